"""Computation of tokens whose bits do not depend on the batch, on CPU with one thread.

Products with 1 row and with 8 rows use different kernels, which add in different orders. Here, every token is
computed by the same compiled program, in one of `SLOTS` slots (He 2025, "Defeating Nondeterminism in LLM Inference",
fixes the tiles of each kernel for the same purpose). If all slots add in the same order, the result of a token depends
only on its own row. `SlotModel.check` tests this order with the compiled program before any result is used.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from bridge import BridgeError
from gpt2_jax.model import GPT2
from gpt2_jax.ops.kv_cache import KVCache, empty_cache
from gpt2_jax.ops.slot_attention import KEY_BLOCK, Slots

SLOTS = 16
"""Tokens that one program computes. Products with 4 to 32 rows take about the same time on CPU."""

THREADS = "NPROC"
"""The environment variable from which XLA's CPU client takes its number of threads."""


class BatchInvarianceError(BridgeError):
    """Batch-invariant results are not available with this device, number of threads or model."""


@dataclass(frozen=True)
class SlotModel:
    """A model with one set of parameters per layer, which computes tokens in slots.

    Raises `BatchInvarianceError` on several CPU threads, on another device, and with sharded parameters.
    """

    model: GPT2
    params: Mapping[str, Any]
    _checked: set[tuple[int, int]] = field(default_factory=set, init=False, repr=False)
    """Numbers of rows and lengths of the caches whose programs have been tested."""

    def __post_init__(self) -> None:
        if (platform := jax.default_backend()) != "cpu":
            raise BatchInvarianceError(
                f"batch_invariant: JAX computes on {platform}, whose products were not tested; set JAX_PLATFORMS=cpu"
            )
        if os.environ.get(THREADS) != "1":
            raise BatchInvarianceError(
                f"batch_invariant: several threads may add in different orders; set {THREADS}=1 in the environment "
                "before JAX starts"
            )
        if any(len(leaf.sharding.device_set) > 1 for leaf in jax.tree.leaves(self.params)):
            raise BatchInvarianceError(
                "batch_invariant: the parameters are sharded over several devices; put them on one"
            )

    def empty_cache(self, rows: int, max_length: int) -> KVCache:
        """Return a cache whose rows start at index 0. Its length is `max_length`, rounded up to whole blocks of keys.

        Raises `BatchInvarianceError` if the program for this cache computes some slots differently.
        """
        length = -(-max_length // KEY_BLOCK) * KEY_BLOCK
        cache = empty_cache(self.model.config, jnp.zeros(rows, jnp.int32), length, self.model.dtype)
        if (rows, length) not in self._checked:
            cache = self.check(cache)
            self._checked.add((rows, length))
        return cache

    def check(self, cache: KVCache) -> KVCache:
        """Compute one token in all slots at once, whose results must have the same bits, and return the cache.

        The order of additions does not depend on the values, so one token is enough to detect a difference.
        """
        zeros = np.zeros(SLOTS, np.int32)
        x_MD, cache = _run(self.model, self.params, zeros, Slots(zeros, zeros, SLOTS), cache)
        for array in (x_MD, *self.logits(x_MD)):
            bits = [row.tobytes() for row in np.asarray(array)]
            if (different := sum(row != bits[0] for row in bits)) > 0:
                raise BatchInvarianceError(
                    f"batch_invariant: XLA adds in another order in {different} of {SLOTS} slots, for arrays of shape "
                    f"{array.shape} in {array.dtype} on this CPU; use another dtype, or decode without batch_invariant"
                )
        return cache

    def hidden(
        self, ids: Sequence[int], rows: Sequence[int], positions: Sequence[int], cache: KVCache
    ) -> tuple[Float[np.ndarray, "N D"], KVCache]:
        """Run N tokens. The tokens of a row must be in order."""
        pieces, count = [], len(ids)
        for start in range(0, count, SLOTS):
            used = min(SLOTS, count - start)
            ids_M, row_M, position_M = (
                np.pad(np.asarray(values[start : start + used], np.int32), (0, SLOTS - used))
                for values in (ids, rows, positions)
            )
            x_MD, cache = _run(self.model, self.params, ids_M, Slots(row_M, position_M, used), cache)
            pieces.append(np.asarray(x_MD)[:used])
        return np.concatenate(pieces), cache

    def prefill(self, prompts: Sequence[Sequence[int]], cache: KVCache) -> tuple[Float[np.ndarray, "R D"], KVCache]:
        """Run one prompt in each of the first R rows of the cache. Returns the last hidden state of each."""
        ids = [i for prompt in prompts for i in prompt]
        rows = [r for r, prompt in enumerate(prompts) for _ in prompt]
        positions = [p for prompt in prompts for p in range(len(prompt))]
        x_ND, cache = self.hidden(ids, rows, positions, cache)
        return x_ND[np.cumsum([len(prompt) for prompt in prompts]) - 1], cache

    def logits(self, x_MD: Float[Any, "M D"]) -> tuple[Float[Array, "M V"], Float[Array, "M V"]]:
        """Return the logits and log-probabilities of the next token. M is `SLOTS`."""
        logits_MV = _head(self.model, self.params, jnp.asarray(x_MD))
        return logits_MV, _log_softmax(logits_MV)

    def token_logprobs(self, ids: Sequence[int]) -> Float[np.ndarray, " T-1"]:
        """Return log p of each token but the first, given those before it, in nats."""
        x_TD, _ = self.hidden(ids, [0] * len(ids), range(len(ids)), self.empty_cache(SLOTS, len(ids)))
        found = np.empty(len(ids) - 1, np.float32)
        for start in range(0, len(found), SLOTS):
            part = slice(start, min(start + SLOTS, len(found)))
            x_MD = np.resize(x_TD[part], (SLOTS, x_TD.shape[1]))
            logprobs_MV = np.asarray(self.logits(x_MD)[1])
            found[part] = logprobs_MV[np.arange(part.stop - start), np.asarray(ids[start + 1 : part.stop + 1])]
        return found


@functools.partial(jax.jit, static_argnums=0, donate_argnums=4)
def _run(
    model: GPT2, params: Mapping[str, Any], ids_M: Int[Array, " M"], slots: Slots, cache: KVCache
) -> tuple[Float[Array, "M D"], KVCache]:
    result: Any = model.apply({"params": params}, ids_M, slots, cache, method="decode_slots")
    return result


@functools.partial(jax.jit, static_argnums=0)
def _head(model: GPT2, params: Mapping[str, Any], x_MD: Float[Array, "M D"]) -> Float[Array, "M V"]:
    logits: Any = model.apply({"params": params}, x_MD, method="head")
    return logits


@jax.jit
def _log_softmax(logits_MV: Float[Array, "M V"]) -> Float[Array, "M V"]:
    return jax.nn.log_softmax(logits_MV.astype(jnp.float32), axis=-1)
