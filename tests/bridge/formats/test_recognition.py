"""Which checkpoint a path refers to if a directory holds several."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import pytest
from fuzz.openai import FILES
from support.models import config_for, huggingface_directory, random_checkpoint
from support.refusals import assert_refused

import bridge
from bridge import CheckpointError, ConversionError
from bridge.formats.recognition import find_checkpoints

FILE_OF = {
    "huggingface": "model.safetensors",
    "flax": "flax_model.safetensors",
    "flax_msgpack": "flax_model.msgpack",
    "nanogpt": "ckpt.pt",
    "llmc": "model.bin",
    "gguf": "model.gguf",
    "openai": "model.ckpt.index",
}
"""Format -> the file that a user gives."""

DIFFERENT_MODELS = [
    pair for pair in itertools.combinations(FILE_OF, 2) if pair != ("huggingface", "flax_msgpack")
]  # which are forms of one model


def add(directory: Path, format: str) -> str:
    """Add a checkpoint of this format to a directory and return its fingerprint."""
    if format == "openai":
        shutil.copytree(FILES / "plain", directory, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.npz"))
        return bridge.fingerprint(bridge.load(FILES / "plain").tensors)
    seed = list(FILE_OF).index(format)
    checkpoint = random_checkpoint(config_for(format), seed=seed)
    file = FILE_OF[format]
    is_single_file = format in ("nanogpt", "llmc", "gguf")
    target = directory / file if is_single_file else directory.with_name(f"{format}-alone")
    bridge.save(checkpoint, target, format=format)
    if not is_single_file:
        directory.mkdir(exist_ok=True)
        for name in (file, "config.json"):
            shutil.copy(target / name, directory / name)
    return bridge.fingerprint(checkpoint.tensors)


@pytest.mark.parametrize("formats", DIFFERENT_MODELS, ids="-".join)
def test_several_checkpoints_are_listed_and_each_is_read_by_its_file(tmp_path: Path, formats: tuple[str, str]) -> None:
    directory = tmp_path / "both"
    fingerprints = {format: add(directory, format) for format in formats}
    with pytest.raises(CheckpointError) as caught:
        bridge.load(directory)
    first, *listed, last = str(caught.value).splitlines()
    assert first == f"'{directory}' holds several checkpoints:"
    assert sorted(listed) == sorted(f"  - {format}: '{FILE_OF[format]}'" for format in formats)
    assert last.startswith(f"give the file to read, for example: gpt2 inspect '{directory}/")
    for format in formats:
        found = bridge.load(directory / FILE_OF[format])
        assert (found.format, found.path) == (format, directory)
        assert bridge.fingerprint(found.tensors) == fingerprints[format]


def test_the_command_lists_several_checkpoints_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for format in ("huggingface", "nanogpt"):
        add(tmp_path / "both", format)
    assert_refused(tmp_path / "both", "  - nanogpt: 'ckpt.pt'\n", capsys, CheckpointError)


def test_names_in_the_list_are_escaped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a\x1b[31m.gguf", "b.gguf"):
        bridge.save(random_checkpoint(), tmp_path / "both" / name, format="gguf")
    assert_refused(tmp_path / "both", r"'a\x1b[31m.gguf'", capsys, CheckpointError)


def test_unrecognised_files_are_ignored(tmp_path: Path) -> None:
    import torch

    path = huggingface_directory(tmp_path / "model")
    torch.save({"state": {}}, path / "optimizer.pt")
    for name in ("notes.pt", "tokens.bin", "broken.gguf", "other.index", "tf_model.h5"):
        (path / name).write_bytes(b"anything")
    found = bridge.load(path)
    assert (found.format, found.diagnostics) == ("huggingface", ())


def test_files_of_transformers_are_forms_of_one_model_in_its_order(tmp_path: Path) -> None:
    import torch

    path = huggingface_directory(tmp_path / "model")
    add(path, "flax_msgpack")
    torch.save({name: torch.tensor(array) for name, array in bridge.load(path).tensors.items()}, tmp_path / "weights")
    (tmp_path / "weights").rename(path / "pytorch_model.bin")
    names = ["model.safetensors", "pytorch_model.bin", "flax_model.msgpack"]
    while names:
        read, *others = names
        found = bridge.load(path)
        listed = ", ".join(f"'{name}'" for name in others)
        expected = (f"read from '{read}'; the directory also holds {listed}, which was not read",) if others else ()
        assert found.diagnostics == expected
        assert bridge.load(path / read).diagnostics == (), "the user chose it"
        (path / read).unlink()
        names = others


@pytest.mark.parametrize(
    ("format", "index"),
    [("huggingface", "model.safetensors.index.json"), ("flax_msgpack", "flax_model.msgpack.index.json")],
)
def test_an_index_of_shards_is_read_by_its_name(tmp_path: Path, format: str, index: str) -> None:
    bridge.save(random_checkpoint(), tmp_path / "model", format=format, max_shard_bytes=100_000)
    bridge.save(random_checkpoint(config_for("nanogpt")), tmp_path / "model" / "ckpt.pt", format="nanogpt")
    with pytest.raises(CheckpointError, match=f"  - {format}: '{index}'"):
        bridge.load(tmp_path / "model")
    found = bridge.load(tmp_path / "model" / index)
    assert found.format == format
    assert bridge.fingerprint(found.tensors) == bridge.fingerprint(random_checkpoint().tensors)


def test_a_run_with_a_checkpoint_beside_it_is_two_checkpoints(tmp_path: Path) -> None:
    path = huggingface_directory(tmp_path / "run")
    (path / "run.json").write_text('{"distance_km": 10}')
    assert [found.format.name for found in find_checkpoints(path)] == ["huggingface"], "another program's run.json"
    (path / "checkpoints").mkdir()
    assert [found.format.name for found in find_checkpoints(path)] == ["run", "huggingface"]
    with pytest.raises(
        CheckpointError, match=r"several checkpoints:\n  - run: 'run'\n  - huggingface: 'model\.safetens"
    ):
        bridge.load(path)
    assert bridge.load(path / "model.safetensors").format == "huggingface"


def test_weights_that_are_a_link_out_of_the_directory_are_read_only_by_name(tmp_path: Path) -> None:
    path = huggingface_directory(tmp_path / "model")
    (path / "model.safetensors").rename(tmp_path / "weights")
    (path / "model.safetensors").symlink_to(tmp_path / "weights")
    with pytest.raises(CheckpointError, match="is a link out of the checkpoint's directory; give the file itself"):
        bridge.load(path)
    assert bridge.load(path / "model.safetensors").format == "huggingface"


def test_a_config_that_may_belong_to_another_checkpoint_is_not_read(tmp_path: Path) -> None:
    """`config.json` has gelu_new. If nanoGPT's file were alone, that would determine its activation."""
    path = huggingface_directory(tmp_path / "both")
    add(path, "nanogpt")
    found = bridge.load(path / "ckpt.pt")
    assert found.config.activation_function == "gelu"
    assert any("--source-activation gelu_new" in line for line in found.diagnostics)
    assert found.diagnostics[-1] == (
        "config.json beside the file was not read, because the directory holds several checkpoints"
    )


