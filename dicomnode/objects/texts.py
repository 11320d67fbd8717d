"""Our own sentences, and the names of series, as DICOM's value representations hold them."""

from __future__ import annotations

import re

_NAMES = re.compile(r"\{(moving|fixed)\}")


def described(pattern: str, moving: str, fixed: str) -> str:
    """A Series Description, at most 64 characters: the names are cut where both do not fit."""
    names = {"moving": moving, "fixed": fixed}
    used = _NAMES.findall(pattern)
    room = max(64 - len(_NAMES.sub("", pattern)), 0)
    if sum(len(names[name]) for name in used) > room:
        names = {name: text[: room // len(used)] for name, text in names.items()}
    return _NAMES.sub(lambda found: names[found[1]], pattern)[:64]


def long_string(text: str) -> str:
    """Text for VR LO: one line of at most 64 characters."""
    return ascii_text(text)[:64]


def ascii_text(text: str) -> str:
    """Our own sentences in the repertoire that every Specific Character Set has; no backslash."""
    return text.encode("ascii", "replace").decode().replace("\\", "/").replace("\n", " ")
