"""Every package that comes with an installation has a licence that an Apache-2.0 program may be shipped with."""

from __future__ import annotations

import re
from importlib.metadata import Distribution, PackageNotFoundError, distribution

PERMISSIVE = re.compile(
    r"\b(MIT|MIT-CMU|BSD|0BSD|BSD License|MIT License|Apache|PSF|Zlib|ISC|BSL-1\.0|CC0-1\.0|HPND)", re.IGNORECASE
)
COPYLEFT = re.compile(r"GPL|MPL|EUPL|CC-BY-(SA|NC)", re.IGNORECASE)

EXCEPTIONS = {
    # The durable queue's PostgreSQL driver: the Lesser GPL allows use as an unmodified, replaceable library.
    "psycopg": "LGPL-3.0-only",
}


def installed_with(name: str, found: dict[str, Distribution]) -> dict[str, Distribution]:
    """The package and all that it requires without extras, as far as this platform installs it."""
    key = re.sub(r"[-_.]+", "-", name).lower()
    if key not in found:
        try:
            found[key] = distribution(name)
        except PackageNotFoundError:
            return found
        for requirement in found[key].requires or []:
            if "extra ==" not in requirement:
                installed_with(re.split(r"[^A-Za-z0-9._-]", requirement)[0], found)
    return found


def licence_of(package: Distribution) -> str:
    metadata = package.metadata
    classifiers = [text.split("::")[-1] for text in metadata.get_all("Classifier") or [] if text.startswith("License")]
    return metadata.get("License-Expression") or ", ".join(classifiers) or (metadata.get("License") or "")[:80]


def test_every_dependency_has_a_permissive_licence() -> None:
    packages = installed_with("dicomnode", {})
    licences = {name: licence_of(package) for name, package in packages.items()}

    assert {"torch", "simpleitk", "pydicom", "pynetdicom", "highdicom", "sqlalchemy", "dbos"} <= licences.keys()
    doubtful = {
        name: text
        for name, text in licences.items()
        if (COPYLEFT.search(text) or not PERMISSIVE.search(text)) and EXCEPTIONS.get(name) != text
    }
    assert doubtful == {}
