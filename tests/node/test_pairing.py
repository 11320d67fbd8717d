from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from volume_refs import NOW, volume

from dicomnode import pairing, partners, reasons, rules, volumes
from dicomnode.derived import Subject
from dicomnode.model import Pair, SeriesActivity, VolumeRef
from dicomnode.pairing import Decision
from dicomnode.rules import RuleSet

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "dicom"

POSITIONS = rules.parse(
    """
version: 1
rules:
  - id: positions
    when: {Modality: MR}
    roles: {fixed: {match: {PatientPosition: HFS}}, moving: {match: {PatientPosition: HFDL}}}
    pair: {same: [PatientID]}
    register: {preset: balanced}
    outputs: [series, sro, dsr]
""",
    "positions",
)


def rule_set(*, defaults: dict[str, Any] | None = None, **changes: Any) -> RuleSet:
    """Rule `r`: description `a…` is fixed, `b…` is moving, changed; dotted by two underscores."""
    rule: dict[str, Any] = {
        "id": "r",
        "roles": {
            "fixed": {"match": {"SeriesDescription": {"matches": "^a"}}},
            "moving": {"match": {"SeriesDescription": {"matches": "^b"}}},
        },
    }
    for dotted, value in changes.items():
        *steps, last = dotted.split("__")
        inner = rule
        for step in steps:
            inner = inner.setdefault(step, {})
        inner[last] = value
    return rules.parse(yaml.safe_dump({"version": 1, "defaults": defaults or {}, "rules": [rule]}), "r.yaml")


def decide(
    rules_in_force: RuleSet,
    candidates: Sequence[VolumeRef],
    *,
    receiving: Sequence[SeriesActivity] = (),
    existing: Collection[Pair] = (),
    quiet_period_s: float = 30.0,
) -> Decision:
    return pairing.pair(
        rules_in_force, candidates, receiving=receiving, existing=existing, quiet_period_s=quiet_period_s, now=NOW
    )


def made(decision: Decision) -> list[tuple[str, str]]:
    return [(pair.fixed_series_instance_uid, pair.moving_series_instance_uid) for pair in decision.pairs]


def a(uid: str = "A", **more: Any) -> VolumeRef:
    return volume(uid, **{"SeriesDescription": "a"} | more)


def b(uid: str = "B", **more: Any) -> VolumeRef:
    return volume(uid, **{"SeriesDescription": "b"} | more)


def receiving(uid: str, *, study: str = "study-1") -> SeriesActivity:
    return SeriesActivity(
        series_instance_uid=uid,
        study_instance_uid=study,
        patient_id="P1",
        issuer_of_patient_id="",
        instances=3,
        last_received_at=NOW,
        receiving=True,
    )


# ── roles ──


def test_a_fixed_and_a_moving_series_of_one_study_make_a_pair() -> None:
    decision = decide(rule_set(), [a(), b()])

    assert decision.pairs == (Pair("r", "A", "B"),)
    assert decision.reasons == {}
    assert decision.look_again_at is None


def test_by_default_series_of_two_studies_make_no_pair() -> None:
    decision = decide(rule_set(), [a(), b(study="study-2")])

    assert made(decision) == []
    assert decision.reasons == {
        "A": "rule r: fits as fixed, but no series is there as moving",
        "B": "rule r: fits as moving, but no series is there as fixed",
    }


def test_the_positions_rule_pairs_across_studies() -> None:
    fixed = volume("A", Modality="MR", PatientPosition="HFS", study="study-1", frame="frame-1")
    moving = volume("B", Modality="MR", PatientPosition="HFDL", study="study-2", frame="frame-2")

    assert decide(POSITIONS, [moving, fixed]).pairs == (Pair("positions", "A", "B"),)


def test_a_series_that_no_rule_takes_has_the_conditions_and_values_as_reason() -> None:
    decision = decide(rule_set(), [a(), b(), volume("C", SeriesDescription="c")])

    assert decision.reasons == {
        "C": "no rule takes it: rule r: fixed needs SeriesDescription matches '^a', got 'c'; "
        "moving needs SeriesDescription matches '^b', got 'c'"
    }


