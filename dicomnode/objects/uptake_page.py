"""Uptake curves as one page for a screen: each region where it lies, its curve before and after registration.

Law: as `pages`, nothing of the sources' headers is drawn but modality and series number.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from dicomnode.objects.pages import DIM, FOOT, HEAD, MARK, SIZE, Words, empty_page, text_line, window_of
from dicomnode.uptake import EDGE_MM, WHOLE, Region, Uptake
from registration_engine import pictures
from registration_engine.pictures import INK, font

_COLUMNS, _ROWS, _GAP, _CAPTION, _SIDE = 2, 3, 8, 22, 206


def uptake_page(uptake: Uptake, words: Words, *, unit: str, header: tuple[float, float] | None) -> Image.Image:
    """Draw it: how the regions were chosen and their peaks, then every region.

    Parameters
    ----------
    unit
        Of the values.
    header
        Window Center and Window Width of the reference, if it has them.
    """
    page, draw = empty_page("Uptake: mean of regions over time, before and after registration", words)
    width, height = (SIZE[0] - _GAP) // _COLUMNS, (SIZE[1] - HEAD - FOOT) // _ROWS
    corners = [(_GAP + (n % _COLUMNS) * width, HEAD + (n // _COLUMNS) * height) for n in range(_COLUMNS * _ROWS)]
    _explained(draw, corners[0], uptake, words, width)
    window = window_of(uptake.reference.voxels, uptake.regions[0].mask, header)
    for region, before, after, (x, y) in zip(uptake.regions, uptake.before, uptake.after, corners[1:], strict=False):
        picture, where = _located(uptake, region, window)
        text_line(draw, (x, y + _CAPTION // 2), f"{region.name}: {where}", 14, width - _GAP)
        page.paste(picture, (x, y + _CAPTION))
        chart = pictures.curves(
            {"before": before.tolist(), "registered": after.tolist()},
            title=f"Mean, {unit}",
            across="seconds from the first phase" if uptake.seconds else "phase, from 1",
            up="",
            size=(width - _SIDE - 2 * _GAP, height - _CAPTION - _GAP),
            at=uptake.seconds or range(1, len(before) + 1),
        )
        page.paste(chart, (x + _SIDE + _GAP, y + _CAPTION))
    return page


def _located(uptake: Uptake, region: Region, window: tuple[float, float]) -> tuple[Image.Image, str]:
    """The axial plane through the region's middle in the reference, with its outline; and which slice that is."""
    grid = uptake.reference.grid
    turned, _ = pictures.canonical(region.mask, grid)
    area = turned.sum(axis=(1, 2))
    slices = len(area)
    index = int(np.rint(np.arange(slices) @ area / area.sum()))
    at = index / max(slices - 1, 1)
    cut = pictures.plane(uptake.reference.voxels, grid, "axial", at=at, side=_SIDE)
    inside = pictures.plane(region.mask.astype(np.float32), grid, "axial", at=at, side=_SIDE) > 0.5
    pixels = np.array(pictures.gray(cut, window))
    pixels[_outline(inside)] = MARK
    return Image.fromarray(pixels), f"axial slice {index + 1} of {slices} from the feet"


def _outline(inside: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """The outermost pixels of what is inside."""
    wide = np.pad(inside, 1)
    within = wide[:-2, 1:-1] & wide[2:, 1:-1] & wide[1:-1, :-2] & wide[1:-1, 2:]
    return inside & ~within


def _explained(draw: ImageDraw.ImageDraw, at: tuple[int, int], uptake: Uptake, words: Words, width: int) -> None:
    x, y = at[0] + 8, at[1] + 10
    phases = uptake.before.shape[1]
    left_out = [str(n + 1) for n in range(phases) if np.isnan(uptake.after[0, n])]
    sentences = [
        f"{words.fixed}, {phases} phases. Before: each phase in its own place. Registered: through the field that is "
        "delivered.",
        f"{WHOLE}: the body that every registered phase reaches. Regions: cubes of about {EDGE_MM:g} mm in it. The "
        "first one takes up most, each next one in the way that is least like those before.",
    ]
    if left_out:
        sentences.append(f"Without a registered image: phase {', '.join(left_out)}.")
    for sentence in sentences:
        for line in textwrap.wrap(sentence, 84)[:4]:
            text_line(draw, (x, y), line, 14, width - 24, DIM)
            y += 19
    y += 12
    columns = (x + 190, x + 300, x + 370, x + 500, x + 570)
    time = "at, s" if uptake.seconds else "phase"
    for right, text in zip(columns, ("first", "peak before", time, "peak registered", time), strict=True):
        draw.text((right, y), text, DIM, font(13), "rm")
    for region, before, after in zip(uptake.regions, uptake.before, uptake.after, strict=True):
        y += 22
        draw.text((x, y), region.name, INK, font(14), "lm")
        cells = (_number(before[0]), *_peak(before, uptake.seconds), *_peak(after, uptake.seconds))
        for right, text in zip(columns, cells, strict=True):
            draw.text((right, y), text, INK, font(14), "rm")


def _peak(curve: npt.NDArray[np.float64], seconds: Sequence[float]) -> tuple[str, str]:
    """The value that is farthest from the first one that is known, and when."""
    known = np.flatnonzero(np.isfinite(curve))
    if not known.size:
        return "-", "-"
    peak = int(known[np.abs(curve[known] - curve[known[0]]).argmax()])
    return _number(curve[peak]), f"{seconds[peak]:g}" if seconds else str(peak + 1)


def _number(value: float) -> str:
    return f"{value:.4g}" if np.isfinite(value) else "-"
