"""The report of `gpt2 plan` as JSON. Bytes, FLOPs and seconds are per device and step."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from gpt2_jax.plan.communication.collectives import Collective
from gpt2_jax.plan.communication.traffic import traffic
from gpt2_jax.plan.memory import peak_upper_bound
from gpt2_jax.plan.plan import Plan, ScalingPoint
from gpt2_jax.plan.roofline import ASSUMPTIONS, Roofline
from gpt2_jax.plan.suggest import Suggestion
from gpt2_jax.training.config import flat


def to_json(plan: Plan) -> dict[str, Any]:
    """The plan of one topology."""
    collectives = plan.collectives.instructions if plan.collectives else ()
    return {
        "preset": plan.config.preset,
        "config": flat(plan.config),
        "topology": plan.topology.name,
        "chip": None if plan.topology.chip is None else asdict(plan.topology.chip),
        "devices": len(plan.topology.devices),
        "mesh": plan.mesh,
        "num_parameters": plan.num_parameters,
        "state_bytes": asdict(plan.state),
        "saved_activation_bytes": plan.saved_activation_bytes,
        "program": {name: value for name, value in asdict(plan.program).items() if name != "text"},
        "peak_upper_bound": peak_upper_bound(plan.program),
        "peak_bytes": plan.peak.needed,
        "available_bytes": plan.peak.available,
        "missing_bytes": plan.peak.missing,
        "fits": plan.fits,
        "traffic": [asdict(row) for row in traffic(plan)],
        "collectives": [_collective(collective) for collective in collectives],
        "uncounted_loops": list(plan.collectives.uncounted_loops) if plan.collectives else [],
        "roofline": None if plan.roofline is None else _roofline(plan.roofline),
        "assumptions": list(ASSUMPTIONS),
        "suggestion": None if plan.suggestion is None else _suggestion(plan.suggestion),
    }


def scaling_to_json(points: Iterable[ScalingPoint]) -> list[dict[str, Any]]:
    """The plans of weak scaling."""
    return [
        {
            "chips": point.chips,
            "topology": point.topology,
            "failure": point.failure,
            "plan": None if point.plan is None else to_json(point.plan),
        }
        for point in points
    ]


def _roofline(line: Roofline) -> dict[str, Any]:
    return {
        **asdict(line),
        "overlapped_seconds": line.overlapped_seconds,
        "serial_seconds": line.serial_seconds,
        "overlapped_mfu": line.mfu(line.overlapped_seconds),
        "serial_mfu": line.mfu(line.serial_seconds),
    }


def _suggestion(suggestion: Suggestion) -> dict[str, Any]:
    return {
        "flags": suggestion.flags,
        "mesh": dict(suggestion.mesh),
        "batch_size": suggestion.batch_size,
        "num_microbatches": suggestion.num_microbatches,
        "memory_bytes": suggestion.memory_bytes,
        "serial_seconds": suggestion.roofline.serial_seconds,
    }


def _collective(collective: Collective) -> dict[str, Any]:
    return {
        "kind": collective.kind,
        "operands": list(collective.operands),
        "group_size": collective.group_size,
        "count": collective.count,
        "sent_bytes": collective.sent_bytes,
        "op_name": collective.op_name,
    }
