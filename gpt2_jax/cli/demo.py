"""`gpt2 demo`: the whole journey on a model of real size."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import bridge
from bridge import GPT2_SIZES, BridgeError, Checkpoint
from gpt2_jax.cli.output import console, json_writer, reading_bar, require_torch
from gpt2_jax.cli.verify import ALL_CHECKS, finish, progress_bar

if TYPE_CHECKING:
    import torch


def demo(
    *,
    out: Path = Path("demo-output"),
    size: Literal["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"] = "gpt2",
    length: int = 128,
    overwrite: bool = False,
) -> int:
    """Write a GPT-2 of real size with random weights, convert it, verify it, and export it back.

    Example: gpt2 demo --out demo-output

    Args:
        out: where to put the three checkpoints and the report; they take 1.5 GB for gpt2.
        size: which of OpenAI's four models to build.
        length: tokens per sequence in the verification.
        overwrite: replace the checkpoints that an earlier demo left there.
    """
    require_torch("gpt2 demo")
    original, converted, exported = out / "huggingface", out / "flax", out / "exported"
    say = console().print
    say(f"1. a {size} with random weights, as Hugging Face stores it: {original}")
    _save(_random_checkpoint(size), original, "huggingface", overwrite)
    say(f"2. the same in Flax: {converted}")
    _save(bridge.load(original), converted, "flax", overwrite)
    say(f"3. and back: {exported}")
    _save(bridge.load(converted), exported, "huggingface", overwrite)
    _require_equal(bridge.load(original), bridge.load(exported))
    say("   every tensor of the export equals the original's byte for byte")
    say("4. both backends, from the Flax directory")
    from gpt2_jax.parity import verify

    with progress_bar(ALL_CHECKS) as begin:
        report = verify(bridge.load(converted), source=str(converted), length=length, untrained=True, progress=begin)
    code = finish(report, json_writer(out / "report.json"))
    say(f"report: {out / 'report.json'}")
    return code


def _random_checkpoint(size: str) -> Checkpoint:
    import torch

    import gpt2_torch

    torch.manual_seed(0)
    model = gpt2_torch.GPT2(GPT2_SIZES[size])
    randomize_biases_and_norms(model)
    return gpt2_torch.checkpoint_from_model(model)


def randomize_biases_and_norms(model: torch.nn.Module) -> None:
    """Instead of the zeros and ones that GPT-2 starts with: those would hide a wrong row."""
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.02)
            elif "ln_" in name:
                parameter.normal_(mean=1.0, std=0.1)


def _save(checkpoint: Checkpoint, target: Path, format: str, overwrite: bool) -> None:
    with reading_bar(checkpoint, f"writing {format}") as watched:
        bridge.save(watched, target, format=format, overwrite=overwrite)


def _require_equal(a: Checkpoint, b: Checkpoint) -> None:
    changed = [name for name in a.tensors if a.tensors[name].tobytes() != b.tensors[name].tobytes()]
    if changed or a.config != b.config:
        raise BridgeError(f"the export differs from the original: {changed or 'config.json'}")
