"""Pictures for people who judge a registration: checkerboard, red and green overlay, maps in colour, curves, sheets.

Arrays and volumes in, Pillow images out; files belong to the caller. Planes are turned the radiological way: axial
with the front up and the patient's left on the right, coronal and sagittal with the head up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from registration_engine.volume import Grid

Array = npt.NDArray[np.float32] | npt.NDArray[np.float64]
Plane = Literal["axial", "coronal", "sagittal"]
PLANES: Mapping[Plane, int] = {"axial": 0, "coronal": 1, "sagittal": 2}
"""Which canonical axis is the normal."""

INK, PAPER, FAINT = (235, 235, 235), (18, 18, 20), (90, 90, 96)
LINES = ((230, 159, 0), (86, 180, 233), (0, 158, 115), (204, 121, 167), (240, 228, 66), (213, 94, 0))
"""Okabe and Ito's colours: told apart by the colour-blind too."""
HEAT = ((0, 0, 4), (81, 18, 124), (183, 55, 121), (252, 137, 97), (252, 253, 191))
"""Dark to light, for magnitudes."""
DIVERGING = ((33, 102, 172), (146, 197, 222), (247, 247, 247), (244, 165, 130), (178, 24, 43))
"""Blue below, white at, red above the middle."""
_LARGEST = 4096  # pixels along a side


@dataclass(frozen=True, eq=False)
class Turned:
    """The axes of a volume turned foot to head, front to back, right to left.

    Attributes
    ----------
    spacing_mm
        Along each.
    directions
        (3, 3), unit vectors in LPS, one row for each; those of an oblique volume lie between the patient's axes.
    """

    spacing_mm: tuple[float, ...]
    directions: npt.NDArray[np.float64]

    def letters(self, which: Plane) -> tuple[str, str, str, str]:
        """Where top, right, bottom and left of a plane point: of A, P, H, F, L, R those that count, strongest first."""
        head, back, left = self.directions
        down, right = {"axial": (back, left), "coronal": (-head, left), "sagittal": (-head, back)}[which]
        return _letters(-down), _letters(right), _letters(down), _letters(-right)


def plane(voxels: Array, grid: Grid, which: Plane, *, at: float = 0.5, side: int = 320) -> Array:
    """Cut one plane out of a volume, square pixels, turned as a radiologist expects.

    Parameters
    ----------
    voxels
        (Z, Y, X) on `grid`, in any orientation.
    at
        Where along the normal, 0 = foot, back … 1 = head; counted towards the feet-to-head, front-to-back or
        right-to-left end of the patient.
    side
        Pixels along the longer side.

    Returns
    -------
    np.ndarray
        (rows, columns); NaN stays NaN.
    """
    turned, axes = canonical(voxels, grid)
    axis = PLANES[which]
    index = min(max(round(at * (turned.shape[axis] - 1)), 0), turned.shape[axis] - 1)
    cut = np.take(turned, index, axis=axis)
    rows_mm, columns_mm = (s for n, s in enumerate(axes.spacing_mm) if n != axis)
    if which != "axial":
        cut = cut[::-1]
    extent = cut.shape[0] * rows_mm, cut.shape[1] * columns_mm
    shape = [max(1, round(side * e / max(extent))) for e in extent]
    at_rows, at_columns = ((np.arange(n) + 0.5) * m / n - 0.5 for n, m in zip(shape, cut.shape, strict=True))
    return _interpolated(np.asarray(cut, dtype=np.float32), at_rows, at_columns)


def canonical(voxels: npt.NDArray[Any], grid: Grid) -> tuple[npt.NDArray[Any], Turned]:
    """A view of the volume with axes foot to head, front to back, right to left of the patient, and what they are."""
    directions = grid.affine[:3, :3] / grid.spacing_mm
    # LPS: world axis 2 grows to the head, 1 to the back, 0 to the left.
    order: list[int] = []
    for world in (2, 1, 0):
        strength = np.abs(directions[world]).copy()
        strength[order] = -1
        order.append(int(strength.argmax()))
    signs = [1.0 if directions[world, axis] >= 0 else -1.0 for world, axis in zip((2, 1, 0), order, strict=True)]
    turned = np.transpose(voxels, order)[tuple(slice(None, None, int(sign)) for sign in signs)]
    spacing = tuple(float(grid.spacing_mm[axis]) for axis in order)
    toward = np.stack([sign * directions[:, axis] for sign, axis in zip(signs, order, strict=True)])
    return turned, Turned(spacing, toward)


