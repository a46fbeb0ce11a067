"""Signatures of certificates and checkpoints, and what they detect."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.signing_keys import write_keys

from bridge import BridgeError
from gpt2_jax.parity import SignatureError, sign, verify_signature

pytest.importorskip("model_signing", reason="the package model-signing is not installed")


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    return write_keys(tmp_path, "key")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    (directory / "folder").mkdir(parents=True)
    (directory / "config.json").write_text("{}")
    (directory / "folder" / "weights").write_bytes(bytes(range(256)) * 50)
    return directory


def test_a_signature_of_a_directory_and_of_a_file_is_valid(
    model: Path, tmp_path: Path, keys: tuple[Path, Path]
) -> None:
    for path in (model, model / "config.json"):
        sign(path, tmp_path / "sig", keys[0], overwrite=True)
        verify_signature(path, tmp_path / "sig", keys[1])


def test_every_change_of_the_files_is_detected(model: Path, tmp_path: Path, keys: tuple[Path, Path]) -> None:
    signature = tmp_path / "sig"
    sign(model, signature, keys[0])
    weights = model / "folder" / "weights"
    right = weights.read_bytes()

    weights.write_bytes(right[:-1] + b"\0")
    with pytest.raises(SignatureError, match=r"Hash mismatch for .*folder/weights"):
        verify_signature(model, signature, keys[1])
    weights.rename(model / "weights")
    (model / "weights").write_bytes(right)
    with pytest.raises(SignatureError, match="Extra files found"):
        verify_signature(model, signature, keys[1])
    (model / "weights").unlink()
    with pytest.raises(SignatureError, match="Missing files"):
        verify_signature(model, signature, keys[1])
    weights.write_bytes(right)
    verify_signature(model, signature, keys[1])


def test_ignored_files_and_the_signature_itself_may_be_in_the_directory(model: Path, keys: tuple[Path, Path]) -> None:
    report = model / "report.json"
    sign(model, model / "sig", keys[0], ignored=[report])
    report.write_text("later")
    verify_signature(model, model / "sig", keys[1])


def test_links_are_followed_as_in_the_cache_of_the_hub(model: Path, tmp_path: Path, keys: tuple[Path, Path]) -> None:
    blob = (model / "config.json").rename(tmp_path / "blob")
    (model / "config.json").symlink_to(blob)
    sign(model, tmp_path / "sig", keys[0])
    verify_signature(model, tmp_path / "sig", keys[1])
    blob.write_text('{"n_layer": 3}')
    with pytest.raises(SignatureError, match="Hash mismatch"):
        verify_signature(model, tmp_path / "sig", keys[1])


def test_another_key_is_refused(model: Path, tmp_path: Path, keys: tuple[Path, Path]) -> None:
    sign(model, tmp_path / "sig", keys[0])
    _, other = write_keys(tmp_path, "other")
    with pytest.raises(SignatureError, match="Key mismatch"):
        verify_signature(model, tmp_path / "sig", other)

    bundle = json.loads((tmp_path / "sig").read_text())
    bundle["verificationMaterial"]["publicKey"]["hint"] = hint_of(tmp_path, other)
    (tmp_path / "sig").write_text(json.dumps(bundle))
    with pytest.raises(SignatureError, match="InvalidSignature"):
        verify_signature(model, tmp_path / "sig", other)


def hint_of(directory: Path, public: Path) -> str:
    private = public.with_suffix(".pem")
    sign(public, directory / "own", private)
    hint: str = json.loads((directory / "own").read_text())["verificationMaterial"]["publicKey"]["hint"]
    return hint


def test_only_a_signature_of_the_same_key_is_replaced(model: Path, tmp_path: Path, keys: tuple[Path, Path]) -> None:
    signature, (other, _) = tmp_path / "sig", write_keys(tmp_path, "other")
    sign(model, signature, keys[0])
    before = signature.read_bytes()
    with pytest.raises(BridgeError, match="exists"):
        sign(model, signature, keys[0])
    with pytest.raises(BridgeError, match="exists"):
        sign(model, signature, other, overwrite=True)
    assert signature.read_bytes() == before
    signature.write_text("notes")
    with pytest.raises(BridgeError, match="exists"):
        sign(model, signature, keys[0], overwrite=True)
    assert signature.read_text() == "notes"


@pytest.mark.parametrize("content", ["", "no key", "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"])
def test_what_is_not_a_key_is_refused(content: str, model: Path, tmp_path: Path, keys: tuple[Path, Path]) -> None:
    wrong = tmp_path / "wrong"
    wrong.write_text(content)
    with pytest.raises(SignatureError, match="is not an unencrypted private key"):
        sign(model, tmp_path / "sig", wrong)
    assert not (tmp_path / "sig").exists()
    sign(model, tmp_path / "sig", keys[0])
    with pytest.raises(SignatureError, match="wrong"):
        verify_signature(model, tmp_path / "sig", wrong)


def test_a_key_of_another_kind_is_refused(model: Path, tmp_path: Path) -> None:
    from cryptography.hazmat.primitives.asymmetric import ed25519
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    key = ed25519.Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (tmp_path / "key").write_bytes(key)
    with pytest.raises(SignatureError, match="is not a key of an elliptic curve"):
        sign(model, tmp_path / "sig", tmp_path / "key")


def test_missing_files_are_errors(model: Path, tmp_path: Path, keys: tuple[Path, Path]) -> None:
    with pytest.raises(SignatureError, match="No such file"):
        verify_signature(model, tmp_path / "missing", keys[1])
    with pytest.raises(SignatureError, match="No such file"):
        sign(model, tmp_path / "sig", tmp_path / "missing")


def test_damaged_signatures_are_refused(model: Path, tmp_path: Path, keys: tuple[Path, Path]) -> None:
    sign(model, tmp_path / "sig", keys[0])
    right, rng, wrong = (tmp_path / "sig").read_bytes(), np.random.default_rng(0), tmp_path / "wrong"
    for content in (b"", b"{}", b"[]", b"null", b"[" * 100_000, b'{"verificationMaterial": []}', b"\xff\xfe"):
        wrong.write_bytes(content)
        with pytest.raises(SignatureError):
            verify_signature(model, wrong, keys[1])
    accepted = 0
    for _ in range(200):
        damaged = bytearray(right)
        damaged[rng.integers(len(right))] = rng.integers(256)
        wrong.write_bytes(damaged)
        try:
            verify_signature(model, wrong, keys[1])
        except SignatureError:
            continue
        accepted += 1
        # Only the text around the signed content may differ: base64 ignores some characters.
        assert bytes(damaged) == right or json.loads(damaged).keys() == json.loads(right).keys()
    assert accepted < 20


def test_a_very_large_signature_is_not_read(model: Path, tmp_path: Path, keys: tuple[Path, Path]) -> None:
    with (tmp_path / "large").open("wb") as file:
        file.truncate(2**33)
    with pytest.raises(SignatureError, match="larger than"):
        verify_signature(model, tmp_path / "large", keys[1])


def test_the_commands_of_model_signing_read_and_write_the_same_files(
    model: Path, tmp_path: Path, keys: tuple[Path, Path]
) -> None:
    def run(*arguments: str | Path) -> None:
        done = subprocess.run([sys.executable, "-m", "model_signing", *map(str, arguments)], capture_output=True)
        assert done.returncode == 0, done.stderr

    run("sign", "key", model, "--private_key", keys[0], "--signature", tmp_path / "theirs")
    verify_signature(model, tmp_path / "theirs", keys[1])
    sign(model, tmp_path / "ours", keys[0])
    run("verify", "key", model, "--public_key", keys[1], "--signature", tmp_path / "ours")
