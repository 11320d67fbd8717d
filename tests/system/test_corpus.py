"""Every real file sent to a running node as it is: each series ends as volumes or with a reason."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from running_node import RunningNode, wait_for

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "dicom"

pytestmark = [
    pytest.mark.data,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not DATA.is_dir(), reason="the real images of ../shared/data are not here"),
    pytest.mark.skipif(shutil.which("dcmsend") is None, reason="dcmsend is not installed (Debian package dcmtk)"),
]

REASONS = {
    "Secondary Capture Image Storage, expected CT, MR or PET",
    "Ultrasound Image Storage, expected CT, MR or PET",
    "the stack is sheared .gantry tilt.: slices slip 30.44 mm sideways over 91.0 mm .18.50 degrees",
    " slices lie where another lies, expected one per place, and no element tells them apart completely",
    "Grayscale Softcopy Presentation State Storage, expected CT, MR or PET",
    "got 1 instance, expected at least 2 slices",
}
"""Some that must be among those given."""


def test_every_real_series_ends_as_volumes_or_with_a_reason(tmp_path: Path) -> None:
    node = RunningNode(tmp_path / "node")
    configuration = json.loads(node.config.read_text())
    configuration["node"]["incomplete_wait_s"] = 2.0
    node.config.write_text(json.dumps(configuration))
    node.start()
    try:
        report = tmp_path / "report.txt"
        options = ["--no-halt", "--no-illegal-proposal", "--no-uid-checks", "--scan-directories", "--recurse"]
        to = ["--create-report-file", str(report), "-aec", "DICOMNODE", "127.0.0.1", str(node.port), str(DATA)]
        subprocess.run(["dcmsend", *options, *to], check=False, capture_output=True)
        sent = re.findall(r"^SOP Instance +: (\S+).*?^DIMSE Status +: (\S+)", report.read_text(), re.M | re.S)

        def settled() -> list[dict[str, str]]:
            series = node.status()["series"]
            is_over = series and all(row["state"] in ("unpaired", "refused", "paired") for row in series)
            return series if is_over and not any(row["reason"] == "not looked at yet" for row in series) else []

        series = wait_for(settled, timeout_s=240, what="every series to end")
        quarantine = node.status().get("quarantine", [])
        assert not node.has_died()
    finally:
        node.kill()

    accepted = {uid for uid, status in sent if status == "0x0000"}
    assert len(accepted) >= 200
    assert sum(int(row["instances"]) for row in series) + len(quarantine) >= len(accepted)
    assert all(row["reason"] for row in series)
    states = Counter(row["state"] for row in series)
    assert states["unpaired"] >= 18  # volumes that the rule has no use for
    assert states["refused"] >= 20
    for reason in REASONS:
        assert any(re.search(reason, row["reason"]) for row in series), reason
    volumes = [row for row in series if row["state"] == "unpaired"]
    assert all(re.search("rule pre-post|left out by defaults.exclude", row["reason"]) for row in volumes)
