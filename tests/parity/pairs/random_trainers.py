"""Compare random correct pairs of trainers, PyTorch and JAX, and report how much of the bounds rounding uses.

    PYTHONPATH=.:tests python -m parity.pairs.random_trainers --pairs 1000 --state trainers.json
    PYTHONPATH=.:tests python -m parity.pairs.random_trainers --mistakes 200

The first exits with 1 at the first pair that does not pass. Ctrl-C stops it, and the same command continues. The second
changes one setting of one side, and exits with 1 at the first diagnosis that names another kind.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from parity.pairs.recipes import Recipe, batches, train_in_jax, train_in_torch

from gpt2_jax.parity.pairs.training.compare import compare_training
from gpt2_jax.parity.pairs.training.result import TrainingComparison


def _schedule(rng: np.random.Generator) -> Any:
    warm, total = int(rng.integers(0, 4)), int(rng.integers(4, 12))

    def factor(step: int) -> float:
        if step < warm:
            return step / warm
        return 0.5 * (1 + float(np.cos(np.pi * min(1.0, step / total))))

    return factor


def random_recipe(seed: int) -> tuple[Recipe, int, int]:
    """Return a recipe, the number of steps, and the rows of a batch."""
    rng = np.random.default_rng(seed)

    def draw(*choices: Any) -> Any:
        return choices[int(rng.integers(len(choices)))]

    kind, optimizer = draw("mlp", "tokens"), draw("adamw", "adamw", "adam", "sgd")
    momentum = draw(0.0, 0.5, 0.9)
    recipe = Recipe(
        kind=kind,
        width=int(rng.integers(3, 33)),
        depth=int(rng.integers(1, 5)),
        standardize=draw(False, False, True),
        tied=kind == "tokens" and draw(False, True),
        reduction=draw("mean", "mean", "all", "sum"),
        optimizer=optimizer,
        lr=float(10 ** rng.uniform(-4, -1.5)),
        b1=draw(0.8, 0.9, 0.95),
        b2=draw(0.9, 0.95, 0.99, 0.999),
        eps=draw(1e-10, 1e-8, 1e-6, 1e-3),
        weight_decay=draw(0.0, 1e-4, 1e-2, 0.1),
        decay_biases=draw(True, False),
        momentum=momentum,
        nesterov=optimizer == "sgd" and momentum > 0 and draw(True, False),
        clip=draw(None, None, 0.1, 1.0),
        schedule=draw(None, _schedule(rng)),
        microbatches=draw(1, 1, 2, 4),
        divides=draw(True, True, False),
        ema=draw(None, 0.9, 0.999),
        ema_before=draw(False, False, True),
        ema_debias=draw(False, False, True),
        frozen=draw("", "", "layers.0.bias", "layers.0.weight"),
        records=draw(True, False),
        dtype=draw("float64", "float32"),
    )
    if recipe.ema_before and recipe.ema_debias:
        recipe = replace(recipe, ema_debias=False)
    steps, rows = int(rng.integers(2, 9)), draw(4, 8, 16)
    if recipe.standardize and rows < 4 * recipe.microbatches:
        # A variance over one or two rows may be close to zero, and dividing by it magnifies rounding without limit.
        recipe = replace(recipe, standardize=False)
    return recipe, steps, rows


def compare_random(seed: int) -> tuple[Recipe, TrainingComparison]:
    """Train the random recipe of a seed in both frameworks."""
    recipe, steps, rows = random_recipe(seed)
    data = batches(recipe, steps, rows, seed)
    with jax.enable_x64(recipe.dtype == "float64"):
        sides = train_in_torch(recipe, data, seed), train_in_jax(recipe, data, seed)
        return recipe, compare_training(*sides, range(steps))


def random_change(rng: np.random.Generator, recipe: Recipe) -> tuple[str, dict[str, Any]]:
    """Return a kind of mistake, and the fields of the other side's recipe."""

    def draw(*choices: Any) -> Any:
        return choices[int(rng.integers(len(choices)))]

    is_adam = recipe.optimizer != "sgd"
    changes: list[tuple[str, dict[str, Any]]] = [
        ("learning rate", {"lr": recipe.lr * draw(0.1, 0.5, 1.001, 1.5, 2.0)}),
        ("learning rate schedule", {"schedule": _schedule(rng)}),
        ("gradient clipping", {"clip": draw(0.03, 0.3, None)}),
        ("weight decay", {"weight_decay": recipe.weight_decay + draw(1e-3, 0.05)}),
        ("weight decay", {"decay_biases": not recipe.decay_biases}),
        ("loss reduction", {"reduction": draw("mean", "sum")}),
        ("gradient accumulation", {"microbatches": 4, "divides": not recipe.divides}),
        ("randomness", {"dropout": 0.1}),
        ("data order", {"offset": 1}),
        ("frozen parameter", {"frozen": "head.weight"}),
    ]
    if is_adam:
        changes += [
            ("epsilon", {"eps": recipe.eps * draw(0.1, 10, 1000)}),
            ("betas", {"b1": draw(0.7, 0.85, 0.99)}),
            ("betas", {"b2": draw(0.8, 0.97, 0.9999)}),
            ("nesterov", {"nesterov": True}),
            ("weight decay", {"optimizer": "adam" if recipe.optimizer == "adamw" else "adamw"}),
        ]
    else:
        changes.append(("betas", {"momentum": draw(0.3, 0.8, 0.99)}))
        changes.append(("nesterov", {"nesterov": not recipe.nesterov and recipe.momentum > 0}))
    if recipe.ema is not None:
        changes += [("average", {"ema": draw(0.5, 0.95)}), ("average", {"ema_before": not recipe.ema_before})]
    if recipe.kind == "tokens":
        changes += [("loss mask", {"ignores": False}), ("loss reduction", {"reduction": draw("all", "mean")})]
    if recipe.tied:
        changes.append(("tied weights", {"tied": False}))
    return changes[int(rng.integers(len(changes)))]


