"""The directory of a training run: configuration, checkpoints, metrics and the report."""
