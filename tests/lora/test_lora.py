"""LoRA in the model: the branch, its gradients, the merge, and the exchange with PEFT's adapters."""

from __future__ import annotations

import functools
import warnings
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.models import SMALLEST, random_checkpoint, random_ids, random_state
from support.peft_adapters import model_of_transformers

import bridge
from bridge import CheckpointError, ConversionError, GPT2Config, LoRA
from gpt2_jax import (
    GPT2,
    LoRAConfig,
    MultiHeadAttention,
    adapter_from_lora,
    generate,
    lora_from_adapter,
    lora_init,
    merge_lora,
    summed_loss,
)
from gpt2_jax.lora.config import PROJECTIONS
from gpt2_jax.model import Projection

FLOAT32 = 2e-5
"""Of logits of about 5: the merged product rounds differently."""
CONFIG = GPT2Config(vocab_size=61, n_positions=20, n_embd=24, n_layer=2, n_head=2, n_inner=40)
LORA = LoRAConfig(rank=4, alpha=12.0, targets="all-linear")
pytestmark = pytest.mark.usefixtures("quick_compilation")
needs_peft = pytest.mark.skipif(find_spec("peft") is None, reason="needs peft, which is not installed")


def adapted(scan: bool = False, config: LoRAConfig = LORA) -> tuple[GPT2, Any, Any]:
    """Return a model, its parameters, and an adapter whose B is not zero."""
    model = GPT2(CONFIG, scan=scan, lora=config)
    params = jax.tree.map(jnp.asarray, bridge.to_flax(random_state(CONFIG), CONFIG, stacked=scan))
    lora = jax.tree.map(lambda x: x + 0.05 * jnp.sin(jnp.arange(x.size)).reshape(x.shape), initial(model))
    return model, params, lora


def initial(model: GPT2) -> Any:
    return jax.jit(lora_init, static_argnums=1)(jax.random.key(0), model)


@functools.partial(jax.jit, static_argnums=0)
def logits(model: GPT2, params: Any, ids: Any, lora: Any = None) -> jax.Array:
    return model.apply({"params": params} if lora is None else {"params": params, "lora": lora}, ids)


@functools.partial(jax.jit, static_argnums=0)
def loss(model: GPT2, params: Any, lora: Any, key: Any = None) -> jax.Array:
    return summed_loss(model, params, batch(), key, lora=lora)


def batch() -> dict[str, Any]:
    ids = random_ids(CONFIG).astype(np.int32)
    return {"input_ids": ids, "labels": np.roll(ids, -1, axis=1)}


@pytest.mark.parametrize(
    ("targets", "modules"),
    [
        ("c_attn", ("attn.c_attn",)),
        ("c_proj", ("attn.c_proj", "mlp.c_proj")),
        ("mlp.c_proj, c_attn", ("attn.c_attn", "mlp.c_proj")),
        ("all-linear", PROJECTIONS),
    ],
)
def test_targets_name_modules_as_in_peft(targets: str, modules: tuple[str, ...]) -> None:
    assert LoRAConfig(targets=targets).modules == modules
    assert LoRAConfig(targets=targets).unknown_targets == ()


def test_the_scaling_is_pefts() -> None:
    assert LoRAConfig(rank=16, alpha=8).scaling == 0.5
    assert LoRAConfig(rank=16, alpha=8, rslora=True).scaling == 2.0


def test_the_initial_adapter_changes_nothing_and_is_pefts() -> None:
    model, params, _ = adapted(scan=True)
    lora = initial(model)
    ids = batch()["input_ids"]
    expected = logits(model.clone(lora=None), params, ids)
    np.testing.assert_array_equal(logits(model, params, ids, lora), expected)
    a, other = lora["h"]["attn"]["c_attn"]["a"]
    bound = 1 / np.sqrt(CONFIG.n_embd)
    assert a.shape == (24, 4) and 0.9 * bound < np.abs(a).max() <= bound
    assert not np.array_equal(a, other)


