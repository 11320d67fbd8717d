"""The pages of a registration's quality as Secondary Capture images, PS3.3 A.8.1: what every viewer shows."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from PIL import Image
from pydicom import Dataset
from pydicom.uid import SecondaryCaptureImageStorage

from dicomnode.objects.common import SourceSeries, Subject, code, own_object, pair_description
from dicomnode.objects.measurement_report import VERDICTS
from dicomnode.objects.pages import Words, pages, window_of
from dicomnode.objects.references import references
from dicomnode.objects.scale import header_window
from dicomnode.objects.texts import ascii_text, long_string
from dicomnode.quality import Quality
from dicomnode.volumes import SOFTWARE_NAME

_NUMBER = 4000


def secondary_captures(subject: Subject, quality: Quality) -> Iterator[Dataset]:
    """One instance for each page, in one series, in the order of reading: `pages.pages` says what they show."""
    windows = (
        window_of(quality.fixed.voxels, quality.body, header_window(subject.fixed)),
        window_of(quality.registered.voxels, quality.body & quality.overlap, header_window(subject.moving)),
    )
    description = f"QC pages {pair_description(subject)}"
    for index, (title, picture) in enumerate(pages(quality, words_of(subject), windows)):
        yield secondary_capture(subject, "sc", title, picture, number=_NUMBER, description=description, index=index)


def secondary_capture(
    subject: Subject, kind: str, title: str, picture: Image.Image, *, number: int, description: str, index: int = 0
) -> Dataset:
    """A picture that names no patient as one Secondary Capture image in 24-bit colour."""
    dataset = own_object(
        subject,
        SecondaryCaptureImageStorage,
        kind,
        modality="OT",
        number=number,
        description=description[:64],
        index=index,
    )
    dataset.ConversionType = "WSD"  # made on a workstation
    dataset.PatientOrientation = None
    dataset.ImageType = ["DERIVED", "SECONDARY"]
    purpose = code("121322", "Source image for image processing operation")
    dataset.SourceImageSequence = [
        item for each in (subject.fixed, subject.moving) for item in references(each.datasets, purpose=purpose)
    ]
    dataset.DerivationDescription = ascii_text(f"Quality of a registration: {title}")[:1024]
    dataset.ImageComments = long_string(title)
    dataset.BurnedInAnnotation = "NO"  # nothing on a page tells whose it is
    dataset.LossyImageCompression = "00"
    pixels = np.asarray(picture.convert("RGB"))
    dataset.SamplesPerPixel = 3
    dataset.PhotometricInterpretation = "RGB"
    dataset.PlanarConfiguration = 0
    dataset.Rows, dataset.Columns = pixels.shape[:2]
    dataset.BitsAllocated = dataset.BitsStored = 8
    dataset.HighBit, dataset.PixelRepresentation = 7, 0
    dataset.PixelData = pixels.tobytes() + b"\0" * (pixels.size % 2)
    dataset["PixelData"].VR = "OB"
    return dataset


def words_of(subject: Subject) -> Words:
    """What the pages of a pair say."""
    made_by = subject.provenance
    model = f"model {made_by.model_sha256[:16]}" if made_by.model_sha256 else "no model"
    modalities = {str(each.first.get("Modality") or "") for each in (subject.fixed, subject.moving)}
    lines = (
        f"{SOFTWARE_NAME} {made_by.software_version}, rule {made_by.rule_id} version {made_by.rule_version}",
        f"preset {made_by.preset}, {model}, device {made_by.device_class}",
        f"made {made_by.created_at:%Y-%m-%d %H:%M %Z}",
        f"fixed {subject.fixed.first.SeriesInstanceUID}",
        f"moving {subject.moving.first.SeriesInstanceUID}",
    )
    return Words(
        fixed=_name(subject.fixed),
        moving=_name(subject.moving),
        verdict=subject.verdict,
        meaning=VERDICTS[subject.verdict],
        reason=ascii_text(subject.reason),
        made_by=[ascii_text(line) for line in lines],
        are_alike=len(modalities) == 1,
        is_deformable=subject.is_deformable,
    )


def _name(series: SourceSeries) -> str:
    return ascii_text(f"{series.first.get('Modality') or 'image'} series {series.first.get('SeriesNumber') or '-'}")
