"""Which series belong together, and why the others were left: rules + one patient's complete volumes → pairs.

Law: pure; `now` is an argument, and neither the order of the candidates nor a second run changes the result. A tie is
never broken silently, no pair joins two patients, and every candidate leaves with a pair or a reason.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from dicomnode import completion, partners
from dicomnode.conditions import Meets
from dicomnode.derived import Subject
from dicomnode.findings import LeftOut, RuleFinding, ScopeFinding, keys_of, label
from dicomnode.model import Ambiguity, Pair, SeriesActivity, VolumeRef
from dicomnode.reasons import reason, several
from dicomnode.rule import Role, Rule, Selection
from dicomnode.rules import RuleSet
from dicomnode.scopes import Key, Scope, Subjects, in_time, key_of, scopes_of

Rank = tuple[float, float, int, float]
"""Recency of a prior, score, likeness, recency again: whichever the rule puts first."""


@dataclass(frozen=True)
class Decision:
    """What the rules make of one patient's series.

    Attributes
    ----------
    pairs
        New pairs only, sorted.
    reasons
        For every series without a volume in a pair, new or existing: why, in one line.
    waiting
        Those among them that wait: something is still being received or must be quiet first.
    look_again_at
        When a quiet period or deadline that a rule waits for ends; None where nothing is due by the clock alone.
    ambiguities
        What a person must settle.
    lacking_priors
        (rule id, Study Instance UID) of every examination that a rule has no earlier one for.
    findings
        What each enabled rule saw, in order: the trace.
    """

    pairs: tuple[Pair, ...]
    reasons: Mapping[str, str]
    waiting: frozenset[str]
    look_again_at: datetime | None
    ambiguities: tuple[Ambiguity, ...] = ()
    lacking_priors: tuple[tuple[str, str], ...] = ()
    findings: tuple[RuleFinding, ...] = field(default=(), compare=False, repr=False)


@dataclass(frozen=True)
class _Circumstances:
    """What is the same for every rule of one call."""

    existing: Collection[Pair]
    receiving: Sequence[SeriesActivity]
    fetching: Collection[str]
    quiet_period_s: float
    now: datetime


@dataclass(frozen=True)
class _Offer:
    """A fixed volume and its partners, each with its rank."""

    fixed: Key
    rank: Rank
    moving: Mapping[Key, Rank]


def pair(
    rules: RuleSet,
    candidates: Iterable[VolumeRef],
    *,
    receiving: Sequence[SeriesActivity] = (),
    existing: Collection[Pair] = (),
    fetching: Collection[str] = (),
    quiet_period_s: float = 0.0,
    now: datetime,
) -> Decision:
    """Apply every rule to a patient's complete series.

    Within a scope (a study; across studies: examinations at most `max_days` apart; a study with its priors; the phases
    of one dynamic examination) the fixed volume is the one with the best `prefer` score among those with a partner that
    meets the pair's conditions; the moving one is its best partner, or with `many` every partner. Without `many` a rule
    uses each study for one pair.

    Parameters
    ----------
    rules
        The rule set in force.
    candidates
        Every complete volume of the patient, in any order, those in a pair too; the node's own output left out.
    receiving
        The patient's series that are not yet complete; a rule waits for those that might belong to its candidates.
    existing
        Pairs made before. They stand, and are never made again.
    fetching
        Studies that a PACS is being asked the priors of; a rule that needs them waits.
    quiet_period_s
        The node's quiet period, for rules that have none of their own.
    now
        Timezone-aware.
    """
    subjects = {
        key_of(each): Subject(each, rules.vocabulary)
        for each in sorted(candidates, key=lambda v: (v.series_instance_uid, v.volume_number))
    }
    here = _Circumstances(existing, receiving, fetching, quiet_period_s, now)
    ordinary = {key: left_out(rules, None, subject) for key, subject in subjects.items()}
    return _decision(subjects, existing, [_apply(rules, rule, subjects, ordinary, here) for rule in rules.enabled])


def quiet_periods_s(rules: RuleSet) -> list[float]:
    """The quiet periods that enabled rules name; with the node's own, the shortest says when to look at a series."""
    return [rule.ready.quiet_s for rule in rules.enabled if rule.ready.quiet_s is not None]


