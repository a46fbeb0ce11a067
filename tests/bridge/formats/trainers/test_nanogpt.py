"""nanoGPT's checkpoints, compared with a reimplementation of its model and optimizer in torch 2.13."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
import torch
from support.models import config_for, random_checkpoint
from support.nanogpt_model import NanoGPT, adamw, adamw_before_june_2023, checkpoint, random_model, resumed, step
from support.refusals import assert_refused

import bridge
import gpt2_jax
import gpt2_jax.training
import gpt2_torch
import gpt2_torch.training
from bridge import BridgeError, Checkpoint, CheckpointError, ConfigError, ConversionError, GPT2Config
from bridge.containers.zip_records import Archive
from bridge.formats import WRITABLE
from bridge.optimizer_state import AdamWState, Hyperparameters
from bridge.storage.tensors import LazyTensorMap
from gpt2_jax.training.optimizer import decay_mask

ARGS: dict[str, Any] = {
    "n_layer": 3,
    "n_head": 4,
    "n_embd": 24,
    "block_size": 13,
    "bias": True,
    "vocab_size": 61,
    "dropout": 0.2,
}
CONFIG = GPT2Config(
    vocab_size=61,
    n_positions=13,
    n_embd=24,
    n_layer=3,
    n_head=4,
    activation_function="gelu",
    embd_pdrop=0.2,
    attn_pdrop=0.2,
    resid_pdrop=0.2,
)
FEW_STEPS = 3
SAME_FP64 = 1e-12
"""Tolerance for logits of size 1 to 10: the order of the sums differs."""

IDS = torch.from_numpy(np.random.default_rng(0).integers(0, 61, (4, 13)))

Saved = dict[str, Any]


def trained(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int = FEW_STEPS) -> None:
    for k in range(steps):
        step(model, optimizer, IDS.roll(k, dims=1))


def nanogpts(
    path: Path, change: Callable[[Saved], object] = lambda _: None, steps: int = FEW_STEPS, **args: Any
) -> Saved:
    """Write with torch a checkpoint of a random model after some steps, after `change` has edited it."""
    args = {**ARGS, **args}
    model = random_model(**args).eval()
    optimizer = adamw(model)
    trained(model, optimizer, steps)
    saved = checkpoint(model, optimizer, args)
    change(saved)
    torch.save(saved, path)
    return saved


def names_in_order(config: GPT2Config = CONFIG) -> list[str]:
    """Return the order of the parameters in nanoGPT's current optimizer."""
    return [p.torch_name for decays in (True, False) for p in bridge.parameters(config) if p.decays is decays]


def assert_is_layout_of(array: np.ndarray, tensor: torch.Tensor, name: str) -> None:
    """Matrices that are `[out, in]` in `nn.Linear` are `[in, out]` here, including square ones."""
    is_matrix = re.search(r"(c_attn|c_proj|c_fc)\.weight$", name)
    expected = tensor.T if is_matrix else tensor
    np.testing.assert_array_equal(array, expected.detach().numpy(), err_msg=name)


def logits_of(model: torch.nn.Module) -> np.ndarray:
    with torch.no_grad():
        return model.double()(IDS).numpy()


def assert_same_state(found: AdamWState, expected: AdamWState) -> None:
    assert found.step == expected.step
    assert dict(found.hyperparameters) == dict(expected.hyperparameters)
    for a, b in ((found.exp_avg, expected.exp_avg), (found.exp_avg_sq, expected.exp_avg_sq)):
        assert bridge.fingerprint(a) == bridge.fingerprint(b)


# Reading


def assumed(since: str) -> str:
    """Return the warning for a file that does not determine its GELU."""
    return (
        "the file does not state its activation; it was read with the exact GELU (gelu), which nanoGPT has used since "
        f"June 14, 2023. If nanoGPT's code of {since} to June 14, 2023 wrote the file, it needs the tanh GELU: "
        'bridge.load(..., activation="gelu_new"), or --source-activation gelu_new'
    )


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("bias", [True, False])
def test_files_of_nanogpt_are_read(tmp_path: Path, bias: bool, prefix: str) -> None:
    def prefixed(saved: Saved) -> None:
        saved["model"] = {prefix + name: tensor for name, tensor in saved["model"].items()}

    saved = nanogpts(tmp_path / "ckpt.pt", prefixed, bias=bias)
    for source in (tmp_path / "ckpt.pt", tmp_path):
        ckpt = bridge.load(source)
        assert (ckpt.format, ckpt.path) == ("nanogpt", tmp_path)
        assert ckpt.config == replace(CONFIG, bias=bias)
        assert ckpt.diagnostics == (assumed("May 6"),)
        assert ckpt.progress == {"iter_num": 3, "best_val_loss": 2.5, "config": saved["config"]}
        for name, array in ckpt.tensors.items():
            assert_is_layout_of(array, saved["model"][f"{prefix}transformer.{name}"], name)


