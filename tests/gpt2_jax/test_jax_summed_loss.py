"""The chunked loss and its hand-written gradients, compared with `cross_entropy` of all logits."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import eight_devices
from support.implementations import jax_model
from support.models import TINY, random_checkpoint, random_ids

from bridge import IGNORE_INDEX, GPT2Config
from gpt2_jax.loss import summed_loss
from gpt2_jax.model import GPT2
from gpt2_jax.ops.cross_entropy import cross_entropy, summed_cross_entropy
from gpt2_jax.training import init_state, make_train_step

pytestmark = pytest.mark.usefixtures("quick_compilation")

FLOAT64 = 1e-12
"""Relative to the largest value, or to 1: sums of a few hundred terms in another order."""
FLOAT32 = 1e-5
"""The same in float32."""
BFLOAT16 = 4 * 2.0**-8
"""Relative to the largest value: the gradients of the logits and their products are each rounded once."""

B, T, D, V = 3, 7, 12, 29
CHUNKS = {7: 1, 4: 2, 3: 3, 1: 7}
"""Positions of a row in a chunk -> chunks. With 4 and with 3 positions, the last chunk is partial."""


def in_chunks_of(positions: int, rows: int = V) -> dict[str, int]:
    return {"chunk_bytes": 4 * B * rows * positions}


def arrays(dtype: Any = np.float64, rows: int = V) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return hidden states and an embedding that give losses of several nats, and labels with some ignored."""
    rng = np.random.default_rng(0)
    hidden, embedding = rng.normal(size=(B, T, D)), rng.normal(size=(rows, D))
    labels = rng.integers(0, V, (B, T)).astype(np.int32)
    labels[0, 0] = labels[1, 3:5] = labels[2, -1] = IGNORE_INDEX
    return jnp.asarray(hidden, dtype), jnp.asarray(embedding, dtype), jnp.asarray(labels)


def definition(hidden: jax.Array, embedding: jax.Array, labels: jax.Array) -> jax.Array:
    return cross_entropy(jnp.einsum("BTD,VD->BTV", hidden, embedding), labels).sum()


def value_and_gradients(loss: Callable[..., jax.Array], *given: jax.Array) -> Any:
    """Return the loss, and its gradients by hidden states and embedding."""
    return jax.tree.leaves(jax.jit(jax.value_and_grad(loss, (0, 1)))(*given))


def assert_close(found: Any, expected: Any, tolerance: float) -> None:
    for i, a, b in zip(range(len(expected)), found, expected, strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(1, np.abs(b).max()), err_msg=f"number {i}")


def loops(loss: Callable[..., jax.Array], *given: jax.Array) -> list[int]:
    """Return the number of iterations of each loop in a program."""
    return [int(times) for times in re.findall(r"\blength=(\d+)", str(jax.make_jaxpr(loss)(*given)))]


@pytest.mark.parametrize(("positions", "chunks"), CHUNKS.items())
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, FLOAT64), (np.float32, FLOAT32)])
def test_values_and_gradients_are_those_of_the_definition(
    positions: int, chunks: int, dtype: Any, tolerance: float, x64: None
) -> None:
    given = arrays(dtype)
    loss = partial(summed_cross_entropy, **in_chunks_of(positions))
    assert loops(loss, *given) == [chunks]
    assert_close(value_and_gradients(loss, *given), value_and_gradients(definition, *given), tolerance)


def test_a_chunk_has_at_least_one_position_of_every_row(x64: None) -> None:
    given = arrays()
    for chunk_bytes, chunks in ((1, [T]), (2**40, [1]), (None, [1])):
        loss = partial(summed_cross_entropy, chunk_bytes=chunk_bytes)
        assert loops(loss, *given) == chunks
        np.testing.assert_allclose(loss(*given), definition(*given), rtol=FLOAT64)


@pytest.mark.parametrize("positions", CHUNKS)
def test_the_value_is_the_same_with_and_without_gradients(positions: int) -> None:
    given = arrays(np.float32)
    loss = partial(summed_cross_entropy, **in_chunks_of(positions))
    np.testing.assert_allclose(jax.jit(loss)(*given), value_and_gradients(loss, *given)[0], rtol=FLOAT32)


