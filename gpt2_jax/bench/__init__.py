"""Benchmarks of training, inference and conversion beside other implementations."""
