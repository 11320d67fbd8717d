"""Does the pretrained network earn its place? Loss of test-time optimisation from it and from random weights.

    python benchmarks/pretrained_start.py --data ../shared/data --out build/pretrained-start

For each real pair, at a quarter of the resolution: the lowest loss within 20 epochs from the shipped weights, against
that within 100 epochs from random ones (median of three seeds). Each run is kept in its own file, so a stopped
benchmark goes on; `--model` takes "student", "teacher" or a training state, `--pairs` some of the pairs by name.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from registration_engine import PRESETS, affine
from registration_engine.checkpoint import network_of, sha256_of
from registration_engine.files import read_volume
from registration_engine.prepare import prepared
from registration_engine.tuning import NetworkPair, tuned
from registration_engine.unet import UNet

PAIRS = {
    **{
        f"liver {n} to 3": (f"liver-mr-breathing/flip_angle_{n}", "liver-mr-breathing/flip_angle_3")
        for n in (1, 2, 4, 5)
    },
    "abdomen CT MR": ("abdomen-ct-mr/mr", "abdomen-ct-mr/ct"),
    "brain T1 two subjects": ("brain-t1-two-subjects/b", "brain-t1-two-subjects/a"),
    "brain T1 FLAIR two patients": (
        "brain-ms-t1-t1post-t2-flair/patient19_FLAIR",
        "brain-ms-t1-t1post-t2-flair/patient07_T1",
    ),
    "brain T2 T1 one patient": ("brain-stroke-t1-t2-flair/T2", "brain-stroke-t1-t2-flair/T1"),
}
"""Moving and fixed image of each real pair."""
_PRETRAINED_EPOCHS, _RANDOM_EPOCHS, _SEEDS = 20, 100, 3


def main() -> None:
    """Measure what is not yet measured and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path, default=Path("build/pretrained-start"))
    parser.add_argument("--model", default="student")
    parser.add_argument("--pairs", nargs="*", default=list(PAIRS), choices=list(PAIRS))
    parser.add_argument("--seeds", type=int, default=_SEEDS)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    pretrained = network_of(options.model, device=torch.device("cpu"))
    name = options.model if not Path(options.model).suffix else sha256_of(Path(options.model))[:12]
    size = sum(p.numel() for p in pretrained.parameters())
    print(f"{'pair':30}{'start':>9}{'pretrained, 20':>16}{'random, 100':>13}{'as good after':>15}")
    for pair_name in options.pairs:
        pair = _pair(options.data, pair_name)
        got = _measured(
            options.out / f"{pair_name} {name}.json".replace(" ", "-"), pair, pretrained, _PRETRAINED_EPOCHS
        )
        random = []
        for seed in range(options.seeds):
            torch.manual_seed(seed)
            fresh = UNet(pretrained.architecture, channels_last=pretrained.channels_last)
            path = options.out / f"{pair_name} random {size} {seed}.json".replace(" ", "-")
            random.append(_measured(path, pair, fresh, _RANDOM_EPOCHS))
        best = min(got["losses"])
        typical = statistics.median(min(run["losses"]) for run in random)
        reached = [_first_below(run["losses"], best) for run in random]
        row = f"{pair_name:30}{random[0]['losses'][0]:9.4f}{best:16.4f}{typical:13.4f}"
        print(f"{row}{statistics.median(reached):12.0f} ep", flush=True)


def _pair(data: Path, name: str) -> NetworkPair:
    moving, fixed = (
        prepared(read_volume(data / f"{path}.nii.gz"), None, path, torch.device("cpu")) for path in PAIRS[name]
    )
    with torch.no_grad():
        start = affine.align(fixed, moving, with_affine=True, near=None, progress=lambda _: None)
        return NetworkPair.of(fixed, moving, start.affine, 4 * float(np.min(fixed.grid.spacing_mm)))


def _measured(path: Path, pair: NetworkPair, network: UNet, epochs: int) -> dict[str, list[float]]:
    if path.exists():
        found: dict[str, list[float]] = json.loads(path.read_text())
        return found
    tuning = PRESETS["paper-student"].tuning
    assert tuning is not None
    started = time.process_time()
    losses = [loss for _, loss, _ in tuned(pair, network, replace(tuning, epochs=epochs, seconds=1e9))]
    measured = {"losses": losses, "cpu_seconds": [time.process_time() - started]}
    path.write_text(json.dumps(measured))
    return measured


def _first_below(losses: list[float], value: float) -> float:
    """The epoch at which a run is as good; infinite where it never is."""
    return next((float(epoch) for epoch, loss in enumerate(losses) if loss <= value), float("inf"))


if __name__ == "__main__":
    main()