@pytest.mark.parametrize("bias", [True, False])
def test_the_reference_computes_what_nanogpt_computes(tmp_path: Path, bias: bool) -> None:
    args = {**ARGS, "bias": bias}
    model = random_model(**args).eval()
    torch.save(checkpoint(model, None, args), tmp_path / "ckpt.pt")
    ours = logits_of(gpt2_torch.model_from_checkpoint(bridge.load(tmp_path)))
    np.testing.assert_allclose(ours, logits_of(model), rtol=0, atol=SAME_FP64)


def test_moments_have_the_names_and_the_layout_of_their_weights(tmp_path: Path) -> None:
    saved = nanogpts(tmp_path / "ckpt.pt")
    state = bridge.load(tmp_path).optimizer
    assert state is not None and state.step == FEW_STEPS
    assert set(state.exp_avg) == set(state.exp_avg_sq) == set(names_in_order())
    for i, name in enumerate(names_in_order()):
        assert_is_layout_of(state.exp_avg[name], saved["optimizer"]["state"][i]["exp_avg"], name)
        assert_is_layout_of(state.exp_avg_sq[name], saved["optimizer"]["state"][i]["exp_avg_sq"], name)
    decaying = Hyperparameters(learning_rate=2e-3, beta1=0.9, beta2=0.99, epsilon=1e-8, weight_decay=0.1)
    assert state.hyperparameters["wte.weight"] == state.hyperparameters["h.2.mlp.c_fc.weight"] == decaying
    assert state.hyperparameters["h.0.ln_1.weight"] == replace(decaying, weight_decay=0.0)


def test_the_optimizer_from_before_june_2023_is_recognised_by_its_groups(tmp_path: Path) -> None:
    """Old versions sorted names as text (layer 10 before layer 2) and computed the tanh GELU."""
    args = {**ARGS, "n_layer": 12, "n_embd": 8}
    model = random_model(**args).eval()
    optimizer = adamw_before_june_2023(model)
    trained(model, optimizer)
    torch.save(checkpoint(model, optimizer, args), tmp_path / "ckpt.pt")
    ckpt = bridge.load(tmp_path)
    assert ckpt.config.activation_function == "gelu_new"
    assert any("before June 2023" in line for line in ckpt.diagnostics)
    assert ckpt.optimizer is not None
    for name, parameter in model.named_parameters():
        name = name.removeprefix("transformer.")
        assert_is_layout_of(ckpt.optimizer.exp_avg[name], optimizer.state[parameter]["exp_avg"], name)
    assert ckpt.optimizer.hyperparameters["wte.weight"].weight_decay == 0.0
    assert ckpt.optimizer.hyperparameters["h.0.mlp.c_fc.weight"].weight_decay == 0.1


def test_old_model_args_without_bias_mean_biases_and_the_tanh_gelu(tmp_path: Path) -> None:
    def older(saved: Saved) -> None:
        del saved["model_args"]["bias"]
        for i in range(3):
            saved["model"][f"transformer.h.{i}.attn.bias"] = torch.ones(1, 1, 13, 13).tril()

    nanogpts(tmp_path / "ckpt.pt", older)
    ckpt = bridge.load(tmp_path)
    assert ckpt.config == replace(CONFIG, activation_function="gelu_new")
    assert ckpt.diagnostics[0] == "3 causal-mask buffers were left out"
    assert len(ckpt.tensors) == len(names_in_order())


@pytest.mark.parametrize("activation", ["gelu", "gelu_new"])
def test_the_activation_of_a_file_that_does_not_state_it_can_be_given(tmp_path: Path, activation: str) -> None:
    nanogpts(tmp_path / "ckpt.pt")
    ckpt = bridge.load(tmp_path, activation=activation)
    assert ckpt.config == replace(CONFIG, activation_function=activation)
    assert ckpt.diagnostics == ()
    in_torch = gpt2_torch.GPT2.from_pretrained(tmp_path, activation=activation)
    in_jax, _ = gpt2_jax.from_pretrained(tmp_path, activation=activation)
    assert in_torch.config == in_jax.config == ckpt.config


