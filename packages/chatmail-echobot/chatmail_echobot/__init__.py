# SPDX-License-Identifier: MIT
"""The echo bot of a chatmail relay: a Delta Chat contact that sends back text and files.

    cli       the command chatmail-echobot(8)
    settings  the file the relay renders for it
    state     what it keeps: key, password, invitation codes
    account   makes its account, the one step with rights in the mail store
    service   the loop: mailbox in, answers out
    imap      just enough of an IMAP client
    smtp      one submission
    bot       whom it answers, and what
    mime      reads messages from files, writes answers to files
    autocrypt the Autocrypt header (https://docs.autocrypt.org/level1.html)
    openpgp   OpenPGP, by the program rsop

It knows nobody: the key for an answer is in the message that is answered, so nothing about its peers is
ever stored. Memory: message bodies pass through files; rsop takes six times the size of one message.
"""
