"""Mistakes in training, each with the kind and the place that `compare_training` must name.

    PYTHONPATH=.:tests python -m parity.pairs.training_mistakes

prints one row for each mistake, and how many kinds are right, wrong and unknown.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from parity.pairs.recipes import Recipe, batches, optax_optimizer, train_in_jax, train_in_torch
from rich.console import Console
from rich.table import Table

from gpt2_jax.parity.pairs.training.compare import compare_training
from gpt2_jax.parity.pairs.training.result import TrainingComparison

MLP = Recipe()
TOKENS = Recipe(kind="tokens", depth=1)
SGD = Recipe(optimizer="sgd", lr=0.1, weight_decay=1e-3)
STEPS = 5

Optimizer = Callable[[Recipe], optax.GradientTransformation]


@dataclass(frozen=True)
class Mistake:
    """A recipe, and what the right side does otherwise."""

    name: str
    kind: str
    step: int
    quantity: str
    recipe: Recipe = MLP
    change: dict[str, Any] = field(default_factory=dict)
    """Fields of the right recipe."""
    optimizer: Optimizer | None = None
    """The right side's optimizer, if no recipe describes it."""
    seed: int = 0
    """Of the right side's initial values."""
    per_token: bool = False
    place: str = ""
    """The tensor of the first difference, if only one can be."""
    names: tuple[str, ...] = ()
    """The parameters that the diagnosis must name."""
    values: tuple[float | None, float | None] | None = None
    """The hyperparameter of both sides that the diagnosis must find."""


def compare(mistake: Mistake, dtype: str = "float64") -> TrainingComparison:
    """Train the right recipe in PyTorch and the wrong one in JAX."""
    right = replace(mistake.recipe, dtype=dtype)
    wrong = replace(right, **mistake.change)
    data = batches(right, STEPS)
    optimizer = None if mistake.optimizer is None else mistake.optimizer(wrong)
    with jax.enable_x64(dtype == "float64"):
        return compare_training(
            train_in_torch(right, data, per_token=mistake.per_token),
            train_in_jax(wrong, data, mistake.seed, optimizer=optimizer, per_token=mistake.per_token),
            range(STEPS),
            dtype=dtype,
        )


def adam_with(change: Callable[..., Any]) -> Optimizer:
    """AdamW whose direction `change(mu, nu, count, recipe)` computes for each parameter."""

    def optimizer(recipe: Recipe) -> optax.GradientTransformation:
        def update(gradients: Any, state: Any, params: Any) -> Any:
            count = state.count + 1
            mu = jax.tree.map(lambda m, g: recipe.b1 * m + (1 - recipe.b1) * g, state.mu, gradients)
            nu = jax.tree.map(lambda v, g: recipe.b2 * v + (1 - recipe.b2) * g**2, state.nu, gradients)
            directions = jax.tree.map(lambda m, v: change(m, v, count, recipe), mu, nu)
            updates = jax.tree.map(lambda d, p: -recipe.lr * (d + recipe.weight_decay * p), directions, params)
            return updates, optax.ScaleByAdamState(count, mu, nu)

        return optax.GradientTransformation(optax.scale_by_adam().init, update)

    return optimizer


def no_correction(m: Any, v: Any, count: Any, recipe: Recipe) -> Any:
    return m / (jnp.sqrt(v) + recipe.eps)


def no_correction_of_v(m: Any, v: Any, count: Any, recipe: Recipe) -> Any:
    return m / (1 - recipe.b1**count) / (jnp.sqrt(v) + recipe.eps)


def epsilon_before_correction(m: Any, v: Any, count: Any, recipe: Recipe) -> Any:
    """The form of the paper's last remark: epsilon is not divided by the correction."""
    rate = jnp.sqrt(1 - recipe.b2**count) / (1 - recipe.b1**count)
    return rate * m / (jnp.sqrt(v) + recipe.eps)


def scaled_gradients(factor: float) -> Optimizer:
    return lambda recipe: optax.chain(optax.scale(factor), optax_optimizer(recipe))


