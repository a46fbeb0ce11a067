"""GGUF files built byte by byte from the documented layout, so that tests can corrupt any part.

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. This module shares no code with the reader.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
from support.models import SMALLEST, random_state

from bridge import GPT2Config

NUMBERS = {
    "uint8": (0, "B"),
    "int8": (1, "b"),
    "uint16": (2, "H"),
    "int16": (3, "h"),
    "uint32": (4, "I"),
    "int32": (5, "i"),
    "float32": (6, "f"),
    "bool": (7, "B"),
    "uint64": (10, "Q"),
    "int64": (11, "q"),
    "float64": (12, "d"),
}
STRING, ARRAY = 8, 9

Pairs = list[tuple[bytes, bytes]]
Tensors = list[tuple[bytes, bytes, bytes]]


def sized(text: bytes | str, length: int | None = None) -> bytes:
    """Return an encoded string. `length`: the length in its header, if not the true one."""
    encoded = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(encoded) if length is None else length) + encoded


def number(value: float, type: str = "uint32") -> bytes:
    code, letter = NUMBERS[type]
    return struct.pack(f"<I{letter}", code, value)


def text(value: bytes | str, length: int | None = None) -> bytes:
    return struct.pack("<I", STRING) + sized(value, length)


def array(payload: bytes, type: int, count: int) -> bytes:
    return struct.pack("<IIQ", ARRAY, type, count) + payload


def texts(values: Sequence[bytes | str]) -> bytes:
    return array(b"".join(map(sized, values)), STRING, len(values))


def int32s(values: Sequence[int]) -> bytes:
    return array(struct.pack(f"<{len(values)}i", *values), NUMBERS["int32"][0], len(values))


def described(name: bytes | str, ne: Sequence[int], offset: int = 0, type: int = 0, rank: int | None = None) -> bytes:
    """Return the description of a tensor. `ne`: its sizes, from the innermost axis to the outermost."""
    rank = len(ne) if rank is None else rank
    return sized(name) + struct.pack(f"<I{len(ne)}QIQ", rank, *ne, type, offset)


def file_of(
    pairs: Pairs,
    descriptions: Sequence[bytes] = (),
    data: bytes = b"",
    *,
    start: bytes = b"GGUF" + struct.pack("<I", 3),
    tensor_count: int | None = None,
    key_count: int | None = None,
    alignment: int = 32,
) -> bytes:
    counts = struct.pack(
        "<QQ",
        len(descriptions) if tensor_count is None else tensor_count,
        len(pairs) if key_count is None else key_count,
    )
    header = start + counts + b"".join(sized(key) + value for key, value in pairs) + b"".join(descriptions)
    return header + bytes(-len(header) % alignment) + data


def gpt2_pairs(config: GPT2Config = SMALLEST, **changed: bytes | None) -> Pairs:
    """Return the metadata of a GPT-2. `changed`: last part of a key -> value, or None to omit it."""
    pairs = {
        "general.architecture": text("gpt2"),
        "gpt2.context_length": number(config.n_positions),
        "gpt2.embedding_length": number(config.n_embd),
        "gpt2.feed_forward_length": number(config.feed_forward_size),
        "gpt2.block_count": number(config.n_layer),
        "gpt2.attention.head_count": number(config.n_head),
        "gpt2.attention.layer_norm_epsilon": number(config.layer_norm_epsilon, "float32"),
    }
    for key, value in changed.items():
        name = next((name for name in pairs if name.endswith(f".{key}")), key)
        pairs[name] = value  # type: ignore[assignment]
    return [(key.encode(), value) for key, value in pairs.items() if value is not None]


OUTSIDE = {"wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm", "lm_head": "output"}
INSIDE = {
    "ln_1": "attn_norm",
    "ln_2": "ffn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
PROJECTIONS = ("attn_qkv.weight", "attn_output.weight", "ffn_up.weight", "ffn_down.weight")


def gguf_name(name: str) -> str:
    """Return llama.cpp's name of a parameter."""
    module, kind = name.rsplit(".", 1)
    if not name.startswith("h."):
        return f"{OUTSIDE[module]}.{kind}"
    _, layer, inner = module.split(".", 2)
    return f"blk.{layer}.{INSIDE[inner]}.{kind}"


def gguf_tensors(config: GPT2Config = SMALLEST, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """Return the random model of `config` with the names of llama.cpp and projections `[out, in]`."""
    state = {gguf_name(name): values for name, values in random_state(config, dtype).items()}
    return {name: np.ascontiguousarray(v.T) if name.endswith(PROJECTIONS) else v for name, v in state.items()}


def laid_out(tensors: dict[str, np.ndarray], alignment: int = 32) -> tuple[list[bytes], bytes]:
    """Return the descriptions and the data of float32 tensors."""
    descriptions, data = [], b""
    for name, values in tensors.items():
        descriptions.append(described(name, values.shape[::-1], len(data)))
        data += values.tobytes() + bytes(-values.nbytes % alignment)
    return descriptions, data


def gpt2(pairs: Pairs | None = None, tensors: dict[str, np.ndarray] | None = None, **options: Any) -> bytes:
    """Return a complete file, by default of the random model of `SMALLEST`."""
    alignment = options.get("alignment", 32)
    descriptions, data = laid_out(gguf_tensors() if tensors is None else tensors, alignment)
    return file_of(gpt2_pairs() if pairs is None else pairs, descriptions, data, **options)
