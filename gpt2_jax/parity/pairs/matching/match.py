"""Match the names of two sides: by the user's mapping, by equality, by convention, and by unique places."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from bridge.errors import bullet_list, quoted
from gpt2_jax.parity.pairs.matching.layouts import Layout, Transform, candidates, layout_by_name, merged
from gpt2_jax.parity.pairs.matching.names import (
    KNOWN_ROLES,
    MatchError,
    closest,
    is_below,
    normalised,
    renaming,
    role_name,
    without_wrappers,
)

Arrays = Mapping[str, np.ndarray]
Layouts = Mapping[str, Layout]


@dataclass(frozen=True)
class Match:
    """One array that both sides have."""

    left: str
    right: str
    transform: Transform
    """Transforms the right array to the left layout. Gradients are compared only if it only moves elements."""
    reason: str


@dataclass(frozen=True)
class Misfit:
    """Two names that match, but whose shapes do not agree in any layout of their kinds."""

    left: str
    right: str
    reason: str


@dataclass(frozen=True)
class Matching:
    """The table of matching names."""

    matches: tuple[Match, ...] = ()
    misfits: tuple[Misfit, ...] = ()
    unmatched_left: tuple[str, ...] = ()
    unmatched_right: tuple[str, ...] = ()


Names = Mapping[str, str | None] | Sequence[Match] | None
"""A mapping given by the user: left name or prefix -> right name or prefix. None excludes the left name."""


def match_names(
    left: Arrays,
    right: Arrays,
    names: Names = None,
    *,
    left_layouts: Layouts | None = None,
    right_layouts: Layouts | None = None,
    left_order: Sequence[str] = (),
    right_order: Sequence[str] = (),
) -> Matching:
    """Match the parameters of two sides.

    Names are matched in this order: by `names`, by equality, by convention (`h.0`, `layers_0`
    and `blocks.0`; `kernel`, `scale`, `embedding` and `weight`), and by the place in the forward pass or the shape, if
    only one pairing is possible.

    Args:
        left: name -> array. Only the shapes are used.
        right: name -> array.
        names: see `Names`.
        left_layouts: name -> layout, where the kind of the module is known.
        right_layouts: the same for the right side.
        left_order: names of modules in the order of the forward pass.
        right_order: the same for the right side.

    Raises:
        MatchError: `names` has unknown names, maps two names to one, or pairs shapes that do not fit; or names or
            layouts are ambiguous.
    """
    sides = (_Side(left, left_layouts, left_order), _Side(right, right_layouts, right_order))
    if names is not None and not isinstance(names, Mapping):
        return _from_matches(names, left, right)
    pairs = _paired(sides[0], sides[1], names or {})
    matches, misfits = _with_transforms(sides[0], sides[1], pairs)
    if names and (wrong := [m for m in misfits if m.left in names]):
        raise MatchError("names pairs shapes that do not fit:\n" + bullet_list(f"{m.left}: {m.reason}" for m in wrong))
    used = {other for other, _ in pairs.values()}
    excluded = {name for name, other in (names or {}).items() if other is None}
    return Matching(
        tuple(matches),
        tuple(misfits),
        _unmatched(sides[0], set(pairs), excluded),
        _unmatched(sides[1], used, set()),
    )


def _unmatched(side: _Side, used: set[str], excluded: set[str]) -> tuple[str, ...]:
    """Names without a partner. A name that is tied to a matched one needs none."""
    return tuple(
        name
        for name in side.shapes
        if name not in used
        and side.tied.get(name) not in used
        and not any(is_below(name, prefix) for prefix in excluded)
    )


class _Side:
    """Names, shapes, layouts and order of one side."""

    def __init__(self, arrays: Arrays, layouts: Layouts | None, order: Sequence[str]) -> None:
        self.shapes = {name: array.shape for name, array in arrays.items()}
        self.tied = tied(arrays)
        by_name = {name: layout_by_name(name, len(shape)) for name, shape in self.shapes.items()}
        self.layouts = {**by_name, **{name: layout for name, layout in (layouts or {}).items() if layout.axes}}
        self.order = {name: k for k, name in reversed([*enumerate(order)])}

    def sizes(self, name: str) -> tuple[int, ...]:
        """The sizes of the axes in any order, after split axes are merged."""
        layout, shape = self.layouts.get(name), self.shapes[name]
        if layout is not None and len(layout.axes) == len(shape):
            shape = merged(layout.axes, shape)[1]
        return tuple(sorted(shape))

    def place(self, name: str) -> int | None:
        """The place of the parameter's module in the forward pass."""
        return self.order.get(name.replace("/", ".").rpartition(".")[0])


