"""The directory of a run: creating, checking, locking and removing it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from bridge import Checkpoint, save_tokenizer
from bridge.checkpoint import GENERATION_CONFIG
from bridge.errors import bullet_list, quoted
from bridge.formats.directory import (
    CONFIG,
    companions_of,
    copy_companions,
    fits_any_tokenizer,
    write_config,
    write_json,
)
from bridge.formats.trainers.run import CHECKPOINTS, RUN, first_valid, steps
from bridge.formats.trainers.run_base import BASE, write_base
from bridge.storage import manifest
from bridge.storage.atomic_writes import (
    Replaceable,
    foreign_files,
    new_directory,
    new_file,
    replace_files,
    require_replaceable,
)
from bridge.storage.locks import exclusive_lock
from bridge.tokenizers.chat.templates import CHAT_TEMPLATE_FOLDER, chat_template_files
from bridge.tokenizers.loading import TOKENIZER_FILES
from gpt2_jax.training.config import TrainConfig
from gpt2_jax.training.errors import TrainingError
from gpt2_jax.training.run.identity import Identity, description, has_run_json, stored_identity
from gpt2_jax.training.run.metrics import METRICS, PLOT, TENSORBOARD, WANDB_ID

if TYPE_CHECKING:
    from gpt2_jax.data import Data

EXPORT, ADAPTER, LOCK = "export", "adapter", ".lock"
VISIBILITY_TIMEOUT = 90
"""Seconds. With default settings, NFS may cache for this long that a file does not exist."""
_COMPANIONS = (*TOKENIZER_FILES, GENERATION_CONFIG)
_FILES = (RUN, CONFIG, LOCK, METRICS, PLOT, WANDB_ID, *_COMPANIONS)
_FOLDERS = (CHECKPOINTS, EXPORT, ADAPTER, BASE, TENSORBOARD, CHAT_TEMPLATE_FOLDER)
"""The names of the files and directories that training writes into the directory of a run."""


def create(
    run: Path, config: TrainConfig, data: Data, *, init_from: Checkpoint | None = None, resume: bool = False
) -> None:
    """Create the directory of a new run.

    The tokenizer files, the generation settings and the further fields of `config.json` are those of `init_from`, so
    that the export has them unchanged. A run that trains a part of the weights also has `init_from` as its base.

    With `resume`, restart a run that ended before its first checkpoint: its configuration and tokenizer are replaced,
    and no other file changes.

    Raises:
        TrainingError: the directory exists and is not empty. With `resume`: it is not a run, or the run has
        checkpoints.
    """
    require_available(run, resume=resume)
    if _is_vacant(run):
        with new_directory(run) as directory:
            _write_new(directory, config, data, init_from)
            if config.is_partial:
                with new_directory(directory / BASE) as base:
                    write_base(base, require_base(init_from))
        return
    with locked(run):
        if steps(run):
            raise _run_exists_error(run)
        if config.is_partial:
            with new_directory(run / BASE, replaceable=manifest.recorded(run / BASE).__contains__) as base:
                write_base(base, require_base(init_from))
        with TemporaryDirectory() as temporary:
            _write_new(Path(temporary), config, data, init_from)
            written = [path for path in Path(temporary).rglob("*") if path.is_file()]
            files = {path.relative_to(temporary).as_posix(): path.read_bytes() for path in written}
        replace_files(run, files, remove=(*_COMPANIONS, *chat_template_files(run)))


def require_available(run: Path, *, resume: bool) -> None:
    """Raise `TrainingError` unless a run can be created in `run` or, with `resume`, continued."""
    if not _is_vacant(run):
        require_run(run)
        if not resume:
            raise _run_exists_error(run)


def _is_vacant(run: Path) -> bool:
    return not os.path.lexists(run) or (run.is_dir() and not any(run.iterdir()))


def _run_exists_error(run: Path) -> TrainingError:
    return TrainingError(f"{quoted(run)} is a run; continue it with --resume, or choose another --out")


def require_run(run: Path) -> None:
    """Raise `TrainingError` unless `run` is the directory of a run of this project."""
    if not has_run_json(run):
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
    """Raise `CheckpointError` if the exports of a run hold files that training did not write."""
    for name in (EXPORT, ADAPTER):
        if (run / name).exists():
            require_replaceable(run / name, replaceable_export(run, name))


def replaceable_export(run: Path, name: str = EXPORT) -> Replaceable:
    """Return which files an export of this run may replace: those in the manifest of the earlier export."""
    return manifest.recorded(run / name).__contains__


def require_base(init_from: Checkpoint | None) -> Checkpoint:
    """Return the initial checkpoint. Raises `TrainingError` if a run that trains a part of the weights has none."""
    if init_from is None:
        raise TrainingError("lora_rank and freeze need a model to start from; give it as init_from")
    return init_from


def _written_by_training(run: Path) -> set[str]:
    names = {*_FILES, *(f"{folder}/" for folder in _FOLDERS)}
    names |= {path.relative_to(run).as_posix() for path in (run / TENSORBOARD).glob("events.out.tfevents.*")}
    names |= {*chat_template_files(run)}
    for folder in (EXPORT, ADAPTER, BASE, *(f"{CHECKPOINTS}/{step}" for step in steps(run))):
        if recorded := manifest.recorded(run / folder):
            names |= {f"{folder}/", *(f"{folder}/{name}" for name in recorded)}
    return names


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Hold the run's lock for the duration of a block. Raises `TrainingError` if another process holds it."""
    with exclusive_lock(run / LOCK, is_file=True) as held:
        if held is False:  # None, for a file system without locks, is accepted
            raise _run_locked_error(run)
        yield


