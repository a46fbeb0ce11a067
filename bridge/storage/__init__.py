"""Files: atomic writes, manifests, bounded reads, and tensors that are read on access."""
