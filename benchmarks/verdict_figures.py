"""The figures that a verdict rests on, of pairs whose truth is known and of pairs that cannot be registered.

    python -m benchmarks.verdict_figures run --out benchmarks/verdict_figures.jsonl
    python -m benchmarks.verdict_figures table --out benchmarks/verdict_figures.jsonl

`run` goes on where it stopped. Each pair is registered as a job would be (preset fast on a
grid of at most 100,000 voxels), sampled on the grid that would
be delivered, measured by `dicomnode.quality` and judged. Kinds: `known` (same body, the error at landmarks is known),
`same` (same body, no truth), `other` (another person), `hopeless` (another part of the body, mirrored, noise, hardly
any overlap, unrelated anatomy). `table` prints what stands in docs/verdict.md.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.registration import motions
from benchmarks.registration.cases import DATA, Pair, _coarser, _moved, cases
from dicomnode import anatomy, phantom, volumes
from dicomnode.objects import sample_grid
from dicomnode.objects.deformable import interpolate
from dicomnode.quality import Figures, measure
from dicomnode.thresholds import Thresholds
from dicomnode.verdict import judge
from registration_engine import PRESETS, Grid, RegistrationError, Volume, register
from registration_engine.files import read_volume
from registration_engine.synth import synthetic_pair

SITK_LINEAR = 2  # SimpleITK.sitkLinear
COARSE_MM = 4.0
QUICK = replace(PRESETS["fast"], voxels=100_000)
SYNTHETIC, UNRELATED = 10, 4


def pairs() -> Iterator[tuple[str, str, Callable[[], Pair]]]:
    """Name, kind and how to make it, quickest first."""
    for seed in range(SYNTHETIC):
        yield f"synth-{seed}", "known", lambda seed=seed: _synthetic(seed, seed)
    for seed in range(UNRELATED):
        yield f"synth-{seed}-to-{seed + 7}", "hopeless", lambda seed=seed: _synthetic(seed, seed + 7)
    for seed in range(1, 4):
        yield f"phantom-{seed}", "known", lambda seed=seed: _phantom(seed)
    real = {case.name: case for case in cases()}
    known = [f"body-ct-{n}" for n in range(1, 6)] + ["ms-agent-1", "ms-agent-6", "ms-agent-2"]
    known += ["stroke-t2-1", "stroke-flair-1", "dce-3", "dce-8", "dce-27"]
    for name in known:
        yield name, "known", lambda name=name: _coarse(real[name].build())
    for n in (1, 2, 4, 5):
        yield f"liver-mr-{n}", "same", real[f"liver-mr-{n}"].build
    yield "siemens-two-positions", "same", _two_positions
    yield "abdomen-ct-mr", "other", real["abdomen-ct-mr"].build
    yield "brain-2mm", "other", real["brain-2mm"].build
    yield "ms-cross", "other", lambda: _coarse(real["ms-cross"].build())
    yield from _hopeless(lambda: _coarse(real["body-ct-1"].build()), lambda: _coarse(real["ms-agent-1"].build()))


def _hopeless(body: Callable[[], Pair], head: Callable[[], Pair]) -> Iterator[tuple[str, str, Callable[[], Pair]]]:
    liver = lambda: read_volume(DATA / "liver-mr-breathing" / "flip_angle_3.nii.gz")  # noqa: E731
    brain = lambda: head().moving  # noqa: E731
    yield "head-to-body", "hopeless", lambda: Pair(body().fixed, _centred(brain(), body().fixed))
    yield "body-to-head", "hopeless", lambda: Pair(brain(), _centred(body().moving, brain()))
    yield "liver-mr-to-head", "hopeless", lambda: Pair(brain(), _centred(liver(), brain()))
    yield "head-to-liver-mr", "hopeless", lambda: Pair(liver(), _centred(brain(), liver()))
    yield "phantom-to-head", "hopeless", lambda: Pair(brain(), _centred(_phantom(1).moving, brain()))
    for name, axis in (("left-right", 2), ("head-foot", 0), ("front-back", 1)):
        yield f"body-mirrored-{name}", "hopeless", lambda axis=axis: _mirrored(body(), axis)
        yield f"head-mirrored-{name}", "hopeless", lambda axis=axis: _mirrored(head(), axis)
    yield "body-noise", "hopeless", lambda: _noise(body())
    yield "head-noise", "hopeless", lambda: _noise(head())
    for share in (0.1, 0.2, 0.35, 0.5):
        kind = "hopeless" if share < 0.3 else "known"
        yield f"body-overlap-{share:.0%}", kind, lambda share=share: _overlapping(body(), share)
    yield "chest-to-pelvis", "hopeless", lambda: _other_part()
    for seed in (1, 2):
        yield f"body-{seed}-moved-60mm", "hopeless", lambda seed=seed: _far(seed, 60)


def _synthetic(one: int, other: int) -> Pair:
    """The fixed image of one drawn pair and the moving image of another, or the same, at 4 mm."""
    shape, spacing = (48, 48, 48), 4.0
    drawn, second = (synthetic_pair(5, n, shape, torch.device("cpu")) for n in (one, other))
    grid = _grid(shape, np.full(3, spacing))
    here = np.argwhere(drawn.body.numpy() > 0)
    here = np.random.default_rng(one).permutation(here)[:3000]
    moved = drawn.displacement.numpy()[:, here[:, 0], here[:, 1], here[:, 2]].T * spacing
    points = grid.points_mm(here.astype(float))
    marks = (points, points + moved) if one == other else (points[:0], points[:0])
    return Pair(Volume(drawn.fixed.numpy(), grid), Volume(second.moving.numpy(), grid), (), None, None, *marks)


def _phantom(seed: int) -> Pair:
    """The demonstration's CT study, native and portal venous, at about 6 mm."""
    body, shape = anatomy.build(seed), (48, 72, 72)
    images = [phantom.draw(body, contrast=contrast, shape=shape) for contrast in (False, True)]
    grid = _grid(shape, np.divide(phantom.FIELD_OF_VIEW_MM, shape))
    rng = np.random.default_rng(seed)
    fixed, moving = (Volume(image + rng.normal(0, 10, shape), grid) for image in images)
    marks = phantom.landmarks(body, seed)
    return Pair(fixed, moving, (), None, None, marks, marks + phantom.true_displacement(marks))


