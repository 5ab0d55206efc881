# SPDX-License-Identifier: MIT
"""OpenPGP packet framing (RFC 9580 section 4.2): is this an encrypted message and nothing else?

The only accepted sequence: one or more session key packets (PKESK, SKESK), then exactly one SEIPD
packet that ends where the data ends. Only tags and lengths are read; versions and algorithms are
the clients' affair. Old-format headers, which GnuPG writes, are accepted if asked for.

Sans-IO and streaming: feed() takes the data in any pieces. Cost: O(1) a packet header or partial
length, whose number is bounded, and nothing for the octets in between. State: at most 5 octets.
"""

from __future__ import annotations

PKESK, SKESK, SEIPD = 1, 3, 18
MIN_FIRST_PARTIAL = 512  # octets, RFC 9580 section 4.2.1.4
# Bounds of the work that tiny packets cost: no real message comes near (a PKESK is about 100 octets
# and there is one a device; writers of partial lengths use one size).
MAX_SESSION_KEYS = 5000
MAX_SMALL_PARTIALS = 64  # partial lengths below MIN_FIRST_PARTIAL


class PacketWalk:
    """Walks the packets of one message. After a False of feed() the message stays refused."""

    __slots__ = (
        "_old_format",
        "_skip",
        "_header",
        "_tag",
        "_partial",
        "_keys",
        "_small",
        "_failed",
    )

    def __init__(self, old_format: bool = False) -> None:
        self._old_format = old_format
        self._skip = 0  # octets of the current packet (or partial chunk) still to come
        self._header = b""  # octets of a header that is not complete yet
        self._tag = 0  # of the current packet, 0 before the first
        self._partial = False  # a length follows the current chunk
        self._keys = 0
        self._small = 0
        self._failed = False

    @property
    def indifferent(self) -> int:
        """How many of the next octets may be anything: the inside of a packet."""
        return self._skip

    def skip(self, octets: int) -> None:
        """As feed() of so many octets, at most `indifferent`."""
        self._skip -= octets

    def feed(self, data: bytes) -> bool:
        """Take the next octets; False if this cannot become an encrypted message any more."""
        if self._failed:
            return False
        if self._skip >= len(data):
            self._skip -= len(data)
            return True
        if self._header:  # then nothing is to be skipped
            data = self._header + data
            self._header = b""
        position = self._skip
        self._skip = 0
        while position < len(data):
            end = self._chunk(data, position)
            if end < 0:
                self._failed = True
                return False
            if end == 0:
                self._header = data[position:]
                return True
            position = end
        self._skip = position - len(data)
        return True

    def _chunk(self, data: bytes, start: int) -> int:
        """Read the header or partial length at *start*: where what it announces ends.

        That may be beyond *data*. 0: the header is incomplete. -1: refused.
        """
        position = start
        tag = self._tag
        length_type = -1  # new format
        if not self._partial:
            if tag == SEIPD:
                return -1  # something follows the encrypted data
            first = data[position]
            position += 1
            if first & 0xC0 == 0xC0:
                tag = first & 0x3F
            elif first & 0x80 and self._old_format:
                tag = first >> 2 & 0x0F
                length_type = first & 0x03
            else:
                return -1
            if tag not in (PKESK, SKESK) and not (tag == SEIPD and self._keys):
                return -1
        if length_type >= 0:
            if length_type == 3:
                return -1  # indeterminate length
            octets = 1 << length_type
            if position + octets > len(data):
                return 0
            length = int.from_bytes(data[position : position + octets], "big")
            partial = False
        else:
            if position >= len(data):
                return 0
            first = data[position]
            octets = 1 if first < 192 or 224 <= first < 255 else 2 if first < 224 else 5
            if position + octets > len(data):
                return 0
            partial = False
            if first < 192:
                length = first
            elif first < 224:
                length = ((first - 192) << 8) + data[position + 1] + 192
            elif first < 255:
                length = 1 << (first & 0x1F)
                partial = True
                if tag != SEIPD:
                    return -1
                if length < MIN_FIRST_PARTIAL:
                    self._small += 1
                    if not self._partial or self._small > MAX_SMALL_PARTIALS:
                        return -1
            else:
                length = int.from_bytes(data[position + 1 : position + 5], "big")
        if not self._partial and tag != SEIPD:
            self._keys += 1
            if self._keys > MAX_SESSION_KEYS:
                return -1
        self._tag = tag
        self._partial = partial
        return position + octets + length

    def end(self) -> bool:
        """Whether the data fed so far is one complete encrypted message."""
        return not (
            self._failed or self._skip or self._header or self._partial or self._tag != SEIPD
        )
