"""The reference model under PyTorch's transformations: each gives the results of a plain call."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.models import TINY, random_checkpoint, random_ids
from torch import Tensor
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from gpt2_torch import GPT2, model_from_checkpoint, next_token_loss

CONFIG = replace(TINY, n_layer=2)
IDS = torch.from_numpy(random_ids(CONFIG, batch=3))
MASK = torch.ones_like(IDS)
MASK[0, :4] = MASK[1, -5:] = 0
SEGMENTS = (torch.arange(IDS.shape[1]) // 6 + 1).repeat(len(IDS), 1)
ROUNDING = 1e-12
"""Float64 logits of order 1."""

no_fused_attention = sdpa_kernel(SDPBackend.MATH)
"""PyTorch's fused attention has no forward mode, and takes a loop over the rows under vmap."""

INPUTS: Mapping[str, Mapping[str, Tensor]] = {
    "ids": {},
    "mask": {"attention_mask": MASK},
    "segments": {"segment_ids": SEGMENTS},
    "positions": {"position_ids": SEGMENTS},
}
each_input = pytest.mark.parametrize("inputs", INPUTS.values(), ids=INPUTS)


@pytest.fixture(scope="module")
def model() -> GPT2:
    return model_from_checkpoint(random_checkpoint(CONFIG)).double()


def loss(model: GPT2, parameters: Mapping[str, Tensor], ids: Tensor) -> Tensor:
    return next_token_loss(functional_call(model, dict(parameters), (ids,)), ids)


def assert_same(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= ROUNDING


@each_input
@torch.no_grad()
@no_fused_attention
def test_vmap(model: GPT2, inputs: Mapping[str, Tensor]) -> None:
    def row(ids: Tensor, *others: Tensor) -> Tensor:
        named = {name: tensor[None] for name, tensor in zip(inputs, others, strict=True)}
        return model(ids[None], **named)[0]

    assert_same(vmap(row)(IDS, *inputs.values()), model(IDS, **inputs))


def test_an_id_outside_the_vocabulary_is_an_index_error_under_vmap(model: GPT2) -> None:
    with pytest.raises(IndexError, match="out of range"):
        vmap(lambda ids: model(ids[None]))(IDS + CONFIG.vocab_size)


@no_fused_attention
def test_gradients_of_each_row(model: GPT2) -> None:
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    together = vmap(grad(lambda p, row: loss(model, p, row)), in_dims=(None, 0))(parameters, IDS[:, None])
    for i, row in enumerate(IDS[:, None]):
        for name, gradient in grad(lambda p, row=row: loss(model, p, row))(parameters).items():
            assert_same(together[name][i], gradient)


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")  # PyTorch's own use
@no_fused_attention
def test_forward_mode_equals_reverse_mode(model: GPT2) -> None:
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    direction = {name: torch.cos(torch.arange(p.numel())).view_as(p).double() for name, p in parameters.items()}
    slope = jvp(lambda p: loss(model, p, IDS), (parameters,), (direction,))[1]
    gradient = grad(lambda p: loss(model, p, IDS))(parameters)
    assert_same(slope, sum(((gradient[name] * direction[name]).sum() for name in direction), torch.tensor(0.0)))


def test_activation_checkpointing(model: GPT2) -> None:
    plain, saving = copy.deepcopy(model), copy.deepcopy(model)
    for layer in saving.h:
        layer.forward = checkpointed(layer.forward)  # type: ignore[method-assign]
    for each in (plain, saving):
        next_token_loss(each(IDS, MASK), IDS).backward()
    for expected, found in zip(plain.parameters(), saving.parameters(), strict=True):
        assert torch.equal(found.grad, expected.grad)


def checkpointed(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *args, **kwargs: checkpoint(forward, *args, use_reentrant=False, **kwargs)


def test_autocast_computes_in_bfloat16(model: GPT2) -> None:
    narrow = copy.deepcopy(model).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = narrow(IDS)
    assert logits.dtype == torch.bfloat16
    assert (logits.double() - model(IDS)).abs().max() <= 0.15  # logits of order 1 at 8 bits of mantissa


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_hook_on_every_module_is_called(tied: bool) -> None:
    model = model_from_checkpoint(random_checkpoint(replace(CONFIG, tie_word_embeddings=tied)))
    called: list[str] = []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda _, __, ___, name=name: called.append(name))
    model(IDS)
    # The list of layers is not called, and the logits are the output of the model itself.
    assert {*called} == {name for name, _ in model.named_modules()} - {"h", "lm_head"}


@pytest.fixture(scope="module")
def compiled(model: GPT2) -> Any:
    return torch.compile(model, fullgraph=True, backend="aot_eager")


@pytest.mark.slow
@each_input
def test_compile_without_graph_breaks(model: GPT2, compiled: Any, inputs: Mapping[str, Tensor]) -> None:
    assert_same(compiled(IDS, **inputs), model(IDS, **inputs))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")  # PyTorch's own use
def test_compile_with_inductor_computes_the_same_gradients(model: GPT2) -> None:
    plain = copy.deepcopy(model)
    fast = copy.deepcopy(model)
    next_token_loss(plain(IDS), IDS).backward()
    next_token_loss(torch.compile(fast, fullgraph=True)(IDS), IDS).backward()
    for expected, found in zip(plain.parameters(), fast.parameters(), strict=True):
        assert_same(found.grad, expected.grad)


@pytest.mark.slow
@each_input
def test_export_with_dynamic_batch_and_length(model: GPT2, inputs: Mapping[str, Tensor]) -> None:
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length", max=CONFIG.n_positions)
    given = {"input_ids": IDS, **inputs}
    shapes = {name: {0: batch, 1: length} for name in given}
    program = torch.export.export(model, (), given, dynamic_shapes=shapes).module()
    for rows, columns in ((7, 9), (1, 40), (2, 1)):
        others = {name: tensor[:1, :1].repeat(rows, columns) for name, tensor in given.items()}
        assert_same(program(**others), model(**others))
