"""The three implementations that `gpt2 verify` compares."""
