"""Debian's Orthanc as the PACS, on the loopback interface, with its storage in a temporary folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import urllib.request
from pathlib import Path
from typing import Any

from running_node import free_port, wait_for

DICOMWEB = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")
EXECUTABLE = shutil.which("Orthanc") or shutil.which("Orthanc", path="/usr/sbin:/usr/local/sbin")


class Orthanc:
    """A running Orthanc that accepts every store.

    Parameters
    ----------
    folder
        For its configuration and storage.
    """

    ae_title = "ORTHANC"

    def __init__(self, folder: Path, *, modalities: dict[str, Any] | None = None) -> None:
        assert EXECUTABLE is not None
        folder.mkdir(parents=True)
        self.port, self.http_port = free_port(), free_port()
        configuration = folder / "orthanc.json"
        configuration.write_text(
            json.dumps(
                {
                    "DicomAet": self.ae_title,
                    "DicomPort": self.port,
                    "HttpPort": self.http_port,
                    "StorageDirectory": str(folder / "storage"),
                    "IndexDirectory": str(folder / "storage"),
                    "RemoteAccessAllowed": False,
                    "AuthenticationEnabled": False,
                    "DicomAlwaysAllowStore": True,
                    "UnknownSopClassAccepted": True,
                    "DicomModalities": modalities or {},
                    "DicomAlwaysAllowFind": True,
                    "DicomAlwaysAllowGet": True,
                    "DicomAlwaysAllowMove": True,
                    "ConcurrentJobs": 1,
                    "Plugins": [str(DICOMWEB)] if DICOMWEB.exists() else [],
                }
            )
        )
        self._folder = folder
        self.start()

    def start(self) -> None:
        """Begin, or begin again with what it holds."""
        assert EXECUTABLE is not None
        with (self._folder / "orthanc.log").open("ab") as log:
            self._process = subprocess.Popen(
                [EXECUTABLE, str(self._folder / "orthanc.json")],
                stdout=log,
                stderr=log,
                env={**os.environ, "TCP_NODELAY": "1"},
            )
        wait_for(self._answers, timeout_s=30, what="Orthanc")

    def upload(self, path: Path) -> None:
        """Put a DICOM file into it by its REST interface."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.http_port}/instances", data=path.read_bytes(), method="POST"
        )
        urllib.request.urlopen(request, timeout=10).close()  # noqa: S310 - our own server

    def instances(self) -> dict[str, Path | str]:
        """SOP Instance UID → Orthanc's identifier of everything it holds."""
        return {
            self.get_json(f"/instances/{each}")["MainDicomTags"]["SOPInstanceUID"]: each
            for each in self.get_json("/instances")
        }

    def identifier(self, sop_instance_uid: str) -> str:
        """Orthanc's identifier of one instance."""
        url = f"http://127.0.0.1:{self.http_port}/tools/lookup"
        request = urllib.request.Request(url, data=sop_instance_uid.encode(), method="POST")
        with urllib.request.urlopen(request, timeout=10) as answer:  # noqa: S310 - our own server
            (found,) = json.load(answer)
        return str(found["ID"])

    def download(self, identifier: str, path: Path) -> Path:
        """Write the file as Orthanc holds it."""
        path.write_bytes(self._get(f"/instances/{identifier}/file"))
        return path

    def get_json(self, url: str) -> Any:
        """The answer of its REST interface."""
        return json.loads(self._get(url))

    def kill(self) -> None:
        """End it as a power cut would."""
        self._process.kill()
        self._process.wait(30)

    def stop(self) -> None:
        """End it; nothing happens where it has ended."""
        self._process.terminate()
        self._process.wait(30)

    def _get(self, url: str) -> bytes:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.http_port}{url}", timeout=10) as answer:
            body: bytes = answer.read()
            return body

    def _answers(self) -> bool:
        assert self._process.poll() is None, "Orthanc died"
        try:
            return bool(self.get_json("/system"))
        except OSError:
            return False
