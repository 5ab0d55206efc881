# SPDX-License-Identifier: MIT
"""HTTP requests and the answers of /new, without sockets."""

import json
import math
import re
import time
from collections import Counter
from http import HTTPStatus
from types import SimpleNamespace
from urllib.parse import parse_qs

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chatmaild import http1, newemail
from chatmaild.config import read_settings
from chatmaild.doveauth import Refused
from chatmaild.http1 import BadRequest, Request, RequestReader
from chatmaild.tokens import TokenStore
from chatmaild.users import MailStore


def service(tmp_path, ini="", closed=False, busy=False):
    def refuse(condition):
        if condition:
            raise Refused("load", "secret detail")

    gate = SimpleNamespace(check_open=lambda: refuse(closed), check_machine=lambda: refuse(busy))
    text = f"[params]\n{'' if 'mail_domain' in ini else 'mail_domain = chat.example'}\n{ini}\n"
    config = read_settings("test.ini", text)[0]
    store = MailStore(tmp_path / "mail")
    tokens = TokenStore(tmp_path / "tokens.sqlite", store.is_taken)
    return newemail.NewEmail(config, gate, store, tokens)


EXTERNAL = "tls_external_cert_and_key = /a.pem /b.pem"


@pytest.mark.parametrize("path", ["/new", "/cgi-bin/newemail.py"])
def test_post_gives_an_address_and_a_password_within_the_rules(tmp_path, path):
    response = service(tmp_path, EXTERNAL).respond(Request("POST", path, True))
    account = json.loads(response.body)
    assert response.status == HTTPStatus.OK
    assert ("Content-Type", "application/json") in response.headers
    assert set(account) == {"email", "password"}
    assert re.fullmatch(r"[a-z0-9]{9}@chat\.example", account["email"])
    assert len(account["password"]) == 12 and account["password"].isprintable()
    assert not any(tmp_path.iterdir())


def test_get_leads_a_browser_into_the_app(tmp_path):
    response = service(tmp_path, EXTERNAL).respond(Request("GET", "/new", True))
    assert response.status == HTTPStatus.MOVED_PERMANENTLY
    assert ("Location", "dcaccount:https://chat.example/new") in response.headers


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_with_a_self_signed_certificate_the_code_holds_everything(tmp_path, method):
    response = service(tmp_path, "tls = self").respond(Request(method, "/new", True))
    account = json.loads(response.body)
    address, query = account["dclogin_url"].removeprefix("dclogin:").split("?")
    values = parse_qs(query, strict_parsing=True)
    assert address == account["email"]
    assert values == {"p": [account["password"]], "v": ["1"], "ic": ["3"]}


BY_TOKEN = EXTERNAL + "\nregistration = token"


def post(service, query="", client="192.0.2.1"):
    response = service.respond(Request("POST", "/new", True, {"x-real-ip": client}, query))
    return response.status, json.loads(response.body)


def test_by_token_an_address_is_reserved_and_its_use_counted_later(tmp_path):
    made = service(tmp_path, BY_TOKEN)
    token = made.tokens.create(1, None, "", now=0).token
    status, account = post(made, f"token={token}")
    assert status == HTTPStatus.OK
    assert [item.used for item in made.tokens.tokens(0)] == [0]
    made.tokens.claim(account["email"], account["password"], time.time())
    assert [item.used for item in made.tokens.tokens(0)] == [1]
    assert post(made, f"token={token}") == (403, {"reason": "this invitation has been used up"})


@pytest.mark.parametrize(
    ("query", "status", "reason"),
    [
        ("", 403, "by invitation only"),
        ("token=", 403, "by invitation only"),
        ("other=1", 403, "by invitation only"),
        ("token=nonsense", 403, "not valid"),
        ("token=%ff%00'", 403, "not valid"),
        ("&".join(f"a{number}=1" for number in range(99)), 400, "malformed query"),
    ],
)
def test_without_a_valid_token_there_is_no_address(tmp_path, query, status, reason):
    made = service(tmp_path, BY_TOKEN)
    got = post(made, query)
    assert got[0] == status and reason in got[1]["reason"]


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(["POST", "GET"]), st.text(), st.text())
def test_any_query_gets_a_reason_or_a_link_of_one_line(tmp_path, method, query, client):
    made = service(tmp_path, BY_TOKEN)
    response = made.respond(Request(method, "/new", True, {"x-real-ip": client}, query))
    if response.status == HTTPStatus.MOVED_PERMANENTLY:
        assert re.fullmatch(r"dcaccount:https://chat\.example/new[!-~]*", response.headers[0][1])
    else:
        assert response.status in (400, 403) and json.loads(response.body)["reason"]
    assert response.render(keep_alive=True).count(b"\r\n\r\n") == 1


def test_a_browser_takes_the_token_into_the_app(tmp_path):
    request = Request("GET", "/new", True, {}, "token=a1%0d%0ab&x=y")
    response = service(tmp_path, BY_TOKEN).respond(request)
    link = "dcaccount:https://chat.example/new?token=a1%0D%0Ab"
    assert ("Location", link) in response.headers
    assert ("Cache-Control", "no-store") in response.headers


