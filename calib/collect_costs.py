"""What the models of a table cost, measured here and counted, as the CSV that the search reads."""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from calib.collect_sources import ModelFile
from calib.model_costs import MODEL
from calib.tables import stage_seconds
from edge_runtime.cascade import Cascade
from edge_runtime.console import Console
from edge_runtime.dataset import ImageDataset
from edge_runtime.errors import BackendUnavailable, ConfigError, EngineBuildError
from edge_runtime.files import write_bytes
from edge_runtime.manifest import Bundle
from edge_runtime.scheduler import Scheduler
from edge_runtime.timing import Clock, warm_up

T = TypeVar("T")

SECONDS, MACS = "seconds", "macs"
#: Samples that a file is timed on, at most.
_TIMED = 200

#: Model -> its cost; None where it can't be told.
Costs = dict[str, float | int | None]


def bundle_seconds(
    scheduler: Scheduler, names: Sequence[str], data: ImageDataset, console: Console
) -> Costs:
    """Seconds for one image of every exit's path alone: its stages, and one decision.

    Args:
        scheduler: Opened at `OperatingPoint.all_exits`; it tells how long a stage takes.
        names: What the exits are called, in their order.
        data: Images; the first few hundred are used.
        console: Shows progress.

    Raises:
        BackendError: The backend does not tell how long a stage took.
    """
    seconds, decide_s, frame_s = stage_seconds(scheduler, data, console)
    paths = _paths(scheduler.cascade, seconds)
    return {
        name: path + decide + frame_s
        for name, path, decide in zip(names, paths, decide_s, strict=True)
    }


def bundle_macs(
    bundle: Bundle, names: Sequence[str], image_size: tuple[int, int], console: Console
) -> Costs:
    """Operations for one image of every exit's path alone; None, with a note, if nobody can tell.

    Args:
        bundle: The bundle.
        names: What its exits are called, in their order.
        image_size: (height, width) of the images.
        console: Gets the note.
    """

    def count() -> list[int]:
        from engines.macs import stage_macs

        return [round(cost) for cost in _paths(bundle.cascade, stage_macs(bundle, image_size))]

    found = _told(count, bundle.manifest.name, console)
    return dict.fromkeys(names) if found is None else dict(zip(names, found, strict=True))


def file_seconds(file: ModelFile, console: Console, clock: Clock = time.perf_counter) -> float:
    """Median seconds of an ONNX file for one sample."""
    samples = min(_TIMED, len(next(iter(file.arrays.values()))))
    found = []
    with file.opened() as run:
        warm_up(lambda: run(0, 1), clock=clock)
        for row in console.progress(range(samples), f"timing {file.path}"):
            begin = clock()
            run(row, row + 1)
            found.append(clock() - begin)
    return float(np.median(found))


def file_macs(file: ModelFile, console: Console) -> int | None:
    """Operations of an ONNX file for one sample; None, with a note, where nobody can tell."""
    return _told(file.macs, str(file.path), console)


def check_costs(path: Path | None, *, overwrite: bool) -> None:
    """Refuse a file to write, before any long work.

    Raises:
        ConfigError: Its folder does not exist, or it exists and may not be replaced.
    """
    if path is None:
        return
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"the folder {path.parent} does not exist", remedy="Create it first")
    if path.exists() and not (overwrite and path.is_file()):
        raise ConfigError(f"{path} exists", remedy="Choose another --costs, or give --overwrite")


def write_costs(path: Path, seconds: Mapping[str, float | int | None], macs: Costs) -> None:
    """Write `model,seconds,macs`, a row per model; without macs where one's are not known.

    Raises:
        EdgeRuntimeError: The file can't be written.
    """
    columns = {SECONDS: seconds}
    if None not in macs.values():
        columns[MACS] = macs
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([MODEL, *columns])
    for name in seconds:
        writer.writerow([name, *(column[name] for column in columns.values())])
    write_bytes(path, text.getvalue().encode())


def _paths(cascade: Cascade, stages: Mapping[str, float] | Mapping[str, int]) -> list[float]:
    """Cost of all stages that each exit needs."""
    return [
        sum(stages[stage.name] for stage in cascade.plan([k]).stages)
        for k in range(len(cascade.exits))
    ]


def _told(count: Callable[[], T], what: str, console: Console) -> T | None:
    try:
        return count()
    except (EngineBuildError, BackendUnavailable) as error:
        console.note(f"{what}: the costs get no column {MACS}: {error}")
        return None
