"""What every object shares: provenance, deterministic UIDs, patient, study, equipment and references.

Law: nothing here asks for the time, a random number or a file; the same inputs give the same bytes.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta, timezone
from functools import cached_property

import numpy as np
import numpy.typing as npt
from pydicom import Dataset
from pydicom.dataset import FileMetaDataset
from pydicom.uid import UID, ExplicitVRLittleEndian
from pydicom.valuerep import DSfloat

from dicomnode.errors import StudyError
from dicomnode.objects.mark import marked
from dicomnode.objects.patient import copy_patient_and_study, set_body_part, study_time
from dicomnode.objects.references import by_series, refer, references
from dicomnode.objects.texts import ascii_text, described, long_string
from dicomnode.volumes import SOFTWARE_NAME, frame_number, geometry
from registration_engine import Grid

_NAMESPACE = uuid.UUID("5a9f3f2e-6d0b-5f0c-9f5e-3f0e1f6b8c21")  # ours; changing it changes every UID

DESCRIPTION = "REG {moving} to {fixed}"


@dataclass(frozen=True)
class Provenance:
    """How a registration was made; written into every object, and into its UIDs but for `created_at` and `seconds`.

    Attributes
    ----------
    parameters
        What the preset does not say, as JSON values.
    device_class
        cpu or cuda.
    seconds
        Of each stage of the registration.
    created_at
        Aware. Written in the time zone that the images state, else in its own.
    """

    rule_id: str
    rule_version: int
    preset: str
    software_version: str
    device_class: str
    created_at: datetime
    model_sha256: str | None = None
    parameters: Mapping[str, object] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class SourceSeries:
    """One complete series, headers enough, that objects are made from and refer to.

    Attributes
    ----------
    datasets
        In slice order of `grid`.
    digests
        sha256 of each instance's data set by SOP Instance UID.
    """

    datasets: tuple[Dataset, ...]
    digests: Mapping[str, str]
    grid: Grid

    @staticmethod
    def of(datasets: Sequence[Dataset], digests: Mapping[str, str]) -> SourceSeries:
        """Order the instances by position; raises what `volumes.geometry` raises."""
        stack = geometry(datasets)
        return SourceSeries(stack.datasets, digests, stack.grid)

    @property
    def first(self) -> Dataset:
        """The instance that stands for what all have in common."""
        return self.datasets[0]

    @property
    def frame_of_reference_uid(self) -> str:
        """As received; made from the series where absent, so that every object of a series agrees."""
        made = _uid(["frame of reference", str(self.first.SeriesInstanceUID)])
        return str(self.first.get("FrameOfReferenceUID") or made)

    @cached_property
    def slices(self) -> Mapping[tuple[str, int], Dataset]:
        """Each slice by what a reference to it says: SOP Instance UID, and of a frame its number, else 0.

        Of an instance whose frames are all meant, a reference need not name one.
        """
        return {(str(dataset.SOPInstanceUID), frame_number(dataset)): dataset for dataset in self.datasets}

    def references(self) -> list[Dataset]:
        """A reference to every instance once, with its frames where not all are meant."""
        return references(self.datasets)

    def content(self) -> Iterator[tuple[str | int, ...]]:
        """What each slice holds: SOP Instance UID, digest, and of a frame its number."""
        for dataset in self.datasets:
            uid, frame = str(dataset.SOPInstanceUID), frame_number(dataset)
            yield (uid, self.digests[uid], frame) if frame else (uid, self.digests[uid])


@dataclass(frozen=True, eq=False)
class Subject:
    """The pair at hand: what all its objects are about.

    Attributes
    ----------
    is_deformable
        The registration has more than a linear part.
    warning
        Why the verdict was a warning; empty where it was not.
    store_in
        fixed_study, moving_study or newest: whose study the objects go to.
    description
        Series Description of what is made; `{moving}` and `{fixed}` stand for those of the two series.
    resolution
        fixed or moving: whose voxel size the registered series has.
    rejection
        Why the verdict was a rejection; empty where it was not.

    Raises
    ------
    StudyError
        The series are not of one patient.
    """

    fixed: SourceSeries
    moving: SourceSeries
    provenance: Provenance
    is_deformable: bool
    warning: str = ""
    store_in: str = "fixed_study"
    description: str = DESCRIPTION
    resolution: str = "fixed"
    rejection: str = ""

    @property
    def turned(self) -> Subject:
        """The same pair seen from the moving series, for objects that lead back; at home where this one is."""
        home = "moving_study" if self.home is self.fixed.first else "fixed_study"
        return replace(self, fixed=self.moving, moving=self.fixed, store_in=home)

    @property
    def home(self) -> Dataset:
        """An instance of the study that the objects go to: the fixed or moving series', or of the newer examination."""
        fixed, moving = self.fixed.first, self.moving.first
        if self.store_in == "newest":
            return moving if study_time(moving) > study_time(fixed) else fixed
        return moving if self.store_in == "moving_study" else fixed

    @property
    def verdict(self) -> str:
        """ACCEPT, WARN or REJECT."""
        return "REJECT" if self.rejection else "WARN" if self.warning else "ACCEPT"

    @property
    def reason(self) -> str:
        """Of the verdict; empty where it was accepted without a word."""
        return self.rejection or self.warning

    def __post_init__(self) -> None:
        fixed, moving = self.fixed.first, self.moving.first
        if not fixed.get("PatientID") and fixed.StudyInstanceUID != moving.StudyInstanceUID:
            raise StudyError(
                f"Series {fixed.SeriesInstanceUID} and {moving.SeriesInstanceUID} have no PatientID and are of two "
                "studies, expected one known patient"
            )
        for keyword in ("PatientID", "IssuerOfPatientID"):
            if (fixed.get(keyword) or "") != (moving.get(keyword) or ""):
                raise StudyError(
                    f"Series {fixed.SeriesInstanceUID} and {moving.SeriesInstanceUID} differ in {keyword}, "
                    "expected one patient"
                )

    def uid(self, kind: str, index: int = 0) -> UID:
        """The UID of one object of this pair: the same for the same inputs, another for any other."""
        return _uid([self._inputs, kind, index])

    @cached_property
    def known(self) -> Mapping[str, tuple[str, str]]:
        """Study and Series Instance UID of every source instance, by SOP Instance UID."""
        sources = (*self.fixed.datasets, *self.moving.datasets)
        return {str(d.SOPInstanceUID): (str(d.StudyInstanceUID), str(d.SeriesInstanceUID)) for d in sources}

    @cached_property
    def inputs_sha256(self) -> str:
        """Of what both series hold."""
        return hashlib.sha256(json.dumps(self._content).encode()).hexdigest()

    @property
    def _content(self) -> list[list[tuple[str | int, ...]]]:
        return [sorted(each.content()) for each in (self.fixed, self.moving)]

    @cached_property
    def _inputs(self) -> str:
        """Everything that decides what the objects hold, but for the time they are made at."""
        made_by = self.provenance
        how = [made_by.rule_id, made_by.rule_version, made_by.preset, dict(made_by.parameters)]
        software = [made_by.software_version, made_by.model_sha256, made_by.device_class]
        return json.dumps([*self._content, *how, *software], sort_keys=True)


