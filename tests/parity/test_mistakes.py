"""`verify` detects mistakes.

Each test breaks the JAX model in a way that is easy to get wrong. `verify` must fail and name the right location.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from support.models import TINY, random_checkpoint

import bridge
import gpt2_jax.model as jax_model
from gpt2_jax.parity import Check, checks, verify
from gpt2_jax.parity.backends import jax_gpt2

CONFIG = replace(TINY, n_layer=3, scale_attn_by_inverse_layer_idx=True)
LENGTH = 12

Patch = pytest.MonkeyPatch


@dataclass(frozen=True)
class Mistake:
    name: str
    make: Callable[[Patch], None]
    check: str
    """The check that must fail."""
    place: str
    """What the check must name: the first divergent activation or, if the forward pass is right, the measurement."""


def in_weights(change: Callable[[dict[str, Any]], None]) -> Callable[[Patch], None]:
    """Break the conversion to Flax: `change` modifies the converted tree."""
    right = bridge.to_flax

    def wrong(*args: Any, **kwargs: Any) -> dict[str, Any]:
        tree = jax.tree.map(np.array, right(*args, **kwargs))
        change(tree)
        return tree

    return lambda patch: patch.setattr(bridge, "to_flax", wrong)


def attn(tree: dict[str, Any]) -> dict[str, Any]:
    return tree["h_1"]["attn"]


def transpose_c_proj(tree: dict[str, Any]) -> None:
    kernel = attn(tree)["c_proj"]["kernel"]
    kernel[:] = kernel.reshape(CONFIG.n_embd, CONFIG.n_embd).T.reshape(kernel.shape)


def transpose_query_projection(tree: dict[str, Any]) -> None:
    kernel = attn(tree)["c_attn"]["kernel"]
    kernel[:, 0] = kernel[:, 0].reshape(CONFIG.n_embd, CONFIG.n_embd).T.reshape(kernel[:, 0].shape)


def swap_query_and_key(tree: dict[str, Any]) -> None:
    for leaf, axis in ((attn(tree)["c_attn"]["kernel"], 1), (attn(tree)["c_attn"]["bias"], 0)):
        leaf[:] = np.take(leaf, [1, 0, 2], axis)


def swap_key_and_value(tree: dict[str, Any]) -> None:
    for leaf, axis in ((attn(tree)["c_attn"]["kernel"], 1), (attn(tree)["c_attn"]["bias"], 0)):
        leaf[:] = np.take(leaf, [0, 2, 1], axis)


def interleave_heads(tree: dict[str, Any]) -> None:
    kernel = attn(tree)["c_attn"]["kernel"]
    D, three, H, K = kernel.shape
    kernel[:] = kernel.reshape(D, three, K, H).swapaxes(2, 3)


def pack_by_head(tree: dict[str, Any]) -> None:
    """Use GPT-NeoX's order, in which query, key and value of each head are adjacent."""
    kernel = attn(tree)["c_attn"]["kernel"]
    D, three, H, K = kernel.shape
    kernel[:] = kernel.reshape(D, H, three, K).swapaxes(1, 2)


def merge_heads_in_the_wrong_order(tree: dict[str, Any]) -> None:
    kernel = attn(tree)["c_proj"]["kernel"]
    H, K, D = kernel.shape
    kernel[:] = kernel.reshape(K, H, D).swapaxes(0, 1)


def swap_layers(tree: dict[str, Any]) -> None:
    tree["h_1"], tree["h_2"] = tree["h_2"], tree["h_1"]


def repeat_a_layer(tree: dict[str, Any]) -> None:
    tree["h_2"] = tree["h_1"]


def drop_attention_bias(tree: dict[str, Any]) -> None:
    attn(tree)["c_proj"]["bias"][:] = 0


def drop_feed_forward_bias(tree: dict[str, Any]) -> None:
    tree["h_1"]["mlp"]["c_fc"]["bias"][:] = 0


def drop_one_key_bias(tree: dict[str, Any]) -> None:
    attn(tree)["c_attn"]["bias"][1] = 0


