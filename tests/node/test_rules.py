from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from volume_refs import volume

from dicomnode import conditions, rules
from dicomnode.conditions import Condition, Names
from dicomnode.derived import Subject, contrast, geometry
from dicomnode.document import ConfigProblemsError, ProblemError
from dicomnode.errors import ConfigError
from dicomnode.model import HeaderValue
from dicomnode.rule import OUTPUTS
from dicomnode.rules import RuleSet
from dicomnode.vocabulary import BUILT_IN, Vocabulary, tokens

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT.parent / "shared" / "docs" / "rules-example.yaml"

POSITIONS = """
version: 1
rules:
  - id: positions
    when: {Modality: MR}
    roles: {fixed: {match: {PatientPosition: HFS}}, moving: {match: {PatientPosition: HFDL}}}
    pair: {same: [PatientID]}
    register: {preset: balanced}
    outputs: [series, sro, dsr]
"""


def rule_with(**changes: object) -> str:
    """A file with one good rule, changed."""
    rule: dict[str, object] = {
        "id": "r",
        "roles": {"fixed": {"match": {"contrast": False}}, "moving": {"match": {"contrast": True}}},
    }
    return yaml.safe_dump({"version": 1, "rules": [rule | changes]}, sort_keys=False)


def problem(text: str) -> ConfigError:
    with pytest.raises(ConfigProblemsError) as caught:
        rules.parse(text, "rules.yaml")
    (found,) = caught.value.problems
    return found


def condition(text: str, expressions: dict[str, str] | None = None) -> Condition:
    return conditions.parse(yaml.safe_load(text), Names(expressions or {}, BUILT_IN))


def seen(uid: str, **header: Any) -> Subject:
    return Subject(volume(uid, **header))


def test_the_five_line_rule_is_read_as_it_stands() -> None:
    (rule,) = rules.parse(POSITIONS, "rules.yaml").rules

    assert (rule.id, rule.enabled, rule.store_in) == ("positions", True, "fixed_study")
    assert rule.pair.same == ("PatientID",)
    assert not rule.pair.is_within_study
    assert rule.pair.max_days == 1
    assert rule.outputs == ("series", "sro", "dsr")
    assert rule.preset("fast") == "balanced"
    assert not rule.roles.moving.many


def test_what_a_rule_leaves_out_has_its_default() -> None:
    (rule,) = rules.parse(rule_with(), "rules.yaml").rules

    assert rule.pair.same == ("StudyInstanceUID",)
    assert rule.outputs == OUTPUTS
    assert rule.preset("fast") == "fast"
    assert rule.quiet_s(30.0) == 30.0
    assert not rule.registration.affine_sro


def test_a_rule_s_own_quiet_period_overrides_the_node_s() -> None:
    (rule,) = rules.parse(rule_with(ready={"quiet_s": 0}), "rules.yaml").rules

    assert rule.quiet_s(30.0) == 0.0


def test_same_content_is_the_same_version_whatever_comments_and_order_of_keys() -> None:
    one = rules.parse(POSITIONS, "a.yaml")
    other = rules.parse(
        "# a comment\nrules:\n- {outputs: [series, sro, dsr], register: {preset: balanced}, id: positions,\n"
        "   pair: {same: [PatientID]}, when: {Modality: MR}, roles: {moving: {match: {PatientPosition: HFDL}},\n"
        "   fixed: {match: {PatientPosition: HFS}}}}\nversion: 1\n",
        "b.yaml",
    )
    changed = rules.parse(POSITIONS.replace("HFDL", "HFDR"), "c.yaml")

    assert one == other
    assert one.sha256 != changed.sha256
    assert rules.parse(one.text, "from the database") == one


def test_a_rule_is_found_by_its_id() -> None:
    rule_set = rules.parse(POSITIONS, "rules.yaml")

    assert rule_set.rule("positions") is rule_set.rules[0]
    with pytest.raises(KeyError):
        rule_set.rule("other")


def test_without_a_rules_file_no_rule_is_in_force() -> None:
    assert rules.load(None).rules == ()


