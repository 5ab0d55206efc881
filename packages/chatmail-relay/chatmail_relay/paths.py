# SPDX-License-Identifier: MIT
"""Where everything is. Tests and container images use another root than "/"."""

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Paths:
    """All places the brain reads and writes, below *root*."""

    root: Path = Path("/")

    def real(self, path: str) -> Path:
        """The place of an absolute *path* of the relay's system."""
        return self.root / path.lstrip("/")

    @property
    def ini(self) -> Path:
        """The settings file: the truth."""
        return self.real("/etc/chatmail/chatmail.ini")

    @property
    def components(self) -> Path:
        """One folder a component: component.toml and templates, read-only."""
        return self.real("/usr/share/chatmail-relay/components")

    @property
    def overrides(self) -> Path:
        """The operator's own templates, looked up first: COMPONENT/TEMPLATE."""
        return self.real("/etc/chatmail/templates")

    @property
    def state(self) -> Path:
        """Ledger, journal and lock; 0700."""
        return self.real("/var/lib/chatmail/state")

    @property
    def format(self) -> Path:
        """The number that tells older versions to keep off (see stateformat.py)."""
        return self.real("/var/lib/chatmail/format")

    @property
    def is_live(self) -> bool:
        """Whether daemons run here: checkers and restarts make no sense in a chroot or an image."""
        return self.root == Path("/") and os.path.isdir("/run/systemd/system")

    @property
    def is_image(self) -> bool:
        """Whether this is a system that boots later: it gets no keys, which each machine makes itself."""
        return self.root == Path("/") and not self.is_live
