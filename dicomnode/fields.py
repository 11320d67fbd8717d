"""What one value of the configuration may be: AE titles, hosts, ports, names."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field


def ae_title(text: str) -> str:
    """`text` if it is an AE title; ValueError otherwise."""
    # PS3.5 Table 6.2-1, VR AE: default repertoire without backslash and control characters, at most 16 bytes,
    # leading and trailing spaces not significant (so refused here, where they can only be a slip).
    if not re.fullmatch(r"[\x20-\x7e]{1,16}", text) or "\\" in text or text != text.strip():
        raise ValueError("an AE title: 1 to 16 ASCII characters, no backslash, no space at either end")
    return text


def matching(pattern: str, expected: str) -> Callable[[str], str]:
    """A check that a text matches a pattern as a whole; ValueError with `expected` otherwise."""

    def check(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise ValueError(expected)
        return text

    return check


def local_path(text: object) -> object:
    """A path with `~` followed; ValueError for an empty one and for what no file system has."""
    if not isinstance(text, str):
        return text
    if not text or "\0" in text:
        raise ValueError("a path")
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise ValueError("a path, its ~ a user of this machine") from None


AETitle = Annotated[str, AfterValidator(ae_title), Field(min_length=1, max_length=16)]
Host = Annotated[str, AfterValidator(matching(r"[^\s/@]+", "a host name or address")), Field(min_length=1)]
HostOrNetwork = Annotated[
    str, AfterValidator(matching(r"[^\s/@]+(/\d{1,3})?", "an address, a network such as 10.1.0.0/16, or a host name"))
]
Port = Annotated[int, Field(strict=True, ge=1, le=65535)]
LocalPath = Annotated[Path, BeforeValidator(local_path)]
Name = Annotated[str, AfterValidator(matching(r"[A-Za-z0-9._-]{1,64}", "1 to 64 letters, digits or . _ -"))]
