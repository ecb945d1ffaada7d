"""The command line. Importing it, and refusing wrong options and rows, needs neither torch nor transformers."""
