"""The report of `gpt2 bench`, as tables and as JSON."""

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
from gpt2_jax.bench.limits import available_cores
from gpt2_jax.bench.measure import Comparison
from gpt2_jax.bench.summary import Summary, summarize
from gpt2_jax.training.config import TrainConfig, flat

PACKAGES = ("gpt2-bridge", "numpy", "jax", "jaxlib", "flax", "optax", "torch", "transformers")
ENVIRONMENT_PREFIXES = ("JAX_", "XLA_", "TORCH", "OMP_", "MKL_", "GLIBC_", "CUDA_")
"""Prefixes of the environment variables that change the behaviour of these packages."""

BUSY_LOAD = 0.3
"""Load average per core above which times are unreliable, because PyTorch's threads spin while they wait."""

NOT_MEASURED = (
    "reading and tokenising data: every step uses the same tokens, which are in memory",
    "evaluation, logging, checkpoints, microbatches and dropout (off in all implementations)",
    "several devices",
    "a second start: the compilation caches of JAX and torch.compile are off, so the first run compiles everything",
    "files outside the page cache: loading reads a file that was just written",
    "other machines and other load: alternating rounds cancel slow drift, and the ranges show the remaining variation",
)


@dataclass(frozen=True)
class Result:
    """One case with all its comparisons."""

    case: Case
    comparisons: list[Comparison]
    unsupported_peers: list[str]
    """Peers that do not have this task."""

    @property
    def summaries(self) -> list[Summary]:
        return summarize(self.case, self.comparisons)

    @property
    def device_rates(self) -> list[float]:
        return [rate for comparison in self.comparisons for rate in comparison.device_rates]


@dataclass(frozen=True)
class Report:
    config: TrainConfig
    results: list[Result]
    rate_sources: dict[str, str]
    """"flops" or "bytes" -> source of the device's rate."""
    rate_failure: str | None
    """Why the device's rates could not be measured."""
    load_before: float | None = None
    """Load average of the minute before the benchmark started."""

    @property
    def failures(self) -> list[str]:
        """One line per implementation that failed."""
        found = [
            f"{result.case.title}: {measurement.implementation}: {measurement.failure}"
            for result in self.results
            for comparison in result.comparisons
            for measurement in comparison.measurements
            if measurement.failure is not None
        ]
        return found + ([] if self.rate_failure is None else [f"limits: {self.rate_failure}"])

    @property
    def devices(self) -> list[str]:
        measurements = [m for r in self.results for comparison in r.comparisons for m in comparison.measurements]
        return list(dict.fromkeys(m.device for m in measurements if m.device is not None and m.device != "disk"))

    def show(self, out: Console) -> None:
        devices, cores = ", ".join(self.devices) or "no device", available_cores()
        out.print(f"{self.config.preset} in {self.config.dtype} on {devices}, {cores} cores", soft_wrap=True)
        if self.load_before is not None and self.load_before > BUSY_LOAD * cores:
            load = f"load average {self.load_before:.1f} on {cores} cores before the start"
            out.print(f"warning: the machine was busy ({load}), so these times are unreliable", soft_wrap=True)
        for result in self.results:
            out.print()
            out.print(_table(result))
            for line in _remarks(result, self.rate_sources):
                out.print(line, soft_wrap=True)
        out.print("\nNot measured:")
        for line in (*NOT_MEASURED, *_differences(self)):
            out.print(f"- {line}", soft_wrap=True)

    def to_json(self) -> dict[str, Any]:
        """All raw times in seconds, memory in bytes, rates in FLOP/s or bytes/s."""
        return {
            "preset": self.config.preset,
            "dtype": self.config.dtype,
            "config": flat(self.config),
            "devices": self.devices,
            "cores": available_cores(),
            "load_before": self.load_before,
            "machine": platform.platform(),
            "python": platform.python_version(),
            "versions": _versions(),
            "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith(ENVIRONMENT_PREFIXES)},
            "rate_sources": self.rate_sources,
            "results": [_result(result) for result in self.results],
            "failures": self.failures,
            "not_measured": [*NOT_MEASURED, *_differences(self)],
        }