def test_a_series_that_every_rule_is_not_for_has_their_gates_as_reason() -> None:
    decision = decide(POSITIONS, [volume("C")])

    assert decision.reasons == {"C": "no rule takes it: rule positions is for Modality 'MR', got 'CT'"}


def test_without_rules_that_is_the_reason() -> None:
    disabled = rule_set(enabled=False)

    assert decide(rules.load(None), [a()]).reasons == {"A": "no rules are in force"}
    assert decide(disabled, [a(), b()]).reasons == dict.fromkeys("AB", "no rules are in force")


def test_a_rule_that_is_not_for_a_modality_leaves_it_alone() -> None:
    decision = decide(rule_set(when={"Modality": "CT"}), [a(), b(Modality="MR")])

    assert made(decision) == []
    assert decision.reasons["B"] == "no rule takes it: rule r is for Modality 'CT', got 'MR'"


def test_what_is_excluded_fills_no_role_of_any_rule() -> None:
    localizer = b(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])

    decision = decide(rule_set(), [a(), localizer])

    assert made(decision) == []
    assert decision.reasons["B"].startswith("left out by defaults.exclude: ImageType any_of ['LOCALIZER'")
    assert made(decide(rule_set(defaults={"exclude": []}), [a(), localizer])) == [("A", "B")]


def test_what_does_not_meet_the_requirement_fills_no_role() -> None:
    needy = rule_set(defaults={"require": {"n_slices": {"min": 8}}})

    decision = decide(needy, [a(), b(shape=(7, 64, 64))])

    assert decision.reasons["B"] == "left out by defaults.require: n_slices min 8, got 7"


def test_the_fallback_is_taken_only_where_match_finds_nobody() -> None:
    falling = rule_set(roles__fixed__fallback={"SeriesDescription": "x"})
    other = volume("X", SeriesDescription="x")

    assert made(decide(falling, [other, b()])) == [("X", "B")]
    assert made(decide(falling, [other, a(), b()])) == [("A", "B")]


def test_one_of_several_rules_suffices_and_each_makes_its_own_pairs() -> None:
    one, two = rule_set(), rule_set(id="s", roles__fixed__match={"SeriesDescription": "c"})
    both = rules.parse(
        yaml.safe_dump({"version": 1, "rules": [yaml.safe_load(each.text)["rules"][0] for each in (one, two)]}), "2"
    )

    decision = decide(both, [a(), b(), volume("C", SeriesDescription="c")])

    assert decision.pairs == (Pair("r", "A", "B"), Pair("s", "C", "B"))


def test_a_reason_names_no_more_than_a_few_rules() -> None:
    rule = yaml.safe_load(rule_set().text)["rules"][0]
    many = [rule | {"id": f"r{n:02}"} for n in range(40)]

    reason = decide(rules.parse(yaml.safe_dump({"version": 1, "rules": many}), "m"), [volume("C")]).reasons["C"]

    assert reason.endswith(f"; {40 - reasons.MAX_CLAUSES} more")
    assert len(reason) < 2000


# ── choice ──


def test_the_best_score_wins_the_fixed_role() -> None:
    thin = rule_set(roles__fixed__prefer=[{"SliceThickness": {"max": 2}, "score": 1}])

    decision = decide(thin, [a("A1", SliceThickness=5.0), a("A2", SliceThickness=1.0), b()])

    assert made(decision) == [("A2", "B")]
    assert decision.reasons == {"A1": "rule r: fits as fixed, but the rule has its pair already, with fixed A2"}


def test_the_best_score_wins_the_moving_role() -> None:
    thin = rule_set(roles__moving__prefer=[{"SliceThickness": {"max": 2}, "score": -1}])

    assert made(decide(thin, [a(), b("B1", SliceThickness=1.0), b("B2", SliceThickness=3.0)])) == [("A", "B2")]


def test_a_tie_for_fixed_makes_no_pair_and_names_both() -> None:
    decision = decide(rule_set(), [a("A1"), a("A2"), b()])

    assert made(decision) == []
    assert decision.reasons == dict.fromkeys(
        ["A1", "A2", "B"], "rule r: a tie for fixed between series A1 and A2; no pair is made"
    )


