"""Which series belong together, and why the others were left: rules + one patient's complete volumes → pairs.

Law: pure; `now` is an argument, and neither the order of the candidates nor a second run changes the result. A tie is
never broken silently, no pair joins two patients, and every candidate leaves with a pair or a reason.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from dicomnode import completion, partners
from dicomnode.model import Pair, SeriesActivity, VolumeRef
from dicomnode.rules import Role, Rule, RuleSet

Volumes = Mapping[str, VolumeRef]
"""By Series Instance UID, sorted by it."""

MAX_CLAUSES = 6
"""Rules, or partners, that one reason tells about; the rest is counted."""


@dataclass(frozen=True)
class Decision:
    """What the rules make of one patient's series.

    Attributes
    ----------
    pairs
        New pairs only, sorted.
    reasons
        For every candidate that is in no pair, new or existing: why, in one line.
    waiting
        Those among them that wait: something is still being received or must be quiet first.
    look_again_at
        When a quiet period that a rule waits for ends; None where nothing is due by the clock alone.
    """

    pairs: tuple[Pair, ...]
    reasons: Mapping[str, str]
    waiting: frozenset[str]
    look_again_at: datetime | None


def pair(
    rules: RuleSet,
    candidates: Iterable[VolumeRef],
    *,
    receiving: Sequence[SeriesActivity] = (),
    existing: Collection[Pair] = (),
    quiet_period_s: float = 0.0,
    now: datetime,
) -> Decision:
    """Apply every rule to a patient's complete series.

    Within a scope (a study; across studies: examinations at most `max_days` apart) the fixed volume is the one with
    the best `prefer` score among those with a partner that meets the pair's conditions; the moving one is its best
    partner, or with `many` every partner. Without `many` a rule uses each study for one pair.

    Parameters
    ----------
    rules
        The rule set in force.
    candidates
        Every complete series of the patient, in any order, those in a pair too; the node's own output left out.
    receiving
        The patient's series that are not yet complete; a rule waits for those that might belong to its candidates.
    existing
        Pairs made before. They stand, and are never made again.
    quiet_period_s
        The node's quiet period, for rules that have none of their own.
    now
        Timezone-aware.
    """
    volumes = {each.series_instance_uid: each for each in sorted(candidates, key=lambda v: v.series_instance_uid)}
    left_out = {uid: why for uid, volume in volumes.items() if (why := _left_out(rules, volume))}
    findings: list[_Finding] = []
    for rule in rules.enabled:
        finding = _Finding()
        findings.append(finding)
        applicable = {}
        for uid in volumes.keys() - left_out.keys():
            check = rule.when.check(volumes[uid])
            if check.passed:
                applicable[uid] = volumes[uid]
            else:
                finding.outside[uid] = f"rule {rule.id} is for {check}"
        made = [each for each in existing if each.rule_id == rule.id]
        for scope in _scopes(rule, applicable):
            _look(rule, scope, made, volumes, finding, receiving, rule.quiet_s(quiet_period_s), now)
    return _decision(volumes, existing, left_out, findings)


def quiet_periods_s(rules: RuleSet) -> list[float]:
    """The quiet periods that enabled rules name; with the node's own, the shortest says when to look at a series."""
    return [rule.ready.quiet_s for rule in rules.enabled if rule.ready.quiet_s is not None]


@dataclass
class _Finding:
    """What one rule made of the patient's series; each mapping is Series Instance UID → text."""

    pairs: list[Pair] = field(default_factory=list)
    outside: dict[str, str] = field(default_factory=dict)
    """The rule's `when` does not hold."""
    no_role: dict[str, str] = field(default_factory=dict)
    """Neither fixed nor moving."""
    unpaired: dict[str, str] = field(default_factory=dict)
    """Fills a role and is in no pair."""
    waiting: dict[str, str] = field(default_factory=dict)
    """Fills a role; the rule waits."""
    look_again_at: datetime | None = None


