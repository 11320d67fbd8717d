from __future__ import annotations

import json
import math
import re
from dataclasses import fields
from pathlib import Path

import pytest
from hand_made import make_figures

from dicomnode import rules
from dicomnode.errors import ConfigError
from dicomnode.model import Verdict
from dicomnode.quality import Figures
from dicomnode.thresholds import AT_LEAST, Limits, Thresholds
from dicomnode.verdict import judge, of_all

RULE = """
version: 1
rules:
  - id: r
    roles: {fixed: {match: {contrast: false}}, moving: {match: {contrast: true}}}
    verdict: %s
"""


def thresholds(text: str) -> Thresholds:
    return rules.parse(RULE % text, "rules").rule("r").verdict


def test_good_figures_are_accepted_without_a_word() -> None:
    assert judge(make_figures(), Thresholds()) == (Verdict.ACCEPT, "")


@pytest.mark.parametrize(
    ("change", "verdict", "reason"),
    [
        ({"similarity_after": 0.19}, Verdict.REJECT, "similarity gain -0.01, expected at least 0"),
        ({"folding_fraction": 1e-6}, Verdict.REJECT, "folding fraction 1e-06, expected at most 0"),
        ({"nonlinear_max_mm": 60.5}, Verdict.REJECT, "nonlinear max 60.5 mm, expected at most 60 mm"),
        ({"similarity_after": math.nan}, Verdict.REJECT, "similarity gain not measurable"),
        ({"folding_fraction": math.nan}, Verdict.REJECT, "folding fraction not measurable"),
        ({"grid_error_mm": 0.314}, Verdict.WARN, "grid error 0.314 mm, expected at most 0.2 mm"),
    ],
)
def test_a_figure_beyond_its_limit_decides_and_is_named(
    change: dict[str, float], verdict: Verdict, reason: str
) -> None:
    got, why = judge(make_figures(**change), Thresholds())

    assert got is verdict
    assert reason in why


def test_every_figure_beyond_a_limit_is_named_and_the_worst_decides() -> None:
    figures = make_figures(similarity_after=0.1, folding_fraction=0.5, grid_error_mm=9)

    verdict, reason = judge(figures, Thresholds())

    assert verdict is Verdict.REJECT
    assert reason.split("; ") == [
        "similarity gain -0.1, expected at least 0", "folding fraction 0.5, expected at most 0",
    ]  # fmt: skip


@pytest.mark.parametrize("name", list(Thresholds().limits()))
def test_a_rule_moves_each_limit_and_the_figure_is_held_against_it(name: str) -> None:
    bound = 0.5
    good, bad = (0.6, 0.4) if name in AT_LEAST else (0.4, 0.6)
    only = Thresholds(**{each: Limits() for each in Thresholds().limits()})

    for limits, expected in ((Limits(warn=bound), Verdict.WARN), (Limits(reject=bound), Verdict.REJECT)):
        set_so = only.model_copy(update={name: limits})
        measured = {
            value: make_figures(**{name.replace("gain", "before"): 0.0, name.replace("gain", "after"): value})
            if name.endswith("gain")
            else make_figures(**{name: value})
            for value in (good, bad)
        }
        assert judge(measured[good], set_so)[0] is Verdict.ACCEPT
        assert judge(measured[bad], set_so)[0] is expected


def test_every_limit_is_on_something_that_is_measured() -> None:
    measured = {each.name for each in fields(Figures)} | {"similarity_gain", "patch_nmi_gain"}

    assert set(Thresholds().limits()) <= measured


def test_what_a_rule_does_not_name_keeps_its_default_and_null_means_never() -> None:
    found = thresholds("{grid_error_mm: {reject: 3}, folding_fraction: {reject: null}}")

    assert found.grid_error_mm == Limits(warn=0.2, reject=3)
    assert found.folding_fraction == Limits()
    assert found.nonlinear_max_mm == Thresholds().nonlinear_max_mm
    assert judge(make_figures(folding_fraction=0.5), found)[0] is Verdict.ACCEPT


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "{overlap_fraction: {warn: 0.2, reject: 0.5}}",
            "overlap_fraction.warn: got 0.2, expected warn above reject, 0.5",
        ),
        ("{sdlogj: {warn: 2, reject: 1}}", "sdlogj.warn: got 2.0, expected warn below reject, 1"),
        ("{sdlogj: {warn: yes}}", "sdlogj.warn"),
        ("{sdlog: {warn: 1}}", "did you mean 'sdlogj'"),
        ("{sdlogj: {alarm: 1}}", "alarm"),
        ("{folding_fraction: 0}", "folding_fraction"),
    ],
)
def test_a_mistake_in_a_rule_is_told_by_its_key(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        thresholds(text)

    assert message in str(error.value)


def test_a_dynamic_series_is_rejected_only_where_every_phase_is() -> None:
    accept, warn, reject = (Verdict.ACCEPT, ""), (Verdict.WARN, "w"), (Verdict.REJECT, "r")

    assert of_all([reject]) == reject
    assert of_all([accept, warn]) == warn
    assert of_all([reject, accept]) == (Verdict.WARN, "1 of 2 phases were rejected, the first: r")
    assert of_all([reject, reject])[0] is Verdict.REJECT


def test_the_defaults_are_those_of_the_documentation() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "verdict.md").read_text()

    for name, limits in Thresholds().limits().items():
        word = "below" if name in AT_LEAST else "above"
        warn, reject = (f" {word} {limit:g} " if limit is not None else " " for limit in (limits.warn, limits.reject))
        assert f"| `{name}` |{warn}|{reject}|" in text
    assert set(re.findall(r"^\| `(\w+)`", text, flags=re.MULTILINE)) == set(Thresholds().limits())


def test_the_measured_pairs_are_judged_as_the_documentation_says() -> None:
    root = Path(__file__).resolve().parents[2]
    rows = [json.loads(line) for line in (root / "benchmarks" / "verdict_figures.jsonl").read_text().splitlines()]
    text = (root / "docs" / "verdict.md").read_text()

    for row in rows:
        told = re.search(rf"^\| {re.escape(row['name'])} \(.*\| (\w[\w ]*) \|$", text, flags=re.MULTILINE)
        assert told is not None, row["name"]
        if "refused" in row:
            assert told[1] == "refused by the engine"
        else:
            verdict, _ = judge(Figures.from_dict(row["figures"]), Thresholds())
            assert told[1] == verdict
            assert not (verdict is Verdict.ACCEPT and row["kind"] in ("other", "hopeless"))
            error = row.get("error_mm", {"mean": [1, 0]})["mean"]
            assert not (verdict is Verdict.ACCEPT and error[1] >= error[0])
