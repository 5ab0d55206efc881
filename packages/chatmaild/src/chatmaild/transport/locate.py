# SPDX-License-Identifier: MIT
"""Where a mail domain's HTTPS is: at its MX hosts, as SMTP is (RFC 5321 section 5.1).

Asks the relay's resolver, which validates DNSSEC and caches.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from typing import NamedTuple

from chatmaild.filtermail.address import IPAddress, is_domain, literal_of

RESOLVER = ("127.0.0.1", 53)
MAX_HOSTS = 3  # of the MX hosts
MAX_ADDRESSES = 4  # of one host


class NoHost(Exception):
    """The domain has no host that could be asked; the text is fit for the log."""


class Host(NamedTuple):
    """A host to connect to: *verify* its certificate for *name*, or take any."""

    name: str
    verify: bool


def is_elsewhere(ip: IPAddress) -> bool:
    """Whether *ip* can be another machine's: a name in the DNS must not lead to our own services."""
    return not (ip.is_loopback or ip.is_unspecified or ip.is_multicast or ip.is_link_local)


class Locator:
    """Answers where a domain's hosts are."""

    def __init__(
        self,
        ipv6: bool = True,
        resolver: tuple[str, int] = RESOLVER,
        allowed: Callable[[IPAddress], bool] = is_elsewhere,
    ) -> None:
        self._ipv6 = ipv6
        self._resolver = resolver
        self._allowed = allowed

    async def hosts(self, domain: str) -> list[Host]:
        """The hosts of *domain*, best first. Raises NoHost.

        Certificates count but for domains that cannot have one which others trust: address
        literals, and names with a leading underscore.
        """
        from chatmaild.filtermail import resolver  # when it is needed: it is large

        literal = literal_of(domain)
        if literal is not None:
            return [Host(str(literal), False)]
        verify = not domain.startswith("_")
        try:
            records, _ttl = await resolver.lookup(self._resolver, domain, "MX")
        except (resolver.NoAnswer, OSError) as error:
            raise NoHost(f"DNS: {error}") from None
        ranked = sorted((r.preference, str(r.exchange).rstrip(".").lower()) for r in records)
        if [name for _, name in ranked] == [""]:
            raise NoHost("null MX")  # RFC 7505
        names = [name for _, name in ranked if is_domain(name)] if ranked else [domain]
        if not names:
            raise NoHost("no usable MX")
        return [Host(name, verify) for name in names[:MAX_HOSTS]]

    async def addresses(self, host: Host) -> list[str]:
        """The addresses of *host*, IPv6 first. Raises NoHost if there is none."""
        from chatmaild.filtermail import resolver

        found: list[IPAddress] = []
        try:
            found.append(ipaddress.ip_address(host.name))
        except ValueError:
            for kind in ("AAAA", "A") if self._ipv6 else ("A",):
                try:
                    records, _ttl = await resolver.lookup(self._resolver, host.name, kind)
                except (resolver.NoAnswer, OSError):
                    continue  # the other kind may be there
                found += [ipaddress.ip_address(r.address) for r in records[: MAX_ADDRESSES // 2]]
        usable = [str(ip) for ip in found if self._allowed(ip)]
        if not usable:
            raise NoHost("no address")
        return usable
