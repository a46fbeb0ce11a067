"""Draw plots with matplotlib as SVG elements for an HTML page.

Text stays text. Colors are CSS variables of the page, so that one drawing fits light and dark pages. Equal plots give
equal bytes.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Sequence
from itertools import pairwise

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from bridge.errors import escaped
from gpt2_jax.reporting.markup import html_text
from gpt2_jax.reporting.plots import Plot, Series

INK, FAINT, BAD = "#010101", "#020202", "#030303"
_SERIES_COLORS = ("#0a0a01", "#0a0a02", "#0a0a03", "#0a0a04")
COLOR_VARIABLES = {
    INK: "var(--ink)",
    FAINT: "var(--faint)",
    BAD: "var(--bad)",
    **{color: f"var(--series-{k})" for k, color in enumerate(_SERIES_COLORS, 1)},
}
"""The colors of the drawing, which occur nowhere else in an SVG, and the CSS variables that replace them."""

_MARKERS = ("o", "^", "s", "D", "v", "P", "X", "*")
_LINES = ("-", "--", "-.", ":")

_SETTINGS = {
    "svg.fonttype": "none",
    "svg.hashsalt": "gpt2-bridge",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": FAINT,
    "grid.alpha": 0.4,
    "legend.frameon": False,
    "text.parse_math": False,
}
_SIZE = (4.6, 3.4)
"""Inches. At this width, the text is readable on a phone."""

_LONGEST_NAME, _LONGEST_LABEL = 28, 60
_MOST_NAMED_TICKS, _MOST_LAYER_TICKS = 12, 8
_MOST_MARKED = 32
"""Lines with more points have no markers."""
_MAX_DRAWN = 1e300
"""Larger values are drawn as not finite, because matplotlib's axis limits and margins would overflow."""


def draw(plot: Plot, id_prefix: str) -> str:
    """Return the SVG element of a plot. `id_prefix` must differ between the plots of a page."""
    with matplotlib.style.context(["default", _SETTINGS]), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # glyphs that matplotlib's font lacks; the browser has others
        figure = Figure(figsize=_SIZE, layout="constrained")
        _draw_axes(figure.add_subplot(), plot)
        handles, labels = figure.axes[0].get_legend_handles_labels()
        unique = dict(zip(labels, handles, strict=True))
        if len(unique) > 1:
            figure.legend(unique.values(), unique.keys(), loc="outside lower center", ncols=2, fontsize=8)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return _inline(buffer.getvalue(), description(plot), id_prefix)


def description(plot: Plot) -> str:
    """Describe a plot for readers who do not see it: the largest value of each series, and its bound."""
    return ". ".join([plot.title, *(_described(series) for series in plot.series)])


def _described(series: Series) -> str:
    missing = sum(not math.isfinite(y) for y in series.y)
    parts = [f"{series.name}: {len(series.y)} values"]
    if series.largest is not None:
        value, x = series.largest
        parts.append(f"the largest is {value:.4g} at {x}")
    if missing:
        parts.append(f"{missing} not finite")
    if series.bound is not None:
        parts.append(f"the bound is {series.bound:.4g}")
    return ", ".join(parts)


def _draw_axes(axes: Axes, plot: Plot) -> None:
    place = {name: k for k, name in enumerate(plot.names)}
    for k, series in enumerate(plot.series):
        x, y = _points(plot, series, place)
        _draw_series(axes, plot, k, x, y)
        _mark_special(axes, plot, k, x, y)
    _draw_bounds(axes, plot)
    if plot.scale == "log":
        _set_log_scale(axes, plot)
    if plot.kind == "sorted":
        axes.xaxis.set_major_locator(NullLocator())
    elif place:
        positions, labels = _name_ticks(plot.names)
        few = len(plot.names) <= _MOST_NAMED_TICKS
        axes.set_xticks(positions, labels, rotation=90 if few and max(map(len, labels)) > 4 else 0, fontsize=8)
    elif all(isinstance(x, int) for series in plot.series for x in series.x):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel=_shown(plot.x_label, _LONGEST_LABEL), ylabel=_shown(plot.y_label, _LONGEST_LABEL))
    axes.grid(axis="y")
    axes.spines[["top", "right"]].set_visible(False)


def _points(plot: Plot, series: Series, place: dict[str, int]) -> tuple[np.ndarray, np.ndarray]:
    """Return positions on the x axis and values. Values that cannot be drawn are infinite."""
    y = np.array(series.y, np.float64)
    y = np.where(np.abs(y) < _MAX_DRAWN, y, np.inf)  # also NaN
    if plot.kind == "sorted":
        return np.arange(len(y)), np.sort(y)
    return np.array([place[x] if isinstance(x, str) else x for x in series.x], np.float64), y


