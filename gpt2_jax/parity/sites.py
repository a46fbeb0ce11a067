"""The places inside a forward pass where the two backends can be compared, by their common names.

A site is named after the PyTorch module whose output it is (`h.3.attn.c_attn`). Two more stand
between modules, as what goes into a projection: `h.3.attn.context` (attention: scores, mask, softmax,
values) and `h.3.mlp.activation`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

HEAD = "head"
"""The site of the logits."""

_OUTPUTS = re.compile(r"wte|wpe|drop|h\.\d+(\.(ln_1|attn\.c_attn|attn\.c_proj|ln_2|mlp\.c_fc|mlp\.c_proj))?|ln_f")

Trace = dict[str, np.ndarray]
"""Site -> value in float64, in the order of the forward pass."""


def is_output_site(name: str) -> bool:
    """Whether what the module of this name returns is compared."""
    return _OUTPUTS.fullmatch(name) is not None


def input_site(name: str) -> str | None:
    """The site of what goes into the module of this name, if that is compared."""
    if name.endswith(".attn.c_proj"):
        return name.removesuffix("c_proj") + "context"
    if name.endswith(".mlp.c_proj"):
        return name.removesuffix("c_proj") + "activation"
    return None


def torch_name(flax_path: tuple[str, ...]) -> str:
    """`("h_3", "attn", "c_attn")` -> `"h.3.attn.c_attn"`."""
    return re.sub(r"\bh_(\d+)", r"h.\1", ".".join(flax_path))


def distances(reference: Mapping[str, np.ndarray], port: Trace, real: np.ndarray) -> dict[str, float]:
    """Per site, the largest difference over the largest value, at the tokens where `real` is True.

    A site that the port never reached, or reached in another shape or as NaN, is infinitely far.
    """
    result = {}
    for site, expected in reference.items():
        found = port.get(site)
        if found is None or found.shape != expected.shape:
            result[site] = float("inf")
            continue
        result[site] = relative_distance(_at_tokens(found, real), _at_tokens(expected, real))
    return result


def relative_distance(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference over the largest value expected."""
    return relative(float(np.abs(found - expected).max()), float(np.abs(expected).max()))


def relative(difference: float, scale: float) -> float:
    """Their quotient; 0 where nothing differs, infinity where a NaN does."""
    if np.isnan(difference) or np.isnan(scale):
        return float("inf")
    return difference / max(scale, float(np.finfo(np.float64).tiny))


def _at_tokens(x: np.ndarray, real_BT: np.ndarray) -> np.ndarray:
    """The rows of real tokens, of an array whose batch and time axes are the two after any leading 3."""
    if x.ndim == 5:  # queries, keys and values: [3, B, T, H, K]
        return x[:, real_BT]
    return np.broadcast_to(x, (*real_BT.shape, *x.shape[2:]))[real_BT]  # wpe comes as [1, T, D]
