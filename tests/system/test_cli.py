"""The command line: exit statuses, messages, a clean start and stop."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from phantoms import make_pair, make_series, write_series
from receiving_scp import ReceivingSCP
from running_node import RunningNode, free_port, wait_for


def dicomnode(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "dicomnode", *arguments], capture_output=True, text=True, check=False, cwd=cwd
    )


def test_check_accepts_the_shipped_example() -> None:
    deploy = Path(__file__).resolve().parents[2] / "deploy"

    done = dicomnode("check", "--config", str(deploy / "node.yaml"))

    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("ok: ")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("node: {prot: 104}", "node.prot"),
        ("node: {port: 70000}", "node.port"),
        ("destinations: [{name: a, ae_title: B, host: c}]", "destinations[0].port"),
        ("node: [", "node.yaml"),
        ("tls: {}", "tls"),
        ("tls: {certificate: no.pem, key: no.key, client_ca: no.pem}", "no.pem with key"),
    ],
)
def test_check_refuses_with_file_key_got_and_expected_and_exits_with_2(
    text: str, expected: str, tmp_path: Path
) -> None:
    (tmp_path / "node.yaml").write_text(text)

    done = dicomnode("check", "--config", str(tmp_path / "node.yaml"))

    assert done.returncode == 2
    assert expected in done.stderr
    assert "expected" in done.stderr
    assert "Traceback" not in done.stderr


def test_check_refuses_bad_rules_with_2(tmp_path: Path) -> None:
    (tmp_path / "node.yaml").write_text("rules: rules.yaml")
    (tmp_path / "rules.yaml").write_text("version: 1\nrules: [{id: a, roles: {fixde: {}}}]")

    done = dicomnode("check", "--config", str(tmp_path / "node.yaml"))

    assert done.returncode == 2
    assert "fixde" in done.stderr


def test_the_schema_is_json_for_editors() -> None:
    schema = json.loads(dicomnode("check", "--schema").stdout)

    assert {"node", "database", "destinations", "worker", "rules"} <= schema["properties"].keys()


def test_status_before_the_first_run_says_so(tmp_path: Path) -> None:
    done = dicomnode("status", "--json", cwd=tmp_path)

    assert done.returncode == 1
    assert "no such database" in done.stderr


def test_without_a_configuration_the_node_serves_from_its_defaults(tmp_path: Path) -> None:
    """The port is the default one: only checked where nothing else has it."""
    node = RunningNode(tmp_path)
    try:
        node.start()
        status = json.loads(node.command("status", "--json").stdout)
        second = node.command("serve")
        stopped = node.stop()
    finally:
        node.kill()

    assert status.pop("journal") == [{"not_yet_indexed": 0, "oldest": None}]
    assert {"studies", "series", "jobs", "deliveries", "quarantine", "associations", "commitments"} <= status.keys()
    assert not any(status.values())
    assert (second.returncode, "node.lock: another live node holds it" in second.stderr) == (1, True)
    assert stopped == 0
    assert "worker stopped" in node.logged()


def test_without_its_accelerator_the_worker_does_not_begin_and_check_says_so(tmp_path: Path) -> None:
    text = "{node: {data_dir: .}, worker: {device: cuda:99}}"
    (tmp_path / "node.yaml").write_text(text)

    worker = dicomnode("worker", "--config", str(tmp_path / "node.yaml"))
    check = dicomnode("check", "--config", str(tmp_path / "node.yaml"))

    said = "worker.device: Device: got 'cuda:99', expected one of those here: auto, cpu"
    assert (worker.returncode, said in worker.stderr) == (1, True)
    assert (check.returncode, f"warning: {said}" in check.stderr) == (0, True)


def test_names_that_no_terminal_shows_are_told_nevertheless(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    Path(os.fsdecode(bytes(folder) + b"/\xff\n.dcm")).write_text("no image")
    (tmp_path / "rules.yaml").write_text("version: 1\nrules: []")
    strict = {**os.environ, "PYTHONIOENCODING": "ascii:strict"}

    def said(*arguments: str) -> tuple[int, str]:
        command = [sys.executable, "-m", "dicomnode", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=strict)
        return done.returncode, done.stdout + done.stderr

    status, told = said("rules", "test", "--rules", "rules.yaml", "--dicom", "images")
    assert (status, "\\udcff" in told) == (0, True)
    status, told = said("import", "images")
    assert (status, "\\udcff\\n.dcm': not imported: " in told) == (1, True)


def test_the_demo_replaces_nothing_but_a_former_demo(tmp_path: Path) -> None:
    (tmp_path / "dicomnode-data").mkdir()
    (tmp_path / "dicomnode-data" / "node.db").write_text("precious")

    for folder in (tmp_path, tmp_path / "dicomnode-data" / "node.db"):
        done = dicomnode("demo", "--out", str(folder))
        assert (done.returncode, done.stderr) == (1, "")
        assert f"FAILED: {folder}: " in done.stdout

    assert (tmp_path / "dicomnode-data" / "node.db").read_text() == "precious"


def test_a_port_that_is_taken_is_named_and_nothing_is_left_running(tmp_path: Path) -> None:
    with ReceivingSCP() as other:
        (tmp_path / "node.yaml").write_text(f"node: {{host: 127.0.0.1, port: {other.port}}}")

        done = dicomnode("serve", "--config", str(tmp_path / "node.yaml"))

    assert done.returncode == 1
    assert str(other.port) in done.stderr
    assert "Traceback" not in done.stderr


def test_every_series_sent_or_imported_ends_with_its_reason(tmp_path: Path) -> None:
    native, arterial = make_pair()
    gap = [each for k, each in enumerate(make_series(phase="portal", seed=5)) if k != 7]
    node = RunningNode(tmp_path, quiet_period_s=0.5)
    try:
        node.start()
        assert node.send(native) == []
        for path in write_series(gap, tmp_path / "gap"):  # a name stands where nobody expects one
            path.write_bytes(path.read_bytes().replace(b"ISO_IR 192", b"MUELLER H "))
        (tmp_path / "gap" / "notes.txt").write_text("no image")
        done = node.command("import", str(tmp_path / "gap"))
        assert (done.returncode, done.stdout) == (1, f"imported {len(gap)} instances, 1 files not imported\n")
        assert "notes.txt: not imported: no DICM at byte 128" in done.stderr

        def reasons() -> dict[str, tuple[str, str]] | None:
            rows = {row["series_instance_uid"]: row for row in node.status()["series"]}
            done = len(rows) == 2 and all(row["state"] != "receiving" for row in rows.values())
            looked_at = done and all(row["reason"] != "not looked at yet" for row in rows.values())
            return {uid: (row["state"], row["reason"]) for uid, row in rows.items()} if looked_at else None

        found = wait_for(reasons, timeout_s=30, what="both series to be complete")
        assert found[native[0].SeriesInstanceUID][0] == "unpaired"
        assert "moving" in found[native[0].SeriesInstanceUID][1]
        assert found[gap[0].SeriesInstanceUID][0] == "refused"
        assert "mm" in found[gap[0].SeriesInstanceUID][1]
        assert node.stop() == 0
    finally:
        node.kill()
    for name in (arterial[0].PatientID, "MUELLER", "pydicom"):
        assert name not in node.logged()


def test_a_folder_is_imported_before_the_first_start(tmp_path: Path) -> None:
    node = RunningNode(tmp_path / "node")
    write_series(make_series(shape=(2, 8, 8)), tmp_path / "images")

    done = node.command("import", str(tmp_path / "images"))

    assert (done.returncode, done.stdout, done.stderr) == (0, "imported 2 instances, 0 files not imported\n", "")


def test_our_own_output_sent_back_is_kept_and_never_registered(tmp_path: Path) -> None:
    with ReceivingSCP() as pacs:
        node = RunningNode(tmp_path, destinations=[("pacs", "PACS", pacs.port)], quiet_period_s=0.5)
        try:
            node.start()
            for series in make_pair():
                assert node.send(series) == []
            wait_for(
                lambda: (rows := node.status()["deliveries"]) and {row["state"] for row in rows} == {"delivered"},
                timeout_s=120,
                what="the first results",
            )
            back = [each.dataset() for each in pacs.stored]
            for dataset in back:
                assert node.send([dataset]) == []

            def all_complete() -> bool:
                rows = node.status()["series"]
                return len(rows) == 5 and all(row["state"] != "receiving" for row in rows)

            wait_for(all_complete, timeout_s=30, what="what came back to be complete")
            status = node.status()
            own = [row for row in status["series"] if "own output" in row["reason"]]
            assert (len(own), len(status["jobs"])) == (3, 1)
            assert node.stop() == 0
        finally:
            node.kill()


def test_a_destination_that_is_down_at_first_and_one_that_refuses_one_instance(tmp_path: Path) -> None:
    refused: list[str] = []

    def refuse_the_third(uid: str) -> int:
        if not refused and len(choosy.requests) == 2:
            refused.append(uid)
        return 0xA900 if uid in refused else 0x0000

    choosy = ReceivingSCP(answer=refuse_the_third)
    late = ReceivingSCP(port=free_port())
    with choosy:
        node = RunningNode(
            tmp_path,
            destinations=[("choosy", "PACS", choosy.port), ("late", "PACS", late.port)],
            quiet_period_s=0.5,
        )
        try:
            node.start()
            for series in make_pair():
                assert node.send(series) == []
            wait_for(
                lambda: [r for r in node.status()["deliveries"] if r["destination"] == "late" and r["attempts"]],
                timeout_s=120,
                what="a first attempt at the destination that is down",
            )
            with late:
                wait_for(
                    lambda: all(row["state"] != "waiting" for row in node.status()["deliveries"]),
                    timeout_s=60,
                    what="every delivery to end",
                )
                rows = node.status()["deliveries"]
                assert node.stop() == 0
        finally:
            node.kill()

    failed = [row for row in rows if row["state"] == "failed"]
    assert [(row["sop_instance_uid"], row["destination"], row["status"]) for row in failed] == [
        (refused[0], "choosy", 0xA900)
    ]
    assert "A900" in failed[0]["reason"].upper()
    assert set(choosy.stored_uids) | set(refused) == set(late.stored_uids)
    assert len(late.stored_uids) == len(set(late.stored_uids))
