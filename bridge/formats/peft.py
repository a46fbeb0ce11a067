"""PEFT's LoRA adapters: `adapter_config.json` with `adapter_model.safetensors` or `adapter_model.bin`.

An adapter is not a model: it changes a base. `base_model_name_or_path` names the base, but this module never opens it,
because it may be a path on another machine or any repository. The caller passes the base.

A and B of a module are `MODULE.lora_A.weight` and `MODULE.lora_B.weight`, or `MODULE.lora_embedding_A` and `..._B`.
Other tensors replace tensors of the base: those of `modules_to_save`, and an embedding whose vocabulary was resized.

Source: https://github.com/huggingface/peft, tuners/lora and utils/save_and_load.py (version 0.21).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from bridge.adapters.lora import LoRA, LoRAUpdate, merge_lora
from bridge.adapters.peft_config import FILE, PeftConfig, read_peft_config
from bridge.checkpoint import Checkpoint
from bridge.containers.safetensors import write_file
from bridge.errors import CheckpointError, ConversionError, bullet_list, quoted
from bridge.finite import rejecting_non_finite
from bridge.formats.directory import CARRIED_FILES, GENERATION_CONFIG, write_json
from bridge.formats.format import Format
from bridge.formats.huggingface import tensors_of_file
from bridge.names import canonical_names, is_of_extra_head, not_a_parameter
from bridge.parameter_table import VOCABULARY_ROWS
from bridge.storage.atomic_writes import new_directory
from bridge.storage.companions import has_companion
from bridge.storage.tensors import LazyTensor, LazyTensorMap
from bridge.tokenizers.chat.templates import chat_template_files
from bridge.tokenizers.loading import VOCABULARY_FILES

NAME = "peft"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
"""In PEFT's order. Only the first one that exists is read."""

_LONGEST_NAME = 128  # characters of a module's name: matching a pattern takes quadratic time
_PREFIX = "base_model.model."
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(embedding_)?(?P<which>[AB])(\.default)?(\.weight)?", re.DOTALL)
_INSIDE_PEFT = re.compile(r"\.(base_layer|modules_to_save(\.default)?)(?=\.)")
"""Parts that PEFT's own layers insert into the names of whole tensors."""


def find(path: Path) -> list[Path]:
    directory = path if path.is_dir() else path.parent
    if not has_companion(directory, FILE):
        return []
    found = [directory / name for name in WEIGHTS if (directory / name).is_file()]
    return found if path.is_dir() else [file for file in found if file == path]


def base_name(weights: Path) -> str | None:
    """Return the name or path of the base that the adapter was made for, if its configuration has one."""
    return read_peft_config(weights.parent).base_model_name_or_path


def read(weights: Path, base: Checkpoint, drop_extra_heads: bool = False) -> Checkpoint:
    """Read an adapter and merge it into its base. See `bridge.adapters.lora.merge_lora`.

    The tokenizer is the adapter's if its directory has a vocabulary. The generation settings are the base's, as with
    PEFT.
    """
    config = read_peft_config(weights.parent)
    tensors, _ = tensors_of_file(weights)
    lora, dropped = _lora(tensors, config, drop_extra_heads)
    merged = merge_lora(base, lora)
    beside = [name for name in CARRIED_FILES if has_companion(weights.parent, name)]
    beside += chat_template_files(weights.parent)
    own = any(name in VOCABULARY_FILES for name in beside)
    unread = [name for name in beside if not own or name == GENERATION_CONFIG]
    notes = [f"ignored beside the adapter; the base's are used: {', '.join(unread)}"] if unread else []
    return replace(
        merged,
        format=NAME,
        path=weights.parent if own else base.path,
        own_tokenizer=None if own else base.own_tokenizer,
        diagnostics=(*base.diagnostics, *_diagnostics(config, lora, dropped, base, merged), *notes),
        source=weights,
        base_source=base.source,
        base_path=base.settings_path,
    )


def load_lora(source: str | Path) -> LoRA:
    """Read an adapter that PEFT or `save_lora` wrote, without its base. Tensors are read on access.

    Args:
        source: the directory of the adapter, or its file of weights.

    Raises a `BridgeError` if there is no adapter, or it is one that `bridge.load` refuses.
    """
    found = find(Path(source).absolute())
    if not found:
        raise CheckpointError(f"{quoted(source)} has no LoRA adapter: it needs {FILE} and {' or '.join(WEIGHTS)}")
    tensors, _ = tensors_of_file(found[0])
    return _lora(tensors, read_peft_config(found[0].parent), drop_extra_heads=False)[0]


def save_lora(
    lora: LoRA, directory: str | Path, *, base_model: str | None = None, allow_non_finite: bool = False
) -> None:
    """Write an adapter that PEFT loads onto transformers' `GPT2LMHeadModel`. The write is atomic.

    Args:
        lora: the adapter, for example from `bridge.LoRA.of`.
        directory: a path that does not exist, or an empty directory.
        base_model: the name or path of the base, for PEFT's `base_model_name_or_path`.
        allow_non_finite: write NaN and infinity. By default they raise a `ConversionError` that names the tensor.

    Raises:
        CheckpointError: the directory exists and is not empty, or cannot be written.
        ConversionError: the adapter has no update, or its updates differ in `rank_stabilized`.
    """
    with new_directory(directory) as new:
        write_lora(lora, new, base_model, allow_non_finite)


