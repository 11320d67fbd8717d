"""The figures of a registration as an Enhanced SR with template TID 1500, PS3.3 A.35.2 and PS3.16.

One measurement group (TID 1501): tracking, the images measured, the algorithm with its parameters, every figure that
could be measured, the verdict as a code and its reason in words.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from highdicom import sr
from pydicom import Dataset
from pydicom.sr.coding import Code
from pydicom.uid import EnhancedSRStorage

from dicomnode.objects.codes import concept, explain_codes
from dicomnode.objects.common import Subject, _uid, own_object, pair_description
from dicomnode.objects.texts import ascii_text
from dicomnode.quality import Figures
from dicomnode.volumes import SOFTWARE_NAME

Group = sr.MeasurementsAndQualitativeEvaluations | sr.VolumetricROIMeasurementsAndQualitativeEvaluations


@dataclass(frozen=True)
class Figure:
    """How one of `Figures` is told: our code, its meaning, its unit (UCUM)."""

    code: str
    meaning: str
    unit: str = "1"


FIGURES = {
    "similarity_before": Figure("NMI_BEFORE", "Normalized mutual information before registration"),
    "similarity_after": Figure("NMI_AFTER", "Normalized mutual information after registration"),
    "patch_nmi_before": Figure("PMM_BEFORE", "Mean patch-wise NMI before registration"),
    "patch_nmi_after": Figure("PMM_AFTER", "Mean patch-wise NMI after registration"),
    "patch_nmi_fell_fraction": Figure("PMM_FELL", "Share of the body where patch-wise NMI fell"),
    "overlap_fraction": Figure("OVERLAP", "Share of the body that the registered image reaches"),
    "folding_fraction": Figure("FOLDING", "Share of the field that folds"),
    "jacobian_min": Figure("JACOBIAN_MIN", "Jacobian determinant, minimum"),
    "jacobian_p01": Figure("JACOBIAN_P01", "Jacobian determinant, 1st percentile"),
    "jacobian_median": Figure("JACOBIAN_MEDIAN", "Jacobian determinant, median"),
    "jacobian_p99": Figure("JACOBIAN_P99", "Jacobian determinant, 99th percentile"),
    "jacobian_max": Figure("JACOBIAN_MAX", "Jacobian determinant, maximum"),
    "sdlogj": Figure("SDLOGJ", "Standard deviation of the logarithm of the Jacobian determinant"),
    "displacement_mean_mm": Figure("DISP_MEAN", "Total displacement, mean", "mm"),
    "displacement_p95_mm": Figure("DISP_P95", "Total displacement, 95th percentile", "mm"),
    "displacement_max_mm": Figure("DISP_MAX", "Total displacement, maximum", "mm"),
    "nonlinear_mean_mm": Figure("NONLIN_MEAN", "Displacement beyond the linear stage, mean", "mm"),
    "nonlinear_p95_mm": Figure("NONLIN_P95", "Displacement beyond the linear stage, 95th percentile", "mm"),
    "nonlinear_max_mm": Figure("NONLIN_MAX", "Displacement beyond the linear stage, maximum", "mm"),
    "rotation_deg": Figure("ROTATION", "Rotation of the rigid stage", "deg"),
    "translation_mm": Figure("TRANSLATION", "Translation of the body's center by the rigid stage", "mm"),
    "inverse_consistency_mean_mm": Figure("INVCON_MEAN", "Inverse consistency error, mean", "mm"),
    "inverse_consistency_p95_mm": Figure("INVCON_P95", "Inverse consistency error, 95th percentile", "mm"),
    "inverse_consistency_max_mm": Figure("INVCON_MAX", "Inverse consistency error, maximum", "mm"),
    "grid_error_mm": Figure("GRID_ERROR", "Largest error of the delivered field's grid", "mm"),
}
"""Every figure, in the order it is written in."""
VERDICTS = {"ACCEPT": "Accepted", "WARN": "Accepted with a mark", "REJECT": "Rejected"}
_UNITS = {"1": "no units", "mm": "millimeter", "deg": "degree"}


def measurement_report(subject: Subject, figures: Figures) -> Dataset:
    """Write the figures and the verdict; a figure that could not be measured is left out."""
    description = f"QC {pair_description(subject)}"
    dataset = report_object(subject, "sr", number=4100, description=description)
    write_groups(dataset, subject, [_group(subject, figures)])
    return dataset


def report_object(subject: Subject, kind: str, *, number: int, description: str) -> Dataset:
    """An Enhanced SR that says nothing yet; `refer` and `write_groups` make it whole."""
    dataset = own_object(subject, EnhancedSRStorage, kind, modality="SR", number=number, description=description[:64])
    for keyword in ("BodyPartExamined", "Laterality"):  # of images
        dataset.pop(keyword, None)
    explain_codes(dataset)
    dataset.ReferencedPerformedProcedureStepSequence = []
    dataset.PerformedProcedureCodeSequence = []
    dataset.CompletionFlag = "COMPLETE"
    dataset.VerificationFlag = "UNVERIFIED"
    return dataset


def write_groups(dataset: Dataset, subject: Subject, groups: Sequence[Group]) -> None:
    """The content, TID 1500, of measurement groups; what was referred to becomes its evidence."""
    _turn_references_into_evidence(dataset)
    (content,) = sr.MeasurementReport(
        observation_context=_observed_by(subject),
        procedure_reported=Code("110002", "DCM", "Quality Control"),
        imaging_measurements=groups,
        language_of_content_item_and_descendants=sr.LanguageOfContentItemAndDescendants(
            sr.CodedConcept("en-US", "RFC5646", "English (United States)")
        ),
    )
    dataset.update(content)


def _group(subject: Subject, figures: Figures) -> sr.MeasurementsAndQualitativeEvaluations:
    measured = {name: value for name, value in vars(figures).items() if math.isfinite(value)}
    group = sr.MeasurementsAndQualitativeEvaluations(
        tracking_identifier=sr.TrackingIdentifier(
            uid=subject.uid("sr tracking"),
            identifier=f"Registration of series {_number(subject.moving.first)} to {_number(subject.fixed.first)}",
        ),
        finding_type=concept("REG_QUALITY", "Quality of a registration"),
        method=Code("125024", "DCM", "Image Content-based Alignment"),
        algorithm_id=algorithm(subject),
        measurements=[
            sr.Measurement(
                name=concept(each.code, each.meaning),
                value=measured[name],
                unit=Code(each.unit, "UCUM", _UNITS[each.unit]),
            )
            for name, each in FIGURES.items()
            if name in measured
        ],
        qualitative_evaluations=[
            sr.QualitativeEvaluation(concept("VERDICT", "Verdict"), concept(subject.verdict, VERDICTS[subject.verdict]))
        ],
        source_images=[
            sr.SourceImageForMeasurementGroup(
                item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID, item.get("ReferencedFrameNumber")
            )
            for series in (subject.fixed, subject.moving)
            for item in series.references()
        ],
    )
    if subject.reason:
        group[0].ContentSequence.append(
            sr.TextContentItem(
                Code("121106", "DCM", "Comment"),
                ascii_text(subject.reason),
                relationship_type=sr.RelationshipTypeValues.CONTAINS,
            )
        )
    return group


def algorithm(subject: Subject) -> sr.AlgorithmIdentification:
    """TID 4019: this software, and how the registration was made."""
    made_by = subject.provenance
    parameters = {
        "rule": made_by.rule_id,
        "rule version": made_by.rule_version,
        "preset": made_by.preset,
        "device": made_by.device_class,
        "model sha256": made_by.model_sha256 or "none",
        **made_by.parameters,
    }
    return sr.AlgorithmIdentification(
        name=SOFTWARE_NAME,
        version=made_by.software_version,
        parameters=[
            ascii_text(f"{name}: {value if isinstance(value, str) else json.dumps(value)}")
            for name, value in parameters.items()
        ],
    )


def _observed_by(subject: Subject) -> sr.ObservationContext:
    version = subject.provenance.software_version
    return sr.ObservationContext(
        observer_device_context=sr.ObserverContext(
            observer_type=sr.CodedConcept("121007", "DCM", "Device"),
            observer_identifying_attributes=sr.DeviceObserverIdentifyingAttributes(
                uid=_uid(["device", SOFTWARE_NAME, version]),
                name=SOFTWARE_NAME,
                manufacturer_name=SOFTWARE_NAME,
                model_name=SOFTWARE_NAME,
                serial_number=version,
            ),
        )
    )


def _turn_references_into_evidence(dataset: Dataset) -> None:
    """PS3.3 C.17.2: reports list by study, as evidence, what images list as references."""
    here = Dataset()
    here.StudyInstanceUID = dataset.StudyInstanceUID
    here.ReferencedSeriesSequence = _taken(dataset, "ReferencedSeriesSequence")
    others = _taken(dataset, "StudiesContainingOtherReferencedInstancesSequence")
    for study in (here, *others):
        for series in study.ReferencedSeriesSequence:
            series.ReferencedSOPSequence = _taken(series, "ReferencedInstanceSequence")
    if here.ReferencedSeriesSequence:
        dataset.CurrentRequestedProcedureEvidenceSequence = [here]
    if others:
        dataset.PertinentOtherEvidenceSequence = others


def _taken(dataset: Dataset, keyword: str) -> list[Dataset]:
    """The items of a sequence that is no longer wanted where it was."""
    items = list(dataset.get(keyword) or [])
    if keyword in dataset:
        del dataset[keyword]
    return items


def _number(dataset: Dataset) -> str:
    return str(dataset.get("SeriesNumber") or "without number")
