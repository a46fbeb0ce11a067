"""Tokenizers in Hugging Face's files, combined as `AutoTokenizer` of transformers 5 combines them.

The class of the tokenizer, in `tokenizer_config.json` or `config.json`, determines which parts of the files are used.
`GPT2Tokenizer` is always byte-level BPE and uses only the vocabulary, the merges and the post-processor of a
`tokenizer.json`. `PreTrainedTokenizerFast` uses `tokenizer.json` unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from bridge.errors import TokenizerError, quoted
from bridge.storage.companions import MOST_TOKENS, decoded, has_companion, read_companion, read_json_companion
from bridge.tokenizers.added_tokens import Declared, stored_added_tokens
from bridge.tokenizers.byte_level_bpe import BYTE_LEVEL, END_OF_TEXT, ByteLevelBPE, ranks_and_merges
from bridge.tokenizers.characters import CHARACTERS_APART, CharacterTokenizer
from bridge.tokenizers.pipeline import PipelineTokenizer, component_types
from bridge.tokenizers.post_processors import NOTHING, around_of, ids_of, template
from bridge.tokenizers.readers import sentencepiece, wordpiece
from bridge.tokenizers.readers.sentencepiece_classes import (
    CLASSES,
    Context,
    SentencePieceClass,
    Vocabulary,
    charsmap_of,
)
from bridge.tokenizers.tokenizer import AddedToken, SpecialTokens, Tokenizer, tokenizer_json
from bridge.tokenizers.validation import (
    flag_of,
    pairs_of,
    require_bpe_model,
    require_distinct_ids,
    require_ids_below,
    require_unigram_vocabulary,
)

VOCAB_AND_MERGES = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))
"""Hugging Face's names and OpenAI's for the same two files."""

TOKENIZER_JSON, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
SPECIAL_TOKENS_MAP, ADDED_TOKENS = "special_tokens_map.json", "added_tokens.json"

GPT2_CLASS = "GPT2Tokenizer"
_GPT2_DEFAULTS = dict.fromkeys(("unk_token", "bos_token", "eos_token"), END_OF_TEXT)


@dataclass(frozen=True)
class Files:
    """The tokenizer files of a directory, parsed when they are needed."""

    directory: Path
    rows: int
    """Size of the model's vocabulary, which limits the size of the files."""
    class_of_config: str | None = None
    """`tokenizer_class` of the model's config.json."""

    @property
    def where(self) -> str:
        return quoted(self.directory)

    def has(self, *names: str) -> bool:
        return all(has_companion(self.directory, name) for name in names)

    def json(self, name: str) -> dict[str, Any]:
        """Return the object in a file, or an empty one if there is no such file."""
        return read_json_companion(self.directory, name, self.rows, TokenizerError) if self.has(name) else {}

    def text(self, name: str) -> str:
        content = read_companion(self.directory, name, self.rows, TokenizerError)
        return decoded(content, quoted(self.directory / name), TokenizerError)

    def content(self, name: str) -> bytes:
        return read_companion(self.directory, name, self.rows, TokenizerError)

    @cached_property
    def settings(self) -> dict[str, Any]:
        return self.json(TOKENIZER_CONFIG)

    @cached_property
    def stored(self) -> dict[str, Any] | None:
        """The content of `tokenizer.json`, with a model, or None."""
        if not self.has(TOKENIZER_JSON):
            return None
        stored = self.json(TOKENIZER_JSON)
        where = quoted(self.directory / TOKENIZER_JSON)
        model = stored.get("model")
        if not isinstance(model, dict):
            raise TokenizerError(f"{where} is not a valid tokenizer.json: model is not an object")
        model = {"type": _type_of(model), **model}
        if model["type"] not in ("BPE", "WordPiece", "WordLevel", "Unigram"):
            raise TokenizerError(f"{where} has a model of the unknown type {quoted(model['type'])}")
        if not isinstance(model.get("unk_token"), str | None):
            raise TokenizerError(f"{where} is not a valid tokenizer.json: model.unk_token is not a string")
        if model["type"] == "Unigram":
            require_unigram_vocabulary(model.get("vocab"), where)
        elif not isinstance(model.get("vocab"), dict):
            raise TokenizerError(f"{where} is not a valid tokenizer.json: model.vocab is not an object")
        return {**stored, "model": model}

    @property
    def tokenizer_class(self) -> str | None:
        """The class that the files name, without transformers' suffix `Fast`."""
        name = self.settings.get("tokenizer_class") or self.class_of_config
        return name.removesuffix("Fast") if isinstance(name, str) else None

    @property
    def is_gpt2_class(self) -> bool:
        return self.tokenizer_class in (None, GPT2_CLASS)

    def declared(self) -> Declared:
        listed = stored_added_tokens((self.stored or {}).get("added_tokens"), quoted(self.directory / TOKENIZER_JSON))
        return Declared(self.settings, self.json(SPECIAL_TOKENS_MAP), self.json(ADDED_TOKENS), listed, self.where)


