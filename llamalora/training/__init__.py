"""From examples to a trained model: batches, steps, the loop, and the memory that it needs."""
