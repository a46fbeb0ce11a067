"""The settings of a LoRA adapter. Imports no JAX."""

from __future__ import annotations

import math
from dataclasses import dataclass

PROJECTIONS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
"""The modules of a layer that an adapter can change."""
ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class LoRAConfig:
    """A LoRA adapter: W is replaced by W + s A B, with A `[in, r]`, B `[r, out]` and s = alpha / r.

    Sources: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models"; PEFT's `LoraConfig`, whose terms and
    defaults these are.
    """

    rank: int = 8
    """r: the rank of each update. 0 trains all weights instead of an adapter."""
    alpha: float = 16.0
    """The numerator of the scaling s = alpha / rank."""
    targets: str = "c_attn"
    """The modules that get an update, separated by commas: c_attn, attn.c_proj, c_fc, mlp.c_proj; c_proj for
    attn.c_proj and mlp.c_proj; or all-linear."""
    dropout: float = 0.0
    """The dropout rate of the input of A."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) (Kalajdzievski 2023)."""

    @property
    def scaling(self) -> float:
        """s: the factor of A B."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @property
    def modules(self) -> tuple[str, ...]:
        """The modules of a layer that the targets name, in the order of `PROJECTIONS`."""
        names = self.target_names
        return tuple(m for m in PROJECTIONS if ALL_LINEAR in names or {m, m.partition(".")[2]} & {*names})

    @property
    def target_names(self) -> tuple[str, ...]:
        """The names in `targets`."""
        return tuple(name.strip() for name in self.targets.split(","))

    @property
    def unknown_targets(self) -> tuple[str, ...]:
        """The names in `targets` that name no module."""
        known = {ALL_LINEAR, *PROJECTIONS, *(module.partition(".")[2] for module in PROJECTIONS)}
        return tuple(name for name in self.target_names if name not in known)
