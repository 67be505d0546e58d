"""What an archive holds, as tables for people."""

from typing import Any

from rich.console import Console
from rich.table import Table


def print_archive(document: dict[str, Any], console: Console) -> None:
    """Print what `detserve inspect` found."""
    spec, golden = document["spec"], document["golden"]
    facts = Table(show_header=False, box=None, pad_edge=False)
    facts.add_column(style="bold")
    facts.add_column(overflow="fold")
    source = spec["source"] or {}
    rows = {
        "archive": f"{document['archive']} ({document['bytes'] / 1e6:.1f} MB)",
        "model": f"{spec['name']} {spec['version']}",
        "description": spec["description"],
        "family": f"{spec['family']} {spec['builder']}".strip(),
        "runtime": spec["runtime"],
        "weights": spec["weights"],
        "made from": f"{source.get('file', '?')}, SHA-256 {source.get('sha256', '?')}",
        "licence": spec["license"],
        "golden image": "none" if golden is None else f"{golden['image']}, {len(golden['scores'])} detections",
        "classes": str(len(document["categories"])),
        "serving": ", ".join(f"{key} {value}" for key, value in spec["serving"].items()),
    }
    for key, value in rows.items():
        if value:
            facts.add_row(key, value)
    console.print(facts)
    classes = Table("label", "category_id", "name", "model output", title="category map", title_justify="left")
    for category in document["categories"]:
        classes.add_row(
            str(category["label"]), str(category["category_id"]), category["name"], str(category["model_label"])
        )
    console.print(classes)
    members = Table("member", "bytes", "SHA-256", title="members", title_justify="left")
    for member in document["members"]:
        members.add_row(member["name"], f"{member['size']:,}", member["sha256"][:16])
    console.print(members)
