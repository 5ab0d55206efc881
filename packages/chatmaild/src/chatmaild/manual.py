# SPDX-License-Identifier: MIT
"""The manual page chatmail.ini(5), made of the declarations of the settings when the package is built.

usage: python3 -m chatmaild.manual >chatmail.ini.5
"""

from __future__ import annotations

from chatmaild.config import FIELDS, SECTION

HEAD = f"""\
.\\" SPDX-License-Identifier: MIT
.\\" made by chatmaild.manual
.TH CHATMAIL.INI 5 "" chatmail-relay "File formats"
.SH NAME
chatmail.ini \\- settings of a chatmail relay
.SH SYNOPSIS
.I /etc/chatmail/chatmail.ini
.SH DESCRIPTION
One section,
.BR [{SECTION}] ,
and in it a line
.IB key " = " value
for each setting that is not to have its default.
What follows a # or ; at the beginning of a line is a comment.
A value goes on in the next line if that is indented.
.PP
The file is read by
.B "chatmail-relay apply"
alone, which refuses it as a whole if one setting is not valid, with line, value and remedy; nothing has
changed then.
.B "chatmail-relay set"
and
.B "dpkg-reconfigure chatmail-relay"
change values in place and leave comments alone.
Files of other chatmail relays are understood: a setting that means nothing here is a warning that says what
replaces it.
.PP
Where nothing else is said, a size is a number of mebibytes, or one with M or G, and an age is in days.
"""

TAIL = """\
.SH EXAMPLE
.nf
[params]
mail_domain = chat.example.org
delete_mails_after = 30
max_mailbox_size = 1G
.fi
.SH FILES
.TP
.I /etc/chatmail/www/
Pages of the web site that replace the relay's own.
.TP
.I /etc/chatmail/templates/
Templates that replace the relay's own, by the names they have below
.IR /usr/share/chatmail-relay/components/ .
They are yours to keep up to date.
.SH SEE ALSO
.BR chatmail\\-relay (8)
"""


def _roff(text: str) -> str:
    """*text* as roff takes it: no escapes, no requests."""
    plain = text.replace("\\", r"\e").replace("-", r"\-")
    return "\\&" + plain if plain.startswith((".", "'")) else plain


def manual_page() -> str:
    """The page, in the man(7) language."""
    parts = [HEAD]
    for key, item in FIELDS.items():
        if item.metadata["group"]:
            parts.append(f".SH {_roff(item.metadata['group'].upper())}\n")
        default = item.metadata["default"]
        parts.append(f".TP\n.B {_roff(key)}\n{_roff(item.metadata['help'])}\n")
        if default:
            parts.append(f"Default: {_roff(default)}.\n")
    return "".join([*parts, TAIL])


if __name__ == "__main__":
    print(manual_page(), end="")
