# SPDX-License-Identifier: MIT
"""The settings of a relay: one typed model for the renderer and for every service.

The file is an ini with one section, ``[params]``, and the keys of existing chatmail relays, so that
an operator can bring theirs. Every key is declared once, in `Config`, with its parser, default and
help text; the commented default file and the manual page are made from that declaration.

Reading never guesses: an unknown key, a wrong unit or an impossible combination is a `Problem` with
file, line, value and remedy, all of them at once, before anybody acts on half a configuration.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import iniconfig

from . import sizing

SECTION = "params"
DEFAULT_PATH = Path("/etc/chatmail/chatmaild/chatmail.ini")
TURN_PORT = 3478  # UDP (RFC 8656 section 12.3)
SELF_SIGNED_CERT = "/var/lib/chatmail/tls/self-signed.crt"
SELF_SIGNED_KEY = "/var/lib/chatmail/tls/self-signed.key"
ACME_LIVE = "/var/lib/acme/live"  # acmetool's: NAME/fullchain, NAME/privkey
ACME_DIRECTORY = "https://acme-v02.api.letsencrypt.org/directory"
# what the daemons read: a copy of the pair that one of the three ways has brought
LIVE_CERT = "/var/lib/chatmail/tls/live/fullchain.pem"
LIVE_KEY = "/var/lib/chatmail/tls/live/privkey.pem"


class Problem(NamedTuple):
    """One thing wrong with a settings file; *line* is None where no line is to blame."""

    path: str
    line: int | None
    key: str
    value: str
    message: str
    remedy: str

    def __str__(self) -> str:
        where = self.path if self.line is None else f"{self.path}:{self.line}"
        what = f"{self.key} = {self.value}: " if self.key else ""
        return f"{where}: {what}{self.message}. {self.remedy}"


class ConfigError(Exception):
    """The settings file cannot be used; `problems` says why, in the order of the file."""

    def __init__(self, problems: list[Problem]):
        super().__init__("\n".join(str(problem) for problem in problems))
        self.problems = problems


class _Invalid(ValueError):
    """Raised by a parser: args are the message and the remedy."""


# --- parsers: text of the file -> typed value ------------------------------------------------------

_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\Z")
_FIRST_LABEL = re.compile(r"_?[a-z0-9]([a-z0-9-]{0,60}[a-z0-9])?\Z")
_LOCALPART = re.compile(r"[A-Za-z0-9.!#$%&'*+/=?^_`{|}~-]{1,64}\Z")
_PATH = re.compile(r"/[A-Za-z0-9@_./\[\]:+-]*\Z")
#: ProtectHome= and ProtectSystem= of the units
_UNSEEN = ("/home/", "/root/", "/run/", "/usr/", "/etc/", "/boot/")
_SIZE = re.compile(r"([0-9]+)\s*([GM]?)B?\Z", re.IGNORECASE)
_MEGABYTE = 1024 * 1024


def _domain(text: str) -> str:
    name = text.lower()
    example = 'Write a full domain name such as "chat.example.org"'
    if not name.isascii():
        raise _Invalid("not ASCII", "Write an international name in its xn-- form")
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        pass
    else:
        raise _Invalid("an IP address is not a domain name", example)
    if name.endswith("."):
        raise _Invalid("ends with a dot", example)
    labels = name.split(".")
    if len(labels) < 2:
        raise _Invalid("not a full domain name", example)
    if len(name) > 253:
        raise _Invalid("longer than 253 characters", example)
    if not _FIRST_LABEL.match(labels[0]) or not all(_LABEL.match(label) for label in labels[1:]):
        raise _Invalid("not a valid domain name", example)
    if labels[-1].isdigit():
        raise _Invalid("a top-level domain is not a number", example)
    return name


def _mail_domain(text: str) -> str:
    """A domain name, or an IPv4 address as RFC 5321 4.1.3 writes it after the "@": in brackets."""
    literal = re.match(r"\[(.*)\]\Z", text)
    try:
        address = ipaddress.ip_address(literal[1] if literal else text)
    except ValueError:
        return _domain(text)
    if address.version != 4:
        raise _Invalid("an IPv6 address", "Write an IPv4 address, or a domain name")
    if address.is_unspecified or address.is_multicast or address.is_reserved:
        raise _Invalid(
            "no host has this address", "Write the one at which others reach this machine"
        )
    return f"[{address}]"


def _integer(low: int, high: int, unit: str) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not re.match(r"-?[0-9]+\Z", text):
            raise _Invalid("not a whole number", f"Write a number of {unit}")
        if not low <= int(text) <= high:
            raise _Invalid("out of range", f"Write a number of {unit} from {low} to {high}")
        return int(text)

    return parse


def _or_unset(parse: Callable[[str], int]) -> Callable[[str], int | None]:
    """An empty value is as if the line was not there."""
    return lambda text: parse(text) if text else None


def _load(text: str) -> float:
    if not re.match(r"[0-9]+(\.[0-9]+)?\Z", text) or float(text) == 0:
        raise _Invalid("not a load", 'Write a number above 0 such as "5" or "2.5"')
    return float(text)


def _size(text: str) -> int:
    match = _SIZE.match(text)
    if not match:
        raise _Invalid("not a size", 'Write a size such as "500M" or "2G"')
    return int(match[1]) * _MEGABYTE * (1024 if match[2].upper() == "G" else 1)


def _boolean(text: str) -> bool:
    if text.lower() in ("true", "yes", "on", "1"):
        return True
    if text.lower() in ("false", "no", "off", "0"):
        return False
    raise _Invalid("neither true nor false", 'Write "true" or "false"')


def _text(text: str) -> str:
    if any(ord(char) < 32 and char != "\n" for char in text):
        raise _Invalid("contains control characters", "Write plain text")
    return text


def is_address(text: str) -> bool:
    """Whether *text* is one plain mail address, user@domain (RFC 5321 dot-string only)."""
    local, separator, domain = text.rpartition("@")
    try:
        check = _mail_domain if domain.startswith("[") else _domain
        return bool(separator and _LOCALPART.match(local) and check(domain))
    except _Invalid:
        return False


def _address(text: str) -> str:
    if text and not is_address(text):
        raise _Invalid("not a mail address", 'Write an address such as "admin@example.org"')
    return text


def _username(text: str) -> str:
    if not re.match(r"[a-z0-9_-][a-z0-9._-]{0,63}\Z", text):
        raise _Invalid("not a name before the @", 'Write a short name such as "echo"')
    return text


def _senders(text: str) -> list[str]:
    for item in text.split():
        if not is_address(item):
            raise _Invalid(f"{item} is not a mail address", "Separate full addresses by spaces")
    return [item.lower() for item in text.split()]


def _recipients(text: str) -> list[str]:
    for item in text.split():
        if not is_address("user" + item if item.startswith("@") else item):
            raise _Invalid(
                f"{item} is neither an address nor @domain", "Separate addresses by spaces"
            )
    return [item.lower() for item in text.split()]


def _path(text: str) -> str:
    if not _PATH.match(text) or ".." in text.split("/"):
        raise _Invalid(
            "not a plain absolute path", "Write a path that starts with / and has no spaces"
        )
    return os.path.normpath(text)


def _mailboxes_dir(text: str) -> str:
    path = _path(text)
    if path.replace("//", "/").startswith(_UNSEEN):
        raise _Invalid(
            "a place that the services do not see or may not write to",
            "Choose one such as /srv/mail, or mount the disk on /var/lib/chatmail/mail",
        )
    return path


def _cert_and_key(text: str) -> tuple[str, str] | None:
    if not text:
        return None
    paths = text.split()
    if len(paths) != 2:
        raise _Invalid(
            "not exactly two paths",
            'Write the certificate chain and the key: "/etc/ssl/x/fullchain.pem /etc/ssl/x/key.pem"',
        )
    return _path(paths[0]), _path(paths[1])


def _tls(text: str) -> str | None:
    if not text:
        return None  # as if the line was not there
    if text not in ("acme", "external", "self"):
        raise _Invalid("unknown way to get a certificate", 'Write "acme", "external" or "self"')
    return text


def _directory(text: str) -> str:
    if not re.match(r"https://[a-z0-9.-]+(:[0-9]{1,5})?/[A-Za-z0-9/._~-]*\Z", text):
        raise _Invalid(
            "not the URL of an ACME directory", f'Write a URL such as "{ACME_DIRECTORY}"'
        )
    return text


def _registration(text: str) -> str:
    if text not in ("open", "closed", "token"):
        raise _Invalid("unknown way to register", 'Write "open", "closed" or "token"')
    return text


def _url(text: str) -> str:
    if text and not re.match(r"https?://[a-z0-9.-]+(:[0-9]{1,5})?(/[!-~]*)?\Z", text):
        raise _Invalid("not a URL", 'Write a URL such as "https://iroh.example.org", or nothing')
    return text


_NOTIFICATION_URL = 'Write a URL such as "https://notifications.delta.chat/notify", or nothing'


def _notification_url(text: str) -> str:
    match = re.match(r"(https?)://([a-z0-9.-]+|\[::1\])(?::([0-9]{1,5}))?(?:/[!-~]*)?\Z", text)
    if text and (not match or not 0 < int(match[3] or 443) < 65536):
        raise _Invalid("not a URL", _NOTIFICATION_URL)
    if match and match[1] == "http" and not re.match(r"127\.[0-9.]+\Z|\[::1\]\Z", match[2]):
        raise _Invalid("not encrypted", "Write https://; http:// is for loopback addresses")
    return text


def _proxy(text: str) -> str:
    match = re.match(r"http://([a-z0-9.-]+|\[[0-9a-f:]+\]):([0-9]{1,5})/?\Z", text)
    if text and (not match or not 0 < int(match[2]) < 65536):
        raise _Invalid("not an HTTP proxy", 'Write it as "http://proxy.example.org:3128"')
    return text


def _selector(text: str) -> str:
    if not re.match(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\Z", text):
        raise _Invalid("not a DKIM selector", 'Write a short name such as "chatmail"')
    return text


def _host(text: str) -> str:
    if text and not re.match(r"[a-zA-Z0-9.:-]+\Z", text):
        raise _Invalid("not an address to listen on", 'Write an address such as "127.0.0.1"')
    return text


def _port_range(text: str) -> str:
    match = re.match(r"([0-9]{1,5})-([0-9]{1,5})\Z", text)
    if not match or not 1024 <= int(match[1]) <= int(match[2]) <= 65535:
        raise _Invalid("not a range of ports", 'Write two ports above 1023: "49152-65535"')
    if int(match[1]) <= TURN_PORT <= int(match[2]):
        raise _Invalid(f"includes {TURN_PORT}", "Leave out the port on which clients ask")
    return f"{int(match[1])}-{int(match[2])}"


def _networks(text: str) -> list[str]:
    example = 'Separate addresses or networks by spaces: "192.0.2.7 2001:db8::/32"'
    networks = []
    for item in text.split():
        try:
            network = ipaddress.ip_network(item)
        except ValueError as error:
            raise _Invalid(f"{item} is not an address or network", example) from error
        networks.append(str(network) if "/" in item else str(network.network_address))
    return networks


# --- the model -------------------------------------------------------------------------------------


def _setting(parse: Callable[[str], Any], default: str | None, help: str, group: str = "") -> Any:
    return field(
        metadata={"parse": parse, "default": default, "help": help, "group": group}, default=None
    )


@dataclass(frozen=True, kw_only=True)
class Config:
    """The settings of one relay. Sizes are bytes, ages are days; see each field's help text."""

    mail_domain: str = _setting(
        _mail_domain,
        None,
        'What follows the "@" in the addresses of this relay. A name that starts with "_" has a '
        "self-signed certificate that clients accept. In place of a name the IPv4 address of this "
        'machine may stand: addresses are then of the form "user@[192.0.2.1]".',
        "The relay",
    )
    tls: str = _setting(
        _tls,
        None,
        'Where the certificate comes from: "acme" (a certificate authority such as Let\'s Encrypt, '
        'renewed by itself), "external" (the files of tls_external_cert_and_key, taken over whenever '
        'they change) or "self" (made by the relay). If unset: external where those files are given, '
        'self for an address or a mail_domain that starts with "_", else acme.',
    )
    tls_external_cert_and_key: tuple[str, str] | None = _setting(
        _cert_and_key, "", "Paths of the certificate chain and of its private key, PEM."
    )
    disable_ipv6: bool = _setting(_boolean, "false", "Listen on IPv4 only.")
    dkim_selector: str = _setting(
        _selector,
        "chatmail",
        "Name of the DKIM key in the DNS: SELECTOR._domainkey.DOMAIN.",
    )
    dkim_ed25519: bool = _setting(
        _boolean,
        "false",
        "Sign with a second key, Ed25519, too. Publish SELECTOR-ed25519._domainkey.DOMAIN first.",
    )

    max_user_send_per_minute: int = _setting(
        _integer(1, 100000, "messages a minute"),
        "60",
        "Messages a minute one address may send on average.",
        "Limits",
    )
    max_user_send_burst_size: int = _setting(
        _integer(1, 100000, "messages"), "10", "Messages one address may send at once."
    )
    max_mailbox_size: int = _setting(
        _size, "500M", "Storage of one mailbox; a bare number is in megabytes."
    )
    max_message_size: int = _setting(
        _integer(65536, 1 << 30, "bytes"),
        "31457280",
        "Size of one message as sent, in bytes. A file grows by about 40 % on the way.",
    )
    max_imap_connections: int = _setting(
        _or_unset(_integer(10, 1000000, "connections")),
        None,
        "IMAP sessions at a time. If unset: as many as memory, cores and open files of this machine "
        'allow; "chatmail-relay status" says which of them is least. Two cores and 8 GB have 10000.',
    )
    max_smtp_connections: int = _setting(
        _or_unset(_integer(5, 100000, "connections")),
        None,
        "Submission sessions at a time on each port; one client address may have a fifth of them, or "
        "ten. If unset: by memory and cores, 1000 for two cores and 24 GB.",
    )
    max_connections_per_client: int = _setting(
        _or_unset(_integer(5, 1000000, "connections")),
        None,
        "Connections to 443 and 993 at a time for one client: an IPv4 address, or an IPv6 network of "
        "64 bits. Many people may be behind one. If unset: a fifth of max_imap_connections, at "
        "least 200.",
    )

    registration: str = _setting(
        _registration,
        "open",
        'Who gets a new address: everybody ("open"), nobody ("closed"), or who was given a token '
        'by "chatmail-relay token create" ("token").',
        "New addresses",
    )
    max_new_addresses_per_hour: int = _setting(
        _integer(1, 1000000, "addresses an hour"),
        "60",
        "New addresses an hour for one source: an IPv4 address, or an IPv6 network of 64 bits.",
    )
    username_min_length: int = _setting(
        _integer(1, 64, "characters"),
        "9",
        'Length of the part before the "@" in a new address. Clients invent 9 characters.',
    )
    username_max_length: int = _setting(_integer(1, 64, "characters"), "9", "The longest one.")
    password_min_length: int = _setting(
        _integer(1, 128, "characters"), "9", "Clients invent 22 characters."
    )
    max_load_1m: float = _setting(
        _load, "5", "No new addresses while the load average of one minute is above this."
    )
    min_available_memory: int = _setting(
        _size, "200M", "No new addresses while less memory than this is available."
    )
    min_free_disk_space: int = _setting(
        _size, "1G", "No new addresses while less disk space than this is free."
    )

    delete_mails_after: int = _setting(
        _integer(1, 36500, "days"), "20", "Days until a message is deleted.", "Retention"
    )
    delete_large_after: int = _setting(
        _integer(1, 36500, "days"), "7", "Days until a read message above 200 kB is deleted."
    )
    delete_inactive_users_after: int = _setting(
        _integer(1, 36500, "days"), "90", "Days without login until an address is deleted."
    )

    passthrough_senders: list[str] = _setting(
        _senders,
        "",
        "Addresses of this relay that may send unencrypted mail, separated by spaces.",
        "Exceptions from encryption",
    )
    passthrough_recipients: list[str] = _setting(
        _recipients,
        "",
        'Addresses, or "@domain", that may be sent unencrypted mail, separated by spaces.',
    )

    privacy_postal: str = _setting(
        _text, "", "Postal address of the operator, for the privacy page.", "Contact"
    )
    privacy_mail: str = _setting(_address, "", "Mail address of the operator.")
    privacy_pdo: str = _setting(_text, "", "Data protection officer.")
    privacy_supervisor: str = _setting(_text, "", "Supervisory authority.")
    acme_email: str = _setting(
        _address, "", "Contact address for the certificate authority.", "Services"
    )
    acme_agreement: bool = _setting(
        _boolean,
        "false",
        "Whether you agree to the terms of service of the certificate authority; it issues nothing "
        "before. Their address is logged when the relay registers there.",
    )
    acme_directory: str = _setting(
        _directory,
        ACME_DIRECTORY,
        "Directory of the certificate authority (RFC 8555). Another one takes effect with the next "
        "certificate, which is asked for at once.",
    )
    iroh_relay: str | None = _setting(
        _url,
        None,
        "URL of another iroh relay, for live connections between webxdc apps. If unset this relay "
        "offers its own, if empty none is announced and clients choose one.",
    )
    https_delivery: bool = _setting(
        _boolean,
        "yes",
        "Exchange mail with other relays over HTTPS where both can, and over SMTP else; if not, over "
        "SMTP only.",
    )
    turn_port_range: str = _setting(
        _port_range,
        "49152-65535",
        "UDP ports through which calls are relayed, one for each side of a call. Open them and "
        "3478 in a firewall.",
    )
    notification_url: str = _setting(
        _notification_url,
        "https://notifications.delta.chat/notify",
        "Where the tokens of devices go when there is new mail, so that phones wake up; nothing else "
        "is sent there. If empty no device is woken.",
    )
    notification_proxy: str = _setting(
        _proxy,
        "",
        "HTTP proxy to reach it, such as http://proxy.example.org:3128.",
    )
    metrics_allow: list[str] = _setting(
        _networks,
        "",
        "Addresses or networks that may read https://DOMAIN/metrics, separated by spaces.",
    )
    mtail_address: str = _setting(
        _host,
        "",
        "Address of mtail's port 3903, if chatmail-mtail-conf is installed; else loopback.",
    )
    echobot_name: str = _setting(
        _username,
        "echo",
        'What stands before the "@" in the address of the echo bot, if chatmail-echobot is '
        "installed. Nobody else gets it.",
    )
    imap_rawlog: bool = _setting(
        _boolean, "false", "Keep what clients say in *.in and *.out files. For debugging only."
    )
    imap_compress: bool = _setting(_boolean, "false", "Offer IMAP COMPRESS.")
    mailboxes_dir: str = _setting(
        _mailboxes_dir,
        None,
        "Directory of the mailboxes. If unset: /var/lib/chatmail/mail/DOMAIN. It is made if it is not "
        "there; mailboxes that exist are not moved.",
    )

    @property
    def mail_host(self) -> str:
        """Where clients and other relays connect: the mail domain, or the address in its brackets."""
        return self.mail_domain.strip("[]")

    @property
    def is_ip_relay(self) -> bool:
        """Whether an IPv4 address stands in place of a name: no DNS, no DKIM, a certificate nobody
        vouches for."""
        return self.mail_domain.startswith("[")

    @property
    def is_underscore_domain(self) -> bool:
        """Clients and relays accept a self-signed certificate of a name that starts with "_"."""
        return self.mail_domain.startswith("_")

    @property
    def certificate_source(self) -> tuple[str, str]:
        """Paths of the certificate chain and its key, PEM, where the way of `tls` puts them.

        Daemons read LIVE_CERT and LIVE_KEY, to which `chatmail-relay` copies what is good there.
        """
        if self.tls == "external" and self.tls_external_cert_and_key:
            return self.tls_external_cert_and_key
        if self.tls == "acme":
            folder = f"{ACME_LIVE}/{self.mail_domain}"
            return f"{folder}/fullchain", f"{folder}/privkey"
        return SELF_SIGNED_CERT, SELF_SIGNED_KEY

    @property
    def iroh_relay_url(self) -> str:
        """The iroh relay that clients are told, "" for none.

        Clients never accept a self-signed certificate there, so our own is then offered without
        TLS; what passes it is encrypted between the clients.
        """
        if self.iroh_relay is not None:
            return self.iroh_relay
        return f"{'http' if self.tls == 'self' else 'https'}://{self.mail_host}"


