"""The checks of `compare` that need no forward pass: names, and values of parameters."""

from __future__ import annotations

from collections import Counter

import numpy as np

from bridge.errors import bullet_list
from gpt2_jax.parity.pairs.explain import explain, same_as_another, where_differs
from gpt2_jax.parity.pairs.matching.match import tied
from gpt2_jax.parity.pairs.runs import Runs, transformed
from gpt2_jax.parity.reporting.report import Check, Measurement

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
            measurements.append(Measurement(title, len(missing), 0, listed(missing)))
    notes = [f"{count} x {reason}" for reason, count in Counter(m.reason for m in matching.matches).items()]
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
            found.append(Measurement(title, len(unmatched), tolerance, listed(unmatched)))
    return found


def parameters(runs: Runs) -> Check:
    """Matched parameters have the same values, in the layout of the left side."""
    matching, left, right = runs.matching, runs.parameters(0), runs.parameters(1)
    if not matching.matches and not matching.misfits:
        return Check("parameters", note="a side has no parameters")
    wrong = {m.left: m for m in matching.matches if not _same(left[m.left], transformed(m, right[m.right]))}
    found = [Measurement(f"parameters that differ, of {len(matching.matches)}", len(wrong), 0, listed([*wrong]))]
    if matching.misfits:
        shapes = "parameters whose shapes do not fit"
        found.append(Measurement(shapes, len(matching.misfits), 0, listed([m.left for m in matching.misfits])))
    layouts = runs.description(0).layouts
    lines = [
        f"{m.left} and {m.right}: {m.reason}{and_hint(explain(left[m.left], right[m.right]))}" for m in matching.misfits
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


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    return np.array_equal(a.astype(np.float64), b, equal_nan=True)


def listed(names: list[str]) -> str:
    """The first names of a list.

    >>> listed(["a", "b", "c", "d"])
    'a, b, c, ... (4 in all)'
    """
    more = f", ... ({len(names)} in all)" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def and_hint(hint: str) -> str:
    """A hint as a further part of a sentence."""
    return f"; {hint}" if hint else ""
