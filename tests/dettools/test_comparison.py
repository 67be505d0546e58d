"""What compare finds in two lists of detections, and what the original tool made of the same lists."""

import json
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from dethandlers.detections import Detections
from dettools.agreement import REASONS, TIER_NAMES, TIERS
from dettools.comparison import Comparison, ImageComparison, compare_image, compare_images, failed_image
from dettools.matching import LEAST_OVERLAP, box_iou, match
from pycocotools import mask as coco_mask

CAT, DOG, CAR = 0, 1, 2
NAMES = ("cat", "dog", "car")
# (x1, y1, x2, y2, score, label), best first
SCENE = [
    (10.0, 10.0, 110.0, 90.0, 0.95, CAT),
    (200.0, 30.0, 320.0, 180.0, 0.80, DOG),
    (400.0, 40.0, 480.0, 100.0, 0.60, CAR),
    (50.0, 200.0, 90.0, 260.0, 0.30, DOG),
    (300.0, 300.0, 330.0, 350.0, 0.12, CAT),
]


def detections(*rows):
    table = np.array(rows, np.float64).reshape(-1, 6)
    return Detections(table[:, :4].astype(np.float32), table[:, 4].astype(np.float32), table[:, 5].astype(np.int64))


def compare(eager, served, **kwargs) -> ImageComparison:
    arguments = {"score_threshold": 0.05, "max_detections": 100, "names": NAMES} | kwargs
    return compare_image("scene.jpg", eager, served, **arguments)


def over(*images, required="numeric") -> Comparison:
    return compare_images(images, score_threshold=0.05, max_detections=100, required=required)


def random_scene(rng, count=8):
    corners = rng.uniform(0, 400, (count, 2))
    sizes = rng.uniform(20, 120, (count, 2))
    scores = np.sort(rng.uniform(0.06, 0.99, count))[::-1]
    return detections(
        *(
            (x, y, x + w, y + h, score, rng.integers(3))
            for (x, y), (w, h), score in zip(corners, sizes, scores, strict=True)
        )
    )


def moved(found, *, px=0.0, score=0.0):
    return replace(found, boxes_xyxy=found.boxes_xyxy + np.float32(px), scores=found.scores + np.float32(score))


def original_verdict(eager, served_json, score_thr=None):
    """Run the three assertions of MMDetection's test_torchserver.py 3.x; the threshold filters the eager side only."""
    if score_thr is not None:
        eager = eager.take(eager.scores >= score_thr)
    sides = (
        (eager.boxes_xyxy, [entry["bbox"] for entry in served_json]),
        (eager.labels, [entry["class_label"] for entry in served_json]),
        (eager.scores, [entry["score"] for entry in served_json]),
    )
    try:
        for ours, theirs in sides:
            reference = torch.from_numpy(np.array(ours))
            if not torch.allclose(reference, torch.tensor(theirs, dtype=reference.dtype)):
                return "AssertionError"
    except RuntimeError as error:
        return f"RuntimeError: {error}"
    return "equal"


def as_json(found):
    return [
        {"class_label": int(label), "class_name": NAMES[label], "bbox": box.tolist(), "score": float(score)}
        for box, score, label in zip(found.boxes_xyxy, found.scores, found.labels, strict=True)
    ]


