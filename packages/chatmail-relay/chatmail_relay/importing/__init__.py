# SPDX-License-Identifier: MIT
"""Taking over a relay that the reference tool (cmdeploy) has deployed: the command `import`.

* `legacy` is what such a machine has: units, programs, configuration, state;
* `steps` are what is done about it, each said before, none of which deletes anything;
* `command` is the command line.

docs/import.md tells administrators of it.
"""

from .command import add_command
from .legacy import ImportProblem

__all__ = ["ImportProblem", "add_command"]
