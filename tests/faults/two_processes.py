"""Faults of one of two training processes: the effect on the other one, and the result of the resumed run.

    PYTHONPATH=.:tests python -m faults.two_processes

After SIGTERM in any phase, both processes must save the same step within the grace period, even if the other process is
signalled later, while they save or export. A second SIGTERM to one process counts as such a late signal, and a third
ends it at once. After kill -9 or a hang (SIGSTOP) of one process, the other must exit with a message. After each fault,
the resumed run must give the result of an undisturbed one. Prints each fault and the longest times. Exits with 1 if
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

from bridge.formats.trainers.run import steps, verified
from faults import phases, runs
from gpt2_jax.parallel.distributed import HEARTBEAT_TIMEOUT

GRACE = 30
"""Seconds from a SIGTERM within which both processes must have ended."""
ALONE = HEARTBEAT_TIMEOUT + 10
"""Seconds within which a process must have ended after the loss of the other."""
AT_ONCE = 1.0
"""Seconds within which a third signal must have ended the process."""
POLLED = 2.0
"""Seconds that a process stays in its phase after a SIGTERM, because JAX polls for it every second."""
MESHES = ("fsdp=2", "data=2")
STEPS = 24
FLAGS = shlex.split(f"""
    --max-steps {STEPS} --eval-every 8 --eval-batches 2 --num-microbatches 1 --n-layer 1 --n-embd 48 --sample-tokens 2
