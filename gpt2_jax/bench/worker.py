"""What runs in a process of its own: one implementation, told by lines of JSON what to do, answering in lines of JSON.

The parent starts it as a script, by its path: as a module of this package it would import the package around it, and
so JAX where PyTorch is measured. Hence nothing here, in `on_torch` or in `on_disk` imports from `gpt2_jax`.

Each `on_*.py`, and `limits`, offers the same verbs:

    imports(name)   what an implementation takes to be imported
    prepare(job)    -> (action, tidy): what is timed, and what is done after it and not timed
    about()         -> the device, and its own peak of memory in bytes where it has one
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any, TextIO

FILES = {
    "jax": "on_jax.py",
    "torch": "on_torch.py",
    "torch-compiled": "on_torch.py",
    "transformers": "on_torch.py",
    "transformers-compiled": "on_torch.py",
    "convert": "on_disk.py",
    "cp": "on_disk.py",
    "limits": "limits.py",
}


def main(name: str) -> int:
    """Answer until standard input ends; the exit code."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no reply
    try:
        serve(name, sys.stdin, replies)
    except BaseException as error:
        traceback.print_exc()
        first_line = next(iter(str(error).splitlines()), "")
        print(f"{type(error).__name__}: {first_line}", file=sys.stderr)
        return 1
    return 0


def serve(name: str, commands: TextIO, replies: TextIO) -> None:
    module, action, tidy = ModuleType("none"), lambda: None, lambda: None
    for line in commands:
        command = json.loads(line)
        reply: dict[str, Any] = {}
        if command["do"] == "import":
            module = _load(Path(__file__).with_name(FILES[name]))
            module.imports(name)
            reply = {"peak_bytes": peak_bytes()}
        elif command["do"] == "prepare":
            job = {**command["job"], "name": name}
            action, tidy = module.prepare({**job, "ids": _random_ids(job)} if job.get("rows") else job)
        elif command["do"] == "run":
            reply = _timed(action, tidy, command["times"])
        elif command["do"] == "about":
            reply = {"peak_bytes": peak_bytes(), **module.about()}
        print(json.dumps(reply), file=replies, flush=True)


def _timed(action: Any, tidy: Any, times: int) -> dict[str, Any]:
    """Seconds of one repetition, the mean of so many in a row, and what the last one gave if that is a figure."""
    total, value = 0.0, None
    for _ in range(times):
        began = time.perf_counter()
        given = action()
        total += time.perf_counter() - began
        value = given if isinstance(given, float | tuple) else None
        del given  # a whole model, where loading is timed: not two at a time
        tidy()
    return {"seconds": total / times, "value": value}


def _random_ids(job: dict[str, Any]) -> Any:
    """[B, T + 1], the same in every worker: a row's inputs, and one more for the last label."""
    import numpy as np

    return np.random.default_rng(0).integers(0, job["model"]["vocab_size"], (job["rows"], job["length"] + 1))


def peak_bytes() -> int | None:
    """The most physical memory that this process has had; None where the system does not say.

    Linux counts VmHWM anew from exec on. `ru_maxrss` instead begins there at the parent's.
    """
    try:
        status = Path("/proc/self/status").read_text()
        return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        if sys.platform != "darwin":
            return None
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in bytes there


def _load(file: Path) -> ModuleType:
    """A file of this directory, without the package around it."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
