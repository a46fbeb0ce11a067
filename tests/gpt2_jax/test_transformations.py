"""The model under JAX's transformations: forward mode, second derivatives, recorded outputs, meshes, and tables."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from support import eight_devices
from support.implementations import jax_model
from support.models import SMALLEST, TINY, random_checkpoint, random_ids

from bridge import IGNORE_INDEX, parameters
from gpt2_jax import GPT2, empty_cache, model_outputs, summed_loss
from gpt2_jax.ops import blockwise_attention
from gpt2_jax.ops.cross_entropy import cross_entropy, summed_cross_entropy
from gpt2_jax.parallel.sharding import MeshError

CONFIG = replace(TINY, n_layer=2)
IDS = random_ids(CONFIG, batch=2, length=9)
ROUNDING = 1e-11
"""Relative, in float64: sums of some thousand terms."""


def dot(a: Any, b: Any) -> jax.Array:
    return sum(jax.tree.leaves(jax.tree.map(jnp.vdot, a, b)), jnp.zeros(()))


def direction_like(params: Any) -> Any:
    return jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), params)


@pytest.mark.slow
@pytest.mark.parametrize("scan", [False, True], ids=["loop", "scan"])
def test_forward_mode_and_hessian_vector_products_of_the_loss(scan: bool, x64: None) -> None:
    model, params = jax_model(random_checkpoint(CONFIG, np.float64), scan=scan)
    direction = direction_like(params)
    batch = {"input_ids": jnp.asarray(IDS[:, :-1]), "labels": jnp.asarray(IDS[:, 1:])}
    loss = partial(summed_loss, model, batch=batch)

    @jax.jit
    def derivatives(params: Any) -> Any:
        slope, product = jax.jvp(lambda p: jax.jvp(loss, (p,), (direction,))[1], (params,), (direction,))
        gradient, column = jax.jvp(jax.grad(loss), (params,), (direction,))
        return slope, product, dot(gradient, direction), dot(column, direction)

    slope, product, expected_slope, expected_product = derivatives(params)
    np.testing.assert_allclose(slope, expected_slope, rtol=ROUNDING)
    np.testing.assert_allclose(product, expected_product, rtol=ROUNDING)


def full_attention(q: Any, k: Any, v: Any, segment_ids: Any) -> Any:
    T = q.shape[2]
    visible = jnp.tri(T, dtype=bool) & (segment_ids[:, None, :, None] == segment_ids[:, None, None])
    scores = jnp.einsum("BHTK,BHSK->BHTS", q, k)
    return jnp.einsum("BHTS,BHSK->BHTK", jax.nn.softmax(jnp.where(visible, scores, -jnp.inf)), v)


def second_derivatives(function: Callable[..., Any], given: tuple[Any, ...], directions: tuple[Any, ...]) -> Any:
    every = tuple(range(len(given)))

    def loss(*x: Any) -> Any:
        return jnp.sin(function(*x)).sum()

    tangent = jax.jvp(loss, given, directions)[1]
    forward_over_reverse = jax.jvp(jax.grad(loss, every), given, directions)[1]
    reverse_over_forward = jax.grad(lambda *x: jax.jvp(loss, x, directions)[1], every)(*given)
    return tangent, forward_over_reverse, reverse_over_forward


def test_second_derivatives_of_attention_by_blocks(monkeypatch: pytest.MonkeyPatch, x64: None) -> None:
    monkeypatch.setattr(blockwise_attention, "BLOCK", 3)
    given, directions = (tuple(np.random.default_rng(i).normal(size=(3, 2, 2, 7, 4))) for i in range(2))
    segments = jnp.array([[1, 1, 1, 1, 2, 2, 2], [1, 1, 2, 2, 2, 2, 3]])
    found, expected = (
        jax.jit(partial(second_derivatives, lambda *x, f=f: f(*x, segments)))(given, directions)
        for f in (blockwise_attention.causal_attention_by_blocks, full_attention)
    )
    jax.tree.map(partial(np.testing.assert_allclose, rtol=ROUNDING, atol=ROUNDING), found, expected)


def test_second_derivatives_of_the_summed_cross_entropy(x64: None) -> None:
    rng = np.random.default_rng(0)
    given, directions = ((rng.normal(size=(2, 5, 3)), rng.normal(size=(11, 3))) for _ in range(2))
    labels = jnp.asarray(rng.integers(0, 11, (2, 5))).at[0, 1].set(IGNORE_INDEX)

    def definition(hidden: Any, embedding: Any) -> Any:
        return cross_entropy(hidden @ embedding.T, labels).sum()

    written = partial(summed_cross_entropy, labels=labels, chunk_bytes=1)  # one position of every row in a chunk
    found, expected = (jax.jit(partial(second_derivatives, f))(given, directions) for f in (written, definition))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=ROUNDING, atol=ROUNDING), found, expected)


def test_scan_records_the_outputs_of_the_loop() -> None:
    checkpoint = random_checkpoint(CONFIG)
    recorded = {}
    for scan in (False, True):
        model, params = jax_model(checkpoint, scan=scan)
        _, state = jax.jit(partial(model.apply, capture_intermediates=True))({"params": params}, IDS)
        recorded[scan] = state["intermediates"]
    stacked = recorded[True].pop("h")
    layers = [recorded[False].pop(f"h_{i}") for i in range(CONFIG.n_layer)]
    expected = jax.tree.map(lambda *x: jnp.stack(x), *layers)
    for found, wanted in ((stacked, expected), (recorded[True], recorded[False])):
        jax.tree.map(partial(np.testing.assert_allclose, rtol=0, atol=1e-5), found, wanted)  # float32 of order 1


def test_the_outputs_of_stacked_layers_are_those_of_separate_layers() -> None:
    checkpoint = random_checkpoint(replace(CONFIG, scale_attn_by_inverse_layer_idx=True))
    models = (jax_model(checkpoint, scan=scan) for scan in (False, True))
    loop, scan = (jax.jit(partial(model_outputs, model))(params, IDS) for model, params in models)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=0, atol=1e-5), scan, loop)  # float32 of order 1


@pytest.mark.slow
def test_the_table_of_the_model_counts_operations() -> None:
    table = GPT2(SMALLEST).tabulate(jax.random.key(0), IDS[:, :4] % 11, compute_flops=True, compute_vjp_flops=True)
    total = next(line for line in table.splitlines() if "Total Parameters" in line)
    count = sum(math.prod(p.flax_shape) for p in parameters(SMALLEST))
    assert f"{count:,}" in total
    assert "vjp_flops" in table


def test_explicit_axes_are_refused_or_made_auto() -> None:
    model, params = jax_model(random_checkpoint(CONFIG))
    mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
    rows = jax.device_put(jnp.asarray(IDS), NamedSharding(mesh, PartitionSpec("data")))

    def logits(params: Any, ids: Any) -> Any:
        return model.apply({"params": params}, ids)

    expected = logits(params, IDS)
    with jax.set_mesh(mesh):
        with pytest.raises(MeshError, match="Explicit axes of its mesh, data"):
            jax.jit(logits)(params, rows)
        with pytest.raises(MeshError, match="Explicit"):
            cache = empty_cache(CONFIG, jnp.zeros(2, int), IDS.shape[1], jnp.float32)
            model.apply({"params": params}, rows, cache, method="decode")
        found = jax.jit(jax.sharding.auto_axes(logits, out_sharding=PartitionSpec("data")))(params, rows)
    assert jax.typeof(found).sharding.spec[0] == "data"
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)  # float32 of order 1


def test_gradients_inside_a_shard_map_are_summed_over_its_devices(tmp_path: Path) -> None:
    results = eight_devices.run("gradients_in_shard_map", tmp_path)
    one = {name.partition("/")[2]: x for name, x in results.items() if name.startswith("one/")}
    assert len(one) == 2 * 16
    for name, expected in one.items():
        # Relative to the largest gradient of the parameter: float32 sums in another order.
        np.testing.assert_allclose(results[f"eight/{name}"], expected, atol=1e-5 * abs(expected).max())