def clipped_by_value(recipe: Recipe) -> optax.GradientTransformation:
    return optax.chain(optax.clip(0.02), optax_optimizer(recipe))


def narrow_moments(recipe: Recipe) -> optax.GradientTransformation:
    tx = optax.scale_by_adam(recipe.b1, recipe.b2, recipe.eps, mu_dtype=jnp.bfloat16)
    decay = optax.add_decayed_weights(recipe.weight_decay)
    return optax.chain(tx, decay, optax.scale_by_learning_rate(recipe.lr))


def rounded_gradients(dtype: Any) -> Optimizer:
    def optimizer(recipe: Recipe) -> optax.GradientTransformation:
        rounded = optax.stateless(lambda g, p: jax.tree.map(lambda x: x.astype(dtype).astype(x.dtype), g))
        return optax.chain(rounded, optax_optimizer(recipe))

    return optimizer


def rounded_parameters(recipe: Recipe) -> optax.GradientTransformation:
    """Keep the parameters in float32, as where they are cast after each step."""
    rounded = optax.stateless(
        lambda u, p: jax.tree.map(lambda u, p: (p + u).astype(jnp.float32).astype(p.dtype) - p, u, p)
    )
    return optax.chain(optax_optimizer(recipe), rounded)


def counting_twice(recipe: Recipe) -> optax.GradientTransformation:
    tx = optax_optimizer(recipe)

    def update(gradients: Any, state: Any, params: Any) -> Any:
        updates, state = tx.update(gradients, state, params)
        return updates, (state[0]._replace(count=state[0].count + 1), *state[1:])

    return optax.GradientTransformation(tx.init, update)


def warm(step: int) -> float:
    return min(1.0, (step + 1) / 4)


def sign_of_momentum(recipe: Recipe) -> optax.GradientTransformation:
    return optax.lion(recipe.lr, recipe.b1, recipe.b2)


def with_noise(recipe: Recipe) -> optax.GradientTransformation:
    return optax.chain(optax.add_noise(1e-3, 0.55, jax.random.key(0)), optax_optimizer(recipe))


def twice_as_fast(name: str) -> Optimizer:
    """Another learning rate for one parameter."""

    def optimizer(recipe: Recipe) -> optax.GradientTransformation:
        scale = optax.stateless(lambda u, p: {n: 2 * x if n == name else x for n, x in u.items()})
        return optax.chain(optax_optimizer(recipe), scale)

    return optimizer


def limited_update(recipe: Recipe) -> optax.GradientTransformation:
    """Clip the update instead of the gradient."""
    return optax.chain(optax_optimizer(recipe), optax.clip_by_global_norm(0.05))


def with_trust_ratio(recipe: Recipe) -> optax.GradientTransformation:
    return optax.lamb(recipe.lr, recipe.b1, recipe.b2, recipe.eps, weight_decay=recipe.weight_decay)


def with_centralized_gradients(recipe: Recipe) -> optax.GradientTransformation:
    return optax.chain(optax.centralize(), optax_optimizer(recipe))


def with_rectification(recipe: Recipe) -> optax.GradientTransformation:
    return optax.chain(optax.scale_by_radam(recipe.b1, recipe.b2, recipe.eps), optax.scale_by_learning_rate(recipe.lr))


BIASES = ("layers.0.bias", "layers.1.bias")
FIRST, SECOND = "first moment", "second moment"