def _grid(shape: tuple[int, int, int], spacing_mm: np.ndarray) -> Grid:
    """Axes z, y, x; the middle at the origin."""
    affine = np.eye(4)
    affine[:3, :3] = np.diag(spacing_mm)[::-1]
    affine[:3, 3] = -affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    return Grid(shape, affine)


def _coarse(pair: Pair) -> Pair:
    """Both images at 4 mm where they are finer; landmarks stay where they are."""
    images = [
        v if v.grid.spacing_mm.min() >= 2 else _coarser(v, COARSE_MM, SITK_LINEAR) for v in (pair.fixed, pair.moving)
    ]
    return Pair(*images, (), None, None, pair.fixed_mm, pair.moving_mm)


def _two_positions() -> Pair:
    folder = DATA / "dicom" / "siemens-mr-two-positions"
    read = [volumes.load(volumes.read(sorted((folder / name).glob("*.dcm")))) for name in ("HFS_t1", "HFDL_t1")]
    return Pair(*read)


def _centred(moving: Volume, fixed: Volume) -> Volume:
    """The image moved so that the middles of both grids meet."""
    middles = [v.grid.points_mm((np.array(v.grid.shape) - 1) / 2) for v in (fixed, moving)]
    affine = moving.grid.affine.copy()
    affine[:3, 3] += middles[0] - middles[1]
    return Volume(moving.voxels, Grid(moving.grid.shape, affine))


def _mirrored(pair: Pair, axis: int) -> Pair:
    return Pair(pair.fixed, Volume(np.flip(pair.moving.voxels, axis).copy(), pair.moving.grid))


def _noise(pair: Pair) -> Pair:
    voxels = np.random.default_rng(3).permutation(pair.moving.voxels.ravel()).reshape(pair.moving.voxels.shape)
    return Pair(pair.fixed, Volume(voxels, pair.moving.grid))


def _overlapping(pair: Pair, share: float) -> Pair:
    """Of the moving image only this share of its slices, from the end of the head."""
    kept = max(4, int(share * pair.moving.grid.shape[0]))
    affine = pair.moving.grid.affine.copy()
    affine[:3, 3] = pair.moving.grid.points_mm(np.array([pair.moving.grid.shape[0] - kept, 0.0, 0.0]))
    voxels = pair.moving.voxels[-kept:]
    grid = Grid((kept, *pair.moving.grid.shape[1:]), affine)
    at = grid.indices(pair.moving_mm)
    seen = ((at >= 0) & (at <= np.array(grid.shape) - 1)).all(1)
    return Pair(pair.fixed, Volume(voxels, grid), (), None, None, pair.fixed_mm[seen], pair.moving_mm[seen])


def _other_part() -> Pair:
    """Upper and lower third of one body CT, laid over each other."""
    whole = read_volume(DATA / "abdomen-ct-mr" / "body_ct.nii.gz")
    third = whole.grid.shape[0] // 3
    grid = Grid((third, *whole.grid.shape[1:]), whole.grid.affine)
    return Pair(Volume(whole.voxels[-third:], grid), Volume(whole.voxels[:third], grid))