def test_an_activation_that_contradicts_the_file_is_refused(tmp_path: Path) -> None:
    nanogpts(tmp_path / "ckpt.pt")
    with pytest.raises(
        ConfigError, match=r"ckpt\.pt': activation='relu': the activation of this file is gelu or gelu_new"
    ):
        bridge.load(tmp_path, activation="relu")
    nanogpts(tmp_path / "ckpt.pt", lambda saved: saved["model_args"].pop("bias"))
    assert bridge.load(tmp_path, activation="gelu_new").config.activation_function == "gelu_new"
    with pytest.raises(ConfigError, match="activation='gelu': the activation of this file is gelu_new"):
        bridge.load(tmp_path, activation="gelu")


def test_the_config_beside_a_file_states_its_activation(tmp_path: Path) -> None:
    bridge.save(random_checkpoint(CONFIG), tmp_path / "saved", format="nanogpt")
    assert bridge.load(tmp_path / "saved").diagnostics == ()
    assert bridge.load(tmp_path / "saved", activation="gelu").config == CONFIG
    with pytest.raises(ConfigError, match="activation='gelu_new': the activation of this file is gelu"):
        bridge.load(tmp_path / "saved", activation="gelu_new")
    config = tmp_path / "saved" / "config.json"
    config.write_text(config.read_text().replace('"gelu"', '"gelu_new"'))
    assert bridge.load(tmp_path / "saved").config == replace(CONFIG, activation_function="gelu_new")


@pytest.mark.parametrize("format", [name for name in WRITABLE if name != "nanogpt"])
def test_an_activation_for_a_format_that_states_it_is_refused(tmp_path: Path, format: str) -> None:
    bridge.save(random_checkpoint(config_for(format)), tmp_path / "out", format=format)
    with pytest.raises(
        CheckpointError, match=f"activation='gelu_new' was given, but {format} files state their activation"
    ):
        bridge.load(tmp_path / "out", activation="gelu_new")


def test_a_file_with_only_the_model_is_read(tmp_path: Path) -> None:
    def alone(saved: Saved) -> None:
        for name in ("optimizer", "iter_num", "best_val_loss", "config"):
            del saved[name]
        del saved["model"]["lm_head.weight"]
        saved["note"] = "mine"

    nanogpts(tmp_path / "mine.pth", alone)
    ckpt = bridge.load(tmp_path)
    assert ckpt.optimizer is None and ckpt.progress == {}
    note = "the file also has 'note', which nanoGPT does not write; this was not read"
    assert ckpt.diagnostics == (note, assumed("January 27"))


