"""Conversion of AdamW's state, compared with the optimizer state that torch writes."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from support.models import TINY, random_state

import bridge
from bridge import ConversionError, GPT2Config, optimizer_state
from bridge.optimizer_state import AdamWState, Hyperparameters
from bridge.storage.tensors import LazyTensor
from bridge.storage.trees import flatten

CONFIG = replace(TINY, n_layer=3)
UNTIED = replace(CONFIG, tie_word_embeddings=False)
STEPS = 3

Groups = list[dict[str, Any]]
StateDict = dict[str, Any]


def shapes(config: GPT2Config) -> dict[str, tuple[int, ...]]:
    return {p.torch_name: p.torch_shape for p in bridge.parameters(config)}


def decay_order(config: GPT2Config) -> list[str]:
    """Return the names in the order in which nanoGPT and this project give parameters to an optimizer."""
    return [p.torch_name for decays in (True, False) for p in bridge.parameters(config) if p.decays is decays]


def random_adamw(config: GPT2Config = CONFIG, dtype: type = np.float32) -> AdamWState:
    first, second = random_state(config, dtype, seed=1), random_state(config, dtype, seed=2)
    return AdamWState(17, first, {name: array**2 for name, array in second.items()})


def torch_state(
    config: GPT2Config = CONFIG, steps: int = STEPS, *, named: bool = False, prefix: str = "", **options: Any
) -> tuple[StateDict, list[str], dict[str, torch.Tensor]]:
    """Return the state of torch's AdamW after some steps, its names in order, and the parameters."""
    rng = np.random.default_rng(0)
    parameters = {n: torch.nn.Parameter(torch.zeros(shapes(config)[n])) for n in decay_order(config)}
    given = [(prefix + n, p) if named else p for n, p in parameters.items()]
    cut = sum(p.decays for p in bridge.parameters(config))
    groups: Groups = [{"params": given[:cut], "weight_decay": 0.1}, {"params": given[cut:], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-7, **options)
    for _ in range(steps):
        for p in parameters.values():
            p.grad = torch.from_numpy(rng.normal(size=p.shape).astype(np.float32))
        optimizer.step()
    return optimizer.state_dict(), [prefix + n for n in parameters], parameters


def entry_of(state: StateDict, name: str, config: GPT2Config = CONFIG) -> dict[str, Any]:
    return state["state"][decay_order(config).index(name)]


@pytest.mark.parametrize("config", [CONFIG, UNTIED], ids=["tied", "untied"])
def test_torchs_state_is_read_under_canonical_names(config: GPT2Config) -> None:
    state, names, _ = torch_state(config)
    adamw = optimizer_state.from_torch(state, names, config)
    assert adamw.step == STEPS
    assert set(adamw.exp_avg) == set(adamw.exp_avg_sq) == set(shapes(config))
    for name in names:
        entry = entry_of(state, name, config)
        np.testing.assert_array_equal(adamw.exp_avg[name], entry["exp_avg"])
        np.testing.assert_array_equal(adamw.exp_avg_sq[name], entry["exp_avg_sq"])
    decaying = Hyperparameters(learning_rate=1e-3, beta1=0.9, beta2=0.95, epsilon=1e-7, weight_decay=0.1)
    assert adamw.hyperparameters["wpe.weight"] == decaying
    assert adamw.hyperparameters["ln_f.bias"] == replace(decaying, weight_decay=0.0)


def test_a_saved_state_with_any_prefix_and_numpy_arrays_is_the_same() -> None:
    state, names, _ = torch_state()
    expected = optimizer_state.from_torch(state, names, CONFIG)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    saved = torch.load(buffer)
    prefixed = [f"_orig_mod.module.transformer.{name}" for name in names]
    arrays = {i: {what: value.numpy() for what, value in entry.items()} for i, entry in state["state"].items()}
    for other in (
        optimizer_state.from_torch(saved, prefixed, CONFIG),
        optimizer_state.from_torch({**state, "state": arrays}, names, CONFIG),
    ):
        assert_equal(other, expected)


def test_names_in_the_state_are_used() -> None:
    state, names, _ = torch_state(named=True, prefix="transformer.")
    expected = optimizer_state.from_torch(torch_state()[0], decay_order(CONFIG), CONFIG)
    assert_equal(optimizer_state.from_torch(state, None, CONFIG), expected)
    assert_equal(optimizer_state.from_torch(state, decay_order(CONFIG), CONFIG), expected)
    by_name = {  # like the output of torch.distributed.checkpoint.state_dict.get_optimizer_state_dict
        "state": {names[i]: entry for i, entry in state["state"].items()},
        "param_groups": [
            {**{k: v for k, v in g.items() if k != "param_names"}, "params": [names[i] for i in g["params"]]}
            for g in state["param_groups"]
        ],
    }
    assert_equal(optimizer_state.from_torch(by_name, None, CONFIG), expected)


def test_stored_moments_are_read_on_access() -> None:
    state, names, _ = torch_state()
    reads = []

    def entry(tensor: torch.Tensor) -> LazyTensor:
        def read() -> np.ndarray:
            reads.append(tensor.shape)
            return tensor.numpy()

        return LazyTensor(np.dtype(np.float32), tuple(tensor.shape), read)

    stored = {i: {what: entry(value) for what, value in e.items()} for i, e in state["state"].items()}
    adamw = optimizer_state.from_torch({**state, "state": stored}, names, CONFIG)
    assert set(reads) == {()}, "only the steps are read, no moment"
    assert_equal(adamw, optimizer_state.from_torch(state, names, CONFIG))


@pytest.mark.parametrize("lazy", [False, True])
def test_moments_of_transposed_matrices_are_transposed(lazy: bool) -> None:
    state, names, _ = torch_state()
    transposed = {p.torch_name for p in bridge.parameters(CONFIG) if p.is_projection}
    expected = optimizer_state.from_torch(state, names, CONFIG)
    for i, name in enumerate(names):
        for what, value in state["state"][i].items():
            array = value.numpy().T.copy() if name in transposed and what != "step" else value.numpy()
            state["state"][i][what] = LazyTensor.of(array) if lazy else array
    assert_equal(optimizer_state.from_torch(state, names, CONFIG, transposed=transposed), expected)


def test_groups_are_counted() -> None:
    assert optimizer_state.group_sizes(torch_state()[0]) == [14, 26]
    with pytest.raises(ConversionError, match=r"state_dict\(\), which has `state`, and `param_groups`"):
        optimizer_state.group_sizes({})


def test_an_optimizer_that_was_never_stepped_is_step_zero_with_zeros() -> None:
    state, names, _ = torch_state(steps=0)
    adamw = optimizer_state.from_torch(state, names, CONFIG)
    assert adamw.step == 0
    for moments in (adamw.exp_avg, adamw.exp_avg_sq):
        assert {name: array.shape for name, array in moments.items()} == shapes(CONFIG)
        assert not any(array.any() for array in moments.values())


def test_torch_loads_its_state_back_bit_for_bit() -> None:
    state, names, parameters = torch_state()
    adamw = optimizer_state.from_torch(state, names, CONFIG)
    back = optimizer_state.to_torch(adamw, names, state["param_groups"])
    assert back["param_groups"] == state["param_groups"]
    tensors = {i: {what: torch.from_numpy(np.array(a)) for what, a in e.items()} for i, e in back["state"].items()}
    optimizer = torch.optim.AdamW([{"params": [parameters[n] for n in g]} for g in grouped(names)], lr=1.0)
    optimizer.load_state_dict({**back, "state": tensors})
    assert optimizer.param_groups[0]["lr"] == 1e-3
    restored = optimizer.state_dict()
    assert restored["state"].keys() == state["state"].keys()
    for i, entry in state["state"].items():
        assert restored["state"][i].keys() == entry.keys()
        for what, tensor in entry.items():
            assert restored["state"][i][what].dtype == tensor.dtype
            assert torch.equal(restored["state"][i][what], tensor)


def test_parameters_in_another_order_get_their_own_moments() -> None:
    adamw = random_adamw()
    names = list(shapes(CONFIG))[::-1]
    groups = [{"params": list(range(5))}, {"params": list(range(5, len(names)))}]
    back = optimizer_state.to_torch(adamw, names, groups)
    for i, name in enumerate(names):
        assert back["state"][i]["exp_avg"] is adamw.exp_avg[name]
        assert back["state"][i]["step"] == 17 and back["state"][i]["step"].dtype == np.float32
    assert_equal(optimizer_state.from_torch(back, names, CONFIG), adamw)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("config", [CONFIG, UNTIED], ids=["tied", "untied"])
@pytest.mark.parametrize("vocab_multiple", [1, 64])
@pytest.mark.parametrize("stacked", [False, True])
def test_flax_and_back_is_the_identity(stacked: bool, vocab_multiple: int, config: GPT2Config, dtype: type) -> None:
    adamw = random_adamw(config, dtype)
    mu, nu = optimizer_state.to_flax(adamw, config, stacked=stacked, vocab_multiple=vocab_multiple)
    assert ("h" in mu) is stacked
    rows = bridge.padded_vocab_size(config.vocab_size, vocab_multiple)
    for tree in (mu, nu):
        assert tree["wte"]["embedding"].shape == (rows, config.n_embd)
        assert not tree["wte"]["embedding"][config.vocab_size :].any()
    back = optimizer_state.from_flax(17, mu, nu, config, vocab_multiple=vocab_multiple)
    assert_equal(back, adamw)


def test_a_moment_has_the_layout_of_its_weight() -> None:
    weights = random_state(CONFIG)
    mu, nu = optimizer_state.to_flax(AdamWState(1, weights, {n: w**2 for n, w in weights.items()}), CONFIG)
    params = flatten(bridge.to_flax(weights, CONFIG))
    for path, weight in params.items():
        np.testing.assert_array_equal(flatten(mu)[path], weight)
        np.testing.assert_array_equal(flatten(nu)[path], weight**2)


# Faults of a torch state, and a part of the error message.


def drop_entry(state: StateDict) -> None:
    del state["state"][decay_order(CONFIG).index("h.1.mlp.c_fc.bias")]


def drop_moment(state: StateDict) -> None:
    del entry_of(state, "wpe.weight")["exp_avg_sq"]


def drop_step(state: StateDict) -> None:
    del entry_of(state, "wpe.weight")["step"]


def misshape(state: StateDict) -> None:
    entry = entry_of(state, "h.2.mlp.c_fc.weight")
    entry["exp_avg"] = entry["exp_avg"].T


def narrow(state: StateDict) -> None:
    entry = entry_of(state, "ln_f.weight")
    entry["exp_avg"] = entry["exp_avg"].to(torch.int32)


def bfloat16(state: StateDict) -> None:
    entry = entry_of(state, "ln_f.weight")
    entry["exp_avg"] = entry["exp_avg"].to(torch.bfloat16)


def step_once_more(state: StateDict) -> None:
    entry_of(state, "h.0.ln_1.bias")["step"] = torch.tensor(float(STEPS + 1))


def half_a_step(state: StateDict) -> None:
    entry_of(state, "h.0.ln_1.bias")["step"] = torch.tensor(0.5)


def no_number_of_steps(state: StateDict) -> None:
    entry_of(state, "h.0.ln_1.bias")["step"] = torch.tensor(torch.nan)


def endless_steps(state: StateDict) -> None:
    entry_of(state, "h.0.ln_1.bias")["step"] = torch.tensor(torch.inf)


def several_steps(state: StateDict) -> None:
    entry_of(state, "h.0.ln_1.bias")["step"] = torch.tensor([1.0, 2.0])


def list_one_twice(state: StateDict) -> None:
    state["param_groups"][1]["params"][0] = 0


def add_entry(state: StateDict) -> None:
    state["state"][999] = state["state"][0]


def add_part(state: StateDict) -> None:
    entry = entry_of(state, "wte.weight")
    entry["max_exp_avg_sq"] = entry["exp_avg_sq"]


def set_option(name: str, value: Any) -> Callable[[StateDict], None]:
    return lambda state: state["param_groups"][1].update({name: value})


def list_one_less(state: StateDict) -> None:
    state["param_groups"][1]["params"].pop()


WRONG: list[tuple[Callable[[StateDict], None], str]] = [
    (drop_entry, "h.1.mlp.c_fc.bias has no state, although others do"),
    (drop_moment, "wpe.weight has no exp_avg_sq"),
    (drop_step, "wpe.weight has no step"),
    (misshape, r"exp_avg of h.2.mlp.c_fc.weight has shape \(100, 48\); the configuration requires \(48, 100\)"),
    (narrow, "exp_avg of 'ln_f.weight' holds int32"),
    (bfloat16, "exp_avg of ln_f.weight cannot be converted to a numpy array"),
    (step_once_more, r"have different steps: 3 \(.*4 \(1 parameters, for example h.0.ln_1.bias"),
    (half_a_step, "step of h.0.ln_1.bias is '0.5', not a number of updates"),
    (no_number_of_steps, "step of h.0.ln_1.bias is 'nan'"),
    (endless_steps, "step of h.0.ln_1.bias is 'inf'"),
    (several_steps, r"step of h.0.ln_1.bias is float32 of shape \(2,\), not a number of updates"),
    (list_one_twice, "the groups contain a parameter twice"),
    (add_entry, "an entry '999', which is in no group"),
    (add_part, "wte.weight has an unknown field 'max_exp_avg_sq'"),
    (set_option("amsgrad", True), "group 1 has amsgrad='True', which is not AdamW"),
    (set_option("maximize", True), "group 1 has maximize='True'"),
    (set_option("decoupled_weight_decay", False), "group 1 has decoupled_weight_decay='False'"),
    (set_option("nesterov", True), "group 1 has an unknown option 'nesterov'"),
    (set_option("betas", 0.9), "group 1: its hyperparameters are not numbers"),
    (set_option("lr", "fast"), "group 1: its hyperparameters are not numbers"),
    (list_one_less, "39 parameters, but 40 names"),
]


@pytest.mark.parametrize(("spoil", "message"), WRONG, ids=[str(i) for i in range(len(WRONG))])
def test_an_incomplete_state_is_refused(spoil: Callable[[StateDict], None], message: str) -> None:
    state, names, _ = torch_state()
    spoil(state)
    with pytest.raises(ConversionError, match=message):
        optimizer_state.from_torch(state, names, CONFIG)


def test_all_problems_of_a_state_are_listed_in_one_error() -> None:
    state, names, _ = torch_state()
    at_once = (drop_entry, drop_moment, drop_step, misshape, narrow, step_once_more, add_entry, add_part)
    for spoil in at_once:
        spoil(state)
    state["param_groups"][0].update(amsgrad=True, betas=None)
    with pytest.raises(ConversionError) as error:
        optimizer_state.from_torch(state, names, CONFIG)
    assert str(error.value).count("\n") == len(at_once) + 2
    for spoil, message in WRONG:
        assert spoil not in at_once or re.search(message, str(error.value))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (UNTIED, "lm_head.weight is not among the optimizer's parameters"),
        (replace(CONFIG, n_layer=2), "'h.2.attn.c_attn.bias' is not a parameter of this model"),
        (replace(CONFIG, bias=False), "'ln_f.bias' is not a parameter of this model"),
        (replace(CONFIG, n_inner=101), r"exp_avg_sq of h.0.mlp.c_fc.weight has shape \(48, 100\)"),
    ],
)
def test_the_state_of_another_model_is_refused(config: GPT2Config, message: str) -> None:
    state, names, _ = torch_state()
    with pytest.raises(ConversionError, match=message):
        optimizer_state.from_torch(state, names, config)
    adamw = optimizer_state.from_torch(state, names, CONFIG)
    with pytest.raises(ConversionError) as error:
        optimizer_state.to_flax(adamw, config)
    assert "exp_avg: " in str(error.value) and "exp_avg_sq: " in str(error.value)


