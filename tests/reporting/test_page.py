"""The page: well-formed, escaped, complete and reproducible."""

from __future__ import annotations

import pytest
from support.html_pages import parse_page, values_of

from bridge import __version__
from gpt2_jax.reporting import page as module
from gpt2_jax.reporting.environment import environment
from gpt2_jax.reporting.markup import HTML_START, Mark, Number, Table, slug
from gpt2_jax.reporting.page import Page, Section, render
from gpt2_jax.reporting.plots import Plot, Series

PLOT = Plot("Losses", "step", "nats", (Series("a", (1, 2), (3.0, 2.5)), Series("b", (1, 2), (3.0, 0.0))))


def page_of(*sections: Section, title: str = "Report") -> Page:
    return Page(title, Mark("failed", "NOT the same"), sections)


def test_a_page_begins_with_its_generator_and_the_verdict_comes_first() -> None:
    text = render(page_of(Section("logits", Mark("failed"), plots=(PLOT,))))
    assert text.startswith(f"{HTML_START}{__version__}")
    parsed = parse_page(text)
    (verdict,) = parsed.of_class("verdict")
    assert verdict.text == "✗ NOT the same"
    body = [element.attributes.get("id") or element.tag for element in parsed.elements if "main" in element.parents]
    assert body[:2] == ["h1", "verdict"]


def test_equal_pages_give_equal_text() -> None:
    assert render(page_of(Section("a", plots=(PLOT, PLOT)))) == render(page_of(Section("a", plots=(PLOT, PLOT))))


def test_sections_with_the_same_title_have_different_ids() -> None:
    parsed = parse_page(render(page_of(Section("a b", plots=(PLOT,)), Section("a-b", plots=(PLOT,)), Section("…"))))
    assert [e.attributes["id"] for e in parsed.all("h2")] == ["a-b-1", "a-b-2", "-3"]


@pytest.mark.parametrize("text", ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "a\0b\ud800", "&lt;"])
def test_text_of_files_appears_as_text(text: str) -> None:
    plot = Plot(text, text, text, (Series(text, (text,), (1.0,)),), "dots")
    table = Table(text, (text,), ((text,), (Number(text),), (Mark("passed", text),)), row_headers=True)
    parsed = parse_page(render(page_of(Section(text, Mark("passed", text), (text,), (table,), (plot,)), title=text)))
    shown = text.replace("\0", r"\x00").replace("\ud800", r"\ud800")
    assert parsed.all("title")[0].text == parsed.all("h1")[0].text == parsed.all("caption")[0].text == shown
    assert parsed.all("th")[1].text == shown
    assert not parsed.all("img")


def test_the_values_of_a_plot_are_a_table() -> None:
    parsed = parse_page(render(page_of(Section("a", plots=(PLOT,)))))
    assert values_of(parsed) == [[["1", "3", "3"], ["2", "2.5", "0"]]]
    assert parsed.all("summary")[0].text == "4 values"


def test_series_over_different_names_have_a_row_for_each_value() -> None:
    series = (Series("norms", ("ln_1",), (1.0,)), Series("other", ("wte", "h.0"), (2.0, float("nan"))))
    parsed = parse_page(render(page_of(Section("a", plots=(Plot("t", "name", "value", series, "dots"),)))))
    assert values_of(parsed) == [[["norms", "ln_1", "1"], ["other", "wte", "2"], ["other", "h.0", "nan"]]]


def test_a_long_table_of_values_is_cut_with_a_remark(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_ROWS", 1)
    parsed = parse_page(render(page_of(Section("a", plots=(PLOT,)))))
    assert values_of(parsed) == [[["1", "3", "3"]]]
    assert "nats, the first 1 of 2 rows" in [caption.text for caption in parsed.all("caption")]


def test_the_page_forbids_scripts_and_requests() -> None:
    (policy,) = (e for e in parse_page(render(page_of())).all("meta") if "http-equiv" in e.attributes)
    assert policy.attributes["content"].startswith("default-src 'none'; style-src 'unsafe-inline'")


def test_the_environment_names_versions_but_no_date_and_no_path() -> None:
    found = environment()
    assert found["gpt2-bridge"] == __version__ and found["numpy"][0].isdigit()
    assert {"python", "platform"} <= {*found}
    assert not any("/" in value for value in found.values())


def test_slugs_are_ascii() -> None:
    assert slug("KL(A || B), größte") == "kl-a-b-gr-te"
