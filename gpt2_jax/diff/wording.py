"""The words of a comparison, for the terminal and for the page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from bridge.comparison import Comparison, TensorComparison
from bridge.errors import quoted

if TYPE_CHECKING:
    from gpt2_jax.diff.function import FunctionComparison
    from gpt2_jax.diff.result import Diff

_MOST_IN_ORDER, _MOST_RANGES = 12, 4
_LONGEST_VALUE = 48

EFFECTS = {
    "function": "changes the function",
    "tensors": "the tensors decide",
    "rounding": "changes only rounding",
    "training": "only in training",
    "text": "changes the text",
    "state": "changes further training",
    "none": "not read by the model",
}
_STATUS = {"rounded": "equal up to dtype"}


def sentence(diff: Diff) -> str:
    """The verdict, with its reason."""
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


def value_text(value: Any) -> str:
    """A value of a setting, truncated."""
    if value is None:
        return "-"
    return quoted(value, _LONGEST_VALUE) if isinstance(value, str) else quoted(value, _LONGEST_VALUE)[1:-1]


def symmetries(found: Comparison) -> Iterator[str]:
    """Yield a sentence for each permutation and for each layer in another place."""
    for permutation in found.tensors.permutations:
        order = ", ".join(map(str, permutation.order[:_MOST_IN_ORDER]))
        more = ", ..." if len(permutation.order) > _MOST_IN_ORDER else ""
        where = "the same function" if permutation.is_same_function else f"only in {', '.join(permutation.names)}"
        if permutation.is_rounded:
            where = f"{where}, up to dtype"
        yield f"layer {permutation.layer}: the {permutation.units} of A are {order}{more} of B ({where})"
    for layer, place in found.tensors.copied_layers:
        yield f"layer {layer} of A is layer {place} of B"


def counted(tensors: Iterable[TensorComparison]) -> str:
    """The number of tensors with each outcome."""
    counts = Counter(tensor.status for tensor in tensors)
    return ", ".join(f"{count} {_STATUS.get(status, status)}" for status, count in counts.items())


def unequal(tensors: Iterable[TensorComparison]) -> list[TensorComparison]:
    """The tensors that are not identical, those that change the function and have the largest distances first."""
    found = [tensor for tensor in tensors if tensor.status != "identical"]
    return sorted(found, key=lambda tensor: (tensor.is_same_function, -tensor.values.relative_l2))


TENSOR_COLUMNS = ("tensor", "", "relative L2", "largest", "values", "")


def tensor_row(tensor: TensorComparison) -> tuple[str, ...]:
    """The row of a tensor, under `TENSOR_COLUMNS`."""
    values = tensor.values
    return (
        tensor.name,
        _STATUS.get(tensor.status, tensor.status),
        _distance(values.relative_l2),
        _distance(values.largest),
        f"{values.different:,}" if values.different else "",
        "; ".join(_remarks(tensor)),
    )


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
        yield f"{tensor.different_rows:,} rows: {range_list(tensor.rows)}"
    if any(tensor.values.not_finite):
        yield "NaN or infinite: {:,} in A, {:,} in B".format(*tensor.values.not_finite)


def range_list(ranges: Sequence[tuple[int, int]]) -> str:
    """List ranges [start, stop) with their last numbers.

    >>> range_list([(3, 4), (7, 10)])
    '3, 7-9'
    """
    shown = [str(start) if stop == start + 1 else f"{start}-{stop - 1}" for start, stop in ranges[:_MOST_RANGES]]
    return ", ".join([*shown, *(["..."] if len(ranges) > _MOST_RANGES else [])])


def function_rows(function: FunctionComparison) -> list[tuple[str, str]]:
    """The figures of the comparison of the functions, with their names."""
    return [
        ("loss of A and B, nats per token", f"{function.loss[0]:.6f}, {function.loss[1]:.6f}"),
        ("KL(A || B) per token, mean and maximum", f"{function.kl_mean:.4g}, {function.kl_max:.4g}"),
        ("the same most likely token", f"{function.top1_agreement:.2%}"),
        ("largest difference of a logit", f"{function.logits_difference:.4g}"),
        ("largest difference that rounding explains", f"{function.logits_tolerance:.4g}"),
        ("first hidden state beyond rounding", _first_departure(function)),
    ]


def _first_departure(function: FunctionComparison) -> str:
    """Return the name of the first hidden state that differs, with the difference relative to its largest value."""
    if not function.hidden_states:
        return "not compared"
    name = function.first_departure
    return "none" if name is None else f"{name}, by {function.hidden_states[name]:.4g} of its largest value"