@pytest.mark.parametrize("positions", [3, 7])
def test_with_all_labels_ignored_everything_is_exactly_zero(positions: int) -> None:
    hidden, embedding, labels = arrays(np.float32)
    loss = partial(summed_cross_entropy, **in_chunks_of(positions))
    for array in value_and_gradients(loss, hidden, embedding, jnp.full_like(labels, IGNORE_INDEX)):
        assert not array.any()
    by_hidden = value_and_gradients(loss, hidden, embedding, labels)[1]
    np.testing.assert_array_equal(by_hidden.any(-1), labels != IGNORE_INDEX)


@pytest.mark.parametrize("wrong", [-1, -V, V, V + 2, 2**31 - 1])
@pytest.mark.parametrize("rows", [V, V + 3])
def test_a_label_outside_the_vocabulary_is_nan_as_in_cross_entropy(wrong: int, rows: int) -> None:
    hidden, embedding, labels = arrays(np.float32, rows)
    labels = labels.at[1, 2].set(wrong)
    loss = partial(summed_cross_entropy, vocab_size=V, **in_chunks_of(3, rows))
    assert jnp.isnan(definition(hidden, embedding[:V], labels))
    assert jnp.isnan(jax.jit(loss)(hidden, embedding, labels))
    assert jnp.isnan(value_and_gradients(loss, hidden, embedding, labels)[0])


@pytest.mark.parametrize("padding", [0.0, 1.0, 1e30, -1e30])
def test_padding_rows_of_the_embedding_are_ignored(padding: float, x64: None) -> None:
    hidden, embedding, labels = arrays(rows=V + 3)
    embedding = embedding.at[V:].multiply(padding)
    loss = partial(summed_cross_entropy, vocab_size=V, **in_chunks_of(3, V + 3))
    total, by_hidden, by_embedding = value_and_gradients(loss, hidden, embedding, labels)
    expected = value_and_gradients(definition, hidden, embedding[:V], labels)
    assert_close((total, by_hidden, by_embedding[:V]), expected, FLOAT64)
    assert not by_embedding[V:].any()


@pytest.mark.parametrize("embedding_dtype", [jnp.bfloat16, jnp.float32])
def test_the_loss_of_bfloat16_is_float32_and_rounds_only_its_products(embedding_dtype: Any, x64: None) -> None:
    """The embedding may be float32, like parameters. It is rounded for the products; its gradient is not rounded."""
    hidden, embedding, labels = arrays(jnp.bfloat16)
    loss = partial(summed_cross_entropy, **in_chunks_of(3))
    found = value_and_gradients(loss, hidden, embedding.astype(embedding_dtype), labels)
    assert [array.dtype for array in found] == [jnp.float32, jnp.bfloat16, embedding_dtype]
    exact = value_and_gradients(definition, hidden.astype(float), embedding.astype(float), labels)
    np.testing.assert_allclose(found[0], exact[0], rtol=FLOAT32)
    assert_close(found, exact, BFLOAT16)
    if embedding_dtype == jnp.float32:  # sums over all positions are accumulated in float32
        whole = value_and_gradients(summed_cross_entropy, hidden, embedding.astype(jnp.float32), labels)[2]
        assert (whole != whole.astype(jnp.bfloat16)).any(-1).all()


@pytest.mark.parametrize("factor", [1 / 3, -7.0, 0.0])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(np.float64, FLOAT64), (np.float32, FLOAT32), (jnp.bfloat16, 2.0**-8)]
)
def test_gradients_are_scaled_by_the_incoming_gradient(factor: float, dtype: Any, tolerance: float, x64: None) -> None:
    """The factor itself is not rounded: 1/3 in bfloat16 is too large by 2^-9, and all gradients would be, too."""
    given = arrays(dtype)
    loss = partial(summed_cross_entropy, **in_chunks_of(3))
    scaled = value_and_gradients(lambda *given: factor * loss(*given), *given)
    for found, plain in zip(scaled, value_and_gradients(loss, *given), strict=True):
        found, expected = np.asarray(found, float), factor * np.asarray(plain, float)
        np.testing.assert_allclose(found, expected, rtol=tolerance, atol=1e-30)
        if factor:  # roundings of many gradients cancel
            assert abs((found * expected).sum() / (expected**2).sum() - 1) <= tolerance / 8