def test_a_tie_for_moving_makes_no_pair_and_names_both() -> None:
    decision = decide(rule_set(), [a(), b("B1"), b("B2")])

    assert made(decision) == []
    assert decision.reasons["B2"] == "rule r: a tie for moving between series B1 and B2; no pair is made"


def test_what_is_better_the_same_decides_between_equals() -> None:
    soft = rule_set(pair__same_soft=["ConvolutionKernel"])
    series = [
        a(ConvolutionKernel="B30f"),
        b("B1", ConvolutionKernel="B70f"),
        b("B2", ConvolutionKernel="B30f"),
    ]

    assert made(decide(soft, series)) == [("A", "B2")]


def test_a_series_with_no_possible_partner_does_not_make_a_tie() -> None:
    near = rule_set(pair__same=["StudyInstanceUID", "FrameOfReferenceUID"])

    decision = decide(near, [a("A1"), a("A2", frame="frame-2"), b()])

    assert made(decision) == [("A1", "B")]
    assert "same FrameOfReferenceUID" not in decision.reasons["A2"]


def test_many_makes_one_pair_per_match() -> None:
    fan = rule_set(roles__moving__many=True)

    decision = decide(fan, [a(), b("B1"), b("B2"), b("B3")])

    assert made(decision) == [("A", "B1"), ("A", "B2"), ("A", "B3")]


def test_a_series_is_never_paired_with_itself() -> None:
    alike = rule_set(roles={"fixed": {"match": {"Modality": "CT"}}, "moving": {"match": {"Modality": "CT"}}})

    decision = decide(alike, [a()])

    assert made(decision) == []
    assert decision.reasons == {"A": "rule r: fits as fixed and moving, but no series is there as moving or fixed"}


def test_with_many_the_reference_itself_is_never_moved_and_what_moved_is_no_reference() -> None:
    alike = rule_set(
        roles={
            "fixed": {"match": {"Modality": "CT"}, "prefer": [{"SliceThickness": {"max": 1}, "score": 1}]},
            "moving": {"match": {"Modality": "CT"}, "many": True},
        }
    )

    decision = decide(alike, [a("A", SliceThickness=1.0), a("B"), a("C")])

    assert made(decision) == [("A", "B"), ("A", "C")]


def test_with_many_a_reference_is_not_moved_onto_another_fixed_series() -> None:
    fan = rule_set(
        roles={
            "fixed": {
                "match": {"SeriesDescription": {"matches": "^[ad]"}},
                "prefer": [{"SeriesDescription": "a", "score": 1}],
            },
            "moving": {"match": {"SeriesDescription": {"matches": "^[ab]"}}, "many": True},
        }
    )

    assert made(decide(fan, [a(), b(), volume("D", SeriesDescription="d")])) == [("A", "B")]


def test_with_many_a_moved_series_becomes_no_reference_of_one_that_does_not_fit_the_first() -> None:
    fan = rule_set(
        roles={
            "fixed": {
                "match": {"SeriesDescription": {"matches": "^[ab]"}},
                "prefer": [{"SeriesDescription": "a", "score": 1}],
            },
            "moving": {"match": {"SeriesDescription": {"matches": "^[bc]"}}, "many": True},
        },
        pair={"close": {"SliceThickness": 1}},
    )
    chain = [a(SliceThickness=1.0), b(SliceThickness=2.0), volume("C", SeriesDescription="c", SliceThickness=3.0)]

    decision = decide(fan, chain)

    assert made(decision) == [("A", "B")]
    assert "close SliceThickness: fixed 1, moving 3, 2 apart, at most 1" in decision.reasons["C"]


def test_a_late_phase_is_moved_onto_the_reference_of_the_others_even_where_a_better_one_came() -> None:
    fan = rule_set(roles__moving__many=True, roles__fixed__prefer=[{"SliceThickness": {"max": 2}, "score": 1}])
    before = [Pair("r", "A1", "B1")]

    decision = decide(fan, [a("A1"), a("A2", SliceThickness=1.0), b("B1"), b("B2")], existing=before)

    assert made(decision) == [("A1", "B2")]


