"""Losses and metrics for fine-tuning, other than the cross-entropy."""
