"""The DICOM objects that go back: registered series, Spatial Registration, Deformable Spatial Registration.

Law: pure. UIDs come from the inputs and from how they were registered, so that making an object again makes the same
object, and another result never hides under an old UID. No object leaves unless `check` found nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import numpy as np
from pydicom import Dataset
from pydicom.config import disable_value_validation

from dicomnode.errors import StudyError
from dicomnode.objects.blending import blending_state
from dicomnode.objects.carrying import KINDS, Drawing, belongs_to
from dicomnode.objects.common import DESCRIPTION, Provenance, SourceSeries, Subject
from dicomnode.objects.contours import carried_structures
from dicomnode.objects.deformable import SampledField, deformable_registration, sample_grid
from dicomnode.objects.dynamic import as_phase, description_4d, reference_phase, series_4d_uid
from dicomnode.objects.invariants import check
from dicomnode.objects.inverse import inverted
from dicomnode.objects.maps import QUANTITIES, overlap_segmentation, parametric_map
from dicomnode.objects.measurement_report import measurement_report
from dicomnode.objects.rejection import rejection_note
from dicomnode.objects.secondary_capture import secondary_captures
from dicomnode.objects.segmentations import carried_segmentation
from dicomnode.objects.series import registered_series
from dicomnode.objects.spatial import spatial_registration
from dicomnode.objects.uptake_objects import uptake_objects
from dicomnode.quality import Measured, measure
from dicomnode.volumes import load
from registration_engine import Registration, Volume

__all__ = [
    "Drawing", "Provenance", "SampledField", "SourceSeries", "as_phase", "belongs_to", "build", "carried", "check",
    "description_4d", "reference_phase", "rejection_note", "sample_grid", "series_4d_uid",
    "uptake_objects",
]  # fmt: skip

REPORTS = ("sr",)
"""What tells of a registration without its result: made of a rejected one too."""
QUALITY = (*REPORTS, "sc", *QUANTITIES, "overlap")
CARRIED = tuple(dict.fromkeys(KINDS.values()))
"""Outputs that `carried` makes of what was drawn on the moving series."""
OUTPUTS = ("series", "sro", "sro_affine", "dsr", "dsr-inverse", "blending", *QUALITY)
"""What can be asked for: `sro` is the rigid stage, `sro_affine` the whole linear part, `dsr-inverse` leads back.

