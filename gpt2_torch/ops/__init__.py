"""Functions of tensors that the model is made of."""
