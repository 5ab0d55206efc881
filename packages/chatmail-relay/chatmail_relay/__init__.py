# SPDX-License-Identifier: MIT
"""The brain of a chatmail relay: renders the configuration of every daemon from one settings file."""