def test_opening_reads_no_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the step counts of the optimizer and the loss are read, in 4 bytes each."""
    nanogpts(tmp_path / "ckpt.pt")
    read: list[int] = []
    original = Archive.read_part

    def watched(archive: Archive, name: str, start: int, count: int) -> np.ndarray:
        if "/data/" in name:
            read.append(count)
        return original(archive, name, start, count)

    monkeypatch.setattr(Archive, "read_part", watched)
    ckpt = bridge.load(tmp_path)
    assert set(read) == {4}, "only scalars"
    assert ckpt.optimizer is not None
    ckpt.optimizer.exp_avg["wpe.weight"]
    assert read[-1] == 4 * 13 * 24


# Writing


@pytest.mark.parametrize(
    "dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16], ids=lambda d: np.dtype(d).name
)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("target", ["model.pt", "directory"])
def test_written_files_are_read_back(tmp_path: Path, dtype: type, bias: bool, target: str) -> None:
    ckpt = random_checkpoint(replace(CONFIG, bias=bias), dtype)
    assert bridge.save(ckpt, tmp_path / target, format="nanogpt") == ()
    back = bridge.load(tmp_path / target)
    assert back.format == "nanogpt"
    assert back.config == ckpt.config
    assert bridge.fingerprint(back.tensors) == bridge.fingerprint(ckpt.tensors)


def test_each_tensor_keeps_its_dtype(tmp_path: Path) -> None:
    state = dict(random_checkpoint(CONFIG).tensors)
    state["h.1.mlp.c_fc.weight"] = state["h.1.mlp.c_fc.weight"].astype(ml_dtypes.bfloat16)
    bridge.save(Checkpoint.of(state, CONFIG), tmp_path / "ckpt.pt", format="nanogpt")
    assert bridge.fingerprint(bridge.load(tmp_path / "ckpt.pt").tensors) == bridge.fingerprint(state)


@pytest.mark.parametrize("bias", [True, False])
def test_nanogpt_loads_written_files_and_computes_the_same(tmp_path: Path, bias: bool) -> None:
    ckpt = random_checkpoint(replace(CONFIG, bias=bias), np.float64)
    bridge.save(ckpt, tmp_path / "ckpt.pt", format="nanogpt")
    saved = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    assert saved["model_args"] == {**ARGS, "bias": bias}
    assert list(saved["model"]) == list(NanoGPT(**saved["model_args"]).state_dict())
    assert saved["model"]["lm_head.weight"].data_ptr() == saved["model"]["transformer.wte.weight"].data_ptr()
    model = NanoGPT(**saved["model_args"]).double().eval()
    model.load_state_dict(saved["model"], strict=True)
    expected = logits_of(gpt2_torch.model_from_checkpoint(ckpt))
    np.testing.assert_allclose(logits_of(model), expected, rtol=0, atol=SAME_FP64)


def test_without_an_optimizer_nanogpt_resumes_with_a_new_one(tmp_path: Path) -> None:
    bridge.save(random_checkpoint(CONFIG), tmp_path / "ckpt.pt", format="nanogpt")
    saved = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    assert (saved["iter_num"], saved["best_val_loss"], saved["config"]) == (0, 1e9, {})
    model, optimizer = resumed(tmp_path / "ckpt.pt")
    other = NanoGPT(**ARGS)
    other.load_state_dict(model.state_dict())
    model.eval(), other.eval()
    fresh = adamw(other)
    for group, its in zip(fresh.param_groups, optimizer.param_groups, strict=True):
        assert set(its) == set(group)
        assert its["betas"] == (0.9, 0.95) and its["lr"] == 6e-4 and its["weight_decay"] == group["weight_decay"]
        group.update({name: value for name, value in its.items() if name != "params"})
    trained(model, optimizer, 1)
    trained(other, fresh, 1)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    back = bridge.load(tmp_path / "ckpt.pt")
    assert back.optimizer is not None and back.optimizer.step == 0
    assert not any(array.any() for array in back.optimizer.exp_avg.values())
    bridge.save(back, tmp_path / "again.pt", format="nanogpt")
    assert (tmp_path / "again.pt").read_bytes() == (tmp_path / "ckpt.pt").read_bytes()


def test_everything_that_nanogpt_saves_survives_a_round_trip(tmp_path: Path) -> None:
    nanogpts(tmp_path / "ckpt.pt")
    ckpt = bridge.load(tmp_path)
    assert bridge.save(ckpt, tmp_path / "back", format="nanogpt") == ()
    back = bridge.load(tmp_path / "back")
    assert back.progress == ckpt.progress
    assert back.optimizer is not None and ckpt.optimizer is not None
    assert_same_state(back.optimizer, ckpt.optimizer)
    theirs, ours = (torch.load(path / "ckpt.pt", weights_only=True) for path in (tmp_path, tmp_path / "back"))
    assert list(theirs) == list(ours)
    assert ours["optimizer"]["param_groups"] == theirs["optimizer"]["param_groups"]
    assert ours["model_args"] == theirs["model_args"]
    for i, entry in theirs["optimizer"]["state"].items():
        for what, tensor in entry.items():
            assert torch.equal(ours["optimizer"]["state"][i][what], tensor), (i, what)
            assert ours["optimizer"]["state"][i][what].dtype == tensor.dtype


def test_step_counts_do_not_share_memory(tmp_path: Path) -> None:
    """torch's AdamW increments each count in place."""
    nanogpts(tmp_path / "ckpt.pt")
    bridge.save(bridge.load(tmp_path), tmp_path / "back.pt", format="nanogpt")
    state = torch.load(tmp_path / "back.pt", weights_only=True)["optimizer"]["state"]
    assert len({entry["step"].data_ptr() for entry in state.values()}) == len(state)


# Continuing training


