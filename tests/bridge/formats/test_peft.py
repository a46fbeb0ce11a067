"""LoRA adapters, compared with PEFT: committed files of PEFT 0.21.2, and the package itself where it is installed."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from support.commands import run
from support.models import SMALLEST, config_for, huggingface_directory, random_checkpoint, random_ids, random_state
from support.peft_adapters import (
    ADAPTERS,
    COMMITTED,
    FILES,
    UNTIED,
    merged_tensors,
    model_of_transformers,
    write_with_peft,
)
from support.refusals import assert_refused
from support.tokenizers_for_tests import write_byte_tokenizer

import bridge
from bridge import CheckpointError, ConversionError, LoRA
from bridge.containers.safetensors import read_file, write_file
from bridge.formats import WRITABLE
from bridge.formats.recognition import SeveralCheckpointsError
from bridge.storage.tensors import LazyTensor, LazyTensorMap

MERGE_ERROR = 1e-6  # of weights of about 1 in float32
LOGIT_ERROR = 1e-5
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
CASES = pytest.mark.parametrize("name", COMMITTED)
needs_peft = pytest.mark.skipif(find_spec("peft") is None, reason="needs peft, which is not installed")


def adapter(directory: Path, name: str = "patterns") -> tuple[Path, Path]:
    """Return a copy of a committed adapter, and its base."""
    shutil.copytree(FILES / name.replace(" ", "-"), directory / "adapter")
    return directory / "adapter", huggingface_directory(directory / "base", ADAPTERS[name][0])


def change_config(path: Path, **fields: Any) -> None:
    stored = json.loads((path / CONFIG).read_text())
    (path / CONFIG).write_text(json.dumps({**stored, **fields}))


def change_tensors(path: Path, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    tensors = {name: np.array(array) for name, array in read_file(path / WEIGHTS)[0].items()}
    change(tensors)
    (path / WEIGHTS).unlink()
    write_file(path / WEIGHTS, LazyTensorMap.of(tensors), {"format": "pt"})


def assert_close(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> None:
    assert {*found} == {*expected}
    for name, array in expected.items():
        assert (found[name].shape, found[name].dtype) == (array.shape, array.dtype), name
        assert np.abs(found[name] - array).max() < MERGE_ERROR, name


# What PEFT writes


@CASES
def test_a_committed_adapter_is_merged_as_peft_merged_it(tmp_path: Path, name: str) -> None:
    path, base = adapter(tmp_path, name)
    changed = dict(read_file(path / "merged.safetensors")[0])
    assert len(changed) >= 3
    (path / "merged.safetensors").unlink()
    merged = bridge.load(path, base=base)
    before = random_state(ADAPTERS[name][0])
    assert_close(merged.tensors, {**before, **changed})
    assert {n for n in before if not np.array_equal(before[n], merged.tensors[n])} == {*changed}
    assert (merged.format, merged.config, merged.source) == ("peft", ADAPTERS[name][0], path / WEIGHTS)


@needs_peft
@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_of_peft_is_merged_as_peft_merges_it(tmp_path: Path, name: str) -> None:
    config = ADAPTERS[name][0]
    expected = write_with_peft(tmp_path / "adapter", *ADAPTERS[name])
    merged = bridge.load(tmp_path / "adapter", base=huggingface_directory(tmp_path / "base", config))
    assert_close(merged.tensors, expected)
    assert merged.config == replace(config, tie_word_embeddings="lm_head.weight" not in expected)


@needs_peft
@pytest.mark.parametrize("target", ["wte", "lm_head"])
def test_an_update_of_one_of_a_tied_pair_unties_it(tmp_path: Path, target: str) -> None:
    """PEFT's merge of it changes both; the model that was trained changes one."""
    import peft
    import torch

    arguments = {"target_modules": ["c_attn", target]}
    write_with_peft(tmp_path / "adapter", SMALLEST, arguments)
    merged = bridge.load(tmp_path / "adapter", base=huggingface_directory(tmp_path / "base", SMALLEST))
    assert not merged.config.tie_word_embeddings
    assert "no longer tied" in merged.diagnostics[-1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trained = peft.PeftModel.from_pretrained(model_of_transformers(SMALLEST), tmp_path / "adapter")
    bridge.save(merged, tmp_path / "merged", format="huggingface")
    import transformers

    ours = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "merged")
    ids = torch.from_numpy(random_ids(SMALLEST, length=5))
    with torch.no_grad():
        difference = trained(ids).logits - ours(ids).logits
    assert difference.abs().max() < LOGIT_ERROR


