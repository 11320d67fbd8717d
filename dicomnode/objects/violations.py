"""How an invariant is broken: by an object, in words; an AssertionError, since it is our own bug."""

from __future__ import annotations

from collections.abc import Iterator

from pydicom import Dataset


def require(holds: bool, dataset: Dataset, what: str) -> None:
    """Raise an AssertionError that names the object and what of it does not hold."""
    if not holds:
        raise AssertionError(f"{dataset.get('SOPInstanceUID', 'item')}: {what}")


def items(dataset: Dataset, keyword: str) -> Iterator[Dataset]:
    """The data set and every nested item that holds an element of this keyword."""
    if keyword in dataset:
        yield dataset
    for element in dataset:
        if element.VR == "SQ":
            for item in element.value:
                yield from items(item, keyword)
