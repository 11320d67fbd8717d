"""One pairing rule: its words, and what each of them may be. `rules` reads a file of them.

Law: a rule is data, frozen once it is checked; a word that this version does not have is refused by name. `pairing`
applies rules; this room decides nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PlainValidator,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from dicomnode import conditions, document
from dicomnode.conditions import ALWAYS, Condition
from dicomnode.config import PRESET_PARAMETERS, Preset
from dicomnode.derived import DERIVED
from dicomnode.document import ProblemError, Section
from dicomnode.model import DeliveryPriority, JobPlan
from dicomnode.outputs import ALL_OUTPUTS, OUTPUTS, RegisteredSeries, each_an_output
from dicomnode.schedule import Schedule
from dicomnode.thresholds import RejectionNote, Thresholds


def _condition(raw: object, info: ValidationInfo) -> Condition:
    names: Any = info.context
    return conditions.parse(raw, names)


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


PICKS = {"first": 0, "second": 1, "third": 2, "fourth": 3, "last": -1}


class Order(Section):
    """Which of several, in the order of their acquisition."""

    by: Literal["acq_time", "series_number"] = "acq_time"
    pick: Annotated[int, Field(strict=True, ge=0)] | Literal["first", "second", "third", "fourth", "last"]

    @property
    def index(self) -> int:
        """Zero-based; -1 for the last."""
        return self.pick if isinstance(self.pick, int) else PICKS[self.pick]


@dataclass(frozen=True)
class Selection:
    """The volumes that meet `condition`; with `order`, one of them."""

    condition: Condition
    order: Order | None = None


def _selection(raw: object, info: ValidationInfo) -> Selection:
    if not isinstance(raw, dict) or "order" not in raw:
        return Selection(_condition(raw, info))
    rest = {key: value for key, value in raw.items() if key != "order"}
    try:
        order = Order.model_validate(raw["order"])
    except ValidationError as error:
        first = error.errors()[0]
        steps = [str(step) for step in first["loc"] if step in ("by", "pick")]
        expected = "by: acq_time or series_number, and pick: first, second, third, fourth, last or a number from 0"
        raise ProblemError(("order", *steps), first["input"], expected) from None
    return Selection(_condition(rest, info) if rest else ALWAYS, order)


SelectionField = Annotated[Selection, PlainValidator(_selection)]


class Role(Section):
    """Which series may be the fixed or the moving one."""

    origin: Literal["current", "prior"] = Field(default="current", alias="from")
    match: SelectionField
    prefer: tuple[Annotated[Preference, PlainValidator(_preference)], ...] = ()
    fallback: SelectionField | None = None
    many: bool = Field(default=False, strict=True)
    one_per: str | None = None

    @field_validator("one_per")
    @classmethod
    def _known(cls, name: str | None) -> str | None:
        if name is not None and name not in DERIVED:
            conditions.check_keyword(name, (), words=tuple(DERIVED))
        return name


class Roles(Section):
    """The two sides of a pair."""

    fixed: Role
    moving: Role

    @model_validator(mode="after")
    def _one_of_each(self) -> Roles:
        if self.fixed.many:
            raise ProblemError(("fixed", "many"), True, "many on moving only: there is one fixed series")
        for name in ("fixed", "moving"):
            role = getattr(self, name)
            if role.one_per is not None and not role.many:
                raise ProblemError((name, "one_per"), role.one_per, "many: true beside one_per")
        if self.fixed.origin == self.moving.origin == "prior":
            raise ProblemError(("moving", "from"), "prior", "current on one of the two roles: it starts the rule")
        return self

    @property
    def prior(self) -> Role | None:
        """The role that an earlier examination fills, if one does."""
        return next((role for role in (self.fixed, self.moving) if role.origin == "prior"), None)


class Overlap(Section):
    """Common extent along the fixed volume's slice normal."""

    min: Positive