@needs_peft
def test_an_adapter_for_a_resized_vocabulary_resizes_it(tmp_path: Path) -> None:
    import peft
    import torch

    base = huggingface_directory(tmp_path / "base", SMALLEST)
    model = model_of_transformers(SMALLEST)
    model.resize_token_embeddings(SMALLEST.vocab_size + 2, mean_resizing=False)
    settings = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(model, settings)
        adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    merged = bridge.load(tmp_path / "adapter", base=base)
    assert merged.config == replace(SMALLEST, vocab_size=SMALLEST.vocab_size + 2)
    assert_close(merged.tensors, merged_tensors(adapted))


# What PEFT reads


def random_factors(config: bridge.GPT2Config, ranks: Mapping[str, int]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(0)
    shapes = {p.torch_name.removesuffix(".weight"): p.torch_shape for p in bridge.parameters(config)}
    factors = {}
    for module, rank in ranks.items():
        rows, columns = shapes[module] if module != "lm_head" else shapes[module][::-1]
        pair = rng.normal(size=(rank, rows)), rng.normal(size=(columns, rank))
        factors[module] = (pair[0].astype(np.float32), pair[1].astype(np.float32))
    return factors


RANKS = {"h.0.attn.c_attn": 3, "h.1.attn.c_attn": 3, "h.1.mlp.c_proj": 2, "wpe": 1}
OURS = {
    "tied": (SMALLEST, RANKS, {}),
    "untied": (UNTIED, {**RANKS, "wte": 3, "lm_head": 4}, {}),
    "rank-stabilized": (SMALLEST, RANKS, {"rank_stabilized": True}),
}


def our_adapter(name: str) -> tuple[bridge.GPT2Config, LoRA]:
    """Return an adapter with different alphas, and two tensors that are replaced."""
    config, ranks, options = OURS[name]
    lora = LoRA.of(random_factors(config, ranks), alpha=4, **options)
    other = LoRA.of(random_factors(config, {"h.0.mlp.c_fc": 2}), alpha=7.5, **options)
    whole = {"ln_f.bias": np.ones(8, np.float32), "ln_f.weight": np.full(8, 2, np.float32)}
    return config, replace(lora, updates={**lora.updates, **other.updates}, tensors=LazyTensorMap.of(whole))


@needs_peft
@pytest.mark.parametrize("name", OURS)
def test_peft_reads_ours_and_merges_it_as_we_do(tmp_path: Path, name: str) -> None:
    import peft

    config, lora = our_adapter(name)
    bridge.save_lora(lora, tmp_path / "ours", base_model="gpt2")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about fan_in_fan_out of an embedding
        adapted = peft.PeftModel.from_pretrained(model_of_transformers(config), tmp_path / "ours")
    theirs = merged_tensors(adapted)
    ours = bridge.merge_lora(random_checkpoint(config), lora)
    assert_close(ours.tensors, theirs)
    changed = [name for name, array in random_state(config).items() if not np.array_equal(array, theirs[name])]
    assert len(changed) == len(lora.updates) + len(lora.tensors)


@pytest.mark.parametrize("name", OURS)
def test_ours_is_read_as_it_was_written(tmp_path: Path, name: str) -> None:
    config, lora = our_adapter(name)
    bridge.save_lora(lora, tmp_path / "ours")
    assert sorted(file.name for file in (tmp_path / "ours").iterdir()) == [CONFIG, WEIGHTS]
    read = bridge.load(tmp_path / "ours", base=huggingface_directory(tmp_path / "base", config))
    merged = bridge.merge_lora(random_checkpoint(config), lora)
    assert bridge.fingerprint(read.tensors) == bridge.fingerprint(merged.tensors)


def test_an_existing_directory_is_not_overwritten_by_an_adapter(tmp_path: Path) -> None:
    path = huggingface_directory(tmp_path / "model", SMALLEST)
    before = sorted(path.iterdir())
    with pytest.raises(CheckpointError, match="exists"):
        bridge.save_lora(our_adapter("tied")[1], path)
    assert sorted(path.iterdir()) == before


def test_an_adapter_that_is_not_finite_is_written_only_on_request(tmp_path: Path) -> None:
    factors = {"h.0.attn.c_attn": (np.full((2, 8), np.nan, np.float32), np.ones((24, 2), np.float32))}
    lora = LoRA.of(factors, alpha=1)
    with pytest.raises(ConversionError, match=r"c_attn\.lora_A\.weight has 16 values that are not finite"):
        bridge.save_lora(lora, tmp_path / "ours")
    assert list(tmp_path.iterdir()) == []
    bridge.save_lora(lora, tmp_path / "ours", allow_non_finite=True)
    assert np.isnan(
        read_file(tmp_path / "ours" / WEIGHTS)[0]["base_model.model.transformer.h.0.attn.c_attn.lora_A.weight"]
    ).all()


@pytest.mark.parametrize("lora", [LoRA({}), "both kinds"], ids=str)
def test_an_adapter_that_peft_cannot_have_is_refused(tmp_path: Path, lora: Any) -> None:
    if lora == "both kinds":
        plain, stabilized = (our_adapter(name)[1].updates for name in ("tied", "rank-stabilized"))
        lora = LoRA({**plain, "h.0.mlp.c_fc.weight": stabilized["h.0.mlp.c_fc.weight"]})
    with pytest.raises(ConversionError, match="at least one update, and the same kind of scaling"):
        bridge.save_lora(lora, tmp_path / "ours")
    assert list(tmp_path.iterdir()) == []


# The merge


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16], ids=str)
def test_an_update_is_computed_in_float32_and_cast_once(dtype: Any) -> None:
    base = random_checkpoint(SMALLEST, dtype)
    [(a, b)] = random_factors(SMALLEST, {"h.0.attn.c_attn": 3}).values()
    merged = bridge.merge_lora(base, LoRA.of({"h.0.attn.c_attn": (a, b)}, alpha=4))
    wide = np.float64 if dtype == np.float64 else np.float32
    old = base.tensors["h.0.attn.c_attn.weight"].astype(wide)
    expected = (old + (b.astype(wide) @ a.astype(wide) * wide(4 / 3)).T).astype(dtype)
    found = merged.tensors["h.0.attn.c_attn.weight"]
    assert found.dtype == dtype and np.array_equal(found, expected)
    untouched = [name for name in base.tensors if name != "h.0.attn.c_attn.weight"]
    assert all(merged.tensors[name].tobytes() == base.tensors[name].tobytes() for name in untouched)


