"""Array functions of the model: attention, linear layers, norms, activations, cross-entropy."""
