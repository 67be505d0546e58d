"""MMDetection's models in the detector: who shares a forward pass, what fails alone, what is refused."""

import io
import math
import os
import shutil
import subprocess
import sys
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from checkout import ROOT
from dethandlers.artefact import load_artefact
from dethandlers.detector import Detector, Request
from dethandlers.errors import ArtefactError, RequestError
from dethandlers.families.mmdet import MmdetFamily
from dethandlers.mmdet_model import MmdetModel
from dethandlers.options import Options
from detserve.archive import build_archive, verify_archive
from detserve.eager_mmdet import load_mmdet
from detserve.errors import SpecError
from detserve.mar import unpacked
from detserve.mmdet_config import ConfigError
from detserve.mmdet_source import mmdet_spec_categories
from detserve.spec import parse_spec
from dettools.cli import main
from mmdet_models import (
    CONFIGS,
    IMAGES,
    MAX_DETECTIONS,
    SIZE,
    mmdet_warnings,
    needs_mmdet,
    packaged,
    random_model,
    untrained,
    write_files,
)
from PIL import Image
from small_artefacts import assert_close

pytestmark = [needs_mmdet, *mmdet_warnings]

CPU = torch.device("cpu")
BACKBONE = '''
"""Someone's own backbone: three levels of plain convolutions."""

from mmdet.registry import MODELS
from torch import nn


@MODELS.register_module()
class PlainPyramid(nn.Module):
    def __init__(self, width):
        super().__init__()
        strides = (8, 2, 2)
        self.levels = nn.ModuleList(
            nn.Conv2d(3 if place == 0 else width, width, 9, stride, 4) for place, stride in enumerate(strides)
        )

    def forward(self, pixels):
        found = []
        for level in self.levels:
            pixels = level(pixels).relu()
            found.append(pixels)
        return tuple(found)
'''
# What whoever trained it does; in a process of its own, so that here the module can only come from the archive.
TRAINING = """
import ast, sys, torch
from pathlib import Path
from dethandlers.mmdet_model import build_network
from mmdet_models import write_files
values = ast.literal_eval(Path("values.txt").read_text())
torch.manual_seed(1)
state = build_network(values, modules=[Path.cwd()], allow_code=True).state_dict()
write_files(values, state, Path.cwd(), "own")
from dettools.cli import main
sys.exit(main(["archive", "own.py", "own.pth", "--module", "plain_pyramid.py", "--allow-code", "--model-store", "."]))
"""


@pytest.fixture(scope="module")
def fcos(tmp_path_factory):
    return random_model("fcos", tmp_path_factory.mktemp("fcos"))


@pytest.fixture(scope="module")
def artefact(fcos, tmp_path_factory):
    """An unpacked archive."""
    folder = tmp_path_factory.mktemp("archive")
    build_archive(spec_of(fcos), folder=fcos.config.parent, out=folder / "a.mar", weights=fcos.checkpoint)
    with unpacked(folder / "a.mar") as members:
        yield load_artefact(members)


@pytest.fixture(scope="module")
def detector(artefact):
    detector = Detector(artefact, CPU)
    yield detector
    detector.close()