@pytest.fixture
def halfway(tmp_path: Path) -> tuple[Path, NanoGPT]:
    """Return a checkpoint in float64, and the model after one more step without interruption."""
    model = random_model(**ARGS).double().eval()
    optimizer = adamw(model)
    trained(model, optimizer)
    torch.save(checkpoint(model, optimizer, ARGS), tmp_path / "ckpt.pt")
    step(model, optimizer, IDS)
    return tmp_path / "ckpt.pt", model


def assert_moved_alike(found: Mapping[str, np.ndarray], model: NanoGPT, before: LazyTensorMap) -> None:
    """Compare the changes of a step up to rounding. A step changes weights by about 2e-3."""
    stepped = {name.removeprefix("transformer."): p.detach().numpy() for name, p in model.named_parameters()}
    for p in bridge.parameters(CONFIG):
        name = p.torch_name
        expected = stepped[name].T if p.is_projection else stepped[name]
        moving = slice(None) if not name.endswith("c_attn.bias") else np.r_[:24, 48:72]  # the key bias has no effect
        np.testing.assert_allclose(found[name][moving], expected[moving], rtol=0, atol=SAME_FP64, err_msg=name)
        assert np.abs(expected - before[name]).max() > 1e-4, "the step changed the parameter"


def test_nanogpt_resumes_from_written_files(halfway: tuple[Path, NanoGPT], tmp_path: Path) -> None:
    """The result equals that of uninterrupted training bit for bit."""
    source, uninterrupted = halfway
    bridge.save(bridge.load(source), tmp_path / "back.pt", format="nanogpt")
    model, optimizer = resumed(tmp_path / "back.pt")
    step(model.eval(), optimizer, IDS)
    for a, b in zip(model.parameters(), uninterrupted.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_reference_resumes_from_nanogpts_checkpoint(halfway: tuple[Path, NanoGPT]) -> None:
    source, uninterrupted = halfway
    ckpt = bridge.load(source)
    assert ckpt.optimizer is not None
    model = gpt2_torch.model_from_checkpoint(ckpt)
    optimizer = gpt2_torch.training.adamw(model, learning_rate=2e-3, beta1=0.9, beta2=0.99, weight_decay=0.1)
    gpt2_torch.training.load_adamw_state(optimizer, ckpt.optimizer, model)
    step(model, optimizer, IDS)
    assert_moved_alike(gpt2_torch.checkpoint_from_model(model).tensors, uninterrupted, ckpt.tensors)


@pytest.mark.usefixtures("x64", "quick_compilation")
def test_jax_resumes_from_nanogpts_checkpoint(halfway: tuple[Path, NanoGPT]) -> None:
    source, uninterrupted = halfway
    ckpt = bridge.load(source)
    assert ckpt.optimizer is not None
    model = gpt2_jax.GPT2(ckpt.config, jnp.float64, jnp.float64)
    params = jax.tree.map(jnp.array, bridge.to_flax(ckpt.tensors, ckpt.config, stacked=model.scan))
    own = ckpt.optimizer.hyperparameters["wte.weight"]
    tx = optax.adamw(
        own.learning_rate, own.beta1, own.beta2, own.epsilon, weight_decay=own.weight_decay, mask=decay_mask
    )
    opt_state = gpt2_jax.training.with_adamw_state(tx.init(params), ckpt.optimizer, model)
    ids = jnp.asarray(IDS.numpy())

    @jax.jit
    def updated(params: Any, opt_state: Any) -> Any:
        def loss(params: Any) -> Any:
            logits = model.apply({"params": params}, ids[:, :-1])
            return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).mean()

        updates, _ = tx.update(jax.grad(loss)(params), opt_state, params)
        return optax.apply_updates(params, updates)

    found = bridge.to_torch(updated(params, opt_state), ckpt.config)
    assert_moved_alike(found, uninterrupted, ckpt.tensors)


# Models that the format cannot store

NOT_NANOGPTS = {
    "activation_function": ("gelu_new", r"--activation gelu(.|\n)*activation_function='gelu_new'"),
    "n_inner": (100, r"n_inner='100': nanoGPT has only 96"),
    "layer_norm_epsilon": (1e-6, "layer_norm_epsilon='1e-06'"),
    "scale_attn_weights": (False, "scale_attn_weights='False'"),
    "scale_attn_by_inverse_layer_idx": (True, "scale_attn_by_inverse_layer_idx='True'"),
    "reorder_and_upcast_attn": (True, "reorder_and_upcast_attn='True'"),
    "tie_word_embeddings": (False, "tie_word_embeddings='False'"),
}


