"""Functions of arrays that the model is made of, in forms that XLA runs fast on each platform.

XLA on CPU runs the plain form of some of them slowly. Their forms here were measured at nanoGPT's CPU size in the
training step (`gpt2 bench --preset shakespeare-char`), and at 124M parameters in generation
(`tests/benchmarks/generate.py`).
"""
