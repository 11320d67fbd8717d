"""The node's configuration: one YAML file → frozen models, or every mistake in it by file, line and key.

Law: `load` reads its one file and nothing else. Names of later sections are fixed here and have no effect yet, which
is said.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from dicomnode import document
from dicomnode.destinations import SENDER, DestinationSection
from dicomnode.document import ProblemError, Section
from dicomnode.errors import StudyError
from dicomnode.fields import AETitle, Host, HostOrNetwork, LocalPath, Name, Port, matching
from dicomnode.remotes import Destination, Source
from dicomnode.schedule import Schedule

PRESETS = ("fast", "balanced", "accurate", "rigid", "paper-teacher", "paper-student")
"""Presets of the engine that a configuration or rule may name. Repeated here because this process must not import
the engine; a test compares the two."""

PRESET_PARAMETERS = {
    "voxels": (1000, 2**30, True),
    "smallest_determinant": (0.0, 1.0, False),
    "largest_displacement_mm": (0.1, 500.0, False),
}
"""What of a preset a rule may set: lowest, highest, whole numbers only. A test compares it with the engine."""

RESERVED = ("storage", "retention", "notify", "audit")
"""Sections of later versions: accepted, warned about, without effect."""


def load(path: Path | None) -> Config:
    """Read the configuration.

    Parameters
    ----------
    path
        A YAML file; relative paths in it are relative to its folder. None: every default, under the current folder.

    Raises
    ------
    ConfigError
        The file cannot be read or used; one problem per line.
    """
    if path is None:
        return _resolved(Config(), Path.cwd())
    found = document.check(document.parse(document.read(path), str(path)), Config)
    return _resolved(found, path.absolute().parent)


def schema() -> dict[str, Any]:
    """JSON Schema of the configuration file, with descriptions, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Config.model_json_schema()}


def _database_url(url: str) -> str:
    expected = "sqlite:///FILE or postgresql+psycopg://USER:PASSWORD@HOST:PORT/DATABASE"
    if re.fullmatch(r"postgresql\+psycopg://.+", url):
        try:
            _ = urlsplit(url).port
        except ValueError:
            raise ValueError(expected) from None
    elif not re.fullmatch(r"sqlite:///[^?\0]+", url) or ":memory:" in url:
        raise ValueError(expected)
    return url


def _mapping_or_list(value: object) -> object:
    if value is not None and not isinstance(value, dict | list):
        raise ValueError("a mapping")
    return value


DEVICE, DEVICES = r"auto|cpu|cuda(:\d{1,3})?", "auto, cpu, cuda or cuda:N (N from 0)"
Device = Annotated[str, AfterValidator(matching(DEVICE, DEVICES))]
Reserved = Annotated[
    Any, BeforeValidator(_mapping_or_list), Field(description="Reserved for a later version; no effect yet.")
]


def preset_name(name: str) -> str:
    """`name` if the engine has such a preset; else ValueError with the nearest one."""
    if name not in PRESETS:
        raise ValueError(f"one of {', '.join(PRESETS)}{document.nearest(name, PRESETS)}")
    return name


Preset = Annotated[str, AfterValidator(preset_name), Field(json_schema_extra={"enum": list(PRESETS)})]


class NodeSection(Section):
    """Who this node is and where it keeps what it has received."""

    ae_title: AETitle = Field(default="DICOMNODE", description="Our AE title.")
    host: Host = Field(default="0.0.0.0", description="Address to listen on.")  # noqa: S104 -- a DICOM node is there to be reached
    port: Port = Field(default=11112, description="Port to listen on.")
    data_dir: LocalPath = Field(
        default=Path("dicomnode-data"), description="Folder of the received instances and results."
    )
    quiet_period_s: float = Field(
        default=30.0, strict=True, gt=0, description="A series is complete this long after its last instance, seconds."
    )
    incomplete_wait_s: float = Field(
        default=300.0,
        strict=True,
        ge=0,
        description="A series that lacks slices, or instances its headers promise, is waited for this long, seconds.",
    )
    late_instances: Literal["rerun", "append", "ignore"] = Field(
        default="rerun",
        description="When instances come after their series was registered. rerun: complete it again and register it "
        "again, the former jobs superseded; append: complete it again, pairs made stand; ignore: a note.",
    )
    duplicates: Literal["flag", "keep-first", "replace"] = Field(
        default="flag",
        description="Other content under a stored SOP Instance UID: flag (keep both, use the first), keep-first "
        "(refuse it with 0x0111), replace (keep both, use the last).",
    )


