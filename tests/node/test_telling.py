"""What `rules test`, `why` and `settle` say to a person: every series by its name, everything once."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import phantoms
import pytest
from held import Held
from volume_refs import NOW, volume

from dicomnode import cli, pairing, rules, trace
from dicomnode.account import account

SMALL: dict[str, Any] = {"shape": (8, 8, 8), "spacing_mm": (5.0, 4.0, 4.0), "study": "A", "patient_id": "A"}
RULES = """
version: 1
rules:
  - id: pre-post
    when: {Modality: CT}
    roles:
      fixed: {match: {contrast: false, n_slices: {min: 4}}, prefer: [{SliceThickness: {max: 2}, score: 3}]}
      moving: {match: {contrast: true}}
"""
TIED = RULES.replace("contrast: true", "Modality: CT").replace("contrast: false", "Modality: CT")


@pytest.fixture
def held(tmp_path: Path) -> Held:
    return Held(tmp_path / "node")


def ct(phase: str, number: int, text: str, **more: Any) -> list[Any]:
    header = {"SeriesNumber": number, "SeriesDescription": text, **more.pop("header", {})}
    return phantoms.make_series(phase=phase, header=header, **{**SMALL, **more})


def said(capsys: pytest.CaptureFixture[str], held: Held, *arguments: str, status: int = 0) -> str:
    assert cli.main([*arguments, "--config", str(held.config)]) == status
    answer = capsys.readouterr()
    return answer.err if status else answer.out


def test_series_are_told_by_number_description_and_slices(held: Held, capsys: pytest.CaptureFixture[str]) -> None:
    native, portal = ct("native", 2, "Abdomen nativ"), ct("portal", 3, "VEN_70s")
    held.put_rules(RULES)
    held.receive([*native, *portal])
    held.tick()
    names = f"{native[0].SeriesInstanceUID} (CT no. 2 'Abdomen nativ', 8 slices)"

    tried = said(capsys, held, "rules", "test")
    why = said(capsys, held, "why", str(portal[0].SeriesInstanceUID))
    told = json.loads(said(capsys, held, "why", str(portal[0].SeriesInstanceUID), "--json"))

    assert "pairs: 1, series in none: 0, not looked at: 0" in tried
    assert f"    fixed   {names}" in tried
    assert f"pair  fixed {names}  moving" in why
    assert "no  prefer +3: SliceThickness max 2, got 5" in tried  # what it would have been worth
    assert "yes match: all of" in tried
    assert told["volumes"][str(portal[0].SeriesInstanceUID)] == "CT no. 3 'VEN_70s', 8 slices"


def test_a_dry_run_names_what_was_received_and_is_no_volume(held: Held, capsys: pytest.CaptureFixture[str]) -> None:
    localizer = ct("native", 1, "Topogram", header={"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]})
    held.put_rules(RULES)
    held.receive([*ct("native", 2, "nativ"), *localizer])
    held.tick()

    tried = said(capsys, held, "rules", "test", "--brief")

    assert "not looked at: 1" in tried
    assert f"  {localizer[0].SeriesInstanceUID}: " in tried
    assert "a localizer, expected a volume" in tried


def test_a_dry_run_on_a_study_that_never_came_says_so(held: Held, capsys: pytest.CaptureFixture[str]) -> None:
    held.put_rules(RULES)

    assert "--study: got '1.2.3', expected the UID of a study that was received" in said(
        capsys, held, "rules", "test", "--study", "1.2.3", status=2
    )


def test_why_tells_notes_and_what_a_person_must_settle(held: Held, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = ct("native", 2, "nativ"), ct("native", 3, "nativ", seed=1)
    colour = ct("native", 2, "nativ", shape=(1, 8, 8))[0]
    colour.SeriesInstanceUID = one[0].SeriesInstanceUID
    colour.PhotometricInterpretation, colour.SamplesPerPixel = "RGB", 3
    held.put_rules(TIED)
    held.receive([*one, *other, colour])
    held.tick()

    why = said(capsys, held, "why", str(one[0].SeriesInstanceUID))
    waiting = said(capsys, held, "settle")

    assert "  left out: 1 images: RGB, expected monochrome" in why
    assert "settle it by `dicomnode settle 1 --fixed UID --moving UID` with" in why
    assert f"    --fixed {one[0].SeriesInstanceUID}  (CT no. 2 'nativ', 8 slices)" in waiting
    held.put_rules(RULES)
    held.tick()
    assert said(capsys, held, "settle") == "nothing waits for a person\n"


def test_why_of_a_refused_series_is_its_reason_alone(held: Held, capsys: pytest.CaptureFixture[str]) -> None:
    tilted = ct("native", 2, "tilted")
    for n, dataset in enumerate(tilted):
        dataset.ImagePositionPatient[1] += 2.0 * n
    held.put_rules(RULES)
    held.receive(tilted)
    held.tick()

    why = said(capsys, held, "why", str(tilted[0].SeriesInstanceUID))

    assert "expected at most 0.06 degrees" in why
    assert "last looked at" not in why


def test_why_of_any_phase_names_the_one_job_of_all_phases(held: Held, capsys: pytest.CaptureFixture[str]) -> None:
    text = RULES.replace("    roles", "    split: {by: study, min_phases: 3}\n    roles")
    text = text.replace("contrast: false, n_slices: {min: 4}", "phase: first").replace(
        "contrast: true}", "phase: others}, many: true"
    )
    phases = [ct("native", n, "dyn", seed=n, header={"AcquisitionTime": f"10000{n}"}) for n in range(3)]
    held.put_rules(text)
    held.receive([each for phase in phases for each in phase])
    held.tick()
    (job,) = held.index.status()["jobs"]

    for phase in phases:
        assert f"job {job['id']}" in said(capsys, held, "why", str(phase[0].SeriesInstanceUID))


def test_versions_that_are_the_same_are_said_to_be(held: Held, capsys: pytest.CaptureFixture[str]) -> None:
    held.put_rules(RULES)

    assert said(capsys, held, "rules", "diff") == "version 1 and version 1 are the same\n"


def test_what_is_the_same_of_several_volumes_of_one_series_is_told_once() -> None:
    echoes = [
        volume("dyn", Modality="MR", SeriesDescription="dyn", volume_number=n, volumes_in_series=30) for n in range(30)
    ]
    decision = pairing.pair(rules.parse(RULES, "r"), echoes, now=NOW)

    lines = list(trace.as_text(trace.as_json(decision.findings)))

    assert decision.reasons == {"dyn": "no rule takes it: rule pre-post is for Modality 'CT', got 'MR'"}
    assert lines == [
        "rule pre-post",
        "  left out by its when: dyn and 29 more volumes of it, to #29",
        "    no  Modality 'CT', got 'MR'",
    ]


def test_the_gate_of_a_rule_with_priors_hides_no_other_rule_s_reason() -> None:
    text = (
        RULES
        + """
  - id: to-prior
    when: {Modality: MR}
    roles: {fixed: {from: prior, match: {Modality: CT}}, moving: {match: {Modality: MR}}}
"""
    )
    decision = pairing.pair(rules.parse(text, "r"), [volume("pt", Modality="PT")], now=NOW)

    assert decision.reasons["pt"] == (
        "no rule takes it: rule pre-post is for Modality 'CT', got 'PT'; rule to-prior is for Modality 'MR', got 'PT'"
    )


def test_a_container_without_accounts_has_a_name_for_the_record(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 987654)

    assert account() == "account 987654"


def test_a_list_says_whose_each_rule_is_and_which_are_off(held: Held, capsys: pytest.CaptureFixture[str]) -> None:
    about = "\n    owner: Radiology\n    tags: [liver, study-7]\n    comment: Portal to native\n    enabled: false\n"
    held.put_rules(RULES.rstrip() + about)

    listed = said(capsys, held, "rules", "list")

    assert "  pre-post  disabled  normal" in listed
    assert listed.rstrip().endswith("owner Radiology  tags liver,study-7  Portal to native")
