"""Whether clocks are locked or float, and a Jetson's power mode; reads, and sets nothing.

A Jetson is asked by `jetson_clocks --show`, which wants root. Without it sysfs tells of CPU and
GPU, but not of the memory (EMC). What both programs printed on boards with JetPack 4 to 7 is in
`tests/bench/recorded.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.machine import facts
from bench.machine.programs import Run, first_line

_SHOWN = re.compile(
    r"^\s*(cpu\d+|GPU|EMC)\b:?(.*?)\bMinFreq=(\d+) +MaxFreq=(\d+) +CurrentFreq=(\d+)"
    r"(?: +FreqOverride=(\d+))?",
    re.MULTILINE,
)
#: A clock that is this near to its limit stands at it.
_NEAR = 0.02


@dataclass(frozen=True)
class _Clock:
    """Where a clock may go and where it stands, in MHz.

    Attributes:
        name: cpu0, GPU, EMC, ...
        least: Lowest that it may go.
        most: Highest.
        now: Where it stands; None where that tells nothing.
        forced: Whether it is held at its highest, where this says so and not `least`.
    """

    name: str
    least: float
    most: float
    now: float | None = None
    forced: bool = False

    @property
    def why_not_locked(self) -> str:
        if self.least != self.most and not self.forced:
            return f"{self.name} may run at {self.least:g} to {self.most:g} MHz"
        if self.now is not None and abs(self.now - self.most) > _NEAR * self.most:
            return f"{self.name} is set to {self.most:g} MHz but runs at {self.now:g}"
        return ""


def power_mode(run: Run) -> dict[str, Any] | str:
    """A Jetson's power mode: its name and number, or "unknown: " and why."""
    answer = run(["nvpmodel", "-q"])
    # With root or without, a warning about the fan may stand above it.
    told = re.search(r"NV Power Mode: *(\S.*?) *$(?:\s*^(\d+)\s*$)?", answer.output, re.MULTILINE)
    if told is None:
        said = first_line(answer.output) or "it says nothing"
        return f"unknown: {answer.why_not or f'nvpmodel: {said}'}"
    return {"name": told[1], "number": None if told[2] is None else int(told[2])}


def clocks(root: Path, run: Run, gpus: Sequence[str] = ()) -> dict[str, Any]:
    """Whether this machine's clocks are locked.

    Args:
        root: Where the system's files are.
        run: Runs a program.
        gpus: Names of the NVIDIA GPUs of a desktop, whose locks can't be read.

    Returns:
        "state": locked, floating or unknown; "why"; and what is known of "cpu", "gpu" and "memory":
        least_mhz, most_mhz, now_mhz.
    """
    if facts.is_jetson(root):
        return _of_jetson(root, run)
    cpus = _cpus(root)
    details = _details(cpus) | _governors(root)
    if not cpus:
        return {
            "state": "unknown",
            "why": "the system shows no CPU frequencies, as in most virtual machines",
            **details,
        }
    why = _why(cpus)
    if why:
        return {"state": "floating", "why": why, **details}
    if gpus:
        told = "the CPU's clocks are locked; a driver does not tell whether the GPU's are"
        return {"state": "unknown", "why": told, **details}
    return {"state": "locked", "why": "all cores have one frequency only", **details}


def _of_jetson(root: Path, run: Run) -> dict[str, Any]:
    answer = run(["jetson_clocks", "--show"])
    shown = _shown(answer.output)
    if {"cpu", "gpu", "memory"} <= _details(shown).keys():
        why = _why(shown)
        held = "CPU, GPU and memory stand at their highest"
        return {
            "state": "floating" if why else "locked",
            "why": why or held,
            **_details(shown),
        }
    seen = [*_cpus(root), *_gpu_of_jetson(root)]
    details = _details(seen) | _governors(root)
    said = answer.why_not or "jetson_clocks --show does not tell of CPU, GPU and memory (EMC)"
    why = _why(seen)
    if why:
        return {"state": "floating", "why": why, **details}
    if {"cpu", "gpu"} <= details.keys():
        said = f"CPU and GPU are locked; the memory's clock does not show: {said}"
    return {"state": "unknown", "why": said, **details}


