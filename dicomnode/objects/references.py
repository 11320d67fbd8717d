"""How instances are referred to: the Common Instance Reference module, PS3.3 C.12.2, and references to frames."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence

from pydicom import Dataset

from dicomnode.volumes import frame_count, frame_number


def refer(target: Dataset, referred: Iterable[tuple[Dataset, Sequence[Dataset]]]) -> None:
    """Write the Common Instance Reference module, PS3.3 C.12.2: same study apart from other studies.

    Parameters
    ----------
    referred
        One instance of each series, and the references to that series' instances.
    """
    here: list[Dataset] = []
    elsewhere: dict[str, list[Dataset]] = {}
    for instance, references in referred:
        item = Dataset()
        item.ReferencedInstanceSequence = [_instance(each) for each in references]
        item.SeriesInstanceUID = instance.SeriesInstanceUID
        study = str(instance.StudyInstanceUID)
        (here if study == target.StudyInstanceUID else elsewhere.setdefault(study, [])).append(item)
    if here:
        target.ReferencedSeriesSequence = here
    if elsewhere:
        target.StudiesContainingOtherReferencedInstancesSequence = [_study(*each) for each in elsewhere.items()]


def by_series(datasets: Iterable[Dataset]) -> list[tuple[Dataset, list[Dataset]]]:
    """What `refer` takes: of each series one instance, and references to all that are here."""
    series: dict[str, list[Dataset]] = {}
    for dataset in datasets:
        series.setdefault(str(dataset.SeriesInstanceUID), []).append(dataset)
    return [(several[0], references(several)) for several in series.values()]


def reference(dataset: Dataset, *, purpose: Dataset | None = None) -> Dataset:
    """Referenced SOP Class UID and Referenced SOP Instance UID of an instance."""
    item = Dataset()
    item.ReferencedSOPClassUID = dataset.SOPClassUID
    item.ReferencedSOPInstanceUID = dataset.SOPInstanceUID
    if purpose is not None:
        item.PurposeOfReferenceCodeSequence = [purpose]
    return item


def references(datasets: Sequence[Dataset], *, purpose: Dataset | None = None) -> list[Dataset]:
    """A reference to each instance once; of a multi-frame one it names the frames, where not all are meant.

    PS3.3 Table 10-3: Referenced Frame Number is required only where the reference does not apply to all frames.
    """
    instances: dict[str, list[Dataset]] = {}
    for dataset in datasets:
        instances.setdefault(str(dataset.SOPInstanceUID), []).append(dataset)
    made = []
    for several in instances.values():
        item = reference(several[0], purpose=purpose)
        if len(several) < frame_count(several[0]):
            item.ReferencedFrameNumber = sorted(frame_number(dataset) for dataset in several)
        made.append(item)
    return made


def _instance(item: Dataset) -> Dataset:
    """The same reference to the instance as a whole, as the Common Instance Reference module has it."""
    whole = copy.deepcopy(item)
    if "ReferencedFrameNumber" in whole:
        del whole.ReferencedFrameNumber
    return whole


def _study(study_instance_uid: str, series: list[Dataset]) -> Dataset:
    item = Dataset()
    item.ReferencedSeriesSequence = series
    item.StudyInstanceUID = study_instance_uid
    return item
