"""Very small training runs."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

import bridge
from bridge import GPT2Config
from gpt2_jax.data import Data, open_data
from gpt2_jax.training import OptimizerConfig, Outcome, TrainConfig, loop, resolve_config, train
from gpt2_jax.training.config import flat, from_flat
from gpt2_jax.training.run.metrics import read_metrics

SPEEDS = ("tokens_per_second", "mfu")

RECIPE = TrainConfig(
    model=GPT2Config(vocab_size=257, n_positions=16, n_embd=24, n_layer=2, n_head=3, n_inner=40, bias=False),
    optimizer=OptimizerConfig(learning_rate=1e-2, min_learning_rate=1e-3, warmup_steps=2),
    tokenizer="bytes",
    max_steps=6,
    batch_size=4,
    seq_len=12,
    eval_every=4,
    eval_batches=2,
    sample_tokens=0,
    log_every=2,
    checkpoint_every=3,
    vocab_multiple=128,
)


def recipe(**changes: Any) -> TrainConfig:
    """Return RECIPE with changed fields. Keywords are names of flags."""
    return from_flat({**flat(RECIPE), **changes})


def write_text(directory: Path, lines: int = 120) -> Path:
    """Write a few kB of text that is easy to learn. Its lines are pairwise different."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "text.txt"
    path.write_text("".join(f"line {i} says that {i} times {i} is {i * i};\n" for i in range(lines)))
    return path


def data_for(config: TrainConfig, directory: Path) -> Data:
    """Return the data of the configuration. Without a file name, it is a generated text in `directory`."""
    text = directory / "text.txt"
    return open_data(
        config.data if config.data != "stdlib" else text if text.exists() else write_text(directory),
        tokenizer=config.tokenizer,
        vocab_size=config.model.vocab_size,
        validation_fraction=config.validation_fraction,
        cache=directory / "cache",
    )


def run_in(directory: Path, config: TrainConfig, name: str = "run", **options: Any) -> Outcome:
    """Train as `gpt2 train` does, without output, in `directory`/`name`."""
    data = data_for(config, directory)
    config = resolve_config(config, data, options.get("init_from"))
    return train(config, directory / name, data, console=Console(file=io.StringIO()), **options)


def records(run: Path) -> list[dict[str, Any]]:
    """Return the log of a run without speeds, which vary between runs."""
    return [{k: v for k, v in record.items() if k not in SPEEDS} for record in read_metrics(run)]


def files(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def all_weights(source: Path) -> dict[str, np.ndarray]:
    return dict(bridge.load(source).tensors.items())


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int, act: Callable[[], Any]) -> None:
    """Call `act` when the batch of `step` is read."""
    inner = loop.training_batches

    def batches(*args: Any, start_step: int, **options: Any) -> Iterator[Any]:
        for number, batch in enumerate(inner(*args, start_step=start_step, **options), start=start_step + 1):
            if number == step:
                act()
            yield batch

    monkeypatch.setattr(loop, "training_batches", batches)
