"""Why a series is in no pair, in one line: what the rules that came nearest said of it.

Law: pure, bounded, and without a word about the patient; nothing is worked out that is not shown.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice

from dicomnode import partners
from dicomnode.conditions import Check
from dicomnode.findings import RuleFinding, ScopeFinding, label
from dicomnode.rule import Rule
from dicomnode.scopes import Key, Scope

MAX_CLAUSES = 6
"""Rules, or partners, that one reason tells about; of rules the rest is counted."""


def reason(keys: Sequence[Key], findings: Sequence[RuleFinding]) -> str:
    """What the rules said of one series, those that came nearest only."""
    if not findings:
        return "no rules are in force"
    said: dict[str, list[Callable[[], str]]] = {"waiting": [], "unpaired": [], "no role": [], "outside": []}
    left: dict[str, None] = {}
    for finding in findings:
        for key in keys:
            if key in finding.left_out:
                where, check = finding.left_out[key]
                if len(left) < MAX_CLAUSES:
                    left[f"left out by {where}: {check}"] = None
            else:
                kind, text = _said(finding, key)
                said[kind].append(text)
    for kind, prefix in (("waiting", "waiting: "), ("unpaired", ""), ("no role", NO_RULE), ("outside", NO_RULE)):
        if said[kind]:  # volumes of one series mostly hear the same
            texts = list(dict.fromkeys(text() for text in said[kind]))
            more = f"; {len(texts) - MAX_CLAUSES} more" if len(texts) > MAX_CLAUSES else ""
            return prefix + "; ".join(texts[:MAX_CLAUSES]) + more
    assert left, f"series {keys[0][0]} was left without a reason"
    return "; ".join(left)


NO_RULE = "no rule takes it: "


def _said(finding: RuleFinding, key: Key) -> tuple[str, Callable[[], str]]:
    """The nearest that one rule came to taking a volume."""
    rule = finding.rule
    if key in finding.outside:
        return "outside", lambda: f"rule {rule.id} is for {finding.outside[key]}"
    within = [scope for scope in finding.scopes if key in scope.scope.subjects]
    taking = [scope for scope in within if key in scope.roles["fixed"] or key in scope.roles["moving"]]
    waits = next((scope.waits for scope in taking if scope.waits), "")
    if waits:
        return "waiting", lambda: f"rule {rule.id}: {waits}"
    if taking:
        return "unpaired", lambda: f"rule {rule.id}: {note(rule, taking[0], key)}"
    if within:
        if (check := not_for(rule, within[0].scope, key)) is not None:
            return "outside", lambda: f"rule {rule.id} is for {check}"
        return "no role", lambda: f"rule {rule.id}: {no_role(rule, within[0].scope, key)}"
    return "no role", lambda: f"rule {rule.id}: {finding.scopeless[key]}"


def note(rule: Rule, finding: ScopeFinding, key: Key) -> str:
    """Why a volume that fills a role is in no new pair."""
    undated = not rule.pair.is_within_study and finding.scope.subjects[key].day is None
    return _note(rule, finding, key) + (
        "; without a date of examination no other study is looked at" if undated else ""
    )


def _note(rule: Rule, finding: ScopeFinding, key: Key) -> str:
    if key in finding.undecided:
        return finding.undecided[key]
    fixed, moving = finding.roles["fixed"], finding.roles["moving"]
    free_fixed, free_moving = finding.free
    role = " and ".join(name for name, side in (("fixed", fixed), ("moving", moving)) if key in side)
    against = list(islice(_against(rule, finding, key), MAX_CLAUSES + 1))
    if against:
        more = "; and more" if len(against) > MAX_CLAUSES else ""
        return f"fits as {role}, but not {'; '.join(against[:MAX_CLAUSES])}{more}"
    if finding.references:
        named = several(sorted(label(each) for each in finding.references))
        return f"fits as {role}, but the rule has its pair already, with fixed {named}"
    missing = " or ".join(
        name for name, side, own in (("moving", free_moving, free_fixed), ("fixed", free_fixed, free_moving))
        if key in own and not side.keys() - {key}
    )  # fmt: skip
    return f"fits as {role}, but no series is there as {missing or 'its partner'}"


def _against(rule: Rule, finding: ScopeFinding, key: Key) -> Iterator[str]:
    """What stands between a volume and each free partner."""
    subjects, (free_fixed, free_moving) = finding.scope.subjects, finding.free
    if key in free_fixed:
        for other in sorted(free_moving.keys() - {key}):
            if found := partners.obstacles(rule, subjects[key], subjects[other]):
                yield f"with moving {label(other)}: {', '.join(found)}"
    if key in free_moving:
        for other in sorted(free_fixed.keys() - {key}):
            if found := partners.obstacles(rule, subjects[other], subjects[key]):
                yield f"with fixed {label(other)}: {', '.join(found)}"


def no_role(rule: Rule, scope: Scope, key: Key) -> str:
    """Why a volume of the scope is neither fixed nor moving."""
    if (check := not_for(rule, scope, key)) is not None:
        return f"the rule is for {check}"
    subject, said = scope.subjects[key], []
    for name, role in (("fixed", rule.roles.fixed), ("moving", rule.roles.moving)):
        if (role.origin == "prior") != (key in scope.priors):
            said.append(f"{name} is from {'an earlier' if role.origin == 'prior' else 'the current'} examination")
            continue
        check = role.match.condition.check(subject)
        said.append(f"{name} is another in the order of acquisition" if check.passed else f"{name} needs {check}")
    return "; ".join(said)


def not_for(rule: Rule, scope: Scope, key: Key) -> Check | None:
    """What `when` saw of a volume of a current examination that it does not hold for, of a rule with priors."""
    if rule.roles.prior is None or key in scope.priors:
        return None
    check = rule.when.check(scope.subjects[key])
    return None if check.passed else check


def several(texts: Iterable[str], joint: str = ", ") -> str:
    """The first few, and how many more."""
    each = list(texts)
    more = f"{joint}{len(each) - MAX_CLAUSES} more" if len(each) > MAX_CLAUSES else ""
    return joint.join(each[:MAX_CLAUSES]) + more
