"""Training on packed documents: the losses and gradients of the documents alone, and runs that can be resumed."""

from __future__ import annotations

from collections.abc import Iterator
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
from support.models import random_checkpoint
from support.training_runs import all_weights, recipe, records, run_in, stop_at

from bridge import IGNORE_INDEX, GPT2Config
from gpt2_jax import cross_entropy
from gpt2_jax.data import Batch, TokenStream, evaluation_batches
from gpt2_jax.data.tokens.stream import open_tokens
from gpt2_jax.training import init_state, make_eval_step, make_train_step
from tests.data.token_files import nanogpt

FLOAT64 = 1e-12
"""Losses of a few nats and gradients, relative to the largest: sums in another order."""

FLOAT32 = 1e-5
"""The same in float32."""

LENGTHS = (3, 9, 1, 12, 4, 12, 20, 2, 7, 5, 13, 6, 30, 11, 8)
"""The lengths of the documents. Three are longer than a row."""
SEQ_LEN, BATCH = 12, 4
CONFIG = GPT2Config(vocab_size=sum(LENGTHS), n_positions=16, n_embd=24, n_layer=2, n_head=3, n_inner=40)

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture
def stream(tmp_path: Path) -> TokenStream:
    """Documents in which every token equals its position in the stream."""
    files = open_tokens(nanogpt(tmp_path / "tokens.bin", np.arange(sum(LENGTHS))))[0].files
    return TokenStream.of(files, document_ends=np.cumsum(LENGTHS))


def batches(stream: TokenStream, examples: Any) -> list[Batch]:
    return list(evaluation_batches(stream, batch_size=BATCH, seq_len=SEQ_LEN, examples=examples))


def losses_by_token(stream: TokenStream, examples: Any) -> dict[int, float]:
    """Return the loss of each label. Labels are different, so they identify the tokens."""
    model, params = jax_model(random_checkpoint(CONFIG, np.float64), scan=True)
    found: dict[int, float] = {}
    for batch in batches(stream, examples):
        more = {name: batch[name] for name in ("attention_mask", "segment_ids") if name in batch}
        losses = cross_entropy(model.apply({"params": params}, batch["input_ids"], **more), batch["labels"])
        counted = batch["labels"] != IGNORE_INDEX
        labels = batch["labels"][counted].tolist()
        assert not found.keys() & set(labels)
        found |= zip(labels, np.asarray(losses)[counted].tolist(), strict=True)
    return found


def test_the_loss_of_each_token_is_that_of_padded_documents(stream: TokenStream, x64: None) -> None:
    packed, padded = (losses_by_token(stream, examples) for examples in ("packed", "documents"))
    common = packed.keys() & padded.keys()
    np.testing.assert_allclose([packed[i] for i in common], [padded[i] for i in common], rtol=FLOAT64)
    ends = np.cumsum(LENGTHS)
    first_tokens = {int(end - length) for end, length in zip(ends, LENGTHS, strict=True)}
    cuts = {int(end - n + i) for end, n in zip(ends, LENGTHS, strict=True) for i in range(SEQ_LEN, n, SEQ_LEN)}
    assert packed.keys() == set(range(sum(LENGTHS))) - first_tokens - cuts
    # Padded documents are truncated after the label of the last position, which is the first token of the next piece.
    assert padded.keys() - packed.keys() <= cuts


@pytest.mark.parametrize("num_microbatches", [1, 2])
def test_a_step_is_that_of_the_same_documents_in_rows_of_their_own(
    num_microbatches: int, stream: TokenStream, x64: None
) -> None:
    short = stream.part(0, sum(LENGTHS[:6]))  # no document is longer than a row
    (packed,), padded = batches(short, "packed"), batches(short, "documents")
    documents = {name: np.concatenate([batch[name] for batch in padded]) for name in padded[0]}
    assert len(packed["labels"]) < 6 < len(documents["labels"])  # the last batch is filled with a copy
    model, params = jax_model(random_checkpoint(CONFIG, np.float64), scan=True)
    tx = optax.sgd(0.1)

    def stepped(batch: Batch, parts: int = 1) -> Any:
        step = make_train_step(model, tx, num_microbatches=parts)
        return step(init_state(jax.tree.map(jnp.array, params), tx), batch)

    (state, metrics), (expected, expected_metrics) = stepped(packed, num_microbatches), stepped(documents)
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(metrics[name], expected_metrics[name], rtol=FLOAT64)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=0, atol=FLOAT64), state.params, expected.params)


def test_an_evaluation_equals_that_of_padded_documents(stream: TokenStream, x64: None) -> None:
    """All labels of packed rows count once, although the last batch is filled with a copy of a row."""
    short = stream.part(0, sum(LENGTHS[:6]))
    model, params = jax_model(random_checkpoint(CONFIG, np.float64), scan=True)
    eval_step = make_eval_step(model)
    sums = []
    for examples in ("packed", "documents"):
        found = [eval_step(params, batch) for batch in batches(short, examples)]
        sums.append((float(sum(loss for loss, _ in found)), int(sum(count for _, count in found))))
    assert sums[0][1] == sums[1][1] == len(short) - 6
    np.testing.assert_allclose(sums[0][0], sums[1][0], rtol=FLOAT64)


@pytest.mark.mesh
def test_a_mesh_computes_the_loss_and_the_gradients_of_one_device(tmp_path: Path) -> None:
    """Rows over two axes, weights over three. The order by segment stays within a row."""
    results = eight_devices.run("spread_packed_documents", tmp_path)
    names = [name.removeprefix("plain/") for name in results if name.startswith("plain/")]
    assert len(names) > 10 and results["part"][0] == 2
    for name in names:
        expected = results[f"plain/{name}"]
        np.testing.assert_allclose(results[f"mesh/{name}"], expected, rtol=0, atol=FLOAT32 * np.abs(expected).max())


def write_documents(directory: Path, number: int = 60) -> Path:
    """Write files of 7 to 49 bytes that are easy to learn."""
    texts = directory / "texts"
    texts.mkdir()
    for i in range(number):
        (texts / f"{i:02}.txt").write_text("abcdef " * (i % 7 + 1))
    return texts


@pytest.mark.sampled(2)
@pytest.mark.parametrize("changes", [{}, {"num_microbatches": 2, "attention": "xla", "scan": False, "remat": "none"}])
def test_a_run_learns(tmp_path: Path, changes: dict[str, Any]) -> None:
    config = recipe(data=str(write_documents(tmp_path)), examples="packed", learning_rate=3e-2, **changes)
    kept = records(run_in(tmp_path, config).run)
    assert kept[-1]["val_loss"] < kept[0]["val_loss"] - 0.5


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = recipe(data=str(write_documents(tmp_path)), examples="packed")
    whole = run_in(tmp_path, config, "whole")
    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        stop_at(patch, 5, interrupt)
        run_in(tmp_path, config, "parts")
    parts = run_in(tmp_path, config, "parts", resume=True)
    assert parts.step == whole.step == 6
    expected = all_weights(whole.run)
    assert all(np.array_equal(array, expected[name]) for name, array in all_weights(parts.run).items())
    assert records(parts.run) == records(whole.run)


def interrupt() -> Iterator[None]:
    raise InterruptedError


def test_text_of_one_document_is_packed_into_its_pieces(tmp_path: Path) -> None:
    kept = records(run_in(tmp_path, recipe(examples="packed")).run)
    assert kept[-1]["val_loss"] < kept[0]["val_loss"]
