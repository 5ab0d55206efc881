# SPDX-License-Identifier: MIT
"""Settings are typed, complete, and refused with file, line, value and remedy."""

import pytest
from chatmaild.config import (
    FIELDS,
    ConfigError,
    default_ini,
    edit_ini,
    explicit_values,
    is_address,
    read_settings,
    render_ini,
)

DOMAIN = "[params]\nmail_domain = chat.example.org\n"


def read(text):
    return read_settings("test.ini", text)


def problems(text):
    with pytest.raises(ConfigError) as caught:
        read(text)
    return caught.value.problems


def test_defaults_are_those_of_existing_relays():
    config, _warnings = read(DOMAIN)
    assert (config.max_user_send_per_minute, config.max_user_send_burst_size) == (60, 10)
    assert config.max_mailbox_size == 500 * 2**20
    assert config.mailboxes_dir == "/var/lib/chatmail/mail/chat.example.org"
    assert config.iroh_relay is None and config.passthrough_senders == []


@pytest.mark.parametrize(
    ("text", "connections"),
    [
        ("max_imap_connections = 100", 200),
        ("max_imap_connections = 50000", 10000),
        ("max_connections_per_client = 7", 7),
    ],
)
def test_one_client_may_hold_a_fifth_of_the_connections_unless_said_otherwise(text, connections):
    assert read(DOMAIN + text)[0].max_connections_per_client == connections


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("", "https://chat.example.org"),
        ("tls = self", "http://chat.example.org"),
        ("tls_external_cert_and_key = /c /k", "https://chat.example.org"),
        ("iroh_relay = https://iroh.example", "https://iroh.example"),
        ("iroh_relay =", ""),
    ],
)
def test_the_own_iroh_relay_is_announced_unless_another_or_none_is_wanted(text, url):
    assert read(DOMAIN + text)[0].iroh_relay_url == url


