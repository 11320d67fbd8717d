"""A real archive and index with a finished job whose instances wait to be delivered, and a service to do it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    CTImageStorage,
    ExplicitVRLittleEndian,
)
from receiving_scp import ReceivingSCP

from dicomnode.archive import Archive
from dicomnode.delivery import DeliveryService
from dicomnode.index import Index
from dicomnode.model import DeliveryPriority, Instance, InstanceHeader, Member, Pair, Product, SeriesState, VolumeRef
from dicomnode.remotes import Destination

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


class Clock:
    """Stands still until told otherwise."""

    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> datetime:
        return self.now

    def advance(self, **by: float) -> None:
        self.now += timedelta(**by)


class Outbox:
    """A real archive and index whose only job has made some instances."""

    def __init__(self, folder: Path) -> None:
        self.archive = Archive(folder)
        self.index = Index(f"sqlite:///{folder}/node.db")
        self.index.migrate()
        self.clock = Clock()
        self.job_id = self._make_job()

    def put(
        self,
        *datasets: Dataset,
        destinations: tuple[str, ...] = ("pacs",),
        priority: DeliveryPriority = DeliveryPriority.NORMAL,
    ) -> list[Instance]:
        instances = [self.archive.keep_dataset(dataset) for dataset in datasets]
        self.index.add_products(Product(self.job_id, "series", instance) for instance in instances)
        self.index.enqueue_deliveries(self.job_id, list(destinations), now=self.clock(), priority=priority)
        return instances

    def service(self, *scps: ReceivingSCP, names: tuple[str, ...] = ("pacs",), **options: Any) -> Delivering:
        destinations = [
            Destination(name, scp.ae_title, "127.0.0.1", scp.port, **{"timeout_s": 5.0, **options})
            for name, scp in zip(names, scps, strict=True)
        ]
        return Delivering(destinations, self.index, self.archive, ae_title="NODE", clock=self.clock)

    def rows(self) -> dict[str, dict[str, Any]]:
        return {row["sop_instance_uid"]: row for row in self.index.status()["deliveries"]}

    def states(self) -> dict[str, str]:
        return {uid: row["state"] for uid, row in self.rows().items()}

    def _make_job(self) -> str:
        """The shortest way to a job that the index offers."""
        association = self.index.open_association(calling_ae_title="A", called_ae_title="B", address="", now=NOW)
        for number, uid in enumerate(("1.2", "1.3")):
            received = Instance(f"{uid}.1", CTImageStorage, ExplicitVRLittleEndian, f"{number}", f"{number}", 1)
            header = InstanceHeader("P", "", "", "", "1.1", uid, "CT", False)
            self.index.add_instance(received, header, association_id=association, now=NOW)
        self.index.close_association(association, now=NOW)
        for activity in self.index.activities():
            facts = VolumeRef(
                "P", "", "", "", "1.1", activity.series_instance_uid, "1.9", "CT", (1, 1, 1), (0.0,) * 16, NOW
            )
            self.index.complete_series(
                activity,
                state=SeriesState.UNPAIRED,
                reason="",
                volumes=[(facts, [Member(f"{activity.series_instance_uid}.1")])],
            )
        version = self.index.rule_set_version("rules", "sha", now=NOW)
        (job_id,) = self.index.add_pairs(
            [Pair("r", "1.2", "1.3")], {}, rule_version=version, enqueue=lambda _connection, _job, _due: None, now=NOW
        )
        return job_id


class Delivering(DeliveryService):
    """A service whose single destination a test sends to by hand."""

    def __init__(self, destinations: list[Destination], *args: Any, **options: Any) -> None:
        super().__init__(destinations, *args, **options)
        self.destinations = destinations

    def once(self) -> int:
        return self.deliver_due(self.destinations[0])


def make_dataset(number: int, *, sop_class_uid: str = CTImageStorage, syntax: str = ExplicitVRLittleEndian) -> Dataset:
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.SOPClassUID = sop_class_uid
    dataset.SOPInstanceUID = f"2.25.7.{number}"
    dataset.PatientName = "Phantom^One"
    dataset.BitsAllocated = 16
    dataset.PixelRepresentation = 1
    dataset.private_block(0x0009, "DICOMNODE", create=True).add_new(0x01, "DS", "1.5")
    dataset.PixelData = os.urandom(50_000)
    return dataset


def data_set_of(path: Path) -> bytes:
    content = path.read_bytes()
    return content[144 + int.from_bytes(content[140:144], "little") :]


def wait_until(condition: Callable[[], bool], *, timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def listens(port: int) -> bool:
    """Without connecting: storescp would log a broken association."""
    return any(line.split()[1].endswith(f":{port:04X}") and line.split()[3] == "0A" for line in tcp_table())


def tcp_table() -> list[str]:
    return [line for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
