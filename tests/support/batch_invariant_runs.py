"""Generate the same rows alone, in batches and in pieces, and print the bits of the results as JSON.

    NPROC=1 python -m support.batch_invariant_runs float32

Each name has the results that must have the same bits, except `without batch_invariant`, which shows that they would
differ.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from support.models import random_checkpoint

import gpt2_jax
from bridge import GenerationConfig, GPT2Config
from bridge.generation.output import GenerationOutput

CONFIG = GPT2Config(vocab_size=1024, n_positions=256, n_embd=160, n_layer=2, n_head=4)
ROWS = 19
"""More than `SLOTS`."""
NEW = 6
DECODING: Mapping[str, dict[str, Any]] = {
    "greedy": {},
    "two samples": {"temperature": 0.9, "top_p": 0.9, "repetition_penalty": 1.3, "num_return_sequences": 2},
}


def bits(output: GenerationOutput) -> str:
    return np.asarray(output.ids, np.int32).tobytes().hex() + np.asarray(output.logprobs, np.float32).tobytes().hex()


def main(dtype: str) -> None:
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, CONFIG.vocab_size, n).tolist() for n in [1, 2, *rng.integers(1, 240, ROWS - 3), 127]]
    model, params = gpt2_jax.model_from_checkpoint(random_checkpoint(CONFIG), vocab_multiple=64)
    plain = gpt2_jax.Decoder(model, params, dtype=jnp.dtype(dtype))
    decoder = gpt2_jax.Decoder(model, params, dtype=jnp.dtype(dtype), batch_invariant=True)
    results: dict[str, list[str]] = {}
    for name, fields in DECODING.items():
        config = GenerationConfig(NEW, logprobs=True, eos_token_id=(7, 8, 9), **fields)
        together = decoder.generate(rows, config)
        for i in (0, 2, ROWS - 1):
            alone, three = decoder.generate([rows[i]], config), decoder.generate([rows[5], rows[i], rows[1]], config)
            for k, output in enumerate(alone[0]):
                scored = decoder.token_logprobs([rows[i] + output.ids])[0][len(rows[i]) - 1 :]
                uncached = GenerationOutput(output.ids, scored.tolist())
                results[f"{name}, row {i}, {k}"] = [*map(bits, (output, together[i][k], three[1][k], uncached))]
    config = GenerationConfig(NEW, logprobs=True)
    results["in pieces"] = [_in_pieces(decoder.slots, rows[-1], pieces) for pieces in ((127,), (1,) * 127, (50, 3, 74))]
    results["streamed"] = [_streamed(decoder, rows[:5], config, size) for size in (None, 1, 4)]
    slid = GenerationConfig(20, logprobs=True, slide=True)
    long = rng.integers(0, CONFIG.vocab_size, 250).tolist()
    results["slid"] = [bits(decoder.generate(batch, slid)[0][0]) for batch in ([long], [long, rows[0], rows[3]])]
    results["without batch_invariant"] = [bits(plain.generate(batch, config)[0][0]) for batch in ([rows[2]], rows[2:5])]
    print(json.dumps(results))


def _in_pieces(slots: Any, row: list[int], pieces: tuple[int, ...]) -> str:
    cache, begin, found = slots.empty_cache(1, len(row)), 0, []
    for length in pieces:
        end = begin + length
        x_ND, cache = slots.hidden(row[begin:end], [0] * length, range(begin, end), cache)
        found.append(x_ND)
        begin = end
    return np.concatenate(found).tobytes().hex()


def _streamed(decoder: Any, rows: list[list[int]], config: GenerationConfig, size: int | None) -> str:
    chunks = [*decoder.stream(rows, config, size)]
    ids, logprobs = (
        np.concatenate(parts, axis=1) for parts in zip(*((c.ids, c.logprobs) for c in chunks), strict=True)
    )
    return (ids.tobytes() + logprobs.tobytes()).hex()


if __name__ == "__main__":
    main(*sys.argv[1:])
