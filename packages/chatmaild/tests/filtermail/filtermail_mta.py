# SPDX-License-Identifier: MIT
"""The other side of the milter protocol: what Postfix sends, and what it makes of the answers."""

import struct
from dataclasses import dataclass, field

from chatmaild.filtermail.milter import Session
from filtermail_samples import split

POSTFIX_ACTIONS = 0x1FF
POSTFIX_PROTOCOL = 0x1FFFFF
BODY_SIZE = 65535


def packet(command, data=b""):
    return struct.pack(">I", len(data) + 1) + command + data


def packets(data):
    """The packets in *data*, all complete, as (command, payload)."""
    result = []
    while data:
        (length,) = struct.unpack_from(">I", data)
        assert 1 <= length <= len(data) - 4, "incomplete answer"
        result.append((data[4:5], data[5 : 4 + length]))
        data = data[4 + length :]
    return result


def negotiation(version=6, actions=POSTFIX_ACTIONS, protocol=POSTFIX_PROTOCOL):
    return packet(b"O", struct.pack(">III", version, actions, protocol))


def connect(address="192.0.2.1"):
    family = b"6" if ":" in address else b"4"
    return packet(b"C", b"host\0" + family + struct.pack(">H", 4711) + address.encode() + b"\0")


def macros(stage, **values):
    text = b"".join(b"{%s}\0%s\0" % (k.encode(), v.encode()) for k, v in values.items())
    return packet(b"D", stage + text)


def mail_from(sender, login=None, **more):
    given = {"auth_type": "PLAIN", "auth_authen": login, **more} if login else more
    return macros(b"M", **given) + packet(b"M", b"<%s>\0BODY=8BITMIME\0" % sender.encode("latin-1"))


def rcpt_to(recipient):
    return packet(b"R", b"<%s>\0" % recipient.encode("latin-1"))


def content(mail, size=BODY_SIZE):
    """Header, body and end of *mail*."""
    fields, body = split(mail)
    out = b"".join(packet(b"L", name + b"\0" + value + b"\0") for name, value in fields)
    out += packet(b"N")
    out += b"".join(packet(b"B", body[at : at + size]) for at in range(0, len(body), size))
    return out + packet(b"E")


@dataclass
class Outcome:
    """What became of a message; *reply* is "" if it passed."""

    reply: str = ""
    sender: str | None = None  # if replaced
    changed: list = field(default_factory=list)  # (number, name, value)
    inserted: list = field(default_factory=list)  # (position, name, value)
    refused: dict = field(default_factory=dict)  # recipient: reply


def interpret(data):
    """The outcome that the answers to the end of a message describe."""
    outcome = Outcome()
    answers = packets(data)
    assert answers, "no answer"
    for command, payload in answers[:-1]:
        text = payload.rstrip(b"\0").decode("latin-1")
        if command == b"m":
            number, (name, value) = (
                struct.unpack_from(">I", payload)[0],
                payload[4:].split(b"\0")[:2],
            )
            outcome.changed.append((number, name, value))
        elif command == b"i":
            number, (name, value) = (
                struct.unpack_from(">I", payload)[0],
                payload[4:].split(b"\0")[:2],
            )
            outcome.inserted.append((number, name, value))
        elif command == b"e":
            outcome.sender = text
        else:
            raise AssertionError(f"unexpected {command!r}")
    command, payload = answers[-1]
    if command == b"y":
        outcome.reply = payload.rstrip(b"\0").decode().replace("%%", "%")
    else:
        assert command in (b"c", b"a")
    return outcome


class Mta:
    """A session of the real Session class, in step as Postfix would be."""

    def __init__(self, handler, keys=None):
        self.session = Session(handler)
        self.keys = {} if keys is None else keys  # domain name: key records, None: DNS failure
        self.asked = []
        ((command, payload),) = packets(self.session.feed(negotiation()))
        assert command == b"O"
        _, self.actions, self.protocol = struct.unpack_from(">III", payload)
        if not self.protocol & 0x01:
            assert self.feed(connect()) == b""

    def feed(self, data):
        out = self.session.feed(data)
        while self.session.wanted is not None:
            names = self.session.wanted
            self.asked.append(names)
            out += self.session.answer({name: self.keys.get(name, ()) for name in names})
        return out

    def send(self, mail, sender, recipients, login=None, size=BODY_SIZE, **more):
        """One message; as Postfix, stop when MAIL or all recipients are refused."""
        outcome = Outcome()
        answer = self.feed(mail_from(sender, login, **more))
        if not self.protocol & 0x4000:
            outcome = interpret(answer)
            if outcome.reply:
                return outcome
        else:
            assert answer == b""
        refused = {}
        for recipient in recipients:
            answer = self.feed(rcpt_to(recipient))
            if not self.protocol & 0x8000:
                reply = interpret(answer).reply
                if reply:
                    refused[recipient] = reply
            else:
                assert answer == b""
        if refused and len(refused) == len(recipients):
            self.feed(packet(b"A"))
            return Outcome(reply=reply, refused=refused)
        outcome = interpret(self.feed(content(mail, size)))
        outcome.refused = refused
        return outcome
