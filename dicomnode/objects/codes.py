"""Codes for what the DICOM Controlled Terminology has none for: our private coding scheme."""

from __future__ import annotations

from pydicom import Dataset

from dicomnode.objects.common import code

PRIVATE_SCHEME = "99DICOMNODE"


def private_code(value: str, meaning: str) -> Dataset:
    """A code of our own, for what the DICOM Controlled Terminology has none for."""
    return code(value, meaning, PRIVATE_SCHEME)


def explain_codes(dataset: Dataset) -> None:
    """Say whose our private coding scheme is, PS3.3 C.12.1.1.13."""
    item = Dataset()
    item.CodingSchemeDesignator = PRIVATE_SCHEME
    item.CodingSchemeName = "dicomnode"
    item.CodingSchemeResponsibleOrganization = "dicomnode"
    dataset.CodingSchemeIdentificationSequence = [item]
