"""MMDetection's configs as data: what is read without running, what is refused, and the same values as MMEngine's."""

import importlib.util
import math
from pathlib import Path

import pytest
from detserve.mmdet_config import (
    ConfigError,
    NotLiteralError,
    dump_config,
    load_config,
    read_config,
)

WITH_MMDET = pytest.mark.skipif(
    importlib.util.find_spec("mmdet") is None, reason="MMDetection is not installed (the extra detserve[mmdet])"
)


@pytest.fixture
def write(tmp_path):
    def write(name, text):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")
        return path

    return write


def test_assignments_are_evaluated(write):
    path = write(
        "config.py",
        '''
"""A docstring."""
scale = (640, 480)
img_scales = [(320, 320), scale]
rate = 2**-3 / 4
model = dict(type='A', size=scale, neck=dict(channels=[64 * 2] * 3), thr=-0.5, nothing=None, on=not False)
both = {**model, 'type': 'B'}
name = f'x_{scale[0]}' + 'y'
tta = [dict(type='Resize', scale=s, keep_ratio=True) for s in img_scales]
table = {f'stage{i}': dict(lr=rate) for i in range(2)}
first, last = scale
model['thr'] = 0.25
tta.append(dict(type='Flip'))
model.update(extra=len(tta))
whole = dict(model.copy(), type='C') if False else 1
''',
    )
    with pytest.raises(NotLiteralError, match="line 15"):
        read_config(path)
    path.write_text(path.read_text("utf-8").rpartition("whole")[0])
    read = read_config(path)
    model = {"type": "A", "size": (640, 480), "neck": {"channels": [128] * 3}, "thr": 0.25}
    model |= {"nothing": None, "on": True}
    tta = [{"type": "Resize", "scale": size, "keep_ratio": True} for size in ((320, 320), (640, 480))]
    assert read.values == {
        "scale": (640, 480),
        "img_scales": [(320, 320), (640, 480)],
        "rate": 0.03125,
        "model": model | {"extra": 3},
        "both": model | {"type": "B", "thr": -0.5},
        "name": "x_640y",
        "tta": [*tta, {"type": "Flip"}],
        "table": {"stage0": {"lr": 0.03125}, "stage1": {"lr": 0.03125}},
        "first": 640,
        "last": 480,
    }
    assert read.files == (path,)
    assert read.code_ran == ""


def test_bases_are_merged_underneath(write):
    base = write(
        "bases/model.py", "model = dict(a=1, neck=dict(x=1, y=2), head=dict(type='A', k=1), seq=[1, 2])\nlr = 0.1\n"
    )
    more = write("bases/more.py", "epochs = 12\n")
    path = write(
        "config.py",
        """
_base_ = ['bases/model.py', './bases/more.py']
model = dict(neck=dict(y=3), head=dict(_delete_=True, type='B'), seq=[3], fresh={{_base_.model.neck}})
warm = _base_.lr
also = [{{ _base_.epochs }}]
where = '{{ fileBasenameNoExtension }}'
""",
    )
    read = read_config(path)
    neck = {"x": 1, "y": 3}
    assert read.values["model"] == {
        "a": 1,
        "neck": neck,
        "head": {"type": "B"},
        "seq": [3],
        "fresh": {"x": 1, "y": 2},
    }
    assert (read.values["warm"], read.values["also"], read.values["lr"]) == (0.1, [12], 0.1)
    assert read.values["where"] == "config"
    assert read.files == (base, more, path)


@pytest.mark.parametrize("suffix", [".json", ".yaml"])
def test_other_formats_have_bases_too(write, suffix):
    write("base.py", "model = dict(a=1, b=2)")
    text = '{"_base_": "base.py", "model": {"b": 3}, "c": {{_base_.model.a}}}'
    assert read_config(write(f"config{suffix}", text)).values == {"model": {"a": 1, "b": 3}, "c": 1}


@pytest.mark.parametrize(
    "line",
    [
        "import os",
        "x = __import__('os')",
        "x = open('f')",
        "x = (lambda: 1)()",
        "x = [].__class__",
        "x = dict.__subclasses__()",
        "x = '{}'.format(1)",
        "x = 'a%s' % 'b'",
        "x = ''.join(['a'])",
        "for x in [1]: y = x",
        "def f(): pass",
        "x = unknown",
        "x = '{{$HOME:none}}'",
        "_base_ = 'other::x.py'",
        "x = [1 for _ in [1] if True]",
        "print('x')",
    ],
)
def test_what_would_have_to_be_run_is_named_and_not_run(write, line):
    with pytest.raises(NotLiteralError, match=r"config\.py.*Reading it would run it"):
        read_config(write("config.py", line))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("x = (", "cannot be parsed"),
        ("_base_ = 'absent.py'", "cannot read"),
        ("_base_ = 'config.py'", "circle"),
        ("x = [1][3]", "line 1: IndexError"),
        ("x = 'a' * 10**9", "too large"),
        ("x = 9 ** 9 ** 9", "too large"),
        ("x = 1 / 0", "ZeroDivisionError"),
        ("x = [i for a in range(2000) for i in range(2000)]", "steps"),
    ],
)
def test_what_cannot_be_read_says_why(write, text, told):
    with pytest.raises(ConfigError, match=told):
        read_config(write("config.py", text))


