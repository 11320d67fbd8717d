"""How good a network is while it is trained: on held-out synthetic pairs, and on real ones where there are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from registration_engine.objectives import multi_axis_mutual_information
from registration_engine.prepare import prepared
from registration_engine.spaces import sample_where_valid
from registration_engine.synth import SyntheticPair, synthetic_pair, unit_lattice
from registration_engine.training_config import TrainingConfig
from registration_engine.tuning import NetworkPair
from registration_engine.unet import UNet

_HELD_OUT = 2**31  # added to the seed: pairs that training never draws
_REDUCED = 4  # real pairs are judged at a quarter of the fixed image's resolution


def warped_moving(pair: SyntheticPair, displacement: Tensor) -> tuple[Tensor, Tensor]:
    """The moving image at the displaced points (Z, Y, X), and the weight: 1 where both images have data."""
    layers = torch.stack([pair.moving, pair.moving_valid])
    lattice = unit_lattice(pair.shape, displacement.device)
    warped, valid = sample_where_valid(layers, lattice.displaced(displacement))
    return warped, pair.fixed_valid * valid


def on_synthetic_pairs(model: UNet, config: TrainingConfig, device: torch.device) -> dict[str, float]:
    """Means over held-out pairs, before and after: error in voxels (median over the body), similarity."""
    sums = {f"{what}_{when}": 0.0 for what in ("error", "similarity") for when in ("before", "after")}
    for index in range(config.validation_pairs):
        pair = synthetic_pair(config.seed + _HELD_OUT, index, config.shape, device)
        with torch.no_grad():
            predicted = model(pair.input)[0]
            inside = pair.body > 0
            for when, displacement in (("before", torch.zeros_like(predicted)), ("after", predicted)):
                error = (displacement - pair.displacement).square().sum(0).sqrt()[inside]
                warped, weight = warped_moving(pair, displacement)
                sums[f"error_{when}"] += float(error.median()) if inside.any() else 0.0
                sums[f"similarity_{when}"] -= float(multi_axis_mutual_information(pair.fixed, warped, weight))
    return {name: total / config.validation_pairs for name, total in sums.items()}


def real_pairs(config: TrainingConfig, device: torch.device, report: Callable[[str], None]) -> list[NetworkPair]:
    """The configured pairs of image files that can be read here, in world coordinates as they are.

    Missing files, or a missing reader of images, are reported and left out: a machine that trains need not hold them.
    """
    try:
        from registration_engine.files import read_volume
        from registration_engine.resampling import simpleitk

        if config.real_pairs:
            simpleitk()
    except ImportError as error:
        report(f"real pairs left out: {error}")
        return []
    pairs = []
    for paths in config.real_pairs:
        missing = [path for path in paths if not (Path(config.data) / path).exists()]
        if missing:
            report(f"real pair left out: {Path(config.data) / missing[0]} is not there")
            continue
        fixed, moving = (prepared(read_volume(Path(config.data) / path), None, path, device) for path in paths)
        with torch.no_grad():
            pairs.append(NetworkPair.of(fixed, moving, np.eye(4), _REDUCED * float(fixed.grid.spacing_mm.min())))
    return pairs


def on_real_pairs(model: UNet, pairs: Sequence[NetworkPair]) -> dict[str, float]:
    """Mean slice-wise mutual information before and after; nobody knows the truth of these."""
    sums = {"similarity_before": 0.0, "similarity_after": 0.0}
    for pair in pairs:
        with torch.no_grad():
            predicted = pair.displacement_mm(model(pair.input)[0])
            for when, displacement in (("before", torch.zeros_like(predicted)), ("after", predicted)):
                warped, weight = pair.level.warped(displacement)
                value = multi_axis_mutual_information(pair.level.fixed.image[0], warped, weight.float())
                sums[f"similarity_{when}"] -= float(value)
    return {name: total / len(pairs) for name, total in sums.items()}