MISTAKES = [
    Mistake("other initial values", "initialization", 1, "parameters before training", seed=3),
    Mistake("batches shifted by one", "data order", 1, "loss", change={"offset": 1}),
    Mistake("dropout left on", "randomness", 1, "loss", change={"dropout": 0.2}),
    Mistake("padding counts in the loss", "loss mask", 1, "loss", TOKENS, {"ignores": False}, per_token=True),
    Mistake("mean over padding too", "loss reduction", 1, "loss", TOKENS, {"reduction": "all"}, per_token=True),
    Mistake("sum for mean", "loss reduction", 1, "loss", change={"reduction": "sum"}, values=(1.0, 8.0)),
    Mistake("sum for mean of counted labels", "loss reduction", 1, "loss", TOKENS, {"reduction": "sum"}),
    Mistake(
        "clipping forgotten", "gradient clipping", 1, FIRST, replace(MLP, clip=0.3), {"clip": None}, values=(0.3, None)
    ),
    Mistake(
        "clipped to half", "gradient clipping", 1, FIRST, replace(MLP, clip=0.3), {"clip": 0.15}, values=(0.3, 0.15)
    ),
    Mistake("clipped by value", "gradient clipping", 1, FIRST, optimizer=clipped_by_value),
    Mistake("SGD, clipping forgotten", "gradient clipping", 1, "momentum", replace(SGD, clip=0.3), {"clip": None}),
    Mistake(
        *(
            "microbatches not divided",
            "gradient accumulation",
            1,
            FIRST,
            replace(MLP, microbatches=2),
            {"divides": False},
        ),
        values=(1.0, 2.0),
    ),
    Mistake("microbatches divided twice", "gradient accumulation", 1, FIRST, optimizer=scaled_gradients(0.25)),
    Mistake("learning rate", "learning rate", 1, "update", change={"lr": 1.1e-2}, values=(1e-2, 1.1e-2)),
    Mistake("SGD, learning rate", "learning rate", 1, "update", SGD, {"lr": 0.2}, values=(0.1, 0.2)),
    Mistake(
        *("warm-up one step late", "learning rate schedule", 1, "update", replace(MLP, schedule=warm)),
        {"schedule": lambda step: warm(step - 1)},
    ),
    Mistake(
        *("warm-up one step early", "learning rate schedule", 1, "update", replace(MLP, schedule=warm)),
        {"schedule": lambda step: warm(step + 1)},
    ),
    Mistake(
        *("decay begins early", "learning rate schedule", 3, "update"),
        change={"schedule": lambda step: 1.0 if step < 2 else 0.5},
    ),
    Mistake("epsilon 1e-6", "epsilon", 1, "update", change={"eps": 1e-6}, values=(1e-8, 1e-6)),
    Mistake(
        *("epsilon inside the root", "epsilon", 1, "update"),
        optimizer=lambda r: optax.adamw(r.lr, r.b1, r.b2, 0.0, r.eps, weight_decay=r.weight_decay),
        values=(1e-8, 1e-8),
    ),
    Mistake("epsilon not corrected", "epsilon", 1, "update", optimizer=adam_with(epsilon_before_correction)),
    Mistake("b1 0.8", "betas", 1, FIRST, change={"b1": 0.8}, values=(0.9, 0.8)),
    Mistake("b2 0.999", "betas", 1, SECOND, change={"b2": 0.999}, values=(0.95, 0.999)),
    Mistake("momentum 0.8", "betas", 2, "momentum", SGD, {"momentum": 0.8}),
    Mistake("no bias correction", "bias correction", 1, "update", optimizer=adam_with(no_correction)),
    Mistake("no bias correction of v", "bias correction", 1, "update", optimizer=adam_with(no_correction_of_v)),
    Mistake("optax's own weight decay", "weight decay", 1, "update", change={"weight_decay": 1e-4}, values=(0.1, 1e-4)),
    Mistake("biases not decayed", "weight decay", 1, "update", change={"decay_biases": False}, names=BIASES),
    Mistake(
        "biases decayed",
        "weight decay",
        1,
        "update",
        replace(MLP, decay_biases=False),
        {"decay_biases": True},
        names=BIASES,
    ),
    Mistake("L2 for decoupled decay", "weight decay", 1, FIRST, change={"optimizer": "adam"}),
    Mistake("SGD without decay", "weight decay", 1, "momentum", SGD, {"weight_decay": 0.0}),
    Mistake("AMSGrad", "amsgrad", 2, "update", change={"amsgrad": True}),
    Mistake("Nesterov's Adam", "nesterov", 1, "update", change={"nesterov": True}),
    Mistake("SGD, Nesterov", "nesterov", 1, "update", SGD, {"nesterov": True}),
    Mistake(
        "average decays at another rate",
        "average",
        1,
        "average",
        replace(MLP, ema=0.9),
        {"ema": 0.99},
        values=(0.9, 0.99),
    ),
    Mistake("average before the step", "average", 1, "average", replace(MLP, ema=0.9), {"ema_before": True}),
    Mistake("average with bias correction", "average", 1, "average", replace(MLP, ema=0.9), {"ema_debias": True}),
    Mistake("first moment in bfloat16", "dtype", 1, FIRST, optimizer=narrow_moments),
    Mistake("gradients in float16", "dtype", 1, FIRST, optimizer=rounded_gradients(jnp.float16)),
    Mistake("gradients in bfloat16", "dtype", 1, FIRST, optimizer=rounded_gradients(jnp.bfloat16)),
    Mistake("parameters in float32", "dtype", 1, "update", optimizer=rounded_parameters),
    Mistake(
        *("a bias not given to the optimizer", "frozen parameter", 1, FIRST),
        change={"frozen": "layers.0.bias"},
        place="layers.0.bias",
        names=("layers.0.bias",),
    ),
    Mistake(
        *("head not tied", "tied weights", 1, FIRST, replace(TOKENS, tied=True), {"tied": False}),
        names=("embed.weight", "head.weight"),
    ),
    Mistake("step counted twice", "step count", 1, "step count", optimizer=counting_twice, values=(1, 2)),
]


