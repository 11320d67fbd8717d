"""Accept, warn or reject: judged on what would be delivered, not on what was hoped for. Pure."""

from __future__ import annotations

from itertools import product

import numpy as np

from dicomnode.model import Verdict
from registration_engine import PRESETS, DisplacementField, Grid, Registration


def judge(
    registration: Registration, delivered: DisplacementField, *, max_error_mm: float, tolerance_mm: float
) -> tuple[Verdict, str]:
    """Judge a registration and the field sampled from it.

    Parameters
    ----------
    delivered
        The total field that the objects will carry.
    max_error_mm, tolerance_mm
        Largest distance of the delivered from the engine's map, and what was aimed at.

    Returns
    -------
    tuple[Verdict, str]
        The reason is empty where accepted. Reject: similarity falls, the delivered field folds anywhere in the fixed
        volume, or the displacement exceeds the preset's limit. Warn: the delivered field is coarser than aimed at.
    """
    report = registration.report
    if not report.similarity_after >= report.similarity_before:
        got = f"{report.similarity_before:.4f} to {report.similarity_after:.4f}"
        return Verdict.REJECT, f"similarity fell from {got}, expected it to rise"
    folded = folding_fraction(delivered, registration.grid)
    if folded > 0:
        return Verdict.REJECT, f"the delivered field folds in {folded:.3%} of the fixed volume, expected nowhere"
    limit = PRESETS[report.preset].largest_displacement_mm
    if not report.max_displacement_mm <= limit:
        got = f"{report.max_displacement_mm:.1f} mm"
        return Verdict.REJECT, f"displacement of {got}, expected at most {limit:.1f} mm with preset {report.preset}"
    if max_error_mm > tolerance_mm:
        got = f"{max_error_mm:.2f} mm"
        return Verdict.WARN, f"grid error up to {got}, aimed at {tolerance_mm:.2f} mm: size limit"
    return Verdict.ACCEPT, ""


def folding_fraction(field: DisplacementField, fixed: Grid) -> float:
    """Share of the field's cells centered in the fixed volume whose trilinear map has det J <= 0 at a corner.

    Parameters
    ----------
    field
        Total displacement; a cell is the box between eight of its vectors.
    """
    axes = field.grid.affine[:3, :3]
    orientation = np.sign(np.linalg.det(axes))
    folded = cells = 0
    for k in range(field.grid.shape[0] - 1):
        u = field.vectors[k : k + 2].astype(np.float64)
        j, i = np.indices((u.shape[1] - 1, u.shape[2] - 1)) + 0.5
        index = fixed.indices(field.grid.points_mm(np.stack([np.full_like(j, k + 0.5), j, i], axis=-1)))
        inside = np.all((index >= -0.5) & (index <= np.array(fixed.shape) - 0.5), axis=-1)
        rows, columns = j.shape
        if not inside.any():
            continue
        # The mapped edges of each cell; corner (a, b, c) stands on one edge of each direction.
        along_k, along_j, along_i = (axes[:, n] + np.diff(u, axis=n) for n in range(3))
        bad = np.zeros_like(inside)
        for a, b, c in product((0, 1), repeat=3):
            edge_k = along_k[0, b : b + rows, c : c + columns]
            edge_j = along_j[a, :, c : c + columns]
            edge_i = along_i[a, b : b + rows]
            bad |= orientation * np.einsum("...c,...c", edge_k, np.cross(edge_j, edge_i)) <= 0
        folded += int((bad & inside).sum())
        cells += int(inside.sum())
    return folded / cells if cells else 0.0
