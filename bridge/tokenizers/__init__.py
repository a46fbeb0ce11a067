"""Tokenizers of checkpoints: loading, saving, and the vocabularies that GPT-2 models use."""
