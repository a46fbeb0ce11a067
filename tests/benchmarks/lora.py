"""Training a LoRA adapter of a model of OpenAI's size: step time and peak memory, beside PEFT and transformers.

    python -m tests.benchmarks.lora [--size gpt2] [--rank 8] [--batch-size 1] [--seq-len 256] [--rounds 7]

Each side has a process of its own, with random weights, AdamW and float32. The processes alternate: each round times
`--steps` steps of every side. The benchmark prints the median and range of the step times, their ratio to PEFT's in the
same round, and the peak of the resident memory of each process, with its size after the imports.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable

import numpy as np

from bridge import GPT2_SIZES

SIDES = ("gpt2_jax, LoRA", "PEFT, LoRA", "gpt2_jax, all weights", "transformers, all weights")
REFERENCE = "PEFT, LoRA"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=GPT2_SIZES, default="gpt2")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--lora-only", action="store_true", help="without the sides that train all weights")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        serve(options)
        return
    sides = [side for side in SIDES if side.endswith("LoRA") or not options.lora_only]
    workers = {side: start(side) for side in sides}
    before = {side: float(ask(worker, "imported")) for side, worker in workers.items()}
    for worker in workers.values():
        ask(worker, "step")  # compiles
    times: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(options.rounds):
        for side, worker in workers.items():
            times[side].append(float(ask(worker, "step")))
    peaks = {side: float(ask(worker, "peak")) for side, worker in workers.items()}
    for worker in workers.values():
        worker.communicate()
    print(f"{options.size}, rank {options.rank} on c_attn, {options.batch_size} x {options.seq_len} tokens, float32")
    for side, seconds in times.items():
        ratios = sorted(own / other for own, other in zip(seconds, times[REFERENCE], strict=True))
        middle, low, high = (1e3 * f(seconds) for f in (statistics.median, min, max))
        print(
            f"{side:<26} {middle:6.0f} ms a step ({low:.0f} to {high:.0f})  {statistics.median(ratios):.2f} times "
            f"PEFT's ({ratios[0]:.2f} to {ratios[-1]:.2f})  peak {peaks[side]:,.0f} MB, {before[side]:,.0f} imported"
        )


Worker = subprocess.Popen[str]


def start(side: str) -> Worker:
    command = [sys.executable, "-m", "tests.benchmarks.lora", *sys.argv[1:], "--side", side]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def ask(worker: Worker, question: str) -> str:
    assert worker.stdin is not None and worker.stdout is not None
    worker.stdin.write(f"{question}\n")
    worker.stdin.flush()
    if not (answer := worker.stdout.readline()):
        raise RuntimeError(f"a worker ended with {worker.wait()}")
    return answer


def serve(options: argparse.Namespace) -> None:
    """Answer the questions of the parent process on standard output."""
    make = jax_step if options.side.startswith("gpt2_jax") else torch_step
    step = make(options, options.side.endswith("LoRA"))
    imported = peak_megabytes()
    run: Callable[[], None] | None = None
    for line in sys.stdin:
        if line.strip() == "step":
            run = run or step()
            began = time.perf_counter()
            for _ in range(options.steps):
                run()
            print((time.perf_counter() - began) / options.steps, flush=True)
        else:
            print(imported if line.strip() == "imported" else peak_megabytes(), flush=True)


def peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def ids_of(options: argparse.Namespace) -> np.ndarray:
    shape = options.batch_size, options.seq_len + 1
    return np.random.default_rng(0).integers(0, GPT2_SIZES[options.size].vocab_size, shape)


def jax_step(options: argparse.Namespace, is_lora: bool) -> Callable[[], Callable[[], None]]:
    import jax

    from gpt2_jax.lora import LoRAConfig
    from gpt2_jax.parallel.sharding import make_mesh
    from gpt2_jax.training import TrainConfig, make_optimizer, make_train_step
    from gpt2_jax.training.state import initial_state, make_model

    def made() -> Callable[[], None]:
        lora = LoRAConfig(rank=options.rank if is_lora else 0)
        config = TrainConfig(model=GPT2_SIZES[options.size], lora=lora)
        model, tx = make_model(config), make_optimizer(config.optimizer, 1000)
        state = initial_state(config, model, tx, None, make_mesh("data=1", jax.devices()[:1]))
        train_step, ids = make_train_step(model, tx), ids_of(options).astype(np.int32)

        def run() -> None:
            nonlocal state
            state, metrics = train_step(state, {"input_ids": ids[:, :-1], "labels": ids[:, 1:]})
            float(metrics["loss"])

        return run

    return made


def torch_step(options: argparse.Namespace, is_lora: bool) -> Callable[[], Callable[[], None]]:
    import peft
    import torch
    import transformers

    def made() -> Callable[[], None]:
        warnings.simplefilter("ignore")  # about fan_in_fan_out
        config = transformers.GPT2Config(**GPT2_SIZES[options.size].to_hf(), use_cache=False)
        model = transformers.GPT2LMHeadModel(config)
        if is_lora:
            settings = peft.LoraConfig(r=options.rank, lora_alpha=16, target_modules=["c_attn"], task_type="CAUSAL_LM")
            model = peft.get_peft_model(model, settings)
        model.train()
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, 6e-4, (0.9, 0.95), weight_decay=0.1)
        ids = torch.tensor(ids_of(options))

        def run() -> None:
            loss = torch.nn.functional.cross_entropy(model(ids[:, :-1]).logits.flatten(0, 1), ids[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            loss.item()

        return run

    return made


if __name__ == "__main__":
    main()
