"""`gpt2 generate`: generate text with PyTorch or JAX."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, field, make_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import OmitArgPrefixes, Positional, UseAppendAction, arg

import bridge
from bridge import BridgeError, Checkpoint
from bridge.generation.config import GenerationConfig
from bridge.generation.decoder import Decoder
from bridge.generation.text import TextOutput, generate_text, printable, stream_text
from gpt2_jax.cli.arguments import BUNDLED, READING, JsonFile, Reading, SourceOrBundled
from gpt2_jax.cli.chat import NEEDS_CHAT, NO_CHAT, Chat
from gpt2_jax.cli.dataclass_flags import docs_of, flags_of
from gpt2_jax.cli.effect import OVERWRITE, Rule, defaults_of, require_effect
from gpt2_jax.cli.models import jax_model
from gpt2_jax.console.output import json_writer, require_torch
from gpt2_jax.console.terminal import print_error
from gpt2_jax.data.text.special_tokens import SpecialTokensFlag, policy_of

DEFAULT_NEW_TOKENS = 50

_OF_CHECKPOINT: Mapping[str, tuple[Any, str]] = {
    "repetition_penalty": (float, "else 1"),
    "no_repeat_ngram_size": (int, "else 0"),
    "min_new_tokens": (int, "else 0"),
    "temperature": (float, "else 1 if the checkpoint samples, else 0"),
    "top_k": (int, "else 50 when sampling; 0 is off"),
    "top_p": (float, "else 1 when sampling"),
    "min_p": (float, "else 0 when sampling"),
    "typical_p": (float, "else 1 when sampling"),
    "epsilon_cutoff": (float, "else 0 when sampling"),
    "eta_cutoff": (float, "else 0 when sampling"),
    "num_return_sequences": (int, "else 1"),
    "num_beams": (int, "else 1"),
    "length_penalty": (float, "else 1"),
    "early_stopping": (Literal["true", "false", "never"], "else false"),
}
"""Flags for fields of `GenerationConfig` that default to the checkpoint's value -> type, and the default without it."""

_OWN: Mapping[str, Any] = {"seed": 0, "slide": False}
"""Other fields of `GenerationConfig` that are flags -> their defaults."""

RULES = (
    Rule(("seed",), lambda v: v["config"].greedy and v["config"].num_beams == 1, "without a --temperature above 0"),
    Rule(("seed",), lambda v: v["config"].num_beams > 1, "with --num-beams"),
    Rule(("length_penalty", "early_stopping"), lambda v: v["config"].num_beams == 1, "without --num-beams above 1"),
)

OF_JAX = Rule(("batch_invariant",), lambda values: values["backend"] != "jax", "without --backend jax")

Backend = Literal["jax", "torch"]
Float32OrBfloat16 = Literal["float32", "bfloat16"]


def _decoding_flags() -> list[tuple[str, Any, Any]]:
    """Return the names, annotated types and defaults of the flags. None means the checkpoint's value."""
    docs, flags = dict(docs_of(GenerationConfig)), []
    for name, (kind, default) in _OF_CHECKPOINT.items():
        hint = arg(help=docs[name], metavar=None, help_behavior_hint=f"(default: the checkpoint's, {default})")
        flags.append((name, Annotated[kind | None, hint], field(default=None)))
    own = flags_of(GenerationConfig, [*_OWN])
    return [*flags, *((name, flag, field(default=_OWN[name])) for name, flag in own)]


if TYPE_CHECKING:
    DecodingFlags = Any
else:
    DecodingFlags = make_dataclass("DecodingFlags", _decoding_flags(), frozen=True)
    DecodingFlags.__doc__ = "How each token is selected."


