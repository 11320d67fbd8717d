"""A dynamic series: pairs to the middle phase, one job, delivered as a series per phase or as one of all phases."""

from __future__ import annotations

import os
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import phantoms
import pydicom
import pytest
from held import Held

from dicomnode import config as configuration
from dicomnode import steps, volumes, workflow
from dicomnode.model import JobState
from dicomnode.steps import Steps

PHASES, SLICES = int(os.environ.get("PHASES", "3")), 8
"""`make dynamic` runs the 30 phases of the paper's protocol; a few show the same in less time."""
RULES = """
version: 1
rules:
  - id: dce
    when: {{Modality: MR}}
    split: {{by: series}}
    roles:
      fixed: {{match: {{phase: middle}}}}
      moving: {{match: {{phase: others}}, many: true}}
    pair: {{same: [SeriesInstanceUID]}}
    register: {{preset: fast, parameters: {{voxels: 2000}}}}
    outputs: [{output}, uptake]
"""


def dynamic() -> list[Any]:
    """One series; phase n lies shifted by a slow wave."""
    uid, found = phantoms.make_uid("dynamic"), []
    for n in range(PHASES):
        shift = 12.0 * abs((n % 10) - 5) / 5
        phase = phantoms.make_series(
            modality="MR", shift_mm=(0.0, shift, 0.0), shape=(SLICES, 32, 32), spacing_mm=(20.0, 11.0, 11.0), seed=0
        )
        for k, dataset in enumerate(phase):
            dataset.SeriesInstanceUID = uid
            dataset.SOPInstanceUID = phantoms.make_uid(uid, n, k)
            dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
            dataset.TemporalPositionIdentifier, dataset.NumberOfTemporalPositions = n + 1, PHASES
            dataset.AcquisitionTime = f"10{n:02}00"
            dataset.InstanceNumber = n * SLICES + k + 1
        found += phase
    return found


@pytest.mark.parametrize("output", ["series", "series_4d"])
def test_all_phases_are_one_job_and_come_back_as_asked(tmp_path: Path, output: str, monkeypatch: Any) -> None:
    held, sent = Held(tmp_path / "node"), dynamic()
    workflow.migrate(held.url)
    held.put_rules(RULES.format(output=output))
    held.receive(sent)
    held.tick()

    (job_id,) = [each for each, _ in held.queued]
    pairs = held.index.pairs_of_job(job_id)
    assert {pair.fixed_volume_number for pair in pairs} == {PHASES // 2}
    assert sorted(pair.moving_volume_number for pair in pairs) == [n for n in range(PHASES) if n != PHASES // 2]

    noted: list[tuple[str, float]] = []
    note = held.index.set_progress
    monkeypatch.setattr(steps, "PROGRESS_EVERY_S", 0.0)
    monkeypatch.setattr(held.index, "set_progress", lambda *told: (noted.append((told[2], told[1])), note(*told)))

    for step in Steps(configuration.load(held.config), held.index, held.archive).in_order().values():
        step(job_id)

    (job,) = held.index.status()["jobs"]
    assert job["state"] == JobState.DONE
    shares = [share for _, share in noted]
    assert shares == sorted(shares)
    assert shares[-1] == 1
    assert len(set(shares)) > 20 * (PHASES - 1)
    others = [*range(PHASES // 2 + 1, PHASES), *range(PHASES // 2 - 1, -1, -1)]
    assert list(dict.fromkeys(stage for stage, _ in noted)) == [f"phase {n + 1}/{PHASES}" for n in others]
    assert job["activity"] == noted[-1][0]
    assert len(job["report"]["phases"]) == PHASES - 1
    products = held.index.products_of(job_id)
    read = [(each.kind, pydicom.dcmread(held.archive.path(each.instance))) for each in products]
    made, uptake = ([each for kind, each in read if (kind == "uptake") == wanted] for wanted in (False, True))
    assert [each.Modality for each in uptake] == ["SEG", "SR", "OT"]
    offsets = [item for item in uptake[1].iterall() if item.keyword == "NumericValue"]
    assert {60.0 * n for n in range(PHASES)} <= {float(each.value) for each in offsets}  # minutes of Acquisition Time
    series = Counter(str(each.SeriesInstanceUID) for each in made)
    if output == "series":
        assert len(series) == PHASES - 1
        assert set(series.values()) == {SLICES}
        return
    assert set(series.values()) == {PHASES * SLICES}
    assert len({str(each.SOPInstanceUID) for each in made}) == PHASES * SLICES
    assert len({int(each.InstanceNumber) for each in made}) == PHASES * SLICES
    described = volumes.describe(made, last_received_at=datetime.now(UTC))
    assert [volume.phases for volume, _ in described.volumes] == [PHASES] * PHASES
    source = {s.ImagePositionPatient[2]: s for s in sent if s.TemporalPositionIdentifier == PHASES // 2 + 1}
    kept = [each for each in made if each.TemporalPositionIdentifier == PHASES // 2 + 1]
    assert len(kept) == SLICES
    for each in kept:
        assert each.PixelData == source[each.ImagePositionPatient[2]].PixelData
        assert each.SOPInstanceUID != source[each.ImagePositionPatient[2]].SOPInstanceUID
        assert volumes.instance_header(each).is_own_output
