"""Turns received series into pairs and jobs: reads the index, asks the pure core, writes what it decided.

Law: nothing is decided here; a tick that is cut off anywhere can be run again.
"""

from __future__ import annotations

import logging
from datetime import datetime

from dicomnode import completion, pairing, volumes
from dicomnode.archive import Archive
from dicomnode.errors import LocalError, StudyError, stack
from dicomnode.index import Enqueue, Index
from dicomnode.model import SeriesActivity, SeriesState, VolumeRef
from dicomnode.rules import RuleSet

log = logging.getLogger(__name__)

Patient = tuple[str, str]
"""PatientID and IssuerOfPatientID."""


class Scheduler:
    """Completes series and makes pairs, one tick at a time.

    Parameters
    ----------
    index, archive
        What was received.
    rules
        The rule set in force.
    rule_version
        Its number in the index.
    quiet_period_s
        The node's quiet period; a rule's own overrides it for that rule.
    enqueue
        Puts a job on the durable queue within the index's transaction.
    """

    def __init__(
        self,
        index: Index,
        archive: Archive,
        rules: RuleSet,
        *,
        rule_version: int,
        quiet_period_s: float,
        enqueue: Enqueue,
    ) -> None:
        self._index = index
        self._archive = archive
        self._rules = rules
        self._rule_version = rule_version
        self._quiet_period_s = quiet_period_s
        self._enqueue = enqueue
        self._look_at: dict[Patient, datetime | None] = dict.fromkeys(index.patients_to_pair())

    def tick(self, now: datetime) -> None:
        """Do all that is due at `now`."""
        activities = self._index.activities()
        shortest_s = min([self._quiet_period_s, *pairing.quiet_periods_s(self._rules)])
        for activity in activities:
            if completion.is_complete(activity, now=now, quiet_s=shortest_s):
                self._complete(activity)
                self._look_at[activity.patient_id, activity.issuer_of_patient_id] = None
        for patient, at in list(self._look_at.items()):
            if at is None or at <= now:
                self._pair_or_say_why(patient, now)

    def _complete(self, activity: SeriesActivity) -> None:
        """Read the series as one volume, or say why it is none."""
        uid = activity.series_instance_uid
        if self._index.is_own_output(uid):
            reason = "the node's own output: never registered again"
            self._index.complete_series(activity, state=SeriesState.UNPAIRED, reason=reason)
            return
        try:
            datasets = volumes.read_headers([self._archive.path(each) for each in self._index.instances_of(uid)])
            described = volumes.describe(datasets, last_received_at=activity.last_received_at)
        except StudyError as error:
            log.info("series %s refused: %s", uid, error)
            self._index.complete_series(activity, state=SeriesState.REFUSED, reason=str(error))
        except Exception as error:  # one hostile series must not stop the others
            log.error("series %s cannot be read: %s\n%s", uid, type(error).__name__, stack(error))
            reason = f"cannot be read: {type(error).__name__}: {error}"
            self._index.complete_series(activity, state=SeriesState.REFUSED, reason=reason)
        else:
            log.info("series %s complete: %d instances", uid, activity.instances)
            self._index.complete_series(
                activity, state=SeriesState.UNPAIRED, reason="not looked at yet", volumes=described.volumes
            )

    def _pair_or_say_why(self, patient: Patient, now: datetime) -> None:
        candidates = self._index.volumes_of(*patient)
        try:
            self._pair(patient, candidates, now)
        except LocalError:
            raise
        except Exception as error:  # a fault with one patient must not stop the others
            log.error("pairing failed: %s\n%s", type(error).__name__, stack(error))
            reasons = {each.series_instance_uid: f"pairing failed: {error!r}" for each in candidates}
            self._index.add_pairs([], reasons, rule_version=self._rule_version, enqueue=self._enqueue, now=now)
            self._look_at.pop(patient, None)

    def _pair(self, patient: Patient, candidates: list[VolumeRef], now: datetime) -> None:
        receiving = [
            each for each in self._index.activities() if (each.patient_id, each.issuer_of_patient_id) == patient
        ]
        decision = pairing.pair(
            self._rules,
            candidates,
            receiving=receiving,
            existing=self._index.pairs_of([each.series_instance_uid for each in candidates]),
            quiet_period_s=self._quiet_period_s,
            now=now,
        )
        jobs = self._index.add_pairs(
            decision.pairs, decision.reasons, rule_version=self._rule_version, enqueue=self._enqueue, now=now
        )
        for made, job_id in zip(decision.pairs, jobs, strict=False):
            log.info("job %s: rule %s", job_id, made.rule_id)
        if decision.look_again_at is None:
            self._look_at.pop(patient, None)
        else:
            self._look_at[patient] = decision.look_again_at
