"""One checkpoint, both backends, the same tokens, and a report that they are the same function."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

import bridge
from bridge import BridgeError, Checkpoint, NoTokenizerError, TokenizerError
from gpt2_jax.parity.checks import CHECKS, Subject
from gpt2_jax.parity.report import Report

BUILT_IN_TEXT = """\
When in the Course of human events, it becomes necessary for one people to dissolve the political bands \
which have connected them with another, and to assume among the powers of the earth, the separate and equal \
station to which the Laws of Nature and of Nature's God entitle them, a decent respect to the opinions of \
mankind requires that they should declare the causes which impel them to the separation.

We hold these truths to be self-evident, that all men are created equal, that they are endowed by their \
Creator with certain unalienable Rights, that among these are Life, Liberty and the pursuit of Happiness. \
That to secure these rights, Governments are instituted among Men, deriving their just powers from the \
consent of the governed, That whenever any Form of Government becomes destructive of these ends, it is the \
Right of the People to alter or to abolish it, and to institute new Government, laying its foundation on \
such principles and organizing its powers in such form, as to them shall seem most likely to effect their \
Safety and Happiness.
"""
"""The Declaration of Independence of the United States, 1776; in the public domain."""

_FROM_SEED = "random ids from seed"


def verify(
    checkpoint: Checkpoint,
    *,
    source: str = "",
    text: str | None = None,
    batch: int = 2,
    length: int = 256,
    seed: int = 0,
    untrained: bool = False,
    checks: Iterable[str] = tuple(CHECKS),
    progress: Callable[[str], None] = lambda name: None,
) -> Report:
    """Run the checks and report. Needs torch; float64 runs on the CPU, the rest on JAX's default device.

    Args:
        source: what to call the checkpoint in the report.
        text: what to run it on, in the checkpoint's tokens; by default a built-in text. Without a
            tokenizer it runs on ids drawn from `seed`, and cannot tell whether the model predicts.
        batch, length: how many sequences of how many tokens; cut to `n_positions`.
        untrained: the weights are known to be random, so a loss above ln(V) is no fault.
        checks: names from `gpt2_jax.parity.CHECKS`.
        progress: called with the name of each check before it starts.

    Raises `TokenizerError` if the checkpoint's tokenizer is damaged, or missing for a `text` that is
    given, and `BridgeError` if there are fewer than two tokens to a sequence.
    """
    config = checkpoint.config
    shape = (batch, min(length, config.n_positions))
    if shape[0] < 1 or shape[1] < 2 or seed < 0:
        raise BridgeError(f"{shape[0]} sequences of {shape[1]} tokens, seed {seed}: a prediction takes two tokens")
    ids, origin = _tokens(checkpoint, text, shape, seed)
    subject = Subject(checkpoint, ids, is_text=origin != _FROM_SEED, untrained=untrained)
    about: dict[str, Any] = {
        "model": f"{bridge.num_parameters(config):,} parameters, {config.n_layer} layers, width {config.n_embd}",
        "tokens": f"{shape[0]} x {shape[1]}, {origin if origin != _FROM_SEED else f'{origin} {seed}'}",
    }
    results = []
    for name in checks:
        progress(name)
        results.append(CHECKS[name](subject))
    return Report(source or str(checkpoint.path or checkpoint.format), about, tuple(results), checkpoint.diagnostics)


def _tokens(checkpoint: Checkpoint, text: str | None, shape: tuple[int, int], seed: int) -> tuple[np.ndarray, str]:
    """[B, T] ids and where they come from; a text too short is repeated."""
    try:
        tokens = checkpoint.tokenizer().encode_ordinary(BUILT_IN_TEXT if text is None else text)
    except NoTokenizerError:
        if text is not None:
            raise
        return np.random.default_rng(seed).integers(0, checkpoint.config.vocab_size, shape), _FROM_SEED
    if not tokens:
        raise TokenizerError("the text is empty; give at least one token")
    return np.resize(np.array(tokens, np.int64), shape), "the built-in text" if text is None else "the given text"
