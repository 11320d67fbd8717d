"""The only room that speaks SQL: what the node knows, one commit per change.

Law: every method is one transaction; database trouble leaves as LocalError; rows never leave, values of
`dicomnode.model` do.

    database     open, migrate, transactions     tables, migrations   their shape
    receiving    associations, instances, series pairs                volumes, pairs with their jobs
    reruns       jobs made again                 withdrawals          what former jobs sent
    late         what came after a series was complete
    rule_sets    every version of the rules      decisions            traces and work items
    priors       what PACS sources are asked for
    journal      sealed, not yet indexed; aside  commitments          storage commitment requests
    clock        times that lie ahead once the clock was set back
    jobs         stages, verdicts, products      deliveries           the ledger        status   all of it, to read
"""

from pathlib import Path

from dicomnode.errors import LocalError
from dicomnode.index.clock import TOLERANCE, Clock
from dicomnode.index.commitment_requests import CommitmentRequests, Denial, Reference
from dicomnode.index.commitments import Commitments
from dicomnode.index.database import create_engine
from dicomnode.index.deliveries import Attempt, Deliveries, Which
from dicomnode.index.jobs import Jobs
from dicomnode.index.journal import AssociationRecord, Journal, Settled
from dicomnode.index.late import SUPERSEDED, Late
from dicomnode.index.pairs import NOT_LOOKED_AT, Enqueue
from dicomnode.index.priors import PriorFetch, Priors
from dicomnode.index.receiving import Added
from dicomnode.index.reruns import ENDED, Reruns
from dicomnode.index.rule_sets import RuleSets
from dicomnode.index.status import Status
from dicomnode.index.withdrawals import NOTE, Notes

__all__ = [
    "ENDED",
    "NOTE",
    "NOT_LOOKED_AT",
    "SUPERSEDED",
    "TOLERANCE",
    "Added",
    "AssociationRecord",
    "Attempt",
    "Denial",
    "Enqueue",
    "Index",
    "Notes",
    "PriorFetch",
    "Reference",
    "Settled",
    "Which",
    "create_engine",
    "open_index",
]


class Index(Journal, Late, RuleSets, Reruns, Priors, Jobs, Deliveries, CommitmentRequests, Commitments, Clock, Status):
    """What the node knows of patients, studies, series, instances, pairs, jobs, products and deliveries."""


def open_index(url: str, *, create: bool = False) -> Index:
    """The node's index, brought to this version's shape where `create`.

    Raises
    ------
    LocalError
        There is none yet, or another version of the software made it.
    """
    file = Path(url.removeprefix("sqlite:///"))
    if url.startswith("sqlite:///") and not file.exists():
        if not create:
            raise LocalError(f"{file}: no such database: the node has not run with this configuration")
        file.parent.mkdir(parents=True, exist_ok=True)
    index = Index(url)
    if create:
        index.migrate()
    else:
        index.require_shape()
    return index