class TestBesideTheOriginal:
    """Each defect of the original tool: its verdict on the same lists, then ours."""

    def test_nothing_found_on_either_side_is_agreement(self):
        nothing = Detections.empty()
        assert original_verdict(nothing, as_json(nothing)).startswith("RuntimeError: The size of tensor")
        result = compare(nothing, nothing)
        assert (result.passed, result.tier, result.reasons) == (True, "bit", ())

    def test_unequal_counts_are_a_report_not_a_crash(self):
        eager = detections(*SCENE)
        served = detections(*SCENE[:4])
        assert original_verdict(eager, as_json(served)).startswith("RuntimeError: The size of tensor")
        result = compare(eager, served)
        assert (result.passed, result.reasons, len(result.pairs)) == (False, ("missing",), 4)
        assert result.unmatched_eager == (4,)
        assert result.findings[0].detail == "score 0.1200"

    def test_equal_scores_in_another_order_are_the_same_detections(self):
        tied = [(*row[:4], 0.5, row[5]) for row in SCENE]
        eager, served = detections(*tied), detections(*reversed(tied))
        assert original_verdict(eager, as_json(served)) == "AssertionError"
        result = compare(eager, served)
        assert (result.passed, result.tier, result.reasons) == (True, "bit", ("order_only",))

    def test_one_threshold_holds_for_both_sides(self):
        eager, served_at_half = detections(*SCENE), detections(*SCENE[:3])
        # The original filters eager at --score-thr and leaves the server at its own 0.5.
        assert original_verdict(eager, as_json(served_at_half), score_thr=0.05).startswith("RuntimeError")
        assert original_verdict(eager, as_json(served_at_half), score_thr=0.5) == "equal"
        result = over(compare(eager, served_at_half))
        assert not result.passed
        assert result.reasons == {"missing": 1}
        assert [hint.code for hint in result.hints] == ["served_threshold_higher"]
        assert "served threshold is higher, about 0.5" in result.hints[0].message

    def test_rounding_of_another_kernel_is_agreement(self):
        eager = detections(*SCENE)
        served = moved(eager, px=0.02, score=-5e-5)
        assert original_verdict(eager, as_json(served)) == "AssertionError"
        result = compare(eager, served)
        assert (result.passed, result.tier) == (True, "numeric")


class TestMatching:
    def test_is_optimal_where_greedy_by_overlap_is_not(self):
        # Greedy takes the best pair (eager 0, served 0) and leaves eager 1 and served 1 alone.
        eager = detections((0, 0, 100, 100, 0.9, CAT), (30, 0, 130, 100, 0.8, CAT))
        served = detections((8, 0, 108, 100, 0.9, CAT), (-25, 0, 75, 100, 0.8, CAT))
        iou = box_iou(eager.boxes_xyxy.astype(np.float64), served.boxes_xyxy.astype(np.float64))
        assert np.unravel_index(iou.argmax(), iou.shape) == (0, 0)
        assert iou[1, 1] < LEAST_OVERLAP
        pairs = {(pair.eager, pair.served) for pair in match(eager, served)}
        assert pairs == {(0, 1), (1, 0)}

    def test_never_pairs_a_detection_twice(self):
        one = detections((0, 0, 100, 100, 0.9, CAT))
        twice = detections((0, 0, 100, 100, 0.9, CAT), (0, 0, 100, 100, 0.9, CAT))
        result = compare(one, twice)
        assert (len(result.pairs), result.reasons) == (1, ("extra",))

    def test_prefers_the_class_among_equal_boxes(self):
        eager = detections((0, 0, 100, 100, 0.9, CAT), (0, 0, 100, 100, 0.4, DOG))
        served = detections((0, 0, 100, 100, 0.4, DOG), (0, 0, 100, 100, 0.9, CAT))
        assert {(pair.eager, pair.served) for pair in match(eager, served)} == {(0, 1), (1, 0)}

    def test_prefers_the_score_among_equal_boxes_of_a_class(self):
        eager = detections((0, 0, 100, 100, 0.9, CAT), (0, 0, 100, 100, 0.4, CAT))
        served = detections((0, 0, 100, 100, 0.4, CAT), (0, 0, 100, 100, 0.9, CAT))
        assert {(pair.eager, pair.served) for pair in match(eager, served)} == {(0, 1), (1, 0)}

    def test_boxes_without_area_are_found_again(self):
        eager = detections((5, 5, 5, 5, 0.9, CAT), (7, 7, 7, 90, 0.8, CAT))
        assert compare(eager, eager).tier == "bit"
        assert compare(eager, moved(eager, px=0.03)).tier == "numeric"

    @pytest.mark.parametrize("broken", [np.nan, np.inf])
    def test_what_is_not_a_number_is_reported_and_stays_json(self, broken):
        eager = detections(*SCENE)
        served = detections((broken, 10, 110, 90, 0.95, CAT), *SCENE[1:4], (300, 300, 330, 350, np.nan, CAT))
        result = compare(eager, served)
        assert (result.passed, result.reasons, len(result.pairs)) == (False, ("missing", "extra"), 3)
        json.dumps(over(result).to_json(), allow_nan=False)

    @pytest.mark.parametrize("seed", range(20))
    def test_any_order_of_the_same_detections_is_found_again(self, seed):
        rng = np.random.default_rng(seed)
        eager = random_scene(rng, count=30)
        order = rng.permutation(30)
        result = compare(eager, eager.take(order))
        assert [order[pair.served] for pair in result.pairs] == [pair.eager for pair in result.pairs]
        assert (result.passed, result.tier, result.reasons) == (True, "numeric", ("order_only",))


