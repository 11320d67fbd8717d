"""Comes to a job's results again, from the archive and what the index recorded, and says what differs.

Law: nothing is sent, and nothing of the node changes: the results go to a folder of the caller's.
"""

from __future__ import annotations

import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydicom import Dataset, dcmread

from dicomnode import rules
from dicomnode.archive import Archive
from dicomnode.errors import ConfigError, StudyError
from dicomnode.index import Index
from dicomnode.job_folder import JobFolder
from dicomnode.model import Verdict
from dicomnode.products import Maker
from dicomnode.registering import judge_pairs, provenance, register
from registration_engine import PRESETS

_OF_THE_MOMENT = frozenset({"DA", "TM", "DT", "UI"})
"""Value representations that say when, not what; UIDs are compared apart."""
_HOW = frozenset({"ContributionDescription", "SoftwareVersions", "DeviceSerialNumber"})


@dataclass
class Comparison:
    """What was made again beside what the job had made.

    Attributes
    ----------
    lines
        In words, for a person.
    uids, values
        Whether every SOP Instance UID, and all that the objects say, came out equal.
    """

    lines: list[str] = field(default_factory=list)
    uids: bool = True
    values: bool = True


def reproduce(index: Index, archive: Archive, job_id: str, out: Path, *, device: str) -> Comparison:
    """Register a job's inputs anew, as its rule's version and the recorded preset say, and write the objects to `out`.

    Parameters
    ----------
    out
        Made if it is not there; one file for each object, named by kind and number.
    device
        As the configuration has it; another class of device gives other UIDs.

    Raises
    ------
    ConfigError
        `out` holds something already, or cannot be made.
    StudyError
        The job has no results, or an input is not what it was.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError("reproduce", "--out", str(out), "an empty folder, or one that is not there")
    job, recorded = index.job(job_id), index.provenance(job_id)
    if recorded is None:
        raise StudyError(f"job {job_id} has no result to reproduce: it is {job.state}{job.reason and ': '}{job.reason}")
    members = _members(index, job_id, recorded["inputs"])
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError("reproduce", "--out", str(out), f"a folder that can be made ({error.strerror})") from None
    text = index.rule_set_text(job.rule_version)
    rule = rules.parse(text, f"rule set {job.rule_version}").rule(job.rule_id)
    report = next(iter(recorded["results"].values()))["report"]
    preset = replace(PRESETS[report["preset"]], **rule.registration.parameters)
    former = index.products_of(job_id)
    with tempfile.TemporaryDirectory(dir=out) as work:
        folder = JobFolder(Path(work), archive)
        folder.write_inputs(members, recorded["order"])
        register(folder, preset=preset, device=device, seed=report["seed"], progress=lambda *_: None)
        judge_pairs(folder, rule)
        judged = folder.read_json("verdicts")
        if not former:  # nothing was sent; here it is made for a look
            judged = {role: (Verdict.WARN, f"{verdict}: {reason}") for role, (verdict, reason) in judged.items()}
            folder.write_json("verdicts", judged)
        found = Comparison(_differing_settings(recorded, provenance(folder)))
        made: dict[str, list[Path]] = defaultdict(list)
        for kind, dataset in Maker(job, rule, folder).make():
            path = out / f"{kind}-{len(made[kind]) + 1:04}.dcm"
            dataset.save_as(path, enforce_file_format=True)
            made[kind].append(path)
    before: dict[str, list[Path]] = defaultdict(list)
    for product in former:
        before[product.kind].append(archive.path(product.instance))
    if not former:
        found.lines.append(f"the job had made nothing to compare with: {job.verdict}: {job.reason}")
        return found
    for kind in {**before, **made}:
        _compare(kind, before[kind], made[kind], found)
    return found


def _members(
    index: Index, job_id: str, inputs: Mapping[str, list[list[Any]]]
) -> dict[str, list[tuple[Any, tuple[int, ...]]]]:
    """The recorded inputs as the archive holds them now."""
    stored = index.stored({uid for several in inputs.values() for uid, _, _ in several})
    for several in inputs.values():
        for uid, sha256, _ in several:
            if uid not in stored:
                raise StudyError(f"job {job_id}: its input {uid} is not here any more")
            if stored[uid].sha256 != sha256:
                got = stored[uid].sha256[:12]
                raise StudyError(f"job {job_id}: its input {uid} has other content now: {got}, expected {sha256[:12]}")
    return {role: [(stored[uid], tuple(frames)) for uid, _, frames in several] for role, several in inputs.items()}


def _differing_settings(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Software, device and weights, each named where it is not what it was."""
    lines = []
    for name, was in recorded["software"].items():
        if (is_now := now["software"].get(name)) != was:
            lines.append(f"{name}: {was} then, {is_now} now")
    machines = [", ".join(f"{name} ({text})" for name, text in each["machine"].items()) for each in (recorded, now)]
    if machines[0] != machines[1]:
        lines.append(f"device: {machines[0]} then, {machines[1]} now")
    for role in recorded["results"].keys() & now["results"].keys():
        then, again = (each["results"][role]["report"] for each in (recorded, now))
        lines += [
            f"{role}: {name} {then[name]} then, {again[name]} now"
            for name in ("model_sha256", "profile")
            if then[name] != again[name]
        ]
    return lines


