"""Resizing of the vocabulary, compared with transformers' `resize_token_embeddings`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from support.models import TINY, huggingface_directory, random_checkpoint, random_state
from support.tokenizers_for_tests import write_byte_tokenizer

import bridge
from bridge import Checkpoint, ConfigError, ConversionError
from bridge.tokenizers.loading import TOKENIZER_FILES

UNTIED = replace(TINY, tie_word_embeddings=False)
ROWS = TINY.vocab_size + 6
MEAN_ERROR = 1e-7  # of a mean of 257 numbers below 1, rounded to float32


def rows_of(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    return {name: checkpoint.tensors[name] for name in ("wte.weight", "lm_head.weight") if name in checkpoint.tensors}


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16], ids=str)
@pytest.mark.parametrize("config", [TINY, UNTIED], ids=["tied", "untied"])
def test_old_rows_keep_their_bits_and_new_rows_are_their_mean(config: bridge.GPT2Config, dtype: Any) -> None:
    before = random_checkpoint(config, dtype)
    after = bridge.resize_vocabulary(before, ROWS)
    assert after.config == replace(config, vocab_size=ROWS)
    assert [*after.tensors] == [*before.tensors]
    for name, array in after.tensors.items():
        old = before.tensors[name]
        assert array[: len(old)].tobytes() == old.tobytes(), name
        assert array.dtype == old.dtype
    for name, array in rows_of(after).items():
        mean = np.mean(before.tensors[name].astype(np.float64), axis=0)
        assert array.shape == (ROWS, config.n_embd)
        assert np.array_equal(array[TINY.vocab_size :], np.tile(mean.astype(dtype), (6, 1))), name
    bridge.to_flax(after.tensors, after.config)  # raises unless the tensors are those of the new configuration


@pytest.mark.parametrize("config", [TINY, UNTIED], ids=["tied", "untied"])
def test_it_agrees_with_transformers(tmp_path: Path, config: bridge.GPT2Config) -> None:
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    path = huggingface_directory(tmp_path / "model", config)
    ours = rows_of(bridge.resize_vocabulary(bridge.load(path), ROWS))
    for mean_resizing in (False, True):
        torch.manual_seed(0)
        model = transformers.GPT2LMHeadModel.from_pretrained(path)
        model.resize_token_embeddings(ROWS, mean_resizing=mean_resizing)
        theirs = {"wte.weight": model.transformer.wte.weight, "lm_head.weight": model.lm_head.weight}
        for name, array in ours.items():
            other = theirs[name].detach().numpy()
            assert array[: TINY.vocab_size].tobytes() == other[: TINY.vocab_size].tobytes(), name
            assert array.shape == other.shape
            if mean_resizing:  # drawn around the mean with 1e-9 times the covariance, here 0.04
                assert np.abs(array - other).max() < 1e-4


def test_the_written_model_is_that_of_transformers_with_a_tied_head(tmp_path: Path) -> None:
    import torch  # noqa: F401 - transformers' model needs it
    import transformers

    before = random_checkpoint(TINY)
    bridge.save(bridge.resize_vocabulary(before, ROWS), tmp_path / "out", format="huggingface")
    model = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "out")
    assert model.config.vocab_size == ROWS and model.lm_head.weight is model.transformer.wte.weight
    embedding = model.transformer.wte.weight.detach().numpy()
    assert np.abs(embedding[-1] - before.tensors["wte.weight"].mean(axis=0)).max() < MEAN_ERROR


def test_given_rows_are_appended() -> None:
    new = np.random.default_rng(1).normal(size=(6, TINY.n_embd))
    after = bridge.resize_vocabulary(random_checkpoint(TINY, ml_dtypes.bfloat16), ROWS, new)
    assert np.array_equal(after.tensors["wte.weight"][TINY.vocab_size :], new.astype(ml_dtypes.bfloat16))
    heads = bridge.resize_vocabulary(random_checkpoint(UNTIED), ROWS, {"wte.weight": new, "lm_head.weight": -new})
    assert np.array_equal(heads.tensors["wte.weight"][TINY.vocab_size :], new.astype(np.float32))
    assert np.array_equal(heads.tensors["lm_head.weight"][TINY.vocab_size :], -new.astype(np.float32))
    mean = bridge.resize_vocabulary(random_checkpoint(UNTIED), ROWS, {"wte.weight": new})
    assert np.array_equal(mean.tensors["wte.weight"], heads.tensors["wte.weight"])
    average = random_state(UNTIED)["lm_head.weight"].mean(axis=0)
    assert np.abs(mean.tensors["lm_head.weight"][-1] - average).max() < MEAN_ERROR


def test_padding_is_removed_first() -> None:
    state = random_state(replace(TINY, vocab_size=320))
    state["wte.weight"][TINY.vocab_size :] = 0
    padded = Checkpoint.of(state, replace(TINY, vocab_size=320))
    resized = bridge.resize_vocabulary(padded.with_vocab_size(TINY.vocab_size), 320)
    mean = state["wte.weight"][: TINY.vocab_size].mean(axis=0)
    assert np.abs(resized.tensors["wte.weight"][TINY.vocab_size :] - mean).max() < MEAN_ERROR


def test_fewer_rows_are_the_first_ones_and_as_many_are_the_same() -> None:
    checkpoint = random_checkpoint(UNTIED)
    assert bridge.resize_vocabulary(checkpoint, TINY.vocab_size) is checkpoint
    for name, array in rows_of(bridge.resize_vocabulary(checkpoint, 100)).items():
        assert array.tobytes() == checkpoint.tensors[name][:100].tobytes()


def test_the_tokenizer_is_that_of_the_source(tmp_path: Path) -> None:
    path = huggingface_directory(tmp_path / "model", replace(TINY, vocab_size=256))
    write_byte_tokenizer(path)
    before = {file.name: file.read_bytes() for file in path.iterdir() if file.name in TOKENIZER_FILES}
    resized = bridge.resize_vocabulary(bridge.load(path), 300)
    assert resized.tokenizer().encode("hi") == bridge.load(path).tokenizer().encode("hi")
    bridge.save(resized, tmp_path / "out", format="huggingface")
    assert before and {name: (tmp_path / "out" / name).read_bytes() for name in before} == before


def test_tensors_are_read_on_access() -> None:
    def read() -> np.ndarray:
        raise AssertionError("was read")

    lazy = {name: replace(entry, read=read) for name, entry in random_checkpoint(TINY).tensors.entries.items()}
    checkpoint = replace(random_checkpoint(TINY), tensors=bridge.storage.tensors.LazyTensorMap(lazy))
    assert bridge.resize_vocabulary(checkpoint, ROWS).tensors.entries["wte.weight"].shape == (ROWS, TINY.n_embd)


NEW = np.zeros((6, TINY.n_embd), np.float32)
REFUSED: dict[str, tuple[bridge.GPT2Config, int, Any, str]] = {
    "no rows": (TINY, 0, None, "it cannot be reduced to 0"),
    "negative": (TINY, -5, None, "it cannot be reduced to -5"),
    "another number of rows": (TINY, ROWS, NEW[:5], r"wte.weight has shape \(5, 48\); 6 new rows of 48 numbers"),
    "another width": (TINY, ROWS, NEW[:, :5], r"wte.weight has shape \(6, 5\)"),
    "one axis": (TINY, ROWS, NEW[0], r"wte.weight has shape \(48,\)"),
    "rows where none are needed": (TINY, 100, NEW, r"wte.weight has shape \(6, 48\); 0 new rows"),
    "integers": (TINY, ROWS, NEW.astype(int), "'wte.weight' holds int64, not floats"),
    "one array for an untied head": (UNTIED, ROWS, NEW, "the head is not tied to the token embedding"),
    "a head that is tied": (TINY, ROWS, {"lm_head.weight": NEW}, "'lm_head.weight' is not one of wte.weight"),
    "an unknown name": (UNTIED, ROWS, {"wpe.weight": NEW}, "'wpe.weight' is not one of lm_head.weight, wte.weight"),
}


@pytest.mark.parametrize(("config", "rows", "new_rows", "says"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused(config: bridge.GPT2Config, rows: int, new_rows: Any, says: str) -> None:
    with pytest.raises(ConversionError, match=says):
        bridge.resize_vocabulary(random_checkpoint(config), rows, new_rows)


def test_more_rows_than_int32_are_refused() -> None:
    with pytest.raises(ConfigError, match="vocab_size"):
        bridge.resize_vocabulary(random_checkpoint(TINY), 2**31)
