"""Conversion of AdamW's state between torch's `optimizer.state_dict()` and the Flax trees of optax.

A moment has the name, shape and layout of its parameter, so `bridge.conversion` converts it like the weights. torch
numbers the parameters in the order in which the optimizer received them, group after group, and stores names only if
it received names. The caller therefore provides the names. One `ConversionError` lists everything that is missing,
extra or misshapen.

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
from bridge.conversion import FlaxTree, differences
from bridge.errors import ConversionError, bullet_list, quoted
from bridge.names import canonical_names
from bridge.parameter_table import parameters
from bridge.storage.tensors import LazyTensor, LazyTensorMap, transposed


@dataclass(frozen=True)
class Hyperparameters:
    """The hyperparameters of a parameter's last update. torch stores them with the state."""

    learning_rate: float
    beta1: float
    beta2: float
    epsilon: float
    weight_decay: float


@dataclass(frozen=True)
class AdamWState:
    """The state of AdamW between steps, with canonical names and shapes."""

    step: int
    """Number of updates made. The bias corrections depend on it."""
    exp_avg: Mapping[str, np.ndarray]
    """First moment, the running mean of the gradients. optax's `mu`."""
    exp_avg_sq: Mapping[str, np.ndarray]
    """Second moment, the running mean of the squared gradients. optax's `nu`."""
    hyperparameters: Mapping[str, Hyperparameters] = field(default_factory=dict)
    """Settings for a caller that continues training. Empty for a state from optax, which does not store them."""


def group_sizes(state_dict: Mapping[str, Any]) -> list[int]:
    """Return the number of parameters in each group of an optimizer's `state_dict()`.

    Raises `ConversionError` if it is not the `state_dict()` of an optimizer.
    """
    groups, _ = _groups_and_entries(state_dict)
    return [len(group["params"]) for group in groups]


def from_torch(
    state_dict: Mapping[str, Any], names: Sequence[str] | None, config: GPT2Config, *, transposed: Collection[str] = ()
) -> AdamWState:
    """Convert the `state_dict()` of an AdamW optimizer.

    Before the first update, the step is 0 and the moments are zero.

    Args:
        state_dict: its leaves are CPU tensors, numpy arrays or `LazyTensor`s. The result shares the memory of tensors
            and arrays, and reads `LazyTensor`s on access.
        names: names of the parameters, in any form that `bridge.canonical_names` accepts, in the optimizer's order,
            group after group. None if the state contains the names, which is the case if the optimizer received
            `model.named_parameters()` (torch 2.6).
        config: the configuration of the model.
        transposed: canonical names of the matrices that are `[out, in]` in the model, the layout of `nn.Linear`.

    Raises:
        ConversionError: the state does not cover exactly the parameters of the model, their steps differ, or the
            optimizer is a variant of AdamW.
    """
    groups, entries = _groups_and_entries(state_dict)
    problems = _variants(groups)
    order = _canonical_order(groups, names, problems)
    keys = dict(zip(order, _keys(groups), strict=True))
    shapes = {p.torch_name: p.torch_shape for p in parameters(config)}
    problems += _name_mismatches(order, shapes)
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
    return AdamWState(step, _mapping(exp_avg), _mapping(exp_avg_sq), hyperparameters)


