"""Time and memory of encoding records, compared with `datasets.map` and the same tokenizer.

    python -m tests.benchmarks.records [--megabytes 1024] [--rounds 3] [directory]

Writes JSON lines with prompts and completions, compressed with gzip, until their text has this size. Each round encodes
them in new processes with empty caches: with `open_data`, and, where `datasets` is installed, with `Dataset.map` over
transformers' fast tokenizer, in batches of 1000 rows. Both tokenizers are the bundled model's and write ids and a mask.
Memory is the growth of the process's peak over the memory before, without the processes that `datasets` starts.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import statistics
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import bridge
from tests.benchmarks.data import MIB

MEASURE = """
import os, sys, time

def kib(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))

open("/proc/self/clear_refs", "w").write("5")  # resets the peak to the current memory
before, began = kib("VmRSS"), time.perf_counter()
work()
print(time.perf_counter() - began, 1024 * (kib("VmHWM") - before))
"""

OURS = """
import sys
from gpt2_jax.data import RecordOptions, make_tokenizer, open_data

tokenizer = make_tokenizer(sys.argv[2])

def work():
    options = {"tokenizer": tokenizer, "cache": sys.argv[3], "validation_fraction": 0}
    open_data(sys.argv[1], records=RecordOptions(max_tokens=4096), **options)
"""

THEIRS = """
import sys
import datasets
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(sys.argv[2])
datasets.disable_progress_bars()

def encode(rows):
    prompts = tokenizer(rows["prompt"])["input_ids"]
    completions = tokenizer(rows["completion"])["input_ids"]
    pairs = [(p, [*c, tokenizer.eos_token_id]) for p, c in zip(prompts, completions)]
    return {"ids": [p + c for p, c in pairs], "mask": [[0] * len(p) + [1] * len(c) for p, c in pairs]}

def work():
    loaded = datasets.load_dataset("json", data_files=sys.argv[1], split="train", cache_dir=sys.argv[3])
    loaded.map(encode, batched=True, num_proc=int(sys.argv[4]), remove_columns=["prompt", "completion"])
"""


def write_records(path: Path, megabytes: int) -> None:
    """Write records whose text has this size. No two are equal, so that the file does not compress to nothing."""
    lines = (bridge.BUNDLED / "validation.txt").read_text(encoding="utf-8").splitlines()
    size = number = 0
    with gzip.open(path, "wt", encoding="utf-8", compresslevel=1) as file:
        while size < megabytes * MIB:
            start = number * 7 % (len(lines) - 12)
            prompt, completion = "\n".join(lines[start : start + 4]), "\n".join(lines[start + 4 : start + 12])
            size += file.write(json.dumps({"prompt": f"{number}. {prompt}", "completion": completion}) + "\n")
            number += 1


def measure(program: str, *arguments: object) -> tuple[float, float]:
    """Return the seconds and the growth of the peak in bytes of one run in a new process."""
    command = [sys.executable, "-c", program + MEASURE, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    seconds, growth = done.stdout.split()[-2:]
    return float(seconds), float(growth)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--megabytes", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("directory", nargs="?")
    flags = parser.parse_args()
    programs = {"open_data": OURS} | ({"datasets.map": THEIRS} if find_spec("datasets") else {})
    with tempfile.TemporaryDirectory(dir=flags.directory) as scratch:
        data, tokenizer = Path(scratch) / "records.jsonl.gz", Path(scratch) / "tokenizer"
        tokenizer.mkdir()
        bridge.save_tokenizer(bridge.load(bridge.BUNDLED).tokenizer(), tokenizer)
        write_records(data, flags.megabytes)
        print(f"{flags.megabytes} MiB of JSON lines, {data.stat().st_size / MIB:.0f} MiB compressed")
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in programs}
        for number in range(flags.rounds):
            for name, program in programs.items():
                cache = Path(scratch) / f"{name}-{number}"
                found[name].append(measure(program, data, tokenizer, cache, os.cpu_count() or 1))
    for name, rounds in found.items():
        seconds, growth = (statistics.median(column) for column in zip(*rounds, strict=True))
        print(
            f"{name:13} {seconds:7.1f} s, {flags.megabytes / seconds:5.1f} MiB/s, peak grows by {growth / MIB:5.0f} MiB"
        )


if __name__ == "__main__":
    main()