def spec_of(model, **serving):
    """What describes it; images of one pixel in height are let through to the pipeline."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        categories = [vars(one) for one in mmdet_spec_categories(model.config, model.checkpoint)]
    limits = {"score_threshold": model.score_threshold, "max_detections": MAX_DETECTIONS, "min_image_side": 1}
    described = {"name": "model", "family": "mmdet", "config": model.config.name, "categories": categories}
    return parse_spec(described | {"serving": limits | serving}, where="test", folder=model.config.parent)


def ask(detector, images, **changes):
    serving = detector.spec.serving
    options = Options(**({"score_threshold": serving.score_threshold, "max_detections": MAX_DETECTIONS} | changes))
    return detector.detect([Request(image, options) for image in images])


def padded(image):
    """``(h, w)`` as the config says: within SIZE, the aspect ratio kept, to multiples of 32."""
    width, height = Image.open(io.BytesIO(image)).size
    factor = min(max(SIZE) / max(width, height), min(SIZE) / min(width, height))
    return tuple(math.ceil(int(side * factor + 0.5) / 32) * 32 for side in (height, width))


def test_only_images_of_one_padded_shape_share_a_forward_pass(detector):
    shapes = [padded(image) for image in IMAGES]
    sharing = Counter(shapes)
    assert len(sharing) >= 2
    together = ask(detector, IMAGES)
    assert [one.forward_size for one in together] == [sharing[shape] for shape in shapes]
    for image, one in zip(IMAGES, together, strict=True):
        (alone,) = ask(detector, [image])
        assert alone.forward_size == 1
        assert len(one.detections) >= 20
        assert_close(alone.detections, one.detections)


def test_deterministic_gives_each_image_a_pass_of_its_own(artefact):
    serving = replace(artefact.spec.serving, deterministic=True)
    detector = Detector(replace(artefact, spec=replace(artefact.spec, serving=serving)), CPU)
    assert [one.forward_size for one in ask(detector, IMAGES[:3])] == [1, 1, 1]
    detector.close()


def test_an_image_on_which_the_pipeline_fails_costs_only_itself(detector):
    """A picture of one pixel in height is resized to nothing."""
    out = io.BytesIO()
    Image.new("RGB", (2000, 1)).save(out, "PNG")
    first, failed, second = ask(detector, [IMAGES[0], out.getvalue(), IMAGES[5]])
    assert isinstance(failed, RequestError)
    assert (failed.type, failed.code) == ("image_too_small", 400)
    assert "2000×1 pixels, which this model's test pipeline resizes to nothing" in failed.message
    for answer, image in ((first, IMAGES[0]), (second, IMAGES[5])):
        assert_close(ask(detector, [image])[0].detections, answer.detections)


def test_each_request_has_its_own_limits_in_a_shared_pass(detector, fcos):
    eager = load_mmdet(fcos.config, fcos.checkpoint)
    high, few = float(fcos.score_threshold) + 0.03, 4
    asked = [Options(high, MAX_DETECTIONS), Options(fcos.score_threshold, few)]
    answers = detector.detect([Request(IMAGES[0], one) for one in asked])
    assert [one.forward_size for one in answers] == [2, 2]
    for answer, one in zip(answers, asked, strict=True):
        expected = eager.detect(IMAGES[0], one.score_threshold, one.max_detections)
        assert 0 < len(expected) <= one.max_detections
        assert_close(expected, answer.detections)


def test_it_can_do_what_the_model_can(artefact, tmp_path):
    family = MmdetFamily(artefact.spec)
    assert family.capabilities == frozenset()
    family.build(artefact.weights)
    assert family.capabilities == frozenset()

    values = packaged(CONFIGS["rtmdet_ins"], (96, 96))
    written = write_files(values, untrained(values).network.state_dict(), tmp_path, "ins")
    built = build_archive(spec_of(written), folder=tmp_path, out=tmp_path / "ins.mar", weights=written.checkpoint)
    with unpacked(built.path) as members:
        loaded = load_artefact(members)
        with_masks = MmdetFamily(loaded.spec)
        with_masks.build(loaded.weights)
    assert with_masks.capabilities == {"masks"}
    with pytest.raises(ArtefactError, match="got 'onnx' with family 'mmdet', expected 'torch'"):
        MmdetFamily(replace(artefact.spec, runtime="onnx"))


def test_weights_of_another_model_are_refused(artefact):
    model = MmdetModel.read(artefact.folder / artefact.spec.config)
    with pytest.raises(ArtefactError, match="weights do not fit the config"):
        model.load({"backbone.conv1.weight": torch.zeros(64, 3, 7, 7)})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{'model': open('x')}", "no flattened config"),
        ("{'model': {", "no flattened config"),
        ("[1, 2]", "got a list, expected a dict"),
        ("{'model': {'type': 'os.system'}}", "Correct the config"),
        ("{'model': {'type': 'NoDetectorOfThisName'}}", "which is in none of MMDetection's registries"),
    ],
)
def test_a_damaged_config_is_refused_and_not_run(tmp_path, text, words):
    (tmp_path / "config.py").write_text(text)
    with pytest.raises(ArtefactError, match=words):
        MmdetModel.read(tmp_path / "config.py")


def test_a_model_whose_classes_nobody_names_is_refused(fcos, tmp_path):
    state = torch.load(fcos.checkpoint, weights_only=True)["state_dict"]
    torch.save({"state_dict": state}, tmp_path / "a.pth")
    values = packaged(CONFIGS["fcos"])
    values["test_dataloader"]["dataset"] = {"type": "BaseDetDataset", "pipeline": values["test_pipeline"]}
    (tmp_path / "a.py").write_text("".join(f"{key} = {value!r}\n" for key, value in values.items()))
    with pytest.raises(SpecError, match="categories"):
        mmdet_spec_categories(tmp_path / "a.py", tmp_path / "a.pth")


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A model with someone's own backbone: its folder, with the archive in `packed`."""
    folder = tmp_path_factory.mktemp("own")
    values = packaged(CONFIGS["fcos"])
    values["model"]["backbone"] = {"type": "PlainPyramid", "width": 16}
    values["model"]["neck"] |= {"in_channels": [16, 16, 16], "start_level": 0, "out_channels": 32}
    values["model"]["bbox_head"] |= {"in_channels": 32, "feat_channels": 32, "stacked_convs": 1}
    values["custom_imports"] = {"imports": ["plain_pyramid"], "allow_failed_imports": False}
    (folder / "values.txt").write_text(repr(values))
    (folder / "plain_pyramid.py").write_text(BACKBONE)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", TRAINING],
        cwd=folder,
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": str(ROOT / "tests")},
    )
    assert done.returncode == 0, done.stderr
    (folder / "packed").mkdir()
    shutil.move(folder / "own.mar", folder / "packed" / "own.mar")
    return folder


def test_code_of_ones_own_is_packed_only_when_that_is_allowed(own, tmp_path, capsys):
    command = ["archive", str(own / "own.py"), str(own / "own.pth"), "--module", str(own / "plain_pyramid.py")]
    assert main([*command, "--model-store", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert "custom_imports plain_pyramid, which run when the model is built" in told
    assert "--allow-code" in told
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ConfigError, match="custom_imports plain_pyramid"):
        load_mmdet(own / "own.py", own / "own.pth")


def test_an_archive_with_code_is_verified_without_running_it(own, capsys):
    verified = verify_archive(own / "packed" / "own.mar")
    assert verified.golden_detections is None
    assert any("plain_pyramid, so the golden detections were not reproduced" in note for note in verified.notes)
    assert "plain_pyramid" not in sys.modules


def test_code_of_ones_own_comes_along_in_the_archive(own, monkeypatch, tmp_path):
    """Only the archive is left of it."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    (path,) = (own / "packed").iterdir()
    archive = shutil.copy(path, tmp_path)
    with unpacked(Path(archive)) as members:
        artefact = load_artefact(members)
        detector = Detector(artefact, CPU)
        assert Path(sys.modules["plain_pyramid"].__file__).is_relative_to(members)
        assert detector.check_golden() == ""
        (answer,) = ask(detector, [IMAGES[0]], score_threshold=0.0, max_detections=20)
        detector.close()
    assert len(answer.detections) > 0
    assert np.isfinite(answer.detections.boxes_xyxy).all()
