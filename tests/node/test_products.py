"""What a job makes of its folder: the rule's wishes reach the objects, and nothing is measured twice."""

from __future__ import annotations

import json
from collections import Counter
from datetime import timedelta
from pathlib import Path
from typing import Any

import counterparts
import multi_frame
import numpy as np
import phantoms
import pytest
from hand_made import CREATED_AT, make_registration, make_report, translation
from pydicom import Dataset

from dicomnode import objects, quality, rules, volumes
from dicomnode.archive import Archive
from dicomnode.job_folder import JobFolder, Result
from dicomnode.model import Job, JobState
from dicomnode.objects import sample_grid
from dicomnode.products import Maker
from dicomnode.registering import judge_pairs
from dicomnode.thresholds import Thresholds
from registration_engine import Registration

SIZE: dict[str, Any] = {"shape": (8, 24, 24), "spacing_mm": (12.0, 9.0, 9.0)}
RULE = """
version: 1
rules:
  - id: r
    roles: {{fixed: {{match: {{n_slices: 8}}}}, moving: {{match: {{n_slices: 8}}, many: {many}}}}}
    verdict: {verdict}
    {more}
"""
ACCEPTED = json.dumps({name: {"warn": None, "reject": None} for name in Thresholds().limits()})


def maker(folder: Path, roles: dict[str, list[Any]], more: str, registrations: dict[str, Registration]) -> Maker:
    """A job whose pairs are registered and judged; `roles` in the order of time."""
    archive = Archive(folder / "data")
    job_folder = JobFolder(folder / "job", archive)
    members = {}
    for role, series in roles.items():
        stored = [archive.keep_dataset(dataset) for dataset in series]
        frames = int(series[0].get("NumberOfFrames") or 0)
        members[role] = [(each, tuple(range(1, frames + 1))) for each in stored]
    job_folder.write_inputs(members, list(roles))
    text = RULE.format(many=str(len(roles) > 2).lower(), verdict=ACCEPTED, more=more)
    rule = rules.parse(text, "rules").rules[0]
    for role, found in registrations.items():
        at = CREATED_AT + timedelta(minutes=len(role))
        job_folder.write_result(Result(found, sample_grid(found), at), role)
    judge_pairs(job_folder, rule)
    uids = (str(roles[role][0].SeriesInstanceUID) for role in ("fixed", "moving"))
    return Maker(Job("1", "r", 1, *uids, JobState.RUNNING), rule, job_folder)


def pair(folder: Path, more: str, *, enhanced: bool = False, moving_mm: float = 9.0) -> Maker:
    fixed = phantoms.make_series(**SIZE)
    moving = phantoms.make_series(
        phase="arterial", shape=(8, 24, 24), spacing_mm=(12.0, moving_mm, moving_mm), header={"SeriesNumber": 7}, seed=1
    )
    found = make_registration(volumes.load(fixed).grid)
    if enhanced:
        moving = [multi_frame.well_formed(moving)]
    return maker(folder, {"fixed": fixed, "moving": moving}, more, {"moving": found})


def made(of: Maker) -> dict[str, list[Dataset]]:
    found: dict[str, list[Dataset]] = {}
    for kind, dataset in of.make():
        found.setdefault(kind, []).append(dataset)
    return found


def test_the_rules_text_voxel_size_study_and_stages_reach_the_objects(tmp_path: Path) -> None:
    more = """outputs: [series, sro, sr]
    series: {resolution: moving, description: 'WARPED {moving}'}
    register: {affine_sro: true}"""

    found = made(pair(tmp_path, more, moving_mm=6.0))

    assert {kind: len(each) for kind, each in found.items()} == {"series": 8, "sro": 2, "sr": 1}
    first = found["series"][0]
    assert [float(mm) for mm in first.PixelSpacing] == [6, 6]
    assert first.SeriesDescription == "WARPED Abdomen arterial"
    assert found["sr"][0].SeriesDescription == "QC WARPED Abdomen arterial"
    types = [each.RegistrationSequence[1].MatrixRegistrationSequence[0].MatrixSequence[0] for each in found["sro"]]
    assert [each.FrameOfReferenceTransformationMatrixType for each in types] == ["RIGID", "AFFINE"]


def test_an_enhanced_moving_series_becomes_one_instance(tmp_path: Path) -> None:
    found = made(pair(tmp_path, "outputs: [series]", enhanced=True))

    (one,) = found["series"]
    assert one.NumberOfFrames == 8


