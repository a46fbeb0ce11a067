"""The HTML page of a `Diff`: the verdict, each part that was compared, and the versions and the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from bridge.comparison import Difference, TensorComparison
from bridge.errors import quoted
from gpt2_jax.diff.plots import tensor_plots
from gpt2_jax.diff.wording import (
    EFFECTS,
    TENSOR_COLUMNS,
    counted,
    function_rows,
    range_list,
    sentence,
    symmetries,
    tensor_row,
    unequal,
    value_text,
)
from gpt2_jax.reporting.markup import Cell, Mark, Number, Table, facts
from gpt2_jax.reporting.page import Page, Section

if TYPE_CHECKING:
    from gpt2_jax.diff.result import Diff, Side

MOST_ROWS = 500
"""Maximum number of rows of a table. The JSON report has all of them."""


def to_page(diff: Diff) -> Page:
    """Arrange the result as a page."""
    found = diff.comparison
    sections = [
        _differences("configuration", [*found.config, *found.extra], diff),
        _tokenizer(diff),
        _differences("generation settings", found.generation, diff),
        *([_differences("chat templates", found.chat_templates, diff)] if found.tokenizer.tokenizers else []),
        _tensors(diff),
        _optimizer(diff),
        _function(diff),
    ]
    details = [_side("A", diff.a), _side("B", diff.b)]
    if diff.environment:
        details.append(Section("Environment", tables=(facts("Versions and device", diff.environment),)))
    verdict = Mark("failed" if diff.verdict == "different" else "passed", sentence(diff))
    return Page(f"Difference of {diff.a.source} and {diff.b.source}", verdict, tuple(sections), tuple(details))


def _mark(part: str, diff: Diff, is_equal: bool) -> Mark:
    if part in diff.different_parts:
        return Mark("failed", "different")
    return Mark("passed", "equal") if is_equal else Mark("informational", "differs without effect")


def _table(caption: str, columns: Sequence[str], rows: Sequence[tuple[Cell, ...]]) -> tuple[Table, ...]:
    """A table of at most `MOST_ROWS` rows, or none without rows."""
    more = f", the first {MOST_ROWS} of {len(rows):,}" if len(rows) > MOST_ROWS else ""
    return (Table(f"{caption}{more}", tuple(columns), tuple(rows[:MOST_ROWS])),) if rows else ()


def _difference_table(name: str, differences: Sequence[Difference]) -> tuple[Table, ...]:
    rows = [(quoted(d.name)[1:-1], value_text(d.a), value_text(d.b), EFFECTS[d.effect]) for d in differences]
    return _table(f"Differences of {name}", ("name", "A", "B", "effect"), rows)


def _differences(name: str, differences: Sequence[Difference], diff: Diff) -> Section:
    return Section(name, _mark(name, diff, not differences), tables=_difference_table(name, differences))


def _tokenizer(diff: Diff) -> Section:
    name, found = "tokenizer", diff.comparison.tokenizer
    if found.tokenizers is None:
        reasons = tuple(f"{side} has none: {reason}" for side, reason in found.missing.items())
        return Section(name, Mark("skipped", "not compared"), reasons)
    first = found.tokenizers[0]
    notes = [f"The same ids: {first.kind}, {first.vocab_size:,} tokens."] if found.is_same_definition else []
    if not found.is_same_definition:
        notes.append(f"Ids with different tokens: {range_list(found.different_tokens) or 'none'}.")
        notes.append(f"Strings with different ids: {len(found.different_strings)} of {found.strings}.")
    strings = _table("Strings with different ids", ("string",), [(text,) for text in found.different_strings])
    mark = _mark(name, diff, found.is_same_definition and not found.differences)
    return Section(name, mark, tuple(notes), (*_difference_table(name, found.differences), *strings))


def _tensors(diff: Diff) -> Section:
    found = diff.comparison.tensors
    notes = (f"{counted(found.tensors)}.", *found.notes, *symmetries(diff.comparison))
    mark = _mark("tensors", diff, found.is_identical)
    return Section("tensors", mark, notes, _tensor_table("tensors", found.tensors), tensor_plots(found))


def _tensor_table(name: str, tensors: Sequence[TensorComparison]) -> tuple[Table, ...]:
    rows: list[tuple[Cell, ...]] = []
    for tensor in unequal(tensors):
        title, outcome, *numbers, remarks = tensor_row(tensor)
        rows.append((title, outcome, *map(Number, numbers), remarks))
    columns = (TENSOR_COLUMNS[0], "outcome", *TENSOR_COLUMNS[2:-1], "remarks")
    return _table(f"Differences of {name}", columns, rows)


def _optimizer(diff: Diff) -> Section:
    name, found = "optimizer state", diff.comparison.optimizer
    if not found.is_compared:
        return Section(name, Mark("skipped", "not compared"), (f"None in {' and '.join(found.missing)}.",))
    mark = _mark(name, diff, not found.differences and not unequal(found.tensors))
    tables = (*_difference_table(name, found.differences), *_tensor_table("the moments", found.tensors))
    return Section(name, mark, (f"Moments: {counted(found.tensors)}.",), tables)


def _function(diff: Diff) -> Section:
    if diff.function is None:
        return Section("function", Mark("skipped", "not run"), (diff.not_run,))
    found = diff.function
    mark = Mark("passed", "equal within rounding") if found.is_within_rounding else Mark("failed", "different")
    table = facts("Figures of the function", dict(function_rows(found)))
    return Section("function", mark, (found.tokens, *found.notes), (table,), found.plots)


def _side(name: str, side: Side) -> Section:
    values = {"source": side.source, "format": side.format, "parameters": f"{side.parameters:,}"}
    if side.fingerprint is not None:
        values["fingerprint"] = side.fingerprint
    return Section(name, None, side.diagnostics, (facts(f"{name} and its configuration", {**values, **side.config}),))
