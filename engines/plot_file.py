"""Where a picture goes: checked before the work, written whole or not at all."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING

from edge_runtime.errors import ConfigError, EdgeRuntimeError, missing_package

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SUFFIXES = (".pdf", ".png", ".svg")

#: Colours that people with any colour vision tell apart (Okabe and Ito).
BLUE, ORANGE, GREEN, PURPLE = "#0072b2", "#d55e00", "#009e73", "#cc79a7"
GREY, BLACK = "#999999", "#000000"


def check_plot(path: Path | None) -> None:
    """Refuse a picture that can't be drawn, before anything long begins.

    Args:
        path: The file of `--plot`, None where no picture is wanted.

    Raises:
        ConfigError: It has another suffix than .pdf, .png or .svg, or its folder does not exist.
        BackendUnavailable: matplotlib is not installed.
    """
    if path is None:
        return
    if path.suffix not in _SUFFIXES or path.is_dir() or not path.absolute().parent.is_dir():
        raise ConfigError(
            f"--plot {path}", expected=f"a file {', '.join(_SUFFIXES)} in a folder that exists"
        )
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise missing_package("matplotlib", "calib") from error


def new_figure(width: float, height: float) -> Figure:
    """An empty picture without a window; sizes in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    figure = Canvas(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write a picture so that a reader sees the old one or the new one.

    Raises:
        EdgeRuntimeError: The file can't be written.
    """
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(8)}{path.suffix}")
    try:
        figure.savefig(temporary, dpi=130)
        temporary.replace(path)
    except OSError as error:
        raise EdgeRuntimeError(f"{path} can't be written: {error.strerror or error}") from error
    finally:
        if os.path.lexists(temporary):
            temporary.unlink()
