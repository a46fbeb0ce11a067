"""The directory of a run, which stores the run's arguments so that it can be resumed and loaded."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from bridge import BridgeError, __version__, save_tokenizer, tokenizer_fingerprint
from bridge.errors import bullet_list, quoted
from bridge.formats.directory import CONFIG, write_config, write_json
from bridge.formats.run import CHECKPOINTS, RUN, steps
from bridge.storage import manifest
from bridge.storage.atomic_writes import (
    Replaceable,
    foreign_files,
    new_directory,
    new_file,
    replace_files,
    require_replaceable,
)
from bridge.storage.json_text import parse_object
from bridge.storage.locks import exclusive_lock
from bridge.storage.regular_file import read_small_file
from bridge.tokenizers.byte_level_bpe import END_OF_TEXT
from bridge.tokenizers.loading import TOKENIZER_FILES
from gpt2_jax.training.config import FREE, PLACES, TrainConfig, TrainingError, flat, from_flat
from gpt2_jax.training.run.metrics import METRICS, PLOT, TENSORBOARD, WANDB_ID

if TYPE_CHECKING:
    from gpt2_jax.data import Data

EXPORT, LOCK = "export", ".lock"
MOST_SECONDS_UNSEEN = 90
"""Seconds for which NFS, with default settings, may cache that a file does not exist."""
_FLAGS = ("XLA_FLAGS", "NPROC", "JAX_ENABLE_X64", "JAX_DEFAULT_MATMUL_PRECISION", "NVIDIA_TF32_OVERRIDE")
"""Environment variables that change what is computed."""
_VERSION = 1
_FILES = (RUN, CONFIG, LOCK, METRICS, PLOT, WANDB_ID, *TOKENIZER_FILES)
_FOLDERS = (CHECKPOINTS, EXPORT, TENSORBOARD)
"""What training writes into the directory of a run."""
_MOST_RUN_BYTES = 2**20
"""Size limit of run.json. A typical one has 3 kB."""


@dataclass(frozen=True)
class Identity:
    """The identity of a run: a change in any of these makes it a different run."""

    config: TrainConfig
    data: str
    """Fingerprint of the tokens."""
    tokenizer: str | None
    """Fingerprint of the tokenizer, if there is one."""

    @classmethod
    def of(cls, config: TrainConfig, data: Data) -> Identity:
        tokenizer = None if data.tokenizer is None else tokenizer_fingerprint(data.tokenizer)
        return cls(config, data.fingerprint, tokenizer)

    def differences(self, other: Identity) -> list[str]:
        """Return one line for each difference from `other`. The path of the data may change, its content may not."""
        mine, theirs = flat(self.config), flat(other.config)
        changed = [name for name in mine if mine[name] != theirs[name] and name not in FREE]
        lines = [f"{name} was {quoted(mine[name])}, now {quoted(theirs[name])}" for name in changed]
        if self.data != other.data:
            lines.append("data: the tokens are not the same as when the run began")
        if self.tokenizer != other.tokenizer:
            lines.append("tokenizer: it is not the same as when the run began")
        return lines


def begin(run: Path, config: TrainConfig, data: Data, *, resume: bool = False) -> None:
    """Create the directory of a new run.

    With `resume`, restart a run that ended before its first checkpoint: its configuration and tokenizer are replaced,
    and no other file changes.

    Raises:
        TrainingError: the directory exists and is not empty. With `resume`: it is not a run without checkpoints.
    """
    if not os.path.lexists(run) or (run.is_dir() and not any(run.iterdir())):
        with new_directory(run) as directory:
            _describe_new(directory, config, data)
        return
    require_run(run)
    with locked(run) if resume else nullcontext():
        if steps(run) or not resume:
            raise TrainingError(f"{quoted(run)} is a run; continue it with --resume, or choose another --out")
        with TemporaryDirectory() as beside:
            _describe_new(Path(beside), config, data)
            files = {path.name: path.read_text(encoding="utf-8") for path in Path(beside).iterdir()}
        replace_files(run, files, remove=TOKENIZER_FILES)


def require_run(run: Path) -> None:
    """Raise `TrainingError` unless `run` is the directory of a run of this project."""
    if not is_run(run):
        raise TrainingError(f"{quoted(run)} exists and is not a run; choose another --out")
    stored_identity(run)  # raises if another program wrote a file with this name
    for name in (*_FILES, *_FOLDERS):
        path = run / name
        if path.is_symlink() or (path.exists() and not (path.is_file() if name in _FILES else path.is_dir())):
            kind = "file" if name in _FILES else "directory"
            raise TrainingError(f"{quoted(path)} is not a regular {kind}; replace or remove it")


def remove(run: Path) -> None:
    """Remove a run if training wrote every file in its directory.

    Raises:
        TrainingError: the directory is not a run, or holds other files; the message lists them. Nothing is removed.
    """
    run = run.resolve()
    require_run(run)
    if run in (Path.cwd(), *Path.cwd().parents):
        raise TrainingError(f"{quoted(run)} is the working directory; leave it first, or choose another --out")
    own = sorted(run.rglob("*"), reverse=True)  # children before their directory
    if kept := foreign_files(run, _written_by_training(run).__contains__):
        raise TrainingError(
            f"{quoted(run)} is not removed, because it holds files that training did not write; move them "
            f"away:\n{bullet_list(map(quoted, kept))}"
        )
    with locked(run):
        for path in (*own, run / LOCK, run):
            path.rmdir() if path.is_dir() else path.unlink(missing_ok=True)


def require_replaceable_export(run: Path) -> None:
    """Raise `CheckpointError` if the export of a run holds files that training did not write."""
    if (run / EXPORT).exists():
        require_replaceable(run / EXPORT, exported(run))


def exported(run: Path) -> Replaceable:
    """Return which files an export of this run may replace: those in the manifest of the earlier export."""
    return manifest.recorded(run / EXPORT).__contains__


def _written_by_training(run: Path) -> set[str]:
    names = {*_FILES, *(f"{folder}/" for folder in _FOLDERS)}
    names |= {path.relative_to(run).as_posix() for path in (run / TENSORBOARD).glob("events.out.tfevents.*")}
    for folder in (EXPORT, *(f"{CHECKPOINTS}/{step}" for step in steps(run))):
        if recorded := manifest.recorded(run / folder):
            names |= {f"{folder}/", *(f"{folder}/{name}" for name in recorded)}
    return names


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Hold the run's lock for the duration of a block. Raises `TrainingError` if another process holds it."""
    with exclusive_lock(run / LOCK, is_file=True) as held:
        if held is False:  # None, for a file system without locks, is accepted
            raise _another_trains(run)
        yield