@pytest.mark.parametrize(("field", "value", "message"), [(f, *v) for f, v in NOT_NANOGPTS.items()], ids=NOT_NANOGPTS)
def test_unsupported_settings_are_refused_by_field(tmp_path: Path, field: str, value: Any, message: str) -> None:
    ckpt = random_checkpoint(replace(CONFIG, **{field: value}))
    with pytest.raises(ConfigError, match=message):
        bridge.save(ckpt, tmp_path / "ckpt.pt", format="nanogpt")
    assert not list(tmp_path.iterdir())


def test_changing_the_activation_makes_a_model_writable(tmp_path: Path) -> None:
    ckpt = random_checkpoint(replace(CONFIG, activation_function="gelu_new"))
    bridge.save(ckpt.with_activation("gelu"), tmp_path / "ckpt.pt", format="nanogpt")
    assert bridge.load(tmp_path / "ckpt.pt").config == CONFIG


def test_training_settings_are_reported_and_kept_by_a_directory(tmp_path: Path) -> None:
    config = replace(CONFIG, embd_pdrop=0.1, attn_pdrop=0.0, initializer_range=0.01)
    [sentence] = bridge.save(random_checkpoint(config), tmp_path / "ckpt.pt", format="nanogpt")
    assert sentence.endswith("cannot store: embd_pdrop=0.1, attn_pdrop=0.0, initializer_range=0.01")
    assert bridge.load(tmp_path / "ckpt.pt").config == CONFIG
    assert bridge.save(random_checkpoint(config), tmp_path / "directory", format="nanogpt") == ()
    assert bridge.load(tmp_path / "directory").config == config


def test_hyperparameters_that_differ_within_a_group_are_reported(tmp_path: Path) -> None:
    nanogpts(tmp_path / "ckpt.pt")
    ckpt = bridge.load(tmp_path)
    assert ckpt.optimizer is not None
    own = dict(ckpt.optimizer.hyperparameters)
    own["wpe.weight"] = replace(own["wpe.weight"], weight_decay=0.0)
    changed = replace(ckpt, optimizer=replace(ckpt.optimizer, hyperparameters=own))
    [sentence] = bridge.save(changed, tmp_path / "back.pt", format="nanogpt")
    assert sentence.startswith("AdamW's settings for wpe.weight:")
    assert torch.load(tmp_path / "back.pt")["optimizer"]["param_groups"][0]["weight_decay"] == 0.1


def test_the_moments_of_another_model_are_refused(tmp_path: Path) -> None:
    nanogpts(tmp_path / "ckpt.pt")
    other = replace(random_checkpoint(replace(CONFIG, n_layer=2)), optimizer=bridge.load(tmp_path).optimizer)
    with pytest.raises(ConversionError, match=r"moments are not this model's(.|\n)*'h.2.ln_1.weight'"):
        bridge.save(other, tmp_path / "back.pt", format="nanogpt")


# Invalid files


def args(**changed: Any) -> Callable[[Saved], object]:
    return lambda saved: saved["model_args"].update(changed)


def without(*path: Any) -> Callable[[Saved], object]:
    def change(saved: Saved) -> None:
        for name in path[:-1]:
            saved = saved[name]
        del saved[path[-1]]

    return change


def put(value: Any, *path: Any) -> Callable[[Saved], object]:
    """Set this entry to `value`, or to `value(old)` if it is a function."""

    def change(saved: Saved) -> None:
        for name in path[:-1]:
            saved = saved[name]
        saved[path[-1]] = value(saved[path[-1]]) if callable(value) else value

    return change


def one_group(saved: Saved) -> None:
    first, second = saved["optimizer"]["param_groups"]
    saved["optimizer"]["param_groups"] = [{**first, "params": first["params"] + second["params"]}]


