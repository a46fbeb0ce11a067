"""Data sets of the Hugging Face hub. A stand-in for `datasets` gives Arrow files, as the package does."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from gpt2_jax.data import DataError, TokenStream, open_data
from tests.data.records.record_files import write_saved_dataset

pytest.importorskip("pyarrow")


class DatasetNotFoundError(Exception):
    """Named as in `datasets`."""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, str | None], dict[str, Any]]:
    """The data sets that the stand-in can load."""
    loadable: dict[tuple[str, str | None], dict[str, Any]] = {}

    def load_dataset(name: str, configuration: str | None) -> dict[str, Any]:
        if (name, configuration) not in loadable:
            raise DatasetNotFoundError(f"Dataset '{name}' doesn't exist on the Hub.\nMore lines")
        return loadable[name, configuration]

    module = ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    monkeypatch.chdir(tmp_path)
    return loadable


def split(directory: Path, text: str) -> Any:
    write_saved_dataset(directory / text, [{"text": text}])
    return SimpleNamespace(cache_files=[{"filename": str(path)} for path in (directory / text).glob("*.arrow")])


def text_of(stream: Any) -> str:
    assert isinstance(stream, TokenStream)
    return "".join("|" if i == 256 else chr(i) for i in stream.read(0, len(stream)).tolist())


def opened(source: str) -> Any:
    return open_data(source, tokenizer="bytes", cache=".cache", validation_fraction=0)


def test_its_splits_are_used(tmp_path: Path, hub: dict[Any, Any]) -> None:
    hub["owner/stories", None] = {name: split(tmp_path, name) for name in ("train", "test", "validation")}
    hub["owner/stories", "small"] = {"train": split(tmp_path / "small", "few")}
    whole, small = opened("owner/stories"), opened("owner/stories:small")
    assert text_of(whole.train) == "train|" and text_of(whole.validation) == "validation|"
    assert text_of(small.train) == "few|" and small.validation is None


def test_what_cannot_be_loaded_is_named(tmp_path: Path, hub: dict[Any, Any]) -> None:
    with pytest.raises(
        DataError,
        match=r"'owner/none' is not a local path, .*\(DatasetNotFoundError: Dataset .* on the Hub\.\); check the name",
    ):
        opened("owner/none")
    hub["owner/tests", None] = {"test": split(tmp_path, "test")}
    with pytest.raises(DataError, match="'owner/tests' has no split 'train', but 'test'"):
        opened("owner/tests")
    hub["owner/memory", None] = {"train": SimpleNamespace(cache_files=[])}
    with pytest.raises(DataError, match="'owner/memory' is not stored in Arrow files; save it with `save_to_disk`"):
        opened("owner/memory")


def test_without_datasets_the_path_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"'owner/name' does not exist; give a file, .*'gpt2-bridge\[datasets\]'"):
        opened("owner/name")


def test_a_local_path_is_no_id(tmp_path: Path, hub: dict[Any, Any]) -> None:
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "name").write_text("text")
    assert text_of(opened("owner/name").train) == "text|"


@pytest.mark.parametrize("name", ["corpora/missing.jsonl.gz", "corpora/missing.bin", "here/missing"])
def test_a_misspelled_path_is_not_sent_to_the_hub(tmp_path: Path, hub: dict[Any, Any], name: str) -> None:
    (tmp_path / "here").mkdir()
    with pytest.raises(DataError, match=f"{name}' does not exist; give a file"):
        opened(name)


def test_a_source_of_a_mixture_may_be_one(tmp_path: Path, hub: dict[Any, Any]) -> None:
    hub["owner/stories", None] = {"train": split(tmp_path, "train")}
    (tmp_path / "mixture.toml").write_text("[stories]\npath = 'owner/stories'\nweight = 1\n")
    assert text_of(opened("mixture.toml").train.streams[0]) == "train|"
