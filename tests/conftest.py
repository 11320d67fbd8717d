"""What several rooms' tests share: one thread per process, and a database server that starts when first asked for."""

from __future__ import annotations

import os
from collections.abc import Iterator

# pytest-xdist keeps every core busy already: a second thread of torch, here or in a node under test, would only wait.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import postgres
import pytest


@pytest.fixture(scope="session")
def postgresql() -> Iterator[postgres.Postgres]:
    if postgres.MISSING:
        pytest.skip(postgres.MISSING)
    server = postgres.Postgres()
    yield server
    server.stop()