def generate(
    source: SourceOrBundled = BUNDLED,
    prompt: Annotated[Positional[str | None], arg(metavar="PROMPT")] = None,
    /,
    *,
    reading: Reading = READING,
    lines: Annotated[Path | None, arg(metavar="FILE")] = None,
    interactive: bool = False,
    backend: Backend = "jax",
    max_new_tokens: Annotated[
        int | None, arg(metavar="INT", help_behavior_hint="(default: the checkpoint's, else 50; at most what fits)")
    ] = None,
    decoding: Annotated[DecodingFlags, OmitArgPrefixes] = DecodingFlags(),  # noqa: B008
    stop: Annotated[tuple[str, ...], UseAppendAction, arg(metavar="TEXT")] = (),
    stop_at_end: bool = True,
    special_tokens: SpecialTokensFlag = "match",
    chat: Chat = NO_CHAT,
    dtype: Annotated[Float32OrBfloat16 | None, arg(metavar="float32|bfloat16")] = None,
    batch_invariant: bool = False,
    json: JsonFile = None,
    overwrite: bool = False,
) -> None:
    """Continue one or more prompts.

    Example: gpt2 generate ./my-gpt2 "Once upon a time" --temperature 0.8 --top-p 0.95

    Args:
        source: a checkpoint in any format, a run, a Hugging Face id, or `bundled`.
        reading: how SRC is read.
        prompt: the text to continue; default: a line break; - reads it from standard input.
        lines: continue each non-empty line of this file instead; - is standard input.
        interactive: ask for one prompt after another; an empty line exits.
        backend: the implementation to run.
        max_new_tokens: maximum number of new tokens.
        decoding: how each token is selected.
        stop: end the text before this string; may be given several times.
        stop_at_end: end the text at the checkpoint's eos_token_id, else at the tokenizer's end-of-sequence token.
        special_tokens: how to treat an added token, such as <|endoftext|>, in a prompt: as one token (match), as
            ordinary text (as-text; for untrusted prompts), or as an error (error).
        dtype: the dtype of the weights and the computation; bfloat16 halves the memory traffic and is faster on GPU and
            TPU.
        batch_invariant: give each prompt the same tokens and log-probabilities, bit for bit, whatever other prompts
            there are. Only with JAX on CPU, on one thread, without beam search, and slower.
        json: also write prompts, texts, ids and log-probabilities to this file.
        overwrite: replace the report of an earlier command.
    """
    require_effect(locals(), defaults_of(generate), (OVERWRITE, OF_JAX))
    require_effect(vars(chat), vars(NO_CHAT), (NEEDS_CHAT,))
    write_json = json_writer(json, overwrite, (source, reading.base, lines))
    checkpoint = reading.load_with_warnings(source)
    tokenizer = checkpoint.tokenizer()
    prompts = _prompts(prompt, lines, interactive, chat)
    defaults = bridge.generation_defaults(checkpoint, tokenizer)
    fixed = _fixed_fields(decoding, max_new_tokens, stop_at_end) | {"logprobs": json is not None}
    several = _asks_for_several(defaults.config(**{**fixed, "max_new_tokens": 1}), decoding)
    if interactive and (several or json is not None):
        raise BridgeError(
            "--interactive generates one text at a time; remove --json, and set --num-return-sequences 1 and "
            "--num-beams 1"
        )
    for note in defaults.notes:
        print_error(note)

    def config_for(length: int) -> GenerationConfig:
        """Return the configuration. Without --max-new-tokens, it fits into the positions after the longest prompt."""
        config = defaults.config(length, new_tokens=DEFAULT_NEW_TOKENS, **fixed)
        room = checkpoint.config.n_positions - length
        if max_new_tokens is None and not decoding.slide and room > 0:
            config = replace(config, max_new_tokens=min(config.max_new_tokens, room))
        return config

    policy = policy_of(special_tokens)
    with open_decoder(backend, checkpoint, dtype, batch_invariant) as decoder:

        def stream(text: str, history: Sequence[tuple[str, str]] = ()) -> Iterator[str]:
            [ids] = chat.encode(tokenizer, [text], policy, history)
            return stream_text(decoder, tokenizer, ids, config_for, stop)

        if interactive:
            _interactive_loop(stream, show_prompt=not chat.chat)
        elif json is None and len(prompts) == 1 and not several:
            _print_pieces("" if chat.chat else prompts[0], stream(prompts[0]))
        else:
            ids = chat.encode(tokenizer, prompts, policy)
            outputs = generate_text(decoder, tokenizer, ids, config_for, stop)
            write_json({"source": source, "backend": backend, "completions": _as_json(prompts, outputs)})
            _print_all([""] * len(prompts) if chat.chat else prompts, outputs)


def _fixed_fields(decoding: DecodingFlags, max_new_tokens: int | None, stop_at_end: bool) -> dict[str, Any]:
    """Return the fields of `GenerationConfig` that flags set. The checkpoint decides about the others."""
    stopping = {"true": True, "false": False}.get(decoding.early_stopping, decoding.early_stopping)
    given = {**vars(decoding), "early_stopping": stopping, "max_new_tokens": max_new_tokens}
    return {name: value for name, value in given.items() if value is not None} | (
        {} if stop_at_end else {"eos_token_id": ()}
    )


