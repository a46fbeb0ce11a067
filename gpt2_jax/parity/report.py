"""What was measured, against what was allowed: for a person at a glance, for a machine as JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

PROOF = {"logits", "hidden states", "gradients"}
"""The checks without which nothing is said of the backends being the same function."""


@dataclass(frozen=True)
class Measurement:
    """One figure. Without a limit it is for information and always holds."""

    what: str
    value: float
    limit: float | None = None
    where: str = ""

    @property
    def holds(self) -> bool:
        return self.limit is None or self.value <= self.limit  # NaN holds nowhere


@dataclass(frozen=True)
class Check:
    """One question and the measurements that answer it; no measurements means it was not asked."""

    name: str
    measurements: tuple[Measurement, ...] = ()
    note: str = ""
    departs_at: str = ""
    """On a failure, the first place where the port leaves the reference."""

    @property
    def holds(self) -> bool:
        return all(m.holds for m in self.measurements)

    @property
    def was_run(self) -> bool:
        return bool(self.measurements)


@dataclass(frozen=True)
class Report:
    """The answer of `verify`."""

    source: str
    about: Mapping[str, Any]
    checks: tuple[Check, ...]
    diagnostics: tuple[str, ...] = ()
    """`Checkpoint.diagnostics`."""

    @property
    def holds(self) -> bool:
        """Whether every check that was run holds; a report without any proves nothing."""
        return any(c.was_run for c in self.checks) and all(c.holds for c in self.checks)

    def to_json(self) -> dict[str, Any]:
        """For machines; a value that is not finite, which JSON cannot say, is null."""
        checks = [
            {
                **asdict(check),
                "holds": check.holds,
                "was_run": check.was_run,
                "measurements": [
                    {**asdict(m), "value": m.value if math.isfinite(m.value) else None, "holds": m.holds}
                    for m in check.measurements
                ],
            }
            for check in self.checks
        ]
        return {
            "source": self.source,
            "about": dict(self.about),
            "diagnostics": list(self.diagnostics),
            "holds": self.holds,
            "checks": checks,
        }

    def show(self, console: Console) -> None:
        console.print(Text.assemble(("Parity of ", "bold"), (self.source, "bold cyan")))
        for name, value in self.about.items():
            console.print(Text(f"  {name}: {value}", style="dim"))
        for warning in self.diagnostics:
            console.print(Text(f"  warning: {warning}", style="yellow"))
        table = Table(show_edge=False, pad_edge=False, header_style="bold")
        table.add_column("")
        table.add_column("check", no_wrap=True)
        table.add_column("measured")
        table.add_column("value", justify="right", no_wrap=True)
        table.add_column("allowed", justify="right", no_wrap=True)
        table.add_column("where")
        for check in self.checks:
            for k, m in enumerate(check.measurements):
                table.add_row(
                    _mark(m),
                    check.name if k == 0 else "",
                    m.what,
                    f"{m.value:.4g}",
                    "" if m.limit is None else f"{m.limit:.4g}",
                    Text(m.where),
                )
            if not check.was_run:
                table.add_row(Text("-", style="yellow"), check.name, Text(f"not run: {check.note}", style="yellow"))
            elif check.note:
                table.add_row("", "", Text(check.note, style="dim"))
            if check.departs_at:
                table.add_row("", "", Text(f"departs at {check.departs_at}", style="bold red"))
            table.add_section()
        console.print(table)
        console.print(self._verdict())

    def _verdict(self) -> Text:
        run = {check.name for check in self.checks if check.was_run}
        left_out = ", ".join(check.name for check in self.checks if not check.was_run)
        besides = f" Not run: {left_out}." if left_out else ""
        failed = [check.name for check in self.checks if not check.holds]
        if failed:
            different = "" if failed == ["prediction"] else "NOT the same function. "
            return Text(f"{different}Failed: {', '.join(failed)}.{besides}", style="bold red")
        if not run:
            return Text(f"Nothing was checked.{besides}", style="bold red")
        holds = f"{len(run)} checks hold" if len(run) > 1 else "1 check holds"
        claim = ": the two backends are the same function." if run >= PROOF else "."
        return Text(f"{holds}{claim}{besides}", style="bold green")


def _mark(measurement: Measurement) -> Text:
    if measurement.limit is None:
        return Text("")
    return Text("✓", style="green") if measurement.holds else Text("✗", style="bold red")
