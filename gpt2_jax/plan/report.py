"""The tables of a plan, and the same for machines."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from gpt2_jax.plan.collectives import Collective
from gpt2_jax.plan.memory import sum_of_parts
from gpt2_jax.plan.plan import Plan, Point
from gpt2_jax.plan.roofline import ASSUMPTIONS
from gpt2_jax.training.config import flat

LARGEST = 6
"""Collectives that are shown one by one."""

_LOOPS = ("step", "while", "body", "closed_call", "cond", "checkpoint", "branch_0_fun", "h.apply_layer", "h", "layers")
"""Parts of JAX's names that say nothing of where in the model they are."""


@dataclass(frozen=True)
class Traffic:
    """Collectives of a kind, over groups of a size; bytes are sent by a device in a step."""

    kind: str
    group_size: int
    crosses_slices: bool
    instructions: int
    count: int
    """How many run in a step."""
    sent_bytes: float


def traffic(plan: Plan) -> list[Traffic]:
    """By kind and group, the most bytes first; those that send nothing, in groups of one, are left out."""
    grouped: dict[tuple[str, int, bool], list[Collective]] = {}
    for one in plan.exchange.collectives if plan.exchange else ():
        if one.group_size > 1:
            grouped.setdefault((one.kind, one.group_size, one.crosses(plan.slices)), []).append(one)
    rows = [
        Traffic(*key, len(those), sum(one.times for one in those), sum(one.sent_bytes for one in those))
        for key, those in grouped.items()
    ]
    return sorted(rows, key=lambda row: -row.sent_bytes)


def show(plan: Plan, out: Console) -> None:
    out.print(_title(plan), soft_wrap=True)
    out.print()
    out.print(_memory(plan))
    out.print(_verdict(plan), soft_wrap=True)
    if plan.exchange is not None and plan.exchange.collectives:
        out.print()
        out.print(_collectives(traffic(plan)))
        out.print()
        out.print(_largest(plan.exchange.collectives))
    for line in _remarks(plan):
        out.print(line, soft_wrap=True)
    if plan.roofline is not None:
        out.print()
        out.print(_times(plan))
        out.print("\nAssumed:")
        for line in ASSUMPTIONS:
            out.print(f"- {line}", soft_wrap=True)


def show_scaling(points: Sequence[Point], out: Console) -> None:
    table = _table("weak scaling", "mesh", "MiB", "s in turn", "overlapped", "MB a link", "MFU in turn", "overlapped")
    without = []
    for point in points:
        plan, line = point.plan, point.plan.roofline if point.plan else None
        if plan is None or line is None:
            without.append(f"{point.topology}: {point.failure if plan is None else _verdict(plan)}")
            continue
        table.add_row(
            point.topology,
            _mesh(plan),
            f"{plan.peak.needed / 2**20:,.0f}",
            f"{line.in_turn:.4g}",
            f"{line.overlapped:.4g}",
            f"{line.link_bytes / 1e6:,.0f}",
            f"{line.mfu(line.in_turn):.1%}",
            f"{line.mfu(line.overlapped):.1%}",
        )
    out.print(table)
    for text in without:
        out.print(text, soft_wrap=True)
    out.print("\nAssumed:")
    for text in ASSUMPTIONS:
        out.print(f"- {text}", soft_wrap=True)


def to_json(plan: Plan) -> dict[str, Any]:
    """Bytes, FLOPs and seconds of one device and step."""
    found = plan.exchange.collectives if plan.exchange else ()
    program = {name: value for name, value in asdict(plan.program).items() if name != "text"}
    return {
        "preset": plan.config.preset,
        "config": flat(plan.config),
        "topology": plan.topology.name,
        "chip": None if plan.topology.chip is None else asdict(plan.topology.chip),
        "devices": len(plan.topology.devices),
        "mesh": plan.mesh,
        "parameters": plan.parameters,
        "state": asdict(plan.state),
        "kept_activations": plan.kept,
        "program": program,
        "sum_of_parts": sum_of_parts(plan.program),
        "peak": plan.peak.needed,
        "available": plan.peak.available,
        "missing": plan.peak.missing,
        "fits": plan.fits,
        "traffic": [asdict(row) for row in traffic(plan)],
        "collectives": [_collective(one) for one in found],
        "uncounted_loops": list(plan.exchange.uncounted_loops) if plan.exchange else [],
        "roofline": None if plan.roofline is None else _roofline(plan),
        "assumptions": list(ASSUMPTIONS),
        "suggestion": None if plan.suggestion is None else _suggestion(plan),
    }


