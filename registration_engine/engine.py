"""`register`: two volumes in, one judged registration out."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from registration_engine import affine, optimize, tuning
from registration_engine import field as fields
from registration_engine.checkpoint import LoadedModel, load_model
from registration_engine.devices import device_named
from registration_engine.errors import (
    ImplausibleResultError,
    InvalidRequestError,
    NoOverlapError,
    OutOfDeviceMemoryError,
)
from registration_engine.metrics import Regularity, normalized_mutual_information, regularity
from registration_engine.prepare import Prepared, prepared
from registration_engine.presets import Preset, preset_named
from registration_engine.spaces import (
    Lattice,
    Matrix,
    linear_coordinates,
    sample,
    sample_where_valid,
    sampling_from_world,
    world_from_lattice,
    world_from_sampling,
)
from registration_engine.volume import DisplacementField, Grid, Registration, Report, Volume

Progress = Callable[[str, float], None]
_JUDGED_VOXELS = 1_500_000  # similarity is measured on a thinned fixed grid of this size
_CONVINCING = 0.15  # similarity beyond chance that images in unrelated places must reach


def register(
    fixed: Volume,
    moving: Volume,
    *,
    preset: str | Preset = "balanced",
    device: str = "auto",
    seed: int = 0,
    fixed_mask: Volume | None = None,
    moving_mask: Volume | None = None,
    start: DisplacementField | None = None,
    model: LoadedModel | None = None,
    progress: Progress | None = None,
) -> Registration:
    """Find where each point of the fixed image lies in the moving image.

    Grids may differ in size, spacing, orientation and extent; contrasts may differ. Points outside the moving image's
    field of view exert no force. The same input on the same device gives the same bits.

    Parameters
    ----------
    preset
        A name of `PRESETS`, or a row of one's own.
    device
        "auto", "cpu", "cuda" or "cuda:N"; "auto" takes an accelerator where there is one.
    seed
        Recorded in the report. This form of the engine draws no random numbers.
    fixed_mask, moving_mask
        On their image's grid; only voxels above 0 count.
    start
        Total displacement, linear part included, on any grid in fixed space: the result of a neighbouring phase, or a
        network's prediction. Its rigid part is one more start of the linear stage; the whole becomes the start of the
        field only where it is more similar than none.
    model
        The network of a preset that has one; the shipped one by default. A copy is tuned unless the model adapts.
    progress
        Called with a stage ("prepare", "linear", "field", "judge") and the share of it that is done, 0…1. An
        exception it raises ends the registration.

    Raises
    ------
    InvalidRequestError
        Unknown preset or device.
    InvalidVolumeError
        Constant image, fewer than four voxels along an axis, a mask on another grid or an empty one.
    NoOverlapError
        The images share no physical space after every start that was tried, or none as given and are not alike.
    ImplausibleResultError
        The field folds, or moves the body farther than the preset allows.
    OutOfDeviceMemoryError
        The device has too little memory even for half the resolution, which the report calls profile "lean".
    """
    chosen = preset_named(preset) if isinstance(preset, str) else preset
    torch_device = device_named(device)
    say = progress or (lambda *_: None)
    attempts = [("full", chosen)]
    if (leaner := chosen.leaner()) is not None:
        attempts.append(("lean", leaner))
    for profile, spent in attempts:
        try:
            network = _network(chosen, model, torch_device)
            with torch.no_grad():
                return _register(
                    fixed, moving, spent, profile, torch_device, seed, fixed_mask, moving_mask, start, network, say
                )
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
            reason = str(error)
        if torch_device.type == "cuda":
            torch.cuda.empty_cache()
    raise OutOfDeviceMemoryError(
        f"Device {torch_device}: too little memory for fixed {fixed.grid.shape}, moving {moving.grid.shape}, "
        f"preset {chosen.name}, profile {profile}: {reason}"
    )


def _register(
    fixed_volume: Volume,
    moving_volume: Volume,
    preset: Preset,
    profile: str,
    device: torch.device,
    seed: int,
    fixed_mask: Volume | None,
    moving_mask: Volume | None,
    given: DisplacementField | None,
    model: LoadedModel | None,
    progress: Progress,
) -> Registration:
    seconds: dict[str, float] = {}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)

    with _timed("prepare", seconds, progress):
        fixed = prepared(fixed_volume, fixed_mask, "Fixed", device)
        moving = prepared(moving_volume, moving_mask, "Moving", device)

    with _timed("linear", seconds, progress):
        with _one_thread():
            start = affine.align(
                fixed,
                moving,
                with_affine=preset.is_deformable,
                near=None if given is None else affine.rigid_part(given),
                progress=lambda part: progress("linear", part),
            )
        judge = _Judge(fixed, moving)
        before = judge.similarity(np.eye(4) if start.world_overlaps else start.centered)
        rigid, linear, after = start.rigid, start.affine, judge.similarity(start.affine)
        if start.world_overlaps and after < before:  # never worse than no registration, nor the field's start
            rigid, linear, after = np.eye(4), np.eye(4), before

    field: Tensor | None = None
    lattice = Lattice.of(fixed.grid, device)
    if preset.is_deformable:

        def on_fixed(part: Tensor, grid: Grid) -> Tensor:
            # Without the kinks of linear interpolation: whoever samples the field coarsely meets a smooth one.
            whole = fields.resize(part, grid, fixed.grid)
            return fields.smooth(whole, 0.5 * float(grid.spacing_mm.min()), lattice)

        with _timed("field", seconds, progress):
            starts = [] if given is None else [_lattice_displacement(given, fixed, linear)]
            if model is not None and preset.tuning is None:
                starts.append(tuning.prediction(fixed, moving, linear, model.network))
            if model is not None and preset.tuning is not None:
                small, grid = tuning.refine(
                    fixed, moving, linear, preset, model.network, lambda part: progress("field", part), model.adapts
                )
            else:
                small, grid = optimize.refine(
                    fixed,
                    moving,
                    linear,
                    preset,
                    starts=starts,
                    judge=lambda part, grid: judge.similarity(linear, fields.resize(part, grid, judge.grid)),
                    progress=lambda part: progress("field", part),
                )
            field = on_fixed(small, grid)
            refined = judge.similarity(linear, fields.resize(field, fixed.grid, judge.grid))
            if refined > after:
                after = refined
            else:
                field.zero_()

    with _timed("judge", seconds, progress):
        found = Regularity(0.0, 0.0, 0.0)
        if field is not None:
            found = regularity(field, fixed.foreground, lattice.spacing_mm)
            if found.folding_fraction > 0:
                # What was one to one on the working grid can fold by a hair between its voxels.
                field = optimize.unfolded(field, lattice, smallest_determinant=preset.smallest_determinant)
                found = regularity(field, fixed.foreground, lattice.spacing_mm)
                after = judge.similarity(linear, fields.resize(field, fixed.grid, judge.grid))
        if not start.world_overlaps:
            part = None if field is None else fields.resize(field, fixed.grid, judge.grid)
            _refuse_unlike(after - judge.similarity(linear, part, by_chance=True))
        _refuse_implausible(found, preset)
        displacement = None if field is None else _world_displacement(field, fixed.grid, linear)
    report = Report(
        preset=preset.name,
        profile=profile,
        device=str(device),
        seed=seed,
        model_sha256=None if model is None else model.sha256,
        similarity_before=before,
        similarity_after=after,
        folding_fraction=found.folding_fraction,
        sdlogj=found.sdlogj,
        max_displacement_mm=found.max_displacement_mm,
        seconds=seconds,
        peak_memory_bytes=_peak_memory(device),
    )
    return Registration(fixed_volume.grid, rigid, linear, displacement, report)


class _Judge:
    """Measures every candidate map on the same points of the fixed grid."""

    def __init__(self, fixed: Prepared, moving: Prepared) -> None:
        voxels = float(np.prod(fixed.grid.shape))
        step = max(1, int(np.ceil((voxels / _JUDGED_VOXELS) ** (1 / 3))))
        steps = [min(step, max(1, n // 8)) for n in fixed.grid.shape]
        k, j, i = steps
        self._fixed, self._valid = fixed.image[0, ::k, ::j, ::i], fixed.valid[0, ::k, ::j, ::i]
        affine = fixed.grid.affine.copy()
        affine[:3, :3] *= steps
        z, y, x = self._fixed.shape
        self.grid = Grid((z, y, x), affine)
        self._moving = moving.layers()
        self._identity = Lattice.of(self.grid, fixed.image.device).identity
        self._world_from_grid = world_from_sampling(self.grid)
        self._moving_from_world = sampling_from_world(moving.grid)
        self._world_from_lattice = world_from_lattice(self.grid)

    def similarity(self, moving_from_fixed: Matrix, field: Tensor | None = None, *, by_chance: bool = False) -> float:
        """Normalized mutual information over the overlap after moving_from_fixed ∘ (id + field), field on `grid`.

        With `by_chance` the moving image's values are dealt out anew over the overlap: what remains is what so few
        voxels have in common by accident.
        """
        to_moving = self._moving_from_world @ moving_from_fixed
        points = linear_coordinates(self._identity, torch.from_numpy(to_moving @ self._world_from_grid))
        if field is not None:
            per_mm = torch.tensor(to_moving[:3, :3] @ self._world_from_lattice, dtype=torch.float32)
            points = points + torch.tensordot(per_mm.to(field.device), field, dims=1)
        warped, valid = sample_where_valid(self._moving, points)
        if by_chance:
            inside = torch.nonzero(self._valid * valid > 0, as_tuple=True)
            order = torch.from_numpy(np.random.default_rng(0).permutation(len(inside[0]))).to(warped.device)
            warped[inside] = warped[inside][order]
        return normalized_mutual_information(self._fixed, warped, self._valid * valid)


def _is_out_of_memory(error: Exception) -> bool:
    """Whether an allocation failed, on an accelerator or in PyTorch's allocator of the CPU."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "allocate memory" in str(error)


