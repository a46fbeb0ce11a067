"""Batch-invariant decoding of a group of rows: runs the programs of `gpt2_jax.decoding.batch_invariance`."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from bridge.generation.config import GenerationConfig
from gpt2_jax.decoding.batch_invariance import SLOTS, SlotModel
from gpt2_jax.decoding.state import State, first_state, next_token


def prefill_group(
    slots: SlotModel,
    ids: Int[np.ndarray, "R T"],
    num_padding: Int[np.ndarray, " R"],
    noise: Float[np.ndarray, "R N"],
    ended: Bool[np.ndarray, " R"],
    max_length: int,
    config: GenerationConfig,
) -> State:
    """Run at most `SLOTS` left-padded prompts, and select the first token of each.

    The state always has `SLOTS` rows, because the selection of a token is compiled for the number of rows. Rows of one
    id that have ended fill it.
    """
    (rows, length), fill = ids.shape, SLOTS - len(ids)
    ids, noise = (np.pad(array, ((0, fill), (0, 0))) for array in (ids, noise))
    num_padding = np.pad(num_padding, (0, fill), constant_values=length - 1)
    ended = np.pad(ended, (0, fill), constant_values=True)
    prompts = [ids[r, num_padding[r] :].tolist() for r in range(rows)]
    x_RD, cache = slots.prefill(prompts, slots.empty_cache(SLOTS, max_length))
    cache = cache._replace(num_padding=jnp.asarray(num_padding), length=jnp.asarray(length, jnp.int32))
    state = first_state(cache, ids, slots.model.config.vocab_size, config, noise, ended)
    return next_token(state, *slots.logits(np.pad(x_RD, ((0, fill), (0, 0)))))


def decode_group(slots: SlotModel, state: State, steps: int) -> State:
    """Select `steps` more tokens in each row, or fewer if all rows end earlier."""
    num_padding = np.asarray(state.cache.num_padding)
    for _ in range(steps):
        rows = np.flatnonzero(~np.asarray(state.ended_R))
        if not len(rows):
            break
        length, ids = int(state.cache.length), np.asarray(state.ids_RN)[rows, int(state.num_new) - 1]
        x_RD, cache = slots.hidden(ids.tolist(), rows.tolist(), (length - num_padding[rows]).tolist(), state.cache)
        x_MD = np.zeros((SLOTS, x_RD.shape[1]), x_RD.dtype)
        x_MD[rows] = x_RD
        state = state._replace(cache=cache._replace(length=jnp.asarray(length + 1, jnp.int32)))
        state = next_token(state, *slots.logits(x_MD))
    return state