`blending` shows the registered series, so that it needs `series`; `build` says when it is not made.
"""


def build(
    fixed: SourceSeries,
    moving: SourceSeries,
    moving_volume: Volume,
    registration: Registration,
    sampled: SampledField,
    *,
    outputs: Collection[str],
    provenance: Provenance,
    warning: str = "",
    rejection: str = "",
    store_in: str = "fixed_study",
    description: str = DESCRIPTION,
    resolution: str = "fixed",
    may_be_multi_frame: bool = True,
    measured: Measured | None = None,
) -> Iterator[tuple[str, Dataset]]:
    """Make the objects of one pair, one at a time: registration objects, the slices of the series, quality.

    Parameters
    ----------
    moving_volume
        As `volumes.load` gives it, of the moving series.
    sampled
        `sample_grid(registration)`: the very field that the deformable object carries and the series is made with.
    outputs
        Some of `OUTPUTS`. `blending` is left out where `blending_state` cannot write it.
    warning
        Why the verdict was a warning, to be written into the objects; empty where it was not.
    rejection
        Why the verdict was a rejection; empty where it was not. Nothing but those of `REPORTS` is made then.
    store_in
        fixed_study, moving_study or newest: whose study the objects go to.
    description
        Series Description; `{moving}` and `{fixed}` stand for those of the two series.
    resolution
        fixed: the registered series has the fixed slices. moving: it fills the fixed volume's box with voxels of the
        moving series' size.
    may_be_multi_frame
        Of an Enhanced moving series one Enhanced instance is made; else single-frame ones.
    measured
        Of this very registration, as `quality.measure` found it; measured here where None.

    Yields
    ------
    tuple[str, Dataset]
        Kind (an output's name; sro for both matrices) and a data set with file meta information, Explicit VR Little
        Endian, ready for `save_as(..., enforce_file_format=True)`.

    Raises
    ------
    StudyError
        The series are not of one patient.
    """
    if unknown := set(outputs) - set(OUTPUTS):
        raise ValueError(f"outputs: got {sorted(unknown)}, expected some of {', '.join(OUTPUTS)}")
    if "blending" in outputs and "series" not in outputs:
        raise ValueError("outputs: blending shows the registered series, expected series among them")
    if not registration.grid.is_same_as(fixed.grid):
        raise ValueError(f"registration: is on a grid of shape {registration.grid.shape}, expected the fixed series'")
    is_deformable = registration.displacement is not None
    subject = Subject(fixed, moving, provenance, is_deformable, warning, store_in, description, resolution, rejection)
    wanted = set(outputs) & set(REPORTS) if rejection else set(outputs)
    return _tolerant(_made(subject, moving_volume, registration, sampled, wanted, may_be_multi_frame, measured))


def carried(
    fixed: SourceSeries,
    moving: SourceSeries,
    sampled: SampledField,
    drawing: Drawing,
    *,
    provenance: Provenance,
    warning: str = "",
    store_in: str = "fixed_study",
) -> tuple[str, Dataset]:
    """Carry a Segmentation or RT Structure Set of the moving series to the fixed one.

    Parameters
    ----------
    sampled
        The delivered field: `registered_series` and this go by the same map.
    drawing
        One that `belongs_to` the moving series.

    Returns
    -------
    tuple[str, Dataset]
        contours or segmentations, and the data set as `build` has it.

    Raises
    ------
    StudyError
        The drawing cannot be read, has no place in the fixed volume, or is of another patient.
    """
    subject = Subject(fixed, moving, provenance, is_deformable=True, warning=warning, store_in=store_in)
    if (drawing.dataset.get("PatientID") or "") != (moving.first.get("PatientID") or ""):
        raise StudyError(
            f"{drawing.output} {drawing.dataset.SOPInstanceUID}: of another patient than the series it names"
        )
    make = carried_structures if drawing.output == "contours" else carried_segmentation
    with disable_value_validation():
        made = make(subject, sampled.field, drawing)
        return drawing.output, check(made, subject, also=[drawing.dataset])


def _made(
    subject: Subject,
    moving: Volume,
    registration: Registration,
    sampled: SampledField,
    outputs: set[str],
    may_be_multi_frame: bool,
    measured: Measured | None,
) -> Iterator[tuple[str, Dataset]]:
    deformable = deformable_registration(subject, sampled) if "dsr" in outputs else None
    if deformable is not None:
        yield "dsr", check(deformable, subject, field=sampled.field)
    if "dsr-inverse" in outputs:
        back = inverted(registration, sampled, subject.moving.grid)
        turned = subject.turned
        there = deformable_registration(turned, back, is_inverse=True)
        yield "dsr-inverse", check(there, turned, field=back.field)
    stages = (("sro", "RIGID", registration.rigid), ("sro_affine", "AFFINE", registration.moving_from_fixed))
    for output, matrix_type, matrix in stages:
        if output in outputs:
            spatial = spatial_registration(
                subject,
                matrix,
                matrix_type=matrix_type,
                is_total=not subject.is_deformable and np.allclose(matrix, registration.moving_from_fixed),
                has_deformable=deformable is not None,
            )
            yield "sro", check(spatial, subject, moving_from_fixed=matrix)
    if "series" in outputs:
        also = [] if deformable is None else [deformable]
        registered = []
        for dataset in registered_series(subject, moving, sampled, deformable, may_be_multi_frame=may_be_multi_frame):
            registered.append(_identity(dataset))
            yield "series", check(dataset, subject, also=also)
        if "blending" in outputs:
            blended = blending_state(subject, load(subject.fixed.datasets), moving, registered)
            if blended is not None:
                yield "blending", check(blended, subject, also=registered)
    if outputs & set(QUALITY):
        for kind, dataset in _of_quality(subject, moving, registration, sampled, outputs, measured):
            yield kind, check(dataset, subject)


def _identity(dataset: Dataset) -> Dataset:
    """What a reference to an instance needs."""
    bare = Dataset()
    for keyword in ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID"):
        bare[keyword] = dataset[keyword]
    return bare


def _of_quality(
    subject: Subject,
    moving: Volume,
    registration: Registration,
    sampled: SampledField,
    outputs: set[str],
    measured: Measured | None,
) -> Iterator[tuple[str, Dataset]]:
    if measured is not None and outputs & set(QUALITY) == {"sr"}:
        yield "sr", measurement_report(subject, measured.figures)
        return
    quality = measure(
        load(subject.fixed.datasets),
        moving,
        registration,
        sampled.field,
        grid_error_mm=sampled.max_error_mm,
        measured=measured,
    )
    if "sr" in outputs:
        yield "sr", measurement_report(subject, quality.figures)
    for page in secondary_captures(subject, quality) if "sc" in outputs else ():
        yield "sc", page
    for kind in QUANTITIES:
        if kind in outputs:
            yield kind, parametric_map(subject, kind, quality)
    if "overlap" in outputs:
        yield "overlap", overlap_segmentation(subject, quality)


def _tolerant(made: Iterator[tuple[str, Dataset]]) -> Iterator[tuple[str, Dataset]]:
    """Carry source values over as they are, however malformed; what is ours is well-formed by construction."""
    while True:
        with disable_value_validation():
            one = next(made, None)
        if one is None:
            return
        yield one