def swap_norms(tree: dict[str, Any]) -> None:
    layer = tree["h_1"]
    layer["ln_1"], layer["ln_2"] = layer["ln_2"], layer["ln_1"]


def swap_scale_and_bias(tree: dict[str, Any]) -> None:
    norm = tree["h_1"]["ln_2"]
    norm["scale"], norm["bias"] = norm["bias"], norm["scale"]


def take_another_final_norm(tree: dict[str, Any]) -> None:
    tree["ln_f"] = tree["h_2"]["ln_2"]


def shift_the_vocabulary(tree: dict[str, Any]) -> None:
    tree["wte"]["embedding"] = np.roll(tree["wte"]["embedding"], 1, axis=0)


def shift_the_positions(tree: dict[str, Any]) -> None:
    tree["wpe"]["embedding"] = np.roll(tree["wpe"]["embedding"], 1, axis=0)


def round_one_weight(tree: dict[str, Any]) -> None:
    kernel = tree["h_2"]["mlp"]["c_proj"]["kernel"]
    kernel[3, 5] *= 1 + 1e-6


def positions_from_one(patch: Patch) -> None:
    right = jax_model.positions
    patch.setattr(jax_model, "positions", lambda *given: right(*given) + 1)


def positions_ignore_the_mask(patch: Patch) -> None:
    right = jax_model.positions
    patch.setattr(jax_model, "positions", lambda ids, *others: right(ids))


def with_attention(change: Callable[[dict[str, Any], Any], None]) -> Callable[[Patch], None]:
    """Call attention with other arguments: `change` modifies them."""
    right = jax_model.attention

    def wrong(q: Any, k: Any, v: Any, mask: Any, **kwargs: Any) -> Any:
        arguments = {"mask": mask, **kwargs}
        change(arguments, q)
        return right(q, k, v, **arguments)

    return lambda patch: patch.setattr(jax_model, "attention", wrong)


def scale_by_head_size(arguments: dict[str, Any], q: Any) -> None:
    arguments["scale"] = arguments["scale"] / CONFIG.head_size**0.5


def scale_not_at_all(arguments: dict[str, Any], q: Any) -> None:
    arguments["scale"] = arguments["scale"] * CONFIG.head_size**0.5


def see_everything(arguments: dict[str, Any], q: Any) -> None:
    arguments["is_causal"] = False


def see_one_token_ahead(arguments: dict[str, Any], q: Any) -> None:
    T = q.shape[1]
    arguments.update(is_causal=False, mask=jnp.tril(jnp.ones((T, T), bool), 1))


def hide_the_own_token(arguments: dict[str, Any], q: Any) -> None:
    T = q.shape[1]
    arguments.update(is_causal=False, mask=jnp.tril(jnp.ones((T, T), bool), -1))


def see_padding(arguments: dict[str, Any], q: Any) -> None:
    arguments["mask"] = None


def softmax_over_queries(patch: Patch) -> None:
    right = jax.nn.softmax
    patch.setattr(jax.nn, "softmax", lambda x, axis: right(x, axis=-2))
    with_attention(lambda arguments, q: arguments.update(implementation="xla"))(patch)


def with_activation(wrong: Callable[[Any], Any]) -> Callable[[Patch], None]:
    return lambda patch: patch.setattr(jax_model, "ACTIVATIONS", {**jax_model.ACTIVATIONS, "gelu_new": wrong})


def another_epsilon_in_one_norm(patch: Patch) -> None:
    class LayerNorm(jax_model.LayerNorm):
        def __call__(self, x: Any) -> Any:
            if self.path == ("h_1", "ln_2"):
                object.__setattr__(self, "config", replace(self.config, layer_norm_epsilon=1e-6))
            return super().__call__(x)

    patch.setattr(jax_model, "LayerNorm", LayerNorm)


def with_layer(call: Callable[..., Any]) -> Callable[[Patch], None]:
    """Connect the correct submodules of a layer incorrectly."""
    call.__name__ = "__call__"  # Linen takes the method's name from the function
    wrong = type("GPT2Layer", (jax_model.GPT2Layer,), {"__call__": call})
    return lambda patch: patch.setattr(jax_model, "GPT2Layer", wrong)


