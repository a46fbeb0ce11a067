"""Inputs of the checks: a checkpoint, token ids, and the hyperparameters of training."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

import bridge
from bridge import BridgeError, Checkpoint, GPT2Config, NoTokenizerError, SequenceClassifier, Tokenizer, TokenizerError
from bridge.comparison.strings import encodable
from bridge.generation.defaults import GenerationDefaults

BUILT_IN_TEXT = """\
When in the Course of human events, it becomes necessary for one people to dissolve the political bands \
which have connected them with another, and to assume among the powers of the earth, the separate and equal \
station to which the Laws of Nature and of Nature's God entitle them, a decent respect to the opinions of \
mankind requires that they should declare the causes which impel them to the separation.

We hold these truths to be self-evident, that all men are created equal, that they are endowed by their \
Creator with certain unalienable Rights, that among these are Life, Liberty and the pursuit of Happiness. \
That to secure these rights, Governments are instituted among Men, deriving their just powers from the \
consent of the governed, That whenever any Form of Government becomes destructive of these ends, it is the \
Right of the People to alter or to abolish it, and to institute new Government, laying its foundation on \
such principles and organizing its powers in such form, as to them shall seem most likely to effect their \
Safety and Happiness. Prudence, indeed, will dictate that Governments long established should not be changed \
for light and transient causes; and accordingly all experience hath shewn, that mankind are more disposed to \
suffer, while evils are sufferable, than to right themselves by abolishing the forms to which they are \
accustomed. But when a long train of abuses and usurpations, pursuing invariably the same Object evinces a \
design to reduce them under absolute Despotism, it is their right, it is their duty, to throw off such \
Government, and to provide new Guards for their future security. Such has been the patient sufferance of \
these Colonies; and such is now the necessity which constrains them to alter their former Systems of \
Government. The history of the present King of Great Britain is a history of repeated injuries and \
usurpations, all having in direct object the establishment of an absolute Tyranny over these States. To prove \
this, let Facts be submitted to a candid world.

He has refused his Assent to Laws, the most wholesome and necessary for the public good.

He has forbidden his Governors to pass Laws of immediate and pressing importance, unless suspended in their \
operation till his Assent should be obtained; and when so suspended, he has utterly neglected to attend to \
them.

He has refused to pass other Laws for the accommodation of large districts of people, unless those people \
would relinquish the right of Representation in the Legislature, a right inestimable to them and formidable \
to tyrants only.

He has called together legislative bodies at places unusual, uncomfortable, and distant from the depository \
of their Public Records, for the sole purpose of fatiguing them into compliance with his measures.

He has dissolved Representative Houses repeatedly, for opposing with manly firmness his invasions on the \
rights of the people.
"""
"""The Declaration of Independence of the United States, 1776; in the public domain. Its 582 tokens of GPT-2 are
more than a row of the default length has, so a row of GPT-2 does not repeat text."""

MIN_TEXT_COVERAGE = 0.9
"""Use the built-in text only if the tokenizer has at least this fraction of its characters. A trained model can then
predict the rest of the text."""

MIN_DEFAULT_LENGTH, BEYOND_HALF = 384, 64
"""The default number of tokens per row, and the tokens beyond half of the model's positions. Short rows would hide
mistakes in the later positions."""

MAX_GRADIENT_LENGTH = 1024
"""Maximum sequence length of gradients. A backward pass keeps the attention weights of all layers, whose memory grows
with the square of the length."""

TRAIN_STEPS = 10
MAX_SHORT_LENGTH = 64
"""Maximum sequence length in the training and padding checks, to save time. What they test is independent of length."""

PROMPTS, PROMPT_LENGTH = 3, 8
"""The number of prompts to generate from, and their tokens."""


@dataclass(frozen=True)
class AdamW:
    """Hyperparameters of AdamW (Loshchilov and Hutter 2019). Weight decay applies to every parameter, to test it."""

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1


@dataclass(frozen=True)
class Tokens:
    """Token ids and their origin."""

    ids: np.ndarray
    """[B, T]."""
    origin: str
    is_text: bool
    """Whether the ids are text, encoded with the checkpoint's tokenizer, which a trained model can predict."""
    tokenizer: Tokenizer | None = None
    no_tokenizer: str = ""
    """Why the checkpoint has no tokenizer."""


