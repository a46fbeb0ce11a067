"""AdamW's state, carried between torch's `optimizer.state_dict()` and the Flax trees that optax holds.

A moment has the name, shape and layout of its parameter, so it crosses the bridge as weights do, through
`bridge.conversion`. torch numbers parameters in the order in which its optimizer was given them, group after group,
and keeps no names unless it was given those too; so whoever brings a torch state brings the names.
Crossing is total: everything missing, extra or misshapen is listed in one `ConversionError`.

Source: Loshchilov and Hutter 2019, "Decoupled Weight Decay Regularization", algorithm 2; torch/optim/adam.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np

from bridge import conversion
from bridge.config import GPT2Config
from bridge.conversion import FlaxTree, canonical_names, differences
from bridge.errors import ConversionError, bullet_list, quoted
from bridge.parameter_table import parameters
from bridge.storage.tensors import LazyTensor, LazyTensorMap, transposed


@dataclass(frozen=True)
class Hyperparameters:
    """What torch keeps beside the moments: how one parameter was updated last."""

    learning_rate: float
    beta1: float
    beta2: float
    epsilon: float
    weight_decay: float


@dataclass(frozen=True)
class AdamWState:
    """What AdamW remembers from step to step, under canonical names and in canonical shapes."""

    step: int
    """Updates made so far; the bias corrections depend on it."""
    exp_avg: Mapping[str, np.ndarray]
    """The running mean of gradients: torch's `exp_avg`, optax's `mu`."""
    exp_avg_sq: Mapping[str, np.ndarray]
    """The running mean of their squares: torch's `exp_avg_sq`, optax's `nu`."""
    hyperparameters: Mapping[str, Hyperparameters] = field(default_factory=dict)
    """For whoever goes on, to read. Empty where it came from optax, whose state does not hold them."""


def group_sizes(state_dict: Mapping[str, Any]) -> list[int]:
    """How many parameters each group of an optimizer's `state_dict()` has; `ConversionError` if it is none."""
    groups, _ = _opened(state_dict)
    return [len(group["params"]) for group in groups]


def from_torch(
    state_dict: Mapping[str, Any], names: Sequence[str] | None, config: GPT2Config, *, transposed: Collection[str] = ()
) -> AdamWState:
    """The state in an AdamW's `state_dict()`; one that was never stepped is step 0 with moments of zero.

    Args:
        state_dict: with CPU tensors or numpy arrays, whose memory the result shares, or with `LazyTensor`, whose
            moments are then read when they are looked up.
        names: the parameters' names in the optimizer's order, group after group, with any prefix that
            `bridge.canonical_names` knows; None where the state names them itself, as it does if the
            optimizer was given `model.named_parameters()` (torch 2.6).
        transposed: the canonical names of the matrices that are `[out, in]` in that model, as `nn.Linear` keeps them.

    Raises `ConversionError` unless this is the state of every parameter of the model that `config`
    describes, all of them stepped equally often, by AdamW and no variant of it.
    """
    groups, entries = _opened(state_dict)
    problems = _variants(groups)
    order = _canonical_order(groups, names, problems)
    keys = dict(zip(order, _keys(groups), strict=True))
    shapes = {p.torch_name: p.torch_shape for p in parameters(config)}
    problems += _unlike(order, shapes)
    problems += _incomplete(keys, entries)
    step = _common_step(_values("step", keys, entries, problems), problems)
    exp_avg, exp_avg_sq = (_transposed(_values(moment, keys, entries, problems), transposed) for moment in _MOMENTS)
    for moment, values in zip(_MOMENTS, (exp_avg, exp_avg_sq), strict=True):
        known = {name: value for name, value in values.items() if name in shapes}
        problems += [f"{moment} of {line}" for line in differences({name: shapes[name] for name in known}, known)]
    hyperparameters = _hyperparameters(groups, order, problems)
    if problems:
        raise ConversionError("this is not the AdamW state of the configured GPT-2:\n" + bullet_list(problems))
    if not entries:
        exp_avg = exp_avg_sq = {name: _zeros(shape) for name, shape in shapes.items()}
    return AdamWState(step, _moments(exp_avg), _moments(exp_avg_sq), hyperparameters)


