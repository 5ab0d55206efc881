# SPDX-License-Identifier: MIT
"""The services of a chatmail relay, and the settings they share with the configuration renderer."""