def post_norm(layer: Any, x: Any, mask: Any = None, *, layer_index: Any = 0, **others: Any) -> Any:
    x = layer.ln_1(x + layer.attn(x, x, x, mask, is_causal=True, layer_index=layer_index))
    return layer.ln_2(x + layer.mlp(x))


def no_residual(layer: Any, x: Any, mask: Any = None, *, layer_index: Any = 0, **others: Any) -> Any:
    y = layer.ln_1(x)
    x = x + layer.attn(y, y, y, mask, is_causal=True, layer_index=layer_index)
    return layer.mlp(layer.ln_2(x))


def side_by_side(layer: Any, x: Any, mask: Any = None, *, layer_index: Any = 0, **others: Any) -> Any:
    """GPT-J's layer: attention and feed-forward have the same input."""
    y = layer.ln_1(x)
    return x + layer.attn(y, y, y, mask, is_causal=True, layer_index=layer_index) + layer.mlp(layer.ln_2(x))


def every_layer_the_first(layer: Any, x: Any, mask: Any = None, *, layer_index: Any = 0, **others: Any) -> Any:
    y = layer.ln_1(x)
    x = x + layer.attn(y, y, y, mask, is_causal=True, layer_index=0)
    return x + layer.mlp(layer.ln_2(x))


def untied_head(patch: Patch) -> None:
    patch.setattr(jax_model, "project_to_vocabulary", lambda x, embedding: x @ jnp.roll(embedding, 1, axis=1).T)


def no_final_norm(patch: Patch) -> None:
    right = jax_model.LayerNorm.__call__
    patch.setattr(jax_model.LayerNorm, "__call__", lambda self, x: x if self.name == "ln_f" else right(self, x))


def half_precision_products(patch: Patch) -> None:
    """Round float32 operands, as GPUs and TPUs do by default."""
    right = jax_model.project_to_vocabulary

    def narrowed(x: Any, embedding: Any) -> Any:
        return right(x.astype(jnp.bfloat16).astype(x.dtype) if x.dtype == jnp.float32 else x, embedding)

    patch.setattr(jax_model, "project_to_vocabulary", narrowed)


def norms_lose_two_bits_of_bfloat16(patch: Patch) -> None:
    right = jax_model.LayerNorm.__call__

    def norm(self: Any, x: Any) -> Any:
        y = right(self, x)
        return jax.lax.reduce_precision(y, 8, 5) if y.dtype == jnp.bfloat16 else y

    patch.setattr(jax_model.LayerNorm, "__call__", norm)


def loss_without_shift(patch: Patch) -> None:
    def loss(logits: Any, ids: Any) -> Any:
        return optax.softmax_cross_entropy_with_integer_labels(logits, ids).mean()

    patch.setattr(jax_gpt2, "next_token_loss", loss)


def frozen_positions(patch: Patch) -> None:
    right = jax_model.Embedding.__call__

    def call(self: Any, ids: Any) -> Any:
        rows = right(self, ids)
        return jax.lax.stop_gradient(rows) if self.name == "wpe" else rows

    patch.setattr(jax_model.Embedding, "__call__", call)


def with_optimizer(**changed: Any) -> Callable[[Patch], None]:
    right = optax.adamw

    def adamw(*args: Any, **kwargs: Any) -> Any:
        return right(*args, **{**kwargs, **changed})

    return lambda patch: patch.setattr(optax, "adamw", adamw)


def no_decay_of_biases(patch: Patch) -> None:
    """Break training as in a model that is too large to train in float64."""
    patch.setattr(checks, "FP64_TRAIN_BYTES", 0)

    def mask(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key != "bias", params)

    with_optimizer(mask=mask)(patch)


def adam_epsilon_inside_the_root(patch: Patch) -> None:
    right = optax.adamw

    def adamw(rate: float, b1: float, b2: float, eps: float, weight_decay: float) -> Any:
        return right(rate, b1, b2, 0.0, eps_root=eps, weight_decay=weight_decay)

    patch.setattr(optax, "adamw", adamw)


