"""The added and special tokens that the files of a tokenizer declare, combined as transformers combines them.

Source: `PreTrainedTokenizerBase._from_pretrained` and `TokenizersBackend.__init__` of transformers 5, rewritten.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from bridge.errors import TokenizerError, quoted
from bridge.tokenizers.tokenizer import AddedToken, SpecialTokens
from bridge.tokenizers.validation import require_distinct_ids, require_special_tokens

ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

NO_ID = -1
"""The id of a token that is declared by its spelling alone."""

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

        A token that is declared without an id, and that the vocabulary does not have, gets the next free id if the
        model has a row for it. Otherwise it is left out.

        Args:
            vocab: the vocabulary of the model of the tokenizer.
            present: the added tokens that the tokenizer has before.
            defaults: role -> spelling, for roles that no file mentions. They count only if the vocabulary has them.
            rows: the size of the model's vocabulary.
        """
        stored = self._stored()
        by_content = {token.content: token for token in stored}
        named = {role: by_content.get(t.content, t) for role, t in self._named().items()}
        contents = {token.content for token in named.values()}
        found = {token.content: token for token in present}
        for token in sorted(stored, key=lambda token: token.id):
            special = token.special or token.content in contents
            if found.get(token.content) != token:
                found[token.content] = replace(token, special=special)
        known = {*found}
        for token in [*(replace(t, special=True) for t in named.values()), *self._extra()]:
            if token.content not in known:
                found.setdefault(token.content, token)
        usual = {role: token for role, token in defaults.items() if role not in self._mentioned()}
        for content in usual.values():
            if content in vocab:
                found.setdefault(content, AddedToken(content, NO_ID))
        added = tuple(_with_ids(found.values(), vocab, rows, self.where))
        present_tokens = {*vocab, *(token.content for token in added)}
        roles = {role: token.content for role, token in named.items()} | usual
        roles = {role.removesuffix("_token"): t for role, t in roles.items() if t in present_tokens and role in ROLES}
        additional = tuple(dict.fromkeys(t.content for t in self._extra() if t.content in present_tokens))
        return added, SpecialTokens(**roles, additional=additional)

    def role(self, name: str, default: str | None) -> str | None:
        """Return the spelling of the token with this role."""
        if name not in self._mentioned():
            return default
        named = self._named().get(name)
        return None if named is None else named.content

    @property
    def _merged(self) -> Mapping[str, Any]:
        # The files of transformers before 4.33 count only where there is no `added_tokens_decoder`.
        if "added_tokens_decoder" in self.settings:
            return self.settings
        return {**self.settings, **self.special_tokens_map}

    def _mentioned(self) -> set[str]:
        return {role for role in ROLES if role in self._merged}

    def _named(self) -> dict[str, AddedToken]:
        """Return role -> token. Roles of the tokenizer's own, such as `image_token`, are among them."""
        merged = self._merged
        own = {key: value for key, value in merged.items() if key.endswith("_token") and isinstance(value, str | dict)}
        extra = merged.get("extra_special_tokens")
        named = own | (extra if isinstance(extra, dict) else {})
        tokens = {role: _token(value, NO_ID, self.where) for role, value in named.items()}
        return {role: token for role, token in tokens.items() if token.content}

    def _extra(self) -> list[AddedToken]:
        merged = self._merged
        listed = merged.get("extra_special_tokens") or merged.get("additional_special_tokens") or []
        if isinstance(listed, dict):
            return []
        if not isinstance(listed, list):
            raise TokenizerError(f"{self.where}: additional_special_tokens is not a list")
        return [_token(value, NO_ID, self.where) for value in listed]

    def _stored(self) -> list[AddedToken]:
        """Return the tokens that the files declare with an id."""
        if "added_tokens_decoder" in self.settings:
            decoder = self.settings["added_tokens_decoder"]
            if not isinstance(decoder, dict):
                raise TokenizerError(f"{self.where}: added_tokens_decoder is not an object")
            return [_token(value, _id_of(key, self.where), self.where) for key, value in decoder.items()]
        special = {token.content for token in [*self._named().values(), *self._extra_of_settings()]}
        require_distinct_ids(self.added_tokens, self.where)
        legacy = {
            i: AddedToken(token, i, special=token in special, normalized=token not in special)
            for token, i in self.added_tokens.items()
        }
        return [*(legacy | {token.id: token for token in self.of_tokenizer_json}).values()]

    def _extra_of_settings(self) -> list[AddedToken]:
        return replace(self, special_tokens_map={})._extra()


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


def _token(value: Any, id: Any, where: str) -> AddedToken:
    """Return the token that a string or an object with `content` describes."""
    if isinstance(value, str):
        return AddedToken(value, id)
    if not isinstance(value, dict) or not isinstance(value.get("content"), str):
        raise TokenizerError(f"{where}: {quoted(value)} is neither a token nor an object with content")
    flags = {name: value[name] for name in _FLAGS if name in value}
    if not all(isinstance(flag, bool) for flag in flags.values()):
        raise TokenizerError(f"{where}: a flag of the token {quoted(value['content'])} is not true or false")
    special = flags.get("special", False)
    return AddedToken(value["content"], id, **{"special": special, "normalized": not special, **flags})


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
        # The rule of the tokenizers package, which counts the vocabulary instead of looking for its largest id.
        id = max(len(vocab), last + 1)
        id = max(used) + 1 if id in used else id
        if token.content and id < rows:
            used.add(id)
            last = id
            yield replace(token, id=id)
