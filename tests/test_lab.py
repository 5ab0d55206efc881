# SPDX-License-Identifier: MIT
"""The lab notices what is left of it: a seeded leftover turns it red."""

import subprocess

import pytest
from lab import Lab
from lab.cleanup import NETNS
from lab.shell import LabError


def test_a_process_left_in_the_lab_is_reported_and_removed():
    lab = Lab("leftover")
    left = subprocess.Popen(["nsenter", f"--net={lab.client.path}", "sleep", "600"])
    with pytest.raises(LabError, match=rf"process {left.pid}"):
        lab.close()
    assert left.wait(10) != 0
    assert not [path for path in NETNS.iterdir() if path.name.startswith(f"cml{lab.state.id}")]


def test_an_orderly_end_leaves_nothing():
    with Lab("orderly") as lab:
        assert lab.dns.address == "10.77.0.1"
    assert lab.state.leftovers() == []
