"""The implementations of GPT-2 that must agree. Each is built from a checkpoint and returns numpy arrays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bridge
import gpt2_jax
from bridge import Checkpoint
from bridge.generation.decoder import Decoder

if TYPE_CHECKING:  # functions import them, so that tests of the JAX model run without torch
    import torch
    import transformers

    import gpt2_torch


def torch_model(checkpoint: Checkpoint) -> gpt2_torch.GPT2:
    import gpt2_torch

    return gpt2_torch.model_from_checkpoint(checkpoint)


def jax_model(checkpoint: Checkpoint, **kwargs: Any) -> tuple[gpt2_jax.GPT2, dict[str, Any]]:
    """Return a model that computes in the dtype of the checkpoint."""
    return gpt2_jax.model_from_checkpoint(checkpoint, dtype=checkpoint.tensors["wte.weight"].dtype, **kwargs)


def transformers_model(checkpoint: Checkpoint) -> transformers.GPT2LMHeadModel:
    """Return a model with `eager` attention, the only one of transformers that supports `reorder_and_upcast_attn`.

    In float64 the setting is off, because transformers would round scores to float32.
    """
    import torch
    import transformers
    from transformers.initialization import no_init_weights

    state = {name: torch.from_numpy(np.array(array)) for name, array in checkpoint.tensors.items()}
    hf = checkpoint.config.to_hf()
    if state["wte.weight"].dtype == torch.float64:
        hf["reorder_and_upcast_attn"] = False
    config = transformers.GPT2Config(**hf, attn_implementation="eager")
    with torch.device("meta"), no_init_weights():
        model = transformers.GPT2LMHeadModel(config)
    head = state.pop("lm_head.weight", state["wte.weight"])
    model.load_state_dict({f"transformer.{k}": v for k, v in state.items()} | {"lm_head.weight": head}, assign=True)
    model.tie_weights()
    return model.eval()


def torch_logits(checkpoint: Checkpoint, ids: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    import torch

    with torch.no_grad():
        return torch_model(checkpoint)(torch.from_numpy(ids), None if mask is None else torch.from_numpy(mask)).numpy()


def jax_logits(
    checkpoint: Checkpoint, ids: np.ndarray, mask: np.ndarray | None = None, *, jit: bool = False, **kwargs: Any
) -> np.ndarray:
    """Compute logits, by default without jit, because compiling each of many small models takes longer."""
    model, params = jax_model(checkpoint, **kwargs)
    apply = jax.jit(model.apply) if jit else model.apply
    return np.asarray(apply({"params": params}, ids, mask))


def transformers_logits(checkpoint: Checkpoint, ids: np.ndarray) -> np.ndarray:
    import torch

    with torch.no_grad():
        return transformers_model(checkpoint)(torch.from_numpy(ids)).logits.numpy()


def torch_gradients(model: torch.nn.Module, logits: torch.Tensor, ids: np.ndarray) -> dict[str, np.ndarray]:
    """Return gradients of the mean cross-entropy of the next token, by canonical name. A tied weight occurs once."""
    import torch

    targets = torch.from_numpy(ids)[:, 1:].flatten()
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets).backward()
    given = dict(model.named_parameters())
    return {name: given[own].grad.numpy() for name, own in bridge.canonical_names(given).items()}


def jax_gradients(checkpoint: Checkpoint, ids: np.ndarray, **kwargs: Any) -> dict[str, np.ndarray]:
    """Return gradients of the mean cross-entropy of the next token, by canonical name."""
    model, params = jax_model(checkpoint, **kwargs)

    def loss(params: dict[str, Any]) -> jax.Array:
        log_probabilities = jax.nn.log_softmax(model.apply({"params": params}, ids)[:, :-1])
        return -jnp.take_along_axis(log_probabilities, jnp.asarray(ids)[:, 1:, None], axis=-1).mean()

    return bridge.to_torch(jax.grad(loss)(params), checkpoint.config)


def relative_error(a: np.ndarray, b: np.ndarray) -> float:
    """Return the largest difference, relative to the largest magnitude in `b`."""
    assert a.shape == b.shape
    return float(np.abs(a - b).max() / np.abs(b).max())


def relative_l2(a: np.ndarray, b: np.ndarray) -> float:
    assert a.shape == b.shape
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def largest_divergence(logits_a: np.ndarray, logits_b: np.ndarray) -> float:
    """Return the largest KL(a || b) of any position in nats, computed in float64."""
    log_a, log_b = (_log_softmax(logits.astype(np.float64)) for logits in (logits_a, logits_b))
    return float((np.exp(log_a) * (log_a - log_b)).sum(axis=-1).max())


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits - logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


Decoders = Mapping[str, Decoder[Any, Any]]
each_backend = pytest.mark.parametrize("backend", ["gpt2_torch", "gpt2_jax"])


def decoders_of(checkpoint: Checkpoint) -> Decoders:
    """Return the decoder of each backend."""
    import gpt2_torch

    return {
        "gpt2_torch": gpt2_torch.Decoder(torch_model(checkpoint)),
        "gpt2_jax": gpt2_jax.Decoder(*jax_model(checkpoint)),
    }