def test_it_supports_vmap(x64: None) -> None:
    hidden, embedding, labels = arrays()
    loss = partial(summed_cross_entropy, chunk_bytes=4 * V * 3)
    rows = hidden[:, None], labels[:, None]
    mapped = jax.jit(jax.vmap(jax.value_and_grad(loss), (0, None, 0)))(rows[0], embedding, rows[1])
    expected = value_and_gradients(definition, hidden, embedding, labels)
    assert_close((mapped[0].sum(), mapped[1][:, 0]), expected[:2], FLOAT64)


def test_eight_devices_compute_the_same_as_one(tmp_path: Path) -> None:
    results = eight_devices.run("spread_loss", tmp_path)
    found, expected = ([results[f"{where}/{i}"] for i in range(3)] for where in ("eight", "one"))
    assert_close(found, expected, FLOAT32)
    assert results["parts"].tolist() == [[2, 7, 12]] * 8


SMALL = replace(TINY, n_layer=2)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("multiple", [1, 64])
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "padded"])
def test_summed_loss_is_the_cross_entropy_of_the_logits(tied: bool, multiple: int, masked: bool, x64: None) -> None:
    config = replace(SMALL, tie_word_embeddings=tied)
    model, params = jax_model(random_checkpoint(config, np.float64), vocab_multiple=multiple, scan=True)
    ids = random_ids(config, batch=3, length=11).astype(np.int32)
    mask = np.ones_like(ids)
    mask[0, 7:] = mask[1, :4] = 0
    labels = np.where(mask == 1, np.roll(ids, -1, axis=1), IGNORE_INDEX) if masked else np.roll(ids, -1, axis=1)
    batch = {"input_ids": ids, "labels": labels} | ({"attention_mask": mask} if masked else {})

    def from_logits(params: Any) -> jax.Array:
        logits = model.apply({"params": params}, ids, batch.get("attention_mask"))
        return cross_entropy(logits, labels).sum()

    found, expected = (
        jax.jit(jax.value_and_grad(loss))(params) for loss in (partial(summed_loss, model, batch=batch), from_logits)
    )
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    assert_close(jax.tree.leaves(found), jax.tree.leaves(expected), FLOAT64)
    if masked:  # the mask has an effect
        assert not np.isclose(summed_loss(model, params, {"input_ids": ids, "labels": labels}), expected[0])


def test_with_a_key_it_applies_dropout_like_the_model(x64: None) -> None:
    model, params = jax_model(random_checkpoint(replace(SMALL, resid_pdrop=0.3, embd_pdrop=0.2), np.float64))
    ids, key = random_ids(SMALL).astype(np.int32), jax.random.key(1)
    labels = np.roll(ids, -1, axis=1)
    logits = model.apply({"params": params}, ids, deterministic=False, rngs={"dropout": key})
    dropped = summed_loss(model, params, {"input_ids": ids, "labels": labels}, key)
    np.testing.assert_allclose(dropped, cross_entropy(logits, labels).sum(), rtol=FLOAT64)
    assert not np.isclose(dropped, summed_loss(model, params, {"input_ids": ids, "labels": labels}))


def sizes(program: str) -> list[int]:
    """Return the number of elements of every array in a compiled program."""
    found = re.findall(r"\b(?:pred|[subf]+\d+)\[([\d,]+)\]", program)
    return [math.prod(map(int, dimensions.split(","))) for dimensions in found]


def test_a_compiled_training_step_never_holds_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The vocabulary is so large that no other array comes near B T V elements."""
    config = GPT2Config(vocab_size=1000, n_positions=32, n_embd=8, n_layer=2, n_head=2, n_inner=12)
    ids = jax.ShapeDtypeStruct((4, 32), jnp.int32)
    logits = math.prod(ids.shape) * config.vocab_size
    largest = []
    for positions in (32, 8):
        monkeypatch.setattr(
            "gpt2_jax.ops.cross_entropy.default_chunk_bytes", lambda p=positions: 4 * 4 * config.vocab_size * p
        )
        model, tx = GPT2(config, scan=True, remat="dots"), optax.sgd(0.1)
        state = jax.eval_shape(
            lambda key, model=model, tx=tx: init_state(model.init(key, jnp.zeros((1, 8), int))["params"], tx),
            jax.random.key(0),
        )
        program = make_train_step(model, tx).lower(state, {"input_ids": ids, "labels": ids}).compile().as_text()
        largest.append(max(sizes(program)))
    assert largest == [logits, logits // 4]
