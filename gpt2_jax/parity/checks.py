"""The checks of `verify` that run the model, and the table of all checks.

Each check is a function from `CheckInputs` to a `Check`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

import bridge
import gpt2_jax.parity.backends.jax_gpt2 as jax_gpt2
import gpt2_jax.parity.backends.torch_gpt2 as torch_gpt2
import gpt2_jax.parity.backends.transformers_gpt2 as transformers_gpt2
import gpt2_jax.parity.reporting.plots as plots
import gpt2_jax.parity.text_checks as text_checks
import gpt2_jax.parity.tolerances as tolerances
from bridge import Checkpoint, SequenceClassifier
from bridge.conversion import mixed_dtypes
from bridge.storage.tensors import LazyTensor, same_bytes
from gpt2_jax.parity.activations import first_divergence
from gpt2_jax.parity.comparisons import (
    SHORT_NAMES,
    compare_activations,
    compare_class_logits,
    compare_errors,
    compare_gradients,
    compare_logits,
    compare_training,
)
from gpt2_jax.parity.inputs import CheckInputs, pad
from gpt2_jax.parity.metrics import max_relative_difference, next_token_loss
from gpt2_jax.parity.reporting.report import Check, Compared, Measurement

FP64_TRAIN_BYTES = 2 * 2**30
"""Train in float64 too if weights, gradients and both moments take at most this many bytes."""


def logits(inputs: CheckInputs) -> Check:
    """The logits are equal in float64, float32 and bfloat16."""
    exact = torch_gpt2.logits(inputs.checkpoint, inputs.ids, None, "float64")
    actual = jax_gpt2.logits(inputs.checkpoint, inputs.ids, None, "float64")
    compared = [compare_logits("float64", exact, actual, inputs.n_layer)]
    for dtype in ("float32", "bfloat16"):
        expected = torch_gpt2.logits(inputs.checkpoint, inputs.ids, None, dtype)
        actual = jax_gpt2.logits(inputs.checkpoint, inputs.ids, None, dtype)
        compared += (
            compare_logits(dtype, expected, actual, inputs.n_layer),
            compare_errors(dtype, exact, expected, actual),
        )
    check = Check.of("logits", compared, note=f"largest logit {float(np.abs(exact).max()):.3g}")
    return _with_location(check, inputs)


def hidden_states(inputs: CheckInputs) -> Check:
    """All activations, inside and after every layer, are equal in float64."""
    differences = compare_activations(torch_gpt2, inputs)
    worst = max(differences, key=differences.__getitem__)
    name = f"fp64 max relative difference of {len(differences)} activations"
    measurement = Measurement(name, differences[worst], tolerances.ACTIVATION_FP64, worst)
    curves = plots.by_activation("Differences in fp64, by activation", differences, tolerances.ACTIVATION_FP64)
    return Check("hidden states", (measurement,), first_divergence=first_divergence(differences), plots=(curves,))


def gradients(inputs: CheckInputs) -> Check:
    """The gradients of the loss are equal for every parameter, in float64 and float32."""
    return _with_location(Check.of("gradients", [compare_gradients(torch_gpt2.gradients, inputs)]), inputs)


def training(inputs: CheckInputs) -> Check:
    """Ten steps of AdamW, with torch.optim and with optax, give equal losses and equal weights."""
    compared = compare_training(torch_gpt2, "float32", inputs)
    # Weights, gradients and two moments, of 8 bytes each.
    if bridge.num_parameters(inputs.checkpoint.config) * 4 * 8 > FP64_TRAIN_BYTES:
        return Check.of("training", [compared], note="fp64 skipped: it needs more than 2 GiB per backend")
    return Check.of("training", [compare_training(torch_gpt2, "float64", inputs), compared])


def padding(inputs: CheckInputs) -> Check:
    """Rows of different lengths, padded left or right in one batch, give the same logits as each row alone."""
    rows = inputs.rows_of_different_lengths()
    unpadded = [torch_gpt2.logits(inputs.checkpoint, row[None], None, "float64")[0] for row in rows]
    compared: list[Compared] = []
    divergence = ""
    for side in ("left", "right"):
        ids, mask = pad(rows, side)
        for backend in (torch_gpt2, jax_gpt2):
            batch = backend.logits(inputs.checkpoint, ids, mask, "float64")
            differences = [max_relative_difference(batch[i][mask[i] == 1], row) for i, row in enumerate(unpadded)]
            worst = int(np.argmax(differences))
            name = f"{backend.NAME}, padded {side} vs unpadded, max relative difference"
            location = f"row of {len(rows[worst])} tokens"
            measurement = Measurement(name, differences[worst], tolerances.PADDING_FP64, location)
            curve = plots.by_length(f"{backend.NAME}, padded {side}", rows, differences, tolerances.PADDING_FP64)
            compared.append(Compared((measurement,), (curve,)))
        if not measurement.passed and not divergence:
            divergence = first_divergence(compare_activations(torch_gpt2, inputs, ids, mask))
    return replace(Check.of("padding", compared), first_divergence=divergence)


def round_trip(inputs: CheckInputs) -> Check:
    """Conversion to the Flax tree and back, per layer and stacked, preserves every byte of every tensor."""
    checkpoint = inputs.checkpoint
    is_mixed = mixed_dtypes(checkpoint.tensors, checkpoint.config)
    measurements = []
    for stacked in [False] if is_mixed else [False, True]:
        tree = bridge.to_flax(checkpoint.tensors, checkpoint.config, stacked=stacked)
        back = bridge.to_torch(tree, checkpoint.config)
        changed = [
            name
            for name, tensor in checkpoint.tensors.items()
            if name not in back or not same_bytes(LazyTensor.of(tensor), LazyTensor.of(back[name]))
        ]
        form = "stacked" if stacked else "per layer"
        name = f"changed tensors of {len(checkpoint.tensors)}, {form}"
        measurements.append(Measurement(name, len(changed), 0, ", ".join(changed[:3])))
    note = "stacked form skipped: layers of different dtypes cannot be stacked" if is_mixed else ""
    return Check("round trip", tuple(measurements), note)


def prediction(inputs: CheckInputs) -> Check:
    """The loss on text is below ln(V), the loss of a uniform guess.

    This finds weights in a wrong layout: both backends agree on them, but they predict nothing.
    """
    if inputs.classifier is not None:
        return Check("prediction", note="a classifier does not predict tokens")
    if not inputs.tokens.is_text:
        return Check("prediction", note="needs text in the checkpoint's own tokens; give --text")
    uniform = math.log(inputs.checkpoint.config.vocab_size)
    limit = None if inputs.untrained else tolerances.PREDICTION
    measurements = []
    for backend in (torch_gpt2, jax_gpt2):
        logits = backend.logits(inputs.checkpoint, inputs.ids, None, "float32")
        loss = next_token_loss(logits, inputs.ids)
        name = f"{backend.NAME} loss {loss:.4f} nats per token, relative to ln(V) = {uniform:.4f}"
        measurements.append(Measurement(name, loss / uniform, limit))
    check = Check("prediction", tuple(measurements))
    if check.passed:
        return check
    return replace(check, note="worse than guessing: the weights have a wrong layout, or are untrained (--untrained)")


def transformers(inputs: CheckInputs) -> Check:
    """The model of transformers gives equal logits and gradients."""
    name = "transformers"
    try:
        transformers_gpt2.require_model(inputs.checkpoint)
    except transformers_gpt2.UnavailableError as reason:
        return Check(name, note=str(reason))
    compared = []
    for dtype in ("float64", "float32"):
        expected = transformers_gpt2.logits(inputs.checkpoint, inputs.ids, dtype)
        actual = jax_gpt2.logits(inputs.checkpoint, inputs.ids, None, dtype)
        compared.append(compare_logits(dtype, expected, actual, inputs.n_layer))
    compared.append(compare_gradients(transformers_gpt2.gradients, inputs))
    return _with_location(Check.of(name, compared), inputs)


def classification(inputs: CheckInputs) -> Check:
    """The logits of the classes are equal in float64 and float32, with padding on either side.

    A classifier gets no mask, so it attends to padding on the left, as in transformers without a mask.
    """
    name, classifier = "classification", inputs.classifier
    if classifier is None:
        return Check(name, note="the checkpoint has no classification head")
    batches, note = _batches_to_classify(inputs, classifier)
    others = [jax_gpt2]
    try:
        transformers_gpt2.require_model(classifier.checkpoint)
        others.append(transformers_gpt2)
    except transformers_gpt2.UnavailableError as reason:
        note += f"; without a third opinion: {reason}"
    ids, measurements = np.concatenate([*batches.values()]), []  # together, to compile once
    for dtype in ("float64", "float32"):
        expected = torch_gpt2.class_logits(classifier, ids, dtype)
        for side in others:
            actual = side.class_logits(classifier, ids, dtype)
            halves = zip(batches, np.split(expected, len(batches)), np.split(actual, len(batches)), strict=True)
            for batch, a, b in halves:
                title = f"logits of classes, {batch}, {side.NAME} vs {torch_gpt2.NAME}"
                measurements.append(compare_class_logits(title, dtype, a, b, inputs.n_layer))
    return Check(name, tuple(measurements), note)


def batch_invariance(inputs: CheckInputs) -> Check:
    """With `batch_invariant`, rows of different lengths get the same bits alone, in a batch and without a cache."""
    name, rows = "batch invariance", [row.tolist() for row in inputs.rows_of_different_lengths()]
    measurements = []
    for dtype in ("float32", "bfloat16"):
        found = jax_gpt2.batch_invariant_outputs(inputs.checkpoint, rows, dtype)
        for comparison, different in found.items():
            title = f"{SHORT_NAMES[dtype]} rows of {len(rows)} with other bits, {comparison}"
            measurements.append(Measurement(title, different, 0))
    return Check(name, tuple(measurements), "generation with batch_invariant, on one thread")


def _batches_to_classify(inputs: CheckInputs, classifier: SequenceClassifier) -> tuple[dict[str, np.ndarray], str]:
    """Return name -> ids, and a remark. Without a padding id, only single rows can be classified."""
    rows, pad_token_id = inputs.rows_of_different_lengths(), classifier.pad_token_id
    if pad_token_id is None or not 0 <= pad_token_id < classifier.checkpoint.config.vocab_size:
        return {"one row": rows[-1][None]}, "one row, because the vocabulary has no pad_token_id"
    batches = {f"padded {side}": pad(rows, side, pad_token_id)[0] for side in ("left", "right")}
    return batches, f"{len(rows)} rows, {classifier.num_labels} classes"


def _with_location(check: Check, inputs: CheckInputs) -> Check:
    """Add the first divergent activation to a check that failed."""
    if check.passed:
        return check
    return replace(check, first_divergence=first_divergence(compare_activations(torch_gpt2, inputs)))


CHECKS: Mapping[str, Callable[[CheckInputs], Check]] = {
    "logits": logits,
    "hidden-states": hidden_states,
    "gradients": gradients,
    "training": training,
    "padding": padding,
    "round-trip": round_trip,
    "prediction": prediction,
    "transformers": transformers,
    "tokenizer": text_checks.tokenizer,
    "generation": text_checks.generation,
    "classification": classification,
    "batch-invariance": batch_invariance,
}
"""In the order of the report. The keys are the names in `gpt2 verify --checks`."""

ON_REQUEST = ("batch-invariance",)
"""Checks that run only if they are named, because they need one thread."""

OF_LANGUAGE_MODELS = ("prediction", "generation")
OF_CLASSIFIERS = ("classification",)


def checks_for(checkpoint: Checkpoint | SequenceClassifier) -> tuple[str, ...]:
    """Return the names of the checks that run by default for a language model or a classifier."""
    others = OF_LANGUAGE_MODELS if isinstance(checkpoint, SequenceClassifier) else OF_CLASSIFIERS
    return tuple(name for name in CHECKS if name not in (*others, *ON_REQUEST))
