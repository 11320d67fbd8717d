"""When the indexer gives way to senders; what it reads and refuses is tried with the listener and the doors."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from dicomnode.archive import Archive
from dicomnode.index import Index
from dicomnode.indexer import BATCH, Indexer, is_streaming
from dicomnode.intake import Intake
from dicomnode.spool import Source
from dicomnode.volumes import instance_header

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


@pytest.mark.parametrize(
    ("oldest_s", "recent_s", "streams"),
    [
        (1.0, 0.5, True),
        (9.9, 1.4, True),
        (10.0, 0.1, False),  # whatever streams in: it has waited long enough
        (2.0, 1.5, False),  # the stream has ended, or is a slow one
        (-3600.0, -3600.0, False),  # the clock was set back
    ],
)
def test_a_fast_stream_is_given_way_to_and_never_for_long(oldest_s: float, recent_s: float, *, streams: bool) -> None:
    oldest, recent = (NOW - timedelta(seconds=each) for each in (oldest_s, recent_s))

    assert is_streaming(oldest, recent, now=NOW) is streams


def test_headers_are_read_at_once_where_few_come_and_after_the_stream_where_many_do(tmp_path: Path) -> None:
    now = NOW
    archive, index = Archive(tmp_path), Index(f"sqlite:///{tmp_path}/node.db")
    index.migrate()
    indexer = Indexer(index, archive, instance_header)
    intake = Intake(archive, index, clock=lambda: now)
    source = Source.new("CT", "NODE", "127.0.0.1")

    def receive(count: int) -> None:
        for number in range(count):
            reception = intake.begin(sop_class_uid="1.2", sop_instance_uid=f"1.2.{number}", transfer_syntax_uid="1.2")
            intake.keep(reception, source, now)
        intake.flush()

    assert not indexer.gives_way(now)
    receive(BATCH - 1)
    assert not indexer.gives_way(now)
    receive(1)
    assert indexer.gives_way(now)
    assert not indexer.gives_way(now + timedelta(seconds=2))

    now += timedelta(seconds=11)
    receive(BATCH)
    assert not indexer.gives_way(now)
    assert indexer.run_once() == BATCH
    assert indexer.gives_way(now)
    index.close()
