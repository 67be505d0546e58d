"""Random detectors of torchvision's builders and their ONNX exports: made once, for all modules that compare them."""

from dataclasses import dataclass, field
from pathlib import Path

from builder_parity import spec_of
from detserve.export.exporters import ExportOptions
from detserve.export.model import ExportedFile, export_model
from random_detectors import RandomDetector, random_detector, random_images
from safetensors.torch import load_file


@dataclass
class BuilderShelf:
    """A folder with what was made so far; the weights stay on the disk, since twelve detectors are gigabytes."""

    folder: Path
    images: list[bytes] = field(default_factory=random_images)
    _made: dict[str, RandomDetector] = field(default_factory=dict)
    _exported: dict[tuple[str, str], ExportedFile] = field(default_factory=dict)

    def detector(self, builder: str) -> RandomDetector:
        """The builder's random detector, the same for everyone."""
        if builder not in self._made:
            made = random_detector(builder, self.images)
            spec_of(made, builder, self.folder)
            self._made[builder] = RandomDetector(builder, made.options, {}, made.score_threshold)
        known = self._made[builder]
        state = load_file(self.folder / f"{builder}.safetensors")
        return RandomDetector(builder, known.options, state, known.score_threshold)

    def exported(self, builder: str, nms: str) -> ExportedFile:
        """The builder's detector as an fp32 ONNX file, everything dynamic that may be."""
        if (builder, nms) not in self._exported:
            golden = self.folder / "golden.jpg"
            golden.write_bytes(self.images[0])
            self._exported[builder, nms] = export_model(
                spec_of(self.detector(builder), builder, self.folder),
                folder=self.folder,
                out=self.folder / f"{builder}_{nms}.onnx",
                golden_image=golden,
                options=ExportOptions(nms=nms),
            )
        return self._exported[builder, nms]
