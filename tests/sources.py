"""PACS sources of earlier examinations, and what they are asked for; images of one patient, then and now."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, date, datetime
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any, ClassVar

import phantoms
from held import Held

from dicomnode.intake import Intake
from dicomnode.remotes import Source
from dicomnode.retrieve import PriorService

SMALL: dict[str, Any] = {"shape": (8, 8, 8), "spacing_mm": (5.0, 4.0, 4.0)}


def old_ct(phase: str = "native", *, patient_id: str = "P", day: str = "20260101") -> list[Any]:
    return phantoms.make_series(phase=phase, study="old", patient_id=patient_id, header={"StudyDate": day}, **SMALL)


def new_mr() -> list[Any]:
    return phantoms.make_series(modality="MR", study="new", patient_id="P", header={"StudyDate": "20260301"}, **SMALL)


def ask(held: Held, source: Source, study: str, intake: Intake | None = None) -> PriorService:
    request = {
        "study_date": date(2026, 3, 1).isoformat(), "max_age_days": 180, "max_studies": 3, "modalities": ["CT"],
        "description": "", "urgent": False,
    }  # fmt: skip
    held.index.request_priors(("P", ""), study, "to-prior", [source.name], request, now=datetime.now(UTC))
    return PriorService([source], held.index, intake or Intake(held.archive, held.index), ae_title="DICOMNODE")


Answer = Callable[[str], tuple[str, bytes]]
"""A path and query → Content-Type and body."""


class _Door(BaseHTTPRequestHandler):
    answer: ClassVar[Answer]
    asked: ClassVar[list[str]]

    def do_GET(self) -> None:
        """Answer."""
        self.asked.append(self.path)
        kind, body = type(self).answer(self.path)
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextmanager
def answering(answer: bytes | Answer) -> Iterator[tuple[Source, list[str]]]:
    """A DICOMweb server, and the paths that it is asked for; bytes are its answer to everything."""
    asked: list[str] = []
    by_path = (lambda _path: ("application/dicom+json", answer)) if isinstance(answer, bytes) else answer
    server = HTTPServer(("127.0.0.1", 0), type("Door", (_Door,), {"answer": staticmethod(by_path), "asked": asked}))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield Source("pacs", "", "127.0.0.1", 0, "dicomweb", url=f"http://127.0.0.1:{server.server_port}"), asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