def test_fewer_moving_series_than_asked_for_make_no_pair() -> None:
    fan = rule_set(roles__moving__many=True, ready={"min_moving": 2})

    decision = decide(fan, [a(), b("B1")])

    assert decision.reasons == dict.fromkeys(["A", "B1"], "rule r: 1 moving series for fixed A, min_moving is 2")
    assert made(decide(fan, [a(), b("B1"), b("B2")])) == [("A", "B1"), ("A", "B2")]


def test_each_study_has_its_own_pair() -> None:
    studies = [each for n in "123" for each in (a(f"A{n}", study=n), b(f"B{n}", study=n))]

    assert made(decide(rule_set(), studies)) == [("A1", "B1"), ("A2", "B2"), ("A3", "B3")]


def test_thirty_phases_of_one_series_make_twenty_nine_pairs_to_the_middle_one() -> None:
    dynamic = rule_set(
        split={"by": "auto"},
        roles={"fixed": {"match": {"phase": "middle"}}, "moving": {"match": {"phase": "others"}, "many": True}},
        pair={"same": ["SeriesInstanceUID"]},
    )
    one = volume("D")
    phases = [replace(one, volume_number=n, phase_index=n, phases=30) for n in range(30)]

    decision = decide(dynamic, phases)

    assert {(pair.fixed_series_instance_uid, pair.fixed_volume_number) for pair in decision.pairs} == {("D", 15)}
    assert sorted(pair.moving_volume_number for pair in decision.pairs) == [n for n in range(30) if n != 15]
    assert decide(dynamic, phases, existing=decision.pairs).pairs == ()
    assert dynamic.rules[0].plan(NOW).is_one_job


# ── between two series ──


@pytest.mark.parametrize(
    ("condition", "moving", "because"),
    [
        ({"same": ["StudyInstanceUID", "FrameOfReferenceUID"]}, {"frame": "other"}, "same FrameOfReferenceUID: fixed"),
        ({"same": ["StudyInstanceUID", "EchoTime"]}, {"EchoTime": 9.0}, "same EchoTime: fixed 5, moving 9"),
        ({"same": ["StudyInstanceUID", "KVP"]}, {}, "same KVP: fixed nothing, moving nothing"),
        (
            {"close": {"SliceThickness": 1.0}},
            {"SliceThickness": 5.0},
            "close SliceThickness: fixed 2.5, moving 5, 2.5 apart, at most 1",
        ),
        ({"close": {"SliceThickness": 1.0}}, {}, "close SliceThickness: fixed 2.5, moving nothing"),
        ({"overlap_mm": {"min": 80}}, {"first_slice_mm": 100.0}, "overlap_mm: 50.0, at least 80"),
        (
            {"overlap_mm": {"min": 80}},
            {"first_slice_mm": 900.0, "frame": "other"},
            "overlap_mm: 0.0, at least 80 (different Frames of Reference)",
        ),
        (
            {"close": {"orientation_deg": 15}},
            {"affine": (2, 0, 0, 0, 0, 0, 0.8, 0, 0, 0.8, 0, 0, 0, 0, 0, 1)},
            "close orientation_deg: 90.0, at most 15",
        ),
        ({}, {"patient_id": "P2"}, ""),
        ({}, {"birth_date": "19800101"}, "PatientBirthDate differs"),
        ({}, {"sex": "M"}, "PatientSex differs"),
    ],
)
def test_a_pair_that_does_not_fit_is_left_with_the_figures(
    condition: dict[str, Any], moving: dict[str, Any], because: str
) -> None:
    fixed = a(SliceThickness=2.5, EchoTime=5.0)

    decision = decide(rule_set(pair=condition), [fixed, b(**moving)])

    assert made(decision) == []
    assert because in decision.reasons["A"]
    assert because in decision.reasons["B"]
    assert not {"P1", "P2", "19700101", "19800101"} & set(" ".join(decision.reasons.values()).split())


