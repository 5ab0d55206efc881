# SPDX-License-Identifier: MIT
"""The web site as a visitor gets it: by HTTPS through the front, and in a real browser."""

import gzip
import http.client
import json
import re
import xml.etree.ElementTree as ET
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from urllib.parse import quote

import html5lib
import pytest
import zxingcpp
from conftest import DOMAIN, measured
from lab.browser import browser
from lab.mail import TIMEOUT, Account, context
from lab.shell import wait_for
from PIL import Image, ImageStat

NEW = ("/new", "/cgi-bin/newemail.py")
PAGES = ("/", "/info.html", "/privacy.html")
OVERRIDES = "/etc/chatmail/www"
AUTOCONFIG = "/.well-known/autoconfig/mail/config-v1.1.xml"
PHONE, DESKTOP = 360, 1280  # CSS pixels


@dataclass(frozen=True)
class Answer:
    """What came back."""

    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def text(self):
        """The words of an HTML page, without markup."""
        return " ".join(re.sub(r"<[^>]*>", " ", self.body.decode()).split())


@pytest.fixture(scope="module")
def get(lab, relay):
    """get(path, host=..., plain=False, method=..., **headers): one request from the lab's client."""

    def get(path, host=DOMAIN, plain=False, method="GET", **headers):
        with lab.at_client():
            if plain:
                connection = http.client.HTTPConnection(relay.address, 80, timeout=TIMEOUT)
            else:
                connection = http.client.HTTPSConnection(
                    relay.address, 443, timeout=TIMEOUT, context=context()
                )
            try:
                names = {name.replace("_", "-"): value for name, value in headers.items()}
                connection.request(method, path, headers={"Host": host, **names})
                response = connection.getresponse()
                return Answer(response.status, response.headers, response.read())
            finally:
                connection.close()

    return get


@pytest.fixture
def overrides(relay):
    """Writes files of the operator and applies them; afterwards they are gone again."""

    def write(check=True, **files):
        for name, text in files.items():
            relay.write(f"{OVERRIDES}/{name.replace('__', '.')}", text)
        return relay.exec("chatmail-relay", "apply", check=check)

    yield write
    relay.sh(f"rm -rf {OVERRIDES} && chatmail-relay apply")


@pytest.fixture(scope="module")
def chromium(lab, relay, tmp_path_factory):
    """Debian's Chromium at the lab's client."""
    with browser(lab, tmp_path_factory.mktemp("chromium")) as running:
        yield running


def test_the_pages_tell_the_numbers_in_force(get, relay):
    settings = json.loads(relay.exec("chatmail-relay", "get", "--json").out)
    start, info, privacy = (get(path) for path in PAGES)
    assert {start.status, info.status, privacy.status} == {200}
    assert f"A message is gone {settings['delete_mails_after']} days after" in start.text
    assert f"{settings['max_mailbox_size'] // 2**20} MB of messages" in start.text
    assert f"sent in a minute {settings['max_user_send_per_minute']}," in info.text
    assert f"after {settings['delete_inactive_users_after']} days without" in start.text
    assert f"once read, {settings['delete_large_after']} days" in privacy.text


@pytest.mark.parametrize("path", [*PAGES, "/info", "/nothing/here"])
def test_pages_are_valid_and_refer_to_nothing_outside(get, path):
    page = get(path).body.decode()
    html5lib.HTMLParser(strict=True).parse(page)
    tree = html5lib.parse(page, namespaceHTMLElements=False)
    for element in tree.iter():
        if not isinstance(element.tag, str):
            continue
        assert element.tag != "script" and not any(name.startswith("on") for name in element.attrib)
        # links are followed by people only; all else is fetched
        for name in ("src", "srcset", "data", "action", "poster", "style"):
            assert element.get(name, "/").startswith("/"), (element.tag, element.attrib)
        if element.tag == "link":
            assert re.match(r"/[^/]", element.get("href"))
    style = get("/main.css").body.decode()
    assert "url(" not in style and "@import" not in style


@pytest.mark.parametrize(
    ("path", "kind", "cache"),
    [
        ("/", "text/html; charset=utf-8", "no-cache"),
        ("/main.css", "text/css; charset=utf-8", "public, max-age=86400"),
        ("/logo.svg", "image/svg+xml", "public, max-age=86400"),
        ("/robots.txt", "text/plain; charset=utf-8", "no-cache"),
        (AUTOCONFIG, "text/xml; charset=utf-8", "no-cache"),
    ],
)
def test_types_caching_and_security_headers(get, path, kind, cache):
    answer = get(path)
    assert answer.status == 200
    assert answer.headers["Content-Type"] == kind
    assert answer.headers.get_all("Cache-Control") == [cache]
    assert answer.headers["Content-Security-Policy"].startswith("default-src 'none';")
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["Referrer-Policy"] == "no-referrer"
    assert answer.headers["Server"] == "nginx"  # without version
    assert get(path, If_None_Match=answer.headers["ETag"]).status == 304


