"""The registered series over the fixed one, as a Blending Softcopy Presentation State."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import counterparts
import multi_frame
import numpy as np
import phantoms
import pytest
from hand_made import make_objects
from pydicom import Dataset
from pydicom.pixels import apply_color_lut

from dicomnode.volumes.frames import frames_of

CASES: dict[str, dict[str, Any]] = {
    "CT": {},
    "MR, two studies": {"modality": "MR", "same_study": False},
    "CT, oblique": {"oblique": True},
}


def blended(fixed: list[Any], moving: list[Any], **changes: Any) -> tuple[Dataset, list[Dataset]]:
    """The presentation state, and the registered series that was made with it."""
    made = make_objects(fixed, moving, outputs=["series", "blending"], **changes)
    (state,) = (dataset for kind, dataset in made if kind == "blending")
    return state, [dataset for kind, dataset in made if kind == "series"]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("form", ["single-frame", "Enhanced"])
def test_it_shows_both_series_and_dciodvfy_finds_no_error(tmp_path: Path, case: str, form: str) -> None:
    fixed, moving = phantoms.make_pair(**CASES[case])
    if form == "Enhanced":
        fixed, moving = ([multi_frame.well_formed(each)] for each in (fixed, moving))
    sources = [*phantoms.write_series(fixed, tmp_path / "f"), *phantoms.write_series(moving, tmp_path / "m")]
    split = [frames_of(each[0]) if form == "Enhanced" else each for each in (fixed, moving)]

    state, registered = blended(*split)

    state.save_as(tmp_path / "state.dcm", enforce_file_format=True)
    assert counterparts.dciodvfy_errors([tmp_path / "state.dcm"]) == set()
    paths = phantoms.write_series(registered, tmp_path / "r")
    assert counterparts.dcentvfy_complaints([*sources, *paths, tmp_path / "state.dcm"]) == ""
    under, above = state.BlendingSequence
    assert (under.BlendingPosition, above.BlendingPosition) == ("UNDERLYING", "SUPERIMPOSED")
    for layer, series in ((under, fixed), (above, registered)):
        (item,) = layer.ReferencedSeriesSequence
        assert layer.StudyInstanceUID == series[0].StudyInstanceUID
        assert item.SeriesInstanceUID == series[0].SeriesInstanceUID
        named = [image.ReferencedSOPInstanceUID for image in item.ReferencedImageSequence]
        assert sorted(named) == sorted(each.SOPInstanceUID for each in series)
    assert {each.FrameOfReferenceUID for each in registered} == {fixed[0].FrameOfReferenceUID}
    assert state.StudyInstanceUID == registered[0].StudyInstanceUID


@pytest.mark.parametrize("modality", ["CT", "MR"])
def test_values_become_gray_as_in_the_images(modality: str) -> None:
    fixed, moving = phantoms.make_pair(modality=modality)

    state, registered = blended(fixed, moving)

    for layer, image in zip(state.BlendingSequence, (fixed[0], registered[0]), strict=True):
        assert layer.RescaleSlope == image.get("RescaleSlope", 1)
        assert layer.RescaleIntercept == image.get("RescaleIntercept", 0)
        (voi,) = layer.SoftcopyVOILUTSequence
        if "WindowCenter" in image:
            assert (voi.WindowCenter, voi.WindowWidth) == (image.WindowCenter, image.WindowWidth)
        assert voi.WindowWidth >= 1
    ramp = apply_color_lut(np.arange(256, dtype=np.uint8)[None], state)
    assert ramp[0, 0].tolist() == [0, 0, 0]
    assert ramp[0, 255].tolist() == [65535, 65535, 65535]
    assert state.RelativeOpacity == 0.5


def test_the_same_inputs_give_the_same_bytes_and_a_warning_marks_it() -> None:
    pair = phantoms.make_pair()

    first, again = blended(*pair)[0], blended(*pair)[0]

    assert first == again
    assert blended(*pair, warning="grid error")[0].SeriesDescription.startswith("CHECK!")


def test_slices_with_rescales_of_their_own_cannot_be_blended() -> None:
    fixed, moving = phantoms.make_pair(modality="PT")
    assert len({each.RescaleSlope for each in fixed}) > 1

    assert {kind for kind, _ in make_objects(fixed, moving, outputs=["series", "blending"])} == {"series"}


def test_without_a_frame_of_reference_the_two_are_not_laid_over_each_other() -> None:
    fixed, moving = phantoms.make_pair()
    for dataset in fixed:
        del dataset.FrameOfReferenceUID

    assert {kind for kind, _ in make_objects(fixed, moving, outputs=["series", "blending"])} == {"series"}


def test_without_the_registered_series_there_is_nothing_to_show() -> None:
    with pytest.raises(ValueError, match="expected series among them"):
        make_objects(*phantoms.make_pair(), outputs=["blending"])
