"""`gpt2 inspect`: what a checkpoint is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

import bridge
from bridge import BridgeError, Checkpoint, GPT2Config, NoTokenizerError, TokenizerError
from bridge.errors import quoted
from bridge.formats.targets import Target, targets
from bridge.tokenizers.chat.templates import read_chat_templates
from bridge.tokenizers.tokenizer import Tokenizer
from gpt2_jax.cli.arguments import BUNDLED, READING, JsonFile, Reading, SourceOrBundled
from gpt2_jax.cli.effect import OVERWRITE, defaults_of, require_effect
from gpt2_jax.console.output import json_writer, reading_bar
from gpt2_jax.console.terminal import console

MOST_SHOWN = 1000
"""Maximum number of characters of the generation settings to show. A list of forbidden words may be long."""


def inspect(
    source: SourceOrBundled = BUNDLED,
    /,
    *,
    tensors: bool = False,
    reading: Reading = READING,
    json: JsonFile = None,
    overwrite: bool = False,
) -> None:
    """Show what a checkpoint is, from its format to its chat templates, and what a conversion would leave out.

    Example: gpt2 inspect ./my-gpt2 --tensors

    Args:
        source: a checkpoint in any format, a run, a Hugging Face id, or `bundled`.
        reading: how SRC is read.
        tensors: list every tensor too.
        json: also write the result to this file.
        overwrite: replace the report of an earlier command.
    """
    require_effect(locals(), defaults_of(inspect), (OVERWRITE,))
    write_json = json_writer(json, overwrite, (source, reading.base))
    checkpoint = reading.load(source)
    with reading_bar(checkpoint, "reading", times=2) as watched:
        facts = _facts(watched)
    left_out = targets(checkpoint)
    write_json({**facts, "targets": {name: asdict(target) for name, target in left_out.items()}})
    _show(console(), checkpoint, facts, left_out, tensors)


def _facts(checkpoint: Checkpoint) -> dict[str, Any]:
    entries = checkpoint.tensors.entries
    dtypes = Counter(str(entry.dtype) for entry in entries.values())
    tokenizer = _tokenizer(checkpoint)
    return {
        "path": str(checkpoint.path),
        "format": checkpoint.format,
        "parameters": bridge.num_parameters(checkpoint.config),
        "bytes": sum(entry.nbytes for entry in entries.values()),
        "config": asdict(checkpoint.config),
        "extra": dict(checkpoint.extra),
        "dtypes": dict(dtypes),
        "diagnostics": bridge.find_diagnostics(checkpoint),
        "fingerprint": bridge.fingerprint(checkpoint.tensors),
        "tokenizer": _tokenizer_facts(tokenizer),
        "chat_templates": _chat_templates(checkpoint),
        "optimizer_step": checkpoint.optimizer.step if checkpoint.optimizer else None,
        "progress": dict(checkpoint.progress),
        "generation": _generation(checkpoint, tokenizer if isinstance(tokenizer, Tokenizer) else None),
        "tensors": {name: {"dtype": str(e.dtype), "shape": list(e.shape)} for name, e in entries.items()},
    }


def _generation(checkpoint: Checkpoint, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Return the generation settings, where they are from, and what is wrong with them."""
    try:
        defaults = bridge.generation_defaults(checkpoint, tokenizer)
    except BridgeError as error:
        return {"error": str(error)}
    settings = {"source": defaults.source, "settings": dict(defaults.settings), "notes": list(defaults.notes)}
    return {**settings, "eos_token_ids": list(defaults.eos_token_ids), "eos_source": defaults.eos_source}


