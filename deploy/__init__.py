"""The composition root: the command line, recipes and everything that knows all packages."""
