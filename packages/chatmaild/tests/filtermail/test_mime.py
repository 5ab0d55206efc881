# SPDX-License-Identifier: MIT
"""What counts as encrypted or as a SecureJoin request; everything beside it is refused."""

import base64
import quopri
import random
import tracemalloc

import pytest

from chatmaild.filtermail import mime
from chatmaild.filtermail.mime import MimeCheck, MimeError, parse_content_type
from filtermail_samples import (
    BOUNDARY,
    DATA_HEADER,
    PKESK,
    SEIPD,
    VERSION_PART,
    armor,
    encrypted,
    encrypted_body,
    encrypted_mail,
    header,
    multipart,
    noise,
    packet,
    partial_packet,
    plain_mail,
    report_mail,
    securejoin_mail,
    setup_mail,
    split,
)

ARMORED = armor(encrypted())
B = BOUNDARY


def judge(mail, incoming=False, chunk=None):
    """'encrypted', 'securejoin' or None."""
    fields, body = split(mail)
    check = MimeCheck(incoming)
    for name, value in fields:
        check.header(name.lower().decode("latin-1"), value.decode("latin-1"))
    check.end_of_header()
    chunk = chunk or max(1, len(body))
    for at in range(0, len(body), chunk):
        check.body(body[at : at + chunk])
    check.end()
    assert not (check.is_encrypted and check.is_securejoin)
    return "encrypted" if check.is_encrypted else "securejoin" if check.is_securejoin else None


def with_type(content_type, body=None):
    return header(content_type=content_type) + (encrypted_body() if body is None else body)


def part(encoding, text, kind=b"application/octet-stream"):
    return b"Content-Type: %s\r\nContent-Transfer-Encoding: %s\r\n\r\n%s" % (kind, encoding, text)


QUOTED = quopri.encodestring(ARMORED.replace(b"\r\n", b"\n")).replace(b"\n", b"\r\n")
BASE64 = base64.encodebytes(ARMORED).replace(b"\n", b"\r\n")

ENCRYPTED = {
    "as the client writes it": encrypted_mail(),
    "partial lengths": encrypted_mail(
        text=armor(packet(PKESK, noise(90)) + partial_packet(SEIPD, noise(9000)))
    ),
    "type in capitals": with_type(
        b'MULTIPART/Encrypted; PROTOCOL="Application/PGP-Encrypted"; Boundary="%s"' % B
    ),
    "boundary as token, other parameters": with_type(b"multipart/encrypted; boundary=%s; x=y;" % B),
    "no protocol parameter": with_type(b'multipart/encrypted; boundary="%s"' % B),
    "no blank line before the first part": header() + encrypted_body(preamble=b""),
    "many blank lines": header() + encrypted_body(preamble=b"\r\n" * 9, epilogue=b"\r\n" * 9),
    "no line end at the very end": (header() + encrypted_body(epilogue=b""))[:-2],
    "blanks after the delimiters": encrypted_mail().replace(
        b"--" + B + b"\r\n", b"--" + B + b" \t\r\n"
    ),
    "no encoding header, more headers": header()
    + multipart(
        b"Content-Type: application/pgp-encrypted\r\n"
        b"Content-Description: PGP/MIME version identification\r\n\r\nVersion: 1\r\n",
        b'Content-Type: application/octet-stream; name="encrypted.asc"\r\n'
        b"Content-Description: OpenPGP encrypted message\r\n"
        b'Content-Disposition: inline;\r\n filename="encrypted.asc"\r\n\r\n' + ARMORED,
    ),
    "quoted-printable": header() + multipart(VERSION_PART, part(b"quoted-printable", QUOTED)),
    "base64": header() + multipart(VERSION_PART, part(b"base64", BASE64)),
    "version part in base64": header()
    + multipart(
        part(b"base64", b"VmVyc2lvbjogMQ0K\r\n", b"application/pgp-encrypted"),
        DATA_HEADER + ARMORED,
    ),
    "message said to be 7bit": header(extra=b"Content-Transfer-Encoding: 7bit\r\n")
    + encrypted_body(),
    "Secure-Join header within encrypted mail": encrypted_mail(
        extra=b"Secure-Join: vg-request\r\n"
    ),
}

