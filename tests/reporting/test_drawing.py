"""The drawings: SVG with text, ids of their own, and marks for values that have no place on the axis."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from xml.etree import ElementTree

import matplotlib
import pytest

from gpt2_jax.reporting.drawing import COLOR_VARIABLES, description, draw
from gpt2_jax.reporting.plots import Plot, Series

SPECIAL = (1e-15, 0.0, -1e-18, math.nan, math.inf, -math.inf, 1e-9)
PLOT = Plot("Differences", "position", "nats", (Series("fp64", tuple(range(7)), SPECIAL, bound=1e-12),))
LABELS = {"fp64", "bound: 1e-12", "above the bound", "zero or less", "not finite"}


def texts(svg: str) -> list[str]:
    root = ElementTree.fromstring(svg.replace("xlink:href", "href"))
    return ["".join(element.itertext()) for element in root.iter() if element.tag == "text"]


def test_values_without_a_place_on_the_axis_are_marked() -> None:
    assert {*texts(draw(PLOT, "a"))} >= LABELS


def test_ordinary_values_have_no_such_marks() -> None:
    series = Series("fp64", (0, 1), (1e-15, 2e-15), bound=1e-12)
    assert {*texts(draw(replace(PLOT, series=(series,)), "a"))} & LABELS == {"fp64", "bound: 1e-12"}


@pytest.mark.parametrize("kind", ["line", "dots", "sorted", "bars"])
@pytest.mark.parametrize("scale", ["log", "linear"])
@pytest.mark.parametrize("x", [tuple(range(7)), tuple(f"h.{k}.ln_1" for k in range(7))])
def test_every_kind_draws_every_value(kind: str, scale: str, x: tuple[float | str, ...]) -> None:
    values = (SPECIAL, (0.0,) * 7, (math.nan,) * 7, (1e308, -1e308, 1e-308, 1.0, 1.0, 1.0, 1.0))
    series = tuple(Series(f"series {k}", x, y, 1e-12) for k, y in enumerate(values))
    shown = {*texts(draw(replace(PLOT, kind=kind, scale=scale, series=series), "a"))}  # type: ignore[arg-type]
    assert shown >= {"position", "not finite", "above the bound", *(f"series {k}" for k in range(4))}


@pytest.mark.parametrize("y", [(0.0,) * 7, (math.nan,) * 7])
def test_a_plot_without_a_positive_value_has_an_axis(y: tuple[float, ...]) -> None:
    series = Series("a", tuple(range(7)), y)
    assert any(text.startswith("1e-") for text in texts(draw(replace(PLOT, series=(series,)), "a")))


def test_an_empty_series_is_drawn() -> None:
    assert "fp64" in draw(replace(PLOT, series=(Series("fp64", (), ()), *PLOT.series)), "a")


def test_the_drawings_of_a_page_share_no_ids() -> None:
    first, second = (re.findall(r'\bid="([^"]+)"', draw(PLOT, prefix)) for prefix in ("a", "b"))
    assert first and len({*first}) == len(first)
    assert {*first}.isdisjoint(second)


def test_equal_plots_give_equal_text_whatever_the_settings_of_matplotlib_are() -> None:
    drawn = draw(PLOT, "a")
    with matplotlib.rc_context({"font.size": 30, "svg.fonttype": "path", "axes.grid": True}):
        assert draw(PLOT, "a") == drawn
    assert "<!--" not in drawn and "metadata" not in drawn and "<style" not in drawn


def test_colors_are_variables_of_the_page() -> None:
    drawn = draw(PLOT, "a")
    assert not any(color in drawn for color in COLOR_VARIABLES)
    assert {"var(--ink)", "var(--series-1)", "var(--bad)"} <= {*COLOR_VARIABLES.values()}
    assert "var(--series-1)" in drawn and "var(--ink)" in drawn and "var(--bad)" in drawn


@pytest.mark.parametrize(
    "name", ["<script>alert(1)</script>", "$x_1$", "</svg>", 'href="#a" #010101', "中文", "\ud800\x1b[0m\u202e", ""]
)
def test_names_appear_as_text(name: str) -> None:
    plot = replace(PLOT, title=name, x_label=name, series=(Series("b", (1,), (1.0,)), Series(name, (1,), (1.0,))))
    drawn = draw(plot, "a")
    drawn.encode("utf-8")
    assert "<script" not in drawn
    assert name.encode("unicode_escape").decode() in texts(drawn) or name in texts(drawn) or len(name) > 28 or not name


def test_few_names_are_all_shown_and_many_by_layer() -> None:
    few = tuple(f"block_{k}" for k in range(5))
    assert {*few} <= {*texts(draw(replace(PLOT, kind="dots", series=(Series("a", few, (1.0,) * 5),)), "a"))}
    many = ("wte", *(f"h.{k}.{place}" for k in range(24) for place in ("ln_1", "attn", "mlp")), "ln_f")
    shown = texts(draw(replace(PLOT, kind="dots", series=(Series("a", many, (1.0,) * 74),)), "a"))
    assert [text for text in shown if text.startswith("h.")] == [f"h.{k}" for k in range(0, 24, 3)]


def test_the_description_has_the_largest_value_and_the_bound() -> None:
    assert description(PLOT) == (
        "Differences. fp64: 7 values, the largest is 1e-09 at 6, 3 not finite, the bound is 1e-12"
    )
