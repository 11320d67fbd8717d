"""The mark of a registration that was accepted with a warning: seen in the list of series, in the image, and in words.

Law: pixels stay as they are. The mark on the image is an overlay plane, which viewers draw over it and anybody can
switch off; multi-frame instances cannot have one.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from pydicom import Dataset

MARK = "CHECK! "
"""Stands first in the Series Description of everything that was made with a warning."""
_TEXTS = ("CHECK REGISTRATION", "CHECK")
_GROUP = 0x6000


def marked(description: str, warning: str) -> str:
    """A Series Description, with the mark first where there is a warning; at most 64 characters."""
    return f"{MARK}{description}"[:64] if warning and not description.startswith(MARK) else description[:64]


def mark_image(dataset: Dataset, warning: str) -> None:
    """Write the reason into Image Comments, and the mark over the image, PS3.3 C.9.2; nothing without a warning.

    Parameters
    ----------
    dataset
        An image whose Rows and Columns stand.
    warning
        Our own sentence; empty where there is none.
    """
    if not warning:
        return
    text = f"{MARK}Registration accepted with a warning, look at it before use: {warning}"
    dataset.ImageComments = text.encode("ascii", "replace").decode().replace("\\", "/")[:1024]
    rows, columns = int(dataset.Rows), int(dataset.Columns)
    if "NumberOfFrames" in dataset or (drawn := _drawn(rows, columns)) is None:
        return
    packed = np.packbits(drawn.ravel(), bitorder="little").tobytes()
    for element, vr, value in (
        (0x0010, "US", rows),
        (0x0011, "US", columns),
        (0x0022, "LO", "Accepted with a warning"),
        (0x0040, "CS", "G"),
        (0x0050, "SS", [1, 1]),
        (0x0100, "US", 1),
        (0x0102, "US", 0),
        (0x1500, "LO", "CHECK"),
        (0x3000, "OW", packed + b"\0" * (len(packed) % 2)),
    ):
        dataset.add_new((_GROUP, element), vr, value)


def _drawn(rows: int, columns: int) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]] | None:
    """The mark at the top middle, larger on larger images; None where the image is too small for it."""
    font = ImageFont.load_default(size=max(10, columns // 24))
    for text in _TEXTS:
        image = Image.new("1", (columns, rows))
        draw = ImageDraw.Draw(image)
        left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
        if right - left <= columns - 4 and bottom - top <= rows // 3:
            draw.text(((columns - (right - left)) // 2 - left, 2 - top), text, fill=1, font=font)
            return np.asarray(image, dtype=bool)
    return None
