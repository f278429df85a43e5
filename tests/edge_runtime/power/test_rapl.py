"""Energy counters of x86 packages, on trees of files (see `machines`)."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_runtime.errors import BadReading, PowerError
from edge_runtime.power import sysfs
from edge_runtime.power.rapl import Rapl, find_sources
from edge_runtime.timing import FakeClock
from tests.edge_runtime.power.machines import INTEL_SERVER, RYZEN, rapl, write


def test_each_package_is_a_source_and_what_lies_in_or_around_it_is_not(tmp_path: Path) -> None:
    rapl(tmp_path, INTEL_SERVER)
    sources = find_sources(tmp_path).sources
    assert [source.name for source in sources] == ["package-0 (RAPL)", "package-1 (RAPL)"]
    write(tmp_path / "sys/class/powercap/intel-rapl:1", {"energy_uj": 250_000_000})
    with sources[1] as source:
        assert source.counts
        write(tmp_path / "sys/class/powercap/intel-rapl:1", {"energy_uj": 262_500_000})
        assert source.read() == pytest.approx(12.5)


def test_a_counter_of_a_ryzen_wraps_within_minutes(tmp_path: Path) -> None:
    rapl(tmp_path, RYZEN)
    folder, clock = tmp_path / "sys/class/powercap/intel-rapl:0", FakeClock()
    with Rapl("package-0", folder, clock=clock) as source:
        clock.advance(10)
        write(folder, {"energy_uj": 500_000_000})
        assert source.read() == pytest.approx(500.610987)


def test_without_a_range_a_counter_that_falls_is_refused(tmp_path: Path) -> None:
    rapl(tmp_path, {"intel-rapl:0": ("package-0", 5_000_000, 0)})
    folder = tmp_path / "sys/class/powercap/intel-rapl:0"
    with find_sources(tmp_path).sources[0] as source:
        write(folder, {"energy_uj": 1_000_000})
        with pytest.raises(BadReading, match="set back or jumped: got 1 J after 5 J"):
            source.read()


def test_a_counter_above_its_range_is_refused(tmp_path: Path) -> None:
    rapl(tmp_path, {"intel-rapl:0": ("package-0", 9_000_000, 5_000_000)})
    with pytest.raises(BadReading, match="got 9 J, expected 0 to 5 J"):
        find_sources(tmp_path).sources[0].open()


def test_a_counter_for_root_only_says_how_to_open_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rapl(tmp_path, RYZEN)
    read = sysfs._bytes

    def guarded(path: Path) -> bytes:
        if path.name == "energy_uj":
            raise PermissionError(13, "Permission denied", str(path))
        return read(path)

    monkeypatch.setattr(sysfs, "_bytes", guarded)
    with pytest.raises(
        PowerError, match=r"energy_uj may not be read by this user.*run as root.*chmod a\+r /"
    ):
        find_sources(tmp_path).sources[0].open()


def test_a_machine_without_rapl_says_so(tmp_path: Path) -> None:
    with pytest.raises(PowerError, match=r"no package with an energy counter.*Virtual machines"):
        find_sources(tmp_path)


def test_a_domain_without_a_name_is_told_of(tmp_path: Path) -> None:
    rapl(tmp_path, INTEL_SERVER)
    (tmp_path / "sys/class/powercap/intel-rapl:1/name").unlink()
    sources, broken = find_sources(tmp_path)
    assert [source.name for source in sources] == ["package-0 (RAPL)"]
    assert "No such file" in broken["intel-rapl:1"]
