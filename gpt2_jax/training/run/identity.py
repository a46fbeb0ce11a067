"""run.json, which stores the configuration of a run and the fingerprints of its data and tokenizer."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bridge import BridgeError, __version__, tokenizer_fingerprint
from bridge.errors import quoted
from bridge.formats.trainers.run import RUN
from bridge.storage.json_text import parse_object
from bridge.storage.regular_file import read_small_file
from gpt2_jax.training.config import CHANGEABLE_FIELDS, PATH_FIELDS, TrainConfig, flat, from_flat, validation_sets
from gpt2_jax.training.errors import TrainingError

if TYPE_CHECKING:
    from gpt2_jax.data import Data

VERSION = 2
"""The version of run.json that this code writes. It reads version 1 too, and refuses later versions."""

RENAMED_SINCE_1 = {
    "steps": "max_steps",
    "length": "seq_len",
    "accumulate": "num_microbatches",
    "clip_norm": "max_grad_norm",
}
"""Fields of the configuration in version 1 of run.json -> their names in version 2."""
ATTENTION_RENAMED_SINCE_1 = {"plain": "xla", "blocks": "blockwise"}
"""Values of `attention` in version 1 of run.json -> their names in version 2."""
ADDED_LATER = {
    "source_activation": None,
    "base": None,
    "drop_extra_heads": False,
    "special_tokens": "as-text",
    "text_field": None,
    "prompt_field": None,
    "completion_field": None,
    "messages_field": None,
    "skip_bad_records": False,
    "layer_decay": 1.0,
    "freeze": None,
    "early_stopping": None,
    "lora_rank": 0,
    "lora_alpha": 16.0,
    "lora_targets": "c_attn",
    "lora_dropout": 0.0,
    "lora_rslora": False,
}
"""Fields that earlier runs of either version did not store, with the value that these runs used."""

_ENVIRONMENT = ("XLA_FLAGS", "NPROC", "JAX_ENABLE_X64", "JAX_DEFAULT_MATMUL_PRECISION", "NVIDIA_TF32_OVERRIDE")
"""Environment variables that change the results of computations."""
_MAX_BYTES = 2**20
"""Size limit of run.json. A typical one has 3 kB."""


@dataclass(frozen=True)
class Identity:
    """The identity of a run: a change in any of these makes it a different run."""

    config: TrainConfig
    data: str
    """Fingerprint of the tokens and of the names of validation sets."""
    tokenizer: str | None
    """Fingerprint of the tokenizer, if there is one."""

    @classmethod
    def of(cls, config: TrainConfig, data: Data) -> Identity:
        tokenizer = None if data.tokenizer is None else tokenizer_fingerprint(data.tokenizer)
        if config.examples == "auto":  # it was not resolved, and resolves to the same for the same data
            config = replace(config, examples=data.usual_examples)
        return cls(config, data.fingerprint, tokenizer)

    def differences(self, other: Identity) -> list[str]:
        """Return one line for each difference from `other`. The path of the data may change, its content may not."""
        mine, theirs = flat(self.config), flat(other.config)
        changed = [name for name in mine if mine[name] != theirs[name] and name not in CHANGEABLE_FIELDS]
        lines = [f"{name} was {quoted(mine[name])}, now {quoted(theirs[name])}" for name in changed]
        if self.data != other.data:
            lines.append("data: the tokens are not the same as when the run started, or validation sets were renamed")
        if self.tokenizer != other.tokenizer:
            lines.append("tokenizer: it is not the same as when the run started")
        return lines


def run_arguments(config: TrainConfig, data: Data) -> dict[str, Any]:
    """Return the arguments that must be equal on all processes. Paths of data may differ between machines."""
    identity = Identity.of(config, data)
    fields = {name: value for name, value in flat(identity.config).items() if name not in PATH_FIELDS}
    return {**fields, "data": identity.data, "tokenizer": identity.tokenizer}


def description(config: TrainConfig, data: Data) -> dict[str, Any]:
    """Return the content of run.json, which the manifests of checkpoints and of the export repeat."""
    identity = Identity.of(config, data)
    return {
        "version": VERSION,
        "config": flat(identity.config),
        "data": identity.data,
        "validation": None if data.validation is None else data.validation.fingerprint,
        "tokenizer": identity.tokenizer,
        "versions": {"gpt2-bridge": __version__} | {n: version(n) for n in ("jax", "jaxlib", "flax", "optax")},
        "flags": {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
    }


def has_run_json(run: Path) -> bool:
    """Whether a directory has a file named run.json, which may be another program's."""
    return (run / RUN).is_file()


def stored_identity(run: Path) -> Identity:
    """Return the identity of a run from its run.json, migrated to the current version.

    Raises:
        TrainingError: run.json is damaged, was written by a later version, or cannot be read.
    """
    path = run / RUN
    try:
        stored = parse_object(read_small_file(path, _MAX_BYTES, TrainingError), quoted(path), TrainingError)
    except OSError as error:
        raise TrainingError(f"cannot read {quoted(path)}: {error.strerror}") from error
    written, data, tokenizer = (stored.get(name) for name in ("version", "data", "tokenizer"))
    if type(written) is not int or written < 1 or not {"config", "tokenizer"} <= stored.keys():
        raise TrainingError(f"{quoted(path)} is damaged or not a run of gpt2-bridge")
    if written > VERSION:
        raise TrainingError(
            f"{quoted(path)} has version {quoted(written)[1:-1]}, but this gpt2-bridge reads versions up to {VERSION}; "
            "install a later one"
        )
    if not isinstance(data, str) or not isinstance(tokenizer, str | None):
        raise TrainingError(f"{quoted(path)} is damaged: data and tokenizer must be fingerprints")
    config = stored["config"]
    try:
        if written == 1 and isinstance(config, dict):
            config = migrated(config)
        if isinstance(config, dict):
            config = _with_validation_sets({**ADDED_LATER, **config})
        return Identity(from_flat(config), data, tokenizer)
    except BridgeError as error:
        raise TrainingError(f"{quoted(path)}: {error}") from error


def _with_validation_sets(config: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration with a list of validation sets. Earlier runs stored one path or null.

    A path such as `lr=3/val.txt` becomes `./lr=3/val.txt`, which does not name a set.
    """
    one = config.get("validation_data", ())
    if one is None or isinstance(one, str):
        config["validation_data"] = [] if one is None else [one if "" in validation_sets([one]) else f"./{one}"]
    return config


def migrated(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a stored configuration of version 1 with the names of version 2."""
    if unknown := RENAMED_SINCE_1.values() & config.keys():
        raise TrainingError(f"version 1 has no field {quoted(min(unknown))}")
    values: dict[str, Any] = dict(ADDED_LATER)
    for name, value in config.items():
        values[RENAMED_SINCE_1.get(name, name)] = value
    attention = values.get("attention")
    if isinstance(attention, str):
        values["attention"] = ATTENTION_RENAMED_SINCE_1.get(attention, attention)
    return values
