# SPDX-License-Identifier: MIT
"""Delivery between relays over HTTPS, both ways; Postfix' smtp(8) is the way around it.

    __main__    sockets, start and end of the process
    sending     from smtp(8) to the peer's /mxdeliv
    receiving   from nginx' /mxdeliv to a smtpd(8) that judges as on port 25
    peers       which domains take HTTPS (bounded, in memory)
    locate      a domain's hosts and addresses, from the DNS
    link        one HTTPS connection
    limits      what one peer may have
    smtp        SMTP lines, replies and data: no I/O

Sending. Postfix sends mail for other domains to "[127.0.0.1]:10083, DOMAIN": here first, and what is
refused here for now, or not at all because nobody listens, goes to DOMAIN's MX by SMTP in the same
delivery attempt (smtp(8), fallback of destinations). So there is no deferral, no second queue, no
SMTP client of ours, and this service can stop no mail. It answers 4xx for a peer that is not known to
take HTTPS, and for whatever the peer refuses.

A peer takes HTTPS if `GET https://MXHOST/mxdeliv` says 405: the reference system does, and we do.
The question is asked at the first message; that message waits sending.PROBE_PATIENCE at most. A peer
that fails is left alone for peers.FORGET_SECONDS.

The request: POST /mxdeliv, X-MAIL-FROM (absent for the null sender), one X-MAIL-TO for each recipient,
the body as in SMTP DATA: dot-stuffed, CRLF, without the final dot. 200 is success, 413 too large,
anything else a refusal that may have an SMTP reply as its text.
"""
