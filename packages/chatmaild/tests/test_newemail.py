# SPDX-License-Identifier: MIT
"""HTTP requests and the answers of /new, without sockets."""

import json
import re
from http import HTTPStatus
from types import SimpleNamespace
from urllib.parse import parse_qs

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chatmaild import http1, newemail
from chatmaild.config import read_settings
from chatmaild.doveauth import Refused
from chatmaild.http1 import BadRequest, Request, RequestReader
from chatmaild.users import MailStore


def service(tmp_path, ini="", closed=False, busy=False):
    def refuse(condition):
        if condition:
            raise Refused("secret detail")

    gate = SimpleNamespace(check_open=lambda: refuse(closed), check_machine=lambda: refuse(busy))
    text = f"[params]\nmail_domain = chat.example\n{ini}\n"
    config = read_settings("test.ini", text)[0]
    return newemail.NewEmail(config, gate, MailStore(tmp_path))


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
    assert response.headers == [("Location", "dcaccount:https://chat.example/new")]


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_with_a_self_signed_certificate_the_code_holds_everything(tmp_path, method):
    response = service(tmp_path, "tls = self").respond(Request(method, "/new", True))
    account = json.loads(response.body)
    address, query = account["dclogin_url"].removeprefix("dclogin:").split("?")
    values = parse_qs(query, strict_parsing=True)
    assert address == account["email"]
    assert values == {"p": [account["password"]], "v": ["1"], "ic": ["3"]}


@pytest.mark.parametrize("why", ["closed", "busy"])
def test_a_relay_that_takes_nobody_says_so_to_the_user(tmp_path, why):
    response = service(tmp_path, EXTERNAL, **{why: True}).respond(Request("POST", "/new", True))
    assert response.status == HTTPStatus.SERVICE_UNAVAILABLE
    assert "new accounts" in json.loads(response.body)["reason"]
    assert b"secret detail" not in response.body


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
        Request("POST", "/new", True),
        Request("POST", "/new", True),
        Request("GET", "/new", False),
    ]
    assert reader.idle


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
