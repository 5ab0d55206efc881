# SPDX-License-Identifier: MIT
"""The operator's file of client versions: what is valid, and how what is not is named."""

import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chatmaild.appversions import MAX_BYTES, AppVersions, Invalid, read

SOURCE = {
    "sourceId": "store",
    "versionInteger": 4294967295,
    "versionString": "1.2.3",
    "downloadUrl": "https://download.delta.chat/x.apk",
}
GOOD = {"clients": [{"clientId": "app", "sources": [SOURCE]}]}


@pytest.fixture
def file(tmp_path):
    return tmp_path / "appversions.json"


def test_a_valid_file_becomes_one_line(file):
    file.write_text(json.dumps(GOOD, indent=4))
    line = read(file)
    assert "\n" not in line and " " not in line
    assert json.loads(line) == GOOD


def test_no_file_is_no_error(file):
    assert read(file) is None


def source(**changes):
    return {"clients": [{"clientId": "app", "sources": [{**SOURCE, **changes}]}]}


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ([], "the file is not an object with the keys clients"),
        ({}, "the file is not an object with the keys clients"),
        ({"clients": {}}, "clients is not a list"),
        ({"clients": [], "more": 1}, "the file is not an object"),
        ({"clients": [{"clientId": "app"}]}, "clients[0] is not an object with the keys"),
        ({"clients": [{"clientId": 1, "sources": []}]}, "clients[0].clientId is not a text"),
        ({"clients": [{"clientId": "a", "sources": 1}]}, "clients[0].sources is not a list"),
        ({"clients": GOOD["clients"] * 2}, "clients: clientId 'app' stands twice"),
        (
            {"clients": [{"clientId": "app", "sources": [SOURCE, SOURCE]}]},
            "clients[0].sources: sourceId 'store' stands twice",
        ),
        (source(more=1), "clients[0].sources[0] is not an object"),
        (source(versionInteger=-1), "clients[0].sources[0].versionInteger is not a number"),
        (source(versionInteger=1 << 32), "versionInteger is not a number from 0 to 4294967295"),
        (source(versionInteger=True), "versionInteger is not a number"),
        (source(versionInteger=1.0), "versionInteger is not a number"),
        (source(versionString=""), "versionString is not a text"),
        (source(downloadUrl="http://download.delta.chat/"), "downloadUrl does not begin with"),
        (source(downloadUrl="https://github.com/evil/"), "downloadUrl does not begin with"),
        (source(downloadUrl="https://github.com/deltachat/../evil"), "not a plain URL"),
        (source(downloadUrl="https://github.com/deltachat/\n"), "not a plain URL"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(file, data, said):
    file.write_text(json.dumps(data))
    with pytest.raises(Invalid) as refused:
        read(file)
    assert str(refused.value).startswith(str(file)) and said in str(refused.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{\n"clients": [}', ":2: no JSON"),
        (b"", ":1: no JSON"),
        (b"\xff", "utf-8"),
        (b'{"clients": [], "clients": []}', "a key stands twice: 'clients'"),
        (b" " * MAX_BYTES + b"x", f"larger than {MAX_BYTES} bytes"),
        (b"[" * MAX_BYTES, "recursion"),
        (b'{"clients": [{"clientId": "' + b"\xc3\xa9" * 5000 + b'", "sources": []}]}', "in ASCII"),
    ],
)
def test_what_is_no_json_is_named(file, content, said):
    file.write_bytes(content)
    with pytest.raises(Invalid, match=str(file)) as refused:
        read(file)
    assert said in str(refused.value)


def test_a_folder_in_its_place_is_named(file):
    file.mkdir()
    with pytest.raises(Invalid, match="cannot be read"):
        read(file)


@given(
    st.binary()
    | st.recursive(st.text() | st.integers() | st.none(), st.lists).map(
        lambda value: json.dumps({"clients": value}).encode()
    )
)
def test_any_content_is_valid_or_named(tmp_path_factory, content):
    file = tmp_path_factory.mktemp("any") / "file"
    file.write_bytes(content)
    try:
        line = read(file)
    except Invalid as error:
        assert str(file) in str(error)
    else:
        assert json.loads(line) == json.loads(content)


def test_a_changed_file_is_read_again_and_an_unchanged_one_is_not(file, caplog):
    versions = AppVersions(file)
    assert versions.value() is None
    file.write_text(json.dumps(GOOD))
    assert json.loads(versions.value()) == GOOD
    status = file.stat()
    with open(file, "r+b") as same:  # another content behind the same size and times
        same.write(b"x")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert json.loads(versions.value()) == GOOD
    os.utime(file, ns=(0, 0))
    assert versions.value() is None and versions.value() is None
    assert len(caplog.records) == 1 and str(file) in caplog.text
    file.unlink()
    assert versions.value() is None
