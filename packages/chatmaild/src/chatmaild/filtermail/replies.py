# SPDX-License-Identifier: MIT
"""Every SMTP reply of the filter, in one table (RFC 5321 section 4.2, RFC 3463).

Clients and other relays match on some of these texts: a change here is a change of the protocol.
`{}` takes an address, which `with_address` makes harmless first.
"""

# content
NOT_ENCRYPTED = "523 Encryption Needed: Invalid Unencrypted Mail"  # matched by clients: no X.Y.Z
NO_SIGNATURE = "554 5.7.1 No valid DKIM signature found"
BAD_FROM = "554 5.7.1 Exactly one From with exactly one address is required"
FROM_NOT_SENDER = "554 5.7.1 From is not the envelope sender"
LITERAL_NOT_CLIENT = "554 5.7.1 From is an address literal of another host"
MALFORMED_HEADER = "554 5.6.0 Malformed message header"
HEADER_TOO_LARGE = "552 5.3.4 Message header too large"

# sender
NOT_LOGIN = "553 5.7.1 Sender address is not the login"
SENDER_DISABLED = "554 5.7.1 <{}>: account disabled"
RATE_LIMITED = "450 4.7.1 Too much mail from <{}>"

# recipients
UNKNOWN_RECIPIENT = "550 5.1.1 <{}>: unknown recipient"
RECIPIENT_DISABLED = "550 5.2.1 <{}>: account disabled"
TOO_MANY_RECIPIENTS = "452 4.5.3 Too many recipients"

# not the message's fault
TEMPORARY_FAILURE = "451 4.3.0 Temporary failure, try again later"
KEY_UNAVAILABLE = "451 4.7.5 DKIM key temporarily unavailable, try again later"


def with_address(reply: str, address: str) -> str:
    """*reply* with up to 256 octets of *address*, whatever is not printable ASCII as "?"."""
    return reply.format("".join(c if "!" <= c <= "~" else "?" for c in address[:256]))
