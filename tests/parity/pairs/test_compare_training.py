"""`compare_training` passes correct pairs of trainers, and reports what cannot be compared."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from flax.training.train_state import TrainState
from parity.pairs.recipes import Recipe, batches, train_in_jax, train_in_torch
from rich.console import Console
from support.models import SMALLEST, random_checkpoint, random_ids

import bridge
import gpt2_jax
import gpt2_torch
from bridge import BridgeError
from gpt2_jax.parity.pairs.matching.match import Match, MatchError
from gpt2_jax.parity.pairs.training.compare import compare_training
from gpt2_jax.parity.pairs.training.optax_trainer import optax_trainer
from gpt2_jax.parity.pairs.training.result import TrainingComparison
from gpt2_jax.parity.pairs.training.torch_trainer import torch_trainer
from gpt2_jax.parity.pairs.training.trainers import Step, Trainer


def warm(step: int) -> float:
    return min(1.0, step / 3)


CORRECT = {
    "AdamW": Recipe(),
    "Adam with L2": Recipe(optimizer="adam"),
    "AdamW with amsgrad off and clipping": Recipe(clip=0.3),
    "AdamW with a warm-up from zero": Recipe(schedule=warm),
    "AdamW with accumulation": Recipe(microbatches=4),
    "AdamW with an average": Recipe(ema=0.9),
    "AdamW with an average and bias correction": Recipe(ema=0.9, ema_debias=True),
    "AdamW without decay of biases": Recipe(decay_biases=False),
    "AdamW with a frozen parameter": Recipe(frozen="layers.0.bias"),
    "AdamW with gradients that are noise": Recipe(standardize=True),
    "SGD": Recipe(optimizer="sgd", lr=0.1, momentum=0.0, weight_decay=1e-3),
    "SGD with momentum": Recipe(optimizer="sgd", lr=0.1, clip=1.0, weight_decay=1e-3),
    "SGD with Nesterov's momentum": Recipe(optimizer="sgd", lr=0.1, nesterov=True),
    "masked tokens": Recipe(kind="tokens"),
    "masked tokens, tied, all together": Recipe(
        kind="tokens", tied=True, clip=0.5, schedule=warm, microbatches=2, ema=0.99, decay_biases=False
    ),
}


def compare(left: Recipe, right: Recipe, **kwargs: Any) -> TrainingComparison:
    data = batches(left)
    with jax.enable_x64(left.dtype == "float64"):
        return compare_training(train_in_torch(left, data), train_in_jax(right, data), range(len(data)), **kwargs)


@pytest.mark.sampled(5)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", CORRECT)
def test_a_correct_pair_passes(name: str, dtype: str) -> None:
    recipe = replace(CORRECT[name], dtype=dtype)
    result = compare(recipe, recipe)
    assert result.passed, (result.departure, result.diagnosis, result.problem)
    assert result.dtype == dtype
    assert result.departure is None and result.diagnosis is None and result.problem is None
    names = [check.name for check in result.report.checks]
    assert {"names", "loss", "update"} <= {*names}
    assert ("average" in names) == (recipe.ema is not None)
    assert result.losses[0] == pytest.approx(result.losses[1], rel=1e-12 if dtype == "float64" else 1e-5)


def test_gradients_are_compared_where_both_sides_know_them() -> None:
    recipe = Recipe(records=True)
    right = compare(recipe, recipe)
    assert right.passed and "gradient" in [check.name for check in right.report.checks]
    wrong = compare(replace(recipe, clip=0.3), recipe)
    assert wrong.departure is not None and wrong.departure.quantity == "gradient"
    assert wrong.diagnosis is not None and wrong.diagnosis.kind == "gradient clipping"


def test_the_result_is_json_and_a_table() -> None:
    result = compare(Recipe(), Recipe(eps=1e-4))
    found = json.loads(json.dumps(result.to_json()))
    assert found["departure"]["step"] == 1 and found["departure"]["quantity"] == "update"
    assert found["diagnosis"]["kind"] == "epsilon" and not found["passed"]
    assert found["losses"] == [[*side] for side in result.losses]
    console = Console(width=200, record=True, file=io.StringIO())
    result.show(console)
    text = console.export_text()
    assert "first divergence at step 1, update of" in text and "Diagnosis: epsilon" in text
    assert "NOT the same training. Failed: update." in text


class Scripted(Trainer):
    """A trainer with one parameter that returns what a test tells it to."""

    def __init__(self, make: Callable[[int, np.ndarray], Step], name: str = "scripted") -> None:
        self.name, self.make, self.count, self.w = name, make, 0, np.ones(3)

    def parameters(self) -> dict[str, np.ndarray]:
        return {"w": self.w}

    def step(self, batch: Any) -> Step:
        self.count += 1
        step = self.make(self.count, self.w)
        self.w = step.parameters.get("w", self.w)
        return step


def descend(count: int, w: np.ndarray) -> Step:
    return Step(float(w.sum()), {"w": w - 0.1 * np.arange(1.0, 4.0)}, {})


def raise_at_two(count: int, w: np.ndarray) -> Step:
    if count == 2:
        raise RuntimeError("out of memory")
    return descend(count, w)


def nan_loss_at_two(count: int, w: np.ndarray) -> Step:
    return Step(float("nan") if count == 2 else float(w.sum()), descend(count, w).parameters, {})


def infinite_parameter(count: int, w: np.ndarray) -> Step:
    return Step(float(w.sum()), {"w": w / 0 if count == 2 else descend(count, w).parameters["w"]}, {})


def other_shape(count: int, w: np.ndarray) -> Step:
    return Step(float(w.sum()), {"w": np.ones(4)} if count == 2 else descend(count, w).parameters, {})


def no_parameter(count: int, w: np.ndarray) -> Step:
    return Step(float(w.sum()), {} if count == 2 else descend(count, w).parameters, {})


@pytest.mark.filterwarnings("ignore:divide by zero")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (raise_at_two, "RuntimeError: 'out of memory'"),
        (nan_loss_at_two, "the loss is nan"),
        (infinite_parameter, "values are not finite:\n  - w"),
        (other_shape, "parameters are missing or have other shapes after the step:\n  - w"),
        (no_parameter, "parameters are missing or have other shapes after the step:\n  - w"),
    ],
)
@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_a_side_that_fails_is_reported_by_side_and_step(
    make: Callable[[int, np.ndarray], Step], message: str, side: str
) -> None:
    left = Scripted(make if side != "right" else descend, "left")
    right = Scripted(make if side != "left" else descend, "right")
    result = compare_training(left, right, range(4))
    assert not result.passed and result.departure is None
    assert result.problem is not None
    assert (result.problem.side, result.problem.step) == ("left" if side == "both" else side, 2)
    assert result.problem.message == message
    assert not json.loads(json.dumps(result.to_json()))["passed"]


def test_trainers_without_more_than_a_step_can_be_compared() -> None:
    assert compare_training(Scripted(descend), Scripted(descend), range(3)).passed
    result = compare_training(
        Scripted(descend), Scripted(lambda count, w: Step(float(w.sum()), {"w": w - 0.2}, {})), range(3)
    )
    assert result.departure is not None and result.departure.quantity == "update"
    assert result.diagnosis is not None and result.diagnosis.kind == "unknown"


def linear_step(optimizer: optax.GradientTransformation) -> Callable[..., Any]:
    @jax.jit
    def step(params: Any, state: Any, batch: Any) -> Any:
        loss, gradients = jax.value_and_grad(lambda p: ((batch[0] @ p["w"] + p["b"] - batch[1]) ** 2).mean())(params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss

    return step


def linear_data(dtype: Any = np.float32) -> tuple[dict[str, Any], list[tuple[np.ndarray, np.ndarray]]]:
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(4, 3)), dtype), "b": jnp.asarray(rng.normal(size=3), dtype)}
    return params, [(rng.normal(size=(6, 4)).astype(dtype), rng.normal(size=(6, 3)).astype(dtype)) for _ in range(4)]


def test_a_step_may_donate_its_arguments_and_change_its_batch_by_copy() -> None:
    params, data = linear_data()
    optimizer = optax.adam(1e-2)
    donating = jax.jit(linear_step(optimizer), donate_argnums=(0, 1))
    sides = [optax_trainer(params, optimizer.init(params), step) for step in (donating, linear_step(optimizer))]
    assert compare_training(sides[0], sides[1], data).passed
    assert params["w"].sum() == params["w"].sum()  # the caller's arrays are not donated


def test_a_flax_train_state_is_one_line() -> None:
    params, data = linear_data()
    optimizer = optax.adamw(1e-2)
    state = TrainState.create(apply_fn=None, params=params, tx=optimizer)

    @jax.jit
    def train_step(state: TrainState, batch: Any) -> Any:
        loss, gradients = jax.value_and_grad(lambda p: ((batch[0] @ p["w"] + p["b"] - batch[1]) ** 2).mean())(
            state.params
        )
        return state.apply_gradients(grads=gradients), loss

    def step(params: Any, state: TrainState, batch: Any) -> Any:
        state, loss = train_step(state, batch)
        return state.params, state, loss

    left = optax_trainer(state.params, state, step, name="TrainState")
    right = optax_trainer(params, optimizer.init(params), linear_step(optimizer))
    result = compare_training(left, right, data)
    assert result.passed, result.departure
    assert {"first moment", "second moment", "step count"} <= {check.name for check in result.report.checks}


class Linear(nnx.Module):
    def __init__(self, params: Any) -> None:
        self.w, self.b = nnx.Param(params["w"]), nnx.Param(params["b"])


def test_an_nnx_optimizer_is_one_line() -> None:
    params, data = linear_data()
    model = Linear(params)
    graph, state = nnx.split((model, nnx.Optimizer(model, optax.adamw(1e-2), wrt=nnx.Param)))

    def train_step(model: Linear, optimizer: nnx.Optimizer, batch: Any) -> Any:
        loss, gradients = nnx.value_and_grad(lambda m: ((batch[0] @ m.w[...] + m.b[...] - batch[1]) ** 2).mean())(model)
        optimizer.update(model, gradients)
        return loss

    @jax.jit
    def step(params: Any, state: Any, batch: Any) -> Any:
        model, optimizer = nnx.merge(graph, state)
        loss = train_step(model, optimizer, batch)
        return nnx.state(model, nnx.Param), nnx.state((model, optimizer)), loss

    left = optax_trainer(nnx.state(model, nnx.Param), state, step, name="nnx")
    optimizer = optax.adamw(1e-2)
    result = compare_training(
        left, optax_trainer(params, optimizer.init(params), linear_step(optimizer)), data, dtype="float32"
    )
    assert result.passed, result.departure
    assert {"first moment", "second moment", "step count"} <= {check.name for check in result.report.checks}


def test_states_are_found_in_chains_partitions_and_injected_hyperparameters() -> None:
    params, data = linear_data()
    plain = optax.adam(1e-2)
    nested = optax.chain(
        optax.clip_by_global_norm(1e6),
        optax.partition({"a": optax.inject_hyperparams(optax.adam)(1e-2), "b": optax.adam(1e-2)}, {"w": "a", "b": "b"}),
    )
    sides = [optax_trainer(params, tx.init(params), linear_step(tx)) for tx in (plain, nested)]
    assert {*sides[0].state()} == {*sides[1].state()}
    step = optax_trainer(params, nested.init(params), linear_step(nested)).step(data[0])
    assert step.settings["learning_rate"] == pytest.approx(1e-2)
    result = compare_training(sides[0], sides[1], data)
    assert result.passed, result.departure


def gpt2_trainers(optimizer: optax.GradientTransformation) -> tuple[Trainer, Trainer, list[np.ndarray]]:
    """GPT-2 with AdamW of both packages. The sides have other names, and the Flax tree other shapes."""
    config = SMALLEST
    checkpoint = random_checkpoint(config, np.float64)
    module = gpt2_torch.model_from_checkpoint(checkpoint).double()
    torch_optimizer = torch.optim.AdamW(module.parameters(), 1e-2, (0.9, 0.95), 1e-8, weight_decay=0.1)

    def torch_step(ids: np.ndarray) -> torch.Tensor:
        torch_optimizer.zero_grad()
        loss = gpt2_torch.next_token_loss(module(torch.tensor(ids)), torch.tensor(ids))
        loss.backward()
        torch_optimizer.step()
        return loss

    model = gpt2_jax.GPT2(config, jnp.float64, jnp.float64)
    params = jax.tree.map(jnp.asarray, bridge.to_flax(checkpoint.tensors, config))

    @jax.jit
    def jax_step(params: Any, state: Any, ids: Any) -> Any:
        def loss_fn(params: Any) -> Any:
            return gpt2_jax.next_token_loss(model.apply({"params": params}, ids), ids)

        loss, gradients = jax.value_and_grad(loss_fn)(params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss

    data = [random_ids(config, 3, 5, seed) for seed in range(4)]
    left = torch_trainer(module, torch_optimizer, torch_step)
    return left, optax_trainer(params, optimizer.init(params), jax_step), data


def adamw(**changed: Any) -> optax.GradientTransformation:
    return optax.adamw(**{"learning_rate": 1e-2, "b1": 0.9, "b2": 0.95, "eps": 1e-8, "weight_decay": 0.1, **changed})


def without_biases(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key != "bias", params)


def _reshaped(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return array.reshape(shape)


def gpt2_names() -> list[Match]:
    """The Flax tree splits the axes of the canonical layout, and keeps their order."""
    return [
        Match(p.torch_name, ".".join(p.flax_path), partial(_reshaped, shape=p.torch_shape), "axes are split")
        for p in bridge.parameters(SMALLEST)
    ]


@pytest.mark.usefixtures("x64")
@pytest.mark.thorough
@pytest.mark.parametrize(
    ("optimizer", "kind"),
    [
        (adamw(), None),
        (adamw(weight_decay=1e-4), "weight decay"),
        (adamw(nesterov=True), "nesterov"),
        (adamw(eps=0.0, eps_root=1e-8), "epsilon"),
        (adamw(mask=without_biases), "weight decay"),
    ],
    ids=["right", "optax's own weight decay", "Nesterov momentum", "epsilon inside the root", "biases not decayed"],
)
def test_gpt2_passes_and_the_mistakes_of_verify_in_training_have_a_kind(
    optimizer: optax.GradientTransformation, kind: str | None
) -> None:
    left, right, data = gpt2_trainers(optimizer)
    result = compare_training(left, right, data, names=gpt2_names())
    assert result.problem is None
    assert (None if result.diagnosis is None else result.diagnosis.kind) == kind, (result.departure, result.diagnosis)
    assert result.passed == (kind is None)
    if kind is None:  # the bias of the keys has no true gradient
        assert result.report.details["elements whose gradient is rounding noise, not compared"] >= 2 * SMALLEST.n_embd


def test_an_unmatched_parameter_fails_the_check_of_names() -> None:
    params, data = linear_data()
    optimizer = optax.sgd(0.1)

    def step(params: Any, state: Any, batch: Any) -> Any:
        inner, state, loss = linear_step(optimizer)({"w": params["w"], "b": params["b"]}, state, batch)
        return {**params, **inner}, state, loss

    extra = {**params, "unused": jnp.zeros(7)}
    result = compare_training(
        optax_trainer(extra, optimizer.init(params), step),
        optax_trainer(params, optimizer.init(params), linear_step(optimizer)),
        data,
        names={"w": "w", "b": "b"},
    )
    assert not result.passed and result.departure is None
    (check,) = [check for check in result.report.checks if not check.passed]
    assert check.name == "names" and check.measurements[0].location == "unused"


def test_names_are_validated() -> None:
    with pytest.raises(MatchError, match="'q' is not a name of the left side"):
        compare_training(Scripted(descend), Scripted(descend), range(2), names={"q": "w"})
    with pytest.raises(MatchError, match="transformed to"):
        match = Match("w", "w", lambda x: x[:2], "half of it")
        compare_training(Scripted(descend), Scripted(descend), range(2), names=[match])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"batches": []}, "at least one batch"),
        ({"batches": [0], "dtype": "bfloat16"}, "is not one of float64, float32"),
    ],
)
def test_arguments_are_validated(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(BridgeError, match=message):
        compare_training(Scripted(descend), Scripted(descend), **kwargs)


def test_a_step_that_returns_no_loss_is_a_problem_with_a_remedy() -> None:
    params, data = linear_data()
    result = compare_training(
        optax_trainer(params, (), lambda params, state, batch: (params, state, jnp.ones(2)), name="vector"),
        optax_trainer(params, (), lambda params, state, batch: params, name="no tuple"),
        data,
    )
    assert result.problem is not None and result.problem.side == "vector"
    assert "the step must return a loss with one value" in result.problem.message


def test_the_torch_trainer_leaves_the_module_as_the_training_left_it() -> None:
    """Repeated steps for the diagnosis are undone."""
    recipe = Recipe(clip=0.3, ema=0.9)
    data = batches(recipe)
    alone = train_in_torch(recipe, data)
    for index in range(len(data)):
        last = alone.step(index)
    with jax.enable_x64(True):
        compared = train_in_torch(recipe, data)
        result = compare_training(compared, train_in_jax(replace(recipe, clip=None), data), range(len(data)))
    assert result.diagnosis is not None and result.diagnosis.kind == "gradient clipping"
    for name, array in compared.parameters().items():
        assert np.array_equal(array, last.parameters[name])
    for name, array in compared.state().items():
        assert np.array_equal(array, last.state[name]), name


def test_jax_against_jax_needs_no_torch() -> None:
    code = """
import sys; sys.modules["torch"] = None
import jax.numpy as jnp, numpy as np, optax, jax
from gpt2_jax.parity import compare_training, optax_trainer
def trainer(tx):
    def step(params, state, batch):
        loss, g = jax.value_and_grad(lambda p: ((p["w"] * batch) ** 2).sum())(params)
        updates, state = tx.update(g, state, params)
        return optax.apply_updates(params, updates), state, loss
    params = {"w": jnp.linspace(0.5, 2.0, 40)}
    return optax_trainer(params, tx.init(params), step)
batches = [np.linspace(1.0, 3.0, 40, dtype=np.float32) * k for k in (1, 2, 3)]
assert compare_training(trainer(optax.adam(0.1)), trainer(optax.adam(0.1)), batches).passed
result = compare_training(trainer(optax.adam(0.1)), trainer(optax.adam(0.2)), batches)
print(result.diagnosis.kind)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "learning rate", done.stderr
