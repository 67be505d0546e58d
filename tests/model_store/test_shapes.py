import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from dettools.datasets.scenes import CATEGORIES, write_dataset
from safetensors import safe_open

SHAPES = Path(__file__).resolve().parents[2] / "model_store" / "shapes"
WEIGHTS = SHAPES / "shapes.safetensors"


@pytest.fixture(scope="module")
def training():
    """train.py as a module; it belongs to no package."""
    spec = importlib.util.spec_from_file_location("shapes_train", SHAPES / "train.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def examples_of(training, count, seed):
    """A few rendered scenes, without the worker processes."""
    rendered = [training.render_example(seed + index) for index in range(count)]
    pixels, boxes, labels = zip(*rendered, strict=True)
    return training.Examples(
        torch.from_numpy(np.stack(pixels)), [torch.from_numpy(b) for b in boxes], [torch.from_numpy(k) for k in labels]
    )


def test_the_weights_are_small_and_stored_in_half_precision():
    assert WEIGHTS.stat().st_size <= 12 * 2**20
    with safe_open(WEIGHTS, "pt") as file:
        kinds = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 - safe_open is no mapping
    assert kinds == {"F16", "I64"}


def test_the_training_report_is_of_these_weights():
    report = json.loads((SHAPES / "training.json").read_text(encoding="utf-8"))
    assert report["bytes"] == WEIGHTS.stat().st_size
    assert report["AP"] >= 0.70
    assert report["AP50"] >= 0.95


def test_training_and_validation_scenes_are_disjoint(training):
    recipe, validation = training.Recipe(), training.VALIDATION
    assert recipe.image_seed >= validation["seed"] + validation["count"]
    assert validation == {"seed": 1, "count": 200}


@pytest.mark.slow
def test_the_weights_reach_the_bar_on_the_validation_scenes(training, tmp_path):
    annotations = write_dataset(tmp_path / "validation", **training.VALIDATION)
    numbers = training.evaluate(training.load_model(WEIGHTS), annotations)
    assert numbers["AP"] >= 0.70
    assert numbers["AP50"] >= 0.95
    report = json.loads((SHAPES / "training.json").read_text(encoding="utf-8"))
    assert numbers["AP"] == pytest.approx(report["AP"], abs=0.005)


def test_an_augmented_image_keeps_every_object_inside(training):
    examples = examples_of(training, count=4, seed=2_000_000)
    rng = np.random.default_rng(0)
    for _ in range(5):
        for pixels, boxes in zip(examples.pixels, examples.boxes, strict=True):
            image, moved = training.augment(pixels, boxes, side_px=160, crop_chance=1.0, rng=rng)
            assert image.shape == (3, 160, 160)
            assert moved.shape == boxes.shape
            assert moved.min() >= 0
            assert moved.max() <= 160
            assert (moved[:, 2:] > moved[:, :2]).all()


def test_every_object_gets_anchors(training):
    anchors = torch.tensor([[0, 0, 10, 10], [0, 0, 12, 10], [40, 40, 60, 60], [45, 45, 60, 60.0]]).repeat(3, 1)
    owner, unclear = training.match(torch.tensor([[0, 0, 10, 10], [42, 42, 60, 60.0]]), anchors)
    assert owner.tolist() == [0, 0, 1, 1] * 3
    assert not unclear.any()


def test_a_few_steps_lower_the_loss(training):
    examples = examples_of(training, count=8, seed=2_000_000)
    stages = (
        training.Stage(96, epochs=12, batch_size=8, rates=(1.5e-3, 1.5e-3)),
        training.Stage(96, epochs=4, batch_size=8, rates=(1e-3, 1e-4), frozen_blocks=4),
    )
    recipe = training.Recipe(image_count=8, stages=stages, warmup_steps=2)
    average, losses = training.train(examples, recipe)
    assert len(losses) == 16
    assert np.mean(losses[-3:]) < 0.75 * np.mean(losses[:3])
    assert all(torch.isfinite(value).all() for value in average.state_dict().values())


def test_training_goes_on_after_an_interruption(training, tmp_path):
    examples = examples_of(training, count=4, seed=2_000_000)
    checkpoint = tmp_path / "checkpoint.pt"
    recipe = training.Recipe(image_count=4, stages=(training.Stage(96, 2, 4, rates=(1e-3, 1e-4)),), warmup_steps=2)
    _, losses = training.train(examples, recipe, checkpoint)
    average, resumed = training.train(examples, recipe, checkpoint, resume=True)
    assert resumed == losses
    training.save_weights(average, tmp_path / "weights.safetensors")
    loaded = training.load_model(tmp_path / "weights.safetensors")
    assert len(loaded.head.classification_head.module_list) == 6
    assert loaded.head.classification_head.num_columns == len(CATEGORIES) + 1
