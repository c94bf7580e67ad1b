"""`python -m llamalora COMMAND`: a file each."""
