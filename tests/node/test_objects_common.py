from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import phantoms
import pytest
from hand_made import CREATED_AT, make_objects, make_provenance, make_registration, make_source
from pydicom import dcmread

from dicomnode import objects, volumes
from dicomnode.errors import StudyError
from dicomnode.objects.common import Subject

SMALL = (6, 16, 20)
FIXED, MOVING = phantoms.make_pair(shape=SMALL)


def subject(**changes: Any) -> Subject:
    values = {
        "fixed": make_source(FIXED),
        "moving": make_source(MOVING),
        "provenance": make_provenance(),
        "is_deformable": True,
        **changes,
    }
    return Subject(**values)


def test_the_same_inputs_make_the_same_bytes(tmp_path: Path) -> None:
    for n in (1, 2):
        (tmp_path / str(n)).mkdir()
        for index, (kind, dataset) in enumerate(make_objects(FIXED, MOVING)):
            dataset.save_as(tmp_path / str(n) / f"{kind}{index}.dcm", enforce_file_format=True)

    first, second = ({p.name: p.read_bytes() for p in (tmp_path / n).iterdir()} for n in ("1", "2"))

    assert len(first) == 9
    assert first == second


def test_every_object_has_its_own_uid() -> None:
    made = make_objects(FIXED, MOVING)

    assert len({dataset.SOPInstanceUID for _, dataset in made}) == len(made)
    assert len({dataset.SeriesInstanceUID for _, dataset in made}) == 4
    assert all(dataset.SOPInstanceUID.startswith("2.25.") and dataset.SOPInstanceUID.is_valid for _, dataset in made)


@pytest.mark.parametrize(
    "change",
    [
        {"rule_id": "other"},
        {"rule_version": 4},
        {"preset": "fast"},
        {"parameters": {"landmarks": 7}},
        {"software_version": "0.1.1"},
        {"model_sha256": "ab" * 32},
        {"device_class": "cuda"},
    ],
)
def test_how_it_was_made_changes_the_uid(change: dict[str, Any]) -> None:
    changed = subject(provenance=make_provenance(**change))

    assert changed.uid("dsr") != subject().uid("dsr")
    assert changed.uid("series", 3) != subject().uid("series", 3)


def test_each_input_changes_the_uid() -> None:
    others = [
        subject(fixed=make_source(FIXED, digest="e")),
        subject(moving=make_source(MOVING, digest="e")),
        subject(moving=make_source(MOVING[:-1])),
        subject(fixed=make_source(MOVING), moving=make_source(FIXED)),
    ]

    assert len({s.uid("dsr") for s in (subject(), *others)}) == 5


def test_the_time_and_the_order_of_instances_do_not_change_the_uid() -> None:
    later = replace(make_provenance(), created_at=CREATED_AT + timedelta(days=1))

    assert subject(provenance=later).uid("dsr") == subject().uid("dsr")
    assert subject(fixed=make_source(FIXED[::-1])).uid("dsr") == subject().uid("dsr")


@pytest.mark.parametrize("keyword", ["PatientID", "IssuerOfPatientID"])
def test_two_patients_are_refused_and_not_named(keyword: str) -> None:
    stranger = phantoms.make_series(shape=SMALL, header={keyword: "STRANGER"})

    with pytest.raises(StudyError, match=f"differ in {keyword}, expected one patient") as raised:
        make_objects(FIXED, stranger)

    assert "STRANGER" not in str(raised.value)


def test_without_a_patient_id_only_one_study_is_one_patient() -> None:
    fixed, moving = phantoms.make_pair(shape=SMALL, patient_id="")
    _, elsewhere = phantoms.make_pair(shape=SMALL, patient_id="", same_study=False)

    assert len(make_objects(fixed, moving)) == 9
    with pytest.raises(StudyError, match="have no PatientID and are of two studies"):
        make_objects(fixed, elsewhere)


def test_a_registration_of_another_grid_is_refused() -> None:
    other = make_registration(make_source(phantoms.make_series()).grid)

    with pytest.raises(ValueError, match="expected the fixed series'"):
        make_objects(FIXED, MOVING, other)


def test_an_output_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="jacobi"):
        make_objects(FIXED, MOVING, outputs=["series", "jacobi"])


@pytest.mark.parametrize(
    ("outputs", "kinds"),
    [(["dsr"], ["dsr"]), (["sro"], ["sro"]), (["series"], ["series"] * 6), (["sro_affine", "sro"], ["sro", "sro"])],
)
def test_only_what_was_asked_for_is_made(outputs: list[str], kinds: list[str]) -> None:
    assert [kind for kind, _ in make_objects(FIXED, MOVING, outputs=outputs)] == kinds


def test_every_output_is_recognised_as_ours() -> None:
    for _, dataset in make_objects(FIXED, MOVING):
        assert volumes.instance_header(dataset).is_own_output


def test_patient_and_study_are_the_fixed_ones() -> None:
    fixed, moving = phantoms.make_pair(shape=SMALL, same_study=False)
    for dataset in moving:
        dataset.AccessionNumber, dataset.StudyDescription, dataset.PatientAge = "A2", "Follow-up", "056Y"

    for _, made in make_objects(fixed, moving):
        assert made.StudyInstanceUID == fixed[0].StudyInstanceUID
        assert (made.AccessionNumber, made.StudyDescription, made.PatientID) == ("A1", "Abdomen", "PHANTOM")
        assert "PatientAge" not in made


