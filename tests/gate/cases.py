"""The cases of the gate: every pair of factor values once, or the full product."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path
from typing import Any

import multi_frame
import phantoms
from drawn import ball, circles, segmentation, structures
from hand_made import make_objects, make_provenance, make_registration, make_source
from pydicom import Dataset, dcmread
from pydicom.dataset import FileDataset

from dicomnode import volumes
from dicomnode.objects import OUTPUTS, Drawing, Provenance, SampledField, carried, sample_grid, uptake_objects
from dicomnode.objects.planes import RESOLUTIONS
from dicomnode.uptake import Moment, measure_uptake
from registration_engine import Registration

Case = dict[str, str]

FACTORS: Mapping[str, Sequence[str]] = {
    "image": ("CT", "MR", "PET", "oblique MR"),
    "position": ("HFS", "FFP", "HFS and HFDL"),
    "frame": ("one frame", "two frames"),
    "study": ("one study", "two studies"),
    "form": ("single-frame", "Enhanced"),
    "resolution": RESOLUTIONS,
}
FIXED, MOVING = ((10, 26, 30), (10.0, 8.0, 8.0)), ((9, 28, 34), (11.0, 7.5, 7.0))
"""(slices, rows, columns), spacing in mm."""
BALL_MM, RADIUS_MM = (6.0, -4.0, 5.0), 28.0
"""What is drawn on the moving series."""


def cases() -> list[Case]:
    """All pairs of factor values, or with GATE=full every combination."""
    everything = [dict(zip(FACTORS, values, strict=True)) for values in product(*FACTORS.values())]
    return everything if os.environ.get("GATE") == "full" else covering(everything)


def covering(everything: Sequence[Case]) -> list[Case]:
    """The cases that hold every pair of values of two factors: greedy, the same at every call."""
    missing = set().union(*map(pairs_of, everything))
    chosen = []
    while missing:
        best = max(everything, key=lambda case: len(pairs_of(case) & missing))
        chosen.append(best)
        missing -= pairs_of(best)
    return chosen


def pairs_of(case: Case) -> set[tuple[tuple[str, str], tuple[str, str]]]:
    return {(one, other) for one, other in combinations(case.items(), 2)}


@dataclass(frozen=True)
class Delivered:
    """One pair's source files and everything that was made of it.

    Attributes
    ----------
    twins
        Folders of fixed and moving as single frames: the same images, for readers that know no others.
    """

    folder: Path
    fixed: list[Path]
    moving: list[Path]
    twins: tuple[Path, Path]
    drawn: list[Path]
    made: dict[str, list[Path]]
    registration: Registration
    sampled: SampledField
    resolution: str

    def one(self, kind: str) -> Dataset:
        return dcmread(self.made[kind][0])

    @property
    def sources(self) -> list[Path]:
        return [*self.fixed, *self.moving, *self.drawn]

    @property
    def objects(self) -> list[Path]:
        return [path for paths in self.made.values() for path in paths]

    @property
    def readable_moving(self) -> list[Path]:
        """The original moving files; ITK reads one slope for all frames, so of an Enhanced PET its single frames."""
        first = dcmread(self.moving[0], stop_before_pixels=True)
        is_beyond_itk = first.Modality == "PT" and len(self.moving) == 1
        return sorted(self.twins[1].glob("*.dcm")) if is_beyond_itk else self.moving

    @property
    def outside(self) -> float:
        return -1024.0 if dcmread(self.moving[0]).Modality == "CT" else 0.0


def make_case(case: Case, folder: Path) -> Delivered:
    """Make the phantoms of a case, and its objects."""
    modality = {"CT": "CT", "PET": "PT"}.get(case["image"], "MR")
    oblique = case["image"] == "oblique MR"
    positions = {"HFS and HFDL": ("HFS", "HFDL")}.get(case["position"], (case["position"],) * 2)
    common: dict[str, Any] = {"modality": modality, "oblique": oblique}
    two_studies, two_frames = case["study"] == "two studies", case["frame"] == "two frames"
    frame = "second" if two_frames else "study"
    fixed = phantoms.make_series(
        shape=FIXED[0], spacing_mm=FIXED[1], position=positions[0], frame_of_reference="study", seed=1, **common
    )
    moving = phantoms.make_series(
        shape=MOVING[0],
        spacing_mm=MOVING[1],
        position=positions[1],
        frame_of_reference=frame,
        study="later study" if two_studies else "study",
        phase="arterial",
        shift_mm=(6.0, -4.0, 5.0),
        seed=2,
        **common,
    )
    twins = tuple(phantoms.write_series(series, folder / name) for series, name in ((fixed, "f"), (moving, "m")))
    paths = twins
    if case["form"] == "Enhanced":
        paths = tuple(whole(series, folder / name) for series, name in ((fixed, "ef"), (moving, "em")))
    return deliver(folder, *paths, twins=(folder / "f", folder / "m"), resolution=case["resolution"])


def whole(series: list[FileDataset], folder: Path) -> list[Path]:
    return phantoms.write_series([multi_frame.well_formed(series)], folder)


def deliver(
    folder: Path,
    fixed: list[Path],
    moving: list[Path],
    *,
    twins: tuple[Path, Path],
    resolution: str = "fixed",
    with_drawings: bool = True,
) -> Delivered:
    registration = make_registration(make_source(volumes.read_headers(fixed)).grid)
    sampled = sample_grid(registration)
    made: dict[str, list[Path]] = {}
    (folder / "series").mkdir()
    made_by = make_provenance(rule_version=3 + RESOLUTIONS.index(resolution))  # another rule gives other UIDs
    everything = make_objects(
        volumes.read(fixed),
        volumes.read(moving),
        registration,
        sampled=sampled,
        outputs=OUTPUTS,
        resolution=resolution,
        provenance=made_by,
    )
    for n, (kind, dataset) in enumerate(everything):
        path = folder / ("series" if kind == "series" else "") / f"{kind}{n}.dcm"
        dataset.save_as(path, enforce_file_format=True)
        made.setdefault(kind, []).append(path)
    for n, (kind, dataset) in enumerate(uptake(fixed, moving, sampled, made_by)):
        path = folder / f"{kind}{n}.dcm"
        dataset.save_as(path, enforce_file_format=True)
        made.setdefault(kind, []).append(path)
    drawn = draw(moving, folder) if with_drawings else []
    for path in drawn:
        drawing = Drawing(dcmread(path), path.stem)
        kind, dataset = carried(
            make_source(volumes.read_headers(fixed)),
            make_source(volumes.read_headers(moving)),
            sampled,
            drawing,
            provenance=made_by,
        )
        dataset.save_as(folder / f"{kind}.dcm", enforce_file_format=True)
        made[kind] = [folder / f"{kind}.dcm"]
    return Delivered(folder, fixed, moving, twins, drawn, made, registration, sampled, resolution)


def uptake(
    fixed: list[Path], moving: list[Path], sampled: SampledField, made_by: Provenance
) -> Iterator[tuple[str, Dataset]]:
    """The pair as two phases."""
    images = [volumes.load(volumes.read(paths)) for paths in (fixed, moving)]
    moments = [Moment(images[0], is_registered=True), Moment(images[1], is_registered=True, field=sampled.field)]
    measured = measure_uptake(images[0], 2, moments.__getitem__)
    assert measured is not None
    first, second = (make_source(volumes.read_headers(paths)) for paths in (fixed, moving))
    return uptake_objects(first, [second], measured, provenance=made_by)


def draw(moving: list[Path], folder: Path) -> list[Path]:
    """A ball as contours and as a segment on the moving series."""
    slices = make_source(volumes.read_headers(moving))
    instances = [dcmread(path) for path in moving]
    if len(instances) > 1:
        instances = list(make_source(volumes.read(moving)).datasets)
    drawn = {
        "contours": structures(list(slices.datasets), {"ball": circles(slices.grid, BALL_MM, RADIUS_MM)}),
        "segments": segmentation(instances, {"ball": ball(slices.grid, BALL_MM, RADIUS_MM)}),
    }
    for name, dataset in drawn.items():
        dataset.save_as(folder / f"drawn-{name}.dcm", enforce_file_format=True)
    return [folder / f"drawn-{name}.dcm" for name in drawn]
