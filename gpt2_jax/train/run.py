"""The directory of a run: what it was told, so that it can be continued and read back."""

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

from bridge import BridgeError, manifest, save_tokenizer, tokenizer_fingerprint
from bridge.bpe import END_OF_TEXT
from bridge.errors import bullet_list, quoted
from bridge.files import (
    Replaceable,
    exclusive_lock,
    foreign_files,
    new_directory,
    new_file,
    replace_files,
    require_replaceable,
)
from bridge.formats.directory import CONFIG, write_config, write_json
from bridge.formats.run import CHECKPOINTS, RUN, steps
from bridge.json_text import parse_object
from bridge.small_file import read_small_file
from bridge.tokenizer import TOKENIZER_FILES
from gpt2_jax.train.config import FREE, PLACES, TrainConfig, TrainingError, flat, from_flat
from gpt2_jax.train.metrics import METRICS, PLOT

if TYPE_CHECKING:
    from gpt2_jax.data import Data

EXPORT, LOCK = "export", ".lock"
MOST_SECONDS_UNSEEN = 90
"""For so long NFS may remember, as it is set up unless told otherwise, that a file was not there."""
_FLAGS = ("XLA_FLAGS", "NPROC", "JAX_ENABLE_X64", "JAX_DEFAULT_MATMUL_PRECISION", "NVIDIA_TF32_OVERRIDE")
"""Environment variables that change what is computed."""
_VERSION = 1
_MOST_RUN_BYTES = 2**20
"""Of run.json, which has some 3 kB."""


@dataclass(frozen=True)
class Identity:
    """What makes a run this run: continuing with any of it changed would be another run."""

    config: TrainConfig
    data: str
    """Fingerprint of the tokens."""
    tokenizer: str | None
    """Fingerprint of the tokenizer, where there is one."""

    @classmethod
    def of(cls, config: TrainConfig, data: Data) -> Identity:
        tokenizer = None if data.tokenizer is None else tokenizer_fingerprint(data.tokenizer)
        return cls(config, data.fingerprint, tokenizer)

    def differences(self, other: Identity) -> list[str]:
        """The fields in which `other` is another run, a line each. Where the data is may change, not what it is."""
        mine, theirs = flat(self.config), flat(other.config)
        changed = [name for name in mine if mine[name] != theirs[name] and name not in FREE]
        lines = [f"{name} was {quoted(mine[name])}, now {quoted(theirs[name])}" for name in changed]
        if self.data != other.data:
            lines.append("data: the tokens are not the same as when the run began")
        if self.tokenizer != other.tokenizer:
            lines.append("tokenizer: it is not the same as when the run began")
        return lines


def begin(run: Path, config: TrainConfig, data: Data, *, resume: bool = False) -> None:
    """Make the directory of a new run.

    With `resume` a run that ended before its first checkpoint begins again: its configuration and tokenizer are
    replaced, and no other file changes.

    Raises:
        TrainingError: the directory exists and is not empty, or with `resume` not such a run.
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
    stored_identity(run)  # raises if another program wrote a file of this name


def remove(run: Path) -> None:
    """Remove a run, if all that its directory holds was written by training.

    Raises:
        TrainingError: it is no run, or holds other files, which are listed. Nothing is removed.
    """
    require_run(run)
    if run.resolve() in (Path.cwd(), *Path.cwd().parents):
        raise TrainingError(f"{quoted(run)} is the working directory; leave it first, or choose another --out")
    own = sorted(run.rglob("*"), reverse=True)  # the contents of a directory before the directory
    if kept := foreign_files(run, _written_by_training(run).__contains__):
        raise TrainingError(
            f"{quoted(run)} is not removed, because it also holds files that training did not write; move them "
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
    """Which files an export of this run may replace: those that the manifest of the earlier export records."""
    return manifest.recorded(run / EXPORT).__contains__


def _written_by_training(run: Path) -> set[str]:
    names = {RUN, CONFIG, LOCK, METRICS, PLOT, *TOKENIZER_FILES, f"{CHECKPOINTS}/", f"{EXPORT}/"}
    for folder in (EXPORT, *(f"{CHECKPOINTS}/{step}" for step in steps(run))):
        if recorded := manifest.recorded(run / folder):
            names |= {f"{folder}/", *(f"{folder}/{name}" for name in recorded)}
    return names


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """As long as the block lasts no other process is in here; raises `TrainingError` where one is."""
    with exclusive_lock(run / LOCK, is_file=True) as held:
        if held is False:  # None, on a file system without locks, will do
            raise _another_trains(run)
        yield


def require_own(run: Path, config: TrainConfig, data: Data) -> None:
    """Raise `TrainingError` where another run has begun in the same directory before this one could lock it."""
    if stored_identity(run) != Identity.of(config, data):
        raise _another_trains(run)


def require_seen(run: Path) -> None:
    """Raise `TrainingError` where the first process has made the run's directory, and this one does not see it."""
    for _ in range(MOST_SECONDS_UNSEEN):
        if is_run(run):
            return
        time.sleep(1)
    raise TrainingError(f"{quoted(run)} is not there for this process; --out must be a directory that all of them see")


def _another_trains(run: Path) -> TrainingError:
    return TrainingError(f"another process trains in {quoted(run)}; wait for it, or choose another --out")


def require_same(run: Path, config: TrainConfig, data: Data, accept_changes: bool) -> None:
    """Raise `TrainingError` naming every field in which the run to be resumed is not the one that was stopped."""
    lines = stored_identity(run).differences(Identity.of(config, data))
    if lines and not accept_changes:
        raise TrainingError(
            f"{quoted(run)} cannot be resumed exactly:\n{bullet_list(lines)}\n"
            "leave these as they were, or continue all the same with --accept-changes"
        )


def told(config: TrainConfig, data: Data) -> dict[str, Any]:
    """What all processes of a run must have been told alike. Where data lies may differ from machine to machine."""
    identity = Identity.of(config, data)
    fields = {name: value for name, value in flat(config).items() if name not in PLACES}
    return {**fields, "data": identity.data, "tokenizer": identity.tokenizer}


def is_run(run: Path) -> bool:
    return (run / RUN).is_file()


def stored_identity(run: Path) -> Identity:
    """What the run in this directory was begun with. Raises `TrainingError` where run.json is damaged."""
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
    """Write config.json and run.json, each whole or not at all."""
    with new_file(run / CONFIG, overwrite=True) as beside:
        write_config(beside, config.model, _end_of_text(data))
    with new_file(run / RUN, overwrite=True) as beside:
        write_json(beside, about(config, data))


def about(config: TrainConfig, data: Data) -> dict[str, Any]:
    """Whose a file of this run is, and what wrote it."""
    identity = Identity.of(config, data)
    return {
        "version": _VERSION,
        "config": flat(config),
        "data": identity.data,
        "tokenizer": identity.tokenizer,
        "versions": {name: version(name) for name in ("gpt2-bridge", "jax", "jaxlib", "flax", "optax")},
        "flags": {name: os.environ[name] for name in _FLAGS if name in os.environ},
    }


def _end_of_text(data: Data) -> dict[str, int | None]:
    """What transformers' generate looks at; unsaid, it would take the ids of OpenAI's vocabulary."""
    tokenizer = data.tokenizer
    has_one = tokenizer is not None and END_OF_TEXT in tokenizer.special_tokens_set
    return dict.fromkeys(("bos_token_id", "eos_token_id"), tokenizer.eot_token if tokenizer and has_one else None)