def require_own(run: Path, config: TrainConfig, data: Data) -> None:
    """Raise `TrainingError` if another run started in this directory before this one locked it."""
    if stored_identity(run) != Identity.of(config, data):
        raise _another_trains(run)


def wait_until_visible(run: Path) -> None:
    """Raise `TrainingError` if this process does not see the run's directory that the first process created."""
    for _ in range(MOST_SECONDS_UNSEEN):
        if is_run(run):
            return
        time.sleep(1)
    raise TrainingError(
        f"{quoted(run)} is not visible to this process; --out must be on a file system that all processes share"
    )


def _another_trains(run: Path) -> TrainingError:
    return TrainingError(f"another process trains in {quoted(run)}; wait for it, or choose another --out")


def require_same(run: Path, config: TrainConfig, data: Data, accept_changes: bool) -> None:
    """Raise `TrainingError` that names every difference between the stored run and the one to resume."""
    lines = stored_identity(run).differences(Identity.of(config, data))
    if lines and not accept_changes:
        raise TrainingError(
            f"{quoted(run)} cannot be resumed exactly:\n{bullet_list(lines)}\n"
            "restore these values, or continue with --accept-changes"
        )


def told(config: TrainConfig, data: Data) -> dict[str, Any]:
    """Return the arguments that must be equal on all processes. Paths of data may differ between machines."""
    identity = Identity.of(config, data)
    fields = {name: value for name, value in flat(config).items() if name not in PLACES}
    return {**fields, "data": identity.data, "tokenizer": identity.tokenizer}


def is_run(run: Path) -> bool:
    return (run / RUN).is_file()


def stored_identity(run: Path) -> Identity:
    """Return the stored identity of a run. Raises `TrainingError` if run.json is damaged."""
    path = run / RUN
    try:
        stored = parse_object(read_small_file(path, _MOST_RUN_BYTES, TrainingError), quoted(path), TrainingError)
    except OSError as error:
        raise TrainingError(f"cannot read {quoted(path)}: {error.strerror}") from error
    version, data, tokenizer = (stored.get(name) for name in ("version", "data", "tokenizer"))
    if type(version) is not int or version != _VERSION or not {"config", "tokenizer"} <= stored.keys():
        raise TrainingError(f"{quoted(path)} is damaged, or was written by another version of gpt2-bridge")
    if not isinstance(data, str) or not isinstance(tokenizer, str | None):
        raise TrainingError(f"{quoted(path)} is damaged: data and tokenizer must be fingerprints")
    try:
        return Identity(from_flat(stored["config"]), data, tokenizer)
    except BridgeError as error:
        raise TrainingError(f"{quoted(path)}: {error}") from error


def _describe_new(directory: Path, config: TrainConfig, data: Data) -> None:
    if data.tokenizer is not None:
        save_tokenizer(data.tokenizer, directory)
    describe(directory, config, data)


def describe(run: Path, config: TrainConfig, data: Data) -> None:
    """Write config.json and run.json. Each write is atomic."""
    with new_file(run / CONFIG, overwrite=True) as beside:
        write_config(beside, config.model, _end_of_text(data))
    with new_file(run / RUN, overwrite=True) as beside:
        write_json(beside, about(config, data))


def about(config: TrainConfig, data: Data) -> dict[str, Any]:
    """Return the `about` of a manifest: the run, and the version that wrote the file."""
    identity = Identity.of(config, data)
    return {
        "version": _VERSION,
        "config": flat(config),
        "data": identity.data,
        "tokenizer": identity.tokenizer,
        "versions": {"gpt2-bridge": __version__} | {n: version(n) for n in ("jax", "jaxlib", "flax", "optax")},
        "flags": {name: os.environ[name] for name in _FLAGS if name in os.environ},
    }


def _end_of_text(data: Data) -> dict[str, int | None]:
    """Return generation settings for transformers. Without them, it would use the ids of OpenAI's vocabulary."""
    tokenizer = data.tokenizer
    has_one = tokenizer is not None and END_OF_TEXT in tokenizer.special_tokens_set
    return dict.fromkeys(("bos_token_id", "eos_token_id"), tokenizer.eot_token if tokenizer and has_one else None)
