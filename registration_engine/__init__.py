"""Registration of medical volumes by test-time optimisation: volumes and millimetres, nothing of DICOM networking."""

from registration_engine.errors import (
    ImplausibleResultError,
    InvalidVolumeError,
    NoOverlapError,
    OutOfDeviceMemoryError,
    RegistrationError,
)
from registration_engine.volume import DisplacementField, Grid, Registration, Report, Volume

__all__ = [
    "DisplacementField",
    "Grid",
    "ImplausibleResultError",
    "InvalidVolumeError",
    "NoOverlapError",
    "OutOfDeviceMemoryError",
    "Registration",
    "RegistrationError",
    "Report",
    "Volume",
]