Pairs = dict[str, tuple[str, str]]
"""Left name -> right name and the reason."""


def _paired(left: _Side, right: _Side, names: Mapping[str, str | None]) -> Pairs:
    rename, excluded = renaming(names, left.shapes, right.shapes)
    pairs: Pairs = {}
    keys: tuple[tuple[str, Callable[[str], object]], ...] = (
        ("same name", lambda name: name),
        ("same name by convention", normalised),
        ("same name by convention", lambda name: without_wrappers(normalised(name))),
        ("same last part of the name", _own_name),
    )
    for reason, key in keys:
        used = {other for other, _ in pairs.values()}
        ours = _unique((key(rename(n)), n) for n in left.shapes if n not in pairs and not excluded(n))
        theirs = _unique((key(n), n) for n in right.shapes if n not in used)
        for value, name in ours.items():
            if value in theirs:
                given = rename(name) != name
                pairs[name] = (theirs[value], "given" if given else reason)
    _pair_by_place(left, right, pairs, excluded)
    return {name: pairs[name] for name in left.shapes if name in pairs}


def _own_name(name: str) -> str:
    """The last part of a name, such as `weight_ih`, unless it is common, such as `weight`."""
    return name if normalised(name)[-1] in KNOWN_ROLES else role_name(name)


def _unique(items: Iterable[tuple[object, str]]) -> dict[object, str]:
    """Key -> name, for keys that occur once."""
    pairs = [*items]
    counts = Counter(key for key, _ in pairs)
    return {key: name for key, name in pairs if counts[key] == 1}


def _pair_by_place(left: _Side, right: _Side, pairs: Pairs, excluded: Callable[[str], bool]) -> None:
    """Add pairs of names that are alone with their role and shape, or in the same places of the forward pass."""
    for with_role in (True, False):
        used = {other for other, _ in pairs.values()}
        ours = [n for n in left.shapes if n not in pairs and n not in left.tied and not excluded(n)]
        theirs = [n for n in right.shapes if n not in used and n not in right.tied]
        groups: dict[object, tuple[list[str], list[str]]] = defaultdict(lambda: ([], []))
        for k, (side, names) in enumerate(((left, ours), (right, theirs))):
            for name in names:
                role = normalised(name)[-1]
                if role in KNOWN_ROLES or not with_role:
                    groups[(role if with_role else "", side.sizes(name))][k].append(name)
        for alike in groups.values():
            if all(alike):
                pairs.update(_in_order(left, right, *alike))


def _in_order(left: _Side, right: _Side, ours: list[str], theirs: list[str]) -> Pairs:
    """Pair names with the same shape. Returns nothing if one side has more of them, or if their roles differ.

    Raises:
        MatchError: several pairings are possible.
    """
    roles = [{normalised(name)[-1] for name in side} & KNOWN_ROLES for side in (ours, theirs)]
    if len(ours) != len(theirs) or (roles[0] and roles[1] and roles[0] != roles[1]):
        return {}
    if len(ours) == 1:
        return {ours[0]: (theirs[0], "the only parameters of this shape that are left")}
    places = [{side.place(n): n for n in names} for side, names in ((left, ours), (right, theirs))]
    # Two parameters of one module have the same place, so the order does not tell them apart.
    if any(None in side or len(side) < len(ours) for side in places):
        raise MatchError(
            f"{len(ours)} parameters of both sides have the same shape, and their names do not tell which belong "
            "together:\n"
            + bullet_list([f"left: {', '.join(ours)}", f"right: {', '.join(theirs)}"])
            + f"\nGive the mapping: names={{{ours[0]!r}: {theirs[0]!r}, ...}}, with the name of a parameter or of a "
            "module on each side"
        )
    pairs = zip(*([name for _, name in sorted(side.items(), key=_place)] for side in places), strict=True)
    return {ours: (theirs, "same place in the forward pass") for ours, theirs in pairs}


