"""What a trained adapter looks like inside."""
