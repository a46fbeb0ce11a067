"""nanoGPT's `ckpt.pt`: a torch file with the weights, AdamW's state, and the progress of training.

Weights have Hugging Face's names. Projections and their moments are `[out, in]`, the layout of `nn.Linear`.
`model_args` has the architecture. nanoGPT's code fixes the rest: feed-forward width 4 D, epsilon 1e-5, a tied head,
and the activation.

nanoGPT has used the exact GELU since June 14, 2023 (pull request 274); before, it used the tanh form, `gelu_new`. No
field of the file states the activation. Two properties identify an older file: `model_args` without `bias` (until
January 27, 2023), and an optimizer that does not decay the embeddings (until May 6, 2023). No later commit changed the
keys of a checkpoint, of `model_args` or of `config`. Traces of torch's version are ignored: they date the file, not
nanoGPT's code. A file with neither property is read with the exact GELU unless `activation` is given.

Source: https://github.com/karpathy/nanoGPT, model.py and train.py with their history.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from bridge import optimizer_state
from bridge.checkpoint import Checkpoint
from bridge.config import GPT2Config
from bridge.containers.torch_zip import read_file
from bridge.containers.torch_zip_writer import write_file
from bridge.conversion import canonicalize, differences
from bridge.errors import BridgeError, CheckpointError, ConfigError, ConversionError, bullet_list, quoted
from bridge.formats.directory import files_by_content, read_config
from bridge.formats.format import Format
from bridge.formats.single_file import require_implied, settings_left_out, with_sidecar
from bridge.names import canonical_names
from bridge.optimizer_state import AdamWState, Hyperparameters
from bridge.parameter_table import parameters
from bridge.storage.dtypes import FLOAT_DTYPES
from bridge.storage.regular_file import first_bytes
from bridge.storage.tensors import LazyTensor, LazyTensorMap, transposed

NAME = "nanogpt"
SUFFIXES = (".pt", ".pth")

_ALWAYS_THERE = {
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_embd": "n_embd",
    "block_size": "n_positions",
    "vocab_size": "vocab_size",
}
"""Field of `model_args` -> field of `GPT2Config`. `dropout` sets three rates here; older files have no `bias`."""

_EXACT, _TANH = "gelu", "gelu_new"

_PROGRESS = ("iter_num", "best_val_loss", "config")
_NO_LOSS_YET = 1e9  # the initial value in train.py

_DECAYING = Hyperparameters(learning_rate=6e-4, beta1=0.9, beta2=0.95, epsilon=1e-8, weight_decay=0.1)
_PLAIN_ADAMW = {
    "amsgrad": False,
    "maximize": False,
    "foreach": None,
    "capturable": False,
    "differentiable": False,
    "fused": None,
    "decoupled_weight_decay": True,
}
_MOST_PICKLE = 2**22  # bytes; the pickle of GPT-2 XL and its optimizer has 0.3 MB


def find(path: Path) -> list[Path]:
    return files_by_content(path, SUFFIXES, _is_nanogpt)


def read(file: Path, config_json: Path | None, activation: str | None = None) -> Checkpoint:
    """Read a file. Only `model` and `model_args` are required.

    Raises:
        ConfigError: `model_args` are not nanoGPT's, or `activation` contradicts the file.
        ConversionError: the tensors or moments do not match the model.
    """
    saved = read_file(file)
    try:
        return _checkpoint(file, saved, config_json, activation)
    except BridgeError as error:
        raise type(error)(f"{quoted(file)}: {error}") from error


def left_out(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Return what nanoGPT cannot store. Raises `ConfigError` if it cannot store the model."""
    config = checkpoint.config
    _require_nanogpt(config)
    rate = config.resid_pdrop
    stored = replace(config, embd_pdrop=rate, attn_pdrop=rate, initializer_range=GPT2Config.initializer_range)
    return settings_left_out(config, stored) + _optimizer(checkpoint.optimizer, config)[1]