def require_created_by(run: Path, config: TrainConfig, data: Data) -> None:
    """Raise `TrainingError` if another process created a run in this directory before this one locked it."""
    if stored_identity(run) != Identity.of(config, data):
        raise _run_locked_error(run)


def wait_until_visible(run: Path) -> None:
    """Wait until this process sees the run that process 0 created.

    Raises:
        TrainingError: the run is not visible within `VISIBILITY_TIMEOUT`.
    """
    for _ in range(VISIBILITY_TIMEOUT):
        if has_run_json(run):
            return
        time.sleep(1)
    raise TrainingError(
        f"{quoted(run)} is not visible to this process; --out must be on a file system that all processes share"
    )


def _run_locked_error(run: Path) -> TrainingError:
    return TrainingError(f"another process is training in {quoted(run)}; wait for it, or choose another --out")


def require_unchanged(run: Path, config: TrainConfig, data: Data) -> None:
    """Raise `TrainingError` that names every difference between the stored run and the one to resume."""
    lines = stored_identity(run).differences(Identity.of(config, data))
    if lines:
        # A run that has passed its last step cannot be resumed with --accept-changes either.
        require_steps_left(run, config, first_valid(run, reversed(steps(run)), lambda _: None))
        raise TrainingError(
            f"{quoted(run)} cannot be resumed exactly:\n{bullet_list(lines)}\n"
            "restore these values, or continue with --accept-changes"
        )


def require_steps_left(run: Path, config: TrainConfig, newest: int | None) -> None:
    """Raise `TrainingError` if `newest`, the step of the newest checkpoint, is after the last step."""
    if newest is not None and newest > config.max_steps:
        raise TrainingError(
            f"max_steps={config.max_steps}: the newest checkpoint in {quoted(run)} is already at step {newest}; "
            f"give --max-steps {newest} or more, or start again with another --out"
        )


def _write_new(directory: Path, config: TrainConfig, data: Data, init_from: Checkpoint | None) -> None:
    if data.tokenizer is not None:
        save_tokenizer(data.tokenizer, directory)
    found = {} if init_from is None else companions_of(init_from)
    copy_companions({n: place for n, place in found.items() if fits_any_tokenizer(n)}, config.model, directory)
    write_description(directory, config, data, init_from)


def write_description(run: Path, config: TrainConfig, data: Data, init_from: Checkpoint | None = None) -> None:
    """Write config.json and run.json. Each write is atomic.

    Args:
        init_from: the initial checkpoint, or the run itself if it is resumed. Its further fields are kept.
    """
    extra = {**_end_of_text(data), **(init_from.extra if init_from is not None else {})}
    with new_file(run / CONFIG, overwrite=True) as temporary:
        write_config(temporary, config.model, extra)
    with new_file(run / RUN, overwrite=True) as temporary:
        write_json(temporary, description(config, data))


def _end_of_text(data: Data) -> dict[str, int | None]:
    """Return generation settings for transformers. Without them, it would use the ids of OpenAI's vocabulary."""
    ends = () if data.tokenizer is None else data.tokenizer.eos_token_ids
    return dict.fromkeys(("bos_token_id", "eos_token_id"), ends[0] if ends else None)
