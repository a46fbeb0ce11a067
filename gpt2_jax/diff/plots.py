"""The plots of the comparison of tensors: distances by tensor, and the rows that differ."""

from __future__ import annotations

import math

from bridge.comparison import TensorComparison, TensorsComparison
from gpt2_jax.parity.reporting.plots import by_place
from gpt2_jax.reporting.plots import Plot, Series

MOST_BARS = 100
"""Maximum number of bars of a plot of rows. Each bar counts the rows of an equal range."""


def tensor_plots(found: TensorsComparison) -> tuple[Plot, ...]:
    """Plot the relative distance of every tensor, and the number of different rows. Empty if all are identical."""
    if all(tensor.status == "identical" for tensor in found.tensors):
        return ()
    distances = {tensor.name: tensor.values.relative_l2 for tensor in found.tensors}
    title = "Distance of B from A, by tensor"
    plots = [by_place(title, "tensor, in the order of the forward pass", "relative distance", distances)]
    return (*plots, *(_rows(tensor) for tensor in found.tensors if tensor.rows))


def _rows(tensor: TensorComparison) -> Plot:
    """Count the rows of a tensor that differ, in ranges of equal length."""
    common = min(shape[0] for shape in tensor.shapes if shape is not None)
    width = math.ceil(common / MOST_BARS)
    counts = dict.fromkeys(range(0, common, width), 0)
    for start, stop in tensor.rows:
        for first in range(start // width * width, stop, width):
            counts[first] += min(stop, first + width) - max(start, first)
    title = (
        f"Rows of {tensor.name} that differ, per {width:,} rows" if width > 1 else f"Rows of {tensor.name} that differ"
    )
    series = Series(tensor.name, tuple(counts), tuple(map(float, counts.values())))
    return Plot(title, "row", "number of rows", (series,), "bars")
