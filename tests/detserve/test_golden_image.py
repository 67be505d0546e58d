"""Which image a golden check looks at, and at which threshold."""

import numpy as np
import pytest
from dethandlers.detections import Category, Detections
from dethandlers.spec import Serving, Spec
from detserve.errors import DetserveError, SpecError
from detserve.golden_image import golden_detections, golden_image_of

SPEC = Spec("a", "yolox", (Category(1, "one", 0),))


class Eager:
    """Finds boxes of given scores, as an eager model would."""

    categories = SPEC.categories
    source = "test"

    def __init__(self, *scores):
        self._found = Detections(
            np.array([[0, 0, 10 + place, 10] for place in range(len(scores))], dtype=np.float32).reshape(-1, 4),
            np.array(scores, dtype=np.float32),
            np.zeros(len(scores), dtype=np.int64),
        )

    def detect(self, image, score_threshold, max_detections, *, masks=False, keypoints=False):
        if image == b"no image":
            raise DetserveError("got 8 bytes that are no image.")
        return self._found.filtered(score_threshold, max_detections)


@pytest.mark.parametrize(
    ("scores", "threshold", "found"),
    [
        ((0.9, 0.3, 0.01), 0.25, 2),  # the model's own, where there is something to see
        ((0.03, 0.01), 0.02, 1),  # lower, where there is not
        ((0.012, 0.011), 0.005, 2),
        ((0.0065,), 0.001, 1),
        ((0.253,), 0.02, 1),  # so near to the threshold that a worker may not find it
        ((0.0001,), 0.25, 0),  # nothing to see at all
        ((), 0.25, 0),
    ],
)
def test_the_threshold_is_lowered_until_there_is_something_to_check(scores, threshold, found):
    name, golden = golden_detections(Eager(*scores), ("a.jpg", b"pixels"), Serving(score_threshold=0.25))
    assert (name, golden.score_threshold, len(golden.detections)) == ("a.jpg", threshold, found)


def test_a_floor_above_the_default_is_where_it_begins():
    _, golden = golden_detections(
        Eager(0.9, 0.3), ("a.jpg", b"pixels"), Serving(score_threshold=0.6, min_score_threshold=0.5)
    )
    assert (golden.score_threshold, len(golden.detections)) == (0.6, 1)


def test_what_is_no_image_asks_for_another():
    with pytest.raises(SpecError, match=r"golden_image: got 8 bytes.*Give another one with --golden-image"):
        golden_detections(Eager(), ("a.jpg", b"no image"), Serving())


def test_the_image_is_the_one_given_or_the_spec_s_or_a_generated_scene(tmp_path):
    (tmp_path / "mine.PNG").write_bytes(b"mine")
    assert golden_image_of(SPEC, tmp_path, tmp_path / "mine.PNG") == ("golden.png", b"mine")
    name, content = golden_image_of(SPEC, tmp_path, None)
    assert (name, content[:2]) == ("golden.jpg", b"\xff\xd8")
    with pytest.raises(SpecError, match="golden_image: cannot read"):
        golden_image_of(SPEC, tmp_path, tmp_path / "missing.jpg")
