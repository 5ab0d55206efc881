# SPDX-License-Identifier: MIT
"""The version of the package; debian/rules writes the one of the changelog in its place."""

VERSION = "0~source"
