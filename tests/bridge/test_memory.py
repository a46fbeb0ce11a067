"""Peak memory of conversions at 124M parameters, in child processes. It is limited to one tensor at a time.

The peak of a child (`ru_maxrss`, which on Linux only rises) is compared with that of a child that
imports the same modules and does nothing.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import bridge
from bridge import GPT2_SIZES, Checkpoint
from bridge.formats import WRITABLE
from bridge.storage.tensors import LazyTensor, LazyTensorMap

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux only"),
]

MIB = 2**20
CONFIG = GPT2_SIZES["gpt2"]
TENSOR_BYTES = 4 * bridge.num_parameters(CONFIG)
LARGEST_TENSOR = 4 * CONFIG.vocab_size * CONFIG.n_embd  # wte in float32
MOST_TO_LOAD = 1.15 * TENSOR_BYTES
"""All tensors once, and an allowance for Python and malloc."""
MOST_TO_CONVERT = 2 * LARGEST_TENSOR + 64 * MIB
"""One tensor is read while the previous one is still being written."""
MOST_TO_REFUSE = 64 * MIB
"""Limit for rejecting a file that is not a checkpoint."""

SEEN = 0.95
"""The measured growth must be at least this fraction of the allocated memory. The peak of the idle child varies by
a MiB or two."""

# A child inherits the peak of its parent on exec. The measured process is therefore started by `sh`, which is small,
# and not by the test's own process.
IMPORTS = "import resource, sys; import numpy, ml_dtypes, json; import bridge, bridge.containers.safetensors"
REPORT = "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"


def peak_bytes(code: str, *arguments: Path) -> int:
    program = f"{IMPORTS}\n{code}\n{REPORT}"
    command = ["/bin/sh", "-c", '"$@"; exit $?', "sh", sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return 1024 * int(done.stdout)


@pytest.fixture(scope="module")
def idle() -> int:
    return peak_bytes("")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("gpt2-124m")
    yield path
    shutil.rmtree(path)  # 500 MB a copy: pytest would keep three runs of them


@pytest.fixture(scope="module")
def huggingface(folder: Path) -> Path:
    """Return a checkpoint with 124M parameters whose tensors are made on access."""
    entries = {
        p.torch_name: LazyTensor(np.dtype("f4"), p.torch_shape, partial(np.full, p.torch_shape, np.float32(0.25)))
        for p in bridge.parameters(CONFIG)
    }
    bridge.save(Checkpoint(CONFIG, LazyTensorMap(entries), "memory"), folder / "huggingface", format="huggingface")
    return folder / "huggingface"


def test_the_measurement_shows_the_memory_of_the_child(idle: int) -> None:
    """Test of the measurement: 200 MiB in the child are counted, memory of the parent is not."""
    held_here = np.ones(400 * MIB, np.uint8)
    used = peak_bytes("held = numpy.ones(200 * 2**20, numpy.uint8)") - idle
    assert 195 * MIB < used < 210 * MIB
    assert held_here.all()


def test_loading_as_flax_holds_the_tensors_once(huggingface: Path, idle: int) -> None:
    code = """
checkpoint = bridge.load(sys.argv[1])
params = bridge.to_flax(checkpoint.tensors, checkpoint.config)
assert params["h_11"]["mlp"]["c_proj"]["kernel"][-1, -1] == 0.25
"""
    used = peak_bytes(code, huggingface) - idle
    print(f"load + to_flax: {used / MIB:.0f} MiB, {used / TENSOR_BYTES:.3f} x the tensors")
    assert SEEN * TENSOR_BYTES < used <= MOST_TO_LOAD


@pytest.mark.parametrize("format", WRITABLE)
def test_converting_holds_no_more_than_two_tensors(tmp_path: Path, huggingface: Path, format: str, idle: int) -> None:
    """Convert to every format and back. nanoGPT has another activation, which changes no tensor."""
    there = """
checkpoint = bridge.load(sys.argv[1])
if sys.argv[3] == "nanogpt":
    checkpoint = checkpoint.with_activation("gelu")
bridge.save(checkpoint, sys.argv[2], format=sys.argv[3])
"""
    back = 'bridge.save(bridge.load(sys.argv[1]), sys.argv[2], format="huggingface")'
    try:
        used = {"there": peak_bytes(there, huggingface, tmp_path / "there", Path(format)) - idle}
        used["back"] = peak_bytes(back, tmp_path / "there", tmp_path / "back") - idle
    finally:
        for name in ("there", "back"):
            shutil.rmtree(tmp_path / name, ignore_errors=True)
    for way, peak in used.items():
        print(f"{format}, {way}: {peak / MIB:.0f} MiB, {peak / LARGEST_TENSOR:.2f} x the largest tensor")
        assert SEEN * LARGEST_TENSOR < peak <= MOST_TO_CONVERT


def test_a_stored_tied_head_costs_no_third_tensor(tmp_path: Path, huggingface: Path, idle: int) -> None:
    """Only the comparison of a tied head with the embedding needs two tensors at once."""
    head_beside = """
from bridge.containers.safetensors import read_file, write_file
tensors, _ = read_file(sys.argv[1] + "/model.safetensors")
tensors.entries["lm_head.weight"] = tensors.entries["transformer.wte.weight"]
write_file(sys.argv[2] + "/model.safetensors", tensors, {})
"""
    path = tmp_path / "with-head"
    path.mkdir()
    shutil.copy(huggingface / "config.json", path)
    try:
        assert peak_bytes(head_beside, huggingface, path) - idle <= MOST_TO_CONVERT
        used = peak_bytes("assert len(bridge.load(sys.argv[1]).diagnostics) == 1", path) - idle
    finally:
        shutil.rmtree(path)
    print(f"load with a stored tied head: {used / MIB:.0f} MiB")
    assert SEEN * 2 * LARGEST_TENSOR < used <= MOST_TO_CONVERT


HOSTILE = {
    "lists": b'{"w":[' + b"[]," * 349_000 + b"[]]}",
    "objects": b'{"w":[' + b"{}," * 349_000 + b"{}]}",
    "names": b"{" + b",".join(b'"%x":{}' % i for i in range(100_000)) + b"}",
    "numbers": b'{"w":[' + b"1e5," * 260_000 + b"1]}",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_refusing_a_hostile_file_is_cheap(tmp_path: Path, idle: int, kind: str) -> None:
    """The most expensive header and config.json within the size limits."""
    text = HOSTILE[kind]
    assert 0.9 * MIB < len(text) <= MIB
    (tmp_path / "f.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    (tmp_path / "config.json").write_bytes(text)
    (tmp_path / "model.safetensors").touch()
    refused = """
try:
    bridge.containers.safetensors.read_file(sys.argv[1]) if sys.argv[1].endswith("s") else bridge.load(sys.argv[1])
except bridge.BridgeError:
    pass
else:
    raise SystemExit("it was accepted")
"""
    used = [peak_bytes(refused, path) - idle for path in (tmp_path / "f.safetensors", tmp_path)]
    assert max(used) <= MOST_TO_REFUSE
