"""Analysis results as HTML pages of one look, which need nothing from a network."""

from pathlib import Path
from typing import Any

import jinja2


def write_analysis_page(path: Path, template: str, **content: Any) -> Path:
    """Fill a template that extends ``analysis.html.j2``; return the path."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("dettools.reports"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    path.write_text(environment.get_template(template).render(**content), encoding="utf-8")
    return path