class TestReasons:
    def test_a_changed_class_is_a_flip_not_missing_and_extra(self):
        changed = [(*SCENE[0][:5], DOG), *SCENE[1:]]
        result = compare(detections(*SCENE), detections(*changed))
        assert (result.passed, result.reasons) == (False, ("label_flip",))
        assert (result.findings[0].eager, result.findings[0].served) == (0, 0)
        assert result.findings[0].detail == "cat became dog"

    def test_a_flip_is_found_beside_a_lost_neighbour_of_that_class(self):
        eager = detections((0, 0, 100, 100, 0.9, CAT), (22, 0, 122, 100, 0.8, DOG))
        served = detections((0, 0, 100, 100, 0.9, DOG))
        assert compare(eager, served).reasons == ("label_flip", "missing")

    def test_a_dropped_detection_is_missing(self):
        result = compare(detections(*SCENE), detections(*SCENE[:1], *SCENE[2:]))
        assert (result.passed, result.tier, result.reasons, result.unmatched_eager) == (False, None, ("missing",), (1,))

    def test_an_added_detection_is_extra(self):
        result = compare(detections(*SCENE[1:]), detections(*SCENE))
        assert (result.passed, result.reasons, result.unmatched_served) == (False, ("extra",), (0,))

    @pytest.mark.parametrize("empty_side", ["eager", "served"])
    def test_nothing_on_one_side_is_a_report(self, empty_side):
        some, none = detections(*SCENE), Detections.empty()
        result = compare(none, some) if empty_side == "eager" else compare(some, none)
        assert (result.passed, result.tier) == (False, None)
        assert result.reasons == (("extra",) if empty_side == "eager" else ("missing",))
        assert len(result.findings) == 5

    def test_a_shifted_box_is_box_drift(self):
        result = compare(detections(*SCENE), moved(detections(*SCENE), px=0.5))
        assert (result.passed, result.tier, result.reasons) == (False, "reduced-precision", ("box_drift",))
        assert result.max_box_delta_px == pytest.approx(0.5, abs=1e-4)

    def test_another_score_is_score_drift(self):
        result = compare(detections(*SCENE), moved(detections(*SCENE), score=-0.01))
        assert (result.passed, result.tier, result.reasons) == (False, "reduced-precision", ("score_drift",))
        assert result.max_score_delta == pytest.approx(0.01, abs=1e-6)

    @pytest.mark.parametrize(("columns", "tier"), [(0, "bit"), (1, "reduced-precision"), (3, "detection"), (9, None)])
    def test_another_mask_is_mask_drift(self, columns, tier):
        def with_mask(right):
            bitmap = np.zeros((60, 80), np.uint8, order="F")
            bitmap[10:30, 10:right] = 1
            rle = coco_mask.encode(bitmap)
            rle["counts"] = rle["counts"].decode()  # as JSON carries it
            return replace(detections((10, 10, 30, 30, 0.9, CAT)), masks=[rle])

        result = compare(with_mask(30), with_mask(30 - columns))
        assert result.tier == tier
        assert result.min_mask_iou == pytest.approx(1 - columns / 20)
        assert result.reasons == (("mask_drift",) if columns else ())

    def test_masks_on_one_side_only_are_mask_drift(self):
        found = detections((10, 10, 30, 30, 0.9, CAT))
        rle = coco_mask.encode(np.ones((40, 40), np.uint8, order="F"))
        assert compare(replace(found, masks=[rle]), found).reasons == ("mask_drift",)

    def test_two_empty_masks_agree(self):
        rle = coco_mask.encode(np.zeros((40, 40), np.uint8, order="F"))
        found = replace(detections((10, 10, 30, 30, 0.9, CAT)), masks=[rle])
        assert compare(found, found).tier == "bit"

    def test_a_moved_keypoint_is_keypoint_drift(self):
        points = np.array([[[20, 20, 0.9], [40, 30, 0.8]]], np.float32)
        eager = replace(detections((10, 10, 110, 110, 0.9, CAT)), keypoints=points)
        served = replace(eager, keypoints=points + np.float32([0, 4, 0]))
        result = compare(eager, served)
        assert (result.tier, result.reasons) == ("detection", ("keypoint_drift",))
        assert result.max_keypoint_delta_px == 4.0
        unlike = compare(eager, replace(eager, keypoints=points[:, :1]))
        assert (unlike.tier, unlike.reasons) == (None, ("keypoint_drift",))

    def test_at_the_threshold_rounding_decides_and_is_tolerated(self):
        edge = (300.0, 10.0, 340.0, 60.0, 0.05006, CAR)
        result = compare(detections(*SCENE, edge), detections(*SCENE))
        assert (result.passed, result.tier, result.reasons) == (True, "numeric", ("threshold_edge",))
        assert result.findings[0].eager == 5

    def test_beyond_the_edge_it_is_missing_at_the_strict_tier_and_tolerated_at_a_looser(self):
        near = (300.0, 10.0, 340.0, 60.0, 0.06, CAR)
        eager, served = detections(*SCENE, near), detections(*SCENE)
        assert compare(eager, served).reasons == ("missing",)
        loose = compare(eager, served, required="reduced-precision")
        assert (loose.passed, loose.tier, loose.reasons) == (True, "reduced-precision", ("threshold_edge",))

    def test_a_tie_at_the_cut_off_is_tolerated(self):
        first, second = (0, 200, 40, 240, 0.3, CAT), (100, 200, 140, 240, 0.3, CAT)
        result = compare(detections(*SCENE[:3], first), detections(*SCENE[:3], second), max_detections=4)
        assert (result.passed, result.tier, result.reasons) == (True, "numeric", ("truncated_by_max_detections",))
        # The same lists with room to spare are a real difference.
        assert compare(detections(*SCENE[:3], first), detections(*SCENE[:3], second)).reasons == ("missing", "extra")

    def test_a_lost_detection_stays_missing_when_the_cut_off_lets_another_in(self):
        eager, served = detections(*SCENE[:4]), detections(*SCENE[:1], *SCENE[2:])
        result = compare(eager, served, max_detections=4)
        assert (result.passed, result.reasons) == (False, ("missing", "truncated_by_max_detections"))
        assert [finding.fails for finding in result.findings] == [True, False]

    def test_a_list_of_nothing_but_ties_does_not_excuse_everything(self):
        eager = detections(*((10 * k, 0, 10 * k + 8, 8, 0.5, CAT) for k in range(10)))
        served = moved(eager, px=300)
        result = compare(eager, served, max_detections=10)
        assert (result.passed, result.tier) == (False, None)

    def test_a_side_that_ignores_max_detections_fails(self):
        result = compare(detections(*SCENE), detections(*SCENE[:3]), max_detections=3)
        assert (result.passed, result.reasons) == (False, ("truncated_by_max_detections",))

    def test_a_failed_request_carries_its_message(self):
        comparison = over(failed_image("a.jpg", "request_failed", "503: no worker", eager=detections(*SCENE)))
        assert (comparison.passed, comparison.tier, comparison.reasons) == (False, None, {"request_failed": 1})
        assert comparison.images[0].findings[0].detail == "503: no worker"
        assert "503: no worker" in comparison.hints[0].message

    def test_failed_eager_inference_is_not_agreement(self):
        assert over(failed_image("a.jpg", "eager_failed", "no image")).reasons == {"eager_failed": 1}


