"""A registration made by hand: a rotation, a shift, some scaling and a smooth bump, so that no engine is needed."""

from __future__ import annotations

import math
from dataclasses import fields
from datetime import UTC, datetime
from typing import Any

import numpy as np
import numpy.typing as npt

from dicomnode import objects, volumes
from dicomnode.quality import Figures
from registration_engine import Grid, Registration, Report

FORWARD = ("series", "sro", "sro_affine", "dsr")
CREATED_AT = datetime(2025, 3, 4, 5, 6, 7, tzinfo=UTC)


def make_registration(
    grid: Grid,
    *,
    scaling: float = 1.02,
    bump_mm: tuple[float, float, float] | None = (4.0, -3.0, 5.0),
    sigma_mm: float = 30,
) -> Registration:
    """x_moving = rotation and shift (and scaling) of x_fixed, plus a Gaussian bump near the volume's center."""
    rigid = rotation(3, -2, 5) @ translation(8, -3, 2)
    linear = rigid @ np.diag([scaling, 1 / scaling, 1.0, 1.0])
    displacement = None
    if bump_mm is not None:
        points = grid.points_mm(np.moveaxis(np.indices(grid.shape), 0, -1).astype(np.float64))
        center = grid.points_mm((np.array(grid.shape) - 1) / 2 + [1, 3, -2])
        height = np.exp(-((points - center) ** 2).sum(axis=-1) / (2 * sigma_mm**2))
        displacement = (height[..., None] * bump_mm).astype(np.float32)
    return Registration(grid, rigid, linear, displacement, make_report())


def make_report(**changes: Any) -> Report:
    values = {
        "preset": "balanced", "device": "cpu", "seed": 0, "model_sha256": None, "similarity_before": 0.2,
        "similarity_after": 0.4, "folding_fraction": 0.0, "sdlogj": 0.1, "max_displacement_mm": 7.0,
    }  # fmt: skip
    return Report(**{**values, **changes})


def make_figures(**changes: float) -> Figures:
    """Of a good registration."""
    values = {each.name: 0.0 for each in fields(Figures)}
    values |= {
        "similarity_before": 0.2, "similarity_after": 0.4, "patch_nmi_before": 0.2, "patch_nmi_after": 0.3,
        "overlap_fraction": 0.98, "jacobian_median": 1.0, "sdlogj": 0.1, "nonlinear_max_mm": 12.0,
        "nonlinear_p95_mm": 7.0, "rotation_deg": 2.0, "translation_mm": 4.0, "inverse_consistency_p95_mm": 0.1,
        "grid_error_mm": 0.1,
    }  # fmt: skip
    return Figures(**{**values, **changes})


def make_provenance(**changes: Any) -> objects.Provenance:
    values = {
        "rule_id": "liver", "rule_version": 3, "preset": "balanced", "software_version": "0.1.0", "device_class": "cpu",
        "created_at": CREATED_AT,
    }  # fmt: skip
    return objects.Provenance(**{**values, **changes})


def make_source(datasets: list[Any], *, digest: str = "d") -> objects.SourceSeries:
    return objects.SourceSeries.of(datasets, {d.SOPInstanceUID: f"{digest}{d.SOPInstanceUID}" for d in datasets})


def make_objects(
    fixed: list[Any], moving: list[Any], registration: Registration | None = None, **changes: Any
) -> list[tuple[str, Any]]:
    """Result and registration objects of a pair; `changes` go to `objects.build`."""
    source = make_source(fixed)
    registration = registration or make_registration(source.grid)
    arguments = {
        "sampled": objects.sample_grid(registration),
        "outputs": FORWARD,
        "provenance": make_provenance(),
        **changes,
    }
    return list(objects.build(source, make_source(moving), volumes.load(moving), registration, **arguments))


def rotation(about_x: float, about_y: float, about_z: float) -> npt.NDArray[np.float64]:
    """(4, 4) of three turns in degrees, x first."""
    total = np.eye(4)
    for axis, degrees in enumerate((about_x, about_y, about_z)):
        a, b = (axis + 1) % 3, (axis + 2) % 3
        turn = np.eye(4)
        cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        turn[a, a] = turn[b, b] = cos
        turn[a, b], turn[b, a] = -sin, sin
        total = turn @ total
    return total


def translation(x: float, y: float, z: float) -> npt.NDArray[np.float64]:
    total = np.eye(4)
    total[:3, 3] = x, y, z
    return total