def _network(preset: Preset, given: LoadedModel | None, device: torch.device) -> LoadedModel | None:
    """The network a preset starts from or tunes, on the device."""
    if preset.model is None:
        return None
    if given is None:
        return load_model(preset.model, device=device)
    if given.name != preset.model:
        raise InvalidRequestError(f"Model: got {given.name!r}, expected {preset.model!r} (preset {preset.name})")
    return LoadedModel(given.name, given.sha256, given.network.to(device), given.adapts)


@contextmanager
def _timed(stage: str, seconds: dict[str, float], progress: Progress) -> Iterator[None]:
    progress(stage, 0.0)
    started = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - started
    progress(stage, 1.0)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Keep small work on one thread: on a busy machine a second one only waits, for up to ten times the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _refuse_unlike(beyond_chance: float) -> None:
    if beyond_chance < _CONVINCING:
        raise NoOverlapError(
            f"Fixed and moving share no physical space, and brought together they do not resemble each other: "
            f"similarity {beyond_chance:.3f} beyond chance, expected {_CONVINCING:g} or more"
        )


def _refuse_implausible(found: Regularity, preset: Preset) -> None:
    if found.folding_fraction > 0:
        raise ImplausibleResultError(
            f"The field folds in {found.folding_fraction:.3%} of the fixed body, expected nowhere"
        )
    if found.max_displacement_mm > preset.largest_displacement_mm:
        raise ImplausibleResultError(
            f"The field moves the body by up to {found.max_displacement_mm:.1f} mm beyond the linear map, "
            f"expected {preset.largest_displacement_mm:g} mm at most (preset {preset.name})"
        )


