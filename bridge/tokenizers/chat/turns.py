"""Which part of a rendered conversation is the assistant's, for training on it.

A chat template is a program, so the boundary is found by rendering. The conversation before a message of the assistant,
rendered with `add_generation_prompt`, is what the model is given at generation. The rendering up to and including that
message begins with the same text. The rest is the message and what the template writes after it, which is what the
model has to generate.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bridge.errors import TokenizerError, quoted
from bridge.tokenizers.chat.encoding import Parts, render_in_parts, template_of, with_special_tokens
from bridge.tokenizers.chat.rendering import Messages, render_each, require_jinja
from bridge.tokenizers.chat.templates import ChatTemplate
from bridge.tokenizers.surrogates import without_lone_surrogates

if TYPE_CHECKING:
    from bridge.tokenizers.tokenizer import Tokenizer


class UnstableTemplateError(TokenizerError):
    """The rendering of a conversation does not begin with the rendering of its first messages."""


@dataclass(frozen=True)
class Segment:
    """A part of a rendered conversation."""

    parts: Parts
    """The text. Only the parts that are trusted may contain special tokens."""
    is_reply: bool
    """Whether the assistant generates it."""

    @property
    def text(self) -> str:
        return "".join(part for part, _ in self.parts)


def require_chat_template(tokenizer: Tokenizer) -> ChatTemplate:
    """Return the tokenizer's default template. Raises `TokenizerError` if there is none or jinja2 is not installed."""
    require_jinja()
    return template_of(tokenizer, None)


def render_turns(
    tokenizer: Tokenizer, conversations: Sequence[Messages], *, trust_messages: bool = True
) -> list[Sequence[Segment] | TokenizerError]:
    """Render conversations with the default template, split before and after each reply of the assistant.

    Each conversation must have a message before the assistant's first one.

    Args:
        trust_messages: whether special tokens in the text of a message are special tokens.

    Returns:
        For each conversation, its parts, or why the template cannot render it: an `UnstableTemplateError` if its
        rendering of the first messages changes when the conversation continues.

    Raises:
        TokenizerError: there is no template.
    """
    template, variables = require_chat_template(tokenizer), with_special_tokens(tokenizer, {})
    replies = [[k for k, message in enumerate(c) if message.get("role") == "assistant"] for c in conversations]
    parts = [(c, k) for c, found in zip(conversations, replies, strict=True) for k in found]
    before = render_each(template, [c[:k] for c, k in parts], {**variables, "add_generation_prompt": True})
    variables["add_generation_prompt"] = False
    up_to = render_each(template, [c[: k + 1] for c, k in parts], variables)
    whole = render_each(template, conversations, variables)
    segments: list[Sequence[Segment] | TokenizerError] = []
    for conversation, text, found in zip(conversations, whole, replies, strict=True):
        boundaries = [(next(before), next(up_to)) for _ in found]
        try:
            complete: Parts = [(_text(text), True)]
            if not trust_messages:
                [complete] = render_in_parts(tokenizer, template, [conversation], variables)
            segments.append(_segments(complete, [(_text(a), _text(b)) for a, b in boundaries], template))
        except TokenizerError as error:
            segments.append(error)
    return segments


def _text(rendered: str | TokenizerError) -> str:
    if isinstance(rendered, TokenizerError):
        raise rendered
    return without_lone_surrogates(rendered)


def _segments(whole: Parts, replies: Sequence[tuple[str, str]], template: ChatTemplate) -> list[Segment]:
    """Split a conversation at its replies: for each, the rendering before it and the rendering up to its end."""
    text = "".join(part for part, _ in whole)
    ends = [0]
    for before, up_to in replies:
        if not (up_to.startswith(before) and text.startswith(up_to) and len(before) >= ends[-1]):
            raise UnstableTemplateError(
                f"{template.where}: the chat template changes the beginning of a conversation when it continues, near "
                f"{quoted(_difference(before, up_to, text))}; train with a template that only appends"
            )
        ends += [len(before), len(up_to)]
    ends.append(len(text))
    pieces = enumerate(itertools.pairwise(ends))
    return [Segment(_slice(whole, start, end), k % 2 == 1) for k, (start, end) in pieces if start < end]


def _slice(parts: Parts, start: int, end: int) -> Parts:
    """Return the parts of characters start ... end - 1."""
    found, at = [], 0
    for text, is_trusted in parts:
        if piece := text[max(0, start - at) : max(0, end - at)]:
            found.append((piece, is_trusted))
        at += len(text)
    return found


def _difference(before: str, up_to: str, text: str) -> str:
    """Return the text after the last common character."""
    one, other = (before, up_to) if not up_to.startswith(before) else (up_to, text)
    same = next((k for k, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return one[max(0, same - 10) : same + 30]