@pytest.mark.parametrize(
    "url", ["", "https://push.example.org:8443/x", "http://127.0.0.1:8080/n", "http://[::1]/"]
)
def test_notifications_go_encrypted_or_to_loopback_or_nowhere(url):
    assert read(DOMAIN + f"notification_url = {url}")[0].notification_url == url
    assert read(DOMAIN)[0].notification_url == "https://notifications.delta.chat/notify"
    proxy = "notification_proxy = http://[2001:db8::1]:3128"
    assert read(DOMAIN + proxy)[0].notification_proxy == "http://[2001:db8::1]:3128"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("mail_domain", "chat", "not a full domain name"),
        ("mail_domain", "chat..example", "not a valid domain name"),
        ("mail_domain", "a._b.example", "not a valid domain name"),
        ("mail_domain", "bücher.example", "not ASCII"),
        ("mail_domain", "2001:db8::1", "an IPv6 address"),
        ("mail_domain", "[::1]", "an IPv6 address"),
        ("mail_domain", "0.0.0.0", "no host has this address"),
        ("mail_domain", "224.0.0.1", "no host has this address"),
        ("mail_domain", "192.0.2", "a top-level domain is not a number"),
        ("mail_domain", "192.0.2.256", "a top-level domain is not a number"),
        ("mail_domain", "[192.0.2.1", "an IP address"),
        ("mail_domain", "chat.example.org.", "ends with a dot"),
        ("mail_domain", ".".join(["a" * 60] * 5), "longer than 253"),
        ("max_user_send_per_minute", "0", "out of range"),
        ("max_user_send_per_minute", "six", "not a whole number"),
        ("max_mailbox_size", "5T", "not a size"),
        ("max_message_size", "-1", "out of range"),
        ("delete_mails_after", "2.5", "not a whole number"),
        ("username_max_length", "65", "out of range"),
        ("username_min_length", "10", "above username_max_length"),
        ("max_message_size", "1073741824", "above max_mailbox_size"),
        ("max_load_1m", "0", "not a load"),
        ("disable_ipv6", "maybe", "neither true nor false"),
        ("imap_rawlog", "", "neither true nor false"),
        ("passthrough_senders", "a@b.example nobody", "nobody is not a mail address"),
        ("passthrough_recipients", "@x.example y", "y is neither"),
        ("privacy_mail", "me", "not a mail address"),
        ("tls", "magic", "unknown way"),
        ("acme_directory", "", "not the URL"),
        ("acme_directory", "http://acme.example/dir", "not the URL"),
        ("acme_agreement", "perhaps", "neither true nor false"),
        ("tls", "external", "no certificate is given"),
        ("tls_external_cert_and_key", "/a", "not exactly two paths"),
        ("tls_external_cert_and_key", "/a b", "not a plain absolute path"),
        ("mailboxes_dir", "mail", "not a plain absolute path"),
        ("mailboxes_dir", "/x/../etc", "not a plain absolute path"),
        ("mailboxes_dir", "/home/vmail/mail", "do not see or may not write to"),
        ("mailboxes_dir", "/srv//../etc/mail", "not a plain absolute path"),
        ("mailboxes_dir", "//etc/mail", "do not see or may not write to"),
        ("iroh_relay", "ftp://x", "not a URL"),
        ("dkim_selector", "a.b", "not a DKIM selector"),
        ("notification_url", "ftp://x/", "not a URL"),
        ("notification_url", "https://x:99999/", "not a URL"),
        ("notification_url", "https://user:x@example.org/", "not a URL"),
        ("notification_url", "http://example.org/notify", "not encrypted"),
        ("notification_url", "http://127.0.0.1.example.org/", "not encrypted"),
        ("notification_proxy", "https://x:3128", "not an HTTP proxy"),
        ("notification_proxy", "http://x", "not an HTTP proxy"),
        ("notification_proxy", "http://x:0", "not an HTTP proxy"),
        ("turn_port_range", "50000", "not a range of ports"),
        ("turn_port_range", "80-90", "not a range of ports"),
        ("turn_port_range", "50001-50000", "not a range of ports"),
        ("turn_port_range", "50000-65536", "not a range of ports"),
        ("turn_port_range", "1024-65535", "includes 3478"),
        ("mtail_address", "a b", "not an address"),
        ("echobot_name", "Echo Bot", "not a name before the @"),
        ("max_mailbox_sise", "1G", "unknown setting"),
    ],
)
def test_an_invalid_setting_is_refused_with_line_value_and_remedy(key, value, message):
    domain = "" if key == "mail_domain" else "mail_domain = a.example\n"
    text = f"# a comment\n\n[params]\n{domain}{key} = {value}\n"
    found = problems(text)
    assert [problem.key for problem in found] == [key]
    assert found[0].path == "test.ini"
    assert found[0].line == (4 if key == "mail_domain" else 5)
    assert found[0].value == value
    assert message in found[0].message
    assert found[0].remedy


def test_all_problems_are_told_at_once():
    text = DOMAIN + "tls = x\ndelete_mails_after = x\nfoo = x\n"
    assert {problem.line for problem in problems(text)} == {3, 4, 5}


def test_a_missing_domain_a_wrong_section_and_bad_syntax_are_problems():
    assert problems("[params]\n")[0].message == "not set"
    assert problems(DOMAIN + "[other]\nx = 1\n")[0].message == "unknown section"
    assert problems("[params]\nno equals sign\n")[0].line == 2
    assert "duplicate" in problems(DOMAIN + "mail_domain = b.example\n")[0].message


