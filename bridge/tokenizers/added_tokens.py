"""The added and special tokens that the files of a tokenizer declare, combined as transformers combines them.

Source: `PreTrainedTokenizerBase._from_pretrained` and `TokenizersBackend.__init__` of transformers 5, rewritten.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from bridge.errors import TokenizerError, quoted
from bridge.tokenizers.tokenizer import AddedToken, SpecialTokens
from bridge.tokenizers.validation import require_distinct_ids, require_special_tokens

ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

NO_ID = -1
"""The id of a token that is declared without an id."""

_EXTRA = "extra_special_tokens"
_FLAGS = ("special", "lstrip", "rstrip", "single_word", "normalized")


@dataclass(frozen=True)
class Declared:
    """What the files of a directory say about added and special tokens."""

    settings: Mapping[str, Any]
    """The content of `tokenizer_config.json`."""
    special_tokens_map: Mapping[str, Any]
    added_tokens: Mapping[str, Any]
    """The content of `added_tokens.json`: spelling -> id."""
    of_tokenizer_json: Sequence[AddedToken]
    """The `added_tokens` of `tokenizer.json`."""
    where: str

    def resolved(
        self, vocab: Mapping[str, int], present: Sequence[AddedToken], defaults: Mapping[str, str], rows: int
    ) -> tuple[tuple[AddedToken, ...], SpecialTokens]:
        """Return the added tokens and the special tokens by role.

        A token without a declared id that is not in the vocabulary gets the next free id, if the model has a row for
        that id. Otherwise the token is left out.

        Args:
            vocab: the vocabulary of the tokenizer's model.
            present: the added tokens that the tokenizer already has.
            defaults: role -> spelling, for the roles that no file mentions.
            rows: the size of the model's vocabulary.
        """
        named = self._named(defaults)
        spellings = {_spelling(value, self.where) for value in named.values()}
        stored = sorted(self._stored(spellings), key=lambda token: token.id)
        found = {token.content: token for token in present}
        known = {*found, *(token.content for token in stored)}
        # The last of several different declarations takes effect, but a token stays special if any of them says so.
        distinct = {(isinstance(value, str), self._token(value)): value for value in [*named.values(), *self._extra]}
        unlisted = [self._token(value, spellings) for value in distinct.values()]
        for token in [*stored, *(token for token in unlisted if token.content not in known)]:
            before = found.get(token.content, token)
            found[token.content] = replace(token, id=before.id, special=token.special or before.special)
        added = tuple(_with_ids(found.values(), vocab, rows, self.where))
        contents = {token.content for token in added}
        roles = {role: _spelling(named[role], self.where) for role in ROLES if role in named}
        roles = {role.removesuffix("_token"): content for role, content in roles.items() if content in contents}
        extra = dict.fromkeys(_spelling(value, self.where) for value in self._extra)
        additional = tuple(content for content in extra if content in contents)
        return added, SpecialTokens(**roles, additional=additional)

    @property
    def is_legacy(self) -> bool:
        """Whether to use the files of transformers before 4.33. True if there is no `added_tokens_decoder`."""
        return "added_tokens_decoder" not in self.settings

    def is_null(self, role: str) -> bool:
        """Whether the files say that no token has this role."""
        settings, _ = self._combined
        return role in settings and settings[role] is None

    @cached_property
    def _combined(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The settings merged with the special tokens map, and the own roles (`model_specific_special_tokens`).

        `extra_special_tokens` lists further special tokens. If this list is empty or missing in
        `tokenizer_config.json`, or missing in both files, `additional_special_tokens` is used instead.
        """
        settings = dict(self.settings)
        if "additional_special_tokens" in settings and not settings.get(_EXTRA):
            settings[_EXTRA] = settings.pop("additional_special_tokens")
        own = {key: settings.pop(key) for key in [*settings] if _is_own_role(key) and isinstance(settings[key], str)}
        if isinstance(settings.get(_EXTRA), dict):
            own |= settings.pop(_EXTRA)
        if self.is_legacy:
            for key, value in self.special_tokens_map.items():
                if key == _EXTRA and isinstance(value, list):
                    before = settings.get(_EXTRA) or []
                    value = [*before, *map(self._of_map, value)] if isinstance(before, list) else before
                settings[key] = self._of_map(value) if key.endswith("_token") else value
            if isinstance(settings.get(_EXTRA), dict):
                own |= settings.pop(_EXTRA)
        return settings, own

    def _of_map(self, value: Any) -> Any:
        """Return a value of `special_tokens_map.json` as a setting. All tokens in this file are special."""
        return self._token({**value, "special": True}) if isinstance(value, dict) else value

    def _named(self, defaults: Mapping[str, str]) -> dict[str, Any]:
        """Return role -> string or object, in the order in which new tokens get ids."""
        settings, own = self._combined
        standard = {role: settings.get(role, defaults.get(role)) for role in ROLES}
        others = {key: value for key, value in settings.items() if _is_own_role(key) and _is_token(value)}
        return {role: value for role, value in (standard | others | own).items() if value not in (None, "")}

    @property
    def _extra(self) -> list[Any]:
        settings, _ = self._combined
        listed = settings.get(_EXTRA) if _EXTRA in settings else settings.get("additional_special_tokens")
        if not isinstance(listed, list | None):
            raise TokenizerError(f"{self.where}: additional_special_tokens is not a list")
        return listed or []

    def _stored(self, spellings: Set[str]) -> list[AddedToken]:
        """Return the tokens that the files declare with an id."""
        if not self.is_legacy:
            decoder = self.settings["added_tokens_decoder"]
            if not isinstance(decoder, dict):
                raise TokenizerError(f"{self.where}: added_tokens_decoder is not an object")
            return [self._token(value, spellings, _id_of(key, self.where)) for key, value in decoder.items()]
        require_distinct_ids(self.added_tokens, self.where)
        legacy = {i: self._legacy_token(content, i, spellings) for content, i in self.added_tokens.items()}
        listed = {t.id: replace(t, special=t.special or t.content in spellings) for t in self.of_tokenizer_json}
        return [*(legacy | listed).values()]

    def _legacy_token(self, content: str, id: int, spellings: Set[str]) -> AddedToken:
        is_special = content in self._special_in_files
        return AddedToken(content, id, special=is_special or content in spellings, normalized=not is_special)

    @cached_property
    def _special_in_files(self) -> set[str]:
        """The tokens that are not normalized if `added_tokens.json` contains them.

        transformers ignores the tokenizer's own roles here, and roles that `tokenizer_config.json` gives as objects.
        """
        settings, _ = self._combined
        listed = settings.get(_EXTRA)
        values = [*(settings.get(role) for role in ROLES), *(listed if isinstance(listed, list) else [])]
        return {_spelling(value, self.where) for value in values if isinstance(value, str | AddedToken)}

    def _token(self, value: Any, spellings: Set[str] = frozenset(), id: int = NO_ID) -> AddedToken:
        return _token(value, id, self.where, spellings)


