"""A run: its settings, what they set up, the folder that keeps it, its resumable state."""
