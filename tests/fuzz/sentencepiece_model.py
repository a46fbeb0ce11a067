"""SentencePiece models, parsed by Google's `protobuf` package and built with the `tokenizers` library."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fuzz import tokenizer_ids
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers.tokenization_utils_base import generate_merges
from transformers.utils import sentencepiece_model_pb2_new as protobuf

from bridge.tokenizers.loading import load_tokenizer

FIXTURES = Path(__file__).parents[1] / "files" / "sentencepiece-0.2.3"
ROWS = 500


def samples(folder: Path) -> list[Path]:
    return [Path(shutil.copytree(FIXTURES / name, folder / name)) for name in BUILT]


def mutable(source: Path) -> list[Path]:
    return [*source.glob("*.model")]


def damage(content: bytes, file: Path, rng: random.Random) -> bytes:
    """Change some pieces or options, in a file that stays a valid message."""
    model = protobuf.ModelProto.FromString(content)
    pieces = model.pieces
    for _ in range(rng.choice((1, 1, 2, 4))):
        one, other = rng.choice(pieces), rng.choice(pieces)
        match rng.randrange(9):
            case 0:
                one.piece = rng.choice(("", "a", "e", "▁", "▁the", "<s>", "<unk>", other.piece + one.piece, "e" * 600))
            case 1:
                one.score = rng.choice((0.0, -1e30, 1e30, float("nan"), float("-inf"), -other.score))
            case 2:
                one.type = rng.randrange(1, 7)
            case 3:
                del pieces[rng.randrange(len(pieces)) :]
                pieces.append(other)
            case 4:
                pieces.insert(rng.randrange(len(pieces)), other)
            case 5:
                one.piece, other.piece = other.piece, one.piece
            case 6:
                model.trainer_spec.model_type = rng.randrange(1, 5)
            case 7:
                name = rng.choice(("unk_id", "bos_id", "eos_id", "pad_id"))
                setattr(model.trainer_spec, name, rng.choice((-1, 0, 1, 2, 3, 179, 2**31 - 1, -(2**31))))
            case _:
                model.trainer_spec.byte_fallback = not model.trainer_spec.byte_fallback
                model.trainer_spec.unk_piece = rng.choice(("<unk>", "e", ""))
    changed: bytes = model.SerializeToString()
    return changed


def judge(source: Path) -> str:
    def theirs() -> Tokenizer:
        [file] = mutable(source)
        return BUILT[source.name](protobuf.ModelProto.FromString(file.read_bytes()))

    return tokenizer_ids.judged(lambda: load_tokenizer(source, ROWS), theirs)


def _t5(model: Any) -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram([(p.piece, p.score) for p in model.pieces], unk_id=2))
    return _with_spaces(tokenizer, pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace())


def _xlm_roberta(model: Any) -> Tokenizer:
    first = [(token, 0.0) for token in ("<s>", "<pad>", "</s>", "<unk>")]
    pieces = [*first, *((p.piece, p.score) for p in model.pieces[3:]), ("<mask>", 0.0)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=3))
    return _with_spaces(tokenizer, pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace())


def _llama(model: Any) -> Tokenizer:
    tokenizer = Tokenizer(_bpe(model, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def _general(model: Any) -> Tokenizer:
    spec, is_unigram = model.trainer_spec, model.trainer_spec.model_type == 1
    options = {"byte_fallback": spec.byte_fallback}
    pieces = [(p.piece, p.score) for p in model.pieces]
    tokenizer = Tokenizer(
        models.Unigram(pieces, spec.unk_id, **options)
        if is_unigram
        else _bpe(model, unk_token=spec.unk_piece, **options)
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    restored = [decoders.ByteFallback(), decoders.Fuse()] if spec.byte_fallback else []
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), *restored])
    return tokenizer


def _bpe(model: Any, **options: Any) -> models.BPE:
    vocab = {p.piece: i for i, p in enumerate(model.pieces)}
    return models.BPE(vocab, generate_merges(vocab), fuse_unk=True, **options)


def _with_spaces(tokenizer: Tokenizer, *apart: Any) -> Tokenizer:
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*apart])
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


BUILT: dict[str, Callable[[Any], Tokenizer]] = {
    "not normalized": _t5,
    "xlm-roberta": _xlm_roberta,
    "llama": _llama,
    "general, BPE": _general,
    "general, Unigram": _general,
}
"""Directory of tests/files/sentencepiece-0.2.3 -> what transformers builds from its model."""
