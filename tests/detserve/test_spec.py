"""Specs in YAML: what is read, what is refused, and that every refusal names its key."""

import dataclasses
import datetime
import json
import re
from pathlib import Path

import pytest
import yaml
from dethandlers.detections import Category
from dethandlers.spec import Decoding, Preprocessing, Serving, Source, Spec
from detserve.errors import SpecError
from detserve.spec import dump_spec, load_spec, override_spec, parse_spec

GOOD = {
    "name": "frcnn-1",
    "family": "torchvision",
    "builder": "fasterrcnn_resnet50_fpn",
    "categories": [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}],
}


def write(folder: Path, text: str) -> Path:
    path = folder / "model.yaml"
    path.write_text(text, "utf-8")
    return path


def refusal(folder: Path, changes: dict[str, object]) -> str:
    """The message for the good spec with these changes."""
    with pytest.raises(SpecError) as caught:
        load_spec(write(folder, yaml.safe_dump({**GOOD, **changes})))
    return str(caught.value)


def test_a_good_spec_is_read_with_its_defaults(tmp_path):
    spec = load_spec(write(tmp_path, yaml.safe_dump(GOOD)))
    assert (spec.name, spec.family, spec.builder) == ("frcnn-1", "torchvision", "fasterrcnn_resnet50_fpn")
    assert spec.categories == (Category(3, "cat", -1), Category(7, "dog", -1))
    assert (spec.version, spec.runtime, spec.num_classes, spec.serving) == ("1.0", "torch", None, Serving())


def test_every_key_of_a_spec_can_be_written(tmp_path):
    spec = load_spec(
        write(
            tmp_path,
            """
            name: all
            family: yolox
            runtime: onnx
            version: "2.1"
            builder_options: {min_size: 320}
            num_classes: 2
            norm_eps: 0.0
            weights: a/b.onnx
            golden_image: dog.jpg
            preprocessing: {size: [640, 512], channel_order: rgb, pad_value: 0, scale: 0.5, mean: [1, 2, 3]}
            decoding: {strides: [8, 16], nms_iou: 0.5}
            serving: {score_threshold: 0.3, workers: 2, device: cpu, golden_check: warn, tf32: true}
            description: größer
            license: MIT
            source: {file: a.pth, sha256: abc}
            categories: [{id: 1, name: cat, model_label: 5}]
            """,
        )
    )
    assert spec.preprocessing == Preprocessing((640, 512), "rgb", 0.0, 0.5, (1.0, 2.0, 3.0))
    assert spec.decoding == Decoding((8, 16), 0.5)
    assert spec.serving == Serving(score_threshold=0.3, workers=2, device="cpu", golden_check="warn", tf32=True)
    assert spec.categories == (Category(1, "cat", 5),)
    assert (spec.norm_eps, spec.description, spec.source) == (0.0, "größer", Source("a.pth", "abc"))


@pytest.mark.parametrize(
    ("changes", "key", "suggestion"),
    [
        ({"famly": "torchvision"}, "famly", "family"),
        ({"serving": {"score_treshold": 0.3}}, "serving.score_treshold", "score_threshold"),
        ({"preprocessing": {"sizes": [416, 416]}}, "preprocessing.sizes", "size"),
        ({"decoding": {"nms_threshold": 0.5}}, "decoding.nms_threshold", None),
        ({"categories": [{"id": 1, "nme": "cat"}]}, "categories.0.nme", "name"),
        ({"categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog", "colour": "red"}]}, "1.colour", None),
    ],
)
def test_an_unknown_key_is_named_with_what_is_allowed(tmp_path, changes, key, suggestion):
    message = refusal(tmp_path, changes)
    assert "model.yaml" in message
    assert f"{key}'" in message
    assert "unknown key" in message
    assert "Allowed here: " in message
    if suggestion:
        assert f"Did you mean {suggestion!r}?" in message
        assert suggestion in message.partition("Allowed here: ")[2]


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"name": 5}, "name: got 5,.*string"),
        ({"version": 1.0}, r"version: got 1\.0,.*string\. Put it in quotes\."),
        ({"num_classes": "many"}, "num_classes: got 'many',.*integer"),
        ({"builder_options": ["min_size"]}, r"builder_options: got \['min_size'\],.*object"),
        ({"serving": {"batch_size": "eight"}}, "serving.batch_size: got 'eight',.*integer"),
        ({"serving": {"batch_size": 2.5}}, "serving.batch_size: got 2.5,.*integer"),
        ({"serving": {"workers": True}}, "serving.workers: got True,"),
        ({"serving": {"score_threshold": "0.3"}}, "serving.score_threshold: got '0.3',.*number"),
        ({"serving": {"channels_last": "yes"}}, "serving.channels_last: got 'yes',.*bool"),
        ({"serving": {"precision": "int8"}}, "serving.precision: got 'int8',.*'fp32', 'fp16' or 'bf16'"),
        ({"serving": "fast"}, "serving: got 'fast'"),
        ({"runtime": "tensorrt"}, "runtime: got 'tensorrt',.*'torch' or 'onnx'"),
        ({"preprocessing": {"size": [416]}}, r"preprocessing\.size"),
        ({"preprocessing": {"channel_order": "BGR"}}, "preprocessing.channel_order: got 'BGR',.*'bgr' or 'rgb'"),
        ({"builder_options": {"a": datetime.date(2026, 1, 2)}, "name": 1}, "name: got 1"),
        ({datetime.date(2026, 1, 2): 1}, "JSON cannot hold"),
        ({"categories": {"cat": 1}}, "categories: got .*expected a list"),
        ({"categories": []}, "categories: got .*expected a list"),
        ({"categories": ["cat", "dog"]}, r"categories\.0: got 'cat'"),
        ({"categories": [{"id": "one", "name": "cat"}]}, r"categories\.0\.id: got 'one',.*integer"),
        ({"categories": [{"name": "cat"}]}, r"categories\.0\.id: missing"),
    ],
)
def test_a_wrong_type_is_named(tmp_path, changes, wanted):
    assert re.search(wanted, refusal(tmp_path, changes)), refusal(tmp_path, changes)