@pytest.mark.thorough
def test_the_initial_values_do_not_depend_on_the_form() -> None:
    layers, stacked = (initial(GPT2(CONFIG, scan=scan, lora=LORA)) for scan in (False, True))
    for i in range(CONFIG.n_layer):
        for own, all_layers in zip(*map(jax.tree.leaves, (layers[f"h_{i}"], stacked["h"])), strict=True):
            np.testing.assert_array_equal(own, all_layers[i])


@pytest.mark.parametrize("scan", [pytest.param(False, marks=pytest.mark.thorough), True], ids=["loop", "scan"])
def test_the_merged_model_equals_the_adapted_one(scan: bool) -> None:
    model, params, lora = adapted(scan)
    ids = batch()["input_ids"]
    plain = model.clone(lora=None)
    expected = logits(plain, merge_lora(params, lora, LORA), ids)
    np.testing.assert_allclose(logits(model, params, ids, lora), expected, rtol=0, atol=FLOAT32)
    assert np.abs(expected - logits(plain, params, ids)).max() > 0.5


def test_the_gradient_of_the_branch_is_that_of_the_merged_weights(x64: None) -> None:
    model, params, lora = adapted(scan=True)
    model = model.clone(dtype=jnp.float64, remat="dots")
    params, lora = (jax.tree.map(lambda x: x.astype(jnp.float64), tree) for tree in (params, lora))
    plain = model.clone(lora=None)

    @jax.jit
    def gradients(lora: Any) -> Any:
        branch = jax.grad(lambda lora: summed_loss(model, params, batch(), lora=lora))(lora)
        return branch, jax.grad(lambda lora: summed_loss(plain, merge_lora(params, lora, LORA), batch()))(lora)

    for found, expected in zip(*map(jax.tree.leaves, gradients(lora)), strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-11 * np.abs(expected).max())


def test_gradients_of_frozen_weights_are_not_computed() -> None:
    """A step with an adapter has about two thirds of the operations: forward, and gradients of activations."""
    model = GPT2(replace(CONFIG, n_layer=1), lora=LoRAConfig(rank=1))
    params = jax.eval_shape(model.clone(lora=None).init, jax.random.key(0), batch()["input_ids"])["params"]
    lora = jax.eval_shape(lambda: initial(model))

    def flops(loss: Any, argument: Any) -> float:
        gradient = jax.jit(jax.grad(loss, argument)).lower(params, lora)
        return float(gradient.compile().cost_analysis()["flops"])

    full = flops(lambda params, _: summed_loss(model.clone(lora=None), params, batch()), 0)
    adapter = flops(lambda params, lora: summed_loss(model, params, batch(), lora=lora), 1)
    assert adapter < 0.75 * full


def test_dropout_scales_what_it_keeps() -> None:
    config = LoRAConfig(rank=2, alpha=2, dropout=0.25)
    layer = Projection((400, 3), 0.0, use_bias=False, lora=config)
    a = jnp.zeros((400, 2)).at[:, 0].set(1.0)
    variables = {
        "params": {"kernel": jnp.zeros((400, 3))},
        "lora": {"a": a, "b": jnp.ones((2, 3))},
    }
    x = jnp.ones((50, 400))
    np.testing.assert_array_equal(layer.apply(variables, x), 400.0)
    y = layer.apply(variables, x, deterministic=False, rngs={"dropout": jax.random.key(0)})
    np.testing.assert_array_equal(y, y[:, :1] * jnp.ones(3))
    np.testing.assert_allclose(y * 0.75, jnp.round(y * 0.75), atol=1e-3)  # each kept input counts 1 / 0.75
    assert abs(float(y.mean()) - 400) < 3 and 5 < float(y[:, 0].std()) < 20


@pytest.mark.thorough
def test_dropout_needs_no_other_dropout() -> None:
    model, params, lora = adapted(config=replace(LORA, dropout=0.5))
    whole, first, second = (loss(model, params, lora, key) for key in (None, jax.random.key(1), jax.random.key(2)))
    assert len({float(whole), float(first), float(second)}) == 3


@pytest.mark.thorough
def test_cross_attention_has_the_same_branch() -> None:
    layer = MultiHeadAttention(CONFIG, lora=LORA)
    _, params, lora = adapted()
    variables = {"params": params["h_0"]["attn"], "lora": lora["h_0"]["attn"]}
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 24)).astype(np.float32))
    same = jax.jit(lambda x: layer.apply(variables, x, x, x))(x)
    np.testing.assert_allclose(
        jax.jit(lambda x: layer.apply(variables, x, x + 0, x + 0))(x), same, rtol=0, atol=FLOAT32
    )


