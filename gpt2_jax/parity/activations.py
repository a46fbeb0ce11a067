"""Names of the activations that are compared between the backends, and the comparison.

An activation has the name of the PyTorch module that outputs it, such as `h.3.attn.c_attn`. Two activations are inputs
of a projection instead: `h.3.attn.context` is the output of attention before `c_proj`, and `h.3.mlp.activation` is the
output of the activation function.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from bridge import IGNORE_INDEX
from gpt2_jax.parity.metrics import max_relative_difference
from gpt2_jax.parity.tolerances import ACTIVATION_FP64

LOGITS = "lm_head"
"""The name of the logits."""

_OUTPUTS = re.compile(r"wte|wpe|drop|h\.\d+(\.(ln_1|attn\.c_attn|attn\.c_proj|ln_2|mlp\.c_fc|mlp\.c_proj))?|ln_f")

Activations = dict[str, np.ndarray]
"""Name -> value in float64, in the order of the forward pass."""


def is_recorded_output(module: str) -> bool:
    """Whether the output of the module with this name is compared."""
    return _OUTPUTS.fullmatch(module) is not None


def recorded_input(module: str) -> str | None:
    """The name of the activation that is the input of this module, or None if its input is not compared.

    >>> recorded_input("h.3.attn.c_proj")
    'h.3.attn.context'
    """
    if module.endswith(".attn.c_proj"):
        return module.removesuffix("c_proj") + "context"
    if module.endswith(".mlp.c_proj"):
        return module.removesuffix("c_proj") + "activation"
    return None


def torch_name(flax_path: tuple[str, ...]) -> str:
    """The PyTorch name of a Flax module.

    >>> torch_name(("h_3", "attn", "c_attn"))
    'h.3.attn.c_attn'
    """
    return re.sub(r"\bh_(\d+)", r"h.\1", ".".join(flax_path))


class Outputs(NamedTuple):
    """What one side computes from token ids [B, T], at K chosen positions of every row and for all tokens."""

    hidden_states: np.ndarray
    """[B, K, L + 2, D]: the outputs of the modules in `layer_outputs`."""
    logits: np.ndarray
    """[B, K, V]."""
    losses: np.ndarray
    """[B, T - 1]: the loss of each token that has a token before it, in nats; 0 if either of them is padding."""


def layer_outputs(n_layer: int) -> tuple[str, ...]:
    """The names of the embeddings, the output of every layer, and the output of the final norm."""
    return ("drop", *(f"h.{layer}" for layer in range(n_layer)), "ln_f")


def next_labels(ids: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """The labels [B, T - 1] of the losses in `Outputs`: the next token, or `IGNORE_INDEX` at padding."""
    if mask is None:
        return ids[:, 1:]
    return np.where((mask[:, 1:] == 1) & (mask[:, :-1] == 1), ids[:, 1:], IGNORE_INDEX)


def activation_differences(
    expected: Mapping[str, np.ndarray], actual: Activations, is_token_BT: np.ndarray
) -> dict[str, float]:
    """Maximum relative difference of every activation, over the positions where `is_token_BT` is True.

    An activation that is missing from `actual`, has another shape or contains NaN has an infinite difference.
    """
    differences = {}
    for name, reference in expected.items():
        found = actual.get(name)
        if found is None or found.shape != reference.shape:
            differences[name] = float("inf")
        else:
            differences[name] = max_relative_difference(
                _at_tokens(found, is_token_BT), _at_tokens(reference, is_token_BT)
            )
    return differences


def first_divergence(differences: dict[str, float]) -> str:
    """The first activation of the forward pass that exceeds its tolerance, or "" if all are within it."""
    exceeding = (name for name, difference in differences.items() if not difference <= ACTIVATION_FP64)
    return next(exceeding, "")


def _at_tokens(x: np.ndarray, is_token_BT: np.ndarray) -> np.ndarray:
    if x.ndim == 5:  # query, key and value: [3, B, T, H, K]
        return x[:, is_token_BT]
    return np.broadcast_to(x, (*is_token_BT.shape, *x.shape[2:]))[is_token_BT]  # the output of wpe is [1, T, D]