def _generation_rows(generation: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the labels and texts that show `_generation`."""
    if "error" in generation:
        yield "generation", generation["error"]
        return
    settings = ", ".join(f"{name}={value}" for name, value in generation["settings"].items())
    yield "generation", f"{settings or 'greedy'} ({generation['source'] or 'no settings'})"
    ends = ", ".join(map(str, generation["eos_token_ids"])) or "never"
    yield "ends at", f"{ends} ({generation['eos_source'] or 'nothing names a token'})"
    for note in generation["notes"]:
        yield "", note


def _tokenizer(checkpoint: Checkpoint) -> Tokenizer | TokenizerError | None:
    """Return the tokenizer, or why it cannot be read. None if the checkpoint has no tokenizer."""
    try:
        return checkpoint.tokenizer()
    except NoTokenizerError:
        return None
    except TokenizerError as error:
        return error


def _tokenizer_facts(tokenizer: Tokenizer | TokenizerError | None) -> dict[str, Any] | None:
    if not isinstance(tokenizer, Tokenizer):
        return None if tokenizer is None else {"error": str(tokenizer)}
    return {
        "kind": tokenizer.kind,
        "vocab_size": tokenizer.vocab_size,
        "special_tokens": {
            role: {"token": token, "id": tokenizer.id_of(token)} for role, token in tokenizer.special.by_role().items()
        },
        "added_tokens": len(tokenizer.added),
        "fingerprint": tokenizer.fingerprint,
    }


def _chat_templates(checkpoint: Checkpoint) -> list[str] | dict[str, str]:
    """Return the names of the chat templates, or why they cannot be read."""
    try:
        return [] if checkpoint.path is None else sorted(read_chat_templates(checkpoint.path))
    except TokenizerError as error:
        return {"error": str(error)}


def _show_tokenizer(summary: Table, facts: dict[str, Any] | None) -> None:
    if facts is None or "error" in facts:
        summary.add_row("tokenizer", "none" if facts is None else facts["error"])
        return
    kind, size, added = facts["kind"], facts["vocab_size"], facts["added_tokens"]
    summary.add_row("tokenizer", f"{kind}, ids below {size:,}, {added} added tokens")
    for role, found in facts["special_tokens"].items():
        summary.add_row(f"  {role}", f"{quoted(found['token'])[1:-1]} ({found['id']})")


def _chat_text(templates: list[str] | dict[str, str]) -> str:
    if isinstance(templates, dict):
        return templates["error"]
    return ", ".join(quoted(name)[1:-1] for name in templates) or "none"


def _target_rows(left_out: Mapping[str, Target]) -> Iterator[tuple[str, str]]:
    """Yield the labels and texts that show what a conversion leaves out. Formats with the same text share a row."""
    formats: dict[tuple[str, str], list[str]] = {}
    for name, target in left_out.items():
        if target.error is not None:
            formats.setdefault(("", f"not possible: {target.error}"), []).append(name)
            continue
        for kind, sentences in ((" as a directory", target.directory), (" as a file", target.file)):
            if sentences is not None:
                formats.setdefault((kind, "\n".join(sentences) or "nothing"), []).append(name)
    for k, ((kind, text), names) in enumerate(formats.items()):
        yield "left out by" if k == 0 else "", f"{', '.join(names)}{kind}: {text}"


def _show(
    out: Console, checkpoint: Checkpoint, facts: dict[str, Any], left_out: Mapping[str, Target], tensors: bool
) -> None:
    summary = Table(show_header=False, box=None, pad_edge=False)
    summary.add_column(style="bold")
    summary.add_column()
    summary.add_row("path", facts["path"])
    summary.add_row("format", facts["format"])
    summary.add_row("parameters", f"{facts['parameters']:,}{_known_size(checkpoint.config)}")
    summary.add_row("tensors", f"{len(facts['tensors'])}, {facts['bytes']:,} bytes")
    summary.add_row("dtypes", ", ".join(f"{dtype} x {count}" for dtype, count in facts["dtypes"].items()))
    if checkpoint.optimizer is not None:
        summary.add_row("AdamW", f"its state after {checkpoint.optimizer.step} steps")
    _show_tokenizer(summary, facts["tokenizer"])
    summary.add_row("chat templates", _chat_text(facts["chat_templates"]))
    summary.add_row("configuration")
    for name, value in facts["config"].items():
        summary.add_row(f"  {name}", str(value), style="" if value != getattr(GPT2Config, name) else "dim")
    for label, text in _generation_rows(facts["generation"]):
        summary.add_row(label, text if len(text) < MOST_SHOWN else f"{text[:MOST_SHOWN]} ...")
    for k, diagnostic in enumerate(facts["diagnostics"] or ["none"]):
        summary.add_row("warnings" if k == 0 else "", diagnostic, style="yellow" if facts["diagnostics"] else "")
    for label, text in _target_rows(left_out):
        summary.add_row(label, text)
    summary.add_row("fingerprint", facts["fingerprint"])
    out.print(summary)
    if tensors:
        listing = Table("tensor", "dtype", "shape", box=None, pad_edge=False)
        for name, entry in checkpoint.tensors.entries.items():
            listing.add_row(name, str(entry.dtype), str(list(entry.shape)))
        out.print(listing)


def _known_size(config: GPT2Config) -> str:
    return next((f" ({name})" for name, size in bridge.GPT2_SIZES.items() if _same_sizes(size, config)), "")


def _same_sizes(a: GPT2Config, b: GPT2Config) -> bool:
    return bridge.parameters(a) == bridge.parameters(b)
