"""Volumes as pairing knows them, for tests: what is not said is ordinary."""

from __future__ import annotations

from datetime import UTC, datetime

from dicomnode.model import HeaderValue, VolumeRef

NOW = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC)


def volume(
    uid: str,
    *,
    patient_id: str = "P1",
    issuer: str = "",
    birth_date: str = "19700101",
    sex: str = "F",
    study: str = "study-1",
    frame: str = "frame-1",
    shape: tuple[int, int, int] = (60, 256, 256),
    spacing_mm: tuple[float, float, float] = (2.5, 0.8, 0.8),
    first_slice_mm: float = 0.0,
    affine: tuple[float, ...] | None = None,
    last_received_at: datetime = datetime(2026, 3, 1, 11, 0, 0, tzinfo=UTC),
    volume_number: int = 0,
    volumes_in_series: int = 1,
    **header: HeaderValue,
) -> VolumeRef:
    """An axial volume from `first_slice_mm` upwards; keywords in capitals go into its header."""
    k, j, i = spacing_mm
    axial = (0.0, 0.0, i, -100.0, 0.0, j, 0.0, -100.0, k, 0.0, 0.0, first_slice_mm, 0.0, 0.0, 0.0, 1.0)
    return VolumeRef(
        patient_id=patient_id,
        issuer_of_patient_id=issuer,
        patient_birth_date=birth_date,
        patient_sex=sex,
        study_instance_uid=study,
        series_instance_uid=uid,
        frame_of_reference_uid=frame,
        modality=str(header.pop("Modality", "CT")),
        shape=shape,
        affine=affine or axial,
        last_received_at=last_received_at,
        volume_number=volume_number,
        volumes_in_series=volumes_in_series,
        header={"StudyDate": "20260301", **header},
    )