class DatabaseSection(Section):
    """Where the index is kept."""

    url: Annotated[str, AfterValidator(_database_url)] = Field(
        default="sqlite:///{data_dir}/node.db",
        repr=False,  # it may carry a password
        description="sqlite:///FILE or postgresql+psycopg://…; {data_dir} stands for node.data_dir.",
    )


class SourceSection(Section):
    """A PACS that rules ask for earlier examinations."""

    name: Name = Field(description="Our word for it, unique.")
    ae_title: AETitle = Field(description="Its AE title.")
    host: Host = Field(default="127.0.0.1", description="Its host name or address.")
    port: Port = Field(default=104, description="Its port.")
    fetch: Literal["c-move", "c-get", "dicomweb"] = Field(
        default="c-move", description="c-move needs our AE title, host and port at the source; dicomweb needs url."
    )
    url: Annotated[str, AfterValidator(matching(r"|https?://\S+[^/\s]", "http(s)://…, without / at its end"))] = Field(
        default="", description="Base of its DICOMweb service."
    )
    hours: Schedule | None = Field(default=None, description="When it may be asked, but for urgent rules.")
    max_instances: int = Field(default=5000, strict=True, ge=1, description="That one request may bring here.")
    timeout_s: float = Field(default=60.0, strict=True, gt=0, description="Without an answer for this long: lost.")
    counts: bool = Field(
        default=False, strict=True, description="Ask it how many instances a series has, and wait for those missing."
    )

    @model_validator(mode="after")
    def _reachable(self) -> SourceSection:
        if self.fetch == "dicomweb" and not self.url:
            raise ProblemError(("url",), "nothing", "the base of its DICOMweb service where fetch is dicomweb")
        return self


class WorkerSection(Section):
    """How registrations are computed."""

    device: Device = Field(default="auto", description="auto, cpu, cuda or cuda:N.")
    preset: Preset = Field(default="balanced", description="Preset of rules that name none.")


class AccessSection(Section):
    """Who may send."""

    mode: Literal["any", "known"] = Field(
        default="any", description="any: whoever reaches the port, warned about; known: only those under peers."
    )
    require_called_ae_title: bool = Field(
        default=False, strict=True, description="Reject callers that do not call us by node.ae_title."
    )
    unknown_sop_classes: bool = Field(
        default=True, strict=True, description="Store private and future SOP classes, whatever UID is proposed."
    )


class PeerSection(Section):
    """A system that may send where access.mode is known."""

    ae_title: AETitle = Field(description="Its calling AE title.")
    host: HostOrNetwork | None = Field(
        default=None, description="Its address, network (10.1.0.0/16) or host name; left out: any address."
    )
    max_associations: int | None = Field(
        default=None, strict=True, ge=1, description="Associations it may have open at once; left out: no own limit."
    )
    port: Port | None = Field(
        default=None, description="Where it takes storage commitment reports, and results that go back to who sent."
    )


