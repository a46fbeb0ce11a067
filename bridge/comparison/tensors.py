"""The comparison of tensors by name, one pair in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from bridge.checkpoint import Checkpoint
from bridge.comparison.symmetries import Permutation, copied_layers, permutations
from bridge.comparison.tokenizers import ranges
from bridge.comparison.values import Status, Values, compare_values, differs
from bridge.config import GPT2Config
from bridge.parameter_table import VOCABULARY_ROWS
from bridge.storage.tensors import LazyTensor, contiguous, first_rows, same_bytes, transposed

SAME_FUNCTION: tuple[Status, ...] = ("identical", "equal values", "permuted")
"""The outcomes that do not change the function."""

EMBEDDING, HEAD = "wte.weight", "lm_head.weight"
_BY_ROW = VOCABULARY_ROWS | {"wpe.weight"}
"""Tensors with a row per token or position. If one side has more rows, the common ones are compared."""

Progress = Callable[[str], None]
Dtypes = tuple[str | None, str | None]
Shapes = tuple[tuple[int, ...] | None, tuple[int, ...] | None]
"""Of both sides. None: this side does not have the tensor."""


@dataclass(frozen=True)
class TensorComparison:
    """How one tensor compares."""

    name: str
    values: Values
    """The comparison of the values, or of those of the common rows. Infinite distances if the shapes do not fit."""
    dtypes: Dtypes
    shapes: Shapes
    rows: tuple[tuple[int, int], ...] = ()
    """For embeddings and an untied head: ranges [start, stop) of common rows that differ."""
    note: str = ""

    @property
    def status(self) -> Status:
        return self.values.status

    @property
    def is_same_function(self) -> bool:
        return self.status in SAME_FUNCTION

    @property
    def different_rows(self) -> int:
        return sum(stop - start for start, stop in self.rows)


@dataclass(frozen=True)
class TensorsComparison:
    """How the tensors of two models compare."""

    tensors: tuple[TensorComparison, ...]
    """In the order of a forward pass."""
    permutations: tuple[Permutation, ...] = ()
    """The layers whose heads or feed-forward units have another order."""
    copied_layers: tuple[tuple[int, int], ...] = ()
    """(i, j): layer i of A has the bits of layer j of B, and j is not i."""
    notes: tuple[str, ...] = ()
    """How tensors that only one side stores were compared."""

    @property
    def is_identical(self) -> bool:
        return not self.notes and all(tensor.status == "identical" for tensor in self.tensors)

    @property
    def is_same_function(self) -> bool:
        return all(tensor.is_same_function for tensor in self.tensors)


def compare_models(a: Checkpoint, b: Checkpoint, progress: Progress = lambda name: None) -> TensorsComparison:
    """Compare the tensors of two models under their canonical names.

    A tied head is compared as the token embedding, and a missing bias as zeros, so that models that compute the same
    function compare as such.

    Args:
        progress: called with the name of each tensor before it is read.
    """
    notes = []
    if a.config.bias != b.config.bias:
        notes.append(f"only {'A' if a.config.bias else 'B'} has biases; they are compared with zeros")
        a, b = a.with_biases(), b.with_biases()
    of_a, of_b = a.tensors.entries, b.tensors.entries
    if a.config.tie_word_embeddings != b.config.tie_word_embeddings:
        untied = "B" if a.config.tie_word_embeddings else "A"
        notes.append(f"only {untied} has an untied head; it is compared with the other's {EMBEDDING}")
        of_a, of_b = ({**entries, HEAD: entries.get(HEAD, entries[EMBEDDING])} for entries in (of_a, of_b))
    result = TensorsComparison(compare_entries(of_a, of_b, progress), notes=tuple(notes))
    return result if result.is_same_function else _with_symmetries(result, of_a, of_b, (a.config, b.config))


def compare_entries(
    a: Mapping[str, LazyTensor], b: Mapping[str, LazyTensor], progress: Progress = lambda name: None
) -> tuple[TensorComparison, ...]:
    """Compare tensors by name. Each tensor is read once, or twice if it differs."""

    def compared() -> Iterator[TensorComparison]:
        for name in dict.fromkeys((*a, *b)):
            progress(name)
            if name in a and name in b:
                yield _compare(name, a[name], b[name])
            else:
                yield _only(name, a.get(name), b.get(name))

    return tuple(compared())


def _only(name: str, a: LazyTensor | None, b: LazyTensor | None) -> TensorComparison:
    status: Status = "only in A" if b is None else "only in B"
    return TensorComparison(name, _incomparable(status), *_described(a, b))


def _incomparable(status: Status) -> Values:
    return Values(status, relative_l2=np.inf, largest=np.inf)


def _described(a: LazyTensor | None, b: LazyTensor | None) -> tuple[Dtypes, Shapes]:
    return (_dtype(a), _dtype(b)), (_shape(a), _shape(b))


def _dtype(entry: LazyTensor | None) -> str | None:
    return None if entry is None else str(entry.dtype)


def _shape(entry: LazyTensor | None) -> tuple[int, ...] | None:
    return None if entry is None else entry.shape


def _compare(name: str, a: LazyTensor, b: LazyTensor) -> TensorComparison:
    dtypes, shapes = _described(a, b)
    note = ""
    if a.shape != b.shape and name in _BY_ROW and a.shape[1:] == b.shape[1:]:
        common = min(a.shape[0], b.shape[0])
        longer = "A" if a.shape[0] > common else "B"
        note = f"{longer} has {abs(a.shape[0] - b.shape[0])} more rows"
        a, b = (first_rows(entry, common) for entry in (a, b))
    if a.shape != b.shape:
        if _is_transpose(a, b):
            return TensorComparison(name, _incomparable("transposed"), dtypes, shapes)
        return TensorComparison(name, _incomparable("different"), dtypes, shapes, note="the shapes differ")
    x, y = a.read(), b.read()
    values = compare_values(x, y)
    rows = ranges(_different_rows(x, y)) if name in _BY_ROW and values.status == "different" else ()
    del x, y
    if values.status == "different" and _is_transpose(a, b):
        values = replace(values, status="transposed")
    if note:  # other rows make another function, even if the common ones are identical
        note += f"; the {common} common rows are {_worded(values)}"
        values = replace(values, status="different")
    return TensorComparison(name, values, dtypes, shapes, rows, note)


def _worded(values: Values) -> str:
    return "equal up to dtype" if values.status == "rounded" else values.status


def _is_transpose(a: LazyTensor, b: LazyTensor) -> bool:
    return len(a.shape) == 2 and a.shape == b.shape[::-1] and same_bytes(a, transposed(b))


def _different_rows(a: np.ndarray, b: np.ndarray) -> Iterator[int]:
    return (i for i in range(len(a)) if differs(contiguous(a[i]), contiguous(b[i])).any())


def _with_symmetries(
    result: TensorsComparison,
    a: Mapping[str, LazyTensor],
    b: Mapping[str, LazyTensor],
    configs: tuple[GPT2Config, GPT2Config],
) -> TensorsComparison:
    """Name permuted heads and copied layers among the tensors that differ."""
    unequal = {tensor.name for tensor in result.tensors if not tensor.is_same_function}
    found = permutations(a, b, configs, unequal)
    explained = unequal & {name for permutation in found if permutation.is_same_function for name in permutation.names}
    tensors = tuple(
        replace(tensor, values=replace(tensor.values, status="permuted")) if tensor.name in explained else tensor
        for tensor in result.tensors
    )
    return replace(result, tensors=tensors, permutations=found, copied_layers=copied_layers(a, b, unequal - explained))
