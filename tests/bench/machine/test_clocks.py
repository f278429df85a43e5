"""--lock-clocks, with programs that write down how they were called."""

from __future__ import annotations

import io
import os
import shlex
import signal
import threading
import time
from pathlib import Path

import pytest

from bench.machine import clocks, programs
from bench.machine.clocks import locked
from edge_runtime.console import Console
from edge_runtime.errors import BackendUnavailable, ConfigError
from tests.bench.machine import recorded
from tests.bench.machine.recorded import program

#: A jetson_clocks that can: it asks, as the real one does, before it overwrites a file.
JETSON = """
case "$1" in
--store)
    if [ -e "$2" ]; then
        echo "File $2 already exists. Can I overwrite it? Y/N:"
        read answer || exit 1
    fi
    echo "Storing system configuration in $2"
    echo "/sys/devices/system/cpu/cpu0/cpufreq/scaling_min_freq:729600" > "$2";;
--restore)
    if [ ! -e "$2" ]; then echo "Error: $2 file not found !"; exit 1; fi;;
esac
"""
SMI = f"""
case "$*" in
*--query-gpu=clocks.max.graphics*) echo 3090;;
*--lock-gpu-clocks=*) echo '{recorded.SMI_LOCKED.strip()}';;
*) echo "All done.";;
esac
"""
SMI_CALLS = (
    "nvidia-smi -i 0 --query-gpu=clocks.max.graphics --format=csv,noheader,nounits",
    "nvidia-smi -i 0 --lock-gpu-clocks=3090,3090",
    "nvidia-smi -i 0 --reset-gpu-clocks",
)


