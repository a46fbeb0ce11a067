"""Directories of `datasets`, and splits by the names of files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gpt2_jax.data import Data, DataError, TokenStream, open_data
from tests.data.records.record_files import write, write_saved_dataset

pytest.importorskip("pyarrow")


def opened(source: Path, **options: Any) -> Data:
    return open_data(source, **{"tokenizer": "bytes", "cache": source.parent / ".cache", **options})


def text_of(stream: TokenStream | None) -> str:
    assert stream is not None
    return "".join("|" if i == 256 else chr(i) for i in stream.read(0, len(stream)).tolist())


def write_dict(directory: Path, *splits: str) -> Path:
    for split in splits:
        write_saved_dataset(directory / split, [{"text": split}])
    (directory / "dataset_dict.json").write_text(json.dumps({"splits": splits}))
    return directory


@pytest.mark.parametrize(
    ("splits", "held_out"),
    [(("train", "validation", "test"), "validation"), (("test", "train"), "test"), (("train", "other"), None)],
)
def test_the_splits_of_a_dataset_dict_are_used(tmp_path: Path, splits: tuple[str, ...], held_out: str | None) -> None:
    data = opened(write_dict(tmp_path / "saved", *splits), validation_fraction=0)
    assert text_of(data.train) == "train|"
    assert (data.validation and text_of(data.validation)) == (held_out and f"{held_out}|")


def test_another_source_for_validation_replaces_the_split(tmp_path: Path) -> None:
    other = write(tmp_path, "a.jsonl", [{"text": "other"}])
    data = opened(write_dict(tmp_path / "saved", "train", "test"), validation=other)
    assert text_of(data.validation) == "other|"


def test_a_dataset_dict_without_training_data_is_refused(tmp_path: Path) -> None:
    saved = write_dict(tmp_path / "saved", "test")
    with pytest.raises(DataError, match="has no split 'train', but 'test'; give the directory of one of them"):
        opened(saved)
    assert text_of(opened(saved / "test", validation_fraction=0).train) == "test|"


def test_datasets_reads_the_same(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [{"text": f"row {i}"} for i in range(5)]
    saved = datasets.Dataset.from_list(rows)
    datasets.DatasetDict({"train": saved, "validation": saved.select([1])}).save_to_disk(tmp_path / "saved")
    data = opened(tmp_path / "saved")
    assert text_of(data.train) == "".join(f"row {i}|" for i in range(5))
    assert text_of(data.validation) == "row 1|"


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("state.json", "{", "is not valid JSON"),
        ("state.json", "{}", "does not list data files"),
        ("state.json", '{"_data_files": [1]}', "does not list data files"),
        ("state.json", '{"_data_files": [{"filename": "../a.arrow"}]}', "does not list data files"),
        ("state.json", '{"_data_files": [{"filename": "/etc/passwd"}]}', "does not list data files"),
        ("state.json", '{"_data_files": [{"filename": ".."}]}', "does not list data files"),
        ("state.json", '{"_data_files": [{"filename": "b.arrow"}]}', "cannot read '.*b.arrow'"),
        ("state.json", '{"_indices_data_files": [{}]}', "separate indices"),
        ("dataset_dict.json", "{}", "does not list splits"),
        ("dataset_dict.json", '{"splits": ["train", "../x"]}', "does not list splits"),
        ("dataset_dict.json", '{"splits": ["train"]}', "cannot read '.*state.json'"),
    ],
)
def test_a_damaged_description_is_refused(tmp_path: Path, name: str, content: str, expected: str) -> None:
    saved = write_saved_dataset(tmp_path / "saved", [{"text": "a"}])
    (saved / name).write_text(content)
    with pytest.raises(DataError, match=expected):
        opened(saved)


def test_a_directory_above_a_saved_dataset_is_refused(tmp_path: Path) -> None:
    write_saved_dataset(tmp_path / "all" / "saved", [{"text": "a"}])
    with pytest.raises(DataError, match=r"contains a saved data set; give its directory, '.*all/saved'"):
        opened(tmp_path / "all")


@pytest.mark.parametrize(
    ("names", "train", "held_out"),
    [
        (("train.jsonl", "validation.jsonl", "test.jsonl"), "train", "validation"),
        (("train-00000-of-00001.parquet", "test-00000-of-00001.parquet"), "train", "test"),
        (("my_train.csv", "my_valid.csv", "other.csv"), "my_train", "my_valid"),
        (("a.jsonl", "val.jsonl"), "a", "val"),
        (("a.jsonl", "validate.jsonl"), None, None),
        (("test.jsonl",), "test", None),
    ],
)
def test_files_are_split_by_their_names(
    tmp_path: Path, names: tuple[str, ...], train: str | None, held_out: str | None
) -> None:
    writers = {"jsonl": "a.jsonl", "csv": "a.csv", "parquet": "a.parquet"}
    for name in names:
        made = write(tmp_path / "made", writers[name.split(".")[-1]], [{"text": name.split(".")[0].split("-")[0]}])
        (tmp_path / "data").mkdir(exist_ok=True)
        made.rename(tmp_path / "data" / name)
    data = opened(tmp_path / "data", validation_fraction=0)
    if train is None:
        assert len(text_of(data.train).split("|")) == len(names) + 1
    else:
        assert text_of(data.train) == f"{train}|"
    assert (data.validation and text_of(data.validation)) == (held_out and f"{held_out}|")
