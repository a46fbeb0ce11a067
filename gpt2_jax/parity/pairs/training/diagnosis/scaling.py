"""Gradients that differ by a constant factor: clipping or accumulation."""

from __future__ import annotations

import numpy as np

from gpt2_jax.parity.pairs.training.diagnosis.changes import fit_change
from gpt2_jax.parity.pairs.training.diagnosis.evidence import Diagnosis, Evidence, norm, unknown
from gpt2_jax.parity.pairs.training.transitions import MOMENT, MOMENTUM, Transition

SAME_NORM = 1e-5
"""Relative difference of norms that were clipped to the same value. `torch.nn.utils.clip_grad_norm_` adds 1e-6 to the
norm before it divides."""


MAX_ACCUMULATION = 64
"""A larger factor may be a loss scale that was not undone."""


def diagnose_scaling(evidence: Evidence, factor: float, fact: str) -> Diagnosis:
    """Explain why the right gradient is `factor` times the left one. `fact` is the sentence that states this."""
    norms = _norms(evidence)
    if norms is None:
        return unknown(fact, "Clipping and accumulation cannot be distinguished, because a side cannot repeat steps.")
    left, right = norms
    if (found := _clipping(evidence, left, right, fact)) is not None:
        return found
    ratios = right / left
    whole = max(factor, 1 / factor)
    is_constant = bool((np.abs(ratios / factor - 1) <= 1e-6).all()) and np.ptp(left) > 1e-3 * left.max()
    if len(left) > 1 and is_constant and _is_whole(whole, evidence) and not _loss_scaled(evidence, factor):
        name = evidence.sides[1 if factor > 1 else 0].name
        sentence = f"The factor is the same on all batches, and {round(whole)} is a whole number: {name} adds "
        sentence += f"{round(whole)} microbatches without dividing by their number."
        return Diagnosis("gradient accumulation", (fact, sentence), values=(1.0, factor))
    return unknown(fact)


def _is_whole(value: float, evidence: Evidence) -> bool:
    whole = round(value)
    return 2 <= whole <= MAX_ACCUMULATION and abs(value / whole - 1) <= 16 * evidence.bounds.relative


def _loss_scaled(evidence: Evidence, factor: float) -> bool:
    """Whether small losses have the same ratio, which means that the loss itself is scaled."""
    left, right = (t.loss for t in evidence.at)
    return left != 0 and abs(right / left / factor - 1) < 1e-3


def _norms(evidence: Evidence) -> tuple[np.ndarray, np.ndarray] | None:
    """Norms of the gradients of all batches from the same state, on the left side and on the right side."""
    left, right = evidence.replayed
    if left is None or right is None:
        return None
    norms = []
    for a, b in zip(left, right, strict=True):
        change = fit_change(evidence, a, b)
        size = _norm(evidence, a, b)
        if change is None or size is None:
            return None
        norms.append(
            (size[0], size[0] * (1 + change.scale.value)) if size[1] else (size[0] / (1 + change.scale.value), size[0])
        )
    found = np.array(norms)
    return found[:, 0], found[:, 1]


def _norm(evidence: Evidence, left: Transition, right: Transition) -> tuple[float, bool] | None:
    """The norm of the gradient, and whether it is the left one."""
    for side, is_left in ((left, True), (right, False)):
        if side.gradients is not None:
            return norm({n: g for n, g in side.gradients.items() if n in side.before}), is_left
    kind = next((k for k in (MOMENT, MOMENTUM) if k in left.state), None)
    if kind is None or any(x.any() for x in left.state_before.get(kind, {}).values()):
        return None  # a moment is a multiple of the gradient only if it was zero before
    betas = next((b for b in evidence.betas if b is not None), None)
    return norm(left.state[kind]) / (1 - betas[0] if kind == MOMENT and betas is not None else 1.0), True


def _clipping(evidence: Evidence, left: np.ndarray, right: np.ndarray, fact: str) -> Diagnosis | None:
    """One side's norms have a common maximum that the other's exceed, or both sides have different maxima."""
    limits = [_limit(norms) for norms in (left, right)]
    if limits == [None, None]:
        return None
    expected = [
        np.minimum(norms, np.inf if limit is None else limit)
        for norms, limit in zip((right, left), limits, strict=True)
    ]
    sentences, explained = [], True
    for side, limit in zip(evidence.sides, limits, strict=True):
        sentences.append(
            f"{side.name} clips to the norm {limit:.6g}." if limit is not None else f"{side.name} does not clip."
        )
    if limits[0] is None:
        explained = bool(np.allclose(expected[1], right, rtol=SAME_NORM))
    elif limits[1] is None:
        explained = bool(np.allclose(expected[0], left, rtol=SAME_NORM))
    if not explained:
        return None
    if limits[0] is not None and limits[1] is not None and abs(limits[0] / limits[1] - 1) <= SAME_NORM:
        sentences.append("The norms are equal except for the 1e-6 that clip_grad_norm_ adds before it divides.")
    norms = f"Norms of the gradients on all batches: {_shown(left)} on {evidence.left.name}, {_shown(right)} on "
    return Diagnosis(
        "gradient clipping", (fact, norms + f"{evidence.right.name}.", *sentences), values=(limits[0], limits[1])
    )


def _limit(norms: np.ndarray) -> float | None:
    """The largest norm, if several batches have it."""
    top = float(norms.max())
    return top if top > 0 and int((norms >= top * (1 - SAME_NORM)).sum()) >= 2 else None


def _shown(values: np.ndarray) -> str:
    return ", ".join(f"{x:.4g}" for x in values[:4])
