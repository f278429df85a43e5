"""The environment of a result: on boards made of files and of what programs printed there."""

from __future__ import annotations

import functools
import json
import os
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.machine import nvidia, programs
from bench.machine.clock_state import clocks, power_mode
from bench.machine.environment import condition, differences, rows, stamp, steal_share
from tests.bench.machine import recorded
from tests.bench.machine.recorded import files, policy, prints, program
from tests.bench.results import made_up_result


@pytest.fixture(autouse=True)
def path(tmp_path, monkeypatch) -> Path:
    """A PATH that holds the test's own programs only; NVML is not installed."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setitem(sys.modules, "pynvml", None)
    return tmp_path / "bin"


@pytest.fixture
def jetson(tmp_path) -> Path:
    return files(tmp_path / "root", recorded.JETSON_FILES)


@pytest.fixture
def desktop(tmp_path) -> Path:
    return files(tmp_path / "root", recorded.DESKTOP_FILES)


class TestClocksOfAJetson:
    @pytest.mark.parametrize(
        ("output", "state", "why"),
        [
            (
                recorded.NANO_FLOATING,
                "floating",
                "cpu0 may run at 729.6 to 1344 MHz; GPU may run at 306 to 918 MHz; "
                "EMC may run at 204 to 3199 MHz",
            ),
            (recorded.NANO_LOCKED, "locked", "CPU, GPU and memory stand at their highest"),
            (
                recorded.NX_FLOATING,
                "floating",
                "cpu0 may run at 729.6 to 1510.4 MHz; GPU may run at 306 to 624.75 MHz; "
                "EMC may run at 204 to 2133 MHz",
            ),
            (
                recorded.AGX_FLOATING,
                "floating",
                "cpu0 may run at 729.6 to 1728 MHz; GPU may run at 306 to 612 MHz; "
                "EMC may run at 204 to 3199 MHz",
            ),
            (recorded.AGX_LOCKED, "locked", "CPU, GPU and memory stand at their highest"),
            (recorded.AGX_R39_LOCKED, "locked", "CPU, GPU and memory stand at their highest"),
            (
                recorded.AGX_LOCKED.replace("FreqOverride=1", "FreqOverride=0"),
                "floating",
                "EMC may run at 204 to 3199 MHz",
            ),
            (
                recorded.NANO_LOCKED.replace("CurrentFreq=1020", "CurrentFreq=510"),
                "floating",
                "GPU is set to 1020 MHz but runs at 510",
            ),
        ],
    )
    def test_as_jetson_clocks_shows_them(self, jetson, path, output, state, why):
        prints(path, "jetson_clocks", output)
        found = clocks(jetson, programs.run)
        assert (found["state"], found["why"]) == (state, why)

    @pytest.mark.parametrize("untold", ["Online CPUs: 0-7\n", "Online=0 ", "nothing"])
    def test_cores_that_are_off_do_not_count(self, jetson, path, untold):
        prints(path, "jetson_clocks", recorded.AGX_LOCKED.replace(untold, ""))
        found = clocks(jetson, programs.run)
        assert found["cpu"] == {"least_mhz": 1728, "most_mhz": 1728, "now_mhz": 1728}
        assert found["gpu"]["now_mhz"] == 612
        assert found["memory"]["most_mhz"] == 3199

    @pytest.mark.parametrize(
        ("least", "gpu", "state", "why"),
        [
            (729600, 306000000, "floating", "cpu4 may run at 729.6 to 1510.4 MHz"),
            (1510400, 306000000, "floating", "GPU may run at 306 to 624.75 MHz"),
            (
                1510400,
                624750000,
                "unknown",
                "CPU and GPU are locked; the memory's clock does not show: jetson_clocks: "
                "Error: Run this script(/usr/bin/jetson_clocks) as a root user",
            ),
        ],
    )
    def test_without_root_sysfs_tells_what_it_can(self, jetson, path, least, gpu, state, why):
        prints(path, "jetson_clocks", recorded.NOT_ROOT, code=1)
        folder = "sys/class/devfreq/17000000.gpu"
        files(jetson, policy(0, 1510400, 1510400, 1510400, "schedutil"))
        files(jetson, policy(4, least, 1510400, 1510400, "schedutil"))
        files(jetson, {f"{folder}/min_freq": f"{gpu}", f"{folder}/cur_freq": f"{gpu}"})
        found = clocks(jetson, programs.run)
        assert found["state"] == state
        assert why in found["why"]
        assert found["governor"] == "schedutil"

    @pytest.mark.parametrize(
        ("output", "why"),
        [
            (None, "there is no jetson_clocks"),
            ("", "does not tell of CPU, GPU and memory"),
            ("cpu0: MinFreq= MaxFreq=x\nOnline CPUs: 0-99999999999\n", "does not tell of CPU"),
        ],
    )
    def test_without_an_answer_it_says_why(self, tmp_path, path, output, why):
        bare = files(tmp_path / "bare", {"etc/nv_tegra_release": "# R36 (release)"})
        if output is not None:
            prints(path, "jetson_clocks", output)
        found = clocks(bare, programs.run)
        assert found["state"] == "unknown"
        assert why in found["why"]


class TestClocksOfADesktop:
    @pytest.mark.parametrize(
        ("least", "gpus", "state", "why"),
        [
            (400000, [], "floating", "cpu0 may run at 400 to 4500 MHz"),
            (4500000, [], "locked", "all cores have one frequency only"),
            (4500000, ["a GPU"], "unknown", "a driver does not tell whether the GPU's are"),
        ],
    )
    def test_by_cpufreq(self, desktop, least, gpus, state, why):
        for core in range(2):
            files(desktop, policy(core, least, 4500000, 3999123, "performance"))
        found = clocks(desktop, programs.run, gpus)
        assert found["state"] == state
        assert why in found["why"]
        assert (found["governor"], found["boost"]) == ("performance", True)

    def test_where_nothing_shows_they_are_unknown(self, desktop):
        found = clocks(desktop, programs.run)
        assert found["state"] == "unknown"
        assert "shows no CPU frequencies" in found["why"]


class TestPowerMode:
    @pytest.mark.parametrize(
        ("output", "mode"),
        [
            ("NV Power Mode: MAXN_SUPER\n2\n", {"name": "MAXN_SUPER", "number": 2}),
            ("NV Power Mode: 25W\n1\n", {"name": "25W", "number": 1}),
            (
                "NVPM WARN: fan mode is not set!\nNV Power Mode: MAXN\n0\n",
                {"name": "MAXN", "number": 0},
            ),
            ("NV Power Mode: MODE_30W", {"name": "MODE_30W", "number": None}),
            ("", "unknown: nvpmodel: it says nothing"),
            ("something new\nof two lines\n", "unknown: nvpmodel: something new"),
        ],
    )
    def test_as_nvpmodel_prints_it(self, path, output, mode):
        prints(path, "nvpmodel", output)
        assert power_mode(programs.run) == mode

    def test_nvpmodel_fails(self, path):
        program(path, "nvpmodel", "echo 'NVPM ERROR: no such file\nmore' >&2; exit 255")
        assert power_mode(programs.run) == "unknown: nvpmodel: NVPM ERROR: no such file"

    def test_nvpmodel_is_absent(self):
        assert power_mode(programs.run) == "unknown: there is no nvpmodel"


class TestPrograms:
    def test_one_that_hangs_is_ended_with_its_children(self, path):
        program(path, "nvpmodel", "/bin/sleep 20 & /bin/sleep 20")
        begin = time.monotonic()
        answer = programs.run(["nvpmodel", "-q"], 0.3)
        assert time.monotonic() - begin < 5
        assert answer == programs.Answer(why_not="nvpmodel took longer than 0.3 s", unfinished=True)

    def test_one_that_asks_gets_no_answer(self, path):
        program(path, "asks", 'read answer || exit 1\necho "$answer"')
        (path / "said").write_text("yes\n")
        before, ours = os.dup(0), os.open(path / "said", os.O_RDONLY)
        try:
            os.dup2(ours, 0)
            assert programs.run(["asks"]).why_not == "asks: exit code 1"
        finally:
            os.dup2(before, 0)
            os.close(before)
            os.close(ours)

    def test_one_that_is_no_program(self, path):
        prints(path, "broken", "").write_text("#!/no/such/shell\n")
        assert programs.run(["broken"]).why_not == "broken can't be run: No such file or directory"


class TestNvidia:
    def test_a_row_of_nvidia_smi(self, path):
        prints(path, "nvidia-smi", recorded.SMI_ROW)
        found = nvidia.gpus(programs.run)
        assert (found.driver, found.why_not) == ("595.71.05", "")
        assert found.each == (
            {
                "graphics_mhz": 180,
                "sm_mhz": 180,
                "memory_mhz": 405,
                "graphics_most_mhz": 3090,
                "sm_most_mhz": 3090,
                "power_limit_w": 600,
                "persistent": True,
                "celsius": 30,
                "state": "P8",
                "slowed_by": ["idle"],
                "name": "NVIDIA RTX PRO 6000 Blackwell Workstation Edition",
            },
        )

    def test_an_older_driver_knows_the_reasons_by_another_name(self, path):
        text = prints(path, "cat", recorded.SMI_ROW).with_suffix(".txt")
        refusal = 'Field "clocks_event_reasons.active" is not a valid field to query.'
        asked = f"case \"$1\" in *event*) echo '{refusal}'; exit 2;; esac"
        program(path, "nvidia-smi", f'{asked}\n/bin/cat "{text}"')
        assert nvidia.gpus(programs.run).each[0]["slowed_by"] == ["idle"]

    @pytest.mark.parametrize(
        ("output", "code", "why"),
        [
            ("NVIDIA-SMI has failed because it couldn't communicate.\n", 9, "has failed because"),
            ("No devices were found\n", 0, "nvidia-smi: No devices were found"),
        ],
    )
    def test_without_an_answer_it_says_why(self, path, output, code, why):
        prints(path, "nvidia-smi", output, code)
        assert why in nvidia.gpus(programs.run).why_not
        assert "nvidia-ml-py is not installed" in nvidia.gpus(programs.run).why_not

    def test_nvml_is_asked_first(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "pynvml", nvml())
        found = nvidia.gpus(programs.run)
        assert (found.driver, found.cuda) == ("580.65.06", "13.0")
        assert found.each == (
            {
                "name": "NVIDIA GeForce RTX 4090",
                "graphics_mhz": 2520,
                "sm_mhz": 2520,
                "memory_mhz": 10501,
                "power_limit_w": 450.0,
                "persistent": False,
                "celsius": 61,
                "state": "P2",
                "slowed_by": ["power cap", "too hot (software)", "reason 0x1000"],
            },
        )

    def test_nvml_without_a_driver(self, monkeypatch):
        broken = nvml()
        broken.nvmlInit = broken.nvmlDeviceGetMaxClockInfo
        monkeypatch.setitem(sys.modules, "pynvml", broken)
        assert nvidia.gpus(programs.run).why_not == "NVML: not here; there is no nvidia-smi"


def nvml() -> Any:
    """NVML with a GPU and one more that fell off the bus; some answers are missing."""

    class NVMLError(Exception):
        pass

    def no(*_: Any) -> Any:
        raise NVMLError("not here")

    def handle(index: int) -> int:
        return index if index == 0 else no()

    return types.SimpleNamespace(
        NVMLError=NVMLError,
        NVML_CLOCK_GRAPHICS=0,
        NVML_CLOCK_SM=1,
        NVML_CLOCK_MEM=2,
        NVML_TEMPERATURE_GPU=0,
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlSystemGetDriverVersion=lambda: b"580.65.06",
        nvmlSystemGetCudaDriverVersion_v2=lambda: 13000,
        nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=handle,
        nvmlDeviceGetName=lambda handle: b"NVIDIA GeForce RTX 4090",
        nvmlDeviceGetClockInfo=lambda handle, kind: [2520, 2520, 10501][kind],
        nvmlDeviceGetMaxClockInfo=no,
        nvmlDeviceGetTemperature=lambda handle, kind: 61,
        nvmlDeviceGetPowerManagementLimit=lambda handle: 450000,
        nvmlDeviceGetPersistenceMode=lambda handle: 0,
        nvmlDeviceGetPerformanceState=lambda handle: 2,
        nvmlDeviceGetCurrentClocksThrottleReasons=lambda handle: 0x1024,
    )


class TestStamp:
    def test_of_a_jetson(self, jetson, path):
        prints(path, "jetson_clocks", recorded.NX_FLOATING)
        prints(path, "nvpmodel", "NV Power Mode: MAXN_SUPER\n2\n")
        found = stamp(root=jetson)
        board = "NVIDIA Jetson Orin NX Engineering Reference Developer Kit"
        expected = {
            "board": board,
            "l4t": "R36.4.4",
            "jetpack": "6.2.1+b38",
            "cuda": "12.6.11",
            "driver": "36.4.4",
            "gpus": [{"name": f"GPU of {board}"}],
            "power_mode": {"name": "MAXN_SUPER", "number": 2},
            "memory_bytes": 16057432 * 1024,
            "kernel": {"isolcpus": "4,5"},
            "virtual": {},
        }
        assert {name: found[name] for name in expected} == expected
        assert found["clocks"]["state"] == "floating"
        shown = dict(rows({"stamp": found}))
        assert shown["L4T"] == "R36.4.4"
        assert shown["power mode"] == "MAXN_SUPER (number 2)"
        assert shown["clocks"].startswith("floating: cpu0 may run at 729.6 to 1510.4 MHz")
        assert shown["memory"] == "15.3 GiB"

    def test_of_tensorrt_the_installed_package_counts(self, jetson, monkeypatch):
        monkeypatch.setattr("bench.machine.facts._version", lambda package: "")
        assert stamp(root=jetson)["tensorrt"] == "10.3.0.30-1+cuda12.5"

    def test_a_jetson_without_the_jetpack_package_says_so(self, jetson):
        removed = "Package: nvidia-jetpack\nStatus: deinstall ok config-files\nVersion: 6.0\n"
        files(jetson, {"var/lib/dpkg/status": removed})
        why = "unknown: the package nvidia-jetpack is not installed"
        assert stamp(root=jetson)["jetpack"] == why

    def test_of_a_desktop(self, desktop, path):
        prints(path, "nvidia-smi", recorded.SMI_ROW)
        found = stamp(root=desktop)
        assert found["board"] is found["power_mode"] is None
        assert found["computer"] == "LENOVO 30E1S2CN00"
        assert found["driver"] == "595.71.05"
        assert found["gpus"] == [
            {
                "name": "NVIDIA RTX PRO 6000 Blackwell Workstation Edition",
                "graphics_most_mhz": 3090,
                "sm_most_mhz": 3090,
                "power_limit_w": 600,
            }
        ]
        shown = dict(rows({"stamp": found}))
        assert shown["power limit of the GPU"] == "600 W"
        assert shown["two threads per core"] == "yes"

    def test_without_nvml_and_nvidia_smi_the_driver_s_files_name_the_gpu(self, desktop):
        assert stamp(root=desktop)["gpus"] == [{"name": "NVIDIA GeForce RTX 4090"}]

    @pytest.mark.parametrize(
        ("contents", "found"),
        [
            ({"proc/cpuinfo": "flags\t\t: fpu hypervisor lm\n"}, "yes, by the processor's flags"),
            ({"proc/cpuinfo": "flags\t\t: fpu lm\nbugs : hypervisor\n"}, ""),
            ({"sys/class/dmi/id/product_name": "VirtualBox\n"}, "VirtualBox"),
            ({"sys/class/dmi/id/product_name": "30E1S2CN00\n"}, ""),
            ({"sys/hypervisor/type": "xen\n"}, "xen"),
            ({".dockerenv": ""}, "docker"),
            ({"proc/1/cgroup": "0::/kubepods.slice/cri-containerd-x.scope\n"}, "kubepods"),
        ],
    )
    def test_signs_of_a_virtual_machine_or_container(self, tmp_path, contents, found):
        shown = dict(rows({"stamp": stamp(root=files(tmp_path / "root", contents))}))
        virtual = shown.get("virtual machine", "") + shown.get("container", "")
        assert virtual == found

    def test_of_this_machine_it_is_plain_json(self):
        both = [stamp(), condition()]
        assert json.loads(json.dumps(both, allow_nan=False)) == both
        assert dict(rows({"stamp": both[0], "before": both[1]}))["CPU"] == both[0]["machine"]["cpu"]


class TestCondition:
    def test_of_a_jetson(self, jetson):
        files(jetson, policy(0, 729600, 1510400, 1510400, "schedutil"))
        files(jetson, policy(4, 729600, 1510400, 729600, "schedutil"))
        found = condition(root=jetson)
        assert found.pop("time")
        assert found == {
            "temperatures": {"cpu-thermal": 46.125},
            "cpu_mhz": {"mean": 1120.0, "min": 729.6, "max": 1510.4},
            "gpus": [{"name": "17000000.gpu", "graphics_mhz": 306.0}],
            "load_average": [0.52, 0.58, 0.59],
            "jiffies": {"total": 1000, "steal": 35},
        }

    def test_of_a_desktop(self, desktop, path):
        prints(path, "nvidia-smi", recorded.SMI_ROW)
        gpu = condition(root=desktop)["gpus"][0]
        assert (gpu["graphics_mhz"], gpu["celsius"], gpu["slowed_by"]) == (180, 30, ["idle"])

    def test_of_a_machine_that_tells_nothing(self, tmp_path):
        found = condition(root=tmp_path)
        assert found.pop("time")
        assert found == {
            "temperatures": {},
            "cpu_mhz": None,
            "gpus": [],
            "load_average": None,
            "jiffies": None,
        }

    def test_files_full_of_nonsense(self, jetson):
        names = [str(file.relative_to(jetson)) for file in jetson.rglob("*") if file.is_file()]
        names += policy(0, 1, 1, 1, "x")
        files(jetson, dict.fromkeys(names, "nonsense 1e999"))
        assert condition(root=jetson)["jiffies"] is None
        assert stamp(root=jetson)["clocks"]["state"] == "unknown"

    def test_stolen_time_is_that_between_two_conditions(self, jetson):
        before = condition(root=jetson)
        files(jetson, {"proc/stat": "cpu  160 0 50 830 10 0 5 45 0 0\n"})
        assert steal_share(before, condition(root=jetson)) == pytest.approx(0.1)

    @pytest.mark.parametrize(
        "after",
        [
            {},
            {"jiffies": None},
            {"jiffies": {"total": 1000}},
            {"jiffies": {"total": 900, "steal": 35}},
            {"jiffies": {"total": 1000, "steal": 35}},
            {"jiffies": {"total": float("nan"), "steal": "35"}},
        ],
    )
    def test_where_stolen_time_is_not_told(self, after):
        assert steal_share({"jiffies": {"total": 1000, "steal": 35}}, after) is None


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=12,
)
names = st.sampled_from(
    [
        *("stamp", "before", "after", "threads", "machine", "packages", "gpus", "clocks", "smt"),
        *("power_mode", "virtual", "onnxruntime", "temperatures", "cpu_mhz", "jiffies"),
    ]
)
strangers = st.dictionaries(
    names, json_values | st.dictionaries(names | st.text(), json_values, max_size=4), max_size=6
)


class TestRows:
    @given(strangers)
    def test_any_shape_gives_short_printable_lines(self, environment):
        for row in rows(environment):
            for text in row:
                assert text.isprintable()
                assert len(text) <= 300
            assert row[1]

    def test_what_a_stranger_calls_otherwise_is_shown_under_its_name(self):
        environment = {"platform": "Jetson Orin Nano", "modes": ["15W", "7W"], "runs": 200}
        assert rows(environment) == [
            ("platform", "Jetson Orin Nano"),
            ("modes", "15W, 7W"),
            ("runs", "200"),
        ]

    def test_of_a_made_up_result(self):
        found = rows(made_up_result("Orin NX").environment)
        assert ("CPU", "Orin NX") in found
        assert ("threads", "as many as the cores") in found

    def test_before_and_after(self):
        before = {
            "time": "2026-11-24T15:00:00+00:00",
            "temperatures": {"cpu-thermal": 46.1, "tj-thermal": 47.9},
            "gpus": [{"celsius": 61, "slowed_by": ["idle"]}],
            "load_average": [0.52, 0.6, 0.6],
            "jiffies": {"total": 1000, "steal": 35},
        }
        after = {
            "temperatures": {"cpu-thermal": 58.4},
            "gpus": [{"celsius": 70, "slowed_by": ["power cap", "too hot (software)"]}],
            "jiffies": {"total": 2000, "steal": 60},
        }
        assert rows({"before": before, "after": after, "clocks_locked_by_us": False}) == [
            ("clocks locked by this run", "no"),
            ("measured from / to", "2026-11-24T15:00:00+00:00 / -"),
            ("temperatures before / after, °C", "cpu-thermal 46 / 58, tj-thermal 48 / -"),
            ("GPU before / after, °C", "61 / 70"),
            ("GPU held back by, before / after", "idle / power cap, too hot (software)"),
            ("load before / after", "0.5 / -"),
            ("taken by the hypervisor", "2.5 %"),
        ]


class TestDifferences:
    def test_what_differs_is_listed_and_the_time_of_day_is_not(self):
        here = {
            "stamp": {"machine": {"cpu": "A", "python": "3.11.7"}, "board": "Orin NX"},
            "before": {"time": "2026-11-24T15:00:00+00:00"},
        }
        there = {
            "stamp": {"machine": {"cpu": "B", "python": "3.11.7"}},
            "before": {"time": "2026-11-25T15:00:00+00:00"},
            "threads": 2,
        }
        assert differences([here, there, {}]) == [
            ("CPU", ("A", "B", "-")),
            ("board", ("Orin NX", "-", "-")),
            ("Python", ("3.11.7", "3.11.7", "-")),
            ("threads", ("-", "2", "-")),
        ]

    def test_equal_machines_do_not_differ(self):
        here = {"stamp": stamp(), "before": condition()}
        assert differences([here, here]) == differences([]) == []


def test_a_program_that_hangs_is_told_in_the_stamp(jetson, path):
    program(path, "nvpmodel", "/bin/sleep 20")
    impatient = functools.partial(programs.run, timeout_s=0.2)
    found = stamp(root=jetson, run=impatient)
    assert found["power_mode"] == "unknown: nvpmodel took longer than 0.2 s"
