"""Logs of a run: JSON lines, TensorBoard and Weights & Biases on request, and a plot."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from bridge.errors import escaped, install_command, quoted
from bridge.storage.atomic_writes import new_file
from bridge.storage.regular_file import open_regular_file
from gpt2_jax.console.report_files import save_plot
from gpt2_jax.training.config import TrainConfig, flat
from gpt2_jax.training.errors import TrainingError

METRICS = "metrics.jsonl"
PLOT = "loss.png"
TENSORBOARD = "tensorboard"
WANDB_ID = "wandb-id"
VALIDATION_CHANGED = "validation_changed"
"""The key that marks the first record with a loss of other validation data than that of the records before it."""
_MAX_LINE_BYTES = 2**16
"""Size limit of a line. A record has a few hundred bytes."""
_MAX_DRAWN = 1e300
"""Limit on values: the difference of larger numbers may overflow, which makes matplotlib fail."""


class Metrics:
    """The log of one run: `write` adds a record, `close` flushes. A resumed run appends to it."""

    def __init__(self, run: Path, config: TrainConfig, start_step: int) -> None:
        self._tensorboard = _tensorboard(run) if config.tensorboard else None
        self._wandb = _wandb(run, config, start_step) if config.wandb else None
        self._file = run / METRICS
        _drop_records_after(self._file, start_step)
        with _naming(self._file):
            self._lines = self._file.open("a", encoding="utf-8")

    def write(self, step: int, values: Mapping[str, float | None]) -> None:
        """Write one record: `step`, and every value that is not None."""
        record = {name: value for name, value in values.items() if value is not None}
        with _naming(self._file):
            self._lines.write(json.dumps({"step": step, **record}) + "\n")
            self._lines.flush()
        if self._tensorboard is not None:
            with _naming(self._file.with_name(TENSORBOARD)):
                for name, value in record.items():
                    self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(record, step=step)

    def flush(self) -> None:
        """Wait until the records are on the disk."""
        with _naming(self._file):
            os.fsync(self._lines.fileno())

    def close(self) -> None:
        with _naming(self._file):  # closing retries a failed write, which may raise
            self._lines.close()
        if self._tensorboard is not None:
            with _naming(self._file.with_name(TENSORBOARD)):
                self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Return the records of a run, in order. Skips invalid lines, such as one truncated by a crash.

    There is one record per step: the line of an evaluation that was repeated after a resume is merged into it. Values
    that are not numbers are skipped. Raises `TrainingError` if the file cannot be read.
    """
    records: dict[int, dict[str, Any]] = {}
    for line in _lines_of(run / METRICS):
        record = _record(line)
        if record is not None:
            records.setdefault(record["step"], {}).update(record)
    return list(records.values())


def _lines_of(file: Path) -> Iterator[bytes]:
    """Yield the lines of a file, if it exists. Lines above `_MAX_LINE_BYTES` are split into invalid pieces."""
    try:
        with open_regular_file(file, TrainingError) as lines:
            while line := lines.readline(_MAX_LINE_BYTES):
                yield line
    except FileNotFoundError:
        return
    except OSError as error:
        raise TrainingError(f"cannot read {quoted(file)}: {error.strerror}") from error


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or type(record.get("step")) is not int or not 0 <= record["step"] < 2**31:
        return None
    return {name: value for name, value in record.items() if _is_number(value)}


def _is_number(value: Any) -> bool:
    return type(value) is float or (type(value) is int and abs(value) < 2**63)


def plot_losses(run: Path) -> Path:
    """Draw the training and validation loss over the steps into RUN/loss.png."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # needs no display and no pyplot state
    from matplotlib.figure import Figure

    records = read_metrics(run)
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, label, style in (("train_loss", "training", "-"), ("val_loss", "validation", "o-")):
        points = [(r["step"], r[name]) for r in records if name in r and not abs(r[name]) > _MAX_DRAWN]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=3, linewidth=1)
    axes.set(xlabel="step", ylabel="loss, nats per token")
    axes.set_title(escaped(run.name), parse_math=False)  # dollar signs in a name do not start a formula
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    save_plot(figure, run / PLOT, overwrite=True, dpi=120)
    return run / PLOT


def _drop_records_after(file: Path, step: int) -> None:
    """Remove records after the checkpoint that a run resumes from, because those steps are repeated."""
    kept = [record for record in read_metrics(file.parent) if record["step"] <= step] if step else []
    with new_file(file, overwrite=True) as temporary:
        temporary.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")


@contextmanager
def _naming(file: Path) -> Iterator[None]:
    """Convert an `OSError` from writing, which does not name the file, to a `TrainingError` that does."""
    try:
        yield
    except OSError as error:
        raise TrainingError(f"cannot write {quoted(file)}: {error.strerror or error}") from error


def _tensorboard(run: Path) -> Any:
    with _naming(run / TENSORBOARD):
        return _import_optional("tensorboard.summary", "tensorboard").Writer(str(run / TENSORBOARD))


def _wandb(run: Path, config: TrainConfig, start_step: int) -> Any:
    wandb = _import_optional("wandb", "wandb")
    file = run / WANDB_ID  # a resumed run keeps the same id
    if not (start_step and file.exists()):
        file.write_text(secrets.token_hex(8))
    return wandb.init(
        project=config.wandb,
        name=run.name,
        id=file.read_text(),
        dir=str(run),
        config=flat(config),
        resume="allow",
    )


def require_packages(config: TrainConfig) -> None:
    """Raise `TrainingError` if `--tensorboard` or `--wandb` needs a package that is not installed."""
    if config.tensorboard:
        _import_optional("tensorboard.summary", "tensorboard")
    if config.wandb:
        _import_optional("wandb", "wandb")


def _import_optional(module: str, extra: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise TrainingError(f"--{extra} needs a package that is not installed: {install_command(extra)}") from error