def _compare(kind: str, before: list[Path], made: list[Path], found: Comparison) -> None:
    """Compare the objects of one kind in their order."""
    if len(before) != len(made):
        found.values = found.uids = False
        found.lines.append(f"{kind}: {len(before)} objects then, {len(made)} now")
        return
    same_uids = 0
    largest: Counter[str] = Counter()
    differing: Counter[str] = Counter()
    of: Counter[str] = Counter()
    for old, new in zip(map(dcmread, before), map(dcmread, made), strict=True):
        same_uids += old.SOPInstanceUID == new.SOPInstanceUID
        values = (dict(_values(old)), dict(_values(new)))
        for path in {**values[0], **values[1]}:
            a, b = values[0].get(path), values[1].get(path)
            name = path.split(".")[-1]
            if isinstance(a, np.ndarray) and isinstance(b, np.ndarray) and a.shape == b.shape:
                of[name] += a.size
                apart = np.abs(a.astype(np.float64) - b.astype(np.float64))
                if apart.any():
                    largest[name] = max(largest[name], float(apart.max()))  # type: ignore[assignment]
                    differing[name] += int(np.count_nonzero(apart))
            elif a is None or b is None or not np.array_equal(a, b):
                differing[name] += 1
    found.uids &= same_uids == len(made)
    found.values &= not differing
    words = [
        f"{name} differs by up to {largest[name]:.4g}, in {count / of[name]:.3%} of values"
        if of[name]
        else f"{name} differs in {count} places"
        for name, count in differing.items()
    ]
    found.lines.append(
        f"{kind}: {len(made)} objects, {same_uids} with the UID they had; {'; '.join(words) or 'all values equal'}"
    )


def _values(dataset: Dataset, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every element but UIDs, times and what made it, by its path; bulk values as numbers."""
    for element in dataset:
        here = f"{path}.{element.keyword or element.tag}"
        if element.VR == "SQ":
            for number, item in enumerate(element.value):
                yield from _values(item, f"{here}[{number}]")
        elif element.VR not in _OF_THE_MOMENT and element.keyword not in _HOW:
            yield here, _numbers(dataset, element.VR, element.value)


def _numbers(dataset: Dataset, vr: str, value: Any) -> npt.NDArray[Any] | str:
    if not isinstance(value, bytes):
        return str(value)
    if vr in ("OF", "OD"):
        return np.frombuffer(value, "<f4" if vr == "OF" else "<f8")
    wide = int(dataset.get("BitsAllocated") or 8) == 16
    return np.frombuffer(value, ("<i2" if dataset.get("PixelRepresentation") else "<u2") if wide else "u1")
