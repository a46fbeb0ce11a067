"""Certificates of parity: reference outputs of `gpt2_torch` in a file, against which JAX is checked without PyTorch."""
