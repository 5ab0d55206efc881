# SPDX-License-Identifier: MIT
"""A small internet for tests: Debian 13 containers with systemd, a bridge, names, real clients."""

from .lab import Lab

__all__ = ["Lab"]
