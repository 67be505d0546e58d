"""One photograph under every corruption of a run, and what is found on it: the samples of a contact sheet."""

from dataclasses import dataclass

from dethandlers.detections import Detections
from detserve.errors import ClientError

from dettools.analysis.corruptions import CorruptionError, corrupted, severities_of
from dettools.analysis.corruptions_transport import level_name
from dettools.analysis.robustness import Plan
from dettools.analysis.robustness_subject import Subject
from dettools.evaluation.answers import Failure
from dettools.evaluation.request import DataSet
from dettools.ground_truth import ImageEntry

_MOST_DRAWN = 100
_FEW_OBJECTS = range(2, 8)


@dataclass(frozen=True)
class Sample:
    """One photograph as it was sent, and what came back.

    Attributes:
        title: of the corruption.
        body: the encoded image.
        detections: above the threshold; None where none came back,
        failure: … and why.
    """

    title: str
    body: bytes
    detections: Detections | None
    failure: str = ""


def sheet_samples(
    subject: Subject, data: DataSet, plan: Plan, *, threshold: float, severity: int
) -> tuple[ImageEntry, list[Sample]]:
    """Ask for one photograph of the data set under each corruption, after it without any.

    Args:
        threshold: lowest score that is kept.
        severity: of the corruptions; those without that level have the nearest below, if the run has one.
    """
    entry = _telling_image(data)
    body = data.files[entry.id].read_bytes()
    samples = [_asked(subject, "no corruption", body, threshold)]
    for corruption in plan.corruptions:
        levels = [one for one in severities_of(corruption) if one in plan.severities]
        if not levels:
            continue
        chosen = max((one for one in levels if one <= severity), default=levels[0])
        name = corruption.replace("_", " ")
        title = (
            f"{name} {chosen}" if not level_name(corruption, chosen) else f"{name}: {level_name(corruption, chosen)}"
        )
        try:
            spoiled = corrupted(body, corruption, chosen, image_id=entry.id, seed=plan.seed)
        except CorruptionError:
            continue  # too small: the cells count it as not corrupted
        samples.append(_asked(subject, title, spoiled, threshold))
    return entry, samples


def _asked(subject: Subject, title: str, body: bytes, threshold: float) -> Sample:
    try:
        (reply,) = subject.answerer.ask([body])
    except ClientError as error:
        return Sample(title, body, None, error.type)
    if isinstance(reply, Failure):
        return Sample(title, body, None, reply.type)
    return Sample(title, body, reply.filtered(threshold, _MOST_DRAWN))


def _telling_image(data: DataSet) -> ImageEntry:
    """Return the image whose few objects cover most of it: what is lost can be seen on a small picture."""
    areas: dict[int, list[float]] = {}
    for one in data.truth.annotations:
        areas.setdefault(one["image_id"], []).append(float(one["area"]))

    def telling(entry: ImageEntry) -> tuple[bool, float]:
        own = areas.get(entry.id, [])
        return len(own) in _FEW_OBJECTS, sum(own) / max(1, entry.width * entry.height)

    return max((entry for entry in data.entries if entry.id in data.files), key=telling)