def registration_object(
    subject: Subject, sop_class_uid: UID, kind: str, *, number: int, label: str, text: str
) -> Dataset:
    """Everything of a registration object but its registration module; modality REG, in the study `subject.home` is of.

    Parameters
    ----------
    number
        Added to the moving series' number.
    label, text
        Content Label and Content Description.
    """
    dataset = own_object(
        subject, sop_class_uid, kind, modality="REG", number=number, description=pair_description(subject)
    )
    set_frame_of_reference(dataset, subject)
    identify_content(dataset, label, text)
    return dataset


def own_object(
    subject: Subject, sop_class_uid: UID, kind: str, *, modality: str, number: int, description: str, index: int = 0
) -> Dataset:
    """Patient, study, series, equipment and references of an object that only this software makes.

    Parameters
    ----------
    number
        Added to the moving series' number.
    description
        Series Description.
    index
        Of the instance within its series, from 0.
    """
    fixed = subject.fixed.first
    dataset = new_dataset(sop_class_uid, subject.uid(kind, index))
    copy_patient_and_study(subject.home, dataset)
    set_times(dataset, fixed, subject.provenance.created_at)
    dataset.SpecificCharacterSet = character_set(subject)
    dataset.SeriesInstanceUID = subject.uid(f"{kind} series")
    dataset.SeriesNumber = series_number(subject.moving.first, number)
    dataset.SeriesDescription = marked(description, subject.warning)
    dataset.Modality = modality
    set_body_part(dataset, fixed)
    dataset.Manufacturer = SOFTWARE_NAME
    dataset.ManufacturerModelName = SOFTWARE_NAME
    dataset.DeviceSerialNumber = subject.provenance.software_version
    dataset.SoftwareVersions = software_versions(subject.provenance)
    dataset.ContributingEquipmentSequence = [contributing_equipment(subject, dataset)]
    dataset.InstanceNumber = index + 1
    refer(dataset, by_series([*subject.fixed.datasets, *subject.moving.datasets]))
    dataset.remove_private_tags()  # those within copied sequences
    return dataset


def set_frame_of_reference(dataset: Dataset, subject: Subject) -> None:
    """The Frame of Reference module: the fixed series'."""
    dataset.FrameOfReferenceUID = subject.fixed.frame_of_reference_uid
    dataset.PositionReferenceIndicator = subject.fixed.first.get("PositionReferenceIndicator") or ""


