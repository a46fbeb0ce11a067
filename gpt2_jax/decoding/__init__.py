"""Parts of generation: the state of a decoding loop, decoding in slots, and batch invariance."""
