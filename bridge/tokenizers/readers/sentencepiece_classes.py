"""The tokenizer classes of transformers that read SentencePiece models, and the `tokenizer.json` that each one builds.

A class takes little more than the vocabulary from a SentencePiece model or a `tokenizer.json`. Its code determines the
rest. As in transformers, a class for BPE reads a Unigram model as BPE.

Source: the tokenization modules, `SpmConverter` and `SLOW_TO_FAST_CONVERTERS` of transformers 5.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from bridge.errors import TokenizerError, quoted
from bridge.tokenizers.post_processors import template
from bridge.tokenizers.readers.sentencepiece import UNIGRAM, Model, Pieces, Trainer, merges_of
from bridge.tokenizers.tokenizer import AddedToken, SpecialTokens, tokenizer_json
from bridge.tokenizers.validation import flag_of

Settings = Mapping[str, Any]

FILES = ("spiece.model", "tokenizer.model", "sentencepiece.bpe.model")
"""Names of SentencePiece models."""

GENERAL = ("PreTrainedTokenizer", "TokenizersBackend")
"""Names of the general class, without the suffix `Fast`."""

_T5S_UNKNOWN = 2  # T5Tokenizer ignores the model's own unk_id
_XLM_ROBERTAS_UNKNOWN = 3
_MOST_EXTRA_IDS = 1000
_SPACE = "▁"
_SPACES_APART = {"type": "WhitespaceSplit"}
_RESTORED_SPACES = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
_RESTORED_BYTES = [{"type": "ByteFallback"}, {"type": "Fuse"}]


@dataclass(frozen=True)
class Vocabulary:
    """What a class takes from a SentencePiece model or a `tokenizer.json`."""

    vocab: Pieces | Mapping[str, int]
    """For Unigram: (piece, score) pairs, where the id is the index. For BPE: token -> id."""
    merges: Sequence[Sequence[str]] = ()
    charsmap: str | None = None
    """The table of the normalizer, in base64."""
    trainer: Trainer = field(default_factory=Trainer)

    @property
    def ids(self) -> dict[str, int]:
        if isinstance(self.vocab, Mapping):
            return dict(self.vocab)
        return {piece: i for i, (piece, _) in enumerate(self.vocab)}

    def bpe(self, **options: Any) -> dict[str, Any]:
        return {"type": "BPE", "fuse_unk": True, "vocab": self.ids, "merges": [*map(list, self.merges)], **options}

    def unigram(self, unk_id: int, byte_fallback: bool = False) -> dict[str, Any]:
        vocab = [*map(list, self.vocab)]
        return {"type": "Unigram", "unk_id": unk_id, "vocab": vocab, "byte_fallback": byte_fallback}


@dataclass(frozen=True)
class Context:
    """The inputs of a `tokenizer.json` other than the vocabulary."""

    added: Sequence[AddedToken]
    special: SpecialTokens
    settings: Settings
    """The content of `tokenizer_config.json`."""
    where: str

    def flag(self, name: str, default: bool) -> bool:
        value = flag_of(self.settings, name, None, self.where)
        return default if value is None else value

    def around(self, ids: Mapping[str, int], before: str | None, after: str | None) -> dict[str, Any] | None:
        """Return the post-processor that puts these tokens around a text."""
        ids = {**ids, **{token.content: token.id for token in self.added}}
        first, last = ([] if token is None else [token] for token in (before, after))
        return template(first, last, {token: ids[token] for token in (*first, *last)}) if first or last else None


def _unchanged(pieces: Pieces, settings: Settings, where: str) -> Pieces:
    return pieces


def _no_tokens(settings: Settings, where: str) -> list[str]:
    return []


@dataclass(frozen=True)
class SentencePieceClass:
    """How one class of transformers reads a SentencePiece model."""

    file: str
    model: Literal["Unigram", "BPE"] | None
    """The type of the model. With None, the file states the type, and a `tokenizer.json` is used unchanged."""
    defaults: Mapping[str, str]
    """Role -> spelling, for roles that no file mentions."""
    pipeline: Callable[[Vocabulary, Context], dict[str, Any]]
    keeps_post_processor: bool = True
    """Whether to apply the post-processor of a `tokenizer.json`, `add_bos_token` and `add_eos_token`."""
    arranged: Callable[[Pieces, Settings, str], Pieces] = _unchanged
    """Converts the pieces of a SentencePiece model to the vocabulary of the class."""
    extra: Callable[[Settings, str], list[str]] = _no_tokens
    """Returns special tokens that the class adds to those of a SentencePiece model."""

    def vocabulary(self, model: Model, settings: Settings, where: str) -> Vocabulary:
        pieces = self.arranged(model.pieces, settings, where)
        is_unigram = self.model == "Unigram" or (self.model is None and model.trainer.model_type == UNIGRAM)
        merges = () if is_unigram else merges_of(pieces, where)
        charsmap = base64.b64encode(model.charsmap).decode() if model.charsmap else None
        return Vocabulary(pieces, merges, charsmap, model.trainer)

    def defaults_of(self, trainer: Trainer) -> Mapping[str, str]:
        if self.model is not None:
            return self.defaults
        own = {role: getattr(trainer, f"{role}_piece") for role in ("unk", "bos", "eos")}
        return {f"{role}_token": piece for role, piece in own.items() if getattr(trainer, f"{role}_id") >= 0}


def _t5_sentinels(settings: Settings, where: str) -> list[str]:
    """Return the sentinels that `T5Tokenizer` adds. `extra_ids` is their number, 100 by default."""
    count = settings.get("extra_ids", 100)
    if type(count) is not int or not 0 <= count <= _MOST_EXTRA_IDS:
        raise TokenizerError(f"{where}: extra_ids={quoted(count)} is not a number from 0 to {_MOST_EXTRA_IDS}")
    return [f"<extra_id_{i}>" for i in range(count)]


def _with_sentinels(pieces: Pieces, settings: Settings, where: str) -> Pieces:
    return [*pieces, *((token, 0.0) for token in reversed(_t5_sentinels(settings, where)))]


def _t5(vocabulary: Vocabulary, context: Context) -> dict[str, Any]:
    return tokenizer_json(
        vocabulary.unigram(_T5S_UNKNOWN),
        context.added,
        normalizer=_precompiled(vocabulary.charsmap),
        pre_tokenizer=_in_sequence("pretokenizers", [_SPACES_APART, _metaspace("always")]),
        post_processor=context.around(vocabulary.ids, None, context.special.eos),
        decoder=_metaspace("always"),
    )


def _in_xlm_robertas_order(pieces: Pieces, settings: Settings, where: str) -> Pieces:
    """Return the pieces in fairseq's order: four special tokens, the pieces after the first three, and the mask."""
    first = [(_spelling(settings, role, XLM_ROBERTAS_TOKENS[role]), 0.0) for role in ("bos", "pad", "eos", "unk")]
    arranged = [*first, *pieces[3:], (_spelling(settings, "mask", XLM_ROBERTAS_TOKENS["mask"]), 0.0)]
    if len({piece for piece, _ in arranged}) < len(arranged):
        raise TokenizerError(f"{where}: XLMRobertaTokenizer's vocabulary would have a token twice")
    return arranged


