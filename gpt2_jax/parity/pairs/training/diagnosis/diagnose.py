"""Name the kind of the first difference of two trainers, from evidence only.

The first quantity that differs decides which kinds are possible. A kind is named only if its prediction agrees with all
elements of all tensors to within rounding. Otherwise the diagnosis is "unknown".
"""

from __future__ import annotations

import numpy as np

from gpt2_jax.parity.pairs.training.diagnosis.average import diagnose_average
from gpt2_jax.parity.pairs.training.diagnosis.evidence import (
    MIN_ELEMENTS,
    Diagnosis,
    Evidence,
    listed,
    narrow_dtype,
    unknown,
)
from gpt2_jax.parity.pairs.training.diagnosis.gradient import diagnose_gradient, diagnose_second_moment
from gpt2_jax.parity.pairs.training.diagnosis.loss import diagnose_loss
from gpt2_jax.parity.pairs.training.diagnosis.update import diagnose_update
from gpt2_jax.parity.pairs.training.rounding import STATES
from gpt2_jax.parity.pairs.training.transitions import AVERAGE, COUNT, MOMENT, wide

__all__ = ["Diagnosis", "Evidence", "diagnose"]


def diagnose(evidence: Evidence) -> Diagnosis:
    """Return the kind of the first difference."""
    if evidence.quantity == "parameters before training":
        return _initialization(evidence)
    if evidence.quantity == "state before training":
        return Diagnosis("initialization", (f"{evidence.name} differs before the first step.",), (evidence.name,))
    if evidence.quantity == "loss":
        return diagnose_loss(evidence)
    for rule in (_tied, _frozen, _dtype):
        if (found := rule(evidence)) is not None:
            return found
    if evidence.quantity == "step count":
        return _step_count(evidence)
    if evidence.quantity == "second moment":
        return diagnose_second_moment(evidence)
    if evidence.quantity == "update":
        return diagnose_update(evidence)
    if evidence.quantity == "average":
        return diagnose_average(evidence)
    return diagnose_gradient(evidence)


def _initialization(evidence: Evidence) -> Diagnosis:
    left, right = evidence.at
    different = [
        name for name, a in left.before.items() if not _equal(wide(a), wide(right.before[name]), evidence.unit)
    ]
    a, b = (wide(side.before[evidence.name]) for side in (left, right))
    for k, (values, others) in enumerate(((a, b), (b, a))):
        dtype = narrow_dtype(values, others, evidence.unit) if values.size >= MIN_ELEMENTS else None
        if dtype is not None:
            sentence = (
                f"{evidence.name} of {evidence.sides[k].name} is the other's rounded to {dtype}, before training."
            )
            return Diagnosis("dtype", (sentence,), tuple(different))
    sentences = [
        f"{len(different)} of {len(left.before)} parameters differ before the first step: {listed(different)}."
    ]
    if a.ndim == 2 and a.shape[0] == a.shape[1] and _equal(a, b.T, evidence.unit):
        sentences.append(f"{evidence.name} is the transpose of the other's.")
    for other, array in right.before.items():
        if other != evidence.name and array.shape == a.shape and _equal(a, wide(array), evidence.unit):
            sentences.append(f"{evidence.name} of {evidence.left.name} is equal to {other} of {evidence.right.name}.")
    return Diagnosis("initialization", tuple(sentences), tuple(different))


def _equal(a: np.ndarray, b: np.ndarray, unit: float) -> bool:
    return a.shape == b.shape and bool((np.abs(a - b) <= 4 * unit * np.abs(a).max(initial=0.0)).all())


def _tied(evidence: Evidence) -> Diagnosis | None:
    """Two parameters that stay equal on one side, and were equal on the other before this step only."""
    for k, side in enumerate(evidence.sides):
        now = side.trainer.parameters()
        for name, other in evidence.tied[k].items():
            if not np.array_equal(now[name], now[other]):
                sentence = f"{name} and {other} of {side.name} are equal before training and differ after it."
                remaining = evidence.sides[1 - k].name
                return Diagnosis("tied weights", (sentence, f"{remaining} has one parameter for both."), (name, other))
    transitions = evidence.at
    names = [*transitions[0].before]
    for i, name in enumerate(names):
        for other in names[i + 1 :]:
            if transitions[0].before[name].shape != transitions[0].before[other].shape:
                continue
            before = [np.array_equal(t.before[name], t.before[other]) for t in transitions]
            after = [np.array_equal(t.after[name], t.after[other]) for t in transitions]
            moved = all(t.update(name).any() for t in transitions)
            if all(before) and moved and after.count(True) == 1 and _is_random_looking(transitions[0].before[name]):
                k = after.index(False)
                sentence = (
                    f"{name} and {other} are equal before step {evidence.step} on both sides. "
                    f"After it they are equal on {evidence.sides[1 - k].name} and differ on {evidence.sides[k].name}."
                )
                return Diagnosis("tied weights", (sentence,), (name, other))
    return None