def _world_displacement(field: Tensor, grid: Grid, moving_from_fixed: Matrix) -> npt.NDArray[np.float32]:
    """(Z, Y, X, 3) LPS mm: what x → moving_from_fixed @ (x + field) adds to moving_from_fixed @ x."""
    world = torch.tensor(moving_from_fixed[:3, :3] @ world_from_lattice(grid), dtype=torch.float32)
    moved = torch.tensordot(world.to(field.device), field, dims=1)
    return np.ascontiguousarray(moved.movedim(0, -1).cpu().numpy(), dtype=np.float32)


def _lattice_displacement(total: DisplacementField, fixed: Prepared, moving_from_fixed: Matrix) -> tuple[Tensor, Grid]:
    """What a total displacement adds before moving_from_fixed, (3, Z, Y, X) lattice mm, and its grid along fixed's."""
    grid = fixed.reduced(float(total.grid.spacing_mm.min())).grid
    device = fixed.image.device
    identity, from_sampling = Lattice.of(grid, device).identity, world_from_sampling(grid)
    vectors = torch.tensor(total.vectors, device=device).movedim(-1, 0)
    there = linear_coordinates(identity, torch.from_numpy(sampling_from_world(total.grid) @ from_sampling))
    points = linear_coordinates(identity, torch.from_numpy(from_sampling))
    back = linear_coordinates(points + sample(vectors, there), torch.from_numpy(np.linalg.inv(moving_from_fixed)))
    to_lattice = torch.tensor(world_from_lattice(grid).T.copy(), dtype=torch.float32, device=device)
    return torch.tensordot(to_lattice, back - points, dims=1), grid


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts KiB