class PairConditions(Section):
    """What must hold between the two series of a pair."""

    same: tuple[Keyword, ...] = ("StudyInstanceUID",)
    different: tuple[Keyword, ...] = ()
    close: dict[str, Positive] = Field(default_factory=dict)
    overlap_mm: Overlap | None = None
    same_soft: tuple[Keyword, ...] = ()
    max_days: Annotated[int, Field(strict=True, ge=0)] = 1
    strict_identity: Annotated[bool, Field(strict=True)] = False

    @field_validator("close")
    @classmethod
    def _numeric(cls, close: dict[str, float]) -> dict[str, float]:
        for name in close:
            if name not in CLOSE and conditions.check_keyword(name, (name,), words=CLOSE) != "number":
                raise ProblemError((name,), name, f"an element with numbers, or one of {', '.join(CLOSE)}")
        return close

    @property
    def is_within_study(self) -> bool:
        """Whether both series must be of one study."""
        return "StudyInstanceUID" in self.same or "SeriesInstanceUID" in self.same


CLOSE = ("orientation_deg", "slice_spacing_mm", "field_of_view_mm", "coverage_mm")
"""What `close` compares beside elements with numbers."""


class Ready(Section):
    """When the rule may look, and how long it waits for what is missing."""

    quiet_s: Annotated[float, Field(strict=True, ge=0)] | None = None
    roles: tuple[Literal["fixed", "moving"], ...] = ("fixed", "moving")
    min_moving: Annotated[int, Field(strict=True, ge=1)] = 1
    deadline_s: Annotated[float, Field(strict=True, gt=0)] | None = None
    at_deadline: Literal["pair", "leave", "ask"] = "leave"


class Split(Section):
    """The phases of a dynamic examination: one scope of its own."""

    by: Literal["auto", "series", "study"] = "auto"
    min_phases: Annotated[int, Field(strict=True, ge=2)] = 2


class Query(Section):
    """Which studies of the patient are asked for."""

    modalities: Annotated[tuple[str, ...], BeforeValidator(lambda v: [v] if isinstance(v, str) else v)] = Field(
        default=(), alias="ModalitiesInStudy"
    )
    description: str = Field(default="", alias="StudyDescription")
    same_patient: Literal[True] = True


class Priors(Section):
    """Where earlier examinations come from, and how many days before the current one they may be."""

    query: Query = Query()
    min_age_days: Annotated[int, Field(strict=True, ge=0)] = 0
    max_age_days: Annotated[int, Field(strict=True, ge=0)] = 365
    max_studies: Annotated[int, Field(strict=True, ge=1, le=20)] = 3
    pick: Literal["newest", "best"] = "newest"
    sources: tuple[str, ...] = ()
    fetch: Literal["c-move", "c-get", "dicomweb"] | None = None

    @model_validator(mode="after")
    def _in_order(self) -> Priors:
        if self.min_age_days > self.max_age_days:
            raise ProblemError(("min_age_days",), self.min_age_days, f"at most max_age_days, {self.max_age_days}")
        return self


class Register(Section):
    """How the pair is registered."""

    later: ClassVar[frozenset[str]] = frozenset({"model"})

    preset: Preset | None = None
    parameters: dict[str, Any] = Field(default_factory=dict)
    affine_sro: bool = Field(default=False, strict=True)
    """Also write the affine stage as a Spatial Registration."""
    groupwise: Literal[False] = False

    @field_validator("parameters")
    @classmethod
    def _of_the_engine(cls, parameters: dict[str, Any]) -> dict[str, Any]:
        for name, value in parameters.items():
            if name not in PRESET_PARAMETERS:
                known = f"one of {', '.join(PRESET_PARAMETERS)}{document.nearest(name, PRESET_PARAMETERS)}"
                raise ProblemError((name,), name, known)
            low, high, is_whole = PRESET_PARAMETERS[name]
            if isinstance(value, bool) or not isinstance(value, int if is_whole else int | float):
                raise ProblemError((name,), value, "a whole number" if is_whole else "a number")
            if not low <= value <= high:
                raise ProblemError((name,), value, f"{low:g} to {high:g}")
        return parameters


