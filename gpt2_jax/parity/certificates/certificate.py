"""The file of a certificate: inputs, reference outputs in float64, tolerances and versions.

The container is safetensors, which other tools can read, with a description as JSON in its metadata. The arrays are not
compressed: zlib would save about a twentieth, because the low bits of float64 outputs are random. A reader thus never
inflates anything, and every size is checked against the size of the file first.

Name the file without the suffix `.safetensors`: some tools load every such file in a directory as weights.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import bridge
import gpt2_jax.parity.tolerances as tolerances
from bridge import BridgeError, ConfigError, GPT2Config
from bridge.containers.safetensors import read_file, write_file
from bridge.errors import quoted
from bridge.storage.atomic_writes import new_file
from bridge.storage.json_text import parse_plain_object
from bridge.storage.stored_file import StoredFile
from bridge.storage.tensors import LazyTensorMap
from gpt2_jax.parity.activations import Outputs, next_labels

KIND = "gpt2-bridge parity certificate"
VERSION = 1
MOST_BYTES = 32 * 2**20
"""Maximum size of a file. The certificate of OpenAI's largest model has 13 MB."""

BOUNDS: Mapping[str, float] = {
    "logits": tolerances.LOGITS_FP64,
    "kl": tolerances.KL_FP64,
    "hidden_states": tolerances.ACTIVATION_FP64,
    "losses": tolerances.LOSS_FP64,
    "gradient_norms": tolerances.GRADIENT_FP64,
    "gradient_projections": tolerances.PROJECTION_FP64,
    "logits_fp32": tolerances.LOGITS_FP32,
    "kl_fp32": tolerances.KL_FP32,
}
"""The tolerances that a certificate freezes."""

_MOST_ELEMENTS = 100_000  # of the description; that of GPT-2 XL has 2,000
_KIND_KEY, _VERSION_KEY, _DESCRIPTION_KEY = "kind", "version", "description"


class CertificateError(BridgeError):
    """A file is not a certificate, is damaged, or belongs to another model."""


@dataclass(frozen=True)
class Certificate:
    """The function of one checkpoint on fixed inputs, as `gpt2_torch` computed it in float64."""

    config: GPT2Config
    fingerprint: str
    """`bridge.fingerprint` of all weights."""
    digests: Mapping[str, str]
    """Canonical name -> `bridge.fingerprint` of this tensor alone."""
    versions: Mapping[str, str]
    """Package -> version, when the certificate was made."""
    tokens: str
    """The origin of the token ids."""
    ids: np.ndarray
    """[B, T]."""
    positions: np.ndarray
    """[K], ascending: the positions of every row with hidden states and logits."""
    outputs: Outputs
    gradients: np.ndarray
    """[N, 2]: `gradient_sketch` of the mean loss."""
    padded_ids: np.ndarray
    """[R, S]: rows of different lengths, padded on the left."""
    padded_mask: np.ndarray
    """[R, S]: 1 at tokens, 0 at padding."""
    padded_losses: np.ndarray
    """[R, S - 1]: as `Outputs.losses`."""
    bounds: Mapping[str, float] = field(default_factory=lambda: dict(BOUNDS))
    """The tolerances: the stricter ones of the file and of this version of the project."""
    measured: Mapping[str, Any] = field(default_factory=dict)
    """The checks and measurements, as in the JSON report, when the certificate was made."""

    @property
    def largest_logit(self) -> float:
        return float(np.abs(self.outputs.logits).max())


def write_certificate(certificate: Certificate, path: str | Path, *, overwrite: bool = False) -> None:
    """Write a certificate atomically.

    Args:
        overwrite: replace an existing certificate. Any other file is never replaced.
    """
    if (size := certificate_bytes(certificate.config, certificate.ids.shape, len(certificate.positions))) > MOST_BYTES:
        raise CertificateError(f"the certificate has {size} bytes; the limit is {MOST_BYTES}; use fewer sequences")
    description = {
        "config": dataclasses.asdict(certificate.config),
        **{name: getattr(certificate, name) for name in ("fingerprint", "digests", "versions", "tokens", "bounds")},
        "measured": certificate.measured,
    }
    metadata = {
        _KIND_KEY: KIND,
        _VERSION_KEY: str(VERSION),
        _DESCRIPTION_KEY: json.dumps(description, allow_nan=False),
    }
    with new_file(path, overwrite=lambda: overwrite and is_certificate(Path(path))) as temporary:
        write_file(temporary, LazyTensorMap.of(_arrays(certificate)), metadata)


