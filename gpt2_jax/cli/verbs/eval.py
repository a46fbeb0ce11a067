"""`gpt2 eval`: how well a model predicts a text."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table
from tyro.conf import arg

import bridge
from bridge.errors import quoted
from bridge.evaluation import Evaluation, Progress, TokenizedText, exp
from bridge.tokenizers.tokenizer import Tokenizer
from gpt2_jax.cli.arguments import BUNDLED, READING, JsonFile, Reading, SourceOrBundled
from gpt2_jax.cli.effect import Rule, defaults_of, require_effect
from gpt2_jax.cli.evaluated_text import Text, read_text
from gpt2_jax.cli.evaluation_records import document_records, token_records
from gpt2_jax.cli.models import jax_model
from gpt2_jax.console.output import json_lines_writer, json_writer, progress, require_torch
from gpt2_jax.console.report_files import require_different_files
from gpt2_jax.console.terminal import console
from gpt2_jax.data.text.special_tokens import SpecialTokensFlag

UNSEEN_SHAKESPEARE = "(default: the part of Shakespeare that the bundled model has not seen)"


RULES = (
    Rule(
        ("overwrite",),
        lambda values: all(values[name] is None for name in ("json", "per_document", "per_token")),
        "without --json, --per-document or --per-token",
    ),
)


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
    separate_documents: bool = False,
    json: JsonFile = None,
    per_document: JsonFile = None,
    per_token: JsonFile = None,
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
            and others are not, those named val are used. If gpt2 train encoded records with completions,
            only the completions are scored, and each record is evaluated by itself.
        backend: the implementation to run.
        context: tokens per window.
        stride: tokens from one window to the next. A shorter stride is slower and gives each
            token more context. If the stride equals the context, the first token of each window is not scored.
        batch_size: windows per batch.
        max_tokens: stop after this many tokens of the text.
        special_tokens: an added token, such as <|endoftext|>, in the text is one token (match), text like any other
            (as-text), or an error.
        separate_documents: evaluate each document by itself. By default, windows continue across documents.
        json: also write the results to this file.
        per_document: also write the loss of each document to this file, as JSON lines.
        per_token: also write the log-probability and rank of each token to this file, as JSON lines.
        overwrite: replace the reports of an earlier command.
    """
    require_effect(locals(), defaults_of(evaluate), RULES)
    write = _writers(json, per_document, per_token, overwrite, (source, reading.base, data))
    data = str(bridge.BUNDLED / "validation.txt") if data is None else data
    if max_tokens is not None and max_tokens < 2:
        raise bridge.BridgeError(
            f"--max-tokens {max_tokens}: must be at least 2, because the first token is not predicted"
        )
    if backend == "torch":
        require_torch("--backend torch")
    checkpoint = reading.load_with_warnings(source)
    tokenizer = _tokenizer(checkpoint) if per_token is not None else None
    run = _with_torch if backend == "torch" else _with_jax
    columns = (TextColumn("{task.description:<10}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with progress(*columns) as bar:
        text = read_text(data, checkpoint, special_tokens, max_tokens or sys.maxsize, _task(bar, "reading"))
        if per_document is not None:
            text.require_documents("--per-document", data)
        found = run(
            checkpoint,
            text.tokenized(data, separate_documents),
            context=context,
            stride=stride,
            batch_size=batch_size,
            token_scores=per_document is not None or per_token is not None,
            progress=_task(bar, "predicting"),
        )
    if not math.isfinite(found.nats):
        raise bridge.BridgeError(
            f"the loss is {found.nats}: the weights in {quoted(source)} are not all finite numbers"
        )
    report = {"source": source, "data": data, "backend": backend, **_figures(found, text)}
    report["separate_documents"] = separate_documents or text.counts is not None
    if json is not None:
        report["fingerprint"] = bridge.fingerprint(checkpoint.tensors)
    write(report, text, found, tokenizer)
    _show(report)


Write = Callable[[dict[str, Any], Text, Evaluation, Tokenizer | None], None]


def _writers(
    json: Path | None, per_document: Path | None, per_token: Path | None, overwrite: bool, inputs: Sequence[str | None]
) -> Write:
    """Return a function that writes the files that are given. Raises `BridgeError` if one cannot be written."""
    files = {"--json": json, "--per-document": per_document, "--per-token": per_token}
    require_different_files(files)
    write_json, write_documents, write_tokens = (
        json_writer(json, overwrite, inputs),
        json_lines_writer(per_document, overwrite, inputs),
        json_lines_writer(per_token, overwrite, inputs),
    )

    def write(report: dict[str, Any], text: Text, found: Evaluation, tokenizer: Tokenizer | None) -> None:
        write_json(report)
        if found.token_scores is not None:
            if text.document_ends is not None:
                write_documents(document_records(text, found.token_scores, text.document_ends))
            write_tokens(token_records(text, found.token_scores, tokenizer))

    return write


def _tokenizer(checkpoint: bridge.Checkpoint) -> Tokenizer | None:
    """Return the tokenizer, or None if there is none and ids are shown without text."""
    try:
        return checkpoint.tokenizer()
    except bridge.NoTokenizerError:
        return None


def _task(bar: Bar, name: str) -> Progress:
    task = bar.add_task(name, total=None)
    return lambda done, total: bar.update(task, completed=done, total=total)


def _with_torch(checkpoint: bridge.Checkpoint, text: TokenizedText, **settings: Any) -> Evaluation:
    import gpt2_torch

    return gpt2_torch.evaluate(gpt2_torch.model_from_checkpoint(checkpoint), text, **settings)


def _with_jax(checkpoint: bridge.Checkpoint, text: TokenizedText, **settings: Any) -> Evaluation:
    import gpt2_jax

    with jax_model(checkpoint) as (model, params):
        return gpt2_jax.evaluate(model, params, text, **settings)


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
    documents = None if text.document_ends is None else len(text.document_ends)
    return {**finite, **counts, "words": text.words, "bytes": text.bytes, "documents": documents, **windows}


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
    for key in ("predicted_tokens", "tokens", "words", "bytes", "documents", "windows", "context", "stride"):
        table.add_row(key.replace("_", " "), "not available" if report[key] is None else f"{report[key]:,}")
    console().print(f"{report['source']} on {report['data']}, with {report['backend']}", soft_wrap=True)
    console().print(table)
