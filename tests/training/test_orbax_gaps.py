"""Damage of checkpoints that Orbax by itself does not detect, but this project does.

If the first half of a test fails, Orbax has changed its behaviour.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
import pytest
import tensorstore
from support.models import TINY

import bridge
from bridge import CheckpointError
from bridge.formats.directory import write_config
from gpt2_jax.training import TrainState
from gpt2_jax.training.run.checkpointing import Checkpoints

pytestmark = [
    pytest.mark.usefixtures("quick_compilation"),
    # After an error in one array, Orbax abandons the other reads, whose errors are then never retrieved.
    pytest.mark.filterwarnings("ignore:.*_read_array_index_and_device_put:pytest.PytestUnraisableExceptionWarning"),
]

NAME, CHUNK = "params.wte.embedding", "c/0/0"
PARAMETERS = bridge.parameters(TINY)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints of steps 1 and 2, of which 2 is better."""
    run = tmp_path_factory.mktemp("gaps") / "run"
    run.mkdir()
    write_config(run / "config.json", TINY)
    (run / "run.json").write_text("{}")
    with Checkpoints(run) as checkpoints:
        for step in (1, 2):
            checkpoints.save(state_of(step), 1 / step)
    return run


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "run"))


def state_of(step: int) -> TrainState:
    """Random bytes, which are stored verbatim because they do not compress."""
    rng = np.random.default_rng(step)
    params = {p.torch_name: np.ndarray(p.torch_shape, np.float32, rng.bytes(10**5)) for p in PARAMETERS}
    return TrainState(jnp.int32(step), jax.tree.map(jnp.asarray, bridge.to_flax(params, TINY)), None)


def by_orbax(run: Path, step: int) -> TrainState:
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state_of(step))
    return ocp.load(run / "checkpoints" / str(step), like)


def numbers(state: TrainState) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]


def flip_a_bit(run: Path) -> None:
    """Flip a bit of a large array. Small arrays are in the database's B-tree, which has checksums."""
    number = np.asarray(state_of(2).params["wte"]["embedding"])[3].tobytes()
    [file] = [path for path in (run / "checkpoints" / "2").rglob("d/*") if number in path.read_bytes()]
    data = bytearray(file.read_bytes())
    data[data.index(number)] ^= 1
    file.write_bytes(data)


def remove_a_chunk(run: Path) -> None:
    array_store(run).delete_range(tensorstore.KvStore.KeyRange(CHUNK, CHUNK + "\0")).result()


def array_store(run: Path) -> tensorstore.KvStore:
    """The file of one array of step 2 in Orbax's database."""
    base = {"driver": "file", "path": f"{run}/checkpoints/2/state/"}
    return tensorstore.KvStore.open({"driver": "ocdbt", "base": base, "path": f"{NAME}/"}).result()


def assert_skipped(run: Path) -> None:
    """Assert that `bridge.load` and a resumed run skip step 2."""
    with pytest.raises(CheckpointError, match="checkpoints/2"):
        bridge.load(run / "checkpoints" / "2")
    loaded = bridge.load(run)
    assert loaded.diagnostics[0] == "read from checkpoints/1"
    assert loaded.diagnostics[1].startswith("the checkpoint of step 2 is damaged and was skipped: ")
    messages: list[str] = []
    with Checkpoints(run, say=messages.append) as checkpoints:
        assert checkpoints.latest() == 1
        assert numbers(checkpoints.restore(1, state_of(1))) == numbers(state_of(1))
    assert messages == list(loaded.diagnostics[1:])


def test_an_undamaged_checkpoint_is_read(run: Path) -> None:
    assert numbers(by_orbax(run, 2)) == numbers(state_of(2))
    assert bridge.load(run).diagnostics == ("read from checkpoints/2",)


def test_orbax_does_not_detect_a_flipped_bit(run: Path) -> None:
    flip_a_bit(run)
    pairs = zip(numbers(by_orbax(run, 2)), numbers(state_of(2)), strict=True)
    assert sum(found != saved for found, saved in pairs) == 1
    assert_skipped(run)


def test_tensorstore_reads_a_missing_chunk_as_zeros(run: Path) -> None:
    """Orbax checks this by default; tensorstore does not."""
    remove_a_chunk(run)
    array = tensorstore.open({"driver": "zarr3", "kvstore": array_store(run).spec()}).result()
    assert not array.read().result().any()
    with pytest.raises(Exception, match="Encountered error while reading array"):
        by_orbax(run, 2)
    loading = ocp.options.ArrayOptions.Loading(raise_array_data_missing_error=False)
    with ocp.Context(array_options=ocp.options.ArrayOptions(loading=loading)):
        assert any(not any(number) for number in numbers(by_orbax(run, 2)))
    assert_skipped(run)


@pytest.mark.parametrize("damage", [Path.unlink, lambda file: file.write_bytes(b"")], ids=["removed", "emptied"])
@pytest.mark.parametrize("name", ["commit_success.txt", "state/_sharding", "state/ocdbt.process_0/manifest.ocdbt"])
def test_orbax_does_not_detect_a_damaged_metadata_file(run: Path, name: str, damage: Callable[[Path], object]) -> None:
    damage(run / "checkpoints" / "2" / name)
    assert numbers(by_orbax(run, 2)) == numbers(state_of(2))
    assert_skipped(run)
