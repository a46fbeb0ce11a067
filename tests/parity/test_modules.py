"""MultiHeadAttention, FeedForward and GPT2Layer by themselves: both backends against numpy formulas."""

from __future__ import annotations

import ast
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
import transformers
from support.models import TINY, random_state

import bridge
import gpt2_jax
import gpt2_jax.model
import gpt2_torch
import gpt2_torch.model
from bridge import GPT2Config
from bridge.config import ACTIVATIONS

pytestmark = pytest.mark.usefixtures("optimized_compilation")  # float32 bounds of single functions

FP64_ABSOLUTE = 1e-12  # values of order 1 to 10, sums of at most 192 terms
FP32_ABSOLUTE = 2e-5  # the same in float32, whose spacing at 10 is 1e-6

B, T, S, H, D = 2, 7, 11, TINY.n_head, TINY.n_embd
GELU_TANH = math.sqrt(2 / math.pi)

FORMULAS = {
    "gelu_new": lambda x: 0.5 * x * (1 + np.tanh(GELU_TANH * (x + 0.044715 * x**3))),
    "gelu": lambda x: 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))),
    "gelu_fast": lambda x: 0.5 * x * (1 + np.tanh(0.7978845608 * x * (1 + 0.044715 * x * x))),
    "gelu_pytorch_tanh": lambda x: 0.5 * x * (1 + np.tanh(GELU_TANH * (x + 0.044715 * x**3))),
    "quick_gelu": lambda x: x / (1 + np.exp(-1.702 * x)),
    "relu": lambda x: np.maximum(x, 0),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "swish": lambda x: x / (1 + np.exp(-x)),
    "tanh": np.tanh,
    "gelu_python": lambda x: 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))),
    "gelu_accurate": lambda x: 0.5 * x * (1 + np.tanh(GELU_TANH * (x + 0.044715 * x**3))),
    "mish": lambda x: x * np.tanh(np.logaddexp(x, 0)),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
    "relu6": lambda x: np.clip(x, 0, 6),
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "linear": lambda x: x,
}


