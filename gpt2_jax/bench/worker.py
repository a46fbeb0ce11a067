"""A process that runs one implementation.

It reads commands from standard input and replies on standard output, with one JSON object per line.

The parent starts this file as a script and not as a module of the package, because importing the package would import
JAX into the processes that measure PyTorch. Therefore this file, `torch_tasks` and `disk_tasks` import nothing from
`gpt2_jax`.

The modules `jax_tasks`, `torch_tasks`, `disk_tasks` and `limits` have the same interface:

    import_packages(name)   import the packages of the implementation
    prepare(job)            return (action, clean_up): `action` is timed, `clean_up` follows it and is not timed
    device_info()           return the device and its peak memory in bytes, if known
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
    "jax": "jax_tasks.py",
    "torch": "torch_tasks.py",
    "torch-compiled": "torch_tasks.py",
    "transformers": "torch_tasks.py",
    "transformers-compiled": "torch_tasks.py",
    "convert": "disk_tasks.py",
    "cp": "disk_tasks.py",
    "limits": "limits.py",
}
"""Implementation -> file with its tasks."""


def main(name: str) -> int:
    """Execute commands until standard input ends. Returns the exit code."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # libraries that print to standard output must not disturb the replies
    try:
        serve(name, sys.stdin, replies)
    except BaseException as error:
        traceback.print_exc()
        first_line = next(iter(str(error).splitlines()), "")
        print(f"{type(error).__name__}: {first_line}", file=sys.stderr)
        return 1
    return 0


def serve(name: str, commands: TextIO, replies: TextIO) -> None:
    """Execute the commands `import`, `prepare`, `run` and `info`."""
    module, action, clean_up = ModuleType("none"), lambda: None, lambda: None
    for line in commands:
        command = json.loads(line)
        reply: dict[str, Any] = {}
        if command["command"] == "import":
            module = _load(Path(__file__).with_name(FILES[name]))
            module.import_packages(name)
            reply = {"peak_bytes": peak_bytes()}
        elif command["command"] == "prepare":
            job = {**command["job"], "name": name}
            action, clean_up = module.prepare({**job, "ids": _random_ids(job)} if job.get("batch_size") else job)
        elif command["command"] == "run":
            reply = _timed(action, clean_up, command["iterations"])
        elif command["command"] == "info":
            reply = {"peak_bytes": peak_bytes(), **module.device_info()}
        print(json.dumps(reply), file=replies, flush=True)


def _timed(action: Any, clean_up: Any, iterations: int) -> dict[str, Any]:
    """The mean time of an iteration in seconds, and the last return value if it is a number or a tuple."""
    total, value = 0.0, None
    for _ in range(iterations):
        began = time.perf_counter()
        result = action()
        total += time.perf_counter() - began
        value = result if isinstance(result, float | tuple) else None
        del result  # it may be a model; memory must never hold two
        clean_up()
    return {"seconds": total / iterations, "value": value}


def _random_ids(job: dict[str, Any]) -> Any:
    """Token ids [B, T + 1], equal in all workers. The last column is only used as a label."""
    import numpy as np

    shape = (job["batch_size"], job["seq_len"] + 1)
    return np.random.default_rng(0).integers(0, job["model"]["vocab_size"], shape)


def peak_bytes() -> int | None:
    """Peak resident memory of this process, or None if the system does not report it.

    On Linux, VmHWM starts at zero after exec, whereas `ru_maxrss` starts at the parent's peak.
    """
    try:
        status = Path("/proc/self/status").read_text()
        return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        if sys.platform != "darwin":
            return None
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS reports bytes


def _load(file: Path) -> ModuleType:
    """Import a file of this directory without importing its package."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
