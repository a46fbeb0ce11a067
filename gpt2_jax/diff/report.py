"""The result of `diff` as tables for people. Long lists are truncated; the JSON report has everything."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from bridge.comparison import Comparison, Difference, TensorComparison
from bridge.errors import quoted
from gpt2_jax.diff.result import Diff, Side
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

if TYPE_CHECKING:
    from gpt2_jax.diff.function import FunctionComparison

MOST_SHOWN = 12
"""Maximum number of lines of each list."""

Row = tuple[str, ...]


def show(diff: Diff, console: Console) -> None:
    """Print the result."""
    found = diff.comparison
    for name, side in (("A", diff.a), ("B", diff.b)):
        _show_side(name, side, console)
    _show_differences("configuration", [*found.config, *found.extra], console)
    _show_tokenizer(found, console)
    _show_differences("generation settings", found.generation, console)
    if found.tokenizer.tokenizers:
        _show_differences("chat templates", found.chat_templates, console)
    _show_tensors(found, console)
    _show_optimizer(found, console)
    if diff.function is None:
        _heading("function", f"not run: {diff.not_run}", console)
    else:
        _show_function(diff.function, console)
    color = {"identical": "bold green", "same function": "bold green", "different": "bold red"}[diff.verdict]
    console.print(Text(sentence(diff), style=color))


def _show_side(name: str, side: Side, console: Console) -> None:
    console.print(Text.assemble((f"{name}  ", "bold"), (side.source, "bold cyan")))
    console.print(Text(f"   {side.format}, {side.parameters:,} parameters", style="dim"))
    for warning in side.diagnostics:
        console.print(Text(f"   warning: {warning}", style="yellow"))


def _heading(name: str, summary: str, console: Console) -> None:
    console.print(Text.assemble((f"{name}: ", "bold"), summary))


def _print_table(header: Row, rows: Sequence[Row], console: Console) -> None:
    """Print a table of at most `MOST_SHOWN` rows, and the number of the others."""
    if not rows:
        return
    table = Table(*header, box=None, pad_edge=False, header_style="dim", show_header=any(header))
    for row in rows[:MOST_SHOWN]:
        table.add_row(*map(Text, row))
    console.print(table)
    if len(rows) > MOST_SHOWN:
        console.print(Text(f"... and {len(rows) - MOST_SHOWN} more", style="dim"))


def _show_differences(name: str, differences: Sequence[Difference], console: Console) -> None:
    _heading(name, f"{len(differences):,} of its values differ" if differences else "equal", console)
    _print_differences(differences, console)


def _print_differences(differences: Sequence[Difference], console: Console) -> None:
    rows = [(d.name, value_text(d.a), value_text(d.b), EFFECTS[d.effect]) for d in differences]
    _print_table(("  name", "A", "B", ""), [(f"  {quoted(row[0])[1:-1]}", *row[1:]) for row in rows], console)


def _show_tokenizer(found: Comparison, console: Console) -> None:
    tokenizer = found.tokenizer
    if tokenizer.tokenizers is None:
        reasons = "; ".join(f"{side} has none: {reason}" for side, reason in tokenizer.missing.items())
        _heading("tokenizer", f"not compared: {reasons}", console)
        return
    first = tokenizer.tokenizers[0]
    if tokenizer.is_same_definition:
        _heading("tokenizer", f"the same ids: {first.kind}, {first.vocab_size:,} tokens", console)
    else:
        _heading("tokenizer", "different definitions", console)
    _print_differences(tokenizer.differences, console)
    if tokenizer.is_same_definition:
        return
    tokens = range_list(tokenizer.different_tokens)
    console.print(Text(f"  ids with different tokens: {tokens or 'none'}"))
    different = tokenizer.different_strings
    console.print(Text(f"  strings with different ids: {len(different)} of {tokenizer.strings}"))
    _print_table(("",), [(f"  {sentence}",) for sentence in different], console)


def _show_tensors(found: Comparison, console: Console) -> None:
    tensors = found.tensors
    _heading("tensors", counted(tensors.tensors), console)
    _print_table(("",), [(f"  {note}",) for note in (*tensors.notes, *symmetries(found))], console)
    _print_tensors(tensors.tensors, console)


def _print_tensors(tensors: Sequence[TensorComparison], console: Console) -> None:
    """Print the tensors that differ, those with the largest distances first."""
    rows = [(f"  {name}", *others) for name, *others in map(tensor_row, unequal(tensors))]
    _print_table(("  tensor", *TENSOR_COLUMNS[1:]), rows, console)


def _show_optimizer(found: Comparison, console: Console) -> None:
    optimizer = found.optimizer
    if not optimizer.is_compared:
        _heading("optimizer state", f"not compared: none in {' and '.join(optimizer.missing)}", console)
        return
    _show_differences("optimizer state", optimizer.differences, console)
    console.print(Text(f"  moments: {counted(optimizer.tensors)}"))
    _print_tensors(optimizer.tensors, console)


def _show_function(function: FunctionComparison, console: Console) -> None:
    agrees = "equal within rounding" if function.is_within_rounding else "different"
    _heading("function", f"{agrees}, on {function.tokens}", console)
    for note in function.notes:
        console.print(Text(f"  {note}"))
    rows = [(f"  {name}", value) for name, value in function_rows(function)]
    _print_table(("", ""), rows, console)
