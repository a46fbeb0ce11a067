"""Speed of generation with a model of OpenAI's size: gpt2_jax, gpt2_torch and transformers.

    python -m tests.benchmarks.generate [--size gpt2] [--dtype float32] [--rounds 5]

Greedy generation in one process; the implementations alternate. The benchmark prints medians and ranges. The limit is
the time of reading the weights once, at the bandwidth measured in the same run. On GPUs, transformers also runs with
its compiled static cache.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

import gpt2_jax
import gpt2_torch
from bridge import GPT2_SIZES, Checkpoint, GenerationConfig
from gpt2_jax.bench.jax_tasks import DECODE_VOCAB_MULTIPLE
from gpt2_jax.bench.limits import min_bytes, read_rate
from gpt2_jax.bench.torch_tasks import DEVICE, generate_with_transformers

PROMPT_LENGTH, NEW_TOKENS = 16, 128
LONG_PROMPT = 512
ROWS = (1, 8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=GPT2_SIZES, default="gpt2")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    peers = make_peers(options.size, options.dtype)
    weights = min_bytes(GPT2_SIZES[options.size], options.dtype)
    print(f"{options.size}, {options.dtype}, {jax.devices()[0].device_kind}; {NEW_TOKENS} tokens after {PROMPT_LENGTH}")
    for rows in ROWS:
        times, bandwidths = measured(peers, rows, PROMPT_LENGTH, NEW_TOKENS, options.rounds)
        first, _ = measured(peers, rows, PROMPT_LENGTH, 1, options.rounds)
        limit = weights / statistics.median(bandwidths)
        print(f"\n{rows} rows; reading the weights once takes {limit * 1e3:.1f} ms at {weights / limit / 1e9:.1f} GB/s")
        for name, seconds in times.items():
            report(name, seconds, times["transformers"], rows)
            further = (statistics.median(seconds) - statistics.median(first[name])) / (NEW_TOKENS - 1)
            print(f"{'':<22} {further * 1e3:6.1f} ms per token after the first: {limit / further:.0%} of the limit")
    times, _ = measured(peers, 1, LONG_PROMPT, 1, options.rounds)
    print(f"\nthe first token of a prompt of {LONG_PROMPT}")
    for name, seconds in times.items():
        ratio = statistics.median(t / s for t, s in zip(times["transformers"], seconds, strict=True))
        print(f"{name:<22} {statistics.median(seconds) * 1e3:7.0f} ms  {ratio:.2f} times transformers' speed")


def report(name: str, seconds: list[float], reference: list[float], rows: int) -> None:
    middle, ratios = statistics.median(seconds), sorted(r / s for r, s in zip(reference, seconds, strict=True))
    print(
        f"{name:<22} {middle / NEW_TOKENS * 1e3:6.1f} ms per token  {rows * NEW_TOKENS / middle:7.1f} tokens/s  "
        f"{statistics.median(ratios):.2f} times transformers' speed ({ratios[0]:.2f} to {ratios[-1]:.2f})"
    )


Peer = Callable[[list[list[int]], int], Any]


def measured(
    peers: dict[str, Peer], rows: int, length: int, new: int, rounds: int
) -> tuple[dict[str, list[float]], list[float]]:
    """Seconds of each call, and read bandwidths measured in between, in bytes/s."""
    prompts = np.random.default_rng(0).integers(0, 50257, (rows, length)).tolist()
    for run in peers.values():
        run(prompts, new)  # compiles
    times: dict[str, list[float]] = {name: [] for name in peers}
    bandwidths = []
    for _ in range(rounds):
        for name, run in peers.items():
            began = time.perf_counter()
            run(prompts, new)
            times[name].append(time.perf_counter() - began)
        bandwidths.append(read_rate()[0])
    return times, bandwidths


def make_peers(size: str, dtype: str) -> dict[str, Peer]:
    torch.manual_seed(0)
    hf = transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2_SIZES[size].to_hf())).eval()
    state = {name.removeprefix("transformer."): p.detach().numpy() for name, p in hf.named_parameters()}
    checkpoint = Checkpoint.of(state, GPT2_SIZES[size])
    model, params = gpt2_jax.model_from_checkpoint(checkpoint, vocab_multiple=DECODE_VOCAB_MULTIPLE)
    jax_decoder = gpt2_jax.Decoder(model, params, dtype=jnp.dtype(dtype))
    torch_dtype = getattr(torch, dtype)
    torch_decoder = gpt2_torch.Decoder(gpt2_torch.model_from_checkpoint(checkpoint).to(DEVICE, torch_dtype))
    hf = hf.to(DEVICE, torch_dtype)

    peers: dict[str, Peer] = {
        "transformers": lambda prompts, new: generate_with_transformers(hf, prompts, new),
        "gpt2_torch": lambda prompts, new: torch_decoder.generate(prompts, GenerationConfig(new)),
        "gpt2_jax": lambda prompts, new: jax_decoder.generate(prompts, GenerationConfig(new)),
    }
    if DEVICE == "cuda":
        peers["transformers, static"] = lambda prompts, new: generate_with_transformers(
            hf, prompts, new, cache_implementation="static"
        )
    return peers


if __name__ == "__main__":
    main()