PATIENCE_S = {"urgent": 0.0, "normal": 3600.0, "off-peak": 12 * 3600.0}
"""How long after it was made a job counts as due; the job due first begins first, so none waits for ever."""


class Rule(Section):
    """One kind of pair."""

    id: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")]
    when: ConditionField = ALWAYS
    split: Split | None = None
    priors: Priors = Priors()
    ready: Ready = Ready()
    roles: Roles
    pair: PairConditions = PairConditions()
    registration: Register = Field(default=Register(), alias="register")
    outputs: tuple[str, ...] = OUTPUTS
    series: RegisteredSeries = RegisteredSeries()
    destinations: tuple[str, ...] | None = None
    store_in: Literal["fixed_study", "moving_study", "newest"] = "fixed_study"
    verdict: Thresholds = Thresholds()
    hold: bool = Field(default=False, strict=True)
    rejection_note: RejectionNote = "none"
    priority: Literal["urgent", "normal", "off-peak"] = "normal"
    schedule: Schedule | None = None
    exclude: tuple[ConditionField, ...] | None = None
    require: ConditionField | None = None
    enabled: bool = Field(default=True, strict=True)
    owner: str = ""
    comment: str = ""
    tags: tuple[str, ...] = ()

    @field_validator("outputs")
    @classmethod
    def _made_here(cls, outputs: tuple[str, ...]) -> tuple[str, ...]:
        if not outputs:
            raise ValueError(f"at least one of {', '.join(ALL_OUTPUTS)}")
        return each_an_output(outputs)

    @model_validator(mode="after")
    def _consistent(self) -> Rule:
        if {"series", "series_4d"} <= set(self.outputs):
            raise ProblemError(
                ("outputs",), "series and series_4d", "one of them: the phases in series each, or in one"
            )
        if "series_4d" in self.outputs and self.split is None:
            raise ProblemError(("outputs",), "series_4d", "split in the rule: one 4D series needs phases")
        if "uptake" in self.outputs and self.split is None:
            raise ProblemError(("outputs",), "uptake", "split in the rule: uptake over time needs phases")
        if "series_4d" in self.outputs and self.series.resolution != "fixed":
            raise ProblemError(("series", "resolution"), self.series.resolution, "fixed: a 4D series has one grid")
        if "blending" in self.outputs and "series" not in self.outputs:
            raise ProblemError(("outputs",), "blending", "series among them: it shows the registered series")
        if self.roles.prior is None:
            if "priors" in self.model_fields_set:
                raise ProblemError(("priors",), "priors", "a role with from: prior, which they would fill")
            return self
        if "same" not in self.pair.model_fields_set:
            pair = self.pair.model_copy(update={"same": ("PatientID",)})
            return self.model_copy(update={"pair": pair})
        if self.pair.is_within_study:
            raise ProblemError(("pair", "same"), "StudyInstanceUID", "PatientID: a prior is of another study")
        return self

    def preset(self, default: str) -> str:
        """The rule's preset, or the node's where it names none."""
        return self.registration.preset or default

    @property
    def delivery_priority(self) -> DeliveryPriority:
        """The order in which its results are sent."""
        return DeliveryPriority[self.priority.upper().replace("-", "_")]

    def plan(self, now: datetime) -> JobPlan:
        """How a job made `now` (aware) is queued."""
        begins = now if self.schedule is None else self.schedule.next_start(now.astimezone())
        held = "" if begins <= now else f"waits for the hours of its rule: {begins:%Y-%m-%d %H:%M}"
        return JobPlan(PATIENCE_S[self.priority], held, is_one_job=self.split is not None)

    def quiet_s(self, default: float) -> float:
        """Seconds of quiet after which a series counts for this rule; `default` is the node's."""
        return default if self.ready.quiet_s is None else self.ready.quiet_s
