"""TLS by BCP 195: who shows a certificate of the configured authority is served, and nobody else."""

from __future__ import annotations

import shutil
import socket
import ssl
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import pydicom
import pytest
from outbox import Delivering, Outbox, make_dataset
from pydicom.data import get_testdata_file
from raw_scu import CT, EXPLICIT, associate_rq
from running_node import free_port

from dicomnode.archive import Archive
from dicomnode.errors import LocalError, RemoteError
from dicomnode.index import Index
from dicomnode.intake import Intake
from dicomnode.listener import Listener
from dicomnode.model import Instance
from dicomnode.negotiation import Access
from dicomnode.remotes import Destination, TlsFiles
from dicomnode.scu import Association
from dicomnode.tls import server_context
from dicomnode.web import WebServer, application

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")


def openssl(*arguments: str | Path) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two authorities; `node` and `peer` are signed by the first, `stranger` by the second."""
    folder = tmp_path_factory.mktemp("certificates")
    for authority in ("ca", "other-ca"):
        openssl(
            "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", f"/CN={authority}", "-days", "2",
            "-keyout", folder / f"{authority}.key", "-out", folder / f"{authority}.pem",
        )  # fmt: skip
    for name, authority in (("node", "ca"), ("peer", "ca"), ("stranger", "other-ca")):
        openssl(
            "req", "-newkey", "rsa:2048", "-nodes", "-subj", f"/CN={name}",
            "-keyout", folder / f"{name}.key", "-out", folder / f"{name}.csr",
        )  # fmt: skip
        openssl(
            "x509", "-req", "-in", folder / f"{name}.csr", "-CA", folder / f"{authority}.pem",
            "-CAkey", folder / f"{authority}.key", "-CAcreateserial", "-days", "2", "-out", folder / f"{name}.pem",
        )  # fmt: skip
    return folder


@pytest.fixture
def listener(certificates: Path, tmp_path: Path) -> Iterator[Listener]:
    index = Index(f"sqlite:///{tmp_path}/node.db")
    index.migrate()
    intake = Intake(Archive(tmp_path), index)
    intake.start()
    context = server_context(certificates / "node.pem", certificates / "node.key", certificates / "ca.pem")
    made = Listener("127.0.0.1", 0, intake, access=Access(), tls=context, artim_timeout_s=3, network_timeout_s=5)
    made.start()
    yield made
    made.stop(grace_s=0.1)
    intake.stop()
    index.close()


def first_byte(port: int, context: ssl.SSLContext) -> bytes:
    """Of the answer to an association request, over TLS."""
    with (
        socket.create_connection(("127.0.0.1", port), timeout=10) as plain,
        context.wrap_socket(plain, server_hostname="node") as peer,
    ):
        peer.sendall(associate_rq([(CT, EXPLICIT)]))
        return peer.recv(1)


def client(certificates: Path, name: str | None) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(certificates / "ca.pem")
    if name is not None:
        context.load_cert_chain(certificates / f"{name}.pem", certificates / f"{name}.key")
    return context


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_peer_with_a_certificate_of_ours_is_served(
    listener: Listener, certificates: Path, version: ssl.TLSVersion
) -> None:
    context = client(certificates, "peer")
    context.minimum_version = context.maximum_version = version

    assert first_byte(listener.port, context) == b"\x02"


@pytest.mark.parametrize("name", [None, "stranger"])
def test_a_peer_without_a_certificate_or_of_another_authority_is_not(
    listener: Listener, certificates: Path, name: str | None
) -> None:
    with pytest.raises((ssl.SSLError, ConnectionError)):
        first_byte(listener.port, client(certificates, name))

    assert first_byte(listener.port, client(certificates, "peer")) == b"\x02"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("version", "ciphers"),
    [(ssl.TLSVersion.TLSv1_1, "DEFAULT:@SECLEVEL=0"), (ssl.TLSVersion.TLSv1_2, "AES128-SHA:@SECLEVEL=0")],
)
def test_old_versions_and_ciphers_without_forward_secrecy_are_not_spoken(
    listener: Listener, certificates: Path, version: ssl.TLSVersion, ciphers: str
) -> None:
    context = client(certificates, "peer")
    context.set_ciphers(ciphers)
    context.minimum_version = context.maximum_version = version

    with pytest.raises((ssl.SSLError, ConnectionError)):
        first_byte(listener.port, context)


def test_who_speaks_in_the_clear_or_not_at_all_is_cut_off(listener: Listener) -> None:
    for said in (associate_rq([(CT, EXPLICIT)]), b""):
        with socket.create_connection(("127.0.0.1", listener.port), timeout=10) as peer:
            peer.sendall(said)
            answer = b""
            with suppress(ConnectionResetError):
                while more := peer.recv(100):
                    answer += more
        assert answer[:1] in (b"", b"\x15")  # nothing, or a TLS alert
    assert listener.counts()["open"] == 0


@pytest.mark.skipif(shutil.which("storescu") is None, reason="DCMTK is not installed")
def test_dcmtk_stores_over_tls(listener: Listener, certificates: Path) -> None:
    path = get_testdata_file("CT_small.dcm")
    credentials = ["+tls", str(certificates / "peer.key"), str(certificates / "peer.pem")]
    authority = ["+cf", str(certificates / "ca.pem")]

    done = subprocess.run(
        ["storescu", *credentials, *authority, "127.0.0.1", str(listener.port), path], check=False, capture_output=True
    )

    if b"nknown option" in done.stderr:
        pytest.skip("this DCMTK is built without TLS")
    assert done.returncode == 0, done.stderr
    listener.intake.flush()
    assert listener.intake._index.contents_of(str(pydicom.dcmread(path).SOPInstanceUID))


def test_a_certificate_that_cannot_be_used_is_a_local_error_that_names_the_files(tmp_path: Path) -> None:

    with pytest.raises(LocalError, match=r"no\.pem"):
        server_context(tmp_path / "no.pem", tmp_path / "no.key", tmp_path / "no-ca.pem")


def stored_over_tls(certificates: Path, port: int, host: str, **options: Any) -> int:
    """The status of one C-STORE by our own SCU."""
    name = options.pop("name", "peer")
    files = TlsFiles(certificates / f"{name}.pem", certificates / f"{name}.key", certificates / "ca.pem", **options)
    association = Association(Destination("node", "NODE", host, port, tls=files), ae_title="PEER", timeout_s=5.0)
    association.open([(CT, [EXPLICIT])])
    data_set = b"\x08\x00\x05\x00CS\x00\x00" * 100_000
    instance = Instance("2.25.1", CT, EXPLICIT, "", "", len(data_set))
    status = association.store(association.accepted[CT, EXPLICIT], instance, BytesIO(data_set), len(data_set))
    association.release()
    return status


def test_we_store_over_tls_at_whoever_shows_a_certificate_of_the_authority(
    listener: Listener, certificates: Path
) -> None:
    assert stored_over_tls(certificates, listener.port, "127.0.0.1", check_host_name=False) == 0x0000


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"check_host_name": True}, "no TLS"), ({"check_host_name": False, "name": "stranger"}, "no association|no TLS")],
)
def test_we_do_not_store_at_another_host_than_the_certificate_names_nor_with_one_that_nobody_knows(
    listener: Listener, certificates: Path, options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(RemoteError, match=reason):
        stored_over_tls(certificates, listener.port, "127.0.0.1", **options)


@pytest.mark.parametrize(("name", "state"), [("peer", "delivered"), ("stranger", "waiting"), (None, "waiting")])
def test_stow_goes_over_mutual_tls_or_waits(certificates: Path, tmp_path: Path, name: str | None, state: str) -> None:
    outbox, index = Outbox(tmp_path / "ours"), Index(f"sqlite:///{tmp_path}/theirs.db")
    index.migrate()
    intake = Intake(Archive(tmp_path / "theirs"), index)
    intake.start()
    port = free_port()
    web = WebServer(
        application(intake, called_ae_title="NODE", is_admitted=lambda _: True, silence_s=5.0),
        "127.0.0.1", port, max_connections=20,
        tls=server_context(certificates / "node.pem", certificates / "node.key", certificates / "ca.pem"),
    )  # fmt: skip
    web.start()
    try:
        dataset = make_dataset(1)
        dataset.StudyInstanceUID, dataset.SeriesInstanceUID, dataset.PatientID = "2.25.8", "2.25.8.1", "P"
        (instance,) = outbox.put(dataset)
        files = TlsFiles(
            certificates / f"{name}.pem", certificates / f"{name}.key", certificates / "ca.pem", check_host_name=False
        )
        destination = Destination(
            "pacs", "STOW-RS", "127.0.0.1", port, url=f"https://127.0.0.1:{port}/dicom-web", timeout_s=5.0,
            tls=files if name else None,
        )  # fmt: skip
        service = Delivering([destination], outbox.index, outbox.archive, ae_title="NODE", clock=outbox.clock)
        service.once()
    finally:
        web.stop()
        intake.stop()
        index.close()

    assert outbox.rows()[instance.sop_instance_uid]["state"] == state
    outbox.index.close()


def test_a_certificate_of_ours_that_cannot_be_read_is_trouble_of_our_own(
    listener: Listener, certificates: Path
) -> None:
    with pytest.raises(LocalError, match=r"nobody\.pem"):
        stored_over_tls(certificates, listener.port, "127.0.0.1", name="nobody")
