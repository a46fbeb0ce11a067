"""The table, and the same for machines."""

from __future__ import annotations

import os
import platform
import statistics
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from rich.console import Console
from rich.table import Table

from gpt2_jax.bench.cases import Case
from gpt2_jax.bench.limits import cores
from gpt2_jax.bench.measure import Pair
from gpt2_jax.bench.summary import Summary, summaries
from gpt2_jax.training.config import TrainConfig, flat

PACKAGES = ("gpt2-bridge", "numpy", "jax", "jaxlib", "flax", "optax", "torch", "transformers")
SETTINGS = ("JAX_", "XLA_", "TORCH", "OMP_", "MKL_", "GLIBC_", "CUDA_")
"""How the variables begin that change what these packages do."""

BUSY = 0.3
"""Load average per core from which the times are doubtful: torch's threads wait for each other without sleeping."""

NOT_MEASURED = (
    "reading and tokenising data: every step takes the same tokens, which are in memory",
    "evaluation, logging, checkpoints, accumulation and dropout, which is off everywhere",
    "several devices",
    "a second start: JAX's and torch.compile's caches on the disk are off, so the first run compiles all it needs",
    "files that are not in the page cache: loading reads what was just written",
    "other machines, and what else this one did: pairs alternate against drift, and the range shows the rest",
)


@dataclass(frozen=True)
class Result:
    """One case with all its pairs."""

    case: Case
    pairs: list[Pair]
    without: list[str]
    """Peers that do not have this task."""

    @property
    def summaries(self) -> list[Summary]:
        return summaries(self.case, self.pairs)

    @property
    def rates(self) -> list[float]:
        return [rate for pair in self.pairs for rate in pair.rates]


@dataclass(frozen=True)
class Report:
    config: TrainConfig
    results: list[Result]
    limit_sources: dict[str, str]
    """"flops" or "bytes" -> where the device's rate is from."""
    limit_failure: str | None
    load_before: float | None = None
    """Threads that wanted to compute on the machine in the minute before this began."""

    @property
    def failures(self) -> list[str]:
        """Who died at what, and of what."""
        found = [
            f"{result.case.title}: {measured.implementation}: {measured.failure}"
            for result in self.results
            for pair in result.pairs
            for measured in pair.measured
            if measured.failure is not None
        ]
        return found + ([] if self.limit_failure is None else [f"limits: {self.limit_failure}"])

    @property
    def devices(self) -> list[str]:
        found = [m.device for r in self.results for pair in r.pairs for m in pair.measured if m.device != "disk"]
        return list(dict.fromkeys(device for device in found if device is not None))

    def show(self, out: Console) -> None:
        devices = ", ".join(self.devices) or "no device"
        out.print(f"{self.config.preset} in {self.config.dtype} on {devices}, {cores()} cores", soft_wrap=True)
        if self.load_before is not None and self.load_before > BUSY * cores():
            busy = f"the machine was busy before this began, load average {self.load_before:.1f} on {cores()} cores"
            out.print(f"{busy}: these are not the times of a quiet one", soft_wrap=True)
        for result in self.results:
            out.print()
            out.print(_table(result))
            for line in _remarks(result, self.limit_sources):
                out.print(line, soft_wrap=True)
        out.print("\nNot measured:")
        for line in (*NOT_MEASURED, *_differences(self)):
            out.print(f"- {line}", soft_wrap=True)

    def to_json(self) -> dict[str, Any]:
        """All raw times in seconds, memory in bytes, rates in FLOP/s or bytes a second."""
        return {
            "preset": self.config.preset,
            "dtype": self.config.dtype,
            "config": flat(self.config),
            "devices": self.devices,
            "cores": cores(),
            "load_before": self.load_before,
            "machine": platform.platform(),
            "python": platform.python_version(),
            "versions": _versions(),
            "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith(SETTINGS)},
            "limit_sources": self.limit_sources,
            "results": [_result(result) for result in self.results],
            "failures": self.failures,
            "not_measured": [*NOT_MEASURED, *_differences(self)],
        }


