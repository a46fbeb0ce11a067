"""The report of `verify`: measurements, their tolerances and plots, as a table, as JSON and as an HTML page."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from gpt2_jax.reporting.plots import Plot, merged


@dataclass(frozen=True)
class Claim:
    """What a report states in its last line."""

    text: str
    denial: str
    required: frozenset[str]
    """The report makes the claim only if these checks ran and passed."""


SAME_FUNCTION = Claim(
    "the two backends are the same function",
    "NOT the same function",
    frozenset({"logits", "hidden states", "gradients"}),
)
SAME_CLASSIFIER = replace(SAME_FUNCTION, required=SAME_FUNCTION.required | {"classification"})
CERTIFIED = Claim(
    "the JAX model is the certified function",
    "NOT the certified function",
    SAME_FUNCTION.required | {"weights", "configuration"},
)

OF_TEXT = {"prediction", "tokenizer"}
"""Checks of the checkpoint, which can fail although the backends are the same function."""


@dataclass(frozen=True)
class Measurement:
    """One figure. Without a tolerance it is informational and always passes."""

    name: str
    value: float
    tolerance: float | None = None
    location: str = ""
    """The parameter, activation or row with the largest difference, or the first difference of texts."""

    @property
    def passed(self) -> bool:
        return self.tolerance is None or self.value <= self.tolerance  # False for NaN


class Compared(NamedTuple):
    """The result of one comparison: its figures, and plots of the values behind them."""

    measurements: tuple[Measurement, ...]
    plots: tuple[Plot, ...] = ()


@dataclass(frozen=True)
class Check:
    """A check and its measurements. A skipped check has none."""

    name: str
    measurements: tuple[Measurement, ...] = ()
    note: str = ""
    """A remark, or the reason why the check was skipped."""
    first_divergence: str = ""
    """If the check failed: the first activation of the forward pass that differs between the backends."""
    plots: tuple[Plot, ...] = ()

    @classmethod
    def of(cls, name: str, comparisons: Iterable[Compared], note: str = "") -> Check:
        """Make a check of several comparisons. Plots with the same title and axes are joined."""
        found = [*comparisons]
        measurements = tuple(measurement for compared in found for measurement in compared.measurements)
        return cls(name, measurements, note, plots=merged(plot for compared in found for plot in compared.plots))

    @property
    def passed(self) -> bool:
        return all(m.passed for m in self.measurements)

    @property
    def skipped(self) -> bool:
        return not self.measurements

    def to_json(self) -> dict[str, Any]:
        """The check as JSON. Values that are not finite are null."""
        return {
            **asdict(self),
            "passed": self.passed,
            "skipped": self.skipped,
            "measurements": [
                {**asdict(m), "value": m.value if math.isfinite(m.value) else None, "passed": m.passed}
                for m in self.measurements
            ],
            "plots": [plot.to_json() for plot in self.plots],
        }


@dataclass(frozen=True)
class Report:
    """The result of `verify`."""

    source: str
    details: Mapping[str, Any]
    """Descriptions of the model and of the tokens that it ran on."""
    checks: tuple[Check, ...]
    diagnostics: tuple[str, ...] = ()
    """`Checkpoint.diagnostics`."""
    claim: Claim = SAME_FUNCTION
    config: Mapping[str, Any] = field(default_factory=dict)
    """The configuration of the model."""
    fingerprint: str = ""
    """`bridge.fingerprint` of the weights."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """The versions and the device that the report was made with: `gpt2_jax.reporting.environment`."""

    @property
    def passed(self) -> bool:
        """Whether at least one check ran, and all that ran passed."""
        return not all(c.skipped for c in self.checks) and all(c.passed for c in self.checks)

    def to_json(self) -> dict[str, Any]:
        """The report as JSON. Values that are not finite are null."""
        return {
            "source": self.source,
            "details": dict(self.details),
            "diagnostics": list(self.diagnostics),
            "passed": self.passed,
            "checks": [check.to_json() for check in self.checks],
            "config": dict(self.config),
            "fingerprint": self.fingerprint,
            "environment": dict(self.environment),
        }

    def to_html(self) -> str:
        """The report as an HTML page in one file, without scripts. The JSON has every number that it draws."""
        from gpt2_jax.parity.reporting.html import to_page
        from gpt2_jax.reporting.page import render

        return render(to_page(self))

    def show(self, console: Console) -> None:
        console.print(Text.assemble(("Parity of ", "bold"), (self.source, "bold cyan")))
        for name, value in self.details.items():
            console.print(Text(f"  {name}: {value}", style="dim"))
        for warning in self.diagnostics:
            console.print(Text(f"  warning: {warning}", style="yellow"))
        console.print(self._table())
        console.print(Text(self.verdict, style="bold green" if self.passed else "bold red"))

    def _table(self) -> Table:
        table = Table(show_edge=False, pad_edge=False, header_style="bold")
        table.add_column("")
        table.add_column("check", no_wrap=True)
        table.add_column("measurement")
        table.add_column("value", justify="right", no_wrap=True)
        table.add_column("tolerance", justify="right", no_wrap=True)
        table.add_column("location")
        for check in self.checks:
            for k, m in enumerate(check.measurements):
                tolerance = "" if m.tolerance is None else f"{m.tolerance:.4g}"
                name = check.name if k == 0 else ""
                table.add_row(_mark(m), name, m.name, f"{m.value:.4g}", tolerance, Text(m.location))
            if check.skipped:
                table.add_row(Text("-", style="yellow"), check.name, Text(f"skipped: {check.note}", style="yellow"))
            elif check.note:
                table.add_row("", "", Text(check.note, style="dim"))
            if check.first_divergence:
                table.add_row("", "", Text(f"first divergence at {check.first_divergence}", style="bold red"))
            table.add_section()
        return table

    @property
    def verdict(self) -> str:
        """The last line of the report."""
        run = {check.name for check in self.checks if not check.skipped}
        names = ", ".join(check.name for check in self.checks if check.skipped)
        skipped = f" Skipped: {names}." if names else ""
        failed = [check.name for check in self.checks if not check.passed]
        if failed:
            different = "" if OF_TEXT.issuperset(failed) else f"{self.claim.denial}. "
            return f"{different}Failed: {', '.join(failed)}.{skipped}"
        if not run:
            return f"Nothing was checked.{skipped}"
        hold = f"{len(run)} checks hold" if len(run) > 1 else "1 check holds"
        claim = f": {self.claim.text}" if run >= self.claim.required else ""
        return f"{hold}{claim}.{skipped}"


def _mark(measurement: Measurement) -> Text:
    if measurement.tolerance is None:
        return Text("")
    return Text("✓", style="green") if measurement.passed else Text("✗", style="bold red")
