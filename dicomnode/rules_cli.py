"""What the commands about rules do: `rules …`, `why`, `settle`; their options stand in `rules_parser`.

Law: what is read or tried changes nothing; a rule set is checked whole before it is kept.
"""

from __future__ import annotations

import argparse
import difflib
import json
import re
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from pydicom.errors import InvalidDicomError

from dicomnode import config as configuration
from dicomnode import pairing, partners, rules, trace, volumes
from dicomnode.account import account
from dicomnode.destinations import SENDER
from dicomnode.errors import ConfigError, StudyError
from dicomnode.findings import label
from dicomnode.index import Index, open_index
from dicomnode.model import Ambiguity, Pair, VolumeRef, WorkItem
from dicomnode.rules import RuleSet
from dicomnode.scopes import Key, key_of

# ── versions ──


def check_against(config: configuration.Config, found: RuleSet, file: str) -> RuleSet:
    """`found`, if every name of the configuration that it uses is there.

    Raises
    ------
    ConfigError
        A rule names a destination or source that the configuration has not.
    """
    destinations, sources = ([each.name for each in several] for several in (config.destinations, config.sources))
    for rule in found.rules:
        for key, kind, names, known in (
            ("destinations", "destination", rule.destinations or (), destinations),
            ("priors.sources", "source", rule.priors.sources, sources),
        ):
            for name in names:
                if name not in known and (kind, name) != ("destination", SENDER):
                    expected = f"a {kind} of the configuration ({', '.join(known) or 'none'})"
                    raise ConfigError(file, f"rules({rule.id}).{key}", name, expected)
    return found


def check_file(arguments: argparse.Namespace) -> int:
    """Check a file of rules."""
    config = configuration.load(arguments.config)
    found = check_against(config, rules.load(arguments.file), str(arguments.file))
    print(f"ok: {len(found.rules)} rules, {len(found.enabled)} enabled")
    return 0


def import_file(arguments: argparse.Namespace) -> int:
    """Put a file of rules in force."""
    config = configuration.load(arguments.config)
    found = check_against(config, rules.load(arguments.file), str(arguments.file))
    return _put(config, found, source="import", comment=arguments.comment)


def _put(config: configuration.Config, found: RuleSet, *, source: str, comment: str) -> int:
    index = open_index(config.database_url, create=True)
    former = index.newest_rule_version()
    version = index.import_rule_set(
        found.text,
        found.sha256,
        written=found.written,
        source=source,
        author=account(),
        comment=comment,
        now=datetime.now(UTC),
    )
    index.close()
    print(f"version {version} is in force" + (": it has these rules already" if version == former else ""))
    return 0


def export(arguments: argparse.Namespace) -> int:
    """Print rules as they were written."""
    index = open_index(configuration.load(arguments.config).database_url)
    print(index.rule_set_text(_version(index, arguments.version), written=True), end="")
    index.close()
    return 0


def _version(index: Index, asked: int | None) -> int:
    return index.newest_rule_version() if asked is None else asked


def list_rules(arguments: argparse.Namespace) -> int:
    """List the rules of a version."""
    index = open_index(configuration.load(arguments.config).database_url)
    version = _version(index, arguments.version)
    found = rules.parse(index.rule_set_text(version), f"version {version}")
    index.close()
    print(f"version {version}: {len(found.rules)} rules")
    for rule in found.rules:
        about = [rule.priority, f"preset {rule.registration.preset or 'of the node'}", "+".join(rule.outputs)]
        about += [f"owner {rule.owner}"] if rule.owner else []
        about += [f"tags {','.join(rule.tags)}"] if rule.tags else []
        about += [rule.comment] if rule.comment else []
        print(f"  {rule.id}  {'enabled' if rule.enabled else 'disabled'}  " + "  ".join(about))
    return 0


def history(arguments: argparse.Namespace) -> int:
    """List every version that was in force."""
    index = open_index(configuration.load(arguments.config).database_url)
    for row in index.rule_set_history():
        print(
            f"{row['version']:>4}  {row['created_at']:%Y-%m-%d %H:%M:%S} UTC  {row['source']:8}  {row['sha256'][:12]}  "
            f"{row['author']}  {row['comment']}".rstrip()
        )
    index.close()
    return 0


