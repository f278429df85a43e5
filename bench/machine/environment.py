"""Where numbers were made: what the machine is, and in what condition it was; sets nothing.

```
stamp()                          # once: board, releases, power mode, clocks, ...
before = condition()             # before and after: temperatures, frequencies, load, ...
...
steal_share(before, condition())  # what a hypervisor took away meanwhile, None where not told
```

A result's environment is `{"stamp": ..., "before": ..., "after": ..., "threads": n,
"clocks_locked_by_us": bool}`; `rows` and `differences` show any, those of strangers too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from bench.machine import clock_state, facts, nvidia, programs
from bench.machine.programs import Run
from edge_runtime import device
from edge_runtime.power import thermal

#: Facts about a GPU that stay; the others change.
_LASTING = ("name", "graphics_most_mhz", "sm_most_mhz", "applications_mhz", "power_limit_w")
_PASSING = ("name", "graphics_mhz", "sm_mhz", "memory_mhz", "celsius", "state", "slowed_by")
#: Longest text and most items that a row shows.
_LONGEST, _MOST = 300, 32
#: Row that no two results have in common.
_TIME = "measured from / to"
#: What the kernel says of two threads per core, in words.
_SMT = {"on": "yes", "off": "no", "forceoff": "no", "notsupported": "no", "notimplemented": ""}
#: Keys that have rows of their own.
_SHOWN = {
    *("stamp", "before", "after", "threads", "clocks_locked_by_us", "machine", "board"),
    *("computer", "l4t", "jetpack", "driver", "cuda", "cuda_of_driver", "tensorrt"),
    *("onnxruntime", "packages"),
    *("gpus", "no_gpu", "power_mode", "clocks", "memory_bytes", "virtual", "kernel", "smt"),
}


def stamp(*, root: Path = Path("/"), run: Run = programs.run) -> dict[str, Any]:
    """What doesn't change during a run, as plain JSON.

    What there is not is None or absent; where a reader would ask why, a text tells it.

    Args:
        root: Where the system's files are.
        run: Runs a program.
    """
    gpus = nvidia.gpus(run)
    names = _gpu_names(root, gpus)
    releases = facts.releases(root)
    jetson = facts.is_jetson(root)
    return {
        "machine": device.fingerprint(),
        "board": facts.board(root),
        "computer": facts.computer(root),
        **releases,
        "driver": gpus.driver or releases.get("driver"),
        "cuda_of_driver": gpus.cuda or None,
        "onnxruntime": facts.onnxruntime(),
        "packages": facts.versions(),
        "gpus": [{k: gpu[k] for k in _LASTING if k in gpu} for gpu in gpus.each]
        or [{"name": name} for name in names],
        **({} if names else {"no_gpu": gpus.why_not or "the driver knows of none"}),
        "power_mode": clock_state.power_mode(run) if jetson else None,
        "clocks": clock_state.clocks(root, run, names),
        "memory_bytes": facts.memory_bytes(root),
        "virtual": facts.virtual(root),
        "kernel": facts.kernel_options(root),
        "smt": facts.smt(root),
    }


def _gpu_names(root: Path, gpus: nvidia.Gpus) -> list[str]:
    """Names of the GPUs; without NVML and nvidia-smi as the driver's files or the board tell."""
    told = [str(gpu.get("name", "unnamed")) for gpu in gpus.each]
    if told:
        return told
    for folder in sorted((root / "proc/driver/nvidia/gpus").glob("*")):
        model = facts.read(folder, "information").partition("\n")[0].partition(":")
        told.append(model[2].strip() or folder.name)
    if not told and facts.is_jetson(root):
        told = [f"GPU of {facts.board(root) or 'a Jetson'}"]
    return told


def condition(*, root: Path = Path("/"), run: Run = programs.run) -> dict[str, Any]:
    """What changes, as plain JSON; taken before a run and after it.

    Args:
        root: Where the system's files are.
        run: Runs a program; only nvidia-smi, and only where nvidia-ml-py is missing.
    """
    gpus = [{k: gpu[k] for k in _PASSING if k in gpu} for gpu in nvidia.gpus(run).each]
    if not gpus:
        for folder in facts.jetson_gpu_clocks(root):
            hertz = facts.number(folder, "cur_freq")
            if hertz is not None:
                gpus.append({"name": folder.name, "graphics_mhz": hertz / 1e6})
    return {
        "time": datetime.now().astimezone().isoformat(timespec="seconds"),
        "temperatures": dict(thermal.temperatures(root)),
        "cpu_mhz": facts.cpu_mhz(root),
        "gpus": gpus,
        "load_average": facts.load_average(root),
        "jiffies": facts.jiffies(root),
    }


