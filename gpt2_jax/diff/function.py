"""The functions that two checkpoints compute: their logits and hidden states on the same tokens, in JAX."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

import bridge
from bridge import BridgeError, Checkpoint
from gpt2_jax.parity import tolerances
from gpt2_jax.parity.activations import activation_differences, first_divergence
from gpt2_jax.parity.backends import jax_gpt2
from gpt2_jax.parity.inputs import Tokens, choose_tokens
from gpt2_jax.parity.metrics import kl_divergence, next_token_losses
from gpt2_jax.parity.reporting import plots
from gpt2_jax.reporting.plots import Plot

_RESIDUAL_STREAM = re.compile(r"drop|h\.\d+|ln_f")
"""The hidden states that do not depend on the order of heads: the embeddings, each layer's output, the last norm's."""

_CHARACTERS_PER_TOKEN = 8
"""More than a token has on average. The rest of the text is not encoded."""


@dataclass(frozen=True)
class FunctionComparison:
    """How the functions of two models, A and B, differ on a text."""

    tokens: str
    """The number of tokens, and the text that they are from."""
    loss: tuple[float, float]
    """The loss of each model, in nats per token."""
    kl_mean: float
    """Mean over the tokens of KL(A || B), in nats."""
    kl_max: float
    top1_agreement: float
    """The fraction of the tokens after which both models have the same most likely token."""
    logits_difference: float
    """The largest difference of two logits, computed in float32."""
    logits_tolerance: float
    """The largest difference that rounding can explain (`gpt2_jax.parity.tolerances.logits_fp32`)."""
    hidden_states: Mapping[str, float]
    """Maximum relative difference of the hidden states after the embeddings (`drop`), after each layer and after the
    last norm, computed in float64. Empty if the widths differ."""
    notes: tuple[str, ...] = ()
    plots: tuple[Plot, ...] = ()
    """The KL divergence and the losses by position, and the hidden states."""

    @property
    def first_departure(self) -> str | None:
        """The first hidden state that differs beyond rounding."""
        return first_divergence(dict(self.hidden_states)) or None

    @property
    def is_within_rounding(self) -> bool:
        """Whether rounding explains every difference. False if a model has NaN in its output."""
        logits_agree = self.logits_difference <= self.logits_tolerance and self.kl_max <= tolerances.KL_FP32
        return logits_agree and self.first_departure is None


def compare_functions(
    a: Checkpoint,
    b: Checkpoint,
    *,
    text: str | None = None,
    text_from_b: bool = False,
    batch_size: int = 2,
    seq_len: int = 256,
    progress: Callable[[str], None] = lambda what: None,
) -> FunctionComparison | str:
    """Run both models on the same tokens, one model in memory at a time. Return why they cannot run as a string.

    Args:
        text: the text. The default is the validation text of the bundled model, or random ids without a tokenizer.
        text_from_b: encode the text with the tokenizer of `b`.
        batch_size: number of sequences.
        seq_len: tokens per sequence; at most the positions of both models are used.
        progress: called with the name of each step before it starts.

    Raises `BridgeError` if there is no sequence or fewer than two tokens per sequence, or for a `text` without a
    tokenizer.
    """
    if batch_size < 1 or seq_len < 2:
        raise BridgeError(f"{batch_size} sequences of {seq_len} tokens: give at least one sequence of two tokens")
    shape = (batch_size, min(seq_len, a.config.n_positions, b.config.n_positions))
    if shape[1] < 2:
        return "a model has one position, and a loss needs two tokens"
    tokens = choose_tokens(b if text_from_b else a, text, shape, 0, _built_in_text(shape))
    common = min(a.config.vocab_size, b.config.vocab_size)
    in_common = tokens.ids[tokens.ids < common]
    if not in_common.size:
        return f"no token of the text is among the {common} that both vocabularies have"
    inputs = replace(tokens, ids=np.resize(in_common, shape))
    with np.errstate(invalid="ignore", over="ignore"):  # weights may be NaN, or infinite in float32
        logits = []
        for name, checkpoint in (("A", a), ("B", b)):
            progress(f"logits of {name}")
            logits.append(jax_gpt2.logits(checkpoint, inputs.ids, None, "float32")[..., :common])
        found = _compare_logits(logits[0], logits[1], inputs, max(a.config.n_layer, b.config.n_layer))
        if a.config.n_embd == b.config.n_embd:
            states = _compare_hidden_states(a, b, inputs.ids, progress)
            curve = plots.by_activation("Differences of hidden states in fp64", states, tolerances.ACTIVATION_FP64)
            found = replace(found, hidden_states=states, plots=(*found.plots, curve))
    notes = []
    if a.config.vocab_size != b.config.vocab_size:
        notes.append(f"the logits are compared over the {common} tokens that both vocabularies have")
    if dropped := tokens.ids.size - in_common.size:
        notes.append(f"{dropped} tokens of the text are left out, because only one vocabulary has them")
    if a.config.n_embd != b.config.n_embd:
        notes.append("the hidden states are not compared, because the widths differ")
    return replace(found, notes=tuple(notes))


def _built_in_text(shape: tuple[int, int]) -> str:
    """Return the beginning of the bundled model's validation text, enough for this number of tokens."""
    text = (bridge.BUNDLED / "validation.txt").read_text(encoding="utf-8")
    return text[: _CHARACTERS_PER_TOKEN * shape[0] * shape[1]]


def _compare_logits(a_BTV: np.ndarray, b_BTV: np.ndarray, inputs: Tokens, n_layer: int) -> FunctionComparison:
    rows = [*zip(a_BTV, b_BTV, strict=True)]  # compared one at a time, to save memory
    kl_BT = np.stack([kl_divergence(x, y) for x, y in rows])
    losses = {name: next_token_losses(logits, inputs.ids) for name, logits in (("A", a_BTV), ("B", b_BTV))}
    is_finite = np.isfinite(a_BTV).all(-1) & np.isfinite(b_BTV).all(-1)
    agree = (a_BTV.argmax(-1) == b_BTV.argmax(-1)) & is_finite
    return FunctionComparison(
        tokens=f"{len(inputs.ids)} x {inputs.ids.shape[1]}, {inputs.origin}",
        loss=(float(losses["A"].mean()), float(losses["B"].mean())),
        kl_mean=float(kl_BT.mean()),
        kl_max=float(kl_BT.max()),
        top1_agreement=float(agree.mean()),
        logits_difference=float(np.max([np.abs(x - y).max() for x, y in rows])),  # NaN, unlike with max
        logits_tolerance=tolerances.logits_fp32(float(np.abs(a_BTV).max()), n_layer),
        hidden_states={},
        plots=(plots.kl_by_position("KL(A || B)", kl_BT, bound=tolerances.KL_FP32), plots.losses_by_position(losses)),
    )


def _compare_hidden_states(
    a: Checkpoint, b: Checkpoint, ids: np.ndarray, progress: Callable[[str], None]
) -> dict[str, float]:
    sides = []
    for name, checkpoint in (("A", a), ("B", b)):
        progress(f"hidden states of {name}")
        sides.append(jax_gpt2.activations(checkpoint, ids, None, lambda name: bool(_RESIDUAL_STREAM.fullmatch(name))))
    common = {name: states for name, states in sides[0].items() if name in sides[1]}
    return activation_differences(common, sides[1], np.ones(ids.shape, bool))
