"""transformers 4's Flax checkpoints: files of transformers 4.57.6 (tests/files), and our files read by flax 0.12.8."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import flax.serialization
import flax.traverse_util
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from support.models import SMALLEST, TINY, random_checkpoint
from support.refusals import assert_refused

import bridge
import gpt2_jax
from bridge import BridgeError, Checkpoint, CheckpointError, ConfigError, ConversionError, GPT2Config

WRITTEN_BY_TRANSFORMERS = Path(__file__).parents[2] / "files" / "transformers-4.57.6"
NAMES = ("tied", "bfloat16", "untied", "sharded", "without_head")
SAME_FP32 = 2e-6
"""Tolerance for logits of size 1: the order of float32 sums differs."""

FOUR_HEADS = replace(SMALLEST, n_head=4)
UNTIED = replace(SMALLEST, tie_word_embeddings=False)

Leaves = dict[str, np.ndarray]


def leaves_of(directory: Path) -> Leaves:
    """Return path in the tree -> array, read by flax from one or several files."""
    leaves: Leaves = {}
    for file in sorted(directory.glob("flax_model*.msgpack")):
        leaves |= flax.traverse_util.flatten_dict(flax.serialization.msgpack_restore(file.read_bytes()), sep="/")
    return leaves


def flaxs(directory: Path, leaves: Mapping[str, Any], config: GPT2Config = SMALLEST) -> Path:
    """Write a checkpoint of these leaves with flax."""
    directory.mkdir(exist_ok=True)
    tree = flax.traverse_util.unflatten_dict(leaves, sep="/")
    (directory / "flax_model.msgpack").write_bytes(flax.serialization.to_bytes(tree))
    (directory / "config.json").write_text(json.dumps(config.to_hf()))
    return directory


def ours(directory: Path, config: GPT2Config = SMALLEST, dtype: Any = np.float32, **options: Any) -> Checkpoint:
    checkpoint = random_checkpoint(config, dtype)
    bridge.save(checkpoint, directory, format="flax_msgpack", **options)
    return checkpoint


def random_leaves(tmp_path: Path, config: GPT2Config = SMALLEST) -> Leaves:
    ours(tmp_path / "leaves", config)
    return leaves_of(tmp_path / "leaves")


# Files of transformers


@pytest.mark.parametrize("name", NAMES)
def test_files_of_transformers_are_read(name: str) -> None:
    """The test states names and layouts itself, and flax reads the file."""
    ckpt = bridge.load(WRITTEN_BY_TRANSFORMERS / name)
    assert ckpt.format == "flax_msgpack"
    assert ckpt.config.tie_word_embeddings is (name != "untied")
    assert (ckpt.config.n_head, ckpt.config.n_inner) == (4, 12)
    leaves = leaves_of(WRITTEN_BY_TRANSFORMERS / name)
    prefix = "" if name == "without_head" else "transformer/"
    dtype = ml_dtypes.bfloat16 if name == "bfloat16" else np.float32
    assert len(ckpt.tensors) == len(leaves)
    for torch_name, array in ckpt.tensors.items():
        *modules, _ = torch_name.split(".")
        leaf = next(leaf for leaf in ("embedding", "scale", "kernel") if leaf in leaves_under(leaves, modules))
        leaf = "bias" if torch_name.endswith("bias") else leaf
        is_head = modules == ["lm_head"]
        stored = leaves["/".join([*modules, leaf]) if is_head else prefix + "/".join([*modules, leaf])]
        assert array.dtype == stored.dtype == dtype
        np.testing.assert_array_equal(array, stored.T if leaf == "kernel" else stored, err_msg=torch_name)


def leaves_under(leaves: Leaves, modules: list[str]) -> set[str]:
    """Return the last parts of the names of a module's arrays."""
    module = "/".join(modules)
    return {
        path.rpartition("/")[2] for path in leaves if path.rpartition("/")[0].removeprefix("transformer/") == module
    }


