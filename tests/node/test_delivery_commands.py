"""`resend`, `hold`, `release`: what a person does with deliveries, by the command line's own functions."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from outbox import Outbox, make_dataset
from receiving_scp import ReceivingSCP

from dicomnode.cli import main


@pytest.fixture
def outbox(tmp_path: Path) -> Iterator[Outbox]:
    made = Outbox(tmp_path / "data")
    pacs = {"name": "pacs", "ae_title": "PACS", "host": "127.0.0.1", "port": 104}
    (tmp_path / "node.yaml").write_text(json.dumps({"node": {"data_dir": "data"}, "destinations": [pacs]}))
    yield made
    made.index.close()


def dicomnode(outbox: Outbox, *arguments: str) -> int:
    return main([*arguments, "--config", str(outbox.archive.root.parent / "node.yaml")])


def test_what_was_refused_goes_again_where_a_person_asks_for_it(outbox: Outbox) -> None:
    refused = {"2.25.7.1": 0xC000}
    with ReceivingSCP(answer=lambda uid: refused.get(uid, 0)) as pacs:
        outbox.put(make_dataset(1), make_dataset(2))
        service = outbox.service(pacs)
        service.once()
        assert dicomnode(outbox, "resend", outbox.job_id[:8]) == 0
        outbox.clock.advance(days=3650)  # the command has the real clock
        service.once()
        assert outbox.states()["2.25.7.1"] == "failed"
        refused.clear()
        assert dicomnode(outbox, "resend", "--instance", "2.25.7.1") == 0
        outbox.clock.advance(days=3650)
        service.once()
        assert dicomnode(outbox, "resend", "--destination", "pacs") == 1  # nothing left
        assert dicomnode(outbox, "resend", "--destination", "pacs", "--delivered") == 0

    assert pacs.stored_uids == ["2.25.7.2", "2.25.7.1"]
    assert set(outbox.states().values()) == {"waiting"}


def test_a_job_that_is_held_is_not_sent_before_it_is_released(outbox: Outbox) -> None:
    with ReceivingSCP() as pacs:
        outbox.put(make_dataset(1))
        service = outbox.service(pacs)
        assert dicomnode(outbox, "hold", outbox.job_id, "--reason", "wrong patient?") == 0
        assert service.once() == 0
        assert outbox.rows()["2.25.7.1"]["reason"] == "wrong patient?"
        assert dicomnode(outbox, "release", outbox.job_id) == 0
        assert dicomnode(outbox, "release", outbox.job_id) == 1
        outbox.clock.advance(days=3650)
        assert service.once() == 1

    assert pacs.stored_uids == ["2.25.7.1"]


def test_a_destination_that_is_held_gets_nothing_that_comes_later_either(outbox: Outbox) -> None:
    with ReceivingSCP() as pacs:
        service = outbox.service(pacs)
        assert dicomnode(outbox, "hold", "--destination", "pacs") == 0
        outbox.put(make_dataset(1))
        assert service.once() == 0
        (held,) = outbox.index.status()["held_destinations"]
        assert (held["destination"], held["reason"]) == ("pacs", "held by a person")
        assert dicomnode(outbox, "release", "--destination", "pacs") == 0
        assert dicomnode(outbox, "release", "--destination", "pacs") == 1
        assert service.once() == 1


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["resend"], "a job, or --destination"),
        (["hold"], "a job, or --destination"),
        (["hold", "--destination", "pasc"], "a destination of the configuration (pacs)"),
        (["release", "no-such-job"], "the id of one job"),
        (["reject", ""], "the id of one job"),
        (["export", "", "--out", "x"], "the id of one job"),
        (["reproduce", "{job}", "--out", "x", "--device", "gpu"], "cuda:N"),
        (["export", "{job}", "--out", "/dev/null/x"], "a folder that is not there yet and can be made"),
    ],
)
def test_a_call_that_names_nothing_or_nobody_is_refused(
    outbox: Outbox, arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    outbox.put(make_dataset(1))
    assert dicomnode(outbox, *(each.format(job=outbox.job_id) for each in arguments)) == 2
    assert expected in capsys.readouterr().err
