"""The reference for an exported torchvision detector whose checkpoint is not there: the file itself, read plainly.

torchvision's own transform prepares the image and takes boxes, masks and keypoints back; onnxruntime runs the file on
the CPU, one image at a time. Whether the file equals the checkpoint was settled when it was exported; with this
reference, `compare` still proves the serving.
"""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from dethandlers.detections import Detections
from dethandlers.spec import Spec
from torch import Tensor
from torchvision.models.detection.roi_heads import heatmaps_to_keypoints
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import nms

from detserve.eager_image import decode_rgb
from detserve.eager_torchvision import as_detections, best_known
from detserve.errors import CheckpointError, DetserveError, SpecError


class ExportedEager:
    """An exported torchvision detector, run by onnxruntime between torchvision's own transform.

    Raises:
        CheckpointError: onnxruntime cannot load the file.
        DetserveError: onnxruntime is missing.
    """

    def __init__(self, spec: Spec, weights: Path, *, source: str) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise DetserveError("eager needs onnxruntime for an ONNX file. Install detserve[onnx].") from error
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        try:
            self._session = onnxruntime.InferenceSession(
                weights.read_bytes(), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime's exceptions share no root
            raise CheckpointError(
                f"weights {weights.name}: onnxruntime cannot load it ({error}). Export the model again."
            ) from error
        self.provider = str(self._session.get_providers()[0])
        self.categories = spec.categories
        self.source = f"onnxruntime {onnxruntime.__version__} on the CPU behind torchvision's transform, {source}"
        self._spec = spec
        self._label_of = {category.model_label: label for label, category in enumerate(spec.categories)}
        settings = spec.preprocessing
        self._transform = GeneralizedRCNNTransform(
            settings.shorter_side,
            settings.longer_side,
            list(settings.mean),
            list(settings.std),
            size_divisible=settings.divisor,
            fixed_size=(settings.size[1], settings.size[0]) if settings.resize == "stretch" else None,
        ).eval()

    def detect(
        self, image: bytes, score_threshold: float, max_detections: int, *, masks: bool = False, keypoints: bool = False
    ) -> Detections:
        """Find objects in one encoded image.

        Raises:
            DetserveError: it is no image, or the file and the spec disagree.
        """
        pixels = torch.from_numpy(decode_rgb(image)).permute(2, 0, 1).float() / 255.0
        with torch.inference_mode():
            prepared, _ = self._transform([pixels])

            def run(most: int) -> dict[str, Tensor]:
                outputs = self._run(prepared.tensors, prepared.image_sizes, score_threshold, most)
                return self._chosen(outputs, score_threshold, most)

            found = best_known(run, self._label_of, max_detections)
            original = [(int(pixels.shape[-2]), int(pixels.shape[-1]))]
            (found,) = self._transform.postprocess([found], prepared.image_sizes, original)
        return as_detections(found, self._label_of, masks=masks, keypoints=keypoints)

    def _run(
        self, images: Tensor, sizes: list[tuple[int, int]], threshold: float, most: int
    ) -> dict[str, npt.NDArray[np.float32]]:
        given: dict[str, npt.NDArray[Any]] = {
            "image_sizes": np.asarray(sizes, dtype=np.int64),
            "score_threshold": np.asarray(threshold, dtype=np.float32),
            "max_detections": np.asarray(most, dtype=np.int64),
        }
        first, *_ = self._session.get_inputs()
        count = first.shape[0] if isinstance(first.shape[0], int) else 1
        takes = {one.name for one in (*self._session.get_inputs(), *self._session.get_overridable_initializers())}
        feeds: dict[str, npt.NDArray[Any]] = {first.name: np.repeat(images.numpy(), count, axis=0)}
        given["image_sizes"] = np.repeat(given["image_sizes"], count, axis=0)
        feeds |= {name: value for name, value in given.items() if name in takes}
        try:
            outputs = self._session.run(None, feeds)
        except Exception as error:  # as above
            raise SpecError(
                f"the network takes {first.name} {first.shape}, got {tuple(images.shape)}: {error}. Export it again."
            ) from error
        names = [one.name for one in self._session.get_outputs()]
        return {name: output[0] for name, output in zip(names, outputs, strict=True)}

    def _chosen(self, outputs: dict[str, npt.NDArray[np.float32]], threshold: float, most: int) -> dict[str, Tensor]:
        tensors = {name: torch.from_numpy(np.asarray(value)) for name, value in outputs.items()}
        boxes, scores, labels = tensors["boxes"], tensors["scores"], tensors["labels"]
        if self._spec.decoding.nms == "host":
            kept = []
            for label in set(labels.tolist()):
                places = torch.where((labels == label) & (scores >= threshold))[0]
                kept.append(places[nms(boxes[places], scores[places], self._spec.decoding.nms_iou)])
            every = torch.cat(kept) if kept else labels[:0]
            order = every[scores[every].argsort(descending=True, stable=True)][:most]
        else:
            order = torch.arange(int(tensors.get("num_detections", torch.tensor(len(scores)))))
        found = {"boxes": boxes[order], "scores": scores[order], "labels": labels[order]}
        if "masks" in tensors:
            found["masks"] = tensors["masks"]
        if "keypoint_maps" in tensors and len(boxes):
            found["keypoints"], found["keypoints_scores"] = heatmaps_to_keypoints(tensors["keypoint_maps"], boxes)
        return found
