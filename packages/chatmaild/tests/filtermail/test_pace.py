# SPDX-License-Identifier: MIT
"""Refusals of mail from other relays are told at a pace; nothing else waits."""

import time

import pytest
from filtermail_mta import content, mail_from, packet, rcpt_to
from filtermail_process import running
from filtermail_samples import BOB, REMOTE, encrypted_mail

from chatmaild.filtermail.pace import Pace


def test_a_burst_is_free_and_the_rest_has_its_turn_one_after_the_other():
    pace = Pace(10, 3, 20)
    assert [pace.wait(100.0) for _ in range(3)] == pytest.approx([0, 0, 0])
    assert [pace.wait(100.0) for _ in range(3)] == pytest.approx([0.1, 0.2, 0.3])
    assert pace.wait(100.5) == 0
    assert pace.wait(200.0) == 0


def test_nobody_waits_longer_than_the_longest_and_it_ends_soon_after_the_flood():
    pace = Pace(10, 3, 2)
    waits = [pace.wait(0.0) for _ in range(1000)]
    assert max(waits) == pytest.approx(2)
    assert pace.wait(2.5) == 0


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    """Two refusals at once, and then five a second."""
    patch = "service.REFUSALS_PER_SECOND, service.REFUSALS_AT_ONCE = 5, 2\n"
    with running(
        tmp_path_factory.mktemp("pace"), "max_user_send_burst_size = 1000\n", patch=patch
    ) as service:
        yield service


def test_a_flood_of_junk_waits_and_others_do_not(service):
    junk = [service.session("incoming") for _ in range(6)]
    good = service.session("outgoing")
    begin = time.monotonic()

    for session in junk:
        session.send(packet(b"C", b"x\0U") + mail_from(REMOTE) + rcpt_to("nobody@chat.example"))
    assert good.submit(encrypted_mail()).reply == ""
    friendly = time.monotonic() - begin
    for session in junk:
        assert session.outcome().reply.startswith("550 5.1.1")
    took = time.monotonic() - begin

    assert took > 4 / 5 - 0.05  # two at once, then one each 0.2 s
    assert friendly < took / 2


def test_after_its_wait_a_session_goes_on(service):
    session = service.session("incoming")
    session.send(packet(b"C", b"x\0U") + mail_from(REMOTE) + rcpt_to("nobody@chat.example"))
    assert session.outcome().reply.startswith("550 5.1.1")
    session.send(rcpt_to(BOB))
    assert session.outcome().reply == ""
    session.send(content(encrypted_mail(REMOTE)))
    assert session.outcome().reply == "554 5.7.1 No valid DKIM signature found"
