"""The end of a run: its plot, its export, and its result."""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bridge
from bridge.errors import quoted
from bridge.formats.peft import write_lora
from bridge.formats.trainers.run import CHECKPOINTS, adapter_of, best_valid_step, validation_loss
from bridge.hub import is_repo_id
from bridge.storage import manifest
from bridge.storage.atomic_writes import new_directory
from gpt2_jax.console.report_files import is_report
from gpt2_jax.parallel.distributed import broadcast_from_first, is_first
from gpt2_jax.training.run.directory import ADAPTER, EXPORT, replaceable_export
from gpt2_jax.training.run.metrics import PLOT, plot_losses


@dataclass(frozen=True)
class Outcome:
    """The result of a run."""

    run: Path
    step: int
    """Total number of steps."""
    best_step: int
    """Step of the checkpoint that was exported. `bridge.load(run)` reads the same one."""
    best_val_loss: float | None
    """Its validation loss, nats per token."""
    stopped_by: signal.Signals | None
    """The signal that ended the run before its last step."""
    export: Path
    plot: Path
    adapter: Path | None = None
    """The trained adapter in PEFT's format; `export` has it merged."""

    def to_json(self) -> dict[str, Any]:
        values = dataclasses.asdict(self)
        paths: dict[str, str | None] = {name: str(values[name]) for name in ("run", "export", "plot")}
        paths["adapter"] = None if self.adapter is None else str(self.adapter)
        return {**values, **paths, "stopped_by": self.stopped_by and self.stopped_by.name}


def finish(
    run: Path,
    about: Mapping[str, Any],
    step: int,
    stopped_by: signal.Signals | None,
    say: Callable[[str], object] = lambda _: None,
) -> Outcome:
    """Plot the losses and export the best checkpoint. The other processes wait for the first one.

    Args:
        about: the content of the export's manifest, beside the step and the loss.
        step: total number of steps.
        stopped_by: the signal that ended the run, if one did.
        say: called with a message about every damaged checkpoint that is skipped.
    """
    best, loss, adapter = 0, None, None
    if is_first():
        best = best_valid_step(run, say)
        loss = validation_loss(run, best)
        with new_directory(run / EXPORT, replaceable=replaceable_export(run)) as export:
            checkpoint = bridge.load(run / CHECKPOINTS / str(best))
            bridge.save(checkpoint.with_biases(), export, format="huggingface")
            manifest.commit(export, {**about, "step": best, "val_loss": loss})
        adapter = adapter_of(run / CHECKPOINTS / str(best), checkpoint.config)
        if adapter is not None:
            with new_directory(run / ADAPTER, replaceable=replaceable_export(run, ADAPTER)) as folder:
                write_lora(adapter, folder, _name_of_base(about["config"]))
                manifest.commit(folder, {**about, "step": best, "val_loss": loss})
        if (run / PLOT).exists() and not is_report(run / PLOT):
            say(f"{quoted(run / PLOT)} was not drawn by this version of gpt2 train and is kept")
        else:
            plot_losses(run)
    best, loss, has_adapter = broadcast_from_first((best, loss, adapter is not None))
    return Outcome(run, step, best, loss, stopped_by, run / EXPORT, run / PLOT, run / ADAPTER if has_adapter else None)


def _name_of_base(config: Mapping[str, Any]) -> str | None:
    """Return the Hugging Face id of the base of an adapter, or None if the base is local.

    A local path has no meaning on other machines, and may be private. With `base`, the run started from a merged model,
    which has no id.
    """
    name = config["init_from"]
    if name is None or config["base"] is not None or name == bridge.BUNDLED.name:
        return None
    return name if is_repo_id(name) and not Path(name).exists() else None