def diff(arguments: argparse.Namespace) -> int:
    """Print what changed between two versions."""
    index = open_index(configuration.load(arguments.config).database_url)
    new = _version(index, arguments.new)
    old = max(new - 1, 1) if arguments.old is None else arguments.old
    one, other = (index.rule_set_text(version, written=True).splitlines(keepends=True) for version in (old, new))
    index.close()
    changes = "".join(difflib.unified_diff(one, other, f"version {old}", f"version {new}"))
    print(changes or f"version {old} and version {new} are the same\n", end="")
    return 0


def rollback(arguments: argparse.Namespace) -> int:
    """Put an earlier version in force again."""
    config = configuration.load(arguments.config)
    index = open_index(config.database_url)
    found = rules.parse(index.rule_set_text(arguments.version, written=True), f"version {arguments.version}")
    index.close()
    comment = arguments.comment or f"back to version {arguments.version}"
    return _put(
        config, check_against(config, found, f"version {arguments.version}"), source="rollback", comment=comment
    )


# ── what rules would do, and what they did ──


def test(arguments: argparse.Namespace) -> int:
    """Tell which pairs rules would make."""
    config = configuration.load(arguments.config)
    index = None if arguments.rules and arguments.dicom else open_index(config.database_url)
    if arguments.rules:
        found = check_against(config, rules.load(arguments.rules), str(arguments.rules))
    else:
        assert index is not None
        version = index.newest_rule_version()
        found = rules.parse(index.rule_set_text(version), f"version {version}")
    refused: dict[str, str] = {}
    if arguments.dicom:
        held = _read(arguments.dicom, refused)
    else:
        assert index is not None
        held = []
        for patient in _patients(index, arguments):
            held += index.volumes_of(*patient)
            refused |= index.reasons_of(*patient)
    if index is not None:
        index.close()
    told = [_tried(found, each, brief=arguments.brief) for each in _by_patient(held)]
    if arguments.json:
        print(json.dumps({"decisions": told, "refused": refused}, indent=2))
        return 0
    counts = sum(len(each["pairs"]) for each in told), sum(len(each["reasons"]) for each in told), len(refused)
    print("pairs: {}, series in none: {}, not looked at: {}".format(*counts))
    for each in told:
        print("\n".join(_decision_lines(each)))
    if refused:
        print("\nnot looked at")
    for uid, reason in refused.items():
        print(f"  {uid}: {reason}")
    return 0


def _patients(index: Index, arguments: argparse.Namespace) -> list[tuple[str, str]]:
    """Whose series the rules are tried on."""
    if arguments.study is None:
        return index.patients_of(since=datetime.now(UTC) - _duration(arguments.last))
    found = index.patients_of(study=arguments.study)
    if not found:
        raise ConfigError("rules test", "--study", arguments.study, "the UID of a study that was received")
    return found


def _tried(found: RuleSet, held: Sequence[VolumeRef], *, brief: bool) -> dict[str, Any]:
    """What the rules would make of one patient's volumes, were they all there and quiet for long."""
    long_after = max(each.last_received_at for each in held) + timedelta(days=3650)
    decision = pairing.pair(found, held, now=long_after)
    return {
        "studies": sorted({each.study_instance_uid for each in held}),
        "volumes": _titles(held),
        "pairs": [_pair_told(each) for each in decision.pairs],
        "to_settle": [_ambiguity_told(each) for each in decision.ambiguities],
        "lacking_priors": [{"rule": rule, "study": study} for rule, study in decision.lacking_priors],
        "reasons": dict(decision.reasons),
        "trace": [] if brief else trace.as_json(decision.findings),
    }


def _titles(held: Iterable[VolumeRef]) -> dict[str, str]:
    """What people call each volume, by its label."""
    return {label(key_of(each)): trace.title(each) for each in held}


def _pair_told(pair: Pair) -> dict[str, str]:
    fixed = label((pair.fixed_series_instance_uid, pair.fixed_volume_number))
    return {
        "rule": pair.rule_id,
        "fixed": fixed,
        "moving": label((pair.moving_series_instance_uid, pair.moving_volume_number)),
    }


def _ambiguity_told(ambiguity: Ambiguity) -> dict[str, Any]:
    return {
        "rule": ambiguity.rule_id,
        "reason": ambiguity.reason,
        "fixed": [label(key) for key in ambiguity.fixed],
        "moving": [label(key) for key in ambiguity.moving],
    }


