"""The pictures: every size and mode is drawn, tags stay readable, what differs is red."""

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from dethandlers.detections import Detections
from dettools.comparison import compare_image, compare_images, failed_image
from dettools.reports.lettering import font_for, place_tag, wrapped
from dettools.reports.pictures import HIGHLIGHT, draw_detections, side_by_side, upright_rgb
from dettools.reports.tables import comparison_table, print_comparison, summary_line
from PIL import Image
from pycocotools import mask as coco_mask
from rich.console import Console

SHARED_PHOTOS = Path(__file__).parents[3] / "shared" / "data" / "photos"
NAMES = ("cat", "dog", "car")
GREY = (120, 120, 120)


def found(*rows):
    table = np.array(rows, np.float64).reshape(-1, 6)
    return Detections(table[:, :4].astype(np.float32), table[:, 4].astype(np.float32), table[:, 5].astype(np.int64))


TWO = found((10, 12, 30, 28, 0.86, 1), (2, 2, 20, 18, 0.5, 0))


def compare(eager, served):
    return compare_image("scene.jpg", eager, served, score_threshold=0.05, max_detections=100, names=NAMES)


def count(picture, colour):
    return int((np.asarray(picture) == colour).all(axis=2).sum())


class TestDrawing:
    @pytest.mark.parametrize("size", [(40, 30), (30, 40), (640, 427), (6000, 40)])
    def test_every_size_gets_boxes_and_leaves_the_image_alone(self, size):
        image = Image.new("RGB", size, GREY)
        picture = draw_detections(image, TWO, NAMES)
        assert max(picture.size) == max(*size, 480)
        assert count(picture, GREY) < picture.width * picture.height
        assert image.getcolors() == [(size[0] * size[1], GREY)]

    @pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "I", "F"])
    def test_every_mode_is_drawn(self, mode):
        assert draw_detections(Image.new(mode, (40, 30)), TWO, NAMES).mode == "RGB"

    def test_sixteen_bit_grey_is_scaled_not_cut_off(self):
        grey = Image.fromarray(np.full((4, 4), 0x8000, np.uint16))
        assert upright_rgb(grey).getpixel((0, 0)) == pytest.approx((128, 128, 128), abs=1)

    def test_exif_orientation_is_applied(self, tmp_path):
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.new("RGB", (600, 500)).save(tmp_path / "turned.jpg", exif=exif)
        with Image.open(tmp_path / "turned.jpg") as image:
            assert draw_detections(image, TWO, NAMES).size == (500, 600)

    def test_line_and_text_grow_with_the_picture(self):
        def tag_height(scale):
            boxes = TWO.boxes_xyxy * np.float32(scale)
            picture = draw_detections(
                Image.new("RGB", (100 * scale, 100 * scale)), replace(TWO, boxes_xyxy=boxes), NAMES
            )
            return np.asarray(picture).any(axis=2).any(axis=1).sum()

        assert tag_height(30) > 2.5 * tag_height(10)

    def test_a_mask_colours_its_pixels_only(self):
        bitmap = np.zeros((600, 600), np.uint8, order="F")
        bitmap[300:400, 300:400] = 1
        one = replace(found((290, 290, 410, 410, 0.9, 0)), masks=[coco_mask.encode(bitmap)])
        picture = draw_detections(Image.new("RGB", (600, 600), GREY), one, NAMES)
        assert picture.getpixel((350, 350)) != GREY
        assert picture.getpixel((297, 350)) == GREY

    def test_keypoints_are_dots_and_unlabelled_ones_are_not(self):
        points = np.zeros((1, 17, 3), np.float32)
        points[0, 5], points[0, 6] = (300, 300, 1), (340, 300, 1)
        one = replace(found((200, 200, 400, 400, 0.9, 0)), keypoints=points)
        picture = draw_detections(Image.new("RGB", (600, 600), GREY), one, NAMES)
        assert picture.getpixel((300, 300)) == (255, 255, 255)
        assert picture.getpixel((320, 300)) != GREY  # the limb between the shoulders
        assert picture.getpixel((0, 0)) == GREY

    def test_strange_boxes_are_drawn_or_left_out_but_never_raise(self):
        strange = found(
            (-50, -50, 1000, 1000, 0.9, 0), (30, 30, 10, 10, 0.8, 1), (5, 5, 5, 5, 0.7, 2), (np.nan, 0, 1, 1, 0.6, 99)
        )
        draw_detections(Image.new("RGB", (600, 600)), strange, NAMES, highlight={0: "extra", 1: "x", 2: "y", 3: "z"})

    def test_names_outside_ascii_are_not_boxes(self):
        assert font_for("Fußgänger", 20).getmask("ä").getbbox() is not None


