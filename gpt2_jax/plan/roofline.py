"""How long a step takes at the least, by what the chip can do: an estimate, whose assumptions are spelled out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gpt2_jax.hardware import TpuChip, flops_per_token
from gpt2_jax.plan.collectives import Exchange
from gpt2_jax.plan.memory import WIDTH, State, kept_bytes, layer_parameters
from gpt2_jax.training import TrainConfig

RING_LINKS = 2
"""Links of a chip that a collective uses: a ring has two neighbours, and data goes both ways round."""

ASSUMPTIONS = (
    "matrix products run at the data sheet's peak, and nothing waits for anything else: no step is faster",
    "FLOPs are 6 N + 12 L D T a token, N without the position embedding; causality is not subtracted (PaLM, appendix "
    "B), although the splash kernel leaves out half of the scores; MFU is relative to these, remat's not among them",
    "HBM: each part reads the layers' weights twice and writes and reads kept activations once, adds to float32 "
    "gradients, and the optimizer reads and writes its state once; what stays on the chip is not counted",
    f"collectives run in rings at the full rate of {RING_LINKS} links a chip, one in each direction, without delay; "
    "an axis that spans no full ring of a torus gets less",
    "what crosses slices runs at the hosts' share of the network for each chip",
    "overlapped: all communication hides behind the arithmetic, or it behind that; in turn: none does",
    "the loss has 256 MiB of logits at a time, as on a chip of 16 GiB; a larger one would take 1/64 of its memory",
    "reading data, evaluation, checkpoints and the start of a program take no time",
)


@dataclass(frozen=True)
class Roofline:
    """Seconds of a step, FLOPs and bytes of a device."""

    flops: float
    """Of the model, as MFU counts them."""
    recomputed: float
    """That remat makes again."""
    hbm_bytes: float
    link_bytes: float
    """That each of the ring's links carries in its direction."""
    network_bytes: float
    """That cross slices."""
    compute: float
    hbm: float
    communication: float
    peak: float
    """FLOP/s of the chip."""

    @property
    def overlapped(self) -> float:
        return max(self.compute, self.hbm, self.communication)

    @property
    def in_turn(self) -> float:
        return max(self.compute, self.hbm) + self.communication

    def mfu(self, seconds: float) -> float:
        return self.flops / self.peak / seconds


def roofline(
    config: TrainConfig, mesh: dict[str, int], state: State, found: Exchange, slices: Sequence[int], chip: TpuChip
) -> Roofline:
    """Of a step on a mesh of devices that lie in these slices."""
    across = [one for one in found.collectives if one.crosses(slices)]
    network = sum(one.sent_bytes for one in across)
    links = (sum(one.sent_bytes for one in found.collectives) - network) / RING_LINKS
    return estimate(config, mesh, state, links, network, chip)


def estimate(
    config: TrainConfig, mesh: dict[str, int], state: State, link_bytes: float, network_bytes: float, chip: TpuChip
) -> Roofline:
    flops, again = step_flops(config, mesh)
    moved = hbm_bytes(config, mesh, state)
    return Roofline(
        flops,
        again,
        moved,
        link_bytes,
        network_bytes,
        compute=(flops + again) / chip.flops,
        hbm=moved / chip.hbm_bandwidth,
        communication=link_bytes / chip.link_bandwidth + network_bytes / chip.network_bandwidth,
        peak=chip.flops,
    )


def step_flops(config: TrainConfig, mesh: dict[str, int]) -> tuple[float, float]:
    """Of a device: the model's, and those of what `--remat full` computes again, which is a layer's forward pass.

    `dots` computes norms and activations again, which are no matrix products.
    """
    devices = mesh["data"] * mesh["fsdp"] * mesh["tensor"]
    tokens = config.batch_size * config.seq_len / devices
    c = config.model
    forward = 2 * layer_parameters(config) + 4 * c.n_layer * c.n_embd * config.seq_len
    return tokens * flops_per_token(c, config.seq_len), tokens * forward if config.remat == "full" else 0.0


def hbm_bytes(config: TrainConfig, mesh: dict[str, int], state: State) -> float:
    """That a device reads and writes in a step at the least; see `ASSUMPTIONS`."""
    gathered = layer_parameters(config) * WIDTH[config.dtype] / mesh["tensor"]
    own_gradients = state.parameters
    part = (
        2 * gathered
        + 2 * kept_bytes(config, mesh)
        + (2 * own_gradients if config.num_microbatches > 1 else own_gradients)
    )
    return config.num_microbatches * part + 2 * (state.parameters + state.optimizer + state.mean) + own_gradients