def _decision_lines(told: dict[str, Any]) -> Iterator[str]:
    names = told["volumes"]

    def named(volume: str) -> str:
        return f"{volume} ({names[volume]})" if volume in names else volume

    yield f"\nstudies {', '.join(told['studies'])}"
    for pair in told["pairs"]:
        yield f"  pair by rule {pair['rule']}"
        yield f"    fixed   {named(pair['fixed'])}"
        yield f"    moving  {named(pair['moving'])}"
    for item in told["to_settle"]:
        yield f"  a person must settle  rule {item['rule']}  {item['reason']}"
        yield from (f"    {role}  {named(each)}" for role in ("fixed", "moving") for each in item[role])
    for each in told["lacking_priors"]:
        yield f"  priors would be asked for  rule {each['rule']}  study {each['study']}"
    for uid, reason in told["reasons"].items():
        yield f"  no pair for {named(uid)}"
        yield f"    {reason}"
    yield from ("  " + line for line in trace.as_text(told["trace"], names))


def _by_patient(held: Iterable[VolumeRef]) -> list[list[VolumeRef]]:
    groups: dict[tuple[str, str], list[VolumeRef]] = defaultdict(list)
    for volume in held:
        groups[volume.patient_id.strip(), volume.issuer_of_patient_id.strip()].append(volume)
    return list(groups.values())


def _read(folder: Path, refused: dict[str, str]) -> list[VolumeRef]:
    """The volumes of every series under a folder; why others are none goes into `refused`."""
    if not folder.is_dir():
        raise ConfigError("rules test", "--dicom", str(folder), "a folder of DICOM files")
    series: dict[str, list[Any]] = defaultdict(list)
    for path in sorted(each for each in folder.rglob("*") if each.is_file()):
        try:
            with warnings.catch_warnings():  # of what is no DICOM file at all
                warnings.simplefilter("ignore")
                datasets = volumes.read_headers([path])
        except (StudyError, InvalidDicomError) as error:
            refused[str(path.relative_to(folder))] = str(error).removeprefix(f"{path.name}: ")
            continue
        header = volumes.instance_header(datasets[0])
        if header.is_own_output:
            refused[header.series_instance_uid] = "the node's own output, or a registration object"
        elif not header.series_instance_uid:
            refused[str(path.relative_to(folder))] = "has no Series Instance UID"
        else:
            series[header.series_instance_uid] += datasets
    found = []
    for uid, datasets in series.items():
        try:
            described = volumes.describe(datasets, last_received_at=datetime.now(UTC))
        except StudyError as error:
            refused[uid] = str(error)
        else:
            found += [volume for volume, _ in described.volumes]
    return found


def _duration(text: str) -> timedelta:
    units = {"d": "days", "h": "hours", "m": "minutes"}
    match = re.fullmatch(r"(\d{1,4})([dhm])", text)
    if match is None:
        raise ConfigError("rules test", "--last", text, "a number and d, h or m, such as 7d")
    return timedelta(**{units[match[2]]: int(match[1])})


def why(arguments: argparse.Namespace) -> int:
    """Tell why a series or study was paired as it was."""
    index = open_index(configuration.load(arguments.config).database_url)
    state = index.about(arguments.uid)
    rows = state["series"]
    if not rows:
        index.close()
        raise ConfigError("why", "UID", arguments.uid, "the UID of a series or study that was received")
    uids = frozenset(row["series_instance_uid"] for row in rows)
    traces = index.traces_of(arguments.uid)
    items = [each for each in index.work_items(everything=True) if uids & _series_of(each)]
    patients = {each for row in rows for each in index.patients_of(study=row["study_instance_uid"])}
    names = _titles(volume for patient in patients for volume in index.volumes_of(*patient))
    index.close()
    for each in traces:
        each["trace"] = [t for rule in each["trace"] if (t := trace.narrowed(rule, uids, each["rules"])) is not None]
    if arguments.json:
        settling = [{"item": each.id, "state": each.state, "by": each.closed_by} for each in items]
        told = {**state, "volumes": names, "to_settle": settling, "decisions": traces}
        print(json.dumps(told, indent=2, default=str))
        return 0
    print("\n".join(_why_lines(state, items, traces, names)))
    return 0


def _series_of(item: WorkItem) -> set[str]:
    return {key[0] for key in item.ambiguity.fixed + item.ambiguity.moving}


