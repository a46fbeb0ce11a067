"""Estimates of a training step's memory, communication and time on devices that are not available: `gpt2 plan`."""
