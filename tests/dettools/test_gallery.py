"""Objects and detections drawn on photographs: turned as they were annotated, one colour a role."""

import numpy as np
import pytest
from dettools.reports.gallery import COLOURS, Mark, PictureError, draw_marks, error_marks, open_photograph, side_by_side
from PIL import Image

NAMES = {1: "cat"}
ANNOTATION = {"category_id": 1, "bbox": [10, 10, 30, 20], "iscrowd": 0}


@pytest.fixture
def turned_photograph(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20)).save(tmp_path / "turned.jpg", exif=exif)
    return tmp_path / "turned.jpg"


@pytest.mark.parametrize(("annotated", "shown"), [(None, (20, 40)), ((20, 40), (20, 40)), ((40, 20), (40, 20))])
def test_a_photograph_is_turned_as_its_annotations_lie(turned_photograph, annotated, shown):
    assert open_photograph(turned_photograph, annotated).size == shown


def test_what_is_no_photograph_is_named(tmp_path):
    (tmp_path / "a.jpg").write_text("no picture")
    with pytest.raises(PictureError, match=r"a\.jpg: cannot be read as an image"):
        open_photograph(tmp_path / "a.jpg")


def test_a_mask_is_laid_over_its_place_and_nowhere_else():
    image = Image.new("RGB", (600, 400), (200, 200, 200))
    polygon = [[300.0, 200.0, 400.0, 200.0, 400.0, 300.0, 300.0, 300.0]]
    bitmap = np.zeros((400, 600), np.uint8)
    bitmap[200:300, 300:400] = 1
    counts = np.diff(np.flatnonzero(np.diff(bitmap.ravel(order="F"), prepend=2, append=2)))
    rle = {"size": [400, 600], "counts": counts.tolist()}
    for segmentation in (polygon, rle):
        drawn = draw_marks(image, [Mark((300, 200, 100, 100), "", "tp", segmentation)])
        assert drawn.getpixel((350, 250)) != (200, 200, 200)
        assert drawn.getpixel((100, 100)) == (200, 200, 200)


def test_the_colours_say_who_was_found():
    missed, found = error_marks([ANNOTATION], [{**ANNOTATION, "score": 0.5}], NAMES, found=[False], roles=["fp"])
    sheet = side_by_side(Image.new("RGB", (600, 400)), [("objects", missed), ("detections", found)], "caption")
    left, right = sheet.crop((0, 0, sheet.width // 2, sheet.height)), sheet.crop((sheet.width // 2, 0, *sheet.size))
    colours = [{colour for _, colour in half.getcolors(1 << 24)} for half in (left, right)]
    assert COLOURS["fn"] in colours[0]
    assert COLOURS["fp"] not in colours[0]
    assert COLOURS["fp"] in colours[1]
