"""The demo detector as torchvision's documentation builds one; the file that torch-model-archiver takes as model.py.

TorchServe wants exactly one class here.
"""

from torch import nn
from torchvision.models.detection import ssdlite320_mobilenet_v3_large


class ShapesDetector(nn.Module):
    """torchvision's own model with its own transform and post-processing: images in [0, 1] in, detections out."""

    def __init__(self):
        super().__init__()
        # The threshold and the maximum that our server answers with by default, so that all do the same work.
        self.detector = ssdlite320_mobilenet_v3_large(
            weights=None, weights_backbone=None, num_classes=7, score_thresh=0.05, detections_per_img=100
        )

    def forward(self, images):
        """Take a list of ``(3, H, W)`` tensors, or a stack of them."""
        return self.detector(images)

    def load_state_dict(self, state_dict, strict=True):
        """Take the state dict of torchvision's model itself, as TorchServe's example does."""
        return self.detector.load_state_dict(state_dict, strict)
