"""Who gives a command, for the record. Law: a name there always is, in a container without accounts too."""

from __future__ import annotations

import getpass
import os


def account() -> str:
    """The name of the account that this process runs under, or its number where it has none."""
    try:
        return getpass.getuser()
    except (KeyError, ImportError, OSError):  # which of them, depends on the version of Python
        return f"account {os.getuid()}"
