"""nanoGPT's `meta.pkl`, read by Python's `pickle` without any class or function."""

from __future__ import annotations

import io
import pickle
import random
from pathlib import Path
from typing import Any

import bridge
from bridge.tokenizers.loading import load_tokenizer

ROWS = 100
CHARACTERS = sorted(set("the quick brown fox jumps over the lazy dog,\n 'naïve café' 日本語🙂"))
_VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 7, 99, 100, 2**31, 2**70, 0.5, float("nan"), "", "a", "ab", "\ud800", "\x1b[31m", b"a"),
    *([], {}, (), ["a"], {"a": 0}, "e" * 2**16),
)


def samples(folder: Path) -> list[Path]:
    found = []
    for protocol in (2, 4, 5):
        source = folder / f"protocol {protocol}"
        source.mkdir()
        (source / "meta.pkl").write_bytes(pickle.dumps(_meta(), protocol))
        found.append(source)
    return found


def _meta() -> dict[Any, Any]:
    """Return the tables as nanoGPT's data/shakespeare_char/prepare.py makes them."""
    stoi = {character: i for i, character in enumerate(CHARACTERS)}
    return {"vocab_size": len(CHARACTERS), "itos": dict(enumerate(CHARACTERS)), "stoi": stoi}


def mutable(source: Path) -> list[Path]:
    return [source / "meta.pkl"]


def damage(content: bytes, file: Path, rng: random.Random) -> bytes:
    """Change entries of the tables, and pickle them again."""
    meta = _meta()
    for _ in range(rng.choice((1, 1, 2, 4))):
        table = meta.get(rng.choice(("itos", "stoi", "stoi")))
        if not isinstance(table, dict) or not table or rng.random() < 0.1:
            table = meta
        key, other = rng.choice([*table] or ["a"]), rng.choice([*table] or ["a"])
        match rng.randrange(4):
            case 0:
                table[key] = rng.choice(_VALUES)
            case 1:
                table.pop(key, None)
            case 2:
                table[key] = table.get(other)
            case _:
                new = rng.choice([value for value in _VALUES if _is_plain(value)])
                table[new] = table.pop(key, None)
    if rng.random() < 0.5:  # tables that belong together
        meta["itos"] = {i: character for character, i in _stoi(meta).items() if _is_plain(i)}
    return pickle.dumps(meta, rng.randrange(pickle.HIGHEST_PROTOCOL + 1))


def _stoi(meta: dict[Any, Any]) -> dict[Any, Any]:
    found = meta.get("stoi")
    return found if isinstance(found, dict) else {}


def _is_plain(value: Any) -> bool:
    return isinstance(value, str | bytes | int | float | None)


def judge(source: Path) -> str:
    """A character that both tables have must have its id, in both directions."""
    try:
        ours = load_tokenizer(source, ROWS)
    except bridge.BridgeError:
        return "refused"
    try:
        stoi = _Plain(io.BytesIO((source / "meta.pkl").read_bytes())).load()["stoi"]
    except Exception:  # pickle raises any exception for invalid files
        return "only we load it"
    text = "".join(stoi)
    assert ours.encode(text) == [stoi[character] for character in text]
    assert ours.decode(stoi.values()) == text
    return "loaded"


class _Plain(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"{module}.{name} is code")
