"""What an archive or an exported file holds, as tables for people."""

from typing import Any

from rich.console import Console
from rich.table import Table


def print_archive(document: dict[str, Any], console: Console) -> None:
    """Print what `detserve inspect` found in an archive."""
    signature = document["signature"]
    named = f"names the key {signature['key']} (check it: detserve verify --trusted-key)" if signature else ""
    _print_facts(
        document,
        console,
        {"archive": f"{document['archive']} ({document['bytes'] / 1e6:.1f} MB)"},
        {"signature": named},
    )
    _print_categories(document, console)
    members = Table("member", "bytes", "SHA-256", title="members", title_justify="left")
    for member in document["members"]:
        members.add_row(member["name"], f"{member['size']:,}", member["sha256"][:16])
    console.print(members)


def print_exported(document: dict[str, Any], console: Console) -> None:
    """Print what `detserve inspect` found in an exported file."""
    spec, export = document["spec"], document["export"]
    preprocessing = spec["preprocessing"]
    size = (
        f"{preprocessing['size'][0]}×{preprocessing['size'][1]}"
        if preprocessing["resize"] != "shorter_side"
        else f"{preprocessing['shorter_side']}, longer side at most {preprocessing['longer_side']}, padded to "
        f"multiples of {preprocessing['divisor']}"
    )
    more = {
        "SHA-256": document["sha256"],
        "exported by": f"detserve {export['detserve']}, torch {export['torch']}, torchvision {export['torchvision']}, "
        f"{export['exporter']}, opset {export['opset']}"
        if export
        else "",
        "precision": spec["serving"]["precision"],
        "preprocessing": f"{preprocessing['resize']} {size} px, {preprocessing['channel_order']}, scale "
        f"{preprocessing['scale']:.6g}, mean {preprocessing['mean']}, std {preprocessing['std']}",
        "decoding": f"NMS in the {'graph' if spec['decoding']['nms'] == 'graph' else 'detector'} at IoU "
        f"{spec['decoding']['nms_iou']:g}",
    }
    _print_facts(document, console, {"file": f"{document['file']} ({document['bytes'] / 1e6:.1f} MB)"}, more)
    ports = Table("", "name", "type", "shape", "default", title="inputs and outputs", title_justify="left")
    for way, rows in (("input", document["inputs"]), ("output", document["outputs"])):
        for one in rows:
            default = "" if one["default"] is None else f"{one['default']:g}"
            ports.add_row(way, one["name"], one["type"], " × ".join(map(str, one["shape"])) or "scalar", default)
    console.print(ports)
    _print_categories(document, console)


def _print_facts(document: dict[str, Any], console: Console, first: dict[str, str], more: dict[str, str]) -> None:
    spec, golden = document["spec"], document["golden"]
    facts = Table(show_header=False, box=None, pad_edge=False)
    facts.add_column(style="bold")
    facts.add_column(overflow="fold")
    source = spec["source"] or {}
    rows = {
        **first,
        "model": f"{spec['name']} {spec['version']}",
        "description": spec["description"],
        "family": f"{spec['family']} {spec['builder']}".strip(),
        "runtime": spec["runtime"],
        "weights": spec["weights"],
        "made from": f"{source.get('file', '?')}, SHA-256 {source.get('sha256', '?')}",
        "licence": spec["license"],
        "golden image": "none" if golden is None else f"{golden['image']}, {len(golden['scores'])} detections",
        "classes": str(len(document["categories"])),
        **more,
        "serving": ", ".join(f"{key} {value}" for key, value in spec["serving"].items()),
    }
    for key, value in rows.items():
        if value:
            facts.add_row(key, value)
    console.print(facts)


def _print_categories(document: dict[str, Any], console: Console) -> None:
    classes = Table("label", "category_id", "name", "model output", title="category map", title_justify="left")
    for category in document["categories"]:
        classes.add_row(
            str(category["label"]), str(category["category_id"]), category["name"], str(category["model_label"])
        )
    console.print(classes)
