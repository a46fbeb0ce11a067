"""Signatures of files and directories with an elliptic-curve key, in the format of OpenSSF Model Signing.

The commands `model_signing sign key` and `model_signing verify key` of the package model-signing write and read the
same files. Nothing here uses the network.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from importlib import import_module
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bridge import BridgeError
from bridge.errors import quoted
from bridge.storage.atomic_writes import new_file
from bridge.storage.regular_file import read_small_file

MOST_SIGNATURE_BYTES = 8 * 2**20
"""A signature lists the name and the digest of every file, about 200 bytes each."""

MOST_KEY_BYTES = 2**16


class SignatureError(BridgeError):
    """A key is invalid, or a signature is missing, damaged, made with another key, or not of these files."""


def sign(
    path: str | Path,
    signature: str | Path,
    private_key: str | Path,
    *,
    ignored: Iterable[str | Path] = (),
    overwrite: bool = False,
) -> None:
    """Sign a file, or all files of a directory, and write the signature atomically.

    Args:
        path: the file or the directory. Symbolic links are followed. Files of git are not signed.
        signature: the file to write.
        private_key: a PEM file with an unencrypted private key on the curve P-256, P-384 or P-521.
        ignored: files in the directory that are not signed, beside the signature itself.
        overwrite: replace an earlier signature that was made with the same key. No other file is replaced.

    Raises:
        SignatureError: the key is invalid, or the files cannot be read.
        BridgeError: the package model-signing is not installed, or the signature cannot be written.
    """
    path, signature = Path(path), Path(signature)
    hashing, signing = _import("hashing"), _import("signing")
    key = _key_id(private_key)
    with TemporaryDirectory() as directory, _errors(f"cannot sign {quoted(path)}"):
        temporary = Path(directory) / "signature"
        inside = [Path(file).absolute() for file in (signature, *ignored)]
        ignored_paths = [file.relative_to(path.absolute()) for file in inside if file.is_relative_to(path.absolute())]
        files = hashing.Config().set_ignored_paths(paths=ignored_paths).set_allow_symlinks(True)
        config = signing.Config().set_hashing_config(files)
        config.use_elliptic_key_signer(private_key=Path(private_key)).sign(path, temporary)
        content = temporary.read_bytes()
    with new_file(signature, overwrite=lambda: overwrite and _key_of(signature) == key) as new:
        new.write_bytes(content)


def verify_signature(path: str | Path, signature: str | Path, public_key: str | Path) -> None:
    """Check that a file, or a directory, is exactly as it was signed.

    Args:
        path, signature: as in `sign`. A file that was added to a directory is an error too.
        public_key: a PEM file with the public key of the signer.

    Raises:
        SignatureError: the signature is missing, damaged, made with another key, or not of these files.
        BridgeError: the package model-signing is not installed.
    """
    path, signature, public_key = Path(path), Path(signature), Path(public_key)
    hashing, verifying = _import("hashing"), _import("verifying")
    with _errors("cannot verify the signature"):
        read_small_file(public_key, MOST_KEY_BYTES, SignatureError)
        read_small_file(signature, MOST_SIGNATURE_BYTES, SignatureError)
    with _errors(f"{quoted(path)} does not have the signature {quoted(signature)} by the key {quoted(public_key)}"):
        # Given explicitly, because the package derives from the signature that links are followed, and then does not.
        files = hashing.Config().set_allow_symlinks(True)
        config = verifying.Config().use_elliptic_key_verifier(public_key=public_key).set_hashing_config(files)
        config.verify(path, signature)


def signature_paths(certificate: Path) -> tuple[Path, Path]:
    """The signatures of a certificate and of its checkpoint, beside the certificate."""
    return Path(f"{certificate}.sig"), Path(f"{certificate}.checkpoint.sig")


def sign_certificate(
    certificate: Path,
    checkpoint: Path,
    private_key: Path,
    *,
    ignored: Iterable[str | Path] = (),
    overwrite: bool = False,
) -> tuple[Path, Path]:
    """Sign a certificate and the files of its checkpoint. Returns the two signatures."""
    of_certificate, of_checkpoint = signature_paths(certificate)
    sign(certificate, of_certificate, private_key, overwrite=overwrite)
    ignored = (certificate, of_certificate, *ignored)
    sign(checkpoint, of_checkpoint, private_key, ignored=ignored, overwrite=overwrite)
    return of_certificate, of_checkpoint


def require_private_key(private_key: Path) -> None:
    """Raise `BridgeError` unless `sign` can use this key."""
    _key_id(private_key)


def is_signature_by(signature: Path, private_key: Path) -> bool:
    """Whether a file is a signature that was made with this key. It is not verified."""
    return _key_of(signature) == _key_id(private_key)


def _key_id(private_key: str | Path) -> str:
    """The SHA-256 of the public key, by which a signature names its key."""
    _import("signing")  # the package requires cryptography
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

    with _errors(f"{quoted(private_key)} is not an unencrypted private key in PEM"):
        content = read_small_file(Path(private_key), MOST_KEY_BYTES, SignatureError)
        public_key = load_pem_private_key(content, None).public_key()
    if not isinstance(public_key, EllipticCurvePublicKey):
        raise SignatureError(f"{quoted(private_key)} is not a key of an elliptic curve")
    return hashlib.sha256(public_key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def _key_of(signature: Path) -> str | None:
    """The key that a signature names, or None if the file is not a signature."""
    with suppress(BridgeError, OSError, ValueError, KeyError, TypeError, RecursionError):
        bundle: Any = json.loads(read_small_file(signature, MOST_SIGNATURE_BYTES, SignatureError))
        return str(bundle["verificationMaterial"]["publicKey"]["hint"])
    return None


def _import(name: str) -> Any:
    try:
        return import_module(f"model_signing.{name}")
    except ModuleNotFoundError as error:
        raise BridgeError("signatures need the package model-signing: pip install 'gpt2-bridge[signing]'") from error


@contextmanager
def _errors(what: str) -> Iterator[None]:
    """Raise every error of the package as a `SignatureError`, and print nothing.

    The package raises errors of many types for damaged input, because it leaves parsing to other packages.
    """
    try:
        with redirect_stdout(StringIO()):
            yield
    except BridgeError:
        raise
    except Exception as error:
        detail = " ".join(str(error).split()) or type(error).__name__
        raise SignatureError(f"{what}: {detail[:500]}") from error
