"""mosec, as its image example shows: a stage that decodes, in processes of its own, and a batching inference stage.

Run: python server.py --address 127.0.0.1 --port PORT
"""

import io
import os

import numpy as np
from detections import detect, load_model
from mosec import Server, Worker
from PIL import Image
from torchvision.transforms.functional import to_tensor


class Preprocess(Worker):
    """Decodes one image; between the stages it travels as bytes, as small as they get."""

    def deserialize(self, data):
        return data

    def forward(self, data):
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


class Inference(Worker):
    """Detects in a batch; mosec writes each answer as JSON."""

    def __init__(self):
        self.model = load_model()

    def forward(self, images):
        return detect(self.model, [to_tensor(np.array(image)) for image in images])


if __name__ == "__main__":
    server = Server()
    server.append_worker(Preprocess, num=2)
    server.append_worker(Inference, num=int(os.environ.get("PEERS_WORKERS", "1")), max_batch_size=8, max_wait_time=5)
    server.run()
