"""The quality of a registration as pages for a screen: figures, and three planes in the key slices.

Law: nothing of the sources' headers is drawn but modality and series number, so that no page names a patient.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from dicomnode.quality import Figures, Mask, Quality
from registration_engine import pictures
from registration_engine.pictures import DIVERGING, HEAT, INK, PAPER, Plane, font

Window = tuple[float, float]
SIZE = (1280, 1024)
"""(columns, rows) of every page, so that a viewer shows a stack of one size."""
_GAP, _CAPTION, HEAD, FOOT, _BAR = 8, 20, 56, 26, 32
_COLUMNS, _ROWS = 4, 3
MARK, DIM = (255, 214, 102), (150, 150, 156)
_BADGES = {"ACCEPT": (0, 135, 95), "WARN": (200, 135, 0), "REJECT": (200, 50, 30)}


@dataclass(frozen=True)
class Words:
    """What a page says beside figures and pictures; ASCII.

    Attributes
    ----------
    fixed, moving
        `CT series 2`.
    verdict, meaning, reason
        ACCEPT, WARN or REJECT; in words; why, or empty.
    made_by
        Lines on software, rule, preset, model and device.
    are_alike
        Both images are of one modality: their difference means something.
    is_deformable
        There is something beyond the linear stage.
    """

    fixed: str
    moving: str
    verdict: str
    meaning: str
    reason: str
    made_by: Sequence[str]
    are_alike: bool
    is_deformable: bool


@dataclass(frozen=True)
class _Scales:
    """Limits that all pages share, so that one colour is one value throughout."""

    windows: tuple[Window, Window]
    patch: float
    gain: float
    length: float
    log_jacobian: float


def pages(quality: Quality, words: Words, windows: tuple[Window, Window]) -> Iterator[tuple[str, Image.Image]]:
    """Title and picture: the figures; each plane where the change is largest; each plane where agreement is lowest.

    Parameters
    ----------
    windows
        Black and white of the fixed and of the moving image.
    """
    scales = _scales(quality, words, windows)
    yield "Figures", _figures_page(quality, words)
    change = np.where(quality.body, _motion(quality, words), 0)
    for which in pictures.PLANES:
        profile = _profile(change, quality, which).sum(axis=1)
        yield _plane_page(quality, words, scales, which, int(profile.argmax()), "where the change is largest")
    after = quality.patches[1]
    measured = np.isfinite(after)
    for which in pictures.PLANES if measured.any() else ():
        size = _profile(measured, quality, which).sum(axis=1)
        total = _profile(np.nan_to_num(after), quality, which).sum(axis=1)
        # A slice that holds little of the body says little.
        mean = np.where(size >= 0.25 * size.max(), total / np.maximum(size, 1), np.inf)
        yield _plane_page(quality, words, scales, which, int(mean.argmin()), "where agreement is lowest")


def window_of(image: npt.NDArray[np.float32], body: Mask, header: tuple[float, float] | None) -> Window:
    """Black and white of an image: the header's center and width where they fit its values, else percentiles.

    A window that shows less than a tenth of the body between black and white fits nothing.
    """
    inside = image[body] if body.any() else image.ravel()
    inside = inside[:: max(1, inside.size // 1_000_000)]
    if header is not None and header[1] > 0:
        low, high = header[0] - header[1] / 2, header[0] + header[1] / 2
        if np.mean((inside > low) & (inside < high)) >= 0.1:
            return low, high
    low, high = (float(p) for p in np.percentile(inside, [0.5, 99.5]))
    return low, high


def _motion(quality: Quality, words: Words) -> npt.NDArray[np.float32]:
    return quality.nonlinear if words.is_deformable else quality.displacement


def _profile(values: npt.NDArray[Any], quality: Quality, which: Plane) -> npt.NDArray[Any]:
    """(slices along the plane's normal, everything else)."""
    turned, _ = pictures.canonical(values, quality.fixed.grid)
    return np.moveaxis(turned, pictures.PLANES[which], 0).reshape(turned.shape[pictures.PLANES[which]], -1)


def _scales(quality: Quality, words: Words, windows: tuple[Window, Window]) -> _Scales:
    before, after = quality.patches
    known = np.concatenate([m[np.isfinite(m)] for m in (before, after)])
    gain = np.abs(after - before)
    logs = np.abs(np.log2(np.clip(quality.jacobian[quality.body], 0.01, 100)))
    lengths = _motion(quality, words)[quality.body]
    return _Scales(
        windows,
        patch=float(np.percentile(known, 99.5)) if known.size else 1.0,
        gain=max(float(np.nanpercentile(gain, 99.5)), 0.05) if np.isfinite(gain).any() else 1.0,
        length=max(float(lengths.max(initial=0.0)), 0.5),
        log_jacobian=max(float(np.percentile(logs, 99.5)) if logs.size else 0.0, 0.1),
    )


def _plane_page(
    quality: Quality, words: Words, scales: _Scales, which: Plane, index: int, why: str
) -> tuple[str, Image.Image]:
    grid = quality.fixed.grid
    turned, axes = pictures.canonical(quality.body, grid)
    normal = pictures.PLANES[which]
    slices = turned.shape[normal]
    rows, columns = (n * mm for k, (n, mm) in enumerate(zip(turned.shape, axes.spacing_mm, strict=True)) if k != normal)
    cell = ((SIZE[0] - _GAP) // _COLUMNS - _GAP, (SIZE[1] - HEAD - FOOT - _BAR) // _ROWS - _CAPTION - _GAP)
    per_mm = min(cell[0] / columns, cell[1] / rows)
    side = max(int(per_mm * max(rows, columns)), 1)

    def cut(values: npt.NDArray[np.float32]) -> npt.NDArray[Any]:
        return pictures.plane(values, grid, which, at=index / max(slices - 1, 1), side=side)

    fixed, before, after = (cut(v.voxels) for v in (quality.fixed, quality.unmoved, quality.registered))
    body = cut(quality.body.astype(np.float32)) > 0.5

    def mapped(values: npt.NDArray[np.float32]) -> npt.NDArray[Any]:
        return np.where(body, cut(values), np.float32(np.nan))

    window, other = scales.windows
    jacobian = np.log2(np.clip(mapped(quality.jacobian), 0.01, 100))
    limits = (-scales.log_jacobian, scales.log_jacobian)
    ticks = [f"{2.0**x:.2f}" for x in (limits[0], 0.0, limits[1])]
    motion = "Displacement beyond linear, mm" if words.is_deformable else "Displacement, mm"
    tiles = [
        (f"Fixed: {words.fixed}", pictures.gray(fixed, window), None),
        (f"Moving before: {words.moving}", pictures.gray(before, other), None),
        ("Moving, registered", pictures.gray(after, other), None),
        _comparison(words, scales, (fixed, after), (mapped(quality.patches[0]), mapped(quality.patches[1]))),
        ("Checkerboard before", pictures.checkerboard(fixed, before, (window, other)), None),
        ("Checkerboard registered", pictures.checkerboard(fixed, after, (window, other)), None),
        ("Fixed red, moving green, before", pictures.red_green(fixed, before, (window, other)), None),
        ("Fixed red, registered green", pictures.red_green(fixed, after, (window, other)), None),
        _map("Patch-wise NMI (PMM) before", mapped(quality.patches[0]), (0.0, scales.patch), HEAT),
        _map("Patch-wise NMI (PMM) registered", mapped(quality.patches[1]), (0.0, scales.patch), HEAT),
        _map(motion, mapped(_motion(quality, words)), (0.0, scales.length), HEAT),
        _map("Jacobian determinant, 1 = unchanged", jacobian, limits, DIVERGING, ticks),
    ]
    title = f"{which.capitalize()} plane {why}: {_place(which, index, slices)}"
    page, draw = empty_page(title, words)
    height = (SIZE[1] - HEAD - FOOT - _BAR) // _ROWS
    for n, (caption, picture, bar) in enumerate(tiles):
        left = _GAP + (n % _COLUMNS) * (cell[0] + _GAP)
        top = HEAD + (n // _COLUMNS) * height
        text_line(draw, (left, top + _CAPTION // 2), caption, 13, cell[0])
        box = (left + (cell[0] - picture.width) // 2, top + _CAPTION)
        page.paste(picture, box)
        _orient(draw, box, picture, axes.letters(which))
        if n == 0:
            _scale_bar(draw, box, picture, picture.width / columns)
        if bar is not None:
            _color_bar(page, draw, (left, box[1] + picture.height + 4), cell[0], bar)
    return title, page


_Bar = tuple[tuple[float, float], Sequence[tuple[int, int, int]], Sequence[str]]
_Tile = tuple[str, Image.Image, _Bar | None]


def _map(
    caption: str,
    values: npt.NDArray[Any],
    limits: tuple[float, float],
    colors: Sequence[tuple[int, int, int]],
    ticks: Sequence[str] = (),
) -> _Tile:
    low, high = limits
    picture = Image.fromarray(pictures.colored(np.clip((values - low) / (high - low), 0, 1), colors))
    return caption, picture, (limits, colors, ticks or [f"{v:.3g}" for v in (low, (low + high) / 2, high)])


def _comparison(
    words: Words, scales: _Scales, images: tuple[npt.NDArray[Any], ...], patches: tuple[npt.NDArray[Any], ...]
) -> _Tile:
    """The difference of gray values as shown, of images of one modality; else where patches gained and lost."""
    if not words.are_alike:
        caption, picture, _ = _map(
            "PMM: gain red, loss blue", patches[1] - patches[0], (-scales.gain, scales.gain), DIVERGING
        )
        return caption, picture, None
    fixed, after = (
        np.clip((image - low) / (high - low if high > low else 1.0), 0, 1)
        for image, (low, high) in zip(images, scales.windows, strict=True)
    )
    caption, picture, _ = _map("Registered - fixed: red brighter, blue darker", after - fixed, (-1.0, 1.0), DIVERGING)
    return caption, picture, None


def _place(which: Plane, index: int, slices: int) -> str:
    start = {"axial": "the feet", "coronal": "the front", "sagittal": "the right"}[which]
    return f"slice {index + 1} of {slices} from {start}"


def _figures_page(quality: Quality, words: Words) -> Image.Image:
    page, draw = empty_page("Figures", words)
    y, split = HEAD + 12, 660
    for line in textwrap.wrap(words.reason, 120)[:4]:
        draw.text((24, y), line, MARK, font(16), "lt")
        y += 24
    draw.text((24, y), f"{words.moving}  registered to  {words.fixed}", INK, font(18), "lt")
    y += 36
    for heading, rows in _table(quality.figures):
        draw.text((24, y), heading[0], MARK, font(15), "lt")
        for x, text in zip((430, 530, 630), heading[1:], strict=True):
            draw.text((x, y), text, DIM, font(14), "rt")
        y += 25
        for name, *values in rows:
            draw.text((36, y), name, INK, font(15), "lt")
            for x, value in zip((430, 530, 630), values, strict=True):
                draw.text((x, y), value, INK, font(15), "rt")
            y += 23
        y += 12
    for line in words.made_by:
        text_line(draw, (24, y + 7), line, 13, split - 40, DIM)
        y += 19
    for n, (title, up, lines) in enumerate(_along(quality, words)):
        chart = pictures.curves(
            lines, title=title, across="slice, from the feet", up=up, size=(SIZE[0] - split - 8, 440)
        )
        page.paste(chart, (split, HEAD + 12 + n * 452))
    return page


def _table(f: Figures) -> list[tuple[tuple[str, str, str, str], list[tuple[str, str, str, str]]]]:
    """Headings and rows of four cells."""

    def mm(name: str) -> tuple[str, str, str]:
        return tuple(f"{getattr(f, f'{name}_{part}_mm'):.2f}" for part in ("mean", "p95", "max"))  # type: ignore[return-value]

    def share(value: float) -> str:
        return "-" if np.isnan(value) else f"{100 * value:.2f} %"

    return [
        (
            ("Agreement", "", "before", "after"),
            [
                ("Normalized mutual information", "", f"{f.similarity_before:.4f}", f"{f.similarity_after:.4f}"),
                ("Mean patch-wise NMI (PMM)", "", f"{f.patch_nmi_before:.4f}", f"{f.patch_nmi_after:.4f}"),
                ("Body where patch-wise NMI fell", "", "", share(f.patch_nmi_fell_fraction)),
                ("Body that the moving image reaches", "", "", share(f.overlap_fraction)),
            ],
        ),
        (
            ("Volume change", "minimum", "median", "maximum"),
            [
                ("Jacobian determinant", f"{f.jacobian_min:.3f}", f"{f.jacobian_median:.3f}", f"{f.jacobian_max:.3f}"),
                ("1st and 99th percentile", f"{f.jacobian_p01:.3f}", "", f"{f.jacobian_p99:.3f}"),
                ("Standard deviation of ln J", "", "", f"{f.sdlogj:.4f}"),
                ("Share of the field that folds", "", "", share(f.folding_fraction)),
            ],
        ),
        (
            ("Lengths in mm", "mean", "95 %", "maximum"),
            [
                ("Total displacement", *mm("displacement")),
                ("Displacement beyond linear", *mm("nonlinear")),
                ("Inverse consistency error", *mm("inverse_consistency")),
                ("Error of the delivered grid", "", "", f"{f.grid_error_mm:.3f}"),
            ],
        ),
        (
            ("Rigid stage", "", "", ""),
            [
                ("Rotation", "", "", f"{f.rotation_deg:.2f} deg"),
                ("Translation of the body's center", "", "", f"{f.translation_mm:.2f} mm"),
            ],
        ),
    ]


def _along(quality: Quality, words: Words) -> list[tuple[str, str, dict[str, list[float]]]]:
    """Charts of means over the body, slice by slice."""

    def means(values: npt.NDArray[np.float32], where: Mask) -> list[float]:
        size = _profile(where, quality, "axial").sum(axis=1)
        total = _profile(np.where(where, values, 0), quality, "axial").sum(axis=1, dtype=np.float64)
        return [float(t / n) if n else float("nan") for t, n in zip(total, size, strict=True)]

    patches = {
        name: means(each, np.isfinite(each))
        for name, each in zip(("before", "registered"), quality.patches, strict=True)
    }
    lengths = {"total": means(quality.displacement, quality.body)}
    if words.is_deformable:
        lengths["beyond linear"] = means(quality.nonlinear, quality.body)
    return [("Patch-wise NMI of each slice", "mean", patches), ("Displacement of each slice", "mean, mm", lengths)]


def empty_page(title: str, words: Words) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """A page with its title, the verdict, and at the foot what it was made with."""
    page = Image.new("RGB", SIZE, PAPER)
    draw = ImageDraw.Draw(page)
    badge = f"{words.verdict}: {words.meaning.lower()}"
    width = int(draw.textlength(badge, font(17))) + 28
    draw.rounded_rectangle((SIZE[0] - width - 12, 10, SIZE[0] - 12, 42), 6, _BADGES[words.verdict])
    draw.text((SIZE[0] - 12 - width / 2, 26), badge, (255, 255, 255), font(17), "mm")
    draw.text((12, 16), "Quality of a registration", DIM, font(13), "lm")
    text_line(draw, (12, 37), title, 18, SIZE[0] - width - 40)
    foot = "Quality control of a registration, not for diagnosis.  " + ";  ".join(words.made_by[:2])
    text_line(draw, (12, SIZE[1] - FOOT // 2), foot, 12, SIZE[0] - 24, DIM)
    return page, draw


def text_line(
    draw: ImageDraw.ImageDraw,
    at: tuple[float, float],
    text: str,
    size: int,
    room: float,
    color: tuple[int, int, int] = INK,
) -> None:
    """One line, left, centered on y; what does not fit ends in dots."""
    while text and draw.textlength(text, font(size)) > room:
        text = text.removesuffix("...")[:-1].rstrip() + "..."
    draw.text(at, text, color, font(size), "lm")


def _orient(
    draw: ImageDraw.ImageDraw, box: tuple[int, int], picture: Image.Image, letters: tuple[str, str, str, str]
) -> None:
    x, y = box
    middle, center = y + picture.height / 2, x + picture.width / 2
    top, right, bottom, left = letters
    for at, text, anchor in (
        ((center, y + 3), top, "mt"),
        ((x + picture.width - 4, middle), right, "rm"),
        ((center, y + picture.height - 3), bottom, "mb"),
        ((x + 4, middle), left, "lm"),
    ):
        draw.text(at, text, MARK, font(13), anchor, stroke_width=2, stroke_fill=(0, 0, 0))


def _scale_bar(draw: ImageDraw.ImageDraw, box: tuple[int, int], picture: Image.Image, per_mm: float) -> None:
    length = next((mm for mm in (100, 50, 20, 10, 5) if mm * per_mm <= 0.4 * picture.width), 2)
    x, y = box[0] + 10, box[1] + picture.height - 10
    draw.line((x, y, x + length * per_mm, y), MARK, 3)
    draw.text((x, y - 5), f"{length} mm", MARK, font(12), "lb", stroke_width=2, stroke_fill=(0, 0, 0))


def _color_bar(page: Image.Image, draw: ImageDraw.ImageDraw, at: tuple[int, int], width: int, bar: _Bar) -> None:
    _, colors, ticks = bar
    x, y = at
    ramp = np.repeat(np.linspace(0, 1, width, dtype=np.float32)[None], 8, axis=0)
    page.paste(Image.fromarray(pictures.colored(ramp, colors)), (x, y))
    for place, anchor, tick in zip((x, x + width / 2, x + width), ("lt", "mt", "rt"), ticks, strict=True):
        draw.text((place, y + 11), tick, INK, font(12), anchor)
