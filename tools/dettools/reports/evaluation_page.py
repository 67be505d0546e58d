"""An evaluation as one HTML page that needs nothing beside it."""

import io
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import matplotlib as mpl
from markupsafe import Markup
from matplotlib.figure import Figure

from dettools.coco_metrics import Metrics
from dettools.evaluation.certificate import Certificate
from dettools.evaluation.evaluation import Evaluation

_HEADLINE = ("AP", "AP50", "AP75")


def write_page(evaluation: Evaluation, path: Path) -> Path:
    """Write the page; return its path."""
    template = files("dettools.reports").joinpath("templates/evaluation.html.j2").read_text("utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(environment.from_string(template).render(_content(evaluation)), encoding="utf-8")
    return path


def _content(evaluation: Evaluation) -> dict[str, Any]:
    document = evaluation.to_json()
    first = next(iter(evaluation.metrics.values()))
    called = evaluation.as_called
    return {
        "name": evaluation.name,
        "annotations": evaluation.truth.path.name,
        "images": len(evaluation.answers),
        "objects": first.objects,
        "categories": len(evaluation.truth.categories),
        "accepted": [objection.sentence() for objection in evaluation.accepted],
        "failed": document["failed_images"],
        "blocks": [
            _block(kind, metrics, evaluation.metrics_answered.get(kind)) for kind, metrics in evaluation.metrics.items()
        ],
        "certificate": None if evaluation.certificate is None else _certificate(evaluation.certificate),
        "threshold": f"{evaluation.limits.effective_threshold:g}",
        "max_detections": evaluation.limits.max_detections,
        "as_called": None
        if called is None
        else {
            "score_threshold": f"{called.score_threshold:g}",
            "max_detections": called.max_detections,
            "ap": _figure(called.ap),
            "ap50": _figure(called.ap50),
        },
        "answered": document["answered"],
        "resumed": evaluation.resumed,
        "seconds": f"{evaluation.seconds:.1f}",
        "events": evaluation.events_by_kind(),
        "notes": evaluation.notes,
        "facts": sorted((key, str(value)) for key, value in document["facts"].items() if value is not None),
    }


def _block(kind: str, metrics: Metrics, answered: Metrics | None) -> dict[str, Any]:
    return {
        "kind": kind,
        "headline": [(name, _figure(metrics.figures.get(name))) for name in _HEADLINE],
        "figures": [(name, _figure(value)) for name, value in metrics.figures.items()],
        "answered": None if answered is None else [_figure(value) for value in answered.figures.values()],
        "classes": [
            {
                "name": one.name,
                "ap": _figure(one.ap),
                "width": f"{8 * (one.ap or 0):.2f}",
                "ap50": _figure(one.ap50),
                "ar": _figure(one.ar),
                "objects": one.objects,
                "detections": one.detections,
            }
            for one in sorted(metrics.per_class, key=lambda one: (one.ap is None, -(one.ap or 0), one.name))
        ],
    }


def _certificate(certificate: Certificate) -> dict[str, Any]:
    return {
        "passed": certificate.passed,
        "sentence": certificate.sentence(),
        "reference": certificate.reference,
        "images": certificate.images,
        "resamples": certificate.resamples,
        "p_lower": certificate.p_lower,
        "p_upper": certificate.p_upper,
        "reached": sum(image.passed for image in certificate.comparison.images),
        "tier": certificate.comparison.required,
        "counterexamples": certificate.counterexamples,
        "picture": Markup(_interval_svg(certificate)),  # noqa: S704 - our own SVG
    }


def _interval_svg(certificate: Certificate) -> str:
    """Draw the interval of ΔAP inside, or outside, the margin."""
    margin, low, high = (100 * value for value in (certificate.margin, certificate.low, certificate.high))
    reach = 1.6 * max(margin, abs(low), abs(high))
    colour = "#1a7f37" if certificate.passed else "#b42318"
    figure = Figure(figsize=(7, 1.3), layout="constrained")
    axes = figure.subplots()
    axes.axvspan(-margin, margin, color="#dafbe1")
    axes.axvline(0, color="#57606a", linewidth=0.8)
    axes.plot([low, high], [0, 0], color=colour, linewidth=3, solid_capstyle="butt")
    axes.plot([100 * certificate.difference], [0], "o", color=colour)
    axes.set(xlim=(-reach, reach), ylim=(-1, 1), yticks=[], xlabel="served − reference, AP points (green: the margin)")
    for side in ("left", "right", "top"):
        axes.spines[side].set_visible(False)
    return svg(figure)


def svg(figure: Figure) -> str:
    """Return a figure as an SVG element, the same bytes each time."""
    stream = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "detserve", "svg.fonttype": "none"}):
        figure.savefig(stream, format="svg", metadata={"Date": None})
    text = stream.getvalue()
    return text[text.index("<svg") :]


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
