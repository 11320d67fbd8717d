"""When is a series complete, what is it still waiting for, and when is that worth a person's attention.

Law: pure; `now` is an argument. What a series contains is another room's question; here it arrives as what was
promised, what came, and what is missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from dicomnode.model import Promise, SeriesActivity

STUCK_AFTER_S = 600.0
"""An association that stays open in silence for longer than this is reported."""
MAX_PROMISE = 100_000
"""A promise of more instances than this is no promise."""


@dataclass(frozen=True)
class Decision:
    """Whether a series is complete.

    Attributes
    ----------
    is_complete
        No more is to be expected, or it was waited for long enough.
    missing
        What is not there though it should be; empty where nothing is.
    look_again_at
        Where it is not complete: when it will be, if nothing else arrives.
    """

    is_complete: bool
    missing: str = ""
    look_again_at: datetime | None = None


def is_complete(activity: SeriesActivity, *, now: datetime, quiet_s: float) -> bool:
    """Whether no more instances of the series are to be expected.

    Parameters
    ----------
    activity
        What was received of it. While an association that sent one of its instances is open it is not complete,
        however long the pause: the sender has not said that it has finished. Nor is it while something that came
        before the end of its quiet period has not been indexed, which may be one of its instances.
    now
        Timezone-aware.
    quiet_s
        Seconds without an instance, after which the series counts as complete. A clock that went backwards makes
        the series wait longer, never shorter.
    """
    is_open = activity.receiving or _is_behind(activity, quiet_s=quiet_s)
    return not is_open and is_quiet(activity.last_received_at, now=now, quiet_s=quiet_s)


def decide(
    activity: SeriesActivity,
    *,
    promises: Sequence[Promise] = (),
    gap: str = "",
    now: datetime,
    quiet_s: float,
    incomplete_wait_s: float,
) -> Decision:
    """Whether to go on with a series as it is.

    Parameters
    ----------
    promises
        What its headers, or the PACS it came from, say there should be. A promise only makes the series wait: scanners
        count images of other series in, and some that are never sent.
    gap
        Why its slices do not form whole volumes, where more slices could mend that; empty where they do.
    quiet_s
        As `is_complete`.
    incomplete_wait_s
        Seconds since the last instance for which a series that lacks something is waited for.
    """
    quiet_until = quiet_from(activity.last_received_at, quiet_s=quiet_s)
    is_open = activity.receiving or _is_behind(activity, quiet_s=quiet_s)
    if is_open or now < quiet_until:
        return Decision(False, look_again_at=None if is_open else quiet_until)
    short = [each for each in promises if each.received < each.promised <= MAX_PROMISE]
    found = [*(f"{each.received} of {each.promised} instances ({each.by})" for each in short[:3]), gap]
    missing = "; ".join(filter(None, found))
    wait_until = quiet_from(activity.last_received_at, quiet_s=max(incomplete_wait_s, quiet_s))
    if missing and now < wait_until:
        return Decision(False, missing, wait_until)
    return Decision(True, missing)


def stuck(activity: SeriesActivity, *, now: datetime) -> str:
    """What keeps a series from being complete though nothing comes any more; empty where nothing does."""
    silent = now - activity.last_received_at
    if not activity.receiving or silent < timedelta(seconds=STUCK_AFTER_S):
        return ""
    minutes = silent.total_seconds() // 60
    return f"stuck: an association that sent it is still open, and nothing has come for {minutes:.0f} minutes"


def _is_behind(activity: SeriesActivity, *, quiet_s: float) -> bool:
    """Whether something that came within the quiet period has not been indexed yet."""
    oldest = activity.oldest_unindexed_at
    return oldest is not None and oldest <= quiet_from(activity.last_received_at, quiet_s=quiet_s)


def is_quiet(last_received_at: datetime, *, now: datetime, quiet_s: float) -> bool:
    """Whether `quiet_s` seconds have gone by since the last instance."""
    return now >= quiet_from(last_received_at, quiet_s=quiet_s)


def quiet_from(last_received_at: datetime, *, quiet_s: float) -> datetime:
    """The moment from which the quiet period is over, if nothing else arrives."""
    return last_received_at + timedelta(seconds=quiet_s)
