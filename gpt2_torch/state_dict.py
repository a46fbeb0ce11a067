"""Loading state_dicts whose names have other tools' prefixes, or that hold more than the parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import bridge


def canonicalize_names(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Rename the entries of `state_dict` in place and remove those that `module` does not have.

    A pre-hook for `load_state_dict`. It removes causal-mask buffers, and a tied `lm_head.weight` that equals
    `wte.weight`. A tied `lm_head.weight` that differs stays, so that `load_state_dict` reports it as unexpected.
    """
    own = {name.removeprefix(prefix): name for name in state_dict if name.startswith(prefix)}
    renamed = {name: state_dict[own[given]] for name, given in bridge.canonical_names(own).items()}
    head, embedding = renamed.get("lm_head.weight"), renamed.get("wte.weight")
    if getattr(module, "lm_head", None) is None and head is not None and embedding is not None:
        if _same_bytes(head, embedding):
            del renamed["lm_head.weight"]
    for name in own.values():
        del state_dict[name]
    state_dict.update({prefix + name: tensor for name, tensor in renamed.items()})


def _same_bytes(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal bit for bit, so that NaN equals itself."""
    return a.dtype == b.dtype and torch.equal(*(x.detach().contiguous().view(torch.uint8) for x in (a, b)))
