"""Plots as data. A report keeps them, its JSON contains them, and `drawing` draws them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

Kind = Literal["line", "dots", "sorted", "bars"]
"""`line`: a line through the points, in the order of x. `dots`: the points. `sorted`: the values in increasing order,
so that x only names them. `bars`: a bar for each point."""

Scale = Literal["log", "linear"]


@dataclass(frozen=True)
class Series:
    """Values over numbers or names.

    >>> Series("fp64", (0, 1), (1e-15, 3e-15), bound=1e-10).largest
    (3e-15, 1)
    """

    name: str
    x: tuple[float | str, ...]
    y: tuple[float, ...]
    bound: float | None = None
    """The tolerance of the values, if they have one."""

    def __post_init__(self) -> None:
        if len(self.x) != len(self.y):
            raise ValueError(f"series {self.name!r} has {len(self.x)} values of x and {len(self.y)} of y")

    @property
    def largest(self) -> tuple[float, float | str] | None:
        """The largest finite value and its x, or None if no value is finite."""
        finite = [(y, x) for x, y in zip(self.x, self.y, strict=True) if math.isfinite(y)]
        return max(finite, key=lambda pair: pair[0], default=None)


@dataclass(frozen=True)
class Plot:
    """Series with common axes."""

    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    kind: Kind = "line"
    scale: Scale = "log"
    order: tuple[str, ...] = ()
    """The names on the x axis from left to right. The default is the order in which the series use them."""

    def __post_init__(self) -> None:
        if not self.series:
            raise ValueError(f"plot {self.title!r} has no series")

    @property
    def names(self) -> tuple[str, ...]:
        """The names on the x axis from left to right. Empty if x is numeric."""
        used = (x for series in self.series for x in series.x if isinstance(x, str))
        return tuple(dict.fromkeys((*self.order, *used)))

    def to_json(self) -> dict[str, Any]:
        """The plot as JSON. Values that are not finite are null."""
        series = [
            {**asdict(series), "x": list(series.x), "y": [y if math.isfinite(y) else None for y in series.y]}
            for series in self.series
        ]
        return {**asdict(self), "series": series, "order": list(self.order)}


def merged(plots: Iterable[Plot]) -> tuple[Plot, ...]:
    """Join plots with equal titles and axes into one with the series of all."""
    found: dict[tuple[Any, ...], Plot] = {}
    for plot in plots:
        axes = (plot.title, plot.x_label, plot.y_label, plot.kind, plot.scale, plot.order)
        found[axes] = replace(plot, series=(*found[axes].series, *plot.series)) if axes in found else plot
    return tuple(found.values())
