# SPDX-License-Identifier: MIT
"""A relay for iroh: passes encrypted datagrams between clients that cannot reach each other.

Delta Chat uses it for the live connections of webxdc apps. Who connects proves an Ed25519 key, and may
then send datagrams to any other key that is connected. Two generations of clients speak two protocols
that share one path, /relay, behind nginx:

    iroh 0.35       "Upgrade: iroh derp http", frames with a length; or frames in a WebSocket
    iroh 0.91 - 1.x a WebSocket with subprotocol iroh-relay-v1 or -v2, key proved by a challenge

They hear only their own generation: the datagrams themselves are not of one format. Contents are never
looked at. Layers, none of which but the last does I/O:

    websocket, length    octets <-> frames (framing)
    dialects             frames <-> what they say (handshake, datagrams, pings)
    hub                  who is connected, who hears of whom
    session              one connection from its HTTP request to its end
    __main__             sockets, time, and how much of them one client may have

What clients probe to find the nearest relay, /ping and /generate_204, is answered by nginx itself.
Specification: iroh's "Relay Protocol" 1.2, and the sources of iroh-relay 0.35.
"""
