"""`gpt2 verify`: check that both backends compute the same function."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from tyro.conf import arg

import bridge
from gpt2_jax.cli.arguments import BUNDLED, READING, JsonFile, Reading, SourceOrBundled
from gpt2_jax.cli.effect import OVERWRITE, Rule, defaults_of, require_effect
from gpt2_jax.console.output import json_writer, progress, require_torch
from gpt2_jax.console.terminal import console

if TYPE_CHECKING:
    from gpt2_jax.parity import Report

CheckName = Literal[
    "logits",
    "hidden-states",
    "gradients",
    "training",
    "padding",
    "round-trip",
    "prediction",
    "transformers",
    "tokenizer",
    "generation",
    "classification",
]
ALL_CHECKS: tuple[CheckName, ...] = CheckName.__args__  # type: ignore[attr-defined]

RULES = (Rule(("untrained",), lambda v: "prediction" not in v["checks"], "without the check of predictions"),)


def verify(
    source: SourceOrBundled = BUNDLED,
    /,
    *,
    reading: Reading = READING,
    text: Annotated[str | None, arg(metavar="TEXT")] = None,
    text_file: Annotated[Path | None, arg(metavar="FILE")] = None,
    batch_size: int = 2,
    seq_len: int = 256,
    seed: int = 0,
    untrained: bool = False,
    checks: Annotated[tuple[CheckName, ...] | None, arg(help_behavior_hint="(default: all that apply)")] = None,
    json: JsonFile = None,
    overwrite: bool = False,
) -> int:
    """Check that PyTorch and JAX compute the same function with this checkpoint and give the same text.

    Exit code 0 if at least one check ran and every check that ran passed. A check that cannot run is skipped. A
    sequence classifier is checked with its head, unless --drop-extra-heads is given.

    Example: gpt2 verify ./my-gpt2 --json report.json

    Args:
        source: a checkpoint in any format, a run, a Hugging Face id, or `bundled`.
        reading: how SRC is read.
        text: the text to run the models on, instead of the built-in text. If the tokenizer lacks more than a tenth of
            the built-in text's characters, the default is random characters, and predictions are not checked.
        text_file: a UTF-8 file with that text.
        batch_size: sequences in the batch.
        seq_len: tokens per sequence; at most n_positions are used.
        seed: the seed of random ids, for a checkpoint without a tokenizer, or of random characters.
        untrained: the weights are random, so do not check that they predict text.
        checks: run only these.
        json: also write the report to this file.
        overwrite: replace the report of an earlier command.
    """
    require_effect(locals(), defaults_of(verify), (OVERWRITE,))
    require_torch("gpt2 verify")
    write_json = json_writer(json, overwrite, (source, reading.base, text_file))
    if checks == ():
        raise bridge.BridgeError(f"--checks needs at least one of {', '.join(ALL_CHECKS)}")
    if text is not None and text_file is not None:
        raise bridge.BridgeError("--text and --text-file are mutually exclusive; give one")
    if text_file is not None:
        text = _read_text(text_file)
    checkpoint = reading.load_with_classifier(source)
    from gpt2_jax.parity import checks_for
    from gpt2_jax.parity import verify as run

    names = checks_for(checkpoint) if checks is None else checks
    require_effect({"untrained": untrained, "checks": names}, defaults_of(verify), RULES)
    with progress_bar(names) as begin:
        report = run(
            checkpoint,
            source=source,
            text=text,
            batch_size=batch_size,
            seq_len=seq_len,
            seed=seed,
            untrained=untrained,
            checks=names,
            progress=begin,
        )
    return finish(report, write_json)


@contextmanager
def progress_bar(checks: Iterable[str]) -> Iterator[Callable[[str], None]]:
    """A progress bar over the checks. Yields a function to call with the name of each check before it starts."""
    columns = (TextColumn("{task.description:<14}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with progress(*columns) as bar:
        task = bar.add_task("", total=len(list(checks)))
        started = 0

        def begin(name: str) -> None:
            nonlocal started
            bar.update(task, description=name, completed=started)
            started += 1

        yield begin


def finish(report: Report, write_json: Callable[[dict[str, Any]], None]) -> int:
    """Print the report, write the JSON file if requested, and return the exit code."""
    report.show(console())
    write_json(report.to_json())
    return 0 if report.passed else 1


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")  # without a byte-order mark
    except (OSError, UnicodeDecodeError) as error:
        raise bridge.BridgeError(f"cannot read {file}: {error}") from error
