"""An exported file and its proof, as tables for people."""

from detserve.export.model import ExportedFile
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from dettools.verification.parity import Parity


def print_export(exported: ExportedFile, console: Console) -> None:
    """Print what was exported, and what was compared before it was written."""
    facts, spec, rehearsal = exported.facts, exported.spec, exported.rehearsal
    state = "not written" if exported.refused else f"{exported.bytes / 1e6:.1f} MB"
    free = " and ".join(facts.dynamic) or "nothing"
    sizes = ", ".join(f"{width}×{height}" for width, height in rehearsal.sizes)
    console.print(
        f"{exported.path}: {spec.name} {spec.version}, {spec.builder}, {len(spec.categories)} classes, "
        f"{facts.precision}, opset {facts.opset}, NMS in the "
        f"{'graph' if facts.nms == 'graph' else 'detector'}, dynamic: {free}, {state}\n"
        f"eager's {rehearsal.detections} detections on the golden image at {sizes}, alone and in a batch: "
        f"{', '.join(rehearsal.compared)}, max Δbox {rehearsal.box_px:.2g} px, max Δscore {rehearsal.score:.2g}",
        highlight=False,
        soft_wrap=True,
    )


def print_parity(parity: Parity, console: Console) -> None:
    """Print the comparison of eager, torch runtime and exported file."""
    tier = parity.tier
    table = Table(
        *("runtime", "batch", "images", "objects", "unmatched", "flips", "Δbox px", "Δscore"),
        title=f"against {parity.eager}",
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
        caption=f"the worst of all; allowed in {parity.precision}: {tier.box_px:g} px, {tier.score:g} in score",
        caption_justify="left",
    )
    masks = any(row.mask_iou is not None for row in parity.rows)
    keypoints = any(row.keypoint_px is not None for row in parity.rows)
    agreeing = parity.precision != "fp32"
    for shown, title in ((masks, "mask IoU"), (keypoints, "Δkeypoint"), (agreeing, "agreeing")):
        if shown:
            table.add_column(title)
    for row in parity.rows:
        cells = [row.runtime, row.batch_size, row.images, row.detections, row.unmatched, row.flips]
        more = [f"{row.box_px:.2g}", f"{row.score:.2g}"]
        if masks:
            more.append("–" if row.mask_iou is None else f"{row.mask_iou:.4f}")
        if keypoints:
            more.append("–" if row.keypoint_px is None else f"{row.keypoint_px:.2g}")
        if agreeing:
            more.append(f"{100 * row.agreeing:.1f}%")
        table.add_row(*map(str, cells), *more)
    console.print(table)
    for check in parity.ap:
        difference = check.difference
        console.print(
            f"AP ({check.iou_type}, {check.images} images): eager {100 * difference.ap_reference:.2f}, torch runtime "
            f"{100 * check.ap_torch:.2f}, onnx {100 * difference.ap_other:.2f}; difference "
            f"{100 * difference.difference:+.3f} (90 % interval {100 * difference.low:+.3f} to "
            f"{100 * difference.high:+.3f}), budget {100 * check.budget:g}",
            highlight=False,
            soft_wrap=True,
        )
