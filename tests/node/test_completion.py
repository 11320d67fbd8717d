from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from dicomnode.completion import Decision, decide, is_complete, quiet_from, stuck
from dicomnode.model import Promise, SeriesActivity

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


FEW = Promise("ImagesInAcquisition", 20, 12)
GAP = "1 slices are missing: gaps of up to 10.000 mm"
SHORT = "12 of 20 instances (ImagesInAcquisition)"
QUIET, WAITED = LAST + timedelta(seconds=30), LAST + timedelta(seconds=300)


@pytest.mark.parametrize(
    ("seconds", "receiving", "promises", "gap", "expected"),
    [
        (0, True, [], "", Decision(False)),
        (86400, True, [FEW], GAP, Decision(False)),
        (29, False, [], "", Decision(False, "", QUIET)),
        (29, False, [FEW], GAP, Decision(False, "", QUIET)),
        (30, False, [], "", Decision(True)),
        (30, False, [Promise("any", 12, 12)], "", Decision(True)),
        (30, False, [Promise("any", 12, 14)], "", Decision(True)),  # more than promised is no lack
        (30, False, [Promise("hostile", 2**31, 12)], "", Decision(True)),
        (30, False, [FEW], "", Decision(False, SHORT, WAITED)),
        (299, False, [], GAP, Decision(False, GAP, WAITED)),
        (299, False, [FEW], GAP, Decision(False, f"{SHORT}; {GAP}", WAITED)),
        (300, False, [FEW], GAP, Decision(True, f"{SHORT}; {GAP}")),
        (301, False, [FEW], "", Decision(True, SHORT)),
        (-5, False, [], "", Decision(False, "", QUIET)),  # a clock that went back
    ],
)
def test_a_series_that_lacks_something_is_waited_for_and_then_goes_on_as_it_is(
    seconds: float, receiving: bool, promises: list[Promise], gap: str, expected: Decision
) -> None:
    assert expected == decide(
        activity(receiving=receiving),
        promises=promises,
        gap=gap,
        now=LAST + timedelta(seconds=seconds),
        quiet_s=30,
        incomplete_wait_s=300,
    )


@pytest.mark.parametrize("wait_s", [0, 10, 30])
def test_waiting_for_what_is_missing_is_never_shorter_than_the_quiet_period(wait_s: float) -> None:
    def at(seconds: float) -> bool:
        now = LAST + timedelta(seconds=seconds)
        decision = decide(activity(receiving=False), promises=[FEW], now=now, quiet_s=30, incomplete_wait_s=wait_s)
        return decision.is_complete

    assert [at(29), at(30)] == [False, True]


@pytest.mark.parametrize(
    ("seconds", "receiving", "expected"),
    [(0, True, False), (599, True, False), (600, True, True), (86400, True, True), (86400, False, False)],
)
def test_an_association_that_stays_open_in_silence_is_reported(seconds: float, receiving: bool, expected: bool) -> None:
    said = stuck(activity(receiving=receiving), now=LAST + timedelta(seconds=seconds))

    assert said.startswith("stuck: an association") is expected
