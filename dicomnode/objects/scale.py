"""How the values of a registered series are stored: as true to the moving series as sixteen bits can be."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from pydicom import Dataset
from pydicom.uid import CTImageStorage, PositronEmissionTomographyImageStorage

from dicomnode.objects.common import SourceSeries, decimal
from dicomnode.volumes import rescale, single_frame_class
from registration_engine import Volume

CT_OUTSIDE_HU = -1024.0


@dataclass(frozen=True)
class Scale:
    """How values of the image are stored: stored = (value - intercept) / slope, in `bits` bits."""

    slope: float
    intercept: float
    bits: int
    signed: bool
    rescale_type: str | None
    """None where the image carries no rescale; empty where its values have their unit elsewhere."""

    @property
    def range(self) -> tuple[int, int]:
        """Smallest and largest stored value."""
        return (-(1 << self.bits - 1), (1 << self.bits - 1) - 1) if self.signed else (0, (1 << self.bits) - 1)

    def stored(self, values: npt.NDArray[np.float32]) -> npt.NDArray[np.int16] | npt.NDArray[np.uint16]:
        """Values rounded to stored units and clipped to the stored range."""
        units = np.rint((values.astype(np.float64) - self.intercept) / self.slope)
        return np.clip(units, *self.range).astype("<i2" if self.signed else "<u2")


def scale_of(series: SourceSeries, volume: Volume) -> Scale:
    """CT in whole HU; else the stored scale of the series, or where its slices differ one scale that holds all.

    PET has no intercept (PS3.3 C.8.9.4) and its unit in Units.
    """
    first = series.first
    is_pet = single_frame_class(first) == PositronEmissionTomographyImageStorage
    rescale_type = first.get("RescaleType")
    if is_in_hu(first):
        return Scale(1.0, 0.0, 16, True, "HU")
    rescale_type = "" if is_pet else rescale_type or "US"
    scales = {rescale(dataset) for dataset in series.datasets}
    bits = max(int(dataset.BitsStored) for dataset in series.datasets)
    if len(scales) == 1 and bits <= 16 and not (is_pet and next(iter(scales))[1] != 0):
        slope, intercept = scales.pop()
        has_rescale = "RescaleSlope" in first
        return Scale(slope, intercept, bits, bool(first.PixelRepresentation), rescale_type if has_rescale else None)
    smallest, largest = float(volume.voxels.min()), float(volume.voxels.max())
    signed = smallest < 0
    limit = 32767 if signed else 65535
    slope = float(str(decimal(max(-smallest, largest, 1e-6) / limit)))
    return Scale(slope, 0.0, 16, signed, rescale_type)


def outside_of(moving: Dataset, scale: Scale) -> float:
    """The value of points outside the moving image: air in CT, 0 in MR and PET or what is stored nearest to it."""
    wanted = CT_OUTSIDE_HU if scale.rescale_type == "HU" and is_ct(moving) else 0.0
    low, high = sorted(limit * scale.slope + scale.intercept for limit in scale.range)
    return min(max(wanted, low), high)


def is_ct(dataset: Dataset) -> bool:
    """Whether a slice has the attributes of CT Image Storage."""
    return single_frame_class(dataset) == CTImageStorage


def is_in_hu(dataset: Dataset) -> bool:
    """Whether a slice's rescaled values are Hounsfield units: CT that names no other Rescale Type."""
    return is_ct(dataset) and (dataset.get("RescaleType") or "HU") == "HU"


def header_window(series: SourceSeries) -> tuple[float, float] | None:
    """Window Center and Window Width of the middle slice, the first where it has several; None where it has none."""
    middle = series.datasets[len(series.datasets) // 2]
    center, width = (middle.get(keyword) for keyword in ("WindowCenter", "WindowWidth"))
    try:
        found = [float(v if isinstance(v, (int, float, str)) else v[0]) for v in (center, width)]
    except (TypeError, ValueError, IndexError):
        return None
    return (found[0], found[1]) if np.isfinite(found).all() else None
