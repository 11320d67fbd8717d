"""The presets: one frozen row each. A new number here needs the measurement that asked for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from registration_engine.errors import InvalidRequestError

_WIDEST_SHARE = 0.14  # of the body's shortest side: a smoothing that is wider loses how the body as a whole is bent
_NARROWEST = 1.5


@dataclass(frozen=True)
class Manner:
    """How stiff the field is, and what drives it; each force is divided by its RMS before it is mixed.

    Attributes
    ----------
    local_share
        Weight of local correlation beside mutual information, 0…1.
    structure_share
        Weight of the likeness of self-similarities beside both, 0…1.
    step_smoothing, field_smoothing
        Gaussians on each step and on the whole field, in finest voxel sides of the level.
    holds_bends
        The whole field is smoothed by the sharpened Gaussian: wide motion is left as it is, where a plain one pulls it
        back at every step. (TRE of body CT, T1-FLAIR, DCE and contrast agent pairs fell by a quarter to a third.)
    worth
        How many times as similar as what a stiffer one reaches it must be: freedom always finds some likeness.
    """

    local_share: float
    structure_share: float
    step_smoothing: float
    field_smoothing: float
    holds_bends: bool = False
    worth: float = 1.01

    def within(self, voxels: float) -> Manner:
        """The same for a body whose shortest side has so many voxels at the finest level."""
        if not self.holds_bends:
            return self
        return replace(self, field_smoothing=min(self.field_smoothing, max(_WIDEST_SHARE * voxels, _NARROWEST)))


STIFF = Manner(local_share=1.0, structure_share=0.0, step_smoothing=2.0, field_smoothing=4.5, holds_bends=True)
"""For wide smooth motion under noise, such as breathing."""
STRUCTURAL = Manner(local_share=1.0, structure_share=0.5, step_smoothing=2.0, field_smoothing=4.5, holds_bends=True)
"""For smooth motion between contrasts that differ."""
MIDDLE = Manner(local_share=1.0, structure_share=0.0, step_smoothing=1.0, field_smoothing=1.5, holds_bends=True)
"""For the motion of small organs between coarse voxels, such as a liver's in a dynamic."""
SUPPLE = Manner(local_share=0.5, structure_share=0.0, step_smoothing=1.0, field_smoothing=0.6, worth=1.035)
"""For fine folds of one contrast, such as two brains."""


@dataclass(frozen=True)
class Tuning:
    """How a network's weights are fitted to one pair, section 2.3 of the paper.

    Attributes
    ----------
    epochs, seconds
        Whichever comes first.
    lambda_sim, lambda_smooth, alpha_div
        Weights of similarity, of |grad u|² and of (div u)².
    coarsening
        Times the voxel side that the device would take.
    stops_early
        End where ten epochs gained less than a thousandth.
    bf16
        Run the network in bfloat16 where the device has it in hardware; fields and losses stay float32.
    """

    learning_rate: float
    lambda_sim: float = 1.0
    lambda_smooth: float = 1.0
    alpha_div: float = 0.1
    epochs: int = 100
    seconds: float = 60.0
    coarsening: float = 1.0
    stops_early: bool = False
    bf16: bool = True


@dataclass(frozen=True)
class Preset:
    """How one registration is done and what it may not do.

    Attributes
    ----------
    voxels
        Largest working grid; its finest voxel size follows from it, never below the fixed image's own.
    iterations
        Steps of the field per level, coarse to fine, each level half the voxel size of the one before; empty for a
        linear registration.
    manners
        The stiffest first. Each is tried at low resolution from the same start; the one with the highest normalized
        mutual information of the images at full resolution goes on, but a suppler one only where it is clearly better,
        or where a stiffer one loses at the finer levels what had been found before.
    unlike
        Takes the place of the first manner where the images turn out to be of different kinds.
    model
        The network taking part: its prediction is a start of the field, or what is tuned.
    tuning
        Of the network's weights, instead of the field's own optimisation.
    search_mm
        Step of the discrete search that finds large motion before the field is optimised.
    bins, window
        Joint histogram size; side of the correlation window in voxels.
    smallest_determinant
        Floor of the local volume change of the field.
    largest_displacement_mm
        A field that moves any foreground point farther than this beyond the linear map is refused.
    """

    name: str
    voxels: int
    iterations: tuple[int, ...]
    manners: tuple[Manner, ...] = (STIFF, MIDDLE, SUPPLE)
    unlike: Manner = STRUCTURAL
    model: str | None = None
    tuning: Tuning | None = None
    search_mm: float = 7.0
    bins: int = 32
    window: int = 5
    smallest_determinant: float = 0.1
    largest_displacement_mm: float = 60.0

    @property
    def is_deformable(self) -> bool:
        """Whether more than a linear map is looked for."""
        return bool(self.iterations) or self.tuning is not None

    def leaner(self) -> Preset | None:
        """The same at half the resolution, an eighth of the memory; None where nothing can be saved."""
        if self.tuning is not None:
            return replace(self, tuning=replace(self.tuning, coarsening=2 * self.tuning.coarsening))
        if self.iterations[1:]:
            return replace(self, voxels=self.voxels // 8, iterations=self.iterations[:-1])
        return None


PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        preset.name: preset
        for preset in (
            Preset("rigid", voxels=1_000_000, iterations=()),
            Preset("fast", voxels=400_000, iterations=(60, 60, 30)),
            Preset("balanced", voxels=1_000_000, iterations=(60, 60, 60, 40)),
            Preset("accurate", voxels=8_000_000, iterations=(60, 60, 60, 40, 18)),
            Preset("paper-teacher", voxels=0, iterations=(), model="teacher", tuning=Tuning(learning_rate=3e-4)),
            Preset("paper-student", voxels=0, iterations=(), model="student", tuning=Tuning(learning_rate=3e-4)),
        )
    }
)


def preset_named(name: str) -> Preset:
    """The preset of that name.

    Raises
    ------
    InvalidRequestError
        No preset has this name.
    """
    if name not in PRESETS:
        raise InvalidRequestError(f"Preset: got {name!r}, expected one of {', '.join(PRESETS)}")
    return PRESETS[name]
