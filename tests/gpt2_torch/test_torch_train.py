"""Training of the reference: weight decay, schedules, exact microbatches, and loading optimizer state."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.models import TINY, random_checkpoint
from torch import Tensor

import bridge
from bridge import IGNORE_INDEX, BridgeError, ConversionError, GPT2Config
from bridge.optimizer_state import AdamWState
from gpt2_torch import GPT2, model_from_checkpoint
from gpt2_torch.training import adamw, adamw_state, learning_rate_at, load_adamw_state, parameter_names, train_step

CONFIG = replace(TINY, vocab_size=61, n_layer=2)
UNTIED = replace(CONFIG, tie_word_embeddings=False)
BATCH, LENGTH = 6, 11

FP64 = 1e-12
"""Relative error of sums of about a thousand terms in another order."""


def model_of(config: GPT2Config = CONFIG, seed: int = 0) -> GPT2:
    return model_from_checkpoint(random_checkpoint(config, np.float64, seed))


def ragged_batch(seed: int = 0) -> dict[str, Tensor]:
    """Return rows of different lengths, one of them empty, so that microbatches have different weights."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, CONFIG.vocab_size, (BATCH, LENGTH + 1))
    mask = np.arange(LENGTH) < np.array([[11], [9], [0], [1], [4], [5]])
    labels = np.where(mask, tokens[:, 1:], IGNORE_INDEX)
    arrays = {"input_ids": tokens[:, :-1], "labels": labels, "attention_mask": mask}
    return {name: torch.from_numpy(np.array(array, np.int32)) for name, array in arrays.items()}


def parameters_of(model: GPT2) -> dict[str, np.ndarray]:
    return {name: p.detach().numpy().copy() for name, p in model.named_parameters()}


def gradients_of(model: GPT2) -> dict[str, np.ndarray]:
    return {name: p.grad.numpy().copy() for name, p in model.named_parameters()}


def assert_close(a: dict[str, np.ndarray], b: dict[str, np.ndarray], tolerance: float = FP64) -> None:
    for name in a | b:
        np.testing.assert_allclose(a[name], b[name], atol=tolerance * np.abs(b[name]).max(), rtol=0, err_msg=name)


@pytest.mark.parametrize("config", [CONFIG, UNTIED, replace(CONFIG, bias=False)], ids=["tied", "untied", "no-bias"])
def test_projections_and_embeddings_decay_and_nothing_else(config: GPT2Config) -> None:
    model = model_of(config)
    optimizer = adamw(model, learning_rate=0.5, beta1=0.7, beta2=0.8, epsilon=1e-3, weight_decay=0.2)
    decaying, others = optimizer.param_groups
    assert (decaying["weight_decay"], others["weight_decay"]) == (0.2, 0.0)
    for group in (decaying, others):
        assert (group["lr"], group["betas"], group["eps"]) == (0.5, (0.7, 0.8), 1e-3)
    names = parameter_names(optimizer, model)
    assert sorted(names) == sorted(p.torch_name for p in bridge.parameters(config))
    assert [name for name in model.state_dict() if name in names[: len(decaying["params"])]] == names[
        : len(decaying["params"])
    ]
    before = parameters_of(model)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, after in parameters_of(model).items():
        decays = name.endswith("weight") and "ln_" not in name
        np.testing.assert_allclose(after, before[name] * (0.9 if decays else 1.0), rtol=FP64, err_msg=name)


def nanogpt_rate(it: int, *, peak: float, floor: float, warmup: int, end: int) -> float:
    """Compute nanoGPT's `get_lr`, written independently."""
    if it < warmup:
        return peak * (it + 1) / (warmup + 1)
    if it > end:
        return floor
    share = (it - warmup) / (end - warmup)
    return floor + 0.5 * (1.0 + math.cos(math.pi * share)) * (peak - floor)


@pytest.mark.parametrize("warmup", [0, 1, 10])
@pytest.mark.parametrize("end", [None, 70])
def test_the_cosine_is_nanogpts(warmup: int, end: int | None) -> None:
    for step in range(130):
        rate = learning_rate_at(
            step, max_steps=100, learning_rate=2e-3, min_learning_rate=1e-4, warmup_steps=warmup, decay_steps=end
        )
        expected = nanogpt_rate(step, peak=2e-3, floor=1e-4, warmup=warmup, end=end or 100)
        assert rate == pytest.approx(expected, rel=FP64)


