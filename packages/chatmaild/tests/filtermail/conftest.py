# SPDX-License-Identifier: MIT
"""Helpers of these tests are modules beside them, whatever import mode pytest runs in."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import pytest  # noqa: E402

from filtermail_relay import Relay  # noqa: E402


@pytest.fixture
def relay(tmp_path):
    """alice and bob take encrypted mail only, dave takes any."""
    result = Relay(tmp_path)
    result.add("alice")
    result.add("bob")
    result.add("dave", encrypted_only=False)
    return result