def compare_mistake(seed: int) -> tuple[str, Recipe, dict[str, Any], TrainingComparison]:
    """Train the random recipe of a seed, and one with another setting."""
    recipe, steps, rows = random_recipe(seed)
    recipe = replace(recipe, dtype="float64", microbatches=1 if rows == 4 else recipe.microbatches)
    kind, change = random_change(np.random.default_rng(seed + 10**6), recipe)
    data = batches(recipe, max(3, steps), rows, seed)
    with jax.enable_x64(True):
        sides = train_in_torch(recipe, data, seed), train_in_jax(replace(recipe, **change), data, seed)
        return kind, recipe, change, compare_training(*sides, range(len(data)))


def run_mistakes(count: int, first: int) -> None:
    verdicts: Counter[str] = Counter()
    for seed in range(first, first + count):
        kind, recipe, change, result = compare_mistake(seed)
        found = "not detected" if result.diagnosis is None else result.diagnosis.kind
        verdict = "right" if found == kind else found if found in ("unknown", "not detected") else "wrong"
        verdicts[verdict] += 1
        if verdict != "right":
            print(f"seed {seed}: {change} is {verdict}", flush=True)
        if verdict == "wrong":
            sys.exit(f"{kind} was named {found}: {result.diagnosis}\n{result.departure}\n{recipe}")
        jax.clear_caches()
    print(f"{count} random mistakes: " + ", ".join(f"{n} {what}" for what, n in verdicts.items()))


def ratios(result: TrainingComparison) -> dict[str, float]:
    """Quantity -> the largest difference relative to its bound."""
    return {c.name: c.measurements[0].value for c in result.report.checks if c.name != "names"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--state", type=Path, help="keep the progress here, to continue after an interruption")
    parser.add_argument("--mistakes", type=int, help="plant this many random mistakes instead")
    arguments = parser.parse_args()
    if arguments.mistakes is not None:
        run_mistakes(arguments.mistakes, arguments.seed)
        return
    state: dict[str, Any] = {"next": arguments.seed, "worst": {}, "least": None, "kinds": {}}
    if arguments.state is not None and arguments.state.exists():
        state = json.loads(arguments.state.read_text())
    kinds, start = Counter(state["kinds"]), time.perf_counter()
    for seed in range(state["next"], arguments.seed + arguments.pairs):
        recipe, result = compare_random(seed)
        if not result.passed:
            sys.exit(f"--pairs 1 --seed {seed}: {result.departure or result.problem}\n{result.diagnosis}\n{recipe}")
        found = ratios(result)
        for name, ratio in found.items():
            if ratio > state["worst"].get(name, (0.0, 0))[0]:
                state["worst"][name] = ratio, seed
        largest = max(found.values())
        state["least"] = largest if state["least"] is None else min(state["least"], largest)
        kinds[f"{recipe.optimizer} {recipe.dtype}"] += 1
        state |= {"next": seed + 1, "kinds": kinds}
        if arguments.state is not None:
            arguments.state.write_text(json.dumps(state))
        jax.clear_caches()  # each pair compiles its own step
    print(
        f"{state['next'] - arguments.seed} random pairs of correct trainers pass ({time.perf_counter() - start:.0f} s)"
    )
    print(", ".join(f"{n} {kind}" for kind, n in sorted(kinds.items())))
    for name, (ratio, seed) in state["worst"].items():
        print(f"{name}: largest difference / bound {ratio:.3g}, of seed {seed}")
    print(f"the largest of each pair is at least {state['least']:.3g}")


if __name__ == "__main__":
    main()
