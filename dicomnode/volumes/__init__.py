"""One series → its volumes in LPS millimetres, or the measured reason why there are none.

Law: `describe` (headers only, before pairing) and `load` (with pixels, in the worker) share `geometry`, so that what
was judged regular is what is registered. Nothing is repaired silently, and what is left out of a series is named.

    reading    stored bytes → datasets           frames     a multi-frame instance → one dataset per frame
    geometry   slices → one regular grid         pixels     one decoder per transfer syntax, value scale, padding
    promises   how many instances there should be
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
from pydicom import Dataset
from pydicom.config import disable_value_validation
from pydicom.dataelem import DataElement
from pydicom.multival import MultiValue

from dicomnode import phases
from dicomnode.errors import IncompleteSeriesError, StudyError, UnsupportedImageError
from dicomnode.model import HeaderValue, Member, VolumeRef
from dicomnode.volumes.frames import SINGLE_FRAME_CLASS, Frame, frame_count, frame_number, single_frame_class
from dicomnode.volumes.geometry import (
    CLASSES,
    MAX_VOXELS,
    SAME_IN_SERIES,
    Stack,
    check_elements,
    check_same,
    geometry,
    left_out_because,
)
from dicomnode.volumes.pixels import rescale, stored_values, values
from dicomnode.volumes.promises import promises
from dicomnode.volumes.reading import SOFTWARE_NAME, instance_header, name, numbers, read, read_headers, text
from registration_engine import Volume

__all__ = [
    "CLASSES", "MAX_VOXELS", "SINGLE_FRAME_CLASS", "SOFTWARE_NAME", "Description", "Stack", "describe", "frame_count",
    "frame_number", "geometry", "instance_header", "load", "outline", "promises", "read", "read_headers", "rescale",
    "seconds_of", "single_frame_class", "stored_values",
]  # fmt: skip

_BULK = {"OB", "OD", "OF", "OL", "OV", "OW", "SQ", "UN", "UT"}
_MAX_TEXT, _MAX_VALUES = 1024, 64
MAX_PLANES = 256
"""More orientations in one series than this are no volumes."""


@dataclass(frozen=True)
class Description:
    """What a complete series holds.

    Attributes
    ----------
    volumes
        At least one, in order of their numbers, each with the instances and frames it consists of.
    notes
        What was left out of every volume, and why; one line each.
    """

    volumes: tuple[tuple[VolumeRef, tuple[Member, ...]], ...]
    notes: tuple[str, ...] = ()


def describe(datasets: Sequence[Dataset], *, last_received_at: datetime) -> Description:
    """What pairing must know of a complete series, from its headers.

    Slices of one plane that lie in one place are told apart by `phases.split`. Images of another kind (colour,
    localizer, mosaic …), single images of another plane and stacks that are not regular are left out and noted,
    if a volume remains.

    Raises
    ------
    IncompleteSeriesError, InconsistentGeometryError, UnsupportedImageError
        The instances hold no volume; the message carries the measured figure.
    """
    with disable_value_validation():
        kinds = [left_out_because(dataset) for dataset in datasets]
        images = [dataset for dataset, why in zip(datasets, kinds, strict=True) if not why]
        strange = [why for why in kinds if why]
        if not images:
            raise (
                UnsupportedImageError(strange[0])
                if strange
                else IncompleteSeriesError("Series: got 0 instance, expected at least 2 slices")
            )
        notes = _counted(strange)
        try:
            stacks, irregular = _stacks(images)
        except StudyError as error:
            if strange:
                raise UnsupportedImageError(f"{strange[0]}; without it: {error}") from error
            raise
        volumes = [
            _described(part, stack, number, len(stacks), last_received_at)
            for number, (part, stack) in enumerate(stacks)
        ]
    return Description(tuple(volumes), (*notes, *irregular))


def outline(dataset: Dataset, *, last_received_at: datetime) -> VolumeRef:
    """What one instance tells of its series before the others are here; of its geometry nothing: one voxel."""
    with disable_value_validation():
        about = instance_header(dataset)
        return VolumeRef(
            patient_id=about.patient_id,
            issuer_of_patient_id=about.issuer_of_patient_id,
            patient_birth_date=about.patient_birth_date,
            patient_sex=about.patient_sex,
            study_instance_uid=about.study_instance_uid,
            series_instance_uid=about.series_instance_uid,
            frame_of_reference_uid=text(dataset, "FrameOfReferenceUID"),
            modality=about.modality,
            shape=(1, 1, 1),
            affine=(0, 0, 1, 0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1),
            last_received_at=last_received_at,
            header={e.keyword: _plain(e.value) for e in dataset if _is_describable(e)},
        )


def load(datasets: Sequence[Dataset]) -> Volume:
    """Decode the slices of one volume, in any order: rescaled (CT: HU), padding made air or darkest, LPS millimetres.

    Raises
    ------
    IncompleteSeriesError, InconsistentGeometryError, UnsupportedImageError
        As `describe`; or pixels cannot be decoded, naming the transfer syntax.
    """
    ordered = geometry(datasets)
    slices, rows, columns = ordered.grid.shape
    voxels = np.empty((slices, rows, columns), dtype=np.float32)
    in_file_order = sorted(range(slices), key=lambda k: frame_number(ordered.datasets[k]))
    decoded = values([ordered.datasets[k] for k in in_file_order], (rows, columns))
    for k, plane in zip(in_file_order, decoded, strict=True):
        voxels[k] = plane
    return Volume(voxels, ordered.grid)


def seconds_of(volumes: Sequence[Sequence[Dataset]]) -> tuple[float, ...]:
    """From the beginning of the first volume to that of each, in their order; empty where the headers do not tell."""
    members: list[range] = []
    slices = [_slice(dataset) for volume in volumes for dataset in volume]
    for volume in volumes:
        start = members[-1].stop if members else 0
        members.append(range(start, start + len(volume)))
    found = phases.seconds_since_first(slices, members)
    return tuple(each for each in found if each is not None)


def _stacks(images: Sequence[Dataset]) -> tuple[list[tuple[phases.Part, Stack]], list[str]]:
    """Every regular volume among the images, and what is none."""
    for dataset in images:
        check_elements(dataset)
    check_same(images, SAME_IN_SERIES)
    slices = [_slice(dataset) for dataset in images]
    planes = phases.by_plane(slices, at_most=MAX_PLANES)
    found: list[tuple[phases.Part, Stack]] = []
    problems: list[str] = []
    errors: list[StudyError] = []
    for plane in planes:
        try:
            parts = phases.split([slices[n] for n in plane]) if len(plane) > 1 else [phases.Part((0,))]
            if len(parts) == len(plane) > 1:
                by = ", ".join(parts[0].split_by)
                raise IncompleteSeriesError(
                    f"{name(images)}: {len(plane)} images of one place, told apart by {by}, expected at least 2 slices "
                    "of each"
                )
            found += [(part, geometry([images[plane[n]] for n in part.indices])) for part in parts]
        except StudyError as error:
            errors.append(error)
            problems.append(f"left out: {len(plane)} images of one plane: {error}")
    if found:
        return _named_by_plane(found, len(planes) - len(errors)), problems
    if len(planes) > 1:
        geometry(images)  # says in what they differ
    first = errors[0]
    if isinstance(first, phases.AmbiguousSeriesError):
        raise IncompleteSeriesError(f"{name(images)}: {first}")
    raise first


def _named_by_plane(found: list[tuple[phases.Part, Stack]], planes: int) -> list[tuple[phases.Part, Stack]]:
    """Where volumes lie in several planes, every one says in which, by what differs; all have the same keywords."""
    if planes == 1:
        return found
    keys = {key: None for part, _ in found for key in part.split_by}
    plane = {key: [_plain(stack.datasets[0][key].value) for _, stack in found] for key in _PLANE}
    named = []
    for n, (part, _) in enumerate(found):
        where = {key: several[n] for key, several in plane.items() if any(each != several[0] for each in several)}
        absent: dict[str, HeaderValue] = {key: part.split_by.get(key, "") for key in keys}
        named.append((phases.replaced(part, {**where, **absent}), found[n][1]))
    return named


_PLANE = ("ImageOrientationPatient", "Rows", "Columns", "PixelSpacing")
"""What `phases.by_plane` looks at."""


def _slice(dataset: Dataset) -> phases.Slice:
    z, y, x = numbers(dataset, "ImagePositionPatient", 3)
    between_rows, between_columns = numbers(dataset, "PixelSpacing", 2)
    number = text(dataset, "InstanceNumber").strip()
    if isinstance(dataset, Frame):
        number = str(dataset.number)
    return phases.Slice(
        position=(float(z), float(y), float(x)),
        orientation=tuple(numbers(dataset, "ImageOrientationPatient", 6).tolist()),
        size=(int(dataset.Rows), int(dataset.Columns)),
        spacing=(float(between_rows), float(between_columns)),
        instance_number=int(number) if number.removeprefix("-").isdecimal() and len(number) < 12 else None,
        values=_telling(dataset),
    )


def _telling(dataset: Dataset) -> dict[str, HeaderValue]:
    """The elements by which `phases` may split, vendors' private b-values among them."""
    found: dict[str, HeaderValue] = {}
    for keyword in (*phases.CONTRAST_KEYS, *phases.TIME_KEYS, *phases.OFFSETS):
        value = _plain(dataset.get(keyword))
        if keyword == "ImageType" and isinstance(value, list):
            value = value[2:]
        if value not in ("", []):
            found[keyword] = value
    if "AcquisitionDateTime" not in found and "AcquisitionTime" in found and (day := text(dataset, "AcquisitionDate")):
        found["AcquisitionDateTime"] = f"{day}{str(found['AcquisitionTime']).replace(':', '')}"
    for tag in _B_VALUES:
        if "DiffusionBValue" not in found and tag in dataset:
            first = _plain(dataset[tag].value)
            first = first[0] if isinstance(first, list) and first else first
            if isinstance(first, int | float):
                found["DiffusionBValue"] = float(first % 100_000)  # GE adds flags far above every b-value
    return found