""")
HANDLED = 0.1
"""Seconds within which Python runs the handler of a signal."""
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
    process: int
    """The process that receives the signals."""
    at: tuple[str, ...]
    """The phases in which it receives the signal, once in each."""
    mesh: str

    def __str__(self) -> str:
        return f"{self.kind} to process {self.process}, {' and '.join(self.at)}, {self.mesh}"


@dataclass(frozen=True)
class Ended:
    code: int | None
    """None if the test had to kill it."""
    seconds: float
    """From the last signal to the end."""
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
        if phase != "leaving":  # a finished process ignores the signal
            for process in (0, 1):
                yield Fault("SIGTERM", process, (phase,), next(meshes))
        next(meshes)  # in the next phase, each process has the other mesh
    for process in (0, 1):
        for late in ("the last save", "exporting"):
            yield Fault("SIGTERM to both", process, ("training", late), next(meshes))
        yield Fault("third SIGTERM", process, ("training", "the last save"), next(meshes))
    for phase in KILLED_IN:
        for process in (0, 1):
            yield Fault("kill -9", process, (phase,), next(meshes))
        next(meshes)
    for process in (0, 1):
        yield Fault("hang", process, ("training",), next(meshes))


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

    def inject(self, fault: Fault) -> list[Ended]:
        """Start the run and send the signals. Returns how both processes end."""
        run = self.directory / str(fault)
        if "restoring" in fault.at:
            shutil.copytree(self.half(fault.mesh), run)
        files = {phase: self.directory / f"{fault} {phase}" for phase in fault.at}
        waiting = 0 if phases.PHASES[fault.at[-1]].first_process_alone else fault.process
        started = self.start(run.name, fault.mesh, waiting, files)
        for file in files.values():
            phases.wait_for(file, *started)
            is_last = file == [*files.values()][-1]
            receiver = 1 - fault.process if fault.kind == "SIGTERM to both" and is_last else fault.process
            if fault.kind == "third SIGTERM" and is_last:
                started[receiver].send_signal(signal.SIGTERM)  # the second
                time.sleep(HANDLED)
                assert started[receiver].poll() is None, "the second signal ended it"
            started[receiver].send_signal(SIGNALS[fault.kind])
            sent = time.monotonic()
            if fault.kind in TO_SAVE or not is_last:
                time.sleep(POLLED)
            file.unlink(missing_ok=True)
        if fault.kind == "hang":
            [ended] = _ends([started[1 - fault.process]], sent, 2 * ALONE)
            started[fault.process].kill()
            return [*_ends([started[fault.process]], sent, 1), ended][:: -1 if fault.process else 1]
        return _ends(started, sent, 2 * ALONE)

    def start(self, run: str, mesh: str, waiting: int = 0, files: dict[str, Path] | None = None) -> list[Process]:
        """Start or resume the run; process `waiting` waits in the phases of `files`."""
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
                variables={phases.SAVED: f"{self._saves(run, process)}", **(places if process == waiting else {})},
            )
            for process in (0, 1)
        ]

    def saved(self, run: str, process: int) -> list[int]:
        """Return the steps that this process saved. Empty if it resumed from the step at which it stopped."""
        file = self._saves(run, process)
        return [int(line) for line in file.read_text().split()] if file.exists() else []

    def _saves(self, run: str, process: int) -> Path:
        return self.directory / f"saved by {process} of {run}"

    def finish(self, run: str, mesh: str) -> str:
        """Resume the run until it is complete. Returns the hash of the result."""
        ended = _ends(self.start(run, mesh), time.monotonic(), 300)
        assert [e.code for e in ended] == [0, 0], ended
        return runs.outcome(self.directory / run, STEPS)


def _ends(started: Sequence[Process], since: float, limit: float) -> list[Ended]:
    """Return how each process ends within `limit` seconds. Kills those that do not."""
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


def problems_of(trial: Trial, fault: Fault, ended: Sequence[Ended]) -> list[str]:
    """Return what is wrong after the fault."""
    wrong, run = [], trial.directory / str(fault)
    signalled, other = ended[fault.process], ended[1 - fault.process]
    if fault.kind in TO_SAVE:
        codes = [e.code for e in ended]
        if codes != [STOPPED] * 2 and not (fault.at[0] in LATE and codes == [COMPLETE] * 2):
            wrong.append(f"the exit codes are {codes}")
        if max(e.seconds for e in ended) > GRACE:
            wrong.append(f"the processes took {[e.seconds for e in ended]} seconds")
        saved = [trial.saved(run.name, process) for process in (0, 1)]
        if saved[0] != saved[1] or saved[0][-1:] not in ([], steps(run)[-1:]):
            wrong.append(f"the processes saved {saved}, but the last checkpoint is {steps(run)[-1:]}")
        if codes == [STOPPED] * 2 and f"saved at step {steps(run)[-1]}" not in ended[0].out:
            wrong.append("the last checkpoint is not that of the reported step")
    else:
        if other.code is None or other.seconds > ALONE:
            wrong.append("the other process did not end in time")
        if not other.err.rstrip().rpartition("\n")[2].startswith("gpt2: ") or "--resume" not in other.err:
            wrong.append("the other process ended without instructions to resume")
        if fault.kind == "third SIGTERM" and (signalled.code != -signal.SIGTERM or signalled.seconds > AT_ONCE):
            wrong.append(f"the third signal ended it after {signalled.seconds:.1f} s with {signalled.code}")
    for step in steps(run):
        verified(run, step)  # raises
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=[*SIGNALS], help="only this kind of fault")
    parser.add_argument("--phase", help="only this phase")
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
            count["ok"] += not wrong
            count["failed"] += bool(wrong)
    print({**count, "longest": {kind: f"{seconds:.1f} s" for kind, seconds in longest.items()}})
    return int(count["failed"] > 0)


def examine(trial: Trial, fault: Fault, longest: Counter[str]) -> list[str]:
    """Cause one fault and resume the run. Returns what was wrong."""
    expected, run = trial.expected(fault.mesh), trial.directory / str(fault)
    ended = trial.inject(fault)
    at = steps(run)[-1:]
    wrong = problems_of(trial, fault, ended)
    ending = ended if fault.kind in TO_SAVE else [ended[1 - fault.process]]
    seconds = max(e.seconds for e in ending)
    longest[fault.kind] = max(longest[fault.kind], seconds)
    if trial.finish(run.name, fault.mesh) != expected:
        wrong.append("the resumed run has another result")
    shutil.rmtree(run)
    print(f"{fault}: codes {[e.code for e in ended]}, {seconds:.1f} s, resumed from {at}: {wrong or 'ok'}")
    for line in wrong and [f"{i} {text}" for i, e in enumerate(ended) for text in (e.out + e.err).splitlines()]:
        print(f"    {line}")
    sys.stdout.flush()
    return wrong


if __name__ == "__main__":
    sys.exit(main())
