"""GGUF, read by the `gguf` package."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
from gguf import GGMLQuantizationType, GGUFReader
from support.gguf_bytes import PROJECTIONS, gguf_name, gguf_tensors, gpt2, gpt2_pairs, number, text, texts
from support.models import SMALLEST, random_checkpoint

import bridge

UNTIED = replace(SMALLEST, tie_word_embeddings=False)
BF16 = np.dtype(ml_dtypes.bfloat16)
WIDENED = {"gpt2_bridge.widened_from_f16": np.dtype(np.float16), "gpt2_bridge.widened_from_bf16": BF16}


def samples(folder: Path) -> list[Path]:
    bridge.save(random_checkpoint(SMALLEST), folder / "f32.gguf", format="gguf")
    bridge.save(random_checkpoint(UNTIED, BF16), folder / "bf16.gguf", format="gguf")
    pairs = [
        *gpt2_pairs(),
        (b"general.alignment", number(64)),
        (b"gpt2.attention.causal", number(1, "bool")),
        (b"tokenizer.ggml.model", text("gpt2")),
        (b"tokenizer.ggml.tokens", texts(list("abcdefghijk"))),
    ]
    embedding = gguf_tensors()["token_embd.weight"]
    stored_head = gpt2(pairs, {**gguf_tensors(), "output.weight": embedding}, start=b"GGUF\2\0\0\0", alignment=64)
    (folder / "others.gguf").write_bytes(stored_head)
    return [folder / name for name in ("f32.gguf", "bf16.gguf", "others.gguf")]


def mutable(source: Path) -> list[Path]:
    return [source]


def oracle(source: Path) -> dict[str, np.ndarray]:
    """Read the arrays. Widened vectors are narrowed, and a head that equals the embedding is tied."""
    reader = GGUFReader(source)
    stored = {tensor.name: _values(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    for key, dtype in WIDENED.items():
        field = reader.get_field(key)
        for name in field.contents() if field else ():
            stored[name] = stored[name].astype(dtype)
    if "output.weight" in stored and stored["output.weight"].tobytes() == stored["token_embd.weight"].tobytes():
        del stored["output.weight"]
    canonical = {gguf_name(p.torch_name): p.torch_name for p in bridge.parameters(UNTIED)}
    return {canonical[name]: values.T if name.endswith(PROJECTIONS) else values for name, values in stored.items()}


def _values(data: np.ndarray, type: GGMLQuantizationType) -> np.ndarray:
    return data.view(BF16) if type == GGMLQuantizationType.BF16 else data