@dataclass(frozen=True)
class _Offer:
    """A fixed volume and its partners, each with its rank: score, then likeness."""

    fixed: str
    rank: tuple[float, int]
    moving: Mapping[str, tuple[float, int]]


def _left_out(rules: RuleSet, volume: VolumeRef) -> str:
    for condition in rules.exclude:
        check = condition.check(volume)
        if check.passed:
            return f"left out by defaults.exclude: {check}"
    check = rules.require.check(volume)
    return "" if check.passed else f"left out by defaults.require: {check}"


def _scopes(rule: Rule, volumes: Volumes) -> list[Volumes]:
    """The volumes among which the rule looks for one fixed; never two patients in one."""
    groups: dict[tuple[str, ...], dict[str, VolumeRef]] = defaultdict(dict)
    for uid in sorted(volumes):
        volume = volumes[uid]
        patient = (volume.patient_id.strip(), volume.issuer_of_patient_id.strip())
        groups[(*patient, volume.study_instance_uid) if rule.pair.is_within_study else patient][uid] = volume
    if rule.pair.is_within_study:
        return list(groups.values())
    return [part for group in groups.values() for part in _by_day(group, rule.pair.max_days)]


def _by_day(volumes: Volumes, max_days: int) -> list[Volumes]:
    """Split where more than `max_days` lie between examinations; a study without a date stands alone."""
    dated = sorted((day, uid) for uid, volume in volumes.items() if (day := partners.study_date(volume)) is not None)
    parts: list[dict[str, VolumeRef]] = []
    previous = None
    for day, uid in dated:
        if previous is None or (day - previous).days > max_days:
            parts.append({})
        parts[-1][uid] = volumes[uid]
        previous = day
    undated: dict[str, dict[str, VolumeRef]] = defaultdict(dict)
    for uid in volumes.keys() - {uid for _, uid in dated}:
        undated[volumes[uid].study_instance_uid][uid] = volumes[uid]
    return [*parts, *undated.values()]


def _look(
    rule: Rule,
    scope: Volumes,
    existing: Sequence[Pair],
    volumes: Volumes,
    finding: _Finding,
    receiving: Sequence[SeriesActivity],
    quiet_s: float,
    now: datetime,
) -> None:
    """Make every pair of one rule in one scope, and note why not for the rest."""
    fixed, moving = _candidates(rule.roles.fixed, scope), _candidates(rule.roles.moving, scope)
    for uid in scope.keys() - fixed.keys() - moving.keys():
        finding.no_role[uid] = f"rule {rule.id}: {_no_role(rule, scope[uid])}"
    taking_part = {uid: scope[uid] for uid in scope if uid in fixed or uid in moving}
    if because := _wait(rule, taking_part, receiving, quiet_s, now, finding):
        finding.waiting.update(dict.fromkeys(taking_part, f"rule {rule.id}: {because}"))
        return
    made = [
        each for each in existing if {each.fixed_series_instance_uid, each.moving_series_instance_uid} & scope.keys()
    ]
    # Each round sees only what stands. So a later run, which starts from what stands, adds nothing.
    while True:
        new, notes = _round(rule, fixed, moving, made, volumes)
        if not new:
            break
        made += new
        finding.pairs += new
    for uid, note in notes.items():
        is_alone = not rule.pair.is_within_study and partners.study_date(scope[uid]) is None
        undated = "; without a date of examination no other study is looked at" if is_alone else ""
        finding.unpaired[uid] = f"rule {rule.id}: {note}{undated}"


def _candidates(role: Role, scope: Volumes) -> dict[str, float]:
    """Series that fill the role → their score; by `fallback` only where `match` finds none."""
    for condition in (role.match, role.fallback):
        found = {uid for uid, volume in scope.items() if condition is not None and condition.check(volume).passed}
        if found:
            return {uid: _score(role, scope[uid]) for uid in sorted(found)}
    return {}


def _score(role: Role, volume: VolumeRef) -> float:
    return sum(each.score for each in role.prefer if each.condition.check(volume).passed)