@dataclass(frozen=True)
class CheckInputs:
    """The inputs of all checks."""

    checkpoint: Checkpoint
    tokens: Tokens
    untrained: bool = False
    """Whether the weights are known to be random, so that a high loss is not a failure."""
    classifier: SequenceClassifier | None = None
    """The classifier whose GPT-2 is `checkpoint`, if it has a classification head."""

    @property
    def ids(self) -> np.ndarray:
        """[B, T] token ids."""
        return self.tokens.ids

    @cached_property
    def generation_defaults(self) -> GenerationDefaults:
        """How the checkpoint generates by default. Raises `CheckpointError` for invalid settings."""
        return bridge.generation_defaults(self.checkpoint, self.tokens.tokenizer)

    @property
    def n_layer(self) -> int:
        return self.checkpoint.config.n_layer

    @property
    def gradient_ids(self) -> np.ndarray:
        """[B, T] token ids, at most `MAX_GRADIENT_LENGTH` per row."""
        return self.ids[:, :MAX_GRADIENT_LENGTH]

    @property
    def short_length(self) -> int:
        return min(self.ids.shape[1], MAX_SHORT_LENGTH)

    def train_batches(self) -> np.ndarray:
        """Token ids for training, [steps, B, T]. Each step reads the tokens from a different offset."""
        stream = self.ids.reshape(-1)
        offsets = [step * len(stream) // TRAIN_STEPS for step in range(TRAIN_STEPS)]
        shape = (len(self.ids), self.short_length)
        return np.stack([np.resize(np.roll(stream, -offset), shape) for offset in offsets])

    def prompts(self) -> np.ndarray:
        """Token ids [B, T] of a few short prompts. At least half of the model's positions remain for new tokens."""
        stream = self.ids.reshape(-1)
        length = min(PROMPT_LENGTH, max(1, self.checkpoint.config.n_positions // 2))
        offsets = [i * len(stream) // PROMPTS for i in range(PROMPTS)]
        return np.stack([np.resize(np.roll(stream, -offset), length) for offset in offsets])

    def rows_of_different_lengths(self) -> list[np.ndarray]:
        """Four rows, whose lengths are 1/4, 2/4, 3/4 and all of `short_length`."""
        lengths = [max(1, self.short_length * (i + 1) // 4) for i in range(4)]
        return [self.ids[i % len(self.ids), :length] for i, length in enumerate(lengths)]


def pad(rows: list[np.ndarray], side: str, pad_token_id: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Pad rows to the same length on the "left" or "right". Returns ids and mask, both [B, T].

    With a mask, any id of padding must give the same results.
    """
    T = max(map(len, rows))
    ids, mask = np.full((len(rows), T), pad_token_id, np.int64), np.zeros((len(rows), T), np.int64)
    for i, row in enumerate(rows):
        where = slice(T - len(row), T) if side == "left" else slice(0, len(row))
        ids[i, where], mask[i, where] = row, 1
    return ids, mask


def default_length(config: GPT2Config) -> int:
    """The default number of tokens per row: enough to reach the second half of the model's positions.

    >>> default_length(GPT2Config(n_positions=1024)), default_length(GPT2Config(n_positions=256))
    (576, 256)
    """
    return min(config.n_positions, max(MIN_DEFAULT_LENGTH, config.n_positions // 2 + BEYOND_HALF))


def choose_tokens(
    checkpoint: Checkpoint, text: str | None, shape: tuple[int, int], seed: int, built_in: str = BUILT_IN_TEXT
) -> Tokens:
    """Return the tokens to run on. A text that is too short is repeated. `built_in`: the text without `text`."""
    rng = np.random.default_rng(seed)
    try:
        tokenizer = checkpoint.tokenizer()
    except NoTokenizerError as reason:
        if text is not None:
            raise
        ids = rng.integers(0, checkpoint.config.vocab_size, shape)
        return Tokens(ids, f"random ids from seed {seed}", is_text=False, no_tokenizer=str(reason))
    origin = "the built-in text" if text is None else "the given text"
    if text is None:
        text = encodable(built_in, tokenizer)
        if len(text) < MIN_TEXT_COVERAGE * len(built_in):
            ids = rng.choice(sorted(i for i in range(tokenizer.vocab_size) if tokenizer.token_of(i) is not None), shape)
            return Tokens(ids, f"random characters of the tokenizer from seed {seed}", False, tokenizer)
        if len(text) < len(built_in):
            origin += f", without {len(built_in) - len(text)} characters that the tokenizer lacks"
    if seed:
        raise BridgeError(f"seed={seed}: has no effect, because the tokens come from a text; leave it out")
    encoded = tokenizer.encode(text)
    if not encoded:
        raise TokenizerError("the text is empty; give at least one token")
    return Tokens(np.resize(np.array(encoded, np.int64), shape), origin, True, tokenizer)
