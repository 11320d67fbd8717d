"""Draws the same coronal and axial slice before and after registration, and the pages of quality that came back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont
from pydicom import Dataset

from dicomnode.demo.evaluation import Series, read_series
from dicomnode.phantom import PhantomStudy

Gray = npt.NDArray[np.float32]
Color = npt.NDArray[np.uint8]

WINDOW_HU = (-160.0, 240.0)
PIXELS_PER_MM = 1.25
GAP, TITLE = 10, 34
OUTLINE = (255, 214, 10)
EDGES_HU = (-400.0, -30.0)
"""Outlines are drawn between lung and tissue, and between fat and tissue."""


def draw_before_after(study: PhantomStudy, registered: Series | None, path: Path) -> None:
    """Write the picture. Without a registered series its two columns stay black.

    The slices are those near the middle in which fixed and moving differ most.
    """
    fixed, moving = read_series(study.fixed_files), read_series(study.moving_files)
    after = registered.voxels if registered is not None else np.full_like(fixed.voxels, -1000)
    spacing = np.array([abs(fixed.planes[1, 2] - fixed.planes[0, 2]), *fixed.planes[0, 9:11]])
    difference = np.abs(np.clip(fixed.voxels, *WINDOW_HU) - np.clip(moving.voxels, *WINDOW_HU))
    rows = []
    for axis, name in ((1, "coronal"), (0, "axial")):
        middle = slice(3 * fixed.voxels.shape[axis] // 8, 5 * fixed.voxels.shape[axis] // 8)
        most = middle.start + int(difference.mean(axis=tuple({0, 1, 2} - {axis}))[middle].argmax())
        planes = [np.take(voxels, most, axis=axis) for voxels in (fixed.voxels, moving.voxels, after)]
        shown = _body(planes[0])
        still, before, done = (_square(plane[shown], np.delete(spacing, axis), flip=axis == 1) for plane in planes)
        rows.append([
            (f"Native (fixed), {name}", _gray(still)),
            ("Portal venous as sent + outlines of native", _outlined(before, still)),
            ("Portal venous registered + outlines of native", _outlined(done, still)),
            ("Before: native green, portal venous magenta", _overlaid(still, before)),
            ("After: native green, registered magenta", _overlaid(still, done)),
        ])  # fmt: skip
    _page(rows).save(path)


def draw_pages(pages: Sequence[Dataset], folder: Path) -> None:
    """Secondary Capture images as `page-N.png`, as a viewer shows them."""
    folder.mkdir(parents=True, exist_ok=True)
    for page in pages:
        Image.fromarray(page.pixel_array).save(folder / f"page-{page.InstanceNumber}.png")


def _body(plane: Gray) -> tuple[slice, slice]:
    """The part of a slice that holds the body, with some air around it."""
    rows, columns = (np.flatnonzero((plane > -300).any(axis=axis)) for axis in (1, 0))
    top, left = max(rows[0] - 4, 0), max(columns[0] - 4, 0)
    return slice(top, rows[-1] + 5), slice(left, columns[-1] + 5)


def _square(plane: Gray, spacing: npt.NDArray[np.float64], *, flip: bool) -> Gray:
    """A slice in square pixels, upside down where its first row is at the feet."""
    height, width = np.rint(np.array(plane.shape) * spacing * PIXELS_PER_MM).astype(int).tolist()
    image = Image.fromarray(plane[::-1] if flip else plane)
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC), np.float32)


def _windowed(plane: Gray) -> Color:
    low, high = WINDOW_HU
    return np.asarray(np.clip((plane - low) / (high - low), 0, 1) * 255, np.uint8)


def _gray(plane: Gray) -> Color:
    return np.repeat(_windowed(plane)[..., None], 3, axis=2)


def _outlined(plane: Gray, outlines_of: Gray) -> Color:
    smooth = outlines_of
    for axis in (0, 1):
        smooth = np.mean([np.roll(smooth, shift, axis) for shift in (-2, -1, 0, 1, 2)], axis=0, dtype=np.float32)
    picture = _gray(plane)
    for edge in EDGES_HU:
        inside = smooth > edge
        picture[(inside ^ np.roll(inside, 1, 0)) | (inside ^ np.roll(inside, 1, 1))] = OUTLINE
    return picture


def _overlaid(green: Gray, magenta: Gray) -> Color:
    return np.stack([_windowed(magenta), _windowed(green), _windowed(magenta)], axis=-1)


def _page(rows: list[list[tuple[str, Color]]]) -> Image.Image:
    width = max(sum(picture.shape[1] + GAP for _, picture in row) for row in rows) + GAP
    height = sum(row[0][1].shape[0] + TITLE + GAP for row in rows) + GAP
    page = Image.new("RGB", (width, height), (24, 26, 30))
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(size=16)
    y = GAP
    for row in rows:
        x = GAP
        for title, picture in row:
            pen.text((x + 2, y + TITLE - 10), title, fill=(235, 235, 235), font=font, anchor="ls")
            page.paste(Image.fromarray(picture), (x, y + TITLE))
            x += picture.shape[1] + GAP
        y += row[0][1].shape[0] + TITLE + GAP
    return page
