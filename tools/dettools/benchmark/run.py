"""A whole benchmark: what ran, on what, with which images, its levels and what they are worth; on disk and back.

    FOLDER/run.json        everything computed          FOLDER/samples.jsonl   every request, one per line
    FOLDER/summary.csv     a line per level             FOLDER/summary.md      the table, to paste

The HTML page is drawn from the same two by `dettools.reports.benchmark_page`.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, Self

from detserve.errors import DetserveError
from pydantic import TypeAdapter

from dettools.benchmark.images import ImageFacts
from dettools.benchmark.knee import Knee, Slo, SloVerdict, find_knee, highest_sustained, judge_sweep
from dettools.benchmark.measurement import Level, Load, Sample, Verdict
from dettools.benchmark.percentiles import PERCENTILES, RESAMPLES
from dettools.benchmark.statistics import LevelSummary, plain, summarise
from dettools.benchmark.summary import to_csv, to_markdown
from dettools.benchmark.validity import validate_level, validate_run

Kind = Literal["served", "eager", "runtime"]
FORMAT = "detserve benchmark run"
VERSION = 1
RUN, SAMPLES, CSV, MARKDOWN = "run.json", "samples.jsonl", "summary.csv", "summary.md"


class RunFileError(DetserveError):
    """A benchmark on disk cannot be read."""


@dataclass(frozen=True)
class Run:
    """A benchmark, computed.

    Attributes:
        kind: ``served``, or ``eager`` or ``runtime`` in process, where a level's load is its batch size.
        model: name of the model, or of its file.
        target: what ran, as the worker or the loader describes it, and the address.
        settings: how it was measured, as the command was given it.
        environment: the machine and the versions.
        levels, verdicts: in the order measured, side by side.
        knee: of the levels that are not INVALID.
        sustained: index of the highest rate that is answered as fast as it arrives; None outside rate sweeps.
        slo: None when no SLO was asked for.
        verdict: of the whole run.
    """

    kind: Kind
    title: str
    model: str
    target: dict[str, Any]
    settings: dict[str, Any]
    environment: dict[str, Any]
    images: ImageFacts
    levels: tuple[LevelSummary, ...]
    verdicts: tuple[Verdict, ...]
    knee: Knee | None
    sustained: int | None
    slo: SloVerdict | None
    verdict: Verdict

    @property
    def labels(self) -> tuple[str, ...]:
        """The levels' names as this kind of run calls them."""
        return tuple(label(self.kind, level.load) for level in self.levels)

    @property
    def best(self) -> int | None:
        """Index of the level with the highest throughput among those that are not INVALID."""
        fit = [index for index, verdict in enumerate(self.verdicts) if verdict.stamp != "INVALID"]
        return max(fit, key=lambda index: self.levels[index].throughput_rps.value, default=None)

    def to_json(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        document = {one.name: getattr(self, one.name) for one in fields(self)}
        document |= {
            "images": asdict(self.images),
            "levels": [level.to_json() for level in self.levels],
            "verdicts": [verdict.to_json() for verdict in self.verdicts],
            "knee": None if self.knee is None else asdict(self.knee),
            "slo": None if self.slo is None else asdict(self.slo),
            "verdict": self.verdict.to_json(),
        }
        values: dict[str, Any] = plain(document)
        return {"format": FORMAT, "version": VERSION, **values, "labels": list(self.labels), "best": self.best}

    @classmethod
    def from_json(cls, document: Any) -> Self:
        """Return the run that `to_json` gave.

        Raises:
            ValueError: it is not one.
        """
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise ValueError(f"it has no format {FORMAT!r}")
        if document.get("version") != VERSION:
            raise ValueError(f"it is version {document.get('version')!r}, this detserve reads version {VERSION}")
        plain_fields = ("kind", "title", "model", "target", "settings", "environment", "sustained")
        try:
            return cls(
                **{name: document[name] for name in plain_fields},
                images=TypeAdapter(ImageFacts).validate_python(document["images"]),
                levels=tuple(LevelSummary.from_json(level) for level in document["levels"]),
                verdicts=tuple(Verdict.from_json(verdict) for verdict in document["verdicts"]),
                knee=TypeAdapter(Knee | None).validate_python(document["knee"]),
                slo=TypeAdapter(SloVerdict | None).validate_python(document["slo"]),
                verdict=Verdict.from_json(document["verdict"]),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from error


@dataclass(frozen=True)
class StoredRun:
    """A run and its raw samples, a sequence per level; empty sequences when the samples are not there."""

    run: Run
    samples: tuple[tuple[Sample, ...], ...]
    source: Path


def label(kind: str, load: Load) -> str:
    """Return a level's name: in process, the load is a batch size."""
    return load.name if kind == "served" else f"batch size {load.value:g}"


def make_run(
    kind: Kind,
    model: str,
    levels: Sequence[Level],
    *,
    images: ImageFacts,
    target: dict[str, Any],
    settings: dict[str, Any],
    environment: dict[str, Any],
    title: str = "",
    slo: Slo | None = None,
    interrupted: bool = False,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Run:
    """Compute everything that is said of a benchmark.

    Args:
        images: from `dettools.benchmark.images.describe_images`.
        environment: from `dettools.environment.describe_environment`.
        interrupted: whether levels that were asked for are missing.
        resamples, seed: of the bootstrap.
    """
    percentiles = sorted({*PERCENTILES, *([slo.p] if slo else [])})
    summaries = tuple(summarise(level, percentiles=percentiles, resamples=resamples, seed=seed) for level in levels)
    cores = (environment.get("cpu") or {}).get("cores")
    verdicts = tuple(validate_level(level, kind=kind, cores=cores) for level in summaries)
    fit = [index for index, verdict in enumerate(verdicts) if verdict.stamp != "INVALID"]
    knee = find_knee([summaries[index] for index in fit]) if kind == "served" else None
    return Run(
        kind=kind,
        title=title or f"{model}, {kind}",
        model=model,
        target=target,
        settings=settings,
        environment=environment,
        images=images,
        levels=summaries,
        verdicts=verdicts,
        knee=None if knee is None else Knee(fit[knee.level], knee.power, knee.bracketed),
        sustained=highest_sustained(summaries) if kind == "served" else None,
        slo=judge_sweep(summaries, slo) if slo else None,
        verdict=validate_run(
            summaries,
            verdicts,
            distinct_images=images.distinct,
            interrupted=interrupted,
            names=[label(kind, level.load) for level in summaries],
        ),
    )


def write_run(run: Run, levels: Sequence[Level], folder: Path) -> None:
    """Write ``samples.jsonl``, ``summary.csv``, ``summary.md`` and, last, ``run.json``.

    Raises:
        RunFileError: the folder cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / SAMPLES).open("w", encoding="utf-8") as file:
            for index, level in enumerate(levels):
                for sample in level.samples:
                    line = {"level": index, "load": level.load.name, **asdict(sample)}
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
        (folder / CSV).write_text(to_csv(run), "utf-8")
        (folder / MARKDOWN).write_text(to_markdown(run), "utf-8")
        (folder / RUN).write_text(json.dumps(run.to_json(), indent=1, ensure_ascii=False) + "\n", "utf-8")
    except OSError as error:
        raise RunFileError(f"Cannot write the benchmark to {folder}: {error.strerror}. Name another --out.") from error


def load_run(path: Path) -> StoredRun:
    """Read a run from its folder or its ``run.json``, with the samples beside it when they are there.

    Raises:
        RunFileError: there is none, or it is not one.
    """
    file = path / RUN if path.is_dir() else path
    try:
        run = Run.from_json(json.loads(file.read_text("utf-8")))
    except OSError as error:
        raise RunFileError(
            f"Cannot read {file}: {error.strerror}. "
            f"Expected a folder that `detserve benchmark … --out` wrote, or its {RUN}."
        ) from error
    except ValueError as error:
        first = str(error).splitlines()[0]
        raise RunFileError(f"{file} is not a benchmark's {RUN}: {first}. Measure again with `--out`.") from error
    return StoredRun(run, _read_samples(file.parent / SAMPLES, len(run.levels)), file)


def _read_samples(file: Path, levels: int) -> tuple[tuple[Sample, ...], ...]:
    found: list[list[Sample]] = [[] for _ in range(levels)]
    if not file.is_file():
        return tuple(() for _ in found)
    number = 0
    try:
        with file.open(encoding="utf-8") as lines:
            for line in lines:
                number += 1
                row = json.loads(line)
                index = row.pop("level")
                del row["load"]
                found[index].append(Sample(**row))
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise RunFileError(
            f"{file}, line {number} is not a sample of this run ({type(error).__name__}: {error}). "
            f"Delete the file to go without the raw samples, or measure again."
        ) from error
    return tuple(tuple(samples) for samples in found)