def test_texts_are_sent_compressed_to_those_who_take_it(get):
    plain, packed = get("/"), get("/", Accept_Encoding="gzip, br")
    assert packed.headers["Content-Encoding"] == "gzip"
    assert packed.headers["Vary"] == "Accept-Encoding"
    assert gzip.decompress(packed.body) == plain.body
    # the copy made beforehand, not one made for this answer
    assert int(packed.headers["Content-Length"]) == len(packed.body)
    measured["front page, compressed"] = f"{len(packed.body)} bytes"


def test_what_is_not_there_is_a_page_that_says_so(get):
    answer = get("/nothing/here")
    assert answer.status == 404
    assert "There is nothing here" in answer.text
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    for path in (
        "/404.html",
        "/404",
        "/_layout.html",
        "/component.toml",
        "/index.md",
        "/../etc/passwd",
    ):
        assert get(path).status in (400, 404)


def test_plain_http_and_other_names_lead_to_the_site(get):
    for host in (DOMAIN, f"www.{DOMAIN}", f"mta-sts.{DOMAIN}"):
        answer = get("/info.html?x=1", host=host, plain=True)
        assert answer.status == 301
        assert answer.headers["Location"] == f"https://{DOMAIN}/info.html?x=1"
    for host in (f"www.{DOMAIN}", f"mta-sts.{DOMAIN}"):
        answer = get("/info.html?x=1", host=host)
        assert answer.status == 301
        assert answer.headers["Location"] == f"https://{DOMAIN}/info.html?x=1"


def test_files_for_machines(get):
    assert get("/robots.txt").body.decode().splitlines()[1:] == ["User-agent: *", "Disallow: /"]
    # no authority vouches for the certificate of this relay, so nobody may be told to demand one
    assert get("/.well-known/mta-sts.txt", host=f"mta-sts.{DOMAIN}").status == 404
    for plain in (False, True):
        provider = ET.fromstring(get(AUTOCONFIG, plain=plain).body).find("emailProvider")
        assert provider.get("id") == provider.findtext("domain") == DOMAIN
        servers = [
            (item.get("type"), item.findtext("port"), item.findtext("socketType"))
            for item in provider
            if item.tag in ("incomingServer", "outgoingServer")
        ]
        assert servers == [
            ("imap", "993", "SSL"),
            ("imap", "143", "STARTTLS"),
            ("imap", "443", "SSL"),
            ("smtp", "465", "SSL"),
            ("smtp", "587", "STARTTLS"),
            ("smtp", "443", "SSL"),
        ]


def test_overrides_take_effect_without_a_reload_and_go_without_trace(get, relay, overrides):
    before, files = get("/").body, relay.files("/var/lib/chatmail/www")
    processes = relay.exec("pgrep", "-x", "nginx").out
    overrides(
        index__md="title: Mine\n\n# Welcome to {{ mail_domain }}\n",
        rules__md="title: Rules\nmenu: 5\n\nBe kind.\n",
    )
    assert f"<h1>Welcome to {DOMAIN}</h1>" in get("/").body.decode()
    assert "Be kind." in get("/rules").text and "Rules" in get("/privacy.html").text
    assert f"{OVERRIDES}/rules.md" in relay.exec("chatmail-relay", "check").out
    assert relay.exec("pgrep", "-x", "nginx").out == processes
    relay.sh(f"rm -rf {OVERRIDES} && chatmail-relay apply")
    assert get("/").body == before
    assert relay.files("/var/lib/chatmail/www") == files


def test_a_broken_override_is_named_and_changes_nothing(get, overrides):
    before = get("/").body
    done = overrides(check=False, index__md="# Hello\n\n{{ no_such_setting }}\n")
    assert done.code == 1
    assert f"{OVERRIDES}/index.md:3: 'no_such_setting' is undefined" in done.err
    assert get("/").body == before


def test_the_preview_is_on_loopback_only(relay):
    relay.exec("systemd-run", "-q", "--unit=preview", "chatmail-relay", "web", "--serve")
    try:
        fetch = "import urllib.request as u; print(u.urlopen('http://127.0.0.1:8080/').read())"
        done = wait_for(
            lambda: (out := relay.exec("python3", "-c", fetch, check=False)).ok and out,
            20,
            "the preview",
        )
        assert DOMAIN in done.out
        listening = relay.sh("ss -Hltn 'sport = :8080'").out.split()
        assert listening[3] == "127.0.0.1:8080"
    finally:
        relay.exec("systemctl", "stop", "preview")


def look_at_invitation(chromium, name, query=""):
    """The code on the page of an invitation, read from its picture; button and text must agree."""
    url = f"https://{DOMAIN}/invite{query}"
    view = chromium.look(url, name, width=PHONE)
    assert view.errors == [] and view.width <= PHONE
    (code,) = zxingcpp.read_barcodes(Image.open(view.picture))
    return code.text


def test_an_invitation_holds_everything_for_a_real_client(get, chromium, delta):
    answer = get("/invite")
    assert answer.status == 200
    assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
    assert answer.headers.get_all("Cache-Control") == ["no-store"]
    html5lib.HTMLParser(strict=True).parse(answer.body.decode())
    code = look_at_invitation(chromium, "invite")
    assert re.fullmatch(rf"dclogin:[a-z0-9]{{9}}@{DOMAIN}\?p=\S+&v=1&ic=3", code)
    account = delta.add_account()
    account.add_transport_from_qr(code)
    assert account.get_config("configured_addr") in code