class Sides:
    """One layer in both backends and as arrays, from the same weights."""

    def __init__(self, config: GPT2Config, dtype: Any = np.float64) -> None:
        state = random_state(config, dtype)
        self.config, self.dtype = config, dtype
        self.arrays = {name.removeprefix("h.1."): a for name, a in state.items() if name.startswith("h.1.")}
        self.params = bridge.to_flax(state, config)["h_1"]
        self.torch_layer = gpt2_torch.GPT2Layer(config).to(torch.from_numpy(np.zeros(0, dtype)).dtype).eval()
        self.torch_layer.load_state_dict({name: torch.from_numpy(a) for name, a in self.arrays.items()})

    def torch(self, part: str, *args: np.ndarray | None, **kwargs: Any) -> np.ndarray:
        module = self.torch_layer if part == "layer" else getattr(self.torch_layer, part)
        tensors = {id(a): torch.from_numpy(a) for a in args if a is not None}  # the same array, the same tensor
        with torch.no_grad():
            return module(*(None if a is None else tensors[id(a)] for a in args), **kwargs).numpy()

    def jax(self, part: str, *args: np.ndarray | None, **kwargs: Any) -> np.ndarray:
        classes = {"layer": gpt2_jax.GPT2Layer, "attn": gpt2_jax.MultiHeadAttention, "mlp": gpt2_jax.FeedForward}
        params = self.params if part == "layer" else self.params[part]
        return np.asarray(classes[part](self.config, self.dtype, self.dtype).apply({"params": params}, *args, **kwargs))

    def attention_formula(
        self, query: np.ndarray, key: np.ndarray, value: np.ndarray, mask: np.ndarray | None, scale: float
    ) -> np.ndarray:
        a = self.arrays
        weights = np.split(a["attn.c_attn.weight"], 3, axis=1)
        biases = np.split(a["attn.c_attn.bias"], 3)
        q, k, v = (
            (x @ w + b).reshape(B, -1, H, D // H).transpose(0, 2, 1, 3)
            for x, w, b in zip((query, key, value), weights, biases, strict=True)
        )
        scores = scale * q @ k.transpose(0, 1, 3, 2)
        if mask is not None:
            mask = np.broadcast_to(mask, scores.shape)
            scores = np.where(mask, scores, -np.inf)
            scores = np.where(mask.any(axis=-1, keepdims=True), scores, 0.0)  # no visible key: equal weights
        probabilities = np.exp(scores - scores.max(axis=-1, keepdims=True))
        probabilities /= probabilities.sum(axis=-1, keepdims=True)
        context = (probabilities @ v).transpose(0, 2, 1, 3).reshape(B, -1, D)
        return context @ a["attn.c_proj.weight"] + a["attn.c_proj.bias"]


def random_inputs(*lengths: int, dtype: Any = np.float64) -> list[np.ndarray]:
    rng = np.random.default_rng(3)
    return [rng.normal(size=(B, length, D)).astype(dtype) for length in lengths]


def random_mask(*shape: int) -> np.ndarray:
    """Return a random mask in which every query has at least one visible key."""
    mask = np.random.default_rng(4).random(shape) < 0.6
    mask[..., 2] = True
    return mask


def assert_all_close(answers: dict[str, np.ndarray], tolerance: float = FP64_ABSOLUTE) -> None:
    (first, expected), *others = answers.items()
    assert np.isfinite(expected).all(), first
    for name, answer in others:
        assert answer.shape == expected.shape
        assert np.abs(answer - expected).max() <= tolerance, f"{name} and {first}"


SCALE = 1 / math.sqrt(TINY.head_size)


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_self_attention_equals_the_formula_with_one_or_three_products(is_causal: bool, x64: None):
    sides, (x,) = Sides(TINY), random_inputs(T)
    mask = np.tril(np.ones((T, T), bool)) if is_causal else None
    assert_all_close(
        {
            "formula": sides.attention_formula(x, x, x, mask, SCALE),
            "torch, packed": sides.torch("attn", x, x, x, is_causal=is_causal),
            "torch, unpacked": sides.torch("attn", x, x.copy(), x.copy(), is_causal=is_causal),
            "jax, packed": sides.jax("attn", x, x, x, is_causal=is_causal),
            "jax, unpacked": sides.jax("attn", x, x.copy(), x.copy(), is_causal=is_causal),
        }
    )


@pytest.mark.parametrize("shape", [None, (1, 1, T, S), (B, 1, 1, S), (B, H, T, S), (1, H, 1, S)], ids=str)
def test_cross_attention_agrees_with_the_formula_under_any_mask(shape: tuple[int, ...] | None, x64: None):
    sides, (query, key, value) = Sides(TINY), random_inputs(T, S, S)
    mask = None if shape is None else random_mask(*shape)
    assert_all_close(
        {
            "formula": sides.attention_formula(query, key, value, mask, SCALE),
            "torch": sides.torch("attn", query, key, value, mask),
            "jax": sides.jax("attn", query, key, value, mask),
        }
    )


@pytest.mark.parametrize("shape", [(1, 1, T, T), (B, 1, 1, T), (B, H, T, T)], ids=str)
def test_a_mask_and_causality_combine(shape: tuple[int, ...], x64: None):
    sides, (x,) = Sides(TINY), random_inputs(T)
    mask = random_mask(*shape)
    mask[..., 0] = True
    both = mask & np.tril(np.ones((T, T), bool))
    assert_all_close(
        {
            "formula": sides.attention_formula(x, x, x, both, SCALE),
            "torch": sides.torch("attn", x, x, x, mask, is_causal=True),
            "jax": sides.jax("attn", x, x, x, mask, is_causal=True),
        }
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, FP64_ABSOLUTE), (np.float32, FP32_ABSOLUTE)], ids=str)
def test_a_query_without_visible_keys_attends_to_all_equally(dtype: type, tolerance: float, x64: None):
    sides, (query, key, value) = Sides(TINY, dtype), random_inputs(T, S, S, dtype=dtype)
    mask = random_mask(B, 1, T, S)
    mask[0, :, 3] = False
    mask[1] = False
    assert_all_close(
        {
            "formula": sides.attention_formula(query, key, value, mask, SCALE),
            "torch": sides.torch("attn", query, key, value, mask),
            "jax": sides.jax("attn", query, key, value, mask),
        },
        tolerance,
    )


@pytest.mark.parametrize("scale_attn_weights", [True, False])
@pytest.mark.parametrize("inverse", [True, False])
@pytest.mark.parametrize("upcast", [True, False])
def test_each_scaling_option_equals_the_formula(scale_attn_weights: bool, inverse: bool, upcast: bool, x64: None):
    config = replace(
        TINY,
        scale_attn_weights=scale_attn_weights,
        scale_attn_by_inverse_layer_idx=inverse,
        reorder_and_upcast_attn=upcast,
    )
    sides, (query, key, value) = Sides(config), random_inputs(T, S, S)
    scale = (SCALE if scale_attn_weights else 1.0) / (4 if inverse else 1)
    assert_all_close(
        {
            "formula": sides.attention_formula(query, key, value, None, scale),
            "torch": sides.torch("attn", query, key, value, layer_index=3),
            "jax": sides.jax("attn", query, key, value, layer_index=3),
        }
    )


