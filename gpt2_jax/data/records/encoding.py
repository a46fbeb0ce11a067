"""Records as token ids, and which of them count in the loss."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from bridge.errors import TokenizerError
from bridge.tokenizers.chat.turns import Segment, UnstableTemplateError, render_turns, require_chat_template
from bridge.tokenizers.tokenizer import SpecialTokenPolicy, Tokenizer
from gpt2_jax.data.records.examples import Example, Message, example_of, texts_in, work_of
from gpt2_jax.data.records.files import Records, rows_of
from gpt2_jax.data.records.rows import BadRecord
from gpt2_jax.data.text.blocks import Block, Tasks
from gpt2_jax.data.text.documents import BLOCK_BYTES, Document
from gpt2_jax.data.text.special_tokens import around_documents
from gpt2_jax.data.tokens.cache import CachedText, TaskProgress, cached
from gpt2_jax.data.tokens.cache_writer import Encoding

_MOST_EXAMPLES = 4096
"""Limit on the examples of a block, so that very short ones do not fill the memory."""
_BLOCK_OF_MESSAGES = 4 * BLOCK_BYTES
"""Each block of conversations starts the process that renders chat templates, so it is larger."""

Parts = Sequence[tuple[np.ndarray, bool]]
"""The ids of an example in parts, and whether each part counts in the loss."""


def cached_records(
    records: Records,
    tokenizer: Tokenizer,
    *,
    special_tokens: SpecialTokenPolicy = "match",
    cache: str | Path | None = None,
    progress: TaskProgress | None = None,
) -> CachedText:
    """Return the tokens of records, encoded into the cache if they are not there yet.

    Each record is one document. A text is encoded as a text file is. A prompt and its completion are encoded
    separately, as at generation; the completion and the end-of-sequence token after it count in the loss. In a
    conversation, the replies of the assistant count; see `bridge.tokenizers.chat.turns`. The end-of-sequence token
    follows each conversation, unless the template writes it in or after the last message.

    Args:
        special_tokens: what to do where a text contains an added token; see `Tokenizer.encode`. The tokens that a chat
            template writes are always matched.

    Raises:
        DataError: a file is damaged, or a record cannot be used and `skip_bad` is false.
        TokenizerError: the tokenizer has no chat template, or its template cannot be used for training.
    """
    encoder = _Encoder(records, tokenizer, special_tokens)
    encoding = Encoding(tokenizer, encoder.key, encoder.tasks, "it has no records", records.schema.masked)
    return cached(records, encoding, cache, progress)


@dataclass(frozen=True)
class _Place:
    """An example that was read, or why it cannot be used, and its place for messages."""

    example: Example | BadRecord
    where: str


@dataclass(frozen=True)
class _Encoder:
    records: Records
    tokenizer: Tokenizer
    special_tokens: SpecialTokenPolicy

    @property
    def key(self) -> str:
        """What distinguishes this encoding of the files from others."""
        limit = self.records.options.max_tokens if self.records.schema.masked else None
        template = require_chat_template(self.tokenizer).text if self.records.schema.kind == "messages" else None
        around = around_documents(self.tokenizer)
        parts = [self.tokenizer.fingerprint, self.special_tokens, around, limit, template]
        return json.dumps(parts) + self.records.key

    def tasks(self) -> Tasks:
        for file in self.records.files:
            yield from self._tasks_of(file)
            yield partial(Block, np.empty(0, np.uint32), files=1)

    def _tasks_of(self, file: Document) -> Tasks:
        """Yield the tasks that encode the examples of a file, about `BLOCK_BYTES` of text each."""
        most = _BLOCK_OF_MESSAGES if self.records.schema.kind == "messages" else BLOCK_BYTES
        waiting: list[_Place] = []
        size = done = position = 0
        for row in rows_of(file.path, self.records.schema):
            found: Example | BadRecord
            try:
                found = example_of(row, self.records.schema)
                size += work_of(found)
            except BadRecord as bad:
                found = bad
            waiting.append(_Place(found, row.place_in(file.path)))
            position = max(position, row.position)
            if size >= most or len(waiting) >= _MOST_EXAMPLES:
                yield partial(self._block, waiting, position - done)
                waiting, size, done = [], 0, position
        yield partial(self._block, waiting, file.size - done)

    def _block(self, places: Sequence[_Place], read: int) -> Block:
        """Encode the examples of a block. The first record that cannot be used is an error, unless it is left out."""
        left_out: Counter[str] = Counter()
        ids, counts, ends = [np.empty(0, np.uint32)], [np.empty(0, np.bool_)], []
        total = size = characters = 0
        for place, parts in zip(places, self._encoded([place.example for place in places]), strict=True):
            if isinstance(parts, BadRecord):
                self.records.leave_out(place.where, parts)
                left_out[parts.reason] += 1
                continue
            ids += [part for part, _ in parts]
            counts += [np.full(len(part), does_count) for part, does_count in parts]
            total += sum(len(part) for part, _ in parts)
            ends.append(total)
            assert not isinstance(place.example, BadRecord)
            for text in texts_in(place.example):
                size += len(text.encode("utf-8", "surrogatepass"))
                characters += len(text)
        return Block(
            np.concatenate(ids),
            np.concatenate(counts) if self.records.schema.masked else None,
            np.array(ends, np.int64),
            read=read,
            bytes=size,
            characters=characters,
            left_out=left_out,
        )

    def _encoded(self, examples: Sequence[Example | BadRecord]) -> Iterator[Parts | BadRecord]:
        """Yield the ids of each example, or why it cannot be used."""
        rendered = iter(self._rendered([example for example in examples if isinstance(example, list)]))
        for example in examples:
            try:
                if isinstance(example, BadRecord):
                    raise example
                if isinstance(example, list):
                    parts = self._of_messages(example, next(rendered))
                else:
                    parts = self._of_text(example)
                self._require_room(parts)
                yield parts
            except BadRecord as bad:
                yield bad
            except TokenizerError as error:
                yield BadRecord("that the tokenizer or its template rejects", str(error))

    def _of_text(self, example: str | tuple[str, str]) -> Parts:
        before, after = (np.array(ids, np.uint32) for ids in around_documents(self.tokenizer))
        if isinstance(example, str):
            return [(before, True), (self._ids(example), True), (after, True)]
        prompt, completion = example
        return [(self._ids(prompt, around=True), False), (self._ids(completion), True), (after, True)]

    def _of_messages(self, messages: Sequence[Message], segments: Sequence[Segment] | TokenizerError) -> Parts:
        if isinstance(segments, TokenizerError):
            raise segments
        if self.special_tokens == "error":
            for message in messages:
                self._ids(message["content"])  # raises for an added token
        if not any(segment.is_reply for segment in segments):
            raise BadRecord("with an empty completion", "its messages have no text in the chat template")
        parts = [(self._ids_of_segment(segment), segment.is_reply) for segment in segments]
        end = np.array(self.tokenizer.eos_token_ids, np.uint32)
        if not np.isin(end, parts[-1][0]).any():
            parts.append((end, segments[-1].is_reply))
        return parts

    def _ids(self, text: str, *, around: bool = False) -> np.ndarray:
        return self.tokenizer.encode_to_numpy(text, special_tokens=self.special_tokens, add_special_tokens=around)

    def _ids_of_segment(self, segment: Segment) -> np.ndarray:
        if self.special_tokens == "as_text":
            return np.array(self.tokenizer.encode_parts(segment.parts), np.uint32)
        return self.tokenizer.encode_to_numpy(segment.text, special_tokens="match", add_special_tokens=False)

    def _rendered(self, conversations: Sequence[Sequence[Message]]) -> list[Sequence[Segment] | TokenizerError]:
        """Render conversations, or return why the template cannot render them."""
        if not conversations:
            return []
        rendered = render_turns(self.tokenizer, conversations, trust_messages=self.special_tokens != "as_text")
        if unstable := next((error for error in rendered if isinstance(error, UnstableTemplateError)), None):
            raise unstable
        return rendered

    def _require_room(self, parts: Parts) -> None:
        """Raise `BadRecord` for an example with a completion that is longer than the limit."""
        limit = self.records.options.max_tokens
        total = sum(len(ids) for ids, _ in parts)
        if self.records.schema.masked and limit is not None and total > limit:
            raise BadRecord(
                "longer than --seq-len", f"has {total} tokens, and an example at most {limit}", "raise --seq-len"
            )