def gray(cut: Array, window: tuple[float, float]) -> Image.Image:
    """One plane in gray, black at the window's lower end, white at its upper."""
    return Image.fromarray(_bytes(cut, window)).convert("RGB")


def checkerboard(fixed: Array, moving: Array, windows: Sequence[tuple[float, float]], *, tiles: int = 8) -> Image.Image:
    """Tiles of the fixed and of the other image by turns: edges run through where the two agree."""
    rows, columns = np.indices(fixed.shape)
    tile = max(1, max(fixed.shape) // tiles)
    first = (rows // tile + columns // tile) % 2 == 0
    return Image.fromarray(np.where(first, _bytes(fixed, windows[0]), _bytes(moving, windows[1]))).convert("RGB")


def red_green(fixed: Array, moving: Array, windows: Sequence[tuple[float, float]]) -> Image.Image:
    """Fixed in red, the other image in green: yellow where both are bright."""
    red, green = _bytes(fixed, windows[0]), _bytes(moving, windows[1])
    return Image.fromarray(np.stack([red, green, np.zeros_like(red)], axis=-1))


def heat_map(
    cut: Array, limits: tuple[float, float], *, colors: Sequence[tuple[int, int, int]] = HEAT, unit: str = ""
) -> Image.Image:
    """A map in colour with its scale on the right; NaN is black."""
    low, high = limits
    share = np.clip((cut - low) / (high - low if high > low else 1.0), 0, 1)
    picture = Image.fromarray(colored(share, colors))
    bar = np.repeat(np.linspace(1, 0, picture.height, dtype=np.float32)[:, None], 12, axis=1)
    sheet_ = Image.new("RGB", (picture.width + 72, picture.height), PAPER)
    sheet_.paste(picture, (0, 0))
    sheet_.paste(Image.fromarray(colored(bar, colors)), (picture.width + 6, 0))
    draw = ImageDraw.Draw(sheet_)
    for value, y, anchor in (
        (high, 0, "lt"),
        ((low + high) / 2, picture.height // 2, "lm"),
        (low, picture.height, "lb"),
    ):
        draw.text((picture.width + 22, y), f"{value:.3g} {unit}".strip(), INK, font(12), anchor)
    return sheet_


def curves(
    series: Mapping[str, Sequence[float]],
    *,
    title: str,
    across: str,
    up: str,
    size: tuple[int, int] = (720, 400),
    at: Sequence[float] = (),
) -> Image.Image:
    """Curves over phases, one colour each, with axes and a legend. Values that are not finite are left out.

    Parameters
    ----------
    at
        Where each value stands, rising; by default at 0, 1, 2 ...
    """
    picture = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(picture)
    left, top, right, bottom = 76, 40, size[0] - 20, size[1] - 52
    finite = [v for values in series.values() for v in values if np.isfinite(v)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 1.0)
    # A curve that hardly changes shall look like one.
    lack = max(0.05 * max(abs(low), abs(high)) - (high - low), 0.0) or (0.0 if high > low else 1.0)
    low, high = low - lack / 2, high + lack / 2
    longest = max((len(values) for values in series.values()), default=1)
    for tick in np.linspace(low, high, 5):
        y = bottom - (tick - low) / (high - low) * (bottom - top)
        draw.line((left, y, right, y), FAINT)
        draw.text((left - 8, y), f"{tick:.4g}", INK, font(12), "rm")
    places = list(at) or [float(n) for n in range(longest)]
    start, span = (places[0], places[-1] - places[0] or 1.0) if places else (0.0, 1.0)
    xs = [left + (place - start) / span * (right - left) for place in places]
    for tick in _ticks(start, start + span) if at else range(0, longest, max(1, longest // 10)):
        draw.text((left + (tick - start) / span * (right - left), bottom + 6), f"{tick:.4g}", INK, font(12), "mt")
    for n, (name, values) in enumerate(series.items()):
        color = LINES[n % len(LINES)]
        points = [
            (x, bottom - (v - low) / (high - low) * (bottom - top))
            for x, v in zip(xs, values, strict=False)
            if np.isfinite(v)
        ]
        if len(points) > 1:
            draw.line(points, color, 2)
        for x, y in points:
            draw.ellipse((x - 2, y - 2, x + 2, y + 2), color)
        draw.line((left + 160 * n, 24, left + 160 * n + 18, 24), color, 3)
        draw.text((left + 160 * n + 24, 24), name, color, font(13), "lm")
    draw.text((left, 8), title, INK, font(13), "lm")
    draw.text(((left + right) / 2, size[1] - 14), across, INK, font(12), "mm")
    draw.text((8, top - 12), up, INK, font(12), "lm")
    return picture


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers from `low` to `high`, ten at most."""
    power = 10.0 ** np.floor(np.log10((high - low) / 10))
    step = next(step for step in (power, 2 * power, 5 * power, 10 * power) if (high - low) / step <= 9)
    return [float(n * step) for n in range(int(np.ceil(low / step)), int(np.floor(high / step)) + 1)]


def sheet(rows: Sequence[Sequence[tuple[str, Image.Image]]]) -> Image.Image:
    """Pictures side by side and one row under the other, each with a line of text above it."""
    gap, caption = 8, 20
    heights = [max(picture.height for _, picture in row) + caption + gap for row in rows]
    columns = max(len(row) for row in rows)
    widths = [max(row[c][1].width for row in rows if c < len(row)) + gap for c in range(columns)]
    whole = Image.new("RGB", (sum(widths) + gap, sum(heights) + gap), PAPER)
    draw = ImageDraw.Draw(whole)
    for r, row in enumerate(rows):
        y = gap + sum(heights[:r])
        for c, (text, picture) in enumerate(row):
            x = gap + sum(widths[:c])
            draw.text((x, y + caption // 2), text, INK, font(13), "lm")
            whole.paste(picture, (x, y + caption))
    whole.thumbnail((_LARGEST, _LARGEST))
    return whole


def window_of(voxels: Array) -> tuple[float, float]:
    """The 0.5 and 99.5 percentiles of an image: black and white for `gray` and its kin."""
    sample = voxels.ravel()[:: max(1, voxels.size // 1_000_000)]
    low, high = np.percentile(sample[np.isfinite(sample)], [0.5, 99.5])
    return float(low), float(high)


def _letters(direction: npt.NDArray[np.float64]) -> str:
    """PS3.3 C.7.6.1.1.1: the patient's directions along a vector in LPS."""
    names = [pair[int(value < 0)] for pair, value in zip(("LR", "PA", "HF"), direction, strict=True)]
    order = sorted(range(3), key=lambda n: -abs(direction[n]))
    return "".join(names[n] for n in order if abs(direction[n]) > 0.3)


def _interpolated(cut: Array, rows: Array, columns: Array) -> Array:
    """Linear interpolation at the outer product of two lists of continuous indices, clamped."""
    for axis, positions in enumerate((rows, columns)):
        last = cut.shape[axis] - 1
        at = np.clip(positions, 0, last)
        lower = np.minimum(at.astype(int), max(last - 1, 0))
        part = (at - lower).astype(np.float32)
        part = part[:, None] if axis == 0 else part
        upper = np.minimum(lower + 1, last)
        mixed = np.take(cut, lower, axis) * (1 - part) + np.take(cut, upper, axis) * part
        cut = np.asarray(mixed, dtype=np.float32)
    return cut


def _bytes(cut: Array, window: tuple[float, float]) -> npt.NDArray[np.uint8]:
    low, high = window
    share = np.clip((cut - low) / (high - low if high > low else 1.0), 0, 1)
    return np.asarray(np.nan_to_num(share) * 255, dtype=np.uint8)


def colored(share: Array, colors: Sequence[tuple[int, int, int]]) -> npt.NDArray[np.uint8]:
    """Values 0…1 (...) in colour (..., 3); NaN is black."""
    stops = np.linspace(0, 1, len(colors))
    known = np.nan_to_num(share).astype(np.float64)
    bands = [np.interp(known, stops, [color[band] for color in colors]) for band in range(3)]
    return np.asarray(np.stack(bands, -1) * np.isfinite(share)[..., None], dtype=np.uint8)


def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The one typeface of all pictures."""
    return ImageFont.load_default(size)