NOT_ENCRYPTED = {
    "empty": b"\r\n",
    "plain": plain_mail(),
    "plain with armor": plain_mail(body=ARMORED),
    "html": header(content_type=b"text/html") + b"<p>hi</p>",
    "no Content-Type": encrypted_mail().replace(b"Content-Type: multipart", b"X-Type: multipart"),
    "two Content-Type": encrypted_mail(extra=b"Content-Type: text/plain\r\n"),
    "same Content-Type twice": encrypted_mail(
        extra=b'Content-Type: multipart/encrypted; boundary="%s"\r\n' % B
    ),
    "encoded message": encrypted_mail(extra=b"Content-Transfer-Encoding: base64\r\n"),
    "message of unknown encoding": encrypted_mail(extra=b"Content-Transfer-Encoding: rot13\r\n"),
    "other protocol": with_type(
        b'multipart/encrypted; protocol="application/pkcs7"; boundary="%s"' % B
    ),
    "multipart/mixed": with_type(b'multipart/mixed; boundary="%s"' % B),
    "no boundary": with_type(b"multipart/encrypted"),
    "empty boundary": with_type(b'multipart/encrypted; boundary=""'),
    "two boundaries": with_type(b'multipart/encrypted; boundary="%s"; boundary="x"' % B),
    "boundary in pieces": with_type(b'multipart/encrypted; boundary*0="%s"' % B),
    "boundary in pieces beside a whole one": with_type(
        b'multipart/encrypted; boundary="%s"; boundary*0=x' % B
    ),
    "boundary with a backslash": with_type(b'multipart/encrypted; boundary="\\%s"' % B),
    "boundary with a quote in it": with_type(b'multipart/encrypted; boundary="\\"%s"' % B),
    "long boundary": header(content_type=b'multipart/encrypted; boundary="%s"' % (b"x" * 201))
    + encrypted_body(boundary=b"x" * 201),
    "boundary ends with a blank": header(content_type=b'multipart/encrypted; boundary="x "')
    + encrypted_body(boundary=b"x "),
    "comment in Content-Type": with_type(b'multipart/encrypted (x); boundary="%s"' % B),
    "Content-Type not ASCII": with_type(b'multipart/encrypted; boundary="%s"; x="\xe9"' % B),
    "endless Content-Type": with_type(
        b'multipart/encrypted; boundary="%s"; x="%s"' % (B, b"x" * 2000)
    ),
    "preamble": header() + encrypted_body(preamble=b"This is an OpenPGP/MIME message.\r\n"),
    "epilogue": header() + encrypted_body(epilogue=b"cleartext\r\n"),
    "epilogue without line end": header() + encrypted_body(epilogue=b"x"),
    "another part in the epilogue": header()
    + encrypted_body(epilogue=b"--" + B + b"\r\nContent-Type: text/plain\r\n\r\nhi\r\n"),
    "closed twice": header() + encrypted_body(epilogue=b"--" + B + b"--\r\n"),
    "not closed": encrypted_mail().replace(b"--" + B + b"--", b""),
    "closed but for a hyphen": encrypted_mail().replace(b"--" + B + b"--", b"--" + B + b"-"),
    "cut in the middle": encrypted_mail()[:-400],
    "header only": header(),
    "only the first part": header() + multipart(VERSION_PART),
    "only the second part": header() + multipart(DATA_HEADER + ARMORED),
    "three parts": header()
    + multipart(VERSION_PART, DATA_HEADER + ARMORED, b"Content-Type: text/plain\r\n\r\nhi"),
    "parts exchanged": header() + multipart(DATA_HEADER + ARMORED, VERSION_PART),
    "nested multipart": header()
    + multipart(VERSION_PART, b"Content-Type: multipart/mixed; boundary=x\r\n\r\n--x--"),
    "first part of another type": header()
    + multipart(
        VERSION_PART.replace(b"application/pgp-encrypted", b"text/plain"), DATA_HEADER + ARMORED
    ),
    "second part of another type": header()
    + multipart(VERSION_PART, part(b"7bit", ARMORED, b"text/plain")),
    "no type of a part": header() + multipart(VERSION_PART, b"\r\n" + ARMORED),
    "two types of a part": header()
    + multipart(VERSION_PART, b"Content-Type: text/plain\r\n" + DATA_HEADER + ARMORED),
    "two encodings of a part": header()
    + multipart(VERSION_PART, b"Content-Transfer-Encoding: base64\r\n" + DATA_HEADER + ARMORED),
    "unknown encoding of a part": header() + multipart(VERSION_PART, part(b"x-y", ARMORED)),
    "garbage in a part's header": header()
    + multipart(VERSION_PART, b"hello, you\r\n" + DATA_HEADER + ARMORED),
    "control character in a part's header": header()
    + multipart(VERSION_PART, b"X: \x01\r\n" + DATA_HEADER + ARMORED),
    "8 bit in a part's header": header()
    + multipart(VERSION_PART, b"X: \xe9\r\n" + DATA_HEADER + ARMORED),
    "bare CR in a part's header": header()
    + multipart(VERSION_PART, b"X: y\rhello\r\n" + DATA_HEADER + ARMORED),
    "endless header of a part": header()
    + multipart(VERSION_PART, b"X: y\r\n" * 4000 + DATA_HEADER + ARMORED),
    "blank before a colon": header()
    + multipart(VERSION_PART, DATA_HEADER.replace(b"Type:", b"Type :") + ARMORED),
    "version 2": encrypted_mail().replace(b"Version: 1", b"Version: 2"),
    "text beside the version": encrypted_mail().replace(b"Version: 1\r\n", b"Version: 1\r\nhi\r\n"),
    "text before the armor": encrypted_mail(text=b"hi\r\n" + ARMORED),
    "text after the armor": encrypted_mail(text=ARMORED + b"hi\r\n"),
    "delimiter with text": encrypted_mail().replace(
        b"--" + B + b"\r\nContent-Type: application/oct",
        b"--" + B + b"x\r\nContent-Type: application/oct",
    ),
    "delimiter with endless padding": encrypted_mail().replace(
        b"--" + B + b"\r\n", b"--" + B + b" " * 500 + b"\r\n"
    ),
    "boundary that looks like BEGIN": header(content_type=b'multipart/encrypted; boundary="---"')
    + encrypted_body(boundary=b"---"),
    "boundary that looks like END": header(
        content_type=b'multipart/encrypted; boundary="---END PGP MESSAGE-----"'
    )
    + encrypted_body(boundary=b"---END PGP MESSAGE-----"),
    "bad base64 part": header() + multipart(VERSION_PART, part(b"base64", b"!" + BASE64)),
    "cut base64 part": header() + multipart(VERSION_PART, part(b"base64", BASE64[:-3])),
    "bad quoted-printable part": header()
    + multipart(VERSION_PART, part(b"quoted-printable", b"=zz" + QUOTED)),
    "quoted-printable not declared": header() + multipart(VERSION_PART, part(b"7bit", QUOTED)),
    "literal packet": encrypted_mail(text=armor(packet(11, b"t\0\0\0\0\0hello"))),
    "setup message": setup_mail(),
    "report": report_mail(),
}

