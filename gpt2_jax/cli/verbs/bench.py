"""`gpt2 bench`: compare the speed of JAX with the installed peers."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Literal

from tyro.conf import FlagCreatePairsOff, arg

from bridge import BridgeError
from gpt2_jax.bench.cases import benchmark_config, make_cases, with_sizes
from gpt2_jax.bench.peers import TASKS, Task, choose_peers
from gpt2_jax.bench.plot import plot
from gpt2_jax.bench.run import run
from gpt2_jax.cli.arguments import JsonFile
from gpt2_jax.console.output import json_writer, status_bar
from gpt2_jax.console.report_files import require_plot_path
from gpt2_jax.console.terminal import console

FAILED = 1

BatchSizes = Annotated[
    tuple[int, ...], arg(metavar="INT ...", help_behavior_hint="(default: one microbatch of the preset)")
]
SeqLens = Annotated[tuple[int, ...], arg(metavar="INT ...", help_behavior_hint="(default: that of the preset)")]


def bench(
    *,
    preset: Annotated[str, arg(metavar="NAME")] = "nano",
    tasks: tuple[Task, ...] = ("train", "forward", "decode"),
    peers: Annotated[tuple[str, ...] | None, arg(metavar="NAME ...")] = None,
    batch_size: BatchSizes = (),
    seq_len: SeqLens = (),
    rounds: int = 5,
    dtype: Literal["float32", "bfloat16"] | None = None,
    remat: Annotated[str | None, arg(metavar="NAME")] = None,
    scan: FlagCreatePairsOff[bool] = False,
    no_scan: FlagCreatePairsOff[bool] = False,
    vocab_multiple: Annotated[int | None, arg(metavar="INT")] = None,
    json: JsonFile = None,
    plot_file: Annotated[Path | None, arg(name="plot", metavar="FILE")] = None,
    overwrite: bool = False,
) -> int:
    """Benchmark JAX against PyTorch, transformers and the limits of this machine.

    Each implementation runs in its own process, alternating with JAX, with the same sizes and tokens. Weights are
    random and dropout is off. Exit code 1 if an implementation crashed; the others are still reported.

    Example: gpt2 bench --preset gpt2 --dtype float32 --batch-size 4 --seq-len 256 --json bench.json --plot bench.png

    Args:
        preset: the model and the defaults of the flags below, as in `gpt2 train`.
        tasks: train: a step with gradients, clipping and AdamW; forward: the logits of a batch; decode: 64 greedy
            tokens after a prompt of 16; load: read a Hugging Face directory to the device; convert: convert it,
            compared with `cp`.
        peers: torch, torch-compiled, transformers, transformers-compiled, or all. The compiled ones take a minute each
            to start on CPU. The default is all installed peers that need no compilation; --peers with no name runs JAX
            alone.
        batch_size: sequences per step; several values are measured one after the other.
        seq_len: tokens per sequence; one or several values.
        rounds: number of timed rounds; in each, JAX and the peer run one after the other.
        dtype: the dtype of the computation. In training, weights and optimizer state stay float32.
        remat: what JAX recomputes in the backward pass, as in `gpt2 train`.
        scan: JAX compiles one layer and loops over it.
        no_scan: JAX compiles all layers.
        vocab_multiple: JAX pads the vocabulary's rows to a multiple of this.
        json: also write all times, versions and rates to this file.
        plot_file: also draw the medians, their range and the limits to this file (.png, .svg or .pdf).
        overwrite: replace the report and the plot of an earlier command.
    """
    write_json = json_writer(json, overwrite)
    if plot_file is not None:
        require_plot_path(plot_file, overwrite=overwrite, json=json)
    scan_flag = _scan_flag(scan, no_scan)
    config = benchmark_config(preset, dtype=dtype, remat=remat, scan=scan_flag, vocab_multiple=vocab_multiple)
    names = choose_peers(peers)
    if rounds < 1:
        raise BridgeError(f"--rounds {rounds}: must be at least 1")
    if not tasks:
        raise BridgeError(f"--tasks needs at least one of {', '.join(TASKS)}")
    configs = with_sizes(config, batch_size, seq_len)
    with TemporaryDirectory(prefix="gpt2-bench-") as scratch, status_bar() as say:
        cases = [case for task in dict.fromkeys(tasks) for case in make_cases(task, configs, Path(scratch))]
        report = run(config, cases, names, rounds, say)
    write_json(report.to_json())
    report.show(console())
    if plot_file is not None:
        plot(report, plot_file, overwrite=overwrite)
    return FAILED if report.failures else 0


def _scan_flag(scan: bool, no_scan: bool) -> bool | None:
    if scan and no_scan:
        raise BridgeError("--scan and --no-scan contradict each other; give one")
    return True if scan else False if no_scan else None
