"""The bundled model: small, trained, and equal in every backend."""

from __future__ import annotations

import json
import math
import re

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from support.implementations import torch_model, transformers_model

import bridge
import gpt2_jax
import gpt2_torch
from bridge import BUNDLED, Checkpoint
from gpt2_jax.parity import verify
from gpt2_jax.training import make_eval_step
from gpt2_torch.ops.cross_entropy import cross_entropy

MOST_BYTES = 8_000_000
PROMPTS = ("ROMEO:", "To be, or not", "KING RICHARD III:\n", "What, ho!", "Enter a messenger")
NEW_TOKENS = 24
LIKE_ITS_TEXT = 0.75  # fraction of generated words that occur in the validation text; 0.05 for random letters
SAME_LOSS = 1e-4  # nats; float32 sums in different orders


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return bridge.load("bundled")


@pytest.fixture(scope="module")
def validation_ids(checkpoint: Checkpoint) -> np.ndarray:
    text = (BUNDLED / "validation.txt").read_text(encoding="utf-8")
    return np.array(checkpoint.tokenizer().encode(text, special_tokens="as_text"))


def test_it_is_small_and_complete() -> None:
    files = {path.name for path in BUNDLED.iterdir()}
    assert {"config.json", "model.safetensors", "vocab.json", "merges.txt", "validation.txt", "README.md"} <= files
    assert {"metrics.jsonl", "loss.png", "recipe.json"} <= files
    assert sum(path.stat().st_size for path in BUNDLED.iterdir()) <= MOST_BYTES


@pytest.mark.thorough
def test_its_validation_loss_is_the_one_that_training_reported(
    checkpoint: Checkpoint, validation_ids: np.ndarray
) -> None:
    lines = (BUNDLED / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    reported = min(record["val_loss"] for record in map(json.loads, lines) if "val_loss" in record)
    context = checkpoint.config.n_positions
    windows = (len(validation_ids) - 1) // context
    inputs = validation_ids[: windows * context].reshape(windows, context)
    labels = validation_ids[1 : windows * context + 1].reshape(windows, context)
    model, params = gpt2_jax.model_from_checkpoint(checkpoint)
    eval_step = make_eval_step(model)
    reference = torch_model(checkpoint)
    port_nats = reference_nats = 0.0
    for rows in np.array_split(np.arange(windows), 8):
        port_nats += float(eval_step(params, {"input_ids": inputs[rows], "labels": labels[rows]})[0])
        with torch.no_grad():
            logits = reference(torch.from_numpy(inputs[rows]))
        reference_nats += float(cross_entropy(logits, torch.from_numpy(labels[rows])).sum())
    assert abs(port_nats / labels.size - reported) < SAME_LOSS
    assert abs(reference_nats / labels.size - reported) < SAME_LOSS


@pytest.mark.thorough
def test_verify_passes_on_trained_weights(checkpoint: Checkpoint) -> None:
    report = verify(checkpoint, seq_len=64)
    assert report.passed, report.to_json()


@pytest.mark.sampled(2)
@pytest.mark.parametrize("prompt", PROMPTS)
def test_all_implementations_continue_a_prompt_identically(checkpoint: Checkpoint, prompt: str) -> None:
    ids = checkpoint.tokenizer().encode(prompt, special_tokens="as_text")
    reference = gpt2_torch.generate(torch_model(checkpoint), torch.tensor([ids]), max_new_tokens=NEW_TOKENS)
    model, params = gpt2_jax.model_from_checkpoint(checkpoint)
    port = gpt2_jax.generate(model, params, jnp.asarray([ids]), max_new_tokens=NEW_TOKENS)
    third = transformers_model(checkpoint).generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),  # otherwise transformers takes id 0, "!", for padding
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
    )
    assert port[0].tolist() == reference[0].tolist() == third[0].tolist()


def test_its_samples_look_like_the_text_it_learned(checkpoint: Checkpoint) -> None:
    tokenizer = checkpoint.tokenizer()
    model, params = gpt2_jax.model_from_checkpoint(checkpoint)
    prompt = jnp.asarray([tokenizer.encode("\n", special_tokens="as_text")] * 4)
    rows = gpt2_jax.generate(model, params, prompt, max_new_tokens=200, temperature=0.8, seed=1)
    text = "\n".join(tokenizer.decode(row.tolist()) for row in rows)
    learned = set(words((BUNDLED / "validation.txt").read_text(encoding="utf-8")))
    written = words(text)
    assert len(written) > 200
    assert sum(word in learned for word in written) / len(written) >= LIKE_ITS_TEXT, text
    assert re.search(r"^[A-Z][A-Za-z ]+:$", text, re.MULTILINE), "a sample must have the name of a speaker"


def test_it_predicts_unseen_text_better_than_chance(checkpoint: Checkpoint, validation_ids: np.ndarray) -> None:
    found = gpt2_torch.evaluate(torch_model(checkpoint), validation_ids[:2000])
    assert found.loss < math.log(checkpoint.config.vocab_size) / 1.5


def words(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())
