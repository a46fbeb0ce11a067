"""llm.c's `model.bin`, compared with its documented layout (`fuzz.llmc.oracle`) and a second writer, in torch.

llm.c is not a Python package, so its `write_model` is reimplemented here.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from fuzz.llmc import oracle
from support.models import TINY, random_checkpoint, random_ids
from support.refusals import assert_refused

import bridge
from bridge import BridgeError, CheckpointError, ConfigError, ConversionError
from gpt2_torch import GPT2

CONFIG = replace(TINY, n_head=4, n_inner=None, n_layer=3)
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}


def written_in_torch(model: GPT2, file: Path, version: int, rows: int = 384) -> None:
    """Return what llm.c's `write_model` writes for a model, with torch's operations."""
    config, dtype = model.config, {3: torch.float32, 5: torch.bfloat16}[version]
    state = model.state_dict()
    header = torch.zeros(256, dtype=torch.int32)
    sizes = [config.n_positions, config.vocab_size, config.n_layer, config.n_head, config.n_embd, rows]
    header[:8] = torch.tensor([20240326, version, *sizes])
    tables = [
        torch.nn.functional.pad(state["wte.weight"], (0, 0, 0, rows - config.vocab_size)),
        state["wpe.weight"],
    ]
    kinds = [
        f"{module}.{kind}"
        for module in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
        for kind in ("weight", "bias")
    ]
    stacks = [torch.stack([state[f"h.{i}.{kind}"] for i in range(config.n_layer)]) for kind in kinds]
    layers = [stack.transpose(1, 2) if stack.ndim == 3 else stack for stack in stacks]
    with open(file, "wb") as out:
        out.write(header.numpy().tobytes())
        for tensor in (*tables, *layers, state["ln_f.weight"], state["ln_f.bias"]):
            out.write(tensor.to(dtype).contiguous().view(torch.uint8).numpy().tobytes())


@pytest.mark.parametrize("form", ["out", "out.bin"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_written_files_have_llmcs_layout_and_are_read_back(tmp_path: Path, dtype: str, form: str) -> None:
    checkpoint = random_checkpoint(CONFIG, DTYPES[dtype])
    bridge.save(checkpoint, tmp_path / form, format="llmc")
    file = tmp_path / form / "model.bin" if form == "out" else tmp_path / form
    header = np.fromfile(file, "<i4", 256).tolist()
    assert header == [20240326, {"float32": 3, "bfloat16": 5}[dtype], 40, 257, 3, 4, 48, 384] + [0] * 248
    fingerprint = bridge.fingerprint(checkpoint.tensors)
    assert bridge.fingerprint(oracle(file)) == fingerprint
    for source in (tmp_path / form, file):
        found = bridge.load(source)
        assert (found.format, found.config) == ("llmc", CONFIG)
        assert bridge.fingerprint(found.tensors) == fingerprint
        assert found.diagnostics == ("127 rows of vocabulary padding were left out",)


@pytest.mark.parametrize("version", [3, 5])
def test_a_model_written_in_torch_computes_the_same(tmp_path: Path, version: int) -> None:
    bridge.save(random_checkpoint(CONFIG), tmp_path / "model", format="huggingface")
    model = GPT2.from_pretrained(tmp_path / "model")
    written_in_torch(model, tmp_path / "gpt2_tiny.bin", version)
    back = GPT2.from_pretrained(tmp_path / "gpt2_tiny.bin")
    ids = torch.from_numpy(random_ids(CONFIG))
    with torch.no_grad():
        expected = model.to(torch.bfloat16) if version == 5 else model
        assert torch.equal(back(ids), expected(ids))


def test_the_same_checkpoint_gives_the_bytes_that_torch_wrote(tmp_path: Path) -> None:
    bridge.save(random_checkpoint(CONFIG), tmp_path / "model", format="huggingface")
    written_in_torch(GPT2.from_pretrained(tmp_path / "model"), tmp_path / "theirs.bin", 3)
    bridge.save(bridge.load(tmp_path / "model"), tmp_path / "ours.bin", format="llmc")
    assert (tmp_path / "ours.bin").read_bytes() == (tmp_path / "theirs.bin").read_bytes()


def test_opening_reads_no_tensor(tmp_path: Path) -> None:
    """The file is sparse and has the size of gpt2-xl."""
    config = bridge.GPT2_SIZES["gpt2-xl"]
    sizes = (1024, 50257, 48, 25, 1600, 50304)
    file = tmp_path / "xl.bin"
    file.write_bytes(np.array([20240326, 3, *sizes, *[0] * 248], "<i4").tobytes())
    os.truncate(file, 1024 + 4 * (bridge.num_parameters(config) + 47 * 1600))
    checkpoint = bridge.load(file)
    assert checkpoint.config == config
    assert not checkpoint.tensors["ln_f.bias"].any()


def test_training_settings_are_reported_or_stored_in_config_json(tmp_path: Path) -> None:
    config = replace(CONFIG, embd_pdrop=0.1, initializer_range=0.01)
    checkpoint = replace(random_checkpoint(config), extra={"task_specific_params": {"a": 1}})
    assert bridge.save(checkpoint, tmp_path / "out", format="llmc") == ()
    found = bridge.load(tmp_path / "out")
    assert (found.config, found.extra["task_specific_params"]) == (config, {"a": 1})
    [note, fields] = bridge.save(checkpoint, tmp_path / "out.bin", format="llmc")
    assert (
        fields
        == "a single file cannot store the fields task_specific_params of config.json; write a directory to keep them"
    )
    assert "embd_pdrop=0.1, initializer_range=0.01" in note


def test_a_config_beside_the_file_must_agree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bridge.save(random_checkpoint(CONFIG), tmp_path / "out", format="llmc")
    config = tmp_path / "out" / "config.json"
    config.write_text(config.read_text().replace("gelu_new", "relu"))
    assert_refused(
        tmp_path / "out", "activation_function is 'relu' in config.json, but 'gelu_new' in", capsys, ConfigError
    )


def test_one_of_two_models_in_a_directory_must_be_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a.bin", "b.bin"):
        bridge.save(random_checkpoint(CONFIG), tmp_path / "two" / name, format="llmc")
    assert_refused(
        tmp_path / "two", "holds several checkpoints:\n  - llmc: 'a.bin'\n  - llmc: 'b.bin'\n", capsys, CheckpointError
    )
    assert bridge.load(tmp_path / "two" / "b.bin").config == CONFIG


def test_other_files_of_llmc_beside_the_model_are_ignored(tmp_path: Path) -> None:
    bridge.save(random_checkpoint(CONFIG), tmp_path / "out", format="llmc")
    (tmp_path / "out" / "gpt2_tokenizer.bin").write_bytes(struct.pack("<i", 20240328) + bytes(2000))
    assert bridge.load(tmp_path / "out").config == CONFIG


def test_mixed_types_are_refused_by_name(tmp_path: Path) -> None:
    state = dict(random_checkpoint(CONFIG).tensors)
    state["ln_f.bias"] = state["ln_f.bias"].astype(ml_dtypes.bfloat16)
    with pytest.raises(ConversionError, match=r"ln_f\.bias holds bfloat16"):
        bridge.save(bridge.Checkpoint.of(state, CONFIG), tmp_path / "out.bin", format="llmc")
    assert list(tmp_path.iterdir()) == []


def header(at: int, value: int) -> Callable[[bytes], bytes]:
    return lambda content: content[: 4 * at] + struct.pack("<i", value) + content[4 * at + 4 :]


MALFORMED: dict[str, tuple[Callable[[bytes], bytes], str, type[BridgeError]]] = {
    "version 1": (header(1, 1), "version 1 of llm.c's model is not supported, only 3", CheckpointError),
    "version 2": (header(1, 2), "version 2", CheckpointError),
    "version -1": (header(1, -1), "version -1", CheckpointError),
    "version of bfloat16, data of float32": (header(1, 5), "the sizes in its header need", CheckpointError),
    "debug state": (header(0, 20240327), "is not a model: it is llm.c's debug state", CheckpointError),
    "tokenizer": (header(0, 20240328), "is not a model: it is llm.c's tokenizer", CheckpointError),
    "token shard": (header(0, 20240520), "tokenized text, which is for `gpt2 train --data`", CheckpointError),
    "token shard of Llama 3": (header(0, 20240801), "tokenized text, which is for", CheckpointError),
    "optimizer's state": (header(0, 20240527), "the weights are in the model_*.bin beside it", CheckpointError),
    "another magic": (header(0, 1), "its first bytes match no supported format", CheckpointError),
    "big-endian": (
        lambda c: np.frombuffer(c, "<i4").byteswap().tobytes(),
        "its first bytes match no supported format",
        CheckpointError,
    ),
    "negative positions": (header(2, -40), "n_positions='-40'", ConfigError),
    "no positions": (header(2, 0), "n_positions='0'", ConfigError),
    "huge positions": (header(2, 2**31 - 1), "the sizes in its header need", CheckpointError),
    "negative vocabulary": (header(3, -257), "vocab_size='-257'", ConfigError),
    "no layers": (header(4, 0), "n_layer='0'", ConfigError),
    "2^31-1 layers": (header(4, 2**31 - 1), "n_layer='2147483647'", ConfigError),
    "10,000 layers": (header(4, 10_000), "the sizes in its header need", CheckpointError),
    "one layer too many": (header(4, 4), "the sizes in its header need", CheckpointError),
    "heads that do not divide": (header(5, 5), "n_embd='48' is not divisible by n_head='5'", ConfigError),
    "no heads": (header(5, 0), "n_head='0'", ConfigError),
    "negative width": (header(6, -48), "n_embd='-48'", ConfigError),
    "huge width": (header(6, 2**30), "the sizes in its header need", CheckpointError),
    "too little padding": (header(7, 256), "padded_vocab_size 256 is less than vocab_size 257", CheckpointError),
    "negative padding": (header(7, -1), "padded_vocab_size -1 is less", CheckpointError),
    "more padding than rows": (header(7, 2**31 - 1), "the sizes in its header need", CheckpointError),
    "unused header": (header(100, 7), "the unused part of llm.c's header is not zero", CheckpointError),
    "one byte less": (lambda c: c[:-1], "the sizes in its header need", CheckpointError),
    "one byte more": (lambda c: c + b"\0", "the sizes in its header need", CheckpointError),
    "truncated in the header": (lambda c: c[:1000], "truncated within llm.c's header", CheckpointError),
    "the magic alone": (lambda c: c[:4], "truncated within llm.c's header", CheckpointError),
    "the header alone": (lambda c: c[:1024], "the sizes in its header need", CheckpointError),
    "nothing": (lambda c: b"", "it is empty", CheckpointError),
    "zeros": (lambda c: bytes(len(c)), "its first bytes match no supported format", CheckpointError),
    "git-LFS pointer": (lambda c: b"version https://git-lfs.github.com/spec/v1\n", "git-LFS pointer", CheckpointError),
}


@pytest.mark.parametrize(("damage", "message", "error"), MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_file_is_refused(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[bytes], bytes],
    message: str,
    error: type[BridgeError],
) -> None:
    file = tmp_path / "damaged.bin"
    bridge.save(random_checkpoint(CONFIG), file, format="llmc")
    file.write_bytes(damage(file.read_bytes()))
    assert_refused(file, message, capsys, error)


def test_a_link_to_an_endless_device_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "zero.bin").symlink_to("/dev/zero")
    assert_refused(tmp_path / "zero.bin", "is not a regular file", capsys, CheckpointError)
