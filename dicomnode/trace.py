"""Everything that rules saw, told in full: each condition, the value seen, the result and the score.

Law: pure; plain JSON values out, and the same as text for people. What is the patient's is never repeated.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from dicomnode import partners
from dicomnode.conditions import All, AnyOf, Check, Not
from dicomnode.derived import values_of
from dicomnode.findings import RuleFinding, ScopeFinding, keys_of, label
from dicomnode.model import VolumeRef
from dicomnode.reasons import no_role, note
from dicomnode.rule import Role, Rule
from dicomnode.scopes import Key

MAX_PARTNERS = 400
"""Pairs of volumes whose pair-wise conditions one scope's trace tells."""

Json = Any


def as_json(findings: Iterable[RuleFinding]) -> list[Json]:
    """The trace of a decision, one entry per rule."""
    return [_rule(finding) for finding in findings]


def as_text(told: Iterable[Json], names: Mapping[str, str] | None = None) -> Iterator[str]:
    """The lines of a trace that `as_json` made; `names` says by `title` what each volume is."""
    names = names or {}
    for rule in told:
        yield f"rule {rule['rule']}"
        for volumes, out in _alike(rule["left_out"]):
            by = f"its {out['by']}" if out["by"] == "when" else out["by"]
            yield f"  left out by {by}: {_several(volumes, names)}"
            yield from _check_lines(out["check"], "    ")
        for scope in rule["scopes"]:
            yield f"  {scope['scope']}: {scope['outcome']}"
            for pair in scope["pairs"]:
                yield f"    pair  fixed {_several([pair['fixed']], names)}  moving {_several([pair['moving']], names)}"
            for volumes, entry in _alike(scope["volumes"]):
                fills = ", ".join(f"{name} with score {score:g}" for name, score in entry["fills"].items())
                why = f"; {entry['why']}" if entry["why"] else ""
                yield f"    {_several(volumes, names)}: {fills or 'no role'}{why}"
                for name, role in entry["roles"].items():
                    yield f"      {name}"
                    for kind in ("match", "fallback"):
                        if kind in role:
                            yield from _check_lines(role[kind], "        ", f"{kind}: ")
                    for each in role.get("prefer", ()):
                        yield from _check_lines(
                            each["check"], "        ", f"prefer {each.get('worth', each['score']):+g}: "
                        )
            for between in scope["between"]:
                yield f"    fixed {between['fixed']}  moving {between['moving']}"
                yield from (f"      {_mark(each['passed'])} {each['condition']}" for each in between["conditions"])


def title(volume: VolumeRef) -> str:
    """What people call a volume: modality, Series Number and Description, slices, and which of the series' volumes."""
    number = "".join(f" no. {value}" for value in values_of(volume, "SeriesNumber"))
    described = "".join(f" {str(value)[:64]!r}" for value in values_of(volume, "SeriesDescription"))
    apart = "".join(f", {name} {value}" for name, value in volume.split_by.items())
    return f"{volume.modality or 'no modality'}{number}{described}, {volume.n_slices} slices{apart}"


def _alike(entries: Iterable[Json]) -> Iterator[tuple[list[str], Json]]:
    """Volumes of one series of which the same is told, and what is told of them."""
    for _, several in groupby(entries, key=lambda each: (each["volume"].split("#")[0], {**each, "volume": ""})):
        same = list(several)
        yield [each["volume"] for each in same], same[0]


def _several(volumes: Sequence[str], names: Mapping[str, str]) -> str:
    if len(volumes) > 1:
        return f"{volumes[0]} and {len(volumes) - 1} more volumes of it, to #{volumes[-1].split('#')[-1]}"
    return f"{volumes[0]} ({names[volumes[0]]})" if volumes[0] in names else volumes[0]


def _rule(finding: RuleFinding) -> Json:
    left_out = [
        {"volume": label(key), "by": where, "check": _check(check)} for key, (where, check) in finding.left_out.items()
    ]
    left_out += [{"volume": label(key), "by": "when", "check": _check(check)} for key, check in finding.outside.items()]
    left_out += [{"volume": label(key), "by": why, "check": None} for key, why in finding.scopeless.items()]
    scopes = [_scope(finding.rule, scope) for scope in finding.scopes]
    return {"rule": finding.rule.id, "left_out": left_out, "scopes": scopes}