class TestTags:
    def test_two_hundred_boxes_in_one_place_never_cover_a_tag(self):
        placed = []
        box = (300.0, 300.0, 340.0, 340.0)
        for _ in range(200):
            rect = place_tag((90, 20), box, (640, 640), placed, np.array([box]))
            if rect is None:
                break
            placed.append(rect)
        assert 15 < len(placed) < 200
        assert all(min(x1, y1) >= 0 and max(x2, y2) < 640 for x1, y1, x2, y2 in placed)
        for a, b in itertools.combinations(placed, 2):
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]

    @pytest.mark.parametrize("box", [(0, 0, 20, 20), (620, 0, 640, 20), (0, 620, 20, 640), (620, 620, 640, 640)])
    def test_in_the_corners_tags_stay_inside(self, box):
        x1, y1, x2, y2 = place_tag((90, 20), box, (640, 640), [], np.array([box], float))
        assert min(x1, y1) >= 0
        assert max(x2, y2) < 640

    def test_a_tag_does_not_hide_a_small_neighbour(self):
        box, neighbour = (100, 100, 200, 200), (100, 80, 130, 98)
        x1, y1, x2, y2 = place_tag((90, 20), box, (640, 640), [], np.array([box, neighbour], float))
        assert x2 <= 100 or x1 >= 130 or y2 <= 80 or y1 >= 98

    def test_long_text_is_broken_and_cut(self):
        lines = wrapped("short words and /a/path/" + "x" * 300, 20, 200, lines=3)
        assert len(lines) == 3
        assert all(font_for(line, 20).getlength(line) <= 215 for line in lines)
        assert lines[-1].endswith("...")


class TestSideBySide:
    image = Image.new("RGB", (640, 480), GREY)
    scene = found((100, 100, 300, 300, 0.9, 0), (350, 200, 500, 400, 0.7, 1))

    def picture(self, eager, served, comparison):
        return side_by_side(self.image, eager, served, comparison, ("eager", "served"), names=NAMES)

    def test_agreement_shows_no_red(self):
        sheet = self.picture(self.scene, self.scene, compare(self.scene, self.scene))
        assert count(sheet, HIGHLIGHT) == 0

    def test_what_is_missing_is_red_on_the_eager_side_only(self):
        served = self.scene.take(np.array([0]))
        sheet = self.picture(self.scene, served, compare(self.scene, served))
        panels = sheet.crop((0, 0, sheet.width, 720))
        half = sheet.width // 2
        assert count(panels.crop((0, 0, half, 720)), HIGHLIGHT) > 500
        assert count(panels.crop((half, 0, sheet.width, 720)), HIGHLIGHT) == 0

    def test_a_drift_is_red_on_both_sides(self):
        served = replace(self.scene, boxes_xyxy=self.scene.boxes_xyxy + np.float32(9))
        sheet = self.picture(self.scene, served, compare(self.scene, served))
        half = sheet.width // 2
        assert count(sheet.crop((0, 0, half, 720)), HIGHLIGHT) > 500
        assert count(sheet.crop((half, 0, sheet.width, 720)), HIGHLIGHT) > 500

    def test_a_failed_request_still_makes_a_picture(self):
        failed = failed_image("scene.jpg", "request_failed", "503: no worker", eager=self.scene)
        assert count(self.picture(self.scene, None, failed), HIGHLIGHT) > 0

    def test_nothing_on_either_side_is_a_picture(self):
        nothing = Detections.empty()
        assert self.picture(nothing, nothing, compare(nothing, nothing)).width > 1280

    @pytest.mark.parametrize("size", [(40, 40), (6000, 200), (200, 3000)])
    def test_every_size_makes_panels_of_a_size(self, size):
        sheet = side_by_side(
            Image.new("RGB", size), TWO, TWO, compare(TWO, TWO), ("eager: " + "long/" * 80, "served"), names=NAMES
        )
        assert 700 < sheet.width < 2100
        assert sheet.height < 1200

    @pytest.mark.shared_data
    @pytest.mark.parametrize("name", ["dog.jpg", "blank_image.jpg", "palette.png", "mmdet_gray.jpg"])
    def test_real_photographs(self, name):
        if not SHARED_PHOTOS.is_dir():
            pytest.skip(f"no photographs at {SHARED_PHOTOS}")
        with Image.open(SHARED_PHOTOS / name) as image:
            sheet = side_by_side(
                image, self.scene, self.scene, compare(self.scene, self.scene), ("a", "b"), names=NAMES
            )
        assert max(sheet.size) >= 960


class TestTable:
    def printed(self, comparison, width=160):
        console = Console(width=width, force_terminal=False, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
        print_comparison(comparison, console)
        console.file.close()
        return console.export_text()

    def over(self, *images):
        return compare_images(images, score_threshold=0.05, max_detections=100)

    def test_says_what_differs(self):
        text = self.printed(self.over(compare(TWO, TWO), compare(TWO, TWO.take(np.array([1])))))
        assert "missing" in text
        assert "FAIL 1 of 2 images reach the tier numeric (all reach: none)" in text

    def test_carries_the_message_of_a_failed_request_with_its_brackets(self):
        text = self.printed(self.over(failed_image("a[1].jpg", "request_failed", "got [bold] nothing")))
        assert "a[1].jpg" in text
        assert "got [bold] nothing" in text

    def test_of_many_images_it_shows_the_worst(self):
        good = [replace(compare(TWO, TWO), image=f"{k}.jpg") for k in range(100)]
        table = comparison_table(self.over(*good, replace(compare(TWO, Detections.empty()), image="bad.jpg")))
        assert table.row_count == 40
        assert next(iter(table.columns[0].cells)) == "bad.jpg"
        assert "61 more images" in table.caption

    def test_the_summary_is_one_line(self):
        line = summary_line(self.over(compare(TWO, TWO)))
        assert line == (
            "PASS 1 of 1 images reach the tier numeric (all reach: bit); 2 detections matched, "
            "max |Δbox| 0 px, max |Δscore| 0"
        )
