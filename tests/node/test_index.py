"""The index: durable, one commit per change, migrations equal to the tables."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from dicomnode.errors import LocalError
from dicomnode.index import Added, Attempt, Index, Which, open_index
from dicomnode.index.tables import METADATA
from dicomnode.model import (
    Ambiguity,
    DeliveryPriority,
    DeliveryState,
    Instance,
    InstanceHeader,
    JobState,
    Member,
    Pair,
    Product,
    SeriesActivity,
    SeriesState,
    Verdict,
    VolumeRef,
)

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
LATER = NOW + timedelta(seconds=1)


@pytest.fixture(params=["sqlite", "postgresql"])
def index(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Index]:
    if request.param == "sqlite":
        made = Index(f"sqlite:///{tmp_path}/node.db")
    else:
        made = Index(request.getfixturevalue("postgresql").new_database())
    made.migrate()
    yield made
    made.close()


def stored(uid: str, sha256: str = "a" * 64) -> Instance:
    return Instance(uid, "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.1.2.1", f"{uid}.dcm", sha256, 100)


def header(series: str, *, study: str = "1.1", patient: str = "P", own: bool = False) -> InstanceHeader:
    return InstanceHeader(patient, "", "", "", study, series, "CT", own)


def facts(activity: SeriesActivity) -> VolumeRef:
    return VolumeRef(
        activity.patient_id, "", "19600101", "F", activity.study_instance_uid, activity.series_instance_uid, "1.9",
        "CT", (3, 4, 5), tuple(float(n) for n in range(16)), activity.last_received_at, {"Modality": "CT", "Rows": 4},
    )  # fmt: skip


def receive(index: Index, *series: str, now: datetime = NOW) -> None:
    association = index.open_association(calling_ae_title="CT1", called_ae_title="NODE", address="::1", now=now)
    for uid in series:
        index.add_instance(stored(f"{uid}.1"), header(uid), association_id=association, now=now)
    index.close_association(association, now=now)


def complete(index: Index, volumes: int = 1) -> None:
    for activity in index.activities():
        described = [
            (replace(facts(activity), volume_number=n, volumes_in_series=volumes), [Member(one.sop_instance_uid, (n,))])
            for n in range(volumes)
            for one in index.instances_of(activity.series_instance_uid)[:1]
        ]
        index.complete_series(activity, state=SeriesState.UNPAIRED, reason="", volumes=described)


def make_job(index: Index) -> str:
    receive(index, "1.2", "1.3")
    complete(index)
    version = index.rule_set_version("rules", "sha", now=NOW)
    (job_id,) = index.add_pairs([Pair("r", "1.2", "1.3")], {}, rule_version=version, enqueue=no_queue, now=NOW)
    return job_id


def no_queue(connection: sa.Connection, job_id: str, due: datetime) -> None:
    """Nothing runs in these tests; the job row is what they look at."""


def test_the_migrations_make_exactly_the_tables(index: Index) -> None:
    with index.engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), METADATA) == []


def test_migrating_twice_changes_nothing(index: Index) -> None:
    receive(index, "1.2")

    index.migrate()

    assert len(index.activities()) == 1


@pytest.mark.parametrize("text", ["A\0B", "A\udcffB", "A" * 5000])
def test_no_text_of_a_sender_stops_the_index(index: Index, text: str) -> None:
    one = InstanceHeader(text, text, text, text, f"1.1.{text[1:40]}", f"1.2.{text[1:40]}", text, is_own_output=False)
    association = index.open_association(calling_ae_title=text, called_ae_title=text, address="::1", now=NOW)
    index.add_instance(stored("1.2.1"), one, association_id=association, now=NOW)
    index.close_association(association, now=NOW)
    (activity,) = index.activities()
    described = replace(facts(activity), header={"SeriesDescription": text}, patient_id=text)

    index.note_series(activity.series_instance_uid, text)
    index.complete_series(
        activity, state=SeriesState.UNPAIRED, reason=text, note=text, volumes=[(described, [Member("1.2.1", ())])]
    )
    version = index.rule_set_version("rules", "sha", now=NOW)
    index.add_pairs(
        [], {activity.series_instance_uid: text}, rule_version=version, enqueue=no_queue, now=NOW,
        patient_of=(activity.patient_id, activity.issuer_of_patient_id), trace=[text],
        ambiguities=[Ambiguity("r", text, text, ((text, 0),), ((text, 0),))],
    )  # fmt: skip

    (volume,) = index.volumes_of(activity.patient_id, activity.issuer_of_patient_id)
    assert volume.patient_id == text  # what persons are compared by stays as it came
    assert index.traces_of(activity.series_instance_uid)[0]["trace"] == [text]
    assert len(index.work_items()) == 1


@pytest.mark.parametrize("index", ["sqlite"], indirect=True)
def test_sqlite_survives_a_power_cut_by_its_settings(index: Index) -> None:
    with index.engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2


def test_equal_content_is_stored_once_and_other_content_is_a_conflict(index: Index) -> None:
    receive(index, "1.2")

    again = index.add_instance(stored("1.2.1"), header("1.2"), association_id=1, now=NOW + timedelta(1))
    other = index.add_instance(stored("1.2.1", "b" * 64), header("1.2"), association_id=1, now=NOW + timedelta(1))

    assert (again, other) == (Added.EQUAL, Added.CONFLICT)
    assert index.activities()[0].last_received_at == NOW
    assert index.find_instance("1.2.1") == stored("1.2.1")


def test_a_series_is_receiving_while_an_association_that_sent_it_is_open(index: Index) -> None:
    association = index.open_association(calling_ae_title="A", called_ae_title="B", address="c", now=NOW)
    index.add_instance(stored("1.2.1"), header("1.2"), association_id=association, now=NOW)
    assert index.activities()[0].receiving

    index.close_all_associations(now=NOW)

    assert not index.activities()[0].receiving


def test_a_start_begins_the_quiet_period_of_what_was_being_received_anew(index: Index) -> None:
    receive(index, "1.2", "1.3")
    (first, _) = index.activities()
    index.complete_series(first, state=SeriesState.UNPAIRED, reason="")

    index.restart_quiet_periods(now=NOW + timedelta(hours=1))

    assert [each.last_received_at for each in index.activities()] == [NOW + timedelta(hours=1)]


def test_a_series_that_grew_meanwhile_is_not_completed(index: Index) -> None:
    receive(index, "1.2")
    (seen,) = index.activities()
    index.add_instance(stored("1.2.2"), header("1.2"), association_id=1, now=NOW + timedelta(seconds=1))

    assert not index.complete_series(seen, state=SeriesState.UNPAIRED, reason="")
    assert index.activities()[0].instances == 2


def test_a_late_instance_reopens_an_unpaired_series_and_only_notes_a_paired_one(index: Index) -> None:
    make_job(index)
    receive(index, "1.4")
    complete(index)

    for series in ("1.2", "1.4"):
        index.add_instance(stored(f"{series}.9"), header(series), association_id=1, now=LATER)

    states = {row["series_instance_uid"]: row["state"] for row in index.status()["series"]}
    assert (states["1.2"], states["1.4"]) == ("paired", "receiving")
    assert index.late_series() == {"1.2": 1}


def test_an_equal_duplicate_is_never_late(index: Index) -> None:
    make_job(index)

    again = index.add_instance(stored("1.2.1"), header("1.2"), association_id=1, now=LATER)

    assert again is Added.EQUAL
    assert index.late_series() == {}
    assert index.activities() == []


def test_ignored_late_instances_leave_a_note_and_are_late_once(index: Index) -> None:
    make_job(index)
    index.add_instance(stored("1.2.9"), header("1.2"), association_id=1, now=LATER)

    index.ignore_late("1.2", "1 came late")

    assert index.late_series() == {}
    assert [row["note"] for row in index.status()["series"]] == ["1 came late", ""]


@pytest.mark.parametrize("begun", [False, True])
def test_a_superseded_pair_is_made_again_and_its_job_delivers_nothing(index: Index, begun: bool) -> None:
    job_id = make_job(index)
    if begun:
        index.take_up_job(job_id, now=NOW)

    cancelled = index.reopen_series("1.3", "grew", supersede=True, now=LATER)

    assert cancelled == ([] if begun else [job_id])
    assert index.job(job_id).state is (JobState.RUNNING if begun else JobState.CANCELLED)
    assert index.is_superseded(job_id)
    assert index.pairs_of(["1.2"]) == []
    assert {row["series_instance_uid"]: row["state"] for row in index.status()["series"]} == {
        "1.2": "unpaired", "1.3": "receiving",
    }  # fmt: skip
    complete(index)
    (again,) = index.add_pairs([Pair("r", "1.2", "1.3")], {}, rule_version=1, enqueue=no_queue, now=LATER)
    assert not index.is_superseded(again)


def test_appended_instances_leave_pairs_standing(index: Index) -> None:
    job_id = make_job(index)

    index.reopen_series("1.3", "grew", supersede=False, now=LATER)
    complete(index)

    assert not index.is_superseded(job_id)
    assert index.pairs_of(["1.3"]) == [Pair("r", "1.2", "1.3")]
    assert {row["state"] for row in index.status()["series"]} == {"paired"}


def test_facts_come_back_as_they_were(index: Index) -> None:
    receive(index, "1.2")
    (activity,) = index.activities()

    phases = [
        replace(
            facts(activity), volume_number=n, volumes_in_series=2, split_by={"TemporalPositionIdentifier": n + 1},
            phase_index=n, phases=2, phase_time_s=8.5 * n,
        )
        for n in range(2)
    ]  # fmt: skip

    index.complete_series(
        activity, state=SeriesState.UNPAIRED, reason="", volumes=[(phase, [Member("1.2.1")]) for phase in phases]
    )

    assert index.volumes_of("P", "") == phases
    assert index.patients_to_pair(since=NOW) == [("P", "")]


def test_pair_job_and_queue_entry_are_all_or_nothing(index: Index) -> None:
    receive(index, "1.2", "1.3")
    complete(index)
    version = index.rule_set_version("rules", "sha", now=NOW)

    def broken_queue(connection: sa.Connection, _job_id: str, _due: datetime) -> None:
        connection.execute(sa.text("insert into nowhere values (1)"))

    with pytest.raises(LocalError):
        index.add_pairs([Pair("r", "1.2", "1.3")], {}, rule_version=version, enqueue=broken_queue, now=NOW)

    status = index.status()
    assert status["jobs"] == []
    assert {row["state"] for row in status["series"]} == {"unpaired"}


def test_a_pair_is_made_once_per_rule_and_moving_series(index: Index) -> None:
    make_job(index)

    again = index.add_pairs([Pair("r", "1.2", "1.3")], {}, rule_version=1, enqueue=no_queue, now=NOW)

    assert again == []
    assert index.pairs_of(["1.3"]) == [Pair("r", "1.2", "1.3")]


def test_volumes_of_one_series_are_paired_each_once(index: Index) -> None:
    receive(index, "1.2")
    complete(index, volumes=3)
    version = index.rule_set_version("rules", "sha", now=NOW)
    pairs = [Pair("r", "1.2", "1.2", 1, number) for number in (0, 2)]

    jobs = index.add_pairs(pairs, {}, rule_version=version, enqueue=no_queue, now=NOW)
    again = index.add_pairs(pairs, {}, rule_version=version, enqueue=no_queue, now=NOW)

    assert (len(jobs), again) == (2, [])
    assert index.pairs_of(["1.2"]) == pairs
    job = index.job(jobs[1])
    assert (job.fixed_volume_number, job.moving_volume_number) == (1, 2)
    assert index.members_of("1.2", 2) == [(stored("1.2.1"), (2,))]
    with pytest.raises(LocalError, match="no volume 3"):
        index.members_of("1.2", 3)


def test_migrating_keeps_what_stands(tmp_path: Path) -> None:
    index = Index(f"sqlite:///{tmp_path}/node.db")
    index.migrate("0001")
    with index.engine.begin() as connection:
        for statement in FORMER_ROWS.strip().split("\n"):
            connection.exec_driver_sql(statement)

    index.migrate()

    assert index.members_of("1.2", 0) == [(stored("1.2.1"), ())]
    assert index.pairs_of(["1.2"]) == [Pair("r", "1.2", "1.2")]
    assert index.job("j").rule_id == "r"
    assert index.rule_set_text(1, written=True) == "rules"
    with index.engine.begin() as connection, pytest.raises(sa.exc.IntegrityError, match="FOREIGN KEY"):
        connection.exec_driver_sql("delete from pair")
    index.close()


FORMER_ROWS = f"""
insert into patient values (1, 'P', '')
insert into study values (1, 1, '1.1')
insert into series values (1, 1, 1, '1.2', 'CT', 0, 'paired', '', '2026-01-02 03:04:05.000000')
insert into association values (1, 'A', 'B', 'c', '2026-01-02 03:04:05.000000', null)
insert into instance values (1, 1, 1, '1.2.1', '1.2.840.10008.5.1.4.1.1.2', '1.2.840.10008.1.2.1', '1.2.1.dcm', '{"a" * 64}', 100, '2026-01-02 03:04:05.000000')
insert into volume values (1, '{{}}')
insert into rule_set values (1, 'sha', 'rules', '2026-01-02 03:04:05.000000')
insert into pair values (1, 'r', 1, 1, 1, '2026-01-02 03:04:05.000000')
insert into job values ('j', 1, 'waiting', '', 0.0, null, 0, null, '', '{{}}', '2026-01-02 03:04:05.000000', null)
"""  # noqa: E501, S608


def test_a_changed_rule_set_is_a_new_version_and_an_unchanged_one_is_not(index: Index) -> None:
    versions = [index.rule_set_version(text, text, now=NOW) for text in ("a", "a", "b", "b", "a")]

    assert versions == [1, 1, 2, 2, 3]
    assert index.rule_set_text(2) == "b"


def test_a_clean_stop_is_no_attempt(index: Index) -> None:
    job_id = make_job(index)

    counts = [index.take_up_job(job_id, now=NOW)]
    index.lay_down_job(job_id)
    counts += [index.take_up_job(job_id, now=NOW), index.take_up_job(job_id, now=NOW)]

    assert counts == [1, 1, 2]
    assert index.job(job_id).state is JobState.RUNNING


def test_deliveries_are_enqueued_once_and_finish_the_job(index: Index) -> None:
    job_id = make_job(index)
    index.judge_job(job_id, Verdict.ACCEPT, "", {"seconds": {"affine": 1.5}})
    index.add_products([Product(job_id, "sro", stored("2.1")), Product(job_id, "dsr", stored("2.2"))])

    for _ in range(2):
        index.enqueue_deliveries(job_id, ["pacs", "archive"], now=NOW)

    assert [each.instance.sop_instance_uid for each in index.due_deliveries("pacs", now=NOW, limit=9)] == ["2.1", "2.2"]
    assert len(index.status()["deliveries"]) == 4
    assert index.job(job_id).state is JobState.DONE
    assert index.status()["jobs"][0]["report"] == {"seconds": {"affine": 1.5}}


def test_a_delivered_instance_is_never_due_again_and_a_delayed_one_when_its_time_comes(index: Index) -> None:
    job_id = make_job(index)
    index.add_products([Product(job_id, "sro", stored("2.1")), Product(job_id, "dsr", stored("2.2"))])
    index.enqueue_deliveries(job_id, ["pacs"], now=NOW)
    sro, dsr = index.due_deliveries("pacs", now=NOW, limit=9)
    later = NOW + timedelta(seconds=30)

    index.record_attempts(
        [
            Attempt(sro.id, DeliveryState.DELIVERED, 0, "", None, NOW),
            Attempt(dsr.id, DeliveryState.WAITING, 0xA700, "full", later, NOW),
        ]
    )

    assert index.due_deliveries("pacs", now=NOW, limit=9) == []
    (due,) = index.due_deliveries("pacs", now=later, limit=9)
    assert (due.id, due.attempts, due.status, due.reason) == (dsr.id, 1, 0xA700, "full")


def test_once_the_clock_was_set_back_nothing_waits_for_a_time_that_lies_ahead(index: Index) -> None:
    job_id = make_job(index)
    index.add_products([Product(job_id, "sro", stored("2.1")), Product(job_id, "dsr", stored("2.2"))])
    index.enqueue_deliveries(job_id, ["pacs"], now=NOW)
    sro, dsr = index.due_deliveries("pacs", now=NOW, limit=9)
    sent = Attempt(sro.id, DeliveryState.DELIVERED, 0, "", None, NOW)
    index.record_attempts([sent, Attempt(dsr.id, DeliveryState.WAITING, 0xA700, "full", LATER, NOW)])
    receive(index, "1.4")
    before = NOW - timedelta(days=1)
    assert not index.is_ahead_of(NOW)
    assert index.is_ahead_of(before)

    index.clock_was_set_back(now=before)

    assert not index.is_ahead_of(before)
    assert {each.last_received_at for each in index.activities()} == {before}
    assert [each.id for each in index.due_deliveries("pacs", now=before, limit=9)] == [dsr.id]


def test_what_waits_for_a_person_is_not_due_before_it_is_released(index: Index) -> None:
    job_id = make_job(index)
    index.add_products([Product(job_id, "sro", stored("2.1")), Product(job_id, "dsr", stored("2.2"))])
    index.enqueue_deliveries(job_id, ["pacs"], now=NOW, held="awaits approval")
    assert index.due_deliveries("pacs", now=NOW, limit=9) == []
    assert {(row["state"], row["reason"]) for row in index.status()["deliveries"]} == {("held", "awaits approval")}

    assert index.release_deliveries(Which(job_id="other"), now=NOW) == 0
    assert index.release_deliveries(Which(job_id=job_id, destination="pacs"), now=NOW) == 2

    assert len(index.due_deliveries("pacs", now=NOW, limit=9)) == 2
    assert index.undelivered(job_id) == 2


def test_a_row_that_is_held_while_it_is_on_its_way_stays_held_unless_it_arrives(index: Index) -> None:
    job_id = make_job(index)
    index.add_products([Product(job_id, "sro", stored("2.1")), Product(job_id, "dsr", stored("2.2"))])
    index.enqueue_deliveries(job_id, ["pacs"], now=NOW)
    sro, dsr = index.due_deliveries("pacs", now=NOW, limit=9)
    assert index.hold_deliveries(Which(job_id=job_id), "a person", now=NOW) == 2

    index.record_attempts(
        [
            Attempt(sro.id, DeliveryState.DELIVERED, 0, "", None, NOW),
            Attempt(dsr.id, DeliveryState.WAITING, 0xA700, "full", NOW, NOW),
        ]
    )

    states = {row["sop_instance_uid"]: row["state"] for row in index.status()["deliveries"]}
    assert states == {"2.1": "delivered", "2.2": "held"}
    assert index.undelivered(job_id) == 1


def test_nothing_is_due_at_a_destination_that_is_held(index: Index) -> None:
    job_id = make_job(index)
    index.add_products([Product(job_id, "sro", stored("2.1"))])
    index.hold_destination("pacs", "moves house", now=NOW)
    index.enqueue_deliveries(job_id, ["pacs", "archive"], now=NOW)

    assert index.due_deliveries("pacs", now=NOW, limit=9) == []
    assert len(index.due_deliveries("archive", now=NOW, limit=9)) == 1
    assert index.release_destination("pacs")
    assert not index.release_destination("pacs")
    assert len(index.due_deliveries("pacs", now=NOW, limit=9)) == 1


def test_what_failed_is_sent_again_where_a_person_asks_and_what_arrived_only_where_they_say_so(index: Index) -> None:
    job_id = make_job(index)
    index.add_products([Product(job_id, "sro", stored("2.1")), Product(job_id, "dsr", stored("2.2"))])
    index.enqueue_deliveries(job_id, ["pacs"], now=NOW)
    sro, dsr = index.due_deliveries("pacs", now=NOW, limit=9)
    index.record_attempts(
        [
            Attempt(sro.id, DeliveryState.DELIVERED, 0, "", None, NOW),
            Attempt(dsr.id, DeliveryState.FAILED, 0xC000, "cannot understand", None, NOW),
        ]
    )

    assert index.resend_deliveries(Which(sop_instance_uid="2.1"), now=NOW) == 0
    assert index.resend_deliveries(Which(job_id=job_id), now=NOW) == 1
    (due,) = index.due_deliveries("pacs", now=NOW, limit=9)
    assert (due.id, due.attempts, due.reason) == (dsr.id, 0, "")
    assert index.resend_deliveries(Which(job_id=job_id), now=NOW, delivered=True) == 2


def test_urgent_results_are_due_first_and_alone_where_asked(index: Index) -> None:
    job_id = make_job(index)
    index.add_products([Product(job_id, "sro", stored("2.1"))])
    index.enqueue_deliveries(job_id, ["pacs"], now=NOW)
    index.add_products([Product(job_id, "dsr", stored("2.2"))])
    index.enqueue_deliveries(job_id, ["pacs"], now=NOW, priority=DeliveryPriority.URGENT)

    assert [each.instance.sop_instance_uid for each in index.due_deliveries("pacs", now=NOW, limit=9)] == ["2.2", "2.1"]
    (urgent,) = index.due_deliveries("pacs", now=NOW, limit=9, up_to=DeliveryPriority.URGENT)
    assert urgent.instance.sop_instance_uid == "2.2"


def test_who_sent_a_series_is_known_by_their_ae_titles(index: Index) -> None:
    for number, sender in enumerate(("CT1", "PACS", "CT1")):
        association = index.open_association(calling_ae_title=sender, called_ae_title="B", address="c", now=NOW)
        index.add_instance(stored(f"1.2.{number}"), header("1.2"), association_id=association, now=NOW)

    assert index.senders_of("1.2") == ["CT1", "PACS"]
    assert index.senders_of("1.3") == []


def test_our_own_products_coming_back_are_known_by_their_uids(index: Index) -> None:
    job_id = make_job(index)
    index.add_products([Product(job_id, "series", stored("1.7.1"))])

    receive(index, "1.7")

    assert index.is_own_output("1.7")
    assert not index.is_own_output("1.2")


def test_trouble_with_the_database_is_a_local_error(tmp_path: Path) -> None:
    missing = Index(f"sqlite:///{tmp_path}/no/such/folder/node.db")

    with pytest.raises(LocalError, match=r"database .*/no/such/folder/node\.db: "):
        missing.migrate()


def test_tables_of_another_version_are_named_and_left_alone(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/node.db"
    made = Index(url)
    made.migrate("0001")
    with pytest.raises(LocalError, match=r"node\.db: got tables of revision 0001, expected revision 0"):
        open_index(url)
    made.migrate()
    open_index(url).close()
    with made.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(LocalError, match="got tables of revision 9999"):
        open_index(url)
    with pytest.raises(LocalError, match=r"node\.db: made by another version of dicomnode"):
        made.migrate()
    made.close()