def test_the_shipped_example_loads_with_every_rule_enabled() -> None:
    rule_set = rules.load(ROOT / "deploy" / "rules.yaml")

    assert [rule.id for rule in rule_set.enabled] == [
        "ct-pre-post",
        "ct-liver-multiphase",
        "mr-liver-dce",
        "pelvis-mr-to-prior-ct",
        "pelvis-prior-mr-to-ct",
        "brain-t1-t2-flair",
    ]


def test_the_positions_rule_in_the_shipped_example_works_once_its_marks_are_removed() -> None:
    lines = (ROOT / "deploy" / "rules.yaml").read_text().splitlines()
    start = next(n for n, line in enumerate(lines) if "# - id: positions" in line)

    shipped = rules.parse("\n".join(lines[:start] + [line.replace("# ", "", 1) for line in lines[start:]]), "r.yaml")

    assert shipped.rule("positions") == rules.parse(POSITIONS, "p.yaml").rules[0]


@pytest.mark.data
@pytest.mark.skipif(not EXAMPLE.exists(), reason="../shared/docs is not here")
def test_the_worked_rules_load() -> None:
    worked = yaml.safe_load(EXAMPLE.read_text())

    loaded = rules.parse(yaml.safe_dump(worked), "r.yaml")

    assert [rule.id for rule in loaded.rules] == [rule["id"] for rule in worked["rules"]]
    assert loaded.rule("mr-to-prior-ct").pair.same == ("PatientID",)


