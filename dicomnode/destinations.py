"""Where results are sent, as an administrator writes it down."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, model_validator

from dicomnode.document import ProblemError, Section
from dicomnode.fields import AETitle, Host, LocalPath, Name, Port, matching
from dicomnode.outputs import each_an_output
from dicomnode.remotes import Availability, Destination, TlsFiles
from dicomnode.schedule import Schedule

SENDER = "sender"
"""What rules call whoever sent the fixed series."""


class RetrySection(Section):
    """When what could not be sent is tried again."""

    first_s: float = Field(default=5.0, strict=True, gt=0, description="Pause after the first attempt, seconds.")
    factor: float = Field(default=2.0, strict=True, ge=1, le=100, description="Each pause is so much longer.")
    longest_s: float = Field(default=300.0, strict=True, gt=0, description="The longest pause, seconds.")
    give_up_after_h: float | None = Field(
        default=None, strict=True, gt=0, description="Failed for good after so many hours; left out: never."
    )

    @model_validator(mode="after")
    def _grows(self) -> RetrySection:
        if self.longest_s < self.first_s:
            raise ProblemError(("longest_s",), self.longest_s, f"at least first_s, {self.first_s}")
        return self


class DestinationTlsSection(Section):
    """Mutual TLS by BCP 195: 1.2 or 1.3."""

    certificate: LocalPath = Field(description="Our certificate chain, PEM.")
    key: LocalPath = Field(description="Its private key, PEM.")
    ca: LocalPath = Field(description="Who signs the destination's certificate, PEM.")
    check_host_name: bool = Field(
        default=True, strict=True, description="The certificate must be of the host name or address we connect to."
    )


class AvailabilitySection(Section):
    """Who is told when results have arrived (Instance Availability Notification)."""

    ae_title: AETitle = Field(description="Its AE title.")
    host: Host = Field(description="Its host name or address.")
    port: Port = Field(description="Its port.")


class DestinationSection(Section):
    """A Storage SCP, or with `url` a STOW-RS service, that results are sent to."""

    name: Name = Field(description="Our word for it, unique.")
    ae_title: AETitle = Field(description="Its AE title.")
    host: Host = Field(description="Its host name or address.")
    port: Port = Field(description="Its port.")
    url: Annotated[
        str, AfterValidator(matching(r"|https?://[^\s/@]+(/\S*)?[^/\s]", "http(s)://…, without / at its end"))
    ] = Field(default="", description="Base of its DICOMweb service; then ae_title, host and port are left out.")
    associations: int = Field(default=2, strict=True, ge=1, le=16, description="Open at once.")
    timeout_s: float = Field(default=60.0, strict=True, gt=0, description="Without an answer for this long: lost.")
    retry: RetrySection = Field(default=RetrySection(), description="When what could not be sent is tried again.")
    hours: Schedule | None = Field(default=None, description="When results are sent, but for urgent rules.")
    paused: bool = Field(default=False, strict=True, description="Send nothing; results wait.")
    skip_present: bool = Field(
        default=False, strict=True, description="Ask it by C-FIND what it has, and do not send that."
    )
    commitment_within_h: float | None = Field(
        default=None,
        strict=True,
        gt=0,
        description="Ask for storage commitment, again where no report came within so many hours; left out: do not.",
    )
    rejection_notes: bool = Field(
        default=True, strict=True, description="Send it the rejection notes that rules ask for, about what it has."
    )
    outputs: Annotated[tuple[str, ...], AfterValidator(each_an_output)] = Field(
        default=(), description="It gets these of a rule's outputs; left out: all."
    )
    announce_to: AvailabilitySection | None = Field(default=None, description="Left out: nobody is told.")
    tls: DestinationTlsSection | None = Field(default=None, description="Left out: not encrypted.")

    @model_validator(mode="before")
    @classmethod
    def _from_url(cls, values: Any) -> Any:
        """A STOW-RS service has its host and port in its URL, and no AE title."""
        if not isinstance(values, dict) or not isinstance(values.get("url"), str) or "url" not in values:
            return values
        try:
            parts = urlsplit(values["url"])
            port = parts.port or (443 if parts.scheme == "https" else 80)
        except ValueError:
            return values
        return {"ae_title": "STOW-RS", "host": parts.hostname or "", "port": port, **values}

    @model_validator(mode="after")
    def _dimse_only(self) -> DestinationSection:
        for key in ("skip_present", "commitment_within_h"):
            if self.url and getattr(self, key):
                raise ProblemError((key,), getattr(self, key), "nothing where url is given: it is asked by DIMSE")
        return self

    @property
    def kinds(self) -> frozenset[str]:
        """The kinds of products it gets: a series of all phases is one too."""
        return frozenset("series" if name == "series_4d" else name for name in self.outputs)

    def destination(self) -> Destination:
        """The same for the rooms that send."""
        retry, tls, told = self.retry, self.tls, self.announce_to
        hours = retry.give_up_after_h
        within = self.commitment_within_h
        return Destination(
            self.name,
            self.ae_title,
            self.host,
            self.port,
            url=self.url,
            associations=self.associations,
            timeout_s=self.timeout_s,
            first_pause_s=retry.first_s,
            pause_factor=retry.factor,
            longest_pause_s=retry.longest_s,
            give_up_after_s=None if hours is None else 3600 * hours,
            hours=None if self.hours is None else self.hours.next_start,
            is_paused=self.paused,
            skip_present=self.skip_present,
            commitment_within_s=None if within is None else 3600 * within,
            announce_to=None if told is None else Availability(told.ae_title, told.host, told.port),
            tls=None if tls is None else TlsFiles(tls.certificate, tls.key, tls.ca, tls.check_host_name),
        )

    def resolved(self, folder: Path) -> DestinationSection:
        """The same with absolute paths."""
        if self.tls is None:
            return self
        paths = {name: folder / getattr(self.tls, name) for name in ("certificate", "key", "ca")}
        return self.model_copy(update={"tls": self.tls.model_copy(update=paths)})