def left_out(rules: RuleSet, rule: Rule | None, subject: Subject) -> LeftOut | None:
    """What keeps a volume out of every role of a rule (None: of rules that have only the defaults)."""
    exclude, require = (None, None) if rule is None else (rule.exclude, rule.require)
    own = "" if rule is None else f"rule {rule.id}"
    for condition in rules.exclude if exclude is None else exclude:
        check = condition.check(subject)
        if check.passed:
            return ("defaults" if exclude is None else own) + ".exclude", check
    check = (rules.require if require is None else require).check(subject)
    return None if check.passed else (("defaults" if require is None else own) + ".require", check)


def _apply(
    rules: RuleSet, rule: Rule, subjects: Subjects, ordinary: Mapping[Key, LeftOut | None], here: _Circumstances
) -> RuleFinding:
    finding = RuleFinding(rule)
    has_own = rule.exclude is not None or rule.require is not None
    applicable = {}
    for key, subject in subjects.items():
        if (out := left_out(rules, rule, subject) if has_own else ordinary[key]) is not None:
            finding.left_out[key] = out
        elif rule.roles.prior is None and not (check := rule.when.check(subject)).passed:
            finding.outside[key] = check
        else:
            applicable[key] = subject
    scopes, meets = scopes_of(rule, applicable), Meets()
    for scope in scopes:
        finding.scopes.append(_look(rule, scope, subjects, finding, here, meets))
    for key in applicable.keys() - {key for scope in scopes for key in scope.subjects}:
        if applicable[key].volume.is_fetched:
            finding.scopeless[key] = "was fetched as a prior, and fills no other role"
        else:
            count = 0 if rule.split is None else rule.split.min_phases
            finding.scopeless[key] = f"is of no dynamic examination with {count} phases or more that can be ordered"
    return finding


def _look(
    rule: Rule, scope: Scope, subjects: Subjects, finding: RuleFinding, here: _Circumstances, meets: Meets
) -> ScopeFinding:
    """Make every pair of one rule in one scope, and note why not for the rest."""
    fixed, fixed_falls = _candidates(rule, rule.roles.fixed, scope, meets)
    moving, moving_falls = _candidates(rule, rule.roles.moving, scope, meets)
    falls = {name for name, fell in (("fixed", fixed_falls), ("moving", moving_falls)) if fell}
    result = ScopeFinding(scope, {"fixed": fixed, "moving": moving}, falls)
    made = [
        each
        for each in here.existing
        if each.rule_id == rule.id and not scope.subjects.keys().isdisjoint(keys_of(each))
    ]
    taking_part = {key: scope.subjects[key] for key in scope.subjects if key in fixed or key in moving}
    if rule.roles.moving.many:  # what others were moved onto stays the reference, even where another fits better now
        for each in made:
            if keys_of(each)[0] in scope.subjects:
                fixed.setdefault(keys_of(each)[0], 0.0)
    if rule.roles.prior is not None:
        _ask_for_priors(rule, scope, fixed, moving, made, finding)
    started = min((each.volume.last_received_at for each in taking_part.values()), default=here.now)
    deadline = None if rule.ready.deadline_s is None else started + timedelta(seconds=rule.ready.deadline_s)
    is_over = deadline is not None and deadline <= here.now
    if not is_over and (because := _wait(rule, scope, taking_part, finding, here)):
        result.waits = because
        return result
    # Each round sees only what stands. So a later run, which starts from what stands, adds nothing.
    while True:
        result.references = {keys_of(each)[0] for each in made}
        result.free = _free(rule, fixed, moving, made, subjects)
        new = _round(rule, result, made, lenient=is_over and rule.ready.at_deadline == "pair")
        if not new:
            break
        made += new
        result.pairs += new
    if not made and result.ambiguity is None and deadline is not None and taking_part:
        _at_deadline(rule, scope, result, deadline, is_over, finding)
    return result


