"""LoRA adapters: low-rank updates of a model's matrices, and their exact merge into the model.

A matrix W `[out, in]` of the base becomes W + s B A, with A `[r, in]`, B `[out, r]` and the scaling s = alpha / r, or
alpha / sqrt(r) with rank-stabilized scaling. `bridge.formats.peft` reads and writes the files of PEFT.

Sources: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models"; Kalajdzievski 2023, "A Rank Stabilization
Scaling Factor for Fine-Tuning with LoRA".
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from bridge.checkpoint import Checkpoint
from bridge.config import GPT2Config
from bridge.conversion import canonicalize
from bridge.errors import ConversionError, bullet_list, quoted
from bridge.parameter_table import VOCABULARY_ROWS, parameters
from bridge.storage.dtypes import FLOAT_DTYPES
from bridge.storage.tensors import LazyTensor, LazyTensorMap, same_bytes

_EMBEDDING, _HEAD = "wte.weight", "lm_head.weight"


@dataclass(frozen=True)
class LoRAUpdate:
    """The update of one matrix."""

    a: LazyTensor
    """A, `[r, in]`. For the token and position embeddings, "in" is the number of rows of the embedding."""
    b: LazyTensor
    """B, `[out, r]`."""
    alpha: float
    """The numerator of the scaling."""
    rank_stabilized: bool = False
    """Whether the scaling is alpha / sqrt(r), and not alpha / r."""

    @property
    def rank(self) -> int:
        """r: the rank of the update."""
        return self.a.shape[0]

    @property
    def scaling(self) -> float:
        """The factor of B A."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)


@dataclass(frozen=True)
class LoRA:
    """An adapter: updates of matrices, and whole tensors that were trained beside them."""

    updates: Mapping[str, LoRAUpdate]
    """Canonical name of the matrix -> its update."""
    tensors: LazyTensorMap = field(default_factory=lambda: LazyTensorMap({}))
    """Canonical name -> tensor that replaces the base's: PEFT's `modules_to_save`."""

    @classmethod
    def of(cls, factors: Mapping[str, tuple[Any, Any]], *, alpha: float, rank_stabilized: bool = False) -> LoRA:
        """Make an adapter from arrays in memory.

        >>> import numpy as np
        >>> a, b = np.ones((4, 8), np.float32), np.zeros((24, 4), np.float32)
        >>> LoRA.of({"h.0.attn.c_attn": (a, b)}, alpha=16).updates["h.0.attn.c_attn.weight"].scaling
        4.0

        Args:
            factors: canonical name of a module, such as `h.0.attn.c_attn` -> A `[r, in]` and B `[out, r]`.
            alpha: the numerator of the scaling, for every matrix.
            rank_stabilized: scale by alpha / sqrt(r), and not by alpha / r.

        Raises `ConversionError` if a pair is not two matrices of equal rank.
        """
        lazy = {}
        for name, (a, b) in factors.items():
            pair = LazyTensorMap.of({f"A of {name}": a, f"B of {name}": b}).entries
            lazy_a, lazy_b = pair.values()
            lazy[f"{name}.weight"] = LoRAUpdate(lazy_a, lazy_b, alpha, rank_stabilized)
        if problems := [problem for name, update in lazy.items() for problem in _problems(name, update)]:
            raise ConversionError("these are not the matrices of a LoRA adapter:\n" + bullet_list(problems))
        return cls(lazy)


def merge_lora(base: Checkpoint, lora: LoRA) -> Checkpoint:
    """Return the model with the adapter merged into its weights. The optimizer state is dropped.

    Each update is computed in float32 (float64 for float64 weights), added, and cast to the dtype of the base's tensor.
    Tensors are read one at a time, on access. If the base ties its embedding and head, and the adapter changes only one
    of them, or each differently, the result has an untied head, because that is the function that was trained.

    Raises:
        ConversionError: the adapter does not fit the base. The message names every tensor.
    """
    entries = dict(base.tensors.entries)
    touched = {*lora.updates, *lora.tensors.entries}
    is_tied = base.config.tie_word_embeddings
    if is_tied and touched & VOCABULARY_ROWS:
        entries[_HEAD] = entries[_EMBEDDING]
        is_tied = _changes_both_alike(lora)
    config = replace(base.config, tie_word_embeddings=is_tied, vocab_size=_vocab_size(base.config, lora))
    shapes = {p.torch_name: p.torch_shape for p in parameters(replace(config, tie_word_embeddings=False))}
    problems = [line for name, update in lora.updates.items() for line in _problems(name, update, shapes)]
    problems += [f"{quoted(name)} is not a parameter of the base" for name in touched if name not in shapes]
    if problems:
        raise ConversionError("the adapter does not fit its base:\n" + bullet_list(problems, limit=20))
    entries.update(lora.tensors.entries)
    entries.update({name: _merged(name, entries[name], update) for name, update in lora.updates.items()})
    if is_tied:
        entries.pop(_HEAD, None)
    return replace(base, config=config, tensors=canonicalize(LazyTensorMap(entries), config), optimizer=None)


def _merged(name: str, entry: LazyTensor, update: LoRAUpdate) -> LazyTensor:
    is_out_in = name == _HEAD  # every other matrix is stored as [in, out]

    def read() -> np.ndarray:
        dtype = np.dtype(np.float64 if entry.dtype == np.float64 else np.float32)
        a, b = (factor.read().astype(dtype, copy=False) for factor in (update.a, update.b))
        delta = (b @ a) * dtype.type(update.scaling)
        weight = entry.read().astype(dtype, copy=False)
        return (weight + (delta if is_out_in else delta.T)).astype(entry.dtype, copy=False)

    return LazyTensor(entry.dtype, entry.shape, read)


def _changes_both_alike(lora: LoRA) -> bool:
    """Whether embedding and head stay equal: both are replaced by the same tensor, and neither has an update."""
    embedding, head = (lora.tensors.entries.get(name) for name in (_EMBEDDING, _HEAD))
    if embedding is None or head is None or VOCABULARY_ROWS & {*lora.updates}:
        return False
    return same_bytes(embedding, head)


def _vocab_size(config: GPT2Config, lora: LoRA) -> int:
    """Return the rows of the embedding. PEFT saves a new embedding if the vocabulary was resized for training."""
    embedding = lora.tensors.entries.get(_EMBEDDING)
    return embedding.shape[0] if embedding is not None and embedding.shape else config.vocab_size


def _problems(name: str, update: LoRAUpdate, shapes: Mapping[str, tuple[int, ...]] | None = None) -> Iterator[str]:
    """Yield an error if an update is not two matrices of equal rank, or does not fit the `shapes` of the parameters."""
    a, b = update.a, update.b
    module = quoted(name.removesuffix(".weight"))
    if not (len(a.shape) == len(b.shape) == 2 and a.shape[0] == b.shape[1] > 0):
        yield f"{module}: A has shape {a.shape} and B {b.shape}; A must be [r, in] and B [out, r]"
    elif a.dtype not in FLOAT_DTYPES or b.dtype not in FLOAT_DTYPES:
        yield f"{module}: A holds {a.dtype} and B {b.dtype}; they must be floats"
    elif shapes is not None and name in shapes:
        shape = shapes[name][::-1] if name != _HEAD else shapes[name]
        if len(shape) != 2:
            yield f"{module} is not a matrix"
        elif (b.shape[0], a.shape[1]) != shape:
            yield f"{module}: B A has shape {(b.shape[0], a.shape[1])}; the base has {shape}"
