# SPDX-License-Identifier: MIT
"""What a machine has on which the reference tool has deployed a relay, in both generations of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from chatmaild.config import FIELDS, OBSOLETE, ConfigError, explicit_values

INI = "/usr/local/lib/chatmaild/chatmail.ini"
STORE = "/home/vmail/mail"  # and the domain, if mailboxes_dir is not set
DKIM_KEY = "/etc/dkimkeys/opendkim.private"
DKIM_SELECTOR = "opendkim"
SELF_SIGNED = ("/etc/ssl/certs/mailserver.pem", "/etc/ssl/private/mailserver.key")
ACME = "/var/lib/acme"
NO_CREATE = "/etc/chatmail-nocreate"
QUEUE = "/var/spool/postfix"
QUEUES = ("active", "bounce", "corrupt", "defer", "deferred", "hold", "incoming", "maildrop")

UNIT_FOLDER = "/etc/systemd/system"
#: Its own units. Those of the same name in our packages are masked by them.
UNITS = (
    "doveauth.service",
    "doveauth-dictproxy.service",
    "chatmail-metadata.service",
    "lastlogin.service",
    "filtermail.service",
    "filtermail-incoming.service",
    "filtermail-transport.service",
    "chatmail-expire.service",
    "chatmail-expire.timer",
    "chatmail-fsreport.service",
    "chatmail-fsreport.timer",
    "turnserver.service",
    "iroh-relay.service",
    "mtail.service",
    "echobot.service",
    "acmetool-redirector.service",
    "acmetool-reconcile.service",
    "acmetool-reconcile.timer",
    "tls-cert-reload.path",
    "tls-cert-reload.service",
    "mta-sts-daemon.service",
)
DROPINS = (
    "opendkim.service.d/10-prevent-memory-leak.conf",
    "dovecot.service.d/10_restart.conf",
    "postfix@.service.d/10_restart.conf",
)
#: Debian's daemons with its configuration.
DAEMONS = (
    "postfix.service",
    "dovecot.service",
    "nginx.service",
    "opendkim.service",
    "fcgiwrap.socket",
)
#: What has to be away before apt can install, and configuration that holds for the whole machine.
OVERRIDES = (
    "/etc/apt/preferences.d/pin-dovecot",
    "/etc/apt/apt.conf.d/00InstallRecommends",
    "/etc/cron.d/chatmail-metrics",
    "/etc/cron.d/expunge",
    "/etc/cron.d/acmetool",
    "/usr/sbin/policy-rc.d",
    "/etc/unbound/unbound.conf.d/chatmail.conf",
    "/etc/acme/hooks/nginx",
    "/var/lib/acme/conf/target",
    "/var/lib/acme/conf/responses",
    "/etc/opendkim/screen.lua",
    "/etc/opendkim/final.lua",
    "/etc/postfix/login_map",
    "/etc/postfix/submission_header_cleanup",
    "/etc/postfix/lmtp_header_cleanup",
    "/etc/postfix/smtp_tls_policy_map",
    "/etc/postfix/smtp_tls_policy_map.db",
    "/etc/dovecot/auth.conf",
    "/etc/dovecot/push_notification.lua",
)
#: Programs and their settings, which nothing starts any more.
PROGRAMS = (
    "/usr/local/bin/filtermail",
    "/usr/local/bin/chatmail-turn",
    "/usr/local/bin/iroh-relay",
    "/usr/local/bin/mtail",
    "/usr/local/lib/chatmaild",
    "/usr/local/lib/postfix-mta-sts-resolver",
    "/usr/lib/cgi-bin/newemail.py",
    "/etc/iroh-relay.toml",
    "/etc/mtail/delivered_mail.mtail",
    "/etc/mta-sts-daemon.yml",
    "/etc/chatmail-version",
    "/var/lib/echobot",
    "/root/from-cmdeploy",
)
#: Files of Debian's packages that it has replaced: package -> files.
CONFFILES = {
    "nginx-common": ("/etc/nginx/nginx.conf",),
    "opendkim": ("/etc/opendkim.conf",),
    "dovecot-core": ("/etc/dovecot/dovecot.conf",),
}
POSTFIX = {
    "/etc/postfix/main.cf": "/usr/share/postfix/main.cf.debian",
    "/etc/postfix/master.cf": "/usr/share/postfix/master.cf.dist",
}
#: Left as they are: right for this relay too, or not ours to judge.
LEFT = {
    "/etc/resolv.conf": "names the relay's unbound first",
    "/etc/mailname": "the mail domain",
    "/etc/environment": "a line with TZ",
    "/etc/sysctl.conf": "limits of inotify",
    "/etc/systemd/journald.conf": "keeps the machine's own log in memory, for three days",
    "/var/www/html": "put pages of your own into /etc/chatmail/www",
}


class ImportProblem(Exception):
    """Nothing to import, or a step that failed; the text is for the administrator."""


class Legacy:
    """The relay below *root*: "/" for the machine itself, else a copy of another one's files.

    *ini* is a copy of its settings that an import before has kept, as the file itself moves away.
    """

    def __init__(self, root: Path, ini: Path | None = None) -> None:
        self.root = root
        self.ini = ini or self.real(INI)
        if not self.ini.is_file():
            raise ImportProblem(
                f"{self.ini}: no such file; no relay of the reference tool is there"
            )
        try:
            self._values = explicit_values(self.ini)
        except ConfigError as error:
            raise ImportProblem(str(error)) from None
        self.mail_domain = self._values.get("mail_domain", "")
        if not self.mail_domain:
            raise ImportProblem(f"{self.ini}: mail_domain is not set")

    def real(self, path: str) -> Path:
        """The place of an absolute *path* of that relay."""
        return self.root / path.lstrip("/")

    @property
    def store(self) -> str:
        """The directory of its mailboxes."""
        default = f"{STORE}/{self.mail_domain.strip('[]')}"
        return self._values.get("mailboxes_dir") or default

    @property
    def settings(self) -> dict[str, str]:
        """Its settings as ours; what it left to a default that is ours too is left out."""
        found = {
            key: value
            for key, value in self._values.items()
            if key in FIELDS and key not in ("mailboxes_dir", "dkim_selector")
        }
        # the defaults of the older generation, where they differ
        if self.real(DKIM_KEY).exists():
            found["dkim_selector"] = DKIM_SELECTOR
        # whoever has an account there has agreed
        if any(self.real(f"{ACME}/accounts").glob("*/*")):
            found["acme_agreement"] = "true"
        for key in ("disable_ipv6", "imap_rawlog", "imap_compress"):
            if key in found:
                found[key] = str(found[key].lower() == "true").lower()
        if found.get("passthrough_recipients"):
            # the older echo bot could not encrypt
            echo = f"echo@{self.mail_domain}"
            words = [word for word in found["passthrough_recipients"].split() if word != echo]
            found["passthrough_recipients"] = " ".join(words)
        return found

    @property
    def not_taken(self) -> Iterator[tuple[str, str]]:
        """Settings that have no place here any more, and why."""
        for key in self._values:
            if key in OBSOLETE:
                yield key, OBSOLETE[key]
            elif key == "mailboxes_dir":
                yield key, "Mailboxes are in /var/lib/chatmail/mail"
            elif key not in FIELDS:
                yield key, "Nothing reads it"

    def there(self, *paths: str) -> list[str]:
        """Those of *paths* that exist, also as links that lead nowhere."""
        return [path for path in paths if os.path.lexists(self.real(path))]

    def links(self) -> list[str]:
        """Links by which its units are enabled."""
        links = sorted(self.real(UNIT_FOLDER).glob("*.wants/*"))
        # of a unit of the same name in our packages it is still right
        return [
            f"/{path.relative_to(self.root)}"
            for path in links
            if path.name in UNITS and os.readlink(path).startswith(f"{UNIT_FOLDER}/")
        ]
