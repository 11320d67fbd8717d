"""Outlines and pixels: closed polygons → signed distance, and a level of it → closed polygons. Pure geometry, no DICOM.

Points are (row, column), pixel centers at whole numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Points = npt.NDArray[np.float64]
_WINDOW = 3
"""Pixels to each side of an edge for which the distance is exact; beyond, it is clamped."""


def band_mm(spacing_mm: tuple[float, float]) -> float:
    """What distances are clamped to."""
    return float((_WINDOW - 1) * min(spacing_mm))


def signed_distance(
    polygons: Sequence[Points], shape: tuple[int, int], spacing_mm: tuple[float, float]
) -> npt.NDArray[np.float32]:
    """Distance in mm to the nearest edge, positive inside by the even-odd rule, clamped to `band_mm`.

    Parameters
    ----------
    polygons
        (n, 2) each, n ≥ 3, closed by themselves; one within another is a hole.
    shape
        (rows, columns).
    spacing_mm
        Between rows, between columns.
    """
    band = band_mm(spacing_mm)
    scale = np.array(spacing_mm)
    distance = np.full(shape, band)
    for polygon in polygons:
        start, end = polygon, np.roll(polygon, -1, axis=0)
        pieces = np.maximum(np.ceil(np.abs(end - start).max(axis=1)).astype(int), 1)
        edge = np.repeat(np.arange(len(polygon)), pieces)
        nth = np.arange(len(edge)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        step = (end - start)[edge] / pieces[edge, None]
        first = start[edge] + nth[:, None] * step
        around = np.stack(np.meshgrid(*[np.arange(-_WINDOW, _WINDOW + 1)] * 2, indexing="ij"), axis=-1).reshape(-1, 2)
        pixels = np.rint(first + step / 2).astype(int)[:, None] + around
        offset, along = (pixels - first[:, None]) * scale, (step * scale)[:, None]
        length = np.maximum((along**2).sum(axis=-1), 1e-12)
        share = np.clip((offset * along).sum(axis=-1) / length, 0, 1)
        found = np.linalg.norm(offset - share[..., None] * along, axis=-1)
        inside = ((pixels >= 0) & (pixels < shape)).all(axis=-1)
        np.minimum.at(distance, tuple(pixels[inside].T), found[inside])
    return np.where(_inside(polygons, shape), distance, -distance).astype(np.float32)


def _inside(polygons: Sequence[Points], shape: tuple[int, int]) -> npt.NDArray[np.bool_]:
    """Even-odd rule at pixel centers: an odd number of edges crosses the row to the left."""
    crossings = np.zeros((shape[0], shape[1] + 1), dtype=np.int64)
    for polygon in polygons:
        for (y0, x0), (y1, x1) in zip(polygon, np.roll(polygon, -1, axis=0), strict=True):
            low, high = sorted((y0, y1))
            rows = np.arange(max(int(np.ceil(low)), 0), min(int(np.ceil(high)), shape[0]))
            if rows.size:
                column = x0 + (rows - y0) * (x1 - x0) / (y1 - y0)
                crossings[rows, np.clip(np.floor(column).astype(int) + 1, 0, shape[1])] += 1
    return np.asarray(np.cumsum(crossings, axis=1)[:, :-1] % 2 == 1)


# Edges of a cell: 0 above, 1 right, 2 below, 3 left; by corners inside (1 upper left, 2 upper right, 4 lower right,
# 8 lower left) the pieces of outline that pass through it, what is inside on their right
_PIECES = {
    1: [(3, 0)], 2: [(0, 1)], 3: [(3, 1)], 4: [(1, 2)], 6: [(0, 2)], 7: [(3, 2)], 8: [(2, 3)], 9: [(2, 0)],
    11: [(2, 1)], 12: [(1, 3)], 13: [(1, 0)], 14: [(0, 3)],
}  # fmt: skip
_SADDLES = {5: ([(3, 0), (1, 2)], [(1, 0), (3, 2)]), 10: ([(0, 1), (2, 3)], [(0, 3), (2, 1)])}


def outlines(values: npt.NDArray[np.floating]) -> list[Points]:
    """The closed polygons (n, 2) along which values cross zero, linear between pixels; outside the array is outside.

    Marching squares; a saddle is joined where the mean of its corners is positive.
    """
    padded = np.pad(values.astype(np.float64), 1, constant_values=-max(float(np.abs(values).max(initial=0)), 1.0))
    corners = padded > 0
    kinds = corners[:-1, :-1] + 2 * corners[:-1, 1:] + 4 * corners[1:, 1:] + 8 * corners[1:, :-1]
    following: dict[tuple[int, int, int], tuple[int, int, int]] = {}
    for r, c in np.argwhere((kinds > 0) & (kinds < 15)).tolist():
        kind = int(kinds[r, c])
        joined = padded[r : r + 2, c : c + 2].mean() > 0
        for start, end in _PIECES[kind] if kind in _PIECES else _SADDLES[kind][int(joined)]:
            following[_edge(r, c, start)] = _edge(r, c, end)
    found = []
    while following:
        first, at = following.popitem()
        path = [first]
        while at != first:
            path.append(at)
            at = following.pop(at)
        found.append(np.array([_crossing(padded, edge) for edge in path]) - 1)
    return found


def _edge(r: int, c: int, side: int) -> tuple[int, int, int]:
    """An edge by its upper or left pixel and whether it goes down: shared by two cells."""
    return [(r, c, 0), (r, c + 1, 1), (r + 1, c, 0), (r, c, 1)][side]


def _crossing(values: npt.NDArray[np.float64], edge: tuple[int, int, int]) -> tuple[float, float]:
    r, c, down = edge
    here, there = values[r, c], values[r + down, c + 1 - down]
    share = here / (here - there)
    return (r + share, float(c)) if down else (float(r), c + share)
