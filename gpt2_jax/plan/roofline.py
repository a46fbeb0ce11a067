"""Lower bound of a step's time from the chip's rates, with its assumptions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gpt2_jax.hardware import TpuChip, flops_per_token
from gpt2_jax.plan.communication.collectives import Collectives
from gpt2_jax.plan.memory import DTYPE_BYTES, StateBytes, layer_parameters, saved_activation_bytes
from gpt2_jax.training import TrainConfig

RING_LINKS = 2
"""Links of a chip that a collective uses. In a ring, data travels in both directions, to two neighbours."""

ASSUMPTIONS = (
    "matrix products run at the data sheet's peak and never wait, so the time is a lower bound",
    "FLOPs are 6 N + 12 L D T per token, N without the position embedding; causality is not subtracted (PaLM, appendix "
    "B), although the splash kernel skips half of the scores; MFU refers to these FLOPs, without those of remat",
    "HBM: each microbatch reads the layers' weights twice, writes and reads saved activations once, and adds to "
    "float32 gradients; the optimizer reads and writes its state once; data that stays on the chip is not counted",
    f"collectives run in rings at the full rate of {RING_LINKS} links per chip, one in each direction, without "
    "latency; an axis that does not span a full ring of a torus is slower",
    "communication between slices runs at each chip's share of the hosts' network",
    "overlapped: communication and computation fully overlap; serial: they do not overlap at all",
    "the loss computes 256 MiB of logits at a time, as on a chip of 16 GiB; larger chips use 1/64 of their memory",
    "reading data, evaluation, checkpoints and start-up take no time",
)


@dataclass(frozen=True)
class Roofline:
    """FLOPs, bytes and seconds of one device and step."""

    flops: float
    """FLOPs of the model, which MFU counts."""
    recomputed_flops: float
    """FLOPs that remat repeats."""
    hbm_bytes: float
    link_bytes: float
    """Bytes on each link of the ring, in one direction."""
    network_bytes: float
    """Bytes between slices."""
    compute_seconds: float
    hbm_seconds: float
    communication_seconds: float
    peak_flops: float
    """The chip's peak, in FLOP/s."""

    @property
    def overlapped_seconds(self) -> float:
        return max(self.compute_seconds, self.hbm_seconds, self.communication_seconds)

    @property
    def serial_seconds(self) -> float:
        return max(self.compute_seconds, self.hbm_seconds) + self.communication_seconds

    def mfu(self, seconds: float) -> float:
        """Model FLOPs utilization of a step that takes this long."""
        return self.flops / self.peak_flops / seconds


def program_roofline(
    config: TrainConfig,
    mesh: Mapping[str, int],
    state: StateBytes,
    collectives: Collectives,
    slice_ids: Sequence[int],
    chip: TpuChip,
) -> Roofline:
    """The roofline of a compiled step. `slice_ids` has the slice of every device, in the order of the mesh."""
    network = sum(c.sent_bytes for c in collectives.instructions if c.crosses(slice_ids))
    links = (sum(c.sent_bytes for c in collectives.instructions) - network) / RING_LINKS
    return roofline(config, mesh, state, links, network, chip)


def roofline(
    config: TrainConfig,
    mesh: Mapping[str, int],
    state: StateBytes,
    link_bytes: float,
    network_bytes: float,
    chip: TpuChip,
) -> Roofline:
    """The roofline of a step with this much communication."""
    flops, recomputed_flops = step_flops(config, mesh, state.parameters / (state.parameters + state.frozen))
    hbm = hbm_bytes(config, mesh, state)
    return Roofline(
        flops=flops,
        recomputed_flops=recomputed_flops,
        hbm_bytes=hbm,
        link_bytes=link_bytes,
        network_bytes=network_bytes,
        compute_seconds=(flops + recomputed_flops) / chip.flops,
        hbm_seconds=hbm / chip.hbm_bandwidth,
        communication_seconds=link_bytes / chip.link_bandwidth + network_bytes / chip.network_bandwidth,
        peak_flops=chip.flops,
    )


def step_flops(config: TrainConfig, mesh: Mapping[str, int], trained: float = 1.0) -> tuple[float, float]:
    """FLOPs of one device and step: those of the model, and those that remat repeats.

    `full` repeats the forward pass of each layer. `dots` repeats norms and activation functions, whose FLOPs are not
    counted. `trained` is the fraction of the weights that have gradients.
    """
    devices = mesh["data"] * mesh["fsdp"] * mesh["tensor"]
    tokens = config.batch_size * config.seq_len / devices
    c = config.model
    forward = 2 * layer_parameters(config) + 4 * c.n_layer * c.n_embd * config.seq_len
    return tokens * flops_per_token(c, config.seq_len, trained), tokens * forward if config.remat == "full" else 0.0


def hbm_bytes(config: TrainConfig, mesh: Mapping[str, int], state: StateBytes) -> float:
    """Minimum number of bytes that a device reads and writes per step; see `ASSUMPTIONS`."""
    weights = layer_parameters(config) * DTYPE_BYTES[config.dtype] / mesh["tensor"]
    gradients = state.parameters  # both are float32 and sharded alike
    gradient_traffic = 2 * gradients if config.num_microbatches > 1 else gradients
    per_microbatch = 2 * weights + 2 * saved_activation_bytes(config, mesh) + gradient_traffic
    update = 2 * (state.parameters + state.optimizer + state.ema) + gradients
    return config.num_microbatches * per_microbatch + update
