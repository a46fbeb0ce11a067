"""Phases of a run for faults. In a chosen phase, the process creates a file and waits until the file is removed.

The process also records the steps that it saves, because each process writes its own part of a checkpoint.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from bridge.storage import manifest
from gpt2_jax.cli.verbs import train as verb
from gpt2_jax.training import loop
from gpt2_jax.training.run.checkpointing import Checkpoints
from gpt2_jax.training.state import TrainState

PLACES, SAVED = "FAULTS_PHASES", "FAULTS_SAVED"
"""Environment variables: JSON of phase -> file; and the file in which to record the steps."""
_PATIENCE = 120
"""Seconds to wait for the removal of the file."""


LAST = -1
"""The last call of `train_step`."""


class Phase(NamedTuple):
    """The call of a function at which the process waits."""

    owner: Any
    function: str
    call: int = 1
    first_process_alone: bool = False


PHASES = {
    "opening the data": Phase(verb, "_open_data"),
    "drawing the weights": Phase(loop, "initial_state"),
    "restoring": Phase(Checkpoints, "restore"),
    "the first evaluation": Phase(loop.Loop, "validate"),
    "compiling the step": Phase(loop.Loop, "train_step"),
    "training": Phase(loop.Loop, "train_step", 10),
    "evaluating": Phase(loop.Loop, "eval_step", 4),  # the second batch of the second evaluation, after step 8
    "sampling": Phase(loop, "sample"),
    "saving": Phase(Checkpoints, "save", 3),
    "writing": Phase(Checkpoints, "_commit", 4),  # Orbax writes while the training continues
    "committing": Phase(manifest, "commit", 5, first_process_alone=True),
    "pruning": Phase(Checkpoints, "_prune", 6, first_process_alone=True),
    "the last step": Phase(loop.Loop, "train_step", LAST),
    "the last save": Phase(Checkpoints, "__exit__"),
    "exporting": Phase(loop, "finish"),
    "leaving": Phase(verb, "leave"),
}


def stay_in(files: Mapping[str, str]) -> None:
    """Wait in each of these phases until its file is removed."""
    for name, file in files.items():
        phase = PHASES[name]
        if phase.owner is loop.Loop and phase.function in ("train_step", "eval_step"):
            _once_made(phase, Path(file))
        else:
            function = getattr(phase.owner, phase.function)
            setattr(phase.owner, phase.function, _staying(function, phase.call, Path(file)))


def wait_for(file: Path, *processes: subprocess.Popen[str]) -> None:
    """Wait until a process has reached the phase."""
    while not file.exists():
        assert all(process.poll() is None for process in processes), [p.communicate() for p in processes]
        time.sleep(0.005)


def note_saves(file: Path) -> None:
    save = Checkpoints.save

    def noted(self: Checkpoints, state: TrainState, *more: Any) -> None:
        with file.open("a") as lines:
            lines.write(f"{int(state.step)}\n")
        save(self, state, *more)

    setattr(Checkpoints, "save", noted)  # noqa: B010


def _once_made(phase: Phase, file: Path) -> None:
    """Wrap a compiled step, which is an attribute of the loop and not of its class."""
    make = loop.Loop.__init__

    def made(self: loop.Loop, *arguments: Any, **named: Any) -> None:
        make(self, *arguments, **named)
        call = self.config.max_steps if phase.call == LAST else phase.call
        setattr(self, phase.function, _staying(getattr(self, phase.function), call, file))

    setattr(loop.Loop, "__init__", made)  # noqa: B010


def _staying(function: Callable[..., Any], call: int, file: Path) -> Callable[..., Any]:
    calls = 0

    def wrapped(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            file.touch()
            deadline = time.monotonic() + _PATIENCE
            while file.exists() and time.monotonic() < deadline:
                time.sleep(0.01)
        return function(*arguments, **named)

    return wrapped