def from_files(files: Files) -> Tokenizer | None:
    """Return the tokenizer in Hugging Face's files or OpenAI's, or None if the directory has neither.

    Raises `TokenizerError` for files that are damaged or of a kind that is not supported.
    """
    if files.settings.get("split_special_tokens") is True:
        raise TokenizerError(
            f"{files.where}: split_special_tokens is true in {TOKENIZER_CONFIG}; remove it, and encode with "
            "special_tokens='as_text'"
        )
    name = files.tokenizer_class
    if name in wordpiece.CLASSES and (files.stored is not None or files.has(wordpiece.VOCAB)):
        return _of_wordpiece(files)
    if (reads := CLASSES.get(name or "")) is not None and (
        files.has(reads.file) if files.stored is None else reads.model == files.stored["model"]["type"]
    ):
        if files.stored is None or not _mentions_byte_level(files.stored):  # Llama 3's is used unchanged
            return _of_sentencepiece(files, reads)
    if files.stored is not None:
        is_bpe = files.stored["model"]["type"] == "BPE"
        if is_bpe and files.is_gpt2_class and (name == GPT2_CLASS or _mentions_byte_level(files.stored)):
            model = files.stored["model"]
            merges = _merges_of_model(model, quoted(files.directory / TOKENIZER_JSON))
            return _gpt2(files, model["vocab"], merges, files.stored.get("post_processor"))
        return _as_stored(files, files.stored)
    for vocab, merges_file in VOCAB_AND_MERGES:
        if files.has(vocab, merges_file):
            if not files.is_gpt2_class:
                raise TokenizerError(
                    f"{files.where}: the tokenizer class {quoted(name)} cannot be read from {vocab} and {merges_file}; "
                    "save the tokenizer as tokenizer.json with transformers, into the same directory"
                )
            return _gpt2(files, files.json(vocab), _read_merges(files, merges_file), None)
    return None


def _gpt2(files: Files, vocab: Mapping[str, int], merges: list[tuple[str, ...]], post_processor: Any) -> Tokenizer:
    """Return the tokenizer that transformers' `GPT2Tokenizer` builds from a vocabulary and merges."""
    _require_rows(vocab, files)
    pairs = pairs_of(merges, files.where)
    _require_ids_of_merges(pairs, vocab, files.where)
    declared = files.declared()
    added, special = declared.resolved(vocab, (), _GPT2_DEFAULTS, files.rows)
    prefix = flag_of(files.settings, "add_prefix_space", False, files.where)
    if post_processor is None and files.stored is None:
        post_processor = _around_of_settings(files, dict(vocab) | {t.content: t.id for t in added}, special)
    stored = tokenizer_json(
        {"type": "BPE", "vocab": vocab, "merges": [list(pair) for pair in pairs]},
        added,
        pre_tokenizer={**BYTE_LEVEL, "add_prefix_space": prefix},
        post_processor=post_processor,
        decoder=BYTE_LEVEL,
    )
    return tokenizer_of_pipeline(files, stored, added, special)


def _as_stored(files: Files, stored: Mapping[str, Any]) -> Tokenizer:
    """Return the tokenizer that `tokenizer.json` describes, with the special tokens of the other files."""
    where = quoted(files.directory / TOKENIZER_JSON)
    model = stored["model"]
    listed = stored_added_tokens(stored.get("added_tokens"), where)
    if model["type"] == "BPE":
        _merges_of_model(model, where)
        require_bpe_model(model, where)
    vocab = model["vocab"] if isinstance(model["vocab"], dict) else {p: i for i, (p, _) in enumerate(model["vocab"])}
    _require_rows(vocab, files)
    added, special = files.declared().resolved(vocab, listed, _pad_of(stored), files.rows)
    if not added and _is_of_characters(stored):
        return CharacterTokenizer(files.directory.name, vocab, files.where, source=files.directory)
    return tokenizer_of_pipeline(files, stored, added, special)


def _pad_of(stored: Mapping[str, Any]) -> dict[str, str]:
    """Return the default padding token. The general class takes it from `padding` if no file has `pad_token`."""
    padding = stored.get("padding")
    pad = padding.get("pad_token") if isinstance(padding, dict) else None
    return {"pad_token": pad} if isinstance(pad, str) else {}