def _no_role(rule: Rule, volume: VolumeRef) -> str:
    roles = (("fixed", rule.roles.fixed), ("moving", rule.roles.moving))
    return "; ".join(f"{name} needs {role.match.check(volume)}" for name, role in roles)


def _wait(
    rule: Rule,
    taking_part: Volumes,
    receiving: Sequence[SeriesActivity],
    quiet_s: float,
    now: datetime,
    finding: _Finding,
) -> str:
    """What is still on its way and might change the choice; empty where nothing is."""
    studies = {volume.study_instance_uid for volume in taking_part.values()}
    awaited = sorted(
        each.series_instance_uid
        for each in receiving
        # The date of what is still coming is not known, so across studies it may always belong here.
        if not rule.pair.is_within_study or each.study_instance_uid in studies
    )
    if taking_part and awaited:
        return f"series {_several(awaited)} is still being received"
    quiet_from = [completion.quiet_from(each.last_received_at, quiet_s=quiet_s) for each in taking_part.values()]
    if not quiet_from or (until := max(quiet_from)) <= now:
        return ""
    finding.look_again_at = until if finding.look_again_at is None else min(until, finding.look_again_at)
    return f"its {quiet_s:g} s of quiet last until {until:%Y-%m-%d %H:%M:%S} UTC"


def _round(
    rule: Rule, fixed: Mapping[str, float], moving: Mapping[str, float], made: Sequence[Pair], volumes: Volumes
) -> tuple[list[Pair], dict[str, str]]:
    """The next pairs, given those that stand; without any, why not for each series that fills a role."""
    free_fixed, free_moving = _free(rule, fixed, moving, made, volumes)
    obstacles: dict[tuple[str, str], list[str]] = {}
    offers = []
    for uid, score in free_fixed.items():
        ranks = {}
        for other, other_score in free_moving.items():
            if other == uid:
                continue
            found = obstacles[uid, other] = partners.obstacles(rule.pair, volumes[uid], volumes[other])
            if not found:
                ranks[other] = (other_score, partners.likeness(rule.pair, volumes[uid], volumes[other]))
        if ranks:
            offers.append(_Offer(uid, (score, max(likeness for _, likeness in ranks.values())), ranks))
    references = {each.fixed_series_instance_uid for each in made}
    offers = [offer for offer in offers if offer.fixed in references] or offers  # what others were moved onto stays
    notes = _no_partner(fixed, moving, free_fixed, free_moving, obstacles, references)
    if not offers:
        return [], notes
    chosen, note = _choose(rule, offers, made)
    return [Pair(rule.id, *each) for each in chosen], notes | {
        uid: note for offer in offers for uid in (offer.fixed, *offer.moving)
    }


def _free(
    rule: Rule, fixed: Mapping[str, float], moving: Mapping[str, float], made: Sequence[Pair], volumes: Volumes
) -> tuple[dict[str, float], dict[str, float]]:
    """Who may still be fixed and moving."""
    if rule.roles.moving.many:
        # A reference is never moved, and what was moved never becomes a reference.
        references = {each.fixed_series_instance_uid for each in made}
        moved = {each.moving_series_instance_uid for each in made}
        return (
            {uid: score for uid, score in fixed.items() if uid not in moved},
            {uid: score for uid, score in moving.items() if uid not in moved | references},
        )
    used = {
        volumes[uid].study_instance_uid
        for each in made
        for uid in (each.fixed_series_instance_uid, each.moving_series_instance_uid)
        if uid in volumes
    }
    return (
        {uid: score for uid, score in fixed.items() if volumes[uid].study_instance_uid not in used},
        {uid: score for uid, score in moving.items() if volumes[uid].study_instance_uid not in used},
    )