def test_names_must_identify_the_parameters() -> None:
    state, names, _ = torch_state()
    for given, message in (
        (None, "the state has no names"),
        (names[:-1], "40 parameters, but 39 names"),
        ([*names[:-1], names[0]], "is the canonical name of 2 tensors"),
        ([*names[:-1], "transformer.wte.weight"], "is the canonical name of 2 tensors"),
    ):
        with pytest.raises(ConversionError, match=message):
            optimizer_state.from_torch(state, given, CONFIG)
    swapped = [names[1], names[0], *names[2:]]  # two embeddings, of different heights
    with pytest.raises(ConversionError, match=r"exp_avg of wpe\.weight has shape"):
        optimizer_state.from_torch(state, swapped, CONFIG)
    named, _, _ = torch_state(named=True)
    with pytest.raises(ConversionError, match=r"the given name 'wpe.weight' differs from 'wte.weight' in the state"):
        optimizer_state.from_torch(named, swapped, CONFIG)


@pytest.mark.parametrize(
    "junk",
    [
        {},
        [],
        None,
        {"state": {}},
        {"state": [], "param_groups": []},
        {"state": {0: 1}, "param_groups": []},
        {"state": {}, "param_groups": [1]},
        {"state": {}, "param_groups": [{"lr": 1.0}]},
        {"state": {}, "param_groups": {}},
        {"state": {}, "param_groups": [{"params": [[]]}]},
    ],
    ids=str,
)
def test_an_object_that_is_not_an_optimizer_state_is_refused(junk: Any) -> None:
    with pytest.raises(ConversionError, match=r"state_dict\(\), which has `state`, and `param_groups`"):
        optimizer_state.from_torch(junk, ["wte.weight"], CONFIG)


