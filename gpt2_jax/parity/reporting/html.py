"""The HTML page of a `Report`: its verdict, its checks with the failed ones first, the versions and the device."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gpt2_jax.reporting.markup import Cell, Mark, Number, Table, facts, number
from gpt2_jax.reporting.page import Page, Section

if TYPE_CHECKING:
    from gpt2_jax.parity.reporting.report import Check, Measurement, Report

_COLUMNS = ("result", "measurement", "value", "tolerance", "location")


def to_page(report: Report) -> Page:
    """Arrange a report as a page."""
    checks = sorted(report.checks, key=lambda check: (check.passed, check.skipped))  # stable within each group
    details = [Section("Input", tables=(facts("Input", {"source": report.source, **report.details}),))]
    if report.diagnostics:
        details.append(Section("Diagnostics", paragraphs=report.diagnostics))
    model = {**report.config, **({"fingerprint": report.fingerprint} if report.fingerprint else {})}
    if model:
        details.append(Section("Configuration", tables=(facts("Configuration and fingerprint of the weights", model),)))
    if report.environment:
        details.append(Section("Environment", tables=(facts("Versions and device", report.environment),)))
    return Page(
        f"Parity of {report.source}",
        Mark("passed" if report.passed else "failed", report.verdict),
        tuple(_section(check) for check in checks),
        tuple(details),
    )


def _section(check: Check) -> Section:
    paragraphs = [check.note] if check.note else []
    if check.first_divergence:
        paragraphs.insert(0, f"The first divergence is at {check.first_divergence}.")
    mark = Mark("skipped" if check.skipped else "passed" if check.passed else "failed")
    rows = tuple(_row(measurement) for measurement in check.measurements)
    used = len(_COLUMNS) if any(m.location for m in check.measurements) else len(_COLUMNS) - 1
    table = Table(f"Measurements of {check.name}", _COLUMNS[:used], tuple(row[:used] for row in rows))
    tables = (table,) if rows else ()
    return Section(check.name, mark, tuple(paragraphs), tables, check.plots)


def _row(m: Measurement) -> tuple[Cell, ...]:
    status = Mark("informational", "no limit") if m.tolerance is None else Mark("passed" if m.passed else "failed")
    tolerance = "" if m.tolerance is None else number(m.tolerance)
    return status, m.name, Number(number(m.value)), Number(tolerance), m.location