@pytest.mark.parametrize(
    ("changes", "key", "got", "expected"),
    [
        ({"id": "a b"}, "rules[0](a b).id", "a b", "text that matches"),
        ({"whem": {"Modality": "CT"}}, "rules[0](r).whem", "whem", "did you mean 'when'?"),
        ({"when": {"Modalty": "CT"}}, "rules[0](r).when.Modalty", "Modalty", "did you mean 'Modality'?"),
        ({"when": {"modality": "CT"}}, "rules[0](r).when.modality", "modality", "did you mean 'Modality'?"),
        ({"when": {"contrst": True}}, "rules[0](r).when.contrst", "contrst", "did you mean 'contrast'?"),
        ({"when": {"StudyID": 42}}, "rules[0](r).when.StudyID", 42, "quotes"),
        ({"when": {"Modality": False}}, "rules[0](r).when.Modality", False, "quotes"),
        ({"when": {"SliceThickness": "thin"}}, "rules[0](r).when.SliceThickness", "thin", "a number"),
        ({"when": {"Modality": {"min": 2}}}, "rules[0](r).when.Modality.min", "min", "has none"),
        ({"when": {"EchoTime": {"matches": "9"}}}, "rules[0](r).when.EchoTime.matches", "matches", "has none"),
        ({"when": {"EchoTime": {"max": "9"}}}, "rules[0](r).when.EchoTime.max", "9", "a number"),
        ({"when": {"EchoTime": {"mx": 9}}}, "rules[0](r).when.EchoTime.mx", "mx", "did you mean 'max'?"),
        ({"when": {"EchoTime": {}}}, "rules[0](r).when.EchoTime", "a mapping", "a value or one of"),
        ({"when": {}}, "rules[0](r).when", "a mapping", "at least one condition"),
        ({"when": {"any": []}}, "rules[0](r).when.any", "a list", "at least one"),
        ({"when": {"any": [{}]}}, "rules[0](r).when.any[0]", "a mapping", "at least one"),
        ({"when": {"not": {"Modalitty": "MR"}}}, "rules[0](r).when.not.Modalitty", "Modalitty", "did you mean"),
        ({"when": {"Modality": {"any_of": "CT"}}}, "rules[0](r).when.Modality.any_of", "CT", "a list"),
        ({"when": {"Modality": {"any_of": ["CT", 3]}}}, "rules[0](r).when.Modality.any_of[1]", 3, "quotes"),
        ({"when": {"Modality": {"exists": "yes"}}}, "rules[0](r).when.Modality.exists", "yes", "true or false"),
        ({"when": {"StudyID": {"matches": "(a"}}}, "rules[0](r).when.StudyID.matches", "(a", "RE2"),
        ({"when": {"StudyID": {"matches": "(?=a)"}}}, "rules[0](r).when.StudyID.matches", "(?=a)", "RE2"),
        ({"when": {"StudyID": {"matches": "$art"}}}, "rules[0](r).when.StudyID.matches", "$art", "vocabulary (none)"),
        ({"when": {"PixelData": "x"}}, "rules[0](r).when.PixelData", "PixelData", "plain values"),
        (
            {"when": {"SourceImageSequence": "x"}},
            "rules[0](r).when.SourceImageSequence",
            "SourceImageSequence",
            "plain",
        ),
        ({"when": {"contrast": "yes"}}, "rules[0](r).when.contrast", "yes", "true or false"),
        ({"when": {"geometry": "skewed"}}, "rules[0](r).when.geometry", "skewed", "regular"),
        ({"when": {"phase": "midle"}}, "rules[0](r).when.phase", "midle", "did you mean 'middle'?"),
        ({"when": {"phase": True}}, "rules[0](r).when.phase", True, "a number"),
        ({"when": {"orientation": "axia"}}, "rules[0](r).when.orientation", "axia", "did you mean 'axial'?"),
        ({"when": {"order": {"pick": 1}}}, "rules[0](r).when.order", "order", "see order beside match"),
        ({"when": {"overlap_mm": {"min": 1}}}, "rules[0](r).when.overlap_mm", "overlap_mm", "see pair.overlap_mm"),
        (
            {"when": {"StudyID": {"means": "nativ"}}},
            "rules[0](r).when.StudyID.means",
            "nativ",
            "did you mean 'native'?",
        ),
        ({"when": {"EchoTime": {"means": "t1"}}}, "rules[0](r).when.EchoTime.means", "means", "has none"),
        ({"when": {"StudyID": {"matches": "$t1"}}}, "rules[0](r).when.StudyID.matches", "$t1", "write means: t1"),
        ({"split": {"by": "phase"}}, "rules[0](r).split.by", "phase", "'auto', 'series' or 'study'"),
        ({"split": {"min_phases": 1}}, "rules[0](r).split.min_phases", 1, "greater than or equal to 2"),
        ({"priors": {}}, "rules[0](r).priors", "priors", "a role with from: prior"),
        ({"priority": "urgnt"}, "rules[0](r).priority", "urgnt", "'urgent', 'normal' or 'off-peak'"),
        ({"schedule": {"from": "25:00"}}, "rules[0](r).schedule.from", "25:00", "text that matches"),
        ({"schedule": {"days": ["monday"]}}, "rules[0](r).schedule.days[0]", "monday", "'mon'"),
        ({"store_in": "elsewhere"}, "rules[0](r).store_in", "elsewhere", "fixed_study"),
        ({"outputs": ["series", "seg"]}, "rules[0](r).outputs[1]", "seg", "one of series, sro, dsr"),
        ({"series": {"resolution": "fine"}}, "rules[0](r).series.resolution", "fine", "'fixed' or 'moving'"),
        ({"series": {"description": "REG {other}"}}, "rules[0](r).series.description", "REG {other}", "only {moving}"),
        ({"series": {"description": "a\\b"}}, "rules[0](r).series.description", "a\\b", "without backslash"),
        ({"series": {"description": " "}}, "rules[0](r).series.description", " ", "1 to 64 characters"),
        ({"outputs": ["sro", "sro"]}, "rules[0](r).outputs[1]", "sro", "each once"),
        ({"outputs": ["sro", "blending"]}, "rules[0](r).outputs", "blending", "series among them"),
        ({"outputs": ["series", "uptake"]}, "rules[0](r).outputs", "uptake", "split in the rule"),
        ({"outputs": []}, "rules[0](r).outputs", "a list", "at least one of series, sro, dsr"),
        ({"register": {"preset": "balance"}}, "rules[0](r).register.preset", "balance", "did you mean 'balanced'?"),
        ({"register": {"groupwise": True}}, "rules[0](r).register.groupwise", True, "False"),
        ({"register": {"prset": "fast"}}, "rules[0](r).register.prset", "prset", "did you mean 'preset'?"),
        ({"ready": {"quiet_s": -1}}, "rules[0](r).ready.quiet_s", -1, "greater than or equal to 0"),
        ({"ready": {"roles": ["fixd"]}}, "rules[0](r).ready.roles[0]", "fixd", "'fixed'"),
        ({"ready": {"deadline_s": 0}}, "rules[0](r).ready.deadline_s", 0, "greater than 0"),
        ({"ready": {"at_deadline": "go"}}, "rules[0](r).ready.at_deadline", "go", "'pair', 'leave' or 'ask'"),
        ({"register": {"parameters": {"voxel": 9}}}, "rules[0](r).register.parameters.voxel", "voxel", "'voxels'?"),
        ({"register": {"parameters": {"voxels": 9}}}, "rules[0](r).register.parameters.voxels", 9, "1000 to"),
        ({"outputs": ["series_4d"]}, "rules[0](r).outputs", "series_4d", "needs phases"),
        ({"exclude": [{"Modalty": "CT"}]}, "rules[0](r).exclude[0].Modalty", "Modalty", "did you mean"),
        ({"pair": {"same": ["StudyUID"]}}, "rules[0](r).pair.same[0]", "StudyUID", "did you mean"),
        ({"pair": {"close": {"Modality": 1}}}, "rules[0](r).pair.close.Modality", "Modality", "numbers"),
        ({"pair": {"close": {"SliceThicknes": 1}}}, "rules[0](r).pair.close.SliceThicknes", "SliceThicknes", "did you"),
        ({"pair": {"close": {"SliceThickness": -1}}}, "rules[0](r).pair.close.SliceThickness", -1, "greater"),
        ({"pair": {"overlap_mm": 80}}, "rules[0](r).pair.overlap_mm", 80, "a mapping"),
        ({"pair": {"max_days": -1}}, "rules[0](r).pair.max_days", -1, "greater"),
        ({"roles": {"fixed": {"match": {"contrast": True}}}}, "rules[0](r).roles.moving", "nothing", "required"),
        ({"enabled": "no"}, "rules[0](r).enabled", "no", "true or false"),
    ],
)
def test_a_bad_rule_is_refused_by_rule_key_got_and_expected(
    changes: dict[str, object], key: str, got: object, expected: str
) -> None:
    found = problem(rule_with(**changes))

    assert (found.key, found.got) == (key, got)
    assert expected in found.expected


