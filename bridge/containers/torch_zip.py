"""Read files of torch.save without torch and without executing code: a zip with a pickle and a record per storage.

Format: https://github.com/pytorch/pytorch/blob/main/docs/source/notes/serialization.rst
The functions that a pickle calls to describe tensors: torch/_utils.py, `_rebuild_tensor_v2` and others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bridge.containers import torch_pickle
from bridge.containers.torch_pickle import Symbol
from bridge.containers.zip_records import Archive
from bridge.errors import CheckpointError, quoted
from bridge.storage.dtypes import TORCH_STORAGES
from bridge.storage.regular_file import first_bytes
from bridge.storage.stored_file import StoredFile
from bridge.storage.tensors import LazyTensor, are_sizes

MOST_TENSORS = 10_000  # GPT-2 XL with AdamW's state has 2,400
_MOST_SIZE = 2**48  # elements along an axis, and in all non-empty axes: the limit of what numpy can address

_WITHOUT_STORAGES = ("uint16", "uint32", "uint64")
"""Types without a storage class. torch saves them as untyped storages and passes the dtype to `_rebuild_tensor_v3`."""

_ZIP = b"PK\3\4"
_LEGACY = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # torch's magic number, pickled
_BARE_PICKLES = tuple(bytes([0x80, protocol]) for protocol in range(2, 6))
_SAVE_AGAIN = "if you trust it, load it with torch (weights_only=True) and torch.save the tensors again"


def is_torch_file(path: Path) -> bool:
    """Whether a file starts like a file of torch, of any version. Returns False for an unreadable file."""
    return first_bytes(path, 4).startswith((_ZIP, *_BARE_PICKLES))


def read_file(path: str | Path) -> Any:
    """Return the object passed to torch.save: dicts, lists, tuples, numbers, strings, and a `LazyTensor` per tensor.

    An OrderedDict becomes a dict, a parameter becomes its tensor, and devices are ignored. Tensors that are the same
    view of the same storage are the same object. Only the pickle is read here; each tensor is read on access.

    Raises `CheckpointError` for any other type of object, with its name, and for a damaged file.
    """
    file = StoredFile.open(path)
    start = file.read(0, min(len(_LEGACY), file.size))
    if not start.startswith(_ZIP):
        if start == _LEGACY:
            raise CheckpointError(f"{quoted(file.path)} is in the format of torch before 1.6; {_SAVE_AGAIN}")
        if start.startswith(_BARE_PICKLES):
            raise CheckpointError(f"{quoted(file.path)} is a pickle that torch.save did not write; {_SAVE_AGAIN}")
        raise CheckpointError(f"{quoted(file.path)} is not a file of torch, or is damaged")
    return _Saved(Archive.open(file)).read()


@dataclass(frozen=True)
class _Storage:
    """The record of a storage."""

    record: str
    dtype: np.dtype
    nbytes: int


class _Saved:
    """An open file: its records, and the functions that its pickle may call."""

    def __init__(self, archive: Archive) -> None:
        self._archive = archive
        self._where = quoted(archive.file.path)
        self._root = next(iter(archive.records), "").partition("/")[0]
        self._storages: dict[str, _Storage] = {}
        self._entries: dict[tuple[Any, ...], LazyTensor] = {}
        self._tensors_made = 0

    def read(self) -> Any:
        self._require_torch_save()
        content = self._archive.read(f"{self._root}/data.pkl")
        return torch_pickle.load(
            content,
            f"{self._where}: data.pkl",
            symbols=self._symbols(),
            persistent=self._storage,
            leaves=(LazyTensor,),
        )

    def _require_torch_save(self) -> None:
        names = self._archive.records
        if any(not name.startswith(f"{self._root}/") for name in names):
            raise CheckpointError(f"{self._where} is a zip archive that torch.save did not write")
        if any(name.startswith((f"{self._root}/code/", f"{self._root}/constants.pkl")) for name in names):
            raise CheckpointError(
                f"{self._where} is a TorchScript archive; load it with torch.jit.load and torch.save its state_dict()"
            )
        pickle = names.get(f"{self._root}/data.pkl")
        if pickle is None:
            raise CheckpointError(f"{self._where} is a zip archive without data.pkl; torch.save did not write it")
        if pickle.size > torch_pickle.MOST_BYTES:
            raise CheckpointError(
                f"{self._where}: data.pkl has {pickle.size} bytes; the limit is {torch_pickle.MOST_BYTES}"
            )
        order = names.get(f"{self._root}/byteorder")
        if order is not None and (order.size != 6 or self._archive.read(order.name) != b"little"):
            raise CheckpointError(f"{self._where} was written on a big-endian machine; {_SAVE_AGAIN}")

    def _symbols(self) -> dict[tuple[str, str], Symbol]:
        """Return everything that a pickle may name, with its meaning."""
        calls = {
            ("collections", "OrderedDict"): self._ordered_dict,
            ("torch", "Size"): self._size,
            ("torch._utils", "_rebuild_tensor_v2"): self._tensor_v2,
            ("torch._utils", "_rebuild_tensor_v3"): self._tensor_v3,
            ("torch._utils", "_rebuild_parameter"): self._parameter,
        }
        types: dict[tuple[str, str], np.dtype] = {("torch", name): dtype for name, dtype in TORCH_STORAGES.items()}
        types["torch.storage", "UntypedStorage"] = np.dtype(np.uint8)
        types.update({("torch", name): np.dtype(name) for name in _WITHOUT_STORAGES})
        return {
            **{key: Symbol(".".join(key), call=call) for key, call in calls.items()},
            **{key: Symbol(".".join(key), value=dtype) for key, dtype in types.items()},
        }

    def _refuse(self, why: str) -> CheckpointError:
        return CheckpointError(f"{self._where}: data.pkl {why}")

    def _ordered_dict(self, arguments: tuple[Any, ...]) -> dict[Any, Any]:
        if arguments:
            raise self._refuse("passes arguments to OrderedDict")
        return {}

    def _size(self, arguments: tuple[Any, ...]) -> tuple[int, ...]:
        if len(arguments) != 1 or not _are_sizes(arguments[0]):
            raise self._refuse("has a torch.Size whose argument is not a tuple of sizes")
        return arguments[0]

    def _parameter(self, arguments: tuple[Any, ...]) -> LazyTensor:
        if len(arguments) != 3 or not isinstance(arguments[0], LazyTensor) or not _are_empty(arguments[2]):
            raise self._refuse("has a parameter whose arguments are not a tensor and a bool")
        return arguments[0]

    def _storage(self, persistent_id: Any) -> _Storage:
        """`("storage", type, key, device, count)`. `count` is a number of elements."""
        match persistent_id:
            case ("storage", Symbol(value=np.dtype() as dtype), str(key), str(), int(count)):
                pass
            case _:
                raise self._refuse("has a persistent id that is not a storage")
        name = f"{self._root}/data/{key}"
        record = self._archive.records.get(name)
        if record is None:
            raise self._refuse(f"has a tensor in the record {quoted(name)}, which does not exist")
        if count * dtype.itemsize != record.size:
            raise self._refuse(
                f"has a storage of {quoted(count)} times {dtype.itemsize} bytes in the record {quoted(name)}, which "
                f"has {record.size} bytes"
            )
        storage = self._storages.setdefault(key, _Storage(name, dtype, record.size))
        if storage.dtype != dtype:
            raise self._refuse(f"reads the record {quoted(name)} as {storage.dtype} and as {dtype}")
        return storage

    def _tensor_v2(self, arguments: tuple[Any, ...]) -> LazyTensor:
        """`(storage, offset, shape, strides, requires_grad, hooks[, metadata])`, counted in elements."""
        match arguments:
            case (_Storage() as storage, offset, shape, strides, bool(), hooks, *metadata):
                if _are_empty(hooks, *metadata) and len(metadata) <= 1:
                    return self._tensor(storage, storage.dtype, offset, shape, strides)
        raise self._refuse(
            "describes a tensor in a way that torch does not: with hooks or metadata, or with missing arguments"
        )

    def _tensor_v3(self, arguments: tuple[Any, ...]) -> LazyTensor:
        """`(storage, offset, shape, strides, requires_grad, hooks, dtype[, metadata])`."""
        match arguments:
            case (_Storage() as storage, offset, shape, strides, bool(), hooks, Symbol(value=np.dtype() as dtype), *m):
                if _are_empty(hooks, *m) and len(m) <= 1:
                    return self._tensor(storage, dtype, offset, shape, strides)
        raise self._refuse(
            "describes a tensor in a way that torch does not: with hooks or metadata, or with missing arguments"
        )

    def _tensor(self, storage: _Storage, dtype: np.dtype, offset: Any, shape: Any, strides: Any) -> LazyTensor:
        """Return the lazy tensor of a view of a storage, after checking that the view lies inside the storage."""
        self._tensors_made += 1
        if self._tensors_made > MOST_TENSORS:
            raise self._refuse(f"has more than {MOST_TENSORS} tensors")
        where = f"has a tensor in the record {quoted(storage.record)}"
        if not (_are_sizes(shape) and _are_sizes(strides) and _are_sizes((offset,)) and len(shape) == len(strides)):
            raise self._refuse(f"{where} whose offset, shape or strides are negative, too large or not integers")
        strides = tuple(stride if size > 1 else 0 for size, stride in zip(shape, strides, strict=True))
        count = math.prod(shape)
        reach = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) + 1 if count else 0
        available = storage.nbytes // dtype.itemsize
        if offset + reach > available or math.prod(size or 1 for size in shape) >= _MOST_SIZE:
            raise self._refuse(f"{where} that is larger than the record")
        if count > available:
            raise self._refuse(f"{where} that repeats its elements; make it contiguous and save it again")
        key = (storage.record, dtype, offset, shape, strides)
        if key not in self._entries:
            self._entries[key] = LazyTensor(dtype, shape, lambda: self._read(*key, reach))
        return self._entries[key]

    def _read(
        self,
        record: str,
        dtype: np.dtype,
        offset: int,
        shape: tuple[int, ...],
        strides: tuple[int, ...],
        reach: int,
    ) -> np.ndarray:
        """Read the range from the first element of the tensor to its last, and return a strided view of it."""
        width = dtype.itemsize
        part = self._archive.read_part(record, offset * width, reach * width)
        return np.ndarray(shape, dtype, part.data, strides=tuple(stride * width for stride in strides))


def _are_sizes(values: Any) -> bool:
    return are_sizes(values, tuple, most=_MOST_SIZE - 1)


def _are_empty(*values: Any) -> bool:
    """Whether hooks and metadata are empty, as torch writes them for plain tensors."""
    return all(value is None or (type(value) is dict and not value) for value in values)
