# SPDX-License-Identifier: MIT
"""The milter of a chatmail relay: only end-to-end encrypted, authentic mail passes.

    __main__    asyncio shell: sockets, time-outs, key lookups       the only module that does I/O,
    keys        DKIM keys, with a cache                              but for these two, and users.py
    resolver    TXT records from the DNS
    policy      verdicts: outgoing, incoming, sign-only
    milter      milter protocol: bytes in, bytes out
    mime        which messages count as encrypted (streaming)
    armor       OpenPGP ASCII armor (streaming)
    openpgp     OpenPGP packet framing (streaming)
    transfer    Content-Transfer-Encoding (streaming)
    dkim        signatures: make and verify (streaming)
    address     header From and envelope addresses
    limiter     messages a minute of each sender
    replies     every SMTP reply, in one table

Promises: memory does not depend on the size of a message; work is linear in it; what cannot be
understood is refused (outgoing, incoming) or passed unsigned (sign-only).
"""