def _of_wordpiece(files: Files) -> Tokenizer:
    vocab = (
        wordpiece.vocabulary(files.text(wordpiece.VOCAB)) if files.stored is None else files.stored["model"]["vocab"]
    )
    if not isinstance(vocab, dict):
        raise TokenizerError(f"{files.where}: {files.tokenizer_class} needs a WordPiece vocabulary")
    _require_rows(vocab, files)
    declared = files.declared()
    added, special = declared.resolved(vocab, (), wordpiece.DEFAULTS, files.rows)
    ids = dict(vocab) | {token.content: token.id for token in added}
    stored = wordpiece.pipeline(vocab, ids, added, special, declared)
    return tokenizer_of_pipeline(files, stored, added, special)


def _of_sentencepiece(files: Files, reads: SentencePieceClass) -> Tokenizer:
    """Return the tokenizer that a class of transformers builds from `tokenizer.json` or a SentencePiece model."""
    declared = files.declared()
    extra: list[Any] = reads.extra(files.settings, files.where)
    if files.stored is not None:
        vocabulary = _stored_vocabulary(files, files.stored)
    else:
        path = files.directory / reads.file
        model = sentencepiece.parse(files.content(path.name), quoted(path), min(files.rows, MOST_TOKENS))
        vocabulary = reads.vocabulary(model, files.settings, quoted(path))
        extra = [*map(asdict, model.symbols), *extra]
    vocab = vocabulary.ids
    _require_rows(vocab, files)
    if extra and not {"additional_special_tokens", "extra_special_tokens"} & files.settings.keys():
        declared = replace(declared, settings={**files.settings, "extra_special_tokens": extra})
    added, special = declared.resolved(vocab, (), reads.defaults_of(vocabulary.trainer), files.rows)
    stored = reads.pipeline(vocabulary, Context(added, special, files.settings, files.where))
    if reads.keeps_post_processor:
        ids = vocab | {token.content: token.id for token in added}
        own = _around_of_settings(files, ids, special) if files.stored is None else files.stored.get("post_processor")
        stored["post_processor"] = own
    return tokenizer_of_pipeline(files, stored, added, special)


def _stored_vocabulary(files: Files, stored: Mapping[str, Any]) -> Vocabulary:
    """Return the parts of a `tokenizer.json` that the classes of SentencePiece models take."""
    model, charsmap = stored["model"], charsmap_of(stored.get("normalizer"))
    if model["type"] == "Unigram":
        return Vocabulary([(piece, score) for piece, score in model["vocab"]], (), charsmap)
    vocab, where = model["vocab"], quoted(files.directory / TOKENIZER_JSON)
    pairs = pairs_of(_merges_of_model(model, where), where)
    _require_rows(vocab, files)
    _require_ids_of_merges(pairs, vocab, where)
    return Vocabulary(vocab, pairs, charsmap)


def _around_of_settings(files: Files, ids: Mapping[str, int], special: SpecialTokens) -> dict[str, Any] | None:
    """Return the post-processor that `add_bos_token` and `add_eos_token` describe, or None."""
    before, after = (
        [token] if files.settings.get(f"add_{role}_token") is True and token is not None else []
        for role, token in (("bos", special.bos), ("eos", special.eos))
    )
    return template(before, after, {token: ids[token] for token in (*before, *after)}) if before or after else None


def tokenizer_of_pipeline(
    files: Files, stored: Mapping[str, Any], added: tuple[AddedToken, ...], special: Any
) -> Tokenizer:
    """Return the tokenizer of a `tokenizer.json`. tiktoken runs it if the ids are the same."""
    model, name = stored["model"], files.directory.name
    around = around_of(stored.get("post_processor"))
    _require_rows_around(stored.get("post_processor"), files)
    pre_tokenizer, decoder = stored.get("pre_tokenizer"), stored.get("decoder")
    if (
        model["type"] == "BPE"
        and around is not None
        and stored.get("normalizer") is None
        and isinstance(pre_tokenizer, dict)
        and _is_byte_level(pre_tokenizer)
        and isinstance(decoder, dict)
        and decoder.get("type") == "ByteLevel"
        and not any(model.get(key) for key in _CHANGES_IDS)
        and not any(token.lstrip or token.rstrip or token.single_word for token in added)
        and (found := _ranks_and_merges(model, files.where)) is not None
    ):
        ranks, merges = found
        taken = {*ranks.values(), *(token.id for token in added)}
        return ByteLevelBPE(
            name,
            ranks,
            added,
            special,
            files.directory,
            unused={token: i for token, i in model["vocab"].items() if i not in taken},
            around=around,
            add_prefix_space=pre_tokenizer.get("add_prefix_space", True),
            merges=merges,
        )
    stored = {**_with_gaps(stored, added, files.where), "added_tokens": tokenizer_json({}, added)["added_tokens"]}
    clean_up = files.settings.get("clean_up_tokenization_spaces") is True
    tokenizer = PipelineTokenizer(
        name, stored, added, special, files.directory, around=around or NOTHING, clean_up=clean_up
    )
    tokenizer.require_valid()
    return tokenizer