def test_a_state_requires_an_optimizer_of_the_same_parameters() -> None:
    adamw = random_adamw()
    names = decay_order(UNTIED)
    groups = [{"params": list(range(len(names)))}]
    with pytest.raises(ConversionError, match=r"'lm_head\.weight' is not a parameter of this model"):
        optimizer_state.to_torch(adamw, names, groups)
    with pytest.raises(ConversionError, match=r"lm_head\.weight is not among the optimizer's parameters"):
        optimizer_state.to_torch(random_adamw(UNTIED), decay_order(CONFIG), [{"params": list(range(40))}])
    with pytest.raises(ConversionError, match="amsgrad"):
        optimizer_state.to_torch(adamw, decay_order(CONFIG), [{"params": list(range(40)), "amsgrad": True}])


@pytest.mark.parametrize(
    "options", [{}, {"foreach": True}, {"fused": True}, {"capturable": False}, {"lr": torch.tensor(0.5)}]
)
def test_how_torch_computes_the_update_does_not_matter(options: dict[str, Any]) -> None:
    state, names, _ = torch_state()
    for group in state["param_groups"]:
        group.update(options, initial_lr=1.0)
    assert optimizer_state.from_torch(state, names, CONFIG).step == STEPS


def grouped(names: list[str]) -> list[list[str]]:
    decaying = sum(p.decays for p in bridge.parameters(CONFIG))
    return [names[:decaying], names[decaying:]]


def assert_equal(a: AdamWState, b: AdamWState) -> None:
    assert a.step == b.step
    for x, y in ((a.exp_avg, b.exp_avg), (a.exp_avg_sq, b.exp_avg_sq)):
        assert set(x) == set(y)
        for name in x:
            assert x[name].dtype == y[name].dtype
            np.testing.assert_array_equal(x[name], y[name])