def stored_added_tokens(listed: Any, where: str) -> list[AddedToken]:
    """Return the `added_tokens` of a `tokenizer.json`."""
    tokens = [] if listed is None else listed
    if not isinstance(tokens, list) or not all(
        isinstance(token, dict) and isinstance(token.get("content"), str) and "id" in token for token in tokens
    ):
        raise TokenizerError(
            f"{where} is not a valid tokenizer.json: added_tokens is not a list of objects with content and id"
        )
    found = {token["content"]: _token(token, token["id"], where) for token in tokens}
    if len(found) < len(tokens):
        raise TokenizerError(f"{where} is not a valid tokenizer.json: added_tokens has a token twice")
    require_distinct_ids({token.content: token.id for token in found.values()}, where)
    return [*found.values()]


def _is_own_role(key: str) -> bool:
    """Whether a setting can be a role of the tokenizer's own, such as `image_token`."""
    return key.endswith("_token") and key not in ROLES


def _is_token(value: Any) -> bool:
    return isinstance(value, str | AddedToken) or (isinstance(value, dict) and value.get("__type") == "AddedToken")


def _spelling(value: Any, where: str) -> str:
    """Return the spelling of a token that is given as a string or as an object with `content`."""
    if isinstance(value, AddedToken):
        return value.content
    content = value.get("content") if isinstance(value, dict) else value
    if not isinstance(content, str):
        raise TokenizerError(f"{where}: {quoted(value)} is neither a token nor an object with content")
    return content


def _token(value: Any, id: Any, where: str, spellings: Set[str] = frozenset()) -> AddedToken:
    """Return the token that is given as a string or as an object with `content`. Tokens in `spellings` are special."""
    if isinstance(value, AddedToken):
        return value
    content = _spelling(value, where)
    if isinstance(value, str):
        return AddedToken(content, id)
    flags = {name: value[name] for name in _FLAGS if name in value}
    if not all(isinstance(flag, bool) for flag in flags.values()):
        raise TokenizerError(f"{where}: a flag of the token {quoted(content)} is not true or false")
    special = flags.get("special", False) or content in spellings
    return AddedToken(content, id, **{"normalized": not special, **flags, "special": special})


def _id_of(key: str, where: str) -> int:
    if not key.isascii() or not key.isdigit() or len(key) > 10:
        raise TokenizerError(f"{where}: {quoted(key)} in added_tokens_decoder is not an integer below 2^31")
    return int(key)


def _with_ids(declared: Iterable[AddedToken], vocab: Mapping[str, int], rows: int, where: str) -> Iterator[AddedToken]:
    """Yield the tokens with their ids, in order. Raises `TokenizerError` for ids that do not fit the vocabulary."""
    tokens = [*declared]
    stated = {token.content: token.id for token in tokens if token.id != NO_ID}
    require_special_tokens(stated, vocab, where)
    require_distinct_ids({**vocab, **stated}, where)
    used, last = {*vocab.values(), *stated.values()}, max(stated.values(), default=-1)
    for token in tokens:
        if token.id != NO_ID or token.content in vocab:
            yield replace(token, id=vocab.get(token.content, token.id))
            continue
        # The tokenizers package derives the next id from the size of the vocabulary, not from the largest id.
        id = max(len(vocab), last + 1)
        id = max(used) + 1 if id in used else id
        if token.content and id < rows:
            used.add(id)
            last = id
            yield replace(token, id=id)