def _is_random_looking(array: np.ndarray) -> bool:
    """Whether equal values are unlikely to be a coincidence, unlike biases of zero and scales of one."""
    return len(np.unique(array)) >= min(3, array.size) and array.size > 1


def _frozen(evidence: Evidence) -> Diagnosis | None:
    """Parameters that only one side trains, or that only on one side have a gradient."""
    if evidence.quantity == "average":
        return None
    for side, other in (evidence.sides, evidence.sides[::-1]):
        still = [n for n in side.transitions[0].before if _is_still(side.transitions, n)]
        frozen = [n for n in still if not _is_still(other.transitions, n)]
        if frozen and evidence.name in frozen and len(frozen) < len(side.transitions[0].before):
            state = {
                kind for kind, arrays in side.transitions[-1].state.items() if kind != AVERAGE and frozen[0] in arrays
            }
            steps = (
                f"{side.name} does not change {listed(frozen)} in {len(side.transitions)} steps, and {other.name} does."
            )
            reason = (
                f"The optimizer of {side.name} has a state for it, so its gradient is zero."
                if state
                else f"The optimizer of {side.name} has no state for it, as if the parameter were not given to it."
            )
            return Diagnosis("frozen parameter", (steps, reason), tuple(frozen), (None, None))
    return _without_gradient(evidence)


def _is_still(transitions: object, name: str) -> bool:
    return not any(t.update(name).any() for t in transitions)  # type: ignore[attr-defined]


def _without_gradient(evidence: Evidence) -> Diagnosis | None:
    """A parameter that only decays on one side: its moments are zero at every step."""
    kind = STATES.get(evidence.quantity)
    if kind is None and evidence.quantity != "gradient":
        return None

    def is_zero(transitions: list, name: str) -> bool:
        if kind is not None:
            return not any(t.moment(kind, name).any() for t in transitions)
        return not any(name in (t.gradients or {}) and t.gradients[name].any() for t in transitions)

    for side, other in (evidence.sides, evidence.sides[::-1]):
        names = [*side.transitions[0].before]
        zero = [n for n in names if is_zero(side.transitions, n) and not is_zero(other.transitions, n)]
        if evidence.name in zero and len(zero) < len(names):
            sentence = (
                f"No gradient of {listed(zero)} reaches the optimizer of {side.name}, and one does on {other.name}."
            )
            return Diagnosis("frozen parameter", (sentence,), tuple(zero))
    return None


def _dtype(evidence: Evidence) -> Diagnosis | None:
    """A tensor that is rounded to a narrower dtype than the comparison claims, on one side only."""
    pairs: list[tuple[str, np.ndarray | None, np.ndarray | None]] = []
    kind = STATES.get(evidence.quantity)
    left, right = evidence.at
    name = evidence.name
    if evidence.quantity == "gradient" and left.gradients and right.gradients:
        pairs.append(("The gradient", left.gradients.get(name), right.gradients.get(name)))
    elif kind is not None and kind != COUNT:
        pairs.append((f"The {evidence.quantity}", left.state[kind].get(name), right.state[kind].get(name)))
        betas = evidence.betas
        if evidence.step == 1 and kind == MOMENT and betas[0] and betas[1]:
            a, b = (t.moment(kind, name) / (1 - b1) for t, b1 in ((left, betas[0][0]), (right, betas[1][0])))
            pairs.append(("The gradient", a, b))
    elif evidence.quantity == "update":
        pairs.append(("The parameter after the step", left.after[name], right.after[name]))
    for what, one, other in pairs:
        if one is None or other is None:
            continue
        sound = evidence.sound(name, one.shape)
        a, b = wide(one)[sound], wide(other)[sound]
        for k, (values, others) in enumerate(((a, b), (b, a))):
            if values.size >= MIN_ELEMENTS and (dtype := narrow_dtype(values, others, evidence.unit)) is not None:
                apart = float(np.abs(a - b).max())
                sentence = f"{what} of {name} on {evidence.sides[k].name} has only values of {dtype}."
                return Diagnosis(
                    "dtype", (sentence, f"The sides differ by at most {apart:.3g}, its rounding."), (name,)
                )
    return None


def _step_count(evidence: Evidence) -> Diagnosis:
    left, right = (float(t.moment(COUNT, evidence.name).flat[0]) for t in evidence.at)
    sentence = (
        f"After step {evidence.step} the optimizer counts {left:g} steps on {evidence.left.name} and {right:g} on "
    )
    names = tuple(
        n for n in evidence.at[0].before if not np.array_equal(*(t.moment(COUNT, n).flat[0] for t in evidence.at))
    )
    if not names:
        return unknown(sentence + f"{evidence.right.name}.")
    return Diagnosis("step count", (sentence + f"{evidence.right.name}.",), names, (left, right))
