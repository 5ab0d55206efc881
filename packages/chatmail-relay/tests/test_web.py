# SPDX-License-Identifier: MIT
"""The web site's sources become its files: two folders, templates, markdown, errors with a place."""

import gzip
import html
import re
import threading
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from chatmail_relay import preview, web
from chatmail_relay.cli import main
from chatmail_relay.errors import RenderError
from chatmail_relay.paths import Paths
from chatmail_relay.render import context
from chatmaild import newemail
from chatmaild.config import read_settings

SHIPPED = Path(__file__).resolve().parents[3] / "www"
TOML = """
name = "www"
order = 45
[site]
dest = "/var/lib/chatmail/www"
overrides = "/etc/chatmail/www"
"""
SETTINGS = """[params]
mail_domain = _alpha.example
privacy_mail = me@example.org
privacy_postal = Jane *Doe* <jane>
    1. Any_street_ 5
"""


@pytest.fixture
def root(tmp_path):
    """A machine with a small site of one page, one style and a layout."""
    ours = tmp_path / "usr/share/chatmail-relay/components/www"
    ours.mkdir(parents=True)
    (ours / "component.toml").write_text(TOML)
    (ours / "_layout.html").write_text(
        '<title>{{ title }}</title><link href="{{ asset("main.css") }}">'
        "{% for link, name in menu %}[{{ link }} {{ name }}]{% endfor %}\n{{ content }}\n"
    )
    (ours / "main.css").write_text("body { color: red }\n")
    (ours / "index.md").write_text("title: Start\nmenu: 1\n\n# Hello {{ mail_domain }}\n")
    (ours / "robots.txt.j2").write_text("{% if tls == 'self' %}\nself\n{% endif %}\n")
    (tmp_path / "etc/chatmail").mkdir(parents=True)
    (tmp_path / "etc/chatmail/chatmail.ini").write_text(SETTINGS)
    return tmp_path


def build(root, settings=SETTINGS, folder=None):
    """The site of *root*, or of the shipped folder."""
    paths = Paths(root)
    config, _warnings = read_settings("chatmail.ini", settings)
    component = preview.load_components(paths.components)[0]
    if folder:
        component = component.__class__(**(component.__dict__ | {"folder": folder}))
    return web.build(paths, component, context(config, {}, "1"))


def put(root, name, content):
    path = root / "etc/chatmail/www" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_pages_are_made_of_markdown_inside_the_layout(root):
    files = build(root)
    assert set(files) == {"index.html", "main.css", "robots.txt"}
    page = files["index.html"].decode()
    assert "<title>Start</title>" in page and "<h1>Hello _alpha.example</h1>" in page
    assert "[/index.html Start]" in page


def test_a_file_of_the_operator_replaces_ours_or_is_one_more(root):
    put(root, "index.html", "mine")
    put(root, "rules.md", "title: Rules\nmenu: 2\n\nBe *kind*.\n")
    put(root, "pictures/cat.png", b"\x89PNG\xff")
    files = build(root)
    assert files["index.html"] == b"mine"
    assert b"<em>kind</em>" in files["rules.html"] and b"[/rules.html Rules]" in files["rules.html"]
    assert files["pictures/cat.png"] == b"\x89PNG\xff"
    put(root, "index.html", "")
    assert "index.html" not in build(root)


def test_what_is_not_for_publication_is_not_published(root):
    for name in ("_part.html", ".git/config", "index.md~", ".hidden", "a/.b/c"):
        put(root, name, "x")
    put(root, ".well-known/security.txt", "y")
    assert set(build(root)) == {"index.html", "main.css", "robots.txt", ".well-known/security.txt"}


def test_what_renders_to_nothing_is_not_published(root):
    external = "[params]\nmail_domain = a.example\ntls_external_cert_and_key = /c /k\n"
    assert "robots.txt" in build(root)
    assert "robots.txt" not in build(root, external)


def test_values_are_never_taken_for_markdown_or_html(root):
    put(
        root,
        "index.md",
        "# {{ privacy_postal }}\n\n{{ mail_domain }} and {{ mail_domain }} `{{ privacy_postal }}`\n\n"
        "[mail](mailto:{{ privacy_mail }})\n\n<p title='{{ privacy_postal }}'>raw</p>\n\n"
        "{% macro twice(text) %}<b>{{ text }}</b>{% endmacro %}{{ twice(privacy_postal) }}\n",
    )
    page = build(root)["index.html"].decode()
    shown = html.escape("Jane *Doe* <jane>\n1. Any_street_ 5", quote=False)
    assert page.count(shown) == 4
    assert f"<h1>{shown}</h1>" in page and f"<code>{shown}</code>" in page
    assert f"<b>{shown}</b>" in page
    assert "_alpha.example and _alpha.example" in page
    assert 'href="mailto:me@example.org"' in page


