"""Weights on disk: those of a training run, and those that ship inside the package.

Safetensors only: a file of weights cannot run code. A file is written whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, load_file, save
from torch import Tensor

from registration_engine.devices import autocast_type
from registration_engine.errors import InvalidRequestError
from registration_engine.training_config import TrainingConfig
from registration_engine.unet import ARCHITECTURES, UNet, parameters_of

WEIGHTS = Path(__file__).parent / "weights"
_MANIFEST = "manifest.json"
_MODEL, _FIRST, _SECOND = "model.", "adam.first.", "adam.second."


@dataclass(frozen=True)
class TrainingState:
    """Where a run stood when it was last saved.

    Attributes
    ----------
    seconds, steps_before
        Time spent, that of the weights it began at included; steps these had had.
    """

    step: int
    seconds: float
    steps_before: int = 0


@dataclass(frozen=True)
class ShippedModel:
    """One row of the manifest of the shipped weights."""

    name: str
    file: str
    sha256: str
    parameters: int
    steps: int
    shape: tuple[int, int, int]
    seconds: float
    device: str


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A network with the sha256 of the file its weights came from.

    Read only, tuning works on a copy, unless `adapts`: then it is the caller's own, and what one pair has taught it
    is where the next begins. For the phases of one series, never from patient to patient.
    """

    name: str
    sha256: str
    network: UNet
    adapts: bool = False


def load_model(name: str, *, device: str | torch.device = "cpu") -> LoadedModel:
    """Load a shipped network; its weights are checked against the manifest.

    Raises
    ------
    InvalidRequestError
        No such model ships, or its file is not the one the manifest names.
    """
    row, content = _shipped(name)
    digest = hashlib.sha256(content).hexdigest()
    if digest != row.sha256:
        raise InvalidRequestError(f"Model {name}: {row.file} has sha256 {digest}, expected {row.sha256}")
    network = UNet(ARCHITECTURES[name], channels_last=autocast_type(torch.device(device)) is not None)
    network.load_state_dict(load(content))
    return LoadedModel(name, row.sha256, network.requires_grad_(False).eval().to(device))


def _shipped(name: str) -> tuple[ShippedModel, bytes]:
    rows = models()
    shipped = {model.name: model for model in rows}
    if name not in shipped:
        raise InvalidRequestError(f"Model: got {name!r}, expected one of {', '.join(shipped) or 'none shipped yet'}")
    row = shipped[name]
    try:
        return row, (WEIGHTS / row.file).read_bytes()
    except FileNotFoundError:
        if models() != rows:  # published anew between the two reads
            return _shipped(name)
        raise InvalidRequestError(f"Model {name}: its file {row.file} is not there") from None


def models() -> list[ShippedModel]:
    """What ships, by the manifest."""
    path = WEIGHTS / _MANIFEST
    if not path.exists():
        return []
    rows = json.loads(path.read_text(encoding="utf-8"))
    return [ShippedModel(**{**row, "shape": tuple(row["shape"])}) for row in rows]


def publish(state: Path) -> ShippedModel:
    """Make the weights of a training run the shipped ones of its model.

    A file is named by its content and the manifest changes at one stroke: a worker that loads a model meanwhile gets
    the old weights whole or the new ones, and its next job the new ones.

    Raises
    ------
    InvalidRequestError
        The file is no training state.
    """
    metadata, tensors = _read(state)
    config = json.loads(metadata["config"])
    name = config["model"]
    weights = {key.removeprefix(_MODEL): value for key, value in tensors.items() if key.startswith(_MODEL)}
    network = UNet(ARCHITECTURES[name])
    network.load_state_dict(weights)
    content = save(weights)
    digest = hashlib.sha256(content).hexdigest()
    row = ShippedModel(
        name=name,
        file=f"{name}-{digest[:12]}.safetensors",
        sha256=digest,
        parameters=parameters_of(network),
        steps=int(metadata["step"]) + int(metadata.get("steps_before", 0)),
        shape=tuple(config["shape"]),
        seconds=round(float(metadata["seconds"])),
        device=metadata["device"],
    )
    before = models()
    rows = [*(model for model in before if model.name != name), row]
    _write_atomically(WEIGHTS / row.file, content)
    rows.sort(key=lambda model: model.name)
    manifest = json.dumps([vars(model) for model in rows], indent=2) + "\n"
    _write_atomically(WEIGHTS / _MANIFEST, manifest.encode())
    for old in before:
        if old.name == name and old.file != row.file:
            (WEIGHTS / old.file).unlink(missing_ok=True)
    return row


