"""GPT-2 with a head that classifies sequences, as transformers' `GPT2ForSequenceClassification`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from bridge import GPT2Config, SequenceClassifier
from gpt2_jax.loading import to_device
from gpt2_jax.model import GPT2, Projection


class GPT2ForSequenceClassification(nn.Module):
    """A GPT-2, and a matrix that maps the hidden state of the last token to the logits of the labels.

    The parameter tree is that of `bridge.SequenceClassifier.to_flax`.

    Attributes:
        pad_token_id: the id of padding on either side of a sequence, or None if sequences are not padded.
        dtype: the dtype of the computation and the logits.
        param_dtype: the dtype of the parameters that `init` creates.
    """

    config: GPT2Config
    num_labels: int
    pad_token_id: int | None = None
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        c = self.config
        self.transformer: GPT2 = GPT2(c, self.dtype, self.param_dtype)
        shape = (c.n_embd, self.num_labels)
        self.score: Projection = Projection(shape, c.initializer_range, 1, False, self.dtype, self.param_dtype)

    def __call__(self, input_ids: Int[Array, "B T"], *, deterministic: bool = True) -> Float[Array, "B C"]:
        """Return the logits of the labels, from the last token of each row that is not padding.

        Args:
            deterministic: False applies dropout; see `GPT2`.

        Raises `ValueError` for several rows without a `pad_token_id`, as transformers does.
        """
        B, T = input_ids.shape
        if self.pad_token_id is None:
            if B > 1:
                raise ValueError(
                    "several rows need a pad_token_id, because rows may have different lengths; set it in config.json"
                )
            last_B = jnp.full(B, T - 1)
        else:
            last_B = jnp.argmax((input_ids != self.pad_token_id) * jnp.arange(T), axis=-1)
        x_BTD = self.transformer.last_hidden_state(input_ids, deterministic=deterministic)
        x_BD = jnp.take_along_axis(x_BTD, last_B[:, None, None], axis=1)[:, 0]
        return self.score(x_BD)


def model_from_classifier(
    classifier: SequenceClassifier, *, dtype: DTypeLike = jnp.float32
) -> tuple[GPT2ForSequenceClassification, dict[str, Any]]:
    """Return the model and its parameters, which keep their dtypes.

    Args:
        dtype: the dtype of the computation.
    """
    params: dict[str, Any] = jax.tree.map(to_device, classifier.to_flax())
    model = GPT2ForSequenceClassification(
        classifier.checkpoint.config,
        classifier.num_labels,
        classifier.pad_token_id,
        jnp.dtype(dtype),
        params["transformer"]["wte"]["embedding"].dtype,
    )
    return model, params


def classifier_from_params(params: Mapping[str, Any], like: SequenceClassifier) -> SequenceClassifier:
    """Return the parameters as a classifier, which `bridge.save_classifier` writes.

    Args:
        like: the classifier that the model was made from. Its tokenizer and labels are kept.
    """
    return like.with_flax(params)
