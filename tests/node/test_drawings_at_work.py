"""Drawings come to the node as images do, and go out carried over with the result of their series."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path

import phantoms
import pytest
from drawn import ball, circles, segmentation, structures
from held import Held
from pydicom import Dataset, dcmread

from dicomnode import cli, volumes
from dicomnode.model import JobState

RULES = """
version: 1
rules:
  - id: pre-post
    when: {Modality: CT}
    roles: {fixed: {match: {contrast: false}}, moving: {match: {contrast: true}}}
    register: {preset: fast, parameters: {voxels: 4000}}
    outputs: [series, contours, segmentations]
"""
SIZE = {"shape": (10, 32, 32), "spacing_mm": (10.0, 7.0, 7.0)}


def drawings(series: list[Dataset]) -> list[Dataset]:
    grid = volumes.load(series).grid
    ordered = list(volumes.geometry(series).datasets)
    return [
        structures(series, {"liver": circles(grid, (6, -4, 5), 40)}),
        segmentation(ordered, {"liver": ball(grid, (6, -4, 5), 40)}),
    ]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Held, str, str]:
    """A node whose one job has ended, and what was logged meanwhile."""
    held = Held(tmp_path_factory.mktemp("drawn") / "node")
    held.put_rules(RULES)
    fixed, moving = phantoms.make_pair(**SIZE)
    on_fixed = structures(fixed, {"spine": circles(volumes.load(fixed).grid, (0, 40, 0), 20)})
    broken = copy.deepcopy(drawings(moving)[0])
    broken.SOPInstanceUID = broken.file_meta.MediaStorageSOPInstanceUID = "2.25.7"
    broken.ROIContourSequence[0].ContourSequence[0].ContourData = ["1", "2"]
    for datasets in (fixed, moving, *([each] for each in (*drawings(moving), on_fixed, broken))):
        held.receive(datasets)
    held.tick()
    ((job_id, _),) = held.queued
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("dicomnode").addHandler(handler)
    try:
        assert held.run(job_id) == JobState.DONE
    finally:
        logging.getLogger("dicomnode").removeHandler(handler)
    return held, job_id, "\n".join(lines)


def test_what_was_drawn_on_the_moving_series_goes_out_and_nothing_else(ran: tuple[Held, str, str]) -> None:
    held, job_id, _ = ran

    products = held.index.products_of(job_id)

    carried = {each.kind: dcmread(held.archive.path(each.instance)) for each in products if each.kind != "series"}
    assert sorted(carried) == ["contours", "segmentations"]
    assert len([each for each in products if each.kind == "series"]) == 10
    (roi,) = carried["contours"].StructureSetROISequence
    assert (roi.ROIName, roi.ROIGenerationAlgorithm) == ("liver", "SEMIAUTOMATIC")
    (segment,) = carried["segmentations"].SegmentSequence
    assert (segment.SegmentLabel, segment.SegmentAlgorithmType) == ("liver", "SEMIAUTOMATIC")
    assert all(volumes.instance_header(each).is_own_output for each in carried.values())


def test_what_cannot_be_carried_is_named_and_holds_nothing_up(ran: tuple[Held, str, str]) -> None:
    _, job_id, logged = ran

    assert f"job {job_id}: not carried over: RT Structure Set 2.25.7 cannot be read" in logged
    assert "Phantom" not in logged


def test_drawings_are_among_the_inputs_that_a_result_is_reproduced_from(
    ran: tuple[Held, str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held, job_id, _ = ran
    recorded = held.index.provenance(job_id)
    assert recorded is not None
    assert len(recorded["inputs"]["drawings of moving"]) == 3

    code = cli.main(["reproduce", job_id[:8], "--out", str(tmp_path / "out"), "--config", str(held.config)])

    told = capsys.readouterr().out
    assert code == 0, told
    assert "contours: 1 objects, 1 with the UID they had; all values equal" in told
    assert "segmentations: 1 objects, 1 with the UID they had; all values equal" in told
    assert json.dumps(recorded)  # plain values