def test_two_roles_from_a_prior_are_refused() -> None:
    roles = {name: {"match": {"contrast": True}, "from": "prior"} for name in ("fixed", "moving")}

    assert problem(rule_with(roles=roles)).key == "rules[0](r).roles.moving.from"


def test_a_rule_with_a_prior_does_not_ask_for_one_study() -> None:
    roles = {"fixed": {"match": {"contrast": True}, "from": "prior"}, "moving": {"match": {"contrast": False}}}

    (rule,) = rules.parse(rule_with(roles=roles), "r.yaml").rules

    assert not rule.pair.is_within_study
    assert problem(rule_with(roles=roles, pair={"same": ["StudyInstanceUID"]})).key == "rules[0](r).pair.same"


def test_many_fixed_are_refused() -> None:
    roles = {"fixed": {"match": {"contrast": True}, "many": True}, "moving": {"match": {"contrast": False}}}

    assert "many on moving only" in problem(rule_with(roles=roles)).expected


@pytest.mark.parametrize("order", [{}, {"pick": "tenth"}, {"by": "size", "pick": 1}, {"pick": -2}, "second"])
def test_an_order_says_by_what_and_which(order: object) -> None:
    roles = {"fixed": {"match": {"contrast": True, "order": order}}, "moving": {"match": {"contrast": False}}}

    assert problem(rule_with(roles=roles)).key.startswith("rules[0](r).roles.fixed.match.order")


