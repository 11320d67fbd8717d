"""Pairing rules: one YAML file → frozen rules, or every mistake in it by line, rule, key, got and expected.

Law: rules are data, checked whole before any is used; a word of the language that this version does not have is
refused by name. `pairing` applies them; this room decides nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import AfterValidator, Field, PlainValidator, ValidationInfo, field_validator, model_validator

from dicomnode import conditions, document
from dicomnode.conditions import ALWAYS, Condition
from dicomnode.config import Preset
from dicomnode.document import ProblemError, Section
from dicomnode.errors import ConfigError

OUTPUTS = ("series", "sro", "dsr")

DEFAULT_EXCLUDE: tuple[dict[str, Any], ...] = (
    {"ImageType": {"any_of": ["LOCALIZER", "SCREEN SAVE", "SECONDARY", "MPR", "PROJECTION IMAGE", "SUBTRACTION"]}},
    {"SeriesDescription": {"matches": "(?i)scout|topogram|surview|locali[sz]er|dose ?report|screen ?save"}},
    {"SeriesDescription": {"matches": "(?i)(^|[^a-z])(mip|minip|mpr)([^a-z]|$)"}},
)
"""What no rule takes where `defaults.exclude` is not given. `exclude: []` takes everything."""


def load(path: Path | None) -> RuleSet:
    """Read the rules; None: a set without rules.

    Raises
    ------
    ConfigError
        The file cannot be read or used; one problem per line.
    """
    if path is None:
        return parse("version: 1\nrules: []", "(no rules file)")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), "(whole file)", str(error), "a readable UTF-8 file") from None
    return parse(text, str(path))


def parse(text: str, file: str) -> RuleSet:
    """Parse rules; `file` is how messages name the text.

    Raises
    ------
    ConfigError
        One problem per line.
    """
    parsed = document.parse(text, file)
    vocabulary = parsed.values.get("vocab")
    found = document.check(parsed, RulesFile, context=vocabulary if isinstance(vocabulary, dict) else {})
    normalized = yaml.safe_dump(dict(parsed.values), sort_keys=True, allow_unicode=True, width=10_000)
    return RuleSet(
        exclude=found.defaults.exclude,
        require=found.defaults.require,
        rules=found.rules,
        text=normalized,
        sha256=hashlib.sha256(normalized.encode()).hexdigest(),
    )


def _condition(raw: object, info: ValidationInfo) -> Condition:
    return conditions.parse(raw, _vocabulary(info))


def _vocabulary(info: ValidationInfo) -> Mapping[str, str]:
    """The document's vocabulary, as far as it is one; what is wrong in it is reported under its own key."""
    return {name: text for name, text in (info.context or {}).items() if isinstance(text, str)}


ConditionField = Annotated[Condition, PlainValidator(_condition)]


def _keyword(name: str) -> str:
    conditions.check_keyword(name, ())
    return name


Keyword = Annotated[str, AfterValidator(_keyword)]
Positive = Annotated[float, Field(strict=True, ge=0)]


@dataclass(frozen=True)
class Preference:
    """A condition that adds `score` to a candidate that meets it."""

    condition: Condition
    score: float


def _preference(raw: object, info: ValidationInfo) -> Preference:
    score = raw.get("score") if isinstance(raw, dict) else None
    if not isinstance(raw, dict) or isinstance(score, bool) or not isinstance(score, int | float):
        raise ProblemError((), raw, "a mapping of conditions with a score, a number")
    return Preference(_condition({key: value for key, value in raw.items() if key != "score"}, info), score)


class Role(Section):
    """Which series may be the fixed or the moving one."""

    later: ClassVar[frozenset[str]] = frozenset({"from", "order"})

    match: ConditionField
    prefer: tuple[Annotated[Preference, PlainValidator(_preference)], ...] = ()
    fallback: ConditionField | None = None
    many: bool = Field(default=False, strict=True)


class Roles(Section):
    """The two sides of a pair."""

    fixed: Role
    moving: Role

    @model_validator(mode="after")
    def _one_fixed(self) -> Roles:
        if self.fixed.many:
            raise ProblemError(
                ("fixed", "many"), True, "many on moving only: on fixed it is not available in this version"
            )
        return self


class Overlap(Section):
    """Common extent along the fixed volume's slice normal."""

    min: Positive


class PairConditions(Section):
    """What must hold between the two series of a pair."""

    later: ClassVar[frozenset[str]] = frozenset({"days_before", "different"})

    same: tuple[Keyword, ...] = ("StudyInstanceUID",)
    close: dict[str, Positive] = Field(default_factory=dict)
    overlap_mm: Overlap | None = None
    same_soft: tuple[Keyword, ...] = ()
    max_days: Annotated[int, Field(strict=True, ge=0)] = 1

    @field_validator("same")
    @classmethod
    def _known(cls, same: tuple[str, ...]) -> tuple[str, ...]:
        if "SeriesInstanceUID" in same:
            raise ValueError("two series: pairs within one series are not available in this version")
        return same

    @field_validator("close")
    @classmethod
    def _numeric(cls, close: dict[str, float]) -> dict[str, float]:
        for name in close:
            if (
                name != "orientation_deg"
                and conditions.check_keyword(name, (name,), words=("orientation_deg",)) != "number"
            ):
                raise ProblemError((name,), name, "an element with numbers, or orientation_deg")
        return close

    @property
    def is_within_study(self) -> bool:
        """Whether both series must be of one study."""
        return "StudyInstanceUID" in self.same