@pytest.mark.parametrize("name", NAMES)
def test_both_backends_compute_the_logits_of_transformers(name: str) -> None:
    import torch

    import gpt2_torch

    ids, expected = np.load(WRITTEN_BY_TRANSFORMERS / "ids.npy"), np.load(WRITTEN_BY_TRANSFORMERS / name / "logits.npy")
    assert abs(expected).max() > 0.5, "logits large enough to compare"
    reference = gpt2_torch.model_from_checkpoint(bridge.load(WRITTEN_BY_TRANSFORMERS / name)).float().eval()
    with torch.no_grad():
        np.testing.assert_allclose(reference(torch.from_numpy(ids)).numpy(), expected, rtol=0, atol=SAME_FP32)
    model, params = gpt2_jax.from_pretrained(WRITTEN_BY_TRANSFORMERS / name)
    found = model.apply({"params": params}, jnp.asarray(ids))
    np.testing.assert_allclose(found, expected, rtol=0, atol=SAME_FP32)


@pytest.mark.parametrize("name", NAMES)
def test_files_of_transformers_are_written_again_with_the_same_arrays(tmp_path: Path, name: str) -> None:
    ckpt = bridge.load(WRITTEN_BY_TRANSFORMERS / name)
    bridge.save(ckpt, tmp_path / "again", format="flax_msgpack", max_shard_bytes=2_000)
    assert len(list(tmp_path.glob("again/flax_model-*-of-*.msgpack"))) > 1
    again = bridge.load(tmp_path / "again")
    assert again.config == ckpt.config
    assert bridge.fingerprint(again.tensors) == bridge.fingerprint(ckpt.tensors)
    before, after = leaves_of(WRITTEN_BY_TRANSFORMERS / name), leaves_of(tmp_path / "again")
    for path, array in before.items():
        written = after[path if name != "without_head" else f"transformer/{path}"]
        assert (written.dtype, written.shape, written.tobytes()) == (array.dtype, array.shape, array.tobytes()), path
    before_json, after_json = (
        json.loads((directory / "config.json").read_text())
        for directory in (WRITTEN_BY_TRANSFORMERS / name, tmp_path / "again")
    )
    del before_json["architectures"]  # without_head is written with a head
    assert before_json.items() <= after_json.items()


def test_a_checkpoint_without_a_head_is_reported() -> None:
    (diagnostic,) = bridge.load(WRITTEN_BY_TRANSFORMERS / "without_head").diagnostics
    assert "from FlaxGPT2Model" in diagnostic
    assert bridge.load(WRITTEN_BY_TRANSFORMERS / "tied").diagnostics == ()


# Round trips


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16, np.float64], ids=lambda d: d.__name__)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("options", [{}, {"max_shard_bytes": 50_000}], ids=["whole", "shards"])
def test_weights_and_configuration_are_read_back(
    tmp_path: Path, tied: bool, dtype: type, options: dict[str, int]
) -> None:
    config = replace(TINY, tie_word_embeddings=tied, activation_function="quick_gelu", layer_norm_epsilon=1e-3)
    ckpt = ours(tmp_path / "out", config, dtype, **options)
    found = bridge.load(tmp_path / "out")
    assert (found.format, found.config, found.path) == ("flax_msgpack", config, tmp_path / "out")
    assert bridge.fingerprint(found.tensors) == bridge.fingerprint(ckpt.tensors)
    assert found.diagnostics == ()


def test_flax_reads_a_written_file_whose_kernels_are_transposed(tmp_path: Path) -> None:
    """Compares c_attn, c_proj, c_fc and the head. Only the head is not transposed in Flax."""
    ckpt = ours(tmp_path / "out", replace(FOUR_HEADS, tie_word_embeddings=False))
    leaves = leaves_of(tmp_path / "out")
    assert len(leaves) == len(ckpt.tensors)
    for module in ("attn/c_attn", "attn/c_proj", "mlp/c_fc", "mlp/c_proj"):
        canonical = ckpt.tensors[f"h.1.{module.replace('/', '.')}.weight"]
        np.testing.assert_array_equal(leaves[f"transformer/h/1/{module}/kernel"], canonical.T)
    np.testing.assert_array_equal(leaves["transformer/wte/embedding"], ckpt.tensors["wte.weight"])
    np.testing.assert_array_equal(leaves["lm_head/kernel"], ckpt.tensors["lm_head.weight"].T)
    assert leaves["lm_head/kernel"].shape == (8, 11)


