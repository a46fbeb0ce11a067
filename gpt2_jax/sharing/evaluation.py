"""The report of `gpt2 eval` that a model card repeats."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from bridge.errors import quoted
from bridge.storage.json_text import parse_plain_object
from bridge.storage.regular_file import read_small_file
from gpt2_jax.console.report_files import is_report
from gpt2_jax.sharing.errors import SharingError

METRICS: Mapping[str, str] = {
    "loss": "loss, nats per token",
    "perplexity": "perplexity per token",
    "perplexity_per_word": "perplexity per word",
    "bits_per_byte": "bits per byte",
}
"""Key of the report -> its name in the card."""
_COUNTS = ("tokens", "predicted_tokens", "context", "stride")
_MOST_BYTES, _MOST_ELEMENTS = 2**16, 1000


@dataclass(frozen=True)
class EvaluationFacts:
    """The figures of one evaluation."""

    data: str
    """The name of the text, without its directory."""
    metrics: Mapping[str, float]
    """Key of `METRICS` -> value. Figures that the report does not have are left out."""
    counts: Mapping[str, int]


def read_evaluation(path: Path, fingerprints: Collection[str]) -> EvaluationFacts:
    """Read a report of `gpt2 eval --json`.

    Args:
        fingerprints: the fingerprints of the shared weights. The report must have one of them.

    Raises:
        SharingError: the file is not such a report, is damaged, or belongs to other weights.
    """
    where = quoted(path)
    try:
        text = read_small_file(path, _MOST_BYTES, SharingError)
    except OSError as error:
        raise SharingError(f"cannot read {where}: {error.strerror}") from error
    report = parse_plain_object(text, where, SharingError, _MOST_ELEMENTS)
    if not is_report(path) or not {"data", "loss", "predicted_tokens", "fingerprint"} <= report.keys():
        raise SharingError(f"{where} is not a report of gpt2 eval --json; make it again with this version")
    if str(report["fingerprint"]) not in fingerprints:
        raise SharingError(f"{where} is the report of other weights; evaluate this checkpoint again")
    metrics = {name: _metric(report, name, where) for name in METRICS if report.get(name) is not None}
    if not metrics:
        raise SharingError(f"{where} has none of {', '.join(METRICS)}; evaluate this checkpoint again")
    counts = {name: report[name] for name in _COUNTS if type(report.get(name)) is int and report[name] >= 0}
    return EvaluationFacts(PurePath(str(report["data"])).name, metrics, counts)


def _metric(report: Mapping[str, Any], name: str, where: str) -> float:
    value = report[name]
    if type(value) not in (int, float) or not math.isfinite(value) or value < 0:
        raise SharingError(f"{where}: {name} must be a number of at least 0, not {quoted(value)}")
    return float(value)
