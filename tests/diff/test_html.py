"""`Diff.to_html`: the page of a comparison, and the numbers of its plots in the JSON."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from support.html_pages import parse_page, values_of
from support.models import SMALLEST, random_checkpoint, random_state

import bridge
from bridge import Checkpoint
from bridge.comparison import compare
from gpt2_jax.diff import Diff, diff
from gpt2_jax.diff import plots as module
from gpt2_jax.diff.plots import tensor_plots

pytestmark = pytest.mark.usefixtures("quick_compilation")

CONFIG = replace(SMALLEST, vocab_size=260, n_positions=16)
ORIGINAL = random_checkpoint(CONFIG)


def changed() -> Checkpoint:
    state = random_state(CONFIG)
    state["wte.weight"][3:5] += 1
    state["wte.weight"][259] += 1
    state["h.1.ln_1.bias"][0] = np.inf
    return Checkpoint.of(state, CONFIG)


@pytest.fixture(scope="module")
def result() -> Diff:
    return diff(ORIGINAL, changed(), sources=("old", "<new>"), seq_len=8, fingerprints=True)


def test_the_page_has_the_verdict_every_part_and_the_plots(result: Diff) -> None:
    page = parse_page(result.to_html())
    assert page.all("title")[0].text == "Difference of old and <new>"
    assert page.of_class("verdict")[0].text == "✗ Different: tensors, function."
    assert [h.text for h in page.all("h2")] == [
        "configuration ✓ equal",
        "tokenizer – not compared",  # noqa: RUF001
        "generation settings ✓ equal",
        "tensors ✗ different",
        "optimizer state – not compared",  # noqa: RUF001
        "function ✗ different",
        "A",
        "B",
        "Environment",
    ]
    assert [caption.text for caption in page.all("figcaption")] == [
        "Distance of B from A, by tensor",
        "Rows of wte.weight that differ, per 3 rows",
        "KL divergence by position, maximum over the rows",
        "Loss of each token by its position, mean over the rows",
        "Differences of hidden states in fp64",
    ]
    assert bridge.fingerprint(changed().tensors) in page.all("main")[0].text


def test_the_json_has_every_number_that_is_drawn(result: Diff) -> None:
    stored = json.loads(json.dumps(result.to_json(), allow_nan=False))
    plots = [*stored["tensors"]["plots"], *stored["function"]["plots"]]
    tables = values_of(parse_page(result.to_html()))
    for rows, plot in zip(tables, plots, strict=True):
        numbers = [row[-1] for row in rows] if plot["order"] else [r[k] for k in range(1, len(rows[0])) for r in rows]
        expected = [y for series in plot["series"] for y in series["y"]]
        assert [None if n in ("nan", "inf") else n for n in numbers] == [
            None if y is None else f"{y:.4g}" for y in expected
        ]
    distances = {x: y for s in plots[0]["series"] for x, y in zip(s["x"], s["y"], strict=True)}
    stored_distances = {t["name"]: t["relative_l2"] for t in stored["tensors"]["tensors"]}
    assert distances == stored_distances and distances["h.1.ln_1.bias"] is None
    assert stored["a"]["fingerprint"] == bridge.fingerprint(ORIGINAL.tensors)


def test_the_figures_of_the_function_are_those_of_its_plots() -> None:
    state = random_state(CONFIG)
    state["wte.weight"][3:5] += 1
    function = diff(ORIGINAL, Checkpoint.of(state, CONFIG), seq_len=8).function
    assert function is not None
    kl, losses, states = function.plots
    assert max(kl.series[0].y) == function.kl_max
    assert [np.mean(series.y) for series in losses.series] == pytest.approx(function.loss, rel=1e-6)
    assert {x: y for s in states.series for x, y in zip(s.x, s.y, strict=True)} == function.hidden_states


@pytest.mark.parametrize("most", [100, 7, 1])
def test_the_bars_count_all_rows_that_differ(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_BARS", most)
    state = random_state(CONFIG)
    rows = [0, 1, 2, 77, 78, *range(100, 180), 259]
    state["wte.weight"][rows] += 1
    _, plot = tensor_plots(compare(ORIGINAL, Checkpoint.of(state, CONFIG)).tensors)
    (series,) = plot.series
    width = -(-260 // most)
    assert len(series.x) <= most
    assert series.y == tuple(sum(x <= row < x + width for row in rows) for x in range(0, 260, width))


def test_identical_checkpoints_have_a_page_without_plots() -> None:
    result = diff(ORIGINAL, ORIGINAL)
    page = parse_page(result.to_html())
    assert page.of_class("verdict")[0].text.startswith("✓ Identical")
    assert not page.all("svg")
    assert result.a.fingerprint is None


def test_equal_results_give_equal_pages(result: Diff) -> None:
    assert result.to_html() == replace(result).to_html()
