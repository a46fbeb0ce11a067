"""Bar chart of the median times, with the range over the rounds and the limit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gpt2_jax.bench.report import Report, Result
from gpt2_jax.console.report_files import save_plot

COLORS = {
    "jax": "tab:blue",
    "convert": "tab:blue",
    "torch": "tab:orange",
    "torch-compiled": "tab:red",
    "transformers": "tab:green",
    "transformers-compiled": "tab:olive",
    "cp": "tab:gray",
}


def plot(report: Report, file: Path, *, overwrite: bool = False) -> None:
    """Write the plot. Raises `BridgeError` if the file cannot be written."""
    from matplotlib.figure import Figure

    shown = [result for result in report.results if any(row.seconds for row in result.summaries)]
    figure = Figure(figsize=(7, 0.6 + 2.2 * max(1, len(shown))), layout="constrained")
    axes = figure.subplots(max(1, len(shown)), squeeze=False)[:, 0]
    figure.suptitle(f"{report.config.preset}, {report.config.dtype}, {', '.join(report.devices)}", fontsize=11)
    for ax, result in zip(axes, shown, strict=False):
        _bars(ax, result)
    save_plot(figure, file, overwrite=overwrite)


def _bars(ax: Any, result: Result) -> None:
    rows = [row for row in result.summaries if row.median is not None]
    names = [row.implementation for row in rows]
    medians = [1e3 * (row.median or 0.0) for row in rows]
    below = [middle - 1e3 * min(row.seconds) for middle, row in zip(medians, rows, strict=True)]
    above = [1e3 * max(row.seconds) - middle for middle, row in zip(medians, rows, strict=True)]
    ax.barh(names, medians, xerr=[below, above], color=[COLORS[name] for name in names], capsize=3)
    ax.invert_yaxis()
    if (limit := rows[0].limit_seconds) is not None:
        ax.axvline(1e3 * limit, color="black", linestyle="--", label="limit")
        ax.legend(fontsize=8)
    ax.set_xlim(left=0)
    ax.set_title(result.case.title, fontsize=10, loc="left")
    ax.set_xlabel(f"milliseconds per {result.case.unit}", fontsize=9)
    ax.tick_params(labelsize=9)