def test_an_unreadable_file_is_a_problem(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        read_settings(tmp_path / "missing.ini")
    (tmp_path / "latin1.ini").write_bytes(b"[params]\nprivacy_pdo = M\xfcller\n")
    with pytest.raises(ConfigError, match="not UTF-8"):
        read_settings(tmp_path / "latin1.ini")


def test_keys_of_older_relays_are_warnings_that_name_a_replacement():
    _config, warnings = read(DOMAIN + "tls = self\nfiltermail_smtp_port = 10080\n")
    assert any(w.key == "filtermail_smtp_port" and "unix socket" in w.remedy for w in warnings)


def test_a_self_signed_ordinary_domain_is_a_warning_an_underscore_domain_is_not():
    assert [w.key for w in read(DOMAIN + "tls = self\n")[1]] == ["tls"]
    assert read("[params]\nmail_domain = _alpha.example\n")[1] == []


@pytest.mark.parametrize(
    ("text", "tls"),
    [
        (DOMAIN, "acme"),
        (DOMAIN + "tls_external_cert_and_key = /c /k\n", "external"),
        ("[params]\nmail_domain = _alpha.example\n", "self"),
        ("[params]\nmail_domain = _alpha.example\ntls =\n", "self"),
    ],
)
def test_the_way_to_a_certificate_follows_from_the_rest_of_the_file(text, tls):
    assert read(text)[0].tls == tls


def test_acme_without_agreement_is_a_warning_and_for_an_underscore_domain_an_error():
    assert [w.key for w in read(DOMAIN)[1]] == ["acme_agreement"]
    assert read(DOMAIN + "acme_agreement = yes\n")[1] == []
    (problem,) = problems("[params]\nmail_domain = _alpha.example\ntls = acme\n")
    assert problem.key == "tls" and "certificate authority" in problem.message


def test_the_source_of_the_certificate_is_that_of_the_way_in_force():
    live = "/var/lib/acme/live/chat.example.org"
    assert read(DOMAIN)[0].certificate_source == (f"{live}/fullchain", f"{live}/privkey")
    assert read(DOMAIN + "tls_external_cert_and_key = /c /k")[0].certificate_source == ("/c", "/k")
    own = read("[params]\nmail_domain = _alpha.example\n")[0].certificate_source
    assert own == ("/var/lib/chatmail/tls/self-signed.crt", "/var/lib/chatmail/tls/self-signed.key")


def test_sizes_have_the_units_of_existing_relays():
    for text, size in (("100", 100), ("100M", 100), ("100MB", 100), ("2G", 2048), ("2gb", 2048)):
        assert read(DOMAIN + f"max_mailbox_size = {text}\n")[0].max_mailbox_size == size * 2**20


def test_the_default_file_names_every_setting_and_is_valid_once_the_domain_is_set():
    text = default_ini()
    assert all(f"{key} =" in text for key in FIELDS)
    assert read(edit_ini(text, {"mail_domain": "_a.example"}))[0].mail_domain == "_a.example"


def test_edits_keep_comments_and_order():
    text = "; top\n[params]\n# about\nmail_domain = a.example\n# tls = self\n\n# end\n"
    changed = edit_ini(text, {"mail_domain": "b.example", "tls": "self", "privacy_pdo": "me\nyou"})
    assert changed == (
        "; top\n[params]\n# about\nmail_domain = b.example\ntls = self\n\n# end\n"
        "privacy_pdo = me\n    you\n"
    )
    assert edit_ini(changed, {"privacy_pdo": "x"}).endswith("# end\nprivacy_pdo = x\n")


def test_the_rendered_file_gives_services_the_same_settings():
    text = DOMAIN + "max_mailbox_size = 1G\nprivacy_postal = a\n  b\n"
    rendered = render_ini(explicit_values("test.ini", text), "header")
    assert read(rendered)[0] == read(text)[0]


@pytest.mark.parametrize("written", ["192.0.2.1", "[192.0.2.1]"])
def test_an_ipv4_address_stands_in_place_of_the_domain(written):
    config, warnings = read(f"[params]\nmail_domain = {written}\n")
    assert config.is_ip_relay and not warnings
    assert config.mail_domain == "[192.0.2.1]"  # as in user@[192.0.2.1]
    assert config.mail_host == "192.0.2.1"
    assert config.tls == "self"
    assert config.mailboxes_dir == "/var/lib/chatmail/mail/192.0.2.1"
    assert config.iroh_relay_url == "http://192.0.2.1"


def test_addresses_of_such_a_relay_can_be_named_in_settings():
    text = "[params]\nmail_domain = 192.0.2.1\npassthrough_senders = bot@[192.0.2.1]\n"
    assert read(text)[0].passthrough_senders == ["bot@[192.0.2.1]"]
    assert not is_address("bot@192.0.2.1") and not is_address("bot@[::1]")


def test_a_name_is_its_own_host():
    config = read(DOMAIN)[0]
    assert config.mail_host == config.mail_domain == "chat.example.org" and not config.is_ip_relay
