# SPDX-License-Identifier: MIT
from chatmaild.config import FIELDS
from chatmaild.manual import manual_page


def test_every_setting_has_its_paragraph_and_default():
    page = manual_page()
    for key, item in FIELDS.items():
        paragraph = page.partition(f"\n.B {key}\n")[2].partition("\n.TP")[0]
        assert paragraph, key
        default = item.metadata["default"]
        assert ("Default: " + (default or "")).replace("-", r"\-") in paragraph or not default


def test_no_line_is_taken_for_a_request():
    known = {".TH", ".SH", ".TP", ".B", ".BR", ".I", ".IR", ".IB", ".PP", ".nf", ".fi", '.\\"'}
    lines = manual_page().splitlines()
    assert {line.split()[0] for line in lines if line.startswith((".", "'"))} <= known
