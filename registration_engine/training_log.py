"""What a training run writes down: CSV always, TensorBoard where asked for."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from registration_engine.errors import InvalidRequestError

_NAMES = ("log", "validation", "validation-real")


class TrainingLog:
    """`log.csv`, `validation.csv`, `validation-real.csv`; rows beyond the resumed step are dropped first."""

    def __init__(self, folder: Path, *, resumed_at: int, tensorboard: bool) -> None:
        self._files = {name: _continued(folder / f"{name}.csv", resumed_at) for name in _NAMES}
        self._events = _events(folder / "tensorboard", resumed_at) if tensorboard else None

    def __enter__(self) -> TrainingLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files.values():
            file.close()
        if self._events is not None:
            self._events.close()

    def write(self, name: str, step: int, values: Mapping[str, float]) -> None:
        """One row of `log`, `validation` or `validation-real`."""
        file = self._files[name]
        row = {"step": step, **{key: f"{value:.6g}" for key, value in values.items()}}
        writer = csv.DictWriter(file, list(row), lineterminator="\n")
        if file.tell() == 0:
            writer.writeheader()
        writer.writerow(row)
        if self._events is not None:
            for key, value in values.items():
                self._events.add_scalar(f"{name}/{key}", value, step)

    def flush(self) -> None:
        """Hand everything written so far to the system."""
        for file in self._files.values():
            file.flush()


def _continued(path: Path, step: int) -> io.TextIOWrapper:
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    # A kill may have left half a line, and rows of steps that will be done again.
    kept = [line for line in lines[1:] if line.endswith("\n") and int(line.split(",")[0]) <= step]
    file = path.open("w", encoding="utf-8", newline="")
    file.writelines(lines[:1] + kept if kept else [])
    return file


def _events(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise InvalidRequestError("tensorboard = true: the package tensorboard is not installed") from None
    return SummaryWriter(folder, purge_step=step + 1)