def _place(item: tuple[int | None, str]) -> int:
    return item[0] or 0


def tied(arrays: Arrays) -> dict[str, str]:
    """Name -> the first name of the same array, for names that share an array with an earlier one."""
    first: dict[object, str] = {}
    found = {}
    for name, array in arrays.items():
        key = (array.__array_interface__["data"][0], array.shape)
        if array.size and first.setdefault(key, name) != name:
            found[name] = first[key]
    return found


def _with_transforms(left: _Side, right: _Side, pairs: Pairs) -> tuple[list[Match], list[Misfit]]:
    """Add the transform of each pair: by the kinds of both modules, by the shapes, or as for other parameters."""
    found = {
        ours: candidates(left.layouts.get(ours), right.layouts.get(theirs), left.shapes[ours], right.shapes[theirs])
        for ours, (theirs, _) in pairs.items()
    }
    votes = {layout for each in found.values() if len(each) == 1 for layout in each}
    matches, misfits = [], []
    for ours, (theirs, reason) in pairs.items():
        if found[ours]:
            layout, why = _chosen(ours, theirs, [*found[ours]], votes)
            matches.append(Match(ours, theirs, found[ours][layout], "; ".join(filter(None, (reason, layout, why)))))
        else:
            kinds = [str(layout) for layout in (left.layouts.get(ours), right.layouts.get(theirs)) if layout]
            shapes = f"shapes {left.shapes[ours]} and {right.shapes[theirs]}"
            misfits.append(Misfit(ours, theirs, "; ".join([shapes, *kinds])))
    return matches, misfits


def _chosen(ours: str, theirs: str, layouts: list[str], votes: set[str]) -> tuple[str, str]:
    """Choose between layouts that all fit a shape. Returns the layout and the reason."""
    if len(layouts) == 1:
        return layouts[0], ""
    if len(known := [layout for layout in layouts if layout in votes]) == 1:
        return known[0], "as for the parameters that are not square"
    if role_name(ours) == role_name(theirs):
        return layouts[0], "because the names are the same"
    raise MatchError(
        f"{ours} and {theirs} are square, and their layouts are ambiguous: {' or '.join(layouts)}. Give "
        f"layouts={{{theirs!r}: 'io'}} or 'oi' to the side whose layout is not known ([in, out] or [out, in])"
    )


def _from_matches(names: Sequence[Match], left: Arrays, right: Arrays) -> Matching:
    """Validate a table of matches that the user made."""
    problems = []
    for side, known, given in (("left", left, [m.left for m in names]), ("right", right, [m.right for m in names])):
        problems += [
            f"{quoted(n)} is not a name of the {side} side{closest(n, [*known])}" for n in given if n not in known
        ]
        problems += [f"{quoted(n)} appears twice on the {side} side" for n, k in Counter(given).items() if k > 1]
    for m in [] if problems else names:
        if (shape := m.transform(right[m.right]).shape) != left[m.left].shape:
            problems.append(f"{quoted(m.right)}: transformed to {shape}, but {quoted(m.left)} has {left[m.left].shape}")
    if problems:
        raise MatchError("names is not a valid table of matches:\n" + bullet_list(problems))
    pairs = {m.left: (m.right, m.reason) for m in names}
    sides = _Side(left, None, ()), _Side(right, None, ())
    used = {m.right for m in names}
    return Matching(tuple(names), (), _unmatched(sides[0], {*pairs}, set()), _unmatched(sides[1], used, set()))
