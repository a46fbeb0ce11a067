"""Sequence classifiers: transformers' `GPT2ForSequenceClassification`, read and written in Hugging Face format.

The classifier is a GPT-2 without its head. A matrix `score` maps the last hidden state of the last token that is not
padding to one logit per label.

Source: https://github.com/huggingface/transformers, models/gpt2/modeling_gpt2.py (version 5.23).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from bridge.checkpoint import Checkpoint
from bridge.config import GPT2Config, config_diagnostics, harmless_fields
from bridge.conversion import FlaxTree, canonicalize, to_flax, to_torch
from bridge.errors import CheckpointError, ConversionError, quoted
from bridge.finite import rejecting_non_finite
from bridge.formats.directory import CONFIG, carry_files, config_beside, read_json, write_json
from bridge.formats.huggingface import NAME, stored_tensors, write_model
from bridge.formats.recognition import choose_checkpoint
from bridge.names import canonical_names
from bridge.storage.atomic_writes import new_directory
from bridge.storage.dtypes import FLOAT_DTYPES
from bridge.storage.tensors import LazyTensor, LazyTensorMap

_SCORE = "score.weight"
_ARCHITECTURE = "GPT2ForSequenceClassification"


@dataclass(frozen=True)
class SequenceClassifier:
    """A GPT-2 with a classification head, independent of the backend."""

    checkpoint: Checkpoint
    """The GPT-2. Its language-model head is tied, and the classifier does not use it."""
    score: LazyTensor
    """`[C, D]`: one row per label, in PyTorch's layout."""

    def __post_init__(self) -> None:
        shape, width = self.score.shape, self.checkpoint.config.n_embd
        if len(shape) != 2 or shape[0] < 1 or shape[1] != width or self.score.dtype not in FLOAT_DTYPES:
            raise ConversionError(
                f"{_SCORE} has shape {shape} and holds {self.score.dtype}; it must be a float matrix [labels, {width}]"
            )

    @property
    def num_labels(self) -> int:
        """C: the number of labels."""
        return self.score.shape[0]

    @property
    def pad_token_id(self) -> int | None:
        """The padding id in `config.json`, or None."""
        value = self.checkpoint.extra.get("pad_token_id")
        return value if type(value) is int else None

    def to_flax(self) -> FlaxTree:
        """Return the parameter tree of `gpt2_jax.GPT2ForSequenceClassification`, with numpy arrays as leaves."""
        transformer = to_flax(self.checkpoint.tensors, self.checkpoint.config)
        return {"transformer": transformer, "score": {"kernel": self.score.read().T}}

    def with_flax(self, params: Mapping[str, Any]) -> SequenceClassifier:
        """Return the classifier with the weights of a tree as `to_flax` returns it.

        Raises `ConversionError` if the tree is not that of this model.
        """
        if {*params} != {"transformer", "score"} or {*params["score"]} != {"kernel"}:
            raise ConversionError("the tree of a classifier must have exactly transformer and score/kernel")
        state = to_torch(params["transformer"], self.checkpoint.config)
        return self.with_torch({**state, _SCORE: np.asarray(params["score"]["kernel"]).T})

    def with_torch(self, tensors: Mapping[str, Any]) -> SequenceClassifier:
        """Return the classifier with the weights of a state_dict, in names that `bridge.canonicalize` accepts.

        Raises `ConversionError` if the tensors are not those of this model.
        """
        return _classifier(LazyTensorMap.of(tensors), self.checkpoint)


def new_classifier(
    checkpoint: Checkpoint, labels: Sequence[str], *, pad_token_id: int | None = None, seed: int = 0
) -> SequenceClassifier:
    """Return a classifier with the weights of a language model and a random head, to train it.

    The head is drawn from a normal distribution with standard deviation `initializer_range`, as in transformers. The
    head of the language model is dropped.

    Args:
        labels: the names of the labels, for `id2label` of `config.json`.
        pad_token_id: the id of padding, which a batch of several rows needs. By default, that of the checkpoint.

    Raises `ConversionError` if labels are missing or not unique, or the padding id is outside the vocabulary.
    """
    config = replace(checkpoint.config, tie_word_embeddings=True)
    if not labels or len({*labels}) != len(labels):
        raise ConversionError(f"labels={quoted(list(labels))}: must be at least one label, without duplicates")
    if pad_token_id is not None and not 0 <= pad_token_id < config.vocab_size:
        raise ConversionError(f"pad_token_id={pad_token_id}: the vocabulary has {config.vocab_size} tokens")
    extra = {**checkpoint.extra, "id2label": {str(k): label for k, label in enumerate(labels)}}  # JSON keys are strings
    extra["label2id"] = {label: k for k, label in enumerate(labels)}
    if pad_token_id is not None:
        extra["pad_token_id"] = pad_token_id
    tensors = LazyTensorMap({n: entry for n, entry in checkpoint.tensors.entries.items() if n != "lm_head.weight"})
    score = np.random.default_rng(seed).normal(0.0, config.initializer_range, (len(labels), config.n_embd))
    base = replace(checkpoint, config=config, tensors=tensors, extra=extra, optimizer=None)
    return SequenceClassifier(base, LazyTensor.of(score.astype(np.float32)))


