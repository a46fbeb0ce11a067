"""`gpt2 generate`: text from the reference or the port."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, UseAppendAction, arg

import bridge
from bridge import BridgeError, Checkpoint
from bridge.generation import decoder as decoding
from bridge.generation.config import GREEDY_BELOW, GenerationConfig
from bridge.generation.text import TextOutput, complete, end_of_text_ids, printable, stream_text
from gpt2_jax.cli.arguments import BUNDLED, JsonFile, SourceActivation, SourceOrBundled
from gpt2_jax.cli.effect import OVERWRITE, Rule, defaults_of, require_effect
from gpt2_jax.cli.models import jax_model
from gpt2_jax.console.output import json_writer, require_torch
from gpt2_jax.console.terminal import print_error

MOST_BY_DEFAULT = 50

RULES = (
    Rule(("seed",), lambda v: v["beams"] == 1 and v["temperature"] < GREEDY_BELOW, "without a --temperature above 0"),
    Rule(("seed",), lambda v: v["beams"] > 1, "with --beams"),
    Rule(("length_penalty",), lambda v: v["beams"] == 1, "without --beams above 1"),
    OVERWRITE,
)

Backend = Literal["jax", "torch"]
Float32OrBfloat16 = Literal["float32", "bfloat16"]


def generate(
    source: SourceOrBundled = BUNDLED,
    prompt: Annotated[Positional[str | None], arg(metavar="PROMPT")] = None,
    /,
    *,
    source_activation: SourceActivation = None,
    lines: Annotated[Path | None, arg(metavar="FILE")] = None,
    interactive: bool = False,
    backend: Backend = "jax",
    max_new_tokens: Annotated[int | None, arg(metavar="INT")] = None,
    temperature: float = 0.0,
    top_k: Annotated[int | None, arg(metavar="INT")] = None,
    top_p: Annotated[float | None, arg(metavar="FLOAT")] = None,
    min_p: Annotated[float | None, arg(metavar="FLOAT")] = None,
    repetition_penalty: Annotated[float | None, arg(metavar="FLOAT")] = None,
    samples: int = 1,
    stop: Annotated[tuple[str, ...], UseAppendAction, arg(metavar="TEXT")] = (),
    stop_at_end: bool = True,
    beams: int = 1,
    length_penalty: float = 1.0,
    slide: bool = False,
    seed: int = 0,
    dtype: Annotated[Float32OrBfloat16 | None, arg(metavar="float32|bfloat16")] = None,
    json: JsonFile = None,
    overwrite: bool = False,
) -> None:
    """Continue one or more prompts.

    Example: gpt2 generate ./my-gpt2 "Once upon a time" --temperature 0.8 --top-p 0.95

    Args:
        source: a checkpoint in any format, a run, a Hugging Face id, or `bundled`.
        prompt: the text to continue; default: a line break; - reads it from standard input.
        lines: continue each non-empty line of this file instead; - is standard input.
        interactive: ask for one prompt after another; an empty line exits.
        backend: the implementation to run.
        max_new_tokens: maximum number of new tokens; default: 50, or fewer if the model has fewer positions left.
        temperature: 0 always takes the likeliest token; 1 samples from the model's distribution.
        top_k: with a temperature: sample from this many likeliest tokens.
        top_p: with a temperature: sample from the smallest set of likeliest tokens whose probabilities sum to this.
        min_p: with a temperature: sample from tokens with at least this fraction of the likeliest one's probability.
        repetition_penalty: above 1, makes tokens that already occurred less likely.
        samples: continuations of each prompt.
        stop: end the text before this string; may be given several times.
        stop_at_end: end the text at the tokenizer's <|endoftext|>.
        beams: above 1: beam search with this many beams.
        length_penalty: with beams: above 0 favours longer texts.
        slide: when all positions are used, continue from the last half of the text.
        seed: the same seed gives the same text, in both backends except for rounding errors.
        dtype: the dtype of the weights and the computation; bfloat16 halves the memory traffic and is faster on GPU and
            TPU.
        json: also write prompts, texts, ids and log-probabilities to this file.
        overwrite: replace the report of an earlier command.
    """
    require_effect(locals(), defaults_of(generate), RULES)
    write_json = json_writer(json, overwrite, (source, lines))
    checkpoint = bridge.load(source, activation=source_activation)
    tokenizer = checkpoint.tokenizer()
    prompts = _prompts(prompt, lines, interactive)
    request = GenerationConfig(
        max_new_tokens=max_new_tokens if max_new_tokens is not None else MOST_BY_DEFAULT,
        repetition_penalty=repetition_penalty,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=seed,
        samples=samples,
        stop_ids=end_of_text_ids(tokenizer) if stop_at_end else (),
        log_probs=json is not None,
        slide=slide,
        beams=beams,
        length_penalty=length_penalty,
    )
    if interactive and (samples > 1 or beams > 1 or json is not None):
        raise BridgeError("--interactive generates one text at a time; remove --samples, --beams and --json")
    with open_decoder(backend, checkpoint, dtype) as decoder:

        def fitting(texts: list[str]) -> GenerationConfig:
            """Where no number of tokens was asked for, no more than there is room for."""
            room = checkpoint.config.n_positions - max(len(tokenizer.encode_ordinary(text)) for text in texts)
            if max_new_tokens is None and not slide and 0 < room < MOST_BY_DEFAULT:
                return dataclasses.replace(request, max_new_tokens=room)
            return request

        def continued(text: str) -> Iterator[str]:
            return stream_text(decoder, tokenizer, text, fitting([text]), stop)

        if interactive:
            _converse(continued)
        elif json is None and len(prompts) == samples == beams == 1:
            _print_pieces(prompts[0], continued(prompts[0]))
        else:
            found = complete(decoder, tokenizer, prompts, fitting(prompts), stop)
            write_json({"source": source, "backend": backend, "completions": _as_json(prompts, found)})
            _print_all(prompts, found)


@contextmanager
def open_decoder(
    backend: Backend, checkpoint: Checkpoint, dtype: Float32OrBfloat16 | None = None
) -> Iterator[decoding.Decoder[Any, Any]]:
    """Return the checkpoint's decoder, in the given dtype; by default float32, or float64 if that is stored."""
    if backend == "torch":
        require_torch("--backend torch")
        import torch

        import gpt2_torch

        model = gpt2_torch.model_from_checkpoint(checkpoint)
        wide = torch.promote_types(model.wte.weight.dtype, torch.float32)
        yield gpt2_torch.Decoder(model.to(wide if dtype is None else getattr(torch, dtype)))
    else:
        import gpt2_jax
        from gpt2_jax.ops.functions import BLOCKS

        with jax_model(checkpoint, vocab_multiple=BLOCKS) as (model_, params):
            yield gpt2_jax.Decoder(model_, params, dtype=dtype)


