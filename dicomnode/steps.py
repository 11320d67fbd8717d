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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any, BinaryIO

import numpy as np
from pydicom import Dataset

import registration_engine
from dicomnode import objects, rules, volumes
from dicomnode.archive import Archive
from dicomnode.config import Config
from dicomnode.errors import LocalError, RegistrationRejectedError, StudyError
from dicomnode.findings import keys_of
from dicomnode.index import SUPERSEDED, Index
from dicomnode.model import Instance, JobState, Product, Verdict
from dicomnode.objects import Provenance, SourceSeries
from dicomnode.rules import Rule
from dicomnode.scopes import in_time, key_of
from dicomnode.verdict import judge
from registration_engine import DisplacementField, Grid, Preset, Registration, Report, Volume
from registration_engine.dynamic import register_4d

PROGRESS_EVERY_S = 1.0
STORED = tuple(Instance.__dataclass_fields__)


@dataclass(frozen=True, eq=False)
class _Result:
    """What the registration step leaves: the linear stages, the field as it will be delivered, and when."""

    registration: Registration
    sampled: objects.SampledField
    registered_at: datetime


class _Phases(Sequence[Volume]):
    """The phases of a dynamic series, each read when it is asked for."""

    def __init__(self, roles: Sequence[str], load: Callable[[str], Volume]) -> None:
        self._roles, self._load = roles, load

    def __len__(self) -> int:
        return len(self._roles)

    def __getitem__(self, number: Any) -> Any:
        return self._load(self._roles[number])