def test_tensors_are_merged_one_at_a_time_on_access() -> None:
    read: list[str] = []

    def watched(name: str, entry: LazyTensor) -> LazyTensor:
        return replace(entry, read=lambda: (read.append(name), entry.read())[1])

    entries = random_checkpoint(SMALLEST).tensors.entries
    base = replace(random_checkpoint(SMALLEST), tensors=LazyTensorMap({n: watched(n, e) for n, e in entries.items()}))
    merged = bridge.merge_lora(base, our_adapter("tied")[1])
    assert read == []
    merged.tensors["h.1.mlp.c_proj.weight"]
    assert read == ["h.1.mlp.c_proj.weight"]


@pytest.mark.parametrize("format", WRITABLE)
def test_the_base_may_have_any_format(tmp_path: Path, format: str) -> None:
    config = config_for(format, SMALLEST)
    lora = LoRA.of(random_factors(config, {"h.0.attn.c_attn": 3, "h.1.mlp.c_proj": 2}), alpha=4)
    bridge.save_lora(lora, tmp_path / "adapter")
    bridge.save(random_checkpoint(config), tmp_path / "base", format=format)
    read = bridge.load(tmp_path / "adapter", base=tmp_path / "base")
    expected = bridge.merge_lora(bridge.load(tmp_path / "base"), lora)
    assert bridge.fingerprint(read.tensors) == bridge.fingerprint(expected.tensors)
    assert read.optimizer is None
    has_state = bridge.load(tmp_path / "base").optimizer is not None
    assert any("the AdamW state of the base was left out" in note for note in read.diagnostics) == has_state


