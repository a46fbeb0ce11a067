"""Batch-invariant generation: the same bits alone and in any batch, and errors where that is not possible."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.batch_invariant_runs import CONFIG
from support.implementations import jax_logits
from support.models import TINY, random_checkpoint, random_ids

import gpt2_jax
from bridge import GenerationConfig
from gpt2_jax.decoding.batch_invariance import SLOTS, BatchInvarianceError

TESTS = Path(__file__).parents[1]
pytestmark = pytest.mark.usefixtures("batch_invariance")

SETTINGS_OF_TESTS = ("JAX_DISABLE_MOST_OPTIMIZATIONS", "XLA_FLAGS")


@pytest.mark.processes
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_row_has_the_same_bits_alone_in_batches_in_pieces_and_uncached(dtype: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in SETTINGS_OF_TESTS}
    environment |= {"NPROC": "1", "PYTHONPATH": os.pathsep.join(map(str, (TESTS, TESTS.parent)))}
    command = [sys.executable, "-m", "support.batch_invariant_runs", dtype]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    without = results.pop("without batch_invariant")
    assert len(results) == 12  # 3 rows greedily and with two samples each; pieces, streams and slides
    assert {name: len({*values}) for name, values in results.items() if len({*values}) != 1} == {}
    if len({*without}) == 1:
        pytest.skip("on this CPU, the bits of this batch are also equal without batch_invariant, so this shows nothing")


@pytest.fixture
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pass the test of the number of threads, which reads the environment."""
    monkeypatch.setenv("NPROC", "1")


def decoder(dtype: Any = None, **form: Any) -> gpt2_jax.Decoder:
    return gpt2_jax.Decoder(
        *gpt2_jax.model_from_checkpoint(random_checkpoint(TINY), **form), dtype=dtype, batch_invariant=True
    )


@pytest.mark.sampled(2)
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("form", [{}, {"scan": True}, {"vocab_multiple": 64}], ids=str)
def test_log_probabilities_are_those_of_the_model(form: dict[str, Any]) -> None:
    ids = random_ids(TINY, batch=3, length=TINY.n_positions)
    logprobs = jax.nn.log_softmax(jax_logits(random_checkpoint(TINY), ids), axis=-1)
    expected = np.take_along_axis(np.asarray(logprobs)[:, :-1], ids[:, 1:, None], axis=-1)[..., 0]
    found = decoder(**form).token_logprobs([*ids.tolist(), [5]])
    assert found[-1].shape == (0,)
    np.testing.assert_allclose(np.stack(found[:-1]), expected, rtol=0, atol=1e-5)


@pytest.mark.thorough
@pytest.mark.usefixtures("one_thread")
def test_the_tokens_are_those_of_the_other_decoder() -> None:
    prompts = [[3, 1, 4], [1], [5, 9, 2, 6]]
    for fields in ({}, {"temperature": 1.0, "num_return_sequences": SLOTS}):
        config = GenerationConfig(5, **fields)
        expected = gpt2_jax.Decoder(*gpt2_jax.model_from_checkpoint(random_checkpoint(TINY))).generate(prompts, config)
        found = decoder().generate(prompts, config)
        assert [[output.ids for output in each] for each in found] == [[o.ids for o in each] for each in expected]


@pytest.mark.usefixtures("one_thread")
def test_generate_takes_the_flag() -> None:
    model, params = gpt2_jax.model_from_checkpoint(random_checkpoint(TINY))
    ids = jnp.asarray([[3, 1, 4]])
    found = gpt2_jax.generate(model, params, ids, max_new_tokens=4, batch_invariant=True)
    np.testing.assert_array_equal(found, gpt2_jax.generate(model, params, ids, max_new_tokens=4))


def test_several_threads_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("2", None):
        monkeypatch.delenv("NPROC", raising=False)
        if value is not None:
            monkeypatch.setenv("NPROC", value)
        with pytest.raises(BatchInvarianceError, match="set NPROC=1 in the environment before JAX starts"):
            decoder()


@pytest.mark.usefixtures("one_thread")
def test_another_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, params = gpt2_jax.model_from_checkpoint(random_checkpoint(TINY))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.raises(BatchInvarianceError, match="JAX computes on gpu"):
        gpt2_jax.Decoder(model, params, batch_invariant=True)


@pytest.mark.usefixtures("one_thread")
def test_beam_search_is_refused() -> None:
    with pytest.raises(BatchInvarianceError, match="does not support beam search; set num_beams=1"):
        decoder().generate([[1, 2]], GenerationConfig(3, num_beams=2))


@pytest.mark.usefixtures("one_thread")
def test_a_product_that_adds_differently_in_one_slot_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test of the slots can fail: the smallest change in one slot of one projection is found."""

    def project(x: jax.Array, kernel: jax.Array, axes: int) -> jax.Array:
        y = jnp.tensordot(x, kernel, axes)
        return y.at[:, -1].multiply(1 + 2.0**-23)

    monkeypatch.setattr("gpt2_jax.model.project", project)
    jax.clear_caches()
    try:
        with pytest.raises(BatchInvarianceError, match=f"another order in 1 of {SLOTS} slots"):
            decoder().generate([[1, 2]], GenerationConfig(3))
    finally:
        jax.clear_caches()


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("row", [[], [0] * (TINY.n_positions + 1)], ids=["empty", "too long"])
def test_rows_that_the_positions_do_not_hold_are_refused(row: list[int]) -> None:
    with pytest.raises(ValueError, match=f"1 to n_positions={TINY.n_positions} tokens"):
        decoder().token_logprobs([row])


def test_log_probabilities_need_the_flag() -> None:
    other = gpt2_jax.Decoder(*gpt2_jax.model_from_checkpoint(random_checkpoint(TINY)))
    with pytest.raises(ValueError, match="batch_invariant=True"):
        other.token_logprobs([[1, 2]])


def test_the_runs_use_several_groups_and_blocks_of_keys() -> None:
    from support.batch_invariant_runs import ROWS

    from gpt2_jax.ops.slot_attention import KEY_BLOCK

    assert ROWS > SLOTS
    assert CONFIG.n_positions > KEY_BLOCK
