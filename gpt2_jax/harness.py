"""An adapter for EleutherAI's lm-evaluation-harness. Needs the `lm-eval` extra.

The harness has no entry points for models of other packages, so the adapter is used from Python. Importing this module
registers it as `gpt2-bridge`::

    import gpt2_jax.harness
    import lm_eval

    results = lm_eval.simple_evaluate("gpt2-bridge", {"pretrained": "my-gpt2"}, tasks=["lambada_openai"])

The harness's own code tokenizes pairs and splits texts into windows, so the results are those of its model `hf` on the
same checkpoint, up to rounding.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bridge import BridgeError, GenerationConfig, Tokenizer, generate_text, load, loglikelihood
from bridge.errors import install_command, quoted
from bridge.generation.decoder import Decoder
from bridge.generation.scoring import encode_text, prefix_token_id
from gpt2_jax.generation import Decoder as JaxDecoder
from gpt2_jax.loading import model_from_checkpoint

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
    from tqdm import tqdm
except ImportError as error:
    raise ImportError(f"gpt2_jax.harness needs lm-evaluation-harness: {install_command('lm-eval')}") from error

MAX_GEN_TOKS = 256
"""The number of tokens to generate if a task does not set one, as in the harness's model `hf`."""

_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty")
"""Generation settings of a task that have the same name and meaning in `GenerationConfig`."""


class HarnessLM(TemplateLM):
    """A checkpoint in any format, run in JAX, as a model of the harness.

    Args:
        pretrained: a checkpoint in any format, a run, or a Hugging Face id.
        dtype: the dtype of the parameters and the computation, such as `bfloat16`. Default: as stored, in float32.
        batch_size: pairs per batch, or `auto` for about 4096 tokens. `auto:N`, with which the harness's model `hf`
            measures the largest batch N times, is the same as `auto`.
        max_batch_size, device: the harness passes them; they must be None. JAX chooses the device.

    Raises `bridge.BridgeError` for anything that is not a GPT-2 checkpoint with a tokenizer.
    """

    def __init__(
        self,
        pretrained: str | Path,
        *,
        dtype: str | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
    ) -> None:
        if max_batch_size is not None or device is not None:
            raise BridgeError("gpt2-bridge takes no max_batch_size and no device; choose a device with JAX_PLATFORMS")
        checkpoint = load(pretrained)
        decoder = JaxDecoder(*model_from_checkpoint(checkpoint), dtype=dtype)
        self._set_up(decoder, checkpoint.tokenizer(), batch_size)

    @classmethod
    def of(cls, decoder: Decoder[Any, Any], tokenizer: Tokenizer, *, batch_size: int | str | None = None) -> HarnessLM:
        """Make a model of the harness from a decoder of either backend and a tokenizer."""
        model = cls.__new__(cls)
        model._set_up(decoder, tokenizer, batch_size)
        return model

    def _set_up(self, decoder: Decoder[Any, Any], tokenizer: Tokenizer, batch_size: int | str | None) -> None:
        TemplateLM.__init__(self)
        self.decoder, self.own_tokenizer = decoder, tokenizer
        self.max_length = decoder.config.n_positions
        self.batch_size = _batch_size(batch_size)

    @property
    def eot_token_id(self) -> int:
        """The end-of-sequence token or, if there is none, the prefix token."""
        return next(iter(self.own_tokenizer.eos_token_ids), self.prefix_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The token that replaces an empty context."""
        return prefix_token_id(self.own_tokenizer)

    @property
    def tokenizer_name(self) -> str:
        """The key of the harness's request cache."""
        return self.own_tokenizer.fingerprint

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Return the ids of a text."""
        if add_special_tokens is None:
            return encode_text(self.own_tokenizer, string)
        return self.own_tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return the text of a conversation in the checkpoint's chat template."""
        return self.own_tokenizer.apply_chat_template(chat_history, add_generation_prompt=add_generation_prompt)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return ln p of each text, in disjoint windows of `n_positions` tokens, as in the harness's model `hf`."""
        windows: list[tuple[None, list[int], list[int]]] = []
        counts = []
        for (text,) in (request.args for request in requests):
            tokens = self.tok_encode(text)
            pairs = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1)
            windows += [(None, *make_disjoint_window(pair)) for pair in pairs]
            counts.append(len(windows))
        found = self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm)
        sums = [
            sum((found[k][0] for k in range(start, end)), 0.0) for start, end in zip([0, *counts], counts, strict=False)
        ]
        for request, total in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return sums

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        with tqdm(total=len(requests), disable=disable_tqdm, desc="loglikelihood") as bar:
            found = loglikelihood(
                self.decoder,
                [(context, continuation) for _, context, continuation in requests],
                batch_size=self.batch_size,
                progress=lambda done, total: bar.update(done - bar.n),
            )
        answers = [(one.logprob, one.is_greedy) for one in found]
        for (texts, _, _), answer in zip(requests, answers, strict=True):
            if texts is not None:  # None for windows: their sum is cached instead
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continue each context until a stop string, the end-of-sequence token, or the task's number of tokens."""
        groups: dict[str, list[int]] = {}
        for k, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(k)
        texts: dict[int, str] = {}
        with tqdm(total=len(requests), disable=disable_tqdm, desc="generate_until") as bar:
            for group in groups.values():
                settings = requests[group[0]].args[1]
                contexts = [requests[k].args[0] for k in group]
                texts |= zip(group, self._generate(contexts, settings), strict=True)
                bar.update(len(group))
        for k, request in enumerate(requests):
            self.cache_hook.add_partial("generate_until", request.args, texts[k])
        return [texts[k] for k in range(len(requests))]

    def _generate(self, contexts: Sequence[str], settings: dict[str, Any]) -> list[str]:
        """Generate with one set of settings. Contexts are truncated on the left to leave room for the new tokens."""
        given = normalize_gen_kwargs(settings, MAX_GEN_TOKS)
        new, until, sample = given.pop("max_gen_toks"), given.pop("until"), given.pop("do_sample")
        if unknown := given.keys() - {*_SAMPLING}:
            raise BridgeError(f"a task has the generation setting {quoted(min(unknown))}, which is not supported here")
        if new >= self.max_length:
            raise BridgeError(f"a task generates {new} tokens; the model has n_positions={self.max_length}")
        room = self.max_length - new
        prompts = [self.tok_encode(context)[-room:] or [self.prefix_token_id] for context in contexts]
        used = given if sample else {name: given[name] for name in ("repetition_penalty",) if name in given}
        config = GenerationConfig(new, eos_token_id=self.own_tokenizer.eos_token_ids or None, **used)
        stop = [text for text in until if text]
        found = generate_text(self.decoder, self.own_tokenizer, prompts, config, stop)
        return [self._text_of(output.ids, stop) for (output,) in found]

    def _text_of(self, ids: Sequence[int], stop: Sequence[str]) -> str:
        """Return the text up to the first stop string, without special tokens, as the model `hf` does."""
        text = self.own_tokenizer.decode(ids, skip_special_tokens=True)
        return text[: min((found for s in stop if (found := text.find(s)) >= 0), default=len(text))]


def _batch_size(given: int | str | None) -> int | None:
    """Return the pairs per batch, or None for `auto`."""
    if given is None or re.fullmatch(r"auto(:[0-9.]+)?", str(given)):
        return None
    if not re.fullmatch(r"0*[1-9][0-9]{0,8}", str(given)):
        raise BridgeError(f"batch_size={quoted(given)}: must be a whole number of at least 1, auto, or auto:N")
    return int(given)


register_model("gpt2-bridge")(HarnessLM)
