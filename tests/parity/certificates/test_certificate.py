"""The file of a certificate: every bit comes back, and no other file is accepted or replaced."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.refusals import within_budget

import bridge
from bridge import BridgeError, Checkpoint
from bridge.containers.safetensors import read_file, write_file
from bridge.storage.tensors import LazyTensorMap
from gpt2_jax.parity import Certificate, read_certificate, write_certificate
from gpt2_jax.parity.certificates.certificate import BOUNDS, MOST_BYTES, certificate_bytes


@pytest.fixture
def file(certificate: Certificate, tmp_path: Path) -> Path:
    write_certificate(certificate, tmp_path / "file")
    return tmp_path / "file"


def test_every_bit_comes_back(certificate: Certificate, file: Path) -> None:
    found = read_certificate(file)
    for field in fields(Certificate):
        np.testing.assert_equal(getattr(found, field.name), getattr(certificate, field.name))


def test_other_tools_can_read_it(certificate: Certificate, file: Path) -> None:
    from safetensors.numpy import load_file

    assert (load_file(file)["logits"] == certificate.outputs.logits).all()


def test_the_rows_reach_the_second_half_of_the_positions(checkpoint: Checkpoint) -> None:
    from gpt2_jax.parity.certificates.certification import certified_length, chosen_positions

    large = replace(checkpoint, config=bridge.GPT2Config())
    assert certified_length(checkpoint, 256) == 40  # all positions of the model
    assert [certified_length(large, seq_len) for seq_len in (None, 8, 256, 700)] == [576, 576, 576, 700]
    assert chosen_positions(large, 576).tolist() == [0, 1, 144, 288, 544, 575]
    assert chosen_positions(large, 2).tolist() == [0, 1]


def test_a_certificate_of_the_largest_model_is_below_the_limit() -> None:
    assert certificate_bytes(bridge.GPT2_SIZES["gpt2"], (2, 576), 6) < 20 * 10**6
    assert certificate_bytes(bridge.GPT2_SIZES["gpt2-xl"], (2, 576), 6) < MOST_BYTES


def test_a_file_cannot_loosen_a_tolerance(certificate: Certificate, tmp_path: Path) -> None:
    loose = replace(certificate, bounds={**dict.fromkeys(BOUNDS, 1e9), "losses": 1e-12})
    write_certificate(loose, tmp_path / "file")
    assert read_certificate(tmp_path / "file").bounds == {**BOUNDS, "losses": 1e-12}


def test_only_a_certificate_is_replaced_and_only_with_permission(certificate: Certificate, file: Path) -> None:
    thesis = file.with_name("thesis")
    thesis.write_text("years of work")
    for path, overwrite in ((file, False), (thesis, False), (thesis, True)):
        before = path.read_bytes()
        with pytest.raises(BridgeError, match="exists"):
            write_certificate(certificate, path, overwrite=overwrite)
        assert path.read_bytes() == before
    write_certificate(replace(certificate, tokens="others"), file, overwrite=True)
    assert read_certificate(file).tokens == "others"
    assert {path.name for path in file.parent.iterdir()} == {"file", "thesis"}


def changed(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda found: found.__setitem__(name, value)


def without(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda found: found.__delitem__(name)


def with_value(name: str, index: tuple[int, ...], value: float) -> Callable[[dict[str, Any]], None]:
    return lambda arrays: arrays[name].__setitem__(index, value)


def in_config(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda description: description["config"].__setitem__(name, value)


def in_bounds(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda description: description["bounds"].__setitem__(name, value)


def assert_refused(file: Path, message: str) -> None:
    with within_budget(), pytest.raises(BridgeError, match=message) as error:
        read_certificate(file)
    assert str(file) in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("logits"), "arrays 'logits' are missing or unexpected"),
        (changed("more", np.zeros(3)), "arrays 'more' are missing or unexpected"),
        (changed("logits", np.zeros((2, 4, 61), np.float32)), "logits holds float32; it must hold float64"),
        (changed("logits", np.zeros((2, 5, 61))), r"logits has the shape \(2, 5, 61\)"),
        (changed("hidden_states", np.zeros((2, 6, 9, 24))), "hidden_states has the shape"),
        (changed("gradients", np.zeros((27, 2))), "gradients has the shape"),
        (changed("ids", np.zeros((2, 41), np.int64)), "41 and 40 tokens per row; the model has 40 positions"),
        (changed("ids", np.zeros((2, 0), np.int64)), "ids has the shape"),
        (changed("ids", np.zeros((2, 40))), "ids holds float64; it must hold int64"),
        (changed("padded_ids", np.zeros(40, np.int64)), "padded_ids has the shape"),
        (with_value("logits", (1, 2, 3), np.nan), "logits has values that are not finite"),
        (with_value("hidden_states", (1, 2, 3, 4), np.inf), "hidden_states has values that are not finite"),
        (with_value("losses", (0, 0), -np.inf), "losses has values that are not finite"),
        (with_value("gradients", (0, 0), -1), "gradients has negative norms"),
        (with_value("padded_losses", (0, 0), 1), "padded_losses must be 0 at padding"),
        (with_value("ids", (0, 0), 61), "ids has ids outside the vocabulary of 61"),
        (with_value("padded_ids", (0, 0), -1), "padded_ids has ids outside the vocabulary of 61"),
        (with_value("positions", (0,), -1), "positions must be ascending and inside the rows"),
        (with_value("positions", (1,), 39), "positions must be ascending and inside the rows"),
        (with_value("positions", (-1,), 40), "positions must be ascending and inside the rows"),
        (with_value("padded_mask", (0, -1), 0), "padded_mask must be 0 at padding on the left"),
        (with_value("padded_mask", (0, 0), 2), "padded_mask must be 0 at padding on the left"),
    ],
)
def test_invalid_arrays_are_refused(file: Path, change: Callable[[dict[str, Any]], None], message: str) -> None:
    tensors, metadata = read_file(file)
    arrays = {name: np.array(array) for name, array in tensors.items()}
    file.unlink()
    change(arrays)
    write_file(file, LazyTensorMap.of(arrays), metadata)
    assert_refused(file, message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("config"), "config must be an object, not NoneType"),
        (in_config("n_embd", "24"), "(?s)config: .*n_embd='24'"),
        (in_config("\x1b[31m", 1), r"config has the unknown field '\\x1b\[31m'"),
        (in_config("n_layer", 10_000), "digests must have one entry for each tensor"),
        (in_config("n_layer", 10**30), "(?s)config: .*must be between"),
        (in_config("vocab_size", 2**31 - 1), "logits has the shape"),
        (in_config("bias", False), "digests must have one entry for each tensor"),
        (changed("digests", {}), "digests must have one entry for each tensor"),
        (changed("fingerprint", 5), "fingerprint must be a string, not int"),
        (changed("versions", {"jax": None}), "versions must map names to strings"),
        (changed("tokens", ["text"]), "tokens must be a string, not list"),
        (changed("measured", []), "measured must be an object, not list"),
        (without("bounds"), "bounds must be an object"),
        (changed("bounds", {"logits": 1.0}), "bounds must have exactly logits, kl"),
        (in_bounds("kl", -1), "bounds: kl='-1' must be a number of at least 0"),
        (in_bounds("kl", True), "bounds: kl='True' must be a number"),
        (in_bounds("kl", float("nan")), "the description is not valid JSON: 'NaN is not a number in JSON'"),
    ],
)
def test_invalid_descriptions_are_refused(file: Path, change: Callable[[dict[str, Any]], None], message: str) -> None:
    tensors, metadata = read_file(file)
    arrays = {name: np.array(array) for name, array in tensors.items()}
    description = json.loads(metadata["description"])
    change(description)
    file.unlink()
    write_file(file, LazyTensorMap.of(arrays), {**metadata, "description": json.dumps(description)})
    assert_refused(file, message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("kind"), "is not a certificate"),
        (changed("version", "2"), "has version '2'; this version of the project reads version 1"),
        (without("version"), "has version 'None'"),
        (without("description"), "the description is not valid JSON"),
        (changed("description", "[1]"), "the description must hold an object, not list"),
        (changed("description", "[" * 10_000), "the description is not valid JSON"),
        (changed("description", '{"a":' * 40 + "1" + "}" * 40), "nested more than 32 deep"),
        (changed("description", '{"a":[' + "1," * 200_000 + "1]}"), "holds more than 100000 values"),
    ],
)
def test_invalid_metadata_is_refused(file: Path, change: Callable[[dict[str, Any]], None], message: str) -> None:
    tensors, metadata = read_file(file)
    arrays = {name: np.array(array) for name, array in tensors.items()}
    change(metadata)
    file.unlink()
    write_file(file, LazyTensorMap.of(arrays), metadata)
    assert_refused(file, message)


def truncated(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def enormous(file: Path) -> None:
    os.truncate(file, 2**40)  # sparse


def with_huge_shape(file: Path) -> None:
    header = b'{"logits":{"dtype":"F64","shape":[4611686018427387904,2],"data_offsets":[0,8]}}'
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))


def weights(file: Path) -> None:
    file.write_bytes((bridge.BUNDLED / "model.safetensors").read_bytes())


def pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncated, "truncated"),
        (enormous, "has 1099511627776 bytes, and a certificate at most"),
        (with_huge_shape, "needs '73786976294838206464' bytes"),
        (weights, "is not a certificate of gpt2 verify"),
        (lambda file: file.write_bytes(b""), "empty or truncated"),
        (lambda file: file.write_text("years of work" * 9), "not a safetensors file, or truncated"),
        (pipe, "not a regular file"),
        (folder, "not a regular file"),
        (Path.unlink, "No such file"),
    ],
)
def test_other_files_are_refused(file: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(file)
    assert_refused(file, message)
