"""Comparison of any two trainers, step by step. The public names are also names of `gpt2_jax.parity`."""