class Ready(Section):
    """When the rule may look."""

    later: ClassVar[frozenset[str]] = frozenset({"deadline_s", "at_deadline", "timeout_s", "max_wait_s"})

    quiet_s: Annotated[float, Field(strict=True, ge=0)] | None = None
    roles: tuple[Literal["fixed", "moving"], ...] = ("fixed", "moving")
    min_moving: Annotated[int, Field(strict=True, ge=1)] = 1


class Register(Section):
    """How the pair is registered."""

    later: ClassVar[frozenset[str]] = frozenset({"groupwise", "parameters", "model"})

    preset: Preset | None = None
    affine_sro: bool = Field(default=False, strict=True)
    """Also write the affine stage as a Spatial Registration."""


class Rule(Section):
    """One kind of pair."""

    later: ClassVar[frozenset[str]] = frozenset(
        {"split", "priors", "destinations", "priority", "schedule", "owner", "tags", "exclude", "require"}
    )

    id: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")]
    when: ConditionField = ALWAYS
    ready: Ready = Ready()
    roles: Roles
    pair: PairConditions = PairConditions()
    registration: Register = Field(default=Register(), alias="register")
    outputs: tuple[str, ...] = OUTPUTS
    store_in: str = "fixed_study"
    enabled: bool = Field(default=True, strict=True)
    comment: str = ""

    @field_validator("outputs")
    @classmethod
    def _made_here(cls, outputs: tuple[str, ...]) -> tuple[str, ...]:
        for index, output in enumerate(outputs):
            if output not in OUTPUTS or output in outputs[:index]:
                later = ": not available in this version" if output in ("jacobian", "sr", "sc") else ""
                raise ProblemError((index,), output, f"one of {', '.join(OUTPUTS)}, each once{later}")
        if not outputs:
            raise ValueError(f"at least one of {', '.join(OUTPUTS)}")
        return outputs

    @field_validator("store_in")
    @classmethod
    def _stored_here(cls, store_in: str) -> str:
        if store_in != "fixed_study":
            later = ": not available in this version" if store_in in ("moving_study", "newest") else ""
            raise ValueError(f"fixed_study{later}")
        return store_in

    def preset(self, default: str) -> str:
        """The rule's preset, or the node's where it names none."""
        return self.registration.preset or default

    def quiet_s(self, default: float) -> float:
        """Seconds of quiet after which a series counts for this rule; `default` is the node's."""
        return default if self.ready.quiet_s is None else self.ready.quiet_s


class Defaults(Section):
    """What holds for every role of every rule."""

    exclude: tuple[ConditionField, ...] = tuple(conditions.parse(raw, {}) for raw in DEFAULT_EXCLUDE)
    require: ConditionField = ALWAYS


class RulesFile(Section):
    """The file as written."""

    version: Literal[1]
    defaults: Defaults = Defaults()
    vocab: dict[str, str] = Field(default_factory=dict)
    rules: tuple[Rule, ...]

    @field_validator("vocab")
    @classmethod
    def _expressions(cls, vocab: dict[str, str]) -> dict[str, str]:
        for name, pattern in vocab.items():
            conditions.expression(pattern, (name,))
        return vocab

    @field_validator("rules")
    @classmethod
    def _ids_differ(cls, rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
        ids = [rule.id for rule in rules]
        for index, each in enumerate(ids):
            if each in ids[:index]:
                raise ProblemError((index, "id"), each, "an id that no other rule has")
        return rules


@dataclass(frozen=True)
class RuleSet:
    """Checked rules in force together.

    Attributes
    ----------
    exclude
        A volume that meets one of these fills no role of any rule.
    require
        What every volume must meet to fill a role.
    rules
        In the order of the file, disabled ones too.
    text
        The normalized text: same content, same text, whatever comments and order of keys. It parses to this set.
    sha256
        Of `text`, hexadecimal.
    """

    exclude: tuple[Condition, ...]
    require: Condition
    rules: tuple[Rule, ...]
    text: str
    sha256: str

    @property
    def enabled(self) -> tuple[Rule, ...]:
        """The rules that make pairs."""
        return tuple(rule for rule in self.rules if rule.enabled)

    def rule(self, rule_id: str) -> Rule:
        """The rule of this id; KeyError where there is none."""
        return {rule.id: rule for rule in self.rules}[rule_id]
