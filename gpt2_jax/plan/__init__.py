"""What a training step takes on devices that are not here: `gpt2 plan` and its arithmetic."""