class TestTiers:
    def test_each_tier_contains_the_stricter_one(self):
        for strict, loose in pairwise(TIERS):
            assert strict.box_px <= loose.box_px
            assert strict.box_share <= loose.box_share
            assert strict.box_iou >= loose.box_iou
            assert strict.score <= loose.score
            assert strict.mask_iou >= loose.mask_iou
            assert strict.keypoint_px <= loose.keypoint_px
            assert strict.keypoint_share <= loose.keypoint_share

    @pytest.mark.parametrize(
        ("px", "score", "tier"),
        [
            (0.0, 0.0, "bit"),
            (0.04, 9e-5, "numeric"),
            (0.0, 2e-4, "reduced-precision"),
            (1.5, 0.015, "reduced-precision"),
            (2.5, 0.0, "detection"),
            (0.0, 0.04, "detection"),
            (0.0, 0.06, None),
            (8.0, 0.0, None),
        ],
    )
    def test_the_strictest_one_reached_is_named(self, px, score, tier):
        eager = detections((100, 100, 220, 200, 0.5, CAT))
        result = compare(eager, moved(eager, px=px, score=score))
        assert result.tier == tier
        for required in TIER_NAMES:
            judged = compare(eager, moved(eager, px=px, score=score), required=required)
            reached = tier is not None and TIER_NAMES.index(tier) <= TIER_NAMES.index(required)
            assert judged.passed is reached

    def test_one_last_bit_of_one_score_is_not_bit_equal(self):
        eager = detections(*SCENE)
        scores = eager.scores.copy()
        scores[2] = np.nextafter(scores[2], np.float32(1))
        assert compare(eager, replace(eager, scores=scores)).tier == "numeric"

    def test_unsorted_answers_are_not_bit_equal(self):
        result = compare(detections(*SCENE), detections(*reversed(SCENE)))
        assert (result.tier, result.reasons) == ("numeric", ("order_only",))
        assert not compare(detections(*SCENE), detections(*reversed(SCENE)), required="bit").passed

    def test_at_the_bit_tier_nothing_is_excused(self):
        edge = (300.0, 10.0, 340.0, 60.0, 0.05, CAR)
        assert not compare(detections(*SCENE, edge), detections(*SCENE), required="bit").passed

    def test_a_comparison_reaches_what_all_its_images_reach(self):
        eager = detections(*SCENE)
        both = over(compare(eager, eager), compare(eager, moved(eager, px=0.03)))
        assert (both.passed, both.tier) == (True, "numeric")
        assert over(*both.images, failed_image("c", "request_failed", "gone")).tier is None

    def test_no_image_at_all_is_no_pass(self):
        assert not over().passed