def steal_share(before: Mapping[str, Any], after: Mapping[str, Any]) -> float | None:
    """Share of the cores' time that a hypervisor gave to others, between two conditions.

    Args:
        before: What `condition` returned.
        after: The same, later.

    Returns:
        In [0, 1]; None where the system did not tell, or no time has passed.
    """
    first, last = _map(_map(before).get("jiffies")), _map(_map(after).get("jiffies"))
    told = [_number(d.get(name)) for name in ("steal", "total") for d in (first, last)]
    if None in told:
        return None
    steal_before, steal_after, total_before, total_after = (float(value or 0) for value in told)
    total = total_after - total_before
    return min(max((steal_after - steal_before) / total, 0.0), 1.0) if total > 0 else None


def rows(environment: Mapping[str, Any]) -> list[tuple[str, str]]:
    """A result's environment for people: name and value.

    Args:
        environment: Anything: what is missing or of another shape is left out, and what has no name
            here is shown under its own.

    Returns:
        One row per known fact, texts on one line and not longer than a few hundred characters.
    """
    known = _map(environment)
    stamped = _map(known.get("stamp")) or known
    before, after = _map(known.get("before")), _map(known.get("after"))
    found: dict[str, str] = {}
    for name, value in (
        *_what_it_is(stamped),
        *_how_it_was_set(stamped),
        ("threads", _threads(known.get("threads"))),
        ("clocks locked by this run", _text(known.get("clocks_locked_by_us"))),
        *_how_it_was(before, after),
        *((_text(k), _text(v)) for k, v in (*known.items(), *stamped.items()) if k not in _SHOWN),
    ):
        if value:
            found.setdefault(name, value)
    return list(found.items())


def differences(environments: Sequence[Mapping[str, Any]]) -> list[tuple[str, tuple[str, ...]]]:
    """The rows in which environments differ, the time of day aside.

    Args:
        environments: Of the results that are compared.

    Returns:
        Name of the row, and its value in each, "-" where it has none.
    """
    tables = [dict(rows(environment)) for environment in environments]
    names = dict.fromkeys(name for table in tables for name in table if name != _TIME)
    lines = [(name, tuple(table.get(name, "-") for table in tables)) for name in names]
    return [(name, values) for name, values in lines if len(set(values)) > 1]


