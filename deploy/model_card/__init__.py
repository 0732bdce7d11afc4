"""A model card from the files of a run alone."""
