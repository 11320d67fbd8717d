"""docs/rules.md: every example is valid and makes the pairs that stand under its table."""

from __future__ import annotations

import re
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from volume_refs import NOW, volume

from dicomnode import pairing, rule, rules, vocabulary
from dicomnode.conditions import OPERATORS
from dicomnode.derived import DERIVED
from dicomnode.model import VolumeRef

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "rules.md").read_text()
EXAMPLES = re.findall(r"^### (.+?)\n(.*?)(?=^### |\Z)", TEXT, re.MULTILINE | re.DOTALL)
NUMBERS = ("SliceThickness", "EchoTime", "FlipAngle")


@pytest.mark.parametrize(("title", "body"), EXAMPLES, ids=[title for title, _ in EXAMPLES])
def test_an_example_makes_the_pairs_under_its_table(title: str, body: str) -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", body, re.DOTALL)
    expected = set(re.findall(r"`([\w#]+) ← ([\w#]+)`", body))
    head, _, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in body.splitlines() if line.startswith("|")
    ]
    held = [one for row in rows for one in volumes(dict(zip(head, row, strict=True)))]

    decision = pairing.pair(rules.parse(text, title), held, now=NOW + timedelta(days=1))

    made = {tuple(pairing.label(key) for key in pairing.keys_of(pair)) for pair in decision.pairs}
    assert expected
    assert made == expected


def volumes(row: dict[str, str]) -> list[VolumeRef]:
    uid, phases = row.pop("series"), int(row.pop("phases", "1"))
    header: dict[str, Any] = {k: float(v) if k in NUMBERS else v for k, v in row.items() if v and k != "study"}
    one = volume(uid, study=row.get("study", "1"), **header)
    return [
        replace(one, volume_number=n, volumes_in_series=phases, phase_index=n, phases=phases) for n in range(phases)
    ]


def test_every_kind_of_pairing_has_an_example() -> None:
    assert len(EXAMPLES) == 7


def test_every_word_of_the_language_stands_in_the_reference() -> None:
    words = {
        *(field.alias or name for name, field in rule.Rule.model_fields.items()),
        *rule.PairConditions.model_fields,
        *rule.Ready.model_fields,
        *rule.Priors.model_fields,
        *rule.Split.model_fields,
        *(set(OPERATORS) | set(DERIVED) | vocabulary.BUILT_IN.names | set(rule.ALL_OUTPUTS) - {"series_4d"}),
    }

    assert {word for word in words if not re.search(rf"\b{re.escape(word)}\b", TEXT)} == set()
