"""Faults of one of two training processes: the effect on the other one, and the result of the resumed run.

    PYTHONPATH=.:tests python -m faults.two_processes

SIGTERM in every phase: both save the same step within the grace period, also if the other process is signalled later,
while they save or export. A second SIGTERM to one process is treated as such a late one, and a third ends it at once.
kill -9, and a hanging machine (SIGSTOP): the other process ends by itself, with a message. After each fault, the run
is resumed, and must give the result of an undisturbed one. Prints each fault and the longest times. Exits with 1 if
anything is wrong. `--only KIND` selects one kind of fault.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bridge.formats.run import steps, verified
from faults import phases, runs
from gpt2_jax.parallel.distributed import HEARTBEAT_TIMEOUT

GRACE = 30
"""Seconds from a SIGTERM within which both processes must have ended."""
ALONE = HEARTBEAT_TIMEOUT + 10
"""Seconds within which a process that has lost the other must have ended."""
AT_ONCE = 1.0
"""Seconds."""
NOTICED = 2.0
"""Seconds that a process stays in its phase after a SIGTERM, because JAX polls for it every second."""
MESHES = ("fsdp=2", "data=2")
STEPS = 24
FLAGS = shlex.split(f"""
    --max-steps {STEPS} --eval-every 8 --eval-batches 2 --num-microbatches 1 --n-layer 1 --n-embd 48 --sample-tokens 2