SECUREJOIN_PART = b"Content-Type: text/plain\r\n\r\nSecure-Join: vc-request"
SECUREJOIN = {
    "vc-request": securejoin_mail(),
    "vg-request": securejoin_mail(step=b"vg-request"),
    "case and blanks of the text": securejoin_mail(text=b"\r\nsecure-join: VC-Request \r\n"),
    "header says vc, text vg": securejoin_mail(text=b"secure-join: vg-request"),
    "multipart/alternative": securejoin_mail().replace(
        b"multipart/mixed", b"multipart/alternative"
    ),
}
NOT_SECUREJOIN = {
    "later step": securejoin_mail(step=b"vc-request-with-auth"),
    "header in capitals": securejoin_mail(step=b"VC-REQUEST"),
    "no header": securejoin_mail().replace(b"Secure-Join: vc-request\r\nS", b"S"),
    "two headers": securejoin_mail(extra=b"Secure-Join: vg-request\r\n"),
    "other text": securejoin_mail(text=b"hello"),
    "more text": securejoin_mail(text=b"secure-join: vc-request\r\nhello"),
    "much text": securejoin_mail(text=b"secure-join: vc-request" + b" " * 20_000),
    "no text": securejoin_mail(text=b""),
    "two parts": securejoin_mail(parts=[SECUREJOIN_PART, SECUREJOIN_PART]),
    "an attachment": securejoin_mail(parts=[SECUREJOIN_PART, b"Content-Type: image/png\r\n\r\nx"]),
    "no part": securejoin_mail(parts=[]),
    "html": securejoin_mail(parts=[SECUREJOIN_PART.replace(b"plain", b"html")]),
    "not multipart": securejoin_mail().replace(b"multipart/mixed", b"text/plain"),
    "preamble": securejoin_mail().replace(b"\r\n\r\n\r\n--", b"\r\n\r\nhello\r\n--"),
    "epilogue": securejoin_mail() + b"hello\r\n",
}