def continued_text(backend: Backend, checkpoint: Checkpoint, prompt: str, request: GenerationConfig) -> str:
    """Print the prompt and its continuation."""
    with open_decoder(backend, checkpoint) as decoder:
        [[found]] = complete(decoder, checkpoint.tokenizer(), [prompt], request)
    return printable(prompt + found.text)


def _prompts(prompt: str | None, lines: Path | None, interactive: bool) -> list[str]:
    if [prompt is not None, lines is not None, interactive].count(True) > 1:
        raise BridgeError("PROMPT, --lines and --interactive exclude each other; give one of them")
    if interactive:
        return []
    if lines is not None:
        if found := [line for line in _read(str(lines)).split("\n") if line]:
            return found
        raise BridgeError(f"{lines} has no line with a prompt; give one prompt per line")
    if prompt == "-":
        return [_read("-").removesuffix("\n")]  # `echo` adds it
    return ["\n" if prompt is None else prompt]


def _read(file: str) -> str:
    data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise BridgeError(f"{'standard input' if file == '-' else file} is not UTF-8 text: {error}") from error


def _print_pieces(prompt: str, pieces: Iterator[str]) -> None:
    first = next(pieces, "")  # before the prompt is printed, so that an invalid request prints nothing
    print(printable(prompt + first), end="", flush=True)
    for piece in pieces:
        print(printable(piece), end="", flush=True)
    print()


def _converse(continued: Callable[[str], Iterator[str]]) -> None:
    while prompt := _asked():
        try:
            _print_pieces(prompt, continued(prompt))
        except BridgeError as error:
            print_error(str(error))


def _asked() -> str:
    try:
        return input("> ").removeprefix("\ufeff")  # removes a byte-order mark, which a redirected file may have
    except EOFError:
        return ""
    except UnicodeDecodeError as error:
        raise BridgeError(f"the prompt is not UTF-8 text: {error}") from error


def _print_all(prompts: list[str], found: list[list[TextOutput]]) -> None:
    texts = [prompt + completion.text for prompt, each in zip(prompts, found, strict=True) for completion in each]
    for i, text in enumerate(texts):
        if len(texts) > 1:
            print(f"{'' if i == 0 else chr(10)}--- {i + 1} of {len(texts)}")
        print(printable(text))


def _as_json(prompts: list[str], found: list[list[TextOutput]]) -> list[dict[str, Any]]:
    return [
        {"prompt": prompt, **dataclasses.asdict(completion)}
        for prompt, each in zip(prompts, found, strict=True)
        for completion in each
    ]