FACTORS = random_factors(SMALLEST, RANKS)
A, B = FACTORS["h.0.attn.c_attn"]
UNFIT: dict[str, tuple[Any, str]] = {
    "an unknown module": ({"h.2.attn.c_attn": (A, B)}, "'h.2.attn.c_attn.weight' is not a parameter of the base"),
    "a vector": ({"ln_f": (A, B)}, "'ln_f' is not a matrix"),
    "another width": ({"h.0.attn.c_attn": (A[:, :5], B)}, r"'h.0.attn.c_attn': B A has shape \(24, 5\); .* \(24, 8\)"),
    "transposed": ({"h.0.attn.c_attn": (B.T, A.T)}, r"B A has shape \(8, 24\); the base has \(24, 8\)"),
}


@pytest.mark.parametrize(("factors", "says"), UNFIT.values(), ids=UNFIT)
def test_an_adapter_that_does_not_fit_is_refused_by_name(factors: Any, says: str) -> None:
    with pytest.raises(ConversionError, match=says):
        bridge.merge_lora(random_checkpoint(SMALLEST), LoRA.of(factors, alpha=1))


@pytest.mark.parametrize(
    ("pair", "says"),
    [
        ((A, B[:, :2]), r"'h.0.attn.c_attn': A has shape \(3, 8\) and B \(24, 2\); A must be \[r, in\]"),
        ((A[:0], B[:, :0]), r"A has shape \(0, 8\)"),
        ((A[0], B), r"A has shape \(8,\)"),
        ((A.astype(int), B), "A holds int64"),
    ],
    ids=["two ranks", "rank 0", "one axis", "integers"],
)
def test_pairs_that_are_not_of_one_rank_are_refused(pair: Any, says: str) -> None:
    with pytest.raises(ConversionError, match=says):
        LoRA.of({"h.0.attn.c_attn": pair}, alpha=1)


# The base, and the directory