@pytest.mark.parametrize(
    ("condition", "moving"),
    [
        ({"same": ["StudyInstanceUID", "EchoTime"]}, {"EchoTime": 5.0000001}),
        ({"close": {"SliceThickness": 1.0}}, {"SliceThickness": 3.5}),
        ({"overlap_mm": {"min": 50}}, {"first_slice_mm": 100.0}),
        ({"close": {"orientation_deg": 15}}, {"affine": (0, 0, -0.8, 0, 0, 0.8, 0, 0, -2.5, 0, 0, 0, 0, 0, 0, 1)}),
        ({}, {"birth_date": "", "sex": ""}),
        ({}, {"StudyDate": ""}),
    ],
)
def test_a_pair_that_just_fits_is_made(condition: dict[str, Any], moving: dict[str, Any]) -> None:
    fixed = a(SliceThickness=2.5, EchoTime=5.0)

    assert made(decide(rule_set(pair=condition), [fixed, b(**moving)])) == [("A", "B")]


def test_overlap_is_measured_along_the_fixed_volume_s_own_normal() -> None:
    sagittal = (2.0, 0, 0, 10, 0, 0, 0.5, 0, 0, 0.5, 0, 0, 0, 0, 0, 1)  # slices along x: 10 - 1 … 10 + 39
    fixed = volume("A", affine=sagittal, shape=(20, 100, 100))
    axial = volume("B", affine=(0, 0, 1, 0, 0, 1, 0, 0, 3, 0, 0, 0, 0, 0, 0, 1), shape=(30, 25, 25))

    assert partners.overlap_mm(Subject(fixed), Subject(axial)) == pytest.approx(
        24.5 - 9
    )  # x of the axial one: -0.5 … 24.5
    assert partners.overlap_mm(Subject(axial), Subject(fixed)) == pytest.approx(min(49.75, 88.5) + 0.25)
    assert partners.orientation_deg(Subject(fixed), Subject(axial)) == pytest.approx(90)


@pytest.mark.parametrize("other", [{"patient_id": "P2"}, {"issuer": "elsewhere"}])
def test_two_patients_are_told_apart_between_two_series_too(other: dict[str, str]) -> None:
    (rule,) = rule_set(pair={"same": ["StudyInstanceUID", "EchoTime"]}).rules

    assert partners.obstacles(rule, Subject(a()), Subject(b(**other))) == ["PatientID or IssuerOfPatientID differs"]


@pytest.mark.parametrize("other", [{"patient_id": "P2"}, {"issuer": "elsewhere"}])
def test_a_series_of_another_patient_does_not_even_make_a_tie(other: dict[str, str]) -> None:
    assert made(decide(rule_set(), [a("A1"), a("A2", **other), b()])) == [("A1", "B")]


@pytest.mark.parametrize(
    ("one", "other", "strict", "refused", "noted"),
    [
        ({}, {}, True, "", ""),
        ({"birth_date": "", "sex": ""}, {"birth_date": "", "sex": ""}, False, "", ""),
        ({"birth_date": "", "sex": ""}, {"birth_date": "", "sex": ""}, True, "PatientBirthDate is empty", ""),
        ({}, {"birth_date": " "}, False, "", "PatientBirthDate is empty on one side"),
        ({"sex": ""}, {}, False, "", "PatientSex is empty on one side"),
        ({"sex": ""}, {}, True, "PatientSex is empty, and strict_identity asks for it", ""),
        ({"issuer": "A"}, {"issuer": "A"}, True, "", ""),
        ({"issuer": "A"}, {}, False, "PatientID or IssuerOfPatientID differs", ""),
        ({"issuer": "A"}, {"birth_date": ""}, False, "PatientID or IssuerOfPatientID differs", "empty on one side"),
        ({}, {"patient_id": "P1 "}, True, "", ""),
        ({}, {"patient_id": "p1"}, False, "PatientID or IssuerOfPatientID differs", ""),
        ({"sex": "M"}, {"sex": "F"}, False, "PatientSex differs", ""),
    ],
)
def test_who_is_one_person(one: dict[str, str], other: dict[str, str], strict: bool, refused: str, noted: str) -> None:
    for first, second in ((a(**one), b(**other)), (a(**other), b(**one))):
        found = list(partners.identity(first, second, strict=strict))
        pair = {"same": ["StudyInstanceUID"], "strict_identity": strict}

        assert refused in "; ".join(each.text for each in found if not each.passed)
        assert all(each.passed for each in found) is (refused == "")
        assert noted in "; ".join(each.text for each in found if each.passed)
        assert made(decide(rule_set(pair=pair), [first, second])) == ([] if refused else [("A", "B")])


