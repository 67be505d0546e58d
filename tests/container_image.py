"""The Dockerfile built and run without a container engine, by mount, process and network namespaces.

    Dockerfile ─► its own RUN and COPY lines, in an empty root folder of ours ─► Image
    Image ─► read-only root, a user without rights, no capability, no network but its own loopback ─► Container

What is replaced, since no registry is asked for five gigabytes:

- the base image: this machine's /usr and Python, mounted read-only, with the few files of /etc that a program needs;
- ``apt-get``: a stand-in that notes its arguments; nginx is this machine's;
- what ``pip install`` would download: this environment's packages, by a .pth file. The project itself is built from
  what COPY brought, and installed, by the Dockerfile's own line.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from checkout import ROOT
from dockerfile_parse import DockerfileParser

PYTHON = Path(sys.base_prefix)
_ETC = ("ld.so.cache", "login.defs", "nsswitch.conf", "ssl/openssl.cnf")
_STAND_IN = "/stand-in"
# Not at their own place: what lies below /tmp here is hidden by the container's own /tmp.
_PACKAGES = f"{_STAND_IN}/packages"
_GIVEN = {"/usr": Path("/usr"), str(PYTHON): PYTHON, _PACKAGES: Path(sysconfig.get_path("purelib"))}
_COMPILERS = ("cc", "c++", "gcc", "g++", "clang", "c99", "c89")


def why_not() -> str:
    """Return why no container can be made here; empty when it can."""
    if os.geteuid() != 0:
        return "namespaces and chroot need root"
    missing = [name for name in ("unshare", "setpriv", "nginx", "chroot", "ip") if shutil.which(name) is None]
    if missing:
        return f"{', '.join(missing)}: not installed"
    tried = subprocess.run(["unshare", "--mount", "--pid", "--net", "--fork", "true"], capture_output=True, text=True)
    return "" if tried.returncode == 0 else f"no namespaces: {tried.stderr.strip()}"


@dataclass
class Instruction:
    """One line of a Dockerfile."""

    name: str
    value: str


@dataclass
class Stage:
    """One FROM of a Dockerfile, as far as it is built."""

    base: str
    name: str
    root: Path
    environment: dict[str, str] = field(default_factory=dict)
    arguments: dict[str, str] = field(default_factory=dict)
    user: str = "0:0"
    folder: str = "/"
    entry_point: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)
    health_check: list[str] = field(default_factory=list)
    ports: list[int] = field(default_factory=list)
    stop_signal: str = "SIGTERM"
    apt_get: list[list[str]] = field(default_factory=list)
    ran: list[str] = field(default_factory=list)


def instructions(path: Path = ROOT / "Dockerfile") -> list[Instruction]:
    """Return the lines of a Dockerfile without its comments."""
    parser = DockerfileParser(path=str(path), cache_content=False, env_replace=False)
    return [
        Instruction(one["instruction"], one["value"]) for one in parser.structure if one["instruction"] != "COMMENT"
    ]


def build(folder: Path, arguments: Mapping[str, str] | None = None) -> Stage:
    """Execute the Dockerfile; return its last stage."""
    given = dict(arguments or {})
    of_the_file: dict[str, str] = {}
    stages: list[Stage] = []
    for one in instructions():
        if one.name == "FROM":
            image, *name = re.split(r"\s+AS\s+", one.value, flags=re.IGNORECASE)
            root = folder / f"stage-{len(stages)}"
            stages.append(Stage(_expanded(image, of_the_file), name[0] if name else "", root))
            _lay_base(root)
            stages[-1].environment["PATH"] = f"{PYTHON}/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin"
        elif one.name == "ARG":
            key, _, value = one.value.partition("=")
            (stages[-1].arguments if stages else of_the_file)[key] = given.get(key, value)
        else:
            _execute(one, stages[-1], stages)
    return stages[-1]


def _execute(one: Instruction, stage: Stage, stages: Sequence[Stage]) -> None:
    if one.name == "ENV":
        for pair in shlex.split(one.value):
            key, _, value = pair.partition("=")
            stage.environment[key] = _expanded(value, stage.environment | stage.arguments)
    elif one.name == "WORKDIR":
        stage.folder = str(Path(stage.folder) / one.value)
        inside(stage.root, stage.folder).mkdir(parents=True, exist_ok=True)
    elif one.name == "COPY":
        _copy(one.value, stage, stages)
    elif one.name == "RUN":
        _run(one.value, stage)
    elif one.name == "USER":
        stage.user = one.value
    elif one.name == "EXPOSE":
        stage.ports += [int(port) for port in one.value.split()]
    elif one.name == "STOPSIGNAL":
        stage.stop_signal = one.value
    elif one.name == "HEALTHCHECK":
        stage.health_check = json.loads(one.value.partition("CMD ")[2])
    elif one.name == "ENTRYPOINT":
        stage.entry_point = json.loads(one.value)
    elif one.name == "CMD":
        stage.command = json.loads(one.value)
    else:
        raise NotImplementedError(f"{one.name} {one.value}")


def _expanded(text: str, names: Mapping[str, str]) -> str:
    return re.sub(r"\$(?:\{(\w+)\}|(\w+))", lambda found: names[found[1] or found[2]], text)


def inside(root: Path, path: str) -> Path:
    """Return where a path of the image lies on this machine."""
    return root / path.lstrip("/")


def _lay_base(root: Path) -> None:
    """Make what stands in for the base image: an empty root, with the mount points of `mounts`."""
    for name in (
        "etc",
        "opt",
        "run",
        "srv",
        "var/lib/apt/lists",
        "var/lib/nginx",
        "var/log/nginx",
        "tmp",
        "proc",
        "dev",
        "sys",
    ):
        (root / name).mkdir(parents=True, exist_ok=True)
    root.chmod(0o755)
    (root / "tmp").chmod(0o1777)
    for name in ("bin", "sbin", "lib", "lib64"):
        (root / name).symlink_to(f"usr/{name}")
    for place in _GIVEN:
        inside(root, place).mkdir(parents=True, exist_ok=True)
    for name in _ETC:
        target = root / "etc" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(Path("/etc") / name, target)
    (root / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534::/:/usr/sbin/nologin\n")
    (root / "etc/group").write_text("root:x:0:\nnogroup:x:65534:\n")
    (root / "etc/hosts").write_text("127.0.0.1 localhost\n")
    tools = inside(root, _STAND_IN)
    (tools / "apt-get").write_text(f'#!/bin/sh\necho "$@" >> {_STAND_IN}/apt-get.log\n')
    (tools / "apt-get").chmod(0o755)


def mounts(root: Path) -> list[str]:
    """Return the shell lines that mount the stand-in of the base image, /proc, /dev and /sys into a root."""
    lines = ["mount --make-rprivate /", f"mount --bind {root} {root}"]
    for place, path in _GIVEN.items():
        target = inside(root, place)
        lines += [f"mount --bind {path} {target}", f"mount -o remount,ro,bind {target}"]
    # A slim image has no compiler, this machine does.
    lines += [
        f"mount --bind /dev/null {root}/usr/bin/{name}" for name in _COMPILERS if (Path("/usr/bin") / name).exists()
    ]
    lines += [f"mount -t tmpfs -o mode=0755 tmpfs {root}/dev"]
    for name in ("null", "zero", "full", "random", "urandom"):
        lines += [f"touch {root}/dev/{name}", f"mount --bind /dev/{name} {root}/dev/{name}"]
    lines += [
        f"mkdir {root}/dev/shm",
        f"mount -t tmpfs -o mode=1777 tmpfs {root}/dev/shm",
        f"ln -s /proc/self/fd {root}/dev/fd",
        f"mount -t proc proc {root}/proc",
        f"mount --rbind /sys {root}/sys",
    ]
    return lines


def _run(line: str, stage: Stage) -> None:
    """Run a RUN line as the image's root, without a network."""
    environment = (
        stage.arguments
        | stage.environment
        | {
            "PATH": f"{_STAND_IN}:{stage.environment['PATH']}",
            # Nothing is downloaded: see the module.
            "PIP_NO_DEPS": "1",
            "PIP_NO_INDEX": "1",
            "PIP_NO_BUILD_ISOLATION": "0",
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2"),
        }
    )
    pairs = [f"{key}={value}" for key, value in environment.items()]
    script = [
        *mounts(stage.root),
        shlex.join(
            ["exec", "chroot", str(stage.root), "env", "-i", f"--chdir={stage.folder}", *pairs, "/bin/sh", "-c", line]
        ),
    ]
    done = subprocess.run(
        ["unshare", "--mount", "--pid", "--net", "--fork", "--kill-child", "/bin/sh", "-euc", "\n".join(script)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"RUN {line}\nexit code {done.returncode}\n{done.stdout}\n{done.stderr}")
    stage.ran.append(line)
    log = inside(stage.root, f"{_STAND_IN}/apt-get.log")
    stage.apt_get = [text.split() for text in log.read_text().splitlines()] if log.exists() else []
    for folder in stage.root.glob("opt/*/lib/python3*/site-packages"):
        (folder / "stand-in.pth").write_text(f"{_PACKAGES}\n")


def _copy(value: str, stage: Stage, stages: Sequence[Stage]) -> None:
    words = shlex.split(value)
    options = [word for word in words if word.startswith("--")]
    *sources, target = [word for word in words if not word.startswith("--")]
    origin = next((option.partition("=")[2] for option in options if option.startswith("--from=")), None)
    assert len(options) == (origin is not None), f"COPY {value}: an option that this test does not know"
    into = inside(stage.root, str(Path(stage.folder) / target))
    for source in sources:
        if origin is not None:
            (other,) = [one for one in stages if one.name == origin]
            path, names = inside(other.root, source), None
        else:
            path, names = ROOT / source, _context()
        end = into / path.name if target.endswith("/") or len(sources) > 1 else into
        _copy_tree(path, end, names)


def _copy_tree(path: Path, end: Path, names: frozenset[str] | None) -> None:
    if path.is_file():
        assert names is None or path.relative_to(ROOT).as_posix() in names, f".dockerignore leaves out {path}"
        end.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, end)
        return
    assert path.is_dir(), f"COPY: there is no {path}"
    for inner in sorted(path.rglob("*")):
        if names is not None and (inner.is_dir() or inner.relative_to(ROOT).as_posix() not in names):
            continue
        to = end / inner.relative_to(path)
        if inner.is_dir() and not inner.is_symlink():
            to.mkdir(parents=True, exist_ok=True)
        else:
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(inner, to, follow_symlinks=False)


def _context() -> frozenset[str]:
    """Return the files that .dockerignore lets into the build's context."""
    patterns = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return frozenset(name for name in listed.stdout.splitlines() if not _is_ignored(name, patterns))


def _is_ignored(name: str, patterns: Sequence[str]) -> bool:
    """Docker's rule: the last pattern that names the path, or a folder above it, decides."""
    ignored = False
    parts = name.split("/")
    for pattern in patterns:
        wanted = pattern.removeprefix("!")
        above = ["/".join(parts[: count + 1]) for count in range(len(parts))]
        if any(
            fnmatchcase(one, wanted) or (wanted.startswith("**/") and fnmatchcase(one.rpartition("/")[2], wanted[3:]))
            for one in above
        ):
            ignored = not pattern.startswith("!")
    return ignored