def _table(result: Result) -> Table:
    case = result.case
    unit, factor = _unit(result)
    table = Table(title=case.title, title_justify="left", box=None, pad_edge=False)
    table.add_column("", no_wrap=True)
    headings = [f"{unit} a\n{case.repetition}", "range", "times\nours", "range", "tokens/s", "of\nlimit", "peak\nMiB"]
    for heading in (*headings, "first,\ns", "after\nimports"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in result.summaries:
        if row.median is None:
            table.add_row(row.implementation, "failed")
            continue
        memory = row.peak_bytes if row.device_peak_bytes is None else row.device_peak_bytes
        table.add_row(
            row.implementation,
            f"{factor * row.median:.4g}",
            f"{factor * min(row.seconds):.4g} to {factor * max(row.seconds):.4g}",
            f"{statistics.median(row.ratios):.2f}" if row.ratios else "",
            f"{min(row.ratios):.2f} to {max(row.ratios):.2f}" if row.ratios else "",
            "" if row.tokens_per_second is None else f"{row.tokens_per_second:,.0f}",
            "" if row.share is None else f"{row.share:.0%}",
            "" if memory is None or row.implementation == "cp" else f"{memory / 2**20:,.0f}",
            "" if row.first is None else f"{row.first:.1f}",
            "" if row.first_after_imports is None else f"{row.first_after_imports:.1f}",
        )
    return table


def _unit(result: Result) -> tuple[str, float]:
    """Of the table's times, and how many of it a second has."""
    medians = [row.median for row in result.summaries if row.median is not None]
    return ("s", 1.0) if medians and min(medians) >= 10 else ("ms", 1e3)


def _remarks(result: Result, sources: dict[str, str]) -> list[str]:
    """The limit in words, and who was not there."""
    lines, case, rates = [], result.case, result.rates
    if rates and case.work is not None and case.bound_by is not None:
        rate, source = statistics.median(rates), sources.get(case.bound_by, "measured")
        spread = f"{rate / 1e9:,.4g} ({min(rates) / 1e9:,.4g} to {max(rates) / 1e9:,.4g})"
        what = {
            "flops": f"{case.work / 1e9:,.4g} GFLOP of matrix products and causal attention, at {spread} GFLOP/s",
            "bytes": f"reading {case.work / 1e6:,.4g} MB of weights once, at {spread} GB/s",
        }[case.bound_by]
        lines.append(f"limit: {1e3 * case.work / rate:.4g} ms a {case.repetition}: {what}, {source}")
    for row in result.summaries:
        if row.share is not None and row.share > 1:
            cached = "the weights fit in a cache, which is faster than memory" if case.task == "decode" else "it varies"
            lines.append(f"{row.implementation} is above the limit as it was measured: {cached}")
        if row.failure is not None:
            lines.append(f"{row.implementation} died: {row.failure}")
    if result.without:
        lines.append(f"not in this task: {', '.join(result.without)}")
    return lines


def _differences(report: Report) -> list[str]:
    """In what the implementations of this very report are not quite the same."""
    names = {row.implementation for result in report.results for row in result.summaries}
    lines = []
    if not report.config.model.bias and names & {"transformers", "transformers-compiled"}:
        lines.append("the biases' cost: transformers always has them, and this preset has none")
    if not report.config.model.bias and any(r.case.directory for r in report.results):
        lines.append("a checkpoint without biases: Hugging Face's format has none such, so these files have biases")
    return lines


def _result(result: Result) -> dict[str, Any]:
    case = result.case
    return {
        "task": case.task,
        "batch": case.batch,
        "length": case.length,
        "prompt": case.prompt,
        "repetition": case.repetition,
        "tokens": case.tokens,
        "work": case.work,
        "work_unit": case.bound_by,
        "pairs": [{**asdict(pair), "ratios": pair.ratios} for pair in result.pairs],
        "summary": [{**asdict(row), "median": row.median, "share": row.share} for row in result.summaries],
        "not_in_this_task": result.without,
    }


def system_load() -> float | None:
    """The load average of the last minute; None where the system has none."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):
        return None


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found
