"""Training on documents of log-normal length: tokens per second with padded rows and with packed rows.

    python -m tests.benchmarks.packing [--preset shakespeare] [--seq-len 256] [--batch-size 16] [--steps 4] [--rounds 7]

A token counts if it has a label. The rows alternate between padded documents, packed documents and a stream, which has
no padding and no segments. Ratios are taken within a round, of tokens per second and of tokens per second of processor
time, which depends less on other work. The data are random tokens, read as a run reads them.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import get_args

import jax
import numpy as np

from bridge import IGNORE_INDEX
from gpt2_jax.data import TokenStream, training_batches
from gpt2_jax.data.batches import Examples
from gpt2_jax.data.packing import packing
from gpt2_jax.data.tokens.stream import open_tokens
from gpt2_jax.training import PRESETS, TrainConfig, init_state, make_optimizer, make_train_step
from gpt2_jax.training.state import make_model

DOCUMENTS = 20_000
SIGMA = 1.0
"""Of the logarithm of the length. The median length is a quarter of a row."""


def document_lengths(seq_len: int, number: int = DOCUMENTS) -> np.ndarray:
    return np.random.default_rng(0).lognormal(np.log(seq_len / 4), SIGMA, number).astype(np.int64) + 1


def print_cost_of_packing(seq_len: int = 1024, number: int = 10**6) -> None:
    """Print the processor time to assign many documents to rows, and the size of the result."""
    ends = np.cumsum(document_lengths(seq_len, number))
    start = time.process_time()
    packed = packing(ends, seq_len)
    seconds = time.process_time() - start
    kept = packed.starts.nbytes + packed.lengths.nbytes + packed.ends.nbytes + 8 * number
    padding = 1 - ends[-1] / (len(packed) * seq_len)
    print(f"{number} documents to rows of {seq_len}: {seconds:.1f} s, {kept / 1e6:.1f} MB, padding {padding:.4%}")


def open_documents(directory: Path, lengths: np.ndarray, vocab_size: int) -> TokenStream:
    path = directory / "tokens.bin"
    np.random.default_rng(1).integers(0, vocab_size, lengths.sum(), np.uint16).tofile(path)
    return TokenStream.of(open_tokens(path)[0].files, document_ends=np.cumsum(lengths))


@dataclass(frozen=True)
class Timed:
    """Some training steps: wall time, the time of all processors together, and the labels."""

    seconds: float
    processor_seconds: float
    tokens: int


def timed_steps(config: TrainConfig, stream: TokenStream, examples: Examples, steps: int) -> Callable[[], Timed]:
    """Return a function that trains for some steps."""
    model = make_model(config)
    tx = make_optimizer(config.optimizer, config.max_steps)
    train_step = make_train_step(model, tx)
    batches = training_batches(
        stream, batch_size=config.batch_size, seq_len=config.seq_len, seed=config.seed, examples=examples
    )
    state = init_state(model.init(jax.random.key(0), next(batches)["input_ids"])["params"], tx)

    def run(steps: int = steps) -> Timed:
        nonlocal state
        tokens, start, processor_start = 0, time.perf_counter(), time.process_time()
        for batch in islice(batches, steps):
            state, metrics = train_step(state, batch)
            tokens += int((batch["labels"] != IGNORE_INDEX).sum())
        jax.block_until_ready(metrics)
        return Timed(time.perf_counter() - start, time.process_time() - processor_start, tokens)

    run(2)  # compiles
    return run


def described(values: list[float], digits: int = 2) -> str:
    return f"{statistics.median(values):,.{digits}f} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="shakespeare", choices=PRESETS)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    print_cost_of_packing()
    lengths = document_lengths(options.seq_len)
    start = time.perf_counter()
    rows = len(packing(np.cumsum(lengths), options.seq_len))
    packing_seconds = time.perf_counter() - start
    kept = int(np.minimum(lengths, options.seq_len).sum())
    print(f"{len(lengths)} documents, {lengths.mean():.0f} tokens on average, longest {lengths.max()}")
    print(f"documents: {len(lengths)} rows, padding {1 - kept / (len(lengths) * options.seq_len):.2%}")
    print(
        f"packed: {rows} rows, padding {1 - lengths.sum() / (rows * options.seq_len):.2%}, in {packing_seconds:.2f} s"
    )
    config = replace(
        PRESETS[options.preset], seq_len=options.seq_len, batch_size=options.batch_size, num_microbatches=1
    )
    config = replace(config, model=replace(config.model, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0))
    with tempfile.TemporaryDirectory() as scratch:
        stream = open_documents(Path(scratch), lengths, config.model.vocab_size)
        runs = {kind: timed_steps(config, stream, kind, options.steps) for kind in get_args(Examples)}
        rounds = [{kind: run() for kind, run in runs.items()} for _ in range(options.rounds)]
    for kind in runs:
        milliseconds = [1e3 * found[kind].seconds / options.steps for found in rounds]
        speeds = [found[kind].tokens / found[kind].seconds for found in rounds]
        print(f"{kind:10} ms per step {described(milliseconds, 0)}  tokens per second {described(speeds, 0)}")
    for other in ("documents", "stream"):
        pairs = [(found["packed"], found[other]) for found in rounds]
        wall = [a.tokens / a.seconds / (b.tokens / b.seconds) for a, b in pairs]
        processor = [a.tokens / a.processor_seconds / (b.tokens / b.processor_seconds) for a, b in pairs]
        print(f"packed / {other}: tokens per second {described(wall)}, of processor time {described(processor)}")


if __name__ == "__main__":
    main()
