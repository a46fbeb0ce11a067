"""The functions of tensors from which the model is built."""