def write(checkpoint: Checkpoint, file: Path) -> None:
    """Write a file that nanoGPT can sample from and resume.

    Without an optimizer state, an initial one at step 0 is written. nanoGPT has one dropout rate. If the three rates
    differ, `resid_pdrop` is written.
    """
    config, progress, adamw = checkpoint.config, checkpoint.progress, checkpoint.optimizer
    rate = config.resid_pdrop
    entries = {f"transformer.{name}": e for name, e in _transposed(checkpoint.tensors, _projections(config)).items()}
    optimizer, _ = _optimizer(adamw, config)
    saved = {
        "model": {**entries, "lm_head.weight": entries["transformer.wte.weight"]},
        "optimizer": optimizer,
        "model_args": {
            **{name: getattr(config, field) for name, field in _ALWAYS_THERE.items()},
            "bias": config.bias,
            "dropout": rate,
        },
        "iter_num": progress.get("iter_num", adamw.step if adamw else 0),
        "best_val_loss": progress.get("best_val_loss", _NO_LOSS_YET),
        "config": progress.get("config", {}),
    }
    write_file(file, saved)


def _is_nanogpt(file: Path) -> bool:
    """Whether the file is a zip with a pickled `model_args` near its beginning, where torch writes the pickle."""
    start = first_bytes(file, _MOST_PICKLE)
    return start.startswith(b"PK\x03\x04") and b"\x0a\0\0\0model_args" in start


def _checkpoint(file: Path, saved: Any, config_json: Path | None, activation: str | None) -> Checkpoint:
    if not isinstance(saved, dict):
        raise CheckpointError(f"it holds a {type(saved).__name__}; nanoGPT saves a dict")
    config, stored = _config(saved.get("model_args")), _stored(saved.get("model"))
    if config.n_layer > len(stored):  # checked before the names of all layers are generated
        raise ConversionError(f"n_layer={config.n_layer}, but model has only {len(stored)} tensors")
    adamw, is_old = _adamw(saved.get("optimizer"), config)
    notes = _diagnostics(saved, stored)
    is_old = is_old or "bias" not in saved["model_args"]
    determined = _determined_activation(is_old, config_json)
    possible = (determined,) if determined else (_EXACT, _TANH)
    if activation is not None and activation not in possible:
        raise ConfigError(f"activation={quoted(activation)}: the activation of this file is {' or '.join(possible)}")
    config = replace(config, activation_function=determined or activation or _EXACT)
    if is_old:
        notes += ("the file was written before June 2023, when nanoGPT computed the tanh GELU (gelu_new)",)
    elif determined is None and activation is None:
        notes += (_assumption(has_optimizer=adamw is not None),)
    config, extra, config_notes = with_sidecar(config, file, config_json)
    tensors = canonicalize(_canonical_layout(stored, config), config)
    return Checkpoint(config, tensors, NAME, file.parent, extra, notes + config_notes, adamw, _progress(saved))


def _determined_activation(is_old: bool, config_json: Path | None) -> str | None:
    """Return the activation, from the age of the file or from its `config.json`; None if neither determines it."""
    if is_old:
        return _TANH
    if config_json is None:
        return None
    stated = read_config(config_json)[0].activation_function
    return stated if stated in (_EXACT, _TANH) else None  # any other value is reported with the other differences


def _assumption(has_optimizer: bool) -> str:
    since = "May 6" if has_optimizer else "January 27"
    return (
        f"the file does not state its activation; it was read with the exact GELU ({_EXACT}), which nanoGPT has used "
        f"since June 14, 2023. If nanoGPT's code of {since} to June 14, 2023 wrote the file, it needs the tanh GELU: "
        f'bridge.load(..., activation="{_TANH}"), or --source-activation {_TANH}'
    )


