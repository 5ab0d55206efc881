# SPDX-License-Identifier: MIT
"""What the bot is told by the relay: /etc/chatmail/echobot/echobot.ini, rendered by chatmail-relay."""

from __future__ import annotations

import configparser
import os
from dataclasses import dataclass
from pathlib import Path

PATH = Path("/etc/chatmail/echobot/echobot.ini")
SECTION = "echobot"


class SettingsError(Exception):
    """The file is missing or wrong; the text names it and the remedy."""


@dataclass(frozen=True)
class Settings:
    """*address* in lower case; *max_message_size* in octets, as it is sent."""

    address: str
    mailboxes_dir: Path
    max_message_size: int


def read_settings(path: str | os.PathLike[str] = PATH) -> Settings:
    """Raises SettingsError."""
    parser = configparser.ConfigParser(interpolation=None)
    try:
        with open(path, encoding="utf-8") as file:
            parser.read_file(file)
        section = parser[SECTION]
        return Settings(
            section["address"].lower(),
            Path(section["mailboxes_dir"]),
            int(section["max_message_size"]),
        )
    except (OSError, ValueError, KeyError, configparser.Error) as error:
        remedy = "Run chatmail-relay status; chatmail-relay apply writes this file"
        what = str(error).partition("\n")[0]
        raise SettingsError(f"{path}: {what}. {remedy}") from error
