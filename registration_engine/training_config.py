"""The configuration of a training run: one flat TOML file, checked key by key."""

from __future__ import annotations

import dataclasses
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from registration_engine.errors import InvalidRequestError
from registration_engine.unet import ARCHITECTURES, MULTIPLE


@dataclass(frozen=True)
class TrainingConfig:
    """One run of training or distillation.

    Attributes
    ----------
    model
        "teacher" or "student".
    out
        Folder of the run; relative paths are relative to the working directory.
    teacher
        Distillation only: name of a shipped model, or the `state.safetensors` of a run.
    start
        Name of a shipped model, or the `state.safetensors` of a run, of the same architecture: its weights are where
        this run begins; by default random ones.
    shape
        (Z, Y, X) of the synthetic pairs, multiples of 16.
    epochs, pairs_per_epoch
        Their product is the number of pairs drawn.
    steps_per_pair
        Steps of Adam on each pair before the next. The paper takes one; more of them exercise what test-time
        optimisation does, which pays where few steps can be afforded.
    learning_rate, halve_every
        Of Adam, and the steps in which it falls to half, evenly; 0 keeps it, as in the paper.
    lambda_sim, lambda_smooth, lambda_dist
        Weights of the paper's loss terms; lambda_dist belongs to distillation.
    lambda_truth
        Weight of the squared distance to the known displacement; the paper has no such term.
    bf16
        Run the network in bfloat16 where the device has it in hardware.
    data, real_pairs
        A folder, and [fixed, moving] image files in it to validate on; those that are not there are left out.
    """

    model: str
    out: Path
    teacher: str = ""
    start: str = ""
    seed: int = 0
    shape: tuple[int, int, int] = (128, 128, 128)
    epochs: int = 300
    pairs_per_epoch: int = 500
    steps_per_pair: int = 1
    learning_rate: float = 1e-4
    halve_every: int = 0
    lambda_sim: float = 1.0
    lambda_smooth: float = 1.0
    lambda_dist: float = 0.0
    lambda_truth: float = 0.0
    bf16: bool = True
    validation_pairs: int = 16
    data: str = ""
    real_pairs: tuple[tuple[str, str], ...] = ()
    report_every: int = 50
    checkpoint_every: int = 100
    validate_every: int = 2500

    @property
    def steps(self) -> int:
        """Of the whole schedule."""
        return self.epochs * self.pairs_per_epoch * self.steps_per_pair

    def learning_rate_at(self, step: int) -> float:
        """Of step number `step`, from 0."""
        return self.learning_rate * 0.5 ** (step / self.halve_every if self.halve_every else 0)

    def identity(self) -> dict[str, Any]:
        """What makes two runs the same one: all but the folder, the length and what is only reported."""
        free = {"out", "epochs", "report_every", "checkpoint_every", "validate_every", "validation_pairs"}
        free |= {"data", "real_pairs"}
        return {name: value for name, value in self.as_dict().items() if name not in free}

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            **vars(self),
            "out": str(self.out),
            "shape": list(self.shape),
            "real_pairs": [*map(list, self.real_pairs)],
        }


def read_config(path: Path) -> TrainingConfig:
    """Read and check a configuration.

    Raises
    ------
    InvalidRequestError
        Names file, key, what it got and what was expected.
    """
    if path.exists() and not path.is_file():
        raise InvalidRequestError(f"{path}: cannot be read (a folder or device, expected a file)")
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidRequestError(f"{path}: cannot be read ({error.strerror})") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidRequestError(f"{path}: no valid TOML ({error})") from None
    fields = {field.name: field for field in dataclasses.fields(TrainingConfig)}
    for key, value in values.items():
        if key not in fields:
            raise InvalidRequestError(f"{path}: unknown key {key!r}, expected one of {', '.join(fields)}")
        expected = _complaint(key, value, fields[key].type)
        if expected:
            raise InvalidRequestError(f"{path}: key {key!r}: got {value!r}, expected {expected}")
    for key in ("model", "out"):
        if key not in values:
            raise InvalidRequestError(f"{path}: key {key!r} is missing")
    values["out"] = Path(values["out"])
    if "shape" in values:
        values["shape"] = tuple(values["shape"])
    values["real_pairs"] = tuple((fixed, moving) for fixed, moving in values.get("real_pairs", []))
    return TrainingConfig(**values)


def _complaint(key: str, value: object, kind: Any) -> str | None:
    """What the key expects, where the value is not that."""
    if key == "model":
        return None if value in ARCHITECTURES else " or ".join(ARCHITECTURES)
    if key == "shape":
        fits = isinstance(value, list) and len(value) == 3 and all(_is_multiple(n) for n in value)
        return None if fits else f"three multiples of {MULTIPLE}, [Z, Y, X]"
    if key == "real_pairs":
        return None if isinstance(value, list) and all(map(_is_pair, value)) else "a list of [fixed, moving] file names"
    if kind == "bool":
        return None if isinstance(value, bool) else "true or false"
    if kind == "int":
        least = 0 if key in ("seed", "halve_every") else 1
        fits = isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**31
        return None if fits else f"a whole number of {least} or more"
    if kind == "float":
        fits = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < float("inf")
        return None if fits else "a number of 0 or more"
    return None if isinstance(value, str) and value else "text"


def _is_pair(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(name, str) for name in value)


def _is_multiple(value: object) -> bool:
    return isinstance(value, int) and value > 0 and value % MULTIPLE == 0
