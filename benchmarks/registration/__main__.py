"""Our registration beside the ones people use today: `python -m benchmarks.registration [COMMAND] …`.

run      every cell that has no result yet, one after the other; stop it at any time and start it again
series   the 30-phase DCE through register_4d, and one pair at growing sizes: what it costs
table    RESULTS.md from the results there are
install  one environment per peer under build/peers

A cell is one (row, method). Each method runs in a process of its own, one thread where it can be told so; what it
found is judged here, the same way for all. One line per cell in results/METHOD.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.registration.cases import DATA, Case, Pair, cases
from benchmarks.registration.series import SIZES
from benchmarks.registration.table import write_table
from registration_engine import DisplacementField, Volume, warp
from registration_engine import evaluation as ev
from registration_engine.files import read_field, write_volume
from registration_engine.patches import patch_mutual_information

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RESULTS = HERE.parent / "results"
WORK = ROOT / "build" / "bench"
PEERS = ROOT / "build" / "peers"
LIMIT_S = 30 * 60
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS")
# ANTs samples at random: without a seed its affine start fails on one run in four of abdomen-ct-mr.
ENVIRONMENT = dict.fromkeys(THREADS, "1") | {"ANTS_RANDOM_SEED": "1"}
PACKAGES = {
    "demons": ("sitk", ["SimpleITK", "numpy"]),
    "ants-mi": ("ants", ["antspyx==0.6.3", "SimpleITK"]),
    "ants-cc": ("ants", ["antspyx==0.6.3", "SimpleITK"]),
    "greedy": ("greedy", ["picsl_greedy==1.4.0.3", "SimpleITK"]),
    "elastix": ("elastix", ["itk-elastix==0.25.4", "SimpleITK"]),
    "convexadam": ("convexadam", ["convexAdam==0.2.0", "torch==2.13.0"]),
    "fireants": ("fireants", ["fireants==1.5.0", "torch==2.13.0", "setuptools<82"]),
}
OURS = ("fast", "balanced", "accurate", "paper-student", "paper-teacher")
FIRST = ("before", "demons", "ants-mi", "convexadam", "greedy", "elastix", "fireants")
LAST = ("ants-cc",)  # mostly over the limit


def main() -> int:
    """Run one command."""
    parser = argparse.ArgumentParser(prog="benchmarks.registration", description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=("run", "series", "table", "install"), nargs="?", default="run")
    parser.add_argument("--methods", nargs="*", help="default: every peer, then ours")
    parser.add_argument("--rows", nargs="*", help="names or beginnings of names; default: all")
    options = parser.parse_args()
    if options.command == "install":
        return install()
    if options.command == "run":
        if not DATA.is_dir():
            print(f"no images at {DATA}", file=sys.stderr)
            return 2
        rows = [c for c in cases() if not options.rows or any(c.name.startswith(r) for r in options.rows)]
        if options.methods:
            run(rows, options.methods)
        else:
            run(rows, FIRST)
            run(rows, OURS)
            run(rows, LAST)
    if options.command == "series":
        series(options.methods or ("fast", "balanced"))
    write_table(HERE.parent / "RESULTS.md", RESULTS, cases())
    return 0


def install() -> int:
    """One environment per peer, so that none pins what another needs."""
    for name, packages in PACKAGES.values():
        if not (PEERS / name).is_dir():
            subprocess.run([sys.executable, "-m", "venv", PEERS / name], check=True)
            subprocess.run([PEERS / name / "bin/pip", "install", "--quiet", *packages], check=True)
    return 0


def run(rows: list[Case], methods: tuple[str, ...] | list[str]) -> None:
    """Fill the cells that are missing, row by row."""
    for case in rows:
        missing = [method for method in methods if case.name not in done(method)]
        if not missing:
            continue
        folder = WORK / case.name
        folder.mkdir(parents=True, exist_ok=True)
        pair = case.build()
        for name, volume in (("fixed", pair.fixed), ("moving", pair.moving)):
            write_volume(folder / f"{name}.nii", volume)
        for method in missing:
            cell = {"row": case.name, "method": method, **measured(case, pair, method, folder)}
            keep(cell | {"machine": machine(), "versions": versions(method)})
        shutil.rmtree(folder)


def series(presets: tuple[str, ...] | list[str]) -> None:
    """Sizes first, then the whole series; each cell in a process of its own, kept under the name of its command."""
    wanted = [["pair", preset, *map(str, size)] for size in SIZES for preset in presets]
    for arguments in [*wanted, *(["dce", preset] for preset in presets)]:
        row = " ".join(arguments)
        if row in done("series"):
            continue
        load = os.getloadavg()[0]
        process = subprocess.run(
            [sys.executable, "-m", "benchmarks.registration.series", *arguments],
            stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT, env=os.environ | ENVIRONMENT,
        )  # fmt: skip
        cell = {"row": row, "method": "series", **json.loads(process.stdout)}
        cell |= {"load": [round(load, 1), round(os.getloadavg()[0], 1)]}
        keep(cell | {"machine": machine(), "versions": versions(arguments[1])})


def keep(cell: dict[str, Any]) -> None:
    """Add one line to the results."""
    with (RESULTS / f"{cell['method']}.jsonl").open("a") as lines:
        lines.write(json.dumps(cell) + "\n")
    print({key: value for key, value in cell.items() if key not in ("machine", "versions")}, flush=True)


def done(method: str) -> dict[str, dict[str, Any]]:
    """The cells there are, by row."""
    path = RESULTS / f"{method}.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return {cell["row"]: cell for cell in map(json.loads, lines)}


def measured(case: Case, pair: Pair, method: str, folder: Path) -> dict[str, Any]:
    """Run one method in its own process and judge what it found."""
    if method == "before":
        return judged(pair, DisplacementField(np.zeros((*pair.fixed.grid.shape, 3)), pair.fixed.grid))
    out = folder / method
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    python = PEERS / PACKAGES[method][0] / "bin" / "python" if method in PACKAGES else Path(sys.executable)
    if not python.exists():
        return {"failed": f"no environment at {python.relative_to(ROOT)}; run `install` first"}
    load, wall = os.getloadavg()[0], time.monotonic()
    with (out / "log").open("w") as log:
        process = subprocess.Popen(
            [python, HERE / "methods.py", method, folder / "fixed.nii", folder / "moving.nii", case.contrast, out],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | ENVIRONMENT | {"PYTHONPATH": str(ROOT) if method in OURS else ""},
            # Processor time: others compute on this machine, and waiting for them is not the method's fault.
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CPU, (LIMIT_S, LIMIT_S + 5)),
        )
        try:
            status = process.wait(6 * LIMIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            status = process.wait()
    wall = time.monotonic() - wall
    about = {"load": [round(load, 1), round(os.getloadavg()[0], 1)]}
    if not (out / "measured.json").exists():
        last = ((out / "log").read_text(errors="replace").strip().splitlines() or ["no output"])[-1][-200:]
        if status in (-9, -24):
            return {"failed": f"not finished within {LIMIT_S // 60} min of processor time", "wall_s": wall} | about
        return {"failed": f"ended with status {status}: {last}".replace(str(ROOT), "…")} | about
    told = json.loads((out / "measured.json").read_text())
    if "cannot" not in told:
        told |= judged(pair, read_field(out / "field.nii"))
    shutil.rmtree(out)
    return told | about


def judged(pair: Pair, field: DisplacementField) -> dict[str, Any]:
    """Every measure of one field, the same for all methods."""
    if not field.grid.is_same_as(pair.fixed.grid, tolerance_mm=0.01):
        return {"failed": f"a field on a grid of shape {field.grid.shape}, expected {pair.fixed.grid.shape}"}
    field = DisplacementField(field.vectors, pair.fixed.grid)
    body = pair.foreground()
    warped = warp(pair.moving, field, pair.fixed.grid, outside=float(pair.moving.voxels.min()))
    found: dict[str, Any] = {
        "pmm": float(np.nanmean(patch_mutual_information(pair.fixed.voxels, warped.voxels, body))),
        "folds": (change := ev.volume_change(field, body)).folding_fraction,
        "sdlogj": change.sdlogj,
    }
    if len(pair.fixed_mm):
        errors = ev.landmark_errors(field, pair.fixed_mm, pair.moving_mm)
        found |= {"tre_mm": float(errors.mean()), "tre95_mm": float(np.percentile(errors, 95))}
    if pair.fixed_labels and pair.moving_labels:
        carried: Volume = warp(pair.moving_labels, field, pair.fixed.grid, interpolation="nearest")
        spacing = pair.fixed.grid.spacing_mm
        scores = ev.label_overlaps(pair.fixed_labels.voxels, carried.voxels, spacing, pair.labels)
        distances = [s.hd95_mm for s in scores if np.isfinite(s.hd95_mm)]
        found["dice"] = float(np.mean([s.dice for s in scores]))
        if distances:
            found["hd95_mm"] = float(np.mean(distances))
    return {key: round(value, 5) for key, value in found.items()}


def machine() -> str:
    """Processor, cores, memory."""
    model = next(
        (x.split(":")[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x), "?"
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return f"{model}, {os.cpu_count()} cores, {memory:.0f} GB"


def versions(method: str) -> str:
    """What ran."""
    if method == "before":
        return "nothing"
    if method in PACKAGES:
        return ", ".join(PACKAGES[method][1])
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    return f"commit {commit}, Python {platform.python_version()}"


if __name__ == "__main__":
    sys.exit(main())
