"""Hours of the week in which something may begin. Pure; `now` is an argument."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Annotated, Literal, get_args

from pydantic import Field

from dicomnode.document import Section

_CLOCK = r"^([01]\d|2[0-3]):[0-5]\d$"
Day = Literal["mon", "tue", "wed", "thu", "fri", "sat", "sun"]
DAYS: tuple[Day, ...] = get_args(Day)


class Schedule(Section):
    """Days and hours, local time of the node; `to` before `from` runs over midnight."""

    days: tuple[Day, ...] = Field(default=DAYS, description="Days on which the hours begin.")
    start: Annotated[str, Field(pattern=_CLOCK)] = Field(default="00:00", alias="from", description="HH:MM")
    end: Annotated[str, Field(pattern=_CLOCK)] = Field(default="00:00", alias="to", description="HH:MM")

    def next_start(self, now: datetime) -> datetime:
        """`now` if it lies within the hours, else when they next begin; `now` aware, in local time."""
        for offset in range(-1, 8):
            day = now + timedelta(days=offset)
            if DAYS[day.weekday()] not in self.days:
                continue
            opens, closes = (
                day.replace(hour=int(t[:2]), minute=int(t[3:]), second=0, microsecond=0) for t in (self.start, self.end)
            )
            if closes <= opens:
                closes += timedelta(days=1)
            if now < closes:
                return max(now, opens)
        return now