def test_a_missing_or_unexpected_adapter_is_an_error() -> None:
    model, params, lora = adapted()
    ids = batch()["input_ids"]
    with pytest.raises(ValueError, match=r'apply it to \{"params": params, "lora": lora\}'):
        model.apply({"params": params}, ids)
    with pytest.raises(ValueError, match="the model has no lora"):
        model.clone(lora=None).apply({"params": params, "lora": lora}, ids)
    with pytest.raises(ValueError, match="merge the adapter"):
        generate(model, params, ids[:, :3], max_new_tokens=1)
    with pytest.raises(ValueError, match="stack both"):
        merge_lora(params, adapted(scan=True)[2], LORA)


@pytest.mark.parametrize(
    "settings", [{"rank": 0}, {"dropout": 1.0}, {"targets": "q_proj"}, {"targets": ""}, {"alpha": float("nan")}]
)
def test_invalid_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="needs rank >= 1"):
        lora_init(jax.random.key(0), GPT2(CONFIG, lora=replace(LORA, **settings)))


# Adapters in PEFT's format


@pytest.mark.parametrize("scan", [False, True], ids=["loop", "scan"])
def test_an_adapter_is_written_and_read_as_it_was(tmp_path: Path, scan: bool) -> None:
    _, params, lora = adapted(scan)
    bridge.save_lora(adapter_from_lora(lora, LORA), tmp_path / "adapter", base_model="base")
    adapter = bridge.load_lora(tmp_path / "adapter")
    config, read = lora_from_adapter(adapter, CONFIG, scan=scan)
    assert config == replace(LORA, targets=",".join(PROJECTIONS))
    assert jax.tree.structure(read) == jax.tree.structure(lora)
    jax.tree.map(np.testing.assert_array_equal, read, lora)
    merged = bridge.to_flax(bridge.merge_lora(random_checkpoint(CONFIG), adapter).tensors, CONFIG, stacked=scan)
    for found, expected in zip(*map(jax.tree.leaves, (merge_lora(params, lora, LORA), merged)), strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


@needs_peft
def test_peft_computes_the_same_logits_with_the_adapter(tmp_path: Path) -> None:
    import peft
    import torch

    model, params, lora = adapted(scan=True)
    bridge.save_lora(adapter_from_lora(lora, LORA), tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the name of the base
        theirs = peft.PeftModel.from_pretrained(model_of_transformers(CONFIG), tmp_path / "adapter")
    ids = batch()["input_ids"]
    with torch.no_grad():
        expected = theirs(torch.tensor(ids)).logits.numpy()
    np.testing.assert_allclose(logits(model, params, ids, lora), expected, rtol=0, atol=FLOAT32)


def test_an_adapter_that_cannot_be_trained_further_is_refused() -> None:
    def pair(rank: int, n_in: int = 8, n_out: int = 24) -> tuple[np.ndarray, np.ndarray]:
        return np.ones((rank, n_in), np.float32), np.ones((n_out, rank), np.float32)

    one_layer = LoRA.of({"h.0.attn.c_attn": pair(2)}, alpha=4)
    two_ranks = LoRA.of({"h.0.attn.c_attn": pair(2), "h.1.attn.c_attn": pair(3)}, alpha=4)
    embedding = LoRA.of({"wte": pair(2)}, alpha=4)
    wrong_size = LoRA.of({f"h.{i}.attn.c_attn": pair(2, 9) for i in range(2)}, alpha=4)
    for adapter, message in (
        (one_layer, "the same modules in every layer"),
        (two_ranks, "several ranks or alphas"),
        (embedding, "merge it into its base"),
        (wrong_size, r"A has shape \(2, 9\)"),
    ):
        with pytest.raises(ConversionError, match=message):
            lora_from_adapter(adapter, SMALLEST)


def test_a_directory_without_an_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no LoRA adapter"):
        bridge.load_lora(tmp_path)
