"""One registration judged and shown: every measure before and after, as values, as a table and as pictures.

Volumes and a field in, values and pictures out; `write_evaluation` alone touches files.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from registration_engine import evaluation, pictures
from registration_engine.errors import InvalidRequestError, InvalidVolumeError
from registration_engine.evaluation import Mask, Points
from registration_engine.patches import patch_mutual_information
from registration_engine.resampling import Interpolation, reached, warp
from registration_engine.volume import DisplacementField, Volume


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What was measured, and the images it was measured on.

    Attributes
    ----------
    measures
        Name → (before, after); before is NaN for what only a field has. Names say the unit.
    labels
        Label → (before, after).
    unmoved, registered
        The moving image on the fixed grid, without and with the field.
    patches
        Patch-wise maps (Z, Y, X) before and after: NMI, or mutual information in nat.
    """

    measures: dict[str, tuple[float, float]]
    labels: dict[int, tuple[evaluation.Overlap, evaluation.Overlap]]
    fixed: Volume
    unmoved: Volume
    registered: Volume
    field: DisplacementField
    patches: tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; what could not be measured is None."""

        def plain(value: float) -> float | None:
            return float(value) if np.isfinite(value) else None

        return {
            "measures": {k: {"before": plain(b), "after": plain(a)} for k, (b, a) in self.measures.items()},
            "labels": {
                str(label): {
                    name: {"before": plain(getattr(before, name)), "after": plain(getattr(after, name))}
                    for name in ("dice", "iou", "hd95_mm")
                }
                for label, (before, after) in self.labels.items()
            },
        }

    def table(self) -> str:
        """The same as comma-separated values: measure, label, before, after."""
        text = io.StringIO()
        lines = csv.writer(text, lineterminator="\n")
        lines.writerow(["measure", "label", "before", "after"])
        told = self.as_dict()
        for name, pair in told["measures"].items():
            lines.writerow([name, "", _cell(pair["before"]), _cell(pair["after"])])
        for label, measures in told["labels"].items():
            for name, pair in measures.items():
                lines.writerow([name, label, _cell(pair["before"]), _cell(pair["after"])])
        return text.getvalue()


def evaluate(
    fixed: Volume,
    moving: Volume,
    field: DisplacementField,
    region: Mask,
    *,
    labels: tuple[Volume, Volume] | None = None,
    landmarks_mm: tuple[Points, Points] | None = None,
    backward: DisplacementField | None = None,
    normalized: bool = True,
) -> Evaluation:
    """Measure one registration.

    Parameters
    ----------
    field
        Total displacement on the fixed grid.
    region
        (Z, Y, X) on the fixed grid: the body.
    labels
        Of the fixed and of the moving image, each on any grid.
    landmarks_mm
        (n, 3) in the fixed and in the moving image.
    backward
        From moving to fixed space. Without one the field's own numerical inverse stands in, and what is measured is
        whether the field can be inverted.
    normalized
        The patch-wise map as 2·I/(H_F + H_M), 0…1; else I in nat, as the paper prints it.

    Raises
    ------
    InvalidVolumeError, InvalidRequestError
        The field is not on the fixed grid, the region is empty, labels or landmarks do not fit.
    """
    if not field.grid.is_same_as(fixed.grid, tolerance_mm=0.01):
        raise InvalidVolumeError(
            f"Field: got a grid of shape {field.grid.shape}, expected the fixed image's of shape {fixed.grid.shape}"
        )
    outside = float(moving.voxels.min())
    unmoved, registered = (warp(moving, f, fixed.grid, outside=outside) for f in (None, field))
    domain = region & reached(moving.grid, field, fixed.grid)
    both = domain & reached(moving.grid, None, fixed.grid)
    # Without overlap at the start there is nothing to compare with.
    domain = both if both.any() else domain
    maps = [
        patch_mutual_information(fixed.voxels, v.voxels, domain, normalized=normalized) for v in (unmoved, registered)
    ]
    change = evaluation.volume_change(field, region)
    nan = float("nan")
    measures = {
        "patch_nmi" if normalized else "patch_mi_nat": (_mean(maps[0]), _mean(maps[1])),
        "folding_fraction": (0.0, change.folding_fraction),
        "sdlogj": (0.0, change.sdlogj),
        "max_displacement_mm": (0.0, change.max_displacement_mm),
    }
    if backward is None:
        rest = evaluation.non_affine_part(field, region)
        consistency = evaluation.inverse_consistency(rest, evaluation.inverted(rest), region)
    else:
        consistency = evaluation.inverse_consistency(field, backward, region)
    measures["inverse_consistency_mm"] = (nan, float(consistency.mean()))
    measures["inverse_consistency_95_mm"] = (nan, float(np.percentile(consistency, 95)))
    overlaps = {}
    if labels is not None:
        overlaps = _overlaps(fixed, labels, field)
        for name in ("dice", "iou", "hd95_mm"):
            measures[f"mean_{name}"] = tuple(  # type: ignore[assignment]
                _mean(np.array([getattr(pair[n], name) for pair in overlaps.values()])) for n in (0, 1)
            )
    if landmarks_mm is not None:
        still = DisplacementField(np.zeros_like(field.vectors), fixed.grid)
        errors = [evaluation.landmark_errors(f, *landmarks_mm) for f in (still, field)]
        measures["tre_mm"] = (float(errors[0].mean()), float(errors[1].mean()))
        measures["tre_95_mm"] = (float(np.percentile(errors[0], 95)), float(np.percentile(errors[1], 95)))
    return Evaluation(measures, overlaps, fixed, unmoved, registered, field, (maps[0], maps[1]))


def overlay_sheet(found: Evaluation, *, side: int = 320) -> Image.Image:
    """Three planes through the middle: fixed, before, after; checkerboards and red–green overlays of both."""
    grid = found.fixed.grid
    images = (found.fixed.voxels, found.unmoved.voxels, found.registered.voxels)
    windows = pictures.window_of(images[0]), pictures.window_of(images[2])
    rows = []
    for which in pictures.PLANES:
        fixed, before, after = (pictures.plane(v, grid, which, side=side) for v in images)
        row = [
            (f"fixed, {which}", pictures.gray(fixed, windows[0])),
            ("moving before", pictures.gray(before, windows[1])),
            ("moving after", pictures.gray(after, windows[1])),
        ]
        for name, moving in (("before", before), ("after", after)):
            row.append((f"checkerboard {name}", pictures.checkerboard(fixed, moving, windows)))
        for name, moving in (("before", before), ("after", after)):
            row.append((f"fixed red, moving green, {name}", pictures.red_green(fixed, moving, windows)))
        rows.append(row)
    return pictures.sheet(rows)


def patch_sheet(found: Evaluation, *, side: int = 320) -> Image.Image:
    """Patch-wise map before and after on one scale, and the gain."""
    name = "patch NMI" if "patch_nmi" in found.measures else "patch MI, nat,"
    before, after = found.patches
    finite = np.concatenate([m[np.isfinite(m)] for m in (before, after)])
    highest = float(np.percentile(finite, 99.5)) if finite.size else 1.0
    gain = after - before
    widest = max(float(np.nanpercentile(np.abs(gain), 99.5)) if np.isfinite(gain).any() else 0.0, 1e-3)
    rows = []
    for which in pictures.PLANES:
        cuts = [pictures.plane(m, found.fixed.grid, which, side=side) for m in (before, after, gain)]
        rows.append(
            [
                (f"{name} before, {which}", pictures.heat_map(cuts[0], (0, highest))),
                (f"{name} after", pictures.heat_map(cuts[1], (0, highest))),
                ("gain", pictures.heat_map(cuts[2], (-widest, widest), colors=pictures.DIVERGING)),
            ]
        )
    return pictures.sheet(rows)


def motion_sheet(field: DisplacementField, region: Mask, *, side: int = 320) -> Image.Image:
    """Local volume change and length of the field's non-affine part over a region."""
    rest = evaluation.non_affine_part(field, region)
    logs = np.log2(np.clip(evaluation.jacobian_determinant(rest), 0.01, 100))
    lengths = np.linalg.norm(rest.vectors, axis=-1).astype(np.float32)
    longest = float(lengths[region].max())
    shown = [np.where(region, m, np.float32(np.nan)) for m in (logs, lengths)]
    rows = []
    for which in pictures.PLANES:
        cuts = [pictures.plane(m, field.grid, which, side=side) for m in shown]
        rows.append(
            [
                (f"volume change, log2 det J, {which}", pictures.heat_map(cuts[0], (-1, 1), colors=pictures.DIVERGING)),
                ("displacement beyond the affine part", pictures.heat_map(cuts[1], (0, longest), unit="mm")),
            ]
        )
    return pictures.sheet(rows)


