"""Llama-2 by hand, and its checkpoints. It knows nothing of LoRA."""
