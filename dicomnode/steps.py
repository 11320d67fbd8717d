"""What a worker does for one job: one method per arrow of the line, each safe to run again.

Law: a step reads what the former left in the job's folder, writes its own result there whole or not at all, and
raises a NodeError for whatever a person or a retry can mend. The folder goes when the job is done; what lasts is in
the archive and the index.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from typing import BinaryIO

import numpy as np
from pydicom import Dataset

import registration_engine
from dicomnode import objects, rules, volumes
from dicomnode.archive import Archive
from dicomnode.config import Config
from dicomnode.errors import LocalError, RegistrationRejectedError, StudyError
from dicomnode.index import SUPERSEDED, Index
from dicomnode.model import Instance, JobState, Product, Verdict
from dicomnode.rules import Rule
from dicomnode.verdict import judge
from registration_engine import DisplacementField, Grid, Preset, Registration, Report

PROGRESS_EVERY_S = 1.0
STORED = tuple(Instance.__dataclass_fields__)


@dataclass(frozen=True, eq=False)
class _Result:
    """What the registration step leaves: the linear stages, the field as it will be delivered, and when."""

    registration: Registration
    sampled: objects.SampledField
    registered_at: datetime


class Steps:
    """The arrows from a claimed job to its deliveries.

    Parameters
    ----------
    config, index, archive
        The node's; results go to every destination of the configuration.
    """

    def __init__(self, config: Config, index: Index, archive: Archive) -> None:
        self._config = config
        self._index = index
        self._archive = archive
        self._jobs = config.data_dir / "jobs"

    def in_order(self) -> dict[str, Callable[[str], None]]:
        """Every step by its stage name, in order."""
        return {
            "volumes": self.volumes,
            "registration": self.registration,
            "verdict": self.verdict,
            "objects": self.objects,
            "deliver": self.deliver,
        }

    def sweep(self) -> None:
        """Remove the folders of jobs that ended while nobody could remove them."""
        ended = (JobState.DONE, JobState.REJECTED, JobState.FAILED, JobState.CANCELLED)
        for folder in self._jobs.iterdir() if self._jobs.is_dir() else ():
            if self._index.job(folder.name).state in ended:
                shutil.rmtree(folder)

    def volumes(self, job_id: str) -> None:
        """Fix which instances and frames take part, and pass both volumes through the geometry gate."""
        job = self._index.job(job_id)
        inputs = {}
        for role, uid, number in (
            ("fixed", job.fixed_series_instance_uid, job.fixed_volume_number),
            ("moving", job.moving_series_instance_uid, job.moving_volume_number),
        ):
            members = self._index.members_of(uid, number)
            paths, frames = [self._archive.path(instance) for instance, _ in members], [each for _, each in members]
            volumes.geometry(volumes.read_headers(paths, frames))
            inputs[role] = [asdict(instance) | {"frames": frames} for instance, frames in members]
        with self._new_file(job_id, "inputs.json") as file:
            file.write(json.dumps(inputs).encode())

    def registration(self, job_id: str) -> None:
        """Register, and sample the result on the very grid that will be delivered."""
        fixed, moving = (volumes.load(self._datasets(job_id, role)) for role in ("fixed", "moving"))
        try:
            registration = registration_engine.register(
                fixed,
                moving,
                preset=self._preset(job_id),
                device=self._config.worker.device,
                progress=self._progress(job_id),
            )
        except registration_engine.ImplausibleResultError as error:
            raise RegistrationRejectedError(str(error)) from error
        except registration_engine.RegistrationError as error:
            raise StudyError(str(error)) from error
        self._write(job_id, _Result(registration, objects.sample_grid(registration), datetime.now(UTC)))

    def verdict(self, job_id: str) -> None:
        """Judge what would be delivered; stop here if it must not be."""
        result = self._read(job_id)
        sampled = result.sampled
        verdict, reason = judge(
            result.registration, sampled.field, max_error_mm=sampled.max_error_mm, tolerance_mm=sampled.tolerance_mm
        )
        self._index.judge_job(job_id, verdict, reason, result.registration.report.as_dict())
        if verdict is Verdict.REJECT:
            raise RegistrationRejectedError(reason)

    def objects(self, job_id: str) -> None:
        """Make the objects and keep them; what is kept and committed already is never made again."""
        if self._index.products_of(job_id):
            return
        job, rule, result = self._index.job(job_id), self._rule(job_id), self._read(job_id)
        fixed, moving = (
            objects.SourceSeries.of(self._datasets(job_id, role), self._digests(job_id, role))
            for role in ("fixed", "moving")
        )
        report = result.registration.report
        made = objects.build(
            fixed,
            moving,
            volumes.load(moving.datasets),
            result.registration,
            result.sampled,
            outputs=[*rule.outputs, *(["sro_affine"] if rule.registration.affine_sro else [])],
            provenance=objects.Provenance(
                rule_id=job.rule_id,
                rule_version=job.rule_version,
                preset=report.preset,
                software_version=version("dicomnode"),
                device_class=report.device.split(":")[0],
                created_at=result.registered_at,
                model_sha256=report.model_sha256,
                parameters={"seed": report.seed, **rule.registration.parameters},
            ),
            warning=job.reason,
            store_in=rule.store_in,
        )
        self._index.add_products([Product(job_id, kind, self._archive.keep_dataset(dataset)) for kind, dataset in made])

    def deliver(self, job_id: str) -> None:
        """Put every product on its way to the rule's destinations, or to all; the job is done with the same commit."""
        if self._index.is_superseded(job_id):
            raise RegistrationRejectedError(SUPERSEDED)
        configured = [each.name for each in self._config.destinations]
        asked = self._rule(job_id).destinations
        names = configured if asked is None else list(asked)
        if missing := sorted(set(names) - set(configured)):
            raise StudyError(f"destination {', '.join(missing)} of the rule is not configured any more")
        self._index.enqueue_deliveries(job_id, names, now=datetime.now(UTC))
        shutil.rmtree(self._jobs / job_id, ignore_errors=True)  # what is left, `sweep` removes

    def _preset(self, job_id: str) -> Preset:
        """The rule's preset, or the node's, with the rule's own parameters."""
        rule = self._rule(job_id)
        preset = registration_engine.PRESETS[rule.preset(self._config.worker.preset)]
        return replace(preset, **rule.registration.parameters)

    def _rule(self, job_id: str) -> Rule:
        """The rule that made the job's pair, in the version that made it."""
        job = self._index.job(job_id)
        text = self._index.rule_set_text(job.rule_version)
        return rules.parse(text, f"rule set {job.rule_version}").rule(job.rule_id)

    def _inputs(self, job_id: str, role: str) -> list[tuple[Instance, tuple[int, ...]]]:
        """The instances of one role, each with its frames."""
        inputs = json.loads((self._jobs / job_id / "inputs.json").read_text())
        return [(Instance(**{name: each[name] for name in STORED}), tuple(each["frames"])) for each in inputs[role]]

    def _datasets(self, job_id: str, role: str) -> list[Dataset]:
        """The slices of one role's volume, whole."""
        inputs = self._inputs(job_id, role)
        return volumes.read([self._archive.path(each) for each, _ in inputs], [frames for _, frames in inputs])

    def _digests(self, job_id: str, role: str) -> dict[str, str]:
        return {each.sop_instance_uid: each.sha256 for each, _ in self._inputs(job_id, role)}

    def _progress(self, job_id: str) -> Callable[[str, float], None]:
        """Note the engine's progress in the index, now and then."""
        noted_at = 0.0

        def note(_stage: str, fraction: float) -> None:
            nonlocal noted_at
            if time.monotonic() - noted_at >= PROGRESS_EVERY_S:
                noted_at = time.monotonic()
                self._index.set_progress(job_id, fraction)

        return note

    def _write(self, job_id: str, result: _Result) -> None:
        registration, sampled = result.registration, result.sampled
        facts = {
            "report": registration.report.as_dict(),
            "max_error_mm": sampled.max_error_mm,
            "tolerance_mm": sampled.tolerance_mm,
            "registered_at": result.registered_at.isoformat(),
        }
        with self._new_file(job_id, "registration.npz") as file:
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

    def _read(self, job_id: str) -> _Result:
        with np.load(self._jobs / job_id / "registration.npz", allow_pickle=False) as file:
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
        sampled = objects.SampledField(field, facts["max_error_mm"], facts["tolerance_mm"])
        return _Result(registration, sampled, datetime.fromisoformat(facts["registered_at"]))

    @contextmanager
    def _new_file(self, job_id: str, name: str) -> Iterator[BinaryIO]:
        """A file of the job's folder that is there whole and durable once the block ends, or not at all."""
        folder = self._jobs / job_id
        temporary = folder / f"{name}.part"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.rename(folder / name)
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise LocalError(f"job folder {folder}: {error}") from error
