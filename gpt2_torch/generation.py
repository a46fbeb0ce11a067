"""Generation from the reference: a preallocated key/value cache, and a loop over it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bridge.generation import decoder as decoding
from bridge.generation.config import GenerationConfig
from bridge.generation.decoder import ENDED, INVALID, Chunk, with_continuations
from gpt2_torch.logits_processors import choose
from gpt2_torch.model import GPT2, KVCache, check_form, empty_cache


def generate(
    model: GPT2,
    input_ids: Int[Tensor, "B T"],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    samples: int = 1,
    stop_ids: Sequence[int] = (),
    slide: bool = False,
    beams: int = 1,
    length_penalty: float = 1.0,
    seed: int = 0,
) -> Int[Tensor, "B*samples T+new"]:
    """Return each prompt followed by `max_new_tokens` tokens. The arguments are fields of `bridge.GenerationConfig`.

    After a stop id, the rest of the row is filled with the first of `stop_ids`. Use `Decoder` for prompts of different
    lengths, for streaming or for log-probabilities.

    Raises `ValueError` for an invalid request or for logits that are NaN or infinite, and `IndexError` for an id
    outside the vocabulary.
    """
    check_form(input_ids)
    request = GenerationConfig(
        max_new_tokens=max_new_tokens,
        repetition_penalty=repetition_penalty,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=seed,
        samples=samples,
        stop_ids=tuple(stop_ids),
        slide=slide,
        beams=beams,
        length_penalty=length_penalty,
    )
    prompts = input_ids.cpu().numpy()
    found = Decoder(model).generate(prompts.tolist(), request)
    return torch.from_numpy(with_continuations(prompts, found, request)).to(input_ids.device)


@dataclass
class _State:
    """Of the loop over tokens. R rows, V vocabulary, N the most tokens that it can make."""

    cache: KVCache
    ids_RN: Int[Tensor, "R N"]
    """`ENDED` before a token is chosen and after the end of a row; `INVALID` if no token could be chosen."""
    log_probs_RN: Float[Tensor, "R N"] | None
    draws_RN: Float[Tensor, "R N"]
    seen_RV: Bool[Tensor, "R V"] | None
    """The tokens of each row, where their repetition is penalized."""
    ended_R: Bool[Tensor, " R"]
    stop_ids: Int[Tensor, " stops"]
    request: GenerationConfig
    made: int = 0


class Decoder(decoding.Decoder[_State, KVCache]):
    """Generation from one model, on its device and in its dtype; the model's mode and gradients stay as they are."""

    def __init__(self, model: GPT2) -> None:
        self.config, self.model = model.config, model

    def _begin(
        self,
        ids: np.ndarray,
        padding: np.ndarray,
        slots: int,
        request: GenerationConfig,
        draws: np.ndarray,
        ended: np.ndarray,
        copies: int,
    ) -> _State:
        cache, logits_RV = self._prefilled(ids, padding, slots, copies)
        (R, N), device = draws.shape, logits_RV.device
        seen = None
        if request.repetition_penalty is not None:
            seen = torch.zeros(R, self.config.vocab_size, dtype=torch.bool, device=device)
            for r in range(R):
                seen[r, ids[r // copies, padding[r // copies] :]] = True
        state = _State(
            cache=cache,
            ids_RN=torch.full((R, N), ENDED, device=device),
            log_probs_RN=torch.zeros(R, N, device=device) if request.log_probs else None,
            draws_RN=torch.from_numpy(draws).to(device),
            seen_RV=seen,
            ended_R=torch.from_numpy(ended).to(device),
            stop_ids=torch.tensor(request.stop_ids, dtype=torch.int64, device=device),
            request=request,
        )
        _add_token(state, logits_RV)
        return state

    def _advance(self, state: _State, steps: int) -> _State:
        for _ in range(steps):
            if state.request.stop_ids and state.ended_R.all():  # looking waits for a GPU
                break
            last_R1 = state.ids_RN[:, state.made - 1 : state.made].clamp(min=0)
            _add_token(state, self._extended(last_R1, state.cache))
        return state

    def _made(self, state: _State, first: int, number: int) -> Chunk:
        ids_RN, log_probs_RN = state.ids_RN[:, first : first + number].cpu().numpy(), None
        if state.log_probs_RN is not None:
            log_probs_RN = state.log_probs_RN[:, first : first + number].cpu().numpy()
        return Chunk(ids_RN, log_probs_RN)

    def _begin_beams(
        self, ids: np.ndarray, padding: np.ndarray, slots: int, beams: int, candidates: int
    ) -> tuple[KVCache, np.ndarray, np.ndarray]:
        cache, logits_RV = self._prefilled(ids, padding, slots, beams)
        return cache, *_likeliest(candidates, logits_RV)

    def _advance_beams(
        self, state: KVCache, parents: np.ndarray, tokens: np.ndarray, candidates: int
    ) -> tuple[KVCache, np.ndarray, np.ndarray]:
        cache = state.of_rows(torch.from_numpy(parents).to(state.padding.device))
        tokens_R1 = torch.from_numpy(tokens)[:, None].to(state.padding.device)
        return cache, *_likeliest(candidates, self._extended(tokens_R1, cache))

    def _prefilled(
        self, ids: np.ndarray, padding: np.ndarray, slots: int, copies: int
    ) -> tuple[KVCache, Float[Tensor, "B*copies V"]]:
        weight = self.model.wte.weight
        cache = empty_cache(self.config, torch.from_numpy(padding).to(weight.device), slots, weight.dtype)
        logits_BV = self._extended(torch.from_numpy(ids).to(weight.device), cache)
        if copies == 1:
            return cache, logits_BV
        rows = torch.arange(len(ids), device=weight.device).repeat_interleave(copies)
        return cache.of_rows(rows), logits_BV[rows]

    @torch.no_grad()  # not inference_mode: a model can be trained on the ids that come out
    def _extended(self, ids: Int[Tensor, "R T"], cache: KVCache) -> Float[Tensor, "R V"]:
        """Logits of what follows the ids, which go into the cache."""
        with _evaluating(self.model):
            return self.model.head(self.model.extend(ids, cache)[:, -1])


def _add_token(state: _State, logits_RV: Float[Tensor, "R V"]) -> None:
    """One more token in each row that has not ended."""
    n = state.made
    chosen_R = choose(logits_RV, state.draws_RN[:, n], state.request, state.seen_RV)
    if state.log_probs_RN is not None:
        state.log_probs_RN[:, n] = logits_RV.float().log_softmax(-1).gather(1, chosen_R[:, None])[:, 0]
    if state.seen_RV is not None:
        state.seen_RV.scatter_(1, chosen_R[:, None], True)
    invalid_R = ~logits_RV.amax(-1).isfinite() & ~state.ended_R  # max is NaN if any element is
    state.ids_RN[:, n] = chosen_R.masked_fill(state.ended_R, ENDED).masked_fill(invalid_R, INVALID)
    state.made = n + 1
    state.ended_R = state.ended_R | torch.isin(chosen_R, state.stop_ids) | invalid_R.any()


def _likeliest(number: int, logits_RV: Float[Tensor, "R V"]) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities and ids of the likeliest tokens."""
    found = logits_RV.float().log_softmax(-1).topk(number)
    return found.values.cpu().numpy(), found.indices.cpu().numpy()


@contextmanager
def _evaluating(model: GPT2) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:  # not model.train(), which would set those too that were not
            module.training = True
