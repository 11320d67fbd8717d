"""Earlier examinations fetched from Debian's Orthanc by C-MOVE and C-GET, with Orthanc stopped half-way once."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import orthanc
import phantoms
import pytest
from orthanc import Orthanc
from running_node import RunningNode, free_port, wait_for

RULES = """
version: 1
rules:
  - id: to-prior
    when: {Modality: MR}
    priors: {query: {ModalitiesInStudy: CT}, max_age_days: 180}
    ready: {quiet_s: 1}
    roles:
      fixed: {from: prior, match: {Modality: CT}, prefer: [{contrast: false, score: 1}]}
      moving: {match: {Modality: MR}}
    register: {preset: rigid}
  - id: never-by-what-was-fetched
    when: {Modality: CT}
    roles: {fixed: {match: {contrast: false}}, moving: {match: {contrast: true}}}
"""
SLICES = 150

pytestmark = [
    pytest.mark.timeout(400),
    pytest.mark.skipif(orthanc.EXECUTABLE is None, reason="Orthanc is not installed (Debian package orthanc)"),
]


@pytest.mark.parametrize("fetch", ["c-move", "c-get"])
def test_a_prior_comes_from_orthanc_though_it_stops_half_way(tmp_path: Path, fetch: str) -> None:
    port = free_port()
    # It sends under another AE title than it answers under: only the Move Originator tells that it was asked to.
    known = {"AET": "DICOMNODE", "Host": "127.0.0.1", "Port": port, "LocalAet": "ARCHIVE_OUT"}
    pacs = Orthanc(tmp_path / "pacs", modalities={"NODE": known})
    node = RunningNode(
        tmp_path / "node",
        rules=RULES,
        port=port,
        sources=[{"name": "pacs", "ae_title": "ORTHANC", "port": pacs.port, "fetch": fetch, "timeout_s": 10}],
    )
    prior = [series(phase, study="old", StudyDate="20260101") for phase in ("native", "portal")]
    other_person = series("native", study="else", patient_id="SOMEBODY ELSE", StudyDate="20260102")
    too_old = series("native", study="ancient", StudyDate="20200101")
    current = series("native", modality="MR", study="new", StudyDate="20260301", slices=10)
    try:
        for number, each in enumerate([*prior, other_person, too_old]):
            for path in phantoms.write_series(each, tmp_path / f"images-{number}"):
                pacs.upload(path)
        node.start()
        node.send(current)

        wait_for(lambda: files(node) > 30, timeout_s=60, what="the beginning of the prior")
        pacs.kill()
        came = files(node)
        wait_for(lambda: is_in_trouble(node), timeout_s=60, what="a failed attempt")
        pacs.start()
        job = wait_for(lambda: node.status()["jobs"], timeout_s=120, what="the pair")[0]
        status = node.status()
    finally:
        node.kill()
        pacs.stop()

    assert came < 2 * SLICES + len(current)
    assert (job["rule_id"], job["moving"]) == ("to-prior", str(current[0].SeriesInstanceUID))
    assert job["fixed"] == str(prior[0][0].SeriesInstanceUID)
    assert len(status["jobs"]) == 1
    held = {row["series_instance_uid"]: row["instances"] for row in status["series"]}
    assert held == {
        **{str(each[0].SeriesInstanceUID): SLICES for each in prior},
        str(current[0].SeriesInstanceUID): len(current),
    }
    senders = {row["calling_ae_title"] for row in status["associations"]}
    assert senders == {"SCANNER", "ARCHIVE_OUT" if fetch == "c-move" else "ORTHANC"}
    assert Counter(row["state"] for row in status["priors"]) == {"done": 1}
    assert status["priors"][0]["attempts"] >= 2


def series(phase: str, *, study: str, slices: int = SLICES, **more: Any) -> list[Any]:
    names = {"modality", "patient_id"}
    header = {key: value for key, value in more.items() if key not in names}
    return phantoms.make_series(
        phase=phase,
        study=study,
        shape=(slices, 32, 32),
        spacing_mm=(3.0, 6.0, 6.0),
        header=header,
        **{key: value for key, value in more.items() if key in names},
    )


def files(node: RunningNode) -> int:
    """Images on the node's disk, indexed or not yet."""
    return sum(path.stat().st_size > 2000 for path in node.data.rglob("*") if path.is_file() and ".db" not in path.name)


def is_in_trouble(node: RunningNode) -> bool:
    return any(row["attempts"] >= 1 and row["state"] == "waiting" for row in node.status()["priors"])
