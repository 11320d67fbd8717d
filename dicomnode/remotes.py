"""Whom the node speaks to of its own accord: where earlier examinations come from, where results are sent.

Frozen values, as in `model`; whoever configures them turns clock times into functions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path


@dataclass(frozen=True)
class Source:
    """A PACS that earlier examinations come from.

    Attributes
    ----------
    fetch
        c-move, c-get or dicomweb.
    url
        Base of its DICOMweb service.
    hours
        Local time → when a request may begin; None: always.
    max_instances
        That one request may bring here.
    counts
        Whether it is asked how many instances a series has that was sent here.
    """

    name: str
    ae_title: str
    host: str
    port: int
    fetch: str = "c-move"
    url: str = ""
    hours: Callable[[datetime], datetime] | None = None
    max_instances: int = 5000
    timeout_s: float = 60.0
    counts: bool = False


@dataclass(frozen=True)
class TlsFiles:
    """What an encrypted association of ours is opened with, PEM: our certificates, their key, the peers' authority."""

    certificate: Path
    key: Path
    ca: Path
    check_host_name: bool = True


@dataclass(frozen=True)
class Availability:
    """Who takes Instance Availability Notifications."""

    ae_title: str
    host: str
    port: int


@dataclass(frozen=True)
class Destination:
    """Where results are sent.

    Attributes
    ----------
    associations
        Open at once, at most.
    first_pause_s, pause_factor, longest_pause_s
        Back-off between attempts.
    give_up_after_s
        From when an instance was put on its way; None: never.
    hours
        Local time → when sending may begin, but for urgent results; None: always.
    url
        Base of a DICOMweb service: results go to it by STOW-RS. Empty: by C-STORE.
    skip_present
        Ask it by C-FIND what it has, and do not send that.
    commitment_within_s
        Ask it for storage commitment, again where no report came in so long; None: do not.
    announce_to
        Who is told when all of a job has arrived there.
    """

    name: str
    ae_title: str
    host: str
    port: int
    associations: int = 2
    first_pause_s: float = 5.0
    pause_factor: float = 2.0
    longest_pause_s: float = 300.0
    give_up_after_s: float | None = None
    hours: Callable[[datetime], datetime] | None = None
    is_paused: bool = False
    timeout_s: float = 60.0
    tls: TlsFiles | None = None
    url: str = ""
    skip_present: bool = False
    commitment_within_s: float | None = None
    announce_to: Availability | None = None
