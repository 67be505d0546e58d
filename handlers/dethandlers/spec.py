"""The spec: the strict description of a model, as it stands in the model store (YAML) and in the archive (JSON).

The dataclasses are plain, so that the worker reads them with this package alone; detserve.spec validates the very same
classes strictly (pydantic reads `__pydantic_config__`), so that there is one definition.

    model_store/NAME/NAME.yaml ──detserve.spec.load_spec──► Spec ──archive──► spec.json + category_map.json ──► worker
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from dethandlers.detections import Category

STRICT: dict[str, Any] = {"extra": "forbid", "str_strip_whitespace": True}

Precision = Literal["fp32", "fp16", "bf16"]


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes the network's input, for models that do not bring their own transform: ONNX files.

    Attributes:
        size: ``[height, width]`` of the input in pixels, for ``letterbox`` and ``stretch``.
        channel_order: ``bgr`` or ``rgb``.
        pad_value: grey level (0..255) right of and below the resized image.
        scale: factor on the 0..255 pixel values, before mean and std.
        mean: subtracted per channel, in the channel order of the input, after ``scale``.
        std: divisor per channel.
        resize: ``letterbox`` keeps the aspect ratio and pads to ``size``; ``stretch`` fills ``size``; ``shorter_side``
            brings the shorter side to its length unless the longer one would pass its own, and pads with zeros after
            the normalisation to multiples of ``divisor`` (torchvision's transform); ``fit`` does so too, but rounds
            the sides to the nearest pixel (MMDetection's ``Resize``).
        shorter_side: wanted length of the shorter side, px.
        longer_side: most that the longer side may have, px.
        divisor: of the padded sides, px.
        pad_to: with ``fit``, to what the resized image is padded with ``pad_value`` before the normalisation: ``size``
            at least, or a ``square`` of its longer side.
        interpolation: bilinear in ``float``, or in OpenCV's whole numbers for ``eight_bit`` images; for MMDetection.
    """

    size: tuple[int, int] = (416, 416)
    channel_order: Literal["bgr", "rgb"] = "bgr"
    pad_value: float = 114.0
    scale: float = 1.0
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    resize: Literal["letterbox", "stretch", "shorter_side", "fit"] = "letterbox"
    shorter_side: int = 800
    longer_side: int = 1333
    divisor: int = 32
    pad_to: Literal["none", "size", "square"] = "none"
    interpolation: Literal["float", "eight_bit"] = "float"

    __pydantic_config__ = STRICT


@dataclass(frozen=True)
class Decoding:
    """How the raw output becomes detections, for networks that do not do it themselves: ONNX files.

    Attributes:
        strides: pixels per grid cell of each level, in the order of the output.
        nms_iou: boxes of one class that overlap a better one by more than this are dropped.
        nms: where that happens: in the detector (``host``), or inside the file (``graph``).
        head: what MMDetection's head does with its maps, as `dethandlers.mmdet_decoding` reads it; written by
            ``export``, empty for other families.
    """

    strides: tuple[int, ...] = (8, 16, 32)
    nms_iou: float = 0.65
    nms: Literal["host", "graph"] = "host"
    head: dict[str, Any] = field(default_factory=dict)

    __pydantic_config__ = STRICT


@dataclass(frozen=True)
class Serving:
    """Defaults of a request, and how the worker runs.

    Attributes:
        score_threshold: used when a request names none.
        min_score_threshold: floor under every request's threshold.
        max_detections: most detections per image when a request names no number.
        batch_size: most requests in one batch; 0 leaves it to the server: 1 on a CPU, 8 on a GPU.
        max_batch_delay_ms: how long TorchServe waits for a batch to fill (it always waits this long when it does not).
        workers: worker processes per model; 0 leaves it to the server: one for each core, or each GPU.
        response_timeout_s: a batch that takes longer kills the worker.
        startup_timeout_s: a worker that takes longer to load is given up.
        device: ``auto`` takes the GPU that TorchServe assigns, or the CPU when it assigns none.
        precision: of the forward pass; ``fp16`` and ``bf16`` run under autocast.
        channels_last: memory layout of the network and its input.
        tf32: allow TensorFloat-32 in matrix products and convolutions on the GPU.
        deterministic: same bits for the same image whatever shares its batch (one image a forward pass).
        jpeg_decoder: ``cpu``, or ``gpu``: nvJPEG, whose colours differ where a JPEG halves them (4:2:0), by 2.6 grey
            levels on average on an H200 (benchmarks/RESULTS.md): enough to move boxes by pixels.
        threads: intra-op threads of a worker; 0 leaves it to the server, which shares the cores out among the workers.
        max_image_pixels: larger images are refused before they are decoded.
        min_image_side: smaller images are refused, in pixels.
        max_decode_s: decoding one image is given up after this time.
        max_response_bytes: a longer answer is refused, before TorchServe does so (at 6,553,500 unless it is told
            otherwise), which would cost the worker.
        golden_check: what a worker does whose detections on the golden image drifted: ``fail``, ``warn`` or ``off``.
    """

    score_threshold: float = 0.05
    min_score_threshold: float = 0.0
    max_detections: int = 100
    batch_size: int = 0
    max_batch_delay_ms: int = 5
    workers: int = 0
    response_timeout_s: int = 120
    startup_timeout_s: int = 300
    device: Literal["auto", "cpu", "gpu"] = "auto"
    precision: Precision = "fp32"
    channels_last: bool = False
    tf32: bool = False
    deterministic: bool = False
    jpeg_decoder: Literal["cpu", "gpu"] = "cpu"
    threads: int = 0
    max_image_pixels: int = 64_000_000
    min_image_side: int = 8
    max_decode_s: float = 10.0
    max_response_bytes: int = 6_000_000
    golden_check: Literal["fail", "warn", "off"] = "fail"

    __pydantic_config__ = STRICT


