"""The folder in which a job's results lie from one step to the next.

Law: a file is there whole and durable, or not at all; what was written is read back equal. Nothing here knows of the
index, nor what a step is for.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from pydicom import Dataset

from dicomnode import volumes
from dicomnode.archive import Archive
from dicomnode.errors import LocalError
from dicomnode.model import Instance
from dicomnode.objects import Drawing, SampledField, SourceSeries
from dicomnode.quality import Figures, Measured
from registration_engine import DisplacementField, Grid, Registration, Report

STORED = tuple(Instance.__dataclass_fields__)

DRAWINGS = "drawings of {}"
"""Under what name the drawings of a role stand among the members."""

Members = Sequence[tuple[Instance, Sequence[int]]]
"""The instances of one volume, each with its frames; no frames: a single-frame instance."""


@dataclass(frozen=True, eq=False)
class Result:
    """What the registration step leaves: the linear stages, the field as it will be delivered, and when."""

    registration: Registration
    sampled: SampledField
    registered_at: datetime


class JobFolder:
    """One job's folder; the roles are `fixed`, `moving`, `moving-1` …

    Parameters
    ----------
    path
        Made with the first file.
    archive
        Where the instances are that take part.
    """

    def __init__(self, path: Path, archive: Archive) -> None:
        self._path = path
        self._archive = archive

    def write_inputs(self, members: Mapping[str, Members], order: Sequence[str]) -> None:
        """Fix what takes part: the members of every role, and the roles in the order of their acquisition."""
        inputs: dict[str, Any] = {
            role: [asdict(instance) | {"frames": list(frames)} for instance, frames in of_role]
            for role, of_role in members.items()
        }
        self.write_json("inputs", {**inputs, "order": list(order)})

    @property
    def order(self) -> list[str]:
        """The roles in the order of their acquisition."""
        return list(self.read_json("inputs")["order"])

    @property
    def moving_roles(self) -> list[str]:
        """Every role but `fixed`, in order."""
        return [role for role in self.order if role != "fixed"]

    def inputs(self, role: str) -> list[tuple[Instance, tuple[int, ...]]]:
        """The instances of one role, each with its frames."""
        return [
            (Instance(**{name: each[name] for name in STORED}), tuple(each["frames"]))
            for each in self.read_json("inputs")[role]
        ]

    @property
    def members(self) -> list[str]:
        """Every role, and for a role whose images were drawn on `drawings of ROLE`."""
        return [name for name in self.read_json("inputs") if name != "order"]

    def drawings(self, role: str) -> list[Drawing]:
        """The Segmentations and RT Structure Sets that belong to one role."""
        name = DRAWINGS.format(role)
        inputs = [instance for instance, _ in self.inputs(name)] if name in self.members else []
        read = volumes.read([self._archive.path(each) for each in inputs])
        return [Drawing(dataset, each.sha256) for dataset, each in zip(read, inputs, strict=True)]

    def datasets(self, role: str) -> list[Dataset]:
        """The slices of one role's volume, whole."""
        inputs = self.inputs(role)
        return volumes.read([self._archive.path(each) for each, _ in inputs], [frames for _, frames in inputs])

    def headers(self, role: str) -> SourceSeries:
        """One role as the objects refer to it, without its pixels."""
        inputs = self.inputs(role)
        paths, frames = [self._archive.path(each) for each, _ in inputs], [frames for _, frames in inputs]
        return SourceSeries.of(volumes.read_headers(paths, frames), self.digests(role))

    def digests(self, role: str) -> dict[str, str]:
        """sha256 of each instance's data set by SOP Instance UID."""
        return {each.sop_instance_uid: each.sha256 for each, _ in self.inputs(role)}

    def source(self, role: str) -> SourceSeries:
        """One role as the objects refer to it."""
        return SourceSeries.of(self.datasets(role), self.digests(role))

    def write_result(self, result: Result, role: str = "moving") -> None:
        """Keep what was registered of one role."""
        registration, sampled = result.registration, result.sampled
        facts = {
            "report": registration.report.as_dict(),
            "max_error_mm": sampled.max_error_mm,
            "tolerance_mm": sampled.tolerance_mm,
            "registered_at": result.registered_at.isoformat(),
        }
        with self._new_file(f"registration-{role}.npz") as file:
            np.savez(
                file,
                facts=np.array(json.dumps(facts)),
                shape=np.array(registration.grid.shape),
                affine=registration.grid.affine,
                rigid=registration.rigid,
                moving_from_fixed=registration.moving_from_fixed,
                vectors=sampled.field.vectors,
                vectors_affine=sampled.field.grid.affine,
                displacement=np.empty(0) if registration.displacement is None else registration.displacement,
            )

    def result(self, role: str) -> Result:
        """What was registered of one role."""
        with np.load(self._path / f"registration-{role}.npz", allow_pickle=False) as file:
            facts = json.loads(str(file["facts"]))
            vectors = file["vectors"]
            z, y, x = (int(n) for n in file["shape"])
            field = DisplacementField(vectors, Grid(vectors.shape[:3], file["vectors_affine"]))
            registration = Registration(
                grid=Grid((z, y, x), file["affine"]),
                rigid=file["rigid"],
                moving_from_fixed=file["moving_from_fixed"],
                displacement=file["displacement"] if file["displacement"].size else None,
                report=Report(**facts["report"]),
            )
        sampled = SampledField(field, facts["max_error_mm"], facts["tolerance_mm"])
        return Result(registration, sampled, datetime.fromisoformat(facts["registered_at"]))

    def write_measured(self, measured: Measured, role: str) -> None:
        """Keep what was measured of one role's result."""
        figures = json.dumps(measured.figures.as_dict())
        before, after = measured.patches
        with self._new_file(f"measured-{role}.npz") as file:
            np.savez(file, figures=np.array(figures), before=before, after=after)

    def measured(self, role: str) -> Measured | None:
        """What was measured of one role's result; None where it was not kept."""
        if not (self._path / f"measured-{role}.npz").exists():
            return None
        with np.load(self._path / f"measured-{role}.npz", allow_pickle=False) as file:
            figures = Figures.from_dict(json.loads(str(file["figures"])))
            return Measured(figures, (file["before"], file["after"]))

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Keep plain values under a name."""
        with self._new_file(f"{name}.json") as file:
            file.write(json.dumps(content).encode())

    def read_json(self, name: str) -> dict[str, Any]:
        """The plain values kept under a name; empty where there are none."""
        path = self._path / f"{name}.json"
        return dict(json.loads(path.read_text())) if path.exists() else {}

    def remove(self) -> None:
        """Remove it with all it holds; what cannot be removed now, the next sweep removes."""
        shutil.rmtree(self._path, ignore_errors=True)

    @contextmanager
    def _new_file(self, name: str) -> Iterator[BinaryIO]:
        """A file that is there whole and durable once the block ends, or not at all."""
        temporary = self._path / f"{name}.part"
        try:
            self._path.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.rename(self._path / name)
            descriptor = os.open(self._path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise LocalError(f"job folder {self._path}: {error}") from error
