"""Benchmark cases: a task at a size, and the work it needs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bridge import BridgeError
from gpt2_jax.bench.disk_tasks import write_checkpoint
from gpt2_jax.bench.limits import min_bytes, min_flops
from gpt2_jax.bench.peers import Task
from gpt2_jax.training.config import TrainConfig, flat
from gpt2_jax.training.presets import PRESETS

PROMPT_LEN, NEW_TOKENS = 16, 64
"""Sizes of the decode task. Models with fewer positions use less."""


@dataclass(frozen=True)
class Case:
    """One task at one size. The fields that a task does not use are 0 or None."""

    task: Task
    config: TrainConfig
    batch_size: int = 0
    seq_len: int = 0
    """Tokens per sequence of `train` and `forward`."""
    prompt_len: int = 0
    """Tokens per prompt of `decode`."""
    new_tokens: int = 0
    """Tokens that `decode` generates."""
    directory: str | None = None
    """The checkpoint that `load` and `convert` read."""

    @property
    def unit(self) -> str:
        """The reported times are per this unit."""
        return {"train": "step", "forward": "pass", "decode": "token"}.get(self.task, "run")

    @property
    def tokens(self) -> int | None:
        """Tokens per unit, or None if the task processes no tokens."""
        if self.task in ("load", "convert"):
            return None
        return self.batch_size if self.task == "decode" else self.batch_size * self.seq_len

    @property
    def limited_by(self) -> str | None:
        """The device's rate that limits the task: "flops" or "bytes"."""
        return {"train": "flops", "forward": "flops", "decode": "bytes"}.get(self.task)

    @property
    def work(self) -> float | None:
        """Minimum number of FLOPs or bytes per unit."""
        if self.limited_by is None:
            return None
        if self.task == "decode":
            return float(min_bytes(self.config.model, self.config.dtype))
        return min_flops(self.task, self.config.model, self.batch_size, self.seq_len)

    @property
    def title(self) -> str:
        if self.task == "decode":
            return f"decode, {self.new_tokens} tokens after {self.prompt_len}"
        return self.task if self.tokens is None else f"{self.task}, {self.batch_size} x {self.seq_len}"

    def job(self) -> dict[str, Any]:
        """The case as JSON, for a worker."""
        return {
            "task": self.task,
            "config": flat(self.config),
            "model": vars(self.config.model),
            "dtype": self.config.dtype,
            "batch_size": self.batch_size,
            "seq_len": self.prompt_len or self.seq_len,
            "new_tokens": self.new_tokens,
            "directory": self.directory,
        }


def benchmark_config(preset: str, **changes: Any) -> TrainConfig:
    """The configuration of a preset for benchmarks: AdamW, no dropout, no weight average, one microbatch.

    Args:
        preset: a key of `PRESETS`.
        **changes: fields of `TrainConfig` to replace; None keeps the preset's value.
    """
    if preset not in PRESETS:
        raise BridgeError(f"--preset {preset}: must be one of {', '.join(PRESETS)}")
    config = PRESETS[preset]
    return replace(
        config,
        model=replace(config.model, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0),
        optimizer=replace(config.optimizer, optimizer="adamw", max_grad_norm=1.0),
        batch_size=config.batch_size // config.num_microbatches,
        num_microbatches=1,
        ema_decay=None,
        **{name: value for name, value in changes.items() if value is not None},
    )


def with_sizes(config: TrainConfig, batch_sizes: Sequence[int], seq_lens: Sequence[int]) -> list[TrainConfig]:
    """The configuration with every combination of sizes. An empty sequence means the configuration's own size."""
    positions = config.model.n_positions
    for seq_len in seq_lens:
        if not 1 <= seq_len <= positions:
            raise BridgeError(f"--seq-len {seq_len}: must be from 1 to the model's n_positions, {positions}")
    for batch_size in batch_sizes:
        if batch_size < 1:
            raise BridgeError(f"--batch-size {batch_size}: must be at least 1")
    return [
        replace(config, batch_size=batch_size, seq_len=seq_len)
        for batch_size in batch_sizes or (config.batch_size,)
        for seq_len in seq_lens or (min(config.seq_len, positions),)
    ]


def make_cases(task: Task, configs: Sequence[TrainConfig], scratch: Path) -> Iterator[Case]:
    """The cases of a task: one per configuration for `train` and `forward`, one in total for the other tasks.

    `load` and `convert` read the same checkpoint, which is written to `scratch`.
    """
    if task in ("train", "forward"):
        for config in configs:
            yield Case(task, config, config.batch_size, config.seq_len)
        return
    config = configs[0]
    if task == "decode":
        prompt_len = min(PROMPT_LEN, config.model.n_positions // 2)
        new_tokens = min(NEW_TOKENS, config.model.n_positions - prompt_len)
        yield Case(task, config, 1, prompt_len=prompt_len, new_tokens=new_tokens)
        return
    source = scratch / "model"
    if not source.exists():
        write_checkpoint(source, replace(config.model, bias=True))
    yield Case(task, config, directory=str(source))
