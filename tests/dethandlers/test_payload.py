"""One request of TorchServe taken apart: the image and the options, from wherever the client put them."""

import base64

import pytest
from dethandlers.errors import ImageError, OptionError
from dethandlers.payload import split_row

IMAGE = bytes(range(256)) * 3
BASE64 = base64.b64encode(IMAGE).decode()


@pytest.mark.parametrize("field", ["body", "data", "image"])
@pytest.mark.parametrize("kind", [bytes, bytearray])
def test_the_image_is_the_body_or_a_form_field(field, kind):
    image, options = split_row({field: kind(IMAGE)})
    assert image == IMAGE
    assert type(image) is bytes
    assert options == {}


def test_query_parameters_and_form_fields_beside_the_image_are_options():
    row = {"score_threshold": b"0.3", "data": IMAGE, "classes": b"cat,dog"}
    assert split_row(row) == (IMAGE, {"score_threshold": b"0.3", "classes": b"cat,dog"})


@pytest.mark.parametrize("field", ["data", "body", "image"])
def test_a_json_object_holds_the_image_as_base64_and_options_as_json_values(field):
    body = {field: BASE64, "score_threshold": 0.3, "classes": ["cat"], "timings": True}
    assert split_row({"body": body}) == (IMAGE, {"score_threshold": 0.3, "classes": ["cat"], "timings": True})


@pytest.mark.parametrize(
    "text",
    [
        f"data:image/jpeg;base64,{BASE64}",
        "\n".join(BASE64[start : start + 76] for start in range(0, len(BASE64), 76)) + "\r\n",
    ],
)
def test_base64_may_be_a_data_uri_or_broken_into_lines(text):
    assert split_row({"body": {"data": text}})[0] == IMAGE


def test_a_json_text_alone_is_the_image_as_base64():
    assert split_row({"body": BASE64})[0] == IMAGE


def test_options_may_come_in_one_header_in_the_form_of_a_query():
    header = "score_threshold=0.3&classes=cat%2Cbig%20dog&masks="
    assert split_row({"body": IMAGE}, header) == (
        IMAGE,
        {"score_threshold": "0.3", "classes": "cat,big dog", "masks": ""},
    )


def test_torchserve_s_routing_fields_are_no_options():
    row = {"model_name": b"shapes", "model_version": b"1.0", "body": IMAGE, "masks": b"rle"}
    assert split_row(row) == (IMAGE, {"masks": b"rle"})


@pytest.mark.parametrize(
    ("row", "header"),
    [
        ({"score_threshold": b"0.3", "body": {"data": BASE64, "score_threshold": 0.3}}, ""),
        ({"body": {"data": BASE64, "score_threshold": 0.3}, "score_threshold": b"0.3"}, ""),
        ({"body": IMAGE, "score_threshold": b"0.3"}, "score_threshold=0.3"),
        ({"body": {"data": BASE64, "score_threshold": 0.3}}, "score_threshold=0.3"),
        ({"body": IMAGE}, "score_threshold=0.3&score_threshold=0.4"),
    ],
)
def test_an_option_given_twice_is_refused(row, header):
    with pytest.raises(OptionError, match="score_threshold: got it twice") as caught:
        split_row(row, header)
    assert caught.value.code == 400


def test_an_image_in_the_header_is_refused():
    with pytest.raises(OptionError, match="data: got it twice"):
        split_row({"body": IMAGE}, f"data={BASE64}")


@pytest.mark.parametrize(
    "row", [{}, {"score_threshold": b"0.3"}, {"body": {}}, {"body": {"img": BASE64}}, {"model_name": b"x"}]
)
def test_a_request_without_an_image_is_refused(row):
    with pytest.raises(ImageError, match="got no image") as caught:
        split_row(row)
    assert (caught.value.code, caught.value.type) == (400, "empty_body")


@pytest.mark.parametrize(
    "row",
    [
        {"body": IMAGE, "data": IMAGE},
        {"body": {"data": BASE64, "image": BASE64}},
        {"data": IMAGE, "body": {"image": BASE64}},
    ],
)
def test_a_request_with_two_images_is_refused(row):
    with pytest.raises(ImageError, match=r"got several images .*, expected one"):
        split_row(row)


@pytest.mark.parametrize("body", [[], [1, 2], [{"data": BASE64}]])
def test_a_json_list_is_refused_with_the_form_that_is_expected(body):
    with pytest.raises(OptionError, match=r"got a JSON list, expected one object such as \{\"data\""):
        split_row({"body": body})


@pytest.mark.parametrize(
    ("value", "kind"), [(5, "int"), (None, "NoneType"), (1.5, "float"), (True, "bool"), ([1], "list"), ({}, "dict")]
)
def test_an_image_of_another_type_is_refused_with_its_type(value, kind):
    with pytest.raises(ImageError, match=f"got an image of type {kind}, expected base64"):
        split_row({"body": {"data": value}})


@pytest.mark.parametrize("value", [5, None, 1.5, True])
def test_a_json_body_that_is_no_container_is_refused(value):
    with pytest.raises(ImageError, match="got an image of type"):
        split_row({"body": value})


@pytest.mark.parametrize("text", ["not base64!", "a", "Bild für alle", "data:image/png;base64,%%%", "abc=d"])
def test_text_that_is_no_base64_is_refused_as_no_image(text):
    with pytest.raises(ImageError, match="got text that begins with") as caught:
        split_row({"body": {"data": text}})
    assert (caught.value.code, caught.value.type) == (415, "not_an_image")


@pytest.mark.parametrize("text", ["", "data:image/png;base64,", "data:nonsense"])
def test_empty_text_is_an_empty_image_which_decoding_then_refuses(text):
    assert split_row({"body": {"data": text}})[0] == b""