def test_one_source_gets_so_many_addresses_an_hour(tmp_path):
    made = service(tmp_path, EXTERNAL + "\nmax_new_addresses_per_hour = 3")
    assert [post(made)[0] for _ in range(4)] == [200, 200, 200, 429]
    assert "too many new accounts" in post(made)[1]["reason"]
    assert post(made, client="192.0.2.2")[0] == 200
    # no address, or none that can be read, is one source
    assert [post(made, client=item)[0] for item in ("", "x", "é", "[")] == [200, 200, 200, 429]


def test_a_refused_token_costs_its_source_nothing(tmp_path):
    made = service(tmp_path, BY_TOKEN + "\nmax_new_addresses_per_hour = 1")
    assert [post(made, "token=wrong")[0] for _ in range(3)] == [403, 403, 403]
    token = made.tokens.create(None, None, "", now=0).token
    assert [post(made, f"token={token}")[0] for _ in range(2)] == [200, 429]


def test_a_store_that_fails_is_an_error_with_a_reason_and_names_no_token(tmp_path, caplog):
    made = service(tmp_path, BY_TOKEN)
    (tmp_path / "tokens.sqlite").mkdir()
    status, answer = post(made, "token=s3cret")
    assert status == 500 and "try again" in answer["reason"]
    assert "s3cret" not in caplog.text and "cannot make up an account" in caplog.text


PAGE = '<a href="@INVITE@">go</a><figure>@QR@</figure><code>@INVITE@</code>'


@pytest.fixture
def page(tmp_path, monkeypatch):
    """Ask for /invite; the page's frame is a short one."""
    (tmp_path / "invite.html").write_text(PAGE)
    monkeypatch.setattr(newemail, "INVITE_PAGE", tmp_path / "invite.html")

    def ask(made, query="", path="/invite"):
        response = made.respond(Request("GET", path, True, {"x-real-ip": "192.0.2.1"}, query))
        return response.status, response.body.decode(), dict(response.headers)

    return ask


def test_an_invitation_is_a_page_with_its_code(tmp_path, page):
    made = service(tmp_path, BY_TOKEN)
    token = made.tokens.create(1, None, "", now=0).token
    status, body, headers = page(made, f"token={token}")
    link = f"dcaccount:https://chat.example/new?token={token}"
    assert status == 200
    assert body.count(f'<a href="{link}">') == body.count(f"<code>{link}</code>") == 1
    assert body.count("<svg ") == 1 and f"QR code: {link}</title>" in body
    assert (
        headers["Content-Type"].startswith("text/html") and headers["Cache-Control"] == "no-store"
    )
    assert [item.used for item in made.tokens.tokens(0)] == [0]


@pytest.mark.parametrize(
    ("ini", "query"),
    [(BY_TOKEN, ""), (BY_TOKEN, "token=wrong"), (f"{EXTERNAL}\nregistration = closed", "")],
)
def test_without_an_invitation_there_is_no_page(tmp_path, page, ini, query):
    assert page(service(tmp_path, ini), query)[0] == 403


def test_the_page_of_an_open_relay_shows_its_code(tmp_path, page):
    made = service(tmp_path, EXTERNAL)
    for path in newemail.INVITE_PATHS:
        assert "<code>dcaccount:chat.example</code>" in page(made, path=path)[1]


def test_with_a_self_signed_certificate_each_view_is_a_new_address(tmp_path, page):
    made = service(tmp_path, "tls = self\nmax_new_addresses_per_hour = 2")
    first, second, third = (page(made) for _ in range(3))
    pattern = (
        r"<code>dclogin:([a-z0-9]{9})@chat\.example\?p=[A-Za-z0-9%_.~-]+&amp;v=1&amp;ic=3</code>"
    )
    assert re.search(pattern, first[1])[1] != re.search(pattern, second[1])[1]
    assert third[0] == 429


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text())
def test_a_query_never_becomes_markup_of_the_page(tmp_path, page, query):
    for ini in (EXTERNAL, BY_TOKEN):
        status, body, _headers = page(service(tmp_path, ini), query)
        assert status in (400, 403) or body.count("<") == 6 + 6  # of the frame, and of the picture


def test_a_page_that_is_not_there_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(newemail, "INVITE_PAGE", tmp_path / "gone")
    response = service(tmp_path, EXTERNAL).respond(Request("GET", "/invite", True))
    assert response.status == HTTPStatus.INTERNAL_SERVER_ERROR


@pytest.mark.parametrize("why", ["closed", "busy"])
def test_a_relay_that_takes_nobody_says_so_to_the_user(tmp_path, why):
    response = service(tmp_path, EXTERNAL, **{why: True}).respond(Request("POST", "/new", True))
    assert response.status == HTTPStatus.SERVICE_UNAVAILABLE
    assert "new accounts" in json.loads(response.body)["reason"]
    assert b"secret detail" not in response.body


