"""What TorchServe hands over for one request, taken apart: the image's bytes, and the options beside it.

body = image bytes (curl -T) · form fields (curl -F data=@…) · JSON {"data": base64, option: value, …}
options: query parameters, form fields, JSON keys, gRPC input entries, or one header in the form of a query

TorchServe 0.12 drops the query of /predictions/NAME before the worker could see it; /NAME/predict and
/NAME/VERSION/predict pass theirs on, and the header works everywhere.
"""

import base64
import binascii
import urllib.parse
from collections.abc import Mapping
from typing import Any

from dethandlers.errors import ImageError, OptionError

IMAGE_FIELDS = ("data", "body", "image")
OPTIONS_HEADER = "X-Detserve-Options"
# What TorchServe's own routes add to a request's fields.
_ROUTING_FIELDS = frozenset({"model_name", "model_version"})


def split_row(row: Mapping[str, Any], header: str = "") -> tuple[bytes, dict[str, Any]]:
    """Split one request into the encoded image and its options, both still unchecked.

    Args:
        row: parameter name to value, as TorchServe's worker makes it.
        header: the options header, ``score_threshold=0.3&masks=rle``.

    Raises:
        ImageError: no image in it, several, or base64 that is none.
        OptionError: a JSON body that is no object, or an option given twice.
    """
    fields: dict[str, Any] = {}
    for name, value in row.items():
        if name in _ROUTING_FIELDS:
            continue
        if name == "body" and isinstance(value, dict | list):
            _merge_json(fields, value)
        elif name in fields:
            raise _twice(name)
        else:
            fields[name] = value
    for name, value in urllib.parse.parse_qsl(header, keep_blank_values=True):
        if name in fields or name in IMAGE_FIELDS:
            raise _twice(name)
        fields[name] = value
    present = [name for name in IMAGE_FIELDS if name in fields]
    if not present:
        raise ImageError(
            "got no image, expected its bytes as the body, a form field 'data', or JSON {\"data\": base64}. "
            "Send the file itself, for instance with curl -T FILE.",
            type="empty_body",
        )
    if len(present) > 1:
        raise ImageError(f"got several images ({', '.join(present)}), expected one. Send one image a request.")
    image = _image_bytes(fields.pop(present[0]))
    return image, fields


def _merge_json(fields: dict[str, Any], value: Any) -> None:
    if not isinstance(value, dict):
        raise OptionError('got a JSON list, expected one object such as {"data": "<base64>", "score_threshold": 0.3}.')
    for name, item in value.items():
        if name in fields:
            raise _twice(name)
        fields[name] = item


def _twice(name: str) -> OptionError:
    return OptionError(f"{name}: got it twice (query, header, form or JSON). Send it once.")


def _image_bytes(value: Any) -> bytes:
    if isinstance(value, bytes | bytearray):
        return bytes(value)
    if not isinstance(value, str):
        raise ImageError(f"got an image of type {type(value).__name__}, expected base64 text or the file's bytes.")
    text = value.partition(",")[2] if value.startswith("data:") else value
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImageError(
            f"got text that begins with {value[:20]!r}, expected an image or its base64. "
            "Send the file itself, for instance with curl -T FILE.",
            type="not_an_image",
            code=415,
        ) from error