def _table(result: Result) -> Table:
    case = result.case
    unit, factor = _time_unit(result)
    table = Table(title=case.title, title_justify="left", box=None, pad_edge=False)
    table.add_column("", no_wrap=True)
    times = (f"{unit} per\n{case.unit}", "range", "relative\ntime", "range")
    for heading in (*times, "tokens/s", "% of\nlimit", "peak\nMiB", "first\nrun, s", "after\nimports"):
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
            f"{statistics.median(row.relative_times):.2f}" if row.relative_times else "",
            f"{min(row.relative_times):.2f} to {max(row.relative_times):.2f}" if row.relative_times else "",
            "" if row.tokens_per_second is None else f"{row.tokens_per_second:,.0f}",
            "" if row.fraction_of_limit is None else f"{row.fraction_of_limit:.0%}",
            "" if memory is None or row.implementation == "cp" else f"{memory / 2**20:,.0f}",
            "" if row.first_run_seconds is None else f"{row.first_run_seconds:.1f}",
            "" if row.first_run_seconds_after_imports is None else f"{row.first_run_seconds_after_imports:.1f}",
        )
    return table


def _time_unit(result: Result) -> tuple[str, float]:
    """The unit of the table's times, and the number of units in a second."""
    medians = [row.median for row in result.summaries if row.median is not None]
    return ("s", 1.0) if medians and min(medians) >= 10 else ("ms", 1e3)


def _remarks(result: Result, sources: dict[str, str]) -> list[str]:
    """Lines below the table: the limit, failures, and peers without this task."""
    lines = _limit_remark(result, sources)
    for row in result.summaries:
        if row.fraction_of_limit is not None and row.fraction_of_limit > 1:
            is_decode = result.case.task == "decode"
            why = "the weights fit into a cache, which is faster than memory" if is_decode else "the rate varies"
            lines.append(f"{row.implementation} exceeds the measured limit: {why}")
        if row.failure is not None:
            lines.append(f"{row.implementation} failed: {row.failure}")
    if result.unsupported_peers:
        lines.append(f"peers without this task: {', '.join(result.unsupported_peers)}")
    return lines


def _limit_remark(result: Result, sources: dict[str, str]) -> list[str]:
    case, rates = result.case, result.device_rates
    if not rates or case.work is None or case.limited_by is None:
        return []
    rate, source = statistics.median(rates), sources.get(case.limited_by, "measured")
    figures = f"{rate / 1e9:,.4g} ({min(rates) / 1e9:,.4g} to {max(rates) / 1e9:,.4g})"
    work = {
        "flops": f"{case.work / 1e9:,.4g} GFLOP of matrix products and causal attention, at {figures} GFLOP/s",
        "bytes": f"reading {case.work / 1e6:,.4g} MB of weights once, at {figures} GB/s",
    }[case.limited_by]
    return [f"limit: {1e3 * case.work / rate:.4g} ms per {case.unit}: {work}, {source}"]


def _differences(report: Report) -> list[str]:
    """Differences between the implementations of this report."""
    names = {row.implementation for result in report.results for row in result.summaries}
    lines = []
    if not report.config.model.bias and names & {"transformers", "transformers-compiled"}:
        lines.append("the cost of biases: transformers always has them, and this preset has none")
    if not report.config.model.bias and any(r.case.directory for r in report.results):
        lines.append("a checkpoint without biases: Hugging Face's format requires them, so these files have biases")
    return lines


def _result(result: Result) -> dict[str, Any]:
    case = result.case
    return {
        "task": case.task,
        "batch_size": case.batch_size,
        "seq_len": case.seq_len,
        "prompt_len": case.prompt_len,
        "new_tokens": case.new_tokens,
        "unit": case.unit,
        "tokens": case.tokens,
        "work": case.work,
        "work_unit": case.limited_by,
        "comparisons": [{**asdict(c), "relative_times": c.relative_times} for c in result.comparisons],
        "summary": [
            {**asdict(row), "median": row.median, "fraction_of_limit": row.fraction_of_limit}
            for row in result.summaries
        ],
        "unsupported_peers": result.unsupported_peers,
    }


def system_load() -> float | None:
    """Load average of the last minute, or None if the system does not report it."""
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
