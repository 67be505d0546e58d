"""A detector of coloured squares that is right by construction, and labelled pictures of such squares.

Squares of 8 px stand on the cells of an 8 px grid, on grey. The network is one convolution: a class is certain where
its own channel is bright and the others are dark; nothing is reported anywhere else. Described rightly, its AP is 1.
"""

import json

import numpy as np
from dethandlers.detections import Category
from dethandlers.spec import Accuracy, Decoding, Preprocessing, Serving, Spec
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

HEIGHT, WIDTH, CELL = 64, 96, 8
# In alphabetical order they are no other order that a test is about.
COLOURS = {"ruby": (255, 0, 0), "emerald": (0, 255, 0), "sapphire": (0, 0, 255)}
GREY = (60, 60, 60)
NAMES = tuple(COLOURS)


def write_detector(path, *, background=False, height=HEIGHT, width=WIDTH):
    """Write the network: BGR in 0..255, YOLOX's rows; with ``background`` a class that never comes is the first."""
    classes = len(COLOURS) + background
    weights = np.zeros((5 + classes, 3, CELL, CELL), np.float32)
    bias = np.array([0.5, 0.5, 0, 0, 40] + [-25.6] * classes, np.float32)
    for place, channel in enumerate((2, 1, 0), start=background):
        weights[5 + place] = -0.2 / CELL**2
        weights[5 + place, channel] = 0.2 / CELL**2
    cells = (height // CELL) * (width // CELL)
    constants = {
        "weights": weights,
        "bias": bias,
        "shape": np.array([0, 5 + classes, cells], np.int64),
        "splits": np.array([4, 1 + classes], np.int64),
    }
    nodes = [
        helper.make_node("Conv", ["images", "weights", "bias"], ["maps"], strides=[CELL, CELL]),
        helper.make_node("Reshape", ["maps", "shape"], ["flat"]),
        helper.make_node("Transpose", ["flat"], ["rows"], perm=[0, 2, 1]),
        helper.make_node("Split", ["rows", "splits"], ["boxes", "logits"], axis=2),
        helper.make_node("Sigmoid", ["logits"], ["scores"]),
        helper.make_node("Concat", ["boxes", "scores"], ["raw"], axis=2),
    ]
    graph = helper.make_graph(
        nodes,
        "colour_squares",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, height, width])],
        [helper.make_tensor_value_info("raw", TensorProto.FLOAT, ["batch", cells, 5 + classes])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    path.write_bytes(model.SerializeToString())
    return path


def squares_spec(*, names=NAMES, accuracy=Accuracy(1.0, "squares"), num_classes=None, serving=None, **preprocessing):  # noqa: B008 - frozen
    """Return the right description; changes make it wrong."""
    return Spec(
        name="squares",
        family="yolox",
        categories=tuple(Category(id=NAMES.index(name) + 1, name=name, model_label=-1) for name in names),
        runtime="onnx",
        num_classes=num_classes,
        preprocessing=Preprocessing(**({"size": (HEIGHT, WIDTH)} | preprocessing)),
        decoding=Decoding(strides=(CELL,)),
        serving=serving or Serving(score_threshold=0.5),
        accuracy=accuracy,
    )


def write_pictures(folder, *, count=12, seed=0):
    """Write pictures and their COCO annotations; return the folder of the pictures and the annotation file."""
    rng = np.random.default_rng(seed)
    images, annotations = [], []
    (folder / "pictures").mkdir(parents=True)
    for number in range(1, count + 1):
        pixels = np.full((HEIGHT, WIDTH, 3), GREY, np.uint8)
        # Every second cell, so that no two squares touch.
        cells = [(row, column) for row in range(0, HEIGHT // CELL, 2) for column in range(0, WIDTH // CELL, 2)]
        for place, cell in enumerate(rng.choice(len(cells), 6, replace=False)):
            row, column = cells[cell]
            colour = place % 3
            top, left = row * CELL, column * CELL
            pixels[top : top + CELL, left : left + CELL] = COLOURS[NAMES[colour]]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": colour + 1,
                    "bbox": [left, top, CELL, CELL],
                    "area": CELL**2,
                    "iscrowd": 0,
                }
            )
        name = f"{number:03d}.png"
        Image.fromarray(pixels).save(folder / "pictures" / name)
        images.append({"id": number, "file_name": name, "width": WIDTH, "height": HEIGHT})
    categories = [{"id": place, "name": name} for place, name in enumerate(NAMES, start=1)]
    document = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations.json").write_text(json.dumps(document))
    return folder / "pictures", folder / "annotations.json"
