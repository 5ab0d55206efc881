# SPDX-License-Identifier: MIT
"""What the build tools share: trees (chroots), sandboxes, exports, stamps.

Standard library only and Python 3.11, so that a fresh Debian 12 or 13 runs it without a step before.
"""