@dataclass(frozen=True)
class Accuracy:
    """What the model is known to reach; ``verify`` with labelled images holds it to that.

    Attributes:
        ap: COCO AP over IoU .50:.95, in 0..1.
        data: the labelled images that it was measured on, for people.
    """

    ap: float
    data: str = ""

    __pydantic_config__ = STRICT


@dataclass(frozen=True)
class Source:
    """Where the weights came from: the file's name and its SHA-256."""

    file: str
    sha256: str

    __pydantic_config__ = STRICT


@dataclass(frozen=True)
class Spec:
    """A model: what it is, what it knows, how it is served.

    Attributes:
        name: the name in the URL.
        family: a key of ``dethandlers.families.FAMILIES``.
        categories: the category map; a category's place is its 0-based label.
        version: TorchServe's model version.
        runtime: a key of ``dethandlers.runtimes.RUNTIMES``.
        builder: the family's model builder (torchvision: ``fasterrcnn_resnet50_fpn``, …); empty where there is none.
        builder_options: keyword arguments of the builder.
        num_classes: the builder's ``num_classes``; None takes it from the checkpoint.
        norm_eps: epsilon of frozen batch norms (0.0 when training began from torchvision's COCO_V1); None leaves it.
        config: the framework's own configuration, relative to the spec (mmdet).
        modules: files and packages of the user's own that ``config`` imports, relative to the spec (mmdet).
        weights: file with the weights, relative to the spec.
        golden_image: image whose eager detections are packed along and checked when the worker starts.
        preprocessing: for models without a transform of their own: ONNX files.
        decoding: for networks that do not put out detections: ONNX files.
        serving: request defaults and worker settings.
        description: one sentence for people.
        license: licence of the weights.
        accuracy: the declared AP; None when nothing is declared.
        source: set by ``archive``: the checkpoint that was packed.
    """

    name: str
    family: str
    categories: tuple[Category, ...]
    version: str = "1.0"
    runtime: Literal["torch", "onnx"] = "torch"
    builder: str = ""
    builder_options: dict[str, Any] = field(default_factory=dict)
    num_classes: int | None = None
    norm_eps: float | None = None
    config: str = ""
    modules: tuple[str, ...] = ()
    weights: str = ""
    golden_image: str = ""
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    decoding: Decoding = field(default_factory=Decoding)
    serving: Serving = field(default_factory=Serving)
    description: str = ""
    license: str = ""
    accuracy: Accuracy | None = None
    source: Source | None = None

    __pydantic_config__ = STRICT

    def to_json(self) -> dict[str, Any]:
        """Return the spec as JSON-ready values, without the category map (a member of its own in the archive)."""
        value = dataclasses.asdict(self)
        del value["categories"]
        return value

    @classmethod
    def from_json(cls, value: dict[str, Any], categories: tuple[Category, ...]) -> "Spec":
        """Build the spec from what ``to_json`` wrote."""
        plain = dict(value)
        nested: dict[str, Any] = {
            "preprocessing": Preprocessing(**_tuples(plain.pop("preprocessing"))),
            "decoding": Decoding(**_tuples(plain.pop("decoding"))),
            "serving": Serving(**plain.pop("serving")),
            "accuracy": Accuracy(**plain["accuracy"]) if plain.get("accuracy") else None,
            "source": Source(**plain["source"]) if plain.get("source") else None,
        }
        plain = _tuples({key: item for key, item in plain.items() if key not in nested})
        return cls(categories=categories, **plain, **nested)


def _tuples(value: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(item) if isinstance(item, list) else item for key, item in value.items()}