FIELDS = {item.name: item for item in dataclasses.fields(Config)}

# keys of older relays that mean nothing any more, and what to do about each
OBSOLETE = {
    "www_folder": "Put your own pages into /etc/chatmail/www/",
    "filtermail_smtp_port": "The filter listens on a unix socket",
    "filtermail_smtp_port_incoming": "The filter listens on a unix socket",
    "filtermail_http_port_incoming": "The filter listens on a unix socket",
    "filtermail_lmtp_port_transport": "The filter listens on a unix socket",
    "filtermail_host": "The filter listens on a unix socket",
    "postfix_host": "The filter listens on a unix socket",
    "postfix_reinject_port": "Messages are not re-injected any more",
    "postfix_reinject_port_incoming": "Messages are not re-injected any more",
    "passdb_path": "Passwords are files in the mailboxes",
    "turn_socket_path": "TURN credentials are made without a socket",
}


def read_settings(
    path: str | os.PathLike[str], text: str | None = None
) -> tuple[Config, list[Problem]]:
    """Read and validate a settings file (or *text* in its place) into settings and warnings.

    Raises ConfigError with every problem found: unreadable file, syntax, unknown or repeated key,
    wrong type, value out of range, values that contradict each other.
    """
    name = os.fspath(path)
    ini = _parse_ini(name, text)
    problems: list[Problem] = []
    warnings: list[Problem] = []
    values: dict[str, Any] = {}
    lines: dict[str, int | None] = {}

    def problem(key: str, message: str, remedy: str, into: list[Problem] = problems) -> None:
        shown = section.get(key, "").replace("\n", " ") if key in section else ""
        into.append(Problem(name, lines.get(key), key, shown, message, remedy))

    for other in ini.sections:
        if other != SECTION:
            problems.append(
                Problem(
                    name,
                    _lineno(ini, other),
                    f"[{other}]",
                    "",
                    "unknown section",
                    f"Put all settings into [{SECTION}]",
                )
            )
    section: dict[str, str] = dict(ini.sections.get(SECTION, {}))
    for key in section:
        lines[key] = _lineno(ini, SECTION, key)
        if key in OBSOLETE:
            problem(key, "has no effect any more", f"{OBSOLETE[key]}; remove the line", warnings)
        elif key not in FIELDS:
            problem(key, "unknown setting", _suggest(key))
    for key, item in FIELDS.items():
        raw = section.get(key, item.metadata["default"])
        if raw is None:
            values[key] = None
            continue
        if key == "mail_domain" and not raw:
            values[key] = None
            continue
        try:
            values[key] = item.metadata["parse"](raw)
        except _Invalid as error:
            problem(key, *error.args)
    if "mail_domain" in values and values["mail_domain"] is None:
        problem(
            "mail_domain",
            "not set",
            'Run "dpkg-reconfigure chatmail-relay", or "chatmail-relay set mail_domain=NAME"',
        )
    if not problems:
        _check_together(values, problem)
    if problems:
        raise ConfigError(problems)
    _fill_derived(values)
    config = Config(**values)
    _warn(config, section, lambda key, message, remedy: problem(key, message, remedy, warnings))
    return config, warnings


