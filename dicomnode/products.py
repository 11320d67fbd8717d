"""What a job makes: from its folder, its rule and how it was made, every object of every pair that was not rejected.

Law: the same folder gives the same objects; nothing here asks the index, nor knows where anything is sent.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version

from pydicom import Dataset

from dicomnode import objects, volumes
from dicomnode.errors import StudyError
from dicomnode.job_folder import JobFolder, Result
from dicomnode.model import Job, Verdict
from dicomnode.objects import Provenance, SourceSeries
from dicomnode.rule import Rule
from dicomnode.uptake import Moment, measure_uptake
from dicomnode.verdict import of_all

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Maker:
    """The objects of one job.

    Parameters
    ----------
    folder
        With the result of each pair that was registered, and the verdict on it (`verdicts.json`).
    """

    job: Job
    rule: Rule
    folder: JobFolder

    def make(self) -> Iterator[tuple[str, Dataset]]:
        """Kind and object, one at a time; with `series_4d` the series of all phases are one.

        Of a pair that was rejected its report alone, and only where the rule wants that.
        """
        rule, folder, order = self.rule, self.folder, self.folder.order
        judged = folder.read_json("verdicts")
        registered = [role for role in folder.moving_roles if role not in folder.read_json("failed")]
        accepted = [role for role in registered if judged[role][0] != Verdict.REJECT]
        fixed = folder.source("fixed")
        with_4d = "series_4d" in rule.outputs
        outputs = [name for name in rule.outputs if name not in ("series_4d", "uptake", *objects.CARRIED)]
        outputs += ["series"] if with_4d else []
        outputs += ["sro_affine"] if rule.registration.affine_sro else []
        digests = [digest for role in order for digest in folder.digests(role).values()]
        reference = self.provenance(folder.result(registered[0]))
        series_uid = objects.series_4d_uid(digests, reference)
        description = objects.description_4d(fixed, rule.series.description)
        _, overall = of_all([judged[role] for role in folder.moving_roles])

        like: Dataset | None = None

        def placed(dataset: Dataset, role: str) -> Dataset:
            nonlocal like
            like = dataset if like is None else like
            slices, phase = fixed.grid.shape[0], order.index(role)
            return objects.as_phase(
                dataset,
                like=like,
                series_uid=series_uid,
                description=description,
                phase=phase,
                phases=len(order),
                slices=slices,
                warning=overall,
            )

        if with_4d and accepted:
            report = folder.result(accepted[0]).registration.report
            for dataset in objects.reference_phase(fixed, report, reference, store_in=rule.store_in):
                yield "series", placed(dataset, "fixed")
        for role in registered if rule.verdict.report_rejected else accepted:
            result, moving = folder.result(role), folder.source(role)
            is_rejected, reason = role not in accepted, judged[role][1]
            for kind, dataset in objects.build(
                fixed,
                moving,
                volumes.load(moving.datasets),
                result.registration,
                result.sampled,
                outputs=outputs,
                provenance=self.provenance(result),
                warning="" if is_rejected else reason,
                rejection=reason if is_rejected else "",
                store_in=rule.store_in,
                description=rule.series.description,
                resolution="fixed" if with_4d else rule.series.resolution,
                may_be_multi_frame=not with_4d,
                measured=folder.measured(role),
            ):
                yield kind, placed(dataset, role) if with_4d and kind == "series" else dataset
            if not is_rejected:
                yield from self._carried(role, fixed, moving, reason)
        if "uptake" in rule.outputs and accepted:
            yield from self._uptake(fixed, accepted, overall)

    def _carried(
        self, role: str, fixed: SourceSeries, moving: SourceSeries, warning: str
    ) -> Iterator[tuple[str, Dataset]]:
        """What was drawn on the moving series, where the rule wants it; what cannot be carried is named in the log."""
        result = self.folder.result(role)
        for drawing in self.folder.drawings(role):
            if drawing.output in self.rule.outputs:
                try:
                    yield objects.carried(
                        fixed,
                        moving,
                        result.sampled,
                        drawing,
                        provenance=self.provenance(result),
                        warning=warning,
                        store_in=self.rule.store_in,
                    )
                except StudyError as error:
                    log.warning("job %s: not carried over: %s", self.job.id, error)

    def _uptake(self, fixed: SourceSeries, accepted: Sequence[str], warning: str) -> Iterator[tuple[str, Dataset]]:
        """The uptake curves over all phases; those that were not accepted have no registered value."""
        folder, order = self.folder, self.folder.order

        def moment(number: int) -> Moment:
            role = order[number]
            image = volumes.load(folder.datasets(role))
            if role not in accepted:
                return Moment(image, is_registered=role == "fixed")
            return Moment(image, is_registered=True, field=folder.result(role).sampled.field)

        sources = {role: fixed if role == "fixed" else folder.headers(role) for role in order}
        seconds = volumes.seconds_of([sources[role].datasets for role in order])
        found = measure_uptake(volumes.load(fixed.datasets), len(order), moment, seconds=seconds)
        if found is None:
            log.warning("job %s: no uptake curves: no part of the body is in every registered phase", self.job.id)
            return
        yield from objects.uptake_objects(
            fixed,
            [source for role, source in sources.items() if role != "fixed"],
            found,
            provenance=self.provenance(folder.result(accepted[0])),
            warning=warning,
            store_in=self.rule.store_in,
            description=self.rule.series.description,
        )

    def provenance(self, result: Result) -> Provenance:
        """How one pair's objects came about, as they tell it."""
        report = result.registration.report
        return Provenance(
            rule_id=self.job.rule_id,
            rule_version=self.job.rule_version,
            preset=report.preset,
            software_version=version("dicomnode"),
            device_class=report.device.split(":")[0],
            created_at=result.registered_at,
            model_sha256=report.model_sha256,
            seconds=report.seconds,
            parameters={"seed": report.seed, **self.rule.registration.parameters},
        )
