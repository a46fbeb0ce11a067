"""GPT-2 as a Flax NNX module, which calls the Linen model with its own parameters.

`flax.nnx.bridge.ToNNX` also turns a Linen module into one of NNX. It is not used, because it ignores `train()` and
`eval()`, and draws from its random streams in every call.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from bridge import GPT2Config
from gpt2_jax import loading, model

__all__ = ["GPT2"]


class GPT2(nnx.Module):
    """`gpt2_jax.GPT2` as an NNX module. Its parameters have the same names: `model.h_0.attn.c_attn.kernel`.

    A new module is in eval mode: dropout is off until `train()` is called.

    Attributes:
        linen: the Linen model.
        deterministic: whether dropout is off.
    """

    def __init__(
        self,
        config: GPT2Config,
        *,
        rngs: nnx.Rngs | None = None,
        params: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        """
        Args:
            rngs: draws random parameters from the stream `params`.
            params: the parameters of a Linen model, instead of random ones.
            **options: the other attributes of `gpt2_jax.GPT2`, such as `dtype` and `scan`.
        """
        if (rngs is None) == (params is None):
            raise ValueError("pass either rngs, for random parameters, or params")
        self.linen: model.GPT2 = model.GPT2(config, **options)
        self.deterministic = True
        if rngs is not None:
            params = self.linen.init(rngs.params(), jnp.zeros((1, 1), jnp.int32))["params"]
        for name, value in dict(params or {}).items():
            setattr(self, name, _variables(value))

    @classmethod
    def from_params(cls, linen: model.GPT2, params: Mapping[str, Any]) -> GPT2:
        """Return the NNX module for a Linen model and its parameters."""
        options = {f.name: getattr(linen, f.name) for f in fields(linen) if f.name not in ("config", "parent", "name")}
        return cls(linen.config, params=params, **options)

    @classmethod
    def from_pretrained(cls, source: str | Path, **options: Any) -> GPT2:
        """Load a model from a checkpoint in any format or a Hugging Face id; see `gpt2_jax.from_pretrained`."""
        return cls.from_params(*loading.from_pretrained(source, **options))

    @property
    def params(self) -> dict[str, Any]:
        """The tree of parameters, for the Linen model, `bridge.to_torch` and `gpt2_jax.checkpoint_from_params`."""
        return nnx.to_pure_dict(nnx.state(self, nnx.Param))

    def __call__(
        self,
        input_ids: Int[Array, "B T"] | None = None,
        attention_mask: Int[Array, "B T"] | None = None,
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        position_ids: Int[Array, "B T"] | None = None,
        inputs_embeds: Float[Array, "B T D"] | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "B T V"]:
        """Return the logits of the next token after each position. Arguments are those of `gpt2_jax.GPT2`.

        Args:
            rngs: has the stream `dropout`, which training mode needs if a dropout rate is above 0.
        """
        c = self.linen.config
        drops = not self.deterministic and max(c.embd_pdrop, c.attn_pdrop, c.resid_pdrop) > 0
        if drops and rngs is None:
            raise ValueError("training mode applies dropout: pass rngs=nnx.Rngs(dropout=...), or call eval()")
        logits: Any = self.linen.apply(
            {"params": self.params},
            input_ids,
            attention_mask,
            segment_ids=segment_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            deterministic=not drops,
            rngs={"dropout": rngs.dropout()} if drops and rngs is not None else {},
        )
        return logits


def _variables(tree: Any) -> Any:
    """Return the tree with a `Param` for each array."""
    if isinstance(tree, Mapping):
        return nnx.Dict({name: _variables(value) for name, value in tree.items()})
    return nnx.Param(jnp.asarray(tree))
