"""Benchmarks of training, inference and conversion, compared with other implementations and with device limits."""
