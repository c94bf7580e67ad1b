"""`llamalora COMMAND`, a file each; `stats` and `tables` are in `paper/`."""
