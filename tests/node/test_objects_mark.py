"""What a radiologist sees of a registration that was accepted with a warning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import counterparts
import numpy as np
import phantoms
import pytest
from hand_made import make_objects

from dicomnode.objects.mark import MARK, marked

WHY = "grid error up to 0.31 mm, aimed at 0.20 mm: size limit"
SIZE: dict[str, Any] = {"shape": (4, 96, 160), "spacing_mm": (5.0, 2.0, 2.0)}


@pytest.mark.parametrize("modality", ["CT", "MR"])
def test_every_object_says_so_first_and_the_image_carries_it_over_its_pixels(modality: str) -> None:
    fixed, moving = phantoms.make_pair(modality=modality, **SIZE)
    without = dict(enumerate(make_objects(fixed, moving)))

    made = make_objects(fixed, moving, warning=WHY)

    for number, (kind, dataset) in enumerate(made):
        assert dataset.SeriesDescription.startswith(MARK), kind
        assert not without[number][1].SeriesDescription.startswith(MARK)
    series = [dataset for kind, dataset in made if kind == "series"]
    for dataset, plain in zip(series, (d for _, (k, d) in without.items() if k == "series"), strict=True):
        assert WHY in dataset.ImageComments
        assert WHY in dataset.DerivationDescription
        assert dataset.PixelData == plain.PixelData
        assert "ImageComments" not in plain
        assert (0x6000, 0x3000) not in plain
    drawn = series[0].overlay_array(0x6000)
    assert drawn.shape == (96, 160)
    lit = np.argwhere(drawn)
    assert 100 < len(lit) < 2000
    assert lit[:, 0].max() < 32
    assert abs(lit[:, 1].mean() - 80) < 8


def test_dciodvfy_and_dcentvfy_find_nothing_in_what_is_marked(tmp_path: Path) -> None:
    for modality in ("CT", "MR"):
        fixed, moving = phantoms.make_pair(modality=modality, **SIZE)
        paths: list[Path] = []
        for number, (kind, dataset) in enumerate(make_objects(fixed, moving, warning=WHY)):
            paths.append(tmp_path / f"{modality}-{kind}-{number}.dcm")
            dataset.save_as(paths[-1], enforce_file_format=True)

        assert counterparts.dciodvfy_errors(paths) == set()
        assert counterparts.dcentvfy_complaints(paths) == ""


def test_an_image_too_small_for_the_words_has_no_overlay_and_still_says_so() -> None:
    fixed, moving = phantoms.make_pair(shape=(4, 16, 20), spacing_mm=(5.0, 9.0, 9.0))

    (dataset, *_) = [d for kind, d in make_objects(fixed, moving, warning=WHY) if kind == "series"]

    assert (0x6000, 0x3000) not in dataset
    assert WHY in dataset.ImageComments


def test_a_description_is_marked_once_and_stays_within_its_length() -> None:
    assert marked("REG a to b", "") == "REG a to b"
    assert marked(marked("x" * 64, "why"), "why") == MARK + "x" * 57
