# SPDX-License-Identifier: MIT
"""Helpers of these tests are modules beside them, whatever import mode pytest runs in."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
