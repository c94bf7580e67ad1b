"""Low-rank updates: layers, injection, PEFT's format, exact counts."""
