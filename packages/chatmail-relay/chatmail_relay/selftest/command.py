# SPDX-License-Identifier: MIT
"""`chatmail-relay test`: all checks in their order, within a time, and whatever happens cleaned up."""

from __future__ import annotations

import argparse
import os

from chatmaild.config import read_settings

from ..accounts import Relay
from ..apply import NotConfigured, is_configured
from ..paths import Paths
from ..status import Finding
from . import mail, ports, turn, web
from .accounts import Accounts
from .net import LOOPBACK, Target, host_of, mail_domain, resolve
from .report import Ending, Report, Wrong, attempt, undisturbed

INTERRUPTED = 130  # exit status, as of a shell

STATUS = "see chatmail-relay status"
FILTER = "see systemctl status chatmail-filtermail postfix"
DELIVERY = "see postqueue -p, and systemctl status dovecot"
METADATA = "see systemctl status chatmail-metadata"
TURN = "see systemctl status chatmail-turn, and open UDP 3478 in the firewall"


def run(paths: Paths, options: argparse.Namespace) -> int:
    """0 if all is well, 1 if not, INTERRUPTED after Ctrl-C."""
    own = read_settings(paths.ini)[0].mail_domain if is_configured(paths) else None
    domain = mail_domain(options.domain) if options.domain else own
    if domain is None:
        raise NotConfigured
    relay = Relay(paths) if domain == own and os.geteuid() == 0 else None
    test = Test(Report(options.json), ask_unbound=own is not None and paths.is_live)

    def work() -> None:
        test.relay(domain, relay, tuple(options.address or ()))
        if options.other:
            test.other(mail_domain(options.other))

    try:
        ending = attempt(work, options.timeout)
    finally:
        with undisturbed():
            test.clean_up()
    if ending is Ending.LATE:
        text = f"not done after {options.timeout:g} s"
        test.report.add(Finding("time", False, text, "what was tried last took it"))
    test.report.end()
    if ending is Ending.INTERRUPTED:
        return INTERRUPTED
    return 0 if test.report.is_well else 1


class Test:
    """One run. *ask_unbound*: names are looked up as the relay of this machine does."""

    def __init__(self, report: Report, *, ask_unbound: bool) -> None:
        self.report = report
        self._ask_unbound = ask_unbound
        self._accounts: list[Accounts] = []

    def relay(self, domain: str, relay: Relay | None, addresses: tuple[str, ...]) -> None:
        """Try a relay; *relay* if it is this machine's, and we may do all there."""
        report = self.report
        target = self._target(domain, addresses, LOOPBACK if relay is not None else ())
        if target is None or not ports.check(report, target):
            report.add(Finding("the rest", False, "not tried without IMAP and submission"))
            return
        web.check(report, target, self._ask_unbound)
        accounts = self._new(target, relay)
        report.check("account by login", "", accounts.by_login)
        report.check("account by /new", "", accounts.by_new)
        if len(accounts.made) < 2:
            report.add(Finding("the rest", False, "not tried without two accounts"))
            return
        sender, recipient = accounts.made
        report.check("logins", STATUS, lambda: mail.logins(sender))
        report.check(
            "cleartext on submission",
            FILTER,
            lambda: mail.cleartext_submitted(sender, recipient.address),
        )
        report.check(
            "cleartext on port 25",
            FILTER,
            lambda: mail.cleartext_received(target, recipient.address),
        )
        report.check(
            "unsigned mail on port 25",
            FILTER,
            lambda: mail.unsigned_received(target, recipient.address),
        )
        self._deliver("delivery", accounts, accounts, mail.DELIVERY_SECONDS)
        self._calls(accounts, addresses)

    def other(self, domain: str) -> None:
        """Exchange mail with another relay, both ways."""
        ours = self._accounts[0] if self._accounts else None
        target = self._target(domain, (), ())
        if target is None or ours is None or not ours.made:
            self.report.add(Finding(domain, False, "not tried without an account here"))
            return
        theirs = self._new(target, None)
        self.report.check(f"account at {domain}", "", lambda: _by_any_way(theirs))
        if theirs.made:
            self._deliver(f"delivery to {domain}", ours, theirs, mail.FEDERATION_SECONDS)
            self._deliver(f"delivery from {domain}", theirs, ours, mail.FEDERATION_SECONDS)

    def clean_up(self) -> None:
        """Remove all accounts; never raises what a check may raise."""
        for accounts in self._accounts:
            if accounts.leave_something:
                self.report.check(f"clean up {accounts.target.host}", "", accounts.remove)

    def _target(
        self, domain: str, given: tuple[str, ...], instead: tuple[str, ...]
    ) -> Target | None:
        """The relay of *domain* at the addresses *given*, or those of the DNS, or *instead* of none."""
        host = host_of(domain)
        found = list(given)

        def look() -> str:
            if not found:
                found.extend(resolve(host, self._ask_unbound))
            return ", ".join(found)

        if not self.report.check(f"name {host}", "see chatmail-relay dns", look):
            found.extend(instead)
        return Target(domain, host, tuple(found)) if found else None

    def _new(self, target: Target, relay: Relay | None) -> Accounts:
        made = Accounts(target, relay)
        self._accounts.append(made)
        return made

    def _deliver(self, what: str, sender: Accounts, recipient: Accounts, seconds: float) -> None:
        """One message; what it keeps of its way is a finding where the relay itself is the one tested."""
        stored: list[bytes] = []

        def look() -> float:
            took, text = mail.deliver(sender.made[0], recipient.made[-1], seconds)
            stored.append(text)
            return took

        if self.report.check(what, DELIVERY, look) and sender is recipient:
            self.report.check("privacy of mail", FILTER, lambda: mail.traces(stored[0]))

    def _calls(self, accounts: Accounts, addresses: tuple[str, ...]) -> None:
        told: dict[str, str] = {}

        def look() -> str:
            told.update(mail.metadata(accounts.made[0]))
            if not told:
                raise Wrong("has no key that clients ask for")
            return ", ".join(told)

        def allocate() -> str:
            if "turn" not in told:
                raise Wrong(
                    "METADATA has no turn: clients do not know of a server for calls", METADATA
                )
            credentials = turn.Credentials.parse(told["turn"])
            return turn.allocate(credentials, self._ask_unbound, addresses)

        if self.report.check("METADATA", METADATA, look):
            self.report.check("TURN", TURN, allocate)


def _by_any_way(accounts: Accounts) -> str:
    """An account by its first login, or by /new where the relay wants that."""
    try:
        return accounts.by_login()
    except Wrong:
        return accounts.by_new()
