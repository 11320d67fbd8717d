"""A Storage SCP that also answers storage commitment: at once, on an association of its own, in part, or never."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from pydicom import Dataset
from pynetdicom import AE, build_role, evt
from pynetdicom.sop_class import StorageCommitmentPushModel  # type: ignore[attr-defined]
from receiving_scp import ReceivingSCP

PUSH_MODEL_INSTANCE = "1.2.840.10008.1.20.1.1"


class CommittingSCP(ReceivingSCP):
    """Keeps its promises by `denies`.

    Parameters
    ----------
    denies
        SOP Instance UID → Failure Reason, 0 for a commitment, None for no mention in the report.
    takes
        The status of its answer to N-ACTION.
    reports
        Whether a report follows at once, on the association that asked.
    """

    def __init__(
        self,
        *,
        denies: Callable[[str], int | None] = lambda _uid: 0,
        takes: int = 0x0000,
        reports: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.denies, self.takes, self.reports = denies, takes, reports
        self.asked: list[list[str]] = []
        self.answers: list[int] = []
        self.unreported: list[Dataset] = []
        self._ae.add_supported_context(StorageCommitmentPushModel)

    def handlers(self) -> list[Any]:
        return [*super().handlers(), (evt.EVT_N_ACTION, self._on_action)]

    def report_to(self, port: int, *, ae_title: str = "NODE") -> None:
        """Report what was not reported yet, on an association of its own."""
        ae = AE(self.ae_title)
        ae.add_requested_context(StorageCommitmentPushModel)
        role = build_role(StorageCommitmentPushModel, scp_role=True)
        association = ae.associate("127.0.0.1", port, ae_title=ae_title, ext_neg=[role])
        assert association.is_established
        while self.unreported:
            self._report(association, self.unreported.pop(0))
        association.release()

    def _on_action(self, event: evt.Event) -> tuple[int, None]:
        request = event.action_information
        if self.takes != 0x0000:
            return self.takes, None
        uids = [str(item.ReferencedSOPInstanceUID) for item in request.ReferencedSOPSequence]
        self.asked.append(uids)
        report = Dataset()
        report.TransactionUID = request.TransactionUID
        done, failed = [], []
        for item in request.ReferencedSOPSequence:
            reason = self.denies(str(item.ReferencedSOPInstanceUID))
            if reason:
                item.FailureReason = reason
            if reason is not None:
                (failed if reason else done).append(item)
        if done:
            report.ReferencedSOPSequence = done
        if failed:
            report.FailedSOPSequence = failed
        self.unreported.append(report)
        if self.reports:
            threading.Thread(target=self._report_soon, args=(event.assoc,), daemon=True).start()
        return 0x0000, None

    def _report_soon(self, association: Any) -> None:
        time.sleep(0.1)  # after the answer to N-ACTION
        self._report(association, self.unreported.pop(0))

    def _report(self, association: Any, report: Dataset) -> None:
        event_type = 2 if "FailedSOPSequence" in report else 1
        status, _ = association.send_n_event_report(report, event_type, StorageCommitmentPushModel, PUSH_MODEL_INSTANCE)
        self.answers.append(int(status.get("Status", -1)))