def certificate_bytes(config: GPT2Config, shape: tuple[int, ...], n_positions: int) -> int:
    """The approximate size of a certificate for ids [B, T] with outputs at `n_positions` of every row."""
    per_position = config.vocab_size + (config.n_layer + 2) * config.n_embd
    return 8 * shape[0] * (n_positions * per_position + 2 * shape[1])


def is_certificate(path: Path) -> bool:
    """Whether a file is a certificate of any version."""
    try:
        return _metadata(path)[1].get(_KIND_KEY) == KIND
    except BridgeError:
        return False


def read_certificate(path: str | Path) -> Certificate:
    """Read and validate a certificate. Everything is validated before it is used or allocated.

    Raises `BridgeError`, which names the file and the field.
    """
    path = Path(path)
    tensors, metadata = _metadata(path)
    if metadata.get(_KIND_KEY) != KIND:
        raise CertificateError(f"{quoted(path)} is not a certificate of gpt2 verify; its metadata has no kind {KIND!r}")
    if metadata.get(_VERSION_KEY) != str(VERSION):
        raise CertificateError(
            f"{quoted(path)} has version {quoted(metadata.get(_VERSION_KEY))}; this version of the project reads "
            f"version {VERSION}; make the certificate again, or use the version of the project that made it"
        )
    where = f"{quoted(path)}: the description"
    text = metadata.get(_DESCRIPTION_KEY, "").encode("utf-8", "replace")
    description = parse_plain_object(text, where, CertificateError, _MOST_ELEMENTS)
    try:
        config = _config(description)
        digests = _digests(description, config)
        arrays = _read_arrays(tensors, config, len(digests))
        return Certificate(
            config=config,
            fingerprint=_text(description, "fingerprint"),
            digests=digests,
            versions=_texts(description, "versions"),
            tokens=_text(description, "tokens"),
            ids=arrays["ids"],
            positions=arrays["positions"],
            outputs=Outputs(arrays["hidden_states"], arrays["logits"], arrays["losses"]),
            gradients=arrays["gradients"],
            padded_ids=arrays["padded_ids"],
            padded_mask=arrays["padded_mask"],
            padded_losses=arrays["padded_losses"],
            bounds=_bounds(description),
            measured=_object(description, "measured"),
        )
    except _InvalidField as error:
        raise CertificateError(f"{quoted(path)}: {error}") from None


class _InvalidField(ValueError):
    """A field of a certificate is invalid. The message names it."""


def _metadata(path: Path) -> tuple[LazyTensorMap, dict[str, str]]:
    if (size := StoredFile.open(path).size) > MOST_BYTES + 2**20:
        raise CertificateError(f"{quoted(path)} has {size} bytes, and a certificate at most {MOST_BYTES}")
    return read_file(path)


def _arrays(certificate: Certificate) -> dict[str, np.ndarray]:
    return {
        **{name: np.asarray(getattr(certificate, name), np.int64) for name in _INTEGERS},
        **certificate.outputs._asdict(),
        "gradients": certificate.gradients,
        "padded_losses": certificate.padded_losses,
    }


_INTEGERS = ("ids", "positions", "padded_ids", "padded_mask")
_FLOATS = (*Outputs._fields, "gradients", "padded_losses")