@pytest.mark.parametrize("path", NEW)
def test_with_a_self_signed_certificate_a_new_address_holds_its_code(get, mail, path):
    for method in ("GET", "POST"):
        answer = get(path, method=method)
        assert answer.status == 200
        assert answer.headers["Content-Type"] == "application/json"
        assert answer.headers.get_all("Cache-Control") == ["no-store"]
        account = json.loads(answer.body)
        assert set(account) == {"email", "password", "dclogin_url"}
        password = quote(account["password"], safe="")
        assert account["dclogin_url"] == f"dclogin:{account['email']}?p={password}&v=1&ic=3"
        assert mail.received(Account(account["email"], account["password"])) == []
    wrong = get(path, method="PUT")
    assert wrong.status == 405 and wrong.headers["Allow"] == "GET, HEAD, POST"


def test_who_asks_for_too_many_new_addresses_at_once_is_told_so(get):
    with ThreadPoolExecutor(30) as pool:
        answers = list(pool.map(lambda _: get("/new", method="POST"), range(30)))
    assert {answer.status for answer in answers} == {200, 429}
    given = [json.loads(answer.body)["email"] for answer in answers if answer.status == 200]
    assert len(set(given)) == len(given)
    wait_for(lambda: get("/new", method="POST").status == 200, 20, "the limit's end")


@pytest.fixture
def strict(get, relay):
    """Registration by token, and a certificate that counts as one of an authority; a token."""
    files = "/var/lib/chatmail/tls/self-signed.crt /var/lib/chatmail/tls/self-signed.key"
    relay.exec("cp", "-a", "/etc/chatmail/chatmail.ini", "/root/settings.ini")
    settings = ("registration=token", "tls=external", f"tls_external_cert_and_key={files}")
    relay.exec("chatmail-relay", "set", *settings)
    relay.exec("chatmail-relay", "apply")
    wait_for(lambda: get("/invite").status == 403, 20, "the service with the new settings")
    token = json.loads(relay.exec("chatmail-relay", "token", "create", "--json").out)["token"]
    yield token
    relay.exec("chatmail-relay", "token", "revoke", token)
    relay.sh("mv /root/settings.ini /etc/chatmail/chatmail.ini && chatmail-relay apply")
    wait_for(lambda: get("/invite").status == 200, 20, "the service as it was")


def test_by_token_and_with_a_trusted_certificate(get, chromium, strict):
    start = get("/")
    assert "by invitation" in start.text and "dcaccount:" not in start.body.decode()
    assert start.headers["Strict-Transport-Security"] == "max-age=31536000"
    assert "This invitation is not valid" in get("/invite?token=wrong").text
    code = look_at_invitation(chromium, "invite-token", f"?token={strict}")
    assert code == f"dcaccount:https://{DOMAIN}/new?token={strict}"
    policy = get("/.well-known/mta-sts.txt", host=f"mta-sts.{DOMAIN}")
    assert policy.status == 200
    assert policy.headers["Content-Type"] == "text/plain; charset=utf-8"
    assert dict(line.split(": ") for line in policy.body.decode().splitlines()) == {
        "version": "STSv1",
        "mode": "enforce",
        "mx": DOMAIN,
        "max_age": "2419200",
    }


@pytest.mark.parametrize("path", NEW)
def test_with_a_trusted_certificate_a_browser_is_sent_into_the_app(get, strict, path):
    for query in ("", f"?token={strict}"):
        answer = get(path + query)
        assert answer.status == 301
        assert answer.headers["Location"] == f"dcaccount:https://{DOMAIN}/new{query}"
        assert answer.headers.get_all("Cache-Control") == ["no-store"]
    assert get(path, method="POST").status == 403
    answer = get(f"{path}?token={strict}", method="POST")
    assert answer.status == 200
    assert set(json.loads(answer.body)) == {"email", "password"}


def is_dark(picture):
    """Whether most of a picture is."""
    return ImageStat.Stat(Image.open(picture).convert("L")).median[0] < 128


@pytest.mark.parametrize(
    ("dark", "scripts"), [(False, True), (True, False)], ids=["light", "dark-without-scripts"]
)
@pytest.mark.parametrize("width", [PHONE, DESKTOP])
@pytest.mark.parametrize("path", PAGES)
def test_in_a_browser(chromium, path, width, scripts, dark):
    name = f"{path.strip('/').removesuffix('.html') or 'index'}-{width}"
    name += "-dark" if dark else "-light"
    view = chromium.look(f"https://{DOMAIN}{path}", name, width=width, dark=dark, scripts=scripts)
    assert view.errors == []
    assert view.width <= width, "it scrolls sideways"
    assert DOMAIN in view.title
    assert all(url.startswith(f"https://{DOMAIN}/") for url in view.requests), view.requests
    assert is_dark(view.picture) == dark
    if path == "/":
        codes = zxingcpp.read_barcodes(Image.open(view.picture))
        assert [code.text for code in codes] == [f"dcaccount:{DOMAIN}"]
