"""What was measured, against what was allowed: for a person at a glance, for a machine as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text


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
    about: dict[str, Any]
    checks: list[Check] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        """Whether every check that was run holds; a report without any proves nothing."""
        return any(c.was_run for c in self.checks) and all(c.holds for c in self.checks)

    def to_json(self) -> dict[str, Any]:
        checks = [
            {
                **asdict(check),
                "holds": check.holds,
                "was_run": check.was_run,
                "measurements": [{**asdict(m), "holds": m.holds} for m in check.measurements],
            }
            for check in self.checks
        ]
        return {"source": self.source, "about": self.about, "holds": self.holds, "checks": checks}

    def show(self, console: Console) -> None:
        console.print(Text.assemble(("Parity of ", "bold"), (self.source, "bold cyan")))
        for name, value in self.about.items():
            console.print(Text(f"  {name}: {value}", style="dim"))
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
                    _mark(m.holds),
                    check.name if k == 0 else "",
                    m.what,
                    f"{m.value:.3g}",
                    "" if m.limit is None else f"{m.limit:.3g}",
                    m.where,
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
        run = [check for check in self.checks if check.was_run]
        if self.holds:
            return Text(f"All {len(run)} checks hold: the two backends are the same function.", style="bold green")
        failed = ", ".join(check.name for check in run if not check.holds)
        return Text(f"NOT the same: {failed or 'nothing was checked'}.", style="bold red")


def _mark(holds: bool) -> Text:
    return Text("✓", style="green") if holds else Text("✗", style="bold red")
