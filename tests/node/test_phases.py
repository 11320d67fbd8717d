"""Series of several volumes as scanners write them, by table: what tells their volumes apart."""

from __future__ import annotations

import random
from typing import Any

import pytest

from dicomnode.phases import AmbiguousSeriesError, Part, Slice, by_plane, seconds, split

PLACES = 4
AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)


def slices(volumes: list[dict[str, Any]], *, places: int = PLACES) -> list[Slice]:
    """Volume after volume; callables are given the slice's index; `offset` moves a volume along its normal."""
    made = []
    for values in volumes:
        for k in range(places):
            here = {key: value(k) if callable(value) else value for key, value in values.items()}
            offset = here.pop("offset", 0.0)
            number = here.pop("InstanceNumber", len(made) + 1)
            made.append(Slice((0.0, 0.0, 5.0 * k + offset), AXIAL, (8, 8), (1.0, 1.0), number, here))
    return made


def clock(start: float) -> Any:
    """An acquisition time of its own for every slice."""
    return lambda k: f"1015{start + 0.1 * k:05.2f}"


DYNAMIC = [{"TemporalPositionIdentifier": n + 1, "AcquisitionTime": f"1015{8 * n:02}"} for n in range(4)]
TABLE = {
    "temporal position": (DYNAMIC, ("TemporalPositionIdentifier",), 4),
    "a time of its own in every slice": (
        [{"AcquisitionTime": clock(10.0 * n), "InstanceNumber": 7} for n in range(3)], ("AcquisitionTime",), 3
    ),
    "acquisition number": ([{"AcquisitionNumber": n} for n in (2, 1, 3)], ("AcquisitionNumber",), 3),
    "trigger time": ([{"TriggerTime": 30.5 * n} for n in range(5)], ("TriggerTime",), 5),
    "cardiac phase": ([{"NominalPercentageOfCardiacPhase": 10 * n} for n in range(3)],
                      ("NominalPercentageOfCardiacPhase",), 3),
    "gated or dynamic PET": ([{"FrameReferenceTime": 1000.0 * n} for n in range(3)], ("FrameReferenceTime",), 3),
    "echoes": ([{"EchoTime": 2.3 * n, "EchoNumbers": n} for n in (1, 2)], ("EchoTime",), 1),
    "flip angles": ([{"FlipAngle": float(n)} for n in (2, 5, 15)], ("FlipAngle",), 1),
    "inversion times": ([{"InversionTime": float(n)} for n in (100, 400)], ("InversionTime",), 1),
    "b-values": ([{"DiffusionBValue": float(n)} for n in (0, 50, 800)], ("DiffusionBValue",), 1),
    "b-values and directions": (
        [{"DiffusionBValue": 0.0}, *({"DiffusionBValue": b, "DiffusionGradientOrientation": d}
                                     for b in (500.0, 1000.0) for d in ([1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0]))],
        ("DiffusionBValue", "DiffusionGradientOrientation"), 1,
    ),
    "Dixon parts": ([{"ImageType": ["M", part]} for part in ("FAT", "IN", "OPP", "WATER")], ("ImageType",), 1),
    "Dixon parts in time": (
        [{"ImageType": [part], "TemporalPositionIdentifier": t} for t in (1, 2, 3) for part in ("FAT", "WATER")],
        ("ImageType", "TemporalPositionIdentifier"), 3,
    ),
    "echoes, parts and times": (
        [{"ImageType": [part], "EchoTime": e, "TriggerTime": t}
         for t in (0.0, 40.0) for part in ("M", "P") for e in (1.2, 2.4)],
        ("ImageType", "EchoTime", "TriggerTime"), 2,
    ),
    "instance numbers, volume after volume": ([{} for _ in range(3)], ("InstanceNumber",), 3),
    "instance numbers, place after place": (
        [{"InstanceNumber": lambda k, n=n: 3 * k + n + 1} for n in range(3)], ("InstanceNumber",), 3
    ),
    "two kernels between each other's slices": (
        [{"ConvolutionKernel": "B30f"}, {"ConvolutionKernel": "B60f", "offset": 2.5}], ("ConvolutionKernel",), 1
    ),
    "two stacks": ([{"StackID": "1"}, {"StackID": "2", "offset": 100.0}], ("StackID",), 1),
}  # fmt: skip


