"""Why the losses of two trainers differ although their parameters are equal."""

from __future__ import annotations

import math

import jax
import numpy as np

from gpt2_jax.parity.pairs.training.diagnosis.evidence import NARROW, Diagnosis, Evidence, is_rounded, unknown
from gpt2_jax.parity.pairs.training.trainers import Step
from gpt2_jax.parity.pairs.training.transitions import wide


def diagnose_loss(evidence: Evidence) -> Diagnosis:
    """Try the kinds in turn, from the strongest evidence to the weakest."""
    for rule in (_randomness, _per_token, _data_order, _dtype, _reduction):
        if (found := rule(evidence)) is not None:
            return found
    losses = " and ".join(f"{t.loss:.6g} on {side.name}" for t, side in zip(evidence.at, evidence.sides, strict=True))
    hint = " Give `loss` to both trainers, with one value per example or token, to compare masks."
    return unknown(f"With equal parameters the loss of step {evidence.step} is {losses}.{hint}")


def _tolerance(evidence: Evidence, *values: float) -> float:
    return evidence.bounds.relative * max(1.0, *map(abs, values))


def _randomness(evidence: Evidence) -> Diagnosis | None:
    random = [side.name for k, side in enumerate(evidence.sides) if evidence.is_random(k)]
    if not random:
        return None
    sentence = (
        f"The same step from the same state gives another loss with other random numbers on {' and on '.join(random)}. "
        "Dropout or another random layer is on."
    )
    return Diagnosis("randomness", (sentence,))


def _per_token(evidence: Evidence) -> Diagnosis | None:
    """Compare losses per example or token, if both sides give them."""
    try:
        a, b = (
            side.trainer.loss(snapshot, evidence.batch)
            for side, snapshot in zip(evidence.sides, evidence.snapshots, strict=True)
        )
    except Exception:  # the user's function; the other rules do not need it
        return None
    if a is None or b is None or a.shape != b.shape or a.size < 2:
        return None
    a, b = wide(a), wide(b)
    apart = np.abs(a - b) > _tolerance(evidence, float(np.abs(a).max()), float(np.abs(b).max()))
    one_is_zero = (a == 0) != (b == 0)
    if apart.any() and (one_is_zero[apart]).all():
        index = tuple(map(int, np.argwhere(apart)[0]))
        counted = [int((x != 0).sum()) for x in (a, b)]
        left, right = (side.name for side in evidence.sides)
        sentence = (
            f"Of {a.size} losses, {counted[0]} count on {left} and {counted[1]} on {right}. "
            f"All that count on both are equal. The first that counts on one only is at {list(index)}."
        )
        return Diagnosis("loss mask", (sentence,), values=(counted[0], counted[1]))
    if apart.any():
        return None
    losses = " and ".join(f"{t.loss:.6g} on {side.name}" for t, side in zip(evidence.at, evidence.sides, strict=True))
    sentence = f"All {a.size} losses are equal, and their reduction is not: {losses}."
    return Diagnosis("loss reduction", (sentence, f"Their sum is {a.sum():.6g} and their mean {a.mean():.6g}."))


def _data_order(evidence: Evidence) -> Diagnosis | None:
    """The loss of one side is the other's loss on another batch."""
    for k, replays in enumerate(evidence.replays):
        if replays is None:
            continue
        actual = evidence.at[1 - k].loss
        for j, replay in enumerate(replays):
            is_other = j != evidence.step - 1
            if is_other and abs(replay.loss - actual) <= _tolerance(evidence, actual) < 1e-3 * _spread(replays):
                sentence = (
                    f"The loss of {evidence.sides[1 - k].name} at step {evidence.step}, {actual:.10g}, is that of "
                    f"{evidence.sides[k].name} on the batch of step {j + 1} with the same parameters."
                )
                return Diagnosis("data order", (sentence,))
    return None


def _spread(replays: list[Step]) -> float:
    """The mean distance of the losses of neighboring batches. A much smaller one is not a coincidence."""
    losses = [replay.loss for replay in replays]
    return (max(losses) - min(losses)) / len(losses)


