"""The checks of text: the checkpoint's tokenizer, and greedy generation with the checkpoint's own settings.

transformers is the third opinion if it is installed and can read the files beside the weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

import gpt2_jax.parity.backends.jax_gpt2 as jax_gpt2
import gpt2_jax.parity.backends.torch_gpt2 as torch_gpt2
import gpt2_jax.parity.backends.transformers_gpt2 as transformers_gpt2
from bridge import Tokenizer, TokenizerError
from bridge.comparison.strings import difficult_strings, encodable
from bridge.comparison.token_ids import Ids, Reader, first_difference, no_token
from bridge.errors import quoted
from bridge.generation.output import InvalidLogits
from bridge.tokenizers.byte_level_bpe import ByteLevelBPE
from bridge.tokenizers.characters import CharacterTokenizer
from bridge.tokenizers.tokenizer import without_lone_surrogates
from gpt2_jax.parity.inputs import CheckInputs
from gpt2_jax.parity.reporting.report import Check, Measurement

OURS = "this project"

NEW_TOKENS = 12
"""Maximum number of new tokens for each prompt, to save time."""

MOST_BEAMS = 4
"""Maximum number of beams, to save time and memory. A checkpoint may ask for any number."""


def count(name: str, differences: Sequence[str]) -> Measurement:
    """The number of differences, with the tolerance 0, and the first difference."""
    return Measurement(name, len(differences), 0, differences[0] if differences else "")


# The tokenizer


def tokenizer(inputs: CheckInputs) -> Check:
    """The tokenizer gives transformers' ids and text for difficult strings.

    If transformers cannot read the files, each string must survive a round trip.
    """
    name, ours = "tokenizer", inputs.tokens.tokenizer
    if ours is None:
        return Check(name, note=inputs.tokens.no_tokenizer)
    try:
        theirs = transformers_gpt2.tokenizer(inputs.checkpoint)
    except transformers_gpt2.UnavailableError as reason:
        return Check(name, (_round_trip(ours),), f"round trip instead of a comparison: {reason}")
    return Check(name, tuple(_against_transformers(ours, theirs, inputs.checkpoint.config.vocab_size)))


def _against_transformers(ours: Tokenizer, theirs: Any, vocab_size: int) -> Iterable[Measurement]:
    # Use the added tokens of both sides, because each side may lack tokens of the other. transformers also adds special
    # tokens whose ids are outside the vocabulary. The model has no embedding for these.
    markers = [*ours.added, *(token for token, id in theirs.get_added_vocab().items() if id < vocab_size)]
    readers = Reader(transformers_gpt2.NAME, theirs.convert_ids_to_tokens), Reader(OURS, ours.token_of)
    refused, ids_differ, texts_differ = [], [], []
    strings = _strings(ours, markers)
    for text in strings:
        try:
            ids = ours.encode(text)
        except TokenizerError as error:  # for example, a text with a byte that has no token
            refused.append(f"{quoted(text)}: {error}")
            continue
        try:  # transformers cannot encode a lone surrogate; this project encodes it as U+FFFD
            expected = transformers_gpt2.encode(theirs, without_lone_surrogates(text))
        except transformers_gpt2.UnavailableError as reason:
            ids_differ.append(f"{quoted(text)}: {reason}")
            continue
        if ids != expected:
            ids_differ.append(first_difference(text, expected, ids, readers))
            continue
        for skip in (False, True):
            decoded, wanted = (t.decode(ids, skip_special_tokens=skip) for t in (ours, theirs))
            if decoded != wanted:
                texts_differ.append(_difference_of_texts(text, wanted, decoded))
                break
    yield count(f"strings whose ids differ from those of transformers (of {len(strings)})", ids_differ)
    yield count("strings whose decoded text differs from that of transformers", texts_differ)
    if refused:
        yield Measurement("strings that the tokenizer cannot encode", len(refused), len(strings) - 1, refused[0])


def _round_trip(ours: Tokenizer) -> Measurement:
    """Encode and decode each string. Lossless tokenizers must return the string, all others a stable text."""
    strings, changed = _strings(ours, ours.added), []
    returns_text = _is_lossless(ours)
    unstable = {token.id for token in ours.added.values()} | {ours.id_of(ours.special.unk or "")}
    for text in map(without_lone_surrogates, strings):
        try:
            ids = ours.encode(text, add_special_tokens=False)
        except TokenizerError:
            continue
        decoded = ours.decode(ids)
        if returns_text:
            if decoded != text:
                changed.append(_difference_of_texts(text, text, decoded))
        elif not unstable & {*ids}:  # added tokens may gain spaces, and unknown tokens are lost
            decoded = decoded.lstrip()  # SentencePiece's decoders remove a space at the start each time
            again, last = _encoded_again(ours, decoded)
            if again != last:
                changed.append(first_difference(decoded, again, last, (Reader(OURS, ours.token_of),) * 2))
    return count(f"strings that change in a round trip (of {len(strings)})", changed)


def _encoded_again(ours: Tokenizer, text: str) -> tuple[Ids, Ids]:
    """Return the ids of a text before and after a round trip. They are equal if the text is already normalized."""
    ids = ours.encode(text, add_special_tokens=False)
    return ids, ours.encode(ours.decode(ids), add_special_tokens=False)


def _is_lossless(ours: Tokenizer) -> bool:
    """Whether decoding returns every text. An added token that is spelled like a byte is decoded as that byte."""
    if isinstance(ours, CharacterTokenizer):
        return True
    is_own_text = all(ours.decode([token.id]) == token.content for token in ours.added.values())
    return isinstance(ours, ByteLevelBPE) and not ours.add_prefix_space and is_own_text


def _strings(ours: Tokenizer, markers: Iterable[str]) -> list[str]:
    return [encodable(text, ours) for text in difficult_strings(markers)]


def _difference_of_texts(text: str, expected: str, actual: str) -> str:
    pairs = enumerate(zip(expected, actual, strict=False))
    position = next((k for k, (a, b) in pairs if a != b), min(len(expected), len(actual)))
    rest = (quoted(decoded[position:], 20) for decoded in (expected, actual))
    return f"{quoted(text)}: the decoded texts differ at character {position}: {' and '.join(rest)}"


# Generation


def generation(inputs: CheckInputs) -> Check:
    """Greedy generation with the checkpoint's settings gives the same ids, the same end and the same text.

    One generated token is declared an additional end-of-sequence token, so that a text ends before the limit.
    """
    name, prompts = "generation", inputs.prompts()
    if inputs.classifier is not None:
        return Check(name, note="a classifier does not generate text")
    try:
        overrides = _overrides(inputs, prompts)
        config = inputs.generation_defaults.config(prompts.shape[1], **overrides)
        expected = torch_gpt2.generate(inputs.checkpoint, prompts, config)
        actual = jax_gpt2.generate(inputs.checkpoint, prompts, config)
    except InvalidLogits as error:
        return Check(name, (count("texts without a next token", [str(error)]),))
    measurements = [_compare_ids(inputs, prompts, torch_gpt2.NAME, expected, jax_gpt2.NAME, actual)]
    note = f"{sum(len(row) < config.max_new_tokens for row in expected)} of {len(expected)} texts end before the limit"
    try:
        for measurement in _against_generate(inputs, prompts, overrides, expected):
            measurements.append(measurement)
    except transformers_gpt2.UnavailableError as reason:
        note += f"; not fully compared with transformers: {reason}"
    return Check(name, tuple(measurements), note)


def _overrides(inputs: CheckInputs, prompts: np.ndarray) -> dict[str, Any]:
    """Return the settings that replace the checkpoint's own, under names that transformers also uses."""
    defaults, length = inputs.generation_defaults, prompts.shape[1]
    found: dict[str, Any] = {"do_sample": False, "num_return_sequences": 1, "eos_token_id": defaults.eos_token_ids}
    most = min(NEW_TOKENS, inputs.checkpoint.config.n_positions - length)
    has_room = defaults.settings.get("max_length", length + 1) > length
    own = defaults.max_new_tokens(length) if has_room else None
    if own is None or own > most:
        found["max_new_tokens"] = most
    if defaults.settings.get("num_beams", 1) > MOST_BEAMS:
        found["num_beams"] = MOST_BEAMS
    first = torch_gpt2.generate(inputs.checkpoint, prompts[:1], defaults.config(length, **found))[0]
    return {**found, "eos_token_id": (*defaults.eos_token_ids, first[len(first) // 2])}


def _against_generate(
    inputs: CheckInputs, prompts: np.ndarray, overrides: dict[str, Any], found: list[list[int]]
) -> Iterable[Measurement]:
    """Compare with transformers' `generate`: its ids, the settings that it reads itself, and its text."""
    defaults, checkpoint = inputs.generation_defaults, inputs.checkpoint
    transformers_gpt2.require_model(checkpoint)
    if defaults.not_applied:
        raise transformers_gpt2.UnavailableError(f"not all settings are supported: {'; '.join(defaults.not_applied)}")
    settings = transformers_gpt2.generation_settings(checkpoint)
    expected = transformers_gpt2.generate(checkpoint, prompts, settings, **overrides)
    yield _compare_ids(inputs, prompts, transformers_gpt2.NAME, expected, torch_gpt2.NAME, found)
    if settings.eos_token_id is not None:  # without one, this project ends a text at the tokenizer's end of sequence
        theirs, ours = {*np.ravel(settings.eos_token_id).tolist()}, {*defaults.eos_token_ids}
        differing = [f"{sorted(theirs)} in transformers, {sorted(ours)} in {OURS}"] if theirs != ours else []
        yield count("sets of end-of-sequence ids that differ from those of transformers", differing)
    if inputs.tokens.tokenizer is not None:
        decode, wanted = inputs.tokens.tokenizer.decode, transformers_gpt2.tokenizer(checkpoint).decode
        texts = [(wanted(a), decode(b)) for a, b in zip(expected, found, strict=True)]
        differing = [_difference_of_texts(a, a, b) for a, b in texts if a != b]
        yield count("generated texts that differ from those of transformers", differing)


def _compare_ids(
    inputs: CheckInputs, prompts: np.ndarray, name: str, expected: list[list[int]], other: str, actual: list[list[int]]
) -> Measurement:
    """The number of prompts whose new ids differ."""
    tokenizer = inputs.tokens.tokenizer
    token_of, text_of = (no_token, str) if tokenizer is None else (tokenizer.token_of, tokenizer.decode)
    readers = Reader(name, token_of), Reader(other, token_of)
    rows = zip(prompts.tolist(), expected, actual, strict=True)
    differing = [f"after {first_difference(text_of(prompt), a, b, readers)}" for prompt, a, b in rows if a != b]
    return count(f"texts that differ, {other} vs {name} (of {len(prompts)})", differing)
