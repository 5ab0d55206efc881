# SPDX-License-Identifier: MIT
"""The scenarios of debian/tests, run by autopkgtest(1) on a booted machine; and what adequate(1) says."""

import re

import pytest
from conftest import keep, measured
from lab import image

TOOLS = ("adequate", "autopkgtest", "dpkg-dev")
SCENARIOS = {"unconfigured", "self-test", "new-domain", "removal"}
#: A scenario that fails, to see that it is told.
CONTROL = "Tests: broken\nDepends: dpkg\nRestrictions: needs-root\n"


@pytest.fixture(scope="module")
def host(lab):
    """A machine with the tools, and our repository, and no relay yet."""
    image.download(lab.tree, *TOOLS)
    made = lab.host("autopkgtest", 71)
    made.use_repository()
    made.sh(f"apt-get install -qq --yes --no-install-recommends {' '.join(TOOLS)} >/dev/null")
    yield made
    lab.remove(made)


def autopkgtest(host, timeout=600):
    """(scenario, result) of all in /root/source, and the report."""
    done = host.exec(
        *("autopkgtest", "--no-built-binaries", "--ignore-restrictions=isolation-machine"),
        *("/root/source", "--", "null"),
        check=False,
        timeout=timeout,
    )
    return dict(re.findall(r"^(\S+)\s+(PASS|FAIL|SKIP)\b", done.out, re.MULTILINE)), done


def test_all_scenarios_pass(host):
    source = image.ROOT / "debian"
    host.sh("mkdir -p /root/source/debian/tests")
    for name in ("control", "changelog"):
        host.write(f"/root/source/debian/{name}", (source / name).read_text())
    for path in (source / "tests").iterdir():
        host.write(f"/root/source/debian/tests/{path.name}", path.read_text(), 0o755)
    results, done = autopkgtest(host)
    keep("autopkgtest", done.out + done.err)
    assert results == dict.fromkeys(SCENARIOS, "PASS"), done.out[-3000:] + done.err[-1000:]
    measured["autopkgtest"] = f"{len(results)} scenarios in {done.seconds:.0f} s"


def test_a_scenario_that_fails_is_told(host):
    host.write("/root/source/debian/tests/control", CONTROL)
    host.write("/root/source/debian/tests/broken", "#!/bin/sh\nexit 1\n", 0o755)
    results, done = autopkgtest(host)
    assert results == {"broken": "FAIL"} and done.code != 0


def test_adequate_finds_nothing(host):
    """Broken links, missing copyright files, obsolete conffiles, libraries that do not resolve ..."""
    host.sh(
        "apt-get install -qq --yes --no-install-recommends chatmail-relay >/dev/null", timeout=300
    )
    shown = "${db:Status-Status} ${Package}\n"
    known = host.exec("dpkg-query", "-W", "-f", shown, "*chatmail*").out.splitlines()
    ours = [line.split()[1] for line in known if line.startswith("installed ")]
    assert "chatmail-postfix-conf" in ours
    assert host.exec("adequate", *ours).out == ""
    # it does look
    host.exec("mv", "/usr/share/doc/chatmail-relay/copyright", "/root/copyright")
    assert "missing-copyright-file" in host.exec("adequate", *ours, check=False).out
