"""Corpora as documents: text, mentions as offsets, sentence bounds. Each format is a file."""
