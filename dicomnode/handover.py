"""The last step of a job: its results go on their way, and what former jobs of its pair had sent is withdrawn.

Law: nothing that awaits a person's approval is in the ledger of deliveries; former results are withdrawn only once
others stand in their place, or by a person.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from importlib.metadata import version

from pydicom import dcmread

from dicomnode import objects, rules
from dicomnode.archive import Archive
from dicomnode.config import Config
from dicomnode.errors import ConfigError, RegistrationRejectedError
from dicomnode.index import NOTE, SUPERSEDED, Index, Notes
from dicomnode.model import Job, JobState, Product, Verdict
from dicomnode.rule import Rule

AWAITS = "awaits approval"


class HandOver:
    """Puts results on their way, at once or when a person approves, or takes them back.

    Parameters
    ----------
    config, index, archive
        The node's.
    """

    def __init__(self, config: Config, index: Index, archive: Archive) -> None:
        self._config = config
        self._index = index
        self._archive = archive

    def end(self, job_id: str, *, now: datetime) -> None:
        """Hand over what the job made, or let it wait where its rule wants a person to approve.

        Raises
        ------
        RegistrationRejectedError
            Its pair is made again with what came late.
        StudyError
            A destination of the rule is not configured any more.
        """
        if self._index.is_superseded(job_id):
            raise RegistrationRejectedError(SUPERSEDED)
        job, rule = self._index.job(job_id), self._rule(job_id)
        if rule.hold and job.verdict is not Verdict.REJECT and self._index.products_of(job_id):
            self._config.route(rule.destinations, self._senders(job))
            self._index.await_approval(job_id, f"{AWAITS}; {job.reason}" if job.reason else AWAITS)
        else:
            self._send(job, rule, None, now)

    def approve(self, job: Job, *, by: str, now: datetime) -> None:
        """Send what awaits approval.

        Raises
        ------
        ConfigError
            The job awaits none, or was superseded.
        """
        self._check_awaiting(job)
        self._send(job, self._rule(job.id), job.reason.replace(AWAITS, f"approved by {by}", 1), now)

    def reject(self, job: Job, *, by: str, why: str, now: datetime) -> list[str]:
        """Send nothing of a job any more, and a rejection note to every destination that has something of it already.

        Returns
        -------
        list[str]
            Those destinations.

        Raises
        ------
        ConfigError
            The job has no results.
        """
        if job.state not in (JobState.APPROVAL, JobState.DONE):
            raise ConfigError("reject", "JOB", job.id, f"a job with results; this one is {job.state}")
        reason = f"rejected by {by}" + (f": {why}" if why else "")
        rule = self._rule(job.id)
        title = "quality" if rule.rejection_note == "none" else rule.rejection_note
        notes = self._notes(
            job.id, [job.id], title, f"Rejected by a person: {why}" if why else "Rejected by a person", now
        )
        self._index.reject_job(job.id, reason, notes, priority=rule.delivery_priority, now=now)
        return sorted({name for _, names in notes for name in names})

    def _send(self, job: Job, rule: Rule, reason: str | None, now: datetime) -> None:
        names = self._config.route(rule.destinations, self._senders(job))
        former = self._index.former_jobs(job.id)
        if not self._index.products_of(job.id) and former:
            reason, former = f"the same results as job {former[-1]}: nothing new is sent", []
        if job.verdict is Verdict.REJECT:
            former = []
        text = f"Superseded: other results stand in their place, made by rule {rule.id} version {job.rule_version}."
        notes = self._notes(job.id, former, rule.rejection_note, text, now)
        self._index.enqueue_deliveries(
            job.id,
            names,
            now=now,
            priority=rule.delivery_priority,
            former=former,
            notes=notes,
            reason=reason,
            wanted={each.name: each.kinds for each in self._config.destination_sections if each.outputs},
        )

    def _notes(self, job_id: str, former: Sequence[str], title: str, text: str, now: datetime) -> Notes:
        """A note for each set of instances that destinations have, kept, with those destinations."""
        if title == "none" or not former:
            return []
        unwilling = {each.name for each in self._config.destination_sections if not each.rejection_notes}
        having: dict[tuple[str, ...], list[str]] = {}
        products: dict[str, Product] = {}
        for name, several in self._index.sent_by(former).items():
            if name not in unwilling:
                products |= {each.instance.sop_instance_uid: each for each in several}
                for uids in self._by_study(several).values():
                    having.setdefault(uids, []).append(name)
        notes = []
        for uids, names in having.items():
            note = objects.rejection_note(
                [dcmread(self._archive.path(products[uid].instance), stop_before_pixels=True) for uid in uids],
                title=title,
                text=text,
                job_id=job_id,
                software_version=version("dicomnode"),
                created_at=now,
            )
            notes.append((Product(job_id, NOTE, self._archive.keep_dataset(note)), names))
        return notes

    def _by_study(self, products: Sequence[Product]) -> Mapping[str, tuple[str, ...]]:
        """SOP Instance UIDs by Study Instance UID: jobs may have stored in different ones."""
        found: dict[str, list[str]] = {}
        for each in products:
            header = dcmread(self._archive.path(each.instance), specific_tags=["StudyInstanceUID"])
            found.setdefault(str(header.StudyInstanceUID), []).append(each.instance.sop_instance_uid)
        return {study: tuple(uids) for study, uids in found.items()}

    def _check_awaiting(self, job: Job) -> None:
        if job.state is not JobState.APPROVAL:
            raise ConfigError("release", "JOB", job.id, f"a job that awaits approval; this one is {job.state}")
        if self._index.is_superseded(job.id):
            raise ConfigError("release", "JOB", job.id, "the newest job of its pair: this one was superseded")

    def _senders(self, job: Job) -> list[str]:
        return self._index.senders_of(job.fixed_series_instance_uid)

    def _rule(self, job_id: str) -> Rule:
        """The rule that made the job's pair, in the version that made it."""
        job = self._index.job(job_id)
        return rules.parse(self._index.rule_set_text(job.rule_version), f"rule set {job.rule_version}").rule(
            job.rule_id
        )