def test_causal_attention_between_different_lengths_is_refused():
    sides, (query, key, value) = Sides(TINY, np.float32), random_inputs(T, S, S, dtype=np.float32)
    for side in (sides.torch, sides.jax):
        with pytest.raises(ValueError, match=f"{T} and {S}"):
            side("attn", query, key, value, is_causal=True)


def test_every_activation_has_a_formula_in_both_backends():
    assert set(FORMULAS) == set(ACTIVATIONS)
    assert set(gpt2_torch.model.ACTIVATIONS) == set(ACTIVATIONS)
    assert set(gpt2_jax.model.ACTIVATIONS) == set(ACTIVATIONS)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_feed_forward_equals_its_formula(activation: str, x64: None):
    sides = Sides(replace(TINY, activation_function=activation))
    (x,) = random_inputs(T)
    a = sides.arrays
    inner = FORMULAS[activation](x @ a["mlp.c_fc.weight"] + a["mlp.c_fc.bias"])
    assert_all_close(
        {
            "formula": inner @ a["mlp.c_proj.weight"] + a["mlp.c_proj.bias"],
            "torch": sides.torch("mlp", x),
            "jax": sides.jax("mlp", x),
        }
    )


SPECIAL = [0.0, -0.0, 6.0, -6.0, 1e-30, -1e-30, 88.0, -88.0, 1e4, -1e4]  # kinks, and where exponentials overflow


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("dtype", "relative"), [(np.float64, 1e-12), (np.float32, 4e-6)], ids=["float64", "float32"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_and_their_gradients_equal_those_of_transformers(
    activation: str, dtype: type, relative: float, x64: None
):
    points = np.concatenate([SPECIAL, np.linspace(-9, 9, 301)]).astype(dtype)
    answers, gradients = {}, {}
    torch_functions = {
        "transformers": transformers.activations.ACT2FN[activation],
        "torch": gpt2_torch.model.ACTIVATIONS[activation],
    }
    for name, function in torch_functions.items():
        x = torch.from_numpy(points.copy()).requires_grad_()
        y = function(x)
        y.sum().backward()
        answers[name], gradients[name] = y.detach().numpy(), x.grad.numpy()
    function = gpt2_jax.model.ACTIVATIONS[activation]
    answers["jax"] = np.asarray(function(points))
    gradients["jax"] = np.asarray(jax.grad(lambda x: function(x).sum())(points))
    for found in (answers, gradients):
        assert all(array.dtype == dtype for array in found.values())
        for name in ("torch", "jax"):
            np.testing.assert_allclose(found[name], found["transformers"], rtol=relative, atol=relative)


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("masked", [True, False], ids=["masked", "unmasked"])
def test_a_layer_equals_its_formula(is_causal: bool, masked: bool, x64: None):
    config = replace(TINY, layer_norm_epsilon=0.03, scale_attn_by_inverse_layer_idx=True)
    sides, (x,) = Sides(config), random_inputs(T)
    a = sides.arrays

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        centred = x - x.mean(axis=-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + config.layer_norm_epsilon)
        return scaled * a[f"{name}.weight"] + a[f"{name}.bias"]

    mask = random_mask(B, 1, 1, T) if masked else None
    seen = np.ones((T, T), bool) if mask is None else mask
    seen = seen & np.tril(np.ones((T, T), bool)) if is_causal else seen
    normed = norm(x, "ln_1")
    middle = x + sides.attention_formula(normed, normed, normed, seen, SCALE / 3)
    inner = FORMULAS["gelu_new"](norm(middle, "ln_2") @ a["mlp.c_fc.weight"] + a["mlp.c_fc.bias"])
    assert_all_close(
        {
            "formula": middle + inner @ a["mlp.c_proj.weight"] + a["mlp.c_proj.bias"],
            "torch": sides.torch("layer", x, mask, is_causal=is_causal, layer_index=2),
            "jax": sides.jax("layer", x, mask, is_causal=is_causal, layer_index=2),
        }
    )


def test_the_layer_is_causal_by_default():
    sides, (x,) = Sides(TINY, np.float32), random_inputs(T, dtype=np.float32)
    changed = x.copy()
    changed[:, -1] += 1.0
    for side in (sides.torch, sides.jax):
        np.testing.assert_array_equal(side("layer", x)[:, :-1], side("layer", changed)[:, :-1])


def test_the_two_model_files_define_the_same_classes_and_functions_in_the_same_order():
    def definitions(module: Any) -> list[str]:
        tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
        return [node.name for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)]

    expected = ["Embedding", "Projection", "LayerNorm", "QKVProjection"]
    expected += ["MultiHeadAttention", "FeedForward", "GPT2Layer", "GPT2"]
    expected += ["positions", "check_shape", "check_inputs", "check_values"]
    assert definitions(gpt2_torch.model) == expected
    assert definitions(gpt2_jax.model) == expected
