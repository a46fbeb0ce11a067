"""A certificate of parity: its header, its description and its arrays."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
from fuzz import json_damage
from safetensors.numpy import load_file
from support.models import SMALLEST, random_checkpoint, random_ids

import bridge
from gpt2_jax.parity import Certificate, read_certificate, verify_against, write_certificate
from gpt2_jax.parity.activations import Outputs
from gpt2_jax.parity.certificates.certificate import BOUNDS
from gpt2_jax.parity.inputs import pad

CHECKPOINT = random_checkpoint(SMALLEST)


def samples(folder: Path) -> list[Path]:
    """A valid file with arbitrary outputs, which needs no PyTorch."""
    c, rng = SMALLEST, np.random.default_rng(0)
    ids = random_ids(c, 2, 4)
    padded_ids, padded_mask = pad([ids[0, :2], ids[1]], "left")
    states, logits = rng.normal(size=(2, 2, c.n_layer + 2, c.n_embd)), rng.normal(size=(2, 2, c.vocab_size))
    certificate = Certificate(
        config=c,
        fingerprint=bridge.fingerprint(CHECKPOINT.tensors),
        digests={name: bridge.fingerprint({name: tensor}) for name, tensor in CHECKPOINT.tensors.items()},
        versions={"torch": "2.0", "jax": "0.10"},
        tokens="random",
        ids=ids,
        positions=np.array([0, 3]),
        outputs=Outputs(states, logits, rng.random((2, 3))),
        gradients=rng.random((len(CHECKPOINT.tensors), 2)),
        padded_ids=padded_ids,
        padded_mask=padded_mask,
        padded_losses=np.array([[0.0, 0.0, 1.0], [1.0, 2.0, 3.0]]),
        measured={"verify": [{"name": "logits", "measurements": []}]},
    )
    write_certificate(certificate, folder / "certificate")
    return [folder / "certificate"]


def mutable(source: Path) -> list[Path]:
    return [source]


def damage(content: bytes, file: Path, rng: random.Random) -> bytes:
    """Change the header, or the description inside it. The length field stays correct."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = content[8:end]
    if rng.random() < 0.7:
        value = json.loads(header)
        metadata = value["__metadata__"]
        damaged = json_damage.damaged_json(metadata["description"].encode(), rng)
        metadata["description"] = damaged.decode("utf-8", "surrogatepass")
        header = json.dumps(value).encode()
    else:
        header = json_damage.damaged_json(header, rng)
    return len(header).to_bytes(8, "little") + header + content[end:]


def judge(source: Path) -> str:
    """What loads has the arrays that the safetensors package reads, finite values, and no looser tolerances."""
    try:
        certificate = read_certificate(source)
        report = verify_against(CHECKPOINT, certificate, checks=["weights", "configuration"])
    except bridge.BridgeError:
        return "refused"
    json.dumps(report.to_json(), allow_nan=False)
    theirs = load_file(source)
    for name, array in (*certificate.outputs._asdict().items(), ("ids", certificate.ids)):
        np.testing.assert_array_equal(array, theirs[name])
        assert np.isfinite(array).all()
    assert certificate.ids.max() < certificate.config.vocab_size
    assert all(certificate.bounds[name] <= limit for name, limit in BOUNDS.items())
    return "loaded"