def write_lora(lora: LoRA, directory: Path, base_model: str | None, allow_non_finite: bool = False) -> None:
    """Write the files of `save_lora` into an existing directory. Raises `ConversionError` as `save_lora`."""
    if len({update.rank_stabilized for update in lora.updates.values()}) != 1:
        raise ConversionError("an adapter needs at least one update, and the same kind of scaling for all updates")
    write_json(directory / FILE, _fields(lora, base_model))
    tensors = LazyTensorMap(_stored_tensors(lora))
    stored = tensors if allow_non_finite else rejecting_non_finite(tensors)
    write_file(directory / WEIGHTS[0], stored, {"format": "pt"})


def _lora(tensors: Mapping[str, LazyTensor], config: PeftConfig, drop_extra_heads: bool) -> tuple[LoRA, list[str]]:
    """Return the adapter, and the names of the tensors of other heads. The adapter does not include these."""
    factors: dict[str, dict[str, LazyTensor]] = {}
    whole: dict[str, LazyTensor] = {}
    problems = []
    for name, entry in tensors.items():
        match = _FACTOR.fullmatch(name)
        place = factors.setdefault(match["module"], {}) if match else whole
        key = match["which"] if match else _INSIDE_PEFT.sub("", name)
        if key in place:
            problems.append(f"{quoted(name)} is stored twice, under two names")
        place[key] = entry
    config.require_few_comparisons(len(factors))
    updates, dropped = {}, []
    for canonical, name in canonical_names(f"{module}.weight" for module in factors).items():
        module = name.removesuffix(".weight")
        if is_of_extra_head(canonical):
            dropped.append(module)
        elif problem := _factor_problem(module, factors[module], config):
            problems.append(problem)
        else:
            a, b = factors[module]["A"], factors[module]["B"]
            updates[canonical] = LoRAUpdate(a, b, config.alpha(module.removeprefix(_PREFIX)), config.use_rslora)
    replaced = {}
    for canonical, name in canonical_names(whole).items():
        if is_of_extra_head(canonical):
            dropped.append(name)
        elif canonical in VOCABULARY_ROWS or config.saves(name.removeprefix(_PREFIX).rpartition(".")[0]):
            replaced[canonical] = whole[name]
        else:
            problems.append(f"{quoted(name)} is not a LoRA tensor, and modules_to_save does not name it")
    problems += [not_a_parameter(name, is_head=True) for name in dropped if not drop_extra_heads]
    if problems:
        raise ConversionError("these are not the tensors of a LoRA adapter:\n" + bullet_list(problems))
    return LoRA(updates, LazyTensorMap(replaced)), dropped


def _factor_problem(module: str, pair: Mapping[str, LazyTensor], config: PeftConfig) -> str | None:
    if len(module) > _LONGEST_NAME:
        return f"{quoted(module)} is not a module of GPT-2"
    if missing := {"A", "B"} - {*pair}:
        return f"lora_{min(missing)} of {quoted(module)} is missing"
    declared = config.rank(module.removeprefix(_PREFIX))
    if pair["A"].shape[:1] != (declared,):
        return f"{quoted(module)}: A has shape {pair['A'].shape}, but its rank (r or rank_pattern) is {declared}"
    return None


def _diagnostics(config: PeftConfig, lora: LoRA, dropped: list[str], base: Checkpoint, merged: Checkpoint) -> list[str]:
    made_for = f" for {quoted(config.base_model_name_or_path)}" if config.base_model_name_or_path else ""
    where = quoted(base.source) if base.source else "the base"
    notes = [f"a LoRA adapter{made_for} was merged into {len(lora.updates)} matrices of {where}"]
    if lora.tensors:
        notes.append(f"the adapter replaces {', '.join(lora.tensors)} of the base")
    if dropped:
        notes.append(f"tensors of heads for other tasks were left out: {', '.join(map(quoted, dropped))}")
    if base.config.tie_word_embeddings and not merged.config.tie_word_embeddings:
        notes.append("the adapter changes the token embedding or the head, so they are no longer tied")
    if base.optimizer is not None:
        notes.append("the AdamW state of the base was left out, because the parameters changed")
    return notes


def _fields(lora: LoRA, base_model: str | None) -> dict[str, Any]:
    """Return the fields of `adapter_config.json`. The patterns list ranks and alphas other than the most common."""
    updates = {_stored_module(name): update for name, update in lora.updates.items()}
    rank = Counter(update.rank for update in updates.values()).most_common(1)[0][0]
    alpha = Counter(update.alpha for update in updates.values()).most_common(1)[0][0]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": alpha,
        "use_rslora": next(iter(updates.values())).rank_stabilized,
        "rank_pattern": {name: update.rank for name, update in updates.items() if update.rank != rank},
        "alpha_pattern": {name: update.alpha for name, update in updates.items() if update.alpha != alpha},
        "target_modules": sorted(updates),
        "modules_to_save": sorted({_stored_module(name) for name in lora.tensors}) or None,
        "fan_in_fan_out": True,
        "bias": "none",
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _stored_tensors(lora: LoRA) -> dict[str, LazyTensor]:
    tensors = {}
    for name, update in lora.updates.items():
        module = _PREFIX + _stored_module(name)
        for letter, factor in (("A", update.a), ("B", update.b)):
            is_embedding = name in ("wte.weight", "wpe.weight")
            tensors[f"{module}.lora_embedding_{letter}" if is_embedding else f"{module}.lora_{letter}.weight"] = factor
    for name, entry in lora.tensors.entries.items():
        tensors[f"{_PREFIX}{_stored_module(name)}.{name.rpartition('.')[2]}"] = entry
    return tensors


def _stored_module(canonical: str) -> str:
    """Return the module of a parameter, named as in `GPT2LMHeadModel`."""
    module = canonical.rpartition(".")[0]
    return module if module == "lm_head" else f"transformer.{module}"


FORMAT = Format(name=NAME, find=find, read=read, may_have_extra_heads=True, base_name=base_name, family=NAME)