def to_torch(
    state: AdamWState, names: Sequence[str] | None, param_groups: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """What the `load_state_dict` of an AdamW takes, but for its leaves: `gpt2_torch.training` makes them tensors.

    Args:
        names: as in `from_torch`, in the order of the optimizer that is to go on.
        param_groups: that optimizer's own, `optimizer.state_dict()["param_groups"]`. They come back
            as they are, so its hyperparameters stay.

    Raises `ConversionError` unless the state has the moments of exactly these parameters.
    """
    groups, _ = _opened({"param_groups": param_groups, "state": {}})
    problems = _variants(groups)
    order = _canonical_order(groups, names, problems)
    if problems := problems + _unlike(order, state.exp_avg):
        raise ConversionError("this AdamW state does not fit the optimizer:\n" + bullet_list(problems))
    step = np.asarray(state.step, np.float32)  # torch counts in float32
    entries = {
        key: {"step": step.copy(), "exp_avg": state.exp_avg[name], "exp_avg_sq": state.exp_avg_sq[name]}
        for name, key in zip(order, _keys(groups), strict=True)
    }
    return {"state": entries, "param_groups": [dict(group) for group in groups]}


def from_flax(
    step: int, mu: Mapping[str, Any], nu: Mapping[str, Any], config: GPT2Config, *, vocab_multiple: int = 1
) -> AdamWState:
    """The state whose moments are Flax trees, per layer or stacked, as `bridge.to_torch` takes them."""
    exp_avg, exp_avg_sq = _both(
        ("mu", mu), ("nu", nu), lambda t: conversion.to_torch(t, config, vocab_multiple=vocab_multiple)
    )
    return AdamWState(step, exp_avg, exp_avg_sq)


def to_flax(
    state: AdamWState, config: GPT2Config, *, stacked: bool = False, vocab_multiple: int = 1
) -> tuple[FlaxTree, FlaxTree]:
    """optax's `mu` and `nu`, with the switches of `bridge.to_flax`; rows that pad the vocabulary are zero."""
    return _both(
        ("exp_avg", state.exp_avg),
        ("exp_avg_sq", state.exp_avg_sq),
        lambda moments: conversion.to_flax(moments, config, stacked=stacked, vocab_multiple=vocab_multiple),
    )


def _both(a: tuple[str, Any], b: tuple[str, Any], crossed: Callable[[Any], dict[str, Any]]) -> tuple[Any, Any]:
    """The two moments after the crossing, with what is wrong with either in one error."""
    results, problems = [], []
    for name, moments in (a, b):
        try:
            results.append(crossed(moments))
        except ConversionError as error:
            problems.append(f"{name}: {error}")
    if problems:
        raise ConversionError("\n".join(problems))
    return results[0], results[1]


# What torch writes.

_MOMENTS = ("exp_avg", "exp_avg_sq")

_MUST_BE = {"amsgrad": False, "maximize": False, "decoupled_weight_decay": True}

# Numbers that are carried, how the update is computed, and what schedulers and people leave behind.
_HARMLESS = {
    *("params", "param_names", "lr", "betas", "eps", "weight_decay"),
    *("foreach", "capturable", "differentiable", "fused"),
    *("initial_lr", "name"),
}

_Groups = Sequence[Mapping[str, Any]]
_Entries = Mapping[Any, Mapping[str, Any]]
_Values = dict[str, np.ndarray | LazyTensor]


def _opened(state_dict: Mapping[str, Any]) -> tuple[_Groups, _Entries]:
    """The parameter groups and the entries, if it has the form of an optimizer's state at all."""
    opened = state_dict if isinstance(state_dict, Mapping) else {}
    groups, entries = opened.get("param_groups"), opened.get("state")
    if (
        not isinstance(groups, Sequence)
        or not all(isinstance(group, Mapping) and isinstance(group.get("params"), Sequence) for group in groups)
        or not isinstance(entries, Mapping)
        or not all(isinstance(entry, Mapping) for entry in entries.values())
        or not all(isinstance(key, int | str) for key in _keys(groups))
    ):
        raise ConversionError("an optimizer's state_dict() has `state` and `param_groups` with `params`; this has not")
    return groups, entries


def _keys(groups: _Groups) -> list[Any]:
    """What stands for each parameter in `state`: a number, or, from torch.distributed.checkpoint, its name."""
    return [key for group in groups for key in group["params"]]


def _variants(groups: _Groups) -> list[str]:
    """Options that make it another algorithm than AdamW, or of which that cannot be said."""
    problems = []
    for i, group in enumerate(groups):
        for name, value in group.items():
            if name in _MUST_BE and bool(value) is not _MUST_BE[name]:
                problems.append(f"group {i} has {name}={quoted(value)}, which is not AdamW")
            elif name not in (*_HARMLESS, *_MUST_BE) and value is not None:
                problems.append(f"group {i} has an unknown option {quoted(name)}; delete it if no update depends on it")
    return problems


def _canonical_order(groups: _Groups, names: Sequence[str] | None, problems: Sequence[str]) -> list[str]:
    """Canonical names in the optimizer's order; raises, with `problems`, where that cannot be known."""
    keys = _keys(groups)
    stored = [str(name) for group in groups for name in group.get("param_names") or ()]
    if not stored and all(isinstance(key, str) for key in keys):
        stored = keys
    orders = [_canonical(order) for order in (stored, names) if order]
    unclear = [f"{len(keys)} parameters, but {len(order)} names" for order in orders if len(order) != len(keys)]
    if len(set(keys)) < len(keys):
        unclear.append("one of them is in the groups twice")
    if not orders:
        unclear.append("they are numbered and not named: pass their names in the optimizer's order")
    elif not unclear and orders[0] != orders[-1]:
        stored_name, name = next((a, b) for a, b in zip(*orders, strict=True) if a != b)
        unclear.append(f"{quoted(name)} was given where the state itself says {quoted(stored_name)}")
    if unclear:
        lines = bullet_list([*unclear, *problems])
        raise ConversionError("it cannot be said which of the optimizer's parameters is which:\n" + lines)
    return orders[0]


def _canonical(names: Sequence[str]) -> list[str]:
    canonical = {given: name for name, given in canonical_names(names).items()}
    return [canonical.get(name, name) for name in names]


def _unlike(names: Sequence[str], expected: Mapping[str, Any]) -> list[str]:
    missing = [f"{name} is not among the optimizer's parameters" for name in expected if name not in names]
    return missing + [f"{quoted(name)} is not a parameter of this model" for name in names if name not in expected]


def _incomplete(keys: Mapping[str, Any], entries: _Entries) -> list[str]:
    """Parameters without a state where others have one, states without a parameter, and what is no part of AdamW's."""
    if not entries:
        return []
    known, named = {"step", *_MOMENTS}, set(keys.values())
    return [
        *(f"{name} has no state, although others do" for name, key in keys.items() if key not in entries),
        *(f"the state has an entry {quoted(key)} that no group has" for key in entries if key not in named),
        *(
            f"{name} has an unknown {quoted(what)}"
            for name, key in keys.items()
            for what in entries.get(key, ())
            if what not in known
        ),
    ]


def _values(what: str, keys: Mapping[str, Any], entries: _Entries, problems: list[str]) -> _Values:
    """One of a state's parts for every parameter that has a state."""
    values: _Values = {}
    for name, key in keys.items():
        if key not in entries:
            continue
        if what not in entries[key]:
            problems.append(f"{name} has no {what}")
            continue
        value = entries[key][what]
        try:
            values[name] = value if isinstance(value, LazyTensor) else np.asarray(value)
        except (TypeError, RuntimeError, ValueError) as error:  # torch: bfloat16, a tensor on a GPU
            problems.append(f"{what} of {name} does not become a numpy array: {quoted(error)}")
    return values


def _transposed(values: _Values, names: Collection[str]) -> _Values:
    """The values, those in `names` transposed."""

    def transpose(value: np.ndarray | LazyTensor) -> np.ndarray | LazyTensor:
        return transposed(value) if isinstance(value, LazyTensor) else value.T

    return {name: transpose(value) if name in names else value for name, value in values.items()}


def _moments(values: _Values) -> Mapping[str, np.ndarray]:
    """What was given as an entry is read when it is looked up."""
    if not any(isinstance(value, LazyTensor) for value in values.values()):
        return cast(dict[str, np.ndarray], values)
    return LazyTensorMap({name: v if isinstance(v, LazyTensor) else LazyTensor.of(v) for name, v in values.items()})


def _zeros(shape: tuple[int, ...]) -> LazyTensor:
    return LazyTensor(np.dtype(np.float32), shape, lambda: np.zeros(shape, np.float32))


def _common_step(steps: _Values, problems: list[str]) -> int:
    """How often all were stepped; 0 where none was."""
    by_count: dict[Any, list[str]] = {}
    for name, step in steps.items():
        if step.shape != () or step.dtype.kind not in "iuf":
            problems.append(f"step of {name} is {step.dtype} of shape {step.shape}, not a number of updates")
            continue
        count = step.read() if isinstance(step, LazyTensor) else step
        if 0 <= count < 2**63 and count % 1 == 0:
            by_count.setdefault(int(count), []).append(name)
        else:
            problems.append(f"step of {name} is {quoted(count)}, not a number of updates")
    if len(by_count) > 1:
        counts = ", ".join(f"{count} ({len(names)}, {names[0]} among them)" for count, names in by_count.items())
        problems.append(f"parameters were stepped unequally often: {counts}; optax counts for all together")
    return next(iter(by_count), 0)


def _hyperparameters(groups: _Groups, order: Sequence[str], problems: list[str]) -> dict[str, Hyperparameters]:
    """Of each parameter whose group has them all."""
    found: dict[str, Hyperparameters] = {}
    names = iter(order)
    for i, group in enumerate(groups):
        members = list(itertools.islice(names, len(group["params"])))
        if not {"lr", "betas", "eps", "weight_decay"} <= set(group):
            continue
        try:
            beta1, beta2 = group["betas"]
            numbers = [float(x) for x in (group["lr"], beta1, beta2, group["eps"], group["weight_decay"])]
        except (TypeError, ValueError) as error:
            problems.append(f"group {i}: its hyperparameters are not numbers: {quoted(error)}")
        else:
            found.update(dict.fromkeys(members, Hyperparameters(*numbers)))
    return found
