"""How memory and work grow with the images: field presets and one epoch of the paper's networks.

    python benchmarks/memory.py

Each row is a process of its own on one thread. Field presets do two iterations on each level, which is what memory
depends on; their seconds say how the cost of an iteration grows, not how long a registration takes. Rows that were
measured are kept under `build/memory`; the table goes to `benchmarks/MEMORY.md`.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import interpolate

from registration_engine import PRESETS, Volume, register
from registration_engine.checkpoint import load_model
from registration_engine.devices import autocast_type
from registration_engine.prepare import prepared
from registration_engine.synth import synthetic_pair
from registration_engine.tuning import NetworkPair, tuned
from registration_engine.volume import Grid

SHAPES = ((32, 64, 64), (64, 128, 128), (128, 256, 256))
KEPT, TABLE = Path("build/memory"), Path(__file__).parent / "MEMORY.md"
CPU = torch.device("cpu")
HEAD = """# Memory and work by the size of the images

Written by `python benchmarks/memory.py`; do not edit. Fixed and moving image of one shape, 1 mm voxels, one thread,
each row a process of its own; peak memory is that of the whole process, interpreter and libraries (about 300 MB)
included. Field presets do two iterations on each level: memory does not depend on how many, and the seconds show how
the cost grows, not how long a registration takes. A paper row is one step between two predictions at the images' own
resolution, in bfloat16 where the processor multiplies it, activations recomputed above two million voxels.

Measured on: {machine}.

| preset | voxels (X × Y × Z) | peak MB | CPU s | µs per voxel |
|---|---|---|---|---|
"""


def volumes(shape: tuple[int, int, int]) -> tuple[Volume, Volume]:
    """A made-up pair, drawn small and enlarged: drawing it must not need more memory than registering it."""
    pair = synthetic_pair(1, 0, SHAPES[0], CPU)
    grid = Grid(shape, np.diag([1.0, 1.0, 1.0, 1.0])[[2, 1, 0, 3]])
    images = interpolate(torch.stack([pair.fixed, pair.moving])[None], shape, mode="trilinear")[0]
    return Volume(images[0].numpy(), grid), Volume(images[1].numpy(), grid)


def field(name: str, fixed: Volume, moving: Volume) -> None:
    """Two iterations on each level of a field preset."""
    preset = PRESETS[name]
    register(fixed, moving, preset=replace(preset, iterations=(2,) * len(preset.iterations)), device="cpu")


def paper(name: str, fixed: Volume, moving: Volume) -> None:
    """One epoch of a network at full size, on the images as they lie."""
    preset = PRESETS[name]
    assert preset.tuning is not None
    assert preset.model is not None
    with torch.no_grad():
        pair = NetworkPair.of(*(prepared(v, None, "An", CPU) for v in (fixed, moving)), np.eye(4), 1.0)
    list(tuned(pair, load_model(preset.model).network, replace(preset.tuning, epochs=1, seconds=1e9)))


ROWS: dict[str, Callable[[str, Volume, Volume], None]] = {
    **dict.fromkeys(("fast", "balanced", "accurate"), field),
    **dict.fromkeys(("paper-student", "paper-teacher"), paper),
}


def main() -> None:
    """Measure what is not yet measured and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", nargs=2, metavar=("PRESET", "SHAPE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row:
        name, number = options.row
        print(json.dumps(measured(name, SHAPES[int(number)])))
        return
    KEPT.mkdir(parents=True, exist_ok=True)
    fast = "with" if autocast_type(CPU) is not None else "without"
    machine = f"{torch.backends.cpu.get_cpu_capability()}, {fast} bfloat16 in hardware, one thread, shared"
    lines = []
    for name in ROWS:
        for number, shape in enumerate(SHAPES):
            kept = KEPT / f"{name}-{number}.json"
            if not kept.exists():
                command = [sys.executable, __file__, "--row", name, str(number)]
                done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, stdout=-1)
                kept.write_bytes(done.stdout)
            found = json.loads(kept.read_text())
            z, y, x = shape
            per_voxel = 1e6 * found["cpu_seconds"] / (z * y * x)
            row = f"{name} | {x} × {y} × {z} | {found['peak_mb']:.0f} | {found['cpu_seconds']:.1f} | {per_voxel:.1f}"
            lines.append(f"| {row} |\n")
            print(lines[-1], end="", flush=True)
    TABLE.write_text(HEAD.format(machine=machine) + "".join(lines), encoding="utf-8")


def measured(name: str, shape: tuple[int, int, int]) -> dict[str, float]:
    """CPU seconds of the work alone, and the peak of the process."""
    pair = volumes(shape)
    started = time.process_time()
    ROWS[name](name, *pair)
    return {
        "cpu_seconds": time.process_time() - started,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000,
    }


if __name__ == "__main__":
    main()
