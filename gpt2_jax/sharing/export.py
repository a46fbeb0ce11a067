"""The files of a repository: an export in Hugging Face format, its card, and its certificate."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bridge
from bridge import Checkpoint
from bridge.checkpoint import GENERATION_CONFIG
from bridge.errors import quoted
from bridge.formats.directory import CONFIG, write_json
from bridge.hub import CARD, CERTIFICATE, is_repo_id
from gpt2_jax.parity.certificates.certificate import Certificate, read_certificate
from gpt2_jax.sharing.card import model_card
from gpt2_jax.sharing.errors import SharingError
from gpt2_jax.sharing.evaluation import read_evaluation
from gpt2_jax.sharing.facts import ModelFacts, dtypes_of, tokenizer_of
from gpt2_jax.sharing.run import run_facts

_SETTINGS = (CONFIG, "tokenizer_config.json", GENERATION_CONFIG)
_PATH_FIELDS = frozenset({"_name_or_path", "name_or_path", "tokenizer_file", "special_tokens_map_file"})
"""Fields that transformers fills with paths. They are always left out, because `clients/bank` may be a path."""
_TEXT_FIELDS = re.compile(r".*_tokens?|added_tokens_decoder|chat_template|stop_strings")
"""Fields with text of the tokenizer, in which `~` and `/` do not mean paths."""
_LOCAL_PATH = re.compile(r"(~|\.{0,2}[/\\]|[A-Za-z]:[/\\]|file:)", re.IGNORECASE)
"""The start of a local path."""
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,63}")


@dataclass(frozen=True)
class Export:
    """A directory that is ready to be uploaded."""

    directory: Path
    card: str
    left_out: tuple[str, ...]
    """One phrase for each part of the checkpoint that the files do not contain."""

    def sizes(self) -> dict[str, int]:
        """Return relative path -> size of each file in bytes."""
        files = sorted(path for path in self.directory.rglob("*") if path.is_file())
        return {path.relative_to(self.directory).as_posix(): path.stat().st_size for path in files}


def prepare(
    checkpoint: Checkpoint,
    repo_id: str,
    directory: Path,
    *,
    license: str,
    evaluation: Path | None = None,
    certificate: Path | None = None,
) -> Export:
    """Write the files of a repository to a new directory.

    Args:
        checkpoint: what `bridge.load` returns. A model without biases is written with zero biases, because Hugging
            Face's GPT-2 requires them. If it belongs to a run, the card has the run's recipe and losses.
        repo_id: the repository, such as `me/my-gpt2`.
        directory: a path that does not exist.
        license: the identifier of the license in the hub's list, such as `mit`.
        evaluation: a report of `gpt2 eval --json` for the same weights.
        certificate: a certificate of `gpt2 verify --certificate` for the exported weights. It is part of the files.

    Raises `BridgeError` if an argument is invalid, or belongs to other weights.
    """
    require_repo_id(repo_id)
    require_license(license)
    left_out = bridge.save(checkpoint.with_biases(), directory, format="huggingface") + _remove_local_paths(directory)
    exported = bridge.load(directory)
    fingerprint = bridge.fingerprint(exported.tensors)
    of_source = fingerprint if checkpoint.config.bias else bridge.fingerprint(checkpoint.tensors)
    facts = ModelFacts(
        license=license,
        config=exported.config,
        dtypes=dtypes_of(exported),
        fingerprint=fingerprint,
        tokenizer=tokenizer_of(exported),
        run=run_facts(checkpoint),
        evaluation=None if evaluation is None else read_evaluation(evaluation, {fingerprint, of_source}),
        certificate=None if certificate is None else _certificate(certificate, exported, fingerprint),
    )
    card = model_card(repo_id, facts)
    (directory / CARD).write_text(card, encoding="utf-8")
    if certificate is not None:
        (directory / CERTIFICATE).write_bytes(certificate.read_bytes())
    return Export(directory, card, left_out)


def require_repo_id(repo_id: str) -> None:
    """Raise `SharingError` unless this is the id of a repository with its owner."""
    if not is_repo_id(repo_id) or repo_id.count("/") != 1:
        raise SharingError(f"REPO {quoted(repo_id)}: must be OWNER/NAME, such as me/my-gpt2")


def require_license(license: str) -> None:
    """Raise `SharingError` unless this can be an identifier of a license."""
    if not _LICENSE.fullmatch(license):
        raise SharingError(
            f"--license {quoted(license)}: must be an identifier of the hub's list, such as mit, apache-2.0 or other"
        )


def _remove_local_paths(directory: Path) -> tuple[str, ...]:
    """Remove fields that may name a file or a directory on this machine. Return one sentence for each."""
    removed = []
    for file in sorted(directory.glob("*.json")):
        fields = json.loads(file.read_text(encoding="utf-8")) if file.name in _SETTINGS else {}
        names = [name for name, value in fields.items() if _has_local_path(name, value)]
        if names:
            write_json(file, {name: value for name, value in fields.items() if name not in names})
            removed += [f"{name} in {file.name}, which may be a local path" for name in names]
    return tuple(removed)


def _has_local_path(name: str, value: Any) -> bool:
    """Whether a field of the settings, or a value inside it, may be a local path."""
    if name in _PATH_FIELDS or _TEXT_FIELDS.fullmatch(name):
        return name in _PATH_FIELDS
    if isinstance(value, dict):
        return any(_has_local_path(*item) for item in value.items())
    if isinstance(value, list):
        return any(_has_local_path(name, item) for item in value)
    return isinstance(value, str) and _LOCAL_PATH.match(value) is not None


def _certificate(path: Path, exported: Checkpoint, fingerprint: str) -> Certificate:
    found = read_certificate(path)
    if found.fingerprint != fingerprint or found.config != exported.config:
        raise SharingError(
            f"--certificate {quoted(path)}: it belongs to another model; make it from the shared weights, for a run "
            "with gpt2 verify RUN/export --certificate"
        )
    return found
