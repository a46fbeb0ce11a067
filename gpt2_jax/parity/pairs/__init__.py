"""Comparison of any two implementations of a model: a PyTorch module, a Flax module, a JAX function, or a saved golden.

`compare` runs both sides on the same inputs. The public names are also names of `gpt2_jax.parity`.
"""
