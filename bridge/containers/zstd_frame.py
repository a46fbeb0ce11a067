"""An upper bound on the decompressed size of a zstd frame, computed from its headers alone.

Source: RFC 8878, "Zstandard Compression and the 'application/zstd' Media Type".
"""

from __future__ import annotations

from collections.abc import Callable

_MAGIC = b"\x28\xb5\x2f\xfd"
_MOST_BLOCK = 2**17
_FEWEST_BLOCKS, _SMALLEST_BLOCK = 64, 2**12
"""A frame may have 64 blocks, and one more for each 4 KiB of content. libzstd splits a block of 128 KiB into parts of
at least 8 KiB."""
_SMALLEST_UNCOMPRESSED = 2**8
"""Smallest content of a raw or RLE block before the last block. An encoder fills a block before it starts the next, and
many tiny blocks would only cost time."""
_RAW, _RLE, _COMPRESSED = range(3)
_DICTIONARY_BYTES = (0, 1, 2, 4)


def largest_content(read: Callable[[int, int], bytes], size: int, most: int) -> int | None:
    """Return an upper bound on the decompressed size of a frame, or None if the bytes are not one valid frame.

    Args:
        read: `read(position, count)` returns up to `count` bytes, fewer at the end.
        size: bytes of the frame.
        most: the expected decompressed size. A frame with many more blocks than this size needs counts as invalid.
    """
    header = read(0, 18)
    if header[:4] != _MAGIC or len(header) < 6:
        return None
    descriptor = header[4]
    has_window, flag = not descriptor & 0x20, descriptor >> 6
    content_bytes = (0 if has_window else 1, 2, 4, 8)[flag]
    position = 5 + has_window + _DICTIONARY_BYTES[descriptor & 3]
    declared = int.from_bytes(header[position : position + content_bytes], "little")
    position += content_bytes
    total = 0
    for _ in range(_FEWEST_BLOCKS + most // _SMALLEST_BLOCK):
        block = int.from_bytes(read(position, 3), "little")
        is_last, kind, length = block & 1, block >> 1 & 3, block >> 3
        if kind > _COMPRESSED or length > _MOST_BLOCK or position + 3 > size:
            return None
        if not is_last and length < (1 if kind == _COMPRESSED else _SMALLEST_UNCOMPRESSED):
            return None
        total += _MOST_BLOCK if kind == _COMPRESSED else length
        position += 3 + (1 if kind == _RLE else length)
        if is_last:
            position += 4 if descriptor & 4 else 0  # a checksum
            return max(total, declared) if position == size else None
    return None
