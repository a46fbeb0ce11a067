"""Run two implementations of a model on the same inputs and report whether they compute the same function."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from bridge import BridgeError
from gpt2_jax.parity.pairs import checks as pass_checks
from gpt2_jax.parity.pairs import parameter_checks
from gpt2_jax.parity.pairs.matching.match import Names
from gpt2_jax.parity.pairs.padding import Pad
from gpt2_jax.parity.pairs.runs import Runs
from gpt2_jax.parity.pairs.sides.side import DTYPES, Side, SideError
from gpt2_jax.parity.reporting.report import Check, Claim, Report

SAME_PAIR = Claim(
    "the two sides compute the same function", "NOT the same function", frozenset({"names", "outputs", "gradients"})
)
SAME_OUTPUTS = Claim("the outputs are the same", "NOT the same function", frozenset({"outputs"}))

PAIR_CHECKS: Mapping[str, Callable[[Runs], Check]] = {
    "names": parameter_checks.names,
    "parameters": parameter_checks.parameters,
    "outputs": pass_checks.outputs,
    "intermediates": pass_checks.intermediates,
    "gradients": pass_checks.gradients,
    "state": pass_checks.state,
    "determinism": pass_checks.determinism,
}
"""The checks in the order of the report, except padding, which needs `pads`."""


def compare(
    left: Side,
    right: Side,
    inputs: Sequence[np.ndarray],
    *,
    names: Names = None,
    checks: Iterable[str] | None = None,
    dtypes: Iterable[str] = DTYPES,
    pads: Mapping[str, Pad] | None = None,
) -> Report:
    """Compare two sides. The left one is the reference.

    Args:
        left: the reference: what `torch_side`, `linen_side`, `nnx_side`, `function_side` or `golden_side` returns.
        right: the implementation to check.
        inputs: the positional arguments of both sides. Floating-point inputs are cast to each dtype.
        names: left name -> right name of parameters, modules or outputs whose names differ by more than convention.
            None as the right name excludes the left one. A sequence of `Match` gives transforms too.
        checks: names from `PAIR_CHECKS`, or `padding`. The default is all.
        dtypes: the dtypes to compute in. float64 decides whether the functions are equal.
        pads: a description -> a function that pads the inputs, such as `pad_tokens("left")`.

    Returns:
        A report. A side that raises, or returns other shapes, other names or NaN, makes checks fail; the report then
        names the side and the place.

    Raises:
        MatchError: names are ambiguous, or `names` is invalid.
        BridgeError: a check or a dtype is unknown, or both sides have the same name.
    """
    chosen = [*PAIR_CHECKS, *(["padding"] if pads else [])] if checks is None else [*checks]
    _require_known(chosen, tuple(dtypes), left, right)
    runs = Runs(left, right, tuple(np.asarray(x) for x in inputs), names, tuple(dtypes))
    if "float64" not in runs.dtypes:
        raise BridgeError("one side cannot compute in float64, which is needed to tell a mistake from rounding")
    results = [_run(name, runs, pads or {}) for name in chosen]
    try:
        training = [
            f"{s.name} is in training mode: {', '.join(runs.description(k).training)}"
            for k, s in enumerate(runs.sides)
            if runs.description(k).training
        ]
    except SideError:
        training = []
    details = {side.name: _described(runs, k) for k, side in enumerate(runs.sides)}
    details["inputs"] = ", ".join(f"{x.dtype} {list(x.shape)}" for x in runs.inputs)
    has_gradients = any(check.name == "gradients" and not check.skipped for check in results)
    claim = SAME_PAIR if has_gradients or ("gradients" in chosen and runs.parameters(0)) else SAME_OUTPUTS
    return Report(f"{left.name} and {right.name}", details, tuple(results), tuple(training), claim)


def _run(name: str, runs: Runs, pads: Mapping[str, Pad]) -> Check:
    if name == "padding":
        return pass_checks.guarded(name, lambda: pass_checks.padding(runs, pads))
    return pass_checks.guarded(name, lambda: PAIR_CHECKS[name](runs))


def _require_known(checks: list[str], dtypes: tuple[str, ...], left: Side, right: Side) -> None:
    if unknown := [name for name in checks if name not in (*PAIR_CHECKS, "padding")]:
        raise BridgeError(f"checks: {unknown[0]!r} is not one of {', '.join(PAIR_CHECKS)}, padding")
    if unknown := [name for name in dtypes if name not in DTYPES]:
        raise BridgeError(f"dtypes: {unknown[0]!r} is not one of {', '.join(DTYPES)}")
    if left.name == right.name:
        raise BridgeError(f"both sides are named {left.name!r}; give one of them another name=")
    if getattr(left, "has_loss", None) != getattr(right, "has_loss", None) and "gradients" in checks:
        if None not in (getattr(left, "has_loss", None), getattr(right, "has_loss", None)):
            raise BridgeError("only one side has a loss; give loss= to both sides or to none")


def _described(runs: Runs, side: int) -> str:
    try:
        arrays = runs.parameters(side)
    except SideError as error:
        return str(error)
    if not arrays:
        return "no parameters"
    return f"{len(arrays)} arrays of parameters and buffers, {sum(x.size for x in arrays.values()):,} numbers"