class Machine:
    """Programs on PATH, and the order in which they were called."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = folder / "calls.txt"
        self.told = io.StringIO()
        self.console = Console(stdout=io.StringIO(), stderr=self.told)

    def has(self, name: str, body: str) -> None:
        program(self.folder / "bin", name, f'echo "{name} $*" >> "{self.log}"\n{body}')

    @property
    def calls(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []

    @property
    def steps(self) -> list[str]:
        """The calls without the name of the file that holds the clocks."""
        return [" ".join(call.split()[:2]) for call in self.calls]


@pytest.fixture
def machine(tmp_path, monkeypatch) -> Machine:
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return Machine(tmp_path)


def kept(machine: Machine) -> list[Path]:
    """Folders that hold clocks from before."""
    return list(machine.folder.glob("edge-runtime-clocks-*"))


def test_nothing_runs_unless_it_is_wanted(machine):
    machine.has("jetson_clocks", JETSON)
    machine.has("nvidia-smi", SMI)
    with locked(False, machine.console) as by_us:
        assert by_us is False
    assert machine.calls == []
    assert machine.told.getvalue() == ""


class TestJetson:
    STEPS = ("jetson_clocks --store", "jetson_clocks", "jetson_clocks --restore")

    def test_clocks_are_stored_locked_and_restored(self, machine):
        machine.has("jetson_clocks", JETSON)
        machine.has("nvidia-smi", SMI)
        with locked(True, machine.console) as by_us:
            assert by_us is True
            assert machine.steps == [*self.STEPS[:2]]
        assert machine.steps == [*self.STEPS]
        assert machine.calls[0].split()[2] == machine.calls[2].split()[2]
        assert kept(machine) == []
        assert "highest clocks of the power mode, by jetson_clocks" in machine.told.getvalue()

    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
    def test_they_are_restored_however_it_ends(self, machine, error):
        machine.has("jetson_clocks", JETSON)
        with pytest.raises(error), locked(True, machine.console):
            raise error
        assert machine.steps == [*self.STEPS]
        assert kept(machine) == []

    def test_without_root_nothing_begins(self, machine):
        machine.has("jetson_clocks", f"echo '{recorded.NOT_ROOT.strip()}'; exit 1")
        with pytest.raises(ConfigError) as caught, locked(True, machine.console):
            raise AssertionError("the body must not run")
        assert str(caught.value) == (
            "--lock-clocks: jetson_clocks: Error: Run this script(/usr/bin/jetson_clocks) as a "
            "root user. Clocks are root's to set: run it as sudo "
            '"$(command -v edge-runtime)", or leave --lock-clocks out'
        )
        assert caught.value.exit_code == 2
        assert machine.steps == ["jetson_clocks --store"]
        assert kept(machine) == []

    def test_clocks_that_were_not_stored_are_not_locked(self, machine):
        machine.has("jetson_clocks", "exit 0")
        with pytest.raises(ConfigError, match="it did nothing"), locked(True, machine.console):
            raise AssertionError("the body must not run")
        assert machine.steps == ["jetson_clocks --store"]

    def test_a_lock_that_fails_halfway_is_undone(self, machine):
        failing = 'if [ $# = 0 ]; then echo "Error: Failed to max GPU frequency!"; exit 1; fi'
        machine.has("jetson_clocks", JETSON + failing)
        with pytest.raises(ConfigError, match="max GPU frequency"), locked(True, machine.console):
            raise AssertionError("the body must not run")
        assert machine.steps == [*self.STEPS]

    def test_ctrl_c_while_it_locks(self, machine):
        machine.has("jetson_clocks", JETSON + "if [ $# = 0 ]; then /bin/sleep 20; fi")
        begin = time.monotonic()
        timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt), locked(True, machine.console):
            raise AssertionError("the body must not run")
        timer.join()
        assert time.monotonic() - begin < 10
        assert machine.steps == [*self.STEPS]

    def test_a_restore_that_fails_tells_the_command_and_keeps_the_file(self, machine):
        machine.has("jetson_clocks", JETSON + 'if [ "$1" = --restore ]; then exit 3; fi')
        with locked(True, machine.console):
            pass
        (folder,) = kept(machine)
        command = f"sudo jetson_clocks --restore {shlex.quote(str(folder / 'clocks.conf'))}"
        assert machine.told.getvalue().splitlines()[-1] == (
            "warning: the clocks may still be locked (jetson_clocks: exit code 3). "
            f"Give them back with: {command}"
        )
        assert "scaling_min_freq:729600" in (folder / "clocks.conf").read_text()


class TestDesktop:
    def test_the_gpu_is_locked_at_its_highest_and_reset(self, machine):
        machine.has("nvidia-smi", SMI)
        with locked(True, machine.console) as by_us:
            assert by_us is True
            assert machine.calls == [*SMI_CALLS[:2]]
        assert machine.calls == [*SMI_CALLS]
        assert "GPU 0 at 3090 MHz" in machine.told.getvalue()

    def test_another_gpu(self, machine):
        machine.has("nvidia-smi", SMI)
        with locked(True, machine.console, gpu=1):
            pass
        assert [call.split()[:3] for call in machine.calls] == [["nvidia-smi", "-i", "1"]] * 3

    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
    def test_it_is_reset_however_it_ends(self, machine, error):
        machine.has("nvidia-smi", SMI)
        with pytest.raises(error), locked(True, machine.console):
            raise error
        assert machine.calls == [*SMI_CALLS]

    @pytest.mark.parametrize(
        ("reply", "code", "message"),
        [
            (recorded.SMI_NOT_ROOT, 4, "The current user does not have permission to change"),
            (recorded.SMI_NOT_SUPPORTED, 0, "Setting locked GPU clocks is not supported for GPU"),
        ],
    )
    def test_a_driver_that_refuses_leaves_nothing_to_reset(self, machine, reply, code, message):
        query = 'case "$*" in *--query-gpu*) echo 3090; exit 0;; esac'
        machine.has("nvidia-smi", f"{query}\necho '{reply.strip()}'\nexit {code}")
        with pytest.raises(ConfigError, match=message), locked(True, machine.console):
            raise AssertionError("the body must not run")
        assert machine.calls == [*SMI_CALLS[:2]]

    def test_a_lock_that_hangs_is_reset(self, machine):
        hanging = 'case "$*" in *--lock*) /bin/sleep 20;; esac'
        machine.has("nvidia-smi", SMI + hanging)

        def impatient(command):
            return programs.run(command, 0.5)

        with (
            pytest.raises(ConfigError, match=r"took longer than 0\.5 s"),
            locked(True, machine.console, run=impatient),
        ):
            raise AssertionError("the body must not run")
        assert machine.calls == [*SMI_CALLS]

    @pytest.mark.parametrize("reply", ["[N/A]", "", "0", "No devices were found"])
    def test_without_a_highest_clock_nothing_is_locked(self, machine, reply):
        machine.has("nvidia-smi", f"echo '{reply}'")
        with pytest.raises(ConfigError) as caught, locked(True, machine.console):
            raise AssertionError("the body must not run")
        assert f"got {reply or 'nothing'} from nvidia-smi, expected a number of MHz" in str(
            caught.value
        )
        assert machine.calls == [SMI_CALLS[0]]

    def test_a_reset_that_fails_tells_the_command(self, machine):
        machine.has("nvidia-smi", SMI + 'case "$*" in *--reset*) exit 6;; esac')
        with locked(True, machine.console):
            pass
        told = machine.told.getvalue()
        assert "Give them back with: sudo nvidia-smi -i 0 --reset-gpu-clocks" in told


def test_where_neither_program_is_nothing_can_be_locked(machine):
    with pytest.raises(BackendUnavailable) as caught, locked(True, machine.console):
        raise AssertionError("the body must not run")
    assert str(caught.value) == (
        "nothing here can lock clocks: got neither jetson_clocks nor nvidia-smi. "
        "Leave --lock-clocks out"
    )
    assert caught.value.exit_code == 3
    assert kept(machine) == []


class TestSignals:
    def test_a_process_that_is_ended_gives_the_clocks_back(self, machine):
        machine.has("nvidia-smi", SMI)
        with pytest.raises(SystemExit) as caught, locked(True, machine.console):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        assert caught.value.code == 128 + signal.SIGTERM
        assert machine.calls == [*SMI_CALLS]
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL

    def test_ctrl_c_does_not_stop_the_giving_back(self, machine):
        impatient = f'case "$*" in *--reset*) kill -INT {os.getpid()}; /bin/sleep 0.3;; esac'
        machine.has("nvidia-smi", f'{impatient}\n{SMI}\necho "done $*" >> "{machine.log}"')
        with locked(True, machine.console):
            pass
        assert machine.calls[-1] == "done -i 0 --reset-gpu-clocks"
        assert signal.getsignal(signal.SIGINT) == signal.default_int_handler

    def test_under_nohup_a_lost_terminal_still_ends_nothing(self, machine):
        machine.has("nvidia-smi", SMI)
        before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        try:
            with locked(True, machine.console):
                os.kill(os.getpid(), signal.SIGHUP)
        finally:
            signal.signal(signal.SIGHUP, before)
        assert machine.calls == [*SMI_CALLS]

    def test_another_thread_can_lock_too(self, machine):
        machine.has("nvidia-smi", SMI)
        seen: list[bool] = []

        def lock() -> None:
            with clocks.locked(True, machine.console) as by_us:
                seen.append(by_us)

        thread = threading.Thread(target=lock)
        thread.start()
        thread.join()
        assert seen == [True]
        assert machine.calls == [*SMI_CALLS]
