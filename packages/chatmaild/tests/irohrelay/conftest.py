# SPDX-License-Identifier: MIT
"""The relay as a process of its own, and clients of it."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from irohrelay_client import Relay  # noqa: E402

MODULE = "chatmaild.irohrelay.__main__"


@pytest.fixture
def start_relay(start_service):
    """Start the service; *patch* is Python that changes its constants (`service` is the module)."""
    relays = []

    def start(patch=""):
        patch = "import chatmaild.irohrelay.session as session\n" + patch
        relays.append(Relay(start_service(MODULE, ["iroh-relay"], "", patch)))
        return relays[-1]

    yield start
    for relay in relays:
        relay.close_clients()


@pytest.fixture(scope="module")
def shared(start_shared_service):
    """The service as it is, for all tests of a module."""
    return Relay(start_shared_service(MODULE, ["iroh-relay"]))


@pytest.fixture
def relay(shared):
    """The service as it is; what a test connects is gone after it."""
    assert shared.process.poll() is None
    yield shared
    shared.close_clients()
