# SPDX-License-Identifier: MIT
"""Backup and restore: everything that makes this relay this relay, while it runs, to another machine.

* `snapshot` reads a running relay into a tree of files, its paths those of the relay;
* `storage` keeps such trees: in a directory, in one tar file, or in a borg repository;
* `restore` makes a machine the relay of a tree; what is there is moved aside, not deleted;
* `command` is the command line.

docs/backup.md tells administrators of it.
"""

from .command import add_commands

__all__ = ["add_commands"]
