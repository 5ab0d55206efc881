# SPDX-License-Identifier: MIT
"""A test internet: one signed root zone, a certificate authority that speaks ACME, relays that trust both.

A relay here runs what it runs in production, and resolves with its own unbound from the root servers on.
Three things differ, and are in place before the relay is installed: the root's addresses, its trust
anchor, and the store of certificate authorities.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import dns.name
import dns.query
import dns.rcode
import dns.update
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from . import image
from .host import Host
from .lab import CLIENT, Lab
from .network import IPV4
from .shell import LabError, wait_for

NUMBER = 3  # last number of the inet host's address
PACKAGES = ("ca-certificates", "curl", "knot", "nginx", "pebble", "procps", "socat", "testssl.sh")
ACME_NAME = "acme.example"
ACME_DIRECTORY = f"https://{ACME_NAME}/dir"  # pebble's path
TTL = 0  # what a test sets is seen at once, by resolvers too
VALID_DAYS = 30  # of certificates of the lab's own authority

#: One zone is the whole internet; knot signs it, and again whatever is changed.
KNOT = """\
server:
    rundir: "/run/knot"
    user: knot:knot
    listen: [ {ipv4}@53, {ipv6}@53 ]
log:
  - target: syslog
    any: info
database:
    storage: "/var/lib/knot"
acl:
  - id: tests
    address: {client}
    action: update
policy:
  - id: internet
    algorithm: ecdsap256sha256
    single-type-signing: on
zone:
  - domain: .
    storage: "/var/lib/knot"
    file: "root.zone"
    zonefile-sync: -1
    zonefile-load: difference-no-serial
    journal-content: all
    dnssec-signing: on
    dnssec-policy: internet
    acl: tests
"""

ROOT_SERVER = "ns.root-servers.example"
ZONE = """\
$ORIGIN .
$TTL 3600
. SOA {server}. hostmaster.example. 1 3600 600 86400 1
. NS {server}.
{server}. A {ipv4}
{server}. AAAA {ipv6}
{acme}. A {ipv4}
{acme}. AAAA {ipv6}
"""

HINTS = """\
. 3600000 NS {server}.
{server}. 3600000 A {ipv4}
{server}. 3600000 AAAA {ipv6}
"""

#: A relay's settings: who gives certificates here, and a machine that is busy with tests.
SETTINGS = f"""\
[params]
acme_directory = {ACME_DIRECTORY}
max_new_addresses_per_hour = 100000
max_load_1m = 1000
"""

#: A relay's unbound: the whole difference to production but for the anchor in dns-root-data.
UNBOUND = """\
server:
    root-hints: "/usr/share/dns/root.hints"
