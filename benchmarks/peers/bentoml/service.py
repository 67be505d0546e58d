"""BentoML, as its documentation shows: a service with an adaptively batched endpoint that takes images.

Run: bentoml serve service:Detector --host 127.0.0.1 --port PORT
"""

import os

import bentoml
from detections import detect, load_model
from PIL.Image import Image
from torchvision.transforms.functional import to_tensor


@bentoml.service(workers=int(os.environ.get("PEERS_WORKERS", "1")), traffic={"timeout": 60})
class Detector:
    """One worker, BentoML's default, unless told otherwise."""

    def __init__(self):
        self.model = load_model()

    @bentoml.api(batchable=True, max_batch_size=8)
    def detect(self, images: list[Image]) -> list[list[dict]]:
        return detect(self.model, [to_tensor(image.convert("RGB")) for image in images])
