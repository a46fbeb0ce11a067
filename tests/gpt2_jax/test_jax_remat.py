"""Rematerialization: the same loss and gradients with every policy, the bytes saved, and the products recomputed."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo
from jax._src.interpreters.partial_eval import dce_jaxpr
from support.models import TINY, random_ids, random_state

import bridge
from bridge import GPT2Config
from gpt2_jax.choices import Remat
from gpt2_jax.loss import summed_loss
from gpt2_jax.model import GPT2
from gpt2_jax.ops.attention import attention
from gpt2_jax.parallel.remat import POLICIES as POLICY_OF

FLOAT64 = 1e-12
"""Relative to the largest value: XLA fuses recomputed operations differently, so they round differently."""

RATES = {"embd_pdrop": 0.1, "attn_pdrop": 0.2, "resid_pdrop": 0.3}
POLICIES: tuple[Remat, ...] = get_args(Remat)
pytestmark = pytest.mark.usefixtures("quick_compilation")
each_form = pytest.mark.parametrize("scan", [False, True], ids=["loop", "scan"])
each_attention = pytest.mark.parametrize("attention", ["xla", "blockwise"])


def loss_of(config: GPT2Config, **form: Any) -> Callable[..., Any]:
    return jax.value_and_grad(lambda params, batch, key: summed_loss(GPT2(config, **form), params, batch, key))


@pytest.mark.sampled(3)
@each_form
@pytest.mark.parametrize("drops", [False, True], ids=["whole", "dropped"])
def test_loss_and_gradients_do_not_depend_on_the_policy(scan: bool, drops: bool, x64: None) -> None:
    """Dropout does not depend on it either: a recomputed layer uses the same masks."""
    config = replace(TINY, n_layer=2, **(RATES if drops else {}))
    params = bridge.to_flax(random_state(config, np.float64), config, stacked=scan)
    ids = random_ids(config).astype(np.int32)
    batch, key = {"input_ids": ids, "labels": np.roll(ids, -1, axis=1)}, jax.random.key(1) if drops else None
    results = {
        remat: jax.jit(loss_of(config, dtype=jnp.float64, scan=scan, remat=remat))(params, batch, key)
        for remat in POLICIES
    }
    for remat in ("dots", "full"):
        for found, expected in zip(*map(jax.tree.leaves, (results[remat], results["none"])), strict=True):
            np.testing.assert_allclose(found, expected, rtol=0, atol=FLOAT64 * np.abs(expected).max(), err_msg=remat)


CONFIG = GPT2Config(vocab_size=64, n_positions=128, n_embd=48, n_layer=4, n_head=3)
"""With 8 rows of 128 tokens, activations take most of the memory, and a row is one block of queries."""
IDS = jax.ShapeDtypeStruct((8, 128), jnp.int32)
BATCH = {"input_ids": IDS, "labels": IDS}


def loss_and_parameters(remat: Remat, **form: Any) -> tuple[Callable[..., jax.Array], Any]:
    model = GPT2(CONFIG, remat=remat, **form)
    parameters = jax.eval_shape(model.init, jax.random.key(0), IDS)["params"]
    return lambda params, batch: summed_loss(model, params, batch), parameters


def kept(remat: Remat, **form: Any) -> int:
    """Return the bytes that JAX saves for the gradient of the loss."""
    loss, parameters = loss_and_parameters(remat, **form)
    pullback = jax.eval_shape(lambda *given: jax.vjp(loss, *given)[1], parameters, BATCH)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(pullback))


@cache
def compiled(remat: Remat, attention: str) -> Any:
    """Compile a loss and its gradients with the layers in a loop, whose body is in the program once."""
    loss, parameters = loss_and_parameters(remat, scan=True, attention=attention)
    return jax.jit(jax.value_and_grad(loss)).lower(parameters, BATCH).compile()


@pytest.mark.sampled(2)
@each_form
@each_attention
def test_each_policy_saves_fewer_bytes_than_the_one_before(scan: bool, attention: str) -> None:
    none, dots, full = (kept(remat, scan=scan, attention=attention) for remat in POLICIES)
    assert none > dots > full


@pytest.mark.sampled(2)
@each_attention
def test_each_policy_gives_a_program_that_needs_fewer_bytes(attention: str) -> None:
    """This holds only with a loop, because XLA on CPU merges recomputations of unrolled layers with the first ones."""
    none, dots, full = (compiled(remat, attention).memory_analysis().temp_size_in_bytes for remat in POLICIES)
    assert none > dots > full


RUN_AGAIN = {("xla", "dots"): 1, ("xla", "full"): 5, ("blockwise", "dots"): 0, ("blockwise", "full"): 5}
"""Matrix products of a layer that are recomputed. `full`: all six except the last projection, whose result is not
needed. `dots`: the scores, except with `blockwise`, whose gradient always recomputes them."""


@each_attention
@pytest.mark.parametrize("remat", ["dots", "full"])
def test_dots_recomputes_no_product_except_the_scores(attention: str, remat: Remat) -> None:
    """Counted in the compiled program, which has no unused products."""
    again, once = (len(re.findall(r" dot\(", compiled(r, attention).as_text())) for r in (remat, "none"))
    assert once > 20  # six forward and twelve backward in a layer, and three of the loss
    assert again - once == RUN_AGAIN[attention, remat]


@pytest.mark.parametrize(("remat", "times"), [("dots", 1), ("full", 2)])
def test_dots_saves_all_results_of_cudnns_attention(remat: Remat, times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """According to JAX. Its check for cuDNN is replaced, so that no GPU is needed."""
    for name in ("check_cudnn_version", "check_compute_capability"):
        monkeypatch.setattr(fused_attention_stablehlo, name, lambda *_: 91000)
    monkeypatch.setattr(fused_attention_stablehlo, "is_cuda_compute_capability_equal", lambda *_: False)

    def layer(x: jax.Array) -> jax.Array:
        return jnp.sin(attention(x, x, x, None, is_causal=True, scale=0.5, implementation="cudnn"))

    gradient = jax.value_and_grad(lambda x: jax.checkpoint(layer, policy=POLICY_OF[remat])(x).astype(float).sum())
    traced = jax.make_jaxpr(gradient)(jnp.ones((2, 12, 3, 8), jnp.bfloat16)).jaxpr
    program, _ = dce_jaxpr(traced, [True] * len(traced.outvars))  # without unused results
    assert str(program).count("= dot_product_attention_fwd_wrapper") == times
