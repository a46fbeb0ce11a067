"""Tokenizers of checkpoints: one interface, its kinds, loading and saving."""
