"""A job that really ran, and its results made again from the archive and what the index recorded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import phantoms
import pydicom
import pytest
from held import Held

from dicomnode import cli
from dicomnode.archive import Archive
from dicomnode.errors import ConfigError, StudyError
from dicomnode.index import Index
from dicomnode.reproduce import reproduce

RULES = """
version: 1
rules:
  - id: pre-post
    when: {Modality: CT}
    roles: {fixed: {match: {contrast: false}}, moving: {match: {contrast: true}}}
    register: {preset: fast, parameters: {voxels: 4000}}
"""
SIZE = {"shape": (10, 32, 32), "spacing_mm": (10.0, 7.0, 7.0)}


class Ran:
    """A node's folder in which one job has ended."""

    def __init__(self, folder: Path) -> None:
        self.held = Held(folder)
        self.held.put_rules(RULES)
        for series in phantoms.make_pair(**SIZE):
            self.held.receive(series)
        self.held.tick()
        ((self.job_id, _),) = self.held.queued
        assert self.held.run(self.job_id) == "done"

    def again(self, out: Path, *more: str) -> int:
        return cli.main(["reproduce", self.job_id[:8], "--out", str(out), "--config", str(self.held.config), *more])


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    return Ran(tmp_path_factory.mktemp("ran") / "node")


@pytest.fixture
def ran(once: Ran, tmp_path: Path) -> Ran:
    """A copy of its own."""
    copy = object.__new__(Ran)
    copy.held, copy.job_id = object.__new__(Held), once.job_id
    shutil.copytree(once.held.config.parent, tmp_path / "node")
    copy.held.config = tmp_path / "node" / "node.yaml"
    copy.held.archive = Archive(tmp_path / "node" / "data")
    copy.held.index = Index(f"sqlite:///{tmp_path / 'node' / 'data' / 'node.db'}")
    return copy


def test_the_same_device_gives_equal_uids_and_equal_values(
    once: Ran, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    deliveries = once.held.index.status()["deliveries"]

    assert once.again(tmp_path / "out") == 0

    told = capsys.readouterr().out
    assert "series: 10 objects, 10 with the UID they had; all values equal" in told
    assert "nothing was sent" in told
    products = once.held.index.products_of(once.job_id)
    made = {str(pydicom.dcmread(path).SOPInstanceUID): path for path in (tmp_path / "out").iterdir()}
    assert made.keys() == {each.instance.sop_instance_uid for each in products}
    for each in products:
        before, after = (
            pydicom.dcmread(once.held.archive.path(each.instance)),
            pydicom.dcmread(made[each.instance.sop_instance_uid]),
        )
        assert before.get("PixelData") == after.get("PixelData")
    assert once.held.index.status()["deliveries"] == deliveries


def test_the_index_tells_what_the_result_was_made_of_and_with(once: Ran, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["provenance", once.job_id, "--config", str(once.held.config)]) == 0

    told = json.loads(capsys.readouterr().out)
    assert told["job"]["rule_version"] == 1
    made = told["made"]
    assert [len(made["inputs"][role]) for role in ("fixed", "moving")] == [10, 10]
    assert made["results"]["moving"]["report"]["preset"] == "fast"
    assert made["results"]["moving"]["report"]["seed"] == 0
    assert made["results"]["moving"]["report"]["seconds"]
    assert set(made["machine"]) == {"cpu"}
    assert {"dicomnode", "torch"} <= set(made["software"])


def test_other_pixels_under_the_same_uid_are_found_and_told(
    ran: Ran, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    product = next(each for each in ran.held.index.products_of(ran.job_id) if each.kind == "series")
    path = ran.held.archive.path(product.instance)
    altered = pydicom.dcmread(path)
    altered.PixelData = b"\x07\x00" + altered.PixelData[2:]
    altered.save_as(path)

    assert ran.again(tmp_path / "out") == 1

    told = capsys.readouterr().out
    assert "series: 10 objects, 10 with the UID they had; PixelData differs by up to " in told
    assert f"in {1 / (10 * 32 * 32):.3%} of values" in told
    assert "other results" in told


def test_other_software_and_another_device_are_told_first(
    ran: Ran, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = ran.held.index.provenance(ran.job_id)
    assert made is not None
    made["software"]["torch"], made["machine"] = "0.0", {"cuda:0": "another card"}
    job = ran.held.index.job(ran.job_id)
    assert job.verdict is not None
    ran.held.index.judge_job(ran.job_id, job.verdict, job.reason, {}, provenance=made)

    ran.again(tmp_path / "out")

    software, device, *objects = capsys.readouterr().out.splitlines()
    assert software.startswith("torch: 0.0 then, ")
    assert device.startswith("device: cuda:0 (another card) then, cpu (")
    assert len(objects) == 4  # series, sro, dsr, and the sum


def test_an_input_with_other_content_is_refused_by_name(ran: Ran, tmp_path: Path) -> None:
    made = ran.held.index.provenance(ran.job_id)
    assert made is not None
    made["inputs"]["moving"][0][1] = "0" * 64
    job = ran.held.index.job(ran.job_id)
    assert job.verdict is not None
    ran.held.index.judge_job(ran.job_id, job.verdict, job.reason, {}, provenance=made)

    with pytest.raises(StudyError, match=f"{made['inputs']['moving'][0][0]} has other content now"):
        reproduce(ran.held.index, ran.held.archive, ran.job_id, tmp_path / "out", device="cpu")


def test_a_folder_that_holds_something_is_left_alone(once: Ran, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")

    with pytest.raises(ConfigError, match="an empty folder"):
        reproduce(once.held.index, once.held.archive, once.job_id, tmp_path, device="cpu")


def test_a_job_that_never_registered_says_so(tmp_path: Path) -> None:
    other = Held(tmp_path / "other")
    other.put_rules(RULES)
    for series in phantoms.make_pair(**SIZE):
        other.receive(series)
    other.tick()
    ((job_id, _),) = other.queued

    with pytest.raises(StudyError, match="has no result to reproduce: it is waiting"):
        reproduce(other.index, other.archive, job_id, tmp_path / "out", device="cpu")


def test_a_job_is_named_by_its_id_or_the_beginning_of_one_and_never_by_nothing(
    once: Ran, capsys: pytest.CaptureFixture[str]
) -> None:
    (job,) = once.held.index.jobs_like("")
    for text, expected in (("nothing-begins-so", 2), ("", 2), (job[:4], 0), (job, 0)):
        assert cli.main(["provenance", text, "--config", str(once.held.config)]) == expected
        assert ("expected the id of one job" in capsys.readouterr().err) == (expected == 2)
