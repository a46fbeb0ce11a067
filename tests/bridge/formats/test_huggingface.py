"""Hugging Face directories, compared with transformers in both directions."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from support.models import TINY, config_for, huggingface_directory, random_checkpoint, random_ids, random_state
from support.refusals import assert_refused

import bridge
from bridge import CheckpointError, ConfigError, ConversionError, GPT2Config
from bridge.containers.safetensors import read_file, write_file
from bridge.formats import WRITABLE
from bridge.storage.tensors import LazyTensorMap

UNTIED = replace(TINY, tie_word_embeddings=False)
UNUSUAL = replace(
    TINY,
    activation_function="quick_gelu",
    layer_norm_epsilon=1e-3,
    scale_attn_by_inverse_layer_idx=True,
    reorder_and_upcast_attn=True,
    n_inner=None,
)
TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def model_of_transformers(config: GPT2Config, kind: str = "GPT2LMHeadModel", dtype: str = "float32") -> Any:
    """Return a model of transformers with random parameters."""
    torch.manual_seed(0)
    model = getattr(transformers, kind)(transformers.GPT2Config(**config.to_hf())).to(TORCH_DTYPES[dtype])
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def as_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()


def assert_tensors_of(tensors: Mapping[str, np.ndarray], model: Any) -> None:
    theirs = {name.removeprefix("transformer."): tensor for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        theirs.pop("lm_head.weight", None)
    assert list(tensors) == list(theirs)
    for name, tensor in theirs.items():
        assert tensors[name].shape == tuple(tensor.shape), name
        assert str(tensors[name].dtype) == str(tensor.dtype).removeprefix("torch."), name
        assert tensors[name].tobytes() == as_bytes(tensor), name


# Files of transformers


@pytest.mark.parametrize("dtype", TORCH_DTYPES)
@pytest.mark.parametrize("config", [TINY, UNTIED, UNUSUAL], ids=["tied", "untied", "unusual"])
@pytest.mark.parametrize("max_shard_size", ["5GB", "100KB"], ids=["whole", "sharded"])
def test_files_of_transformers_are_loaded_bit_for_bit(
    tmp_path: Path, config: GPT2Config, dtype: str, max_shard_size: str
) -> None:
    model = model_of_transformers(config, dtype=dtype)
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (max_shard_size == "100KB")
    checkpoint = bridge.load(tmp_path)
    assert checkpoint.config == config
    assert checkpoint.format == "huggingface"
    assert checkpoint.diagnostics == ()
    assert_tensors_of(checkpoint.tensors, model)


@pytest.mark.parametrize("max_shard_size", ["5GB", "100KB"], ids=["whole", "sharded"])
def test_a_model_without_head_is_loaded(tmp_path: Path, max_shard_size: str) -> None:
    model = model_of_transformers(TINY, "GPT2Model")
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert_tensors_of(bridge.load(tmp_path).tensors, model)


def test_an_untied_model_saved_without_its_head_is_refused(tmp_path: Path) -> None:
    model_of_transformers(UNTIED, "GPT2Model").save_pretrained(tmp_path)
    with pytest.raises(ConversionError, match=r"lm_head\.weight is missing"):
        bridge.load(tmp_path)


HEADS = {
    "GPT2ForSequenceClassification": ["score.weight"],
    "GPT2ForTokenClassification": ["classifier.bias", "classifier.weight"],
    "GPT2ForQuestionAnswering": ["qa_outputs.bias", "qa_outputs.weight"],
    "GPT2DoubleHeadsModel": ["multiple_choice_head.summary.bias", "multiple_choice_head.summary.weight"],
}
"""Model of transformers -> the tensors of its head."""


@pytest.mark.parametrize("kind", HEADS)
def test_the_head_of_another_task_is_refused_by_name_and_left_out_on_request(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    model = model_of_transformers(TINY, kind)
    model.save_pretrained(tmp_path / "model")
    flag = "--drop-extra-heads, or bridge.load(..., drop_extra_heads=True), leaves it out"
    for name in HEADS[kind]:
        says = f"'{name}' is not a parameter of this model but of a head for another task; {flag}"
        assert_refused(tmp_path / "model", says, capsys, ConversionError)
    checkpoint = bridge.load(tmp_path / "model", drop_extra_heads=True)
    left_out = ", ".join(f"'{name}'" for name in HEADS[kind])
    assert checkpoint.diagnostics[0] == f"tensors of heads for other tasks were left out: {left_out}"
    assert checkpoint.config == TINY
    theirs = {name.removeprefix("transformer."): tensor for name, tensor in model.state_dict().items()}
    assert {*theirs} - {*checkpoint.tensors} == {*HEADS[kind]} | ({"lm_head.weight"} & {*theirs})
    for name, array in checkpoint.tensors.items():
        assert array.tobytes() == as_bytes(theirs[name]), name


def test_value_heads_of_trl_are_left_out_on_request(tmp_path: Path) -> None:
    """TRL names the tensors of its value head so, beside those of the language model or of its wrapper."""
    for prefix in ("transformer.", "pretrained_model.transformer."):
        path = tmp_path / prefix
        state = {prefix + name: array for name, array in random_state(TINY).items()}
        heads = {"v_head.summary.bias": np.ones(1, np.float32), "v_head.summary.weight": np.ones((1, 48), np.float32)}
        path.mkdir()
        (path / "config.json").write_text(json.dumps(TINY.to_hf()))
        write_file(path / "model.safetensors", LazyTensorMap.of({**state, **heads}), {"format": "pt"})
        with pytest.raises(
            ConversionError, match=r"'v_head\.summary\.weight' is not a parameter .* --drop-extra-heads"
        ):
            bridge.load(path)
        checkpoint = bridge.load(path, drop_extra_heads=True)
        assert checkpoint.diagnostics[0].endswith("left out: 'v_head.summary.bias', 'v_head.summary.weight'")
        assert_same(checkpoint.tensors, random_state(TINY))


def test_other_tensors_are_refused_although_heads_are_left_out(tmp_path: Path) -> None:
    path = huggingface_directory(tmp_path / "model")
    extra = {
        "scores.weight": np.ones(2, np.float32),
        "score": np.ones(2, np.float32),
        "v_head.": np.ones(2, np.float32),
    }
    (path / "model.safetensors").unlink()
    write_file(path / "model.safetensors", LazyTensorMap.of({**random_state(TINY), **extra}), {"format": "pt"})
    with pytest.raises(ConversionError, match=r"'scores\.weight' is not a parameter of this model\n") as caught:
        bridge.load(path, drop_extra_heads=True)
    assert "'score' is not" in str(caught.value) and "'v_head.' is not" in str(caught.value)


def test_a_model_without_other_heads_is_read_with_the_request_too(tmp_path: Path) -> None:
    for format in WRITABLE:
        bridge.save(random_checkpoint(config_for(format)), tmp_path / format, format=format)
        checkpoint = bridge.load(tmp_path / format, drop_extra_heads=True)
        assert checkpoint.diagnostics == bridge.load(tmp_path / format).diagnostics


def test_cross_attention_is_refused_by_name(tmp_path: Path) -> None:
    config = transformers.GPT2Config(**TINY.to_hf(), add_cross_attention=True)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="add_cross_attention"):
        bridge.load(tmp_path)


# transformers reads our files


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("config", [TINY, UNTIED, UNUSUAL], ids=["tied", "untied", "unusual"])
@pytest.mark.parametrize("max_shard_bytes", [5 * 10**9, 100_000], ids=["whole", "sharded"])
def test_transformers_loads_every_key_of_our_files_and_computes_the_same(
    tmp_path: Path, config: GPT2Config, dtype: type, max_shard_bytes: int
) -> None:
    checkpoint = random_checkpoint(config, dtype)
    bridge.save(checkpoint, tmp_path / "ours", format="huggingface", max_shard_bytes=max_shard_bytes)
    loaded, info = transformers.GPT2LMHeadModel.from_pretrained(
        tmp_path / "ours", output_loading_info=True, dtype="auto", local_files_only=True
    )
    assert {name: list(keys) for name, keys in info.items() if keys} == {}
    assert {"missing_keys", "unexpected_keys", "mismatched_keys"} <= set(info)
    assert_tensors_of(checkpoint.tensors, loaded)
    assert (loaded.lm_head.weight is loaded.transformer.wte.weight) is config.tie_word_embeddings

    expected = model_of_transformers(config, dtype=np.dtype(dtype).name)
    state = {name: torch.from_numpy(array.astype(np.float32)) for name, array in checkpoint.tensors.items()}
    head = state.pop("lm_head.weight", state["wte.weight"])
    expected.load_state_dict({**{f"transformer.{n}": t for n, t in state.items()}, "lm_head.weight": head})
    ids = torch.from_numpy(random_ids(config))
    with torch.no_grad():
        assert torch.equal(loaded.eval()(ids).logits, expected(ids).logits)


def test_a_round_trip_through_transformers_is_bit_for_bit(tmp_path: Path) -> None:
    checkpoint = random_checkpoint(UNTIED)
    bridge.save(checkpoint, tmp_path / "ours", format="huggingface")
    transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    back = bridge.load(tmp_path / "theirs")
    assert back.config == UNTIED
    assert {n: a.tobytes() for n, a in back.tensors.items()} == {n: a.tobytes() for n, a in checkpoint.tensors.items()}


# Sharded writing


@pytest.mark.parametrize("limit", [1, 40_000, 100_000, 300_000])
def test_shards_obey_the_limit_and_the_index_describes_them(tmp_path: Path, limit: int) -> None:
    checkpoint = random_checkpoint(UNTIED)
    bridge.save(checkpoint, tmp_path / "out", format="huggingface", max_shard_bytes=limit)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert [f.name for f in files] == [f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))]
    weight_map = {}
    for file in files:
        tensors, metadata = read_file(file)
        assert metadata == {"format": "pt"}
        sizes = [entry.nbytes for entry in tensors.entries.values()]
        assert sum(sizes) <= limit or len(sizes) == 1
        weight_map |= dict.fromkeys(tensors, file.name)
    assert index["weight_map"] == weight_map
    assert index["metadata"]["total_size"] == sum(e.nbytes for e in checkpoint.tensors.entries.values())
    assert set(weight_map) == {n if n == "lm_head.weight" else f"transformer.{n}" for n in checkpoint.tensors}
    assert_same(bridge.load(tmp_path / "out").tensors, checkpoint.tensors)


def assert_same(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> None:
    assert list(found) == list(expected)
    assert all(found[name].tobytes() == array.tobytes() for name, array in expected.items())


def test_small_models_are_one_file_with_the_metadata_of_transformers(tmp_path: Path) -> None:
    path = huggingface_directory(tmp_path / "out")
    assert sorted(f.name for f in path.iterdir()) == ["config.json", "model.safetensors"]
    assert read_file(path / "model.safetensors")[1] == {"format": "pt"}
    exactly = sum(entry.nbytes for entry in random_checkpoint().tensors.entries.values())
    bridge.save(random_checkpoint(), tmp_path / "fits", format="huggingface", max_shard_bytes=exactly)
    assert (tmp_path / "fits/model.safetensors").exists()


def test_a_model_without_biases_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="bias=False"):
        huggingface_directory(tmp_path / "sub" / "out", replace(TINY, bias=False))
    assert list(tmp_path.iterdir()) == []


# Hostile and damaged indexes

FIRST = "model-00001-of-00003.safetensors"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    bridge.save(random_checkpoint(), tmp_path / "sharded", format="huggingface", max_shard_bytes=200_000)
    assert len(list((tmp_path / "sharded").glob("model-*-of-00003.safetensors"))) == 3
    return tmp_path / "sharded"


def edit_index(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    index = json.loads((path / "model.safetensors.index.json").read_text())
    edit(index)
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    "file",
    [
        f"../outside/{FIRST}",
        f"./{FIRST}",
        f"sub/{FIRST}",
        f"sub/../{FIRST}",
        f"..\\outside\\{FIRST}",
        f"C:{FIRST}",
        f"https://example.com/{FIRST}",
        f"file:{FIRST}",
        f"{FIRST}\0",
        "/etc/passwd",
        "..",
        ".",
        "",
    ],
)
def test_a_shard_that_is_not_a_plain_file_name_is_refused(sharded: Path, file: str) -> None:
    for elsewhere in (sharded.parent / "outside", sharded / "sub"):
        elsewhere.mkdir()
        shutil.copy(sharded / FIRST, elsewhere)  # a reader that followed the path would find it
    edit_index(
        sharded,
        lambda index: index["weight_map"].update({n: file for n, f in index["weight_map"].items() if f == FIRST}),
    )
    with pytest.raises(CheckpointError, match=r"is not a plain file name") as caught:
        bridge.load(sharded)
    assert str(sharded / "model.safetensors.index.json") in str(caught.value)


@pytest.mark.parametrize("file", ["a" * 5000, "\x1b[31m", "model.safetensors "])
def test_an_impossible_file_name_is_a_missing_shard(sharded: Path, file: str) -> None:
    edit_index(sharded, lambda index: index["weight_map"].update({"transformer.wpe.weight": file}))
    with pytest.raises(CheckpointError, match="is missing; download it") as caught:
        bridge.load(sharded)
    assert "\x1b" not in str(caught.value)


def test_a_shard_that_is_a_link_out_of_the_directory_is_refused(sharded: Path) -> None:
    (sharded / FIRST).rename(sharded.parent / "elsewhere.safetensors")
    (sharded / FIRST).symlink_to(sharded.parent / "elsewhere.safetensors")
    with pytest.raises(CheckpointError, match=f"'{FIRST}' is a link out of the directory"):
        bridge.load(sharded)


def test_a_missing_shard_is_named(sharded: Path) -> None:
    (sharded / FIRST).unlink()
    with pytest.raises(CheckpointError, match=f"'{FIRST}' is missing; download it"):
        bridge.load(sharded)


@pytest.mark.timeout(10)
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no FIFOs")
def test_a_shard_that_is_a_fifo_does_not_hang(sharded: Path) -> None:
    (sharded / FIRST).unlink()
    os.mkfifo(sharded / FIRST)
    with pytest.raises(CheckpointError, match=f"'{FIRST}' is missing"):
        bridge.load(sharded)


def test_a_damaged_shard_is_named(sharded: Path) -> None:
    (sharded / FIRST).write_bytes(b"")
    with pytest.raises(CheckpointError, match=rf"{FIRST}': only 0 bytes"):
        bridge.load(sharded)


def test_a_name_that_its_shard_lacks_is_named(sharded: Path) -> None:
    edit_index(sharded, lambda index: index["weight_map"].update({"transformer.new.weight": FIRST}))
    with pytest.raises(CheckpointError, match=rf"'transformer\.new\.weight' should be in '{FIRST}' but is not"):
        bridge.load(sharded)


def test_a_name_in_two_shards_is_named(sharded: Path) -> None:
    shutil.copy(sharded / FIRST, sharded / "again.safetensors")
    edit_index(sharded, lambda index: index["weight_map"].update({"transformer.wte.weight": "again.safetensors"}))
    with pytest.raises(
        CheckpointError, match=rf"'transformer\.wte\.weight' is in '{FIRST}', but the index names 'again"
    ):
        bridge.load(sharded)


def test_a_tensor_that_the_index_does_not_list_is_named(sharded: Path) -> None:
    edit_index(sharded, lambda index: index["weight_map"].pop("transformer.wpe.weight"))
    with pytest.raises(CheckpointError, match=r"'transformer\.wpe\.weight' is in .*, but the index does not list it"):
        bridge.load(sharded)


@pytest.mark.parametrize("size", [1, "12", -1, None, [], 1e30])
def test_a_wrong_total_size_is_refused(sharded: Path, size: object) -> None:
    edit_index(sharded, lambda index: index["metadata"].update({"total_size": size}))
    with pytest.raises(CheckpointError, match=r"total_size is .*, but the shards hold 444368 bytes"):
        bridge.load(sharded)


@pytest.mark.parametrize("metadata", [None, {}, {"total_size": 444368.0}, {"total_size": 444368, "more": 1}])
def test_an_index_without_total_size_or_with_a_float_is_read(sharded: Path, metadata: object) -> None:
    """Some versions of transformers wrote a float."""
    edit_index(sharded, lambda index: index.update({"metadata": metadata}))
    assert_same(bridge.load(sharded).tensors, random_checkpoint().tensors)


@pytest.mark.parametrize("weight_map", [None, [], "model.safetensors", 3, {"wte.weight": 1}, {"wte.weight": None}])
def test_a_weight_map_that_is_not_an_object_of_names_is_refused(sharded: Path, weight_map: object) -> None:
    edit_index(sharded, lambda index: index.update({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match="weight_map must map tensor names to file names"):
        bridge.load(sharded)


@pytest.mark.parametrize("text", ["", "[]", "{", "null", "[" * 100_000, "\xff", '"' + "x" * 2**20 + '"'], ids=range(7))
@pytest.mark.parametrize("file", ["config.json", "model.safetensors.index.json"])
def test_json_that_is_not_an_object_is_refused_by_file(sharded: Path, file: str, text: str) -> None:
    (sharded / file).write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"not valid JSON|must hold an|larger than|holds more than") as caught:
        bridge.load(sharded)
    assert str(sharded / file) in str(caught.value)


def test_an_empty_weight_map_is_a_model_with_everything_missing(sharded: Path) -> None:
    edit_index(sharded, lambda index: index.update({"weight_map": {}, "metadata": {}}))
    with pytest.raises(ConversionError, match=r"wte\.weight is missing"):
        bridge.load(sharded)


def test_all_problems_of_an_index_are_listed_in_one_error(sharded: Path) -> None:
    edit_index(sharded, lambda index: index["weight_map"].update({"a": "../x", "b": "gone.safetensors", "c": FIRST}))
    with pytest.raises(CheckpointError) as caught:
        bridge.load(sharded)
    assert all(name in str(caught.value) for name in ("'../x'", "'gone.safetensors'", "'c'"))


# Other layouts


@pytest.mark.parametrize("limit", [10**9, 200_000], ids=["whole", "sharded"])
def test_a_hugging_face_cache_with_linked_blobs_is_loaded(tmp_path: Path, limit: int) -> None:
    repo = tmp_path / "models--someone--tiny"
    bridge.save(random_checkpoint(), tmp_path / "plain", format="huggingface", max_shard_bytes=limit)
    snapshot = repo / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    for number, file in enumerate((tmp_path / "plain").iterdir()):
        file.rename(repo / "blobs" / f"{number:064x}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number:064x}")
    assert_same(bridge.load(snapshot).tensors, random_checkpoint().tensors)
    (tmp_path / "link").symlink_to(snapshot)
    assert_same(bridge.load(tmp_path / "link").tensors, random_checkpoint().tensors)


def test_old_files_with_buffers_and_a_stored_head_load_with_diagnostics(tmp_path: Path) -> None:
    path = huggingface_directory(tmp_path / "old")
    state = random_state(TINY)
    stored = {**state, "lm_head.weight": state["wte.weight"]}
    for i in range(TINY.n_layer):
        stored[f"h.{i}.attn.bias"] = np.tril(np.ones((1, 1, 40, 40), np.uint8))
        stored[f"h.{i}.attn.masked_bias"] = np.float32(-1e4)
    (path / "model.safetensors").unlink()
    bridge.containers.safetensors.write_file(
        path / "model.safetensors", bridge.storage.tensors.LazyTensorMap.of(stored), {}
    )
    checkpoint = bridge.load(path)
    assert_same(checkpoint.tensors, state)
    assert len(checkpoint.diagnostics) == 2
    assert "10 causal-mask buffers" in checkpoint.diagnostics[0]
    assert "lm_head.weight" in checkpoint.diagnostics[1]


def test_mixed_dtypes_load_with_a_diagnostic(tmp_path: Path) -> None:
    state = random_state(TINY, ml_dtypes.bfloat16)
    state["ln_f.weight"] = state["ln_f.weight"].astype(np.float32)
    bridge.save(bridge.Checkpoint.of(state, TINY), tmp_path / "mixed", format="huggingface")
    checkpoint = bridge.load(tmp_path / "mixed")
    [diagnostic] = bridge.find_diagnostics(checkpoint)
    assert diagnostic.startswith("mixed dtypes: bfloat16 in 63 (wte.weight), float32 in 1 (ln_f.weight)")
    assert_same(checkpoint.tensors, state)


def test_weights_that_are_not_those_of_the_config_are_refused(tmp_path: Path) -> None:
    path = huggingface_directory(tmp_path / "model")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "n_layer": 6}))
    with pytest.raises(ConversionError, match=r"h\.5\.ln_1\.weight is missing"):
        bridge.load(path)
