"""What it costs: a whole simulated DCE series through `register_4d`, and one pair at growing sizes.

Both run in a process of their own (`python series.py dce PRESET` or `pair PRESET SLICES ROWS COLUMNS`) and print one
line of JSON: the volumes are drawn first, their seconds are not counted, imports are.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.registration import dynamic
from benchmarks.registration.methods import peak_mb, so_far
from registration_engine import evaluation as ev
from registration_engine import pictures, register
from registration_engine.dynamic import Phase, region_mean, register_4d

PICTURES = Path(__file__).resolve().parents[1] / "pictures"
SIZES = ((32, 64, 64), (48, 96, 96), (64, 128, 128), (96, 192, 192), (128, 256, 256))


def series(preset: str) -> dict[str, Any]:
    """All phases to the middle one: error at every voxel of the organs, uptake against the truth, seconds, memory."""
    imported = so_far()
    phases = [dynamic.volume(n) for n in range(dynamic.PHASES)]
    grid, region = phases[0].grid, dynamic.dome()
    drawn, drawn_mb = so_far(), peak_mb()
    found: dict[int, Phase] = {}
    for phase in register_4d(phases, preset=preset, device="cpu", reference=dynamic.REFERENCE):
        found[phase.number] = phase
        print(f"phase {phase.number}", file=sys.stderr, flush=True)
    told = _cost(imported, drawn) | {"drawn_mb": drawn_mb}
    organs = np.logical_or.reduce([dynamic.organ(name) for name in ("liver", "spleen", "kidney right", "kidney left")])
    here = grid.points_mm(np.argwhere(organs)[::7].astype(float))
    errors: dict[str, list[float]] = {"before": [], "after": []}
    curves: dict[str, list[float]] = {"truth": [], "before": [], "after": []}
    for number, image in enumerate(phases):
        there = here + dynamic.motion(number)(here)
        curves["truth"].append(region_mean(dynamic.volume(number, still=True, noise=0.0), grid, region))
        curves["before"].append(region_mean(image, grid, region))
        if number == dynamic.REFERENCE:
            curves["after"].append(curves["before"][-1])
            continue
        registration = found[number].registration
        errors["before"].append(float(np.linalg.norm(there - here, axis=1).mean()))
        if registration is None:
            curves["after"].append(float("nan"))
            continue
        field = registration.total_field()
        errors["after"].append(float(ev.landmark_errors(field, here, there).mean()))
        curves["after"].append(region_mean(image, grid, region, field))
    truth = np.array(curves["truth"])
    PICTURES.mkdir(exist_ok=True)
    shown = {"known": curves["truth"], "before registration": curves["before"], preset: curves["after"]}
    pictures.curves(shown, title="Uptake at the liver dome, simulated DCE", across="phase", up="mean").save(
        PICTURES / f"dce-uptake-{preset}.png"
    )
    return told | {
        "failed_phases": sum(p.registration is None for p in found.values()),
        "tre_before_mm": np.mean(errors["before"]),
        "tre_mm": np.mean(errors["after"]),
        "tre_worst_phase_mm": np.max(errors["after"]),
        "uptake_error_before": np.sqrt(np.mean((np.array(curves["before"]) - truth) ** 2)),
        "uptake_error": np.sqrt(np.nanmean((np.array(curves["after"]) - truth) ** 2)),
    }


def pair(preset: str, shape: tuple[int, int, int]) -> dict[str, Any]:
    """Two phases of the phantom drawn at a size, registered."""
    imported = so_far()
    fixed, moving = (dynamic.volume(n, on=dynamic.grid(shape)) for n in (dynamic.REFERENCE, 8))
    drawn, drawn_mb = so_far(), peak_mb()
    register(fixed, moving, preset=preset, device="cpu")
    return _cost(imported, drawn) | {"drawn_mb": drawn_mb}


def _cost(imported: tuple[float, float], drawn: tuple[float, float]) -> dict[str, float]:
    wall, cpu = (i + now - d for i, d, now in zip(imported, drawn, so_far(), strict=True))
    return {"wall_s": wall, "cpu_s": cpu, "peak_mb": peak_mb()}


if __name__ == "__main__":
    kind, name, *size = sys.argv[1:]
    measured = series(name) if kind == "dce" else pair(name, (int(size[0]), int(size[1]), int(size[2])))
    print(json.dumps({key: round(float(value), 4) for key, value in measured.items()}))