@pytest.mark.parametrize("case", TABLE)
def test_volumes_are_told_apart_completely_and_in_whatever_order_they_come(case: str) -> None:
    volumes, keys, phases = TABLE[case]
    given = slices(volumes)
    random.Random(case).shuffle(given)

    parts = split(given)

    assert len(parts) == len(volumes)
    assert {tuple(part.split_by) for part in parts} == {keys}
    assert {part.phases for part in parts} == {phases}
    assert [part.phase_index for part in parts] == [*range(phases)] * (len(volumes) // phases)
    assert sorted(n for part in parts for n in part.indices) == [*range(len(given))]
    for part in parts:
        offsets = {round(given[n].position[2] % 5, 3) for n in part.indices}
        assert len({given[n].position for n in part.indices}) == PLACES
        assert len(offsets) == 1


def test_phases_come_in_order_of_time_with_their_seconds() -> None:
    given = slices(list(reversed(DYNAMIC)))

    parts = split(given)

    assert [part.split_by["TemporalPositionIdentifier"] for part in parts] == [1, 2, 3, 4]
    assert [part.phase_time_s for part in parts] == [0, 8, 16, 24]


def test_time_past_midnight_goes_by_the_date() -> None:
    days = ("20260301235950", "20260301235958", "20260302000006")

    parts = split(slices([{"AcquisitionDateTime": day} for day in reversed(days)]))

    assert [part.phase_time_s for part in parts] == [0, 8, 16]


def test_without_any_clock_the_seconds_stay_unknown() -> None:
    assert {part.phase_time_s for part in split(slices([{"AcquisitionNumber": n} for n in range(3)]))} == {None}


@pytest.mark.parametrize(
    "volumes",
    [
        [{}],
        [{"AcquisitionTime": clock(1.0), "TriggerTime": lambda k: 10.0 * k, "EchoTime": 3.0}],
        [{"ConvolutionKernel": "B30f", "AcquisitionNumber": lambda k: k // 2}],  # two beds
    ],
)
def test_an_ordinary_series_is_one_volume(volumes: list[dict[str, Any]]) -> None:
    assert split(slices(volumes)) == [Part((0, 1, 2, 3))]


@pytest.mark.parametrize(
    ("given", "figure"),
    [
        (slices(DYNAMIC)[:-1], "11 of 15 slices.*TemporalPositionIdentifier comes nearest: 3 of its 4 values have 4"),
        ([*slices([{}]), *slices([{}])], "4 of 8 slices lie where another lies"),  # sent twice under other UIDs
        ([*slices([{}]), *slices([{}])[1:2]], "1 of 5 slices lie where another lies"),
        (slices([{"InstanceNumber": lambda k: 7 * k % 5}, {"InstanceNumber": lambda k: 10 + 3 * k % 4 - 7}]), "4 of 8"),
    ],
)
def test_what_nothing_tells_apart_is_named_and_not_guessed(given: list[Slice], figure: str) -> None:
    with pytest.raises(AmbiguousSeriesError, match=figure):
        split(given)


def test_slices_of_another_plane_size_or_spacing_are_another_volume() -> None:
    base = slices([{}])
    others = [
        Slice((0, 0, 0), (0.0, 1.0, 0.0, 0.0, 0.0, 1.0), (8, 8), (1.0, 1.0)),
        Slice((0, 0, 0), AXIAL, (8, 9), (1.0, 1.0)),
        Slice((0, 0, 0), AXIAL, (8, 8), (1.0, 1.1)),
    ]
    jittered = Slice((0, 0, 20), (1.0, 0.0004, 0.0, 0.0, 1.0, 0.0), (8, 8), (1.0, 1.00001))

    assert by_plane([*others, *base, jittered], at_most=9) == [(3, 4, 5, 6, 7), (0,), (1,), (2,)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("101530", 36930), ("10:15:30", 36930), ("1015", 36900), ("10", 36000), ("101530.250000 ", 36930.25),
        ("19700102000001", 86401), ("19700102000001.5+0100", 86401.5), ("", None), ("noon", None),
        ("20261340101530", None), ("9" * 400, None),
    ],
)  # fmt: skip
def test_dicom_times_in_seconds(text: str, expected: float | None) -> None:
    assert seconds(text) == expected
