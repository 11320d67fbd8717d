"""Accept, warn or reject: judged on what would be delivered, not on what was hoped for. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dicomnode.model import Verdict
from registration_engine import PRESETS, DisplacementField, Grid, Registration

_SLAB = 8


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


def of_all(judged: Sequence[tuple[Verdict, str]]) -> tuple[Verdict, str]:
    """The verdict on a job of one or several pairs: rejected only where every pair is."""
    if len(judged) == 1:
        return judged[0]
    rejected = [reason for verdict, reason in judged if verdict == Verdict.REJECT]
    if len(rejected) == len(judged):
        return Verdict.REJECT, f"every phase was rejected, the first: {rejected[0]}"
    if rejected:
        return Verdict.WARN, f"{len(rejected)} of {len(judged)} phases were rejected, the first: {rejected[0]}"
    warned = [reason for verdict, reason in judged if verdict == Verdict.WARN]
    return (Verdict.WARN, warned[0]) if warned else (Verdict.ACCEPT, "")


def folding_fraction(field: DisplacementField, fixed: Grid) -> float:
    """Share of the field's nodes inside the fixed volume with det J <= 0.

    Central differences, one-sided at the border, as the engine's report and SimpleITK's Jacobian filter have them.

    Parameters
    ----------
    field
        Total displacement, two nodes or more along each axis.

    References
    ----------
    Leow et al., Statistical properties of Jacobian maps, IEEE TMI 2007.
    """
    axes = field.grid.affine[:3, :3]
    volume = np.linalg.det(axes)
    planes, rows, columns = field.grid.shape
    folded = nodes = 0
    for first in range(0, planes, _SLAB):
        last = min(first + _SLAB, planes)
        low, high = max(first - 1, 0), min(last + 1, planes)
        u = field.vectors[low:high].astype(np.float64)
        along_k, along_j, along_i = (axes[:, n] + np.gradient(u, axis=n) for n in range(3))
        determinant = np.einsum("...c,...c", along_k, np.cross(along_j, along_i))[first - low : last - low] / volume
        index = np.moveaxis(np.indices((last - first, rows, columns), dtype=np.float64), 0, -1)
        index[..., 0] += first
        place = fixed.indices(field.grid.points_mm(index))
        inside = np.all((place >= -0.5) & (place <= np.array(fixed.shape) - 0.5), axis=-1)
        folded += int(np.count_nonzero((determinant <= 0) & inside))
        nodes += int(np.count_nonzero(inside))
    return folded / nodes if nodes else 0.0