_B_VALUES = ((0x0019, 0x100C), (0x0043, 0x1039), (0x2001, 0x1003))
"""Siemens, GE, Philips."""


def _described(
    part: phases.Part, stack: Stack, number: int, count: int, last_received_at: datetime
) -> tuple[VolumeRef, tuple[Member, ...]]:
    first = stack.datasets[0]
    about = instance_header(first)
    described = VolumeRef(
        patient_id=about.patient_id,
        issuer_of_patient_id=about.issuer_of_patient_id,
        patient_birth_date=about.patient_birth_date,
        patient_sex=about.patient_sex,
        study_instance_uid=about.study_instance_uid,
        series_instance_uid=about.series_instance_uid,
        frame_of_reference_uid=text(first, "FrameOfReferenceUID"),
        modality=about.modality,
        shape=stack.grid.shape,
        affine=tuple(stack.grid.affine.ravel().tolist()),
        last_received_at=last_received_at,
        header={e.keyword: _plain(e.value) for e in first if _is_describable(e)},
        volume_number=number,
        volumes_in_series=count,
        split_by=part.split_by,
        phase_index=part.phase_index,
        phases=part.phases,
        phase_time_s=part.phase_time_s,
    )
    frames: dict[str, list[int]] = defaultdict(list)
    for dataset in stack.datasets:
        frames[text(dataset, "SOPInstanceUID")] += [frame_number(dataset)] if frame_number(dataset) else []
    return described, tuple(Member(uid, tuple(sorted(several))) for uid, several in frames.items())


def _counted(reasons: Sequence[str]) -> list[str]:
    """One line per reason, with how many instances have it; the first instance is named."""
    kinds = Counter(why.split(": ", 1)[-1] for why in reasons)
    return [f"left out: {count} images: {why}" for why, count in kinds.most_common(8)]


def _is_describable(element: DataElement) -> bool:
    is_bulk = element.VR in _BULK or isinstance(element.value, bytes)
    return bool(element.keyword) and not element.tag.is_private and not is_bulk


def _plain(value: Any) -> HeaderValue:
    """An element's value as JSON knows it, cut to a sane length."""
    if isinstance(value, MultiValue | list | tuple):
        return [_plain(one) for one in value[:_MAX_VALUES]]  # type: ignore[return-value]  # one VR, so one kind
    if value is None:
        return ""
    if isinstance(value, int) and abs(value) < 2**63:  # beyond it no number of DICOM, nor one that a float can hold
        return int(value)
    if isinstance(value, float) and np.isfinite(value):
        return float(value)
    return str(value)[:_MAX_TEXT]
