"""Everything an administrator asks for, in one consistent read."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from dicomnode.index.database import Database
from dicomnode.index.tables import delivery, instance, job, pair, prior_fetch, product, series, study


class Status(Database):
    """The whole state, to read."""

    def status(self) -> dict[str, list[dict[str, Any]]]:
        """Everything an administrator asks for: studies, series, jobs, deliveries, with reasons."""
        fixed, moving = series.alias(), series.alias()
        count = sa.func.count(instance.c.id).label("instances")
        queries = {
            "studies": sa.select(study.c.study_instance_uid, sa.func.count(series.c.id).label("series"))
            .join(series, series.c.study_id == study.c.id)
            .group_by(study.c.id)
            .order_by(study.c.id),
            "series": sa.select(
                series.c.series_instance_uid, study.c.study_instance_uid, series.c.modality, series.c.state,
                series.c.reason, series.c.note, count,
            )
            .join(study, series.c.study_id == study.c.id)
            .outerjoin(instance, instance.c.series_id == series.c.id)
            .group_by(series.c.id, study.c.study_instance_uid)
            .order_by(series.c.id),
            "priors": sa.select(
                prior_fetch.c.study_instance_uid, prior_fetch.c.rule_id, prior_fetch.c.source, prior_fetch.c.state,
                prior_fetch.c.attempts, prior_fetch.c.reason,
            ).order_by(prior_fetch.c.id),
            "jobs": sa.select(
                job.c.id, pair.c.rule_id, pair.c.rule_version, fixed.c.series_instance_uid.label("fixed"),
                moving.c.series_instance_uid.label("moving"), pair.c.fixed_volume_number.label("fixed_volume"),
                pair.c.moving_volume_number.label("moving_volume"), job.c.state, job.c.stage, job.c.progress,
                job.c.attempts, job.c.verdict, job.c.reason, job.c.report,
            )
            .join(pair, job.c.pair_id == pair.c.id)
            .join(fixed, pair.c.fixed_series_id == fixed.c.id)
            .join(moving, pair.c.moving_series_id == moving.c.id)
            .order_by(job.c.created_at, job.c.id),
            "deliveries": sa.select(
                product.c.sop_instance_uid, product.c.kind, delivery.c.destination, delivery.c.state,
                delivery.c.status, delivery.c.attempts, delivery.c.reason,
            )
            .join(product, delivery.c.product_id == product.c.id)
            .order_by(delivery.c.id),
        }  # fmt: skip
        with self._reading() as connection:
            return {
                name: [dict(row) for row in connection.execute(query).mappings()] for name, query in queries.items()
            }