def test_an_asset_has_an_address_that_changes_with_it(root):
    address = re.compile(r"/main\.css\?[0-9a-f]{8}")
    before = address.search(build(root)["index.html"].decode())[0]
    assert address.search(build(root)["index.html"].decode())[0] == before
    put(root, "main.css", "body {}")
    assert address.search(build(root)["index.html"].decode())[0] != before


def test_texts_have_a_compressed_copy_and_it_is_reproducible(root):
    put(root, "long.txt", "line\n" * 1000)
    put(root, "long.png", b"\0" * 5000)
    files = build(root)
    assert gzip.decompress(files["long.txt.gz"]) == files["long.txt"]
    assert "long.png.gz" not in files and "main.css.gz" not in files
    assert build(root) == files


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.md", "one\n\n{{ nothing }}\n", "x.md:3: 'nothing' is undefined"),
        ("x.md", "one\n{% if %}\n", "x.md:2: Expected an expression"),
        ("x.txt.j2", "\n\n{{ 1 // 0 }}\n", "x.txt.j2:3: "),
        ("x.md", "title: A\nmenu: first\n\ntext\n", "x.md: menu: first: write a number"),
        ("x.md", "a\n\n{{ asset('gone.css') }}\n", "x.md:3: gone.css is not among the files"),
        ("x.md", b"good\nb\xe4d\n", "x.md:2: not UTF-8"),
        ("x.md", '{% include "_part.html" %}\n', "x.md:1: _part.html"),
        ("_layout.html", "a\nb {{ content | nothing }}\n", "_layout.html:2: No filter named"),
        ("big.bin", b"\0" * (web.MAX_FILE + 1), "big.bin: larger than 16 MB"),
    ],
)
def test_errors_name_file_and_line(root, name, content, message):
    path = put(root, name, content)
    with pytest.raises(RenderError) as caught:
        build(root)
    assert str(caught.value).startswith(f"{path.parent}/{message}")


def test_an_error_in_an_included_file_names_that_file(root):
    put(root, "x.md", 'a\n{% include "_part.md" %}\n')
    part = put(root, "_part.md", "b\n{{ nothing }}\n")
    with pytest.raises(RenderError, match=f"^{part}:2: 'nothing' is undefined"):
        build(root)


def test_two_sources_of_one_file_are_an_error(root):
    put(root, "x.md", "a")
    second = put(root, "x.html.j2", "b")
    with pytest.raises(RenderError, match=f"^{second.parent}/x.md: x.html.j2 makes x.html too"):
        build(root)


def test_apply_publishes_and_a_removed_override_gives_ours_back(root, monkeypatch):
    monkeypatch.setattr("chatmail_relay.transaction.os.geteuid", lambda: 1)
    published = root / "var/lib/chatmail/www"
    mine = put(root, "main.css", "mine")
    extra = put(root, "a/b/extra.md", "more")
    assert main(["apply"], root=str(root)) == 0
    assert (published / "main.css").read_text() == "mine"
    assert "more" in (published / "a/b/extra.html").read_text()
    mine.unlink()
    extra.unlink()
    assert main(["apply"], root=str(root)) == 0
    assert "red" in (published / "main.css").read_text()
    assert not (published / "a").exists()
    assert main(["unapply"], root=str(root)) == 0
    assert not published.exists()


def test_a_broken_override_changes_nothing(root, monkeypatch, capsys):
    monkeypatch.setattr("chatmail_relay.transaction.os.geteuid", lambda: 1)
    assert main(["apply"], root=str(root)) == 0
    page = root / "var/lib/chatmail/www/index.html"
    before = page.read_bytes()
    path = put(root, "index.md", "new\n{{ oops }}\n")
    assert main(["apply"], root=str(root)) == 1
    assert f"{path}:2: 'oops' is undefined" in capsys.readouterr().err
    assert page.read_bytes() == before


