"""`make demo` as a reader of the README runs it: it judges itself, by what the stand-in PACS received."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image


@pytest.mark.timeout(600)
def test_the_demo_passes_by_its_own_measures_and_leaves_its_picture(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dicomnode", "demo", "--out", str(tmp_path / "demo")]

    done = subprocess.run(command, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stdout + done.stderr
    for expected in ("Error at", "Folding of the delivered field   0.0000 %", "Seconds of registration", "Verdict"):
        assert expected in done.stdout
    pages = sorted((tmp_path / "demo" / "quality").iterdir())
    assert [page.name for page in pages] == [f"page-{n}.png" for n in range(1, 8)]
    for page in pages:
        with Image.open(page) as picture:
            assert picture.size == (1280, 1024)
    with Image.open(tmp_path / "demo" / "before-after.png") as picture:
        assert picture.convert("L").getextrema() != (0, 0)