def _why_lines(
    state: Mapping[str, Any], items: Iterable[WorkItem], traces: Iterable[Any], names: Mapping[str, str]
) -> Iterator[str]:
    for row in state["series"]:
        uid = row["series_instance_uid"]
        yield f"series {uid} ({names.get(uid, row['modality'])}, {row['instances']} instances)  {row['state']}"
        yield from (f"  {line}" for line in (row["reason"], row["note"]) if line)
    for row in state["priors"]:
        yield f"  priors for rule {row['rule_id']} from {row['source']}: {row['state']}; {row['reason']}".rstrip("; ")
    for job in state["jobs"]:
        yield (
            f"  job {job['id']}  rule {job['rule_id']} version {job['rule_version']}  fixed {job['fixed']}  "
            f"moving {job['moving']}  {job['state']}  {job['reason'] or ''}".rstrip()
        )
    for item in items:
        if item.state == "open":
            yield from _item_lines(item, names)
        elif item.state == "settled":
            yield f"  item {item.id} settled by {item.closed_by} {item.closed_at:%Y-%m-%d %H:%M:%S} UTC"
    for each in traces:
        if each["trace"]:
            what = "last looked at" if each["rules"] is None else f"pair of {', '.join(each['rules'])} made"
            yield f"{what} {each['decided_at']:%Y-%m-%d %H:%M:%S} UTC by rule set {each['rule_version']}"
            yield from ("  " + line for line in trace.as_text(each["trace"], names))


# ── what a person decides ──


def settle(arguments: argparse.Namespace) -> int:
    """List what the rules could not decide, or decide one item."""
    index = open_index(configuration.load(arguments.config).database_url)
    if arguments.item is None:
        for item in (items := index.work_items()):
            print("\n".join(_item_lines(item, _titles(index.volumes_of(*item.patient)))))
        index.close()
        if not items:
            print("nothing waits for a person")
        return 0
    item = index.work_item(arguments.item)
    fixed = _chosen(arguments.fixed, item.ambiguity.fixed, "--fixed")
    moving = [_chosen(each, item.ambiguity.moving, "--moving") for each in arguments.moving]
    pairs = chosen_pairs(index, item, fixed, moving)
    rule = rules.parse(index.rule_set_text(item.rule_version), "rules").rule(item.ambiguity.rule_id)
    from dicomnode.workflow import JobQueue

    queue, now = JobQueue(index.engine), datetime.now(UTC)
    jobs = index.settle(item, pairs, by=account(), plan=rule.plan(now), enqueue=queue.enqueue, now=now)
    queue.close()
    index.close()
    print(f"item {item.id} settled: pairs: {len(pairs)}, jobs {', '.join(jobs) or 'none: they stood already'}")
    return 0


def chosen_pairs(index: Index, item: WorkItem, fixed: Key, moving: Sequence[Key]) -> list[Pair]:
    """The pairs that a person chose among what an item offers.

    Raises
    ------
    ConfigError
        Nothing is moving, a volume twice, or the two may be different persons.
    """
    held = {key_of(each): each for each in index.volumes_of(*item.patient)}
    if not moving or fixed in moving or len(set(moving)) < len(moving):
        raise ConfigError("settle", "--moving", [label(key) for key in moving], "series other than --fixed, each once")
    for key in (fixed, *moving):
        if key not in held:
            raise ConfigError("settle", "UID", label(key), "a series that is still here")
        if persons := [each.text for each in partners.identity(held[fixed], held[key]) if not each.passed]:
            raise ConfigError("settle", "UID", label(key), f"series of one patient: {'; '.join(persons)}")
    return [Pair(item.ambiguity.rule_id, fixed[0], each[0], fixed[1], each[1]) for each in moving]


def _chosen(text: str | None, offered: Sequence[Key], option: str) -> Key:
    named = {label(key): key for key in offered}
    if text is None and len(offered) == 1:
        return offered[0]
    if text is None or text not in named:
        raise ConfigError("settle", option, text or "nothing", f"one of {', '.join(named)}")
    return named[text]


def _item_lines(item: WorkItem, names: Mapping[str, str]) -> Iterator[str]:
    about = item.ambiguity
    yield f"item {item.id}  rule {about.rule_id} version {item.rule_version}  {item.created_at:%Y-%m-%d %H:%M:%S} UTC"
    yield f"  {about.scope}: {about.reason}"
    yield f"  settle it by `dicomnode settle {item.id} --fixed UID --moving UID` with"
    for option, keys in (("--fixed", about.fixed), ("--moving", about.moving)):
        for each in map(label, keys):
            yield f"    {option} {each}  ({names.get(each, 'not here any more')})"