class LimitsSection(Section):
    """Bounds on what peers may ask of us."""

    max_associations: int = Field(default=20, strict=True, ge=1, le=1000, description="Associations open at once.")
    max_pdu: int = Field(
        default=131072, strict=True, ge=4096, le=1048576, description="Largest PDU we accept, bytes (PS3.8 D.1)."
    )
    network_timeout_s: float = Field(
        default=60.0, strict=True, gt=0, description="An association silent for this long is closed, seconds."
    )
    artim_timeout_s: float = Field(
        default=15.0, strict=True, gt=0, description="From a connection to its whole association request, seconds."
    )
    max_instance_mb: int = Field(default=8192, strict=True, ge=1, description="Largest data set taken, MiB.")
    refuse_below_free_mb: int = Field(
        default=1024, strict=True, ge=0, description="Instances are refused (0xA700) while less is free, MiB."
    )
    reject_below_free_mb: int = Field(
        default=512, strict=True, ge=0, description="Associations are rejected while less is free, MiB."
    )


class TlsSection(Section):
    """Mutual TLS by BCP 195: 1.2 or 1.3, and every peer shows a certificate."""

    certificate: LocalPath = Field(description="Our certificate chain, PEM.")
    key: LocalPath = Field(description="Its private key, PEM.")
    client_ca: LocalPath = Field(description="Who signs the peers' certificates, PEM.")
    port: Port | None = Field(
        default=None, description="Port for TLS beside node.port in the clear; left out: node.port speaks TLS alone."
    )


class WebSection(Section):
    """The HTTP server, for DICOMweb (STOW-RS); encrypted where `tls` stands."""

    host: Host = Field(default="127.0.0.1", description="Address to listen on.")
    port: Port = Field(default=8080, description="Port to listen on.")


class LogSection(Section):
    """What is logged."""

    level: Literal["debug", "info", "warning", "error"] = Field(default="info", description="Least severity to log.")


