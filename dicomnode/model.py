"""The words of the node: frozen values that travel between rooms. No behaviour beyond what a value knows of itself.

Times are timezone-aware UTC. UIDs are strings as received. Nothing here imports pydicom, SQL or the engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import IntEnum, StrEnum

HeaderValue = str | float | int | list[str] | list[float] | list[int]
"""One public, non-sequence, non-bulk element's value; multi-valued elements are lists."""


class SeriesState(StrEnum):
    """Where a series stands."""

    RECEIVING = "receiving"
    """Instances may still come. The scheduler moves it on when it is complete."""
    PAIRED = "paired"
    """Complete, and part of at least one pair."""
    UNPAIRED = "unpaired"
    """Complete, and in no pair; `reason` says why. Looked at again whenever a series of its patient completes."""
    REFUSED = "refused"
    """Complete, but not one regular volume; `reason` carries the measured figure."""


class DuplicatePolicy(StrEnum):
    """What becomes of other content under a SOP Instance UID that is stored already; never is it lost in silence."""

    FLAG = "flag"
    """Both are kept, the first is used, and the second shows up in quarantine."""
    KEEP_FIRST = "keep-first"
    """The sender is answered 0x0111 and keeps it."""
    REPLACE = "replace"
    """Both are kept, the last is used, and the first shows up in quarantine."""


class RetrievedBy(StrEnum):
    """Whose retrieve request brought an instance here, as far as its C-STORE request names a Move Originator."""

    UNKNOWN = ""
    """Nobody is named: it was sent unasked, or by a source that keeps this to itself."""
    NODE = "node"
    """Ours: it was fetched, and is no new examination."""
    OTHER = "other"
    """Another's: somebody had it sent here as if it were new."""


class JobState(StrEnum):
    """Where a registration job stands. A crash leaves it as it is; the worker resumes it at start."""

    WAITING = "waiting"
    RUNNING = "running"
    DONE = "done"
    REJECTED = "rejected"
    """The verdict, or a person's, was reject: nothing but a report was sent; `reason` says why."""
    FAILED = "failed"
    CANCELLED = "cancelled"
    HELD = "held"
    """Waits for the hours of its rule; the scheduler lets it on."""
    APPROVAL = "approval"
    """All is made and kept, and a person must release or reject it before anything is sent."""


class DeliveryState(StrEnum):
    """Where one instance stands on its way to one destination."""

    WAITING = "waiting"
    """Not yet delivered; will be tried at `next_attempt_at`."""
    DELIVERED = "delivered"
    """The destination answered with success or a storing warning."""
    FAILED = "failed"
    """The destination refused for good, or it was given up; `reason` says why. Never retried by itself."""
    HELD = "held"
    """Waits for a person, who releases it; `reason` says for what."""
    CANCELLED = "cancelled"
    """Never sent: other results stand in its place, or a person rejected it; `reason` says which."""


class DeliveryPriority(IntEnum):
    """The order in which what is due goes to a destination."""

    URGENT = 0
    """Goes outside the destination's hours too."""
    NORMAL = 1
    OFF_PEAK = 2


class Verdict(StrEnum):
    """What is done with a registration."""

    ACCEPT = "accept"
    WARN = "warn"
    """Sent, with the reason written into the objects."""
    REJECT = "reject"


@dataclass(frozen=True)
class Instance:
    """One stored SOP Instance.

    Attributes
    ----------
    path
        Relative to the archive's root; made from our own hash, never from the wire.
    sha256
        Of the data set bytes as received (file meta information excluded).
    size_bytes
        Of the whole file.
    """

    sop_instance_uid: str
    sop_class_uid: str
    transfer_syntax_uid: str
    path: str
    sha256: str
    size_bytes: int


@dataclass(frozen=True)
class JournalEntry:
    """An instance that is safe and acknowledged, and whose header nobody has looked at yet.

    Attributes
    ----------
    path
        Of the sealed file, relative to the archive's root.
    sop_instance_uid, sop_class_uid
        As the sender's command or file meta information named them, whatever that is.
    attempts
        How often its header was begun to be read.
    """

    sop_instance_uid: str
    sop_class_uid: str
    transfer_syntax_uid: str
    path: str
    sha256: str
    size_bytes: int
    received_at: datetime
    retrieved_by: RetrievedBy = RetrievedBy.UNKNOWN
    id: int = 0
    attempts: int = 0


@dataclass(frozen=True)
class InstanceHeader:
    """What the index must know of an instance besides its bytes; every text as received, empty where absent."""

    patient_id: str
    issuer_of_patient_id: str
    patient_birth_date: str
    patient_sex: str
    study_instance_uid: str
    series_instance_uid: str
    modality: str
    is_own_output: bool
    """Contributing Equipment Sequence names this software, or Modality is REG."""


@dataclass(frozen=True)
class SeriesActivity:
    """What completion must know of a series."""

    series_instance_uid: str
    study_instance_uid: str
    patient_id: str
    issuer_of_patient_id: str
    instances: int
    last_received_at: datetime
    receiving: bool
    """An association that sent one of its instances is still open."""
    is_fetched: bool = False
    """All of it was asked for by a rule."""
    oldest_unindexed_at: datetime | None = None
    """When the oldest instance came whose header has not been read: it may belong to any series."""


@dataclass(frozen=True)
class Promise:
    """How many instances something says there should be, and how many of them are here."""

    by: str
    promised: int
    received: int