def _choose(rule: Rule, offers: Sequence[_Offer], made: Sequence[Pair]) -> tuple[list[tuple[str, str]], str]:
    """The (fixed, moving) chosen, or none and why."""
    best = _best({offer.fixed: offer.rank for offer in offers})
    if len(best) > 1:
        return [], f"a tie for fixed between series {_several(best, ' and ')}; no pair is made"
    offer = next(offer for offer in offers if offer.fixed == best[0])
    count = len(offer.moving) + sum(each.fixed_series_instance_uid == offer.fixed for each in made)
    if count < rule.ready.min_moving:
        return [], f"{count} moving series for fixed {offer.fixed}, min_moving is {rule.ready.min_moving}"
    if rule.roles.moving.many:
        return [(offer.fixed, uid) for uid in offer.moving], ""
    best = _best(offer.moving)
    if len(best) > 1:
        return [], f"a tie for moving between series {_several(best, ' and ')}; no pair is made"
    return [(offer.fixed, best[0])], ""


def _best(ranks: Mapping[str, tuple[float, int]]) -> list[str]:
    top = max(ranks.values())
    return sorted(uid for uid, rank in ranks.items() if rank == top)


def _no_partner(
    fixed: Mapping[str, float],
    moving: Mapping[str, float],
    free_fixed: Mapping[str, float],
    free_moving: Mapping[str, float],
    obstacles: Mapping[tuple[str, str], Sequence[str]],
    references: Collection[str],
) -> dict[str, str]:
    """Why each series that fills a role finds no partner."""
    notes = {}
    for uid in fixed.keys() | moving.keys():
        as_fixed = [f"with moving {m}: {', '.join(why)}" for (f, m), why in obstacles.items() if f == uid and why]
        as_moving = [f"with fixed {f}: {', '.join(why)}" for (f, m), why in obstacles.items() if m == uid and why]
        role = " and ".join(name for name, side in (("fixed", fixed), ("moving", moving)) if uid in side)
        if as_fixed or as_moving:
            notes[uid] = f"fits as {role}, but not {_several(as_fixed + as_moving, '; ')}"
        elif references:
            notes[uid] = f"fits as {role}, but the rule has its pair already, with fixed {_several(sorted(references))}"
        else:
            missing = " or ".join(
                name for name, side, own in (("moving", free_moving, free_fixed), ("fixed", free_fixed, free_moving))
                if uid in own and not side.keys() - {uid}
            )  # fmt: skip
            notes[uid] = f"fits as {role}, but no series is there as {missing}"
    return notes


def _decision(
    volumes: Volumes, existing: Collection[Pair], left_out: Mapping[str, str], findings: Sequence[_Finding]
) -> Decision:
    pairs = [each for finding in findings for each in finding.pairs]
    paired = {uid for p in (*pairs, *existing) for uid in (p.fixed_series_instance_uid, p.moving_series_instance_uid)}
    unpaired = [uid for uid in volumes if uid not in paired]
    due = [finding.look_again_at for finding in findings if finding.look_again_at is not None]
    return Decision(
        pairs=tuple(
            sorted(pairs, key=lambda p: (p.rule_id, p.fixed_series_instance_uid, p.moving_series_instance_uid))
        ),
        reasons={uid: left_out.get(uid) or _reason(uid, findings) for uid in unpaired},
        waiting=frozenset(uid for uid in unpaired if any(uid in finding.waiting for finding in findings)),
        look_again_at=min(due, default=None),
    )


def _reason(uid: str, findings: Sequence[_Finding]) -> str:
    """What the rules said of one series, those that came nearest only."""
    if not findings:
        return "no rules are in force"
    for prefix, said in (
        ("waiting: ", [finding.waiting[uid] for finding in findings if uid in finding.waiting]),
        ("", [finding.unpaired[uid] for finding in findings if uid in finding.unpaired]),
        ("no rule takes it: ", [finding.no_role[uid] for finding in findings if uid in finding.no_role]),
        ("no rule takes it: ", [finding.outside[uid] for finding in findings if uid in finding.outside]),
    ):
        if said:
            return prefix + _several(said, "; ")
    raise AssertionError(f"series {uid} was left without a reason")


def _several(texts: Sequence[str], joint: str = ", ") -> str:
    more = f"{joint}{len(texts) - MAX_CLAUSES} more" if len(texts) > MAX_CLAUSES else ""
    return joint.join(texts[:MAX_CLAUSES]) + more
