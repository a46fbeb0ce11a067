"""`Report.to_html`: the page shows every measurement and every plot, and its numbers are those of the JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from support.html_pages import Parsed, parse_page, values_of
from support.models import SMALLEST, random_checkpoint

import bridge
from bridge import BUNDLED, Checkpoint
from gpt2_jax.parity import Check, Measurement, Report, read_certificate, verify, verify_against

CONFIG = replace(SMALLEST, n_positions=16)

PLOTS: Mapping[str, list[str]] = {
    "logits": [
        "KL divergence by position, maximum over the rows",
        "RMS error of the logits against fp64 by position, maximum over the rows",
    ],
    "hidden states": ["Differences in fp64, by activation"],
    "gradients": ["Distance of the gradients, by parameter"],
    "training": [
        "Losses in float64",
        "Difference of the losses",
        "Distance of the weight updates, by parameter",
        "Losses in float32",
    ],
    "padding": ["Padded rows against the rows alone"],
    "round trip": [],
}


@pytest.fixture(scope="module")
def report() -> Report:
    pytest.importorskip("torch")
    names = [name.replace(" ", "-") for name in PLOTS]
    return verify(random_checkpoint(CONFIG), seq_len=12, checks=names, source="tiny")


def shown_number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"


def assert_same_numbers(page: Parsed, plots: list[dict[str, Any]]) -> None:
    """Assert that the table of each plot has the numbers of the JSON, in the order of the page."""
    assert [caption.text for caption in page.all("figcaption")] == [plot["title"] for plot in plots]
    assert len(page.all("svg")) == len(plots)
    for rows, plot in zip(values_of(page), plots, strict=True):
        numbers = [row[k] for k in range(1, len(rows[0])) for row in rows]
        if [*plot["series"][0]["x"]] != [*plot["series"][-1]["x"]]:  # a row for each point: series, x, y
            numbers = [row[2] for row in rows]
        expected = [shown_number(y) for series in plot["series"] for y in series["y"]]
        assert ["not finite" if number in ("nan", "inf") else number for number in numbers] == expected


def test_each_check_has_its_plots_and_the_json_has_their_numbers(report: Report) -> None:
    stored = json.loads(json.dumps(report.to_json(), allow_nan=False))
    found = {check["name"]: [plot["title"] for plot in check["plots"]] for check in stored["checks"]}
    assert found == PLOTS
    assert_same_numbers(parse_page(report.to_html()), [plot for check in stored["checks"] for plot in check["plots"]])


def test_the_largest_value_of_a_plot_is_the_measurement(report: Report) -> None:
    checks = {check.name: check for check in report.checks}
    for name, measurement, plot, series in (
        ("logits", "fp64 max KL divergence, nats per token", 0, 0),
        ("hidden states", "fp64 max relative difference of 23 activations", 0, None),
        ("gradients", "fp32 gradients, max relative L2 difference of 28 parameters", 0, 1),
        ("training", "fp32 losses of 10 steps, max difference", 1, 1),
        ("training", "fp64 weight updates, max relative L2 difference", 2, 0),
        ("padding", "gpt2_jax, padded right vs unpadded, max relative difference", 0, 3),
    ):
        (found,) = (m for m in checks[name].measurements if m.name == measurement)
        curves = checks[name].plots[plot].series
        chosen = curves if series is None else (curves[series],)
        assert max(y for curve in chosen for y in curve.y) == found.value, measurement
        assert {curve.bound for curve in chosen} == {found.tolerance}
        if name in ("hidden states", "gradients") or "weight" in measurement:
            assert found.location in {curve.largest[1] for curve in chosen if curve.largest}


def test_the_error_by_position_has_the_ratio_of_the_measurement(report: Report) -> None:
    logits = report.checks[0]
    curves = {series.name: np.array(series.y) for series in logits.plots[1].series}
    assert [*curves] == ["fp32, torch", "fp32, JAX", "bf16, torch", "bf16, JAX"]
    assert all((curves[f"fp32, {side}"] < curves[f"bf16, {side}"]).all() for side in ("torch", "JAX"))


def test_every_measurement_is_in_the_page_with_its_outcome(report: Report) -> None:
    page = parse_page(report.to_html())
    assert page.of_class("verdict")[0].text == f"✓ {report.verdict}"
    cells = [element.text for element in page.all("td")]
    for measurement in (m for check in report.checks for m in check.measurements):
        k = cells.index(measurement.name)
        assert cells[k - 1] == ("ℹ no limit" if measurement.tolerance is None else "✓ passed")  # noqa: RUF001
        assert cells[k + 1] == f"{measurement.value:.4g}"


def test_the_page_has_the_configuration_the_fingerprint_and_the_versions(report: Report) -> None:
    page = parse_page(report.to_html())
    names = {element.text for element in page.all("th") if element.attributes["scope"] == "row"}
    assert {"n_positions", "fingerprint", "numpy", "jax", "torch", "python", "platform", "device"} <= names
    assert bridge.fingerprint(random_checkpoint(CONFIG).tensors) in page.all("main")[0].text


def test_equal_reports_give_equal_pages(report: Report) -> None:
    assert report.to_html() == replace(report).to_html()


def test_a_failed_check_is_first_and_its_divergence_is_named() -> None:
    pytest.importorskip("torch")
    state = {name: np.array(array) for name, array in random_checkpoint(CONFIG).tensors.items()}
    state["h.1.ln_2.bias"][0] = np.nan
    with np.errstate(invalid="ignore"):
        failing = verify(Checkpoint.of(state, CONFIG), seq_len=9, checks=("round-trip", "hidden-states"))
    page = parse_page(failing.to_html())
    assert page.of_class("verdict")[0].text.startswith("✗ NOT the same function. Failed: hidden states.")
    assert [h.text for h in page.all("h2")][:2] == ["hidden states ✗ failed", "round trip ✓ passed"]
    assert "The first divergence is at h.1.ln_2." in [note.text for note in page.of_class("note")]
    stored = failing.to_json()["checks"][1]["plots"][0]["series"]
    places = {x: y for series in stored for x, y in zip(series["x"], series["y"], strict=True)}
    assert places["h.1.ln_2"] is None and places["h.1.ln_1"] < 1e-12
    assert "not finite" in page.all("svg")[0].text


def test_skipped_checks_have_their_reason_and_come_last() -> None:
    checks = (Check("prediction", note="no tokenizer"), Check("logits", (Measurement("difference", math.nan, 1.0),)))
    page = parse_page(Report("x", {}, checks).to_html())
    assert [h.text for h in page.all("h2")][:2] == ["logits ✗ failed", "prediction – skipped"]  # noqa: RUF001
    assert "no tokenizer" in [note.text for note in page.of_class("note")]


def test_names_and_paths_of_files_are_escaped() -> None:
    name = "<script>alert('\ud800\x00')</script>"
    checks = (Check(name, (Measurement(name, 2.0, 1.0, name),), name, name),)
    page = parse_page(Report(name, {name: name}, checks, (name,), config={name: name}).to_html())
    assert page.all("title")[0].text == r"Parity of <script>alert('\ud800\x00')</script>"


def test_a_report_against_a_certificate_has_plots() -> None:
    checkpoint = bridge.load("bundled")
    names = ["weights", "configuration", "logits", "hidden-states", "losses", "float32"]
    report = verify_against(checkpoint, read_certificate(BUNDLED / "parity.certificate"), checks=names)
    stored = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert [len(check["plots"]) for check in stored["checks"]] == [0, 0, 1, 1, 1, 1]
    assert_same_numbers(parse_page(report.to_html()), [plot for check in stored["checks"] for plot in check["plots"]])
    positions = stored["checks"][2]["plots"][0]["series"][0]["x"]
    assert positions == read_certificate(BUNDLED / "parity.certificate").positions.tolist()
