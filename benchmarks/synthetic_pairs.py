"""A picture sheet of 16 synthetic training pairs.

    python benchmarks/synthetic_pairs.py --out docs/synthetic-pairs.png

Each row of tiles: fixed, moving, moving warped by the truth, length of the displacement (white = 8 voxels).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from registration_engine.spaces import sample
from registration_engine.synth import synthetic_pair, unit_lattice


def main() -> None:
    """Draw and write the sheet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--size", type=int, default=64)
    options = parser.parse_args()
    shape = (options.size,) * 3
    device = torch.device("cpu")
    rows = []
    for index in range(16):
        pair = synthetic_pair(options.seed, index, shape, device)
        warped = sample(pair.moving[None], unit_lattice(shape, device).displaced(pair.displacement))[0]
        length = pair.displacement.square().sum(0).sqrt() / 8
        middle = options.size // 2
        cut = [t[:, middle] if index % 2 else t[middle] for t in (pair.fixed, pair.moving, warped, length)]
        rows.append(np.concatenate([np.pad(c.clamp(0, 1).numpy(), 1) for c in cut], axis=1))
    columns = [np.concatenate(rows[n::2], axis=0) for n in range(2)]
    sheet = (255 * np.concatenate([np.pad(c, ((0, 0), (0, 6))) for c in columns], axis=1)).astype(np.uint8)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet).save(options.out, optimize=True)


if __name__ == "__main__":
    main()
