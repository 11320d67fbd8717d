"""Who may open an association, and for what: the answers to an A-ASSOCIATE-RQ (PS3.8 9.3.2 to 9.3.4).

Law: pure; how many associations are open, what a host name resolves to and whether the disk is full are arguments.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from enum import Enum

from pydicom.uid import UID

from dicomnode.pdu import APPLICATION_CONTEXT_NAME, AssociateRequest, ContextAnswer, ProposedContext

VERIFICATION = "1.2.840.10008.1.1"
STORAGE_COMMITMENT_PUSH_MODEL = "1.2.840.10008.1.20.1"

_IMPLICIT, _EXPLICIT = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1"


class Rejection(Enum):
    """Result, source and reason of an A-ASSOCIATE-RJ (PS3.8 9.3.4), and what the log says."""

    PROTOCOL_VERSION = (1, 2, 2, "protocol version is not supported")
    APPLICATION_CONTEXT = (1, 1, 2, "application context is not DICOM's")
    CALLING_AE_TITLE = (1, 1, 3, "calling AE title is not known at that address")
    CALLED_AE_TITLE = (1, 1, 7, "called AE title is not ours")
    CONGESTION = (2, 3, 1, "the disk is full")
    LIMIT = (2, 3, 2, "too many associations are open")
    PEER_LIMIT = (2, 3, 2, "too many associations of this peer are open")


@dataclass(frozen=True)
class Peer:
    """A system that may send.

    Attributes
    ----------
    hosts
        Addresses, networks (CIDR) or host names it may come from; empty for any.
    max_associations
        Of its AE title at once; None for no limit of its own.
    port
        Where it takes reports of storage commitment on an association of ours; None where it does not.
    """

    ae_title: str
    hosts: tuple[str, ...] = ()
    max_associations: int | None = None
    port: int | None = None


@dataclass(frozen=True)
class Access:
    """Who is let in.

    Attributes
    ----------
    peers
        None: whoever reaches the port.
    called_ae_title
        What callers must call us; None: anything.
    """

    peers: tuple[Peer, ...] | None = None
    called_ae_title: str | None = None
    max_associations: int = 20


def rejection(
    request: AssociateRequest,
    address: str,
    access: Access,
    *,
    open_calling: Sequence[str],
    is_full: bool,
    resolve: Callable[[str], Collection[str]],
) -> Rejection | None:
    """Why a request is rejected, or None.

    Parameters
    ----------
    open_calling
        Calling AE titles of the associations that are open.
    is_full
        Less space is free than associations are accepted with.
    resolve
        A host name's addresses; none where it cannot be resolved.
    """
    if not request.protocol_version & 1:
        return Rejection.PROTOCOL_VERSION
    if request.application_context_name != APPLICATION_CONTEXT_NAME:
        return Rejection.APPLICATION_CONTEXT
    if access.called_ae_title not in (None, request.called_ae_title):
        return Rejection.CALLED_AE_TITLE
    calling = request.calling_ae_title
    peer = None
    if access.peers is not None:
        known = [each for each in access.peers if each.ae_title == calling]
        peer = next((each for each in known if comes_from(address, each.hosts, resolve)), None)
        if peer is None:
            return Rejection.CALLING_AE_TITLE
    if is_full:
        return Rejection.CONGESTION
    if len(open_calling) >= access.max_associations:
        return Rejection.LIMIT
    limit = None if peer is None else peer.max_associations
    if limit is not None and sum(each == calling for each in open_calling) >= limit:
        return Rejection.PEER_LIMIT
    return None


def comes_from(address: str, hosts: Collection[str], resolve: Callable[[str], Collection[str]]) -> bool:
    """Whether an address is one of the hosts, or in one of the networks; always where there are none."""
    if not hosts:
        return True
    parsed = ipaddress.ip_address(address.split("%")[0])
    if isinstance(parsed, ipaddress.IPv6Address) and parsed.ipv4_mapped:
        parsed = parsed.ipv4_mapped
    for host in hosts:
        try:
            if parsed in ipaddress.ip_network(host, strict=False):
                return True
        except ValueError:  # a host name
            if str(parsed) in resolve(host):
                return True
    return False


def answer(context: ProposedContext, *, unknown_sop_classes: bool, commitment: bool) -> ContextAnswer:
    """Whether a presentation context is accepted, and with which transfer syntax (PS3.8 9.3.3.2)."""
    first = context.transfer_syntaxes[0] if context.transfer_syntaxes else _IMPLICIT
    if is_storage(context.abstract_syntax, unknown_sop_classes=unknown_sop_classes):
        allowed = [uid for uid in context.transfer_syntaxes if uid]
    elif context.abstract_syntax == VERIFICATION or (
        commitment and context.abstract_syntax == STORAGE_COMMITMENT_PUSH_MODEL
    ):
        allowed = [uid for uid in context.transfer_syntaxes if uid in (_IMPLICIT, _EXPLICIT)]
    else:
        return ContextAnswer(context.id, context.abstract_syntax, 3, first)
    if not allowed:
        return ContextAnswer(context.id, context.abstract_syntax, 4, first)
    # Explicit VR keeps private elements' VRs; no sender is made to compress what it proposes both ways; else the
    # sender's own order.
    chosen = next((uid for uid in (_EXPLICIT, _IMPLICIT) if uid in allowed), allowed[0])
    # whom we ask for storage commitment reports as its SCP (PS3.4 J.3.3)
    reports = context.abstract_syntax == STORAGE_COMMITMENT_PUSH_MODEL
    return ContextAnswer(context.id, context.abstract_syntax, 0, chosen, scp_too=reports)


def is_storage(sop_class_uid: str, *, unknown_sop_classes: bool) -> bool:
    """Whether a SOP class is one of the Storage Service, or one that nobody here has heard of."""
    uid = UID(sop_class_uid)
    if not uid.type:  # not in PS3.6 as pydicom knows it
        return unknown_sop_classes and bool(sop_class_uid)
    return uid.type == "SOP Class" and "Storage" in uid.name and "Commitment" not in uid.name
