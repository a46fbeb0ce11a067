"""Losses and scores of fine-tuning beside the cross-entropy."""