def _shown(output: str) -> list[_Clock]:
    """Clocks as `jetson_clocks --show` lists them: CPUs in kHz, the others in Hz.

    Up to JetPack 6 a locked EMC keeps its lowest MinFreq and has FreqOverride=1.
    """
    found = []
    online = _online(output)
    for name, flags, *values, override in _SHOWN.findall(output):
        if "Online=0" in flags or (name.startswith("cpu") and online and name not in online):
            continue
        scale = 1e3 if name.startswith("cpu") else 1e6
        least, most, now = (int(value) / scale for value in values)
        found.append(_Clock(name, least, most, now, override not in ("", "0")))
    return found


def _online(output: str) -> set[str]:
    """Names of the CPUs that are online; empty where that isn't told."""
    told = re.search(r"^\s*Online CPUs: *([\d,-]+)", output, re.MULTILINE)
    names: set[str] = set()
    for part in told[1].split(",") if told else ():
        first, _, last = part.partition("-")
        if first.isdecimal() and (last or first).isdecimal() and int(last or first) < 4096:
            names |= {f"cpu{i}" for i in range(int(first), int(last or first) + 1)}
    return names


def _cpus(root: Path) -> list[_Clock]:
    """Limits of the cores by cpufreq, in kHz there; a core that idles may show any frequency."""
    found = []
    for policy in facts.cpu_policies(root):
        least = facts.number(policy, "scaling_min_freq")
        most = facts.number(policy, "scaling_max_freq")
        if least is not None and most is not None:
            name = policy.name.replace("policy", "cpu")
            found.append(_Clock(name, least / 1e3, most / 1e3))
    return found


def _gpu_of_jetson(root: Path) -> list[_Clock]:
    found = []
    for folder in facts.jetson_gpu_clocks(root):
        told = [facts.number(folder, file) for file in ("min_freq", "max_freq", "cur_freq")]
        least, most, now = (None if hertz is None else hertz / 1e6 for hertz in told)
        if least is not None and most is not None:
            found.append(_Clock("GPU", least, most, now))
    return found


def _part(clock: _Clock) -> str:
    return {"GPU": "gpu", "EMC": "memory"}.get(clock.name, "cpu")


def _why(clocks: Iterable[_Clock]) -> str:
    """Why the clocks are not locked: the first reason of CPU, of GPU and of memory."""
    reasons: dict[str, str] = {}
    for clock in clocks:
        if clock.why_not_locked:
            reasons.setdefault(_part(clock), clock.why_not_locked)
    return "; ".join(reasons.values())


def _details(clocks: Sequence[_Clock]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for part in ("cpu", "gpu", "memory"):
        those = [clock for clock in clocks if _part(clock) == part]
        if those:
            found[part] = {
                "least_mhz": min(clock.least for clock in those),
                "most_mhz": max(clock.most for clock in those),
            }
            now = [clock.now for clock in those if clock.now is not None]
            if now:
                found[part]["now_mhz"] = round(sum(now) / len(now), 1)
    return found


def _governors(root: Path) -> dict[str, Any]:
    """What chooses the cores' frequencies, and whether they may boost."""
    told = {facts.read(p, "scaling_governor") for p in facts.cpu_policies(root)} - {""}
    found: dict[str, Any] = {"governor": ", ".join(sorted(told))} if told else {}
    boost = facts.number(root, "sys/devices/system/cpu/cpufreq/boost")
    no_turbo = facts.number(root, "sys/devices/system/cpu/intel_pstate/no_turbo")
    if boost is not None or no_turbo is not None:
        found["boost"] = bool(boost) if boost is not None else not no_turbo
    return found