def test_the_other_schedules_are_constant_and_wsd_decays_linearly() -> None:
    def rate(schedule: str, step: int, warmup_steps: int = 4) -> float:
        return learning_rate_at(
            step,
            max_steps=50,
            learning_rate=1.0,
            min_learning_rate=0.2,
            schedule=schedule,
            warmup_steps=warmup_steps,
            decay_fraction=0.2,
        )

    for schedule in ("wsd", "constant"):
        assert [rate(schedule, step) for step in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
        assert {rate(schedule, step) for step in range(4, 41)} == {1.0}
    assert {rate("constant", step) for step in range(41, 60)} == {1.0}
    assert [rate("wsd", step) for step in range(40, 52)] == pytest.approx([1 - 0.08 * k for k in range(11)] + [0.2])
    late = [rate("wsd", step, warmup_steps=45) for step in (44, 45, 47, 50)]  # the warm-up ends during the decay
    assert late == pytest.approx([45 / 46, 1.0, 0.68, 0.2])


@pytest.mark.parametrize("config", [CONFIG, UNTIED], ids=["tied", "untied"])
@pytest.mark.parametrize("num_microbatches", [2, 3, 6])
def test_microbatches_give_the_update_of_the_batch(config: GPT2Config, num_microbatches: int) -> None:
    results = []
    for parts in (1, num_microbatches):
        model = model_of(config)
        optimizer = adamw(model)
        loss, norm = train_step(
            model, optimizer, ragged_batch(), learning_rate=1e-3, max_grad_norm=0.3, num_microbatches=parts
        )
        results.append(({"loss": loss.numpy(), "norm": norm.numpy(), **gradients_of(model)}, parameters_of(model)))
    (figures, weights), (figures_in_parts, weights_in_parts) = results
    assert_close(figures_in_parts, figures)
    # Adam divides by the gradient. That of the keys' bias is only rounding, which epsilon damps.
    assert_close(weights_in_parts, weights, 1e-8)


def test_the_loss_is_the_mean_over_labels_that_are_not_ignored() -> None:
    batch = ragged_batch()
    losses, count = 0.0, 0
    model = model_of()
    for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
        n = int(mask.sum())
        logits = model(ids[None, :n])[0] if n else torch.zeros(0, CONFIG.vocab_size)
        losses += -logits.log_softmax(-1).gather(1, labels[:n, None].long()).sum().item()
        count += n
    loss, _ = train_step(model, adamw(model), batch, learning_rate=1e-3, num_microbatches=2)
    assert loss.item() == pytest.approx(losses / count, rel=FP64)


def test_a_batch_without_a_mask_has_no_padding() -> None:
    batch = ragged_batch()
    batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    bare = {name: tensor for name, tensor in batch.items() if name != "attention_mask"}
    norms = [
        train_step(m, adamw(m), b, learning_rate=1e-3)[1].item() for m, b in ((model_of(), batch), (model_of(), bare))
    ]
    assert norms[0] == pytest.approx(norms[1], rel=FP64)


@pytest.mark.parametrize("max_grad_norm", [None, 1e-2, 1e3])
def test_the_gradient_norm_is_returned_unclipped(max_grad_norm: float | None) -> None:
    model = model_of()
    _, norm = train_step(model, adamw(model), ragged_batch(), learning_rate=0.0, max_grad_norm=max_grad_norm)
    left = math.sqrt(sum((g**2).sum() for g in gradients_of(model).values()))
    assert norm.item() > 0.1
    factor = min(1.0, (max_grad_norm or math.inf) / (norm.item() + 1e-6))
    assert left == pytest.approx(norm.item() * factor, rel=FP64)


def test_a_batch_with_all_labels_ignored_applies_only_weight_decay() -> None:
    model, batch = model_of(), ragged_batch()
    before = parameters_of(model)
    batch["labels"].fill_(IGNORE_INDEX)
    loss, norm = train_step(model, adamw(model, weight_decay=0.0), batch, learning_rate=1e-3, num_microbatches=2)
    assert (loss.item(), norm.item()) == (0.0, 0.0)
    assert_close(parameters_of(model), before, 0.0)


def test_training_memorizes_a_batch_with_dropout() -> None:
    model = model_of(replace(CONFIG, resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1)).eval()
    optimizer = adamw(model)
    torch.manual_seed(0)
    losses = [train_step(model, optimizer, ragged_batch(), learning_rate=1e-2)[0].item() for _ in range(16)]
    assert model.training
    assert losses[-1] < losses[0] / 3


@pytest.mark.parametrize("num_microbatches", [0, -1, 4, 7])
def test_unequal_microbatches_are_refused(num_microbatches: int) -> None:
    model = model_of()
    with pytest.raises(BridgeError, match=f"a batch of 6 rows cannot be split into {num_microbatches} equal"):
        train_step(model, adamw(model), ragged_batch(), learning_rate=1e-3, num_microbatches=num_microbatches)


@pytest.mark.parametrize("config", [CONFIG, UNTIED], ids=["tied", "untied"])
def test_another_optimizer_continues_from_a_state(config: GPT2Config) -> None:
    first = model_of(config)
    optimizer = adamw(first)
    for seed in range(3):
        train_step(first, optimizer, ragged_batch(seed), learning_rate=1e-3)
    second = model_from_checkpoint(bridge.Checkpoint.of(parameters_of(first), config))
    reversed_groups = [{"params": [p]} for p in reversed(list(second.parameters()))]
    for group in reversed_groups:
        group["weight_decay"] = 0.1 if group["params"][0].ndim == 2 else 0.0
    other = torch.optim.AdamW(reversed_groups, betas=(0.9, 0.95))
    state = adamw_state(optimizer, first)
    assert state.step == 3
    load_adamw_state(other, state, second)
    for model, its in ((first, optimizer), (second, other)):
        train_step(model, its, ragged_batch(3), learning_rate=1e-3)
    assert_close(parameters_of(second), parameters_of(first), 0.0)


def test_a_loaded_state_is_a_copy() -> None:
    model = model_of()
    optimizer = adamw(model)
    train_step(model, optimizer, ragged_batch(), learning_rate=1e-3)
    state = adamw_state(optimizer, model)
    kept = {name: array.copy() for name, array in state.exp_avg.items()}
    other_model = model_of()
    other = adamw(other_model)
    load_adamw_state(other, state, other_model)
    train_step(other_model, other, ragged_batch(1), learning_rate=1e-3)
    assert_close(dict(state.exp_avg), kept, 0.0)


def test_a_state_of_bfloat16_survives() -> None:
    model = model_of().bfloat16()
    optimizer = adamw(model)
    train_step(model, optimizer, ragged_batch(), learning_rate=1e-3)
    state = adamw_state(optimizer, model)
    other = adamw(model)
    load_adamw_state(other, state, model)
    again = adamw_state(other, model)
    for name, array in state.exp_avg.items():
        assert array.dtype == again.exp_avg[name].dtype == "bfloat16"
        np.testing.assert_array_equal(array.view(np.int16), again.exp_avg[name].view(np.int16))


def spoiled(state: AdamWState, name: str, change: Callable[[np.ndarray], np.ndarray]) -> AdamWState:
    return replace(state, exp_avg_sq={**state.exp_avg_sq, name: change(state.exp_avg_sq[name])})


def test_a_state_of_another_model_is_refused() -> None:
    model = model_of()
    optimizer = adamw(model)
    state = adamw_state(optimizer, model)
    with pytest.raises(ConversionError, match=r"wpe\.weight has shape"):
        load_adamw_state(optimizer, spoiled(state, "wpe.weight", lambda array: array.T), model)
    with pytest.raises(ConversionError, match=r"h\.1\.attn\.c_attn\.weight is missing"):
        load_adamw_state(optimizer, adamw_state(*stranger(replace(CONFIG, n_layer=1))), model)
    with pytest.raises(ConversionError, match="parameters that are not the model's"):
        adamw_state(optimizer, model_of())
    with pytest.raises(ConversionError, match="amsgrad"):
        adamw_state(torch.optim.AdamW(model.parameters(), amsgrad=True), model)
    with pytest.raises(ConversionError, match="unknown option 'momentum'"):
        adamw_state(torch.optim.SGD(model.parameters(), momentum=0.9), model)


def stranger(config: GPT2Config) -> tuple[torch.optim.Optimizer, GPT2]:
    model = model_of(config)
    return adamw(model), model