@pytest.mark.parametrize("prefer", [{"contrast": True}, {"contrast": True, "score": "high"}, {"score": 1}, 3])
def test_a_preference_needs_a_condition_and_a_number(prefer: object) -> None:
    roles = {"fixed": {"match": {"contrast": True}, "prefer": [prefer]}, "moving": {"match": {"contrast": False}}}

    assert problem(rule_with(roles=roles)).key == "rules[0](r).roles.fixed.prefer[0]"


def test_a_mistake_is_told_with_its_line() -> None:
    found = problem(POSITIONS.replace("PatientPosition: HFDL", "PatientPositin: HFDL"))

    assert found.file == "rules.yaml:6"
    assert "did you mean 'PatientPosition'?" in found.expected


def test_every_mistake_is_told_and_no_rule_of_the_file_is_used() -> None:
    text = POSITIONS.replace("balanced", "best").replace("HFDL", "1").replace("dsr", "rsd")
    text = text.replace(
        "when: {Modality: MR}", "when: {Modalty: MR, Rows: {mni: 1, maks: 2}, any: [{Rowz: 1}, {Colums: 2}]}"
    )
    text += "vocab: {one: '(', two: ['-']}\n"

    with pytest.raises(ConfigProblemsError) as caught:
        rules.parse(text, "rules.yaml")

    assert {each.key.split(".", 1)[1] for each in caught.value.problems} == {
        "when.Modalty",
        "when.Rows.mni",
        "when.Rows.maks",
        "when.any[0].Rowz",
        "when.any[1].Colums",
        "one",
        "two[0]",
        "roles.moving.match.PatientPosition",
        "register.preset",
        "outputs[2]",
    }


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("version: 2\nrules: []", "version"),
        ("rules: []", "version"),
        ("version: 1", "rules"),
        ("version: 1\nrules: {}", "rules"),
        ("version: 1\nrules: []\nvocab: {a: '('}", "vocab.a"),
        ("version: 1\nrules: []\nvocab: [a]", "vocab"),
        ("version: 1\nrules: []\ndefaults: {exclude: [{ImageTyp: {any_of: [MPR]}}]}", "defaults.exclude[0].ImageTyp"),
        ("version: 1\nrules: []\ndefaults: {require: {n_slice: 3}}", "defaults.require.n_slice"),
    ],
)
def test_a_bad_file_is_refused(text: str, key: str) -> None:
    assert problem(text).key == key


def test_two_rules_of_one_id_are_refused() -> None:
    rule = yaml.safe_load(POSITIONS)["rules"][0]

    found = problem(yaml.safe_dump({"version": 1, "rules": [rule, rule]}))

    assert found.key == "rules[1](positions).id"


def test_conditions_nested_beyond_reason_are_refused_without_a_traceback() -> None:
    text = "version: 1\nrules: [{id: r, when: " + "{not: " * 4000 + "{Modality: CT}" + "}" * 4000 + "}]"

    with pytest.raises(ConfigError):
        rules.parse(text, "rules.yaml")


