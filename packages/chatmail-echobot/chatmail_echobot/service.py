# SPDX-License-Identifier: MIT
"""The loop: what is in the inbox is answered and removed, then wait for more.

A message is removed after its answer was taken by the relay, so a crash repeats an answer and loses
none. While the relay takes nothing from us (its limit is for us, too) the message waits.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from chatmail_echobot import imap, smtp
from chatmail_echobot.bot import Bot, Ignored
from chatmail_echobot.settings import Settings
from chatmail_echobot.state import Identity

HOST = "127.0.0.1"
IDLE_SECONDS = 1500.0  # RFC 2177: less than half an hour
SESSION_SECONDS = 43200.0  # then a new login: the expiry of idle accounts goes by logins
FIRST_PAUSE, LAST_PAUSE = 1.0, 60.0  # seconds between tries, doubled each time
TRIES = 8  # to hand over one answer: four minutes

log = logging.getLogger("echobot")


def pauses() -> Callable[[], float]:
    """Each call returns the next pause in seconds."""
    following = FIRST_PAUSE

    def pause() -> float:
        nonlocal following
        now, following = following, min(following * 2, LAST_PAUSE)
        return now

    return pause


class Service:
    """run() never returns; it survives whatever the relay or a peer does."""

    def __init__(self, settings: Settings, identity: Identity) -> None:
        self._settings = settings
        self._identity = identity
        self._sender = smtp.Sender(HOST, identity.address, identity.password)
        self._bot = Bot(identity, self._sender.send)

    def run(self) -> None:
        """Serve the mailbox; after any trouble log in again."""
        pause = pauses()
        while True:
            try:
                with imap.Session(HOST) as session:
                    session.login(self._identity.address, self._identity.password)
                    session.select()
                    log.info("logged in")
                    pause = pauses()
                    self._serve(session)
            except (OSError, imap.ImapError) as error:
                seconds = pause()
                log.warning("%s, next try in %g s", _describe(error), seconds)
                time.sleep(seconds)

    def _serve(self, session: imap.Session) -> None:
        end = time.monotonic() + SESSION_SECONDS
        while time.monotonic() < end:
            for uid in session.uids():
                self._take(session, uid)
            session.idle(IDLE_SECONDS)

    def _take(self, session: imap.Session, uid: int) -> None:
        message = session.fetch(uid, self._settings.max_message_size)
        if message is None:
            log.info("ignored: too long")
        else:
            with message:
                pause = pauses()
                for _ in range(TRIES):
                    try:
                        log.info("%s", self._bot.handle(message))
                        break
                    except Ignored as reason:
                        log.info("ignored: %s", reason)
                        break
                    except smtp.Refused as error:
                        log.warning("answer refused: %s", error)
                        break
                    except smtp.Temporary as error:
                        log.info("the relay is busy: %s", error)
                        time.sleep(pause())
                        message.seek(0)
                    except Exception as error:
                        # no text of it: it may quote the message
                        log.error("cannot handle a message: %s", type(error).__name__)
                        break
        session.delete(uid)


def _describe(error: Exception) -> str:
    return str(error) if isinstance(error, imap.ImapError) else type(error).__name__
