"""Encode a rendered conversation so that the text of a message cannot become a special token.

Tokens that the template writes must match; tokens that a message spells must not. The conversation is therefore
rendered twice: unchanged, and with two marks around the text of each message. The marks are characters that occur
nowhere else. If both texts are equal apart from the marks, the text between two marks comes from a message.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from bridge.errors import TokenizerError, quoted
from bridge.tokenizers.chat.rendering import Messages, as_json, render
from bridge.tokenizers.chat.templates import ChatTemplate, read_chat_templates, select_chat_template
from bridge.tokenizers.surrogates import without_lone_surrogates

if TYPE_CHECKING:
    from bridge.tokenizers.tokenizer import SpecialTokenPolicy, Tokenizer

Parts = Sequence[tuple[str, bool]]
"""The parts of a text, in order, and whether each is trusted."""

_NOT_TEXT = ("role", "type")
"""Fields that a template compares with its own words. Their values are not marked."""


def apply_chat_template(
    tokenizer: Tokenizer, messages: Messages, name: str | None, variables: Mapping[str, Any]
) -> str:
    """Return the text of a conversation. See `Tokenizer.apply_chat_template`.

    Args:
        name: the name of the template, or None for the default one.
    """
    return render(template_of(tokenizer, name), [messages], with_special_tokens(tokenizer, variables))[0]


def encode_conversations(
    tokenizer: Tokenizer,
    conversations: Sequence[Messages],
    name: str | None,
    variables: Mapping[str, Any],
    special_tokens: SpecialTokenPolicy,
) -> list[list[int]]:
    """Return the ids of each conversation. See `Tokenizer.encode_conversations`."""
    template, variables = template_of(tokenizer, name), with_special_tokens(tokenizer, variables)
    if special_tokens == "match":
        texts = render(template, conversations, variables)
        return tokenizer.encode_batch(texts, add_special_tokens=False)
    ids = []
    for parts in render_in_parts(tokenizer, template, conversations, variables):
        ids.append(tokenizer.encode_parts(parts))
        text = "".join(part for part, _ in parts)
        if special_tokens == "error" and ids[-1] != tokenizer.encode(text, add_special_tokens=False):
            _raise_for_token(tokenizer, parts)
    return ids


def render_in_parts(
    tokenizer: Tokenizer, template: ChatTemplate, conversations: Sequence[Messages], variables: Mapping[str, Any]
) -> list[Parts]:
    """Return the text of each conversation in parts. Those that the template wrote are trusted.

    Raises `TokenizerError` if the two cannot be distinguished.
    """
    _require_no_unmarked_token(tokenizer, conversations)
    marks = _marks(template.text, conversations, variables)
    # A template may strip messages, so white space at their ends stays outside the marks unless a token contains some.
    around_space = any(character.isspace() for token in tokenizer.added for character in token)
    marked = [_with_marks(messages, marks, around_space) for messages in conversations]
    texts = list(map(without_lone_surrogates, render(template, [*conversations, *marked], variables)))
    found = []
    for text, with_marks in zip(texts[: len(conversations)], texts[len(conversations) :], strict=True):
        parts = _parts(with_marks, marks)
        if parts is None or "".join(part for part, _ in parts) != text:
            raise TokenizerError(
                f"{template.where}: the chat template changes the messages so much that their text cannot be "
                "distinguished from its own; use special_tokens='match' (--special-tokens) if you trust the messages"
            )
        found.append(parts)
    return found


def template_of(tokenizer: Tokenizer, name: str | None) -> ChatTemplate:
    """Return the template of this name, by default the default one. Raises `TokenizerError` if there is none."""
    directory = tokenizer.chat_directory
    found = {} if directory is None else read_chat_templates(directory)
    return select_chat_template(found, name, quoted(directory or tokenizer.name))


def with_special_tokens(tokenizer: Tokenizer, variables: Mapping[str, Any]) -> dict[str, Any]:
    """Return the variables of a template, with the tokenizer's special tokens by role."""
    return {f"{role}_token": token for role, token in tokenizer.special.by_role().items()} | dict(variables)


def _require_no_unmarked_token(tokenizer: Tokenizer, conversations: Sequence[Messages]) -> None:
    """Raise `TokenizerError` for an added token in what `_with_marks` leaves unmarked."""
    for text in _unmarked(conversations):
        for token in tokenizer.added:
            if token in text:
                raise TokenizerError(
                    f"{quoted(text)}, a field, role or type of a message, contains the token {quoted(token)}; remove "
                    "it, or choose special_tokens='match' (--special-tokens)"
                )


def _unmarked(value: Any, is_text: bool = True) -> Iterator[str]:
    """Yield the names of fields, and the values of the fields in `_NOT_TEXT`."""
    if isinstance(value, str) and not is_text:
        yield value
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield str(name)
            yield from _unmarked(inner, is_text and name not in _NOT_TEXT)
    elif isinstance(value, list | tuple):
        for element in value:
            yield from _unmarked(element, is_text)


def _raise_for_token(tokenizer: Tokenizer, parts: Parts) -> NoReturn:
    from_messages = [part for part, is_trusted in parts if not is_trusted]
    found = (f"the token {quoted(t)}" for t in tokenizer.added if any(t in part for part in from_messages))
    raise TokenizerError(
        f"a message contains {next(found, 'a part of an added token')}; remove it, or choose "
        "special_tokens='match' or 'as_text' (--special-tokens)"
    )


def _marks(*used: Any) -> tuple[str, str]:
    """Return two characters that occur in none of the arguments. Private-use characters are tried first."""
    taken = {*as_json(used, ensure_ascii=False)}
    free = (character for character in map(chr, range(0xE000, 0x110000)) if character not in taken)
    first, second = itertools.islice(free, 2)
    return first, second


def _with_marks(value: Any, marks: tuple[str, str], around_space: bool) -> Any:
    if isinstance(value, str):
        text = value if around_space else value.strip()
        start = value.index(text)
        return f"{value[:start]}{marks[0]}{text}{marks[1]}{value[start + len(text) :]}" if text else value
    if isinstance(value, Mapping):
        return {k: v if k in _NOT_TEXT else _with_marks(v, marks, around_space) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_with_marks(element, marks, around_space) for element in value]
    return value


def _parts(text: str, marks: tuple[str, str]) -> Parts | None:
    """Split a text at its marks, and remove the marks. Returns None unless they alternate."""
    found = re.findall(f"[{marks[0]}{marks[1]}]", text)
    if found != [*marks] * (len(found) // 2):
        return None
    return [(part, k % 2 == 0) for k, part in enumerate(re.split(f"[{marks[0]}{marks[1]}]", text))]
