"""Generation with the reference model: a preallocated key/value cache, and a loop over tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

import bridge.generation.decoder
from bridge import GPT2Config
from bridge.evaluation import LabelScores
from bridge.generation.config import GenerationConfig
from bridge.generation.output import ENDED, INVALID, Candidates, Chunk, concatenate
from bridge.generation.processors import LogitsProcessors, padded_ids, seen_tokens
from gpt2_torch.evaluation import label_scores
from gpt2_torch.logits_processors import History, on_device, process_logits
from gpt2_torch.model import GPT2, check_shape
from gpt2_torch.ops.kv_cache import KVCache, empty_cache
from gpt2_torch.sampling import select_token


def generate(
    model: GPT2,
    input_ids: Int[Tensor, "B T"],
    generation_config: GenerationConfig | None = None,
    **overrides: Any,
) -> Int[Tensor, "B*num_return_sequences T+new"]:
    """Return each prompt followed by `max_new_tokens` new tokens.

    Rows that end early are filled with the first of `eos_token_ids`. Use `Decoder` for prompts of different lengths,
    for streaming, or for log-probabilities.

    Args:
        input_ids: prompts of one length.
        generation_config: the configuration.
        **overrides: fields of `bridge.GenerationConfig`, which replace those of `generation_config`. Without
            `generation_config`, `max_new_tokens` is required.

    Raises `ValueError` for an invalid configuration or for logits that are NaN or infinite, and `IndexError` for an id
    outside the vocabulary.
    """
    check_shape(input_ids)
    config = GenerationConfig.of(generation_config, overrides)
    prompts = input_ids.cpu().numpy()
    outputs = Decoder(model).generate(prompts.tolist(), config)
    return torch.from_numpy(concatenate(prompts, outputs, config)).to(input_ids.device)


@dataclass
class _State:
    """The state of the loop over tokens. Axes: R rows, V vocabulary, N the maximum number of new tokens."""

    cache: KVCache
    ids_RN: Int[Tensor, "R N"]
    """`ENDED` before a token is selected and after the end of a row; `INVALID` if no token could be selected."""
    logprobs_RN: Float[Tensor, "R N"] | None
    noise_RN: Float[Tensor, "R N"]
    history: History
    ended_R: Bool[Tensor, " R"]
    eos_token_ids: Int[Tensor, " eos"]
    processors: LogitsProcessors


@dataclass
class _Beams:
    """The state of beam search."""

    cache: KVCache
    history: History
    processors: LogitsProcessors


class Decoder(bridge.generation.decoder.Decoder[_State, _Beams]):
    """Generates with one model, on its device and in its dtype. Does not change the model's mode or gradients."""

    def __init__(self, model: GPT2) -> None:
        self.config: GPT2Config = model.config
        self.model: GPT2 = model

    def score_labels(self, ids: np.ndarray, labels: np.ndarray) -> LabelScores:
        with _in_eval_mode(self.model):
            return label_scores(self.model, True, ids, labels)

    def _prefill(
        self,
        ids: np.ndarray,
        num_padding: np.ndarray,
        max_length: int,
        generation_config: GenerationConfig,
        noise: np.ndarray,
        ended: np.ndarray,
        copies: int,
    ) -> _State:
        cache, logits_RV = self._prefill_cache(ids, num_padding, max_length, copies)
        (R, N), device = noise.shape, logits_RV.device
        processors = on_device(generation_config, self.config.vocab_size, device)
        state = _State(
            cache=cache,
            ids_RN=torch.full((R, N), ENDED, device=device),
            logprobs_RN=torch.zeros(R, N, device=device) if generation_config.logprobs else None,
            noise_RN=torch.from_numpy(noise).to(device),
            history=self._history(processors, ids, num_padding, max_length, copies),
            ended_R=torch.from_numpy(ended).to(device),
            eos_token_ids=torch.tensor(generation_config.eos_token_ids, dtype=torch.int64, device=device),
            processors=processors,
        )
        _add_token(state, logits_RV)
        return state

    def _decode(self, state: _State, steps: int) -> _State:
        for _ in range(steps):
            if len(state.eos_token_ids) and state.ended_R.all():  # reading the values waits for a GPU
                break
            last_R1 = state.ids_RN[:, state.history.num_new - 1 : state.history.num_new].clamp(min=0)
            _add_token(state, self._next_logits(last_R1, state.cache))
        return state

    def _chunk(self, state: _State, first: int, count: int) -> Chunk:
        ids_RN, logprobs_RN = state.ids_RN[:, first : first + count].cpu().numpy(), None
        if state.logprobs_RN is not None:
            logprobs_RN = state.logprobs_RN[:, first : first + count].cpu().numpy()
        return Chunk(ids_RN, logprobs_RN)

    def prefill_beams(
        self, ids: np.ndarray, num_padding: np.ndarray, max_length: int, config: GenerationConfig, num_candidates: int
    ) -> tuple[_Beams, Candidates]:
        cache, logits_RV = self._prefill_cache(ids, num_padding, max_length, config.num_beams)
        processors = on_device(config, self.config.vocab_size, logits_RV.device)
        history = self._history(processors, ids, num_padding, max_length, config.num_beams)
        beams = _Beams(cache, history, processors)
        return beams, _most_likely(num_candidates, beams, logits_RV)

    def decode_beams(
        self, beams: _Beams, parents: np.ndarray, tokens: np.ndarray, num_candidates: int
    ) -> tuple[_Beams, Candidates]:
        device = beams.cache.num_padding.device
        parents_R, tokens_R = torch.from_numpy(parents).to(device), torch.from_numpy(tokens).to(device).long()
        beams = _Beams(beams.cache.select_rows(parents_R), beams.history.select_rows(parents_R), beams.processors)
        beams.history.append(tokens_R)
        return beams, _most_likely(num_candidates, beams, self._next_logits(tokens_R[:, None], beams.cache))

    def _history(
        self, processors: LogitsProcessors, ids: np.ndarray, num_padding: np.ndarray, max_length: int, copies: int
    ) -> History:
        """Return what the processors need of the prompts' tokens."""
        history, device = padded_ids(ids, num_padding, max_length, copies), self.model.wte.weight.device
        needs_seen = processors.repetition_penalty is not None
        seen_RV = torch.from_numpy(seen_tokens(history, self.config.vocab_size)).to(device) if needs_seen else None
        ids_RS = torch.from_numpy(history).long().to(device) if processors.needs_ids else None
        return History(ids_RS, seen_RV, ids.shape[1])

    def _prefill_cache(
        self, ids: np.ndarray, num_padding: np.ndarray, max_length: int, copies: int
    ) -> tuple[KVCache, Float[Tensor, "B*copies V"]]:
        """Run the prompts. Returns the cache and the next token's logits, with `copies` rows for each prompt."""
        weight = self.model.wte.weight
        cache = empty_cache(self.config, torch.from_numpy(num_padding).to(weight.device), max_length, weight.dtype)
        logits_BV = self._next_logits(torch.from_numpy(ids).to(weight.device), cache)
        if copies == 1:
            return cache, logits_BV
        rows = torch.arange(len(ids), device=weight.device).repeat_interleave(copies)
        return cache.select_rows(rows), logits_BV[rows]

    @torch.no_grad()  # not inference_mode, because a model may be trained on the generated ids
    def _next_logits(self, ids: Int[Tensor, "R T"], cache: KVCache) -> Float[Tensor, "R V"]:
        """Add the ids to the cache and return the next token's logits."""
        with _in_eval_mode(self.model):
            return self.model.head(self.model.decode(ids, cache)[:, -1])


