"""The array functions that make up the model, in forms that XLA runs fast on each platform.

XLA on CPU runs the textbook form of some of them slowly. The forms used here were measured at nanoGPT's CPU size in the
training step (`gpt2 bench --preset shakespeare-char`), and at 124M parameters in generation
(`tests/benchmarks/generate.py`).
"""