def test_a_whole_number_is_a_number(tmp_path):
    spec = load_spec(write(tmp_path, yaml.safe_dump({**GOOD, "serving": {"score_threshold": 0}})))
    assert spec.serving.score_threshold == 0.0
    assert isinstance(spec.serving.score_threshold, float)


@pytest.mark.parametrize("key", ["name", "family", "categories"])
def test_a_missing_key_is_named(tmp_path, key):
    with pytest.raises(SpecError, match=f"{key}: missing"):
        load_spec(write(tmp_path, yaml.safe_dump({name: value for name, value in GOOD.items() if name != key})))


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("name: a\nname: b\n", "name"),
        ("name: a\nserving:\n  workers: 1\n  workers: 2\n", "workers"),
        ("name: a\ncategories:\n  - {id: 1, name: x, id: 2}\n", "id"),
    ],
)
def test_a_key_that_stands_twice_is_refused_with_its_line(tmp_path, text, key):
    with pytest.raises(SpecError, match=rf"the key '{key}' twice[\s\S]*line \d"):
        load_spec(write(tmp_path, text))


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", "got NoneType"),
        ("- a\n- b\n", "got list"),
        ("just words\n", "got str"),
        ("name: [unclosed\n", "not YAML"),
        ("name: a\n\tfamily: b\n", "not YAML"),
        ("name: &a [*a]\n", "JSON cannot hold|missing|recurs"),
        ("{[a, b]: c}\n", "not YAML"),
        ("a: &a [*a]\n? *a\n: b\n", "not YAML"),
    ],
)
def test_what_is_no_mapping_is_refused(tmp_path, text, wanted):
    with pytest.raises(SpecError, match=wanted):
        load_spec(write(tmp_path, text))


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.system", "!!python/name:os.system", "!!python/module:os"])
def test_a_python_tag_is_refused_and_not_obeyed(tmp_path, tag):
    marker = tmp_path / "marker"
    value = f'{tag} ["touch {marker}"]' if "apply" in tag else f"{tag} ''"
    with pytest.raises(SpecError, match="python/"):
        load_spec(write(tmp_path, f"name: {value}\n"))
    assert not marker.exists()


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(SpecError, match=r"nowhere\.yaml: cannot be read"):
        load_spec(tmp_path / "nowhere.yaml")
    with pytest.raises(SpecError, match="cannot be read"):
        load_spec(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00name")
    with pytest.raises(SpecError, match="cannot be read"):
        load_spec(tmp_path / "binary.yaml")


def test_categories_may_be_a_coco_file_beside_the_spec(tmp_path):
    coco = {"categories": [{"id": 9, "name": "tram", "supercategory": "vehicle"}], "images": []}
    (tmp_path / "coco.json").write_text(json.dumps(coco))
    spec = load_spec(write(tmp_path, yaml.safe_dump({**GOOD, "categories": "coco.json"})))
    assert spec.categories == (Category(9, "tram", -1),)
    message = refusal(tmp_path, {"categories": "missing.json"})
    assert "missing.json" in message


@pytest.mark.parametrize(
    ("second", "wanted"),
    [({"id": 3, "name": "dog"}, "categories: got id 3 twice"), ({"id": 4, "name": "cat"}, "got name 'cat' twice")],
)
def test_a_category_that_stands_twice_is_refused(tmp_path, second, wanted):
    assert wanted in refusal(tmp_path, {"categories": [{"id": 3, "name": "cat"}, second]})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("score_threshold", 1.1),
        ("score_threshold", -0.1),
        ("score_threshold", float("nan")),
        ("min_score_threshold", 2),
        ("max_detections", 0),
        ("max_detections", 1001),
        ("batch_size", -1),
        ("max_batch_delay_ms", 0),
        ("workers", 65),
        ("response_timeout_s", 0),
        ("startup_timeout_s", 0),
        ("threads", -1),
        ("max_image_pixels", 0),
        ("min_image_side", 0),
    ],
)
def test_a_number_out_of_range_is_named_with_its_range(tmp_path, key, value):
    assert re.search(
        rf"serving\.{key}: got {value}(\.0)?, expected \d+ to \d+", refusal(tmp_path, {"serving": {key: value}})
    )