C_FC = "transformer.h.0.mlp.c_fc.weight"
MALFORMED: dict[str, tuple[Callable[[Saved], object], str, type[BridgeError]]] = {
    "model missing": (without("model"), "have the weights in `model`", CheckpointError),
    "model a list": (put([], "model"), "have the weights in `model`", CheckpointError),
    "a number in the model": (put(1, "model", C_FC), "'transformer.h.0.mlp.c_fc.weight' is a int", CheckpointError),
    "a tensor named by a number": (lambda s: s["model"].update({7: torch.ones(1)}), "'7' is a", CheckpointError),
    "model_args a list": (put(["model_args"], "model_args"), "in `model_args`", ConfigError),
    "model_args empty": (put({}, "model_args"), "n_layer is missing", ConfigError),
    "n_head missing": (without("model_args", "n_head"), "n_head is missing", ConfigError),
    "block_size missing": (without("model_args", "block_size"), "block_size is missing", ConfigError),
    "a setting of another program": (args(use_rmsnorm=True), "'use_rmsnorm'='True': nanoGPT has no", ConfigError),
    "a setting of escape codes": (args(**{"\x1b[31m": "\0"}), "'\\x1b[31m'='\\x00'", ConfigError),
    "no vocab_size": (args(vocab_size=None), "vocab_size='None': must be int", ConfigError),
    "n_layer 0": (args(n_layer=0), "n_layer='0': must be between 1", ConfigError),
    "n_layer -1": (args(n_layer=-1), "n_layer='-1'", ConfigError),
    "n_layer 10^9": (args(n_layer=10**9), "n_layer='1000000000'", ConfigError),
    "n_layer 10^300": (args(n_layer=10**300), "n_layer='1000", ConfigError),
    "n_layer 10,000": (args(n_layer=10_000), "n_layer=10000, but model has only 41 tensors", ConversionError),
    "n_layer text": (args(n_layer="12"), "n_layer='12': must be int, not str", ConfigError),
    "n_layer true": (args(n_layer=True), "n_layer='True': must be int, not bool", ConfigError),
    "n_layer a tensor": (args(n_layer=torch.ones(1)), "must be int, not LazyTensor", ConfigError),
    "n_layer 4 of 3": (args(n_layer=4), "groups of '[14, 26]' parameters; nanoGPT makes [18, 34]", ConversionError),
    "n_head 5": (args(n_head=5), "n_embd='24' is not divisible by n_head='5'", ConfigError),
    "block_size a float": (args(block_size=13.0), "n_positions='13.0': must be int", ConfigError),
    "block_size of another model": (args(block_size=14), "wpe.weight has shape (13, 24)", ConversionError),
    "vocab_size of another model": (args(vocab_size=64), "wte.weight has shape (61, 24)", ConversionError),
    "bias a number": (args(bias=1), "bias='1': must be bool", ConfigError),
    "bias without biases": (args(bias=False), "groups of '[14, 26]'", ConversionError),
    "dropout text": (args(dropout="0.2"), "embd_pdrop='0.2': must be float", ConfigError),
    "dropout 1": (args(dropout=1.0), "must be at least 0 and below 1", ConfigError),
    "a tensor missing": (without("model", C_FC), "h.0.mlp.c_fc.weight is missing", ConversionError),
    "an unknown tensor": (
        lambda s: s["model"].update({"transformer.h.0.mlp.gate.weight": torch.ones(3)}),
        "h.0.mlp.gate.weight' is not a parameter",
        ConversionError,
    ),
    "a tensor twice": (
        lambda s: s["model"].update({f"_orig_mod.{C_FC}": s["model"][C_FC]}),
        "'h.0.mlp.c_fc.weight' is the canonical name of 2 tensors",
        ConversionError,
    ),
    "weights laid out as GPT-2's": (
        put(lambda w: w.T.contiguous(), "model", C_FC),
        "h.0.mlp.c_fc.weight has shape (96, 24); the configuration requires (24, 96): it is transposed",
        ConversionError,
    ),
    "integers": (put(lambda w: w.to(torch.int32), "model", C_FC), "holds int32", ConversionError),
    "an untied head": (
        put(lambda w: w + 1, "model", "lm_head.weight"),
        "lm_head.weight differs from wte.weight",
        ConversionError,
    ),
    "a head without an embedding": (
        without("model", "transformer.wte.weight"),
        "wte.weight is missing",
        ConversionError,
    ),
    "optimizer a list": (put([], "optimizer"), "`state`, and `param_groups`", ConversionError),
    "optimizer empty": (put({}, "optimizer"), "`state`, and `param_groups`", ConversionError),
    "one group": (one_group, "groups of '[40]' parameters; nanoGPT makes [14, 26]", ConversionError),
    "a moment missing": (
        without("optimizer", "state", 3, "exp_avg_sq"),
        "h.0.attn.c_proj.weight has no exp_avg_sq",
        ConversionError,
    ),
    "a moment of another shape": (
        put(torch.ones(3), "optimizer", "state", 2, "exp_avg"),
        "exp_avg of h.0.attn.c_attn.weight has shape (3,)",
        ConversionError,
    ),
    "a moment that is no tensor": (
        put("exp_avg", "optimizer", "state", 2, "exp_avg"),
        "exp_avg of 'h.0.attn.c_attn.weight' holds <U7",
        ConversionError,
    ),
    "adamw state transposed": (
        put(lambda m: m.T.contiguous(), "optimizer", "state", 2, "exp_avg"),
        "exp_avg of h.0.attn.c_attn.weight has shape (72, 24)",
        ConversionError,
    ),
    "a state missing": (without("optimizer", "state", 5), "h.0.mlp.c_proj.weight has no state", ConversionError),
    "steps that differ": (
        put(torch.tensor(9.0), "optimizer", "state", 0, "step"),
        "the parameters have different steps",
        ConversionError,
    ),
    "endless steps": (
        put(torch.tensor(torch.inf), "optimizer", "state", 0, "step"),
        "step of wte.weight is 'inf'",
        ConversionError,
    ),
    "another algorithm": (
        put(True, "optimizer", "param_groups", 0, "amsgrad"),
        "amsgrad='True', which is not AdamW",
        ConversionError,
    ),
    "parameters numbered twice": (
        put(0, "optimizer", "param_groups", 0, "params", 1),
        "the groups contain a parameter twice",
        ConversionError,
    ),
    "iter_num text": (put("3", "iter_num"), "iter_num is not a count", CheckpointError),
    "best_val_loss a matrix": (put(torch.ones(2), "best_val_loss"), "best_val_loss is not a number", CheckpointError),
    "best_val_loss text": (put("low", "best_val_loss"), "best_val_loss is not a number", CheckpointError),
    "config a list": (put([1], "config"), "config is not a dict", CheckpointError),
}


