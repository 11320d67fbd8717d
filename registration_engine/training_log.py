"""What a training run writes down: as CSV, and the same as events for TensorBoard."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from registration_engine.event_file import EventFile

_NAMES = ("log", "validation", "validation-real")


class TrainingLog:
    """`log.csv`, `validation.csv`, `validation-real.csv`, `tensorboard/`; rows beyond the resumed step are dropped."""

    def __init__(self, folder: Path, *, resumed_at: int) -> None:
        self._files = {name: _continued(folder / f"{name}.csv", resumed_at) for name in _NAMES}
        self._events = EventFile(folder / "tensorboard", first_step=resumed_at + 1)

    def __enter__(self) -> TrainingLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files.values():
            file.close()
        self._events.close()

    def write(self, name: str, step: int, values: Mapping[str, float]) -> None:
        """One row of `log`, `validation` or `validation-real`."""
        file = self._files[name]
        row = {"step": step, **{key: f"{value:.6g}" for key, value in values.items()}}
        writer = csv.DictWriter(file, list(row), lineterminator="\n")
        if file.tell() == 0:
            writer.writeheader()
        writer.writerow(row)
        self._events.write(step, {f"{name}/{key}": value for key, value in values.items()})

    def flush(self) -> None:
        """Hand everything written so far to the system."""
        for file in self._files.values():
            file.flush()
        self._events.flush()


def _continued(path: Path, step: int) -> io.TextIOWrapper:
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    # A kill may have left half a line, and rows of steps that will be done again.
    kept = [line for line in lines[1:] if line.endswith("\n") and int(line.split(",")[0]) <= step]
    part = path.with_name(f".{path.name}.part")
    with part.open("w", encoding="utf-8", newline="") as file:
        file.writelines(lines[:1] + kept if kept else [])
    part.replace(path)  # a kill now must not cost what earlier pieces wrote
    return path.open("a", encoding="utf-8", newline="")