"""

PEBBLE = {
    "listenAddress": "127.0.0.1:14000",
    "managementListenAddress": "127.0.0.1:15000",
    "certificate": "/etc/pebble/cert.pem",
    "privateKey": "/etc/pebble/key.pem",
    "httpPort": 80,
    "tlsPort": 443,
    "ocspResponderURL": "",
    "externalAccountBindingRequired": False,
    "retryAfter": {"authz": 1, "order": 1},
    "keyAlgorithm": "ecdsa",
    "certificateValidityPeriod": 90 * 86400,
}

PEBBLE_UNIT = """\
[Unit]
Description=ACME server of the test internet
After=knot.service
[Service]
Environment=PEBBLE_VA_NOSLEEP=1 PEBBLE_WFE_NONCEREJECT=0 PEBBLE_AUTHZREUSE=0
ExecStart=/usr/bin/pebble -config /etc/pebble/config.json -dnsserver {ipv4}:53
DynamicUser=yes
[Install]
WantedBy=multi-user.target
"""

#: In front of pebble, because pebble forgets everything when it ends and knows no rate limits. What a
#: test wants to go wrong is included.
FRONT = """\
server {{
    listen 80;
    listen [::]:80;
    return 404;
}}
server {{
    listen 443 ssl;
    listen [::]:443 ssl;
    server_name {acme};
    ssl_certificate /etc/pebble/cert.pem;
    ssl_certificate_key /etc/pebble/key.pem;
    default_type application/problem+json;
    include /etc/nginx/acme-trouble.con[f];
    location / {{
        proxy_pass https://127.0.0.1:14000;
        proxy_set_header Host {acme};
        proxy_set_header X-Forwarded-Proto https;
    }}
}}
"""
TROUBLE = "/etc/nginx/acme-trouble.conf"

#: Paths of pebble's directory.
NEW_ACCOUNT = "/sign-me-up"
NEW_ORDER = "/order-plz"


@dataclass(frozen=True)
class Pair:
    """A certificate chain and its private key, PEM."""

    chain: str
    key: str


class Authority:
    """A certificate authority of the lab's own, for servers that are no relay."""

    def __init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Lab Web CA")])
        # a strict verifier wants to be told what the key is for
        usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
        certificate = (
            self._builder(self._name, self._key.public_key())
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(usage, critical=True)
            .sign(self._key, hashes.SHA256())
        )
        self.certificate = _pem(certificate)

    def issue(self, *names: str, days: int = VALID_DAYS) -> Pair:
        """A certificate for *names*; with negative *days* it has expired."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0])])
        alternatives = x509.SubjectAlternativeName([x509.DNSName(name) for name in names])
        usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])
        certificate = (
            self._builder(subject, key.public_key(), days)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(usage, critical=False)
            .add_extension(alternatives, critical=False)
            .sign(self._key, hashes.SHA256())
        )
        private = key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        return Pair(_pem(certificate) + self.certificate, private.decode())

    def _builder(
        self, subject: x509.Name, key: ec.EllipticCurvePublicKey, days: int = VALID_DAYS
    ) -> x509.CertificateBuilder:
        now = datetime.datetime.now(datetime.timezone.utc)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=2 * VALID_DAYS))
            .not_valid_after(now + datetime.timedelta(days=days))
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()),
                critical=False,
            )
        )


def _pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(serialization.Encoding.PEM).decode()


class Internet:
    """The inet host, and what relays of this internet need of it; it ends with its lab."""

    #: What the operator of a relay of this internet answers to debconf.
    ANSWERS: ClassVar = {"tls": "select acme", "acme_agreement": "boolean true"}

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.authority = Authority()
        self._roots: list[str] = []
        self._relays: list[Host] = []
        image.download(lab.tree, *PACKAGES)
        self.host = host = lab.boot("inet", NUMBER)
        self._places = {
            "server": ROOT_SERVER,
            "acme": ACME_NAME,
            "ipv4": host.namespace.ipv4,
            "ipv6": host.namespace.ipv6,
            "client": IPV4.format(CLIENT),
        }
        host.sh(
            f"apt-get install -qq --yes --no-install-recommends {' '.join(PACKAGES)} >/dev/null",
            timeout=120,
        )
        self._start_names()
        self._start_authority()
        #: DS record of the root zone
        self.anchor = host.exec("keymgr", ".", "ds").out.splitlines()[0]

    @property
    def resolver(self) -> str:
        """The address of a server that answers for every name here; clients ask it."""
        return self.host.address

    # -- names -----------------------------------------------------------------------------------

    def _start_names(self) -> None:
        self.host.write("/etc/knot/knot.conf", KNOT.format(**self._places))
        self.host.write("/var/lib/knot/root.zone", ZONE.format(**self._places))
        self.host.sh("chown knot:knot /var/lib/knot/root.zone; systemctl restart knot")
        wait_for(
            lambda: self.host.exec("keymgr", ".", "ds", check=False).out, 20, "the root zone's key"
        )

    def set(self, name: str, kind: str, *values: str) -> None:
        """Make *values*, in the presentation form of RFC 1035, all records of a name and type."""
        self.edit({(name, kind): values})

    def unset(self, name: str, kind: str) -> None:
        """Remove all records of a name and type."""
        self.edit({(name, kind): ()})

    def edit(self, wanted: Mapping[tuple[str, str], Sequence[str]]) -> None:
        """One signed change of the zone (RFC 2136): (name, type) -> all its values.

        An alias and other records exclude each other: the new ones win.
        """
        update = dns.update.UpdateMessage(dns.name.root)
        for (name, kind), values in wanted.items():
            owner = dns.name.from_text(name)
            update.delete(owner, *(() if kind == "CNAME" else (kind,)))
            if kind != "CNAME":
                update.delete(owner, "CNAME")
            for value in values:
                update.add(owner, TTL, kind, value)
        with self.lab.at_client():
            reply = dns.query.tcp(update, self.host.address, timeout=10)
        if reply.rcode() != dns.rcode.NOERROR:
            raise LabError(f"{dns.rcode.to_text(reply.rcode())}: {update}")

    def publish(self, domain: str, host: Host, *others: str) -> None:
        """Point *domain* to *host* by IPv4 and IPv6, and *others* (such as "www") to *domain*."""
        records = {(domain, "A"): [host.namespace.ipv4], (domain, "AAAA"): [host.namespace.ipv6]}
        records |= {(f"{name}.{domain}", "CNAME"): [f"{domain}."] for name in others}
        self.edit(records)

    def publish_zone(self, domain: str, host: Host) -> None:
        """Everything that the relay's own `chatmail-relay dns --zone` asks for."""
        self.publish(domain, host)
        records: dict[tuple[str, str], list[str]] = {}
        for line in host.exec("chatmail-relay", "dns", "--zone").out.splitlines():
            fields = line.split(None, 4)  # name, TTL, class, type, value
            if not line.startswith(";") and fields and fields[3] not in ("A", "AAAA"):
                records.setdefault((fields[0], fields[3]), []).append(fields[4])
        self.edit(records)

    # -- certificates ----------------------------------------------------------------------------

    def _start_authority(self) -> None:
        pair = self.authority.issue(ACME_NAME, "localhost")
        host = self.host
        host.write("/etc/pebble/cert.pem", pair.chain)
        host.write("/etc/pebble/key.pem", pair.key)
        host.write("/etc/pebble/config.json", json.dumps({"pebble": PEBBLE}))
        host.write("/etc/systemd/system/pebble.service", PEBBLE_UNIT.format(**self._places))
        host.write("/etc/nginx/sites-enabled/default", FRONT.format(**self._places))
        host.sh(
            "systemctl daemon-reload; systemctl enable -q --now pebble; systemctl restart nginx"
        )
        self._wait_authority()

    def _wait_authority(self) -> None:
        """Until pebble answers; what it signs with is new at each of its starts."""

        def root() -> str:
            return self.host.exec("curl", "-sk", "https://127.0.0.1:15000/roots/0", check=False).out

        self.acme_root = wait_for(root, 20, "pebble's root certificate")
        self._roots.append(self.acme_root)

    def restart_authority(self) -> None:
        """The certificate authority forgets every account, and has a new root; all relays trust both."""
        self.host.exec("systemctl", "restart", "pebble")
        self._wait_authority()
        for host in self._relays:
            if host.running:
                self.trust(host)

    @contextmanager
    def authority_down(self) -> Iterator[None]:
        """Nobody listens at the authority's address; it forgets nothing."""
        self.host.exec("systemctl", "stop", "nginx")
        try:
            yield
        finally:
            self._restart_front()

    @contextmanager
    def authority_says(self, path: str, status: int, error: str, detail: str) -> Iterator[None]:
        """*path* of the authority answers with a problem document (RFC 8555 section 6.7)."""
        problem = {
            "type": f"urn:ietf:params:acme:error:{error}",
            "detail": detail,
            "status": status,
        }
        answer = json.dumps(problem).replace("\\", "\\\\").replace("'", "\\'")  # for nginx' quotes
        self.host.write(TROUBLE, f"location = {path} {{ return {status} '{answer}'; }}\n")
        self._restart_front()
        try:
            yield
        finally:
            self.host.exec("rm", TROUBLE)
            self._restart_front()

    def _restart_front(self) -> None:
        """Not a reload: its old workers would still answer. However often tests want it."""
        self.host.sh("systemctl reset-failed nginx; systemctl restart nginx")

    # -- relays ----------------------------------------------------------------------------------

    def relay_host(self, name: str, number: int) -> Host:
        """A machine of this internet at 10.77.0.*number* and fd77::*number*; nothing is installed yet."""
        host = self.lab.boot(name, number)
        # dpkg keeps what lies here in place of dns-root-data's own files
        host.write("/etc/dpkg/dpkg.cfg.d/lab", "path-exclude=/usr/share/dns/root.[kh]*\n")
        host.write("/usr/share/dns/root.key", f"{self.anchor}\n")
        host.write("/usr/share/dns/root.hints", HINTS.format(**self._places))
        host.write("/etc/unbound/unbound.conf.d/lab.conf", UNBOUND)
        host.write("/etc/chatmail/chatmail.ini", SETTINGS)
        self._relays.append(host)
        self.trust(host)
        return host

    def trust(self, host: Host) -> None:
        """Put the authorities of this internet, and no others, into the store of *host*."""
        store = "/usr/local/share/ca-certificates"
        host.write(f"{store}/lab-web.crt", self.authority.certificate)
        for number, root in enumerate(self._roots):
            host.write(f"{store}/lab-acme-{number}.crt", root)
        host.write("/etc/ca-certificates.conf", "# none of Debian's\n")
        host.exec("update-ca-certificates", "--fresh")
