"""Write files for `torch.load(weights_only=True)` without torch: a pickle, and one record per tensor.

Format: an uncompressed zip. `data.pkl` describes the nested value; a tensor is a call that names its record. Each
record `data/N` holds the bytes of a tensor, aligned for memory mapping.
https://github.com/pytorch/pytorch/blob/main/docs/source/notes/serialization.rst
Opcodes: https://docs.python.org/3/library/pickletools.html
"""

from __future__ import annotations

import itertools
import math
import pickle
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from bridge.errors import CheckpointError, quoted
from bridge.storage.dtypes import TORCH_STORAGES
from bridge.storage.stored_file import write_array
from bridge.storage.tensors import ALIGNMENT, LazyTensor

STORAGES: Mapping[np.dtype, str] = {dtype: name for name, dtype in TORCH_STORAGES.items()}
"""numpy dtype -> name of torch's storage class."""

_ROOT = "archive"
_ZIP64_FROM = 2**30  # zipfile needs 64-bit fields from 2**31 bytes, and must know before it writes
_LOCAL_HEADER, _ZIP64_EXTRA, _PADDING_HEADER = 30, 20, 4  # bytes


def write_file(path: str | Path, value: Any) -> None:
    """Write `value` to a new file: dict, list, tuple, str, int, float, bool, None, and `LazyTensor` for tensors.

    A tensor that appears several times is written once, and its copies share memory when loaded. At most one tensor is
    in memory at a time.
    """
    pickled = _Pickled(value)
    with open(path, "xb") as file, zipfile.ZipFile(file, "w") as archive:
        archive.writestr(_record(archive, "data.pkl"), pickled.content)
        archive.writestr(_record(archive, "byteorder"), b"little")
        for key, entry in enumerate(pickled.entries):
            wide = entry.nbytes >= _ZIP64_FROM
            with archive.open(_record(archive, f"data/{key}", wide), "w", force_zip64=wide) as record:
                write_array(cast(BinaryIO, record), f"data/{key}", entry)
        archive.writestr(_record(archive, "version"), b"3\n")


def _record(archive: zipfile.ZipFile, name: str, wide: bool = False) -> zipfile.ZipInfo:
    """Return the header of the next record, padded so that the data after it is aligned."""
    record = zipfile.ZipInfo(f"{_ROOT}/{name}")
    header = _LOCAL_HEADER + len(record.filename) + _PADDING_HEADER + (_ZIP64_EXTRA if wide else 0)
    padding = -(archive.start_dir + header) % ALIGNMENT
    record.extra = b"FB" + struct.pack("<H", padding) + bytes(padding)
    return record


class _Pickled:
    """A pickled value.

    Attributes:
        content: the pickle.
        entries: its tensors, each once, in the order of their records.
    """

    def __init__(self, value: Any) -> None:
        self.entries: list[LazyTensor] = []
        self._keys: dict[int, int] = {}
        self.content = pickle.PROTO + b"\x02" + self._of(value) + pickle.STOP

    def _of(self, value: Any) -> bytes:
        match value:
            case None:
                return pickle.NONE
            case bool():
                return pickle.NEWTRUE if value else pickle.NEWFALSE
            case int() if -(2**31) <= value < 2**31:
                return pickle.BININT + struct.pack("<i", value)
            case int() if value.bit_length() < 8 * 255:
                encoded = pickle.encode_long(value)
                return pickle.LONG1 + bytes([len(encoded)]) + encoded
            case float():
                return pickle.BINFLOAT + struct.pack(">d", value)
            case str():
                encoded = value.encode("utf-8", "surrogatepass")
                return pickle.BINUNICODE + struct.pack("<I", len(encoded)) + encoded
            case tuple():
                return self._all(value) + pickle.TUPLE
            case list():
                return pickle.EMPTY_LIST + self._all(value) + pickle.APPENDS
            case dict():
                return pickle.EMPTY_DICT + self._all(itertools.chain(*value.items())) + pickle.SETITEMS
            case LazyTensor():
                return self._tensor(value)
        raise CheckpointError(f"cannot write a {type(value).__name__} to a torch file: {quoted(value)}")

    def _all(self, values: Any) -> bytes:
        return pickle.MARK + b"".join(map(self._of, values))

    def _tensor(self, entry: LazyTensor) -> bytes:
        """Pickle the call `_rebuild_tensor_v2(storage, offset, shape, strides, requires_grad, hooks)`."""
        if entry.dtype not in STORAGES:
            raise CheckpointError(f"torch cannot hold {entry.dtype}")
        key = self._keys.setdefault(id(entry), len(self._keys))
        if key == len(self.entries):
            self.entries.append(entry)
        kind = _global("torch", STORAGES[entry.dtype])
        where = self._of(str(key)) + self._of("cpu") + self._of(math.prod(entry.shape))
        storage = pickle.MARK + self._of("storage") + kind + where + pickle.TUPLE + pickle.BINPERSID
        shape = self._of(0) + self._of(entry.shape) + self._of(_strides(entry.shape))
        hooks = _global("collections", "OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE
        arguments = pickle.MARK + storage + shape + pickle.NEWFALSE + hooks + pickle.TUPLE
        return _global("torch._utils", "_rebuild_tensor_v2") + arguments + pickle.REDUCE


def _global(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides of a contiguous tensor, in elements. torch counts an empty axis as size 1."""
    return tuple(math.prod(max(size, 1) for size in shape[i + 1 :]) for i in range(len(shape)))
