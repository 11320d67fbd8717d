"""The HTTP server: today the door for STOW-RS alone.

Law: it runs in a thread of `serve` and answers only whom the access rules let in; each request's blocking work is done
on a thread of its own, and a sender that falls silent is cut off.
"""

from __future__ import annotations

import asyncio
import ssl
import threading
import time
from collections.abc import Callable

import uvicorn
from anyio import to_thread
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse
from uvicorn.protocols.http.h11_impl import H11Protocol

from dicomnode.errors import LocalError
from dicomnode.intake import Intake, is_too_slow
from dicomnode.spool import Source
from dicomnode.stow import CALLING_AE_TITLE, BadRequestError, Storing, boundary_of

START_TIMEOUT_S = 15.0


def application(
    intake: Intake, *, called_ae_title: str, is_admitted: Callable[[str], bool], silence_s: float
) -> FastAPI:
    """The HTTP application.

    Parameters
    ----------
    is_admitted
        Whether this address may send.
    silence_s
        A sender that sends nothing, or next to nothing, for so long in the middle of a request is cut off.
    """
    app = FastAPI(title="dicomnode", docs_url=None, redoc_url=None, openapi_url=None)

    @app.post("/dicom-web/studies")
    @app.post("/dicom-web/studies/{study_instance_uid}")
    async def store(request: Request, study_instance_uid: str = "") -> JSONResponse:
        address = request.client.host if request.client else ""
        if not await to_thread.run_sync(is_admitted, address):
            raise HTTPException(403, "this address is not known here; see access and peers")
        try:
            boundary = boundary_of(request.headers.get("content-type", ""))
            source = Source.new(CALLING_AE_TITLE, called_ae_title, address)
            storing = Storing(boundary, intake, source, study_instance_uid=study_instance_uid)
            outcome = "connection lost"
            try:
                body, began, length = request.stream(), time.monotonic(), 0
                while chunk := await _next(body, silence_s):
                    length += len(chunk)
                    if is_too_slow(time.monotonic() - began, length, silence_s=silence_s):
                        raise _cut_off(f"{length} bytes came in {time.monotonic() - began:.0f} s")
                    await to_thread.run_sync(storing.write, chunk)
                status, answer = storing.answer()
                outcome = "answered"
            finally:
                await to_thread.run_sync(storing.close, outcome)
        except BadRequestError as error:
            raise HTTPException(error.status, str(error)) from None
        except TimeoutError:
            raise _cut_off(f"nothing came for {silence_s:g} s") from None
        return JSONResponse(answer, status, media_type="application/dicom+json")

    return app


def _cut_off(why: str) -> HTTPException:
    return HTTPException(408, why, headers={"Connection": "close"})  # or its drops would be read on


async def _next(body: object, silence_s: float) -> bytes:
    """The next bytes of a body, empty at its end."""
    while True:
        try:
            chunk: bytes = await asyncio.wait_for(anext(body), silence_s)  # type: ignore[call-overload]  # an async generator
        except StopAsyncIteration:
            return b""
        if chunk:
            return chunk


class _Protocol(H11Protocol):
    """HTTP/1.1 that waits for the whole head of a request no longer than this.

    The server underneath waits for ever, and counts such connections: a few of them would shut the door for all.
    """

    head_timeout_s = 15.0
    _head_due: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as its base has it
        super().connection_made(transport)
        self._follow_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._follow_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def _follow_head(self) -> None:
        """The time runs while no request is in hand, and not anew with each byte of its head."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_waiting()
        elif self._head_due is None:
            self._head_due = self.loop.call_later(self.head_timeout_s, self.transport.close)

    def _stop_waiting(self) -> None:
        if self._head_due is not None:
            self._head_due.cancel()
            self._head_due = None


class WebServer:
    """Serves an application from a thread of its own.

    Parameters
    ----------
    max_connections
        Above it, requests are answered with 503.
    head_timeout_s
        A connection on which no whole request has begun for so long is closed.
    tls
        Server side context; None: not encrypted.
    """

    def __init__(
        self,
        app: FastAPI,
        host: str,
        port: int,
        *,
        max_connections: int,
        head_timeout_s: float = _Protocol.head_timeout_s,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._address = f"{host}:{port}"
        config = uvicorn.Config(
            app,
            host,
            port,
            http=type("Protocol", (_Protocol,), {"head_timeout_s": head_timeout_s}),
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            lifespan="off",
            ws="none",
            limit_concurrency=max_connections,
            timeout_graceful_shutdown=10,
            ssl_context_factory=None if tls is None else (lambda _config, _default: tls),
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._run, name="web", daemon=True)
        self._ended = threading.Event()

    def start(self) -> None:
        """Bind and serve.

        Raises
        ------
        LocalError
            The port cannot be had.
        """
        self._thread.start()
        waited = 0.0
        while not self._server.started:
            if self._ended.wait(0.02) or (waited := waited + 0.02) > START_TIMEOUT_S:
                raise LocalError(f"web: cannot listen on {self._address}")

    def stop(self) -> None:
        """Let requests in hand finish for a while, then end."""
        self._server.should_exit = True
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        try:
            self._server.run()
        except SystemExit:  # uvicorn has logged why
            pass
        finally:
            self._ended.set()
