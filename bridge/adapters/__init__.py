"""Adapters: small sets of weights that change a base model."""