def _at_deadline(
    rule: Rule, scope: Scope, result: ScopeFinding, deadline: datetime, is_over: bool, finding: RuleFinding
) -> None:
    """Nothing fits yet and the rule has a deadline: wait for it, or do what it says."""
    fixed, moving = result.roles["fixed"], result.roles["moving"]
    partners_there = moving.keys() - fixed.keys() if len(fixed) == 1 else moving.keys()
    missing = [name for name in rule.ready.roles if not (fixed if name == "fixed" else partners_there)]
    short = "moving" in rule.ready.roles and len(partners_there) < rule.ready.min_moving
    if not is_over and (missing or short):
        what = " and ".join(missing) or f"{rule.ready.min_moving} moving series"
        result.waits = f"it waits for {what} until {deadline:%Y-%m-%d %H:%M:%S} UTC"
        _note_due(finding, deadline)
    elif is_over and rule.ready.at_deadline == "ask":
        text = f"nothing fits and the deadline of {rule.ready.deadline_s:g} s has passed; a person is asked"
        everyone = tuple(scope.subjects)
        result.ambiguity = Ambiguity(rule.id, scope.id, text, tuple(fixed) or everyone, tuple(moving) or everyone)
        result.undecided = dict.fromkeys([*fixed, *moving], text)


def _candidates(rule: Rule, role: Role, scope: Scope, meets: Meets) -> tuple[dict[Key, float], bool]:
    """Volumes that fill the role → their score, and whether it took `fallback` to find them."""
    of_origin = {
        key: subject
        for key, subject in scope.subjects.items()
        if (key in scope.priors) == (role.origin == "prior")
        # `when` is about the examination that starts the rule; a prior need not meet it
        and (role.origin == "prior" or rule.roles.prior is None or meets(rule.when, subject))
    }
    for selection in (role.match, role.fallback):
        found = [] if selection is None else _selected(selection, of_origin, meets)
        if found:
            return {key: _score(role, of_origin[key], meets) for key in found}, selection is role.fallback
    return {}, False


def _selected(selection: Selection, subjects: Subjects, meets: Meets) -> list[Key]:
    found = [key for key, subject in subjects.items() if meets(selection.condition, subject)]
    order = selection.order
    if order is None or not found:
        return found
    if order.by == "series_number":
        numbers = {key: subjects[key].observe("SeriesNumber").values for key in found}
        ranked = sorted((float(value[0]), key) for key, value in numbers.items() if value)
        in_order = [key for _, key in ranked] if len({n for n, _ in ranked}) == len(ranked) == len(found) else None
    else:
        volumes = in_time([subjects[key].volume for key in found])
        in_order = None if volumes is None else [key_of(volume) for volume in volumes]
    if in_order is None:
        return found  # nothing tells which comes first: all of them, so that a tie is told
    return in_order[order.index :][:1]


def _score(role: Role, subject: Subject, meets: Meets) -> float:
    return sum(each.score for each in role.prefer if meets(each.condition, subject))


def _ask_for_priors(
    rule: Rule, scope: Scope, fixed: Mapping[Key, float], moving: Mapping[Key, float], made: Sequence[Pair],
    finding: RuleFinding,
) -> None:  # fmt: skip
    prior, current = (fixed, moving) if rule.roles.fixed.origin == "prior" else (moving, fixed)
    if current and not prior and not made:
        study = scope.subjects[next(iter(current))].volume.study_instance_uid
        finding.lacking_priors.append(study)


def _wait(rule: Rule, scope: Scope, taking_part: Subjects, finding: RuleFinding, here: _Circumstances) -> str:
    """What is still on its way and might change the choice; empty where nothing is."""
    if not taking_part:
        return ""
    studies = {subject.volume.study_instance_uid for subject in taking_part.values()}
    current = {subject.volume.study_instance_uid for key, subject in taking_part.items() if key not in scope.priors}
    if rule.roles.prior is not None and current & set(here.fetching):
        return "earlier examinations are being fetched"
    awaited = sorted(
        each.series_instance_uid
        for each in here.receiving
        # The date of what is still coming is not known, so across studies it may always belong here.
        if (not rule.pair.is_within_study or each.study_instance_uid in studies)
        and (rule.roles.prior is not None or not each.is_fetched)
    )
    if awaited:
        return f"series {several(awaited)} is still being received"
    quiet_s = rule.quiet_s(here.quiet_period_s)
    until = max(completion.quiet_from(e.volume.last_received_at, quiet_s=quiet_s) for e in taking_part.values())
    if until <= here.now:
        return ""
    _note_due(finding, until)
    return f"its {quiet_s:g} s of quiet last until {until:%Y-%m-%d %H:%M:%S} UTC"


