"""Plot weak scaling: seconds per step, bytes per link, and MFU over the number of chips."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bridge import BridgeError
from gpt2_jax.console.report_files import save_plot
from gpt2_jax.plan.plan import Plan, ScalingPoint
from gpt2_jax.plan.roofline import ASSUMPTIONS


def plot(points: Sequence[ScalingPoint], file: Path, *, overwrite: bool = False) -> None:
    """Write the plot with its assumptions below it. Raises `BridgeError` if the file cannot be written."""
    from matplotlib.figure import Figure

    shown = [(point.plan, point.plan.roofline) for point in points if point.plan and point.plan.roofline]
    if not shown:
        raise BridgeError(f"--plot {file}: none of the sizes fits, so there is nothing to draw")
    figure = Figure(figsize=(11, 4.8))
    axes = figure.subplots(1, 3)
    figure.suptitle(_title(shown[-1][0]), fontsize=10)
    chips = [plan.num_devices for plan, _ in shown]
    lines = [line for _, line in shown]
    times = {
        "communication overlapped": [line.overlapped_seconds for line in lines],
        "communication serial": [line.serial_seconds for line in lines],
    }
    mfu = {
        name: [100 * line.mfu(seconds) for line, seconds in zip(lines, curve, strict=True)]
        for name, curve in times.items()
    }
    _panel(axes[0], chips, "seconds per step", times)
    _panel(axes[1], chips, "MB per link and direction", {"": [line.link_bytes / 1e6 for line in lines]})
    _panel(axes[2], chips, "MFU, % of peak", mfu)
    figure.subplots_adjust(left=0.06, right=0.98, top=0.88, bottom=0.4, wspace=0.25)
    figure.text(0.02, 0.01, _assumptions(), fontsize=6.5, va="bottom")
    save_plot(figure, file, overwrite=overwrite)


def _panel(ax: Any, chips: Sequence[int], title: str, curves: dict[str, list[float]]) -> None:
    for name, values in curves.items():
        ax.plot(chips, values, marker="o", label=name)
    ax.set_xscale("log", base=2)
    ax.set_xticks(chips, [str(count) for count in chips])
    ax.set_ylim(0, 1.1 * max(max(values) for values in curves.values()) or 1.0)
    ax.set_title(title, fontsize=9, loc="left")
    ax.set_xlabel("chips", fontsize=9)
    ax.tick_params(labelsize=8)
    if any(curves):
        ax.legend(fontsize=7)


def _title(plan: Plan) -> str:
    c, chip = plan.config, plan.topology.chip
    rows, name = c.batch_size / plan.num_devices, "" if chip is None else chip.name
    batch = f"{rows:g} x {c.seq_len} tokens per chip and step in {c.num_microbatches} microbatches"
    return f"{c.preset} on {name}: {batch}, estimated"


def _assumptions() -> str:
    return "\n".join(textwrap.fill(f"- {line}", 210, subsequent_indent="  ") for line in ASSUMPTIONS)
