"""The result of `compare_training`."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.text import Text

from gpt2_jax.parity.pairs.training.diagnosis.evidence import Diagnosis
from gpt2_jax.parity.reporting.report import Claim, Report

SAME_TRAINING = Claim(
    "the two trainers take the same steps", "NOT the same training", frozenset({"names", "loss", "update"})
)


@dataclass(frozen=True)
class Departure:
    """The first difference that rounding does not explain."""

    step: int
    """Counted from 1."""
    quantity: str
    """One of `QUANTITIES`."""
    name: str
    """The tensor, by its left name. Empty for the loss."""
    difference: float
    """The largest absolute difference, of sqrt(v) for second moments."""
    bound: float
    """The largest difference there that rounding explains."""

    def __str__(self) -> str:
        return f"step {self.step}, {self.quantity}" + (f" of {self.name}" if self.name else "")


@dataclass(frozen=True)
class Problem:
    """A side that cannot be compared: it raised an error, or returned values that are not finite or other shapes."""

    side: str
    step: int
    message: str

    def __str__(self) -> str:
        return f"{self.side}, step {self.step}: {self.message}"


@dataclass(frozen=True)
class TrainingComparison:
    """The result of `compare_training`."""

    left: str
    right: str
    dtype: str
    losses: tuple[tuple[float, ...], tuple[float, ...]]
    """The losses of both sides, of all steps."""
    report: Report
    departure: Departure | None = None
    diagnosis: Diagnosis | None = None
    problem: Problem | None = None

    @property
    def passed(self) -> bool:
        return self.report.passed and self.departure is None and self.problem is None

    def to_json(self) -> dict[str, Any]:
        """The result as JSON. Values that are not finite are null."""
        return {
            **self.report.to_json(),
            "passed": self.passed,
            "left": self.left,
            "right": self.right,
            "dtype": self.dtype,
            "losses": [[x if math.isfinite(x) else None for x in side] for side in self.losses],
            "departure": None if self.departure is None else _finite(asdict(self.departure)),
            "diagnosis": None if self.diagnosis is None else self.diagnosis.to_json(),
            "problem": None if self.problem is None else asdict(self.problem),
        }

    def show(self, console: Console) -> None:
        """Print the table of measurements, the first difference, and the diagnosis."""
        self.report.show(console)
        if self.problem is not None:
            console.print(Text(str(self.problem), style="bold red"))
        if self.departure is not None:
            console.print(Text(f"The first difference is at {self.departure}.", style="bold red"))
        if self.diagnosis is not None:
            console.print(Text(f"Diagnosis: {self.diagnosis.kind}", style="bold"))
            for sentence in self.diagnosis.evidence:
                console.print(Text(f"  {sentence}"))


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