@pytest.mark.parametrize("name", ENCRYPTED)
@pytest.mark.parametrize("incoming", [False, True])
@pytest.mark.parametrize("chunk", [1, 13, None])
def test_encrypted_mail_is_recognized_in_any_pieces(name, incoming, chunk):
    assert judge(ENCRYPTED[name], incoming, chunk) == "encrypted"


@pytest.mark.parametrize("name", NOT_ENCRYPTED)
@pytest.mark.parametrize("incoming", [False, True])
@pytest.mark.parametrize("chunk", [1, 13, None])
def test_everything_else_is_not_in_any_pieces(name, incoming, chunk):
    assert judge(NOT_ENCRYPTED[name], incoming, chunk) is None


@pytest.mark.parametrize("name", SECUREJOIN)
@pytest.mark.parametrize("chunk", [1, None])
def test_the_first_step_of_securejoin_is_recognized(name, chunk):
    assert judge(SECUREJOIN[name], False, chunk) == "securejoin"


@pytest.mark.parametrize("name", NOT_SECUREJOIN)
@pytest.mark.parametrize("chunk", [1, None])
def test_what_only_looks_like_securejoin_is_not(name, chunk):
    assert judge(NOT_SECUREJOIN[name], False, chunk) is None


def test_nothing_is_encrypted_before_the_end():
    check = MimeCheck(incoming=False)
    for name, value in split(encrypted_mail())[0]:
        check.header(name.decode().lower(), value.decode())
    check.end_of_header()
    check.body(encrypted_body())
    assert not check.is_encrypted
    check.end()
    assert check.is_encrypted


def test_memory_does_not_depend_on_the_size_of_the_message():
    fields, _ = split(header())
    start, end = encrypted_body().split(ARMORED)
    key = packet(PKESK, noise(90)) + b"\xd2\xff" + (20_000_000).to_bytes(4, "big")
    line = b"A" * 64 + b"\r\n"
    head = armor(key + noise(1), checksum=b"").partition(b"-----END")[0]  # 99 octets: no padding
    check = MimeCheck(incoming=False)
    for name, value in fields:
        check.header(name.decode().lower(), value.decode())
    check.end_of_header()
    check.body(start + head)
    piece = line * 900
    tracemalloc.start()
    check.body(piece)
    tracemalloc.reset_peak()
    before, _ = tracemalloc.get_traced_memory()
    for _ in range(400):
        check.body(piece)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert check._state != mime._REFUSED
    assert peak - before < 300_000


