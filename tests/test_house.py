"""The house of DESIGN.md, kept true by reading the sources: who imports whom, who prints, who knows TorchServe.

Each rule is a function from sources to the lines that break it; each is shown to find what it looks for.
"""

import ast
import importlib
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from dethandlers.families import FAMILIES
from dethandlers.runtimes import RUNTIMES
from dettools.cli import COMMANDS

ROOT = Path(__file__).resolve().parent.parent
# The package, its source root, and those of ours that it may import.
PACKAGES = {
    "dethandlers": ("handlers", set()),
    "detserve": ("serving", {"dethandlers"}),
    "dettools": ("tools", {"dethandlers", "detserve"}),
}
WORKER_MAY_IMPORT = {"torch", "torchvision", "numpy", "PIL", "safetensors"}
# A runtime or family imports its own framework, and only when it is asked for.
WORKER_MAY_IMPORT_LAZILY = {
    "runtimes/onnx_runtime.py": {"onnxruntime"},
    "mmdet_model.py": {"mmcv", "mmdet", "mmengine"},
    "mmdet_fusion.py": {"mmcv"},
    "worker_metrics.py": {"prometheus_client"},
    "mmdet_types.py": {"mmengine"},
}
PRINTING = {"rich", "PIL.ImageDraw", "PIL.ImageFont", "matplotlib"}
PRINTERS = ("commands/", "cli.py", "reports/")
# Its shapes are painted pixels of training images, not a report of a result.
PAINTERS_OF_DATA = {"datasets/scene_drawing.py": {"PIL.ImageDraw"}}
# What a successor to TorchServe would cost.
KNOWS_TORCHSERVE = {
    "dethandlers": ("entry.py", "payload.py"),
    "detserve": (
        "archive.py",
        "mar.py",
        # What MMDetection's script wrote, and nothing writes any more.
        "mmdet_archive.py",
        "server/",
        "client.py",
        "client_errors.py",
        "grpc_management.py",
        "instance.py",
        "server_metrics.py",
    ),
    # doctor looks at TorchServe's packages, its environment variables and what other tools wrote into archives.
    # `serve start` prints the curl line to copy.
    "dettools": ("diagnosis.py", "commands/serve.py"),
}
TORCHSERVE_WORDS = re.compile(
    r"MAR-INF|MANIFEST\.json|config\.properties|key_file\.json|log4j|model-config\.yaml|/predictions/|\bTS_[A-Z]+"
    r"|\b(minWorkers|maxWorkers|batchSize|maxBatchDelay|responseTimeout|startupTimeout|deviceType|modelName"
    r"|modelVersion|serializedFile|configFile|model_dir|system_properties|model-server\.jar)\b"
)
HEAVY = {
    "torch",
    "torchvision",
    "numpy",
    "PIL",
    "pydantic",
    "scipy",
    "pycocotools",
    "rich",
    "yaml",
    "requests",
    "psutil",
    "asyncio",
}
# These import nothing heavy themselves.
LIGHT_OF_OURS = {
    "dethandlers",
    "dethandlers.errors",
    "detserve.errors",
    "detserve.model_store",
    "dettools.argument_types",
    "dettools.edge_options",
    "dettools.endpoint",
    "dettools.model_source",
    "dettools.agreement",
}
LONGEST = 400


@dataclass(frozen=True)
class Source:
    """One file of a package: ``name`` is its path inside the package."""

    package: str
    name: str
    text: str

    @property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @property
    def module(self) -> str:
        parts = [self.package, *self.name.removesuffix(".py").split("/")]
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@dataclass(frozen=True)
class Import:
    """An imported module; ``lazy`` inside a function, ``typing`` under TYPE_CHECKING."""

    name: str
    lazy: bool
    typing: bool

    @property
    def top(self) -> str:
        return self.name.partition(".")[0]


def imports_of(source: Source) -> list[Import]:
    return list(_imports(source, source.tree, lazy=False, typing=False))