def test_an_empty_patient_id_is_never_taken_for_one_person() -> None:
    decision = decide(rule_set(), [a(patient_id=""), b(patient_id="")])

    assert made(decision) == []
    assert "PatientID is empty" in decision.reasons["A"]


@pytest.mark.parametrize(
    ("dates", "max_days", "pairs"),
    [
        (("20260301", "20260301"), 0, [("A", "B")]),
        (("20260228", "20260301"), 1, [("A", "B")]),
        (("20260301", "20260228"), 1, [("A", "B")]),
        (("20260228", "20260302"), 1, []),
        (("20251231", "20260101"), 1, [("A", "B")]),
        (("20260301", ""), 1, []),
        (("20261301", "20260301"), 1, []),
        (("2026.03.01", "20260301"), 0, [("A", "B")]),
    ],
)
def test_examinations_pair_only_within_the_days_allowed(
    dates: tuple[str, str], max_days: int, pairs: list[tuple[str, str]]
) -> None:
    across = rule_set(pair={"same": ["PatientID"], "max_days": max_days})
    fixed, moving = a(study="1", StudyDate=dates[0]), b(study="2", StudyDate=dates[1])

    assert made(decide(across, [fixed, moving])) == pairs


def test_a_study_without_a_date_says_that_other_studies_are_not_looked_at() -> None:
    across = rule_set(pair={"same": ["PatientID"]})

    reason = decide(across, [a(study="1"), b(study="2", StudyDate="")]).reasons["B"]

    assert reason.endswith("without a date of examination no other study is looked at")


def test_a_chain_of_days_does_not_carry_a_pair_beyond_the_days_allowed() -> None:
    across = rule_set(pair={"same": ["PatientID"]})
    chain = [a(study="1", StudyDate="20260301"), volume("C", study="2", StudyDate="20260302"),
             b(study="3", StudyDate="20260303")]  # fmt: skip

    decision = decide(across, chain)

    assert made(decision) == []
    assert "2 days apart, max_days 1" in decision.reasons["B"]


def test_the_day_is_the_acquisition_s_where_the_study_has_none() -> None:
    across = rule_set(pair={"same": ["PatientID"], "max_days": 0})
    fixed = a(study="1", StudyDate="", AcquisitionDate="20260302")

    assert made(decide(across, [fixed, b(study="2", StudyDate="20260302")])) == [("A", "B")]


def test_visits_far_apart_each_have_their_pair() -> None:
    across = rule_set(pair={"same": ["PatientID"]})
    visits = [
        each
        for month in ("01", "06")
        for each in (
            a(f"A{month}", study=f"1{month}", StudyDate=f"2026{month}10"),
            b(f"B{month}", study=f"2{month}", StudyDate=f"2026{month}11"),
        )
    ]

    assert made(decide(across, visits)) == [("A01", "B01"), ("A06", "B06")]


# ── waiting ──


def test_a_rule_waits_while_a_series_of_the_study_is_still_being_received() -> None:
    decision = decide(rule_set(), [a(), b()], receiving=[receiving("C")])

    assert made(decision) == []
    assert decision.reasons == dict.fromkeys("AB", "waiting: rule r: series C is still being received")
    assert decision.waiting == {"A", "B"}
    assert decision.look_again_at is None  # its completion brings the patient back, not the clock


def test_a_rule_within_a_study_does_not_wait_for_another_study() -> None:
    assert made(decide(rule_set(), [a(), b()], receiving=[receiving("C", study="2")])) == [("A", "B")]


def test_a_rule_across_studies_waits_for_every_study_of_the_patient() -> None:
    across = rule_set(pair={"same": ["PatientID"]})

    assert made(decide(across, [a(), b(study="2")], receiving=[receiving("C", study="3")])) == []


