"""Tokenizer files of other tools: one module per kind of file."""
