"""LoRA adapters, written by PEFT onto transformers' GPT-2, and what PEFT merges them to.

`python -m support.peft_adapters DIRECTORY` writes the files of `tests/files/peft-0.21.2`, with peft 0.21.2,
transformers 5.23 and torch 2.13.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from support.models import SMALLEST, random_state

from bridge import GPT2Config
from bridge.containers.safetensors import write_file
from bridge.storage.tensors import LazyTensorMap

FILES = Path(__file__).parents[1] / "files" / "peft-0.21.2"
UNTIED = replace(SMALLEST, tie_word_embeddings=False)

ADAPTERS: Mapping[str, tuple[GPT2Config, dict[str, Any]]] = {
    "attention": (SMALLEST, {"target_modules": ["c_attn"]}),
    "every projection": (SMALLEST, {"target_modules": ["c_attn", "c_proj", "c_fc"], "r": 2, "lora_alpha": 3}),
    "rank-stabilized": (SMALLEST, {"target_modules": ["c_attn"], "use_rslora": True}),
    "patterns": (
        SMALLEST,
        {
            "target_modules": ["c_attn", "c_fc"],
            "rank_pattern": {"h.0.attn.c_attn": 2, "^transformer.h.1.mlp.c_fc": 1},
            "alpha_pattern": {"h.*.c_fc": 64, "c_attn": 5},
        },
    ),
    "whole modules": (SMALLEST, {"target_modules": ["c_attn"], "modules_to_save": ["wpe", "ln_f", "h.1.ln_2"]}),
    "position embedding": (SMALLEST, {"target_modules": ["wpe", "c_proj"]}),
    "untied embedding and head": (UNTIED, {"target_modules": ["wte", "lm_head", "c_attn"]}),
    "tied embedding alone, replaced": (SMALLEST, {"target_modules": ["c_attn"], "modules_to_save": ["wte"]}),
    "tied embedding and head, replaced": (
        SMALLEST,
        {"target_modules": ["c_attn"], "modules_to_save": ["wte", "lm_head"]},
    ),
    "layers": (SMALLEST, {"target_modules": ["c_attn"], "layers_to_transform": [1], "layers_pattern": "h"}),
}
"""Name -> the base, and arguments of `peft.LoraConfig`. The base's weights are those of `random_state`."""
COMMITTED = ("patterns", "whole modules", "untied embedding and head")
"""The adapters in `tests/files`."""


def model_of_transformers(config: GPT2Config) -> Any:
    """Return `GPT2LMHeadModel` with the weights of `random_state`."""
    import torch
    import transformers

    tokens = {"bos_token_id": None, "eos_token_id": None}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**config.to_hf(), **tokens))
    state = {name: torch.from_numpy(array) for name, array in random_state(config).items()}
    head = state.pop("lm_head.weight", state["wte.weight"])
    model.load_state_dict({**{f"transformer.{n}": t for n, t in state.items()}, "lm_head.weight": head})
    return model.eval()


def write_with_peft(directory: Path, config: GPT2Config, arguments: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Write an adapter with random values. Return the tensors that `merge_and_unload` gives, by canonical name."""
    import peft
    import torch

    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about fan_in_fan_out, and about tied weights
        settings = {"r": 4, "lora_alpha": 16, "init_lora_weights": False, "task_type": "CAUSAL_LM", **arguments}
        adapted = peft.get_peft_model(model_of_transformers(config), peft.LoraConfig(**settings))
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "modules_to_save" in name or "lora_" in name:
                    parameter.add_(torch.randn_like(parameter) / 10)
                if "lora_embedding" in name:  # PEFT's start with a standard deviation of 1; updates would be about 8
                    parameter.div_(4)
        adapted.save_pretrained(directory)
        (directory / "README.md").unlink()
        return merged_tensors(adapted)


def merged_tensors(adapted: Any) -> dict[str, np.ndarray]:
    """Return the tensors of `merge_and_unload`, by canonical name, with the head if it is not the embedding itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = adapted.merge_and_unload()
    state = {n.removeprefix("transformer."): t.detach().numpy() for n, t in merged.state_dict().items()}
    if merged.lm_head.weight is merged.transformer.wte.weight:
        del state["lm_head.weight"]
    return state


def write_files(root: Path) -> None:
    """Write the committed adapters, each with the tensors that PEFT merges it to."""
    for name in COMMITTED:
        directory = root / name.replace(" ", "-")
        merged = write_with_peft(directory, *ADAPTERS[name])
        base = random_state(ADAPTERS[name][0])
        changed = {n: array for n, array in merged.items() if n not in base or not np.array_equal(array, base[n])}
        write_file(directory / "merged.safetensors", LazyTensorMap.of(changed), {"format": "pt"})


if __name__ == "__main__":
    write_files(Path(sys.argv[1]))
