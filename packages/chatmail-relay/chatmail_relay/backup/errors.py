# SPDX-License-Identifier: MIT
"""What cannot be backed up or restored."""


class BackupError(Exception):
    """The text is for the administrator: what, where, and what to do."""
