"""Codes for what the DICOM Controlled Terminology has none for: our private coding scheme."""

from __future__ import annotations

from pydicom import Dataset
from pydicom.sr.coding import Code

from dicomnode.objects.common import code

PRIVATE_SCHEME = "99DICOMNODE"


def private_code(value: str, meaning: str) -> Dataset:
    """A code of our own, for what the DICOM Controlled Terminology has none for."""
    return code(value, meaning, PRIVATE_SCHEME)


def concept(value: str, meaning: str) -> Code:
    """The same as a report's content takes it."""
    return Code(value, PRIVATE_SCHEME, meaning)


def explain_codes(dataset: Dataset) -> None:
    """Say whose our private coding scheme is, PS3.3 C.12.1.1.13."""
    item = Dataset()
    item.CodingSchemeDesignator = PRIVATE_SCHEME
    item.CodingSchemeName = "dicomnode"
    item.CodingSchemeResponsibleOrganization = "dicomnode"
    dataset.CodingSchemeIdentificationSequence = [item]