def test_without_its_base_the_error_names_it_and_the_flag(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, _ = adapter(tmp_path)
    assert_refused(path, "an adapter for another model and not a model; give that model too: --base", capsys)
    change_config(path, base_model_name_or_path="me/my-gpt2\x1b[2J")
    shown = "'me/my-gpt2\\x1b[2J'"
    says = f"an adapter for {shown} and not a model; give that model too: --base {shown}, or bridge.load("
    assert_refused(path, says, capsys, CheckpointError)


def test_the_base_is_never_looked_up_from_the_file(tmp_path: Path) -> None:
    path, base = adapter(tmp_path)
    change_config(path, base_model_name_or_path=str(base))
    with pytest.raises(CheckpointError, match="is an adapter for"):
        bridge.load(path)
    assert f"for '{base}' was merged" in bridge.load(path, base=base).diagnostics[0]


def test_a_base_for_a_model_is_refused(tmp_path: Path) -> None:
    path, base = adapter(tmp_path)
    with pytest.raises(CheckpointError, match="this is a model and not an adapter; leave the argument"):
        bridge.load(base, base=base)
    with pytest.raises(CheckpointError, match="is an adapter for another model"):
        bridge.load(path, base=path)


def test_a_base_of_another_size_is_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, _ = adapter(tmp_path)
    other = huggingface_directory(tmp_path / "other", replace(SMALLEST, n_embd=6))
    assert_refused(path, "'h.0.attn.c_attn': B A has shape (24, 8); the base has (18, 6)", capsys, base=other)


def test_the_file_alone_is_enough(tmp_path: Path) -> None:
    path, base = adapter(tmp_path)
    expected = bridge.fingerprint(bridge.load(path, base=base).tensors)
    assert bridge.fingerprint(bridge.load(path / WEIGHTS, base=base).tensors) == expected


def test_a_torch_file_is_read_too(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    path, base = adapter(tmp_path)
    expected = bridge.fingerprint(bridge.load(path, base=base).tensors)
    tensors = {name: torch.from_numpy(np.array(array)) for name, array in read_file(path / WEIGHTS)[0].items()}
    torch.save(tensors, path / "adapter_model.bin")
    assert "adapter_model.bin" in bridge.load(path, base=base).diagnostics[-1]  # beside safetensors, it is not read
    (path / WEIGHTS).unlink()
    found = bridge.load(path, base=base)
    assert bridge.fingerprint(found.tensors) == expected and found.source == path / "adapter_model.bin"


def test_names_of_older_versions_are_read(tmp_path: Path) -> None:
    path, base = adapter(tmp_path)
    expected = bridge.fingerprint(bridge.load(path, base=base).tensors)

    def rename(tensors: dict[str, np.ndarray]) -> None:
        for name in [*tensors]:
            tensors[name.replace(".weight", ".default.weight")] = tensors.pop(name)

    change_tensors(path, rename)
    assert bridge.fingerprint(bridge.load(path, base=base).tensors) == expected


def test_an_adapter_beside_a_model_is_ambiguous(tmp_path: Path) -> None:
    path, base = adapter(tmp_path)
    for file in base.iterdir():
        shutil.copy(file, path)
    with pytest.raises(SeveralCheckpointsError, match=r"(?s)peft: 'adapter_model\.s.*huggingface: 'model\.s"):
        bridge.load(path, base=base)
    assert bridge.load(path / "model.safetensors").format == "huggingface"
    assert bridge.load(path / WEIGHTS, base=base).format == "peft"


def test_a_configuration_without_weights_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, _ = adapter(tmp_path)
    (path / WEIGHTS).unlink()
    expected = "it has adapter_config.json, but no adapter_model.safetensors or adapter_model.bin"
    assert_refused(path, expected, capsys, CheckpointError)


def test_weights_without_a_configuration_say_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, _ = adapter(tmp_path)
    (path / "adapter_config.json").unlink()
    expected = "it has adapter_model.safetensors, but no adapter_config.json; copy it from the adapter's source"
    assert_refused(path, expected, capsys, CheckpointError)


def test_the_tokenizer_is_the_adapters_or_that_of_the_base(tmp_path: Path) -> None:
    path, base = adapter(tmp_path)
    write_byte_tokenizer(base)
    assert bridge.load(path, base=base).path == base
    (path / "chat_template.jinja").write_text("{{ messages }}")
    found = bridge.load(path, base=base)
    assert found.path == base, "a template is not a vocabulary"
    assert found.diagnostics[-1] == "ignored beside the adapter; the base's are used: chat_template.jinja"
    write_byte_tokenizer(path)
    found = bridge.load(path, base=base)
    assert found.path == path
    assert not any("not read" in diagnostic for diagnostic in found.diagnostics)


@pytest.mark.parametrize("has_tokenizer", [False, True])
def test_the_generation_settings_are_those_of_the_base(tmp_path: Path, has_tokenizer: bool) -> None:
    path, base = adapter(tmp_path)
    (base / "generation_config.json").write_text('{"eos_token_id": [5, 6], "max_new_tokens": 3}')
    (path / "generation_config.json").write_text('{"eos_token_id": 9}')
    if has_tokenizer:
        write_byte_tokenizer(path)
    merged = bridge.load(path, base=base)
    assert bridge.generation_defaults(merged).eos_token_ids == (5, 6)
    assert "generation_config.json" in merged.diagnostics[-1]
    bridge.save(merged, tmp_path / "merged", format="huggingface")
    assert (tmp_path / "merged" / "vocab.json").exists() == has_tokenizer
    again = bridge.Checkpoint.of(merged.tensors, merged.config, like=merged)
    for checkpoint in (bridge.load(tmp_path / "merged"), again):
        assert bridge.generation_defaults(checkpoint).settings == {"max_new_tokens": 3}


def test_neither_the_adapter_nor_its_base_is_overwritten(tmp_path: Path) -> None:
    path, base = adapter(tmp_path)
    merged = bridge.load(path, base=base)
    before = {file: file.read_bytes() for file in (*path.iterdir(), *base.iterdir())}
    for target in (path, base):
        with pytest.raises(CheckpointError, match="is, or contains, the source"):
            bridge.save(merged, target, format="huggingface", overwrite=True)
    assert {file: file.read_bytes() for file in (*path.iterdir(), *base.iterdir())} == before


def test_a_classification_head_is_left_out_on_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, base = adapter(tmp_path)
    head = {"base_model.model.score.weight": np.ones((2, 8), np.float32)}
    change_tensors(path, lambda tensors: tensors.update(head))
    change_config(path, task_type="SEQ_CLS", modules_to_save=["classifier", "score"])
    says = "'base_model.model.score.weight' is not a parameter of this model but of a head for another task"
    assert_refused(path, says, capsys, ConversionError, base)
    merged = bridge.load(path, base=base, drop_extra_heads=True)
    assert "left out: 'base_model.model.score.weight'" in merged.diagnostics[-1]


# Strangers' files


def without(*names: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        stored = json.loads((path / CONFIG).read_text())
        (path / CONFIG).write_text(json.dumps({name: v for name, v in stored.items() if name not in names}))

    return change


def fields(**values: Any) -> Callable[[Path], None]:
    return lambda path: change_config(path, **values)


def text(content: str | bytes) -> Callable[[Path], None]:
    return lambda path: (
        (path / CONFIG).write_bytes(content if isinstance(content, bytes) else content.encode()) and None
    )


def linked(path: Path) -> None:
    (path / CONFIG).rename(path.parent / "elsewhere.json")
    (path / CONFIG).symlink_to(path.parent / "elsewhere.json")


def fifo(path: Path) -> None:
    (path / CONFIG).unlink()
    os.mkfifo(path / CONFIG)


TENSORS_OF_C_ATTN = "base_model.model.transformer.h.0.attn.c_attn"


def tensors(change: Callable[[dict[str, np.ndarray]], object]) -> Callable[[Path], None]:
    return lambda path: change_tensors(path, change)


def many_modules_and_patterns(path: Path) -> None:
    modules = {f"m{k}.lora_A.weight": np.ones((2, 1), np.float32) for k in range(5000)}
    change_tensors(path, lambda tensors: tensors.update(modules))
    change_config(path, alpha_pattern={f"x{k}": 1 for k in range(40)})


def with_modules_and_patterns(modules: list[str], patterns: list[str]) -> Callable[[Path], None]:
    """Replace the tensors by modules of rank 1 with the longest names, and give half of the patterns to each table."""

    def change(path: Path) -> None:
        names = [f"base_model.model.{module}.lora_{letter}.weight" for module in modules for letter in "AB"]
        (path / WEIGHTS).unlink()
        write_file(path / WEIGHTS, LazyTensorMap.of(dict.fromkeys(names, np.ones((1, 1), np.float32))), {})
        half = len(patterns) // 2
        ranks, alphas = patterns[:half], patterns[half:]
        change_config(path, r=1, rank_pattern=dict.fromkeys(ranks, 1), alpha_pattern=dict.fromkeys(alphas, 1))

    return change


BAD: dict[str, tuple[Callable[[Path], None], str]] = {
    # fields that change the function
    "DoRA": (fields(use_dora=True), "use_dora='True': not supported; it must be False"),
    "biases": (fields(bias="all"), "bias='all': not supported; it must be 'none'"),
    "biases of LoRA": (fields(bias="lora_only"), "bias='lora_only': not supported"),
    "a bias of B": (fields(lora_bias=True), "lora_bias='True': not supported"),
    "PiSSA": (fields(init_lora_weights="pissa_niter_16"), "init_lora_weights='pissa_niter_16': not supported"),
    "LoftQ": (fields(init_lora_weights="loftq"), "init_lora_weights='loftq'"),
    "another adapter": (fields(peft_type="IA3"), "peft_type='IA3': not supported; it must be 'LORA'"),
    "replicated layers": (fields(layer_replication=[[0, 2]]), "layer_replication='[[0, 2]]'"),
    "trained tokens": (
        fields(trainable_token_indices=[3]),
        "trainable_token_indices='[3]': not supported",
    ),
    "parameters": (fields(target_parameters=["x"]), "target_parameters="),
    "QALoRA": (fields(use_qalora=True), "use_qalora='True'"),
    "activated LoRA": (fields(alora_invocation_tokens=[1]), "alora_invocation_tokens='[1]'"),
    "tied weights": (fields(ensure_weight_tying=True), "ensure_weight_tying='True'"),
    "a number for false": (fields(use_dora=0), "use_dora='0': not supported"),
    "an unknown field": (fields(use_new="yes"), "'use_new'='yes': unknown; remove it if it does not change"),
    # values
    "no kind": (without("peft_type"), "peft_type is missing"),
    "no rank": (without("r"), "r is missing"),
    "no alpha": (without("lora_alpha"), "lora_alpha is missing"),
    "rank 0": (fields(r=0), "r='0': must be a positive integer"),
    "a negative rank": (fields(r=-4), "r='-4'"),
    "a rank as text": (fields(r="4"), "r='4'"),
    "a rank of true": (fields(r=True), "r='True'"),
    "a large rank": (fields(r=2**70), "r='1180591620717411303424'"),
    "another rank": (fields(r=5, rank_pattern={}), "A has shape (2, 8), but its rank (r or rank_pattern) is 5"),
    "alpha as text": (fields(lora_alpha="16"), "lora_alpha='16': must be a number"),
    "a large alpha": (fields(lora_alpha=1e300), "lora_alpha='1e+300'"),
    "alpha of null": (fields(lora_alpha=None), "lora_alpha='None'"),
    "use_rslora as text": (fields(use_rslora="no"), "use_rslora='no': must be true or false"),
    "a list of patterns": (fields(rank_pattern=[1]), "rank_pattern='[1]': must be an object"),
    "a pattern with text": (fields(alpha_pattern={"c_attn": "4"}), "alpha_pattern="),
    "an exponential pattern": (fields(alpha_pattern={"(a*)*b": 4}), "the pattern '(a*)*b' is too complex"),
    "a polynomial pattern": (fields(alpha_pattern={".*.*.*.*.*x": 4}), "is too complex"),
    "alternatives": (fields(rank_pattern={"c_attn|c_fc": 4}), "the pattern 'c_attn|c_fc' is too complex"),
    "an invalid pattern": (fields(rank_pattern={"[9-0]": 4}), "the pattern '[9-0]' is too complex"),
    "a long pattern": (fields(rank_pattern={"a" * 5000: 4}), "is too complex"),
    "many patterns": (fields(rank_pattern={f"a{k}": 4 for k in range(2000)}), "an object of at most 1024"),
    "a name as saved modules": (fields(modules_to_save="wte"), "modules_to_save='wte': must be a list"),
    "numbers as saved modules": (fields(modules_to_save=[1]), "modules_to_save='[1]'"),
    "a number as base": (fields(base_model_name_or_path=3), "base_model_name_or_path='3'"),
    "control characters": (fields(peft_type="\x1b[31m"), "peft_type='\\x1b[31m'"),
    # JSON
    "empty": (text(""), "is not valid JSON"),
    "a list": (text("[]"), "must hold an object"),
    "deep": (text("[" * 100_000), "lists and objects"),
    "deep enough": (text('{"r":' + "[" * 500 + "]" * 500 + "}"), "nested more than 32 deep"),
    "not UTF-8": (text(b"\xff\xfe"), "is not valid JSON"),
    "twice": (text('{"r": 1, "r": 2}'), "the name 'r' appears twice"),
    "large": (text('{"r": "' + "x" * 2**20 + '"}'), "adapter_config.json"),
    "many values": (text('{"r": [' + "1," * 200_000 + "1]}"), "holds more than"),
    "an infinity": (text('{"lora_alpha": Infinity}'), "Infinity is not a number"),
    "a link out of the directory": (linked, "is a link out of the checkpoint's directory"),
    "a FIFO": (fifo, "adapter_config.json"),
    # tensors
    "no tensors of LoRA for A": (
        tensors(lambda t: t.pop(f"{TENSORS_OF_C_ATTN}.lora_A.weight")),
        f"lora_A of '{TENSORS_OF_C_ATTN}' is missing",
    ),
    "no tensors of LoRA for B": (tensors(lambda t: t.pop(f"{TENSORS_OF_C_ATTN}.lora_B.weight")), "lora_B of "),
    "a tensor twice": (
        tensors(
            lambda t: t.update({f"{TENSORS_OF_C_ATTN}.lora_A.default.weight": t[f"{TENSORS_OF_C_ATTN}.lora_A.weight"]})
        ),
        "is stored twice, under two names",
    ),
    "DoRA's magnitudes": (
        tensors(lambda t: t.update({f"{TENSORS_OF_C_ATTN}.lora_magnitude_vector": np.ones(24, np.float32)})),
        "is not a LoRA tensor, and modules_to_save does not name it",
    ),
    "a bias": (
        tensors(lambda t: t.update({f"{TENSORS_OF_C_ATTN}.bias": np.ones(24, np.float32)})),
        f"'{TENSORS_OF_C_ATTN}.bias' is not a LoRA tensor",
    ),
    "a long name": (
        tensors(lambda t: t.update({f"{'a.' * 5000}x.lora_{k}.weight": np.ones((2, 2), np.float32) for k in "AB"})),
        "is not a module of GPT-2",
    ),
    "many modules and patterns": (
        many_modules_and_patterns,
        "adapter_config.json has too many patterns of ranks and alphas: 42 for 5004 modules",
    ),
    "more patterns than re keeps": (
        with_modules_and_patterns([f"m{k}" for k in range(64)], [f"x{k}" for k in range(2048)]),
        "does not fit its base",
    ),
    "patterns that match slowly": (
        with_modules_and_patterns(["a." * 53 + f"a{k:03}" for k in range(273)], [f".*b{k}" for k in range(480)]),
        "does not fit its base",
    ),
    "a rank beyond the other": (
        tensors(lambda t: t.update({f"{TENSORS_OF_C_ATTN}.lora_B.weight": np.ones((24, 3), np.float32)})),
        "A has shape (2, 8) and B (24, 3)",
    ),
    "integers": (
        tensors(lambda t: t.update({f"{TENSORS_OF_C_ATTN}.lora_B.weight": np.ones((24, 2), np.int32)})),
        "B int32; they must be floats",
    ),
    "another vocabulary in the head alone": (
        tensors(lambda t: t.update({"base_model.model.lm_head.weight": np.ones((13, 8), np.float32)})),
        "lm_head.weight has shape (13, 8)",
    ),
    "a damaged file": (lambda path: (path / WEIGHTS).write_bytes(b"\x10\0\0\0\0\0\0\0{}") and None, WEIGHTS),
}


@pytest.mark.sampled(2)
@pytest.mark.timeout(60)
@pytest.mark.parametrize(("damage", "says"), BAD.values(), ids=BAD)
def test_a_bad_adapter_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], None], says: str
) -> None:
    path, base = adapter(tmp_path)
    damage(path)
    assert_refused(path, says, capsys, base=base)