def in_tensors(change: Callable[[dict[str, Any]], None]) -> Callable[[Patch], None]:
    right = bridge.to_torch

    def wrong(*args: Any, **kwargs: Any) -> dict[str, Any]:
        state = {name: np.array(array) for name, array in right(*args, **kwargs).items()}
        change(state)
        return state

    return lambda patch: patch.setattr(bridge, "to_torch", wrong)


def cut_to_bfloat16(state: dict[str, Any]) -> None:
    name = "h.1.mlp.c_fc.weight"
    state[name] = state[name].astype(jnp.bfloat16).astype(state[name].dtype)


def transpose_on_the_way_back(state: dict[str, Any]) -> None:
    state["h.2.attn.c_proj.weight"] = np.ascontiguousarray(state["h.2.attn.c_proj.weight"].T)


def lose_the_sign_of_zero(state: dict[str, Any]) -> None:
    state["h.0.ln_1.bias"].flat[0] = -state["h.0.ln_1.bias"].flat[0]


HIDDEN = "hidden states"
MISTAKES = [
    Mistake("attn.c_proj transposed", in_weights(transpose_c_proj), HIDDEN, "h.1.attn.c_proj"),
    Mistake("query projection transposed", in_weights(transpose_query_projection), HIDDEN, "h.1.attn.c_attn"),
    Mistake("query and key swapped", in_weights(swap_query_and_key), HIDDEN, "h.1.attn.c_attn"),
    Mistake("key and value swapped", in_weights(swap_key_and_value), HIDDEN, "h.1.attn.c_attn"),
    Mistake("heads interleaved", in_weights(interleave_heads), HIDDEN, "h.1.attn.c_attn"),
    Mistake("packed by head", in_weights(pack_by_head), HIDDEN, "h.1.attn.c_attn"),
    Mistake("heads merged in the wrong order", in_weights(merge_heads_in_the_wrong_order), HIDDEN, "h.1.attn.c_proj"),
    Mistake("two layers swapped", in_weights(swap_layers), HIDDEN, "h.1.ln_1"),
    Mistake("a layer repeated", in_weights(repeat_a_layer), HIDDEN, "h.2.ln_1"),
    Mistake("attn.c_proj bias dropped", in_weights(drop_attention_bias), HIDDEN, "h.1.attn.c_proj"),
    Mistake("mlp.c_fc bias dropped", in_weights(drop_feed_forward_bias), HIDDEN, "h.1.mlp.c_fc"),
    # Softmax cancels the key bias, so the logits are right and only this activation differs.
    Mistake("key bias dropped", in_weights(drop_one_key_bias), HIDDEN, "h.1.attn.c_attn"),
    Mistake("ln_1 and ln_2 swapped", in_weights(swap_norms), HIDDEN, "h.1.ln_1"),
    Mistake("norm scale and bias swapped", in_weights(swap_scale_and_bias), HIDDEN, "h.1.ln_2"),
    Mistake("another norm for ln_f", in_weights(take_another_final_norm), HIDDEN, "ln_f"),
    Mistake("vocabulary shifted", in_weights(shift_the_vocabulary), HIDDEN, "wte"),
    Mistake("position table shifted", in_weights(shift_the_positions), HIDDEN, "wpe"),
    Mistake("one weight off by a millionth", in_weights(round_one_weight), HIDDEN, "h.2.mlp.c_proj"),
    Mistake("positions from 1", positions_from_one, HIDDEN, "wpe"),
    Mistake("epsilon 1e-6 in one norm", another_epsilon_in_one_norm, HIDDEN, "h.1.ln_2"),
    Mistake(
        "erf for tanh GELU", with_activation(lambda x: nn.gelu(x, approximate=False)), HIDDEN, "h.0.mlp.activation"
    ),
    Mistake("ReLU for GELU", with_activation(nn.relu), HIDDEN, "h.0.mlp.activation"),
    Mistake("scores over K", with_attention(scale_by_head_size), HIDDEN, "h.0.attn.context"),
    Mistake("scores not scaled", with_attention(scale_not_at_all), HIDDEN, "h.0.attn.context"),
    Mistake("no causal mask", with_attention(see_everything), HIDDEN, "h.0.attn.context"),
    Mistake("mask one too wide", with_attention(see_one_token_ahead), HIDDEN, "h.0.attn.context"),
    Mistake("mask one too narrow", with_attention(hide_the_own_token), HIDDEN, "h.0.attn.context"),
    Mistake("softmax over queries", softmax_over_queries, HIDDEN, "h.0.attn.context"),
    Mistake("inverse layer index ignored", with_layer(every_layer_the_first), HIDDEN, "h.1.attn.context"),
    Mistake("post-norm", with_layer(post_norm), HIDDEN, "h.0.ln_1"),
    Mistake("residual forgotten", with_layer(no_residual), HIDDEN, "h.0"),
    Mistake("attention and feed-forward side by side", with_layer(side_by_side), HIDDEN, "h.0.ln_2"),
    Mistake("final norm forgotten", no_final_norm, HIDDEN, "ln_f"),
    Mistake("untied head", untied_head, HIDDEN, "lm_head"),
    Mistake("attn.c_proj transposed, by its logits", in_weights(transpose_c_proj), "logits", "h.1.attn.c_proj"),
    Mistake("products in half precision", half_precision_products, "logits", "fp32 logits, max difference"),
    Mistake(
        "norms with too few bits",
        norms_lose_two_bits_of_bfloat16,
        "logits",
        "bf16 error vs fp64, JAX / torch",
    ),
    Mistake("positions ignore padding", positions_ignore_the_mask, "padding", "wpe"),
    Mistake("attention sees padding", with_attention(see_padding), "padding", "h.0.attn.context"),
    Mistake("loss not shifted", loss_without_shift, "gradients", "fp64 gradients"),
    Mistake("positions not trained", frozen_positions, "gradients", "wpe.weight"),
    Mistake("optax's own weight decay", with_optimizer(weight_decay=1e-4), "training", "fp64 weight updates"),
    Mistake("Nesterov momentum", with_optimizer(nesterov=True), "training", "fp64 losses"),
    Mistake("Adam's epsilon inside the root", adam_epsilon_inside_the_root, "training", "fp64 losses"),
    Mistake("biases not decayed", no_decay_of_biases, "training", "fp32 weight updates"),
    Mistake("rounded on the way back", in_tensors(cut_to_bfloat16), "round trip", "h.1.mlp.c_fc.weight"),
    Mistake("transposed on the way back", in_tensors(transpose_on_the_way_back), "round trip", "h.2.attn.c_proj"),
    Mistake("a sign lost on the way back", in_tensors(lose_the_sign_of_zero), "round trip", "h.0.ln_1.bias"),
]


@pytest.mark.sampled(5)
@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_verify_detects_the_mistake_and_names_its_location(mistake: Mistake, monkeypatch: Patch) -> None:
    checkpoint = random_checkpoint(CONFIG)
    mistake.make(monkeypatch)
    report = verify(checkpoint, seq_len=LENGTH, checks=(mistake.check.replace(" ", "-"),))
    (check,) = report.checks
    assert not report.passed
    if check.first_divergence:
        assert check.first_divergence == mistake.place
    else:
        assert any(mistake.place in f"{m.name} {m.location}" for m in check.measurements if not m.passed), failures(
            check
        )


@pytest.mark.sampled(3)
@pytest.mark.parametrize("check", sorted({mistake.check for mistake in MISTAKES}))
def test_the_check_passes_without_a_mistake(check: str) -> None:
    report = verify(random_checkpoint(CONFIG), seq_len=LENGTH, checks=(check.replace(" ", "-"),))
    assert report.passed, failures(report.checks[0])
    assert report.checks[0].first_divergence == ""


def failures(check: Check) -> list[str]:
    return [f"{m.name}: {m.value} > {m.tolerance} at {m.location!r}" for m in check.measurements if not m.passed]
