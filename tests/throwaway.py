"""Archives for a real TorchServe that need no detector: one handler file in a zip, ready in seconds."""

import json
import zipfile
from pathlib import Path

ECHO = '''
import os
import time


class Echo:
    """Answers one detection; the body says what else to do."""

    def initialize(self, context):
        self.calls = 0

    def handle(self, data, context):
        if context.get_request_header(0, "describe") == "True":
            path = os.environ.get("PYTHONPATH", "")
            return [{"runtime": "echo", "device": "cpu", "precision": "fp32", "categories": [], "path": path}]
        return [self.answer(row, index, context) for index, row in enumerate(data)]

    def answer(self, row, index, context):
        self.calls += 1
        body = bytes(row.get("body") or b"")
        if body == b"bad":
            context.set_response_status(422, "Unprocessable", index)
            return {"code": 422, "type": "invalid_image", "message": "got 'bad'"}
        if body == b"boom":
            raise ValueError("boom")
        if body == b"die":
            os._exit(3)
        if body.startswith(b"sleep "):
            time.sleep(float(body[6:]))
        if body == b"nothing":
            return []
        found = {"class_label": 1, "class_name": "cat", "bbox": [0.0, 1.0, 2.0, 3.0], "score": 0.5}
        found["options"] = {name: bytes(value).decode() for name, value in row.items() if name != "body"}
        found["calls"] = self.calls
        if found["options"].get("masks") == "rle":
            found["segmentation"] = {"size": [4, 4], "counts": "04"}
        if found["options"].get("keypoints") == "true":
            found["keypoints"] = [[1.0, 2.0, 0.9]]
        return [found]
'''


def failing(initialize: str, above: str = "") -> str:
    """Return the source of a handler whose ``initialize`` runs those statements."""
    return (
        f"{above}\nclass Failing:\n    def initialize(self, context):\n        {initialize}\n\n"
        "    def handle(self, data, context):\n        return [1]\n"
    )


def build(
    folder: Path,
    name: str = "echo",
    *,
    version: str = "1.0",
    source: str = ECHO,
    config: dict[str, object] | None = None,
) -> Path:
    """Write an archive into the folder."""
    path = folder / f"{name}-{version}.mar"
    worker = {"minWorkers": 1, "maxWorkers": 1, "batchSize": 1, "maxBatchDelay": 1} | (config or {})
    model = {"modelName": name, "modelVersion": version, "handler": "handler.py", "configFile": "model-config.yaml"}
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("MAR-INF/MANIFEST.json", json.dumps({"runtime": "python", "model": model}))
        archive.writestr("model-config.yaml", json.dumps(worker))  # JSON is YAML
        archive.writestr("handler.py", source)
    return path
