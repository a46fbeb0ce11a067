"""The plots of the checks, made from the values that the checks compute."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np

from gpt2_jax.reporting.plots import Plot, Series

_PLACES: Mapping[str, re.Pattern[str]] = {
    "norms": re.compile(r"(^|\.)ln_\w+(\.|$)"),
    "attention": re.compile(r"\.attn\."),
    "feed-forward": re.compile(r"\.mlp\."),
}
"""The parts of a layer, by the names of their activations and parameters."""
_ELSEWHERE = "embeddings, layers, logits"


def by_place(title: str, x_label: str, y_label: str, values: Mapping[str, float], bound: float | None = None) -> Plot:
    """Plot a value for each activation or parameter, in the order of the names, with a series for each part."""
    groups: dict[str, list[str]] = {}
    for name in values:
        place = next((place for place, pattern in _PLACES.items() if pattern.search(name)), _ELSEWHERE)
        groups.setdefault(place, []).append(name)
    series = [
        Series(place, tuple(names), tuple(values[name] for name in names), bound) for place, names in groups.items()
    ]
    return Plot(title, x_label, y_label, tuple(series), "dots", order=tuple(values))


def by_activation(title: str, differences: Mapping[str, float], bound: float) -> Plot:
    """Plot the relative difference of every activation, in the order of the forward pass."""
    return by_place(title, "activation, in the order of the forward pass", "relative difference", differences, bound)


def by_length(series: str, rows: Sequence[np.ndarray], differences: Sequence[float], bound: float) -> Plot:
    """Plot the difference of each padded row from the row alone, over its number of tokens."""
    line = Series(series, tuple(map(len, rows)), tuple(differences), bound)
    return Plot("Padded rows against the rows alone", "tokens of the row", "relative difference", (line,), "dots")


def by_parameter(title: str, series: str, values: Mapping[str, float], bound: float | None) -> Plot:
    """Plot the relative L2 distance of every parameter, sorted."""
    line = Series(series, tuple(values), tuple(values.values()), bound)
    return Plot(title, "parameters, sorted", "relative distance", (line,), "sorted")


def by_position(
    title: str,
    y_label: str,
    series: str,
    values_BT: np.ndarray,
    positions: Sequence[int] | None = None,
    bound: float | None = None,
) -> Plot:
    """Plot the maximum over the rows at each position. `positions`: the default is 0, 1, 2, ..."""
    x = range(values_BT.shape[1]) if positions is None else positions
    line = Series(series, tuple(map(int, x)), tuple(values_BT.max(0).tolist()), bound)
    return Plot(title, "position", y_label, (line,))


def kl_by_position(
    series: str, kl_BT: np.ndarray, positions: Sequence[int] | None = None, bound: float | None = None
) -> Plot:
    """Plot the largest KL divergence at each position."""
    title = "KL divergence by position, maximum over the rows"
    return by_position(title, "nats per token", series, kl_BT, positions, bound)


def losses_by_position(losses_BT: Mapping[str, np.ndarray]) -> Plot:
    """Plot the mean loss of several models at each position."""
    series = [
        Series(name, tuple(range(1, losses.shape[1] + 1)), tuple(losses.mean(0).tolist()))
        for name, losses in losses_BT.items()
    ]
    title = "Loss of each token by its position, mean over the rows"
    return Plot(title, "position", "nats", tuple(series), scale="linear")


def over_steps(title: str, y_label: str, lines: Mapping[str, Sequence[float]], bound: float | None = None) -> Plot:
    """Plot values of training steps 1, 2, ... A plot with a bound is on a log scale."""
    series = [Series(name, tuple(range(1, len(y) + 1)), tuple(map(float, y)), bound) for name, y in lines.items()]
    return Plot(title, "step", y_label, tuple(series), scale="linear" if bound is None else "log")