def _read_arrays(tensors: LazyTensorMap, config: GPT2Config, n_parameters: int) -> dict[str, np.ndarray]:
    """Return the arrays, whose shapes and values are valid for the model."""
    if {*tensors} != {*_INTEGERS, *_FLOATS}:
        wrong = sorted({*tensors} ^ {*_INTEGERS, *_FLOATS})
        raise _InvalidField(f"the arrays {', '.join(map(quoted, wrong[:5]))} are missing or unexpected")
    shapes = {name: entry.shape for name, entry in tensors.entries.items()}
    for name, rank in (("ids", 2), ("positions", 1), ("padded_ids", 2)):
        if len(shapes[name]) != rank or 0 in shapes[name]:
            raise _InvalidField(f"{name} has the shape {shapes[name]}; it must have {rank} axes and not be empty")
    (B, T), (K,), (R, S) = shapes["ids"], shapes["positions"], shapes["padded_ids"]
    if not 2 <= T <= config.n_positions or config.n_positions < S:
        raise _InvalidField(f"{T} and {S} tokens per row; the model has {config.n_positions} positions")
    expected = {
        "hidden_states": (B, K, config.n_layer + 2, config.n_embd),
        "logits": (B, K, config.vocab_size),
        "losses": (B, T - 1),
        "gradients": (n_parameters, 2),
        "padded_mask": (R, S),
        "padded_losses": (R, S - 1),
    }
    for name, entry in tensors.entries.items():
        dtype = np.dtype(np.int64 if name in _INTEGERS else np.float64)
        if entry.dtype != dtype:
            raise _InvalidField(f"{name} holds {entry.dtype}; it must hold {dtype}")
        if shapes[name] != expected.get(name, shapes[name]):
            raise _InvalidField(f"{name} has the shape {shapes[name]}; this model and these ids need {expected[name]}")
    arrays = dict(tensors)
    _require_valid_values(arrays, config)
    return arrays


def _require_valid_values(arrays: Mapping[str, np.ndarray], config: GPT2Config) -> None:
    for name in ("ids", "padded_ids"):
        if arrays[name].min() < 0 or arrays[name].max() >= config.vocab_size:
            raise _InvalidField(f"{name} has ids outside the vocabulary of {config.vocab_size}")
    positions, mask = arrays["positions"], arrays["padded_mask"]
    if positions[0] < 0 or positions[-1] >= arrays["ids"].shape[1] or (np.diff(positions) <= 0).any():
        raise _InvalidField("positions must be ascending and inside the rows")
    if not np.isin(mask, (0, 1)).all() or (np.diff(mask) < 0).any() or not mask[:, -1].all():
        raise _InvalidField("padded_mask must be 0 at padding on the left, and 1 at the tokens after it")
    for name in _FLOATS:
        if not np.isfinite(arrays[name]).all():
            raise _InvalidField(f"{name} has values that are not finite")
    if (arrays["gradients"][:, 0] < 0).any():
        raise _InvalidField("gradients has negative norms")
    if arrays["padded_losses"][next_labels(arrays["padded_ids"], mask) == bridge.IGNORE_INDEX].any():
        raise _InvalidField("padded_losses must be 0 at padding")


def _config(description: Mapping[str, Any]) -> GPT2Config:
    fields = _object(description, "config")
    if unknown := sorted({*fields} - {field.name for field in dataclasses.fields(GPT2Config)}):
        raise _InvalidField(f"config has the unknown field {quoted(unknown[0])}")
    try:
        return GPT2Config(**fields)
    except ConfigError as error:
        raise _InvalidField(f"config: {error}") from None


def _digests(description: Mapping[str, Any], config: GPT2Config) -> dict[str, str]:
    digests = _texts(description, "digests")
    # A layer has at least 6 tensors. The first condition limits the length of the table that the second one builds.
    if len(digests) < 6 * config.n_layer or {*digests} != {p.torch_name for p in bridge.parameters(config)}:
        raise _InvalidField("digests must have one entry for each tensor of the model")
    return digests


def _bounds(description: Mapping[str, Any]) -> dict[str, float]:
    """The stricter of the file's and this project's tolerances, so that a file cannot loosen them."""
    bounds = _object(description, "bounds")
    if {*bounds} != {*BOUNDS}:
        raise _InvalidField(f"bounds must have exactly {', '.join(BOUNDS)}")
    for name, value in bounds.items():
        if type(value) not in (int, float) or not 0 <= value < math.inf:
            raise _InvalidField(f"bounds: {name}={quoted(value)} must be a number of at least 0")
    return {name: min(bounds[name], limit) for name, limit in BOUNDS.items()}


def _object(description: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = description.get(name)
    if not isinstance(value, dict):
        raise _InvalidField(f"{name} must be an object, not {type(value).__name__}")
    return value


def _texts(description: Mapping[str, Any], name: str) -> dict[str, str]:
    values = _object(description, name)
    if not all(isinstance(value, str) for value in values.values()):
        raise _InvalidField(f"{name} must map names to strings")
    return values


def _text(description: Mapping[str, Any], name: str) -> str:
    value = description.get(name)
    if not isinstance(value, str):
        raise _InvalidField(f"{name} must be a string, not {type(value).__name__}")
    return value
