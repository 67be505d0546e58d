"""Everything that runs inside the TorchServe worker; copied whole into each archive.

    image bytes ─► images.decode ─► preprocess ─► runtime ─► postprocess ─► Detections ─► JSON
                   (one request)    └──────── detector.Detector, for a batch ───────┘

Only torch, torchvision, numpy, pillow and safetensors may be imported here (onnxruntime by its runtime alone), because
an archive must run on a TorchServe that holds nothing of ours.
"""

__version__ = "0.1.0"
