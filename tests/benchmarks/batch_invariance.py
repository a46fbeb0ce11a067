"""What batch-invariant decoding costs, with a model of OpenAI's size on one CPU thread.

    NPROC=1 python -m tests.benchmarks.batch_invariance [--new-tokens 24] [--rounds 5]

Greedy generation with 124M random float32 parameters, with and without `batch_invariant`. The two alternate; the
benchmark prints medians and the range of the pairs.
"""

from __future__ import annotations

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

import gpt2_jax
from bridge import GenerationConfig, GPT2Config
from gpt2_jax.bench.jax_tasks import DECODE_VOCAB_MULTIPLE

PROMPT_LENGTH, LONG_PROMPT = 16, 256
ROWS = (1, 8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    model = gpt2_jax.GPT2(GPT2Config(), vocab_multiple=DECODE_VOCAB_MULTIPLE)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    plain, invariant = (gpt2_jax.Decoder(model, params, batch_invariant=value) for value in (False, True))
    decoders = {"plain": plain, "invariant": invariant}
    rng, new = np.random.default_rng(0), options.new_tokens
    cases = {f"{r} rows": (rng.integers(0, 50257, (r, PROMPT_LENGTH)).tolist(), new) for r in ROWS}
    cases[f"a prompt of {LONG_PROMPT}, one new token"] = rng.integers(0, 50257, (1, LONG_PROMPT)).tolist(), 1
    for case, (prompts, count) in cases.items():
        config, times = GenerationConfig(count), {name: [] for name in decoders}
        for decoder in decoders.values():
            decoder.generate(prompts, config)  # compiles
        for _ in range(options.rounds):
            for name, decoder in decoders.items():
                began = time.perf_counter()
                decoder.generate(prompts, config)
                times[name].append(time.perf_counter() - began)
        tokens = len(prompts) * count
        rates = [tokens / statistics.median(each) for each in times.values()]
        ratios = sorted(a / b for a, b in zip(*times.values(), strict=True))
        ratio = f"{statistics.median(ratios):.2f} times the speed ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        print(f"{case}: {rates[0]:.1f} tokens/s, batch-invariant {rates[1]:.1f}: {ratio}", flush=True)


if __name__ == "__main__":
    main()
