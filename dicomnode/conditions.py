"""Conditions of rules: parsed once with every word checked, evaluated on a volume with a trace of what was seen.

Law: data, never evaluated code. Regular expressions are RE2, so that no rule and no header can stall the node. Every
check says which condition it was, the value it saw and the result.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Protocol, runtime_checkable

import re2
from pydicom.datadict import dictionary_VR, keyword_dict

from dicomnode.derived import DERIVED, WORDS, Observation, Scalar, Subject
from dicomnode.document import ProblemError, Step, each_of, nearest, shown
from dicomnode.vocabulary import Vocabulary

COMBINATORS = ("all", "any", "not")
OPERATORS = ("any_of", "none_of", "means", "matches", "min", "max", "exists")
ELSEWHERE = {
    "overlap_mm": "pair.overlap_mm",
    "days_before": "priors.min_age_days and max_age_days, or pair.max_days",
    "order": "order beside match or fallback, in a role",
    "from": "from in a role",
    "score": "score in a role's prefer",
}
"""Words that stand at another place of a rule."""

_NUMERIC_VRS = {"DS", "FD", "FL", "IS", "SL", "SS", "SV", "UL", "US", "UV"}
_TEXT_VRS = {"AE", "AS", "CS", "DA", "DT", "LO", "LT", "PN", "SH", "ST", "TM", "UC", "UI", "UR", "UT"}


@runtime_checkable
class Condition(Protocol):
    """Something that holds of a volume or does not, and says what it saw."""

    def check(self, subject: Subject) -> Check:
        """Evaluate on one volume."""


class Meets:
    """Whether a volume meets a condition; looked at once, in however many scopes it stands.

    For one turn of one rule: what it has looked at is known by identity, and must live as long.
    """

    def __init__(self) -> None:
        self._seen: dict[tuple[int, int], bool] = {}

    def __call__(self, condition: Condition, subject: Subject) -> bool:
        """`condition.check(subject).passed`."""
        which = id(condition), id(subject)
        if which not in self._seen:
            self._seen[which] = condition.check(subject).passed
        return self._seen[which]


@dataclass(frozen=True)
class Check:
    """One evaluated condition.

    Attributes
    ----------
    condition
        What was asked; its text by `str`.
    passed
        The result.
    observation
        What a comparison saw; None for a combinator.
    parts
        The checks that a combinator rests on, all of them evaluated.
    """

    condition: Condition
    passed: bool
    observation: Observation | None = None
    parts: tuple[Check, ...] = ()

    @property
    def seen(self) -> str:
        """The value seen, bounded; elements of the patient group are never repeated."""
        if self.observation is None:
            return ", ".join(part.seen for part in self.parts)
        return _seen(self.condition, self.observation)

    def __str__(self) -> str:
        """`condition, got value`: of what failed where it failed, of everything where it passed."""
        if self.observation is not None:
            return f"{self.condition}, got {self.seen}"
        if isinstance(self.condition, Not):
            return f"not ({self.parts[0]})"
        decisive = [part for part in self.parts if part.passed == self.passed]
        joint = " or " if isinstance(self.condition, AnyOf) and not self.passed else "; "
        return joint.join(str(part) for part in decisive)


@dataclass(frozen=True)
class Comparison:
    """One element or derived value compared with one operand.

    Attributes
    ----------
    name
        DICOM keyword or derived name.
    operator
        One of OPERATORS, or `is` for equality with a scalar.
    operand
        None within any_of and none_of stands for an absent or empty element.
    label
        How the operand was written, where that is shorter (`$name`).
    """

    name: str
    operator: str
    operand: Scalar | tuple[Scalar | None, ...] | None
    label: str = ""

    def check(self, subject: Subject) -> Check:
        """Evaluate; an element with several values holds when any of them does."""
        observation = subject.observe(self.name)
        if self.operator != "means":
            return Check(self, self._holds(observation.values), observation)
        said = subject.vocabulary.read(" ".join(str(value) for value in observation.values))
        read = ", ".join(f"{phrase!r} means {name}" for name, phrase in said.items()) or "no known phrase"
        asked = self.operand if isinstance(self.operand, tuple) else (self.operand,)
        return Check(self, not said.keys().isdisjoint(asked), Observation(observation.values, read))

    def __str__(self) -> str:
        operand = self.label or _text(self.operand)
        return f"{self.name} {operand}" if self.operator == "is" else f"{self.name} {self.operator} {operand}"

    def _holds(self, values: tuple[Scalar, ...]) -> bool:
        operand = self.operand
        if self.operator == "exists":
            return bool(values) == operand
        if self.operator == "matches":
            pattern = compiled(str(operand))
            return any(pattern.search(str(value)) is not None for value in values or ("",))
        if self.operator in ("min", "max"):
            numbers = [number for value in values if (number := _as_number(value)) is not None]
            limit = _as_number(operand)
            return limit is not None and any(n >= limit if self.operator == "min" else n <= limit for n in numbers)
        options = operand if isinstance(operand, tuple) else (operand,)
        is_among = any(_equal(value, option) for value in values or (None,) for option in options)
        return is_among != (self.operator == "none_of")


@dataclass(frozen=True)
class All:
    """Every part holds; without parts: always."""

    parts: tuple[Condition, ...] = ()

    def check(self, subject: Subject) -> Check:
        """Evaluate every part."""
        checks = tuple(part.check(subject) for part in self.parts)
        return Check(self, all(check.passed for check in checks), parts=checks)

    def __str__(self) -> str:
        return "; ".join(str(part) for part in self.parts) or "anything"


@dataclass(frozen=True)
class AnyOf:
    """At least one part holds."""

    parts: tuple[Condition, ...]

    def check(self, subject: Subject) -> Check:
        """Evaluate every part."""
        checks = tuple(part.check(subject) for part in self.parts)
        return Check(self, any(check.passed for check in checks), parts=checks)

    def __str__(self) -> str:
        return " or ".join(f"({part})" for part in self.parts)


@dataclass(frozen=True)
class Not:
    """The part does not hold."""

    part: Condition

    def check(self, subject: Subject) -> Check:
        """Evaluate the part."""
        check = self.part.check(subject)
        return Check(self, not check.passed, parts=(check,))

    def __str__(self) -> str:
        return f"not ({self.part})"


ALWAYS = All()


@dataclass(frozen=True)
class Names:
    """What a rule set calls things.

    Attributes
    ----------
    expressions
        Named regular expressions, for `matches: $name`.
    vocabulary
        Names with their phrases, for `means: name`.
    """

    expressions: Mapping[str, str]
    vocabulary: Vocabulary


def parse(raw: object, names: Names, path: tuple[Step, ...] = ()) -> Condition:
    """Turn one mapping of conditions into a value; all of its keys must hold.

    Parameters
    ----------
    raw
        From YAML: keyword or derived name → scalar or operators; `all`/`any` → list of mappings; `not` → mapping.
    path
        Where `raw` stands below the field, for messages.

    Raises
    ------
    ProblemError
        An unknown word (with the nearest valid one), an operand of the wrong kind, a bad regular expression.
    """
    if not isinstance(raw, dict) or not raw:
        raise ProblemError(path, raw, "a mapping with at least one condition")
    parts = each_of(partial(_parse_one, str(name), operand, names, (*path, str(name))) for name, operand in raw.items())
    return parts[0] if len(parts) == 1 else All(tuple(parts))


@lru_cache(maxsize=1024)
def compiled(pattern: str) -> Any:
    """The RE2 program of a pattern.

    Raises
    ------
    re2.error
        RE2 does not take it (back references and look-around, which cannot run in linear time, among others).
    """
    options = re2.Options()
    options.log_errors = False
    return re2.compile(pattern, options)


def check_keyword(name: str, path: tuple[Step, ...], *, words: tuple[str, ...] = ()) -> str:
    """The value representation kind, `number` or `text`, of a DICOM keyword.

    Raises
    ------
    ProblemError
        Not a keyword of PS3.6, or an element without plain values.
    """
    tag = keyword_dict.get(name)
    if tag is None:
        hint = nearest(name, words) or nearest(name, keyword_dict)
        raise ProblemError(path, name, f"a DICOM keyword{_or(words)}{hint}")
    vrs = set(dictionary_VR(tag).split(" or "))
    if vrs & _NUMERIC_VRS:
        return "number"
    if not vrs & _TEXT_VRS:
        raise ProblemError(path, name, "an element with plain values, not a sequence or bulk data")
    return "text"


def _parse_one(name: str, operand: object, names: Names, path: tuple[Step, ...]) -> Condition:
    if name == "not":
        return Not(parse(operand, names, path))
    if name in ("all", "any"):
        if not isinstance(operand, list) or not operand:
            raise ProblemError(path, operand, "a list of at least one mapping of conditions")
        parts = tuple(each_of(partial(parse, part, names, (*path, index)) for index, part in enumerate(operand)))
        return All(parts) if name == "all" else AnyOf(parts)
    kind = _kind(name, path)
    if not isinstance(operand, dict):
        return Comparison(name, "is", _operand(name, operand, kind, path))
    if not operand:
        raise ProblemError(path, operand, f"a value or one of {', '.join(OPERATORS)}")
    comparisons = each_of(partial(_compare, name, op, value, kind, names, (*path, op)) for op, value in operand.items())
    return comparisons[0] if len(comparisons) == 1 else All(tuple(comparisons))


def _compare(name: str, operator: str, operand: object, kind: str, names: Names, path: tuple[Step, ...]) -> Comparison:
    if operator not in OPERATORS:
        raise ProblemError(path, operator, f"one of {', '.join(OPERATORS)}{nearest(operator, OPERATORS)}")
    if operator == "means":
        return _means(name, operand, kind, names, path)
    if operator == "matches":
        return _matches(name, operand, kind, names, path)
    if operator == "exists":
        if not isinstance(operand, bool):
            raise ProblemError(path, operand, "true or false")
        return Comparison(name, operator, operand)
    if operator in ("any_of", "none_of"):
        if not isinstance(operand, list) or not operand:
            raise ProblemError(path, operand, "a list of at least one value")
        values = tuple(_operand(name, value, kind, (*path, index)) for index, value in enumerate(operand))
        return Comparison(name, operator, values)
    if kind not in ("number", "phase"):
        raise ProblemError(path, operator, f"an element with numbers; {name} has none")
    return Comparison(name, operator, _number(operand, path))


def _means(name: str, operand: object, kind: str, names: Names, path: tuple[Step, ...]) -> Comparison:
    if kind != "text":
        raise ProblemError(path, "means", f"an element with text; {name} has none")
    known = names.vocabulary.names
    for word in (operand or [None]) if isinstance(operand, list) else [operand]:
        if word not in known:
            hint = f"a name of the vocabulary ({', '.join(sorted(known))}){nearest(str(word), known)}"
            raise ProblemError(path, word, hint)
    return Comparison(name, "means", tuple(map(str, operand)) if isinstance(operand, list) else str(operand))


def _matches(name: str, operand: object, kind: str, names: Names, path: tuple[Step, ...]) -> Comparison:
    if kind != "text":
        raise ProblemError(path, "matches", f"an element with text; {name} has none")
    if not isinstance(operand, str):
        raise ProblemError(path, operand, "a regular expression (RE2) or $name of the vocabulary")
    if not operand.startswith("$") or len(operand) == 1:
        return Comparison(name, "matches", expression(operand, path))
    word, expressions = operand[1:], names.expressions
    if word not in expressions:
        hint = f"; {word} is a vocabulary: write means: {word}" if word in names.vocabulary.names else ""
        known = ", ".join(sorted(expressions)) or "none"
        raise ProblemError(path, operand, f"a name of the vocabulary ({known}){hint or nearest(word, expressions)}")
    return Comparison(name, "matches", expressions[word], label=operand)


def expression(pattern: str, path: tuple[Step, ...] = ()) -> str:
    """`pattern` if RE2 takes it, else ProblemError."""
    try:
        compiled(pattern)
    except re2.error as error:
        reason = error.args[0].decode() if isinstance(error.args[0], bytes) else error.args[0]
        raise ProblemError(path, pattern, f"a regular expression as RE2 takes it ({reason})") from None
    return pattern


def _kind(name: str, path: tuple[Step, ...]) -> str:
    """What operands a name takes: number, text, flag (contrast), words or phase (a word or a number)."""
    if name in ELSEWHERE:
        raise ProblemError(path, name, f"no condition on a series; see {ELSEWHERE[name]}")
    if name == "phase":
        return "phase"
    if name in WORDS:
        return "words"
    if name in DERIVED:
        return "flag" if name == "contrast" else "number"
    return check_keyword(name, path, words=(*COMBINATORS, *DERIVED))


def _operand(name: str, value: object, kind: str, path: tuple[Step, ...]) -> Scalar | None:
    if kind == "flag":
        if not isinstance(value, bool):
            raise ProblemError(path, value, "true or false")
        return value
    if value is None:
        return None
    if kind == "phase" and not isinstance(value, str):
        return _number(value, path)
    if kind in ("words", "phase"):
        if value not in WORDS[name]:
            raise ProblemError(path, value, f"one of {', '.join(WORDS[name])}{nearest(str(value), WORDS[name])}")
        return str(value)
    if kind == "number":
        return _number(value, path)
    if not isinstance(value, str):
        # YAML reads 0042 as 34, NO as false and 2024-01-01 as a date: only quotes say what is meant.
        raise ProblemError(path, value, "text; put it in quotes")
    return value.strip()


def _number(value: object, path: tuple[Step, ...]) -> float | int:
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
        raise ProblemError(path, value, "a number")
    return value


def _equal(value: Scalar | None, option: Scalar | None) -> bool:
    if value is None or option is None or isinstance(option, bool):
        return value is option
    if isinstance(option, str):
        return str(value) == option
    number = _as_number(value)
    return number is not None and abs(number - option) <= 1e-9 * max(abs(number), abs(option))


def _as_number(value: object) -> float | None:
    try:
        return float(value) if isinstance(value, str | int | float) else None
    except ValueError:
        return None


def _seen(condition: Condition, observation: Observation) -> str:
    if isinstance(condition, Comparison) and (keyword_dict.get(condition.name, 0) >> 16) == 0x0010:
        return "another value (not repeated here)" if observation.values else "nothing"
    values = observation.values
    text = _text(values[0] if len(values) == 1 else values) if values else "nothing"
    return f"{text} ({observation.evidence})" if observation.evidence else text


def _text(value: object) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(_text(each) for each in value)}]"
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return repr(shown(value))


def _or(words: tuple[str, ...]) -> str:
    return f" or one of {', '.join(words)}" if words else ""
