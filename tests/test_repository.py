# SPDX-License-Identifier: MIT
"""apt takes our packages only with a good signature, over file: (every installation here) and http."""

import pytest
from conftest import DOMAIN
from lab import image
from lab.shell import wait_for

SERVED = "/srv/http"
UPDATE = (
    "apt-get update -q -o Dir::Etc::sourcelist=/etc/apt/{name} -o Dir::Etc::sourceparts=- "
    "-o Dir::State::lists={lists} -o APT::Update::Error-Mode=any"
)


@pytest.fixture
def served(relay):
    """The repository over http on the host's loopback; returns a function that tries an update."""
    relay.sh(f"cp -r {image.INSIDE_REPO} {SERVED}")
    relay.exec(
        "systemd-run", "-q", "--unit=repo-http", f"--working-directory={SERVED}",
        "python3", "-m", "http.server", "--bind", "127.0.0.1", "8099",
    )  # fmt: skip
    listening = "ss -Hltn 'sport = :8099' | grep -q 8099"
    wait_for(lambda: relay.sh(listening, check=False).ok, 20, "the http server")
    source = image.SOURCES.replace(f"file:{image.INSIDE_REPO}", "http://127.0.0.1:8099")

    def update(keyring=f"/usr/share/keyrings/{image.KEYRING_NAME}"):
        text = source.replace(f"/usr/share/keyrings/{image.KEYRING_NAME}", keyring)
        relay.write("/etc/apt/http.sources", text)
        relay.sh("rm -rf /tmp/lists && mkdir -p /tmp/lists/partial")
        command = UPDATE.format(name="http.sources", lists="/tmp/lists")
        return relay.sh(command, check=False, timeout=60)

    yield update
    relay.sh(f"systemctl stop repo-http; rm -rf {SERVED} /etc/apt/http.sources /tmp/lists")


def test_a_good_signature_is_accepted_over_http(served, relay):
    done = served()
    assert done.ok, done.err
    assert relay.exec("chatmail-relay", "get", "mail_domain").out == f"{DOMAIN}\n"


def test_a_tampered_release_is_refused(served, relay):
    relay.sh(f"sed -i 's/^Label: Chatmail/Label: Chatmai1/' {SERVED}/dists/trixie/InRelease")
    relay.sh(f"rm -f {SERVED}/dists/trixie/Release {SERVED}/dists/trixie/Release.gpg")
    done = served()
    assert not done.ok
    assert "signature" in (done.err + done.out).lower()


def test_another_key_is_refused(served, relay):
    done = served("/usr/share/keyrings/debian-archive-keyring.gpg")
    assert not done.ok, done.out