@pytest.mark.parametrize("source", ["out", "out/flax_model.msgpack"])
def test_a_directory_and_its_file_load_the_same_checkpoint(tmp_path: Path, source: str) -> None:
    ckpt = ours(tmp_path / "out")
    found = bridge.load(tmp_path / source)
    assert (found.format, found.path) == ("flax_msgpack", tmp_path / "out")
    assert bridge.fingerprint(found.tensors) == bridge.fingerprint(ckpt.tensors)


def test_a_file_without_config_json_is_refused(tmp_path: Path) -> None:
    ours(tmp_path / "out")
    (tmp_path / "out" / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"flax_model\.msgpack' holds tensors, but there is no config\.json"):
        bridge.load(tmp_path / "out" / "flax_model.msgpack")


def test_the_single_file_takes_precedence_over_shards_as_in_transformers(tmp_path: Path) -> None:
    ours(tmp_path / "out", max_shard_bytes=2_000)
    shutil.copy(tmp_path / "out" / "flax_model-00001-of-00003.msgpack", tmp_path / "out" / "flax_model.msgpack")
    with pytest.raises(ConversionError, match=r"flax_model\.msgpack' does not hold"):
        bridge.load(tmp_path / "out")


def test_safetensors_beside_the_flax_file_are_read(tmp_path: Path) -> None:
    bridge.save(random_checkpoint(SMALLEST), tmp_path / "out", format="huggingface")
    (tmp_path / "out" / "flax_model.msgpack").write_bytes(b"damaged")
    assert bridge.load(tmp_path / "out").format == "huggingface"