def _note_due(finding: RuleFinding, at: datetime) -> None:
    finding.look_again_at = at if finding.look_again_at is None else min(at, finding.look_again_at)


def _round(rule: Rule, result: ScopeFinding, made: Sequence[Pair], *, lenient: bool) -> list[Pair]:
    """The next pairs, given those that stand; without any, `result` says why where there was a choice."""
    offers = _offers(rule, result)
    if not offers:
        return []
    chosen, text, ambiguity = _choose(rule, result.scope, offers, made, lenient=lenient)
    result.ambiguity = ambiguity
    result.undecided = {} if chosen else {key: text for offer in offers for key in (offer.fixed, *offer.moving)}
    return [Pair(rule.id, f[0], m[0], f[1], m[1]) for f, m in chosen]


def _offers(rule: Rule, result: ScopeFinding) -> list[_Offer]:
    """The best fixed volumes that have a partner: references before others, then by recency and score.

    Volumes of a lower score are not looked at where one of a higher has a partner: that keeps the cost linear.
    """
    (free_fixed, free_moving), scope = result.free, result.scope
    groups: dict[tuple[bool, float, float], list[Key]] = {}
    for key, score in free_fixed.items():
        groups.setdefault((key in result.references, *_rank(rule, scope, key, score, 0)[:2]), []).append(key)
    for group in sorted(groups, reverse=True):
        offers = []
        for key in groups[group]:
            one, ranks = scope.subjects[key], {}
            for other, score in free_moving.items():
                if other != key and partners.fits(rule, one, scope.subjects[other]):
                    likeness = partners.likeness(rule, one, scope.subjects[other])
                    ranks[other] = _rank(rule, scope, other, score, likeness)
            if ranks:
                likest = max(rank[2] for rank in ranks.values())
                offers.append(_Offer(key, _rank(rule, scope, key, free_fixed[key], likest), ranks))
        if offers:
            return offers
    return []


def _rank(rule: Rule, scope: Scope, key: Key, score: float, likeness: int) -> Rank:
    day = scope.subjects[key].day if key in scope.priors else None
    recency = float(day.toordinal()) if day else 0.0
    return (recency if rule.priors.pick == "newest" else 0.0, score, likeness, recency)


def _free(
    rule: Rule, fixed: Mapping[Key, float], moving: Mapping[Key, float], made: Sequence[Pair], subjects: Subjects
) -> tuple[dict[Key, float], dict[Key, float]]:
    """Who may still be fixed and moving."""
    if rule.roles.moving.many:
        # A reference is never moved, and what was moved never becomes a reference.
        references, moved = {keys_of(each)[0] for each in made}, {keys_of(each)[1] for each in made}
        return (
            {key: score for key, score in fixed.items() if key not in moved},
            {key: score for key, score in moving.items() if key not in moved | references},
        )
    used = {
        subjects[key].volume.study_instance_uid
        for each in made
        for key, role in zip(keys_of(each), (rule.roles.fixed, rule.roles.moving), strict=True)
        if key in subjects and role.origin == "current"  # one prior may serve several later examinations
    }
    return (
        {key: score for key, score in fixed.items() if not _is_used(rule.roles.fixed, subjects[key], used)},
        {key: score for key, score in moving.items() if not _is_used(rule.roles.moving, subjects[key], used)},
    )


def _is_used(role: Role, subject: Subject, used: Collection[str]) -> bool:
    return role.origin == "current" and subject.volume.study_instance_uid in used


