# SPDX-License-Identifier: MIT
"""Every SMTP reply of the filter, in one table (RFC 5321 section 4.2, RFC 3463).

Clients and other relays match on some of these texts: a change here is a change of the protocol.
`{}` takes an address, which `with_address` makes harmless first.
"""

from __future__ import annotations


class Reply(str):
    """What the SMTP client is told; *why* are the words for the log and the counters."""

    why: str

    def __new__(cls, text: str, why: str) -> Reply:
        reply = super().__new__(cls, text)
        reply.why = why
        return reply


# content; NOT_ENCRYPTED is matched by clients, so it has no X.Y.Z
NOT_ENCRYPTED = Reply("523 Encryption Needed: Invalid Unencrypted Mail", "unencrypted mail")
NO_SIGNATURE = Reply("554 5.7.1 No valid DKIM signature found", "no valid DKIM signature")
BAD_FROM = Reply(
    "554 5.7.1 Exactly one From with exactly one address is required", "not exactly one From"
)
FROM_NOT_SENDER = Reply("554 5.7.1 From is not the envelope sender", "From is not the sender")
LITERAL_NOT_CLIENT = Reply(
    "554 5.7.1 From is an address literal of another host", "From is another host's literal"
)
MALFORMED_HEADER = Reply("554 5.6.0 Malformed message header", "malformed header")
HEADER_TOO_LARGE = Reply("552 5.3.4 Message header too large", "header too large")

# sender
NOT_LOGIN = Reply("553 5.7.1 Sender address is not the login", "sender is not the login")
SENDER_DISABLED = Reply("554 5.7.1 <{}>: account disabled", "sender is disabled")
RATE_LIMITED = Reply("450 4.7.1 Too much mail from <{}>", "too much mail from one sender")

# recipients
UNKNOWN_RECIPIENT = Reply("550 5.1.1 <{}>: unknown recipient", "unknown recipient")
RECIPIENT_DISABLED = Reply("550 5.2.1 <{}>: account disabled", "recipient is disabled")
TOO_MANY_RECIPIENTS = Reply("452 4.5.3 Too many recipients", "too many recipients")

# not the message's fault
TEMPORARY_FAILURE = Reply("451 4.3.0 Temporary failure, try again later", "an error of the filter")
KEY_UNAVAILABLE = Reply(
    "451 4.7.5 DKIM key temporarily unavailable, try again later", "DKIM key unavailable"
)


def with_address(reply: Reply, address: str) -> Reply:
    """*reply* with up to 256 octets of *address*, whatever is not printable ASCII as "?"."""
    shown = "".join(c if "!" <= c <= "~" else "?" for c in address[:256])
    return Reply(reply.format(shown), reply.why)