def is_classifier(source: str | Path) -> bool:
    """Whether `source` is a model in Hugging Face format with a tensor `score.weight`.

    Raises `BridgeError` if its files are damaged, or if there are several checkpoints.
    """
    found, _ = choose_checkpoint(Path(source).absolute()) or (None, ())
    return found is not None and found.format.name == NAME and _SCORE in canonical_names(stored_tensors(found.path)[0])


def load_classifier(source: str | Path) -> SequenceClassifier:
    """Open transformers' `GPT2ForSequenceClassification` from its directory.

    Only names, shapes and the configuration are read; each tensor is read on access.

    Raises:
        BridgeError: there is no such model. The message names the problem.
    """
    path = Path(source).absolute()
    found, notes = choose_checkpoint(path) or (None, ())
    if found is None or found.format.name != NAME:
        raise CheckpointError(f"{quoted(path)} has no config.json beside weights in Hugging Face format")
    weights = found.path
    hf = read_json(config_beside(weights))
    # A classifier has no language-model head that could be untied.
    config = replace(GPT2Config.from_hf(hf), tie_word_embeddings=True)
    stored, left_out = stored_tensors(weights)
    notes = (*config_diagnostics(hf), *left_out, *notes)
    like = Checkpoint(config, stored, NAME, weights.parent, harmless_fields(hf), notes, source=weights)
    try:
        return _classifier(stored, like)
    except ConversionError as error:
        raise ConversionError(f"{quoted(path)}: {error}") from error


def save_classifier(classifier: SequenceClassifier, target: str | Path, *, allow_non_finite: bool = False) -> None:
    """Write a directory that transformers' `GPT2ForSequenceClassification.from_pretrained` reads. The write is atomic.

    Args:
        target: a path that does not exist, or an empty directory.
        allow_non_finite: write NaN and infinity. By default they raise a `ConversionError` that names the tensor.

    Raises:
        CheckpointError: the target exists and is not empty, or cannot be written.
        ConfigError: the model has no biases, which transformers' GPT-2 requires.
    """
    checkpoint = classifier.checkpoint
    fields = {**checkpoint.config.to_hf(_labelled(classifier)), "architectures": [_ARCHITECTURE]}
    named = {f"transformer.{name}": entry for name, entry in checkpoint.tensors.entries.items()}
    tensors = LazyTensorMap({**named, _SCORE: classifier.score})
    tensors = tensors if allow_non_finite else rejecting_non_finite(tensors)
    with new_directory(target) as directory:
        write_json(directory / CONFIG, fields)
        write_model(directory, tensors.entries)
        carry_files(checkpoint, directory)


def _classifier(stored: LazyTensorMap, like: Checkpoint) -> SequenceClassifier:
    """Split tensors into those of the GPT-2 and the head."""
    names = canonical_names(stored)
    if _SCORE not in names:
        raise ConversionError(f"{_SCORE} is missing; bridge.load reads a model without a classification head")
    others = {name: entry for name, entry in stored.entries.items() if name != names[_SCORE]}
    tensors = canonicalize(LazyTensorMap(others), like.config)
    found = SequenceClassifier(replace(like, tensors=tensors, optimizer=None), stored.entries[names[_SCORE]])
    labels = like.extra.get("id2label")
    if labels is None or _name_all(labels, found.num_labels):
        return found
    note = f"id2label of {CONFIG} does not name the {found.num_labels} rows of {_SCORE}; an export has LABEL_0, ..."
    notes = dict.fromkeys((*found.checkpoint.diagnostics, note))  # the file may already have this note
    return replace(found, checkpoint=replace(found.checkpoint, diagnostics=tuple(notes)))


def _name_all(labels: Any, count: int) -> bool:
    """Whether `id2label` names the labels 0 to `count` - 1, and no other."""
    return isinstance(labels, dict) and {*labels} == {*map(str, range(count))}


def _labelled(classifier: SequenceClassifier) -> dict[str, Any]:
    """Return the further fields of `config.json`. transformers takes the number of labels from `id2label`."""
    extra, count = dict(classifier.checkpoint.extra), classifier.num_labels
    if not _name_all(extra.get("id2label"), count):
        labels = [f"LABEL_{k}" for k in range(count)]
        extra["id2label"] = {str(k): label for k, label in enumerate(labels)}
        extra["label2id"] = {label: k for k, label in enumerate(labels)}
    return extra