def _ranks_and_merges(
    model: Mapping[str, Any], where: str
) -> tuple[dict[bytes, int], list[tuple[bytes, bytes]]] | None:
    """Return the ranks and merges of a BPE for tiktoken, or None if tiktoken would give other ids."""
    pairs = pairs_of(_pairs(model["merges"]), where)
    try:
        return ranks_and_merges(model["vocab"], pairs, where)
    except TokenizerError:
        return None


_CHANGES_IDS = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")


def _with_gaps(stored: Mapping[str, Any], added: tuple[AddedToken, ...], where: str) -> dict[str, Any]:
    """Return the pipeline. The vocabulary contains the added tokens if there is a gap before one of their ids.

    The `tokenizers` package gives an added token the next id, unless the token is in the vocabulary.
    """
    model = stored["model"]
    if model["type"] != "BPE":
        return dict(stored)
    vocab, last = dict(model["vocab"]), -1
    for token in sorted(added, key=lambda token: token.id):
        if token.content not in vocab and token.id != max(len(model["vocab"]), last + 1):
            vocab = {**model["vocab"], **{t.content: t.id for t in added}}
            break
        last = max(last, token.id)
    return {**stored, "model": {**model, "vocab": vocab}}


def _type_of(model: Mapping[str, Any]) -> str:
    """Return the type of a model. Files of tokenizers before 0.9 do not state it."""
    if "merges" in model:
        return "BPE"
    if "continuing_subword_prefix" in model or "max_input_chars_per_word" in model:
        return "WordPiece"
    return "Unigram" if isinstance(model.get("vocab"), list) else "BPE"


def _is_of_characters(stored: Mapping[str, Any]) -> bool:
    """Whether this is the `tokenizer.json` of a `CharacterTokenizer`. The caller checks that it has no added tokens."""
    model = stored["model"]
    return (
        model["type"] == "WordLevel"
        and stored.get("pre_tokenizer") == CHARACTERS_APART
        and stored.get("normalizer") is None
        and around_of(stored.get("post_processor")) == NOTHING
        and model.get("unk_token") not in model["vocab"]
    )


def _is_byte_level(pre_tokenizer: Mapping[str, Any]) -> bool:
    return (
        pre_tokenizer.get("type") == "ByteLevel"
        and isinstance(pre_tokenizer.get("add_prefix_space", True), bool)
        and pre_tokenizer.get("use_regex", True) is True
    )


def _mentions_byte_level(stored: Mapping[str, Any]) -> bool:
    return any("ByteLevel" in component_types(stored.get(part)) for part in ("pre_tokenizer", "normalizer", "decoder"))


def _merges_of_model(model: Mapping[str, Any], where: str) -> list[tuple[str, ...]]:
    """Return the `merges` of a `tokenizer.json`. A merge is two tokens in a list, or in a string with a space."""
    merges = model.get("merges")
    if not isinstance(merges, list) or not all(isinstance(merge, str | list) for merge in merges):
        raise TokenizerError(f"{where} is not a valid tokenizer.json: model.merges is not a list of pairs")
    return _pairs(merges)


def _pairs(merges: list[Any]) -> list[tuple[str, ...]]:
    return [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in merges]


def _require_rows(vocab: Mapping[str, int], files: Files) -> None:
    """Require that ids are unique and that the model has a row for each. Call this before building a tokenizer."""
    require_distinct_ids(vocab, files.where)
    require_ids_below(files.rows, max(vocab.values(), default=0), files.where)


def _require_rows_around(post_processor: Any, files: Files) -> None:
    for id in ids_of(post_processor):
        if type(id) is not int or not 0 <= id < files.rows:
            raise TokenizerError(
                f"{quoted(files.directory / TOKENIZER_JSON)}: the post-processor adds the id {quoted(id)}, but the "
                f"model's vocabulary has only {files.rows}; the tokenizer belongs to another model"
            )


def _require_ids_of_merges(pairs: list[tuple[str, str]], vocab: Mapping[str, int], where: str) -> None:
    for pair in pairs:
        if unknown := [part for part in (*pair, "".join(pair)) if part not in vocab]:
            raise TokenizerError(
                f"{where}: the merge {quoted(' '.join(pair))} needs {quoted(unknown[0])}, which is not in the "
                "vocabulary"
            )


def _read_merges(files: Files, name: str) -> list[tuple[str, ...]]:
    text = files.text(name)
    if text.count("\n") > MOST_TOKENS:
        raise TokenizerError(f"{quoted(files.directory / name)} has more than {MOST_TOKENS} lines")
    lines = (line.removesuffix("\r") for line in text.split("\n"))
    return [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