def test_tensorflows_state_file_selects_the_index_and_the_others_are_named(tmp_path: Path) -> None:
    add(tmp_path / "both", "openai")
    for part in ("index", "data-00000-of-00001"):
        shutil.copy(tmp_path / "both" / f"model.ckpt.{part}", tmp_path / "both" / f"older.{part}")
    for source in (tmp_path / "both", tmp_path / "both" / "checkpoint"):
        found = bridge.load(source)
        assert found.format == "openai"
        assert found.diagnostics == (
            "read from 'model.ckpt.index'; the directory also holds 'older.index', which was not read",
        )
    assert "read from 'older.index'" in bridge.load(tmp_path / "both" / "older.index").diagnostics[0]


def test_a_flax_file_and_an_index_without_their_companions_are_refused_by_name(tmp_path: Path) -> None:
    add(tmp_path / "flax", "flax")
    (tmp_path / "flax" / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"flax_model\.safetensors' holds tensors, but there is no config\.json"):
        bridge.load(tmp_path / "flax" / "flax_model.safetensors")
    add(tmp_path / "openai", "openai")
    (tmp_path / "openai" / "hparams.json").unlink()
    with pytest.raises(CheckpointError, match=r"cannot read '.*hparams\.json'"):
        bridge.load(tmp_path / "openai" / "model.ckpt.index")


def test_a_flax_tree_is_recognised_under_any_name_and_a_state_dict_is_not_one(tmp_path: Path) -> None:
    add(tmp_path / "flax", "flax")
    (tmp_path / "flax" / "flax_model.safetensors").rename(tmp_path / "flax" / "any")
    assert bridge.load(tmp_path / "flax" / "any").format == "flax"
    path = huggingface_directory(tmp_path / "model")
    (path / "model.safetensors").rename(path / "flax_model.safetensors")
    assert bridge.load(path / "flax_model.safetensors").format == "huggingface"
    with pytest.raises(ConversionError, match="wte/embedding is missing"):
        bridge.load(path)
