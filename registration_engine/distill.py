"""Teach a small network what a large one predicts: the paper's stage 2."""

from __future__ import annotations

from collections.abc import Callable

import torch

from registration_engine.checkpoint import network_of
from registration_engine.errors import InvalidRequestError
from registration_engine.objectives import multi_axis_mutual_information, smoothness
from registration_engine.synth import SyntheticPair
from registration_engine.train import Progress, Terms, run, truth_term
from registration_engine.training_config import TrainingConfig
from registration_engine.unet import UNet
from registration_engine.validation import warped_moving


def distill(
    config: TrainingConfig,
    *,
    device: torch.device,
    time_limit_s: float | None = None,
    report: Callable[[str], None] = print,
) -> Progress:
    """Run or resume the distillation of `config.teacher` into `config.model`: L_KD of section 2.2.

    The student's warped image is to resemble the teacher's and the fixed one. Parameters and errors as in `train`.

    Raises
    ------
    InvalidRequestError
        No teacher is named, or it is neither a shipped model nor a training state.
    """
    if not config.teacher:
        raise InvalidRequestError(
            "Distillation: key 'teacher' is missing, expected a shipped model or a training state"
        )
    teacher = network_of(config.teacher, device=device)

    def objective(model: UNet, pair: SyntheticPair) -> Terms:
        with torch.no_grad():
            taught, taught_weight = warped_moving(pair, teacher(pair.input)[0])
        displacement = model(pair.input)[0]
        warped, weight = warped_moving(pair, displacement)
        return {
            "distillation": config.lambda_dist * multi_axis_mutual_information(taught, warped, weight * taught_weight),
            "similarity": config.lambda_sim * multi_axis_mutual_information(pair.fixed, warped, weight),
            "smoothness": config.lambda_smooth * smoothness(displacement),
            **truth_term(config, displacement, pair),
        }

    return run(config, objective, device=device, time_limit_s=time_limit_s, report=report)
