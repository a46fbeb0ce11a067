"""Text generation without a framework: the configuration, the decoding loop, beam search, and text."""