def _add_token(state: _State, logits_RV: Float[Tensor, "R V"]) -> None:
    """Select one more token in each row that has not ended."""
    n = state.history.num_new
    processed_RV = process_logits(logits_RV, state.processors, state.history)
    token_R = select_token(processed_RV, state.noise_RN[:, n], state.processors)
    if state.logprobs_RN is not None:
        state.logprobs_RN[:, n] = logits_RV.float().log_softmax(-1).gather(1, token_R[:, None])[:, 0]
    state.history.append(token_R)
    invalid_R = ~logits_RV.amax(-1).isfinite()  # the maximum is NaN if any element is
    if state.processors.temperature is not None and state.processors.change_scores:
        invalid_R |= processed_RV.amax(-1).isinf()  # no token is left to sample
    invalid_R &= ~state.ended_R
    state.ids_RN[:, n] = token_R.masked_fill(state.ended_R, ENDED).masked_fill(invalid_R, INVALID)
    state.ended_R = state.ended_R | torch.isin(token_R, state.eos_token_ids) | invalid_R.any()


def _most_likely(count: int, beams: _Beams, logits_RV: Float[Tensor, "R V"]) -> Candidates:
    """Return the `count` best tokens of each row. Processors change the log-probabilities, as in transformers.

    Of equal scores, the lower id comes first, as in JAX. `topk` alone does not define this order.
    """
    logprobs_RV = logits_RV.float().log_softmax(-1)
    scores_RV = process_logits(logprobs_RV, beams.processors, beams.history)
    scores_RV = scores_RV.masked_fill(scores_RV.isnan(), -torch.inf)
    lowest_R1 = scores_RV.topk(count).values[:, -1:]
    is_above_RV, is_tied_RV = scores_RV > lowest_R1, scores_RV == lowest_R1
    room_R1 = count - is_above_RV.sum(-1, keepdim=True)
    ids_RN = (is_above_RV | (is_tied_RV & (is_tied_RV.cumsum(-1) <= room_R1))).nonzero()[:, 1].view(-1, count)
    scores_RN, order_RN = scores_RV.gather(1, ids_RN).sort(descending=True, stable=True)
    ids_RN = ids_RN.gather(1, order_RN)
    return Candidates(*(x.cpu().numpy() for x in (ids_RN, scores_RN, logprobs_RV.gather(1, ids_RN))))


@contextmanager
def _in_eval_mode(model: GPT2) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:  # not model.train(), which would also change modules that were in eval mode
            module.training = True
