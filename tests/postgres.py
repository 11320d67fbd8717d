"""Debian's PostgreSQL as the node's database: a cluster of its own on the loopback interface, in a temporary folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import psycopg
from running_node import free_port

_BINARIES = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: float(path.parent.name))
MISSING = "" if _BINARIES else "PostgreSQL is not installed (Debian package postgresql)"
_ACCOUNT = "postgres"  # the server refuses to run as root


class Postgres:
    """A running server; `new_database` gives the URL of an empty database."""

    def __init__(self) -> None:
        # not in pytest's own folder: the server's account may not enter it
        self._folder = Path(tempfile.mkdtemp(prefix="postgres-"))
        if os.getuid() == 0:
            shutil.chown(self._folder, _ACCOUNT)
        self._port = free_port()
        self._databases = 0
        self._run("initdb", "--auth=trust", f"--username={_ACCOUNT}", "--encoding=UTF8", "--locale=C.UTF-8")
        options = f"-p {self._port} -c listen_addresses=127.0.0.1 -c unix_socket_directories="
        self._run("pg_ctl", "--wait", "--options", options, "--log", str(self._folder / "log"), "start")

    def new_database(self) -> str:
        """Make an empty database; its SQLAlchemy URL."""
        self._databases += 1
        name = f"node_{self._databases}"
        address = f"{_ACCOUNT}@127.0.0.1:{self._port}"
        with psycopg.connect(f"postgresql://{address}/postgres", autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")
        return f"postgresql+psycopg://{address}/{name}"

    def stop(self) -> None:
        """End it and remove its files."""
        self._run("pg_ctl", "--mode=immediate", "--wait", "stop")
        shutil.rmtree(self._folder)

    def _run(self, program: str, *arguments: str) -> None:
        as_account = ["setpriv", f"--reuid={_ACCOUNT}", f"--regid={_ACCOUNT}", "--clear-groups"]
        command = [str(_BINARIES[-1] / program), "--pgdata", str(self._folder / "cluster"), *arguments]
        said = self._folder / "said"
        with said.open("wb") as output:  # the server keeps it open: a pipe would never end
            done = subprocess.run(
                [*(as_account if os.getuid() == 0 else []), *command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                check=False,
                cwd=self._folder,
            )
        assert done.returncode == 0, f"{program}: {said.read_text()}"