def _xlm_roberta(vocabulary: Vocabulary, context: Context) -> dict[str, Any]:
    spaces = _metaspace("always" if context.flag("add_prefix_space", True) else "never")
    return tokenizer_json(
        vocabulary.unigram(_XLM_ROBERTAS_UNKNOWN),
        context.added,
        normalizer=_precompiled(vocabulary.charsmap),
        pre_tokenizer=_in_sequence("pretokenizers", [_SPACES_APART, spaces]),
        post_processor=context.around(vocabulary.ids, context.special.bos, context.special.eos),
        decoder=spaces,
    )


def _llama(vocabulary: Vocabulary, context: Context) -> dict[str, Any]:
    has_prefix = context.flag("add_prefix_space", True)
    scheme = "never" if not has_prefix else "always" if context.flag("legacy", False) else "first"
    stripped = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if has_prefix else []
    return tokenizer_json(
        vocabulary.bpe(byte_fallback=True),
        context.added,
        pre_tokenizer={**_metaspace(scheme), "split": False},
        decoder=_in_sequence("decoders", [_RESTORED_SPACES, *_RESTORED_BYTES, *stripped]),
    )


def _reformer(vocabulary: Vocabulary, context: Context) -> dict[str, Any]:
    one_space = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}
    precompiled = _precompiled(vocabulary.charsmap)
    return tokenizer_json(
        vocabulary.bpe(unk_token=context.special.unk),
        context.added,
        normalizer=precompiled and _in_sequence("normalizers", [precompiled, one_space]),
        pre_tokenizer=_metaspace("always"),
        decoder=_metaspace("always"),
    )


