"""Totals of a plan's collectives, by kind and group."""

from __future__ import annotations

from dataclasses import dataclass

from gpt2_jax.plan.communication.collectives import Collective
from gpt2_jax.plan.plan import Plan


@dataclass(frozen=True)
class Traffic:
    """All collectives of one kind over groups of one size."""

    kind: str
    group_size: int
    crosses_slices: bool
    instructions: int
    count: int
    """Executions per step."""
    sent_bytes: float
    """Bytes that each device sends per step."""


def traffic(plan: Plan) -> list[Traffic]:
    """Totals in descending order of bytes. Collectives in groups of one device send nothing and are omitted."""
    grouped: dict[tuple[str, int, bool], list[Collective]] = {}
    for collective in plan.collectives.instructions if plan.collectives else ():
        if collective.group_size > 1:
            key = collective.kind, collective.group_size, collective.crosses(plan.slice_ids)
            grouped.setdefault(key, []).append(collective)
    rows = [
        Traffic(*key, len(group), sum(c.count for c in group), sum(c.sent_bytes for c in group))
        for key, group in grouped.items()
    ]
    return sorted(rows, key=lambda row: -row.sent_bytes)