def scaling_to_json(points: Iterable[Point]) -> list[dict[str, Any]]:
    return [
        {
            "chips": point.chips,
            "topology": point.topology,
            "failure": point.failure,
            "plan": None if point.plan is None else to_json(point.plan),
        }
        for point in points
    ]


def _title(plan: Plan) -> str:
    c = plan.config
    return (
        f"{c.preset}: {plan.parameters:,} parameters, {c.batch_size} x {c.seq_len} tokens a step in "
        f"{c.num_microbatches} microbatch{'es' if c.num_microbatches > 1 else ''}, {c.dtype}, attention {c.attention}, "
        f"remat {c.remat}; on "
        f"{plan.topology.name}, {_mesh(plan)}; compiled in {plan.program.seconds:.0f} s"
    )


def _mesh(plan: Plan) -> str:
    sizes = [f"{axis}={size}" for axis, size in plan.mesh.items() if size > 1]
    return ",".join(sizes) or "data=1"


def _memory(plan: Plan) -> Table:
    table = _table("memory of a device", "MiB")
    program, state = plan.program, plan.state
    rows: list[tuple[str, int | None]] = [
        ("parameters", state.parameters),
        ("optimizer's state", state.optimizer),
        ("running mean", state.mean or None),
        ("batch", state.batch),
    ]
    if program.text is not None:
        rows += [
            ("arguments, as the compiler lays them out", program.arguments),
            ("temporaries: activations, gradients, workspace", program.temporaries),
            (f"  of these activations, kept by remat {plan.config.remat}, by arithmetic", plan.kept),
            ("arguments, outputs and temporaries, as if at once", sum_of_parts(program)),
        ]
    rows.append((f"peak{', by the compiler' if program.peak or program.needed else ''}", plan.peak.needed))
    rows.append(("available", plan.peak.available))
    for name, size in rows:
        if size is not None:
            table.add_row(name, _mebibytes(size))
    return table


def _verdict(plan: Plan) -> str:
    where = plan.topology.chip.name if plan.topology.chip else "device"
    if plan.peak.available is None:
        return "no chip is named, so nothing is said of whether it fits"
    needs = f"needs {plan.peak.needed / 2**30:.2f} GiB on each {where}, which has {plan.peak.available / 2**30:.2f}"
    if plan.fits:
        return f"fits: {needs}"
    return f"does not fit: {needs}, so {plan.peak.missing / 2**30:.2f} GiB are missing"


def _collectives(rows: Sequence[Traffic]) -> Table:
    table = _table("collectives of a step", "among", "instructions", "times", "MB a device sends")
    for row in rows:
        name = f"{row.kind}{' across slices' if row.crosses_slices else ''}"
        cells = row.group_size, row.instructions, row.count
        table.add_row(name, *(f"{cell:,}" for cell in cells), f"{row.sent_bytes / 1e6:,.1f}")
    table.add_row("all", "", "", f"{sum(row.count for row in rows):,}", f"{sum(r.sent_bytes for r in rows) / 1e6:,.1f}")
    return table


def _largest(collectives: Sequence[Collective]) -> Table:
    """One by one; those that are the same but for their direction in a ring are one row."""
    merged: dict[tuple[str, str, str], list[Collective]] = {}
    for one in collectives:
        merged.setdefault((one.kind, " ".join(one.operands[:2]), _place(one.source)), []).append(one)
    rows = sorted(merged.items(), key=lambda row: -sum(one.sent_bytes for one in row[1]))[:LARGEST]
    table = _table("the largest", "array", "times", "MB", "for")
    for (kind, arrays, place), those in rows:
        sent = sum(one.sent_bytes for one in those) / 1e6
        table.add_row(kind, arrays, f"{sum(one.times for one in those):,}", f"{sent:,.1f}", place)
    return table


