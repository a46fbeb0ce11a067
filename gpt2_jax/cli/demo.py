"""`gpt2 demo`: convert, verify, fine-tune and export the bundled model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import bridge
from bridge import BridgeError, GenerationConfig
from bridge.errors import quoted
from gpt2_jax.cli.arguments import BUNDLED
from gpt2_jax.cli.generate import Backend, continued_text
from gpt2_jax.cli.train import run_training
from gpt2_jax.cli.verify import ALL_CHECKS, finish, progress_bar
from gpt2_jax.console.output import json_writer, require_torch
from gpt2_jax.console.terminal import console
from gpt2_jax.training.config import PRESETS, TOKENIZER_OF_INIT_FROM, OptimizerConfig, TrainConfig
from gpt2_jax.training.run.directory import remove as remove_run

SHAKESPEARE, PYTHON = "ROMEO:", "def "
SAMPLING = GenerationConfig(max_new_tokens=60, temperature=0.8, top_p=0.9, seed=1)
"""The same seed produces the same text in both backends."""


def demo(
    *, out: Path = Path("demo-output"), data: str = "stdlib", max_steps: int = 150, overwrite: bool = False
) -> int:
    """Load a PyTorch GPT-2 in JAX, verify that both compute the same, fine-tune it, and export it for PyTorch.

    The model is the bundled one, trained on Shakespeare. It is fine-tuned on Python's standard library.

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
    write_report = json_writer(report_file, overwrite)
    if run.exists():
        remove_run(run)
    say(f"1. the bundled GPT-2 in PyTorch: {bridge.BUNDLED}", soft_wrap=True)
    say(continued_text("torch", bridge.load(BUNDLED), SHAKESPEARE, SAMPLING), soft_wrap=True)
    say("\n2. is it the same function in JAX?")
    from gpt2_jax.parity import verify

    with progress_bar(ALL_CHECKS) as begin:
        report = verify(bridge.load(BUNDLED), source=BUNDLED, seq_len=128, progress=begin)
    code = finish(report, write_report)
    say(f"\n3. fine-tuned in JAX, on {data}")
    outcome = run_training(_recipe(data, max_steps), run, cache=out / "tokens")
    say("\n4. the export, in both")
    exported = bridge.load(outcome.export)
    backends: tuple[Backend, ...] = ("torch", "jax")
    texts = {backend: continued_text(backend, exported, PYTHON, SAMPLING) for backend in backends}
    for backend, text in texts.items():
        say(f"--- {backend}\n{text}", soft_wrap=True)
    if texts["torch"] != texts["jax"]:
        raise BridgeError(f"the export {quoted(outcome.export)} generates different text in PyTorch and JAX")
    say(f"\nreport: {report_file}\nplot: {outcome.plot}\ncheckpoint: {outcome.export}", soft_wrap=True)
    return code


def _recipe(data: str, max_steps: int) -> TrainConfig:
    return replace(
        PRESETS["finetune"],
        init_from=BUNDLED,
        tokenizer=TOKENIZER_OF_INIT_FROM,
        data=data,
        mesh="data=1",  # independent of the number of devices
        optimizer=OptimizerConfig(learning_rate=1e-3, min_learning_rate=1e-4, warmup_steps=10, beta2=0.99),
        max_steps=max_steps,
        eval_every=max(1, max_steps // 3),
        eval_batches=20,
        checkpoint_every=max_steps,
        sample_tokens=0,
    )
