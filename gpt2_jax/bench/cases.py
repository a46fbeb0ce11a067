"""What is timed: a task at a size, and the work that is in it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bridge import BridgeError
from gpt2_jax.bench.limits import needed_bytes, needed_flops
from gpt2_jax.bench.on_disk import write_checkpoint
from gpt2_jax.bench.peers import Task
from gpt2_jax.training.config import PRESETS, TrainConfig, flat

PROMPT, NEW_TOKENS = 16, 64
"""Of decoding: fewer in a model with fewer positions."""


@dataclass(frozen=True)
class Case:
    """One task at one size. For decode, `batch` rows get `length` new tokens after a prompt of `prompt`."""

    task: Task
    config: TrainConfig
    batch: int
    length: int
    prompt: int = 0
    directory: str | None = None
    """The checkpoint that is loaded or converted."""

    @property
    def repetition(self) -> str:
        """What one of the times is of."""
        return {"train": "step", "forward": "pass", "decode": "token"}.get(self.task, "run")

    @property
    def tokens(self) -> int | None:
        """Tokens in one repetition; None where there are none."""
        if self.task in ("load", "convert"):
            return None
        return self.batch if self.task == "decode" else self.batch * self.length

    @property
    def bound_by(self) -> str | None:
        """The unit of the work that a repetition cannot do without."""
        return {"train": "flops", "forward": "flops", "decode": "bytes"}.get(self.task)

    @property
    def work(self) -> float | None:
        if self.bound_by is None:
            return None
        if self.task == "decode":
            return float(needed_bytes(self.config.model, self.config.dtype))
        return needed_flops(self.task, self.config.model, self.batch, self.length)

    @property
    def title(self) -> str:
        if self.task == "decode":
            return f"decode, {self.length} tokens after {self.prompt}"
        return self.task if self.tokens is None else f"{self.task}, {self.batch} x {self.length}"

    def job(self) -> dict[str, Any]:
        """The same for a worker."""
        length = self.prompt if self.task == "decode" else self.length
        return {
            "task": self.task,
            "config": flat(self.config),
            "model": vars(self.config.model),
            "dtype": self.config.dtype,
            "rows": 0 if self.tokens is None else self.batch,
            "length": length,
            "new": self.length,
            "directory": self.directory,
        }


def recipe(preset: str, **changes: Any) -> TrainConfig:
    """The preset's recipe as it is measured: with AdamW, without dropout, in one part."""
    if preset not in PRESETS:
        raise BridgeError(f"--preset {preset}: must be one of {', '.join(PRESETS)}")
    found = PRESETS[preset]
    given = {name: value for name, value in changes.items() if value is not None}
    return replace(
        found,
        model=replace(found.model, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0),
        optimizer=replace(found.optimizer, optimizer="adamw", max_grad_norm=1.0),
        batch_size=found.batch_size // found.num_microbatches,
        num_microbatches=1,
        ema_decay=None,
        **given,
    )


def at_sizes(config: TrainConfig, batch: Sequence[int], seq_len: Sequence[int]) -> list[TrainConfig]:
    """The configuration at each size that was asked for."""
    positions = config.model.n_positions
    for tokens in seq_len:
        if not 1 <= tokens <= positions:
            raise BridgeError(f"--seq-len {tokens}: must be from 1 to the model's n_positions, {positions}")
    for rows in batch:
        if rows < 1:
            raise BridgeError(f"--batch {rows}: must be at least 1")
    return [
        replace(config, batch_size=rows, seq_len=tokens)
        for rows in batch or (config.batch_size,)
        for tokens in seq_len or (min(config.seq_len, positions),)
    ]


def cases_of(task: Task, configs: Sequence[TrainConfig], scratch: Path) -> Iterator[Case]:
    """train and forward at every size; the others do not depend on it. The checkpoint of `load` and `convert`, one for
    both, is written to `scratch`."""
    if task in ("train", "forward"):
        for config in configs:
            yield Case(task, config, config.batch_size, config.seq_len)
        return
    config = configs[0]
    if task == "decode":
        prompt = min(PROMPT, config.model.n_positions // 2)
        new = min(NEW_TOKENS, config.model.n_positions - prompt)
        yield Case(task, config, 1, new, prompt)
        return
    source = scratch / "model"
    if not source.exists():
        write_checkpoint(source, replace(config.model, bias=True))
    yield Case(task, config, 0, 0, directory=str(source))
