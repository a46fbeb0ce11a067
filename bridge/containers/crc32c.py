"""CRC-32C (Castagnoli), which TensorFlow's and LevelDB's files carry, of many bytes at once with numpy.

A CRC is linear over GF(2): that of two pieces is that of the first, moved past the second's length, plus (XOR) that of
the second. So a block is cut into lanes that are worked on side by side, a byte of each at a time, and put together.
Source: RFC 3720, appendix B.4; the mask is LevelDB's (util/crc32c.h).
"""

from __future__ import annotations

import functools

import numpy as np

_POLYNOMIAL = 0x82F63B78  # reversed
_ONES = 0xFFFF_FFFF
_LANE = 256
_BLOCK = 2**22


def crc32c(content: bytes | memoryview) -> int:
    """The checksum of some bytes; takes 10 MB of memory, however many they are."""
    data = np.frombuffer(content, np.uint8)
    state = _ONES
    for start in range(0, len(data), _BLOCK):
        block = data[start : start + _BLOCK]
        state = _past(state, len(block)) ^ _remainder(block)
    return state ^ _ONES


def masked(crc: int) -> int:
    """As it is stored: the CRC of bytes that hold a CRC would be weak."""
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & _ONES


def _remainder(data: np.ndarray) -> int:
    """Of `data` alone, from a state of zero, in which zeros in front change nothing."""
    lanes = 1 << max(0, -(-len(data) // _LANE) - 1).bit_length()
    padded = np.zeros(lanes * _LANE, np.uint8)
    padded[len(padded) - len(data) :] = data
    state = np.zeros(lanes, np.uint32)
    for column in np.ascontiguousarray(padded.reshape(lanes, _LANE).T):
        state = _step(state ^ column)
    doublings = _LANE.bit_length() - 1
    while len(state) > 1:
        state = _apply(_move(doublings), state[::2]) ^ state[1::2]
        doublings += 1
    return int(state[0])


def _past(state: int, length: int) -> int:
    """The state after `length` zeros more."""
    moved = np.array(state, np.uint32)
    for bit in range(length.bit_length()):
        if length >> bit & 1:
            moved = _apply(_move(bit), moved)
    return int(moved)


@functools.cache
def _move(doublings: int) -> np.ndarray:
    """What 2^doublings zeros do to a state, as a table for each of its four bytes."""
    if doublings == 0:
        return _step(np.arange(256, dtype=np.uint32) << np.arange(0, 32, 8, dtype=np.uint32)[:, None])
    half = _move(doublings - 1)
    return _apply(half, half)


def _apply(move: np.ndarray, states: np.ndarray) -> np.ndarray:
    return move[0][states & 255] ^ move[1][states >> 8 & 255] ^ move[2][states >> 16 & 255] ^ move[3][states >> 24]


def _step(states: np.ndarray) -> np.ndarray:
    """One byte on; the byte is already in the lowest one of the state."""
    return _table()[states & 255] ^ states >> np.uint32(8)


@functools.cache
def _table() -> np.ndarray:
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, table >> 1 ^ np.uint32(_POLYNOMIAL), table >> 1)
    return table