def write_evaluation(folder: Path, found: Evaluation, region: Mask) -> None:
    """Write evaluation.json, table.csv, overlays.png, patches.png and motion.png into an existing folder."""
    (folder / "evaluation.json").write_text(json.dumps(found.as_dict(), indent=2) + "\n", encoding="utf-8")
    (folder / "table.csv").write_text(found.table(), encoding="utf-8")
    overlay_sheet(found).save(folder / "overlays.png")
    patch_sheet(found).save(folder / "patches.png")
    motion_sheet(found.field, region).save(folder / "motion.png")


def write_uptake(folder: Path, before: Sequence[float], after: Sequence[float]) -> None:
    """Write uptake.csv and uptake.png: the mean of a region in each phase, before and after registration."""
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(["phase", "before", "after"])
    for number, pair in enumerate(zip(before, after, strict=True)):
        lines.writerow([number, *(_cell(v if np.isfinite(v) else None) for v in pair)])
    (folder / "uptake.csv").write_text(text.getvalue(), encoding="utf-8")
    shown = {"before registration": before, "after": after}
    pictures.curves(shown, title="Uptake in the region", across="phase", up="mean").save(folder / "uptake.png")


def read_landmarks(path: Path) -> tuple[Points, Points]:
    """Landmarks of a CSV file: columns fixed_x, fixed_y, fixed_z, moving_x, moving_y, moving_z, LPS mm.

    Raises
    ------
    InvalidRequestError
        A column is missing, a value is no finite number, there is no line, or it is no table at all.
    """
    if path.exists() and not path.is_file():
        raise InvalidRequestError(f"{path}: got a folder or device, expected a file of landmarks")
    try:
        return _landmarks(path)
    except (UnicodeDecodeError, csv.Error) as error:
        raise InvalidRequestError(f"{path}: no table of comma-separated values ({error})") from None