def test_no_tensor_is_read_to_open_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One file and shards. Of 1 MB of weights, only the 4 kB blocks that contain names are read."""
    config = replace(SMALLEST, n_embd=64, n_inner=None)
    counts: list[int] = []
    read = bridge.storage.stored_file.StoredFile.read
    monkeypatch.setattr(
        bridge.storage.stored_file.StoredFile,
        "read",
        lambda self, at, count: counts.append(count) or read(self, at, count),
    )
    monkeypatch.setattr(bridge.storage.stored_file, "aligned_empty", lambda *_: pytest.fail("a tensor was read"))
    for name, options in (("whole", {}), ("shards", {"max_shard_bytes": 100_000})):
        ckpt = ours(tmp_path / name, config, **options)
        counts.clear()
        found = bridge.load(tmp_path / name)
        assert {name: entry.shape for name, entry in found.tensors.entries.items()} == {
            name: entry.shape for name, entry in ckpt.tensors.entries.items()
        }
        assert max(counts) <= 4096 and sum(counts) < sum(entry.nbytes for entry in ckpt.tensors.entries.values()) / 2


# Models that the format cannot store


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("scale_attn_weights", False),
        ("scale_attn_by_inverse_layer_idx", True),
        ("reorder_and_upcast_attn", True),
        ("activation_function", "gelu_fast"),
        ("bias", False),
    ],
)
def test_settings_that_transformers_ignores_are_refused_by_name(tmp_path: Path, field: str, value: Any) -> None:
    checkpoint = random_checkpoint(replace(SMALLEST, **{field: value}))
    with pytest.raises(ConfigError, match=f"{field}='?{value}"):
        bridge.save(checkpoint, tmp_path / "out", format="flax_msgpack")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("field", "value"),
    [("scale_attn_weights", False), ("scale_attn_by_inverse_layer_idx", True), ("reorder_and_upcast_attn", True)],
)
def test_settings_that_transformers_ignored_are_read_and_reported(tmp_path: Path, field: str, value: bool) -> None:
    config = replace(SMALLEST, **{field: value})
    found = bridge.load(flaxs(tmp_path / "out", random_leaves(tmp_path), config))
    assert found.config == config
    assert [diagnostic.split(",")[0] for diagnostic in found.diagnostics] == [f"{field}={value}"]


# Trees that are not those of the configured model


def renamed(old: str, new: str) -> Callable[[Leaves], Leaves]:
    return lambda leaves: {path.replace(old, new): array for path, array in leaves.items()}


def without(path: str) -> Callable[[Leaves], Leaves]:
    return lambda leaves: {name: array for name, array in leaves.items() if name != path}


def changed(path: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Leaves], Leaves]:
    return lambda leaves: {**leaves, path: change(leaves[path])}


WTE, C_ATTN, C_FC = "transformer/wte/embedding", "transformer/h/1/attn/c_attn/kernel", "transformer/h/0/mlp/c_fc/kernel"

OTHER_TREES: dict[str, tuple[Callable[[Leaves], Leaves], str]] = {
    "nothing": (lambda _: {}, "transformer/wte/embedding is missing (shape (11, 8))"),
    "an array missing": (without(C_ATTN), f"{C_ATTN} is missing (shape (24, 8))"),
    "a layer missing": (
        lambda leaves: {path: array for path, array in leaves.items() if "/1/" not in path},
        "transformer/h/1/ln_1/scale is missing",
    ),
    "a layer skipped": (renamed("/h/1/", "/h/2/"), "'transformer/h/2/ln_1/scale' is not a parameter of this model"),
    "a layer too many": (
        lambda leaves: leaves | {path.replace("/1/", "/2/"): array for path, array in leaves.items()},
        "'transformer/h/2/ln_1/scale' is not a parameter of this model",
    ),
    "a layer under another spelling": (renamed("/h/1/", "/h/01/"), "'transformer/h/01/ln_1/scale' is not a parameter"),
    "names of this project": (renamed("/h/", "/h_"), "'transformer/h_0/ln_1/scale' is not a parameter"),
    "a level of params": (renamed("transformer/", "params/transformer/"), "'params/transformer/wte/embedding' is not"),
    "names with control characters": (renamed("wte", "\x1b[31m\n"), r"'transformer/\x1b[31m\n/embedding' is not"),
    "another model's name": (renamed("transformer/wte", "model/wte"), "'model/wte/embedding' is not a parameter"),
    "with and without transformer": (
        lambda leaves: leaves | {"wte/embedding": leaves[WTE]},
        "'wte/embedding' is not a parameter of this model",
    ),
    "an array in place of a module": (
        lambda leaves: without(WTE)(leaves) | {"transformer/wte": leaves[WTE]},
        "'transformer/wte' is not a parameter",
    ),
    "a kernel not transposed": (
        changed(C_ATTN, np.transpose),
        f"{C_ATTN} has shape (8, 24); the configuration requires (24, 8)",
    ),
    "a kernel flat": (changed(C_FC, np.ravel), f"{C_FC} has shape (96,); the configuration requires (12, 8)"),
    "a padded vocabulary": (
        changed(WTE, lambda array: np.pad(array, ((0, 5), (0, 0)))),
        f"{WTE} has shape (16, 8); the configuration requires (11, 8)",
    ),
    "whole numbers": (
        changed(C_FC, lambda array: array.astype(np.int8)),
        f"'{C_FC}' holds int8; weights must be one of",
    ),
    "bools": (changed(C_FC, lambda array: array > 0), f"'{C_FC}' holds bool"),
    "scalars": (changed(C_FC, lambda array: array[0, 0]), f"{C_FC} has shape ()"),
    "a tied head that differs": (
        lambda leaves: leaves | {"lm_head/kernel": leaves[WTE].T + 1},
        "lm_head.weight differs from wte.weight although the configuration ties them",
    ),
    "a tied head not transposed": (
        lambda leaves: leaves | {"lm_head/kernel": leaves[WTE]},
        "lm_head/kernel has shape (11, 8); the configuration requires (8, 11)",
    ),
    "a head that is an embedding": (
        lambda leaves: leaves | {"lm_head/embedding": leaves[WTE]},
        "'lm_head/embedding' is not a parameter",
    ),
}


@pytest.mark.parametrize(("change", "message"), OTHER_TREES.values(), ids=OTHER_TREES)
def test_a_tree_of_another_model_is_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Callable[[Leaves], Leaves], message: str
) -> None:
    assert_refused(flaxs(tmp_path / "other", change(random_leaves(tmp_path))), message, capsys, ConversionError)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("lm_head/kernel"), "lm_head/kernel is missing (shape (8, 11))"),
        (
            changed("lm_head/kernel", np.transpose),
            "lm_head/kernel has shape (11, 8); the configuration requires (8, 11)",
        ),
    ],
    ids=["no head", "a head not transposed"],
)
def test_an_untied_head_must_be_stored_transposed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Callable[[Leaves], Leaves], message: str
) -> None:
    source = flaxs(tmp_path / "other", change(random_leaves(tmp_path, UNTIED)), UNTIED)
    assert_refused(source, message, capsys, ConversionError)


def test_a_stored_tied_head_is_left_out_and_reported(tmp_path: Path) -> None:
    leaves = random_leaves(tmp_path)
    found = bridge.load(flaxs(tmp_path / "out", leaves | {"lm_head/kernel": leaves[WTE].T}))
    assert "lm_head.weight" not in found.tensors
    assert found.diagnostics == ("lm_head/kernel is stored although the head is tied; it equals wte/embedding",)


def test_all_differences_are_in_one_error(tmp_path: Path) -> None:
    leaves = without(WTE)(changed(C_ATTN, np.transpose)(random_leaves(tmp_path))) | {"extra/kernel": np.zeros(1)}
    with pytest.raises(ConversionError) as caught:
        bridge.load(flaxs(tmp_path / "out", leaves))
    for message in (f"{WTE} is missing", f"{C_ATTN} has shape", "'extra/kernel' is not"):
        assert message in str(caught.value)


# Damaged and hostile shards


def index_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "flax_model.msgpack.index.json").read_text())


def in_shards(directory: Path, change: Callable[[dict[str, Any]], object] = lambda _: None) -> Path:
    """Write a checkpoint in three shards, with an index that `change` has edited."""
    ours(directory, max_shard_bytes=2_000)
    index = index_of(directory)
    change(index)
    (directory / "flax_model.msgpack.index.json").write_text(json.dumps(index))
    return directory


def mapped(to: Any) -> Callable[[dict[str, Any]], object]:
    """Edit the index so that it places the embedding in this file."""
    return lambda index: index["weight_map"].update({WTE: to})


FIRST, LAST = (f"flax_model-0000{number}-of-00003.msgpack" for number in (1, 3))

BAD_INDICES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "absolute": (mapped("/etc/passwd"), "'/etc/passwd' is not a plain file name"),
    "with ..": (mapped(f"../{FIRST}"), "is not a plain file name"),
    "in a folder": (mapped(f"shards/{FIRST}"), "is not a plain file name"),
    "with backslashes": (mapped(f"..\\{FIRST}"), "is not a plain file name"),
    "a URL": (mapped("https://example.org/flax_model.msgpack"), "is not a plain file name"),
    "the directory": (mapped("."), "is not a plain file name"),
    "empty": (mapped(""), "is not a plain file name"),
    "with a NUL": (mapped("a\0b"), r"'a\x00b' is not a plain file name"),
    "with escape codes": (mapped("\x1b[31m"), r"'\x1b[31m' is missing"),
    "too long": (mapped("x" * 5_000), "is missing"),
    "missing": (mapped("flax_model-00009-of-00003.msgpack"), "'flax_model-00009-of-00003.msgpack' is missing"),
    "in another shard": (mapped(LAST), f"'{WTE}' should be in '{LAST}' but is not"),
    "the configuration": (mapped("config.json"), "config.json'"),
    "a number": (mapped(1), "weight_map must map tensor names to file names"),
    "nil": (mapped(None), "weight_map must map tensor names"),
    "a list": (lambda index: index.update(weight_map=[FIRST]), "weight_map must map tensor names"),
    "no weight_map": (lambda index: index.pop("weight_map"), "weight_map must map tensor names"),
    "an empty weight_map": (lambda index: index.update(weight_map={}), "total_size is"),
    "a name that its shard lacks": (
        lambda index: index["weight_map"].update({"transformer/more": FIRST}),
        f"'transformer/more' should be in '{FIRST}' but is not",
    ),
    "a name that is not listed": (lambda index: index["weight_map"].pop(WTE), f"'{WTE}' is in '{FIRST}'"),
    "a wrong total_size": (lambda index: index["metadata"].update(total_size=5), "total_size is '5'"),
    "total_size a text": (lambda index: index["metadata"].update(total_size="many"), "total_size is 'many'"),
}


@pytest.mark.parametrize(("change", "message"), BAD_INDICES.values(), ids=BAD_INDICES)
def test_a_bad_index_is_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Callable[[dict[str, Any]], object], message: str
) -> None:
    assert_refused(in_shards(tmp_path / "shards", change), message, capsys, CheckpointError)


def a_linked_shard(directory: Path) -> None:
    (directory / FIRST).rename(directory.parent / "elsewhere")
    (directory / FIRST).symlink_to(directory.parent / "elsewhere")


def a_name_in_two_shards(directory: Path) -> None:
    both = {
        path: array for path, array in leaves_of(directory).items() if index_of(directory)["weight_map"][path] == LAST
    }
    both[WTE] = leaves_of(directory)[WTE]
    tree = flax.traverse_util.unflatten_dict(both, sep="/")
    (directory / LAST).write_bytes(flax.serialization.to_bytes(tree))


BAD_SHARDS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a link out of the directory": (a_linked_shard, f"'{FIRST}' is a link out of the directory"),
    "gone": (lambda directory: (directory / LAST).unlink(), f"'{LAST}' is missing"),
    "empty": (lambda directory: (directory / LAST).write_bytes(b""), LAST),
    "truncated": (lambda directory: (directory / LAST).write_bytes((directory / LAST).read_bytes()[:-1]), "truncated"),
    "swapped": (lambda directory: shutil.copy(directory / FIRST, directory / LAST), "should be in"),
    "with a tensor of another shard": (a_name_in_two_shards, f"'{WTE}' is in '{LAST}', but the index names '{FIRST}'"),
    "an empty tree": (lambda directory: (directory / LAST).write_bytes(b"\x80"), f"should be in '{LAST}' but is not"),
}


@pytest.mark.parametrize(("damage", "message"), BAD_SHARDS.values(), ids=BAD_SHARDS)
def test_a_bad_shard_is_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], object], message: str
) -> None:
    damage(in_shards(tmp_path / "shards"))
    assert_refused(tmp_path / "shards", message, capsys, BridgeError)


def test_shards_respect_the_size_limit_and_the_index_lists_them(tmp_path: Path) -> None:
    in_shards(tmp_path / "shards")
    leaves, index = leaves_of(tmp_path / "shards"), index_of(tmp_path / "shards")
    assert index["weight_map"].keys() == leaves.keys()
    assert index["metadata"] == {"total_size": sum(array.nbytes for array in leaves.values())}
    assert sorted({*index["weight_map"].values()}) == sorted(p.name for p in tmp_path.glob("shards/*-of-*.msgpack"))


def test_an_empty_shard_of_transformers_is_accepted(tmp_path: Path) -> None:
    """If the first weight is larger than a shard, transformers 4.57.6 writes an empty file first."""
    ckpt = ours(tmp_path / "out", max_shard_bytes=1)
    (tmp_path / "out" / "flax_model-00000-of-00028.msgpack").write_bytes(flax.serialization.to_bytes({}))
    found = bridge.load(tmp_path / "out")
    assert bridge.fingerprint(found.tensors) == bridge.fingerprint(ckpt.tensors)
