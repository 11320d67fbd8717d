"""How many instances of a series a PACS holds: asked by C-FIND or QIDO-RS, in a thread of its own.

Law: nobody waits for a PACS here. A question that is not answered in time counts as answered with nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import datetime, timedelta

from dicomnode.errors import stack
from dicomnode.model import Promise, SeriesActivity
from dicomnode.pacs_sources import client_of
from dicomnode.remotes import Source

log = logging.getLogger(__name__)

PATIENCE = timedelta(seconds=30)
"""After this long without an answer a series goes on without it."""


class SeriesCounts:
    """Asks every source that is configured to be asked for counts.

    Parameters
    ----------
    sources
        All that are configured; those without `counts` are left alone.
    ae_title
        Ours.
    """

    def __init__(self, sources: Sequence[Source], *, ae_title: str) -> None:
        self._sources = [source for source in sources if source.counts]
        self._ae_title = ae_title
        self._asked: dict[str, tuple[Future[list[tuple[str, int]]], datetime]] = {}
        self._pool = ThreadPoolExecutor(1, "counts")

    def promises(self, activity: SeriesActivity, now: datetime) -> list[Promise] | None:
        """What the sources hold of a series; None while that is not known. An answer is given once, then asked anew."""
        uid = activity.series_instance_uid
        if not self._sources:
            return []
        if uid not in self._asked:
            self._asked[uid] = self._pool.submit(self._ask, activity.study_instance_uid, uid), now
        future, asked_at = self._asked[uid]
        if not future.done() and now - asked_at < PATIENCE:
            return None
        del self._asked[uid]
        if not future.done():
            log.warning("series %s: no source told its count within %s", uid, PATIENCE)
            return []
        return [Promise(f"NumberOfSeriesRelatedInstances at {by}", n, activity.instances) for by, n in future.result()]

    def stop(self) -> None:
        """Let the question in hand end; ask no more."""
        self._pool.shutdown(cancel_futures=True)

    def _ask(self, study_instance_uid: str, series_instance_uid: str) -> list[tuple[str, int]]:
        """Source and count, of those that hold the series."""
        found = []
        for source in self._sources:
            try:
                held = client_of(source, self._ae_title, _stores_nothing).series(study_instance_uid)
            except Exception as error:  # a source that is down must not stop the series
                log.warning("source %s: no counts: %s\n%s", source.name, error, stack(error))
                continue
            found += [(source.name, each.instances) for each in held if each.series_instance_uid == series_instance_uid]
        return found


def _stores_nothing(*_instance: object) -> None:
    raise AssertionError("a question brings no instances")
