"""What a worker does for one job: one method per arrow of the line, each safe to run again.

Law: a step reads what the former left in the job's folder, writes its own result there whole or not at all, and
raises a NodeError for whatever a person or a retry can mend. The folder goes when the job is done; what lasts is in
the archive and the index.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime

from dicomnode import objects, rules, volumes
from dicomnode.archive import Archive
from dicomnode.config import Config
from dicomnode.errors import LocalError, RegistrationRejectedError, StudyError
from dicomnode.findings import keys_of
from dicomnode.handover import HandOver
from dicomnode.index import ENDED, Index
from dicomnode.job_folder import DRAWINGS, JobFolder
from dicomnode.model import Instance, Product, Verdict
from dicomnode.products import Maker
from dicomnode.registering import judge_pairs, provenance, register
from dicomnode.rule import Rule
from dicomnode.scopes import in_time, key_of
from registration_engine import PRESETS, Preset
from registration_engine.devices import device_named
from registration_engine.errors import InvalidRequestError

log = logging.getLogger(__name__)

PROGRESS_EVERY_S = 1.0


def require_device(name: str) -> None:
    """LocalError where there is no such device: no job may fail because an accelerator is gone."""
    try:
        device_named(name)
    except InvalidRequestError as error:
        raise LocalError(f"worker.device: {error}") from None


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
        for folder in self._jobs.iterdir() if self._jobs.is_dir() else ():
            if self._index.job(folder.name).state in ENDED:
                shutil.rmtree(folder)

    def volumes(self, job_id: str) -> None:
        """Fix which instances and frames take part, and pass every volume through the geometry gate."""
        pairs = self._index.pairs_of_job(job_id)
        keys = {f"moving-{n}" if n else "moving": keys_of(each)[1] for n, each in enumerate(pairs)}
        keys["fixed"] = keys_of(pairs[0])[0]
        members, first = {}, {}
        for role, key in keys.items():
            members[role] = self._index.members_of(*key)
            paths = [self._archive.path(instance) for instance, _ in members[role]]
            headers = volumes.read_headers(paths, [frames for _, frames in members[role]])
            volumes.geometry(headers)
            first[role] = replace(
                volumes.outline(headers[0], last_received_at=datetime.now(UTC)),
                series_instance_uid=key[0],
                volume_number=key[1],
            )
        of_key = {key: role for role, key in keys.items()}
        is_one_series = len({key[0] for key in of_key}) == 1
        in_order = None if is_one_series else in_time(list(first.values()))
        # The volumes of one series are numbered in time.
        order = [of_key[key] for key in (sorted(of_key) if in_order is None else map(key_of, in_order))]
        for role, key in keys.items() if set(self._rule(job_id).outputs) & set(objects.CARRIED) else ():
            if role != "fixed":
                members[DRAWINGS.format(role)] = self._drawings(key[0], members[role])
        self._folder(job_id).write_inputs(members, order)

    def _drawings(
        self, series_instance_uid: str, members: Sequence[tuple[Instance, tuple[int, ...]]]
    ) -> list[tuple[Instance, tuple[int, ...]]]:
        """What is here now that was drawn on a volume; what cannot be read is named in the log and left."""
        paths, frames = [self._archive.path(each) for each, _ in members], [each for _, each in members]
        series = objects.SourceSeries.of(volumes.read_headers(paths, frames), {})
        found: list[tuple[Instance, tuple[int, ...]]] = []
        for instance in self._index.drawings_near(series_instance_uid):
            try:
                (dataset,) = volumes.read_headers([self._archive.path(instance)])
            except StudyError as error:
                log.warning("instance %s: drawings in it are not carried over: %s", instance.sop_instance_uid, error)
                continue
            if objects.belongs_to(dataset, series):
                found.append((instance, ()))
        return found

    def registration(self, job_id: str) -> None:
        """Register, and sample each result on the very grid that will be delivered."""
        device, progress = self._config.worker.device, self._progress(job_id)
        register(self._folder(job_id), preset=self._preset(job_id), device=device, progress=progress)

    def verdict(self, job_id: str) -> None:
        """Judge what would be delivered; stop here if it must not be. Of a dynamic series each phase stands alone."""
        folder, rule = self._folder(job_id), self._rule(job_id)
        verdict, reason, report = judge_pairs(folder, rule)
        self._index.judge_job(job_id, verdict, reason, report, provenance=provenance(folder))
        if verdict is Verdict.REJECT:
            log.error("ALERT job %s of rule %s: its result is rejected and not sent: %s", job_id, rule.id, reason)
            if not (rule.verdict.report_rejected and "sr" in rule.outputs):
                raise RegistrationRejectedError(reason)

    def objects(self, job_id: str) -> None:
        """Make the objects and keep them; what is kept and committed already is never made again.

        An object that a former job made alike and sent stays that job's: the results are the same.
        """
        if self._index.products_of(job_id):
            return
        made, alike = [], {}
        for kind, dataset in Maker(self._index.job(job_id), self._rule(job_id), self._folder(job_id)).make():
            uid = str(dataset.SOPInstanceUID)
            if self._index.made_already([uid]):
                alike[uid] = job_id
            else:
                made.append(Product(job_id, kind, self._archive.keep_dataset(dataset)))
        self._index.add_products(made, adopted=alike)

    def deliver(self, job_id: str) -> None:
        """Put every product on its way to the rule's destinations, or to all; the job ends with the same commit."""
        HandOver(self._config, self._index, self._archive).end(job_id, now=datetime.now(UTC))
        self._folder(job_id).remove()

    def _folder(self, job_id: str) -> JobFolder:
        return JobFolder(self._jobs / job_id, self._archive)

    def _preset(self, job_id: str) -> Preset:
        """The rule's preset, or the node's, with the rule's own parameters."""
        rule = self._rule(job_id)
        preset = PRESETS[rule.preset(self._config.worker.preset)]
        return replace(preset, **rule.registration.parameters)

    def _rule(self, job_id: str) -> Rule:
        """The rule that made the job's pair, in the version that made it."""
        job = self._index.job(job_id)
        text = self._index.rule_set_text(job.rule_version)
        return rules.parse(text, f"rule set {job.rule_version}").rule(job.rule_id)

    def _progress(self, job_id: str) -> Callable[[str, float], None]:
        """Note the engine's progress in the index, now and then."""
        noted_at = 0.0

        def note(activity: str, fraction: float) -> None:
            nonlocal noted_at
            if time.monotonic() - noted_at >= PROGRESS_EVERY_S:
                noted_at = time.monotonic()
                self._index.set_progress(job_id, fraction, activity)

        return note