def test_the_machine_is_looked_at_twice_a_second_at_most(tmp_path, monkeypatch):
    made, looks, now = service(tmp_path), [], [1000.0]
    busy = [False]

    def look():
        looks.append(now[0])
        if busy[0]:
            raise Refused("load", "")

    made.gate.check_machine = look
    monkeypatch.setattr(newemail.time, "monotonic", lambda: now[0])
    assert [post(made)[0] for _ in range(3)] == [200] * 3 and len(looks) == 1
    busy[0] = True
    now[0] += newemail.MACHINE_SECONDS
    assert [post(made)[0] for _ in range(2)] == [503] * 2 and len(looks) == 2
    busy[0] = False
    now[0] += newemail.MACHINE_SECONDS
    assert post(made)[0] == 200 and len(looks) == 3


@pytest.mark.parametrize("size", [1, 2, 36, 94, 256])
def test_every_character_is_as_likely_as_any_other(size):
    """For 94 of 256 octets, the remainder alone would give the first 68 half as much again."""
    alphabet = "".join(chr(256 + number) for number in range(size))
    count, rounds = Counter(), 400 * size
    for _ in range(40):
        count.update(newemail.random_text(alphabet, rounds // 40))
    assert count.total() == rounds and set(count) == set(alphabet)
    # of a fair choice the square sum has the mean *size* - 1, and its root is 6 deviations off once in 1e9
    squares = sum((found - 400) ** 2 / 400 for found in count.values())
    assert squares < size + 6 * math.sqrt(2 * size) + 20


def test_only_what_reads_a_file_takes_a_thread(tmp_path):
    made, invited = service(tmp_path), service(tmp_path, BY_TOKEN)
    assert made.is_quick(Request("POST", "/new", True))
    for request in (Request("GET", "/new", True), Request("POST", "/invite", True)):
        assert not made.is_quick(request)
    assert not invited.is_quick(Request("POST", "/new", True))


@pytest.mark.parametrize(("method", "path", "status"), [("PUT", "/new", 405), ("GET", "/", 404)])
def test_other_methods_and_paths_are_errors_with_a_reason(tmp_path, method, path, status):
    response = service(tmp_path).respond(Request(method, path, True))
    assert response.status == status and json.loads(response.body)["reason"]


def read(*pieces):
    reader, found = RequestReader(), []
    for piece in pieces:
        reader.receive(piece)
        while (request := reader.next()) is not None:
            found.append(request)
    return found, reader


def test_requests_follow_each_other_on_one_connection():
    found, reader = read(
        b"POST /new?x=1 HTTP/1.1\r\nHost: a\r\n\r\n"
        b"POST /new HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc"
        b"GET /new HTTP/1.0\r\n\r\n"
    )
    assert found == [
        Request("POST", "/new", True, {"host": "a"}, "x=1"),
        Request("POST", "/new", True, {"content-length": "3"}),
        Request("GET", "/new", False),
    ]
    assert reader.idle


def test_what_follows_a_request_can_be_taken_for_another_protocol():
    found, reader = read(b"GET /relay HTTP/1.1\r\nUpgrade:  Other \r\n\r\n\0\1")
    assert found[0].fields["upgrade"] == "Other"
    assert reader.take_rest() == b"\0\1" and reader.idle


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"POST /new HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n", 501),
        (b"POST /new HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\n", 400),
        (b"POST /new HTTP/1.1\r\nContent-Length: +1\r\n\r\n", 400),
        (b"POST /new HTTP/1.1\r\nContent-Length: 99999999\r\n\r\n", 413),
        (b"POST /new HTTP/1.1\r\nA: b\r\n folded\r\n\r\n", 400),
        (b"POST /new HTTP/1.1\r\nA : b\r\n\r\n", 400),
        (b"POST new HTTP/1.1\r\n\r\n", 400),
        (b"POST /new HTTP/2.0\r\n\r\n", 400),
        (b"x" * (http1.MAX_HEAD + 1), 431),
    ],
)
def test_what_could_be_smuggled_or_is_too_large_is_refused(data, status):
    with pytest.raises(BadRequest) as caught:
        read(data)
    assert caught.value.status == status


@settings(deadline=None)
@given(
    st.one_of(
        st.binary(),
        st.lists(
            st.sampled_from(
                [b"POST /new HTTP/1.1\r\n", b"Content-Length: 2\r\n", b"\r\n", b"ab", b"A: b\r\n"]
            )
        ).map(b"".join),
    ),
    st.integers(1, 20),
)
def test_any_bytes_in_any_pieces_are_requests_or_a_bad_request(data, size):
    def outcome(pieces):
        try:
            return read(*pieces)[0]
        except BadRequest as error:
            return str(error)

    pieces = [data[index : index + size] for index in range(0, len(data), size)]
    assert outcome(pieces) == outcome([data[i : i + 1] for i in range(len(data))])


def test_without_a_name_the_code_says_where_to_connect(tmp_path):
    made = service(tmp_path, "mail_domain = 192.0.2.1")
    account = json.loads(made.respond(Request("POST", "/new", True)).body)
    assert re.fullmatch(r"[a-z0-9]{9}@\[192\.0\.2\.1\]", account["email"])
    assert account["dclogin_url"].startswith(f"dclogin:{account['email']}?p=")
    assert account["dclogin_url"].endswith("&v=1&ih=192.0.2.1&sh=192.0.2.1&ic=3")
