"""Teach a network on synthetic pairs: the paper's stage 1, and the loop that stage 2 (`distill`) shares.

A run lives in one folder: `state.safetensors` (weights, optimiser, step), `log.csv`, `validation.csv`,
`validation-real.csv`, `tensorboard/`. It can be killed at any moment and started again by the same command: pair n is a
function of the seed and n, so the resumed run is the uninterrupted one, bit for bit on a CPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from registration_engine.checkpoint import TrainingState, restore_state, save_state, start_from
from registration_engine.devices import autocast_type
from registration_engine.errors import DivergedError
from registration_engine.objectives import multi_axis_mutual_information, smoothness
from registration_engine.synth import SyntheticPair, synthetic_pair
from registration_engine.training_config import TrainingConfig
from registration_engine.training_log import TrainingLog
from registration_engine.unet import ARCHITECTURES, UNet
from registration_engine.validation import on_real_pairs, on_synthetic_pairs, real_pairs, warped_moving

STATE = "state.safetensors"

Terms = Mapping[str, Tensor]
Objective = Callable[[UNet, SyntheticPair], Terms]
"""The parts of the loss by name, weighted; their sum is minimised."""


@dataclass(frozen=True)
class Progress:
    """Where a run stands when it returns."""

    step: int
    steps: int
    state: Path

    @property
    def is_complete(self) -> bool:
        """Whether every step of the schedule is done."""
        return self.step >= self.steps


def train(
    config: TrainingConfig,
    *,
    device: torch.device,
    time_limit_s: float | None = None,
    report: Callable[[str], None] = print,
) -> Progress:
    """Run or resume the training of stage 1: Eq. 1 of the paper.

    Parameters
    ----------
    time_limit_s
        Stop after about so many seconds with everything saved; the next call goes on.
    report
        Gets a line of progress now and then.

    Raises
    ------
    InvalidRequestError
        The folder holds a run of other settings.
    """

    def objective(model: UNet, pair: SyntheticPair) -> Terms:
        displacement = model(pair.input)[0]
        warped, weight = warped_moving(pair, displacement)
        return {
            "similarity": config.lambda_sim * multi_axis_mutual_information(pair.fixed, warped, weight),
            "smoothness": config.lambda_smooth * smoothness(displacement),
            **truth_term(config, displacement, pair),
        }

    return run(config, objective, device=device, time_limit_s=time_limit_s, report=report)


def truth_term(config: TrainingConfig, displacement: Tensor, pair: SyntheticPair) -> Terms:
    """The squared distance to the known displacement over the body; not in the paper, off unless asked for."""
    if not config.lambda_truth:
        return {}
    distance = (displacement - pair.displacement).square().sum(0)
    return {"truth": config.lambda_truth * (distance * pair.body).sum() / pair.body.sum().clamp(min=1)}


def run(
    config: TrainingConfig,
    objective: Objective,
    *,
    device: torch.device,
    time_limit_s: float | None,
    report: Callable[[str], None],
) -> Progress:
    """The loop of both stages: a pair, a step of Adam or several, the next pair."""
    started = time.monotonic()
    config.out.mkdir(parents=True, exist_ok=True)
    model, optimizer, state = _restored(config, device)
    report(f"{config.model}: step {state.step} of {config.steps}, {config.shape} voxels, {device}")
    real = real_pairs(config, device, report)
    step, elapsed, pair = state.step, 0.0, None
    with TrainingLog(config.out, resumed_at=state.step) as log:
        while step < config.steps and (time_limit_s is None or elapsed < time_limit_s):
            if pair is None or step % config.steps_per_pair == 0:
                pair = synthetic_pair(config.seed, step // config.steps_per_pair, config.shape, device)
            optimizer.param_groups[0]["lr"] = config.learning_rate_at(step)
            terms = _step(model, optimizer, objective, pair)
            step += 1
            elapsed = time.monotonic() - started
            log.write("log", step, {"seconds": state.seconds + elapsed, "loss": sum(terms.values()), **terms})
            is_last = step == config.steps or (time_limit_s is not None and elapsed >= time_limit_s)
            if step % config.validate_every == 0 or step == config.steps:
                log.write("validation", step, on_synthetic_pairs(model, config, device))
                if real:
                    log.write("validation-real", step, on_real_pairs(model, real))
            if step % config.checkpoint_every == 0 or is_last:
                log.flush()
                reached = TrainingState(step, state.seconds + elapsed, state.steps_before)
                save_state(config.out / STATE, config, model, optimizer, reached)
            if step % config.report_every == 0 or is_last:
                left = (config.steps - step) * elapsed / (step - state.step)
                report(f"step {step} of {config.steps}, loss {sum(terms.values()):.4f}, {_clock(left)} left")
    return Progress(step, config.steps, config.out / STATE)


def _restored(config: TrainingConfig, device: torch.device) -> tuple[UNet, torch.optim.Adam, TrainingState]:
    torch.manual_seed(config.seed)
    autocast = autocast_type(device) if config.bf16 else None
    model = UNet(ARCHITECTURES[config.model], channels_last=True, autocast=autocast).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate)
    path = config.out / STATE
    if not path.exists():
        begun = start_from(model, config.start) if config.start else TrainingState(step=0, seconds=0.0)
        return model, optimizer, begun
    return model, optimizer, restore_state(path, config, model, optimizer)


def _step(model: UNet, optimizer: torch.optim.Adam, objective: Objective, pair: SyntheticPair) -> dict[str, float]:
    optimizer.zero_grad(set_to_none=True)
    terms = objective(model, pair)
    loss = torch.stack(list(terms.values())).sum()
    if not torch.isfinite(loss):
        raise DivergedError(f"The loss is {float(loss.detach())}, expected a number: a lower learning rate may help")
    torch.autograd.backward(loss)
    optimizer.step()
    return {name: float(term.detach()) for name, term in terms.items()}


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