class TestOverImages:
    def scenes(self, count=6, seed=3):
        rng = np.random.default_rng(seed)
        return {f"{k}.jpg": random_scene(rng) for k in range(count)}

    def compare_all(self, scenes, served, required="numeric"):
        return over(
            *(
                compare_image(name, eager, served[name], score_threshold=0.05, max_detections=100, required=required)
                for name, eager in scenes.items()
            ),
            required=required,
        )

    def test_swapped_replies_are_named(self):
        scenes = self.scenes()
        served = scenes | {"1.jpg": scenes["4.jpg"], "4.jpg": scenes["1.jpg"]}
        result = self.compare_all(scenes, served)
        assert (result.passed, result.reasons) == (False, {"swapped_replies": 2})
        assert {image.image: image.swapped_with for image in result.images if image.swapped_with} == {
            "1.jpg": "4.jpg",
            "4.jpg": "1.jpg",
        }
        assert result.hints[0].code == "swapped_replies"
        assert "1.jpg got the detections of 4.jpg" in result.hints[0].message

    def test_a_swap_with_an_empty_image_is_named(self):
        scenes = self.scenes(2) | {"empty.jpg": Detections.empty(), "bare.jpg": Detections.empty()}
        served = scenes | {"1.jpg": Detections.empty(), "empty.jpg": scenes["1.jpg"]}
        result = self.compare_all(scenes, served)
        assert result.reasons == {"swapped_replies": 2}

    def test_a_ring_of_replies_is_named(self):
        scenes = self.scenes(5)
        names = list(scenes)
        served = {name: scenes[names[(k + 1) % 5]] for k, name in enumerate(names)}
        assert self.compare_all(scenes, served).reasons == {"swapped_replies": 5}

    def test_a_swap_is_seen_through_rounding(self):
        scenes = self.scenes(3)
        served = scenes | {"0.jpg": moved(scenes["1.jpg"], px=0.01), "1.jpg": moved(scenes["0.jpg"], score=2e-5)}
        assert self.compare_all(scenes, served).reasons == {"swapped_replies": 2}

    def test_a_threshold_of_a_half_on_the_served_side(self):
        scenes = self.scenes()
        served = {name: found.filtered(0.5, 100) for name, found in scenes.items()}
        result = self.compare_all(scenes, served)
        assert set(result.reasons) == {"missing"}
        assert [hint.code for hint in result.hints] == ["served_threshold_higher"]
        assert "about 0.5:" in result.hints[0].message

    def test_a_threshold_of_a_half_on_the_eager_side(self):
        scenes = self.scenes()
        eager = {name: found.filtered(0.5, 100) for name, found in scenes.items()}
        result = self.compare_all(eager, scenes)
        assert set(result.reasons) == {"extra"}
        assert [hint.code for hint in result.hints] == ["eager_threshold_higher"]

    def test_an_endpoint_that_ignores_the_threshold(self):
        scenes = self.scenes()
        below = {name: replace(found, scores=found.scores - np.float32(0.3)) for name, found in scenes.items()}
        eager = {name: found.filtered(0.05, 100) for name, found in below.items()}
        result = self.compare_all(eager, below)
        assert [hint.code for hint in result.hints] == ["served_threshold_ignored"]

    def test_an_endpoint_with_a_lower_max_detections(self):
        scenes = self.scenes()
        served = {name: found.filtered(0, 5) for name, found in scenes.items()}
        result = self.compare_all(scenes, served)
        assert [hint.code for hint in result.hints] == ["served_max_detections_lower"]
        assert "more than 5 detections" in result.hints[0].message

    def test_one_dropped_detection_is_no_pattern(self):
        scenes = self.scenes()
        served = scenes | {"2.jpg": scenes["2.jpg"].take(np.array([0, 1, 2, 4, 5, 6, 7]))}
        result = self.compare_all(scenes, served)
        assert (result.passed, result.reasons, result.hints) == (False, {"missing": 1}, ())
        assert result.worst[0].image == "2.jpg"

    def test_labels_counted_with_the_background(self):
        scenes = self.scenes()
        served = {name: replace(found, labels=found.labels + 1) for name, found in scenes.items()}
        result = self.compare_all(scenes, served)
        assert result.reasons == {"label_flip": 6}
        assert [hint.code for hint in result.hints] == ["category_map_differs"]
        assert "shifted by +1" in result.hints[0].message

    def test_broad_drift_is_preprocessing(self):
        rng = np.random.default_rng(5)
        scenes = self.scenes()
        served = {
            name: replace(
                found,
                boxes_xyxy=found.boxes_xyxy + rng.normal(0, 4, found.boxes_xyxy.shape).astype(np.float32),
                scores=np.clip(found.scores + rng.normal(0, 0.1, len(found)), 0.06, 1).astype(np.float32),
            )
            for name, found in scenes.items()
        }
        result = self.compare_all(scenes, served)
        assert {"box_drift", "score_drift"} <= set(result.reasons)
        assert [hint.code for hint in result.hints] == ["preprocessing_differs"]
        assert "channel order, resize filter, normalisation" in result.hints[0].message

    def test_slight_broad_drift_is_precision(self):
        scenes = self.scenes()
        served = {name: moved(found, px=0.4, score=0.004) for name, found in scenes.items()}
        result = self.compare_all(scenes, served)
        assert [hint.code for hint in result.hints] == ["precision_differs"]

    def test_drift_on_one_image_of_many_is_no_pattern(self):
        scenes = self.scenes()
        result = self.compare_all(scenes, scenes | {"0.jpg": moved(scenes["0.jpg"], px=0.7)})
        assert (result.reasons, result.hints) == ({"box_drift": 1}, ())

    def test_an_endpoint_that_finds_nothing(self):
        scenes = self.scenes()
        result = self.compare_all(scenes, dict.fromkeys(scenes, Detections.empty()))
        assert [hint.code for hint in result.hints] == ["served_finds_nothing"]

    def test_the_json_says_it_all(self):
        scenes = self.scenes()
        result = self.compare_all(scenes, scenes | {"0.jpg": moved(scenes["0.jpg"], px=0.7)})
        document = json.loads(json.dumps(result.to_json(), allow_nan=False))
        assert (document["passed"], document["required_tier"], document["tier"]) == (
            False,
            "numeric",
            "reduced-precision",
        )
        assert (document["images"], document["images_passed"], document["matched"]) == (6, 5, 48)
        assert document["worst_images"] == ["0.jpg"]
        assert set(document["reasons"]) <= set(REASONS)
        finding = document["per_image"][0]["findings"][0]
        assert (finding["reason"], finding["eager"]["index"], finding["served"]["index"]) == ("box_drift", 0, 0)
        assert finding["eager"]["bbox"] == pytest.approx(scenes["0.jpg"].boxes_xyxy[0].tolist())
        assert "per_image" not in result.to_json(per_image=False)