def _what_it_is(stamped: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    host = _map(stamped.get("machine"))
    runtime = _map(stamped.get("onnxruntime"))
    yield "CPU", _text(host.get("cpu"))
    yield "cores", _text(host.get("cores"))
    yield "board", _text(stamped.get("board"))
    yield "computer", _text(stamped.get("computer"))
    yield "GPU", _text(_names(stamped.get("gpus"))) or _none(stamped.get("no_gpu"))
    memory = _number(stamped.get("memory_bytes"))
    yield "memory", "" if memory is None else f"{memory / 2**30:.1f} GiB"
    virtual = _map(stamped.get("virtual"))
    yield "virtual machine", _text(virtual.get("machine"))
    yield "container", _text(virtual.get("container"))
    yield "system", _text([host.get("system"), host.get("machine")])
    yield "L4T", _text(stamped.get("l4t"))
    yield "JetPack", _text(stamped.get("jetpack"))
    yield "NVIDIA driver", _text(stamped.get("driver"))
    yield "CUDA of the driver", _text(stamped.get("cuda_of_driver"))
    yield "CUDA toolkit", _text(stamped.get("cuda"))
    yield "TensorRT", _text(stamped.get("tensorrt"))
    providers = _text(runtime.get("providers")).replace("ExecutionProvider", "")
    version = _text(runtime.get("version"))
    told = f"{version} ({providers})" if providers else version
    yield "ONNX Runtime", told or _text(stamped.get("onnxruntime"))
    yield "Python", _text(host.get("python"))
    for packages in (host.get("packages"), stamped.get("packages")):
        for name, release in _map(packages).items():
            if name not in ("onnxruntime", "tensorrt"):
                yield _text(name), _text(release)


def _how_it_was_set(stamped: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    mode = stamped.get("power_mode")
    name, index = _text(_map(mode).get("name")), _text(_map(mode).get("number"))
    yield "power mode", (f"{name} (number {index})" if name and index else name) or _text(mode)
    clocks = stamped.get("clocks")
    state, why = _text(_map(clocks).get("state")), _text(_map(clocks).get("why"))
    yield "clocks", (f"{state}: {why}" if state and why else state) or _text(clocks)
    yield "governor", _text(_map(clocks).get("governor"))
    yield "boost", _text(_map(clocks).get("boost"))
    limits = [_map(gpu).get("power_limit_w") for gpu in _list(stamped.get("gpus"))]
    yield "power limit of the GPU", _text([f"{_text(w)} W" for w in limits if _text(w)])
    yield "kept for few", _text(stamped.get("kernel"))
    smt = _text(stamped.get("smt"))
    yield "two threads per core", _SMT.get(smt, smt)


def _how_it_was(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    ends = (before, after)
    yield _TIME, _pair([_text(end.get("time")) for end in ends])
    heat = [_map(end.get("temperatures")) for end in ends]
    yield "temperatures before / after, °C", _each([_whole(zones) for zones in heat])
    speeds = [_map(end.get("cpu_mhz")) for end in ends]
    yield "CPU before / after, MHz", _each([_whole(each) for each in speeds])
    gpus = [[_map(gpu) for gpu in _list(end.get("gpus"))] for end in ends]
    for key, name in (
        ("graphics_mhz", "GPU before / after, MHz"),
        ("celsius", "GPU before / after, °C"),
        ("slowed_by", "GPU held back by, before / after"),
    ):
        yield name, _pair([_text([_rounded(gpu.get(key)) for gpu in each]) for each in gpus])
    loads = [_list(end.get("load_average"))[:1] for end in ends]
    told = [_number(load[0]) if load else None for load in loads]
    yield (
        "load before / after",
        _pair(["" if load is None else f"{load:.1f}" for load in told]),
    )
    share = steal_share(before, after)
    yield "taken by the hypervisor", "" if share is None else f"{100 * share:.1f} %"


def _names(gpus: object) -> list[object]:
    return [_map(gpu).get("name") for gpu in _list(gpus)]


def _none(why: object) -> str:
    return f"none: {_text(why)}" if _text(why) else ""


def _threads(count: object) -> str:
    """The number of threads; 0 leaves it to ONNX Runtime."""
    return "as many as the cores" if _number(count) == 0 else _text(count)


def _whole(values: Mapping[str, Any]) -> dict[str, str]:
    return {_text(name): _text(_rounded(value)) for name, value in values.items()}


def _rounded(value: object) -> object:
    number = _number(value)
    return value if number is None else round(number)


def _each(ends: Sequence[Mapping[str, str]]) -> str:
    """Before and after of several things."""
    names = list(dict.fromkeys(name for end in ends for name in end))[:_MOST]
    pairs = ((name, _pair([end.get(name, "") for end in ends])) for name in names)
    return ", ".join(f"{name} {pair}" for name, pair in pairs if pair)


def _pair(ends: Sequence[str]) -> str:
    return " / ".join(end or "-" for end in ends) if any(ends) else ""


def _map(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _list(value: object) -> list[Any]:
    return list(value[:_MOST]) if isinstance(value, list | tuple) else []


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < 2**63 and math.isfinite(value) else None


def _text(value: object, depth: int = 3) -> str:
    """A value on one line; "" for None and for what is too deep."""
    if value is None or depth == 0:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        number = _number(value)
        return "" if number is None else f"{number:.10g}"
    if isinstance(value, Mapping):
        pairs = ((str(name), _text(item, depth - 1)) for name, item in list(value.items())[:_MOST])
        value = ", ".join(f"{name} {text}" for name, text in pairs if text)
    elif isinstance(value, list | tuple):
        value = ", ".join(filter(None, (_text(item, depth - 1) for item in value[:_MOST])))
    line = "".join(c if c.isprintable() else " " for c in str(value)[: 2 * _LONGEST])
    line = " ".join(line.split())
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST - 3]}..."