def _place(source: str) -> str:
    """The end of JAX's name, where in the model, and in which pass; what `vmap` runs over devices' rows is the loss."""
    inner = re.sub(r"(jit|jvp|transpose|checkpoint)\(|\)", "", source.replace("vmap()", "loss"))
    names = [name for name in inner.split("/") if name and name not in _LOOPS]
    return f"{'backward: ' if 'transpose' in source else ''}{'/'.join(names[-3:])}"


def _times(plan: Plan) -> Table:
    line = plan.roofline
    assert line is not None
    devices = plan.mesh["data"] * plan.mesh["fsdp"] * plan.mesh["tensor"]
    tokens = plan.config.batch_size * plan.config.seq_len
    per = f"{devices} device{'s' if devices > 1 else ''}"
    table = _table(f"estimate of a step, {tokens:,} tokens on {per}", "of each", "seconds", "MFU", "tokens/s")
    table.add_row("arithmetic of the model", f"{line.flops / 1e12:,.2f} TFLOP", f"{line.flops / line.peak:.4g}")
    if line.recomputed:
        again = line.recomputed
        table.add_row("computed again by remat", f"{again / 1e12:,.2f} TFLOP", f"{again / line.peak:.4g}")
    table.add_row("memory", f"{line.hbm_bytes / 1e9:,.1f} GB", f"{line.hbm:.4g}")
    exchanged = f"{line.link_bytes / 1e9:,.2f} GB a link"
    if line.network_bytes:
        exchanged += f", {line.network_bytes / 1e9:,.2f} GB over the network"
    table.add_row("communication", exchanged, f"{line.communication:.4g}")
    for name, seconds in (("overlapped", line.overlapped), ("in turn", line.in_turn)):
        speed = tokens / seconds
        table.add_row(f"step, {name}", "", f"{seconds:.4g}", f"{line.mfu(seconds):.0%}", f"{speed:,.0f}")
    return table


def _remarks(plan: Plan) -> list[str]:
    lines = []
    if plan.exchange is not None and plan.exchange.uncounted_loops:
        names = ", ".join(plan.exchange.uncounted_loops)
        lines.append(f"counted once, for the program does not say how often they run: the loops {names}")
    if plan.suggestion is not None:
        line, sizes = plan.suggestion.roofline, plan.suggestion.needed / 2**30
        lines.append(
            f"by arithmetic alone, not compiled, the fastest that fits: {plan.suggestion.flags} "
            f"({line.in_turn:.4g} s in turn, {sizes:.1f} GiB)"
        )
    elif plan.topology.chip is not None:
        lines.append("by arithmetic, no mesh of these devices has room for this; take more devices, or --remat full")
    return lines


def _roofline(plan: Plan) -> dict[str, Any]:
    line = plan.roofline
    assert line is not None
    return {
        **asdict(line),
        "seconds_overlapped": line.overlapped,
        "seconds_in_turn": line.in_turn,
        "mfu_overlapped": line.mfu(line.overlapped),
        "mfu_in_turn": line.mfu(line.in_turn),
    }


def _suggestion(plan: Plan) -> dict[str, Any]:
    made = plan.suggestion
    assert made is not None
    return {
        "flags": made.flags,
        "mesh": dict(made.mesh),
        "batch_size": made.batch_size,
        "num_microbatches": made.num_microbatches,
        "needed": made.needed,
        "seconds_in_turn": made.roofline.in_turn,
    }


def _collective(one: Collective) -> dict[str, Any]:
    return {
        "kind": one.kind,
        "operands": list(one.operands),
        "group_size": one.group_size,
        "times": one.times,
        "sent_bytes": one.sent_bytes,
        "source": one.source,
    }


def _table(title: str, *headings: str) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column(title, no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="left" if heading in ("array", "for", "mesh") else "right", no_wrap=True)
    return table


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:,.1f}"
