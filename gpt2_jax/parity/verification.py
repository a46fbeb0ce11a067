"""Run one checkpoint on the same tokens in both backends and report whether they compute the same function."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict

import bridge
from bridge import BridgeError, Checkpoint, SequenceClassifier
from gpt2_jax.parity.checks import CHECKS, checks_for
from gpt2_jax.parity.inputs import CheckInputs, choose_tokens, default_length
from gpt2_jax.parity.reporting.report import SAME_CLASSIFIER, SAME_FUNCTION, Report
from gpt2_jax.reporting.environment import environment


def verify(
    checkpoint: Checkpoint | SequenceClassifier,
    *,
    source: str = "",
    text: str | None = None,
    batch_size: int = 2,
    seq_len: int | None = None,
    seed: int = 0,
    untrained: bool = False,
    checks: Iterable[str] | None = None,
    progress: Callable[[str], None] = lambda name: None,
) -> Report:
    """Run the checks and return their report.

    Needs PyTorch. float64 runs on the CPU, all else on JAX's default device.

    Args:
        checkpoint: a language model or a sequence classifier. The checks of a classifier run on its GPT-2 with a tied
            head, except `classification`, which runs on the whole model.
        source: the name of the checkpoint in the report.
        text: the text to run the model on. The default is a built-in text, without characters that a character
            tokenizer lacks. If the tokenizer lacks more than a tenth of the text, the tokens are random characters of
            the tokenizer. Without a tokenizer, the tokens are random ids. Random tokens are drawn from `seed`, and the
            check of predictions is skipped for them, because no model predicts them.
        batch_size: number of sequences.
        seq_len: tokens per sequence; at most `n_positions` are used. The default is at least 384, and 64 more than half
            of `n_positions`.
        seed: the seed of random tokens.
        untrained: the weights are known to be random, so a loss above ln(V) is not a failure.
        checks: names from `gpt2_jax.parity.CHECKS`. The default is `gpt2_jax.parity.checks_for(checkpoint)`.
        progress: called with the name of each check before it starts.

    Raises:
        TokenizerError: the checkpoint's tokenizer is damaged, or is missing although `text` is given.
        CheckpointError: the check of generation is to run, and the checkpoint's generation settings are invalid.
        BridgeError: there is no sequence or fewer than two tokens per sequence, or `seed` is negative, or it is given
            but not used.
    """
    names = checks_for(checkpoint) if checks is None else tuple(checks)
    classifier = checkpoint if isinstance(checkpoint, SequenceClassifier) else None
    model = checkpoint.checkpoint if isinstance(checkpoint, SequenceClassifier) else checkpoint
    length = default_length(model.config) if seq_len is None else seq_len
    shape = (batch_size, min(length, model.config.n_positions))
    if shape[0] < 1 or shape[1] < 2 or seed < 0:
        raise BridgeError(
            f"{shape[0]} sequences of {shape[1]} tokens, seed {seed}: give at least one sequence of two tokens, and a "
            "seed of 0 or more"
        )
    tokens = choose_tokens(model, text, shape, seed)
    inputs = CheckInputs(model, tokens, untrained, classifier)
    if "generation" in names:
        _ = inputs.generation_defaults  # invalid settings are an error before the first check
    details = {"model": _description(model, classifier), "tokens": f"{shape[0]} x {shape[1]}, {tokens.origin}"}
    results = []
    for name in names:
        progress(name)
        results.append(CHECKS[name](inputs))
    title = source or str(model.path or model.format)
    claim = SAME_FUNCTION if classifier is None else SAME_CLASSIFIER
    return Report(
        title,
        details,
        tuple(results),
        model.diagnostics,
        claim,
        config=asdict(model.config),
        fingerprint=bridge.fingerprint(model.tensors),
        environment=environment(),
    )


def _description(model: Checkpoint, classifier: SequenceClassifier | None) -> str:
    config = model.config
    size = f"{bridge.num_parameters(config):,} parameters, {config.n_layer} layers, width {config.n_embd}"
    return size if classifier is None else f"{size}, and a classification head of {classifier.num_labels} classes"
