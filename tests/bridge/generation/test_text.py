"""Text generation without a model: stop strings, characters split over tokens, and control characters.

The decoder returns given ids, so that each case can be stated exactly.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from support.tokenizers_for_tests import of_tiktoken

import bridge
from bridge import BridgeError, GenerationConfig
from bridge.generation.decoder import Decoder
from bridge.generation.output import ENDED, Chunk, GenerationOutput
from bridge.generation.text import TextOutput, generate_text, printable, stream_text
from bridge.tokenizers.byte_level_bpe import WORDS
from bridge.tokenizers.tokenizer import Tokenizer

BYTES = bridge.byte_tokenizer()
END = 256
NO_TOKEN = 299

PIECES = ["ab", "abc", "stop", "END", "one STOP two", "é", "🙂", "\n\n"]
"""Tokens of several characters, with ids after the bytes and the end of text. Some are prefixes of others."""

CONFIG = bridge.GPT2Config(vocab_size=NO_TOKEN + 1, n_positions=512, n_embd=8, n_layer=1, n_head=1)


class Canned(Decoder[np.ndarray, Any]):
    """Returns the given ids, a list for each row, for any prompts. Token i has the log-probability -i/8."""

    def __init__(self, *rows: Sequence[int]) -> None:
        self.config, self.rows, self.made = CONFIG, rows, 0

    def _prefill(
        self,
        ids: np.ndarray,
        num_padding: np.ndarray,
        max_length: int,
        generation_config: GenerationConfig,
        noise: np.ndarray,
        ended: np.ndarray,
        copies: int,
    ) -> np.ndarray:
        assert len(noise) == len(ids) * copies == len(self.rows)
        ids_of_rows = np.full(noise.shape, ENDED)
        for row, canned in zip(ids_of_rows, self.rows, strict=True):
            stops = [i for i, token in enumerate(canned) if token in generation_config.eos_token_ids]
            length = min([len(row), *(i + 1 for i in stops)])
            row[:length] = canned[:length]
        self.made = 1
        return ids_of_rows

    def _decode(self, state: np.ndarray, steps: int) -> np.ndarray:
        self.made += steps
        return state

    def _chunk(self, state: np.ndarray, first: int, number: int) -> Chunk:
        assert first + number == self.made  # the caller reads each new token exactly once
        logprobs = np.broadcast_to(-np.arange(first, first + number, dtype=np.float32) / 8, (len(state), number))
        return Chunk(state[:, first : first + number], logprobs)

    def score_labels(self, *_: Any) -> Any:
        raise NotImplementedError

    def prefill_beams(self, *_: Any) -> Any:
        raise NotImplementedError

    def decode_beams(self, *_: Any) -> Any:
        raise NotImplementedError


class CannedBeams(Canned):
    """Returns the given ids as the outputs of beam search."""

    def generate(self, prompts: Any, config: GenerationConfig) -> list[list[GenerationOutput]]:
        found = [GenerationOutput([*row], [-1.0] * len(row) if config.logprobs else None) for row in self.rows]
        return [found[i : i + config.num_return_sequences] for i in range(0, len(found), config.num_return_sequences)]


@pytest.fixture(scope="module")
def pieces() -> Tokenizer:
    ranks = {bytes([b]): b for b in range(256)} | {piece.encode(): END + 1 + i for i, piece in enumerate(PIECES)}
    return of_tiktoken("pieces", pat_str=WORDS, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": END})


def spelled(*parts: str | int) -> list[int]:
    """Return ids: integers as they are, strings in `PIECES` as one token, and other strings as bytes."""
    ids: list[int] = []
    for part in parts:
        if isinstance(part, int):
            ids.append(part)
        else:
            ids += [END + 1 + PIECES.index(part)] if part in PIECES else part.encode()
    return ids


def output_of(ids: Sequence[int], tokenizer: Tokenizer, stop: Sequence[str] = (), **fields: Any) -> TextOutput:
    config = GenerationConfig(len(ids), **fields)
    ((done,),) = generate_text(Canned(ids), tokenizer, ["prompt"], config, stop)
    streamed = [*stream_text(Canned(ids), tokenizer, "prompt", config, stop)]
    assert "".join(streamed) == done.text
    assert all(streamed)
    return done


# Stop strings


@pytest.mark.parametrize(
    ("parts", "stop", "text", "read"),
    [
        (["one STOP two"], ["STOP"], "one ", 1),  # inside a token
        (["xST", "OP", "y"], ["STOP"], "x", 5),  # across tokens
        (["x", "ab", "c", "y"], ["abc"], "x", 3),
        (["x", "stop", "y"], ["op"], "xst", 2),  # begins inside a token
        (["x", "abc", "y"], ["xa", "bc"], "", 2),  # begins before a token
        (["xaab", "y"], ["ab"], "xa", 4),  # the start of the stop string occurs twice
        (["ababab", "END"], ["ababEND"], "ab", 7),
        (["xabababc"], ["ababc"], "xab", 8),
        (["aé", "🙂", "é"], ["🙂é"], "aé", 5),
        (["a", "é", "b"], ["é"], "a", 2),
        (["a\n", "\n\n"], ["\n\n"], "a", 3),
        (["a", "\n\n", "b"], ["\n"], "a", 2),
        (["END", "more"], ["END"], "", 1),
    ],
)
def test_a_stop_string_ends_the_text_before_it(
    parts: list[str], stop: list[str], text: str, read: int, pieces: Tokenizer
) -> None:
    ids = spelled(*parts)
    assert output_of(ids, pieces, stop) == TextOutput(text, ids[:read], None, True)


def test_the_shorter_of_two_stop_strings_with_one_prefix_wins(pieces: Tokenizer) -> None:
    for stop in itertools.permutations(["abcd", "ab", "abc"]):
        assert output_of(spelled("xabcdy"), pieces, stop).ids == spelled("xab")
        for parts in (["xabcdy"], ["x", "abc", "d"]):
            assert output_of(spelled(*parts), pieces, stop).text == "x"


def test_the_first_stop_string_within_a_token_wins(pieces: Tokenizer) -> None:
    for stop in itertools.permutations(["two", "STOP", "one STOP two!", "P t"]):
        assert output_of(spelled("one STOP two"), pieces, stop).text == "one "


def test_the_stop_string_that_is_complete_first_wins(pieces: Tokenizer) -> None:
    """This holds for every division into tokens, even if a longer stop string starts earlier."""
    for stop in (["abcd", "bc"], ["bc", "abcd"]):
        assert output_of(spelled("xabcd"), pieces, stop) == TextOutput("xa", spelled("xabc"), None, True)
        assert output_of(spelled("xabcd", "y"), pieces, stop).text == "xa"


def test_an_empty_stop_string_is_refused(pieces: Tokenizer) -> None:
    with pytest.raises(BridgeError, match="empty"):
        output_of(spelled("x"), pieces, [""])


@pytest.mark.parametrize("text", ["x stoSTO", "ST", "x S"])
def test_a_partial_stop_string_at_the_end_is_text(text: str) -> None:
    assert output_of(spelled(text), BYTES, ["STOP", "TO."]) == TextOutput(text, spelled(text), None, False)


def test_a_partial_stop_string_before_the_end_of_sequence_is_text() -> None:
    ids = spelled("x STO", END, "P")
    assert output_of(ids, BYTES, ["STOP"], eos_token_id=(END,)) == TextOutput("x STO", ids[:6], None, True)


def test_a_stop_string_in_the_prompt_is_ignored() -> None:
    config = GenerationConfig(3)
    ((done,),) = generate_text(Canned(spelled("OPx")), BYTES, ["STOP and ST"], config, ["STOP"])
    assert done == TextOutput("OPx", spelled("OPx"), None, False)


def test_stop_strings_end_random_text_as_a_search_of_the_whole_text(pieces: Tokenizer) -> None:
    rng = random.Random(0)
    tokens = [*b"abc", *spelled("ab", "abc")]
    stopped = 0
    for _ in range(500):
        ids = rng.choices(tokens, k=rng.randint(1, 20))
        stop = ["".join(rng.choices("abc", k=rng.randint(1, 5))) for _ in range(rng.randint(0, 3))]
        text, read = "", 0
        while read < len(ids) and not any(s in text for s in stop):
            text, read = text + pieces.decode([ids[read]]), read + 1
        places = [text.find(s) for s in stop if s in text]
        expected = TextOutput(text[: min(places, default=len(text))], ids[:read], None, bool(places))
        assert output_of(ids, pieces, stop) == expected, (ids, stop)
        stopped += expected.stopped
    assert 100 < stopped < 400


# Characters


def test_characters_split_over_tokens_are_joined() -> None:
    text = "a é € 🙂\u0301 日本語 — Ελ"
    assert output_of([*text.encode()], BYTES).text == text


def test_pieces_of_text_never_end_inside_a_character() -> None:
    text = "🙂€é日本語🙂🙂🙂"
    pieces = [*stream_text(Canned([*text.encode()]), BYTES, "p", GenerationConfig(len(text.encode())))]
    assert "".join(pieces) == text and len(pieces) > 3


def test_invalid_utf8_is_replaced() -> None:
    rng = random.Random(0)
    for _ in range(300):
        text = bytes(rng.choices(b"a\x80\x9f\xc3\xa9\xe2\x82\xac\xf0\x9f\x99\x82\xff", k=rng.randint(1, 14)))
        assert output_of([*text], BYTES).text == text.decode("utf-8", "replace")


@pytest.mark.parametrize("end", [[], [END]])
def test_an_incomplete_character_is_replaced(end: list[int]) -> None:
    done = output_of([*b"ab", *"🙂".encode()[:3], *end], BYTES, ["🙂"], eos_token_id=(END,))
    assert done.text == "ab\ufffd" and done.stopped is bool(end)


@pytest.mark.parametrize("tokenizer", [BYTES, bridge.character_tokenizer("amno\n prt")])
def test_ids_without_a_token_add_no_text(tokenizer: Tokenizer) -> None:
    """A model with a padded vocabulary may sample them."""
    m, o = (tokenizer.encode(c, special_tokens="as_text")[0] for c in "mo")
    ids = [NO_TOKEN, m, NO_TOKEN, 2**40, o, o, NO_TOKEN]
    assert output_of(ids, tokenizer) == TextOutput("moo", ids, None, False)
    assert output_of(ids, tokenizer, ["oo"]) == TextOutput("m", ids[:6], None, True)


def test_an_id_without_a_token_does_not_split_a_character() -> None:
    first, second = "é".encode()
    assert output_of([first, NO_TOKEN, second], BYTES).text == "é"


# End-of-sequence tokens, ids and log-probabilities


def test_the_end_of_sequence_is_in_the_ids_but_not_in_the_text() -> None:
    ids = spelled("uvw", END, "xyz")
    assert output_of(ids, BYTES, eos_token_id=(END,)) == TextOutput("uvw", ids[:4], None, True)
    assert output_of(ids, BYTES, eos_token_id=(ord("w"), ord("u"))) == TextOutput("", ids[:1], None, True)
    assert output_of(ids, BYTES) == TextOutput("uvw<|endoftext|>xyz", ids, None, False)


def test_the_first_of_stop_string_and_end_of_sequence_ends_the_text() -> None:
    ids = spelled("a.", END, "b,")
    assert output_of(ids, BYTES, ["."], eos_token_id=(END,)) == TextOutput("a", ids[:2], None, True)
    assert output_of(ids, BYTES, [","], eos_token_id=(END,)) == TextOutput("a.", ids[:3], None, True)


def test_a_text_that_ends_with_the_last_token_is_stopped() -> None:
    assert output_of(spelled("ab."), BYTES, ["."]).stopped
    assert output_of(spelled("ab", END), BYTES, eos_token_id=(END,)).stopped
    assert not output_of(spelled("ab"), BYTES, ["."], eos_token_id=(END,)).stopped


@pytest.mark.parametrize("stop", ["", "the end"])
def test_log_probabilities_are_those_of_the_ids(stop: str) -> None:
    text = "a text that is longer than is looked at in one go, the end and more"
    ids = spelled(text, END, "unread")
    done = output_of(ids, BYTES, [stop] if stop else [], eos_token_id=(END,), logprobs=True)
    length = text.index(stop) + len(stop) if stop else len(text) + 1
    assert done.ids == ids[:length]
    assert done.logprobs == [-i / 8 for i in range(length)]
    assert output_of(ids, BYTES, eos_token_id=(END,)).logprobs is None


def test_no_tokens_or_no_prompts_give_no_text() -> None:
    assert output_of([], BYTES, ["."]) == TextOutput("", [], None, False)
    assert output_of([], BYTES, logprobs=True) == TextOutput("", [], [], False)
    assert generate_text(Canned(), BYTES, [], GenerationConfig(3), ["."]) == []


def test_the_configuration_may_depend_on_the_longest_prompt() -> None:
    def config_for(length: int) -> GenerationConfig:
        return GenerationConfig(length)

    [[first], [second]] = generate_text(Canned(*[range(97, 107)] * 2), BYTES, ["ab", "abcd"], config_for)
    assert [len(first.ids), len(second.ids)] == [4, 4]
    assert "".join(stream_text(Canned(range(97, 107)), BYTES, "abc", config_for)) == "abc"


def test_outputs_are_grouped_by_prompt_and_each_stops_by_itself() -> None:
    texts = ["first.ab", "second, ", "third. a", "fourth,.", "longer a", "sixth, a"]
    config = GenerationConfig(8, temperature=1.0, num_return_sequences=2, eos_token_id=(ord(","),), logprobs=True)
    found = generate_text(Canned(*map(spelled, texts)), BYTES, ["one", "another prompt", "3"], config, ["."])
    assert [[done.text for done in samples] for samples in found] == [
        ["first", "second"],
        ["third", "fourth"],
        ["longer a", "sixth"],
    ]
    assert [done.stopped for samples in found for done in samples] == [True, True, True, True, False, True]
    for done, ids in zip(itertools.chain(*found), map(spelled, texts), strict=True):
        assert done.ids == ids[: len(done.text) + done.stopped]
        assert done.logprobs is not None and len(done.logprobs) == len(done.ids)


def test_beams_end_with_stop_strings_too() -> None:
    decoder = CannedBeams(spelled("a.b"), spelled("uv", END), spelled("xyz"), spelled("a"))
    config = GenerationConfig(3, num_beams=2, num_return_sequences=2, eos_token_id=(END,), logprobs=True)
    assert generate_text(decoder, BYTES, ["one", "two"], config, ["."]) == [
        [TextOutput("a", spelled("a."), [-1.0] * 2, True), TextOutput("uv", spelled("uv", END), [-1.0] * 3, True)],
        [TextOutput("xyz", spelled("xyz"), [-1.0] * 3, False), TextOutput("a", spelled("a"), [-1.0], False)],
    ]


# Streaming


def test_decoding_ends_when_all_rows_have_stopped() -> None:
    decoder = Canned(spelled("a." + 98 * "x"), spelled("abc." + 96 * "y"))
    generate_text(decoder, BYTES, ["one", "two"], GenerationConfig(100), ["."])
    assert decoder.made < 25
    decoder = Canned(spelled("a." + 98 * "x"))
    assert [*stream_text(decoder, BYTES, "one", GenerationConfig(100), ["."])] == ["a"]
    assert decoder.made < 10


def test_text_that_may_be_a_stop_string_is_not_streamed() -> None:
    text = "0123456789 ST no STOP"
    decoder = Canned(spelled(text))
    shown = ""
    for piece in stream_text(decoder, BYTES, "prompt", GenerationConfig(len(text)), ["STOP"]):
        shown += piece
        made = text[: decoder.made]
        assert shown == made.removesuffix(next(s for s in ("STOP", "STO", "ST", "S", "") if made.endswith(s)))
    assert shown == "0123456789 ST no "


def test_an_invalid_configuration_is_refused_before_the_first_text() -> None:
    decoder = Canned([1])
    with pytest.raises(BridgeError, match="the prompt is empty"):
        generate_text(decoder, BYTES, [""], GenerationConfig(1))
    with pytest.raises(BridgeError, match="temperature=-1"):
        next(stream_text(decoder, BYTES, "a", GenerationConfig(1, temperature=-1)))
    with pytest.raises(BridgeError, match="no character"):
        generate_text(decoder, bridge.character_tokenizer("abc"), ["d"], GenerationConfig(1))
    assert decoder.made == 0


# Other functions


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain\ttext\nof two lines, é 🙂 日本", "plain\ttext\nof two lines, é 🙂 日本"),
        ("\x1b[2J\x1b]0;title\x07", "\ufffd[2J\ufffd]0;title\ufffd"),
        ("a\rb\x00c\x08d\x7fe", "a\ufffdb\ufffdc\ufffdd\ufffde"),
        ("\x9b31m", "\ufffd31m"),  # the one-byte form of ESC [
        ("\u202eright to left\u2066", "\ufffdright to left\ufffd"),
        ("", ""),
    ],
)
def test_control_characters_are_not_printed(text: str, shown: str) -> None:
    assert printable(text) == shown