def _config(model_args: Any) -> GPT2Config:
    if not isinstance(model_args, dict):
        raise ConfigError("nanoGPT's checkpoints have the sizes of the model in `model_args`, which is missing here")
    problems = [f"{name} is missing" for name in _ALWAYS_THERE if name not in model_args]
    problems += [
        f"{quoted(name)}={quoted(value)}: nanoGPT has no such setting; another program wrote this model"
        for name, value in model_args.items()
        if name not in (*_ALWAYS_THERE, "bias", "dropout")
    ]
    if problems:
        raise ConfigError("model_args are not nanoGPT's:\n" + bullet_list(problems))
    values: dict[str, Any] = {field: model_args[name] for name, field in _ALWAYS_THERE.items()}
    for field in ("embd_pdrop", "attn_pdrop", "resid_pdrop"):
        values[field] = model_args.get("dropout", 0.0)
    try:
        return GPT2Config(**values, bias=model_args.get("bias", True), activation_function=_EXACT)
    except ConfigError as error:
        raise ConfigError(
            f"model_args (block_size is n_positions here, and dropout is three rates): {error}"
        ) from error


def _stored(model: Any) -> dict[str, LazyTensor]:
    if not isinstance(model, dict):
        raise CheckpointError("nanoGPT's checkpoints have the weights in `model`, which is missing here")
    others = [
        f"{quoted(name)} is a {type(value).__name__}, not a tensor"
        for name, value in model.items()
        if not isinstance(name, str) or not isinstance(value, LazyTensor)
    ]
    if others:
        raise CheckpointError("model is not a state_dict:\n" + bullet_list(others))
    return model


def _projections(config: GPT2Config) -> frozenset[str]:
    """Return the names of the parameters that `nn.Linear` stores as `[out, in]`."""
    return frozenset(p.torch_name for p in parameters(config) if p.is_projection)


def _transposed(tensors: LazyTensorMap, names: Collection[str]) -> dict[str, LazyTensor]:
    """Convert between the canonical layout and nanoGPT's, in either direction."""
    return {name: transposed(entry) if name in names else entry for name, entry in tensors.entries.items()}


def _canonical_layout(stored: Mapping[str, LazyTensor], config: GPT2Config) -> LazyTensorMap:
    """Return the tensors in the canonical layout, without a head that shares the embedding's memory."""
    given = canonical_names(stored)
    head, embedding = given.get("lm_head.weight"), stored.get(given.get("wte.weight", ""))
    kept = {name: entry for name, entry in stored.items() if name != head or entry is not embedding}
    return LazyTensorMap(
        _transposed(LazyTensorMap(kept), {given[name] for name in _projections(config) if name in given})
    )


def _adamw(state: Any, config: GPT2Config) -> tuple[AdamWState | None, bool]:
    """Return the state of AdamW, and whether its groups are those of nanoGPT before June 2023."""
    if state is None:
        return None, False
    sizes = optimizer_state.group_sizes(state)
    layouts = _groups(config), _old_groups(config)
    known_sizes = [[len(names) for names in layout] for layout in layouts]
    if sizes not in known_sizes:
        raise ConversionError(
            f"optimizer has groups of {quoted(sizes)} parameters; nanoGPT makes {known_sizes[0]} for this model, and "
            f"made {known_sizes[1]} before June 2023. To convert only the model, delete `optimizer` from the file with "
            "torch"
        )
    is_old = sizes == known_sizes[1]
    order = [name for names in layouts[is_old] for name in names]
    return optimizer_state.from_torch(state, order, config, transposed=_projections(config)), is_old


def _groups(config: GPT2Config) -> list[list[str]]:
    """Return the parameters of the optimizer's two groups: with weight decay, then without."""
    return [[p.torch_name for p in parameters(config) if p.decays is decays] for decays in (True, False)]


def _old_groups(config: GPT2Config) -> list[list[str]]:
    """Return the two groups before June 2023: only projections had weight decay, and names were sorted as text."""
    return [sorted(p.torch_name for p in parameters(config) if p.is_projection is decays) for decays in (True, False)]


