"""Hugging Face's `pytorch_model.bin`, written and read by torch."""

from __future__ import annotations

import json
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import torch
from fuzz.nanogpt import repair as repair_file
from support.models import SMALLEST, random_state

from gpt2_torch.arrays import array_from_tensor, tensor_from_array

P = SMALLEST.n_positions


def samples(folder: Path) -> list[Path]:
    tied, untied = SMALLEST, replace(SMALLEST, tie_word_embeddings=False)
    for name, config, dtype in (("float32", tied, np.float32), ("bfloat16", untied, ml_dtypes.bfloat16)):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config.to_hf()))
        state = {n: tensor_from_array(array) for n, array in random_state(config, dtype).items()}
        if config is tied:
            state["lm_head.weight"] = state["wte.weight"]
            state["h.0.mlp.c_fc.weight"] = state["h.0.mlp.c_fc.weight"].T.contiguous().T  # a view with strides
            state["h.0.attn.bias"] = torch.ones(1, 1, P, P, dtype=torch.bool).tril()
            state = OrderedDict(state)
            state._metadata = {"": {"version": 1}}  # type: ignore[attr-defined] # like the state_dict() of a module
        else:
            state = {n: torch.nn.Parameter(tensor) for n, tensor in state.items()}
        torch.save(state, folder / name / "pytorch_model.bin")
    return [folder / "float32", folder / "bfloat16"]


def mutable(source: Path) -> list[Path]:
    return [source / "pytorch_model.bin"]


def repair(source: Path) -> None:
    repair_file(source / "pytorch_model.bin")


def oracle(source: Path) -> dict[str, np.ndarray]:
    state = torch.load(source / "pytorch_model.bin", weights_only=True)
    arrays = {name: array_from_tensor(tensor.detach()) for name, tensor in state.items() if ".attn.bias" not in name}
    if source.name == "float32":
        arrays.pop("lm_head.weight", None)
    return arrays