def read_config(path: str | os.PathLike[str] = DEFAULT_PATH) -> Config:
    """Read the settings file of a running service; raises ConfigError, ignores warnings."""
    return read_settings(path)[0]


def _parse_ini(name: str, text: str | None) -> iniconfig.IniConfig:
    try:
        if text is None:
            text = Path(name).read_text(encoding="utf-8")
        return iniconfig.IniConfig(name, data=text)
    except UnicodeDecodeError as error:
        problem = Problem(
            name, None, "", "", f"not UTF-8 at byte {error.start}", "Save the file as UTF-8"
        )
    except OSError as error:
        problem = Problem(
            name,
            None,
            "",
            "",
            f"cannot be read: {error.strerror}",
            'Run "dpkg-reconfigure chatmail-relay"',
        )
    except iniconfig.ParseError as error:
        problem = Problem(
            name, error.lineno + 1, "", "", error.msg, 'Write one "key = value" a line'
        )
    raise ConfigError([problem])


def _lineno(ini: iniconfig.IniConfig, section: str, key: str | None = None) -> int | None:
    line = ini.lineof(section, key)
    return None if line is None else int(line)


def _suggest(key: str) -> str:
    import difflib

    near = difflib.get_close_matches(key, FIELDS, n=1)
    return f"Did you mean {near[0]}?" if near else "Remove the line; see chatmail.ini(5)"


