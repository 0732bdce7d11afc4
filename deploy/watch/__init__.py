"""`flowfleet watch`: a run from its files, in a terminal."""
