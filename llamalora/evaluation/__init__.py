"""Decoding, answers, scores."""
