"""`registration-engine train | distill | models | publish`.

Also `python -m registration_engine.training_cli`, which needs torch, numpy and safetensors alone.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from registration_engine import checkpoint
from registration_engine.devices import device_named
from registration_engine.distill import distill
from registration_engine.errors import RegistrationError
from registration_engine.train import train
from registration_engine.training_config import read_config

NOT_FINISHED = 4
"""Exit status of a piece that ended by its time limit: run the same command again."""


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Describe the commands."""
    for name, text in (
        ("train", "teach a network on synthetic pairs; goes on where it was stopped"),
        ("distill", "teach a small network what a large one predicts; goes on where it was stopped"),
    ):
        training = commands.add_parser(name, help=text)
        training.add_argument("--config", type=Path, required=True, help="TOML, see deploy/training")
        training.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
        training.add_argument(
            "--time-limit",
            type=_seconds,
            metavar="SECONDS",
            help=f"stop after so long with everything saved and exit with {NOT_FINISHED}: run it again",
        )
    models = commands.add_parser("models", help="list the networks that ship")
    models.add_argument("--json", action="store_true", help="for machines")
    publish = commands.add_parser("publish", help="make a run's weights the shipped ones of its model")
    publish.add_argument("state", type=Path, help="state.safetensors of the run")


def _seconds(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"got {text}, expected a number above 0")
    return value


def _train(options: argparse.Namespace) -> int:
    training = train if options.command == "train" else distill
    progress = training(
        read_config(options.config),
        device=device_named(options.device),
        time_limit_s=options.time_limit,
        report=lambda line: print(line, flush=True),
    )
    return 0 if progress.is_complete else NOT_FINISHED


def _models(options: argparse.Namespace) -> int:
    rows = checkpoint.models()
    if options.json:
        print(json.dumps([vars(row) for row in rows], indent=2))
        return 0
    for row in rows:
        print(f"{row.name:8} {row.parameters:7} parameters  {row.steps:6} steps on {row.device}  {row.sha256}")
    return 0


def _publish(options: argparse.Namespace) -> int:
    row = checkpoint.publish(options.state)
    print(f"{row.name}: {row.steps} steps, sha256 {row.sha256}")
    return 0


COMMANDS: Mapping[str, Callable[[argparse.Namespace], int]] = {
    "train": _train,
    "distill": _train,
    "models": _models,
    "publish": _publish,
}


def main() -> int:
    """Run one of these commands where the readers of images are not installed."""
    parser = argparse.ArgumentParser(prog="registration_engine.training_cli")
    add_commands(parser.add_subparsers(dest="command", required=True))
    options = parser.parse_args()
    try:
        return COMMANDS[options.command](options)
    except (RegistrationError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
