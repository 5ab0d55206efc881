# SPDX-License-Identifier: MIT
"""BLAKE3's derive_key for short inputs, as Debian has no Python module for BLAKE3.

Enough for the handshake: context and key material of at most one chunk (1024 octets), 32 octets of
output, no tree. About a millisecond. Specification: "BLAKE3: one function, fast everywhere", section 2.
"""

from __future__ import annotations

import struct

CHUNK = 1024
_BLOCK = 64

_IV = (
    *(0x6A09E667, 0xBB67AE85, 0x3C6EF372, 0xA54FF53A),
    *(0x510E527F, 0x9B05688C, 0x1F83D9AB, 0x5BE0CD19),
)
_PERMUTATION = (2, 6, 3, 10, 7, 0, 4, 13, 1, 11, 12, 5, 9, 14, 15, 8)
# the quarter rounds of one round: four columns, then four diagonals
_ROUND = (
    *((0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15)),
    *((0, 5, 10, 15), (1, 6, 11, 12), (2, 7, 8, 13), (3, 4, 9, 14)),
)
_ROUNDS = 7
_MASK = 0xFFFFFFFF

_CHUNK_START, _CHUNK_END, _ROOT = 1, 2, 8
_DERIVE_KEY_CONTEXT, _DERIVE_KEY_MATERIAL = 32, 64


def derive_key(context: bytes, material: bytes) -> bytes:
    """32 octets derived from *material* for *context*; both at most CHUNK octets, else ValueError."""
    context_key = _hash_chunk(_IV, context, _DERIVE_KEY_CONTEXT)
    return struct.pack("<8I", *_hash_chunk(context_key, material, _DERIVE_KEY_MATERIAL))


def _hash_chunk(key: tuple[int, ...], data: bytes, mode: int) -> tuple[int, ...]:
    """The root hash of an input of one chunk, as eight words."""
    if len(data) > CHUNK:
        raise ValueError(f"longer than {CHUNK} octets")
    value = key
    starts = range(0, max(len(data), 1), _BLOCK)
    for start in starts:
        block = data[start : start + _BLOCK]
        flags = mode
        if start == 0:
            flags |= _CHUNK_START
        if start == starts[-1]:
            flags |= _CHUNK_END | _ROOT
        words = struct.unpack("<16I", block.ljust(_BLOCK, b"\0"))
        value = _compress(value, words, len(block), flags)
    return value


def _compress(
    value: tuple[int, ...], words: tuple[int, ...], length: int, flags: int
) -> tuple[int, ...]:
    """The compression function with block counter 0, its output cut to the chaining value."""
    state = [*value, *_IV[:4], 0, 0, length, flags]
    for _ in range(_ROUNDS):
        for number, (a, b, c, d) in enumerate(_ROUND):
            for word, high, low in ((words[2 * number], 16, 12), (words[2 * number + 1], 8, 7)):
                state[a] = state[a] + state[b] + word & _MASK
                state[d] = _rotate(state[d] ^ state[a], high)
                state[c] = state[c] + state[d] & _MASK
                state[b] = _rotate(state[b] ^ state[c], low)
        words = tuple(words[source] for source in _PERMUTATION)
    return tuple(state[i] ^ state[i + 8] for i in range(8))


def _rotate(word: int, bits: int) -> int:
    """A 32-bit word, rotated to the right."""
    return word >> bits | word << 32 - bits & _MASK