@dataclass(frozen=True)
class Member:
    """One instance's part in a volume.

    Attributes
    ----------
    frames
        1-based frame numbers that belong to the volume; empty: a single-frame instance.
    """

    sop_instance_uid: str
    frames: tuple[int, ...] = ()


@dataclass(frozen=True)
class VolumeRef:
    """One volume of a complete series, as far as pairing must know it.

    Series Instance UID and `volume_number` name it. A dynamic, multi-echo, Dixon or diffusion series has several.

    Attributes
    ----------
    header
        The first instance's public, non-sequence, non-bulk elements by DICOM keyword; of a multi-frame instance those
        of its functional groups too.
    shape
        (slices, rows, columns).
    affine
        16 numbers, row-major (4, 4): array index (k, j, i, 1) → LPS mm.
    volume_number
        Position among the series' volumes, from 0, in the order of the split: first by what tells contrasts apart
        (echo, b-value, Dixon part …), then by time.
    volumes_in_series
        How many there are; 1 for an ordinary series.
    split_by
        What told the volumes apart, by DICOM keyword, with this volume's values: {"TemporalPositionIdentifier": 3},
        {"EchoTime": 4.6, "ImageType": ["M", "WATER"]}. Empty for an ordinary series. All volumes of a series have the
        same keywords.
    phase_index, phases
        Position in time, from 0, among the volumes that agree in all else, and how many those are; 0 and 1 where the
        series was not split by time.
    phase_time_s
        Seconds since the first of these phases; None where the headers do not tell.
    """

    patient_id: str
    issuer_of_patient_id: str
    patient_birth_date: str
    patient_sex: str
    study_instance_uid: str
    series_instance_uid: str
    frame_of_reference_uid: str
    modality: str
    shape: tuple[int, int, int]
    affine: tuple[float, ...]
    last_received_at: datetime
    header: Mapping[str, HeaderValue] = field(default_factory=dict)
    volume_number: int = 0
    volumes_in_series: int = 1
    split_by: Mapping[str, HeaderValue] = field(default_factory=dict)
    phase_index: int = 0
    phases: int = 1
    phase_time_s: float | None = None
    is_fetched: bool = False
    """Here only because a rule asked a PACS for it: fills roles `from: prior` and nothing else."""

    @property
    def n_slices(self) -> int:
        """Number of slices."""
        return self.shape[0]


@dataclass(frozen=True)
class Pair:
    """Two volumes that a rule joins: `moving` is brought onto `fixed`. Both may be of one series."""

    rule_id: str
    fixed_series_instance_uid: str
    moving_series_instance_uid: str
    fixed_volume_number: int = 0
    moving_volume_number: int = 0


@dataclass(frozen=True)
class Ambiguity:
    """What a rule cannot decide and a person can.

    Attributes
    ----------
    scope
        The same at every look; with patient and rule it names the work item.
    fixed, moving
        The volumes among which to choose: Series Instance UID and volume number.
    """

    rule_id: str
    scope: str
    reason: str
    fixed: tuple[tuple[str, int], ...]
    moving: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class WorkItem:
    """An ambiguity that waits for a person, or that was settled."""

    id: int
    patient: tuple[str, str]
    rule_version: int
    ambiguity: Ambiguity
    state: str
    """open; settled by a person; gone: the rules have decided since."""
    created_at: datetime
    closed_at: datetime | None = None
    closed_by: str = ""


@dataclass(frozen=True)
class JobPlan:
    """How the jobs of a rule are queued.

    Attributes
    ----------
    patience_s
        A job counts as due this long after it was made; the job that is due first begins first, so that no class of
        jobs can starve another.
    held
        Why it may not begin yet; empty: it may.
    is_one_job
        Pairs with the same fixed volume are one job.
    """

    patience_s: float = 3600.0
    held: str = ""
    is_one_job: bool = False


@dataclass(frozen=True)
class Job:
    """One registration to do, and how far it has come.

    Attributes
    ----------
    stage
        The step in hand: volumes, registration, verdict, objects, deliver, or empty before the first.
    attempts
        How often a worker took it up; a clean stop does not count.
    """

    id: str
    rule_id: str
    rule_version: int
    fixed_series_instance_uid: str
    moving_series_instance_uid: str
    state: JobState
    stage: str = ""
    attempts: int = 0
    verdict: Verdict | None = None
    reason: str = ""
    fixed_volume_number: int = 0
    moving_volume_number: int = 0


@dataclass(frozen=True)
class Product:
    """One instance that a job made: `kind` is series, sro or dsr; `instance` is where it is kept."""

    job_id: str
    kind: str
    instance: Instance


@dataclass(frozen=True)
class Delivery:
    """One instance on its way to one destination."""

    id: int
    instance: Instance
    destination: str
    state: DeliveryState
    attempts: int
    next_attempt_at: datetime
    status: int | None = None
    """The DIMSE status of the last answer, None where none came."""
    reason: str = ""
    priority: int = DeliveryPriority.NORMAL
    queued_at: datetime | None = None
    """When a job or a person put it on its way; the destination's deadline counts from here."""


@dataclass(frozen=True)
class Commitment:
    """A request for storage commitment whose report the requestor has not taken yet.

    Attributes
    ----------
    references
        (SOP Class UID, SOP Instance UID) of what it asks for.
    """

    id: int
    transaction_uid: str
    calling_ae_title: str
    address: str
    references: tuple[tuple[str, str], ...]
    attempts: int
    created_at: datetime