@pytest.mark.parametrize("store_in", ["fixed_study", "moving_study", "newest"])
def test_objects_go_to_the_study_that_the_rule_names(store_in: str) -> None:
    fixed, moving = phantoms.make_pair(shape=SMALL, same_study=False)
    for dataset in moving:
        dataset.StudyDate = "20991231"

    made = [dataset for _, dataset in make_objects(fixed, moving, store_in=store_in)]

    home = fixed[0] if store_in == "fixed_study" else moving[0]
    assert {dataset.StudyInstanceUID for dataset in made} == {home.StudyInstanceUID}
    assert {dataset.FrameOfReferenceUID for dataset in made} == {fixed[0].FrameOfReferenceUID}


def test_times_are_written_in_the_zone_the_images_state() -> None:
    fixed, moving = phantoms.make_pair(shape=SMALL, header={"TimezoneOffsetFromUTC": "-0330"})

    for _, made in make_objects(fixed, moving):
        assert (made.ContentDate, made.ContentTime) == ("20250304", "013607")
        assert made.TimezoneOffsetFromUTC == "-0330"


def test_provenance_stands_in_every_object() -> None:
    provenance = make_provenance(model_sha256="ab" * 32, parameters={"landmarks": 7}, seconds={"field": 1.234})
    content = [sorted((d.SOPInstanceUID, f"d{d.SOPInstanceUID}") for d in series) for series in (FIXED, MOVING)]
    inputs = hashlib.sha256(json.dumps(content).encode()).hexdigest()

    for _, made in make_objects(FIXED, MOVING, provenance=provenance):
        item = made.ContributingEquipmentSequence[-1]
        assert item.ManufacturerModelName == volumes.SOFTWARE_NAME
        assert item.SoftwareVersions == ["0.1.0", f"model {'ab' * 16}"]
        assert item.ContributionDescription == (
            f'rule liver version 3; preset balanced; parameters {{"landmarks": 7}}; model {"ab" * 32}; '
            f'device cpu; inputs {inputs}; seconds {{"field": 1.2}}'
        )


def test_a_warning_stands_in_every_object() -> None:
    for kind, made in make_objects(FIXED, MOVING, warning="grid error up to 0.31 mm ± 0"):
        text = made.DerivationDescription if kind == "series" else made.ContentDescription
        assert "WARNING" in text
        assert "grid error up to 0.31 mm ? 0" in text


@pytest.mark.parametrize(
    ("study", "here", "elsewhere"), [("study", 2, 0), ("later study", 1, 1)], ids=["same study", "other study"]
)
def test_references_are_split_by_study(study: str, here: int, elsewhere: int) -> None:
    fixed, moving = phantoms.make_pair(shape=SMALL, same_study=study == "study")

    for _, made in make_objects(fixed, moving, outputs=["sro", "dsr"]):
        assert len(made.ReferencedSeriesSequence) == here
        other = made.get("StudiesContainingOtherReferencedInstancesSequence") or []
        assert [item.StudyInstanceUID for item in other] == [moving[0].StudyInstanceUID] * elsewhere
        series = [*made.ReferencedSeriesSequence, *(s for item in other for s in item.ReferencedSeriesSequence)]
        assert [len(s.ReferencedInstanceSequence) for s in series] == [6, 6]


def test_a_series_without_a_frame_of_reference_gets_one_that_all_objects_share() -> None:
    fixed = phantoms.make_series(shape=SMALL, header={"FrameOfReferenceUID": None})

    made = make_objects(fixed, MOVING)

    (frame,) = {dataset.FrameOfReferenceUID for _, dataset in made}
    assert frame.startswith("2.25.")
    assert frame == make_source(fixed).frame_of_reference_uid != make_source(MOVING).frame_of_reference_uid


def test_text_of_two_character_sets_survives(tmp_path: Path) -> None:
    fixed, moving = phantoms.make_pair(
        shape=SMALL, header={"SpecificCharacterSet": "ISO_IR 100", "PatientName": "Müller^Jörg"}
    )
    for dataset in moving:
        dataset.SpecificCharacterSet, dataset.SeriesDescription = "ISO_IR 192", "腹部"

    for _, made in make_objects(fixed, moving):
        made.save_as(tmp_path / "one.dcm", enforce_file_format=True)
        read = dcmread(tmp_path / "one.dcm")
        assert read.PatientName == "Müller^Jörg"
        assert read.SeriesDescription == "REG 腹部 to Abdomen native"


def test_objects_come_one_at_a_time() -> None:
    source = make_source(FIXED)
    registration = make_registration(source.grid)
    made = objects.build(
        source,
        make_source(MOVING),
        volumes.load(MOVING),
        registration,
        objects.sample_grid(registration),
        outputs=["series"],
        provenance=make_provenance(created_at=datetime(2025, 1, 1, tzinfo=UTC)),
    )

    assert next(made)[0] == "series"
