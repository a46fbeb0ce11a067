"""Compare two trainers step by step: the first step and the first tensor that differ, and the kind of the mistake."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from bridge import BridgeError
from bridge.errors import bullet_list, quoted
from gpt2_jax.parity.pairs.matching.match import Matching, Names
from gpt2_jax.parity.pairs.training.diagnosis.diagnose import Evidence, diagnose
from gpt2_jax.parity.pairs.training.result import SAME_TRAINING, Departure, Problem, TrainingComparison
from gpt2_jax.parity.pairs.training.rounding import QUANTITIES, UNIT, Bounds, Distance
from gpt2_jax.parity.pairs.training.trainers import Step, Trainer
from gpt2_jax.parity.pairs.training.transitions import History, aliases, pair_parameters
from gpt2_jax.parity.reporting.report import Check, Measurement, Report


@dataclass
class _Run:
    """The state of a comparison while it runs."""

    bounds: Bounds
    histories: tuple[History, History]
    worst: dict[str, tuple[int, Distance]] = field(default_factory=dict)
    departure: Departure | None = None
    snapshots: tuple[Any, Any] = (None, None)
    """Of both sides, before the step of the departure."""
    problem: Problem | None = None
    tied: tuple[dict[str, str], dict[str, str]] = ({}, {})


def compare_training(
    left: Trainer, right: Trainer, batches: Iterable[Any], *, names: Names = None, dtype: str | None = None
) -> TrainingComparison:
    """Train both sides on the same batches, and compare every step.

    Quantities are compared in the order in which a step computes them: loss, gradient, moments, step count, update,
    average. Bounds follow from the dtype, the sizes and the steps before; see `rounding`. Moments and averages are
    compared where both sides have them. All steps of both sides are kept in memory.

    Args:
        left: a trainer. Its names are those of the report.
        right: the other trainer.
        batches: one batch for each step. Ten or fewer are enough; at least three are needed to recognize a schedule.
        names: left name -> right name, or a list of `Match`; see `match_names`.
        dtype: "float64" or "float32": the dtype in which both sides are meant to train. By default, the wider of the
            parameters' dtypes.

    Raises:
        MatchError: `names` is not valid, or the names are ambiguous.
    """
    batches = list(batches)
    if not batches:
        raise BridgeError("compare_training needs at least one batch")
    parameters = left.parameters(), right.parameters()
    matching = pair_parameters(left, right, names)
    if not matching.matches:
        raise BridgeError("the two trainers have no parameter in common; give names={left: right}")
    dtype = _claimed([*parameters[0].values(), *parameters[1].values()]) if dtype is None else dtype
    if dtype not in UNIT:
        raise BridgeError(f"dtype {quoted(dtype)} is not one of {', '.join(UNIT)}")
    bounds = Bounds(dtype, _terms([*parameters[0].values()], batches), len(matching.matches))
    histories = (
        History(left, {m.left: m for m in matching.matches}, is_right=False),
        History(right, {m.right: m for m in matching.matches}, is_right=True),
    )
    run = _Run(bounds, histories)
    matched = [m.left for m in matching.matches], [m.right for m in matching.matches]
    unmatched = matching.unmatched_left, matching.unmatched_right
    run.tied = tuple(aliases(*each) for each in zip(parameters, unmatched, matched, strict=True))  # type: ignore[assignment]
    for number, batch in enumerate(batches, 1):
        if not _take_step(run, number, batch):
            break
    return _result(run, matching, batches)


def _take_step(run: _Run, number: int, batch: Any) -> bool:
    """Train both sides for one step and compare it, until the first difference. False if a side failed."""
    sides = [history.trainer for history in run.histories]
    before = [(side.parameters(), side.state()) for side in sides]
    snapshots = (None, None) if run.departure else tuple(side.snapshot() for side in sides)
    for history, (parameters, state) in zip(run.histories, before, strict=True):
        try:
            step = history.trainer.step(batch)
            message = _unusable(step, parameters)
        except Exception as error:
            message = f"{type(error).__name__}: {quoted(str(error), 200)}"
        if message:
            run.problem = run.problem or Problem(history.name, number, message)
        else:
            history.transitions.append(history.record(parameters, state, step))
    if run.problem:
        return False
    if run.departure is None:
        _compare_step(run, number, snapshots)
    return True


def _compare_step(run: _Run, number: int, snapshots: tuple[Any, ...]) -> None:
    left, right = (history.transitions[-1] for history in run.histories)
    distances = run.bounds.at_start(left, right) if number == 1 else []
    distances += run.bounds.compare(left, right)
    for distance in distances:
        if distance.quantity not in run.worst or distance.ratio > run.worst[distance.quantity][1].ratio:
            run.worst[distance.quantity] = number, distance
    failed = [d for d in distances if d.ratio > 1]
    if failed:
        first = min(failed, key=lambda d: (QUANTITIES.index(d.quantity), -d.ratio))
        run.departure = Departure(number, first.quantity, first.name, first.difference, first.bound)
        run.snapshots = snapshots[0], snapshots[1]
        return
    for history, tied in zip(run.histories, run.tied, strict=True):
        now = history.trainer.parameters()
        for name, other in tied.items():
            if run.departure is None and not np.array_equal(now[name], now[other]):
                apart = float(np.abs(now[name].astype(np.float64) - now[other]).max())
                run.departure = Departure(number, "update", name, apart, 0.0)
                run.snapshots = snapshots[0], snapshots[1]
                return
    run.bounds.advance(left, right)


def _result(run: _Run, matching: Matching, batches: Sequence[Any]) -> TrainingComparison:
    left, right = run.histories
    steps = min(len(left.transitions), len(right.transitions))
    diagnosis = None
    if run.departure is not None:
        departure, bounds = run.departure, run.bounds
        evidence = Evidence(
            *(departure.step, departure.quantity, departure.name), left, right, bounds, batches, run.snapshots, run.tied
        )
        diagnosis = diagnose(evidence)
    checks = [_names_check(matching, run.tied), *_checks(run)]
    noise = sum(int(x.sum()) for x in run.bounds.noise.values())
    details = {
        "trainers": f"{left.name}, {right.name}",
        "steps": steps,
        "dtype": run.bounds.dtype,
        "elements whose gradient is rounding noise, not compared": noise,
    }
    if run.problem is not None:
        checks.append(Check("trainers", (Measurement("failed steps", 1.0, 0.0, str(run.problem)),)))
    report = Report(f"{left.name} and {right.name}", details, tuple(checks), (), SAME_TRAINING)
    losses = tuple(tuple(t.loss for t in history.transitions) for history in run.histories)
    return TrainingComparison(
        *(left.name, right.name, run.bounds.dtype),
        (losses[0], losses[1]),
        report,
        run.departure,
        diagnosis,
        run.problem,
    )


def _names_check(matching: Matching, tied: tuple[dict[str, str], dict[str, str]]) -> Check:
    measurements = []
    for side, names, known in zip(
        ("left", "right"), (matching.unmatched_left, matching.unmatched_right), tied, strict=True
    ):
        unknown = [name for name in names if name not in known]
        measurements.append(
            Measurement(f"parameters that only the {side} side has", len(unknown), 0.0, ", ".join(unknown[:5]))
        )
    misfits = [f"{m.left}: {m.reason}" for m in matching.misfits]
    measurements.append(Measurement("pairs of other shapes", len(misfits), 0.0, "; ".join(misfits[:5])))
    notes = [f"{name} is tied to {other}" for side in tied for name, other in side.items()]
    return Check("names", tuple(measurements), "; ".join(notes))


def _checks(run: _Run) -> list[Check]:
    """One check for each quantity that was compared."""
    checks = []
    for quantity in QUANTITIES:
        if quantity in run.worst:
            step, distance = run.worst[quantity]
            location = " ".join(filter(None, (f"step {step}", str(distance))))
            figures = f"difference {distance.difference:.3g}, bound {distance.bound:.3g}"
            measurement = Measurement("largest difference / bound", distance.ratio, 1.0, location)
            first = run.departure is not None and run.departure.quantity == quantity
            checks.append(Check(quantity, (measurement,), figures, str(run.departure) if first else ""))
    if run.departure is not None and all(check.passed for check in checks):  # a tied parameter
        departure = run.departure
        apart = Measurement(
            "largest difference of tied parameters", departure.difference, departure.bound, departure.name
        )
        checks.append(Check("tied parameters", (apart,), "", str(departure)))
    return checks


def _unusable(step: Step, before: Any) -> str:
    """Why a step cannot be compared, or an empty string."""
    if not math.isfinite(step.loss):
        return f"the loss is {step.loss}"
    if wrong := [n for n in before if n not in step.parameters or step.parameters[n].shape != before[n].shape]:
        return "parameters are missing or have other shapes after the step:\n" + bullet_list(wrong)
    for arrays in (step.parameters, step.state, step.gradients or {}):
        if wrong := [name for name, array in arrays.items() if not np.isfinite(array.astype(np.float64)).all()]:
            return "values are not finite:\n" + bullet_list(wrong)
    return ""


def _claimed(arrays: Sequence[np.ndarray]) -> str:
    return "float64" if any(array.dtype == np.float64 for array in arrays) else "float32"


def _terms(parameters: Sequence[np.ndarray], batches: Sequence[Any]) -> int:
    leaves = [leaf for leaf in jax.tree.leaves(batches[0]) if hasattr(leaf, "shape")]
    sizes = [math.prod(leaf.shape) for leaf in leaves] + [max(array.shape, default=1) for array in parameters]
    return max(sizes, default=1)
