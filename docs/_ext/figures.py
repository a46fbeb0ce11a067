"""Draw the figures and the report of the manual from the code into `_generated/`, before the pages are read."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import jax
import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch
from sphinx.application import Sphinx

import bridge
from gpt2_jax.parallel.sharding import make_mesh
from gpt2_jax.parity import verify
from gpt2_jax.plan.compiled import describe_step
from gpt2_jax.plan.suggest import can_shard, estimated_memory, possible_meshes, state_bytes_on
from gpt2_jax.training import PRESETS

TORCH, JAX, BRIDGE, FILES = "#fde0cf", "#d5e8f7", "#e3f1d8", "#eeeeee"


def architecture(file: Path) -> None:
    """Draw the three packages and what crosses between them."""
    figure, axes = plt.subplots(figsize=(9, 4.6))
    axes.set(xlim=(0, 12), ylim=(0, 6.4))
    axes.axis("off")
    formats = "Hugging Face · nanoGPT · llm.c · GGUF · flax_model.msgpack · OpenAI's TensorFlow files"
    _box(axes, 0.4, 5.3, 11.2, 0.8, formats, FILES)
    _box(
        axes,
        2.2,
        3.3,
        7.6,
        1.2,
        "bridge\none table of parameters: names, shapes, both directions\nno framework",
        BRIDGE,
    )
    _box(axes, 0.4, 0.7, 4.2, 1.4, "gpt2_torch\nPyTorch, the reference", TORCH)
    _box(axes, 7.4, 0.7, 4.2, 1.4, "gpt2_jax\nFlax Linen, pure functions, jit", JAX)
    _arrow(axes, (6, 5.3), (6, 4.5), "bridge.load", "bridge.save")
    _arrow(axes, (3.2, 3.3), (2.5, 2.1), "state_dict", "")
    _arrow(axes, (8.8, 3.3), (9.5, 2.1), "", "parameter tree")
    _arrow(axes, (4.6, 1.4), (7.4, 1.4), "", "")
    axes.text(6, 1.55, "gpt2 verify", ha="center", va="bottom", family="monospace", fontsize=9)
    axes.text(6, 1.25, "logits, hidden states,\ngradients, AdamW steps", ha="center", va="top", fontsize=8.5)
    axes.text(9.5, 0.35, "gpt2 train, your own optax loop", ha="center", fontsize=8.5)
    _save(figure, file)


def _box(axes: Axes, x: float, y: float, width: float, height: float, text: str, color: str) -> None:
    box = FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0.05", facecolor=color, edgecolor="#555555")
    axes.add_patch(box)
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=10)


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], left: str, right: str) -> None:
    axes.annotate("", end, start, arrowprops={"arrowstyle": "<->", "color": "#333333"})
    x, y = (start[0] + end[0]) / 2, (start[1] + end[1]) / 2
    axes.text(x - 0.2, y, left, ha="right", va="center", fontsize=9)
    axes.text(x + 0.2, y, right, ha="left", va="center", fontsize=9)


def loss_curve(file: Path) -> None:
    """Draw the losses of the bundled model's run."""
    lines = (bridge.BUNDLED / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    figure, axes = plt.subplots(figsize=(7, 3.4))
    for name, style, label in (("train_loss", "-", "training"), ("val_loss", "o-", "validation")):
        points = [(r["step"], r[name]) for r in records if name in r]
        axes.plot(*zip(*points, strict=True), style, label=label, linewidth=1.2, markersize=4)
    axes.set(xlabel="step", ylabel="loss, nats per token")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    _save(figure, file)


def memory_by_mesh(file: Path) -> None:
    """Draw the memory that a training step of 774M parameters needs on each of eight devices, for every mesh."""
    config = replace(PRESETS["gpt2-large"], num_microbatches=10)
    one = replace(config, batch_size=1, num_microbatches=1)
    state = describe_step(one, make_mesh("data=1", jax.devices()[:1])).state
    meshes = [mesh for mesh in possible_meshes(8) if can_shard(state, mesh)]
    names, parts = [], []
    for mesh in meshes:
        sizes = state_bytes_on(config, state, mesh)
        rest = estimated_memory(config, mesh, sizes) - sizes.total
        names.append(",".join(f"{axis}={size}" for axis, size in mesh.items() if size > 1))
        parts.append((sizes.parameters, sizes.optimizer, rest))
    figure, axes = plt.subplots(figsize=(7, 3.2))
    left = [0.0] * len(names)
    labels = ("parameters", "optimizer state", "gradients, activations, logits")
    for part, label in zip(zip(*parts, strict=True), labels, strict=True):
        widths = [size / 2**30 for size in part]
        axes.barh(names, widths, left=left, label=label)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("GiB per device")
    axes.legend(frameon=False)
    _save(figure, file)


def parity_report(file: Path) -> None:
    """Write the report of `gpt2 verify bundled --html`, without the checks that have no plots."""
    checks = ("logits", "hidden-states", "gradients", "training", "padding", "round-trip")
    report = verify(bridge.load("bundled"), source="bundled", seq_len=64, checks=checks)
    file.write_text(report.to_html(), encoding="utf-8")


def _save(figure: plt.Figure, file: Path) -> None:
    # Fixed ids and no date, so that every build writes the same bytes.
    with plt.rc_context({"svg.hashsalt": file.name}):
        figure.savefig(file, bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)


FIGURES = {
    "architecture.svg": architecture,
    "loss.svg": loss_curve,
    "memory-by-mesh.svg": memory_by_mesh,
    "extra/parity-of-bundled.html": parity_report,
}


def _draw(app: Sphinx) -> None:
    directory = Path(app.srcdir) / "_generated"
    for name, draw in FIGURES.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        draw(directory / name)


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("builder-inited", _draw)
    return {"parallel_read_safe": True}
