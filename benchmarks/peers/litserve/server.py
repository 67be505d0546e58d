"""LitServe, as its documentation shows: a LitAPI with batching; the image comes as a form's file.

Run: python server.py PORT
"""

import os
import sys

import litserve
from detections import detect, load_model, read_image


class Detector(litserve.LitAPI):
    """decode_request and encode_response work on one request, predict on the batch."""

    def setup(self, device):
        self.model = load_model().to(device)

    def decode_request(self, request):
        return read_image(request["image"].file.read())

    def batch(self, inputs):
        return inputs  # images of different sizes: torchvision's model takes a list

    def predict(self, images):
        return detect(self.model, images)

    def unbatch(self, output):
        return output

    def encode_response(self, output):
        return output


if __name__ == "__main__":
    api = Detector(max_batch_size=8, batch_timeout=0.005)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=int(os.environ.get("PEERS_WORKERS", "1")))
    server.run(host="127.0.0.1", port=int(sys.argv[1]), generate_client_file=False, log_level="warning")
