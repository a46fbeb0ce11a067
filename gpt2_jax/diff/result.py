"""The result of `diff`: the verdict, and the result as JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import bridge
from bridge import Checkpoint
from bridge.comparison import Comparison, TensorComparison
from gpt2_jax.diff.plots import tensor_plots
from gpt2_jax.reporting.environment import environment

if TYPE_CHECKING:
    from gpt2_jax.diff.function import FunctionComparison

Verdict = Literal["identical", "same function", "different"]


@dataclass(frozen=True)
class Side:
    """One of the two checkpoints."""

    source: str
    format: str
    path: str
    parameters: int
    diagnostics: tuple[str, ...]
    config: Mapping[str, Any]
    fingerprint: str | None = None
    """`bridge.fingerprint` of the weights. None if it was not computed."""

    @classmethod
    def of(cls, checkpoint: Checkpoint, source: str, with_fingerprint: bool = False) -> Side:
        return cls(
            source,
            checkpoint.format,
            str(checkpoint.path),
            bridge.num_parameters(checkpoint.config),
            checkpoint.diagnostics,
            asdict(checkpoint.config),
            bridge.fingerprint(checkpoint.tensors) if with_fingerprint else None,
        )


@dataclass(frozen=True)
class Diff:
    """How two checkpoints, A and B, differ."""

    a: Side
    b: Side
    comparison: Comparison
    """Everything that needs no framework."""
    function: FunctionComparison | None
    """The comparison of the functions. None if the models were not run."""
    not_run: str = ""
    """Why the models were not run."""
    environment: Mapping[str, str] = field(default_factory=environment)
    """The versions and the device that the result was computed with."""

    @property
    def different_parts(self) -> tuple[str, ...]:
        """The parts that make the checkpoints different, in the order of the report.

        The function is one of them if it differs beyond rounding. Agreement on one text alone does not show that two
        functions are equal, so it makes no other part equal.
        """
        differs = self.function is not None and not self.function.is_within_rounding
        return (*self.comparison.different_parts, *(["function"] if differs else []))

    @property
    def verdict(self) -> Verdict:
        """`identical`: every part that both sides have is equal.

        `same function`: the parts that differ do not change what the model computes, and the tokenizer and the
        generation settings are the same. If the models were run, they agree within rounding.
        """
        if self.different_parts:
            return "different"
        return "identical" if self.comparison.is_identical else "same function"

    def to_json(self) -> dict[str, Any]:
        """The result as JSON, with all differences. Numbers that are not finite are null."""
        found = self.comparison
        return _finite(
            {
                "a": asdict(self.a),
                "b": asdict(self.b),
                "verdict": self.verdict,
                "different": self.different_parts,
                "config": [asdict(difference) for difference in found.config],
                "extra": [asdict(difference) for difference in found.extra],
                "tokenizer": _tokenizer_to_json(found),
                "generation": [asdict(difference) for difference in found.generation],
                "chat_templates": [asdict(difference) for difference in found.chat_templates],
                "tensors": {
                    "tensors": [_tensor_to_json(tensor) for tensor in found.tensors.tensors],
                    "permutations": [asdict(permutation) for permutation in found.tensors.permutations],
                    "copied_layers": found.tensors.copied_layers,
                    "notes": found.tensors.notes,
                    "plots": [plot.to_json() for plot in tensor_plots(found.tensors)],
                },
                "optimizer": {
                    "missing": found.optimizer.missing,
                    "differences": [asdict(difference) for difference in found.optimizer.differences],
                    "tensors": [_tensor_to_json(tensor) for tensor in found.optimizer.tensors],
                },
                "function": None if self.function is None else _function_to_json(self.function),
                "function_not_run": self.not_run,
                "environment": self.environment,
            }
        )

    def to_html(self) -> str:
        """The result as an HTML page in one file, without scripts. The JSON report has every number that is drawn."""
        from gpt2_jax.diff.html import to_page
        from gpt2_jax.reporting.page import render

        return render(to_page(self))


def _tokenizer_to_json(found: Comparison) -> dict[str, Any]:
    tokenizer = found.tokenizer
    return {
        "missing": tokenizer.missing,
        "differences": [asdict(difference) for difference in tokenizer.differences],
        "same_definition": tokenizer.is_same_definition,
        "different_tokens": tokenizer.different_tokens,
        "strings": tokenizer.strings,
        "different_strings": tokenizer.different_strings,
    }


def _tensor_to_json(tensor: TensorComparison) -> dict[str, Any]:
    values = tensor.values
    return {
        "name": tensor.name,
        "status": tensor.status,
        "dtypes": tensor.dtypes,
        "shapes": tensor.shapes,
        "different_values": values.different,
        "relative_l2": values.relative_l2,
        "max_difference": values.largest,
        "not_finite": values.not_finite,
        "rows": tensor.rows,
        "note": tensor.note,
    }


def _function_to_json(function: FunctionComparison) -> dict[str, Any]:
    derived = {"first_departure": function.first_departure, "within_rounding": function.is_within_rounding}
    return {**asdict(function), **derived, "plots": [plot.to_json() for plot in function.plots]}


def _finite(value: Any) -> Any:
    """Return JSON's form of a value: tuples as lists, and None for NaN and infinity."""
    if isinstance(value, Mapping):
        return {str(name): _finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
