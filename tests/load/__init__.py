# SPDX-License-Identifier: MIT
"""Load on a relay of the lab, by `make test-load`: not a part of `make test`."""
