from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from dicomnode.completion import is_complete, quiet_from
from dicomnode.model import SeriesActivity

LAST = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC)


def activity(*, receiving: bool) -> SeriesActivity:
    return SeriesActivity(
        series_instance_uid="1.2.3",
        study_instance_uid="1.2",
        patient_id="P",
        issuer_of_patient_id="",
        instances=12,
        last_received_at=LAST,
        receiving=receiving,
    )


@pytest.mark.parametrize("seconds", [0, 30, 86400])
def test_a_series_is_not_complete_while_its_association_is_open(seconds: float) -> None:
    assert not is_complete(activity(receiving=True), now=LAST + timedelta(seconds=seconds), quiet_s=30)


@pytest.mark.parametrize(
    ("seconds", "quiet_s", "expected"),
    [
        (0, 30, False),
        (29.999, 30, False),
        (30, 30, True),
        (31, 30, True),
        (0, 0, True),
        (0.4, 0.5, False),
        (0.5, 0.5, True),
        (-5, 30, False),
        (-3600, 0, False),  # a clock that went back
    ],
)
def test_a_series_is_complete_when_its_quiet_period_is_over(seconds: float, quiet_s: float, expected: bool) -> None:
    assert is_complete(activity(receiving=False), now=LAST + timedelta(seconds=seconds), quiet_s=quiet_s) is expected


def test_the_end_of_the_quiet_period_is_the_first_moment_of_completeness() -> None:
    at = quiet_from(LAST, quiet_s=90)

    assert at == LAST + timedelta(seconds=90)
    assert is_complete(activity(receiving=False), now=at, quiet_s=90)
    assert not is_complete(activity(receiving=False), now=at - timedelta(microseconds=1), quiet_s=90)
