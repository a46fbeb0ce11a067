"""nanoGPT's tokenizer of characters: `meta.pkl`, which its data preparation writes and its sample.py reads.

The pickle is read as data by `bridge.containers.torch_pickle`; no code in it runs.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bridge.containers import torch_pickle
from bridge.errors import CheckpointError, TokenizerError, quoted
from bridge.storage.companions import has_companion, read_companion
from bridge.tokenizers.characters import CharacterTokenizer
from bridge.tokenizers.tokenizer import Tokenizer

META = "meta.pkl"

_DATASET = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


def from_meta(directory: Path, progress: Mapping[str, Any]) -> Tokenizer | None:
    """Return the tokenizer in the `meta.pkl` of a nanoGPT checkpoint, or None without this file.

    nanoGPT's sample.py reads `data/<dataset>/meta.pkl` relative to its own folder. In the same folder, train.py writes
    `out/ckpt.pt`. A file beside the checkpoint takes precedence.

    Args:
        directory: the directory of the checkpoint.
        progress: `Checkpoint.progress`, whose `config` names the dataset.

    Raises `TokenizerError` for a file that is not a table of characters.
    """
    config = progress.get("config")
    dataset = config.get("dataset") if isinstance(config, dict) else None
    places = [directory]
    if isinstance(dataset, str) and _DATASET.fullmatch(dataset):
        places += [parent / "data" / dataset for parent in (directory, Path(os.path.abspath(directory)).parent)]
    for place in places:
        if has_companion(place, META):
            return _read(place)
    return None


def _read(directory: Path) -> CharacterTokenizer:
    where = quoted(directory / META)
    content = read_companion(directory, META, error=TokenizerError)
    try:
        meta = torch_pickle.load(content, where, symbols={}, persistent=_no_reference, leaves=())
    except CheckpointError as error:
        raise TokenizerError(str(error)) from None
    ids = meta.get("stoi") if isinstance(meta, dict) else None
    if not isinstance(ids, dict):
        raise TokenizerError(f"{where} has no table stoi; only nanoGPT's tables of characters are supported")
    tokenizer = CharacterTokenizer("characters", ids, where)
    if isinstance(itos := meta.get("itos"), dict) and itos != {i: character for character, i in ids.items()}:
        raise TokenizerError(f"{where}: the tables stoi and itos do not belong together")
    return tokenizer


def _no_reference(_: Any) -> Any:
    raise CheckpointError(f"{META} refers to data outside the file")
