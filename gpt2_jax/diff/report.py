"""The result of `diff` as tables for people. Long lists are truncated; the JSON report has everything."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from bridge.comparison import Comparison, Difference, TensorComparison
from bridge.errors import quoted
from gpt2_jax.diff.result import Diff, Side

if TYPE_CHECKING:
    from gpt2_jax.diff.function import FunctionComparison

MOST_SHOWN = 12
"""Maximum number of lines of each list."""
_MOST_RANGES = 4
_LONGEST_VALUE = 48

Row = tuple[str, ...]

_EFFECTS = {
    "function": "changes the function",
    "tensors": "the tensors decide",
    "rounding": "changes only rounding",
    "training": "only in training",
    "text": "changes the text",
    "state": "changes further training",
    "none": "not read by the model",
}
_STATUS = {"rounded": "equal up to dtype"}


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
    console.print(Text(_sentence(diff), style=color))


def _sentence(diff: Diff) -> str:
    if diff.verdict == "identical":
        return "Identical: every part that both sides have is equal, and every tensor bit for bit."
    if diff.verdict == "same function":
        run = "not run" if diff.function is None else "within float32 rounding on this text"
        return f"The same function: nothing that differs changes what the model computes ({run})."
    parts = f"Different: {', '.join(diff.different_parts)}."
    if diff.comparison.has_identical_model:
        return f"{parts} The models are identical."
    if diff.function is not None and diff.function.is_within_rounding:
        return f"{parts} The logits agree within float32 rounding on this text."
    return parts


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
    rows = [(d.name, _shown(d.a), _shown(d.b), _EFFECTS[d.effect]) for d in differences]
    _print_table(("  name", "A", "B", ""), [(f"  {quoted(row[0])[1:-1]}", *row[1:]) for row in rows], console)


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    return quoted(value, _LONGEST_VALUE) if isinstance(value, str) else quoted(value, _LONGEST_VALUE)[1:-1]


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
    tokens = _ranges(tokenizer.different_tokens)
    console.print(Text(f"  ids with different tokens: {tokens or 'none'}"))
    different = tokenizer.different_strings
    console.print(Text(f"  strings with different ids: {len(different)} of {tokenizer.strings}"))
    _print_table(("",), [(f"  {sentence}",) for sentence in different], console)


def _show_tensors(found: Comparison, console: Console) -> None:
    tensors = found.tensors
    _heading("tensors", _counted(tensors.tensors), console)
    _print_table(("",), [(f"  {note}",) for note in (*tensors.notes, *_symmetries(found))], console)
    _print_tensors(tensors.tensors, console)


def _symmetries(found: Comparison) -> Iterator[str]:
    """Yield a sentence for each permutation and for each layer in another place."""
    for permutation in found.tensors.permutations:
        order = ", ".join(map(str, permutation.order[:MOST_SHOWN]))
        more = ", ..." if len(permutation.order) > MOST_SHOWN else ""
        where = "the same function" if permutation.is_same_function else f"only in {', '.join(permutation.names)}"
        if permutation.is_rounded:
            where = f"{where}, up to dtype"
        yield f"layer {permutation.layer}: the {permutation.units} of A are {order}{more} of B ({where})"
    for layer, place in found.tensors.copied_layers:
        yield f"layer {layer} of A is layer {place} of B"


def _counted(tensors: Iterable[TensorComparison]) -> str:
    counts = Counter(tensor.status for tensor in tensors)
    return ", ".join(f"{count} {_STATUS.get(status, status)}" for status, count in counts.items())


def _print_tensors(tensors: Sequence[TensorComparison], console: Console) -> None:
    """Print the tensors that differ, those with the largest distances first."""
    unequal = [tensor for tensor in tensors if tensor.status != "identical"]
    unequal.sort(key=lambda tensor: (tensor.is_same_function, -tensor.values.relative_l2))
    rows = [
        (
            f"  {tensor.name}",
            _STATUS.get(tensor.status, tensor.status),
            _distance(tensor.values.relative_l2),
            _distance(tensor.values.largest),
            f"{tensor.values.different:,}" if tensor.values.different else "",
            "; ".join(_remarks(tensor)),
        )
        for tensor in unequal
    ]
    _print_table(("  tensor", "", "relative L2", "largest", "values", ""), rows, console)


def _distance(value: float) -> str:
    return "-" if value == float("inf") else f"{value:.4g}"


def _remarks(tensor: TensorComparison) -> Iterator[str]:
    if tensor.dtypes[0] != tensor.dtypes[1] and None not in tensor.dtypes:
        yield f"{tensor.dtypes[0]} and {tensor.dtypes[1]}"
    if tensor.note == "the shapes differ":
        yield f"shapes {tensor.shapes[0]} and {tensor.shapes[1]}"
    elif tensor.note:
        yield tensor.note
    if tensor.rows:
        yield f"{tensor.different_rows:,} rows: {_ranges(tensor.rows)}"
    if any(tensor.values.not_finite):
        yield "NaN or infinite: {:,} in A, {:,} in B".format(*tensor.values.not_finite)


def _ranges(ranges: Sequence[tuple[int, int]]) -> str:
    shown = [str(start) if stop == start + 1 else f"{start}-{stop - 1}" for start, stop in ranges[:_MOST_RANGES]]
    return ", ".join([*shown, *(["..."] if len(ranges) > _MOST_RANGES else [])])


def _show_optimizer(found: Comparison, console: Console) -> None:
    optimizer = found.optimizer
    if not optimizer.is_compared:
        _heading("optimizer state", f"not compared: none in {' and '.join(optimizer.missing)}", console)
        return
    _show_differences("optimizer state", optimizer.differences, console)
    console.print(Text(f"  moments: {_counted(optimizer.tensors)}"))
    _print_tensors(optimizer.tensors, console)


def _show_function(function: FunctionComparison, console: Console) -> None:
    agrees = "equal within rounding" if function.is_within_rounding else "different"
    _heading("function", f"{agrees}, on {function.tokens}", console)
    for note in function.notes:
        console.print(Text(f"  {note}"))
    rows = [
        ("  loss of A and B, nats per token", f"{function.loss[0]:.6f}, {function.loss[1]:.6f}"),
        ("  KL(A || B) per token, mean and maximum", f"{function.kl_mean:.4g}, {function.kl_max:.4g}"),
        ("  the same most likely token", f"{function.top1_agreement:.2%}"),
        ("  largest difference of a logit", f"{function.logits_difference:.4g}"),
        ("  what rounding explains of it", f"{function.logits_tolerance:.4g}"),
        ("  first hidden state beyond rounding", _first_departure(function)),
    ]
    _print_table(("", ""), rows, console)


def _first_departure(function: FunctionComparison) -> str:
    """Return the name of the first hidden state that differs, with the difference relative to its largest value."""
    if not function.hidden_states:
        return "not compared"
    name = function.first_departure
    return "none" if name is None else f"{name}, by {function.hidden_states[name]:.4g} of its largest value"
