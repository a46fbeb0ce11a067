"""What is compared: one implementation of a model, in PyTorch, in Flax, as a JAX function, or as a saved golden."""
