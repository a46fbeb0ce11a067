"""The tokenizer and sizes that a training run takes from its initial checkpoint, and checks of flags against them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import bridge
from bridge import BridgeError, Checkpoint, GPT2Config, NoTokenizerError, Tokenizer
from bridge.errors import quoted
from gpt2_jax.cli.effect import flag
from gpt2_jax.data.text.tokenizers import MADE_FROM_TEXT, make_tokenizer
from gpt2_jax.training import TrainConfig
from gpt2_jax.training.config import TOKENIZER_OF_INIT_FROM
from gpt2_jax.training.run.identity import Identity

NO_TOKENIZER = "none"
DROPOUT_RATES = ("embd_pdrop", "attn_pdrop", "resid_pdrop")


def sizes_asked_for(config: TrainConfig, default: TrainConfig | None) -> dict[str, Any]:
    """Return the sizes of the model, by name, that differ from the default."""
    if default is None:
        return {}
    sizes, defaults = vars(config.model), vars(default.model)
    return {name: value for name, value in sizes.items() if value != defaults[name] and name not in DROPOUT_RATES}


def require_sizes(asked: Mapping[str, Any], model: GPT2Config, origin: str) -> None:
    """Raise `BridgeError` for requested sizes that the model does not have.

    `origin`: what sets the sizes, for the message, such as "--init-from sets".
    """
    lines = [
        f"{flag(name)} {quoted(value)}: has no effect, because {origin} it to {getattr(model, name)}; leave it out"
        for name, value in asked.items()
        if value != getattr(model, name)
    ]
    if lines:
        raise BridgeError("\n".join(lines))


def chosen_tokenizer(config: TrainConfig, source: Checkpoint | None, resumed: Identity | None) -> Any:
    """Return the tokenizer for `open_data`: that of `source`, or the configured one if `source` has none.

    Args:
        resumed: the stored identity of the run, if one is resumed.

    Raises `BridgeError` for a `--tokenizer` that differs from the tokenizer of `source` or exceeds its vocabulary.
    """
    named = None if config.tokenizer == NO_TOKENIZER else config.tokenizer
    if source is None:
        return named
    try:
        own = source.tokenizer()
    except NoTokenizerError:
        own = None
    is_default = config.tokenizer == (TOKENIZER_OF_INIT_FROM if resumed is None else resumed.config.tokenizer)
    if own is None:
        has_none = resumed is not None and resumed.tokenizer is None
        return None if has_none or named in (None, TOKENIZER_OF_INIT_FROM) else _checked_tokenizer(named, source)
    if not is_default and not _is_same(named, own):
        raise BridgeError(
            f"--tokenizer {quoted(config.tokenizer)}: is not the tokenizer of {quoted(source.path)}, with which "
            "its weights were trained; leave it out"
        )
    return own


def _is_same(named: str | None, own: Tokenizer) -> bool:
    """Whether `named` equals the tokenizer `own`. False for a tokenizer that is trained on the data."""
    if named == TOKENIZER_OF_INIT_FROM:
        return True
    if named is None or named in MADE_FROM_TEXT:
        return False
    return bridge.tokenizer_fingerprint(make_tokenizer(named)) == bridge.tokenizer_fingerprint(own)


def _checked_tokenizer(named: str, source: Checkpoint) -> Any:
    """Return the named tokenizer. A tokenizer that `open_data` trains on the data is checked later."""
    if named in MADE_FROM_TEXT:
        return named
    tokenizer = make_tokenizer(named)
    require_rows(tokenizer, source)
    return tokenizer


def require_rows(tokenizer: Tokenizer, source: Checkpoint) -> None:
    """Raise `BridgeError` if the tokenizer has ids outside the vocabulary of `source`."""
    rows, needed = source.config.vocab_size, tokenizer.vocab_size
    if needed > rows:
        raise BridgeError(
            f"the tokenizer {quoted(tokenizer.name)} has ids up to {needed - 1}, and the vocabulary of "
            f"{quoted(source.path)} has {rows} rows; choose the --tokenizer that it was trained with"
        )
