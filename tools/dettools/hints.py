"""What the pattern of the differences over all images says about their cause.

Each rule reads the failing images and either recognises its own pattern or says nothing. Broad drift is named only when
nothing more exact fits. A hint is a lead for people, not a verdict.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dettools.agreement import TIER_NAMES, rank

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dettools.comparison import ImageComparison

_BROAD = 0.8
"""Share of the images that a fault of the whole pipeline reaches."""
_FEW = 2
"""A pattern needs at least this many detections."""


@dataclass(frozen=True)
class Hint:
    """A likely cause.

    Attributes:
        code: machine word.
        message: what was seen and what probably causes it.
        images: number of images that show it.
    """

    code: str
    message: str
    images: int


def derive_hints(images: Sequence[ImageComparison], *, score_threshold: float) -> tuple[Hint, ...]:
    """Return the likely causes of the failures, the surest first.

    Args:
        images: all images of the comparison, swapped replies already marked.
        score_threshold: asked of both sides.
    """
    found = [_swapped(images), _failed(images)]
    compared = [
        image
        for image in images
        if image.swapped_with is None and image.eager is not None and image.served is not None
        if len(image.eager) or len(image.served)
    ]
    failing = [image for image in compared if not image.passed]
    if failing:
        specific: list[Hint | None] = [
            _below_threshold(failing, score_threshold) or _other_threshold(compared, failing, "extra"),
            _nothing_served(failing) or _other_threshold(compared, failing, "missing"),
            _fewer_allowed(compared, failing),
            _category_map(failing),
        ]
        found += specific
        if not any(specific):
            found.append(_broad_drift(compared, failing))
    return tuple(hint for hint in found if hint is not None)


def _swapped(images: Sequence[ImageComparison]) -> Hint | None:
    swapped = [image for image in images if image.swapped_with is not None]
    if not swapped:
        return None
    examples = ", ".join(f"{image.image} got the detections of {image.swapped_with}" for image in swapped[:3])
    return Hint("swapped_replies", f"replies are swapped within a batch or between requests: {examples}", len(swapped))


def _failed(images: Sequence[ImageComparison]) -> Hint | None:
    messages = Counter(
        finding.detail for image in images for finding in image.findings if finding.reason == "request_failed"
    )
    if not messages:
        return None
    message, _ = messages.most_common(1)[0]
    total = messages.total()
    return Hint("request_failed", f"{total} of {len(images)} requests failed, most often with: {message}", total)


def _below_threshold(failing: Sequence[ImageComparison], score_threshold: float) -> Hint | None:
    below = [(image.served.scores < score_threshold).sum() for image in failing if image.served is not None]
    count = sum(int(number) for number in below)
    if count < _FEW:
        return None
    return Hint(
        "served_threshold_ignored",
        f"the endpoint answered {count} detections with scores below the threshold {score_threshold:g} that it was "
        "asked for: it does not apply the option score_threshold",
        sum(bool(number) for number in below),
    )


def _nothing_served(failing: Sequence[ImageComparison]) -> Hint | None:
    if any(image.served is None or len(image.served) for image in failing):
        return None
    return Hint(
        "served_finds_nothing",
        "the endpoint finds nothing on any image that differs: preprocessing (normalisation, scale), weights or the "
        "served threshold",
        len(failing),
    )


def _fewer_allowed(compared: Sequence[ImageComparison], failing: Sequence[ImageComparison]) -> Hint | None:
    """Recognise a lower max_detections: the same number served on several images, the best of what eager finds."""
    sizes = {len(image.served) for image in failing if image.served is not None}
    if len(failing) < _FEW or len(sizes) != 1 or 0 in sizes:
        return None
    if any(image.served is not None and len(image.served) > max(sizes) for image in compared):
        return None
    for image in failing:
        served = image.served
        if served is None or not _only(image, "missing") or not _scores(image, "missing").max() <= served.scores.min():
            return None
    return Hint(
        "served_max_detections_lower",
        f"the endpoint never answers more than {sizes.pop()} detections, always the best ones: its max_detections is "
        "lower than asked for",
        len(failing),
    )


def _other_threshold(
    compared: Sequence[ImageComparison], failing: Sequence[ImageComparison], reason: str
) -> Hint | None:
    """Recognise a higher threshold on the side that lacks something: a score parts what it has from what it lacks."""
    if not all(_only(image, reason) for image in failing):
        return None
    lacking = "served" if reason == "missing" else "eager"
    lacked = np.concatenate([_scores(image, reason) for image in failing])
    sides = [image.served if reason == "missing" else image.eager for image in compared]
    kept = np.concatenate([side.scores for side in sides if side is not None])
    # With nothing kept at all, the threshold may be anything above: that is not this pattern.
    if len(lacked) < _FEW or not len(kept) or not lacked.max() < kept.min():
        return None
    about = _round_between(float(lacked.max()), float(kept.min()))
    return Hint(
        f"{lacking}_threshold_higher",
        f"{lacking} threshold is higher, about {about:g}: everything {reason} scores at most {lacked.max():.3f}, "
        f"everything {lacking} at least {kept.min():.3f}",
        len(failing),
    )


def _category_map(failing: Sequence[ImageComparison]) -> Hint | None:
    """Recognise a wrong category map: most pairs changed their class, and each class always into the same one."""
    changes: Counter[tuple[int, int]] = Counter()
    pairs = 0
    touched = 0
    for image in failing:
        if image.eager is None or image.served is None:
            continue
        flips = [pair for pair in image.pairs if not pair.same_label]
        changes.update((int(image.eager.labels[p.eager]), int(image.served.labels[p.served])) for p in flips)
        pairs += len(image.pairs)
        touched += bool(flips)
    flipped = changes.total()
    if flipped < _FEW or flipped * 2 < pairs or len({before for before, _ in changes}) != len(changes):
        return None
    offsets = {after - before for before, after in changes}
    what = f"every label is shifted by {offsets.pop():+d}" if len(offsets) == 1 else "labels are permuted"
    return Hint(
        "category_map_differs",
        f"{what} ({flipped} of {pairs} matched boxes): the category map differs, or the background class is counted",
        touched,
    )


def _broad_drift(compared: Sequence[ImageComparison], failing: Sequence[ImageComparison]) -> Hint | None:
    drifting = [image for image in failing if any(reason.endswith("_drift") for reason in image.reasons)]
    if not drifting or len(failing) < _BROAD * len(compared):
        return None
    pairs = [pair for image in failing for pair in image.pairs]
    box = float(np.median([pair.box_delta_px for pair in pairs]))
    score = float(np.median([pair.score_delta for pair in pairs]))
    seen = (
        f"{len(failing)} of {len(compared)} images differ (median |Δbox| {box:.3g} px, |Δscore| {score:.3g} over the "
        f"{len(pairs)} matched boxes)"
    )
    if all(rank(image.tier) <= rank(TIER_NAMES[2]) for image in failing):
        return Hint(
            "precision_differs",
            f"{seen}: precision differs (fp16, TF32), or preprocessing slightly (resize filter, rounding)",
            len(failing),
        )
    return Hint(
        "preprocessing_differs",
        f"{seen}: preprocessing differs (channel order, resize filter, normalisation), or it runs in bf16",
        len(failing),
    )


def _only(image: ImageComparison, reason: str) -> bool:
    return {finding.reason for finding in image.findings if finding.fails} == {reason}


def _scores(image: ImageComparison, reason: str) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    side, positions = (
        (image.eager, image.unmatched_eager) if reason == "missing" else (image.served, image.unmatched_served)
    )
    return np.zeros(0, np.float32) if side is None else side.scores[list(positions)]


def _round_between(below: float, above: float) -> float:
    """Return the roundest number in ``(below, above]``: people set thresholds such as 0.5, 0.25 or 0.3."""
    for step in (0.5, 0.1, 0.05, 0.01, 0.001):
        candidates = [step * k for k in range(1, round(1 / step) + 1) if below < step * k <= above]
        if candidates:
            return round(candidates[len(candidates) // 2], 3)
    return (below + above) / 2