def test_what_no_rule_takes_does_not_wait() -> None:
    decision = decide(rule_set(), [volume("C")], receiving=[receiving("D")])

    assert decision.waiting == frozenset()
    assert decision.reasons["C"].startswith("no rule takes it")


def test_a_rule_s_own_quiet_period_counts_from_the_last_candidate() -> None:
    slow = rule_set(ready={"quiet_s": 90})
    fresh = b(last_received_at=NOW - timedelta(seconds=60))

    decision = decide(slow, [a(), fresh])

    assert made(decision) == []
    assert decision.look_again_at == NOW + timedelta(seconds=30)
    assert decision.reasons["A"] == "waiting: rule r: its 90 s of quiet last until 2026-03-01 12:00:30 UTC"
    later = pairing.pair(slow, [a(), fresh], quiet_period_s=30, now=NOW + timedelta(seconds=30))
    assert made(later) == [("A", "B")]


def test_without_its_own_a_rule_has_the_node_s_quiet_period() -> None:
    fresh = b(last_received_at=NOW - timedelta(seconds=20))

    assert decide(rule_set(), [a(), fresh], quiet_period_s=30).look_again_at == NOW + timedelta(seconds=10)
    assert made(decide(rule_set(), [a(), fresh], quiet_period_s=20)) == [("A", "B")]
    assert made(decide(rule_set(ready={"quiet_s": 5}), [a(), fresh], quiet_period_s=30)) == [("A", "B")]


def test_a_series_that_fills_no_role_does_not_hold_the_rule_up() -> None:
    fresh = volume("C", last_received_at=NOW)

    assert made(decide(rule_set(), [a(), b(), fresh])) == [("A", "B")]


def test_the_quiet_periods_of_enabled_rules_are_told() -> None:
    assert pairing.quiet_periods_s(rule_set(ready={"quiet_s": 90})) == [90.0]
    assert pairing.quiet_periods_s(rule_set(ready={"quiet_s": 90}, enabled=False)) == []
    assert pairing.quiet_periods_s(rule_set()) == []


# ── what stands ──


def test_a_pair_that_stands_is_not_made_again_and_its_series_need_no_reason() -> None:
    decision = decide(rule_set(), [a(), b()], existing=[Pair("r", "A", "B")])

    assert decision.pairs == ()
    assert decision.reasons == {}


def test_a_study_whose_pair_is_made_gets_no_second_one_from_a_late_series() -> None:
    decision = decide(rule_set(), [a(), b(), b("LATE")], existing=[Pair("r", "A", "B")])

    assert decision.pairs == ()
    assert decision.reasons == {"LATE": "rule r: fits as moving, but the rule has its pair already, with fixed A"}


def test_a_pair_of_another_rule_leaves_this_rule_free() -> None:
    assert made(decide(rule_set(), [a(), b()], existing=[Pair("other", "A", "B")])) == [("A", "B")]


# ── for any input ──

words = st.sampled_from(["a", "b", "a b", "c", ""])
volumes_of_anybody = st.builds(
    lambda uid, who, issuer, birth, sex, study, word, day, thickness, first, frame, age: volume(
        f"1.2.{uid}",
        patient_id=who,
        issuer=issuer,
        birth_date=birth,
        sex=sex,
        study=f"{study}",
        SeriesDescription=word,
        StudyDate=day,
        SliceThickness=thickness,
        first_slice_mm=first,
        frame=frame,
        last_received_at=NOW - timedelta(seconds=age),
    ),
    st.integers(1, 40),
    st.sampled_from(["P1", "P1 ", "P2", ""]),
    st.sampled_from(["", "X"]),
    st.sampled_from(["", "19700101", "19800101"]),
    st.sampled_from(["", "F", "M"]),
    st.integers(1, 3),
    words,
    st.sampled_from(["", "20260301", "20260302", "20260304"]),
    st.sampled_from([1.0, 3.0, 5.0]),
    st.sampled_from([0.0, 100.0]),
    st.sampled_from(["f", "g"]),
    st.sampled_from([10, 3600]),
)
candidates_of_anybody = st.lists(volumes_of_anybody, max_size=10, unique_by=lambda v: v.series_instance_uid)