def _of_all(judged: Sequence[tuple[Verdict, str]]) -> tuple[Verdict, str]:
    """The verdict on a dynamic series: rejected only where every phase is."""
    rejected = [reason for verdict, reason in judged if verdict == Verdict.REJECT]
    if len(rejected) == len(judged):
        return Verdict.REJECT, f"every phase was rejected, the first: {rejected[0]}"
    if rejected:
        return Verdict.WARN, f"{len(rejected)} of {len(judged)} phases were rejected, the first: {rejected[0]}"
    warned = [reason for verdict, reason in judged if verdict == Verdict.WARN]
    return (Verdict.WARN, warned[0]) if warned else (Verdict.ACCEPT, "")


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
        """Fix which instances and frames take part, and pass every volume through the geometry gate."""
        pairs = self._index.pairs_of_job(job_id)
        keys = {f"moving-{n}" if n else "moving": keys_of(each)[1] for n, each in enumerate(pairs)}
        keys["fixed"] = keys_of(pairs[0])[0]
        inputs: dict[str, Any] = {}
        first = {}
        for role, key in keys.items():
            members = self._index.members_of(*key)
            paths, frames = [self._archive.path(instance) for instance, _ in members], [each for _, each in members]
            headers = volumes.read_headers(paths, frames)
            volumes.geometry(headers)
            first[role] = replace(
                volumes.outline(headers[0], last_received_at=datetime.now(UTC)),
                series_instance_uid=key[0],
                volume_number=key[1],
            )
            inputs[role] = [asdict(instance) | {"frames": frames} for instance, frames in members]
        of_key = {key: role for role, key in keys.items()}
        is_one_series = len({key[0] for key in of_key}) == 1
        in_order = None if is_one_series else in_time(list(first.values()))
        # The volumes of one series are numbered in time.
        inputs["order"] = [of_key[key] for key in (sorted(of_key) if in_order is None else map(key_of, in_order))]
        with self._new_file(job_id, "inputs.json") as file:
            file.write(json.dumps(inputs).encode())

    def registration(self, job_id: str) -> None:
        """Register, and sample each result on the very grid that will be delivered."""
        if len(self._order(job_id)) > 2:
            self._register_phases(job_id)
            return
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
        """Judge what would be delivered; stop here if it must not be. Of a dynamic series each phase stands alone."""
        moving = [role for role in self._order(job_id) if role != "fixed"]
        failed = json.loads(self._text(job_id, "failed.json") or "{}")
        judged: dict[str, tuple[Verdict, str]] = {role: (Verdict.REJECT, reason) for role, reason in failed.items()}
        reports = {}
        for role in moving:
            if role in failed:
                continue
            result = self._read(job_id, role)
            sampled = result.sampled
            judged[role] = judge(
                result.registration, sampled.field, max_error_mm=sampled.max_error_mm, tolerance_mm=sampled.tolerance_mm
            )
            reports[role] = result.registration.report.as_dict()
        verdict, reason = judged[moving[0]] if len(moving) == 1 else _of_all([judged[role] for role in moving])
        report = reports[moving[0]] if len(moving) == 1 else {"phases": [reports.get(role) for role in moving]}
        self._index.judge_job(job_id, verdict, reason, report)
        if verdict is Verdict.REJECT:
            raise RegistrationRejectedError(reason)
        with self._new_file(job_id, "verdicts.json") as file:
            file.write(json.dumps(judged).encode())

    def objects(self, job_id: str) -> None:
        """Make the objects and keep them; what is kept and committed already is never made again."""
        if self._index.products_of(job_id):
            return
        made = self._made(job_id)
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

    def _register_phases(self, job_id: str) -> None:
        """All phases of a dynamic series onto its reference, each from what its neighbour found."""
        order, preset = self._order(job_id), self._preset(job_id)
        note = self._progress(job_id)
        phases = _Phases(order, lambda role: volumes.load(self._datasets(job_id, role)))
        failed: dict[str, str] = {}
        try:
            for done, phase in enumerate(
                register_4d(phases, reference=order.index("fixed"), preset=preset, device=self._config.worker.device),
                start=1,
            ):
                role = order[phase.number]
                if phase.registration is None:
                    failed[role] = f"phase {phase.number}: {phase.error}"
                else:
                    sampled = objects.sample_grid(phase.registration)
                    self._write(job_id, _Result(phase.registration, sampled, datetime.now(UTC)), role)
                note("phases", done / (len(order) - 1))
        except registration_engine.RegistrationError as error:
            raise StudyError(str(error)) from error
        with self._new_file(job_id, "failed.json") as file:
            file.write(json.dumps(failed).encode())

    def _made(self, job_id: str) -> Iterator[tuple[str, Dataset]]:
        """The objects of every pair that was not rejected; with `series_4d` their series are one."""
        rule, order = self._rule(job_id), self._order(job_id)
        judged = json.loads(self._text(job_id, "verdicts.json"))
        fixed = self._source(job_id, "fixed")
        with_4d = "series_4d" in rule.outputs
        outputs = [name for name in rule.outputs if name != "series_4d"] + (["series"] if with_4d else [])
        outputs += ["sro_affine"] if rule.registration.affine_sro else []
        digests = [digest for role in order for digest in self._digests(job_id, role).values()]
        accepted = [role for role in order if role != "fixed" and judged[role][0] != Verdict.REJECT]
        reference = self._provenance(job_id, self._read(job_id, accepted[0]))
        series_uid = objects.series_4d_uid(digests, reference)

        def placed(dataset: Dataset, role: str) -> Dataset:
            slices = fixed.grid.shape[0]
            return objects.as_phase(
                dataset, series_uid=series_uid, phase=order.index(role), phases=len(order), slices=slices
            )

        if with_4d:
            report = self._read(job_id, accepted[0]).registration.report
            for dataset in objects.reference_phase(fixed, report, reference, store_in=rule.store_in):
                yield "series", placed(dataset, "fixed")
        for role in accepted:
            result, moving = self._read(job_id, role), self._source(job_id, role)
            for kind, dataset in objects.build(
                fixed,
                moving,
                volumes.load(moving.datasets),
                result.registration,
                result.sampled,
                outputs=outputs,
                provenance=self._provenance(job_id, result),
                warning=judged[role][1],
                store_in=rule.store_in,
            ):
                yield kind, placed(dataset, role) if with_4d and kind == "series" else dataset

    def _provenance(self, job_id: str, result: _Result) -> Provenance:
        job, rule, report = self._index.job(job_id), self._rule(job_id), result.registration.report
        return Provenance(
            rule_id=job.rule_id,
            rule_version=job.rule_version,
            preset=report.preset,
            software_version=version("dicomnode"),
            device_class=report.device.split(":")[0],
            created_at=result.registered_at,
            model_sha256=report.model_sha256,
            parameters={"seed": report.seed, **rule.registration.parameters},
        )

    def _source(self, job_id: str, role: str) -> SourceSeries:
        return SourceSeries.of(self._datasets(job_id, role), self._digests(job_id, role))

    def _order(self, job_id: str) -> list[str]:
        """The roles in the order of their acquisition: `fixed`, `moving`, `moving-1` …"""
        return list(json.loads(self._text(job_id, "inputs.json"))["order"])

    def _text(self, job_id: str, name: str) -> str:
        """A file of the job's folder; empty where there is none."""
        path = self._jobs / job_id / name
        return path.read_text() if path.exists() else ""

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

    def _write(self, job_id: str, result: _Result, role: str = "moving") -> None:
        registration, sampled = result.registration, result.sampled
        facts = {
            "report": registration.report.as_dict(),
            "max_error_mm": sampled.max_error_mm,
            "tolerance_mm": sampled.tolerance_mm,
            "registered_at": result.registered_at.isoformat(),
        }
        with self._new_file(job_id, f"registration-{role}.npz") as file:
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

    def _read(self, job_id: str, role: str) -> _Result:
        with np.load(self._jobs / job_id / f"registration-{role}.npz", allow_pickle=False) as file:
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