@pytest.mark.parametrize(
    ("text", "header", "expected"),
    [
        ("StationName: CT1", {"StationName": "CT1"}, True),
        ("StationName: CT1", {"StationName": " CT1 "}, True),
        ("StationName: CT1", {"StationName": "ct1"}, False),
        ("StationName: CT1", {}, False),
        ("StationName: null", {}, True),
        ("StationName: null", {"StationName": "  "}, True),
        ("StationName: null", {"StationName": "CT1"}, False),
        ("SliceThickness: 2.5", {"SliceThickness": 2.5}, True),
        ("SliceThickness: 2.5", {"SliceThickness": "2.50 "}, True),
        ("SliceThickness: 2", {"SliceThickness": 2.0}, True),
        ("SliceThickness: 2", {"SliceThickness": 2.001}, False),
        ("SliceThickness: 2", {"SliceThickness": "two"}, False),
        ("ImageType: {any_of: [LOCALIZER, MPR]}", {"ImageType": ["DERIVED", "SECONDARY", "MPR"]}, True),
        ("ImageType: {any_of: [LOCALIZER, MPR]}", {"ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"]}, False),
        ("ImageType: {none_of: [LOCALIZER, MPR]}", {"ImageType": ["ORIGINAL", "PRIMARY", "MPR"]}, False),
        ("ImageType: {none_of: [LOCALIZER, MPR]}", {"ImageType": ["ORIGINAL", "PRIMARY"]}, True),
        ("ImageType: {none_of: [LOCALIZER]}", {}, True),
        ("BodyPartExamined: {any_of: [HEAD, null]}", {}, True),
        ("BodyPartExamined: {any_of: [HEAD, null]}", {"BodyPartExamined": ""}, True),
        ("BodyPartExamined: {any_of: [HEAD, null]}", {"BodyPartExamined": "KNEE"}, False),
        ("BodyPartExamined: {none_of: [null]}", {}, False),
        ("BodyPartExamined: {matches: '(?i)brain|^$'}", {}, True),
        ("BodyPartExamined: {matches: '(?i)brain|^$'}", {"BodyPartExamined": "Brain"}, True),
        ("BodyPartExamined: {matches: brain}", {"BodyPartExamined": "BRAIN"}, False),
        ("EchoTime: {min: 70}", {"EchoTime": 70}, True),
        ("EchoTime: {min: 70}", {"EchoTime": 69.9}, False),
        ("EchoTime: {min: 70}", {}, False),
        ("EchoTime: {max: 30, min: 10}", {"EchoTime": 20.0}, True),
        ("EchoTime: {max: 30, min: 10}", {"EchoTime": 5.0}, False),
        ("EchoTime: {max: 30}", {"EchoTime": float("nan")}, False),
        ("PixelSpacing: {max: 0.9}", {"PixelSpacing": [0.8, 1.2]}, True),
        ("KVP: {exists: true}", {"KVP": 120.0}, True),
        ("KVP: {exists: true}", {"KVP": ""}, False),
        ("KVP: {exists: false}", {}, True),
        ("n_slices: {min: 60}", {}, True),
        ("n_slices: {min: 61}", {}, False),
        ("n_slices: 60", {}, True),
        ("geometry: regular", {}, True),
        ("{StationName: A, KVP: 120}", {"StationName": "A", "KVP": 120.0}, True),
        ("{StationName: A, KVP: 120}", {"StationName": "A", "KVP": 100.0}, False),
        ("any: [{StationName: A}, {KVP: 120}]", {"KVP": 120.0}, True),
        ("any: [{StationName: A}, {KVP: 120}]", {"KVP": 100.0}, False),
        ("all: [{StationName: A}, {KVP: 120}]", {"KVP": 120.0}, False),
        ("not: {StationName: A}", {"StationName": "B"}, True),
        ("not: {StationName: A, KVP: 120}", {"StationName": "A", "KVP": 100.0}, True),
        ("not: {any: [{StationName: A}, {KVP: 120}]}", {"StationName": "A"}, False),
    ],
)
def test_conditions_hold_as_their_words_say(text: str, header: dict[str, HeaderValue], expected: bool) -> None:
    assert condition(text).check(seen("1", **header)).passed is expected


@pytest.mark.parametrize("written", ["Verzögerung", "VERZOGERUNG", "verzoegerung_3mm", "Verzo\u0308gerung"])
def test_umlauts_are_read_with_dots_without_and_as_two_letters(written: str) -> None:
    assert "delayed" in Vocabulary({"delayed": ["verzögerung"]}).read(written)


def test_a_name_of_the_vocabulary_stands_for_its_expression() -> None:
    native = condition("SeriesDescription: {matches: $native}", {"native": "(?i)nativ"})

    assert native.check(seen("1", SeriesDescription="Abdomen NATIV")).passed
    assert str(native) == "SeriesDescription matches $native"
    with pytest.raises(ProblemError, match=r"vocabulary \(native\); did you mean 'native'"):
        condition("SeriesDescription: {matches: $nativ}", {"native": "x"})


