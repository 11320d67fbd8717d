"""When is a series complete: its associations are closed and nothing has come for a while.

Law: pure; `now` is an argument. What a complete series contains is another room's question.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from dicomnode.model import SeriesActivity


def is_complete(activity: SeriesActivity, *, now: datetime, quiet_s: float) -> bool:
    """Whether no more instances of the series are to be expected.

    Parameters
    ----------
    activity
        What was received of it. While an association that sent one of its instances is open it is not complete,
        however long the pause: the sender has not said that it has finished.
    now
        Timezone-aware.
    quiet_s
        Seconds without an instance, after which the series counts as complete. A clock that went backwards makes
        the series wait longer, never shorter.
    """
    return not activity.receiving and is_quiet(activity.last_received_at, now=now, quiet_s=quiet_s)


def is_quiet(last_received_at: datetime, *, now: datetime, quiet_s: float) -> bool:
    """Whether `quiet_s` seconds have gone by since the last instance."""
    return now >= quiet_from(last_received_at, quiet_s=quiet_s)


def quiet_from(last_received_at: datetime, *, quiet_s: float) -> datetime:
    """The moment from which the quiet period is over, if nothing else arrives."""
    return last_received_at + timedelta(seconds=quiet_s)
