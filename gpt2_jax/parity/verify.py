"""Run one checkpoint on the same tokens in both backends and report whether they compute the same function."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

import bridge
from bridge import BridgeError, Checkpoint, NoTokenizerError, TokenizerError
from gpt2_jax.parity.checks import CHECKS, Subject
from gpt2_jax.parity.report import Report

if TYPE_CHECKING:
    import tiktoken

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

ENOUGH_OF_TEXT = 0.9
"""If the tokenizer has at least this fraction of the built-in text's characters, a trained model can predict the rest
of the text."""


def verify(
    checkpoint: Checkpoint,
    *,
    source: str = "",
    text: str | None = None,
    batch: int = 2,
    seq_len: int = 256,
    seed: int = 0,
    untrained: bool = False,
    checks: Iterable[str] = tuple(CHECKS),
    progress: Callable[[str], None] = lambda name: None,
) -> Report:
    """Run the checks and report. Needs torch; float64 runs on the CPU, the rest on JAX's default device.

    Args:
        source: the name of the checkpoint in the report.
        text: the text to run it on. By default a built-in text, without the characters that a tokenizer of characters
            lacks. If it lacks more than a tenth of the text, the tokens are random characters of the tokenizer. Without
            a tokenizer, they are random ids. Both are drawn from `seed`, and the check of predictions is skipped,
            because no model predicts random tokens.
        batch, seq_len: number of sequences, and of tokens in each; at most `n_positions` are used.
        untrained: the weights are known to be random, so a loss above ln(V) is not a failure.
        checks: names from `gpt2_jax.parity.CHECKS`.
        progress: called with the name of each check before it starts.

    Raises:
        TokenizerError: the checkpoint's tokenizer is damaged, or is missing although `text` is given.
        BridgeError: a sequence has fewer than two tokens, or `seed` is given but not used.
    """
    config = checkpoint.config
    shape = (batch, min(seq_len, config.n_positions))
    if shape[0] < 1 or shape[1] < 2 or seed < 0:
        raise BridgeError(f"{shape[0]} sequences of {shape[1]} tokens, seed {seed}: a prediction needs two tokens")
    tokens = _tokens(checkpoint, text, shape, seed)
    subject = Subject(checkpoint, tokens.ids, is_text=tokens.are_text, untrained=untrained)
    about: dict[str, Any] = {
        "model": f"{bridge.num_parameters(config):,} parameters, {config.n_layer} layers, width {config.n_embd}",
        "tokens": f"{shape[0]} x {shape[1]}, {tokens.origin}",
    }
    results = []
    for name in checks:
        progress(name)
        results.append(CHECKS[name](subject))
    return Report(source or str(checkpoint.path or checkpoint.format), about, tuple(results), checkpoint.diagnostics)


@dataclass(frozen=True)
class _Tokens:
    """Token ids [B, T], their origin, and whether they are text that a trained model should predict."""

    ids: np.ndarray
    origin: str
    are_text: bool


def _tokens(checkpoint: Checkpoint, text: str | None, shape: tuple[int, int], seed: int) -> _Tokens:
    """Return the tokens to run on. A text that is too short is repeated."""
    rng = np.random.default_rng(seed)
    try:
        tokenizer = checkpoint.tokenizer()
    except NoTokenizerError:
        if text is not None:
            raise
        ids = rng.integers(0, checkpoint.config.vocab_size, shape)
        return _Tokens(ids, f"random ids from seed {seed}", are_text=False)
    origin = "the built-in text" if text is None else "the given text"
    if text is None:
        text = _encodable(BUILT_IN_TEXT, tokenizer)
        if len(text) < ENOUGH_OF_TEXT * len(BUILT_IN_TEXT):
            ids = rng.choice(sorted(tokenizer._mergeable_ranks.values()), shape)
            return _Tokens(ids, f"random characters of its tokenizer from seed {seed}", are_text=False)
        if len(text) < len(BUILT_IN_TEXT):
            origin += f", without {len(BUILT_IN_TEXT) - len(text)} characters that the tokenizer lacks"
    if seed:
        raise BridgeError(f"seed={seed}: has no effect, because the tokens come from a text; leave it out")
    encoded = tokenizer.encode_ordinary(text)
    if not encoded:
        raise TokenizerError("the text is empty; give at least one token")
    return _Tokens(np.resize(np.array(encoded, np.int64), shape), origin, are_text=True)


def _encodable(text: str, tokenizer: tiktoken.Encoding) -> str:
    """Remove the characters that a tokenizer of characters lacks. Other tokenizers can encode every text."""
    from bridge.tokenizers.characters import CharacterEncoding  # imports tiktoken

    if not isinstance(tokenizer, CharacterEncoding):
        return text
    return "".join(character for character in text if character.encode() in tokenizer._mergeable_ranks)