def test_what_the_volume_says_of_itself_wins_over_its_header() -> None:
    refined = condition("{Modality: MR, PatientID: P1}")

    assert refined.check(seen("1", Modality="MR", PatientID="somebody else")).passed


@pytest.mark.parametrize(
    ("text", "header", "expected"),
    [
        ("SliceThickness: {max: 3}", {"SliceThickness": 5.0}, "SliceThickness max 3, got 5.0"),
        ("Modality: MR", {}, "Modality 'MR', got 'CT'"),
        ("KVP: {exists: true}", {}, "KVP exists true, got nothing"),
        (
            "{Modality: CT, SliceThickness: {max: 3}, KVP: 120}",
            {"SliceThickness": 5.0, "KVP": 100.0},
            "SliceThickness max 3, got 5.0; KVP 120, got 100.0",
        ),
        ("any: [{KVP: 120}, {KVP: 80}]", {"KVP": 100.0}, "KVP 120, got 100.0 or KVP 80, got 100.0"),
        ("any: [{KVP: 120}, {KVP: 100}]", {"KVP": 100.0}, "KVP 100, got 100.0"),
        ("not: {KVP: 100}", {"KVP": 100.0}, "not (KVP 100, got 100.0)"),
        (
            "ImageType: {any_of: [MPR, null]}",
            {"ImageType": ["A", "B"]},
            "ImageType any_of ['MPR', null], got ['A', 'B']",
        ),
        (
            "contrast: false",
            {"ContrastBolusAgent": "Iomeron"},
            "contrast false, got true (ContrastBolusAgent 'Iomeron' +1)",
        ),
    ],
)
def test_a_check_tells_the_condition_and_the_value_seen(
    text: str, header: dict[str, HeaderValue], expected: str
) -> None:
    assert str(condition(text).check(seen("1", **header))) == expected


def test_a_check_never_repeats_what_is_the_patient_s() -> None:
    check = condition("{PatientName: {matches: phantom}, PatientBirthDate: '20000101'}").check(
        seen("1", PatientName="Doe^Jane", birth_date="19700102")
    )

    assert not check.passed
    assert "Doe" not in str(check)
    assert "1970" not in str(check)
    assert [part.seen for part in check.parts] == ["another value (not repeated here)"] * 2


def test_every_part_of_a_trace_stands_with_its_value_and_result() -> None:
    check = condition("{KVP: 120, any: [{StationName: A}, {StationName: B}]}").check(
        seen("1", KVP=120.0, StationName="B")
    )

    leaves = [check.parts[0], *check.parts[1].parts]
    assert [(str(leaf.condition), leaf.seen, leaf.passed) for leaf in leaves] == [
        ("KVP 120", "120.0", True),
        ("StationName 'A'", "'B'", False),
        ("StationName 'B'", "'B'", True),
    ]