def _asks_for_several(config: GenerationConfig, decoding: DecodingFlags) -> bool:
    """Whether there is more than one text, or beam search. Raises `BridgeError` for flags without an effect."""
    require_effect({**vars(decoding), "config": config}, {**dict.fromkeys(_OF_CHECKPOINT), **_OWN}, RULES)
    return config.num_return_sequences > 1 or config.num_beams > 1


@contextmanager
def open_decoder(
    backend: Backend,
    checkpoint: Checkpoint,
    dtype: Float32OrBfloat16 | None = None,
    batch_invariant: bool = False,
) -> Iterator[Decoder[Any, Any]]:
    """Yield the checkpoint's decoder, in the given dtype; by default float32, or float64 if that is stored."""
    if backend == "torch":
        require_torch("--backend torch")
        import torch

        import gpt2_torch

        model = gpt2_torch.model_from_checkpoint(checkpoint)
        wide = torch.promote_types(model.wte.weight.dtype, torch.float32)
        yield gpt2_torch.Decoder(model.to(wide if dtype is None else getattr(torch, dtype)))
    else:
        import gpt2_jax
        from gpt2_jax.ops.linear import BLOCKS

        with jax_model(checkpoint, vocab_multiple=BLOCKS) as (model_, params):
            yield gpt2_jax.Decoder(model_, params, dtype=dtype, batch_invariant=batch_invariant)


def continued_text(backend: Backend, checkpoint: Checkpoint, prompt: str, config: GenerationConfig) -> str:
    """Return the prompt and its continuation."""
    with open_decoder(backend, checkpoint) as decoder:
        [[output]] = generate_text(decoder, checkpoint.tokenizer(), [prompt], config)
    return printable(prompt + output.text)


def _prompts(prompt: str | None, lines: Path | None, interactive: bool, chat: Chat) -> list[str]:
    given = [prompt is not None, lines is not None, interactive].count(True)
    if given > 1:
        raise BridgeError("PROMPT, --lines and --interactive are mutually exclusive; give one of them")
    if chat.chat and not given:
        raise BridgeError("--chat needs a message; give PROMPT, --lines or --interactive")
    if interactive:
        return []
    if lines is not None:
        if found := [line for line in _read(str(lines)).split("\n") if line]:
            return found
        raise BridgeError(f"{lines} has no line with a prompt; give one prompt per line")
    if prompt == "-":
        return [_read("-").removesuffix("\n")]  # `echo` appends a line break
    return ["\n" if prompt is None else prompt]


def _read(file: str) -> str:
    data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise BridgeError(f"{'standard input' if file == '-' else file} is not UTF-8 text: {error}") from error


def _print_pieces(prompt: str, pieces: Iterator[str]) -> str:
    """Print a prompt and the text that continues it, and return that text."""
    first = next(pieces, "")  # before the prompt is printed, so that an invalid request prints nothing
    print(printable(prompt + first), end="", flush=True)
    printed = [first]
    for piece in pieces:
        print(printable(piece), end="", flush=True)
        printed.append(piece)
    print()
    return "".join(printed)


def _interactive_loop(stream: Callable[[str, Sequence[tuple[str, str]]], Iterator[str]], show_prompt: bool) -> None:
    history: list[tuple[str, str]] = []
    while prompt := _read_prompt():
        try:
            history.append((prompt, _print_pieces(prompt if show_prompt else "", stream(prompt, history))))
        except BridgeError as error:
            print_error(str(error))


def _read_prompt() -> str:
    try:
        return input("> ").removeprefix("\ufeff")  # removes a byte-order mark, which a redirected file may have
    except EOFError:
        return ""
    except UnicodeDecodeError as error:
        raise BridgeError(f"the prompt is not UTF-8 text: {error}") from error


def _print_all(prompts: list[str], outputs: list[list[TextOutput]]) -> None:
    texts = [prompt + output.text for prompt, each in zip(prompts, outputs, strict=True) for output in each]
    for i, text in enumerate(texts):
        if len(texts) > 1:
            print(f"{'' if i == 0 else chr(10)}--- {i + 1} of {len(texts)}")
        print(printable(text))


def _as_json(prompts: list[str], outputs: list[list[TextOutput]]) -> list[dict[str, Any]]:
    return [
        {"prompt": prompt, **asdict(output)} for prompt, each in zip(prompts, outputs, strict=True) for output in each
    ]
