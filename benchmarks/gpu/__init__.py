"""Scripts for a machine with a GPU."""
