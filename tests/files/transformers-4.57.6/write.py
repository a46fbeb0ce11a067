"""Write the checkpoints of this directory. README.md states the packages to install."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
from transformers import FlaxGPT2LMHeadModel, FlaxGPT2Model, GPT2Config

HERE = Path(__file__).parent
SIZES = {"vocab_size": 37, "n_positions": 11, "n_embd": 8, "n_layer": 2, "n_head": 4, "n_inner": 12}


def random_params(model: FlaxGPT2Model | FlaxGPT2LMHeadModel, seed: int) -> dict:
    """Return random parameters. Scales of LayerNorms are around 1."""
    rng = np.random.default_rng(seed)

    def values(path: tuple, like: jax.Array) -> jax.Array:
        return jax.numpy.asarray(rng.normal(scale=0.2, size=like.shape) + (path[-1].key == "scale"), like.dtype)

    return jax.tree_util.tree_map_with_path(values, model.params)


def write(name: str, model_class: type, seed: int, dtype: str = "fp32", max_shard_size: str = "10GB", **config) -> None:
    model = model_class(GPT2Config(**SIZES, **config))
    model.params = getattr(model, f"to_{dtype}")(random_params(model, seed))
    model.save_pretrained(HERE / name, max_shard_size=max_shard_size)
    read_back = FlaxGPT2LMHeadModel.from_pretrained(HERE / name)
    np.save(HERE / name / "logits.npy", np.asarray(read_back(np.load(HERE / "ids.npy")).logits))


if __name__ == "__main__":
    np.save(HERE / "ids.npy", np.random.default_rng(0).integers(0, SIZES["vocab_size"], (2, 7)))
    write("tied", FlaxGPT2LMHeadModel, 1)
    write("bfloat16", FlaxGPT2LMHeadModel, 2, dtype="bf16", activation_function="gelu")
    write("untied", FlaxGPT2LMHeadModel, 3, tie_word_embeddings=False, layer_norm_epsilon=0.01)
    write("sharded", FlaxGPT2LMHeadModel, 4, max_shard_size="2KB", activation_function="relu")
    write("without_head", FlaxGPT2Model, 5)
