"""4D: every phase of a dynamic series registered to one of them, and what a region takes up over time.

Volumes in, registrations out, one by one; free of files.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from registration_engine.checkpoint import LoadedModel, load_model
from registration_engine.engine import register
from registration_engine.errors import (
    ImplausibleResultError,
    InvalidRequestError,
    InvalidVolumeError,
    NoOverlapError,
)
from registration_engine.evaluation import Mask
from registration_engine.prepare import prepared
from registration_engine.presets import Preset, preset_named
from registration_engine.resampling import warp
from registration_engine.volume import DisplacementField, Grid, Registration, Volume

PhaseProgress = Callable[[int, str, float], None]


@dataclass(frozen=True, eq=False)
class Phase:
    """What became of one phase.

    Attributes
    ----------
    number
        Zero-based position in the series.
    registration
        None where it failed.
    error
        Why it failed; None where it did not.
    """

    number: int
    registration: Registration | None
    error: ImplausibleResultError | InvalidVolumeError | NoOverlapError | None = None


def register_4d(
    phases: Sequence[Volume],
    *,
    reference: int | str = "middle",
    preset: str | Preset = "balanced",
    device: str = "auto",
    seed: int = 0,
    reference_mask: Volume | None = None,
    model: LoadedModel | None = None,
    progress: PhaseProgress | None = None,
) -> Iterator[Phase]:
    """Register every phase of a series to a reference phase, from the reference outwards.

    Each phase starts from what its neighbour nearer to the reference found; the engine takes that start only where it
    is better than none. A network that is tuned goes on from the weights it had learned there, and stops where it gains
    nothing more. Both sides of the reference are independent of each other: phases added at one end change
    nothing at the other, and a series read backwards gives the same registrations. A phase that cannot be registered
    is told and left out; the next one starts from the last good neighbour.

    Parameters
    ----------
    phases
        In order of time; read one at a time, so that a sequence may load them when asked. Two fields are held at most.
    reference
        "middle" (zero-based n // 2), "first", or a zero-based number.
    reference_mask
        On the reference's grid; only voxels above 0 count.
    model
        The network of a preset that has one; the shipped one by default. Copies are tuned.
    progress
        Called with the number of the phase, a stage as `register` names it, and the share of the stage that is done.
        An exception it raises ends the series.

    Returns
    -------
    Iterator[Phase]
        One for each phase but the reference, from the reference to the end, then from the reference to the beginning.

    Raises
    ------
    InvalidRequestError
        Fewer than two phases, no such reference, preset or device.
    InvalidVolumeError
        The reference itself cannot be registered to.
    OutOfDeviceMemoryError
        The device has too little memory.
    """
    middle = reference_number(reference, len(phases))
    fixed = phases[middle]
    # What is wrong with the reference is not told once per phase.
    prepared(fixed, reference_mask, "Reference", torch.device("cpu"))

    chosen = preset_named(preset) if isinstance(preset, str) else preset
    if chosen.model is not None and model is None:
        model = load_model(chosen.model)
    later = chosen if chosen.tuning is None else replace(chosen, tuning=replace(chosen.tuning, stops_early=True))

    def one(number: int, start: DisplacementField | None, network: LoadedModel | None) -> Phase:
        def told(stage: str, part: float) -> None:
            if progress is not None:
                progress(number, stage, part)

        try:
            found = register(
                fixed,
                phases[number],
                preset=chosen if start is None else later,
                device=device,
                seed=seed,
                fixed_mask=reference_mask,
                start=start,
                model=network,
                progress=told,
            )
        except (ImplausibleResultError, InvalidVolumeError, NoOverlapError) as error:
            return Phase(number, None, error)
        return Phase(number, found)

    def outwards() -> Iterator[Phase]:
        for side in (range(middle + 1, len(phases)), range(middle - 1, -1, -1)):
            start: DisplacementField | None = None
            own = None if model is None else replace(model, network=copy.deepcopy(model.network), adapts=True)
            for number in side:
                phase = one(number, start, own)
                if phase.registration is not None:
                    start = phase.registration.total_field()
                yield phase

    return outwards()


def reference_number(reference: int | str, phases: int) -> int:
    """The zero-based number of the reference phase.

    Raises
    ------
    InvalidRequestError
        Fewer than two phases, or no such phase.
    """
    if phases < 2:
        raise InvalidRequestError(f"Series: got {phases} phase{'s' * (phases != 1)}, expected two or more")
    named = {"middle": phases // 2, "first": 0}
    if reference in named:
        return named[str(reference)]
    try:
        number = int(reference)
    except ValueError:
        number = -1
    if not 0 <= number < phases:
        raise InvalidRequestError(f"Reference: got {reference!r}, expected middle, first or 0 to {phases - 1}")
    return number


def region_mean(volume: Volume, onto: Grid, region: Mask, field: DisplacementField | None = None) -> float:
    """Mean of an image over a region of the reference grid, through a field where there is one.

    One point of an uptake curve. Voxels the image does not reach are left out; NaN where it reaches none.

    Parameters
    ----------
    region
        (Z, Y, X) on `onto`.
    """
    if region.shape != onto.shape or not region.any():
        raise InvalidVolumeError(f"Region: got shape {region.shape}, expected {onto.shape} with one voxel or more")
    through = field or DisplacementField(np.zeros((*onto.shape, 3), np.float32), onto)
    # Darker than every voxel: what the image does not reach.
    outside = float(volume.voxels.min()) - 1.0
    values = warp(volume, through, onto, outside=outside).voxels[region]
    inside = values[values >= outside + 1.0]
    return float(inside.mean()) if inside.size else float("nan")