def _scope(rule: Rule, finding: ScopeFinding) -> Json:
    made = {key for pair in finding.pairs for key in keys_of(pair)}
    volumes = []
    for key in finding.scope.subjects:
        fills = {name: scores[key] for name, scores in finding.roles.items() if key in scores}
        if finding.waits and fills:
            why = f"waiting: {finding.waits}"
        elif fills:
            why = "" if key in made else note(rule, finding, key)
        else:
            why = no_role(rule, finding.scope, key)
        volumes.append({"volume": label(key), "fills": fills, "why": why, "roles": _roles(rule, finding, key)})
    return {
        "scope": finding.scope.id,
        "outcome": _outcome(finding),
        "pairs": [{"fixed": label(f), "moving": label(m)} for f, m in map(keys_of, finding.pairs)],
        "volumes": volumes,
        "between": list(_between(rule, finding)),
    }


def _outcome(finding: ScopeFinding) -> str:
    if finding.pairs:
        return f"{len(finding.pairs)} pair{'s' if len(finding.pairs) > 1 else ''}"
    if finding.waits:
        return f"waiting: {finding.waits}"
    if finding.ambiguity is not None:
        return f"to be settled by a person: {finding.ambiguity.reason}"
    return "no new pair"


def _roles(rule: Rule, finding: ScopeFinding, key: Key) -> Json:
    subject, told = finding.scope.subjects[key], {}
    for name, role in (("fixed", rule.roles.fixed), ("moving", rule.roles.moving)):
        if (role.origin == "prior") != (key in finding.scope.priors):
            continue
        entry: dict[str, Json] = {"match": _check(role.match.condition.check(subject))}
        if role.fallback is not None and name in finding.by_fallback:
            entry["fallback"] = _check(role.fallback.condition.check(subject))
        if key in finding.roles[name]:
            entry["prefer"] = _preferences(role, finding, key)
        told[name] = entry
    return told


def _preferences(role: Role, finding: ScopeFinding, key: Key) -> list[Json]:
    subject = finding.scope.subjects[key]
    checks = [(each.condition.check(subject), each.score) for each in role.prefer]
    return [{"check": _check(check), "worth": score, "score": score if check.passed else 0} for check, score in checks]


def _between(rule: Rule, finding: ScopeFinding) -> Iterator[Json]:
    subjects, told = finding.scope.subjects, 0
    for fixed in finding.roles["fixed"]:
        for moving in finding.roles["moving"]:
            if fixed == moving:
                continue
            if (told := told + 1) > MAX_PARTNERS:
                return
            seen = partners.findings(rule, subjects[fixed], subjects[moving])
            conditions = [{"condition": each.text, "passed": each.passed} for each in seen]
            soft = partners.likeness(rule, subjects[fixed], subjects[moving])
            yield {"fixed": label(fixed), "moving": label(moving), "conditions": conditions, "same_soft": soft}


def _check(check: Check) -> Json:
    told: dict[str, Json] = {"condition": str(check.condition), "passed": check.passed}
    if check.observation is not None:
        told["seen"] = check.seen
    if check.parts:
        told["of"] = _COMBINED[type(check.condition)]
        told["parts"] = [_check(part) for part in check.parts]
    return told


_COMBINED: dict[type, str] = {All: "all of", AnyOf: "any of", Not: "not"}


def _check_lines(check: Mapping[str, Json] | None, indent: str, prefix: str = "") -> Iterator[str]:
    if check is None:
        return
    if "parts" not in check:
        seen = f", got {check['seen']}" if "seen" in check else ""
        yield f"{indent}{_mark(check['passed'])} {prefix}{check['condition']}{seen}"
        return
    yield f"{indent}{_mark(check['passed'])} {prefix}{check.get('of', check['condition'])}"
    for part in check["parts"]:
        yield from _check_lines(part, indent + "  ")


def _mark(passed: bool) -> str:
    return "yes" if passed else "no "


def narrowed(told: Json, series: frozenset[str], rules: list[str] | None) -> Json:
    """What one rule's entry says of these series, and only if it is one of `rules`; None where it says nothing."""
    if rules is not None and told["rule"] not in rules:
        return None

    def concerns(volume: str) -> bool:
        return volume.split("#")[0] in series

    left_out = [each for each in told["left_out"] if concerns(each["volume"])]
    scopes = []
    for scope in told["scopes"]:
        volumes = [each for each in scope["volumes"] if concerns(each["volume"])]
        between = [each for each in scope["between"] if concerns(each["fixed"]) or concerns(each["moving"])]
        if volumes:
            scopes.append({**scope, "volumes": volumes, "between": between})
    return {**told, "left_out": left_out, "scopes": scopes} if left_out or scopes else None
