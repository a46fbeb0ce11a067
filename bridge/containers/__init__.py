"""File containers that hold tensors: safetensors, GGUF, msgpack, torch.save archives, TensorFlow bundles, OCDBT."""