def _check_together(values: dict[str, Any], problem: Callable[[str, str, str], None]) -> None:
    if values["username_min_length"] > values["username_max_length"]:
        problem("username_min_length", "above username_max_length", "Make it the smaller one")
    if values["max_message_size"] > values["max_mailbox_size"]:
        problem("max_message_size", "above max_mailbox_size", "Make it the smaller one")
    if values["tls"] == "external" and not values["tls_external_cert_and_key"]:
        problem("tls", "no certificate is given", "Set tls_external_cert_and_key as well")
    if values["tls"] == "acme" and values["mail_domain"].startswith(("_", "[")):
        remedy = "Set tls = self, or a mail_domain that is in the DNS"
        problem("tls", "no certificate authority knows such a name", remedy)
    if values["min_free_disk_space"] == 0:
        problem("min_free_disk_space", "leaves no room", 'Write at least "1M"')


def _fill_derived(values: dict[str, Any]) -> None:
    if values["tls"] is None:
        own = "self" if values["mail_domain"].startswith(("_", "[")) else "acme"
        values["tls"] = "external" if values["tls_external_cert_and_key"] else own
    if values["mailboxes_dir"] is None:
        values["mailboxes_dir"] = f"/var/lib/chatmail/mail/{values['mail_domain'].strip('[]')}"
    if None in (values["max_imap_connections"], values["max_smtp_connections"]):
        fit = sizing.sizes(sizing.Machine.this())
        if values["max_imap_connections"] is None:
            values["max_imap_connections"] = fit.imap
        if values["max_smtp_connections"] is None:
            values["max_smtp_connections"] = fit.smtp
    if values["max_connections_per_client"] is None:
        values["max_connections_per_client"] = max(values["max_imap_connections"] // 5, 200)


def _warn(config: Config, section: dict[str, str], warn: Callable[[str, str, str], None]) -> None:
    if not config.username_min_length <= 9 <= config.username_max_length:
        key = "username_min_length" if config.username_min_length > 9 else "username_max_length"
        warn(key, "keeps clients out that invent 9 characters", "Let the range include 9")
    if config.password_min_length > 22:
        warn(
            "password_min_length", "keeps clients out that invent 22 characters", "Write at most 22"
        )
    if config.tls == "self" and not config.is_underscore_domain and not config.is_ip_relay:
        warn(
            "tls",
            "clients and other relays refuse a self-signed certificate of this name",
            'Set tls = acme or external, or a mail_domain that starts with "_"',
        )
    if config.tls == "acme" and not config.acme_agreement:
        warn(
            "acme_agreement",
            "no certificate is asked for without it",
            "Set it to true if you agree to the terms of the certificate authority",
        )


def render_ini(config_text: dict[str, str], header: str) -> str:
    """The settings in force as a complete file, for services: explicit values, else defaults."""
    lines = [f"# {header}", f"[{SECTION}]"]
    for key, item in FIELDS.items():
        value = config_text.get(key, item.metadata["default"])
        if value is not None:
            lines.append(f"{key} = " + value.replace("\n", "\n    "))
    return "\n".join(lines) + "\n"


def explicit_values(path: str | os.PathLike[str], text: str | None = None) -> dict[str, str]:
    """The settings written in the file, as text, without validation; {} for a missing file."""
    if text is None and not Path(path).exists():
        return {}
    return dict(_parse_ini(os.fspath(path), text).sections.get(SECTION, {}))


def default_ini() -> str:
    """The commented file a new relay starts with: every setting, its help, its default."""
    out = [
        "# Settings of this chatmail relay; see chatmail.ini(5).",
        '# This file is the truth: edit it and run "chatmail-relay apply", or run',
        '# "dpkg-reconfigure chatmail-relay". Answers are written into it in place, your comments stay.',
        f"[{SECTION}]",
    ]
    for key, item in FIELDS.items():
        if item.metadata["group"]:
            out += ["", f"# --- {item.metadata['group']} ---"]
        out += ["", *_comment(item.metadata["help"])]
        default = item.metadata["default"]
        out.append(f"{key} =" if key == "mail_domain" else f"# {key} = {default or ''}".rstrip())
    return "\n".join(out) + "\n"


def _comment(text: str) -> Iterable[str]:
    import textwrap

    return textwrap.wrap(text, 96, initial_indent="# ", subsequent_indent="# ")


def edit_ini(text: str, changes: dict[str, str]) -> str:
    """*text* with each key of *changes* set in place; comments and order stay (debconf-devel(7)).

    An active line is replaced, with its indented continuation lines; else the commented default
    line of that key is brought to life; else the line is added at the end of the section.
    """
    lines = text.splitlines() or [f"[{SECTION}]"]
    for key, value in changes.items():
        new = f"{key} = {value}".rstrip().replace("\n", "\n    ").split("\n")
        active = re.compile(rf"{re.escape(key)}\s*[=:]")
        dormant = re.compile(rf"[#;]\s*{re.escape(key)}\s*[=:]")
        places = [i for i, line in enumerate(lines) if active.match(line)]
        if not places:
            places = [i for i, line in enumerate(lines) if dormant.match(line)][-1:]
        if places:
            end = places[-1] + 1
            while end < len(lines) and lines[end][:1].isspace() and lines[end].strip():
                end += 1
            lines[places[-1] : end] = new
        else:
            if not any(line.strip() == f"[{SECTION}]" for line in lines):
                lines.append(f"[{SECTION}]")
            lines += new
    return "\n".join(lines) + "\n"
