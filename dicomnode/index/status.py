"""Everything an administrator asks for, in one consistent read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa

from dicomnode.index.database import Database
from dicomnode.index.tables import (
    association,
    commitment,
    commitment_request,
    delivery,
    destination_hold,
    instance,
    job,
    journal,
    pair,
    prior_fetch,
    product,
    quarantine,
    series,
    study,
)


class Status(Database):
    """The whole state, to read."""

    def status(self) -> dict[str, list[dict[str, Any]]]:
        """Everything an administrator asks for: studies, series, jobs, deliveries, with reasons."""
        is_open = association.c.closed_at.is_(None)
        outcome = sa.case((is_open, sa.literal_column("'open'")), else_=association.c.outcome).label("outcome")
        queries = {
            "studies": sa.select(study.c.study_instance_uid, sa.func.count(series.c.id).label("series"))
            .join(series, series.c.study_id == study.c.id)
            .group_by(study.c.id)
            .order_by(study.c.id),
            "series": _series(),
            "priors": _priors(),
            "jobs": _jobs(),
            "quarantine": sa.select(
                quarantine.c.sop_instance_uid, quarantine.c.reason, quarantine.c.path, quarantine.c.received_at,
                association.c.calling_ae_title, association.c.address,
            )
            .join(association, quarantine.c.association_id == association.c.id)
            .order_by(quarantine.c.id),
            "journal": sa.select(
                sa.func.count(journal.c.id).label("not_yet_indexed"),
                sa.func.min(journal.c.received_at).label("oldest"),
            ),
            "associations": sa.select(
                association.c.calling_ae_title, association.c.address,
                outcome,
                sa.func.count(association.c.id).label("associations"),
                sa.func.sum(association.c.stored).label("stored"),
                sa.func.sum(association.c.refused).label("refused"),
                sa.func.max(association.c.opened_at).label("last"),
            )
            .group_by(association.c.calling_ae_title, association.c.address, outcome)
            .order_by(sa.func.max(association.c.id)),
            "commitments": sa.select(
                commitment.c.transaction_uid, commitment.c.calling_ae_title, commitment.c.state,
                commitment.c.attempts, commitment.c.reason,
            ).order_by(commitment.c.id),
            "deliveries": sa.select(
                product.c.sop_instance_uid, product.c.kind, delivery.c.destination, delivery.c.state,
                delivery.c.status, delivery.c.attempts, delivery.c.reason, delivery.c.committed_at,
            )
            .join(product, delivery.c.product_id == product.c.id)
            .order_by(delivery.c.id),
            "commitment_requests": sa.select(commitment_request).order_by(commitment_request.c.created_at),
            "held_destinations": sa.select(destination_hold).order_by(destination_hold.c.destination),
        }  # fmt: skip
        return self._rows(queries)

    def about(self, uid: str) -> dict[str, list[dict[str, Any]]]:
        """The rows of `status` that concern one series, or the series of one study: `series`, `jobs` and `priors`."""
        of_it = sa.select(series.c.id).join(study, series.c.study_id == study.c.id)
        of_it = of_it.where(sa.or_(series.c.series_instance_uid == uid, study.c.study_instance_uid == uid))
        in_a_pair = sa.or_(pair.c.fixed_series_id.in_(of_it), pair.c.moving_series_id.in_(of_it))
        jobs = _jobs().where(job.c.id.in_(sa.select(pair.c.job_id).where(in_a_pair)))
        studies = sa.select(study.c.study_instance_uid).join(series, series.c.study_id == study.c.id)
        priors = _priors().where(prior_fetch.c.study_instance_uid.in_(studies.where(series.c.id.in_(of_it))))
        return self._rows({"series": _series().where(series.c.id.in_(of_it)), "jobs": jobs, "priors": priors})

    def _rows(self, queries: Mapping[str, sa.Select[Any]]) -> dict[str, list[dict[str, Any]]]:
        with self._reading() as connection:
            return {
                name: [dict(row) for row in connection.execute(query).mappings()] for name, query in queries.items()
            }


def _series() -> sa.Select[Any]:
    columns = (
        series.c.series_instance_uid, study.c.study_instance_uid, series.c.modality, series.c.state, series.c.reason,
        series.c.note, sa.func.count(instance.c.id).label("instances"),
    )  # fmt: skip
    query = sa.select(*columns).join(study, series.c.study_id == study.c.id)
    query = query.outerjoin(instance, instance.c.series_id == series.c.id)
    return query.group_by(series.c.id, study.c.study_instance_uid).order_by(series.c.id)


def _priors() -> sa.Select[Any]:
    return sa.select(
        prior_fetch.c.study_instance_uid, prior_fetch.c.rule_id, prior_fetch.c.source, prior_fetch.c.state,
        prior_fetch.c.attempts, prior_fetch.c.reason,
    ).order_by(prior_fetch.c.id)  # fmt: skip


def _jobs() -> sa.Select[Any]:
    fixed, moving = series.alias(), series.alias()
    columns = (
        job.c.id, pair.c.rule_id, pair.c.rule_version, fixed.c.series_instance_uid.label("fixed"),
        moving.c.series_instance_uid.label("moving"), pair.c.fixed_volume_number.label("fixed_volume"),
        pair.c.moving_volume_number.label("moving_volume"), job.c.state, job.c.stage, job.c.activity, job.c.progress,
        job.c.attempts, job.c.verdict, job.c.reason, job.c.report,
    )  # fmt: skip
    query = sa.select(*columns).join(pair, job.c.pair_id == pair.c.id)
    query = query.join(fixed, pair.c.fixed_series_id == fixed.c.id)
    query = query.join(moving, pair.c.moving_series_id == moving.c.id)
    return query.order_by(job.c.created_at, job.c.id)