def _landmarks(path: Path) -> tuple[Points, Points]:
    names = [f"{image}_{axis}" for image in ("fixed", "moving") for axis in "xyz"]
    with path.open(encoding="utf-8-sig", newline="") as file:
        lines = csv.DictReader(file, skipinitialspace=True)
        missing = [name for name in names if name not in (lines.fieldnames or [])]
        if missing:
            raise InvalidRequestError(
                f"{path}: got columns {', '.join(lines.fieldnames or ['none'])}, expected {', '.join(names)}"
            )
        rows: list[list[float]] = []
        for number, line in enumerate(lines, start=2):
            try:
                rows.append([float(line[name]) for name in names])
            except (TypeError, ValueError):
                raise InvalidRequestError(
                    f"{path}, line {number}: got {list(line.values())}, expected 6 numbers"
                ) from None
    points = np.array(rows, dtype=np.float64).reshape(-1, 6)
    if not len(points) or not np.isfinite(points).all():
        raise InvalidRequestError(f"{path}: got {len(points)} landmarks, expected one or more with finite coordinates")
    return points[:, :3], points[:, 3:]


def _overlaps(
    fixed: Volume, labels: tuple[Volume, Volume], field: DisplacementField
) -> dict[int, tuple[evaluation.Overlap, evaluation.Overlap]]:
    nearest: Interpolation = "nearest"
    on_fixed = warp(labels[0], None, fixed.grid, interpolation=nearest).voxels
    moved = [warp(labels[1], f, fixed.grid, interpolation=nearest).voxels for f in (None, field)]
    # A label of one image alone says nothing about the registration.
    shared = np.intersect1d(np.unique(labels[0].voxels), np.unique(labels[1].voxels)).astype(int)
    wanted = [int(n) for n in shared if n > 0]
    if not wanted:
        raise InvalidVolumeError("Labels: fixed and moving image share none, expected one or more above 0")
    before, after = (
        {o.label: o for o in evaluation.label_overlaps(on_fixed, m, fixed.grid.spacing_mm, wanted)} for m in moved
    )
    found = {label: (before[label], after[label]) for label in wanted if label in before and label in after}
    if not found:
        raise InvalidVolumeError(f"Labels: none of the {len(wanted)} that both images share reaches the fixed image")
    return found


def _mean(values: npt.NDArray[Any]) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if finite.size else float("nan")


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"
