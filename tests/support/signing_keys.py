"""Pairs of keys for signatures."""

from __future__ import annotations

from pathlib import Path


def write_keys(directory: Path, name: str) -> tuple[Path, Path]:
    """Write a new private key and its public key, on the curve P-256. Returns their paths."""
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

    private, public = directory / f"{name}.pem", directory / f"{name}.pub"
    key = ec.generate_private_key(ec.SECP256R1())
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return private, public