@pytest.mark.parametrize(
    "value, kind, parameters",
    [
        ("text/plain", "text/plain", {}),
        (" Text/PLAIN ;", "text/plain", {}),
        ('a/b; X="1;2"; y=z', "a/b", {"x": "1;2", "y": "z"}),
        ('a/b;\n\tboundary="a b"', "a/b", {"boundary": "a b"}),
        (r'a/b; x="\"q\\"', "a/b", {"x": r'"q\ '.strip()}),
        ("a/b; name*=utf-8''x", "a/b", {"name*": "utf-8''x"}),
    ],
)
def test_content_type_is_parsed(value, kind, parameters):
    assert parse_content_type(value) == (kind, parameters)


@pytest.mark.parametrize(
    "value",
    ["", "text", "text/", "/plain", "a/b x", "a/b; x", "a/b; x=", 'a/b; x="', "a/b; x=1; X=2",
     "a/b; boundary*0=x", "a/b, c/d", "a/b; x=y z", "a/b\0"],
)  # fmt: skip
def test_ambiguous_content_type_is_refused(value):
    with pytest.raises(MimeError):
        parse_content_type(value)


@pytest.mark.parametrize(
    "value", ["a/b;" + " " * 1990, "a/b; x=" + '"\\' * 900, "a/b" + ";" * 1990]
)
def test_content_type_parsing_is_fast_on_garbage(value):
    for _ in range(50):
        try:
            parse_content_type(value)
        except MimeError:
            pass


def test_a_check_that_accepted_any_second_part_would_be_noticed(monkeypatch):
    """The tests above can fail: seed the defect they are there for."""
    hidden = NOT_ENCRYPTED["text before the armor"]
    assert judge(hidden) is None
    monkeypatch.setattr(mime.armor.ArmorCheck, "feed", lambda self, data: True)
    monkeypatch.setattr(mime.armor.ArmorCheck, "end", lambda self: True)
    assert judge(hidden) == "encrypted"


SENTENCE = b"This is an OpenPGP/MIME encrypted message (RFC 4880 and 3156)"


@pytest.mark.parametrize("chunk", [None, 1, 7])
@pytest.mark.parametrize(
    "before, after", [(b"", b"\r\n"), (b"\r\n", b"\r\n\r\n"), (b" ", b" \r\n")]
)
def test_the_sentence_before_the_parts_is_accepted_from_others_only(before, after, chunk):
    preamble = before + SENTENCE + after
    mail = header() + multipart(VERSION_PART, DATA_HEADER + armor(encrypted()), preamble=preamble)
    assert judge(mail, True, chunk) == "encrypted"
    assert judge(mail, False, chunk) is None


@pytest.mark.parametrize("chunk", [None, 1, 7])
@pytest.mark.parametrize(
    "preamble",
    [
        SENTENCE + b" and a secret\r\n",
        b"Secret. " + SENTENCE + b"\r\n",
        SENTENCE + b"\r\n" + SENTENCE + b"\r\n",
        SENTENCE.replace(b"4880", b"488O") + b"\r\n",
        SENTENCE + b"\r\n" + b" " * 200 + b"\r\n",
        b"hello\r\n",
    ],
)
def test_nothing_else_is_accepted_there(preamble, chunk):
    mail = header() + multipart(VERSION_PART, DATA_HEADER + armor(encrypted()), preamble=preamble)
    assert judge(mail, True, chunk) is None


def test_a_delimiter_is_found_where_it_is_however_many_dashes_stand_before_it():
    line, choose = b"\n--" + B, random.Random(1)
    for dashes in (0, 1, mime.MAX_DASHES - 2, mime.MAX_DASHES, 3 * mime.MAX_DASHES):
        for _ in range(200):
            pieces = [b"-", b"\n-", b"\n--", line[:-1]] * dashes + [b"A", b"\r\n"] * 9
            pieces += [line] * choose.randrange(3)
            choose.shuffle(pieces)
            data = b"".join(pieces)
            assert mime._find(data, line) == data.find(line), data