""")
HEARD = 0.1
"""Seconds after which Python has run the handler of a signal."""
TO_SAVE = {"SIGTERM", "SIGTERM to both"}
STOPPED, COMPLETE = 128 + signal.SIGTERM, 0
LATE = {"the last step", "the last save", "exporting", "leaving"}
"""Phases in which training has finished when SIGTERM arrives."""
KILLED_IN = (
    *("compiling the step", "training", "evaluating", "saving", "writing", "committing", "pruning", "exporting"),
    "leaving",
)

Process = subprocess.Popen[str]


@dataclass(frozen=True)
class Fault:
    kind: str
    told: int
    """The process."""
    at: tuple[str, ...]
    """The phases in which it receives the signal, once in each."""
    mesh: str

    def __str__(self) -> str:
        return f"{self.kind} to process {self.told}, {' and '.join(self.at)}, {self.mesh}"


@dataclass(frozen=True)
class Ended:
    code: int | None
    """None if it had to be killed."""
    seconds: float
    """After the last signal."""
    out: str
    err: str


SIGNALS = {
    "SIGTERM": signal.SIGTERM,
    "SIGTERM to both": signal.SIGTERM,
    "third SIGTERM": signal.SIGTERM,
    "kill -9": signal.SIGKILL,
    "hang": signal.SIGSTOP,
}


def all_faults() -> Iterator[Fault]:
    meshes = itertools.cycle(MESHES)
    for phase in phases.PHASES:
        if phase != "leaving":  # its work is done, and it ignores the signal
            for told in (0, 1):
                yield Fault("SIGTERM", told, (phase,), next(meshes))
        next(meshes)  # so that each process is signalled with both
    for told in (0, 1):
        for late in ("the last save", "exporting"):
            yield Fault("SIGTERM to both", told, ("training", late), next(meshes))
        yield Fault("third SIGTERM", told, ("training", "the last save"), next(meshes))
    for phase in KILLED_IN:
        for told in (0, 1):
            yield Fault("kill -9", told, (phase,), next(meshes))
        next(meshes)
    for told in (0, 1):
        yield Fault("hang", told, ("training",), next(meshes))


class Trial:
    """A directory with the text, the results of undisturbed runs on each mesh, and the disturbed runs."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        runs.write_text(directory)
        self._expected: dict[str, str] = {}

    def expected(self, mesh: str) -> str:
        if mesh not in self._expected:
            self._expected[mesh] = self.finish(f"whole {mesh}", mesh)
        return self._expected[mesh]

    def half(self, mesh: str) -> Path:
        """Create a run whose processes were both killed in the middle."""
        half = self.directory / f"half {mesh}"
        if not half.exists():
            file = self.directory / "half of it"
            started = self.start(half.name, mesh, 0, {"evaluating": file})
            phases.wait_for(file, *started)
            for process in started:
                process.kill()
                process.communicate()
            file.unlink()
        return half

    def strike(self, fault: Fault) -> list[Ended]:
        """Start the run and send the signals. Returns how both processes end."""
        run = self.directory / str(fault)
        if "restoring" in fault.at:
            shutil.copytree(self.half(fault.mesh), run)
        files = {phase: self.directory / f"{fault} {phase}" for phase in fault.at}
        stays = 0 if phases.PHASES[fault.at[-1]].first_process_alone else fault.told
        started = self.start(run.name, fault.mesh, stays, files)
        for file in files.values():
            phases.wait_for(file, *started)
            is_last = file == [*files.values()][-1]
            told = 1 - fault.told if fault.kind == "SIGTERM to both" and is_last else fault.told
            if fault.kind == "third SIGTERM" and is_last:
                started[told].send_signal(signal.SIGTERM)  # the second
                time.sleep(HEARD)
                assert started[told].poll() is None, "it was taken for a late one"
            started[told].send_signal(SIGNALS[fault.kind])
            sent = time.monotonic()
            if fault.kind in TO_SAVE or not is_last:
                time.sleep(NOTICED)
            file.unlink(missing_ok=True)
        if fault.kind == "hang":
            [ended] = _ends([started[1 - fault.told]], sent, 2 * ALONE)
            started[fault.told].kill()
            return [*_ends([started[fault.told]], sent, 1), ended][:: -1 if fault.told else 1]
        return _ends(started, sent, 2 * ALONE)

    def start(self, run: str, mesh: str, stays: int = 0, files: dict[str, Path] | None = None) -> list[Process]:
        """Start or resume the run; the process `stays` waits in the phases of `files`."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        places = {phases.PLACES: json.dumps({phase: str(file) for phase, file in (files or {}).items()})}
        return [
            runs.start(
                self.directory,
                run,
                *(*FLAGS, "--mesh", mesh, "--distributed", "--processes", 2, "--process", process),
                *("--coordinator", f"127.0.0.1:{port}"),
                variables={phases.SAVED: f"{self._saves(run, process)}", **(places if process == stays else {})},
            )
            for process in (0, 1)
        ]

    def saved(self, run: str, process: int) -> list[int]:
        """The steps that this process saved; none if it resumed from the step at which it stopped."""
        file = self._saves(run, process)
        return [int(line) for line in file.read_text().split()] if file.exists() else []

    def _saves(self, run: str, process: int) -> Path:
        return self.directory / f"saved by {process} of {run}"

    def finish(self, run: str, mesh: str) -> str:
        """Run to the end. Returns the hash of the result."""
        ended = _ends(self.start(run, mesh), time.monotonic(), 300)
        assert [e.code for e in ended] == [0, 0], ended
        return runs.outcome(self.directory / run, STEPS)


def _ends(started: Sequence[Process], since: float, limit: float) -> list[Ended]:
    """Return how each process ends by itself, or that it does not end within this many seconds."""
    seconds: dict[int, float] = {}
    while len(seconds) < len(started) and time.monotonic() < since + limit:
        for number, process in enumerate(started):
            if number not in seconds and process.poll() is not None:
                seconds[number] = time.monotonic() - since
        time.sleep(0.005)
    for process in started:
        process.kill()
    texts = [process.communicate() for process in started]
    return [
        Ended(process.returncode if number in seconds else None, seconds.get(number, limit), *texts[number])
        for number, process in enumerate(started)
    ]


def complaints(trial: Trial, fault: Fault, ended: Sequence[Ended]) -> list[str]:
    """Return what is wrong after the fault."""
    wrong, run = [], trial.directory / str(fault)
    told, other = ended[fault.told], ended[1 - fault.told]
    if fault.kind in TO_SAVE:
        codes = [e.code for e in ended]
        if codes != [STOPPED] * 2 and not (fault.at[0] in LATE and codes == [COMPLETE] * 2):
            wrong.append(f"they ended with {codes}")
        if max(e.seconds for e in ended) > GRACE:
            wrong.append(f"they took {[e.seconds for e in ended]} seconds")
        saved = [trial.saved(run.name, process) for process in (0, 1)]
        if saved[0] != saved[1] or saved[0][-1:] not in ([], steps(run)[-1:]):
            wrong.append(f"they saved {saved}, and the last checkpoint is {steps(run)[-1:]}")
        if codes == [STOPPED] * 2 and f"saved at step {steps(run)[-1]}" not in ended[0].out:
            wrong.append("the last checkpoint is not of the step that it said")
    else:
        if other.code is None or other.seconds > ALONE:
            wrong.append("the other did not end by itself in time")
        if not other.err.rstrip().rpartition("\n")[2].startswith("gpt2: ") or "--resume" not in other.err:
            wrong.append("the other ended without saying what to do")
        if fault.kind == "third SIGTERM" and (told.code != -signal.SIGTERM or told.seconds > AT_ONCE):
            wrong.append(f"the third signal ended it after {told.seconds:.1f} s with {told.code}")
    for step in steps(run):
        verified(run, step)  # raises
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=[*SIGNALS], help="one kind of fault")
    parser.add_argument("--phase", help="one phase")
    options = parser.parse_args()
    chosen = [
        fault
        for fault in all_faults()
        if options.only in (None, fault.kind) and (options.phase is None or options.phase in fault.at)
    ]
    count, longest = Counter[str](), Counter[str]()
    with tempfile.TemporaryDirectory() as temporary:
        trial = Trial(Path(temporary))
        for fault in chosen:
            wrong = examine(trial, fault, longest)
            count["as they must"] += not wrong
            count["OTHERWISE"] += bool(wrong)
    print({**count, "longest": {kind: f"{seconds:.1f} s" for kind, seconds in longest.items()}})
    return int(count["OTHERWISE"] > 0)


def examine(trial: Trial, fault: Fault, longest: Counter[str]) -> list[str]:
    """Cause one fault and resume the run. Returns what was wrong."""
    expected, run = trial.expected(fault.mesh), trial.directory / str(fault)
    ended = trial.strike(fault)
    at = steps(run)[-1:]
    wrong = complaints(trial, fault, ended)
    heeds = ended if fault.kind in TO_SAVE else [ended[1 - fault.told]]
    seconds = max(e.seconds for e in heeds)
    longest[fault.kind] = max(longest[fault.kind], seconds)
    if trial.finish(run.name, fault.mesh) != expected:
        wrong.append("the run that went on ended otherwise")
    shutil.rmtree(run)
    print(f"{fault}: codes {[e.code for e in ended]}, {seconds:.1f} s, went on from {at}: {wrong or 'as it must'}")
    for line in wrong and [f"{i} {text}" for i, e in enumerate(ended) for text in (e.out + e.err).splitlines()]:
        print(f"    {line}")
    sys.stdout.flush()
    return wrong


if __name__ == "__main__":
    sys.exit(main())