def _progress(saved: Mapping[str, Any]) -> dict[str, Any]:
    progress = {name: saved[name] for name in _PROGRESS if name in saved}
    loss = progress.get("best_val_loss", _NO_LOSS_YET)
    if isinstance(loss, LazyTensor) and loss.shape == () and loss.dtype in FLOAT_DTYPES:
        progress["best_val_loss"] = loss = float(loss.read())
    problems = [
        *(["iter_num is not a count"] if type(progress.get("iter_num", 0)) is not int else []),
        *(["best_val_loss is not a number"] if type(loss) not in (int, float) else []),
        *(["config is not a dict"] if not isinstance(progress.get("config", {}), dict) else []),
    ]
    if problems:
        raise CheckpointError("this is not what nanoGPT saves:\n" + bullet_list(problems))
    return progress


def _diagnostics(saved: Mapping[str, Any], stored: Mapping[str, LazyTensor]) -> tuple[str, ...]:
    notes = []
    if dropped := len(stored) - len(canonical_names(stored)):
        notes.append(f"{dropped} causal-mask buffers were left out")
    if unread := [quoted(name) for name in saved if name not in ("model", "model_args", "optimizer", *_PROGRESS)]:
        notes.append(f"the file also has {', '.join(unread[:10])}, which nanoGPT does not write; this was not read")
    return tuple(notes)


def _require_nanogpt(config: GPT2Config) -> None:
    implied = {
        "activation_function": "gelu",
        "n_inner": 4 * config.n_embd,
        "layer_norm_epsilon": 1e-5,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "reorder_and_upcast_attn": False,
        "tie_word_embeddings": True,
    }
    remedy = (
        '. checkpoint.with_activation("gelu"), or gpt2 convert --activation gelu, changes the activation to the exact '
        "GELU, and with it the model's output, as nanoGPT's own from_pretrained does"
    )
    require_implied(config, "nanoGPT", implied, remedy if config.activation_function != "gelu" else "")


def _optimizer(adamw: AdamWState | None, config: GPT2Config) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return the `state_dict()` of nanoGPT's AdamW, and a sentence about hyperparameters that it cannot store."""
    own = adamw.hyperparameters if adamw else {}
    groups, mismatched = [], []
    number = itertools.count()
    for names, default in zip(_groups(config), (_DECAYING, replace(_DECAYING, weight_decay=0.0)), strict=True):
        common = Counter(own.get(name, default) for name in names).most_common(1)[0][0]
        mismatched += [name for name in names if own.get(name, common) != common]
        groups.append(
            {
                "lr": common.learning_rate,
                "betas": (common.beta1, common.beta2),
                "eps": common.epsilon,
                "weight_decay": common.weight_decay,
                **_PLAIN_ADAMW,
                "params": list(itertools.islice(number, len(names))),
            }
        )
    order = [name for names in _groups(config) for name in names]
    state = dict(enumerate(_torch_state(adamw, order, config))) if adamw and adamw.step else {}
    not_stored = f"AdamW's settings for {', '.join(mismatched)}: nanoGPT has one set for each of its two groups"
    return {"state": state, "param_groups": groups}, (not_stored,) if mismatched else ()


def _torch_state(adamw: AdamWState, order: Sequence[str], config: GPT2Config) -> Iterator[dict[str, LazyTensor]]:
    """Yield torch's state of each parameter, in the order of the optimizer."""
    exp_avg, exp_avg_sq = LazyTensorMap.of(adamw.exp_avg), LazyTensorMap.of(adamw.exp_avg_sq)
    shapes = {p.torch_name: p.torch_shape for p in parameters(config)}
    if problems := differences(shapes, exp_avg.entries) + differences(shapes, exp_avg_sq.entries):
        raise ConversionError("the optimizer's moments are not this model's:\n" + bullet_list(problems))
    first, second = (_transposed(moment, _projections(config)) for moment in (exp_avg, exp_avg_sq))
    for name in order:
        step = np.asarray(adamw.step, np.float32)  # torch stores step counts as float32
        yield {"step": LazyTensor.of(step), "exp_avg": first[name], "exp_avg_sq": second[name]}


FORMAT = Format(
    name=NAME,
    find=find,
    read=read,
    write=write,
    left_out=left_out,
    file_name="ckpt.pt",
    suffixes=SUFFIXES,
    keeps_optimizer=True,
    states_activation=False,
)