def to_torch(
    state: AdamWState, names: Sequence[str] | None, param_groups: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Return a state for the `load_state_dict` of an AdamW optimizer, with arrays as leaves.

    `gpt2_torch.training.load_adamw_state` converts the arrays to tensors.

    Args:
        state: the state.
        names: as in `from_torch`, in the order of the optimizer that loads the state.
        param_groups: that optimizer's `optimizer.state_dict()["param_groups"]`. They are returned unchanged, so that
            the optimizer keeps its hyperparameters.

    Raises:
        ConversionError: the state does not have exactly these parameters.
    """
    groups, _ = _groups_and_entries({"param_groups": param_groups, "state": {}})
    problems = _variants(groups)
    order = _canonical_order(groups, names, problems)
    if problems := problems + _name_mismatches(order, state.exp_avg):
        raise ConversionError("this AdamW state does not fit the optimizer:\n" + bullet_list(problems))
    step = np.asarray(state.step, np.float32)  # torch stores step counts as float32
    entries = {
        key: {"step": step.copy(), "exp_avg": state.exp_avg[name], "exp_avg_sq": state.exp_avg_sq[name]}
        for name, key in zip(order, _keys(groups), strict=True)
    }
    return {"state": entries, "param_groups": [dict(group) for group in groups]}


def from_flax(
    step: int, mu: Mapping[str, Any], nu: Mapping[str, Any], config: GPT2Config, *, vocab_multiple: int = 1
) -> AdamWState:
    """Convert moments that are Flax trees. The arguments are those of `bridge.to_torch`.

    Raises `ConversionError` unless the leaves are those of the model.
    """
    exp_avg, exp_avg_sq = _converted(
        ("mu", mu), ("nu", nu), lambda tree: conversion.to_torch(tree, config, vocab_multiple=vocab_multiple)
    )
    return AdamWState(step, exp_avg, exp_avg_sq)


def to_flax(
    state: AdamWState, config: GPT2Config, *, stacked: bool = False, vocab_multiple: int = 1
) -> tuple[FlaxTree, FlaxTree]:
    """Return optax's `mu` and `nu`, with the options of `bridge.to_flax`. Rows of vocabulary padding are zero."""
    return _converted(
        ("exp_avg", state.exp_avg),
        ("exp_avg_sq", state.exp_avg_sq),
        lambda moment: conversion.to_flax(moment, config, stacked=stacked, vocab_multiple=vocab_multiple),
    )


def _converted(a: tuple[str, Any], b: tuple[str, Any], convert: Callable[[Any], dict[str, Any]]) -> tuple[Any, Any]:
    """Convert both moments, each given with its name. The errors of both are raised as one."""
    results, problems = [], []
    for name, moment in (a, b):
        try:
            results.append(convert(moment))
        except ConversionError as error:
            problems.append(f"{name}: {error}")
    if problems:
        raise ConversionError("\n".join(problems))
    return results[0], results[1]


_MOMENTS = ("exp_avg", "exp_avg_sq")

_MUST_BE = {"amsgrad": False, "maximize": False, "decoupled_weight_decay": True}

# Options that do not change the algorithm: hyperparameters, implementation choices, and options added by schedulers.
_HARMLESS = {
    *("params", "param_names", "lr", "betas", "eps", "weight_decay"),
    *("foreach", "capturable", "differentiable", "fused"),
    *("initial_lr", "name"),
}

_Groups = Sequence[Mapping[str, Any]]
_Entries = Mapping[Any, Mapping[str, Any]]
_Values = dict[str, np.ndarray | LazyTensor]


def _groups_and_entries(state_dict: Mapping[str, Any]) -> tuple[_Groups, _Entries]:
    """Return the parameter groups and the entries. Raises `ConversionError` if it is not an optimizer's state."""
    fields = state_dict if isinstance(state_dict, Mapping) else {}
    groups, entries = fields.get("param_groups"), fields.get("state")
    if (
        not isinstance(groups, Sequence)
        or not all(isinstance(group, Mapping) and isinstance(group.get("params"), Sequence) for group in groups)
        or not isinstance(entries, Mapping)
        or not all(isinstance(entry, Mapping) for entry in entries.values())
        or not all(isinstance(key, int | str) for key in _keys(groups))
    ):
        raise ConversionError("not an optimizer's state_dict(), which has `state`, and `param_groups` with `params`")
    return groups, entries


def _keys(groups: _Groups) -> list[Any]:
    """Return the key of each parameter in `state`: a number or, with torch.distributed.checkpoint, a name."""
    return [key for group in groups for key in group["params"]]


def _variants(groups: _Groups) -> list[str]:
    """Return one line for each option that makes the algorithm a variant of AdamW, or that is unknown."""
    problems = []
    for i, group in enumerate(groups):
        for name, value in group.items():
            if name in _MUST_BE and bool(value) is not _MUST_BE[name]:
                problems.append(f"group {i} has {name}={quoted(value)}, which is not AdamW")
            elif name not in (*_HARMLESS, *_MUST_BE) and value is not None:
                problems.append(f"group {i} has an unknown option {quoted(name)}; delete it if no update depends on it")
    return problems


def _canonical_order(groups: _Groups, names: Sequence[str] | None, problems: Sequence[str]) -> list[str]:
    """Return canonical names in the optimizer's order.

    Raises `ConversionError`, which also lists `problems`, if the order cannot be determined.
    """
    keys = _keys(groups)
    stored = [str(name) for group in groups for name in group.get("param_names") or ()]
    if not stored and all(isinstance(key, str) for key in keys):
        stored = keys
    orders = [_canonical(order) for order in (stored, names) if order]
    unclear = [f"{len(keys)} parameters, but {len(order)} names" for order in orders if len(order) != len(keys)]
    if len(set(keys)) < len(keys):
        unclear.append("the groups contain a parameter twice")
    if not orders:
        unclear.append("the state has no names: pass the names of the parameters in the optimizer's order")
    elif not unclear and orders[0] != orders[-1]:
        stored_name, name = next((a, b) for a, b in zip(*orders, strict=True) if a != b)
        unclear.append(f"the given name {quoted(name)} differs from {quoted(stored_name)} in the state")
    if unclear:
        lines = bullet_list([*unclear, *problems])
        raise ConversionError("the names of the optimizer's parameters cannot be determined:\n" + lines)
    return orders[0]


def _canonical(names: Sequence[str]) -> list[str]:
    canonical = {given: name for name, given in canonical_names(names).items()}
    return [canonical.get(name, name) for name in names]


def _name_mismatches(names: Sequence[str], expected: Mapping[str, Any]) -> list[str]:
    missing = [f"{name} is not among the optimizer's parameters" for name in expected if name not in names]
    return missing + [f"{quoted(name)} is not a parameter of this model" for name in names if name not in expected]


def _incomplete(keys: Mapping[str, Any], entries: _Entries) -> list[str]:
    """Return one line for each parameter without a state if others have one, and for each unknown entry or field."""
    if not entries:
        return []
    known, named = {"step", *_MOMENTS}, set(keys.values())
    return [
        *(f"{name} has no state, although others do" for name, key in keys.items() if key not in entries),
        *(f"the state has an entry {quoted(key)}, which is in no group" for key in entries if key not in named),
        *(
            f"{name} has an unknown field {quoted(what)}"
            for name, key in keys.items()
            for what in entries.get(key, ())
            if what not in known
        ),
    ]


def _values(what: str, keys: Mapping[str, Any], entries: _Entries, problems: list[str]) -> _Values:
    """Return one part of the state, such as `exp_avg`, of every parameter that has a state."""
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
            problems.append(f"{what} of {name} cannot be converted to a numpy array: {quoted(error)}")
    return values


def _transposed(values: _Values, names: Collection[str]) -> _Values:
    """Transpose the values in `names`."""

    def transpose(value: np.ndarray | LazyTensor) -> np.ndarray | LazyTensor:
        return transposed(value) if isinstance(value, LazyTensor) else value.T

    return {name: transpose(value) if name in names else value for name, value in values.items()}


def _mapping(values: _Values) -> Mapping[str, np.ndarray]:
    """Return a mapping of arrays. Lazy tensors are read on access."""
    if not any(isinstance(value, LazyTensor) for value in values.values()):
        return cast(dict[str, np.ndarray], values)
    return LazyTensorMap({name: v if isinstance(v, LazyTensor) else LazyTensor.of(v) for name, v in values.items()})


def _zeros(shape: tuple[int, ...]) -> LazyTensor:
    return LazyTensor(np.dtype(np.float32), shape, lambda: np.zeros(shape, np.float32))


def _common_step(steps: _Values, problems: list[str]) -> int:
    """Return the step of all parameters; 0 before the first update."""
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
        counts = ", ".join(
            f"{count} ({len(names)} parameters, for example {names[0]})" for count, names in by_count.items()
        )
        problems.append(f"the parameters have different steps: {counts}; optax has one step for all")
    return next(iter(by_count), 0)


def _hyperparameters(groups: _Groups, order: Sequence[str], problems: list[str]) -> dict[str, Hyperparameters]:
    """Return the hyperparameters of the parameters whose group has all of them."""
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