def identify_content(dataset: Dataset, label: str, text: str) -> None:
    """Content Label, Content Description and an empty Content Creator's Name."""
    dataset.ContentLabel = label
    dataset.ContentDescription = long_string(text)
    dataset.ContentCreatorName = ""


def new_dataset(sop_class_uid: UID, sop_instance_uid: UID) -> Dataset:
    """An empty data set of Explicit VR Little Endian, ready for `save_as(..., enforce_file_format=True)`."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = sop_class_uid
    dataset.file_meta.MediaStorageSOPInstanceUID = sop_instance_uid
    dataset.SOPClassUID = sop_class_uid
    dataset.SOPInstanceUID = sop_instance_uid
    return dataset


def character_set(subject: Subject) -> str | list[str]:
    """The fixed series', so that patient and study keep their bytes, where it can write the moving's text."""
    fixed, moving = (series.first.get("SpecificCharacterSet") for series in (subject.fixed, subject.moving))
    return copy.deepcopy(fixed) if fixed and (not moving or fixed == moving) else "ISO_IR 192"


def set_times(target: Dataset, source: Dataset, created_at: datetime) -> None:
    """Instance creation, series and content times, in the time zone that `source` states, if it does."""
    offset = str(source.get("TimezoneOffsetFromUTC") or "")
    if found := re.fullmatch(r"([+-])(\d{2})(\d{2})", offset):
        sign = -1 if found[1] == "-" else 1
        created_at = created_at.astimezone(timezone(sign * timedelta(hours=int(found[2]), minutes=int(found[3]))))
        target.TimezoneOffsetFromUTC = offset
    for what in ("InstanceCreation", "Series", "Content"):
        setattr(target, f"{what}Date", created_at.strftime("%Y%m%d"))
        setattr(target, f"{what}Time", created_at.strftime("%H%M%S"))


def contributing_equipment(subject: Subject, target: Dataset) -> Dataset:
    """The item that names this software and says how the object was made; also the loop guard's mark."""
    made_by = subject.provenance
    text = (
        f"rule {made_by.rule_id} version {made_by.rule_version}; preset {made_by.preset}; "
        f"parameters {json.dumps(dict(made_by.parameters), sort_keys=True)}; "
        f"model {made_by.model_sha256 or 'none'}; device {made_by.device_class}; "
        f"inputs {subject.inputs_sha256}; "
        f"seconds {json.dumps({name: round(value, 1) for name, value in made_by.seconds.items()})}"
    )
    item = Dataset()
    item.PurposeOfReferenceCodeSequence = [code("109102", "Processing Equipment")]
    item.Manufacturer = SOFTWARE_NAME
    item.ManufacturerModelName = SOFTWARE_NAME
    item.SoftwareVersions = software_versions(made_by)
    item.ContributionDateTime = f"{target.ContentDate}{target.ContentTime}"
    item.ContributionDescription = ascii_text(text)[:1024]
    return item


def software_versions(provenance: Provenance) -> list[str]:
    """The software's version, and the network's where one took part."""
    model = [f"model {provenance.model_sha256[:32]}"] if provenance.model_sha256 else []
    return [provenance.software_version, *model]


def code(value: str, meaning: str, scheme: str = "DCM") -> Dataset:
    """A code, by default of the DICOM Controlled Terminology."""
    item = Dataset()
    item.CodeValue = value
    item.CodingSchemeDesignator = scheme
    item.CodeMeaning = meaning
    return item


def matrix_item(matrix: npt.NDArray[np.float64], kind: str) -> Dataset:
    """Frame of Reference Transformation Matrix, row-major, and its type: RIGID or AFFINE."""
    item = Dataset()
    item.FrameOfReferenceTransformationMatrix = [decimal(value) for value in matrix.ravel()]
    item.FrameOfReferenceTransformationMatrixType = kind
    return item


def decimal(value: float) -> DSfloat:
    """The number as a Decimal String of at most 16 characters."""
    return DSfloat(float(value) + 0.0, auto_format=True)  # + 0.0 turns -0 into 0


def pair_description(subject: Subject) -> str:
    """The pair's Series Description."""
    return described(subject.description, series_name(subject.moving), series_name(subject.fixed))


def series_name(series: SourceSeries) -> str:
    """What a description calls a series."""
    return str(series.first.get("SeriesDescription") or series.first.get("SeriesNumber") or "series")


def series_number(moving: Dataset, offset: int) -> int:
    """The moving series' number plus an offset, within Integer String."""
    return min(int(moving.get("SeriesNumber") or 0), 10**8) + offset


def _uid(parts: list[object]) -> UID:
    """PS3.5 B.2: 2.25 and a UUID, here of version 5."""
    return UID(f"2.25.{uuid.uuid5(_NAMESPACE, json.dumps(parts, sort_keys=True)).int}")
