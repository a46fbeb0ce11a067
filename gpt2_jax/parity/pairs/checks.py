"""The checks of `compare`. Each is a function from the runs of both sides to a `Check`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from bridge.errors import bullet_list
from gpt2_jax.parity.pairs.bounds import (
    SHORT_NAMES,
    Bound,
    deviation,
    error_ratio,
    fp64_bound,
    l2,
    largest,
    typical_error,
)
from gpt2_jax.parity.pairs.explain import explain, explain_update, same_as_another, where_differs
from gpt2_jax.parity.pairs.matching import tied
from gpt2_jax.parity.pairs.padding import Pad
from gpt2_jax.parity.pairs.runs import Runs, aligned, transformed
from gpt2_jax.parity.pairs.sides import Arrays, Inputs, SideError
from gpt2_jax.parity.report import Check, Measurement

_MOST_EXPLAINED = 8
"""Parameters that are described one by one in a report."""


def names(runs: Runs) -> Check:
    """Every parameter has a counterpart on the other side, and every output."""
    matching = runs.matching
    measurements = []
    for side, unmatched in enumerate((matching.unmatched_left, matching.unmatched_right)):
        arrays, layouts = runs.parameters(side), runs.description(side).layouts
        missing = [name for name in unmatched if name not in layouts or layouts[name].required]
        title = f"parameters only in {runs.sides[side].name}, of {len(arrays)}"
        if arrays and (matching.matches or unmatched):
            measurements.append(Measurement(title, len(missing), 0, _listed(missing)))
    notes = [f"{count} x {reason}" for reason, count in _counted(m.reason for m in matching.matches).items()]
    measurements += _without_counterpart(runs, "outputs", 0)
    measurements += _without_counterpart(runs, "intermediates", None)
    return Check("names", tuple(measurements), note="; ".join(notes[:_MOST_EXPLAINED]))


def _without_counterpart(runs: Runs, section: str, tolerance: int | None) -> list[Measurement]:
    arrays = [getattr(runs.forward(side, runs.dtypes[0]), section) for side in (0, 1)]
    pairs = runs.pairs(*arrays)
    missing = [[n for n in arrays[0] if n not in pairs], [n for n in arrays[1] if n not in pairs.values()]]
    found = []
    for side, unmatched in enumerate(missing):
        if unmatched or tolerance is not None:
            title = f"{section} only in {runs.sides[side].name}, of {len(arrays[side])}"
            found.append(Measurement(title, len(unmatched), tolerance, _listed(unmatched)))
    return found


def parameters(runs: Runs) -> Check:
    """Matched parameters have the same values, in the layout of the left side."""
    matching, left, right = runs.matching, runs.parameters(0), runs.parameters(1)
    if not matching.matches and not matching.misfits:
        return Check("parameters", note="a side has no parameters")
    wrong = {m.left: m for m in matching.matches if not _same(left[m.left], transformed(m, right[m.right]))}
    found = [Measurement(f"parameters that differ, of {len(matching.matches)}", len(wrong), 0, _listed([*wrong]))]
    if matching.misfits:
        shapes = "parameters whose shapes do not fit"
        found.append(Measurement(shapes, len(matching.misfits), 0, _listed([m.left for m in matching.misfits])))
    layouts = runs.description(0).layouts
    lines = [
        f"{m.left} and {m.right}: {m.reason}{_and(explain(left[m.left], right[m.right]))}" for m in matching.misfits
    ]
    for name, match in wrong.items():
        a, b = left[name].astype(np.float64), transformed(match, right[match.right])
        blocks = layouts[name].blocks if name in layouts else ()
        others = {other: each for other, each in left.items() if other != name and each.shape == a.shape}
        same = same_as_another(b, {other: each.astype(np.float64) for other, each in others.items()})
        why = f"has the values of {same}" if same else explain(a, b, blocks) or where_differs(a, b, 0.0)
        lines.append(f"{name} and {match.right}: {why}")
    lines += _ties(runs)
    shown = bullet_list(lines, _MOST_EXPLAINED).replace("  - ", "") if lines else ""
    return Check("parameters", tuple(found), shown)


def _ties(runs: Runs) -> list[str]:
    """Parameters that are one array on one side, and two on the other."""
    matching, lines = runs.matching, []
    partners = {m.left: m.right for m in matching.matches}
    for side, names in enumerate((partners, {right: left for left, right in partners.items()})):
        other = tied(runs.parameters(1 - side))
        for name, first in tied(runs.parameters(side)).items():
            a, b = names.get(name), names.get(first)
            if a and b and other.get(a, a) != other.get(b, b):
                lines.append(f"{name} is tied to {first} in {runs.sides[side].name}; {a} is not tied to {b}")
    return lines


def outputs(runs: Runs) -> Check:
    """Outputs are equal in float64, and as close to float64 in float32 and bfloat16 as the reference."""
    left, right = runs.forward(0, "float64").outputs, runs.forward(1, "float64").outputs
    pairs = runs.pairs(left, right)
    found, reasons, divergence = [], [], ""
    for name, other in pairs.items():
        a, b = left[name].astype(np.float64), aligned(left[name], right[other].astype(np.float64))
        bound = _bound(runs, "outputs", name, a)
        title = f"fp64 {name}, max difference"
        if b is None:
            shapes = f"shapes {a.shape} and {right[other].shape}"
            found.append(Measurement(title, float("inf"), bound.value, shapes))
            divergence = divergence or f"{name}: {shapes}"
            continue
        measurement = Measurement(title, _difference(a, b), bound.value, where_differs(a, b, bound.value))
        found.append(measurement)
        reasons.append(f"tolerance of {name}: {bound.reason}")
        if not measurement.passed:
            divergence = divergence or f"{name} at {measurement.location}"
            reasons += [f"{name}: {hint}" for hint in _hints(runs, a, b, right, other) if hint]
        found += _errors(runs, name, other, a)
    found += [Measurement(f"fp64 {n}, in one side only", float("inf"), 0.0, n) for n in left if n not in pairs]
    return Check("outputs", tuple(found), "; ".join(reasons), divergence)


def _errors(runs: Runs, name: str, other: str, exact: np.ndarray) -> list[Measurement]:
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
            ratio, limit = error_ratio(exact, a, b, dtype, runs.size)
            found.append(Measurement(title, ratio, limit))
    return found


def _hints(runs: Runs, a: np.ndarray, b: np.ndarray, right: Arrays, other: str) -> list[str]:
    """What the values of two different outputs tell."""
    scale = largest(a) * 1e-12
    candidates = {n: x.astype(np.float64) for n, x in right.items() if n != other}
    same = same_as_another(a, candidates, scale)
    hints = [f"the left side equals {same} of the right side"] if same else [explain(a, b)]
    if 0 < _difference(a, b) <= 1e-5 * largest(a):
        hints.append("the difference has the size of float32 rounding; a side may compute a part in float32")
    return [*hints, *_narrow(runs)]


def _narrow(runs: Runs) -> list[str]:
    """The first intermediate of each side that is not in float64, although float64 was asked for."""
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
        bound = _bound(runs, "intermediates", name, a).value
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
    if not matches:
        return Check("gradients", note="no trainable parameter has a counterpart")
    ratios: dict[str, dict[str, float]] = {"fp64": {}, "fp32": {}}
    limit, rounded = 1.0, in_float32[0][1] if in_float32[0] else {}
    known = [m.left for m in matches if m.left in rounded]
    typical = typical_error([left[n] for n in known], [rounded[n] for n in known], l2)
    for m in matches:
        a, b, ours = left[m.left].astype(np.float64), transformed(m, right[m.right]), rounded.get(m.left)
        ratios["fp64"][m.left] = _ratio(l2(b - a), fp64_bound(a, ours, runs.size, l2, typical).value)
        if ours is not None and in_float32[1]:
            theirs = transformed(m, in_float32[1][1][m.right])
            ratios["fp32"][m.left], limit = error_ratio(a, ours, theirs, "float32", runs.size, l2, typical)
    titles = {"fp64": "max L2 difference / tolerance", "fp32": "max error vs fp64, right / left"}
    found = []
    for short, each in ratios.items():
        if each:
            tolerance = 1.0 if short == "fp64" else limit
            worst = max(each, key=lambda name: each[name])
            title = f"{short} gradients of {len(each)} parameters, {titles[short]}"
            found.append(Measurement(title, each[worst], tolerance, worst))
    departing = [name for name, ratio in ratios["fp64"].items() if not ratio <= 1]
    note = f"loss {left_loss:.6g} and {right_loss:.6g}"
    if not departing:
        return Check("gradients", tuple(found), note)
    first = departing[-1]
    match = next(m for m in matches if m.left == first)
    hint = explain(left[first], transformed(match, right[match.right]))
    return Check("gradients", tuple(found), f"{note}{_and(hint)}", f"{first}, the first in the backward pass")


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
        rounded = runs.forward(0, "float32").state.get(m.left) if "float32" in runs.dtypes else None
        bound = fp64_bound(a, None if rounded is None else rounded.astype(np.float64), runs.size)
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
        in_float32 = runs.forward(side, "float32") if "float32" in runs.dtypes else None
        different = 0
        for section in ("intermediates", "outputs"):
            again = getattr(second, section)
            for name, array in getattr(first, section).items():
                a, b = (x.astype(np.float64) for x in (array, again.get(name, np.empty(0))))
                rounded = getattr(in_float32, section).get(name) if in_float32 else None
                bound = fp64_bound(a, None if rounded is None else rounded.astype(np.float64), runs.size).value
                different += a.tobytes() != b.tobytes()
                if a.shape != b.shape or not _difference(a, b) <= bound:
                    divergence = divergence or f"{name} of {each.name}"
        ok = not divergence.endswith(f" of {each.name}")
        title = f"{each.name}, arrays that change in a second run"
        found.append(Measurement(title, different, None if different and ok else 0, divergence if not ok else ""))
        if different and ok:
            notes.append(f"{each.name} is not bit-reproducible: {different} arrays change within rounding")
        if training := runs.description(side).training:
            notes.append(f"{each.name} is in training mode: {_listed(list(training))}")
    return Check("determinism", tuple(found), "; ".join(notes), divergence)


def padding(runs: Runs, pads: Mapping[str, Pad]) -> Check:
    """Padded inputs give the same outputs as inputs without padding, on each side."""
    found, divergence = [], ""
    for title, pad in pads.items():
        inputs, unpad = pad(runs.inputs)
        for side, each in enumerate(runs.sides):
            alone, padded = runs.forward(side, "float64").outputs, runs.run(side, _checked(inputs), "float64").outputs
            for name, array in alone.items():
                a, b = array.astype(np.float64), unpad(padded[name].astype(np.float64))
                bound = _bound(runs, "outputs", name, a, side).value
                location = where_differs(a, b, bound) if a.shape == b.shape else f"shapes {a.shape} and {b.shape}"
                value = _difference(a, b) if a.shape == b.shape else float("inf")
                found.append(Measurement(f"{each.name}, {title} vs unpadded, {name}", value, bound, location))
                if not found[-1].passed:
                    divergence = divergence or f"{name} of {each.name}, {title}"
    return Check("padding", tuple(found), first_divergence=divergence)


def guarded(name: str, check: Callable[[], Check]) -> Check:
    """Run a check. A side that fails makes it fail, with the side, the place and the message."""
    try:
        return check()
    except SideError as error:
        measurement = Measurement(f"{error.side} fails", float("inf"), 0.0, error.place)
        return Check(name, (measurement,), error.message, f"{error.place} of {error.side}".removeprefix(" of "))


def with_note(check: Check, note: str) -> Check:
    """Add to the note of a check."""
    return replace(check, note="; ".join(filter(None, (check.note, note))))


def _bound(runs: Runs, section: str, name: str, exact: np.ndarray, side: int = 0) -> Bound:
    rounded = None
    if "float32" in runs.dtypes:
        try:
            rounded = getattr(runs.forward(side, "float32"), section).get(name)
        except SideError:
            rounded = None
    return fp64_bound(exact, None if rounded is None else rounded.astype(np.float64), runs.size)


def _difference(a: np.ndarray, b: np.ndarray) -> float:
    """max |a - b|. NaN if there is any."""
    return largest(deviation(a, b))


def _ratio(difference: float, bound: float) -> float:
    if difference == 0:
        return 0.0
    return difference / bound if bound else float("inf")


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    return np.array_equal(a.astype(np.float64), b, equal_nan=True)


def _checked(inputs: Inputs) -> Inputs:
    return tuple(np.asarray(array) for array in inputs)


def _listed(names: list[str]) -> str:
    more = f", ... ({len(names)} in all)" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _counted(values: object) -> dict[str, int]:
    counts: dict[str, int] = {}
    for value in values:  # type: ignore[attr-defined]
        counts[value] = counts.get(value, 0) + 1
    return counts


def _and(hint: str) -> str:
    return f"; {hint}" if hint else ""
