"""Turns received series into pairs and jobs: reads the index, asks the pure core, writes what it decided.

Law: nothing is decided here; a tick that is cut off anywhere can be run again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from datetime import UTC, date, datetime, timedelta
from typing import Any

from dicomnode import completion, pairing, rules, trace, volumes
from dicomnode.archive import Archive
from dicomnode.derived import Subject, study_date
from dicomnode.errors import ConfigError, IncompleteSeriesError, LocalError, StudyError, stack
from dicomnode.index import NOT_LOOKED_AT, TOLERANCE, Enqueue, Index
from dicomnode.model import Promise, SeriesActivity, SeriesState, VolumeRef
from dicomnode.remotes import Source
from dicomnode.rule import Rule
from dicomnode.rules import RuleSet

log = logging.getLogger(__name__)

MAX_REMEMBERED = 10_000
"""Studies known to have been looked at for priors; one that is forgotten is looked at again, which changes nothing."""
LOOK_BACK = timedelta(days=1)
"""Series in no pair are looked at again at a start or under new rules if they came within this time."""
SHORT_QUEUE = 2
"""Jobs that may wait on the queue while a held one is let on; what must wait for its hours can wait its turn too."""
LONGEST_HELD = timedelta(days=1)
"""A job held for longer is let on in its hours however long the queue is."""
UNREADABLE_PAUSE = timedelta(seconds=30)
"""After trouble with our disk or database, a series is tried again this much later."""

Patient = tuple[str, str]
"""PatientID and IssuerOfPatientID."""


class Scheduler:
    """Completes series and makes pairs, one tick at a time, by the newest rule set of the index.

    Parameters
    ----------
    index, archive
        What was received.
    quiet_period_s
        The node's quiet period; a rule's own overrides it for that rule.
    incomplete_wait_s
        How long a series that lacks something is waited for.
    late_instances
        rerun, append or ignore: what instances do that come after their series was paired.
    counts
        What PACS sources hold of a series; None while that is not known.
    enqueue
        Puts a job on the durable queue within the index's transaction.
    """

    def __init__(
        self,
        index: Index,
        archive: Archive,
        *,
        quiet_period_s: float,
        incomplete_wait_s: float = 300.0,
        late_instances: str = "rerun",
        sources: Sequence[Source] = (),
        counts: Callable[[SeriesActivity, datetime], list[Promise] | None] = lambda _activity, _now: [],
        enqueue: Enqueue,
    ) -> None:
        self._index = index
        self._archive = archive
        self._rules: RuleSet = rules.load(None)
        self._rule_version = self._newest_seen = 0
        self._quiet_period_s = quiet_period_s
        self._incomplete_wait_s = incomplete_wait_s
        self._late_instances = late_instances
        self._sources = sources
        self._counts = counts
        self._fetching: dict[Patient, set[str]] = {}
        self._prefetched: dict[str, None] = {}
        self._enqueue = enqueue
        self._waiting: dict[str, tuple[tuple[int, datetime], datetime]] = {}
        self._noted: dict[str, str] = {}
        self._last_tick: datetime | None = None
        since = datetime.now(UTC) - LOOK_BACK
        self._look_at: dict[Patient, datetime | None] = dict.fromkeys(index.patients_to_pair(since=since))

    def tick(self, now: datetime) -> None:
        """Do all that is due at `now`."""
        self._follow_clock(now)
        self._follow_rules(now)
        self._settle_late(now)
        activities = self._index.activities()
        self._follow_priors(activities, now)
        shortest_s = min([self._quiet_period_s, *pairing.quiet_periods_s(self._rules)])
        for activity in activities:
            if completion.is_complete(activity, now=now, quiet_s=shortest_s):
                if self._is_due(activity, now) and self._complete(activity, shortest_s, now):
                    self._look_at[activity.patient_id, activity.issuer_of_patient_id] = None
            else:
                self._note(activity, completion.stuck(activity, now=now))
        for patient, at in list(self._look_at.items()):
            if at is None or at <= now:
                self._pair_or_say_why(patient, now)
        self._release_held(now)

    def _follow_clock(self, now: datetime) -> None:
        """Where the machine's clock was set back, wait for no time that was ahead of it."""
        former, self._last_tick = self._last_tick, now
        if self._index.is_ahead_of(now) if former is None else now < former - TOLERANCE:
            log.warning("the clock was set back: what waits for a time that lies ahead is due")
            self._index.clock_was_set_back(now=now)
            self._waiting.clear()
            self._look_at = dict.fromkeys(self._look_at)

    def _follow_priors(self, activities: Sequence[SeriesActivity], now: datetime) -> None:
        """Ask for what new examinations will need, and look again where what was asked for has come."""
        if not self._sources:
            return
        for activity in activities:
            if activity.study_instance_uid not in self._prefetched and not activity.is_fetched:
                self._prefetch(activity, now)
        fetching = self._index.patients_fetching()
        self._look_at |= dict.fromkeys(self._fetching.keys() - fetching.keys())
        self._fetching = fetching

    def _prefetch(self, activity: SeriesActivity, now: datetime) -> None:
        """Ask for earlier examinations as soon as the first instance of one is here that some rule is about."""
        (first, *_) = self._index.instances_of(activity.series_instance_uid)
        self._prefetched[activity.study_instance_uid] = None
        while len(self._prefetched) > MAX_REMEMBERED:
            del self._prefetched[next(iter(self._prefetched))]
        try:
            volume = volumes.outline(
                volumes.read_headers([self._archive.path(first)])[0], last_received_at=activity.last_received_at
            )
        except (StudyError, LocalError) as error:
            log.warning("series %s: no priors are asked for yet: %s", activity.series_instance_uid, error)
            return
        try:
            self._ask_for_priors_of(volume, activity, now)
        except LocalError:
            raise
        except Exception as error:  # one hostile header must not stop the others
            log.error(
                "series %s: no priors are asked for: %s\n%s",
                activity.series_instance_uid,
                type(error).__name__,
                stack(error),
            )

    def _ask_for_priors_of(self, volume: VolumeRef, activity: SeriesActivity, now: datetime) -> None:
        """One request for each rule that the examination starts."""
        subject = Subject(volume, self._rules.vocabulary)
        for rule in self._rules.enabled:
            if rule.roles.prior is not None and rule.when.check(subject).passed:
                patient = (activity.patient_id, activity.issuer_of_patient_id)
                self._ask_for_priors(rule, patient, activity.study_instance_uid, study_date(volume), now)

    def _ask_for_priors(self, rule: Rule, patient: Patient, study: str, day: date | None, now: datetime) -> None:
        """One request to each source that the rule may ask; asked before, nothing changes."""
        if day is None or not patient[0].strip():
            return
        names = [
            each.name
            for each in self._sources
            if (not rule.priors.sources or each.name in rule.priors.sources)
            and (rule.priors.fetch is None or each.fetch == rule.priors.fetch)
        ]
        request = {
            "study_date": day.isoformat(),
            "min_age_days": rule.priors.min_age_days,
            "max_age_days": rule.priors.max_age_days,
            "max_studies": rule.priors.max_studies,
            "modalities": list(rule.priors.query.modalities),
            "description": rule.priors.query.description,
            "urgent": rule.priority == "urgent",
        }
        self._index.request_priors(patient, study, rule.id, names, request, now=now)

    def _follow_rules(self, now: datetime) -> None:
        """Take over a rule set that was imported meanwhile, and look again at the patients of the day."""
        newest = self._index.newest_rule_version()
        if newest == self._newest_seen:
            return
        self._newest_seen = newest
        text = self._index.rule_set_text(newest)
        try:
            self._rules = rules.parse(text, f"rule set {newest}")
        except ConfigError as error:  # of another version of this program; the one in force stays
            log.error("rule set %d cannot be used, %d stays in force: %s", newest, self._rule_version, error)
        else:
            log.info("rule set %d is in force", newest)
            self._rule_version = newest
            self._look_at |= dict.fromkeys(self._index.patients_to_pair(since=now - LOOK_BACK))

    def _release_held(self, now: datetime) -> None:
        """Let the oldest held job whose rule's hours have come onto the queue, while the queue is short."""
        held = self._index.held_jobs()
        if not held:
            return
        room = SHORT_QUEUE - self._index.waiting_jobs()
        for job_id, version, rule_id, created_at in held:
            try:
                rule = self._rule(version, rule_id)
            except (ConfigError, KeyError) as error:
                # of another version of this program: the worker says so of the job
                log.error("job %s is let on, rule set %d cannot be used: %s", job_id, version, error)
                self._index.release_job(job_id, due=now, enqueue=self._enqueue)
                continue
            if (room > 0 or now - created_at > LONGEST_HELD) and not rule.plan(now).held:
                due = created_at + timedelta(seconds=rule.plan(created_at).patience_s)
                self._index.release_job(job_id, due=due, enqueue=self._enqueue)
                room -= 1

    def _rule(self, version: int, rule_id: str) -> Rule:
        if version == self._rule_version:
            return self._rules.rule(rule_id)
        return rules.parse(self._index.rule_set_text(version), f"rule set {version}").rule(rule_id)

    def _settle_late(self, now: datetime) -> None:
        """Apply the policy to series that grew after they were paired."""
        for uid, count in self._index.late_series().items():
            came = f"{count} instances came after it was complete"
            if self._late_instances == "ignore":
                self._index.ignore_late(uid, f"{came}; they are stored, not used")
            else:
                supersede = self._late_instances == "rerun"
                cancelled = self._index.reopen_series(uid, came, supersede=supersede, now=now)
                for job_id in cancelled:
                    log.info("job %s cancelled: superseded", job_id)
            log.warning("series %s: %s; late_instances: %s", uid, came, self._late_instances)

    def _is_due(self, activity: SeriesActivity, now: datetime) -> bool:
        """False while nothing has changed since it was last looked at and its wait lasts."""
        seen, until = self._waiting.get(activity.series_instance_uid, (None, now))
        return seen != (activity.instances, activity.last_received_at) or now >= until

    def _wait(self, activity: SeriesActivity, until: datetime, why: str) -> None:
        self._waiting[activity.series_instance_uid] = (activity.instances, activity.last_received_at), until
        self._note(activity, f"waiting until {until:%Y-%m-%d %H:%M:%S} UTC: {why}")

    def _note(self, activity: SeriesActivity, note: str) -> None:
        """Show a note in `status`, written once."""
        if note and self._noted.get(activity.series_instance_uid) != note:
            self._noted[activity.series_instance_uid] = note
            log.warning("series %s: %s", activity.series_instance_uid, note)
            self._index.note_series(activity.series_instance_uid, note)

    def _complete(self, activity: SeriesActivity, quiet_s: float, now: datetime) -> bool:
        """Read the series as its volumes, or say why it has none; False while it is waited for."""
        uid = activity.series_instance_uid
        if self._index.is_own_output(uid):
            self._close(activity, SeriesState.UNPAIRED, "the node's own output: never registered again")
            return True
        held = self._counts(activity, now)
        if held is None:
            self._waiting[uid] = (activity.instances, activity.last_received_at), now
            return False
        described, problem, promised = volumes.Description(()), "", held
        gap = ""
        try:
            datasets = volumes.read_headers([self._archive.path(each) for each in self._index.instances_of(uid)])
            promised = [*held, *volumes.promises(datasets)]
            described = volumes.describe(datasets, last_received_at=activity.last_received_at)
        except LocalError as error:
            self._wait(activity, now + UNREADABLE_PAUSE, str(error))
            return False
        except StudyError as error:
            problem = str(error)
            gap = problem if isinstance(error, IncompleteSeriesError) and activity.instances > 2 else ""
        except Exception as error:  # one hostile series must not stop the others
            log.error("series %s cannot be read: %s\n%s", uid, type(error).__name__, stack(error))
            problem = f"cannot be read: {type(error).__name__}: {error}"
        decision = completion.decide(
            activity,
            promises=promised,
            gap=gap,
            now=now,
            quiet_s=quiet_s,
            incomplete_wait_s=self._incomplete_wait_s,
        )
        if not decision.is_complete:
            self._wait(activity, decision.look_again_at or now, decision.missing)
            return False
        short = f"complete as it is, with {decision.missing}" if decision.missing and not gap else ""
        note = "; ".join(filter(None, [short, *described.notes]))
        if problem:
            log.info("series %s refused: %s", uid, problem)
            self._close(activity, SeriesState.REFUSED, problem, note=note)
        else:
            log.info("series %s complete: %d instances, %d volumes", uid, activity.instances, len(described.volumes))
            self._close(activity, SeriesState.UNPAIRED, NOT_LOOKED_AT, note=note, volumes=described.volumes)
        return True

    def _close(self, activity: SeriesActivity, state: SeriesState, reason: str, **more: Any) -> None:
        self._waiting.pop(activity.series_instance_uid, None)
        self._noted.pop(activity.series_instance_uid, None)
        self._index.complete_series(activity, state=state, reason=reason, **more)

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
            fetching=self._fetching.get(patient, ()),
            quiet_period_s=self._quiet_period_s,
            now=now,
        )
        days = {each.study_instance_uid: study_date(each) for each in candidates}
        for rule_id, study in decision.lacking_priors:
            self._ask_for_priors(self._rules.rule(rule_id), patient, study, days[study], now)
        jobs = self._index.add_pairs(
            decision.pairs,
            decision.reasons,
            rule_version=self._rule_version,
            enqueue=self._enqueue,
            now=now,
            plans={each.rule_id: self._rules.rule(each.rule_id).plan(now) for each in decision.pairs},
            patient_of=patient,
            ambiguities=decision.ambiguities,
            trace=trace.as_json(decision.findings),
        )
        for job_id in jobs:
            log.info("job %s made by rule set %d", job_id, self._rule_version)
        if decision.look_again_at is None:
            self._look_at.pop(patient, None)
        else:
            self._look_at[patient] = decision.look_again_at
