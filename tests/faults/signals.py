"""SIGTERM and Ctrl-C in every phase of a run: it saves, ends in time, and gives the same result after a resume.

    PYTHONPATH=.:tests python -m faults.signals

Also tests a second signal in the phases after the first, which must end the run at once and leave valid files, and a
signal during a long compilation. Exits with 1 if anything is wrong.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bridge.formats.trainers.run import steps, verified
from faults import phases, runs

GRACE = 30
"""Seconds from a signal within which the process must have ended."""
AT_ONCE = 1.0
"""Seconds within which a second signal must have ended it."""
SAMPLES = ("--sample-tokens", 3)
OUTSIDE = {"opening the data", "leaving"}
"""Phases in which there is nothing to save. A signal acts as in any Python program."""
DONE = {"the last save", "exporting"}
"""Phases in which everything is evaluated and saved. The run finishes."""
LONG = ("--no-scan", "--n-layer", 12, "--remat", "none")
"""Flags of a model that XLA compiles for a long time."""


@dataclass(frozen=True)
class Fault:
    at: tuple[str, ...]
    """The phases in which signals are sent, one in each."""
    number: signal.Signals

    def __str__(self) -> str:
        return f"{self.number.name}, {' and '.join(self.at)}"


def all_faults() -> Iterator[Fault]:
    for number in (signal.SIGTERM, signal.SIGINT):
        for phase in phases.PHASES:
            yield Fault((phase,), number)
        for second in ("writing", "the last save", "exporting"):
            yield Fault(("training", second), number)


def examine(directory: Path, fault: Fault, expected: str) -> tuple[float, list[str]]:
    """Return the seconds until the process ended, and what was wrong."""
    name = str(fault)
    run = directory / name
    if fault.at == ("restoring",):
        shutil.copytree(_half(directory), run)
    files = {phase: directory / f"{name} {phase}" for phase in fault.at}
    variables = {phases.PLACES: json.dumps({phase: str(file) for phase, file in files.items()})}
    process = runs.start(directory, name, *SAMPLES, variables=variables)
    for file in files.values():
        phases.wait_for(file, process)
        process.send_signal(fault.number)
        sent = time.monotonic()
        file.unlink()
    out, errors = process.communicate(timeout=2 * GRACE)
    seconds, wrong = time.monotonic() - sent, []
    killed, stopped = -fault.number, 128 + fault.number
    if len(fault.at) == 2:
        if process.returncode not in (killed, stopped) or "saved at step" in out or seconds > AT_ONCE:
            wrong.append("the second signal did not end it at once")
    elif fault.at[0] in OUTSIDE:
        if process.returncode != (stopped if fault.number == signal.SIGINT else killed):
            wrong.append("it did not end like any Python program")
    elif fault.at[0] in DONE:
        if process.returncode != 0:
            wrong.append("it did not end like a complete run")
    elif process.returncode != stopped or f"saved at step {steps(run)[-1]}" not in out:
        wrong.append("it did not report a save")
    if seconds > GRACE or "Traceback" in errors:
        wrong.append(f"{seconds:.1f} seconds, {errors}")
    for step in steps(run):
        verified(run, step)  # raises
    if runs.finish(directory, name, *SAMPLES) != expected:
        wrong.append("the resumed run has another result")
    print(f"{fault}: {process.returncode} after {seconds:.2f} s, {wrong or 'ok'}", flush=True)
    shutil.rmtree(run)
    return seconds, wrong


def _half(directory: Path) -> Path:
    """Create a run that was killed in the middle."""
    half, file = directory / "half", directory / "half of it"
    if not half.exists():
        variables = {phases.PLACES: json.dumps({"evaluating": str(file)})}
        process = runs.start(directory, half.name, *SAMPLES, variables=variables)
        phases.wait_for(file, process)
        process.kill()
        process.communicate()
        file.unlink()
    return half


def while_compiling(directory: Path, number: signal.Signals) -> tuple[float, list[str]]:
    """Return the seconds from a signal during compilation until the end."""
    name = f"{number.name} while compiling"
    file = directory / name
    variables = {phases.PLACES: json.dumps({"compiling the step": str(file)})}
    process = runs.start(directory, f"run {name}", *SAMPLES, *LONG, variables=variables)
    phases.wait_for(file, process)
    file.unlink()
    time.sleep(3)  # tracing ends and compilation starts
    sent = time.monotonic()
    process.send_signal(number)
    out, errors = process.communicate(timeout=2 * GRACE)
    seconds = time.monotonic() - sent
    right = process.returncode == 128 + number and "saved at step 0" in out and not errors
    print(f"{name}: {process.returncode} after {seconds:.2f} s", flush=True)
    return seconds, [] if right else [f"{name}: {out}{errors}"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--phase", choices=[*phases.PHASES], help="only this phase")
    chosen = parser.parse_args().phase
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        runs.write_text(directory)
        expected = runs.finish(directory, "whole", *SAMPLES)
        faults = [fault for fault in all_faults() if chosen in (None, *fault.at)]
        ends = {fault: examine(directory, fault, expected) for fault in faults}
        compiling = [while_compiling(directory, number) for number in (signal.SIGTERM, signal.SIGINT)]
    first = [seconds for fault, (seconds, _) in ends.items() if len(fault.at) == 1]
    second = [seconds for fault, (seconds, _) in ends.items() if len(fault.at) == 2]
    wrong = [*(line for _, lines in (*ends.values(), *compiling) for line in lines)]
    print(
        f"{len(first)} signals, at most {max(first):.2f} s; {len(second)} second signals, at most "
        f"{max(second, default=0):.2f} s; {len(compiling)} while compiling, at most {max(compiling)[0]:.2f} s; "
        f"{wrong or 'all ok'}"
    )
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
