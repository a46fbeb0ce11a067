"""The report of `gpt2 plan` as tables."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from gpt2_jax.plan.communication.collectives import Collective
from gpt2_jax.plan.communication.traffic import Traffic, traffic
from gpt2_jax.plan.memory import peak_upper_bound
from gpt2_jax.plan.plan import Plan, ScalingPoint
from gpt2_jax.plan.roofline import ASSUMPTIONS, Roofline

NUM_LARGEST = 6
"""Number of collectives that are listed individually."""

_WRAPPERS = (
    "step",
    "while",
    "body",
    "closed_call",
    "cond",
    "checkpoint",
    "branch_0_fun",
    "h.apply_layer",
    "h",
    "layers",
)
"""Parts of JAX's operation names that do not identify a part of the model."""


def show(plan: Plan, out: Console) -> None:
    """Print the plan of one topology."""
    out.print(_title(plan), soft_wrap=True)
    out.print()
    out.print(_memory_table(plan))
    out.print(_fit(plan), soft_wrap=True)
    if plan.collectives is not None and plan.collectives.instructions:
        out.print()
        out.print(_traffic_table(traffic(plan)))
        out.print()
        out.print(_largest_table(plan.collectives.instructions))
    for line in _remarks(plan):
        out.print(line, soft_wrap=True)
    if plan.roofline is not None:
        out.print()
        out.print(_time_table(plan, plan.roofline))
        _show_assumptions(out)


def show_scaling(points: Sequence[ScalingPoint], out: Console) -> None:
    """Print the plans of weak scaling, one row per size."""
    table = _table("weak scaling", "mesh", "MiB", "s serial", "overlapped", "MB per link", "MFU serial", "overlapped")
    unplanned = []
    for point in points:
        plan, line = point.plan, point.plan.roofline if point.plan else None
        if plan is None or line is None:
            unplanned.append(f"{point.topology}: {point.failure if plan is None else _fit(plan)}")
            continue
        table.add_row(
            point.topology,
            _mesh(plan),
            f"{plan.peak.needed / 2**20:,.0f}",
            f"{line.serial_seconds:.4g}",
            f"{line.overlapped_seconds:.4g}",
            f"{line.link_bytes / 1e6:,.0f}",
            f"{line.mfu(line.serial_seconds):.1%}",
            f"{line.mfu(line.overlapped_seconds):.1%}",
        )
    out.print(table)
    for text in unplanned:
        out.print(text, soft_wrap=True)
    _show_assumptions(out)


def _show_assumptions(out: Console) -> None:
    out.print("\nAssumptions:")
    for text in ASSUMPTIONS:
        out.print(f"- {text}", soft_wrap=True)


def _title(plan: Plan) -> str:
    c = plan.config
    return (
        f"{c.preset}: {plan.num_parameters:,} parameters, {c.batch_size} x {c.seq_len} tokens per step in "
        f"{c.num_microbatches} microbatch{'es' if c.num_microbatches > 1 else ''}, {c.dtype}, attention {c.attention}, "
        f"remat {c.remat}; on {plan.topology.name}, {_mesh(plan)}; compiled in {plan.program.compile_seconds:.0f} s"
    )


def _mesh(plan: Plan) -> str:
    sizes = [f"{axis}={size}" for axis, size in plan.mesh.items() if size > 1]
    return ",".join(sizes) or "data=1"


def _memory_table(plan: Plan) -> Table:
    table = _table("memory per device", "MiB")
    program, state = plan.program, plan.state
    rows: list[tuple[str, int | None]] = [
        ("parameters", state.parameters),
        ("frozen parameters", state.frozen or None),
        ("optimizer state", state.optimizer),
        ("moving average of parameters", state.ema or None),
        ("batch", state.batch),
    ]
    if program.text is not None:
        rows += [
            ("arguments, in the compiler's layout", program.argument_bytes),
            ("temporaries: activations, gradients, workspace", program.temp_bytes),
            (f"  activations saved with remat {plan.config.remat}, estimated", plan.saved_activation_bytes),
            ("upper bound: arguments, outputs and temporaries", peak_upper_bound(program)),
        ]
    by_compiler = program.peak_bytes or program.required_bytes
    rows.append((f"peak{', reported by the compiler' if by_compiler else ''}", plan.peak.needed))
    rows.append(("available", plan.peak.available))
    for name, size in rows:
        if size is not None:
            table.add_row(name, f"{size / 2**20:,.1f}")
    return table


