"""Progress and logs of a run: a progress bar, printed lines, and records in metrics.jsonl."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import rich.console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from gpt2_jax.console.terminal import Console
from gpt2_jax.hardware import flops_per_token, peak_flops
from gpt2_jax.parallel.distributed import broadcast_from_first, is_first
from gpt2_jax.training.config import TrainConfig
from gpt2_jax.training.errors import NonFiniteLoss
from gpt2_jax.training.run.metrics import VALIDATION_CHANGED, Metrics, read_metrics

MAX_SKIPPED_IN_A_ROW = 100
"""The run ends after this many consecutive steps without a finite loss and gradient: it will not recover."""


class Report:
    """A progress bar on standard error if that is a terminal, lines on standard output, and records in metrics.jsonl.

    Metrics stay on the device until `fetch`, so that the host does not wait for every step. Work that is not a training
    step runs inside `not_training`, which excludes its time from the speed.

    Args:
        out: the console for printed lines.
        schedule: step -> learning rate.
        devices: the number of devices of the mesh, for the MFU.
        trained: the fraction of the weights that are trained, for the MFU.
    """

    def __init__(
        self,
        out: rich.console.Console,
        run: Path,
        config: TrainConfig,
        start_step: int,
        schedule: Callable[[int], Any],
        devices: int = 1,
        trained: float = 1.0,
    ) -> None:
        self._out, self._run, self._config, self._schedule = out, run, config, schedule
        self._metrics = Metrics(run, config, start_step) if is_first() else None
        tokens_per_step = config.batch_size * config.seq_len
        self._flops_per_step = flops_per_token(config.model, config.seq_len, trained) * tokens_per_step
        peak, source = peak_flops(config.dtype)
        self._peak = devices * peak
        each = f" on each of {devices} devices" if devices > 1 else ""
        self.say(f"MFU is relative to {peak / 1e12:.3g} TFLOP/s in {config.dtype}{each}, {source}")
        terminal = Console(stderr=True)
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
        self._bar = Progress(
            *columns, console=terminal, transient=True, disable=not (terminal.is_interactive and is_first())
        )
        self._task = self._bar.add_task("compiling", total=config.max_steps, completed=start_step)
        self._pending: list[tuple[int, dict[str, Any]]] = []
        self._skipped_in_a_row = 0
        self._timed_since: float | None = None  # None until the first step is over, because it includes compilation
        self._status = ""

    def say(self, text: str) -> None:
        self._out.print(text, soft_wrap=True)

    def stepped(self, step: int, metrics: dict[str, Any]) -> None:
        """Register the metrics of a step, which are still on the device. `step` counts from 1."""
        self._pending.append((step, metrics))

    def fetch(self) -> dict[str, float | None]:
        """Wait for the newest step; return its metrics and the speed since the last fetch.

        Raises as `require_finite`.
        """
        count, (step, metrics) = len(self._pending), self._pending[-1]
        self.require_finite()
        now = time.perf_counter()
        speed = None if self._timed_since is None else count / (now - self._timed_since)
        self._timed_since = now
        loss, norm, skipped = float(metrics["loss"]), float(metrics["grad_norm"]), int(metrics["skipped"])
        was_skipped = not _are_finite(loss, norm)
        values = {
            "train_loss": None if was_skipped else loss,
            "grad_norm": None if was_skipped else norm,
            # Skipped steps do not advance the schedule.
            "learning_rate": float(self._schedule(max(0, step - skipped - 1))),
            "skipped": skipped if self._config.non_finite == "skip" else None,
            "tokens_per_second": speed and speed * self._config.batch_size * self._config.seq_len,
            "mfu": speed and speed * self._flops_per_step / self._peak,
        }
        self._status = f"loss {loss:.4f}"
        if speed:
            self._status += f"  {values['tokens_per_second']:,.0f} tokens/s  MFU {values['mfu']:.0%}"
        self._bar.update(self._task, completed=step, description=self._status)
        return values

    def require_finite(self) -> None:
        """Check the steps since the last call, and print which of them were skipped.

        Raises:
            NonFiniteLoss: with `--non-finite stop`, for the first step without a finite loss and gradient; with `skip`,
                for the last of `MAX_SKIPPED_IN_A_ROW` such steps.
        """
        pending, self._pending = self._pending, []
        for step, metrics in pending:
            loss, norm = float(metrics["loss"]), float(metrics["grad_norm"])
            what = f"step {step}: loss {loss}, gradient norm {norm}"
            if _are_finite(loss, norm):
                self._skipped_in_a_row = 0
            elif self._config.non_finite == "stop":
                raise NonFiniteLoss(what)
            else:
                self._skipped_in_a_row += 1
                self.say(f"{what}; skipped, {int(metrics['skipped'])} in total")
                if self._skipped_in_a_row == MAX_SKIPPED_IN_A_ROW:
                    raise NonFiniteLoss(f"{what}; {MAX_SKIPPED_IN_A_ROW} consecutive steps were skipped")

    def write(self, step: int, values: dict[str, float | None]) -> None:
        """Log a record, and print its validation loss if it has one."""
        if self._metrics is not None:
            self._metrics.write(step, values)
        if values.get("val_loss") is not None:
            sets = {name.partition("/")[2]: loss for name, loss in values.items() if name.startswith("val_loss/")}
            each = f" ({', '.join(f'{name} {loss:.4f}' for name, loss in sets.items())})" if sets else ""
            self.say(f"step {step:>6}  validation loss {values['val_loss']:.4f}{each}  {self._status}")

    def validation_losses(self) -> list[float]:
        """Return the losses of the run so far on its present validation data, in order."""
        records = read_metrics(self._run) if is_first() else []
        start = max((i for i, record in enumerate(records) if VALIDATION_CHANGED in record), default=0)
        return broadcast_from_first([record["val_loss"] for record in records[start:] if "val_loss" in record])

    def flush(self) -> None:
        """Wait until all logged records are on the disk."""
        if self._metrics is not None:
            self._metrics.flush()

    @contextmanager
    def not_training(self, activity: str) -> Iterator[None]:
        """Exclude the time of a block from the training speed. `activity` is shown in the progress bar."""
        self._bar.update(self._task, description=f"{self._status}  {activity}")
        yield
        if self._timed_since is not None:
            self._timed_since = time.perf_counter()
        self._bar.update(self._task, description=self._status)

    def __enter__(self) -> Report:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()
        if self._metrics is not None:
            self._metrics.close()


def _are_finite(loss: float, norm: float) -> bool:
    return math.isfinite(loss) and math.isfinite(norm)