def test_matching_many_simple_patterns_is_quick(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, base = adapter(tmp_path)
    change_config(path, alpha_pattern={f".*{'a' * k}x": 1 for k in range(200)}, rank_pattern={"h.0.attn.c_attn": 2})
    assert_refused(path, "A has shape (1, 8), but its rank (r or rank_pattern) is 4", capsys, ConversionError, base)


@pytest.mark.parametrize("value", [None, "gaussian", "eva", "orthogonal"])
def test_initializations_that_leave_the_base_alone_are_read(tmp_path: Path, value: str | None) -> None:
    path, base = adapter(tmp_path)
    change_config(path, **({"init_lora_weights": value} if value else {}), unknown_feature=None, use_other=False)
    assert bridge.load(path, base=base).format == "peft"


def test_old_configurations_with_few_fields_are_read(tmp_path: Path) -> None:
    path, base = adapter(tmp_path)
    stored = json.loads((path / CONFIG).read_text())
    kept = ("peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern")
    expected = bridge.fingerprint(bridge.load(path, base=base).tensors)
    (path / CONFIG).write_text(json.dumps({name: stored[name] for name in kept}))
    assert bridge.fingerprint(bridge.load(path, base=base).tensors) == expected


def test_the_command_converts_an_adapter_with_its_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, base = adapter(tmp_path)
    assert run("convert", path, tmp_path / "merged", "--to", "huggingface", "--base", base) == 0
    assert "warning: a LoRA adapter was merged into 4 matrices" in capsys.readouterr().out
    expected = bridge.load(path, base=base)
    assert bridge.fingerprint(bridge.load(tmp_path / "merged").tensors) == bridge.fingerprint(expected.tensors)
    assert run("convert", path, tmp_path / "x", "--to", "flax", "--base", base, "--json", base / "config.json") == 2
    assert "config.json" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
