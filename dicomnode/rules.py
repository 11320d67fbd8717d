"""Pairing rules: one YAML file → frozen rules, or every mistake in it by line, rule, key, got and expected.

Law: a file is checked whole before any of it is used; the same content is the same text, whatever its order. What
stands in one rule is `rule`'s.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, field_validator

from dicomnode import conditions, document
from dicomnode.conditions import ALWAYS, Condition, Names
from dicomnode.document import ProblemError, Section, each_of
from dicomnode.rule import ConditionField, Rule
from dicomnode.vocabulary import BUILT_IN, Vocabulary, tokens

DEFAULT_EXCLUDE: tuple[dict[str, Any], ...] = (
    {"ImageType": {"any_of": ["LOCALIZER", "SCREEN SAVE", "SECONDARY", "MPR", "PROJECTION IMAGE", "SUBTRACTION"]}},
    {"SeriesDescription": {"means": ["localizer", "screenshot", "dose_report", "timing"]}},
    {"SeriesDescription": {"means": ["projection", "reformat", "subtraction"]}},
)
"""What no rule takes where neither it nor `defaults` has `exclude`. `exclude: []` takes everything."""


def load(path: Path | None) -> RuleSet:
    """Read the rules; None: a set without rules.

    Raises
    ------
    ConfigError
        The file cannot be read or used; one problem per line.
    """
    if path is None:
        return parse("version: 1\nrules: []", "(no rules file)")
    return parse(document.read(path), str(path))


def parse(text: str, file: str) -> RuleSet:
    """Parse rules; `file` is how messages name the text.

    Raises
    ------
    ConfigError
        One problem per line.
    """
    parsed = document.parse(text, file)
    names = _names(parsed.values.get("vocab"))
    found = document.check(parsed, RulesFile, context=names)
    normalized = yaml.safe_dump(dict(parsed.values), sort_keys=True, allow_unicode=True, width=10_000)
    return RuleSet(
        exclude=found.defaults.exclude,
        require=found.defaults.require,
        vocabulary=names.vocabulary,
        rules=found.rules,
        text=normalized,
        written=text,
        sha256=hashlib.sha256(normalized.encode()).hexdigest(),
    )


def _names(vocab: object) -> Names:
    """The document's vocabulary, as far as it is one; what is wrong in it is reported under its own key."""
    entries = {name: entry for name, entry in vocab.items() if isinstance(name, str)} if isinstance(vocab, dict) else {}
    lists = {
        name: [each for each in entry if isinstance(each, str)]
        for name, entry in entries.items()
        if isinstance(entry, list)
    }
    expressions = {name: entry for name, entry in entries.items() if isinstance(entry, str)}
    return Names(expressions, Vocabulary(lists) if lists else BUILT_IN)


class Defaults(Section):
    """What holds for every role of every rule."""

    exclude: tuple[ConditionField, ...] = tuple(conditions.parse(raw, Names({}, BUILT_IN)) for raw in DEFAULT_EXCLUDE)
    require: ConditionField = ALWAYS


class RulesFile(Section):
    """The file as written."""

    version: Literal[1]
    defaults: Defaults = Defaults()
    vocab: dict[str, str | tuple[str, ...]] = Field(default_factory=dict)
    rules: tuple[Rule, ...]

    @field_validator("vocab")
    @classmethod
    def _usable(cls, vocab: dict[str, str | tuple[str, ...]]) -> dict[str, str | tuple[str, ...]]:
        each_of(partial(_check_entry, name, entry) for name, entry in vocab.items())
        return vocab

    @field_validator("rules")
    @classmethod
    def _ids_differ(cls, rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
        ids = [rule.id for rule in rules]
        for index, each in enumerate(ids):
            if each in ids[:index]:
                raise ProblemError((index, "id"), each, "an id that no other rule has")
        return rules


def _check_entry(name: str, entry: str | tuple[str, ...]) -> None:
    if isinstance(entry, str):
        conditions.expression(entry, (name,))
        return
    for index, phrase in enumerate(entry):
        if not tokens(phrase):
            raise ProblemError((name, index), phrase, "a phrase with a letter or digit")


@dataclass(frozen=True)
class RuleSet:
    """Checked rules in force together.

    Attributes
    ----------
    exclude
        A volume that meets one of these fills no role of any rule.
    require
        What every volume must meet to fill a role; a rule may have its own `exclude` and `require` instead.
    vocabulary
        What descriptions are read with.
    rules
        In the order of the file, disabled ones too.
    text
        The normalized text: same content, same text, whatever comments and order of keys. It parses to this set.
    sha256
        Of `text`, hexadecimal.
    written
        The text as it was read.
    """

    exclude: tuple[Condition, ...]
    require: Condition
    vocabulary: Vocabulary = field(compare=False)
    rules: tuple[Rule, ...]
    text: str
    sha256: str
    written: str = field(compare=False, repr=False)

    @property
    def enabled(self) -> tuple[Rule, ...]:
        """The rules that make pairs."""
        return tuple(rule for rule in self.rules if rule.enabled)

    def rule(self, rule_id: str) -> Rule:
        """The rule of this id; KeyError where there is none."""
        return {rule.id: rule for rule in self.rules}[rule_id]