def test_the_threshold_is_not_below_its_floor(tmp_path):
    message = refusal(tmp_path, {"serving": {"score_threshold": 0.1, "min_score_threshold": 0.2}})
    assert "serving.score_threshold: got 0.1, expected at least min_score_threshold 0.2" in message


@pytest.mark.parametrize("name", ["", "../up", "a/b", "a b", "-a", ".hidden", "ä", "a\nb"])
def test_a_name_is_what_a_url_and_a_file_can_hold(tmp_path, name):
    assert "name: got" in refusal(tmp_path, {"name": name})


@pytest.mark.parametrize("version", ["", "v1", "1.", "1.0-beta", "1..2"])
def test_a_version_is_numbers_with_dots(tmp_path, version):
    assert f"version: got {version!r}" in refusal(tmp_path, {"version": version})


def test_an_unknown_family_is_named_with_the_known_ones(tmp_path):
    message = refusal(tmp_path, {"family": "detr"})
    assert "family: got 'detr', expected one of fastestdet, mmdet, mmdet_onnx, torchvision, ultraface, yolox" in message


def test_an_override_replaces_merges_and_checks():
    spec = parse_spec(GOOD | {"builder_options": {"min_size": 1, "max_size": 2}}, where="test", folder=Path())
    assert override_spec(spec, {}, where="test") is spec
    changed = override_spec(
        spec,
        {"name": "other", "serving": {"workers": 3}, "builder_options": {"min_size": 9}, "num_classes": 4},
        where="test",
    )
    assert (changed.name, changed.num_classes, changed.serving.workers) == ("other", 4, 3)
    assert changed.builder_options == {"min_size": 9, "max_size": 2}
    assert changed.serving.score_threshold == spec.serving.score_threshold
    assert changed.categories == spec.categories
    for wrong, wanted in (
        ({"serving": {"wokers": 3}}, "wokers"),
        ({"serving": {"workers": -1}}, "serving.workers"),
        ({"name": "a/b"}, "name"),
        ({"nme": "x"}, "nme"),
    ):
        with pytest.raises(SpecError, match=f"^command line: .*{wanted}"):
            override_spec(spec, wrong, where="command line")


@pytest.mark.parametrize(
    "spec",
    [
        Spec("plain", "torchvision", (Category(1, "cat", -1),)),
        Spec("labels", "torchvision", (Category(1, "cat", 0), Category(90, "größer: #1", 4)), version="2"),
        Spec(
            "all",
            "yolox",
            (Category(1, "no", -1), Category(2, "1.0", -1)),
            version="1.10",
            runtime="onnx",
            builder="b",
            builder_options={"min_size": 320, "anchors": [1, 2]},
            num_classes=91,
            norm_eps=0.0,
            weights="w w.onnx",
            golden_image="g.jpg",
            preprocessing=Preprocessing((640, 512), "rgb", 0.0, 1 / 255, (0.5, 0.25, 0.125), (1.0, 2.0, 3.0)),
            decoding=Decoding((8, 16), 0.5),
            serving=Serving(score_threshold=0.3, workers=2, golden_check="off", tf32=True),
            description="yes: 'no'",
            license="MIT",
            source=Source("a.pth", "0" * 64),
        ),
    ],
    ids=lambda spec: spec.name,
)
def test_a_dumped_spec_is_read_back_equal(tmp_path, spec):
    path = tmp_path / "new folder" / "spec.yaml"
    dump_spec(spec, path)
    assert load_spec(path) == spec


def test_a_dumped_spec_leaves_out_the_defaults(tmp_path):
    path = tmp_path / "spec.yaml"
    dump_spec(Spec("plain", "torchvision", (Category(1, "cat", -1),), serving=Serving(workers=2)), path)
    assert yaml.safe_load(path.read_text()) == {
        "name": "plain",
        "family": "torchvision",
        "categories": [{"id": 1, "name": "cat"}],
        "version": "1.0",
        "serving": {"workers": 2},
    }


def test_a_spec_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SpecError, match="cannot be written"):
        dump_spec(Spec("a", "torchvision", (Category(1, "cat", -1),)), tmp_path / "file" / "spec.yaml")


def test_a_packed_spec_is_read_back_equal_from_json():
    spec = parse_spec(GOOD, where="test", folder=Path())
    again = Spec.from_json(json.loads(json.dumps(spec.to_json())), spec.categories)
    assert dataclasses.asdict(again) == dataclasses.asdict(spec)


@pytest.mark.parametrize(
    "path", sorted(Path(__file__).parents[2].glob("model_store/*/*.yaml")), ids=lambda path: path.stem
)
def test_the_specs_of_the_model_store_are_good(path):
    assert load_spec(path).name == path.parent.name