@st.composite
def any_rules(draw: st.DrawFn) -> RuleSet:
    rules_in_file = []
    for n in range(draw(st.integers(1, 3))):
        within = draw(st.booleans())
        pair: dict[str, Any] = {"same": ["StudyInstanceUID"] if within else ["PatientID"]}
        if draw(st.booleans()):
            pair["overlap_mm"] = {"min": 60}
        if draw(st.booleans()):
            pair["same_soft"] = ["FrameOfReferenceUID"]
        prefer = [{"SliceThickness": {"max": 2}, "score": 2}, {"SliceThickness": {"max": 4}, "score": 1}]
        fixed, moving = draw(st.tuples(*[st.sampled_from(["a", "b", "a|b", "."])] * 2))
        rules_in_file.append(
            {
                "id": f"r{n}",
                "roles": {
                    "fixed": {"match": {"SeriesDescription": {"matches": fixed}}, "prefer": prefer},
                    "moving": {
                        "match": {"SeriesDescription": {"matches": moving}},
                        "prefer": prefer,
                        "fallback": {"SeriesDescription": "c"},
                        "many": draw(st.booleans()),
                    },
                },
                "pair": pair,
            }
        )
    return rules.parse(yaml.safe_dump({"version": 1, "rules": rules_in_file}), "any")


@settings(max_examples=150, deadline=None)
@given(any_rules(), candidates_of_anybody, st.randoms(use_true_random=False), st.integers(0, 10))
def test_for_any_rules_and_series(
    rules_in_force: RuleSet, candidates: list[VolumeRef], shuffler: random.Random, arrived: int
) -> None:
    """No pair joins two patients; order does not matter; a second run adds nothing; nobody is left without a word."""
    decision = decide(rules_in_force, candidates)

    known = {each.series_instance_uid: each for each in candidates}
    for pair in decision.pairs:
        fixed, moving = known[pair.fixed_series_instance_uid], known[pair.moving_series_instance_uid]
        assert fixed is not moving
        assert fixed.patient_id.strip() == moving.patient_id.strip() != ""
        assert fixed.issuer_of_patient_id == moving.issuer_of_patient_id
        assert len({fixed.patient_birth_date, moving.patient_birth_date} - {""}) <= 1
        assert len({fixed.patient_sex, moving.patient_sex} - {""}) <= 1
    by_rule_and_moving = [(pair.rule_id, pair.moving_series_instance_uid) for pair in decision.pairs]
    assert len(by_rule_and_moving) == len(set(by_rule_and_moving))

    paired = {uid for p in decision.pairs for uid in (p.fixed_series_instance_uid, p.moving_series_instance_uid)}
    assert set(decision.reasons) == known.keys() - paired
    assert all(decision.reasons.values())

    shuffled = list(candidates)
    shuffler.shuffle(shuffled)
    assert decide(rules_in_force, shuffled) == decision
    assert decide(rules_in_force, candidates, existing=decision.pairs).pairs == ()

    early = decide(rules_in_force, candidates[:arrived])
    late = decide(rules_in_force, candidates, existing=early.pairs)
    assert not set(early.pairs) & set(late.pairs)
    moved = [(pair.rule_id, pair.moving_series_instance_uid) for pair in (*early.pairs, *late.pairs)]
    assert len(moved) == len(set(moved))


# ── real series ──


@pytest.mark.data
@pytest.mark.skipif(not DATA.exists(), reason="../shared/data is not here")
def test_the_two_positions_of_the_real_head_make_one_pair_across_studies() -> None:
    held = []
    for name in ("siemens-mr-two-positions/HFDL_t1", "siemens-mr-two-positions/HFS_t1"):
        paths = sorted((DATA / name).glob("*.dcm"))
        described = volumes.describe(volumes.read_headers(paths), last_received_at=NOW - timedelta(hours=1))
        held += [volume for volume, _ in described.volumes]

    decision = decide(POSITIONS, held)

    assert made(decision) == [(held[1].series_instance_uid, held[0].series_instance_uid)]
    assert decision.reasons == {}
