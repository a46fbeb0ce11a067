"""`gpt2 demo`: convert, verify, fine-tune and export the bundled model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from rich.table import Table
from tyro.conf import arg

import bridge
from bridge import BridgeError, GenerationConfig
from bridge.errors import quoted
from gpt2_jax.cli.arguments import BUNDLED
from gpt2_jax.cli.verbs.generate import Backend, continued_text
from gpt2_jax.cli.verbs.verify import finish, progress_bar
from gpt2_jax.console.output import report_writer, require_torch
from gpt2_jax.console.terminal import console
from gpt2_jax.training.config import TOKENIZER_OF_INIT_FROM, OptimizerConfig, TrainConfig
from gpt2_jax.training.presets import PRESETS
from gpt2_jax.training.run.directory import remove as remove_run
from gpt2_jax.training.run.metrics import read_metrics

if TYPE_CHECKING:
    from gpt2_jax.training import Outcome

PLAY = str(bridge.BUNDLED / "validation.txt")
"""The Taming of the Shrew, which the bundled model has not seen."""
PROMPT = "PETRUCHIO:\n"
SAMPLING = GenerationConfig(max_new_tokens=80, temperature=0.8, top_p=0.9, seed=1)
"""The same seed produces the same text in both backends."""
BACKENDS: Mapping[Backend, str] = {"torch": "PyTorch", "jax": "JAX"}

Play = Annotated[str, arg(help_behavior_hint="(default: The Taming of the Shrew)")]


def demo(*, out: Path = Path("demo-output"), data: Play = PLAY, max_steps: int = 150, overwrite: bool = False) -> int:
    """Load a PyTorch GPT-2 in JAX, verify that both compute the same, fine-tune it, and export it for PyTorch.

    The model is the bundled one, trained on Shakespeare without The Taming of the Shrew. It is fine-tuned on that play.

    Example: gpt2 demo --out demo-output

    Args:
        out: the directory for the report and the run; they take 50 MB.
        data: the text to fine-tune on, as for `gpt2 train --data`.
        max_steps: number of fine-tuning steps.
        overwrite: replace the report and the run of an earlier demo. Other files in the directory stay.
    """
    require_torch("gpt2 demo")
    say = console().print
    run, report_file = out / "run", out / "report.json"
    if run.exists() and not overwrite:
        raise BridgeError(f"{quoted(run)} exists; choose another --out, or replace an earlier demo with --overwrite")
    out.mkdir(parents=True, exist_ok=True)
    write_report = report_writer(report_file, None, overwrite)
    if run.exists():
        remove_run(run)
    from gpt2_jax.cli.run_training import run_training
    from gpt2_jax.parity import checks_for, verify

    bundled = bridge.load(BUNDLED)
    say(f"1. Load the bundled GPT-2 in PyTorch: {bridge.BUNDLED}", soft_wrap=True)
    before = continued_text("torch", bundled, PROMPT, SAMPLING)
    say(_whole_sentences(before), soft_wrap=True)
    say("\n2. Check that JAX computes the same function")
    with progress_bar(checks_for(bundled)) as begin:
        report = verify(bundled, source=BUNDLED, seq_len=128, progress=begin)
    code = finish(report, write_report)
    say(f"\n3. Fine-tune in JAX on {'The Taming of the Shrew' if data == PLAY else data}", soft_wrap=True)
    outcome = run_training(_recipe(data, max_steps), run, cache=out / "tokens")
    say("\n4. Load the export in PyTorch and in JAX")
    exported = bridge.load(outcome.export)
    after = {backend: continued_text(backend, exported, PROMPT, SAMPLING) for backend in BACKENDS}
    if after["torch"] != after["jax"]:
        raise BridgeError(f"the export {quoted(outcome.export)} generates different text in PyTorch and JAX")
    say(_continuations(before, after))
    passed = sum(check.passed and not check.skipped for check in report.checks)
    say(_summary(f"{passed} of {len(report.checks)} checks of PyTorch against JAX passed", report_file, outcome, run))
    return code


def _continuations(before: str, after: Mapping[Backend, str]) -> Table:
    """The same prompt, continued by the model before and after fine-tuning, side by side."""
    table = Table("before, PyTorch", *(f"after, {BACKENDS[backend]}" for backend in after))
    table.add_row(*map(_whole_sentences, (before, *after.values())))
    return table


def _whole_sentences(text: str) -> str:
    """Return the text up to the end of its last sentence; all of it if no sentence ends."""
    end = max(map(text.rfind, ".!?"))
    return text[: end + 1] if end >= 0 else text


def _summary(parity: str, report_file: Path, outcome: Outcome, run: Path) -> Table:
    losses = [record["val_loss"] for record in read_metrics(run) if "val_loss" in record]
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("parity", parity)
    table.add_row("loss", f"{losses[0]:.3f} -> {min(losses):.3f} nats per token, on the part that training did not see")
    table.add_row("text", "identical in PyTorch and JAX")
    for name, path in (("report", report_file), ("plot", outcome.plot), ("checkpoint", outcome.export)):
        table.add_row(name, str(path))
    return table


def _recipe(data: str, max_steps: int) -> TrainConfig:
    return replace(
        PRESETS["finetune"],
        init_from=BUNDLED,
        tokenizer=TOKENIZER_OF_INIT_FROM,
        data=data,
        mesh="data=1",  # independent of the number of devices
        optimizer=OptimizerConfig(learning_rate=3e-4, min_learning_rate=3e-5, warmup_steps=10, beta2=0.99),
        max_steps=max_steps,
        eval_every=max(1, max_steps // 3),
        eval_batches=None,
        checkpoint_every=max_steps,
        sample_tokens=0,
    )
