"""Registration of medical volumes by test-time optimisation: volumes and millimetres, nothing of DICOM networking.

    volume         images, grids, fields, registrations   spaces     the one home of axis order and normalised points
    prepare        foreground, intensity scale, margins   affine     rigid and affine start
    losses         similarities and their gradients       optimize   the field, coarse to fine
    unet           the paper's network                    objectives   its losses, for autograd
    synth          image pairs that never were             train        stage 1, and the loop
    distill        stage 2                                 tuning       stage 3, on a copy of the weights
    checkpoint     weights on disk, those that ship        devices      the device a caller names
    field          compose, smooth, invert, Jacobian      metrics    what the report says
    engine         register(): all of it in order         presets    the table of named values
    evaluation     measures from outside, of any field    patches    the patch-wise mutual information map
    report         evaluate(): table and pictures         pictures   overlays, maps, curves
    dynamic        register_4d(): all phases of a series
    resampling     warp()                                 files, cli NIfTI, MHA and NRRD from the command line

`register`, `warp` and `load_model` are loaded when first asked for: a program that only describes volumes needs no
torch.
"""

from typing import TYPE_CHECKING, Any

from registration_engine.errors import (
    ImplausibleResultError,
    InvalidRequestError,
    InvalidVolumeError,
    NoOverlapError,
    OutOfDeviceMemoryError,
    RegistrationError,
)
from registration_engine.presets import PRESETS, Preset
from registration_engine.volume import DisplacementField, Grid, Registration, Report, Volume

if TYPE_CHECKING:
    from registration_engine.checkpoint import load_model
    from registration_engine.engine import register
    from registration_engine.field import inverse
    from registration_engine.resampling import warp

__all__ = [
    "PRESETS",
    "DisplacementField",
    "Grid",
    "ImplausibleResultError",
    "InvalidRequestError",
    "InvalidVolumeError",
    "NoOverlapError",
    "OutOfDeviceMemoryError",
    "Preset",
    "Registration",
    "RegistrationError",
    "Report",
    "Volume",
    "inverse",
    "load_model",
    "register",
    "warp",
]


def __getattr__(name: str) -> Any:
    if name == "load_model":
        from registration_engine.checkpoint import load_model

        return load_model
    if name == "register":
        from registration_engine.engine import register

        return register
    if name == "inverse":
        from registration_engine.field import inverse

        return inverse
    if name == "warp":
        from registration_engine.resampling import warp

        return warp
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
