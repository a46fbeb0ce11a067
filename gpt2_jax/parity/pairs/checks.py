"""The checks of `compare` that run both sides. Each is a function from their runs to a `Check`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from gpt2_jax.parity.metrics import rms
from gpt2_jax.parity.pairs.bounds import (
    deviation,
    error_ratio,
    fp64_bound,
    l2,
    largest,
    rounding_error,
    typical_error,
    usual_size,
)
from gpt2_jax.parity.pairs.explain import explain, explain_update, same_as_another, where_differs
from gpt2_jax.parity.pairs.matching.match import Match
from gpt2_jax.parity.pairs.padding import Pad
from gpt2_jax.parity.pairs.parameter_checks import and_hint, listed
from gpt2_jax.parity.pairs.runs import Runs, aligned, transformed
from gpt2_jax.parity.pairs.sides.projection import projection_weights
from gpt2_jax.parity.pairs.sides.side import Arrays, SideError
from gpt2_jax.parity.reporting.report import Check, Measurement
from gpt2_jax.parity.tolerances import SHORT_NAMES


def outputs(runs: Runs) -> Check:
    """Outputs are equal in float64, and as close to float64 in float32 and bfloat16 as the reference."""
    left, right = runs.forward(0, "float64").outputs, runs.forward(1, "float64").outputs
    pairs = runs.pairs(left, right)
    found, hints, divergence = [], [], ""
    reasons: dict[str, list[str]] = {}
    for name, other in pairs.items():
        a, b = left[name].astype(np.float64), aligned(left[name], right[other].astype(np.float64))
        bound = fp64_bound(a, runs.rounding("outputs", {0: name, 1: other}), runs.size)
        title = f"fp64 {name}, max difference"
        if b is None:
            shapes = f"shapes {a.shape} and {right[other].shape}"
            found.append(Measurement(title, float("inf"), bound.value, shapes))
            divergence = divergence or f"{name}: {shapes}"
            continue
        measurement = Measurement(title, _difference(a, b), bound.value, where_differs(a, b, bound.value))
        found.append(measurement)
        reasons.setdefault(bound.reason, []).append(name)
        if not measurement.passed:
            divergence = divergence or f"{name} at {measurement.location}"
            hints += [f"{name}: {hint}" for hint in _hints(runs, a, b, right, other) if hint]
        found += _errors(runs, name, other, a, rms(deviation(a, b)))
    alone = [n for n in left if n not in pairs and not runs.is_excluded(n)]
    alone += [n for n in right if n not in pairs.values()]
    found += [Measurement(f"fp64 {n}, in one side only", float("inf"), 0.0, n) for n in alone]
    notes = [f"tolerance of {listed(names)}: {reason}" for reason, names in reasons.items()]
    return Check("outputs", tuple(found), "; ".join([*notes, *hints]), divergence)


def _errors(runs: Runs, name: str, other: str, exact: np.ndarray, difference: float) -> list[Measurement]:
    """The errors of one output against float64, right over left, in each narrower dtype."""
    found = []
    for dtype in runs.dtypes:
        if dtype == "float64":
            continue
        title = f"{SHORT_NAMES[dtype]} {name}, error vs fp64, {runs.sides[1].name} / {runs.sides[0].name}"
        try:
            a = runs.forward(0, dtype).outputs[name].astype(np.float64)
            b = aligned(exact, runs.forward(1, dtype).outputs[other].astype(np.float64))
        except SideError as error:
            found.append(Measurement(title, float("inf"), 0.0, str(error)))
            continue
        if b is not None:
            ratio, limit = error_ratio(exact, a, b, dtype, runs.size, difference=difference)
            found.append(Measurement(title, ratio, limit, name))
    return found


def _hints(runs: Runs, a: np.ndarray, b: np.ndarray, right: Arrays, other: str) -> list[str]:
    """What the values of two different outputs show."""
    scale = largest(a) * 1e-12
    candidates = {n: x.astype(np.float64) for n, x in right.items() if n != other}
    same = same_as_another(a, candidates, scale)
    hints = [f"the left side equals {same} of the right side"] if same else [explain(a, b)]
    if 0 < _difference(a, b) <= 1e-5 * largest(a):
        hints.append("the difference has the size of float32 rounding; a side may compute a part in float32")
    return [*hints, *_narrow(runs)]


def _narrow(runs: Runs) -> list[str]:
    """The first intermediate of each side that is not in float64, although float64 was requested."""
    found = []
    for side in (0, 1):
        forward = runs.forward(side, "float64")
        for name, array in {**forward.intermediates, **forward.outputs}.items():
            if array.dtype.kind in "fV" and array.dtype != np.float64:
                found.append(f"{runs.sides[side].name} computes {name} in {array.dtype}")
                break
    return found


def intermediates(runs: Runs) -> Check:
    """What passes into and out of modules is equal in float64."""
    left, right = (runs.forward(side, "float64").intermediates for side in (0, 1))
    pairs = runs.pairs(left, right)
    worst, place, divergence, compared = 0.0, "", "", 0
    for name, other in pairs.items():
        a, b = left[name].astype(np.float64), aligned(left[name], right[other].astype(np.float64))
        if left[name].dtype.kind in "iub":
            continue
        if b is None:
            # Arrays of other ranks, or with their axes in another order, cannot be compared.
            if a.ndim == right[other].ndim and a.size != right[other].size:
                worst, place = float("inf"), place or name
                divergence = divergence or f"{name}: shapes {a.shape} and {right[other].shape}"
            continue
        compared += 1
        bound = fp64_bound(a, runs.rounding("intermediates", {0: name, 1: other}), runs.size).value
        ratio = _ratio(_difference(a, b), bound)
        if not divergence and not ratio <= 1:
            divergence = f"{name} at {where_differs(a, b, bound)}"
            if hint := explain(a, b):
                divergence += f"; {hint}"
        if not ratio <= worst:
            worst, place = ratio, name
    if not compared and not divergence:
        return Check("intermediates", note="no module of one side has a counterpart with the same shape")
    title = f"fp64 max difference of {compared} intermediates / tolerance"
    return Check("intermediates", (Measurement(title, worst, 1.0, place),), first_divergence=divergence)


def gradients(runs: Runs) -> Check:
    """Gradients are equal in float64, and as close to float64 in float32 as the reference."""
    ours, theirs = (runs.gradients(side, "float64") for side in (0, 1))
    if ours is None or theirs is None:
        return Check("gradients", note="a side has no gradients")
    (left_loss, left), (right_loss, right) = ours, theirs
    in_float32 = [runs.gradients(side, "float32") if "float32" in runs.dtypes else None for side in (0, 1)]
    matches = [m for m in runs.matching.matches if m.left in left and m.right in right]
    scaled = [m.left for m in matches if not _moves_elements(m, right[m.right].shape)]
    matches = [m for m in matches if m.left not in scaled]
    if not matches:
        return Check("gradients", note="no trainable parameter has a counterpart")
    ratios: dict[str, dict[str, float]] = {"fp64": {}, "fp32": {}}
    limit, rounded = 1.0, in_float32[0][1] if in_float32[0] else {}
    known = [m.left for m in matches if m.left in rounded]
    usual = usual_size([left[n] for n in known])
    typical = typical_error([left[n] for n in known], [rounded[n] for n in known], l2)
    for m in matches:
        a, b = left[m.left].astype(np.float64), transformed(m, right[m.right])
        a32, b32 = rounded.get(m.left), None
        if in_float32[1] is not None:
            b32 = transformed(m, in_float32[1][1][m.right])
        errors = [rounding_error(x, y, l2) for x, y in ((a, a32), (b, b32)) if y is not None]
        ratios["fp64"][m.left] = _ratio(l2(b - a), fp64_bound(a, errors, runs.size, l2, typical).value)
        if a32 is not None and b32 is not None:
            ratios["fp32"][m.left], limit = error_ratio(
                a, a32, b32, "float32", runs.size, l2, typical, usual * a.size**0.5, l2(b - a)
            )
    one_sided = _with_one_gradient(runs, left, right)
    losses = [np.array(left_loss), np.array(right_loss)]
    errors = [rounding_error(x, np.array(each[0])) for x, each in zip(losses, in_float32, strict=True) if each]
    bound = fp64_bound(losses[0], errors, replace(runs.size, depth=max(runs.size.depth, runs.size.rows)))
    titles = {"fp64": "max L2 difference / tolerance", "fp32": "max error vs fp64, right / left"}
    found = [
        Measurement("fp64 loss, difference", _difference(*losses), bound.value),
        Measurement("parameters with a gradient on one side only", len(one_sided), 0, listed(one_sided)),
    ]
    for short, each in ratios.items():
        if each:
            tolerance = 1.0 if short == "fp64" else limit
            worst = max(each, key=lambda name: each[name])
            title = f"{short} gradients of {len(each)} parameters, {titles[short]}"
            found.append(Measurement(title, each[worst], tolerance, worst))
    departing = [name for name, ratio in ratios["fp64"].items() if not ratio <= 1]
    note = f"loss {left_loss:.6g} and {right_loss:.6g}"
    if scaled:
        note += f"; not compared, because the transform does more than move elements: {listed(scaled)}"
    if not departing:
        return Check("gradients", tuple(found), note)
    first = departing[-1]
    match = next(m for m in matches if m.left == first)
    hint = explain(left[first], transformed(match, right[match.right]))
    return Check("gradients", tuple(found), f"{note}{and_hint(hint)}", f"{first}, the first in the backward pass")


def _with_one_gradient(runs: Runs, left: Arrays, right: Arrays) -> list[str]:
    """The matched parameters that only one side trains. The other may have frozen or detached them."""
    buffers = [runs.description(side).buffers for side in (0, 1)]
    return [
        m.left
        for m in runs.matching.matches
        if (m.left in left) != (m.right in right) and m.left not in buffers[0] and m.right not in buffers[1]
    ]


def _moves_elements(match: Match, shape: tuple[int, ...]) -> bool:
    """Whether a transform only moves elements. Only then can gradients be transformed like their parameters."""
    x = projection_weights([shape])[0]
    return np.array_equal(np.sort(match.transform(x).reshape(-1)), np.sort(x.reshape(-1)))


def state(runs: Runs) -> Check:
    """Buffers that a pass in training mode updates, such as running statistics, get the same values."""
    forwards = [runs.forward(side, "float64") for side in (0, 1)]
    left, right = forwards[0].state, forwards[1].state
    matches = [m for m in runs.matching.matches if m.left in left or m.right in right]
    if not matches:
        return Check("state", note="the pass updates no buffers")
    found, lines, divergence = [], [], ""
    old = runs.parameters(0)
    for m in matches:
        before = old[m.left].astype(np.float64)
        a = left[m.left].astype(np.float64) if m.left in left else before
        b = transformed(m, right[m.right]) if m.right in right else transformed(m, runs.parameters(1)[m.right])
        names = {0: m.left} if m.left in left else {1: m.right}
        bound = fp64_bound(a, runs.rounding("state", names), runs.size)
        measurement = Measurement(f"fp64 {m.left}, max difference", _difference(a, b), bound.value)
        found.append(measurement)
        if not measurement.passed:
            divergence = divergence or f"{m.left} at {where_differs(a, b, bound.value)}"
            if hint := explain_update(before, a, b):
                lines.append(f"{m.left}: {hint}")
    return Check("state", tuple(found), "; ".join(lines), divergence)


def determinism(runs: Runs) -> Check:
    """Each side, run twice, gives the same values."""
    found, notes, divergence = [], [], ""
    for side, each in enumerate(runs.sides):
        first, second = runs.forward(side, "float64"), runs.run(side, runs.inputs, "float64")
        different, place = 0, ""
        for section in ("intermediates", "outputs"):
            again = getattr(second, section)
            for name, array in getattr(first, section).items():
                a, b = (x.astype(np.float64) for x in (array, again.get(name, np.empty(0))))
                bound = fp64_bound(a, runs.rounding(section, {side: name}), runs.size).value
                different += a.tobytes() != b.tobytes()
                if a.shape != b.shape or not _difference(a, b) <= bound:
                    place = place or f"{name} of {each.name}"
        divergence = divergence or place
        title = f"{each.name}, arrays that change in a second run"
        found.append(Measurement(title, different, None if different and not place else 0, place))
        if different and not place:
            notes.append(f"{each.name} is not bit-reproducible: {different} arrays change within rounding")
        if training := runs.description(side).training:
            notes.append(f"{each.name} is in training mode: {listed(list(training))}")
    return Check("determinism", tuple(found), "; ".join(notes), divergence)


def padding(runs: Runs, pads: Mapping[str, Pad]) -> Check:
    """Padded inputs give the same outputs as inputs without padding, on each side."""
    found, divergence = [], ""
    for title, pad in pads.items():
        inputs, unpad = pad(runs.inputs)
        for side, each in enumerate(runs.sides):
            alone = runs.forward(side, "float64").outputs
            padded = runs.run(side, tuple(map(np.asarray, inputs)), "float64").outputs
            if missing := [name for name in alone if name not in padded]:
                raise SideError(each.name, missing[0], "the pass with padding does not return this output")
            for name, array in alone.items():
                a, b = array.astype(np.float64), unpad(padded[name].astype(np.float64))
                bound = fp64_bound(a, runs.rounding("outputs", {side: name}), runs.size).value
                location = where_differs(a, b, bound) if a.shape == b.shape else f"shapes {a.shape} and {b.shape}"
                value = _difference(a, b) if a.shape == b.shape else float("inf")
                found.append(Measurement(f"{each.name}, {title} vs unpadded, {name}", value, bound, location))
                if not found[-1].passed:
                    divergence = divergence or f"{name} of {each.name}, {title}"
    return Check("padding", tuple(found), first_divergence=divergence)


def guarded(name: str, check: Callable[[], Check]) -> Check:
    """Run a check. If a side fails, the check fails with the side, the place and the message."""
    try:
        return check()
    except SideError as error:
        measurement = Measurement(f"{error.side} fails", float("inf"), 0.0, error.place)
        return Check(name, (measurement,), error.message, f"{error.place} of {error.side}".removeprefix(" of "))


def _difference(a: np.ndarray, b: np.ndarray) -> float:
    """max |a - b|. NaN if there is any."""
    return largest(deviation(a, b))


def _ratio(difference: float, bound: float) -> float:
    if difference == 0:
        return 0.0
    return difference / bound if bound else float("inf")