def save_state(
    path: Path, config: TrainingConfig, model: UNet, optimizer: torch.optim.Adam, state: TrainingState
) -> None:
    """Save all that a run needs to go on, in one file that is whole or not there.

    Random numbers need no saving: each pair is a function of the seed and its step.
    """
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        moments = optimizer.state[parameter]
        tensors[_MODEL + name] = parameter.detach()
        tensors[_FIRST + name], tensors[_SECOND + name] = moments["exp_avg"], moments["exp_avg_sq"]
    metadata = {
        "config": json.dumps(config.as_dict()),
        "step": str(state.step),
        "steps_before": str(state.steps_before),
        "seconds": f"{state.seconds:.1f}",
        "device": _device_name(next(model.parameters()).device),
    }
    _write_atomically(path, save({name: t.cpu().contiguous() for name, t in tensors.items()}, metadata=metadata))


def restore_state(path: Path, config: TrainingConfig, model: UNet, optimizer: torch.optim.Adam) -> TrainingState:
    """Put a saved run back into a model and its optimiser.

    Raises
    ------
    InvalidRequestError
        The file is damaged, or of a run with other settings.
    """
    metadata, tensors = _read(path)
    saved = json.loads(metadata["config"])
    for key, value in config.identity().items():
        if saved.get(key) != value:
            raise InvalidRequestError(
                f"{path}: the run in this folder has {key} = {saved.get(key)!r}, the configuration {value!r}; "
                "expected the same, or another folder"
            )
    step = int(metadata["step"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[_MODEL + name])
            optimizer.state[parameter] = {
                "step": torch.tensor(float(step)),
                "exp_avg": torch.empty_like(parameter).copy_(tensors[_FIRST + name]),
                "exp_avg_sq": torch.empty_like(parameter).copy_(tensors[_SECOND + name]),
            }
    return TrainingState(step, float(metadata["seconds"]), int(metadata.get("steps_before", 0)))


def network_of(source: str, *, device: torch.device) -> UNet:
    """The frozen network of a shipped model's name or of a training state's path, for distillation.

    Raises
    ------
    InvalidRequestError
        Neither a shipped model nor a training state.
    """
    path = Path(source)
    if not path.suffix:
        return load_model(source, device=device).network
    metadata, tensors = _read(path)
    network = UNet(ARCHITECTURES[json.loads(metadata["config"])["model"]], channels_last=True)
    network.load_state_dict({k.removeprefix(_MODEL): v for k, v in tensors.items() if k.startswith(_MODEL)})
    return network.requires_grad_(False).eval().to(device)


def start_from(model: UNet, source: str) -> TrainingState:
    """Give a network the weights of a shipped model, or of a training state, and tell what they have cost.

    Raises
    ------
    InvalidRequestError
        Neither a shipped model nor a training state, or one of another architecture.
    """
    found = network_of(source, device=torch.device("cpu"))
    if found.architecture != model.architecture:
        raise InvalidRequestError(f"Start: {source} is of another architecture, expected {model.architecture}")
    model.load_state_dict(found.state_dict())
    if not Path(source).suffix:
        (row,) = (row for row in models() if row.name == source)
        return TrainingState(0, row.seconds, row.steps)
    metadata, _ = _read(Path(source))
    steps = int(metadata["step"]) + int(metadata.get("steps_before", 0))
    return TrainingState(0, float(metadata["seconds"]), steps)


def sha256_of(path: Path) -> str:
    """Of a file's bytes, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _read(path: Path) -> tuple[Mapping[str, str], dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InvalidRequestError(f"{path}: cannot be read as a training state ({error})") from None
    if not {"config", "step", "seconds", "device"} <= metadata.keys():
        raise InvalidRequestError(f"{path}: got weights without a run's description, expected a training state")
    return cast(Mapping[str, str], metadata), tensors


def _write_atomically(path: Path, content: bytes) -> None:
    """Temporary file beside it, fsync, rename, fsync of the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    with part.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _device_name(device: torch.device) -> Any:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