def test_no_expression_can_stall_the_node() -> None:
    hostile = condition("SeriesDescription: {matches: '^(a+)+$'}")
    started = time.perf_counter()

    assert not hostile.check(seen("1", SeriesDescription="a" * 5000 + "!")).passed
    assert time.perf_counter() - started < 1


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ({}, False),
        ({"ContrastBolusAgent": "Iomeron 400"}, True),
        ({"ContrastBolusAgent": "NONE"}, False),
        ({"ContrastBolusAgent": "N/A"}, False),
        ({"SeriesDescription": "Abdomen 5.0"}, False),
        ({"SeriesDescription": "ABD_ART_3mm"}, True),
        ({"SeriesDescription": "VEN_70s"}, True),
        ({"SeriesDescription": "Art30s"}, True),
        ({"SeriesDescription": "Pre_Contrast"}, False),
        ({"SeriesDescription": "T1 post contrast"}, True),
        ({"SeriesDescription": "T1 tra +C"}, True),
        ({"SeriesDescription": "late arterial"}, True),
        ({"SeriesDescription": "artefact scan"}, False),
        # The scanner names the agent for the native scan too.
        ({"ContrastBolusAgent": "Iomeron", "SeriesDescription": "nativ"}, False),
        ({"ContrastBolusAgent": "Iomeron", "SeriesDescription": "ABD W/O"}, False),
        ({"ContrastBolusAgent": "Iomeron", "SeriesDescription": "Pre_Contrast"}, False),
        ({"ContrastBolusAgent": "Iomeron", "SeriesDescription": "without contrast"}, False),
        ({"ContrastBolusAgent": "Iomeron", "SeriesDescription": "sans injection"}, False),
        ({"ContrastBolusAgent": "Iomeron", "ContrastBolusVolume": 100.0, "SeriesDescription": "non-contrast"}, False),
        ({"ContrastBolusAgent": "Iomeron", "ContrastBolusStartTime": "101500", "AcquisitionTime": "101000"}, False),
        ({"ContrastBolusAgent": "Iomeron", "ContrastBolusStartTime": "101500", "AcquisitionTime": "101530.5"}, True),
        ({"ContrastBolusAgent": "Iomeron", "ContrastBolusStartTime": "235950", "AcquisitionTime": "000030"}, True),
        ({"ContrastBolusVolume": 0.0}, False),
        # It says nothing of both kinds, or of neither: the elements decide.
        ({"ContrastBolusAgent": "Iomeron", "SeriesDescription": "LIVER W WO CONTRAST"}, True),
        ({"ContrastBolusAgent": "Gadovist", "SeriesDescription": "head post op"}, True),
        ({"SeriesDescription": "native to arterial"}, False),
        ({"ImageComments": "portal venous phase", "ContrastBolusVolume": "90"}, True),
    ],
)
def test_contrast_is_decided_by_vote(header: dict[str, HeaderValue], expected: bool) -> None:
    observed = contrast(seen("1", **header))

    assert observed.values == (expected,), observed.evidence


def test_an_undecided_vote_is_neither_true_nor_false() -> None:
    undecided = seen("1", ProtocolName="arterial")

    checks = [condition(f"contrast: {word}").check(undecided) for word in ("true", "false")]

    assert [check.passed for check in checks] == [False, False]
    assert "undecided: ContrastBolusAgent empty -1, ProtocolName 'arterial' +1" in checks[0].seen


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ABD_ART_3mm", ["abd", "art", "3", "mm"]),
        ("Spätphase 5,0/B30f", ["spätphase", "5", "0", "b", "30", "f"]),
        ("", []),
        ("__--  ", []),
    ],
)
def test_tokens_split_at_all_but_letters_and_digits_and_between_them(text: str, expected: list[str]) -> None:
    assert tokens(text) == expected


@pytest.mark.parametrize(
    ("affine", "expected"),
    [
        ((0, 0, 1, 0, 0, 1, 0, 0, 2, 0, 0, 0, 0, 0, 0, 1), "regular"),
        ((0, 0, 1, 0, 0.2, 1, 0, 0, 2, 0, 0, 0, 0, 0, 0, 1), "sheared"),
        ((0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1), "degenerate"),
        ((0, 0, float("nan"), 0, 0, 1, 0, 0, 2, 0, 0, 0, 0, 0, 0, 1), "degenerate"),
    ],
)
def test_geometry_is_regular_only_at_right_angles(affine: tuple[float, ...], expected: str) -> None:
    assert geometry(seen("1", affine=affine)).values == (expected,)


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ({"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}, True),
        ({"ImageType": ["DERIVED", "SECONDARY", "REFORMATTED"]}, True),
        ({"ImageType": ["DERIVED", "PRIMARY", "DIXON"]}, False),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"]}, False),
        ({"SeriesDescription": "Topogram 0.6"}, True),
        ({"SeriesDescription": "ABD_MIP_5"}, True),
        ({"SeriesDescription": "Dose Report"}, True),
        ({"SeriesDescription": "thorax mipsen-study"}, False),
    ],
)
def test_without_a_word_on_it_no_rule_takes_what_is_no_plain_acquisition(
    header: dict[str, HeaderValue], expected: bool
) -> None:
    rule_set: RuleSet = rules.parse(POSITIONS, "rules.yaml")

    assert any(each.check(seen("1", **header)).passed for each in rule_set.exclude) is expected
