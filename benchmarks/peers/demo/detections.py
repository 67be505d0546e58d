"""What the peers' services share: loading the demo model, reading a JPEG, writing the detections."""

import io
import os

import torch
from model import ShapesDetector
from PIL import Image
from torchvision.transforms.functional import to_tensor

WEIGHTS_VARIABLE = "PEERS_WEIGHTS"
CLASS_NAMES = ("circle", "square", "triangle", "star", "ring", "cross")


def load_model():
    """Return the model with the weights that the environment names, ready to answer."""
    model = ShapesDetector()
    model.load_state_dict(torch.load(os.environ[WEIGHTS_VARIABLE], weights_only=True))
    return model.eval()


def read_image(data):
    """Return an encoded image as a ``(3, H, W)`` float tensor in [0, 1]."""
    return to_tensor(Image.open(io.BytesIO(data)).convert("RGB"))


def detect(model, images):
    """Return the detections of a list of tensors, in the response form of detserve."""
    with torch.inference_mode():
        return [_rows(found) for found in model(images)]


def _rows(found):
    rows = zip(found["boxes"].tolist(), found["scores"].tolist(), found["labels"].tolist(), strict=True)
    return [
        {"class_label": label - 1, "class_name": CLASS_NAMES[label - 1], "bbox": box, "score": score}
        for box, score, label in rows
    ]
