"""verify on labelled images: the declared AP is reached, or the description is wrong, and the right one is named."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from colour_squares import NAMES, squares_spec, write_detector, write_pictures
from dethandlers.detections import Category
from dethandlers.spec import Decoding, Preprocessing, Serving, Spec
from detserve.archive import build_archive
from detserve.resolve import resolve_spec
from detserve.spec import dump_spec, load_spec
from dettools.cli import main
from dettools.ground_truth import CategoryEntry
from dettools.verification.alternatives import changed_keys, describe_changes, other_descriptions, other_readings
from random_detectors import class_count, model_labels, random_detector, random_images
from safetensors.torch import save_file

YOLOX_SPEC = Path(__file__).parents[2] / "model_store" / "yolox_nano" / "yolox_nano.yaml"
IMAGENET = {"scale": 1 / 255, "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("squares"))


@pytest.fixture
def build(tmp_path, pictures):
    """Pack a detector of squares under a description."""

    def build(spec, **network):
        weights = write_detector(tmp_path / "squares.onnx", **network)
        golden = pictures[0] / "001.png"
        return build_archive(
            spec, folder=tmp_path, out=tmp_path / "squares.mar", weights=weights, golden_image=golden, force=True
        ).path

    return build


@pytest.fixture
def verify(pictures, capsys):
    """Run the command with --json; return the exit code, the document and what went to stderr."""

    def verify(model, *options, images=pictures[0], annotations=pictures[1]):
        code = main(
            ["verify", str(model), "--images", str(images), "--annotations", str(annotations), "--json", *options]
        )
        printed = capsys.readouterr()
        return code, json.loads(printed.out.splitlines()[-1]) if code < 2 else {}, printed.err

    return verify


def test_the_right_description_reaches_its_declared_ap(build, verify):
    code, document, _ = verify(build(squares_spec()))
    assert code == 0
    assert document["verified"]
    labelled = document["labelled"]
    assert labelled["metrics"]["figures"]["AP"] == pytest.approx(1)
    assert (labelled["metrics"]["images"], labelled["metrics"]["objects"]) == (12, 72)
    assert (labelled["declared_ap"], labelled["declared_on"], labelled["descriptions_tried"]) == (1, "squares", 0)


def test_a_spec_is_verified_without_an_archive(tmp_path, verify):
    dump_spec(squares_spec(), tmp_path / "squares.yaml")
    weights = write_detector(tmp_path / "squares.onnx")
    code, document, _ = verify(tmp_path / "squares.yaml", "--weights", str(weights))
    assert (code, document["verified"]) == (0, True)
    assert document["labelled"]["metrics"]["figures"]["AP"] == pytest.approx(1)


@pytest.mark.parametrize(
    ("wrong", "ap", "words"),
    [
        # Ruby and sapphire are taken for each other; emerald stays.
        ({"channel_order": "rgb"}, 1 / 3, "channel_order: bgr"),
        ({"scale": 1 / 255}, 0, "scale: 1"),
        ({"mean": (127.5,) * 3, "std": (127.5,) * 3}, 0, "mean: 0, std: 1"),
        ({"channel_order": "rgb"} | IMAGENET, 0, "channel_order: bgr, scale: 1, mean: 0, std: 1"),
        ({"names": ("emerald", "sapphire", "ruby")}, 0, "the categories in the order of the annotation file"),
    ],
    ids=["channels", "scale", "normalisation", "all of them", "classes"],
)
def test_a_wrong_description_passes_the_golden_check_and_fails_on_labels_with_the_right_one_named(
    build, verify, wrong, ap, words
):
    code, document, _ = verify(build(squares_spec(**wrong)))
    assert code == 1
    assert (document["verified"], document["drift"]) == (False, "")
    labelled = document["labelled"]
    assert labelled["metrics"]["figures"]["AP"] == pytest.approx(ap, abs=1e-6)
    assert (
        f"AP is {ap:.3f} where 1.000 is declared (squares): the description does not fit the file; check "
        in (labelled["message"])
    )
    assert f"With {words} → AP 1.000 on the first 12 images" in labelled["message"]
    better = labelled["better_description"]
    assert (better["ap"], better["ap_described"]) == (pytest.approx(1), pytest.approx(ap, abs=1e-6))


def test_a_background_that_was_forgotten_is_named(build, verify):
    code, document, _ = verify(build(squares_spec(), background=True))
    assert code == 1
    assert "With the model_label of each category one higher → AP 1.000" in document["labelled"]["message"]


def test_a_background_that_is_not_there_is_named(build, verify):
    # Two of the three outputs are in the map, and taken for the ones after them.
    spec = squares_spec()
    shifted = replace(
        spec,
        num_classes=3,
        categories=tuple(replace(one, model_label=place) for place, one in enumerate(spec.categories[:2], start=1)),
    )
    code, document, _ = verify(build(shifted), "--expect-ap", "0.66")
    assert code == 1
    better = document["labelled"]["better_description"]
    assert better["categories"] == "the model_label of each category one lower"
    # Two classes of three are found.
    assert better["ap"] == pytest.approx(2 / 3, abs=1e-6)


def test_the_changes_that_are_named_are_the_right_description(build, verify):
    _, document, _ = verify(build(squares_spec(channel_order="rgb", **IMAGENET)))
    changes = document["labelled"]["better_description"]["changes"]
    code, again, _ = verify(build(squares_spec(**{key: _plain(value) for key, value in changes.items()})))
    assert (code, again["verified"]) == (0, True)


def _plain(value):
    return tuple(value) if isinstance(value, list) else value


def test_where_no_description_fits_none_is_named(tmp_path, pictures, build, verify):
    path = tmp_path / "elsewhere.json"
    document = json.loads(pictures[1].read_text())
    rng = np.random.default_rng(0)
    for one in document["annotations"]:
        one["bbox"][:2] = [8 * float(rng.integers(0, 5)) + 4, 8 * float(rng.integers(0, 5)) + 4]
    path.write_text(json.dumps(document))
    code, document, _ = verify(build(squares_spec()), annotations=path)
    assert code == 1
    assert document["labelled"]["better_description"] is None
    tried = document["labelled"]["descriptions_tried"]
    assert tried >= 30
    assert (
        f"None of {tried} other descriptions brings it back on the first 12 images" in document["labelled"]["message"]
    )


def test_without_a_declaration_ap_is_told_and_nothing_fails(build, verify, capsys, pictures):
    path = build(squares_spec(accuracy=None, channel_order="rgb"))
    code, document, _ = verify(path)
    assert (code, document["labelled"]["declared_ap"]) == (0, None)
    assert "AP is 0.333 on 12 images. Nothing is declared" in document["labelled"]["message"]
    assert main(["verify", str(path), "--images", str(pictures[0]), "--annotations", str(pictures[1])]) == 0
    assert "AP is 0.333 on 12 images. Nothing is declared" in capsys.readouterr().out


def test_what_is_expected_on_the_command_line_comes_before_the_spec(build, verify):
    path = build(squares_spec(channel_order="rgb"))
    assert verify(path, "--expect-ap", "0.33")[0] == 0
    assert verify(path, "--expect-ap", "0.35", "--ap-tolerance", "0.02")[0] == 0
    code, document, _ = verify(path, "--expect-ap", "0.35")
    assert code == 1
    assert (
        "AP is 0.333 where 0.350 is declared (--expect-ap): below it by more than 0.005. On other images"
        in (document["labelled"]["message"])
    )


def test_images_without_a_file_are_left_out_and_told(build, verify, pictures, tmp_path):
    for number in (1, 2, 3):
        (tmp_path / f"{number:03d}.png").write_bytes((pictures[0] / f"{number:03d}.png").read_bytes())
    code, document, told = verify(build(squares_spec()), images=tmp_path)
    assert (code, document["labelled"]["metrics"]["images"]) == (0, 3)
    assert "9 of 12 images are not in" in told


def test_an_image_that_fails_counts_as_empty_and_is_told(build, verify, pictures, tmp_path):
    for file in pictures[0].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes() if file.name != "001.png" else b"no image")
    code, document, told = verify(build(squares_spec()), images=tmp_path)
    assert code == 1
    assert document["labelled"]["failed"] == 1
    # Precision is 1 up to a recall of 11 / 12: 92 of COCO's 101 recalls.
    assert document["labelled"]["metrics"]["figures"]["AP"] == pytest.approx(92 / 101, abs=1e-6)
    assert "1 of 12 images got an error and count as empty; the first is 001.png" in told


def test_a_network_of_another_input_is_told_by_its_own_error(tmp_path, verify):
    dump_spec(squares_spec(), tmp_path / "squares.yaml")
    weights = write_detector(tmp_path / "squares.onnx", height=32)
    code, _, told = verify(tmp_path / "squares.yaml", "--weights", str(weights))
    assert code == 2
    assert "Correct preprocessing.size" in told


def test_where_every_image_fails_the_reason_is_told(build, verify, pictures, tmp_path):
    for file in pictures[0].iterdir():
        (tmp_path / file.name).write_bytes(b"no image")
    code, document, _ = verify(build(squares_spec()), images=tmp_path)
    assert code == 1
    assert "none of 12 images could be answered: got 8 bytes" in document["labelled"]["message"]
    assert document["labelled"]["descriptions_tried"] == 0


def test_the_floor_under_scores_is_kept_and_told(build, verify):
    spec = squares_spec(serving=Serving(score_threshold=0.5, min_score_threshold=0.3))
    code, _, told = verify(build(spec))
    assert code == 0
    assert "serving.min_score_threshold is 0.3: what lies below it is missing from this AP" in told


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--images", "."], "got one of --images and --annotations, expected both or neither"),
        (["--annotations", "a.json"], "got one of --images and --annotations, expected both or neither"),
        (["--expect-ap", "0.3"], "--expect-ap: got it without labelled images"),
    ],
)
def test_half_a_question_is_refused(build, capsys, arguments, message):
    assert main(["verify", str(build(squares_spec())), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_spec_alone_is_refused(tmp_path, capsys):
    dump_spec(squares_spec(), tmp_path / "squares.yaml")
    assert main(["verify", str(tmp_path / "squares.yaml")]) == 2
    assert "got the spec" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--expect-ap", "--ap-tolerance"])
def test_ap_in_points_is_refused(build, verify, option):
    code, _, told = verify(build(squares_spec()), option, "32.6")
    assert code == 2
    assert f"{option}: got 32.6, expected a fraction from 0 to 1" in told


def test_a_folder_of_other_images_is_refused(build, verify, tmp_path):
    (tmp_path / "empty").mkdir()
    code, _, told = verify(build(squares_spec()), images=tmp_path / "empty")
    assert code == 2
    assert "has none of the 12 images" in told


def test_classes_that_the_data_set_does_not_have_are_refused(build, verify, pictures, tmp_path):
    document = json.loads(pictures[1].read_text())
    for one in document["categories"]:
        one["id"] += 50
        one["name"] = f"other {one['id']}"
    for one in document["annotations"]:
        one["category_id"] += 50
    (tmp_path / "other.json").write_text(json.dumps(document))
    code, _, told = verify(build(squares_spec()), annotations=tmp_path / "other.json")
    assert code == 2
    assert "3 of the model's 3 classes are not in the data set" in told


# The descriptions that are tried.


def described(**preprocessing):
    return resolve_spec(squares_spec(**preprocessing), None)


def test_every_other_description_differs_in_what_it_says_to_change():
    current = replace(described(), decoding=Decoding(strides=(8, 16)))
    others = other_descriptions(current)
    said = [
        describe_changes(changed_keys(current, one), str([c.model_label for c in one.categories])) for one in others
    ]
    assert len(set(said)) == len(others) >= 20
    inputs = {replace(one.preprocessing, pad_value=0) for one in others}
    assert Preprocessing(size=(64, 96), channel_order="rgb", **IMAGENET, pad_value=0) in inputs
    assert [one.decoding.strides for one in others].count((16, 8)) == 1
    assert [one.categories[0].model_label for one in others if one.categories != current.categories] == [1]


def test_the_changes_make_the_other_description():
    current = described()
    for other in other_descriptions(current):
        changes = changed_keys(current, other)
        assert replace(current.preprocessing, **changes) == other.preprocessing


def test_the_description_itself_is_not_among_the_others():
    # ImageNet's numbers over 0..255 are those over 0..1.
    mean, std = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
    current = described(channel_order="rgb", mean=mean, std=std)
    for other in other_descriptions(current):
        one = other.preprocessing
        same_line = all(
            abs((200 * one.scale - one.mean[place]) / one.std[place] - (200 - mean[place]) / std[place]) < 0.01
            for place in range(3)
        )
        assert not (same_line and (one.channel_order, one.resize) == ("rgb", "letterbox") and not _moved(other))


def _moved(spec):
    return spec.categories[0].model_label != 0


def test_the_mean_follows_the_channel_order():
    means = {(one.preprocessing.channel_order, one.preprocessing.mean) for one in other_descriptions(described())}
    assert {("rgb", (0.485, 0.456, 0.406)), ("bgr", (0.406, 0.456, 0.485))} <= means


def test_a_model_with_its_own_transform_is_asked_once_and_only_its_labels_are_doubted(tmp_path, pictures, verify):
    builder = "ssdlite320_mobilenet_v3_large"
    detector = random_detector(builder, random_images()[:2])
    save_file({key: tensor.contiguous() for key, tensor in detector.state.items()}, tmp_path / "ssd.safetensors")
    spec = Spec(
        name="ssd",
        family="torchvision",
        builder=builder,
        builder_options=detector.options,
        num_classes=class_count(builder),
        categories=tuple(
            Category(id=place, name=f"class {place}", model_label=label)
            for place, label in enumerate(model_labels(builder), start=1)
        ),
        weights="ssd.safetensors",
    )
    path = build_archive(spec, folder=tmp_path, out=tmp_path / "ssd.mar").path
    code, document, _ = verify(path, "--expect-ap", "0.9")
    assert code == 1
    assert "check the category map, builder, builder_options and norm_eps. None of" in document["labelled"]["message"]
    # Of the six readings at most; no other input is tried.
    assert 2 <= document["labelled"]["descriptions_tried"] <= 6


def test_readings_that_mean_the_same_come_once():
    data = [CategoryEntry(place, name) for place, name in enumerate(NAMES, start=1)]
    readings = other_readings(described().categories, data, (1, 2, 3))
    found = [reading.category_ids for reading in readings]
    assert len(set(found)) == len(found)
    assert (1, 2, 3) not in found
    assert {(None, 1, 2), (2, 3, None), (2, 1, 3)} <= set(found)


# On photographs.


@pytest.mark.shared_data
@pytest.mark.slow
def test_yolox_described_for_another_network_is_built_and_found_out(shared_data, tmp_path, verify):
    """Its golden image cannot see it: eager reads the same description."""
    weights = shared_data / "models" / "yolox_nano" / "yolox_nano.onnx"
    data = {
        "images": shared_data / "coco" / "liz50" / "val2017",
        "annotations": shared_data / "coco" / "liz50" / "instances_val2017.json",
    }
    right = load_spec(YOLOX_SPEC)
    path = build_archive(right, folder=tmp_path, out=tmp_path / "right.mar", weights=weights).path
    code, document, _ = verify(path, **data)
    assert code == 0
    assert document["labelled"]["metrics"]["figures"]["AP"] == pytest.approx(0.326, abs=0.003)
    assert document["labelled"]["declared_ap"] > 0.31
    wrong = replace(right, preprocessing=replace(right.preprocessing, channel_order="rgb", **IMAGENET))
    path = build_archive(wrong, folder=tmp_path, out=tmp_path / "wrong.mar", weights=weights).path
    code, document, _ = verify(path, **data)
    assert code == 1
    assert document["drift"] == ""
    labelled = document["labelled"]
    assert labelled["metrics"]["figures"]["AP"] < 0.01
    assert f"AP is {labelled['metrics']['figures']['AP']:.3f} where 0.326 is declared (liz50" in labelled["message"]
    assert "With channel_order: bgr, scale: 1, mean: 0, std: 1 → AP 0.2" in labelled["message"]
