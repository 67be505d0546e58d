"""A request's options: read from any form they come in, or refused with the option's name and what is allowed."""

import pytest
from dethandlers.detections import Category
from dethandlers.errors import OptionError
from dethandlers.options import MAX_DETECTIONS_LIMIT, OPTION_NAMES, Options, parse_options
from dethandlers.spec import Serving

CATEGORIES = (Category(3, "circle", 1), Category(7, "big square", 2), Category(9, "star", 4))
SERVING = Serving(score_threshold=0.25, max_detections=40)
EVERYTHING = frozenset({"masks", "keypoints"})
WORDS = {"true": True, "1": True, "yes": True, "TRUE": True, "false": False, "0": False, "no": False}


def parse(values, *, serving=SERVING, capabilities=EVERYTHING):
    return parse_options(values, serving, CATEGORIES, capabilities)


def refused(values, **settings):
    with pytest.raises(OptionError) as caught:
        parse(values, **settings)
    assert caught.value.code == 400
    return caught.value


def test_without_options_the_spec_s_values_hold():
    assert parse({}) == Options(score_threshold=0.25, max_detections=40)
    assert parse({}).labels is None
    assert parse({}).format == "list"


@pytest.mark.parametrize(
    ("name", "values", "attribute", "expected"),
    [
        ("score_threshold", ["0.5", b"0.5", bytearray(b"0.5"), 0.5, " 5e-1 "], "score_threshold", 0.5),
        ("score_threshold", ["0", b"0.0", 0, 0.0], "score_threshold", 0.0),
        ("score_threshold", ["1", b"1.0", 1], "score_threshold", 1.0),
        ("max_detections", ["7", b"7", 7, 7.0, "7.0"], "max_detections", 7),
        ("max_detections", ["1000", 1000], "max_detections", MAX_DETECTIONS_LIMIT),
        ("classes", ["star,circle", b"star,circle", " circle , star ", ["circle", "star"]], "labels", {0, 2}),
        ("classes", ["big square", ["big square"]], "labels", {1}),
        ("format", ["coco", b"coco"], "format", "coco"),
        ("format", ["columns"], "format", "columns"),
        ("masks", ["rle", b"rle"], "masks", True),
        ("masks", ["none", b"none"], "masks", False),
    ],
)
def test_an_option_is_read_from_text_bytes_and_json(name, values, attribute, expected):
    for value in values:
        got = getattr(parse({name: value}), attribute)
        assert got == expected
        assert type(got) is type(expected) or isinstance(got, frozenset)


@pytest.mark.parametrize("name", ["keypoints", "category_id", "timings"])
def test_a_flag_is_read_from_words_and_from_json(name):
    for word, expected in WORDS.items():
        assert getattr(parse({name: word}), name) is expected
        assert getattr(parse({name: word.encode()}), name) is expected
    assert getattr(parse({name: True}), name) is True
    assert getattr(parse({name: False}), name) is False


def test_every_option_is_covered_by_these_tests():
    assert frozenset(Options.__dataclass_fields__) - {"labels"} | {"classes"} == OPTION_NAMES


def test_a_request_s_threshold_stays_at_or_above_the_spec_s_floor():
    serving = Serving(score_threshold=0.05, min_score_threshold=0.1)
    assert parse({"score_threshold": "0.01"}, serving=serving).score_threshold == 0.1
    assert parse({}, serving=serving).score_threshold == 0.1
    assert parse({"score_threshold": "0.3"}, serving=serving).score_threshold == 0.3


@pytest.mark.parametrize(("name", "meant"), [("treshold", "score_threshold"), ("class", "classes"), ("mask", "masks")])
def test_an_unknown_option_is_refused_with_the_one_that_was_meant(name, meant):
    error = refused({name: "1"})
    assert error.type == "unknown_option"
    assert f"unknown option {name!r}; did you mean {meant!r}?" in error.message
    for option in OPTION_NAMES:
        assert option in error.message


def test_an_unknown_option_far_from_all_is_refused_with_the_list_alone():
    error = refused({"zzzz": "1"})
    assert error.message.startswith("unknown option 'zzzz'. Allowed: category_id, classes, format")
    assert "did you mean" not in error.message


@pytest.mark.parametrize(
    "value",
    [
        "abc",
        "",
        "nan",
        "inf",
        "-inf",
        "-0.01",
        "1.01",
        1.5,
        -1,
        True,
        False,
        None,
        [0.5],
        {},
        float("nan"),
        10**400,
        b"\xff\xfe",
        "0,5",
        10**4000,
    ],
)
def test_a_malformed_threshold_is_refused_with_what_is_allowed(value):
    error = refused({"score_threshold": value})
    assert error.type == "invalid_option"
    assert error.message.startswith("score_threshold: got ")
    assert "expected a number from 0 to 1" in error.message
    assert len(error.message) < 250


@pytest.mark.parametrize("value", ["abc", "0", 0, -3, "1.5", 2.5, 1001, "1001", True, None, "inf", "nan", 10**400])
def test_a_malformed_count_is_refused_with_what_is_allowed(value):
    error = refused({"max_detections": value})
    assert error.type == "invalid_option"
    assert "expected a whole number from 1 to 1000" in error.message


@pytest.mark.parametrize("name", ["keypoints", "category_id", "timings"])
@pytest.mark.parametrize("value", ["maybe", "", 1, 0, None, [True]])
def test_a_malformed_flag_is_refused(name, value):
    assert f"{name}: got " in refused({name: value}).message
    assert "expected true or false" in refused({name: value}).message


@pytest.mark.parametrize("value", ["xml", "", "LIST", None, 1, ["list"]])
def test_an_unknown_format_is_refused(value):
    assert "expected list, coco or columns" in refused({"format": value}).message


@pytest.mark.parametrize("value", ["polygon", "true", True, 1, None, ["rle"], {}])
def test_an_unknown_form_of_masks_is_refused(value):
    assert "expected rle or none" in refused({"masks": value}).message


@pytest.mark.parametrize(("value", "close"), [("cirle", "circle"), ("Star", "star"), (["bigsquare"], "big square")])
def test_an_unknown_class_is_refused_with_a_close_name(value, close):
    message = refused({"classes": value}).message
    assert "which this model does not know" in message
    assert close in message


def test_an_unknown_class_far_from_all_is_refused_with_the_names_there_are():
    assert "such as circle, big square, star" in refused({"classes": "zzzz,circle"}).message
    assert "got ''" in refused({"classes": ""}).message
    assert "got ''" in refused({"classes": "circle,"}).message


@pytest.mark.parametrize("value", [3, True, None, {"circle": 1}, ["circle", 3], [["circle"]]])
def test_classes_that_are_no_names_are_refused(value):
    assert "expected class names separated by commas" in refused({"classes": value}).message


@pytest.mark.parametrize(("name", "value"), [("masks", "rle"), ("keypoints", "true")])
def test_what_the_model_does_not_have_is_refused(name, value):
    assert f"{name} were asked for, but this model has none" in refused({name: value}, capabilities=frozenset()).message
    assert f"{name} were asked for" in refused({name: value}, capabilities=EVERYTHING - {name}).message


def test_declining_what_the_model_does_not_have_is_allowed():
    assert parse({"masks": "none", "keypoints": "false"}, capabilities=frozenset()) == parse({})


def test_a_message_stays_short_whatever_a_client_sends():
    for values in ({"x" * 100_000: "1"}, {"classes": "x" * 100_000}, {"score_threshold": "x" * 100_000}):
        assert len(refused(values).message) < 500