class Config(Section):
    """The whole configuration; every path absolute and the database URL complete once `load` has returned it."""

    node: NodeSection = NodeSection()
    database: DatabaseSection = DatabaseSection()
    destination_sections: tuple[DestinationSection, ...] = Field(
        default=(), alias="destinations", description="Where results are sent."
    )
    source_sections: tuple[SourceSection, ...] = Field(
        default=(), alias="sources", description="Where rules fetch earlier examinations from."
    )
    worker: WorkerSection = WorkerSection()
    rules_path: LocalPath | None = Field(
        default=None, alias="rules", description="The pairing rules' file; left out: nothing is registered."
    )
    access: AccessSection = AccessSection()
    peers: tuple[PeerSection, ...] = Field(default=(), description="Systems that may send where access.mode is known.")
    limits: LimitsSection = LimitsSection()
    log: LogSection = LogSection()
    tls: TlsSection | None = Field(default=None, description="Left out: nothing is encrypted.")
    web: WebSection | None = Field(default=None, description="Left out: no HTTP.")
    storage: Reserved = None
    retention: Reserved = None
    notify: Reserved = None
    audit: Reserved = None

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        names = [destination.name for destination in self.destination_sections]
        for index, name in enumerate(names):
            if name in names[:index]:
                raise ProblemError(("destinations", index, "name"), name, "a name that no other destination has")
            if name == SENDER:
                raise ProblemError(("destinations", index, "name"), name, "another name: this one means whoever sent")
        if self.access.mode == "known" and not self.peers:
            raise ProblemError(("peers",), "no peers", "at least one peer where access.mode is known")
        if self.limits.reject_below_free_mb > self.limits.refuse_below_free_mb:
            raise ProblemError(
                ("limits", "reject_below_free_mb"),
                self.limits.reject_below_free_mb,
                f"at most refuse_below_free_mb, {self.limits.refuse_below_free_mb}",
            )
        if self.tls is not None and self.tls.port == self.node.port:
            raise ProblemError(("tls", "port"), self.tls.port, "another port than node.port, or none")
        taken = {self.node.port} if self.tls is None else {self.node.port, self.tls.port}
        if self.web is not None and self.web.port in taken and self._share_an_address():
            raise ProblemError(("web", "port"), self.web.port, "another port than node.port and tls.port")
        return self

    def _share_an_address(self) -> bool:
        """Whether DICOM and HTTP listen on one address."""
        hosts = {self.node.host, "" if self.web is None else self.web.host}
        return len(hosts) == 1 or not hosts.isdisjoint({"0.0.0.0", "::"})  # noqa: S104 - every address is one of them

    @property
    def data_dir(self) -> Path:
        """Folder of the received instances and results."""
        return self.node.data_dir

    @property
    def database_url(self) -> str:
        """Where the index is kept."""
        return self.database.url

    @property
    def destinations(self) -> tuple[Destination, ...]:
        """Where results are sent."""
        return tuple(section.destination() for section in self.destination_sections)

    @property
    def peer_destinations(self) -> tuple[Destination, ...]:
        """Peers that results can go back to, under names that no configured destination can have."""
        return tuple(
            Destination(f"{SENDER}:{peer.ae_title}", peer.ae_title, peer.host, peer.port)
            for peer in self.peers
            if peer.port is not None and peer.host is not None and "/" not in peer.host
        )

    def route(self, asked: Sequence[str] | None, senders: Sequence[str]) -> list[str]:
        """Names of the destinations that a rule asks for.

        Parameters
        ----------
        asked
            As the rule has them; None: every one.
        senders
            Calling AE titles of whoever sent, for `sender`: the destination of that AE title, or the peer with a
            host and a port.

        Raises
        ------
        StudyError
            One is not configured (any more).
        """
        configured = {each.name for each in self.destinations}
        names: dict[str, None] = {}
        for name in [each.name for each in self.destinations] if asked is None else asked:
            if name != SENDER:
                if name not in configured:
                    raise StudyError(f"destination {name} of the rule is not configured any more")
                names[name] = None
                continue
            known = {each.ae_title: each.name for each in (*self.peer_destinations, *self.destinations)}
            if missing := [each for each in senders if each not in known]:
                whose = f"{', '.join(missing)}, who sent the fixed series"
                raise StudyError(f"results cannot go back to {whose}: no such destination, nor peer with host and port")
            names |= {known[each]: None for each in senders}
        return list(names)

    @property
    def sources(self) -> tuple[Source, ...]:
        """Where rules fetch earlier examinations from."""
        return tuple(
            Source(
                s.name,
                s.ae_title,
                s.host,
                s.port,
                s.fetch,
                s.url,
                None if s.hours is None else s.hours.next_start,
                s.max_instances,
                s.timeout_s,
                s.counts,
            )
            for s in self.source_sections
        )

    def warnings(self) -> list[str]:
        """What is allowed and yet worth a line at each start."""
        found = []
        if self.access.mode == "any":
            found.append("access.mode is any: every system that reaches the port may send; see access and peers")
        if not self.destinations:
            found.append("no destinations are configured: results are kept and sent nowhere")
        if self.rules_path is None:
            found.append("no rules are configured: series are received and never registered")
        found += [
            f"section {name} is reserved for a later version and has no effect yet"
            for name in RESERVED
            if getattr(self, name) is not None
        ]
        return found


def _resolved(config: Config, folder: Path) -> Config:
    """The same with absolute paths and the database URL complete."""
    data_dir = folder / config.node.data_dir
    url = config.database.url.replace("{data_dir}", str(data_dir))
    if url.startswith("sqlite:///"):
        url = f"sqlite:///{folder / url.removeprefix('sqlite:///')}"
    return config.model_copy(
        update={
            "node": config.node.model_copy(update={"data_dir": data_dir}),
            "database": config.database.model_copy(update={"url": url}),
            "destination_sections": tuple(section.resolved(folder) for section in config.destination_sections),
            "rules_path": None if config.rules_path is None else folder / config.rules_path,
            "tls": None
            if config.tls is None
            else config.tls.model_copy(
                update={name: folder / getattr(config.tls, name) for name in ("certificate", "key", "client_ca")}
            ),
        }
    )
