"""The answer of an operator that is not provided: which one, who asked, and what to do."""

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

from torch import nn

from dethandlers.errors import ArtefactError

if TYPE_CHECKING:
    from types import FrameType


class MissingOperatorError(ArtefactError, NotImplementedError):
    """A model needs an operator of mmcv that neither we nor the installed mmcv have."""

    type = "missing_operator"


def missing(name: str) -> Callable[..., NoReturn]:
    """Return a function that raises `MissingOperatorError` for the operator ``name``."""

    def operator(*_arguments: Any, **_options: Any) -> NoReturn:
        raise MissingOperatorError(_message(name))

    operator.__name__ = name
    return operator


def _message(name: str) -> str:
    part = _asking_module()
    asked = f", which {part} asked for" if part else ""
    if name.endswith("_backward"):
        return f"mmcv operator: got a call of {name}{asked}; expected inference alone. Train with a compiled mmcv."
    return (
        f"mmcv operator: got a call of {name}{asked}; expected one of those that inference of MMDetection's detectors "
        "needs. Install an mmcv with compiled operators: it is used when it is there."
    )


def _asking_module() -> str:
    """The innermost torch modules on the stack, outermost first."""
    found: list[str] = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and len(found) < 3:
        asking = frame.f_locals.get("self")
        if isinstance(asking, nn.Module) and (not found or found[-1] != type(asking).__name__):
            found.append(type(asking).__name__)
        frame = frame.f_back
    return " › ".join(reversed(found))
