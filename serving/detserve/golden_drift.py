"""Whether the worker's own code reproduces an artefact's golden detections, on this machine's CPU.

A module of its own, since an archive with someone's modules is also asked in a process that has nothing but them.
"""

from dataclasses import replace

import torch
from dethandlers.artefact import Artefact
from dethandlers.detector import Detector


def golden_drift(artefact: Artefact) -> str:
    """Check the golden image in fp32 but for ONNX files, whose precision is their own.

    Returns:
        How what is found differs from eager's detections; empty when it does not.

    Raises:
        DetectorError: the artefact cannot be loaded.
    """
    serving = replace(artefact.spec.serving, device="cpu", jpeg_decoder="cpu", threads=0)
    if artefact.spec.runtime == "torch":
        serving = replace(serving, precision="fp32")
    detector = Detector(replace(artefact, spec=replace(artefact.spec, serving=serving)), torch.device("cpu"))
    try:
        return detector.check_golden()
    finally:
        detector.close()