@pytest.mark.parametrize(
    "text",
    [
        "a = [1] * 1000\nb = [a] * 1000\nc = [b] * 1000",
        "a = [1] * 1000\nb = [a] * 1000\nc = [b] * 1000\nd = f'{c}'",
        "a = dict(b=1)\n" + "a = dict(x=a, y=a)\n" * 40,
        "a = 'x' * 10**6\nb = [a] * 10**5",
        "a = list(range(10**9))",
        "a = tuple(range(10**12))",
        "a = [1]\na.extend(range(10**9))",
        "a = [1, 2]\n" + "a.extend(a)\n" * 40,
        "a = 'xxxxxxxx'\n" + "a = f'{a}{a}'\n" * 40,
        "a = 'xxxxxxxx'\n" + "a = a + a\n" * 40,
        "a = 9\n" + "a = a * a\n" * 60,
        "a = 9\n" + "a = a ** 64\n" * 9,
        "x = [[1 for b in range(1000)] for a in range(10**12)]",
        "a = []\na.append(a)",
        "a = [1]\n" + "a = [a]\n" * 5000,
        "a = " + "-" * 100_000 + "1",
    ],
)
def test_a_few_lines_do_not_fill_the_memory(write, text):
    with pytest.raises(ConfigError):
        read_config(write("config.py", text))


@pytest.mark.parametrize(
    "text",
    [
        "a0: &a0 [1]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 10)),
        "a: &a {x: 1}\nb: {<<: [*a, *a]}",
    ],
)
def test_nor_do_yaml_s_aliases(write, text):
    with pytest.raises(ConfigError):
        read_config(write("config.yaml", text))


def test_variables_of_the_bases_are_counted_where_they_are_copied(write):
    write("base.py", "model = [1] * 10**5")
    with pytest.raises(ConfigError, match="got more than"):
        read_config(write("config.py", "_base_ = 'base.py'\nx = [" + "{{_base_.model}}, " * 10 + "]"))


def test_an_archive_s_own_config_is_read(write):
    values = {"model": {"type": "A", "text": "{{ x }}", "size": (1,)}, "inf": -math.inf}
    path = write("config.py", dump_config(values))
    read = read_config(path)
    assert (read.values, read.files, read.code_ran) == (values, (path,), "")


def test_a_dict_does_not_replace_what_is_none_silently(write):
    write("base.py", "model = [1]")
    with pytest.raises(ConfigError, match="model is a dict and its base's is a list"):
        read_config(write("config.py", "_base_ = 'base.py'\nmodel = dict(a=1)"))


def test_bases_may_not_both_set_a_name(write):
    write("one.py", "x = 1")
    write("two.py", "x = 2")
    with pytest.raises(ConfigError, match="two of its bases set x"):
        read_config(write("config.py", "_base_ = ['one.py', 'two.py']"))


def test_tuples_survive_being_written():
    values = {
        "a": (1, [2.5, ("x",)]),
        "b": {0: None, "inf": [math.inf, -math.inf]},
        "c": "quote \" ' \n{{ x }}",
        "d": {1},
        "e": {math.inf: "to inf and (inf, -inf)", "none": set()},
    }
    assert load_config(dump_config(values)) == values
    assert dump_config(values) == dump_config(load_config(dump_config(values)))


@pytest.mark.parametrize("text", ["[1]", "{1: 2}", "dict(a=1)", "{'a': open}", "{"])
def test_what_is_no_flattened_config_is_refused(text):
    with pytest.raises(ConfigError):
        load_config(text)


def test_only_data_is_written():
    with pytest.raises(ConfigError, match=r"a\[0\]: got nan"):
        dump_config({"a": [math.nan]})
    with pytest.raises(ConfigError, match=r"a\.b\[1\]: got a PosixPath"):
        dump_config({"a": {"b": [1, Path()]}})


