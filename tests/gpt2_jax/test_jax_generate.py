"""Sampling from the port, and greedy tokens in every implementation."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.implementations import jax_model, torch_logits, torch_model, transformers_model
from support.models import TINY, huggingface_directory, random_checkpoint, random_ids

from bridge.generation.config import GenerationConfig, uniform_noise
from bridge.generation.prompts import left_padded
from gpt2_jax import GPT2, generate
from gpt2_jax.generation import SMALLEST_BUCKET, Decoder, _decode_loop, _prefill_chunks, bucket

ROOT = Path(__file__).parents[2]

LOGIT_ROUNDING = 1e-5
"""Relative to the largest logit: float32 sums in another order differ by 5e-7."""
BFLOAT16_NATS = 0.3
"""bfloat16 has 8 bits of precision: logits of 16 and more are multiples of 0.125, and each layer adds rounding."""

SMALL = replace(TINY, n_layer=2)  # enough for layers to differ; more layers take longer to compile
PROMPTS = random_ids(SMALL, batch=3, length=4)


@pytest.fixture(scope="module")
def model_and_params() -> tuple[GPT2, dict[str, Any]]:
    return jax_model(random_checkpoint(SMALL))


@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        replace(SMALL, tie_word_embeddings=False, scale_attn_by_inverse_layer_idx=True, activation_function="relu"),
    ],
    ids=["gpt2", "untied-inverse-relu"],
)
def test_greedy_tokens_are_the_same_in_every_implementation(config: Any):
    import torch

    import gpt2_torch

    checkpoint = random_checkpoint(config)
    expected = gpt2_torch.generate(torch_model(checkpoint), torch.from_numpy(PROMPTS), max_new_tokens=12).numpy()
    for form in ({}, {"scan": True}, {"vocab_multiple": 64}):
        np.testing.assert_array_equal(generate(*jax_model(checkpoint, **form), PROMPTS, max_new_tokens=12), expected)
    peer = transformers_model(checkpoint).generate(
        torch.from_numpy(PROMPTS),
        attention_mask=torch.ones(PROMPTS.shape, dtype=torch.long),
        do_sample=False,
        max_new_tokens=12,
        min_new_tokens=None,
        eos_token_id=-1,
        pad_token_id=0,
    )
    np.testing.assert_array_equal(peer.numpy(), expected)


def test_the_tokens_depend_on_the_seed(model_and_params: tuple[GPT2, dict[str, Any]]):
    first, same, other = (
        np.asarray(generate(*model_and_params, PROMPTS, max_new_tokens=9, temperature=1.0, seed=seed))
        for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, same)
    assert first.shape == (3, 13)
    assert not np.array_equal(first, other)
    np.testing.assert_array_equal(first[:, :4], PROMPTS)


def test_one_candidate_is_greedy(model_and_params: tuple[GPT2, dict[str, Any]]):
    sampled = generate(*model_and_params, PROMPTS, max_new_tokens=9, temperature=5.0, top_k=1)
    np.testing.assert_array_equal(sampled, generate(*model_and_params, PROMPTS, max_new_tokens=9))


def test_only_the_k_most_likely_tokens_are_sampled(model_and_params: tuple[GPT2, dict[str, Any]]):
    model, params = model_and_params
    ids = generate(model, params, PROMPTS, max_new_tokens=20, temperature=9.0, top_k=3)
    candidates = jax.lax.top_k(jax.jit(model.apply)({"params": params}, ids)[:, 3:-1], 3)[1]
    assert (candidates == ids[:, 4:, None]).any(axis=-1).all()
    assert not (candidates[..., 0] == ids[:, 4:]).all()


def test_more_than_the_positions_is_refused(model_and_params: tuple[GPT2, dict[str, Any]]):
    assert generate(*model_and_params, PROMPTS, max_new_tokens=36).shape == (3, SMALL.n_positions)
    with pytest.raises(ValueError, match=r"41 tokens.*n_positions=40"):
        generate(*model_and_params, PROMPTS, max_new_tokens=37)


def test_prompts_that_cannot_be_continued_are_refused(model_and_params: tuple[GPT2, dict[str, Any]]):
    with pytest.raises(ValueError, match="empty"):
        generate(*model_and_params, PROMPTS[:, :0], max_new_tokens=1)
    with pytest.raises(IndexError, match="vocabulary"):
        generate(*model_and_params, PROMPTS + SMALL.vocab_size, max_new_tokens=1)


def test_generating_twice_gives_the_same(model_and_params: tuple[GPT2, dict[str, Any]]):
    """The compiled loops donate their own buffers, not the caller's parameters or ids."""
    model, params = model_and_params
    before, ids = jax.tree.map(np.array, params), jnp.asarray(PROMPTS)
    first, second = (generate(model, params, ids, max_new_tokens=9, temperature=1.0) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    jax.tree.map(np.testing.assert_array_equal, params, before)
    np.testing.assert_array_equal(ids, PROMPTS)


def test_a_row_is_filled_with_the_token_that_ended_it(model_and_params: tuple[GPT2, dict[str, Any]]):
    free = np.asarray(generate(*model_and_params, PROMPTS, max_new_tokens=9)).tolist()
    stop = free[0][6]
    ids = np.asarray(generate(*model_and_params, PROMPTS, max_new_tokens=9, eos_token_id=[stop])).tolist()
    assert len(ids) == len(free)
    for row, whole in zip(ids, free, strict=True):
        end = whole.index(stop, 4) + 1 if stop in whole[4:] else len(whole)
        assert row == [*whole[:end], *[stop] * (len(whole) - end)]


def test_outputs_of_a_prompt_are_adjacent(model_and_params: tuple[GPT2, dict[str, Any]]):
    ids = np.asarray(generate(*model_and_params, PROMPTS, max_new_tokens=9, temperature=3.0, num_return_sequences=2))
    np.testing.assert_array_equal(ids[:, :4], PROMPTS.repeat(2, axis=0))
    assert len({tuple(row) for row in ids.tolist()}) == 6


COMPILED = replace(SMALL, n_positions=128, n_layer=1)
COMPILED_BUCKETS = (32, 64, 128)


@pytest.fixture
def counted() -> Decoder:
    """A decoder, after the caches of compiled functions have been cleared."""
    _prefill_chunks.clear_cache()
    _decode_loop.clear_cache()
    return Decoder(*jax_model(random_checkpoint(COMPILED)))


@pytest.mark.thorough
def test_any_number_of_lengths_takes_one_compilation_per_bucket(counted: Decoder):
    rng, caches, prompts = np.random.default_rng(0), set(), set()
    for _ in range(50):
        length = int(rng.integers(1, COMPILED.n_positions - 2))
        new = int(rng.integers(2, COMPILED.n_positions - length + 1))
        counted.generate([rng.integers(0, COMPILED.vocab_size, length).tolist()], GenerationConfig(new))
        slots = bucket(length + new, COMPILED.n_positions)
        caches.add(slots)
        prompts.add((slots, bucket(length, COMPILED.n_positions)))
    assert caches <= {SMALLEST_BUCKET, *COMPILED_BUCKETS}
    assert _decode_loop._cache_size() <= len(caches)
    assert _prefill_chunks._cache_size() <= len(prompts)


def test_other_values_in_a_configuration_compile_nothing(counted: Decoder):
    generation_config = GenerationConfig(8, temperature=0.7, top_k=5, seed=1)
    counted.generate([[1, 2, 3]], generation_config)
    assert (_prefill_chunks._cache_size(), _decode_loop._cache_size()) == (1, 1)
    for changes in ({"seed": 2}, {"temperature": 1.3}, {"top_k": 9}, {"max_new_tokens": SMALLEST_BUCKET - 3}):
        counted.generate([[4, 5, 6]], replace(generation_config, **changes))
    for at_a_time in (1, 3):
        assert [*counted.stream([[7]], generation_config, at_a_time)]
    assert (_prefill_chunks._cache_size(), _decode_loop._cache_size()) == (1, 1)
    counted.generate([[1, 2, 3]], replace(generation_config, top_p=0.9))
    assert (_prefill_chunks._cache_size(), _decode_loop._cache_size()) == (1, 2), "the compilation was not counted"


def test_other_values_of_processors_compile_nothing(counted: Decoder):
    """Also not for lists of other lengths, up to the next power of two."""
    config = GenerationConfig(
        8,
        no_repeat_ngram_size=2,
        min_new_tokens=3,
        eos_token_id=5,
        suppress_tokens=[1],
        bad_words_ids=[[1, 2, 3]] + [[i] for i in range(9, 13)],
        forced_eos_token_id=7,
    )
    counted.generate([[1, 2, 3]], config)
    changes = {
        "no_repeat_ngram_size": 4,
        "min_new_tokens": 1,
        "suppress_tokens": [3, 4, 5],
        "forced_eos_token_id": (8, 9),
    }
    words = [[4, 5, 6, 7], *([i] for i in range(20, 26))]
    counted.generate([[4, 5, 6]], replace(config, bad_words_ids=words, **changes))
    assert (_prefill_chunks._cache_size(), _decode_loop._cache_size()) == (1, 1)
    counted.generate([[1, 2, 3]], replace(config, suppress_tokens=None))
    assert _decode_loop._cache_size() == 2, "the compilation was not counted"


def test_buckets_are_powers_of_two_up_to_the_positions():
    lengths = (1, SMALLEST_BUCKET, SMALLEST_BUCKET + 1, 64, 65, 100)
    assert [bucket(length, 100) for length in lengths] == [16, 16, 32, 64, 100, 100]
    assert bucket(3, 8) == 8


@pytest.mark.parametrize("lengths", [(7,), (8,), (9,), (16, 3), (29, 21)], ids=str)
def test_prefill_in_chunks_gives_the_logits_of_one_run(
    lengths: tuple[int, ...], model_and_params: tuple[GPT2, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys.modules[Decoder.__module__], "PREFILL_CHUNK", 8)
    model, params = model_and_params
    rows = [random_ids(SMALL, 1, length, seed=length)[0].tolist() for length in lengths]
    _, found = Decoder(model, params)._prefill_cache(*left_padded(rows), max_length=31)
    for row, logits in zip(rows, found, strict=True):
        expected = torch_logits(random_checkpoint(SMALL), np.array([row]))[0, -1]  # torch does not compile
        np.testing.assert_allclose(logits, expected, rtol=0, atol=LOGIT_ROUNDING * np.abs(expected).max())


def test_bfloat16_parameters_give_the_log_probabilities_of_a_bfloat16_model(
    model_and_params: tuple[GPT2, dict[str, Any]],
):
    model, params = model_and_params
    narrow = model.clone(dtype=jnp.bfloat16), jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    decoder = Decoder(model, params, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(decoder.params)} == {jnp.dtype(jnp.bfloat16)}
    prompts = PROMPTS.tolist()
    found = decoder.generate(prompts, GenerationConfig(9, logprobs=True))
    ids = np.array([[*prompt, *row[0].ids] for prompt, row in zip(prompts, found, strict=True)])
    logits = jnp.asarray(jax.jit(narrow[0].apply)({"params": narrow[1]}, ids))
    logprobs = jax.nn.log_softmax(logits[:, 3:-1].astype(jnp.float32))
    expected = np.take_along_axis(np.asarray(logprobs), ids[:, 4:, None], axis=-1)[..., 0]
    np.testing.assert_allclose([row[0].logprobs for row in found], expected, rtol=0, atol=BFLOAT16_NATS)


def copies_of(size: int, program: str) -> list[str]:
    """Return the instructions of a compiled program that copy arrays of `size` elements."""
    found = re.finditer(r"= \w+\[([\d,]+)\]\S* copy\(.*", program)
    return [match[0] for match in found if math.prod(map(int, match[1].split(","))) == size]


def test_the_loop_over_tokens_copies_no_cache():
    """With a layout that the products cannot read in place, XLA would copy the cache of every layer for every token."""
    decoder = Decoder(*jax_model(random_checkpoint(replace(SMALL, n_positions=64))))
    generation_config = GenerationConfig(20, temperature=1.0)
    [(state, _)] = decoder._prefill(
        *left_padded([[1, 2, 3]]), 64, generation_config, uniform_noise(generation_config), np.zeros(1, bool), 1
    )
    size = state.cache.keys[0].size
    assert size == state.cache.values[0].size == SMALL.n_embd * 64
    program = _decode_loop.lower(decoder.model, decoder.params, state, 3).compile().as_text()
    assert re.search(r"\bwhile\(", program)
    assert copies_of(size, program) == []


def test_the_check_detects_a_copy_in_a_loop():
    def exchanged(a: Any, b: Any) -> Any:
        return jax.lax.fori_loop(0, 3, lambda _, pair: (pair[1] + 1, pair[0]), (a, b))

    program = jax.jit(exchanged).lower(jnp.zeros((3, 16, 64)), jnp.ones((3, 16, 64))).compile().as_text()
    assert copies_of(3 * 16 * 64, program)


SHARDED = """
import sys
import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import bridge
import gpt2_jax

model, params = gpt2_jax.from_pretrained(sys.argv[1])
mesh = jax.make_mesh((2, 4), ("rows", "columns"), axis_types=(AxisType.Auto, AxisType.Auto))


def split(path, leaf):
    # Over the first axis that is n_embd: the mesh divides it, as it does no other.
    spec = [None] * leaf.ndim
    if path[-1].key in ("kernel", "embedding"):
        spec[leaf.shape.index(model.config.n_embd)] = "columns"
    return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*spec)))


assert len(jax.devices()) == 8
sharded = jax.tree_util.tree_map_with_path(split, params)
assert sum(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(sharded)) > 8
prompts = np.arange(1, 9).reshape(2, 4)
for fields in ({}, {"temperature": 1.0}):
    expected, found = (gpt2_jax.generate(model, p, prompts, max_new_tokens=9, **fields) for p in (params, sharded))
    np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))
"""


@pytest.mark.mesh
def test_sharded_parameters_give_the_same_tokens(tmp_path: Path):
    """In a separate process, because JAX fixes the number of devices when it starts."""
    model = huggingface_directory(tmp_path / "model", SMALL)
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-W", "error", "-c", SHARDED, str(model)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("temperature", [1e-30, 1e-50])
def test_a_tiny_temperature_takes_the_most_likely_token(
    temperature: float, model_and_params: tuple[GPT2, dict[str, Any]]
) -> None:
    greedy, cold = (generate(*model_and_params, PROMPTS, max_new_tokens=9, temperature=t) for t in (0.0, temperature))
    np.testing.assert_array_equal(cold, greedy)
