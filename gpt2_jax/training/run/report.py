"""What a person sees of a run, and what is logged of it."""

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
from gpt2_jax.parallel.distributed import is_first
from gpt2_jax.training.config import TrainConfig
from gpt2_jax.training.errors import NonFiniteLoss
from gpt2_jax.training.run.metrics import Metrics

MOST_SKIPPED = 100
"""Steps in a row; where so many have no finite loss and gradient, the next will have none either."""


class Report:
    """A bar on standard error where a person is watching, lines on standard output, records in metrics.jsonl.

    Metrics stay on the device until `fetch`, so that nothing waits for each of them. Time that goes into other
    things than training steps is spent inside `not_training`.
    """

    def __init__(
        self,
        out: rich.console.Console,
        run: Path,
        config: TrainConfig,
        start_step: int,
        schedule: Callable[[int], Any],
        devices: int = 1,
    ) -> None:
        self._out, self._config, self._schedule = out, config, schedule
        self._metrics = Metrics(run, config, start_step) if is_first() else None
        self._flops_per_step = flops_per_token(config.model, config.seq_len) * config.batch_size * config.seq_len
        peak, source = peak_flops(config.dtype)
        self._peak = devices * peak
        each = f" on each of {devices} devices" if devices > 1 else ""
        self.say(f"MFU is relative to {peak / 1e12:.3g} TFLOP/s in {config.dtype}{each}, {source}")
        watched = Console(stderr=True)
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
        self._bar = Progress(
            *columns, console=watched, transient=True, disable=not (watched.is_terminal and is_first())
        )
        self._task = self._bar.add_task("compiling", total=config.max_steps, completed=start_step)
        self._pending: list[tuple[int, dict[str, Any]]] = []
        self._skipped_in_a_row = 0
        self._resumed_at: float | None = None  # None until the first step, which compiles, is over
        self._shown = ""

    def say(self, text: str) -> None:
        self._out.print(text, soft_wrap=True)

    def stepped(self, step: int, metrics: dict[str, Any]) -> None:
        """`step` updates have been made; `metrics` are of the last one, still on the device."""
        self._pending.append((step, metrics))

    def fetch(self) -> dict[str, float | None]:
        """The newest step's metrics, once the device has them, and the speed since the last fetch.

        Raises as `require_finite`.
        """
        count, (step, metrics) = len(self._pending), self._pending[-1]
        self.require_finite()
        now = time.perf_counter()
        speed = None if self._resumed_at is None else count / (now - self._resumed_at)
        self._resumed_at = now
        loss, norm, skipped = float(metrics["loss"]), float(metrics["grad_norm"]), int(metrics["skipped"])
        was_skipped = not _are_finite(loss, norm)
        values = {
            "train_loss": None if was_skipped else loss,
            "grad_norm": None if was_skipped else norm,
            "learning_rate": float(self._schedule(max(0, step - skipped - 1))),  # skipped steps have no place in it
            "skipped": skipped if self._config.non_finite == "skip" else None,
            "tokens_per_second": speed and speed * self._config.batch_size * self._config.seq_len,
            "mfu": speed and speed * self._flops_per_step / self._peak,
        }
        self._shown = f"loss {loss:.4f}"
        if speed:
            self._shown += f"  {values['tokens_per_second']:,.0f} tokens/s  MFU {values['mfu']:.0%}"
        self._bar.update(self._task, completed=step, description=self._shown)
        return values

    def require_finite(self) -> None:
        """Look at the steps since the last time; say which of them were skipped.

        Raises `NonFiniteLoss` naming the first that has no finite loss and gradient; where those are skipped, the
        one that is too many in a row.
        """
        pending, self._pending = self._pending, []
        for step, metrics in pending:
            loss, norm = float(metrics["loss"]), float(metrics["grad_norm"])
            what = f"step {step}: loss {loss}, norm of the gradient {norm}"
            if _are_finite(loss, norm):
                self._skipped_in_a_row = 0
            elif self._config.non_finite == "stop":
                raise NonFiniteLoss(what)
            else:
                self._skipped_in_a_row += 1
                self.say(f"{what}; skipped, {int(metrics['skipped'])} in all")
                if self._skipped_in_a_row == MOST_SKIPPED:
                    raise NonFiniteLoss(f"{what}; it is the last of {MOST_SKIPPED} in a row that were skipped")

    def write(self, step: int, values: dict[str, float | None]) -> None:
        """Log a record; say it too where there is a validation loss in it."""
        if self._metrics is not None:
            self._metrics.write(step, values)
        if values.get("val_loss") is not None:
            self.say(f"step {step:>6}  validation loss {values['val_loss']:.4f}  {self._shown}")

    def flush(self) -> None:
        """What was logged is on the disk."""
        if self._metrics is not None:
            self._metrics.flush()

    @contextmanager
    def not_training(self, doing: str) -> Iterator[None]:
        """What happens inside does not count as time of training."""
        self._bar.update(self._task, description=f"{self._shown}  {doing}")
        yield
        if self._resumed_at is not None:
            self._resumed_at = time.perf_counter()
        self._bar.update(self._task, description=self._shown)

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