@WITH_MMDET
def test_a_config_that_must_be_run_is_run_when_that_is_allowed(write):
    path = write("config.py", "import os\nmodel = dict(type='A', size=(len('ab'), 1))\n")
    read = read_config(path, allow_code=True)
    assert read.values == {"model": {"type": "A", "size": (2, 1)}}
    assert "import os" in read.code_ran
    with pytest.raises(ConfigError, match=r"running it failed.*no way"):
        read_config(write("bad.py", "raise ValueError('no way')"), allow_code=True)
    with pytest.raises(ConfigError, match="got a object, expected data"):
        read_config(write("object.py", "x = dict(a=object())"), allow_code=True)


SAMPLE = [
    "faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py",
    "faster_rcnn/faster-rcnn_r50-caffe_fpn_ms-90k_coco.py",
    "mask_rcnn/mask-rcnn_r50_fpn_1x-wandb_coco.py",
    "cascade_rcnn/cascade-mask-rcnn_x101-64x4d_fpn_ms-3x_coco.py",
    "retinanet/retinanet_r50_fpn_1x_coco.py",
    "fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py",
    "atss/atss_r50_fpn_1x_coco.py",
    "yolo/yolov3_mobilenetv2_8xb24-320-300e_coco.py",
    "yolox/yolox_tiny_8xb8-300e_coco.py",
    "ssd/ssd300_coco.py",
    "ssd/ssdlite_mobilenetv2-scratch_8xb24-600e_coco.py",
    "rtmdet/rtmdet_tiny_8xb32-300e_coco.py",
    "rtmdet/rtmdet-ins_tiny_8xb32-300e_coco.py",
    "detr/detr_r50_8xb2-150e_coco.py",
    "deformable_detr/deformable-detr_r50_16xb2-50e_coco.py",
    "dino/dino-4scale_r50_8xb2-12e_coco.py",
    "sparse_rcnn/sparse-rcnn_r50_fpn_ms-480-800-3x_coco.py",
    "yolact/yolact_r50_8xb8-55e_coco.py",
    "pascal_voc/retinanet_r50_fpn_1x_voc0712.py",
    "cityscapes/mask-rcnn_r50_fpn_1x_cityscapes.py",
    "soft_teacher/soft-teacher_faster-rcnn_r50-caffe_fpn_180k_semi-0.1-coco.py",
    "misc/d2_retinanet_r50-caffe_fpn_ms-90k_coco.py",
]


@WITH_MMDET
@pytest.mark.parametrize("name", SAMPLE)
def test_packaged_configs_are_read_as_mmengine_reads_them(name):
    from mmengine.config import Config

    package = importlib.util.find_spec("mmdet")
    path = Path(package.submodule_search_locations[0]) / ".mim" / "configs" / name
    read = read_config(path)
    assert read.values == Config.fromfile(path, import_custom_modules=False).to_dict()
    assert load_config(dump_config(read.values)) == read.values


@pytest.mark.parametrize("base", ["None", "3", "[3]", "{'a': 1}"])
@pytest.mark.parametrize("suffix", [".py", ".yml"])
def test_a_base_that_is_no_name_is_an_error(base, suffix, tmp_path):
    path = tmp_path / f"c{suffix}"
    path.write_text(f"_base_ = {base}\n" if suffix == ".py" else f"_base_: {base.replace('None', 'null')}\n")
    with pytest.raises(ConfigError, match="expected a file's name or a list of them"):
        read_config(path)


def test_bases_that_lead_back_or_are_read_a_billion_times_are_refused(tmp_path):
    (tmp_path / "circle.py").write_text("_base_ = 'circle.py'\n")
    for number in range(30):
        (tmp_path / f"c{number}.py").write_text(f"_base_ = ['c{number + 1}.py', 'c{number + 1}.py']\n")
    (tmp_path / "c30.py").write_text("")
    for name in ("circle.py", "c0.py"):
        with pytest.raises(ConfigError, match="form a circle, or there are more than"):
            read_config(tmp_path / name)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1: 2\n", "got the keys 1, expected a mapping of names"),
        ("x: [2020-01-01]\n", "a date"),
        ("x: !!binary aGk=", "a bytes"),
    ],
)
def test_yaml_that_is_no_config_is_refused(text, message, tmp_path):
    path = tmp_path / "c.yml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_config(path)


@WITH_MMDET
def test_what_a_config_that_is_run_gives_is_data(tmp_path):
    path = tmp_path / "c.py"
    path.write_text("import math\nlargest = float('inf')\nkinds = {1, 2}\n")
    assert read_config(path, allow_code=True).values == {"largest": math.inf, "kinds": {1, 2}}
    for text, message in (
        ("first = lambda: 1", "got a function, expected data"),
        ("exit(0)", "ended before its values"),
    ):
        path.write_text(f"import math\n{text}\n")
        with pytest.raises(ConfigError, match=message):
            read_config(path, allow_code=True)
