"""The registered series in colour over the fixed one: a Blending Softcopy Presentation State, PS3.3 A.33.4.

Both lie in one Frame of Reference, so that no Spatial Registration is named: what is shown is what was resampled.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
from pydicom import Dataset, dcmread
from pydicom.data import get_palette_files
from pydicom.uid import BlendingSoftcopyPresentationStateStorage

from dicomnode.objects.common import Subject, decimal, identify_content, own_object, pair_description
from dicomnode.objects.references import refer, reference
from dicomnode.objects.scale import header_window, is_ct, scale_of
from dicomnode.volumes import rescale
from registration_engine import Volume

OPACITY = 0.5
"""Of the registered series; every viewer lets it be moved."""
_PALETTE = "hotiron.dcm"
"""Hot Iron, PS3.6 B.1.1, with its ICC profile, as pydicom brings it."""


def blending_state(subject: Subject, fixed: Volume, moving: Volume, registered: Sequence[Dataset]) -> Dataset | None:
    """Write it; None where it cannot be written.

    Of a fixed series whose slices have rescales of their own, since an item holds one for all its images; and of one
    without a Frame of Reference, which then only the registered series has (PS3.3 C.11.14 wants a registration there).

    Parameters
    ----------
    fixed, moving
        Both series' voxels, rescaled: where a header has no window, black and white are percentiles of these.
    registered
        Headers of every instance of the registered series.
    """
    scales = {rescale(dataset) for dataset in subject.fixed.datasets}
    if len(scales) != 1 or not subject.fixed.first.get("FrameOfReferenceUID"):
        return None
    dataset = own_object(
        subject,
        BlendingSoftcopyPresentationStateStorage,
        "blending",
        modality="PR",
        number=4600,
        description=f"BLEND {pair_description(subject)}"[:64],
    )
    for keyword in ("ReferencedSeriesSequence", "StudiesContainingOtherReferencedInstancesSequence"):
        dataset.pop(keyword, None)
    shown = [reference(each) for each in registered]
    refer(dataset, [(subject.fixed.first, subject.fixed.references()), (registered[0], shown)])
    identify_content(dataset, "BLENDING", "Registered series in colour over the fixed series")
    dataset.PresentationCreationDate, dataset.PresentationCreationTime = dataset.ContentDate, dataset.ContentTime
    scale = scale_of(subject.moving, moving)
    own = (scale.slope, scale.intercept), scale.rescale_type or "US"
    theirs = scales.pop(), str(subject.fixed.first.get("RescaleType") or ("HU" if is_ct(subject.fixed.first) else "US"))
    dataset.BlendingSequence = [
        _layer("UNDERLYING", subject.fixed.first, subject.fixed.references(), *theirs, _window(subject, fixed)),
        _layer("SUPERIMPOSED", registered[0], shown, *own, _window(subject.turned, moving)),
    ]
    dataset.RelativeOpacity = OPACITY
    dataset.DisplayedAreaSelectionSequence = [_whole(subject)]
    palette = _palette()
    for color in ("Red", "Green", "Blue"):
        entries = np.frombuffer(palette[f"{color}PaletteColorLookupTableData"].value, np.uint8)
        # PS3.3 C.7.9 as validators read it for presentation states: 16 bits for each entry
        setattr(dataset, f"{color}PaletteColorLookupTableDescriptor", [entries.size, 0, 16])
        setattr(dataset, f"{color}PaletteColorLookupTableData", (entries.astype("<u2") * 257).tobytes())
    dataset.ICCProfile = palette.ICCProfile
    return dataset


@cache
def _palette() -> Dataset:
    (path,) = get_palette_files(_PALETTE)
    return dcmread(path)


def _layer(
    position: str,
    instance: Dataset,
    images: list[Dataset],
    transformation: tuple[float, float],
    rescale_type: str,
    window: tuple[float, float],
) -> Dataset:
    """An item of the Blending Sequence, PS3.3 C.11.14: which images, and how their values become gray."""
    layer, series, voi = Dataset(), Dataset(), Dataset()
    series.SeriesInstanceUID = instance.SeriesInstanceUID
    series.ReferencedImageSequence = images
    voi.WindowCenter, voi.WindowWidth = (decimal(value) for value in window)
    layer.BlendingPosition = position
    layer.StudyInstanceUID = instance.StudyInstanceUID
    layer.ReferencedSeriesSequence = [series]
    layer.RescaleSlope, layer.RescaleIntercept = (decimal(value) for value in transformation)
    layer.RescaleType = rescale_type
    layer.SoftcopyVOILUTSequence = [voi]
    return layer


def _window(subject: Subject, image: Volume) -> tuple[float, float]:
    """Center and width: the header's, else from percentiles."""
    found = header_window(subject.fixed)
    if found is not None and found[1] >= 1:
        return found
    low, high = (float(p) for p in np.percentile(image.voxels, (0.5, 99.5)))
    return (low + high) / 2, max(high - low, 1.0)


def _whole(subject: Subject) -> Dataset:
    """All of each fixed image, as large as fits."""
    item, first, grid = Dataset(), subject.fixed.first, subject.fixed.grid
    item.DisplayedAreaTopLeftHandCorner = [1, 1]
    item.DisplayedAreaBottomRightHandCorner = [int(first.Columns), int(first.Rows)]
    item.PresentationSizeMode = "SCALE TO FIT"
    item.PresentationPixelSpacing = [decimal(mm) for mm in grid.spacing_mm[1:]]
    return item
