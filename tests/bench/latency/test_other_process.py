"""Baselines in another process: the same answers, frozen between turns, and nothing left behind."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from bench.latency import other_process
from bench.latency.other_process import OtherProcess, wait_until_idle
from edge_runtime.errors import BackendError, ConfigError, InputError, ManifestError
from edge_runtime.load import load
from edge_runtime.operating_point import OperatingPoint
from tests.meta.repository import ROOT
from tests.toys import toy_bundle, toy_images

POINT = OperatingPoint("half", thresholds={"saver": 0.45, "middle": 0.5})
IMAGES = toy_images(24)
SIZE = IMAGES.shape[1:3]

#: Opens the process of a bundle, tells its pid, and waits to be ended.
USER = """
import sys, time
from bench.latency.other_process import OtherProcess
from edge_runtime.operating_point import OperatingPoint
point = OperatingPoint("p", policy="never")
try:
    with OtherProcess(sys.argv[1], point, (5, 7), kind="naive") as one:
        print(one.pid, flush=True)
        time.sleep(60)
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_bundle(tmp_path_factory.mktemp("toy") / "toy.bundle").path


@pytest.fixture(scope="module")
def process(bundle: Path) -> Iterator[OtherProcess]:
    with OtherProcess(bundle, POINT, SIZE, kind="naive", threads=1) as opened:
        yield opened


def state(pid: int | None) -> str:
    """As the kernel has it: R, S, T (stopped); Z or nothing for one that has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def eventually(pid: int | None, states: tuple[str, ...]) -> bool:
    end = time.monotonic() + 10
    while state(pid) not in states and time.monotonic() < end:
        time.sleep(0.01)
    return state(pid) in states


def same_as_here(process: OtherProcess, bundle: Path) -> bool:
    """Whether every image leaves at the same exit with the same label; three exits are taken."""
    with load(bundle, operating_point=POINT, image_size=SIZE) as session:
        want = [(p.exit, p.label) for p in session.classify(IMAGES)]
    assert len({name for name, _ in want}) == 3
    timed = [process.classify(image) for image in IMAGES]
    assert all(0 < one.seconds < 10 for one in timed)
    return [(one.exit, one.label) for one in timed] == want


def test_sessions_with_pools_of_their_own_answer_as_ours_do(
    process: OtherProcess, bundle: Path
) -> None:
    assert same_as_here(process, bundle)


@pytest.mark.torch
def test_pytorch_answers_as_our_sessions_do(bundle: Path) -> None:
    pytest.importorskip("torch")
    with OtherProcess(bundle, POINT, SIZE, kind="eager", threads=1) as process:
        assert same_as_here(process, bundle)


def test_it_is_frozen_between_its_turns(process: OtherProcess) -> None:
    assert eventually(process.pid, ("T",))
    process.classify(IMAGES[0])
    assert eventually(process.pid, ("T",))


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (IMAGES[0].astype(np.float32), r"got \(5, 7, 3\) float32, expected \(height, width"),
        (IMAGES, r"got \(24, 5, 7, 3\) uint8, expected \(height, width, channels\) uint8"),
        (IMAGES[0, 1:], r"^input 'image': shape: got \(1, 4, 7, 3\), expected \(batch, 5, 7, 3\)"),
    ],
)
def test_an_image_that_does_not_fit_is_refused_and_the_next_one_is_not(
    process: OtherProcess, image: np.ndarray, said: str
) -> None:
    with pytest.raises(InputError, match=said):
        process.classify(image)
    assert process.classify(IMAGES[0]).exit in ("saver", "middle", "final")


def test_closing_leaves_no_process(bundle: Path) -> None:
    process = OtherProcess(bundle, POINT, SIZE, kind="naive", threads=1).open()
    pid = process.pid
    assert state(pid)
    with pytest.raises(BackendError, match=r"is running already"):
        process.open()
    process.close()
    process.close()
    assert (state(pid), process.pid) == ("", None)
    with pytest.raises(BackendError, match=r"is not running\. Open it first"):
        process.classify(IMAGES[0])


def test_a_killed_process_is_an_error_that_says_so(bundle: Path) -> None:
    with OtherProcess(bundle, POINT, SIZE, kind="naive", threads=1) as process:
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        with pytest.raises(
            BackendError, match=r"^the process of the baseline 'naive' was ended by SIGKILL"
        ):
            process.classify(IMAGES[0])
        assert process.pid is None


def test_what_a_dying_process_said_is_quoted_and_handed_on(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(other_process, "_START", "import sys; sys.exit('no room\\nfor it')")
    with pytest.raises(BackendError, match=r"ended with code 1; it said: no room / for it$"):
        OtherProcess(bundle, POINT, SIZE, kind="naive").open()
    assert capsys.readouterr().err == "no room\nfor it\n"


def test_what_opening_raises_there_is_raised_here(tmp_path: Path, bundle: Path) -> None:
    with pytest.raises(ManifestError, match=r"no\.bundle does not exist\. Make one with"):
        OtherProcess(tmp_path / "no.bundle", POINT, SIZE, kind="naive").open()
    with pytest.raises(ConfigError, match=r"takes images of any size"):
        OtherProcess(bundle, POINT, None, kind="naive").open()


def test_another_kind_is_refused(bundle: Path) -> None:
    with pytest.raises(ConfigError, match=r"no process of kind 'egaer'\. Did you mean 'eager'\?"):
        OtherProcess(bundle, POINT, SIZE, kind="egaer")


def user(bundle: Path) -> tuple[subprocess.Popen[str], int]:
    """A process of a user, in a process group of its own, and the pid of the one it has opened."""
    opened = subprocess.Popen(
        [sys.executable, "-c", USER, str(bundle)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        start_new_session=True,
    )
    assert opened.stdout is not None
    return opened, int(opened.stdout.readline())


def test_control_c_ends_both_without_a_word(bundle: Path) -> None:
    opened, pid = user(bundle)
    os.killpg(opened.pid, signal.SIGINT)
    _, said = opened.communicate(timeout=20)
    assert (opened.returncode, said) == (130, "")
    assert eventually(pid, ("", "Z"))


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux to end it")
def test_nothing_is_left_when_its_user_is_killed(bundle: Path) -> None:
    opened, pid = user(bundle)
    assert eventually(pid, ("T",))
    opened.kill()
    opened.communicate(timeout=20)
    assert eventually(pid, ("", "Z"))


def test_our_own_threads_are_waited_for() -> None:
    begun, naps = threading.Event(), 0

    def work() -> None:
        begun.set()
        hashlib.sha256(bytes(64 << 20))  # without holding Python's lock

    def sleep(seconds: float) -> None:
        nonlocal naps
        naps += 1
        working.join()

    working = threading.Thread(target=work)
    working.start()
    begun.wait()
    time.sleep(0.005)
    wait_until_idle(sleep)
    assert naps >= 1


def test_they_are_not_waited_for_forever() -> None:
    naps: list[float] = []
    wait_until_idle(naps.append, lambda: True)
    assert sum(naps) == pytest.approx(0.2)
