"""The comparison of two checkpoints, without a framework."""