def _draw_series(axes: Axes, plot: Plot, k: int, x: np.ndarray, y: np.ndarray) -> None:
    drawn = np.where(np.isfinite(y) & ((y > 0) | (plot.scale == "linear")), y, np.nan)
    color, label = _color(k), _shown(plot.series[k].name)
    if plot.kind == "bars":
        step = min((b - a for a, b in pairwise(np.unique(x))), default=1.0)
        axes.bar(x, drawn, width=0.8 * step, align="edge", color=color, label=label)
        axes.set_xlim(x.min() - step, x.max() + 2 * step)  # also where all bars are empty
        return
    is_line = plot.kind == "line"
    axes.plot(
        x,
        drawn,
        linestyle=_LINES[k % len(_LINES)] if is_line else "none",
        marker=_MARKERS[k % len(_MARKERS)] if not is_line or len(x) <= _MOST_MARKED else "",
        markersize=4,
        markerfacecolor="none" if k % 2 else color,
        linewidth=1.3,
        color=color,
        label=label,
    )


def _mark_special(axes: Axes, plot: Plot, k: int, x: np.ndarray, y: np.ndarray) -> None:
    """Mark values above their bound, values that are not finite, and values that a log scale cannot show."""
    bound, color = plot.series[k].bound, _color(k)
    edge = axes.get_xaxis_transform()  # y from 0 at the bottom to 1 at the top
    if (missing := np.isinf(y)).any():
        axes.plot(x[missing], np.full(missing.sum(), 0.97), "x", color=color, transform=edge, label="not finite")
    if plot.scale == "log" and plot.kind != "bars" and (low := y <= 0).any():
        axes.plot(x[low], np.full(low.sum(), 0.03), "|", color=color, transform=edge, label="zero or less")
    if bound is not None and (above := np.isfinite(y) & (y > bound)).any():
        ring = axes.plot(x[above], y[above], "o", markerfacecolor="none", color=BAD, label="above the bound")
        ring[0].set_markersize(9)


def _color(k: int) -> str:
    return _SERIES_COLORS[k % len(_SERIES_COLORS)]


def _draw_bounds(axes: Axes, plot: Plot) -> None:
    bounds = [(series.bound, series.name, k) for k, series in enumerate(plot.series) if series.bound is not None]
    is_common = len({bound for bound, *_ in bounds}) == 1 and len(bounds) == len(plot.series)
    for bound, name, k in bounds[:1] if is_common else bounds:
        of = "" if is_common else f" of {_shown(name)}"
        color = INK if is_common else _color(k)
        axes.axhline(bound, color=color, linestyle=(0, (6, 3)), linewidth=1, label=f"bound{of}: {bound:.3g}")


def _set_log_scale(axes: Axes, plot: Plot) -> None:
    """Set a logarithmic y axis with room for the marks at its edges, and ticks such as 1e-12."""
    values = [v for series in plot.series for v in (*series.y, series.bound) if v is not None and 0 < v < _MAX_DRAWN]
    low, high = (math.log10(min(values)), math.log10(max(values))) if values else (-16, 0)
    margin = 0.12 * (high - low) + 0.3
    axes.set_yscale("log")
    axes.set_ylim(10 ** max(low - margin, -307.0), 10 ** min(high + margin, 307.0))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, position: f"{value:.0e}" if value < 1 else f"{value:g}"))


def _name_ticks(names: Sequence[str]) -> tuple[list[int], list[str]]:
    """Return the positions and labels of ticks: all names if they are few, else where a new layer begins."""
    if len(names) <= _MOST_NAMED_TICKS:
        return [*range(len(names))], [_shown(name) for name in names]
    layers = [match[0] if (match := re.match(r"\D*\d+", name)) else "" for name in names]
    starts = [k for k, layer in enumerate(layers) if layer and layer not in layers[:k]] or [*range(len(names))]
    starts = starts[:: math.ceil(len(starts) / _MOST_LAYER_TICKS)]
    return starts, [_shown(layers[k] or names[k]) for k in starts]


def _shown(text: str, limit: int = _LONGEST_NAME) -> str:
    text = escaped(text, keep="")
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def _inline(svg: str, label: str, id_prefix: str) -> str:
    """Return the SVG element alone, with its own ids and the page's colors."""
    box = re.search(r'viewBox="([\d. -]+)"', svg)
    assert box is not None, "matplotlib writes a viewBox"
    body = svg[svg.index(">", svg.index("<svg")) + 1 :]
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", body, flags=re.DOTALL).strip()
    referenced = {*re.findall(r'(?:href="|url\()#(\w+)', body)}

    def page_tag(tag: re.Match[str]) -> str:
        """Change a tag, and never the text between two tags, which may come from a file."""
        found = re.sub(r' id="([^"]+)"', lambda m: f' id="{id_prefix}-{m[1]}"' if m[1] in referenced else "", tag[0])
        found = re.sub(r'(href="|url\()#', rf"\g<1>#{id_prefix}-", found)
        return re.sub(r"#[0-9a-f]{6}\b", lambda m: COLOR_VARIABLES.get(m[0], m[0]), found)

    body = re.sub(r"<[^>]+>", page_tag, body)
    return f'<svg viewBox="{box[1]}" role="img" aria-label="{html_text(label)}">\n{body}'