def _imports(source: Source, node: ast.AST, *, lazy: bool, typing: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(alias.name, lazy, typing) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            base = child.module or ""
            if child.level:
                parts = source.module.split(".") + ([""] if source.name.endswith("__init__.py") else [])
                base = ".".join([*parts[: -child.level], *([base] if base else [])])
            # `from PIL import ImageDraw` imports PIL.ImageDraw.
            yield from (Import(f"{base}.{alias.name}", lazy, typing) for alias in child.names)
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for part in child.body:
                yield from _imports(source, ast.Module([part], []), lazy=lazy, typing=True)
            for part in child.orelse:
                yield from _imports(source, ast.Module([part], []), lazy=lazy, typing=typing)
        else:
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from _imports(source, child, lazy=lazy or inside, typing=typing)


def is_of(name: str, packages: set[str]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def wrong_directions(source: Source) -> list[str]:
    """Imports of a package of ours that this one may not import; also for types, which are knowledge too."""
    allowed = PACKAGES[source.package][1] | {source.package}
    return [one.name for one in imports_of(source) if one.top in PACKAGES and one.top not in allowed]


def upward_imports(source: Source) -> list[str]:
    """Inside dettools: library modules that import commands or the cli, or reports that are imported by a library."""
    if source.package != "dettools" or source.name.startswith(("commands/", "cli.py")):
        return []
    above = {"dettools.commands", "dettools.cli"}
    if not source.name.startswith("reports/"):
        above.add("dettools.reports")
    return [one.name for one in imports_of(source) if is_of(one.name, above)]


def foreign_to_the_worker(source: Source) -> list[str]:
    """Imports that a stock TorchServe with torch, torchvision and safetensors does not have."""
    if source.package != "dethandlers":
        return []
    lazily = WORKER_MAY_IMPORT_LAZILY.get(source.name, set())
    allowed = WORKER_MAY_IMPORT | set(sys.stdlib_module_names) | {"dethandlers"}
    return [
        one.name
        for one in imports_of(source)
        if one.top not in allowed and not (one.top in lazily and one.lazy) and not one.typing
    ]


def printing_outside_its_place(source: Source) -> list[str]:
    """print(), sys.stdout and drawing in a module of dettools that computes."""
    if source.package != "dettools" or source.name.startswith(PRINTERS):
        return []
    excused = PAINTERS_OF_DATA.get(source.name, set())
    found = [one.name for one in imports_of(source) if is_of(one.name, PRINTING) and not is_of(one.name, excused)]
    calls = [node for node in ast.walk(source.tree) if isinstance(node, ast.Call)]
    printing = {"print", "sys.stdout.write", "sys.stderr.write"}
    return found + [f"line {call.lineno}: print" for call in calls if ast.unparse(call.func) in printing]


def knowledge_of_torchserve(source: Source) -> list[str]:
    """Imports of TorchServe's packages, and its words in string constants that are no docstrings."""
    if source.name.startswith(KNOWS_TORCHSERVE[source.package]):
        return []
    found = [one.name for one in imports_of(source) if one.top in ("ts", "model_archiver", "torchserve")]
    for node in _without_docstrings(source.tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found += [f"line {node.lineno}: {match.group()}" for match in TORCHSERVE_WORDS.finditer(node.value)]
    return found


def _without_docstrings(tree: ast.Module) -> Iterator[ast.AST]:
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        yield node
        children = list(ast.iter_child_nodes(node))
        waiting += [child for child in children if not (isinstance(child, ast.Expr) and _is_text(child.value))]


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def shadowing(source: Source) -> list[str]:
    """A file or folder whose name is that of a package it imports: a reader would take one for the other."""
    own = {part.removesuffix(".py") for part in source.name.split("/")}
    return [one.name for one in imports_of(source) if one.top in own]


def reserved_in_the_worker(source: Source) -> list[str]:
    """Files at the archive's root would be replaced by TorchServe's own of that name (ts/ comes first on sys.path)."""
    reserved = {"utils.py", "common.py", "metrics.py", "service.py", "context.py", "protocol.py", "version.py"}
    return [source.name] if source.name.rpartition("/")[2] in reserved else []


def no_docstring(source: Source) -> list[str]:
    empty = source.name.endswith("__init__.py") and not source.text.strip()
    return [] if empty or ast.get_docstring(source.tree) else [source.name]


def too_long(source: Source) -> list[str]:
    lines = source.text.count("\n")
    return [f"{lines} lines"] if lines > LONGEST else []


def heavy_at_the_top(source: Source) -> list[str]:
    """What a command imports before it is run; `detserve --help` imports every command."""
    if source.package != "dettools" or not source.name.startswith(("commands/", "cli.py")):
        return []
    eager = [one for one in imports_of(source) if not one.lazy and not one.typing]
    return [
        one.name
        for one in eager
        if one.top in HEAVY or (one.top in PACKAGES and not is_of(one.name.rpartition(".")[0], LIGHT_OF_OURS))
    ]


RULES = [
    wrong_directions,
    upward_imports,
    foreign_to_the_worker,
    printing_outside_its_place,
    knowledge_of_torchserve,
    shadowing,
    reserved_in_the_worker,
    no_docstring,
    too_long,
    heavy_at_the_top,
]


def sources() -> list[Source]:
    found = []
    for package, (folder, _) in PACKAGES.items():
        root = ROOT / folder / package
        found += [
            Source(package, path.relative_to(root).as_posix(), path.read_text("utf-8")) for path in root.rglob("*.py")
        ]
    return found


def test_the_sources_are_found():
    names = {f"{source.package}/{source.name}" for source in sources()}
    assert {"dethandlers/entry.py", "detserve/archive.py", "detserve/server/launch.py", "dettools/cli.py"} <= names


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_house_keeps(rule):
    broken = {f"{source.package}/{source.name}": rule(source) for source in sources()}
    assert {name: lines for name, lines in broken.items() if lines} == {}


GOOD = '"""Why."""\n'
COUNTER_EXAMPLES = [
    (wrong_directions, "dethandlers", "images.py", "from detserve.errors import DetserveError"),
    (wrong_directions, "dethandlers", "families/x.py", "def f():\n    import dettools.cli"),
    (wrong_directions, "detserve", "archive.py", "from dettools import comparison"),
    (wrong_directions, "detserve", "archive.py", "if TYPE_CHECKING:\n    from dettools.comparison import Pair"),
    (upward_imports, "dettools", "comparison.py", "from dettools.commands import compare"),
    (upward_imports, "dettools", "comparison.py", "from . import cli"),
    (upward_imports, "dettools", "datasets/scenes.py", "def f():\n    from ..reports import tables"),
    (upward_imports, "dettools", "reports/tables.py", "from dettools.cli import main"),
    (foreign_to_the_worker, "dethandlers", "images.py", "import cv2"),
    (foreign_to_the_worker, "dethandlers", "spec.py", "def f():\n    from pydantic import BaseModel"),
    (foreign_to_the_worker, "dethandlers", "runtimes/onnx_runtime.py", "import onnxruntime"),
    (foreign_to_the_worker, "dethandlers", "detector.py", "def f():\n    import onnxruntime"),
    (printing_outside_its_place, "dettools", "comparison.py", "print('done')"),
    (printing_outside_its_place, "dettools", "comparison.py", "from rich.table import Table"),
    (printing_outside_its_place, "dettools", "matching.py", "def f():\n    from PIL import Image, ImageDraw"),
    (printing_outside_its_place, "dettools", "datasets/scenes.py", "from PIL import ImageDraw"),
    (printing_outside_its_place, "dettools", "datasets/scene_drawing.py", "import matplotlib.pyplot"),
    (knowledge_of_torchserve, "dethandlers", "detector.py", "from ts.context import Context"),
    (knowledge_of_torchserve, "detserve", "spec.py", "def f():\n    import model_archiver.model_packaging"),
    (knowledge_of_torchserve, "detserve", "eager.py", "path = 'MAR-INF/x'"),
    (knowledge_of_torchserve, "dettools", "comparison.py", "config = {'maxBatchDelay': 5}"),
    (knowledge_of_torchserve, "dethandlers", "detector.py", "def f(p):\n    return p.get('model_dir')"),
    (shadowing, "dettools", "rich.py", "from rich.console import Console"),
    (shadowing, "dethandlers", "torch/runtime.py", "import torch.nn"),
    (reserved_in_the_worker, "dethandlers", "metrics.py", ""),
    (reserved_in_the_worker, "dettools", "datasets/utils.py", ""),
    (too_long, "detserve", "spec.py", "x = 1\n" * 400),
    (heavy_at_the_top, "dettools", "commands/verify.py", "import torch"),
    (heavy_at_the_top, "dettools", "commands/verify.py", "try:\n    from PIL import Image\nexcept ImportError: pass"),
    (heavy_at_the_top, "dettools", "commands/verify.py", "from detserve.archive import verify_archive"),
    (heavy_at_the_top, "dettools", "cli.py", "from detserve import server"),
]


@pytest.mark.parametrize(("rule", "package", "name", "text"), COUNTER_EXAMPLES, ids=lambda part: None)
def test_a_rule_finds_what_breaks_it(rule, package, name, text):
    assert rule(Source(package, name, GOOD + text))


def test_a_file_without_docstring_is_found():
    assert no_docstring(Source("detserve", "x.py", "import os\n"))
    assert {rule for rule, *_ in COUNTER_EXAMPLES} | {no_docstring} == set(RULES)


def test_what_is_allowed_is_not_found():
    fine = [
        Source("dettools", "commands/verify.py", GOOD + "def run():\n    import torch\n    print('done')\n"),
        Source("dettools", "datasets/scene_drawing.py", GOOD + "from PIL import Image, ImageDraw\n"),
        Source("dethandlers", "runtimes/onnx_runtime.py", GOOD + "def f():\n    import onnxruntime\n"),
        Source(
            "dethandlers", "spec.py", '"""max_batch_delay: as TorchServe\'s maxBatchDelay."""\nimport dataclasses\n'
        ),
        Source("detserve", "server/settings.py", GOOD + "x = 'minWorkers'\n"),
        Source("dettools", "reports/x.py", GOOD + "from rich.table import Table\nfrom dettools.comparison import Y\n"),
    ]
    assert [rule(source) for source in fine for rule in RULES] == [[]] * (len(fine) * len(RULES))


@pytest.mark.parametrize("entry", [*FAMILIES.values(), *RUNTIMES.values()])
def test_families_and_runtimes_resolve(entry):
    module, separator, name = entry.partition(":")
    assert separator
    assert isinstance(getattr(importlib.import_module(module), name), type)


@pytest.mark.parametrize(("name", "module"), COMMANDS.items())
def test_commands_resolve(name, module):
    command = importlib.import_module(module)
    assert module == f"dettools.commands.{name.replace('-', '_')}"
    assert callable(command.add_parser)


def test_every_file_of_a_table_stands_in_it():
    """A family, runtime or command that no table names could never be used."""
    for folder, modules in (
        (ROOT / "handlers/dethandlers/families", {entry.partition(":")[0] for entry in FAMILIES.values()}),
        (ROOT / "handlers/dethandlers/runtimes", {entry.partition(":")[0] for entry in RUNTIMES.values()}),
        (ROOT / "tools/dettools/commands", set(COMMANDS.values())),
    ):
        files = {path.stem for path in folder.glob("*.py")} - {"__init__"}
        assert {module.rpartition(".")[2] for module in modules} == files
