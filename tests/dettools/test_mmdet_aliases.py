"""MMDetection's two scripts by their names and flags: which command lines of ours they are."""

import argparse
import shlex

import pytest
from detserve.errors import DetserveError
from dettools import cli
from dettools.commands import compare, mmdet2torchserve
from dettools.commands import test_torchserver as torchserver

CONFIG, CHECKPOINT = "configs/yolo/yolov3.py", "checkpoint/yolov3.pth"
OWN = "http://127.0.0.1:9080"


@pytest.fixture(scope="module")
def parser():
    return cli.build_parser()


PACKING = [
    ("--output-folder store --model-name yolov3", "--model-store store --name yolov3 --model-version 1.0"),
    ("--output-folder store", "--model-store store --model-version 1.0"),
    (
        "--output-folder store --model-name a --model-version 2.1 --force",
        "--model-store store --name a --model-version 2.1 --force",
    ),
    ("-f --output-folder s", "--model-store s --model-version 1.0 --force"),
]


@pytest.mark.parametrize(("original", "ours"), PACKING)
def test_packing(parser, original, ours):
    args = parser.parse_args(["mmdet2torchserve", CONFIG, CHECKPOINT, *shlex.split(original)])
    command = mmdet2torchserve.arguments(args)
    assert command == ["archive", CONFIG, CHECKPOINT, *shlex.split(ours)]
    packed = parser.parse_args(command)
    assert (str(packed.spec), str(packed.checkpoint)) == (CONFIG, CHECKPOINT)
    assert str(packed.model_store) == args.output_folder
    assert (packed.name, packed.model_version, packed.force) == (args.model_name, args.model_version, args.force)


@pytest.mark.parametrize("missing", ["", "--model-name a"])
def test_the_folder_is_required_as_in_the_original(parser, missing, capsys):
    with pytest.raises(SystemExit):
        parser.parse_args(["mmdet2torchserve", CONFIG, CHECKPOINT, *shlex.split(missing)])
    assert "--output-folder" in capsys.readouterr().err


TESTING = [
    # flags, this machine's own server, GPU or not, what `compare` is given
    ("", None, False, "--score-threshold 0.5 --device cpu --url http://127.0.0.1:8080"),
    ("", OWN, True, "--score-threshold 0.5 --device cuda:0"),
    ("--inference-addr localhost:9080", OWN, False, "--score-threshold 0.5 --device cpu"),
    (
        "--inference-addr gpu7:8080 --device cpu --score-thr 0.3 --work-dir out",
        OWN,
        True,
        "--score-threshold 0.3 --device cpu --url http://gpu7:8080 --work-dir out",
    ),
    ("--inference-addr https://a.b/ts/", None, False, "--score-threshold 0.5 --device cpu --url https://a.b/ts"),
]


@pytest.mark.parametrize(("original", "own_url", "has_cuda", "ours"), TESTING)
def test_testing(parser, original, own_url, has_cuda, ours):
    args = parser.parse_args(
        ["test-torchserver", "demo/demo.jpg", CONFIG, CHECKPOINT, "yolov3", *shlex.split(original)]
    )
    command = torchserver.arguments(args, own_url=own_url, has_cuda=has_cuda)
    assert command == ["compare", CONFIG, CHECKPOINT, "--model", "yolov3", "demo/demo.jpg", *shlex.split(ours)]
    compared = parser.parse_args(command)
    compare._take_inputs(compared)
    assert (compared.model, compared.images) == ("yolov3", ["demo/demo.jpg"])
    assert (str(compared.config), str(compared.weights)) == (CONFIG, CHECKPOINT)


def taken(*words):
    parser = argparse.ArgumentParser()
    compare.add_parser(parser.add_subparsers())
    args = parser.parse_args(["compare", *words])
    compare._take_inputs(args)
    return args


@pytest.mark.parametrize(
    "words",
    [
        "c.py k.pth --model nano a.jpg b.jpg --tier bit",
        "c.py k.pth a.jpg b.jpg --model nano",
        "--model nano c.py k.pth a.jpg b.jpg",
        "c.py k.pth a.jpg --device cpu --model nano b.jpg",
        "c.py --device cpu k.pth --model nano --work-dir out a.jpg --masks b.jpg",
    ],
)
def test_the_config_s_form_of_compare_takes_any_order(words):
    args = taken(*words.split())
    assert (str(args.config), str(args.weights), args.model) == ("c.py", "k.pth", "nano")
    assert sorted(args.images) == ["a.jpg", "b.jpg"]


def test_the_other_form_of_compare_is_as_it_was():
    args = taken("nano", "a.jpg", "b.jpg", "--weights", "k.pth")
    assert (args.model, args.images, args.config, str(args.weights)) == ("nano", ["a.jpg", "b.jpg"], None, "k.pth")
    assert taken("--model", "nano", "a.jpg").images == ["a.jpg"]


@pytest.mark.parametrize(
    "words",
    [
        "nano --work-dir out a.jpg b.jpg",
        "nano a.jpg --work-dir out b.jpg",
        "--work-dir out nano --tier bit a.jpg --masks b.jpg",
        "--model nano --work-dir out a.jpg b.jpg",
    ],
)
def test_options_stand_between_the_inputs_of_compare(words):
    args = taken(*words.split())
    assert (args.model, args.images, str(args.work_dir)) == ("nano", ["a.jpg", "b.jpg"], "out")


def test_an_unknown_option_of_compare_is_still_refused(capsys):
    with pytest.raises(SystemExit):
        taken("nano", "--tear", "bit", "a.jpg")
    assert "unrecognized arguments: --tear" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("", "got nothing, expected MODEL IMAGE"),
        ("nano", "got nano, expected MODEL IMAGE"),
        ("c.py k.pth a.jpg", "and no --model, expected CONFIG.py CHECKPOINT.pth --model MODEL IMAGE"),
        ("c.py k.pth --model nano", "expected CONFIG.py CHECKPOINT.pth --model MODEL IMAGE"),
        ("c.py k.pth --model nano a.jpg --weights b.pth", "got --weights with c.py"),
    ],
)
def test_half_a_command_line_is_told(words, told):
    with pytest.raises(DetserveError) as caught:
        taken(*words.split())
    assert told in str(caught.value)