def phases(folder: Path, more: str, *, named: str, enhanced: bool = False) -> Maker:
    """Three series, the second one the reference; the others lie 4 mm beside it."""
    series: dict[str, list[Any]] = {}
    for n, role in enumerate(("moving", "fixed", "moving-1")):
        header = {"SeriesDescription": named, "SeriesNumber": n + 3, "ProtocolName": f"dyn {n}"}
        one = phantoms.make_series(modality="MR", seed=n, header=header, **SIZE)
        uid = phantoms.make_uid("phase", n)
        for k, dataset in enumerate(one):
            dataset.SeriesInstanceUID, dataset.SOPInstanceUID = uid, phantoms.make_uid("phase", n, k)
            dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
            dataset.AcquisitionTime = f"1000{20 * n:02}"
        series[role] = [multi_frame.well_formed(one)] if enhanced else one
    grid = volumes.load(phantoms.make_series(modality="MR", **SIZE)).grid
    shift = translation(4, 0, 0)
    found = Registration(grid, shift, shift, None, make_report())
    text = f"split: {{by: study}}\n    {more}"
    return maker(folder, series, text, {"moving": found, "moving-1": found})


@pytest.mark.parametrize("enhanced", [False, True])
def test_a_4d_series_is_labelled_whole_and_stands_before_the_validators(tmp_path: Path, enhanced: bool) -> None:
    of = phases(tmp_path, "outputs: [series_4d, uptake]", named="DCE to be read", enhanced=enhanced)

    found = made(of)

    assert {kind: len(each) for kind, each in found.items()} == {"series": 3 * 8, "uptake": 3}
    assert {each.SeriesDescription for each in found["series"]} == {"REG 4D to DCE to be read"}
    assert {each.SeriesDescription for each in found["uptake"]} == {"UPTAKE REG 4D to DCE to be read"}
    assert len({each.SeriesInstanceUID for each in found["series"]}) == 1
    assert Counter(each.TemporalPositionIdentifier for each in found["series"]) == {1: 8, 2: 8, 3: 8}
    sources = [path for n, path in enumerate(archived(of)) if n % 8 == 0]
    paths = phantoms.write_series(found["series"], tmp_path / "4d")
    assert counterparts.dciodvfy_errors(paths[::8]) <= counterparts.dciodvfy_errors(sources)
    assert counterparts.dcentvfy_complaints(paths) == ""


def archived(of: Maker) -> list[Path]:
    archive = of.folder._archive
    return [archive.path(each) for role in of.folder.order for each, _ in of.folder.inputs(role)]


def test_a_text_of_the_rule_without_names_stands_for_all_phases(tmp_path: Path) -> None:
    of = phases(tmp_path, "outputs: [series_4d]\n    series: {description: 'Moved to rest'}", named="DCE")

    assert {each.SeriesDescription for each in made(of)["series"]} == {"Moved to rest"}


def test_the_uptake_has_the_times_of_the_headers(tmp_path: Path) -> None:
    found = made(phases(tmp_path, "outputs: [uptake]", named="DCE"))

    numbers = {float(each.value) for each in found["uptake"][1].iterall() if each.keyword == "NumericValue"}
    assert {0.0, 20.0, 40.0} <= numbers


def test_a_registration_is_measured_once_for_verdict_and_objects(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow: list[int] = []
    original = quality.patch_mutual_information

    def counted(*arguments: Any) -> Any:
        slow.append(1)
        return original(*arguments)

    monkeypatch.setattr(quality, "patch_mutual_information", counted)

    of = pair(tmp_path, "outputs: [sr, sc, pmm, overlap]")
    found = made(of)

    assert len(slow) == 2  # before and after
    result, folder = of.folder.result("moving"), of.folder
    fresh = objects.build(
        folder.source("fixed"),
        folder.source("moving"),
        volumes.load(folder.datasets("moving")),
        result.registration,
        result.sampled,
        outputs=["sr", "sc", "pmm", "overlap"],
        provenance=of.provenance(result),
    )
    assert [dataset for each in found.values() for dataset in each] == [dataset for _, dataset in fresh]
    assert len(slow) == 4


def test_what_was_measured_is_read_back_equal_and_kept_only_where_it_is_told(tmp_path: Path) -> None:
    told, untold = pair(tmp_path / "a", "outputs: [sr]"), pair(tmp_path / "b", "outputs: [series]")

    kept = told.folder.measured("moving")

    assert untold.folder.measured("moving") is None
    assert kept is not None
    told.folder.write_measured(kept, "again")
    again = told.folder.measured("again")
    assert again is not None
    assert again.figures == kept.figures
    assert all(np.array_equal(a, b, equal_nan=True) for a, b in zip(kept.patches, again.patches, strict=True))