def test_web_lists_the_files_and_where_they_come_from(root, capsys):
    path = put(root, "index.html", "mine")
    assert main(["web"], root=str(root)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"/index.html  {path}" in lines
    assert len(lines) == 3 and "_layout" not in "".join(lines)


@pytest.fixture
def served(root):
    """The preview, running; a function that fetches from it."""
    with preview.Preview(preview.Pages(Paths(root), "1"), 0) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        assert server.server_address[0] == "127.0.0.1"

        def fetch(path, wait=None):
            try:
                with urllib.request.urlopen(server.url + path, timeout=20) as answer:
                    if wait:
                        wait(answer)
                    return answer.status, answer.read().decode()
            except urllib.error.HTTPError as error:
                return error.code, error.read().decode()

        yield fetch
        server.shutdown()
        thread.join()


def test_the_preview_shows_changes_errors_and_the_way_back(root, served):
    assert "Hello _alpha.example" in served("")[1]
    put(root, "index.md", "changed\n")
    assert "changed" in served("index")[1]
    path = put(root, "index.md", "{{ oops }}\n")
    status, text = served("")
    assert status == 500 and f"{path}:1: &#x27;oops&#x27; is undefined" in text
    path.unlink()
    assert "Hello" in served("index.html")[1]
    assert served("nothing")[0] == 404


def test_an_open_page_of_the_preview_is_told_of_a_change(root, served):
    assert f'EventSource("{preview.CHANGED}")' in served("")[1]
    told = served(preview.CHANGED[1:], lambda answer: put(root, "index.md", "changed\n"))
    assert told[1].endswith("data: changed\n\n")


def test_the_marks_of_the_invitation_are_those_the_service_fills_in(root):
    page = build(root, SETTINGS, SHIPPED)[newemail.INVITE_PAGE.name].decode()
    assert page.count(f'href="{newemail.INVITE_MARK}"') == 1
    assert page.count(newemail.INVITE_MARK) == 2 and page.count(newemail.QR_MARK) == 1


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ("tls = self", 'href="/invite"'),
        ("tls_external_cert_and_key = /c /k", 'href="dcaccount:_alpha.example"'),
        ("registration = token", "Addresses here are by invitation"),
        ("registration = closed", "There are no new addresses here"),
    ],
)
def test_the_front_page_fits_the_way_to_register(root, settings, words):
    page = build(root, f"{SETTINGS}{settings}\n", SHIPPED)["index.html"].decode()
    assert words in page
    assert ("<svg" in page) == ("registration" not in settings)


def test_a_self_signed_certificate_of_an_ordinary_name_has_no_short_code(root):
    page = build(root, "[params]\nmail_domain = a.example\ntls = self\n", SHIPPED)[
        "index.html"
    ].decode()
    assert 'href="/invite"' in page and "dcaccount:" not in page


def test_a_relay_without_a_name_is_shown_by_its_address(root):
    site = build(root, "[params]\nmail_domain = 192.0.2.1\n", SHIPPED)
    page = site["index.html"].decode()
    assert "<title>192.0.2.1</title>" in page and "[192.0.2.1]" not in page
    assert 'href="/invite"' in page and "dcaccount:" not in page
    settings = site[".well-known/autoconfig/mail/config-v1.1.xml"].decode()
    assert settings.count("<hostname>192.0.2.1</hostname>") == 6


@pytest.mark.parametrize(
    ("more", "page", "words"),
    [
        ("delete_mails_after = 13", "index.html", "A message is gone 13 days after"),
        ("delete_inactive_users_after = 1", "index.html", "gone after one day without"),
        ("max_mailbox_size = 3G", "index.html", "3 GB of messages"),
        ("max_message_size = 14680064", "info.html", "A message with its files 10 MB"),
        ("delete_large_after = 4", "privacy.html", "above 200 kB, once read, 4 days"),
        ("privacy_pdo = Max", "privacy.html", "Data protection officer Max"),
        ("username_max_length = 20", "info.html", "before the @ 9 to 20 characters"),
    ],
)
def test_the_shipped_pages_tell_the_numbers_of_the_settings(root, more, page, words):
    files = build(root, f"{SETTINGS}{more}\n", SHIPPED)
    text = " ".join(re.sub(r"<[^>]*>", " ", files[page].decode()).split())
    assert words in text


def test_links_between_the_shipped_pages_lead_somewhere(root):
    files = build(root, SETTINGS, SHIPPED)
    pages = [name for name in files if name.endswith(".html")]
    assert {"index.html", "info.html", "privacy.html", "404.html"} <= set(pages)
    for name in pages:
        for link in re.findall(r'(?:href|src)="(/[^"?]*)', files[name].decode()):
            # nginx finds names without .html too
            assert link == "/" or {link[1:], f"{link[1:]}.html"} & set(files), f"{name}: {link}"


def test_the_policy_of_mta_sts_needs_a_certificate_that_others_trust(root):
    external = "[params]\nmail_domain = a.example\ntls_external_cert_and_key = /c /k\n"
    name = ".well-known/mta-sts.txt"
    assert name not in build(root, SETTINGS, SHIPPED)
    policy = build(root, external, SHIPPED)[name].decode()
    assert policy.splitlines() == [
        "version: STSv1",
        "mode: enforce",
        "mx: a.example",
        "max_age: 2419200",
    ]
