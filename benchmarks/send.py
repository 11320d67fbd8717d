"""How fast results are sent: our delivery and DCMTK's `storescu`, side by side in one run, to the same receivers.

    make bench-send

Receivers: DCMTK's `storescp` as it is installed (Nagle's algorithm on), the same with TCP_NODELAY=1, and Orthanc both
ways. Each gets the same CT instances of 512x512 from both senders, in turn, into an empty folder. Ours goes the whole
way: from waiting rows of the ledger to delivered ones, the index on the same disk.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pydicom

from benchmarks import receive
from benchmarks.receive import Orthanc, Receiver, Storescp, make_instances, wait_for
from dicomnode.archive import Archive
from dicomnode.delivery import DeliveryService
from dicomnode.index import Index
from dicomnode.model import Product
from dicomnode.remotes import Destination

NODELAY = {**os.environ, "TCP_NODELAY": "1"}
STOCK = {name: value for name, value in os.environ.items() if name != "TCP_NODELAY"}


class StockStorescp(Storescp):
    """One process, one association at a time, PDUs of 16 KiB: its defaults."""

    name = "storescp"

    def command(self) -> list[str]:
        """Every transfer syntax, so that nothing is decided by negotiation."""
        (self.folder / "data").mkdir()
        return ["storescp", "--accept-all", "-od", str(self.folder / "data"), str(self.port)]


class ForkingStorescp(StockStorescp):
    """A process for each association."""

    name = "storescp --fork"

    def command(self) -> list[str]:
        """The same otherwise."""
        return [*super().command(), "--fork"]


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--instances", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where files are written, sent and received alike")
    arguments = parser.parse_args()
    receivers: list[tuple[type[Receiver], dict[str, str], str]] = [
        (StockStorescp, STOCK, "stock"),
        (StockStorescp, NODELAY, "NODELAY"),
        (ForkingStorescp, NODELAY, "NODELAY"),
    ]
    if receive.ORTHANC:
        receivers += [(Orthanc, STOCK, "stock"), (Orthanc, NODELAY, "NODELAY")]
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        paths = make_instances(folder / "sent", arguments.instances)
        rates: dict[tuple[str, str, str], list[float]] = {}
        for round_number in range(arguments.rounds):
            outbox = Outbox(folder / f"outbox-{round_number}", paths)
            for number, (receiver_class, environment, kind) in enumerate(receivers):
                senders: list[tuple[str, Callable[[int], None]]] = [
                    ("storescu", lambda port, env=environment: storescu(port, paths, env)),  # type: ignore[misc]
                    ("dicomnode", lambda port, box=outbox, nth=number: box.send(port, f"peer-{nth}")),  # type: ignore[misc]
                ]
                for sender, send in senders if round_number % 2 else reversed(senders):
                    receive.ENVIRONMENT = environment
                    receiver = receiver_class(folder / "receiver")
                    try:
                        started = time.monotonic()
                        send(receiver.port)
                        rate = len(paths) / (time.monotonic() - started)
                        wait_for(lambda held=receiver: held.stored() == len(paths), "all instances to be held")  # type: ignore[misc]
                    finally:
                        receiver.stop()
                    rates.setdefault((receiver_class.name, kind, sender), []).append(rate)
                    print(f"  {receiver_class.name} ({kind}), {sender}: {rate:.0f}/s", flush=True)
            outbox.close()
    print(f"\n{arguments.instances} instances of 512x512, instances/s, median of {arguments.rounds} rounds\n")
    print("receiver                    storescu  dicomnode   x storescu")
    for receiver_class, _, kind in receivers:
        theirs, ours = (
            statistics.median(rates[receiver_class.name, kind, sender]) for sender in ("storescu", "dicomnode")
        )
        print(f"{receiver_class.name + ', ' + kind:28}{theirs:8.0f}{ours:11.0f}{ours / theirs:13.2f}")


def storescu(port: int, paths: list[Path], environment: dict[str, str]) -> None:
    """Send all over one association; CalledProcessError unless all of it was taken."""
    command = ["storescu", "-xe", "-aec", "ANY-SCP", "127.0.0.1", str(port), *map(str, paths)]
    subprocess.run(command, env=environment, check=True)


class Outbox:
    """A node's archive and index with one job whose products are the instances."""

    def __init__(self, folder: Path, paths: list[Path]) -> None:
        self.archive = Archive(folder)
        self.index = Index(f"sqlite:///{folder}/node.db")
        self.index.migrate()
        with self.index.engine.begin() as connection:  # what a job refers to is of no interest here
            connection.exec_driver_sql("PRAGMA foreign_keys=OFF")
            connection.exec_driver_sql(
                "INSERT INTO job (id, pair_id, state, stage, progress, attempts, reason, report, created_at) "
                "VALUES ('job', 1, 'running', '', 0, 1, '', '{}', '2026-01-01')"
            )
        self.index.add_products(
            Product("job", "series", self.archive.keep_dataset(pydicom.dcmread(path))) for path in paths
        )

    def send(self, port: int, name: str) -> None:
        """From rows that wait to rows that are delivered; RuntimeError unless all are."""
        self.index.enqueue_deliveries("job", [name], now=datetime.now(UTC))
        destination = Destination(name, "ANY-SCP", "127.0.0.1", port)
        service = DeliveryService([destination], self.index, self.archive, ae_title="NODE")
        while service.deliver_due(destination):
            pass
        states = {row["state"] for row in self.index.status()["deliveries"] if row["destination"] == name}
        if states != {"delivered"}:
            raise RuntimeError(f"deliveries are {states}")

    def close(self) -> None:
        """Give back the database."""
        self.index.close()


if __name__ == "__main__":
    sys.exit(main())
