"""`destinations: [sender]` over the wire: DCMTK sends as one of two workstations, and only its own SCP gets results."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from pathlib import Path

import counterparts
import phantoms
import pydicom
from running_node import RunningNode, free_port, wait_for

RULES = """
version: 1
rules:
  - id: back
    when: {Modality: CT}
    roles: {fixed: {match: {contrast: false}}, moving: {match: {contrast: true}}}
    register: {preset: fast, parameters: {voxels: 2000}}
    destinations: [sender]
"""


def test_results_go_back_to_the_workstation_that_sent_and_to_nobody_else(tmp_path: Path) -> None:
    storescp, storescu = (counterparts.tool(name, "dcmtk") for name in ("storescp", "storescu"))
    environment = {**os.environ, "TCP_NODELAY": "1"}
    ports = {"WS_A": free_port(), "WS_B": free_port()}
    pair = phantoms.make_pair(shape=(8, 24, 24), spacing_mm=(12.0, 9.0, 9.0))
    node = RunningNode(tmp_path / "node", rules=RULES, quiet_period_s=0.5)
    config = json.loads(node.config.read_text())
    config["peers"] = [{"ae_title": ae_title, "host": "127.0.0.1", "port": port} for ae_title, port in ports.items()]
    node.config.write_text(json.dumps(config))
    scps = []
    try:
        for ae_title, port in ports.items():
            (tmp_path / ae_title).mkdir()
            command = [storescp, "--accept-all", "-aet", ae_title, "-od", tmp_path / ae_title, str(port)]
            scps.append(subprocess.Popen(command, env=environment))
            wait_for(lambda at=port: listens(at), timeout_s=20, what="storescp to listen")
        node.start()
        for n, series in enumerate(pair):
            paths = phantoms.write_series(series, tmp_path / f"sent{n}")
            address = ["-aet", "WS_A", "-aec", "DICOMNODE", "127.0.0.1", str(node.port)]
            subprocess.run([storescu, *address, *paths], check=True, env=environment)
        rows = wait_for(
            lambda: (found := node.status()["deliveries"]) and all(r["state"] == "delivered" for r in found) and found,
            timeout_s=180,
            what="every delivery",
        )
        assert node.stop() == 0
    finally:
        node.kill()
        for scp in scps:
            scp.terminate()
            scp.wait(10)

    received = [pydicom.dcmread(path) for path in (tmp_path / "WS_A").iterdir()]
    assert {str(each.SOPInstanceUID) for each in received} == {row["sop_instance_uid"] for row in rows}
    assert len(received) == len(rows) == 8 + 2
    assert {each.StudyInstanceUID for each in received} == {pair[0][0].StudyInstanceUID}
    assert list((tmp_path / "WS_B").iterdir()) == []


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