UNKNOWN = [
    Mistake("one learning rate doubled", "unknown", 1, "update", optimizer=twice_as_fast("head.weight")),
    Mistake("the update clipped", "unknown", 1, "update", optimizer=limited_update),
    Mistake("LAMB for AdamW", "unknown", 1, "update", optimizer=with_trust_ratio),
    Mistake("RAdam for AdamW", "unknown", 1, "update", optimizer=with_rectification),
    Mistake("Lion for AdamW", "unknown", 1, FIRST, optimizer=sign_of_momentum),
    Mistake("gradients centralized", "unknown", 1, FIRST, optimizer=with_centralized_gradients),
    Mistake("gradients with noise", "unknown", 1, FIRST, optimizer=with_noise),
    Mistake("loss scale of 1024 not undone", "unknown", 1, FIRST, optimizer=scaled_gradients(1024.0)),
    Mistake("gradients scaled by 0.3", "unknown", 1, FIRST, optimizer=scaled_gradients(0.3)),
    Mistake("hidden units standardized", "unknown", 1, "loss", change={"standardize": True}),
    Mistake("padding counts, without losses per token", "unknown", 1, "loss", TOKENS, {"ignores": False}),
    Mistake("two mistakes in the update", "unknown", 1, "update", change={"lr": 2e-2, "eps": 1e-5}),
    Mistake("two mistakes in the first moment", "unknown", 1, FIRST, change={"b1": 0.8, "optimizer": "adam"}),
]
"""Mistakes of other kinds, and several at once. No kind that is listed may be named for them."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", default="float64", choices=("float64", "float32"))
    parser.add_argument("--evidence", action="store_true", help="print the evidence too")
    arguments = parser.parse_args()
    table = Table("mistake", "kind", "diagnosis", "first difference")
    verdicts: Counter[str] = Counter()
    for mistake in [*MISTAKES, *UNKNOWN]:
        result = compare(mistake, arguments.dtype)
        kind = "not detected" if result.diagnosis is None else result.diagnosis.kind
        verdicts["right" if kind == mistake.kind else kind if kind in ("unknown", "not detected") else "wrong"] += 1
        table.add_row(mistake.name, mistake.kind, kind, str(result.departure or result.problem or ""))
        if arguments.evidence and result.diagnosis is not None:
            for sentence in result.diagnosis.evidence:
                table.add_row("", "", "", f"  {sentence}")
    Console(width=np.iinfo(np.int16).max if arguments.evidence else 120).print(table)
    print(
        f"{len(MISTAKES) + len(UNKNOWN)} mistakes in {arguments.dtype}: "
        + ", ".join(f"{n} {what}" for what, n in verdicts.items())
    )


if __name__ == "__main__":
    main()
