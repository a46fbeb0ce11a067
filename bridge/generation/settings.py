"""The settings in a `generation_config.json`: which are supported, and the types of their values."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

LARGEST_COUNT = 2**31 - 1
"""Limit for numbers of tokens: positions are int32."""


def _integer(value: Any, least: int = 0) -> int:
    if type(value) is not int or not least <= value <= LARGEST_COUNT:
        raise ValueError(f"must be an integer of at least {least}")
    return value


def _positive(value: Any) -> int:
    return _integer(value, 1)


def _number(value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError("must be a finite number")
    return float(value)


def _boolean(value: Any) -> bool:
    if type(value) is not bool:
        raise ValueError("must be true or false")
    return value


def _early_stopping(value: Any) -> Any:
    if value != "never" and type(value) is not bool:
        raise ValueError('must be true, false or "never"')
    return value


def _ids(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(i) is int for i in value):
        raise ValueError("must be a list of token ids")
    return tuple(value)


def _id(value: Any) -> int:
    if type(value) is not int:
        raise ValueError("must be a token id")
    return value


def _one_or_more_ids(value: Any) -> tuple[int, ...]:
    return (value,) if type(value) is int else _ids(value)


def _sequences(value: Any) -> tuple[tuple[int, ...], ...]:
    if not isinstance(value, list):
        raise ValueError("must be a list of lists of token ids")
    return tuple(map(_ids, value))


def _biases(value: Any) -> tuple[tuple[tuple[int, ...], float], ...]:
    if not isinstance(value, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in value):
        raise ValueError("must be a list of pairs [token ids, bias]")
    return tuple((_ids(ids), _number(bias)) for ids, bias in value)


def _decay(value: Any) -> tuple[int, float]:
    if not isinstance(value, list) or len(value) != 2:
        raise ValueError("must be a pair [number of tokens, factor]")
    return _integer(value[0]), _number(value[1])


SETTINGS: Mapping[str, Callable[[Any], Any]] = {
    "max_length": _positive,
    "max_new_tokens": _positive,
    "min_length": _integer,
    "min_new_tokens": _integer,
    "do_sample": _boolean,
    "eos_token_id": _one_or_more_ids,
    "num_beams": _positive,
    "num_return_sequences": _positive,
    "length_penalty": _number,
    "early_stopping": _early_stopping,
    "sequence_bias": _biases,
    "repetition_penalty": _number,
    "no_repeat_ngram_size": _integer,
    "bad_words_ids": _sequences,
    "forced_bos_token_id": _id,
    "forced_eos_token_id": _one_or_more_ids,
    "exponential_decay_length_penalty": _decay,
    "suppress_tokens": _ids,
    "begin_suppress_tokens": _ids,
    "temperature": _number,
    "top_k": _integer,
    "top_p": _number,
    "min_p": _number,
    "typical_p": _number,
    "epsilon_cutoff": _number,
    "eta_cutoff": _number,
}
"""Supported setting -> a function that returns its value, or raises `ValueError` for a wrong type."""

ID_FIELDS = frozenset(name for name, kind in SETTINGS.items() if kind in (_id, _ids, _one_or_more_ids, _sequences))
ID_FIELDS |= {"sequence_bias"}
"""Settings whose values contain token ids."""

_UNSUPPORTED: Mapping[str, Any] = {
    "constraints": None,
    "custom_generate": None,
    "diversity_penalty": 0.0,
    "dola_layers": None,
    "force_words_ids": None,
    "guidance_scale": 1.0,
    "max_time": None,
    "num_beam_groups": 1,
    "penalty_alpha": 0.0,
    "prompt_lookup_num_tokens": None,
    "remove_invalid_values": False,
    "renormalize_logits": False,
    "stop_strings": None,
    "token_healing": False,
    "top_h": None,
    "watermarking_config": None,
}
"""Settings that would change the tokens -> their neutral value."""

_WITHOUT_EFFECT = frozenset(
    {
        *("bos_token_id", "pad_token_id", "decoder_start_token_id", "use_cache", "cache_implementation"),
        *("cache_config", "max_cache_len", "return_legacy_cache", "return_dict_in_generate", "low_memory"),
        *("output_attentions", "output_hidden_states", "output_scores", "output_logits", "compile_config"),
        *("encoder_repetition_penalty", "encoder_no_repeat_ngram_size", "disable_compile", "prefill_chunk_size"),
        *("is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"),
        *("assistant_lookbehind", "target_lookbehind", "assistant_early_exit", "assistant_ensemble_weight"),
        *("max_matching_ngram_size", "continuous_batching_config", "transformers_version", "use_mtp"),
        "task_specific_params",  # of transformers' pipelines; its `generate` ignores them
        *("_from_model_config", "_commit_hash", "_original_object_hash", "speculation_type"),
    }
)
"""Settings that do not change the tokens of a GPT-2."""

_MOST_NOTES = 40


def unsupported(stored: Mapping[str, Any], only_known: bool = False) -> dict[str, Any]:
    """Return the settings that would change the tokens and are not supported.

    Args:
        only_known: leave out unknown names, which in a `config.json` are fields of the model.
    """
    found = (
        (name, value)
        for name, value in stored.items()
        if name not in SETTINGS
        and name not in _WITHOUT_EFFECT
        and (name in _UNSUPPORTED or not only_known)
        and not _is_neutral(value, _UNSUPPORTED.get(name))
    )
    return dict(itertools.islice(found, _MOST_NOTES))


def _is_neutral(value: Any, neutral: Any) -> bool:
    """Whether a setting is switched off. 0 is a number: it equals `False` in Python, but switches nothing off."""
    if value is None or type(value) is bool:
        return value in (None, False)
    return value in ([], {}) or value == neutral


def within_vocabulary(name: str, value: Any, vocab_size: int) -> tuple[Any, int]:
    """Return the entries of a setting whose ids are all in the vocabulary, or None, and the number of other entries.

    Ids outside the vocabulary never occur, so an entry with such an id has no effect.
    """

    def is_inside(ids: Iterable[int]) -> bool:
        return all(0 <= i < vocab_size for i in ids)

    if isinstance(value, int):
        return (value, 0) if is_inside([value]) else (None, 1)
    ids_of: Callable[[Any], Iterable[int]] = {
        "bad_words_ids": lambda ids: ids,
        "sequence_bias": lambda pair: pair[0],
    }.get(name, lambda i: (i,))
    kept = tuple(entry for entry in value if is_inside(ids_of(entry)))
    return kept or None, len(value) - len(kept)
