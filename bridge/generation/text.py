"""Text generation over any backend's `Decoder` and any tokenizer."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from bridge.errors import BridgeError
from bridge.generation.config import GenerationConfig
from bridge.generation.decoder import Decoder
from bridge.generation.output import ENDED, InvalidLogits
from bridge.tokenizers.tokenizer import SpecialTokenPolicy, Tokenizer

STREAM_CHUNK = 4
"""Tokens per piece of streamed text. With 124M parameters on CPU, a piece takes a tenth of a second."""

PROMPTS_PER_BATCH = 32
"""Prompts that run together. A cache for all prompts of a long list would not fit in memory."""

STOP_CHUNK = 16
"""Tokens between two searches for stop strings."""

_DIRECTION = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


@dataclass(frozen=True)
class TextOutput:
    """One continuation of a text."""

    text: str
    """The new text, without the prompt and without the stop string or end-of-sequence token."""
    ids: list[int]
    """The new tokens, including the one that completed a stop string or is an end-of-sequence token."""
    logprobs: list[float] | None
    """The log-probability of each token, in nats, if requested."""
    stopped: bool
    """Whether a stop string or an end-of-sequence token, and not `max_new_tokens`, ended the text."""


ConfigOrRule = GenerationConfig | Callable[[int], GenerationConfig]
"""A configuration, or a function that returns it for the number of tokens of the longest prompt, such as
`GenerationDefaults.config`."""


def generate_text(
    decoder: Decoder[Any, Any],
    tokenizer: Tokenizer,
    prompts: Sequence[str | Sequence[int]],
    generation_config: ConfigOrRule,
    stop: Sequence[str] = (),
    *,
    special_tokens: SpecialTokenPolicy = "match",
) -> list[list[TextOutput]]:
    """Return `num_return_sequences` outputs for each prompt.

    Args:
        prompts: texts, or their ids, such as those of `Tokenizer.encode_conversations`.
        generation_config: with `eos_token_id=tokenizer.eos_token_ids`, outputs end at the end of a document. It may be
            a function of the number of tokens of the longest prompt, such as `GenerationDefaults.config`.
        stop: outputs also end before any of these strings.
        special_tokens: what to do where a prompt contains an added token; see `Tokenizer.encode`.

    Raises `BridgeError` for an invalid configuration, a text that the tokenizer cannot encode, and logits that are NaN
    or infinite.
    """
    ids = _encoded(tokenizer, prompts, special_tokens)
    config = _config_for(ids, generation_config)
    config.check(decoder.config, ids)
    outputs = []
    for i in range(0, len(ids), PROMPTS_PER_BATCH):
        try:
            outputs += _generate_batch(decoder, tokenizer, ids[i : i + PROMPTS_PER_BATCH], config, stop)
        except InvalidLogits as error:
            raise InvalidLogits(i * config.num_return_sequences + error.row, error.step) from None
    return outputs


def _config_for(ids: Sequence[Sequence[int]], config: ConfigOrRule) -> GenerationConfig:
    return config if isinstance(config, GenerationConfig) else config(max(map(len, ids), default=0))


def _generate_batch(
    decoder: Decoder[Any, Any],
    tokenizer: Tokenizer,
    ids: Sequence[Sequence[int]],
    config: GenerationConfig,
    stop: Sequence[str],
) -> list[list[TextOutput]]:
    n = config.num_return_sequences
    rows = [_Row(tokenizer, config, stop, ids[r // n]) for r in range(len(ids) * n)]
    if config.num_beams > 1:
        found = [output for outputs in decoder.generate(ids, config) for output in outputs]
        for row, output in zip(rows, found, strict=True):
            row.read(output.ids, output.logprobs)
    else:
        for chunk in decoder.stream(ids, config, STOP_CHUNK if stop else None):
            for r, row in enumerate(rows):
                row.read(chunk.ids[r].tolist(), None if chunk.logprobs is None else chunk.logprobs[r].tolist())
            if all(row.stopped for row in rows):
                break
    done = [row.output() for row in rows]
    return [done[i : i + n] for i in range(0, len(done), n)]


def stream_text(
    decoder: Decoder[Any, Any],
    tokenizer: Tokenizer,
    prompt: str | Sequence[int],
    generation_config: ConfigOrRule,
    stop: Sequence[str] = (),
    *,
    special_tokens: SpecialTokenPolicy = "match",
) -> Iterator[str]:
    """Yield the continuation of one prompt in pieces. The prompt is a text or a list of ids.

    No piece ends inside a character or a stop string. The arguments are those of `generate_text`.
    """
    [ids] = _encoded(tokenizer, [prompt], special_tokens)
    config = _config_for([ids], generation_config)
    row = _Row(tokenizer, config, stop, ids)
    for chunk in decoder.stream([ids], config, STREAM_CHUNK):
        if piece := row.read(chunk.ids[0].tolist()):
            yield piece
        if row.stopped:
            return
    if piece := row.flush():
        yield piece


def _encoded(
    tokenizer: Tokenizer, prompts: Sequence[str | Sequence[int]], special_tokens: SpecialTokenPolicy
) -> list[Sequence[int]]:
    """Return the ids of each prompt. A prompt of ids is returned unchanged."""
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    encoded = iter(tokenizer.encode_batch(texts, special_tokens=special_tokens))
    return [next(encoded) if isinstance(prompt, str) else prompt for prompt in prompts]


def printable(text: str) -> str:
    """Replace control characters and direction marks, which would control a terminal."""
    return "".join(
        "\ufffd" if (unicodedata.category(c) == "Cc" and c not in "\n\t") or c in _DIRECTION else c for c in text
    )


@dataclass
class _Row:
    """The text of one output, decoded token by token."""

    tokenizer: Tokenizer
    config: GenerationConfig
    stop: Sequence[str]
    prompt: Sequence[int] = ()
    text: str = ""
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    stopped: bool = False
    pending: str = ""
    """Text that may be the beginning of a stop string and is not yet part of `text`."""

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            raise BridgeError(f"stop: {self.stop!r} is one string; give a list of strings")
        if "" in self.stop:
            raise BridgeError("stop: an empty string would end every text at its start; leave it out")
        self.stream = self.tokenizer.stream(self.prompt)

    def read(self, ids: Sequence[int], logprobs: Sequence[float] | None = None) -> str:
        """Decode more tokens and return the new text. Tokens after the one that ends the text are ignored."""
        before = len(self.text)
        for i, token in enumerate(ids):
            if self.stopped or token == ENDED:
                break
            self.ids.append(token)
            if logprobs is not None:
                self.logprobs.append(logprobs[i])
            if token in self.config.eos_token_ids:
                self.flush()
                self.stopped = True
            else:
                self._add(self.stream.add(token))
        return self.text[before:]

    def flush(self) -> str:
        """Append the pending text to `text` and return it. It is empty after a stop string."""
        before = len(self.text)
        if not self.stopped:
            self._add(self.stream.flush())
            if not self.stopped:
                self.text, self.pending = self.text + self.pending, ""
        return self.text[before:]

    def output(self) -> TextOutput:
        self.flush()
        return TextOutput(self.text, self.ids, self.logprobs if self.config.logprobs else None, self.stopped)

    def _add(self, new: str) -> None:
        self.pending += new
        found = [(place + len(s), place) for s in self.stop if (place := self.pending.find(s)) >= 0]
        if found:
            self.stopped = True
            keep = min(found)[1]  # the stop string that is complete first when characters are added one by one
        else:
            keep = len(self.pending) - max((_overlap(self.pending, s) for s in self.stop), default=0)
        self.text, self.pending = self.text + self.pending[:keep], self.pending[keep:]


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest suffix of `text` that is a proper prefix of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