@pytest.fixture(scope="module")
def good() -> Saved:
    model = random_model(**ARGS).eval()
    optimizer = adamw(model)
    trained(model, optimizer, 1)
    return checkpoint(model, optimizer, ARGS)


def copied(value: Any) -> Any:
    """Return a copy of the nested containers that shares the tensors."""
    if isinstance(value, dict):
        return {name: copied(part) for name, part in value.items()}
    return [copied(part) for part in value] if isinstance(value, list) else value


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("change", "message", "error"), MALFORMED.values(), ids=MALFORMED)
def test_a_file_that_is_not_nanogpts_is_refused_by_name(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    good: Saved,
    change: Callable[[Saved], object],
    message: str,
    error: type[BridgeError],
) -> None:
    saved = copied(good)
    change(saved)
    torch.save(saved, tmp_path / "ckpt.pt")
    assert_refused(tmp_path / "ckpt.pt", message, capsys, error)


def test_the_unedited_file_of_these_tests_is_valid(tmp_path: Path, good: Saved) -> None:
    torch.save(copied(good), tmp_path / "ckpt.pt")
    assert bridge.load(tmp_path / "ckpt.pt").config == CONFIG


def test_a_truncated_file_is_refused_by_name(tmp_path: Path, good: Saved) -> None:
    torch.save(good, tmp_path / "ckpt.pt")
    content = (tmp_path / "ckpt.pt").read_bytes()
    for kept in (4, 100, len(content) // 2, len(content) - 1):
        (tmp_path / "ckpt.pt").write_bytes(content[:kept])
        with pytest.raises(CheckpointError, match=r"ckpt\.pt"):
            bridge.load(tmp_path / "ckpt.pt")


def test_one_of_two_checkpoints_in_a_directory_must_be_named(tmp_path: Path, good: Saved) -> None:
    for name in ("ckpt.pt", "best.pt"):
        torch.save(good, tmp_path / name)
    with pytest.raises(
        CheckpointError, match=r"several checkpoints:\n  - nanogpt: 'best\.pt'\n  - nanogpt: 'ckpt\.pt'\n"
    ):
        bridge.load(tmp_path)


def test_a_config_beside_the_file_that_disagrees_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bridge.save(random_checkpoint(CONFIG), tmp_path / "saved", format="nanogpt")
    config = tmp_path / "saved" / "config.json"
    config.write_text(config.read_text().replace('"n_head": 4', '"n_head": 2'))
    assert_refused(tmp_path / "saved", "n_head is 2 in config.json, but 4 in 'ckpt.pt'", capsys, ConfigError)