def _fit(plan: Plan) -> str:
    """Whether the step fits into memory."""
    device = plan.topology.chip.name if plan.topology.chip else "device"
    if plan.peak.available is None:
        return "no chip is given, so whether the step fits is unknown"
    needs = f"needs {plan.peak.needed / 2**30:.2f} GiB on each {device}, which has {plan.peak.available / 2**30:.2f}"
    if plan.fits:
        return f"fits: {needs}"
    return f"does not fit: {needs}; {plan.peak.missing / 2**30:.2f} GiB are missing"


def _traffic_table(rows: Sequence[Traffic]) -> Table:
    table = _table("collectives per step", "group size", "instructions", "count", "MB sent per device")
    for row in rows:
        name = f"{row.kind}{' between slices' if row.crosses_slices else ''}"
        cells = row.group_size, row.instructions, row.count
        table.add_row(name, *(f"{cell:,}" for cell in cells), f"{row.sent_bytes / 1e6:,.1f}")
    count, sent_bytes = sum(row.count for row in rows), sum(row.sent_bytes for row in rows)
    table.add_row("total", "", "", f"{count:,}", f"{sent_bytes / 1e6:,.1f}")
    return table


def _largest_table(collectives: Sequence[Collective]) -> Table:
    """The largest collectives. Those that differ only in their direction around a ring share a row."""
    merged: dict[tuple[str, str, str], list[Collective]] = {}
    for collective in collectives:
        key = collective.kind, " ".join(collective.operands[:2]), _module(collective.op_name)
        merged.setdefault(key, []).append(collective)
    rows = sorted(merged.items(), key=lambda row: -sum(c.sent_bytes for c in row[1]))[:NUM_LARGEST]
    table = _table("largest collectives", "array", "count", "MB", "module")
    for (kind, arrays, module), group in rows:
        sent_bytes = sum(c.sent_bytes for c in group)
        table.add_row(kind, arrays, f"{sum(c.count for c in group):,}", f"{sent_bytes / 1e6:,.1f}", module)
    return table


def _module(op_name: str) -> str:
    """The end of JAX's operation name, which identifies the module and the pass.

    The loss is the only part of the step that uses `vmap` with an empty name.
    """
    inner = re.sub(r"(jit|jvp|transpose|checkpoint)\(|\)", "", op_name.replace("vmap()", "loss"))
    names = [name for name in inner.split("/") if name and name not in _WRAPPERS]
    return f"{'backward: ' if 'transpose' in op_name else ''}{'/'.join(names[-3:])}"


def _time_table(plan: Plan, line: Roofline) -> Table:
    tokens = plan.config.batch_size * plan.config.seq_len
    devices = f"{plan.num_devices} device{'s' if plan.num_devices > 1 else ''}"
    table = _table(f"estimated step of {tokens:,} tokens on {devices}", "per device", "seconds", "MFU", "tokens/s")
    table.add_row("computation", f"{line.flops / 1e12:,.2f} TFLOP", f"{line.flops / line.peak_flops:.4g}")
    if line.recomputed_flops:
        seconds = line.recomputed_flops / line.peak_flops
        table.add_row("recomputation by remat", f"{line.recomputed_flops / 1e12:,.2f} TFLOP", f"{seconds:.4g}")
    table.add_row("HBM", f"{line.hbm_bytes / 1e9:,.1f} GB", f"{line.hbm_seconds:.4g}")
    sent = f"{line.link_bytes / 1e9:,.2f} GB per link"
    if line.network_bytes:
        sent += f", {line.network_bytes / 1e9:,.2f} GB over the network"
    table.add_row("communication", sent, f"{line.communication_seconds:.4g}")
    for name, seconds in (("overlapped", line.overlapped_seconds), ("serial", line.serial_seconds)):
        table.add_row(f"step, {name}", "", f"{seconds:.4g}", f"{line.mfu(seconds):.0%}", f"{tokens / seconds:,.0f}")
    return table


def _remarks(plan: Plan) -> list[str]:
    lines = []
    if plan.collectives is not None and plan.collectives.uncounted_loops:
        names = ", ".join(plan.collectives.uncounted_loops)
        lines.append(f"loops with an unknown number of iterations, counted once: {names}")
    if plan.suggestion is not None:
        seconds, memory = plan.suggestion.roofline.serial_seconds, plan.suggestion.memory_bytes / 2**30
        lines.append(
            f"fastest mesh that fits, estimated without compiling: {plan.suggestion.flags} "
            f"({seconds:.4g} s serial, {memory:.1f} GiB)"
        )
    elif plan.topology.chip is not None:
        lines.append("no mesh of these devices is estimated to fit; use more devices or --remat full")
    return lines


def _table(title: str, *headings: str) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column(title, no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="left" if heading in ("array", "module", "mesh") else "right", no_wrap=True)
    return table