def _general(vocabulary: Vocabulary, context: Context) -> dict[str, Any]:
    """Return the pipeline of the general class for a SentencePiece model. It adds no space before the text."""
    trainer = vocabulary.trainer
    fallback = bool(trainer.byte_fallback)
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    precompiled = _precompiled(vocabulary.charsmap)
    return tokenizer_json(
        vocabulary.unigram(trainer.unk_id, fallback)
        if trainer.model_type == UNIGRAM
        else vocabulary.bpe(unk_token=trainer.unk_piece, byte_fallback=fallback),
        context.added,
        normalizer=_in_sequence("normalizers", [spaces] if precompiled is None else [precompiled, spaces]),
        decoder=_in_sequence("decoders", [_RESTORED_SPACES, *(_RESTORED_BYTES if fallback else [])]),
    )


def charsmap_of(normalizer: Any) -> str | None:
    """Return the table in the normalizer of a `tokenizer.json`, in base64."""
    parts = normalizer.get("normalizers", [normalizer]) if isinstance(normalizer, dict) else []
    for part in parts if isinstance(parts, list) else []:
        if isinstance(part, dict) and part.get("type") == "Precompiled":
            table = part.get("precompiled_charsmap")
            return table if isinstance(table, str) else None
    return None


def _spelling(settings: Settings, role: str, default: str) -> str:
    """Return the spelling of a role in `tokenizer_config.json`."""
    value = settings.get(f"{role}_token", default)
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else default


def _metaspace(scheme: str) -> dict[str, Any]:
    return {"type": "Metaspace", "replacement": _SPACE, "prepend_scheme": scheme, "split": True}


def _precompiled(charsmap: str | None) -> dict[str, Any] | None:
    return None if charsmap is None else {"type": "Precompiled", "precompiled_charsmap": charsmap}


def _in_sequence(name: str, parts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    return {"type": "Sequence", name: [*parts]}


XLM_ROBERTAS_TOKENS = {"bos": "<s>", "pad": "<pad>", "eos": "</s>", "unk": "<unk>", "mask": "<mask>"}
_ENDS = {"eos_token": "</s>", "unk_token": "<unk>"}

CLASSES: Mapping[str, SentencePieceClass] = {
    "T5Tokenizer": SentencePieceClass(
        FILES[0],
        "Unigram",
        {**_ENDS, "pad_token": "<pad>"},
        _t5,
        keeps_post_processor=False,
        arranged=_with_sentinels,
        extra=_t5_sentinels,
    ),
    "ReformerTokenizer": SentencePieceClass(FILES[0], "BPE", _ENDS, _reformer),
    "LlamaTokenizer": SentencePieceClass(FILES[1], "BPE", {**_ENDS, "bos_token": "<s>"}, _llama),
    "XLMRobertaTokenizer": SentencePieceClass(
        FILES[2],
        "Unigram",
        {f"{role}_token": token for role, token in XLM_ROBERTAS_TOKENS.items()}
        | {"cls_token": "<s>", "sep_token": "</s>"},
        _xlm_roberta,
        keeps_post_processor=False,
        arranged=_in_xlm_robertas_order,
    ),
    **dict.fromkeys(GENERAL, SentencePieceClass(FILES[1], None, {}, _general)),
}
