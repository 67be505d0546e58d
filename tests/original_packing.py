"""Archives as MMDetection's mmdet2torchserve.py packs them: torch-model-archiver with that script's own arguments."""

import warnings
from argparse import Namespace
from pathlib import Path

# What the original handler does, as far as it can be seen in its text.
HANDLER = """
import base64
import mmcv
from mmdet.apis import inference_detector, init_detector
from ts.torch_handler.base_handler import BaseHandler

class Handler(BaseHandler):
    threshold = 0.5

    def initialize(self, context):
        device = 'cuda:' + str(context.system_properties.get('gpu_id'))
        self.model = init_detector('config.py', 'model.pth', device)

    def preprocess(self, data):
        return [mmcv.imfrombytes(row.get('data') or row.get('body')) for row in data]

    def inference(self, data):
        return inference_detector(self.model, data)

    def postprocess(self, data):
        return [[box for box in sample.pred_instances.bboxes] for sample in data]
"""
CONFIG = """
model = dict(type='FasterRCNN', roi_head=dict(type='StandardRoIHead', bbox_head=dict(num_classes=2)))
test_dataloader = dict(dataset=dict(type='CocoDataset', metainfo=dict(classes=('cat', 'dog'))))
"""


def pack_as_original(
    folder: Path,
    checkpoint: Path,
    *,
    config: str = CONFIG,
    handler: str = HANDLER,
    name: str = "old",
    version: str = "1.0",
    extra_files: str | None = None,
) -> Path:
    """Return the archive of a config and a checkpoint."""
    with warnings.catch_warnings():
        # Its version module leaves a file open.
        warnings.simplefilter("ignore", ResourceWarning)
        from model_archiver.model_packaging import package_model
        from model_archiver.model_packaging_utils import ModelExportUtils

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.py").write_text(config)
    (folder / "mmdet_handler.py").write_text(handler)
    arguments = Namespace(
        model_file=str(folder / "config.py"),
        config_file=str(folder / "config.py"),
        serialized_file=str(checkpoint),
        handler=str(folder / "mmdet_handler.py"),
        model_name=name,
        version=version,
        export_path=str(folder),
        force=True,
        requirements_file=None,
        extra_files=extra_files,
        runtime="python",
        archive_format="default",
    )
    package_model(arguments, ModelExportUtils.generate_manifest_json(arguments))
    return folder / f"{name}.mar"