def _dtype(evidence: Evidence) -> Diagnosis | None:
    losses = [t.loss for t in evidence.at]
    for k in (0, 1):
        for dtype, bits in NARROW.items():
            if 2.0**-bits <= evidence.unit or abs(losses[0] - losses[1]) > 256 * 2.0**-bits * abs(losses[1 - k]):
                continue
            rounded = [is_rounded(np.asarray([loss]), bits, 0.0) for loss in losses]
            if rounded[k] and not rounded[1 - k]:
                side = evidence.sides[k].name
                narrow = {str(a.dtype) for a in evidence.at[k].before.values()}
                sentence = f"The loss of {side} is a {dtype} number and differs by a few of its roundings."
                return Diagnosis("dtype", (sentence, f"Its parameters are {', '.join(sorted(narrow))}."))
    return None


def _reduction(evidence: Evidence) -> Diagnosis | None:
    """The losses of all batches have one ratio, or ratios of counts."""
    left, right = evidence.replays
    if left is None or right is None or len(left) < 2:
        return None
    pairs = [(a.loss, b.loss) for a, b in zip(left, right, strict=True)]
    if any(a == 0 for a, _ in pairs):
        return None
    ratios = np.array([b / a for a, b in pairs])
    errors = np.array([_tolerance(evidence, a, b) * (1 / abs(a) + abs(b) / a**2) for a, b in pairs])
    if _spread(left) <= 1e3 * errors.max() or errors.max() > 1e-3:
        return None  # equal or too inexact losses do not determine a ratio
    sizes = _sizes(evidence.batch)
    if (np.abs(ratios - ratios[0]) <= errors + errors[0]).all():
        factor = float(ratios[0])
        matching = [n for n in sizes if abs(factor * n - 1) <= n * errors[0] or abs(factor - n) <= errors[0]]
        what = f", the number of {'/'.join(map(str, matching))} items of a batch" if matching else ""
        left_name, right_name = (side.name for side in evidence.sides)
        sentence = f"The loss of {right_name} is {factor:.8g} times that of {left_name} on all batches{what}."
        return Diagnosis("loss reduction", (sentence,), values=(1.0, factor))
    return _sum_for_mean(evidence, ratios, errors) or _by_count(evidence, ratios, errors, sizes)


def _sum_for_mean(evidence: Evidence, ratios: np.ndarray, errors: np.ndarray) -> Diagnosis | None:
    """A sum on one side and a mean over the counted items on the other: ratios that are whole numbers."""
    for counts, limits, k in ((ratios, errors, 1), (1 / ratios, errors / ratios**2, 0)):
        is_whole = (np.abs(counts - np.rint(counts)) <= limits).all() and (counts > 1.5).all()
        if is_whole and limits.max() < 0.01 and len(counts) >= 3:
            names = evidence.sides[k].name, evidence.sides[1 - k].name
            shown = ", ".join(f"{round(c)}" for c in counts[:5])
            sentence = (
                f"The loss of {names[0]} is that of {names[1]} times a whole number, on the batches {shown}: a sum "
            )
            return Diagnosis("loss reduction", (sentence + "in place of a mean.",))
    return None


def _by_count(evidence: Evidence, ratios: np.ndarray, errors: np.ndarray, sizes: list[int]) -> Diagnosis | None:
    """A mean over all positions on one side, and over the counted ones on the other."""
    for n in sizes:
        for values, which in ((ratios, 1), (1 / ratios, 0)):
            counts = values * n
            limits = np.maximum(errors * n * 4, 1e-12 * n)
            is_count = (np.abs(counts - np.rint(counts)) <= limits).all() and (counts > 0.5).all()
            if is_count and (counts < n + 0.5).all() and limits.max() < 0.01 and len({*np.rint(counts)}) > 1:
                shown = ", ".join(f"{round(c)}" for c in counts[:5])
                names = evidence.sides[which].name, evidence.sides[1 - which].name
                sentence = f"{names[0]} divides by {n}, all items of a batch, and {names[1]} by a part of them: "
                sentence += f"{shown} in the first batches."
                return Diagnosis("loss reduction", (sentence,))
    return None


def _sizes(batch: object) -> list[int]:
    """The sizes that a loss can be divided by: of each array of a batch, all its leading axes."""
    found = set()
    for leaf in jax.tree.leaves(batch):
        shape = tuple(getattr(leaf, "shape", ()))
        found |= {math.prod(shape[: k + 1]) for k in range(len(shape))}
    return sorted(n for n in found if n > 1)
