"""`gpt2 eval`: how well a model predicts a text."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table
from tyro.conf import arg

import bridge
from bridge.errors import quoted
from bridge.evaluation import Evaluation, Progress, exp
from bridge.tokenizers.tokenizer import Tokenizer
from gpt2_jax.cli.arguments import BUNDLED, READING, JsonFile, Reading, SourceOrBundled
from gpt2_jax.cli.effect import OVERWRITE, defaults_of, require_effect
from gpt2_jax.cli.models import jax_model
from gpt2_jax.console.output import json_writer, progress, require_torch
from gpt2_jax.console.terminal import console
from gpt2_jax.data import open_data
from gpt2_jax.data.documents import STDLIB, Documents, find_documents
from gpt2_jax.data.special_tokens import SpecialTokensFlag, around_documents, blocks_to_encode, policy_of
from gpt2_jax.data.token_cache import SIDECAR
from gpt2_jax.data.token_stream import TokenStream, is_token_source

UNSEEN_SHAKESPEARE = "(default: the part of Shakespeare that the bundled model has not seen)"


@dataclass(frozen=True)
class Text:
    """The evaluated text. Words are separated by white space, bytes are UTF-8; both are None if only ids are known."""

    ids: np.ndarray
    words: int | None = None
    bytes: int | None = None


def evaluate(
    source: SourceOrBundled = BUNDLED,
    /,
    *,
    reading: Reading = READING,
    data: Annotated[str | None, arg(help_behavior_hint=UNSEEN_SHAKESPEARE)] = None,
    backend: Literal["jax", "torch"] = "jax",
    context: Annotated[int | None, arg(help_behavior_hint="(default: all positions of the model)")] = None,
    stride: Annotated[int | None, arg(help_behavior_hint="(default: half the context)")] = None,
    batch_size: Annotated[int | None, arg(help_behavior_hint="(default: about 4096 tokens)")] = None,
    max_tokens: int | None = None,
    special_tokens: SpecialTokensFlag = "match",
    json: JsonFile = None,
    overwrite: bool = False,
) -> None:
    """Measure how well a model predicts a text: loss, perplexity per token and per word, bits per byte.

    The text is evaluated in sliding windows. Each window starts one stride after the previous one and scores only the
    tokens that no earlier window scored, so every token except the first counts once.

    Example: gpt2 eval ./my-gpt2 --data book.txt --stride 256

    Args:
        source: a checkpoint in any format, a run, a Hugging Face id, or `bundled`.
        reading: how SRC is read.
        data: a UTF-8 text file, a directory or glob of them, stdlib, or token files. If some token files are named val
            and others are not, those named val are used.
        backend: the implementation to run.
        context: tokens per window.
        stride: tokens from one window to the next. A shorter stride is slower and gives each
            token more context. If the stride equals the context, the first token of each window is not scored.
        batch_size: windows per batch.
        max_tokens: stop after this many tokens of the text.
        special_tokens: an added token, such as <|endoftext|>, in the text is one token (match), text like any other
            (as-text), or an error.
        json: also write the results to this file.
        overwrite: replace the report of an earlier command.
    """
    require_effect(locals(), defaults_of(evaluate), (OVERWRITE,))
    write_json = json_writer(json, overwrite, (source, reading.base, data))
    data = str(bridge.BUNDLED / "validation.txt") if data is None else data
    if max_tokens is not None and max_tokens < 2:
        raise bridge.BridgeError(
            f"--max-tokens {max_tokens}: must be at least 2, because the first token is not predicted"
        )
    if backend == "torch":
        require_torch("--backend torch")
    checkpoint = reading.load_with_warnings(source)
    run = _with_torch if backend == "torch" else _with_jax
    columns = (TextColumn("{task.description:<10}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with progress(*columns) as bar:
        text = _read(data, checkpoint, special_tokens, max_tokens or sys.maxsize, _task(bar, "reading"))
        windows = {"context": context, "stride": stride, "batch_size": batch_size}
        found = run(checkpoint, text.ids, **windows, progress=_task(bar, "predicting"))
    if not math.isfinite(found.nats):
        raise bridge.BridgeError(
            f"the loss is {found.nats}: the weights in {quoted(source)} are not all finite numbers"
        )
    report = {"source": source, "data": data, "backend": backend, **_figures(found, text)}
    write_json(report)
    _show(report)


def _task(bar: Bar, name: str) -> Progress:
    task = bar.add_task(name, total=None)
    return lambda done, total: bar.update(task, completed=done, total=total)


def _read(
    data: str, checkpoint: bridge.Checkpoint, special_tokens: SpecialTokensFlag, max_tokens: int, advance: Progress
) -> Text:
    """Return the first `max_tokens` tokens of a source."""
    if data == STDLIB or not (is_token_source(data) or (Path(data) / SIDECAR).is_file()):
        return _encode(find_documents(data), checkpoint.tokenizer(), special_tokens, max_tokens, advance)
    opened = open_data(data, vocab_size=checkpoint.config.vocab_size, validation_fraction=0)
    stream = opened.train if opened.validation is None else opened.validation
    assert isinstance(stream, TokenStream)  # token files are no mixture
    return Text(stream.read(0, min(max_tokens, len(stream))))


def _encode(
    documents: Documents, tokenizer: Tokenizer, special_tokens: SpecialTokensFlag, max_tokens: int, advance: Progress
) -> Text:
    pieces, words, size, room = [np.empty(0, np.int32)], 0, 0, max_tokens
    for ids, text in _pieces(documents, tokenizer, special_tokens):
        if len(ids) <= room:
            raw = text.encode()
        else:
            ids = ids[:room]
            raw = b"".join(map(tokenizer.token_bytes, ids)) if text else b""
        pieces.append(np.array(ids, np.int32))
        words += len(raw.decode(errors="ignore").split())  # pieces start at white space, so no word is split
        size += len(raw)
        room -= len(ids)
        advance(size, documents.size)
        if not room:
            break
    return Text(np.concatenate(pieces), words, size)


def _pieces(
    documents: Documents, tokenizer: Tokenizer, special_tokens: SpecialTokensFlag
) -> Iterator[tuple[list[int], str]]:
    """Yield ids and their text. The tokens between documents have no text."""
    before, after = around_documents(tokenizer)
    for k, document in enumerate(documents.readable()):
        yield [*(after if k else ()), *before], ""
        for text in blocks_to_encode(document, tokenizer):
            policy = policy_of(special_tokens)
            yield tokenizer.encode(text, special_tokens=policy, add_special_tokens=False), text


def _with_torch(checkpoint: bridge.Checkpoint, ids: np.ndarray, **windows: Any) -> Evaluation:
    import gpt2_torch

    return gpt2_torch.evaluate(gpt2_torch.model_from_checkpoint(checkpoint), ids, **windows)


def _with_jax(checkpoint: bridge.Checkpoint, ids: np.ndarray, **windows: Any) -> Evaluation:
    import gpt2_jax

    with jax_model(checkpoint) as (model, params):
        return gpt2_jax.evaluate(model, params, ids, **windows)


def _figures(found: Evaluation, text: Text) -> dict[str, Any]:
    """Return the report as JSON values. None: the value overflows, or the text is unknown or has no words."""
    figures = {
        "loss": found.loss,
        "perplexity": found.perplexity,
        "perplexity_per_word": found.word_perplexity(text.words) if text.words else None,
        "bits_per_byte": found.bits_per_byte(text.bytes) if text.bytes else None,
        "transformers_loss": found.transformers_loss,
        "transformers_perplexity": None if found.transformers_loss is None else exp(found.transformers_loss),
    }
    finite = {name: x if x is not None and math.isfinite(x) else None for name, x in figures.items()}
    counts = {"nats": found.nats, "predicted_tokens": found.predicted_tokens, "tokens": found.tokens}
    windows = {"windows": found.windows, "context": found.context, "stride": found.stride}
    return {**finite, **counts, "words": text.words, "bytes": text.bytes, **windows}


def _show(report: dict[str, Any]) -> None:
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column()

    def row(name: str, key: str, unit: str) -> None:
        value = report[key]
        shown = "not available" if value is None else f"{value:,.4f}" if value < 1e7 else f"{value:.4g}"
        table.add_row(name, shown, unit)

    row("loss", "loss", "nats per token")
    row("perplexity", "perplexity", "per token")
    row("", "perplexity_per_word", "per word")
    row("", "transformers_perplexity", "per token, with the window weights of transformers' recipe")
    row("bits", "bits_per_byte", "per byte of UTF-8")
    for key in ("predicted_tokens", "tokens", "words", "bytes", "windows", "context", "stride"):
        table.add_row(key.replace("_", " "), "not available" if report[key] is None else f"{report[key]:,}")
    console().print(f"{report['source']} on {report['data']}, with {report['backend']}", soft_wrap=True)
    console().print(table)
