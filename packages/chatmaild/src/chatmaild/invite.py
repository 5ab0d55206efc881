# SPDX-License-Identifier: MIT
"""The text of the code (QR or link) by which a client gets an address here.

What Delta Chat makes of it: of `dcaccount:DOMAIN` it invents address and password itself and logs
in; of `dcaccount:https://...` it posts to that URL and logs in with what it is answered.
"""

from __future__ import annotations

from chatmaild.config import Config

# what the client invents for `dcaccount:DOMAIN`, characters
CLIENT_USERNAME = 9
CLIENT_PASSWORD = 22


def invite(config: Config, token: str | None = None) -> str:
    """The code for a new address; "" if there is none: registration is closed, or by token and
    there is no *token*."""
    if config.registration == "closed":
        return ""
    if config.registration == "token":
        return f"dcaccount:{new_url(config, token)}" if token else ""
    fits = (
        not config.is_ip_relay
        and config.username_min_length <= CLIENT_USERNAME <= config.username_max_length
        and config.password_min_length <= CLIENT_PASSWORD
    )
    return f"dcaccount:{config.mail_domain if fits else new_url(config)}"


def new_url(config: Config, token: str | None = None) -> str:
    """The URL that answers with a fresh address and password."""
    url = f"https://{config.mail_host}/new"
    return f"{url}?token={token}" if token else url