def _far(seed: int, largest_mm: float) -> Pair:
    """A deformation beyond what any preset is made for."""
    whole = read_volume(DATA / "abdomen-ct-mr" / "body_ct.nii.gz")
    motion = motions.waves(whole.grid, seed, largest_mm=largest_mm, wavelengths_mm=(120, 260))
    return _moved(whole, whole, whole.grid, motion, seed, outside=-1024)


def judged(pair: Pair) -> dict[str, Any]:
    """The figures of one pair and, where the truth is known, the error at its landmarks before and after."""
    row: dict[str, Any] = {}
    try:
        found = register(pair.fixed, pair.moving, preset=QUICK, device="cpu")
    except RegistrationError as error:
        return {"refused": f"{type(error).__name__}: {error}"}
    sampled = sample_grid(found)
    quality = measure(pair.fixed, pair.moving, found, sampled.field, grid_error_mm=sampled.max_error_mm)
    row["figures"] = quality.figures.as_dict()
    if len(pair.fixed_mm):
        error = np.linalg.norm(pair.fixed_mm + _at(sampled.field, pair.fixed_mm) - pair.moving_mm, axis=1)
        start = np.linalg.norm(pair.fixed_mm - pair.moving_mm, axis=1)
        row["error_mm"] = {
            name: [float(f(each)) for each in (start, error)]
            for name, f in (("mean", np.mean), ("p95", lambda e: np.percentile(e, 95)))
        }
    return row


def _at(field: Any, points: np.ndarray) -> np.ndarray:
    """The field at points, trilinear."""
    return np.asarray(interpolate(field.vectors, field.grid.indices(points)))


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Every pair with its figures and what the default limits make of them, then how many of each kind are what."""
    counts: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
    yield f"| pair | error mm | {' | '.join(COLUMNS)} | verdict |"
    yield "|---|---|" + "---:|" * len(COLUMNS) + "---|"
    for kind in KINDS:
        for row in sorted((r for r in rows if r["kind"] == kind), key=lambda r: r["name"]):
            if "refused" in row:
                counts[kind]["refused by the engine"] += 1
                yield f"| {row['name']} ({kind}) | | {' | ' * len(COLUMNS)}refused by the engine |"
                continue
            figures = Figures.from_dict(row["figures"])
            verdict, _ = judge(figures, Thresholds())
            error = row.get("error_mm", {}).get("mean")
            has_grown = error is not None and error[1] > error[0]
            counts[kind][f"{verdict}{', error grew' if has_grown else ''}"] += 1
            values = [f"{get(figures):.2f}" for get in COLUMNS.values()]
            told = "" if error is None else f"{error[0]:.1f} → {error[1]:.1f}"
            yield f"| {row['name']} ({kind}) | {told} | {' | '.join(values)} | {verdict} |"
    yield ""
    for kind, found in counts.items():
        yield f"* {kind}: " + ", ".join(f"{number} {name}" for name, number in sorted(found.items()))


COLUMNS: dict[str, Callable[[Figures], float]] = {
    "similarity gain": lambda f: f.similarity_after - f.similarity_before,
    "patch NMI gain": lambda f: f.patch_nmi_after - f.patch_nmi_before,
    "patch NMI after": lambda f: f.patch_nmi_after,
    "fell": lambda f: f.patch_nmi_fell_fraction,
    "overlap": lambda f: f.overlap_fraction,
    "sdlogj": lambda f: f.sdlogj,
    "nonlinear max mm": lambda f: f.nonlinear_max_mm,
    "rotation": lambda f: f.rotation_deg,
    "translation mm": lambda f: f.translation_mm,
    "inverse p95 mm": lambda f: f.inverse_consistency_p95_mm,
    "grid error mm": lambda f: f.grid_error_mm,
}
KINDS = ("known", "same", "other", "hopeless")


def main() -> None:
    """Measure, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("action", choices=("run", "table"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/verdict_figures.jsonl"))
    parser.add_argument("--only", default="", help="names that begin so")
    options = parser.parse_args()
    rows = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.exists() else []
    if options.action == "table":
        print("\n".join(table(rows)))
        return
    done = {row["name"] for row in rows}
    with options.out.open("a") as file:
        for name, kind, build in pairs():
            if name not in done and name.startswith(options.only):
                row = {"name": name, "kind": kind, **judged(build())}
                print(name, flush=True)
                file.write(json.dumps(row) + "\n")
                file.flush()


if __name__ == "__main__":
    main()
