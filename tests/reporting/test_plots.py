"""Plots as data: names, bounds, JSON, and joining."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from gpt2_jax.reporting.plots import Plot, Series, merged

CURVE = Plot("Losses", "step", "nats", (Series("a", (1, 2), (3.0, 2.0), bound=4.0),))


def test_values_that_are_not_finite_are_null_in_json() -> None:
    series = Series("a", ("x", "y", "z"), (math.nan, math.inf, 1.5))
    stored = json.loads(json.dumps(replace(CURVE, series=(series,)).to_json(), allow_nan=False))
    assert stored["series"] == [{"name": "a", "x": ["x", "y", "z"], "y": [None, None, 1.5], "bound": None}]
    assert {*stored} == {"title", "x_label", "y_label", "series", "kind", "scale", "order"}


def test_the_largest_value_ignores_those_that_are_not_finite() -> None:
    assert Series("a", (1, 2, 3), (math.nan, 2.0, math.inf)).largest == (2.0, 2)
    assert Series("a", (1,), (math.nan,)).largest is None


def test_plots_with_the_same_axes_are_joined_in_order() -> None:
    other = replace(CURVE, series=(Series("b", (1, 2), (1.0, 1.0)),))
    apart = replace(CURVE, title="Other losses")
    joined, alone = merged([CURVE, apart, other])
    assert [series.name for series in joined.series] == ["a", "b"]
    assert alone == apart


def test_names_keep_the_given_order() -> None:
    series = (Series("odd", ("b", "d"), (1.0, 1.0)), Series("even", ("a", "c"), (1.0, 1.0)))
    plot = Plot("t", "x", "y", series, "dots")
    assert plot.names == ("b", "d", "a", "c")
    assert replace(plot, order=("a", "b", "c", "d")).names == ("a", "b", "c", "d")


def test_series_of_unequal_lengths_and_empty_plots_are_refused() -> None:
    with pytest.raises(ValueError, match="2 values of x and 1 of y"):
        Series("a", (1, 2), (1.0,))
    with pytest.raises(ValueError, match="'t' has no series"):
        Plot("t", "x", "y", ())