def _choose(
    rule: Rule, scope: Scope, offers: Sequence[_Offer], made: Sequence[Pair], *, lenient: bool
) -> tuple[list[tuple[Key, Key]], str, Ambiguity | None]:
    """The (fixed, moving) chosen, or none, why, and what a person must decide."""
    best = _best({offer.fixed: offer.rank for offer in offers})
    if len(best) > 1:
        text = f"a tie for fixed between series {several([label(key) for key in best], ' and ')}; no pair is made"
        others = sorted({key for offer in offers if offer.fixed in best for key in offer.moving})
        return [], text, Ambiguity(rule.id, scope.id, text, tuple(best), tuple(others))
    offer = next(offer for offer in offers if offer.fixed == best[0])
    count = len(offer.moving) + sum(keys_of(each)[0] == offer.fixed for each in made)
    least = rule.ready.min_moving if "moving" in rule.ready.roles and not lenient else 1
    if count < least:
        return [], f"{count} moving series for fixed {label(offer.fixed)}, min_moving is {least}", None
    if rule.roles.moving.many:
        return _choose_many(rule, scope, offer, made)
    best = _best(offer.moving)
    if len(best) > 1:
        text = f"a tie for moving between series {several([label(key) for key in best], ' and ')}; no pair is made"
        return [], text, Ambiguity(rule.id, scope.id, text, (offer.fixed,), tuple(best))
    return [(offer.fixed, best[0])], "", None


def _choose_many(
    rule: Rule, scope: Scope, offer: _Offer, made: Sequence[Pair]
) -> tuple[list[tuple[Key, Key]], str, Ambiguity | None]:
    """Every partner; with `one_per`, the best of each value that has no pair yet."""
    name = rule.roles.moving.one_per
    if name is None:
        return [(offer.fixed, key) for key in offer.moving], "", None
    value = {key: scope.subjects[key].observe(name).values for key in offer.moving}
    served = {
        scope.subjects[key].observe(name).values
        for each in made
        if keys_of(each)[0] == offer.fixed and (key := keys_of(each)[1]) in scope.subjects
    }
    chosen, tied, texts = [], [], []
    for each in sorted(set(value.values()) - served, key=str):
        best = _best({key: rank for key, rank in offer.moving.items() if value[key] == each})
        if len(best) == 1:
            chosen.append((offer.fixed, best[0]))
        else:
            tied += best
            texts.append(
                f"a tie for {name} {each} between series {several(map(label, best), ' and ')}; no pair is made"
            )
    if chosen or not texts:
        return chosen, f"the rule has its pair for this {name} already", None
    return [], "; ".join(texts), Ambiguity(rule.id, scope.id, "; ".join(texts), (offer.fixed,), tuple(tied))


def _best(ranks: Mapping[Key, Rank]) -> list[Key]:
    top = max(ranks.values())
    return sorted(key for key, rank in ranks.items() if rank == top)


def _decision(subjects: Subjects, existing: Collection[Pair], findings: Sequence[RuleFinding]) -> Decision:
    pairs = [each for finding in findings for scope in finding.scopes for each in scope.pairs]
    paired = {key[0] for each in (*pairs, *existing) for key in keys_of(each)}
    unpaired: dict[str, list[Key]] = {}
    for key in subjects:
        if key[0] not in paired:
            unpaired.setdefault(key[0], []).append(key)
    due = [finding.look_again_at for finding in findings if finding.look_again_at is not None]
    reasons = {uid: reason(keys, findings) for uid, keys in unpaired.items()}
    return Decision(
        pairs=tuple(sorted(pairs, key=lambda p: (p.rule_id, *keys_of(p)))),
        reasons=reasons,
        waiting=frozenset(uid for uid, why in reasons.items() if why.startswith("waiting: ")),
        look_again_at=min(due, default=None),
        ambiguities=tuple(s.ambiguity for finding in findings for s in finding.scopes if s.ambiguity is not None),
        lacking_priors=tuple((finding.rule.id, study) for finding in findings for study in finding.lacking_priors),
        findings=tuple(findings),
    )
