"""An evaluation, its certificate or its refusal as text."""

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dettools.coco_metrics import Metrics
from dettools.evaluation.certificate import Certificate
from dettools.evaluation.evaluation import Evaluation
from dettools.evaluation.request import RefusedError
from dettools.evaluation.shards import Part

_FIGURES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR100")
_SHOWN = 10


def print_evaluation(evaluation: Evaluation, console: Console, *, per_class: bool = False) -> None:
    """Print the figures, what failed, what was got over, and the certificate."""
    if evaluation.accepted:
        console.print("[bold red]NOT COMPARABLE[/] objections were accepted:")
        for objection in evaluation.accepted:
            console.print(f"  {escape(objection.sentence())}")
    console.print(f"[bold]{escape(evaluation.name)}[/] on {escape(str(evaluation.truth.path))}")
    table = Table(box=None, pad_edge=False, padding=(0, 1))
    table.add_column("")
    for figure in _FIGURES:
        table.add_column(figure, justify="right", no_wrap=True)
    for iou_type, metrics in evaluation.metrics.items():
        table.add_row(iou_type, *_figures(metrics))
    for iou_type, metrics in evaluation.metrics_answered.items():
        table.add_row(f"{iou_type}, answered only", *_figures(metrics))
    console.print(table)
    answered = len(evaluation.answers) - len(evaluation.failed)
    resumed = f", {evaluation.resumed} of them by an earlier run" if evaluation.resumed else ""
    console.print(f"{answered} of {len(evaluation.answers)} images answered{resumed}, in {evaluation.seconds:.1f} s")
    if evaluation.as_called is not None:
        called = evaluation.as_called
        console.print(
            f"as called without options (threshold {called.score_threshold:g}, at most {called.max_detections}): "
            f"AP {_figure(called.ap)}, AP50 {_figure(called.ap50)}"
        )
    for kind, count, first, last in evaluation.events_by_kind():
        console.print(f"[yellow]sent again[/] {count} requests after: {kind} (from {first:.1f} s to {last:.1f} s)")
    for answer in evaluation.failed[:_SHOWN]:
        reason = answer.failure.message if answer.failure else ""
        console.print(f"[red]failed[/] {escape(answer.file_name)}: {escape(reason)}", soft_wrap=True)
    if len(evaluation.failed) > _SHOWN:
        console.print(f"[red]failed[/] and {len(evaluation.failed) - _SHOWN} more images: see metrics.json")
    for note in evaluation.notes:
        console.print(f"note: {escape(note)}")
    if per_class:
        for iou_type, metrics in evaluation.metrics.items():
            _print_classes(iou_type, metrics, console)
    if evaluation.certificate is not None:
        print_certificate(evaluation.certificate, console)


def print_part(part: Part, console: Console) -> None:
    """Print what one shard answered; figures are the whole's alone."""
    answered = part.images - len(part.failed)
    console.print(f"shard {part.shard}: {answered} of {part.images} images answered, in {part.seconds:.1f} s")
    for answer in part.failed[:_SHOWN]:
        reason = answer.failure.message if answer.failure else ""
        console.print(f"[red]failed[/] {escape(answer.file_name)}: {escape(reason)}", soft_wrap=True)
    if len(part.failed) > _SHOWN:
        console.print(f"[red]failed[/] and {len(part.failed) - _SHOWN} more images")


def print_certificate(certificate: Certificate, console: Console) -> None:
    """Print the verdict and the images that speak against it."""
    colour = "green" if certificate.passed else "red"
    console.print(
        f"[bold {colour}]{'CERTIFIED' if certificate.passed else 'NOT CERTIFIED'}[/] {certificate.sentence()}"
    )
    console.print(f"  reference: {escape(certificate.reference)}")
    comparison = certificate.comparison
    passed = sum(image.passed for image in comparison.images)
    console.print(f"  {passed} of {len(comparison.images)} images reach the tier {comparison.required}")
    for one in certificate.counterexamples[:_SHOWN]:
        console.print(
            f"  {escape(one.image)}: {', '.join(one.reasons)}; {escape(one.detail)} (ΔAP {100 * one.ap_effect:+.3f})",
            soft_wrap=True,
        )
    for hint in comparison.hints:
        console.print(f"  hint: {escape(hint.message)}")


def print_refusal(refused: RefusedError, console: Console) -> None:
    """Print why it was not evaluated."""
    console.print("[bold red]REFUSED[/] the figure would not be this model's COCO AP:")
    for objection in refused.objections:
        console.print(f"  {escape(objection.sentence())}", soft_wrap=True)
    console.print("Evaluate it all the same with --accept-objections; the report is stamped NOT COMPARABLE.")


def _print_classes(kind: str, metrics: Metrics, console: Console) -> None:
    table = Table(title=f"{kind} by category", title_justify="left", box=None, pad_edge=False)
    for name in ("category", "AP", "AP50", "objects", "detections"):
        table.add_column(name, justify="left" if name == "category" else "right")
    for one in metrics.per_class:
        table.add_row(escape(one.name), _figure(one.ap), _figure(one.ap50), str(one.objects), str(one.detections))
    console.print(table)


def _figures(metrics: Metrics) -> list[str]:
    return [_figure(metrics.figures.get(name)) for name in _FIGURES]


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
