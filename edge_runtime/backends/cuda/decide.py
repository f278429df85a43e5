"""What the host knows of `decide.cu`: its structs, its rules, and how to read what it wrote.

The kernel judges one exit as `confidence.decide` does, applies the rule of the policy, and writes
a record of eight 64-bit words per sample, which the host may read while the kernel still runs. A
word holds its payload in the upper half and the number of the frame in the lower: the host takes a
record once every word of it is of its frame, whatever order they arrived in.

Frames count from 1, since zeroed memory looks like frame 0, and wrap within 32 bits.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edge_runtime import confidence
from edge_runtime.confidence import METRICS, Decision, Metric
from edge_runtime.errors import BackendError, ConfigError
from edge_runtime.policy import Never, Patience, PatientAndConfident, Policy, Threshold

SOURCE = Path(__file__).with_name("decide.cu")

#: Threads of a block; a kernel is launched on one block per sample.
THREADS = 256
RECORD_WORDS = 8
RECORD_BYTES = 8 * RECORD_WORDS

#: Status of a sample at an exit: why it leaves here, or `GOES_ON`.
GOES_ON, CONFIDENT, LAST, DEADLINE, NOT_FINITE = 0, 1, 2, 4, 8

#: When an exit fires, one per evaluated exit: its metric's index in `METRICS`; whether it fires by
#: repeating a label instead of by its threshold; and how many must fire in a row.
RULE = np.dtype(
    [
        ("threshold", np.float32),
        ("temperature", np.float32),
        ("metric", np.int32),
        ("repeat", np.int32),
        ("patience", np.int32),
        ("spare", np.int32, (3,)),
    ]
)
#: What arrives with a frame: its number, the exit from which on every sample leaves (one that does
#: not exist for none), and how many samples it has.
CONTROL = np.dtype(
    [
        ("sequence", np.uint32),
        ("deepest", np.uint32),
        ("samples", np.uint32),
        ("spare", np.uint32),
    ]
)
#: What a sample carries from exit to exit.
STATE = np.dtype([("label", np.int32), ("streak", np.int32)])

_KERNELS = ("float32", "float16")
#: The words of a record that say something: label, signal, confidence, status, time.
_USED = 5
_LOW = 0xFFFFFFFF
#: Which half of a word in memory is the lower one.
_LOWER = 0 if sys.byteorder == "little" else 1

# Native alignment, for which struct loads each word at once: half a word could be another frame's.
_words_of = struct.Struct(f"@{_USED}Q").unpack_from
_bits = struct.Struct("=2I").pack
_floats = struct.Struct("=2f").unpack


def source() -> str:
    """The text of `decide.cu`, for the compiler."""
    return SOURCE.read_text(encoding="utf-8")


def kernel_name(dtype: str, conditional: bool) -> str:
    """Name of the kernel for logits of a dtype.

    Args:
        dtype: "float32" or "float16".
        conditional: Whether it also sets the condition on which the next stage runs.

    Raises:
        BackendError: There is no kernel for this dtype.
    """
    if dtype not in _KERNELS:
        raise BackendError("dtype of the logits", got=dtype, expected=" or ".join(_KERNELS))
    return f"decide_{dtype}{'_next' if conditional else ''}"


def rules(
    policy: Policy, metric: Metric, temperatures: Sequence[float], positions: Sequence[int]
) -> NDArray[Any]:
    """A policy as the device follows it.

    Args:
        policy: The rule by which samples leave.
        metric: The signal.
        temperatures: Of each evaluated exit.
        positions: Index in the cascade of each evaluated exit; the last one always answers.

    Returns:
        Dtype `RULE`, shape (evaluated exits,).

    Raises:
        ConfigError: The device does not know the policy.
    """
    table = np.zeros(len(positions), RULE)
    table["metric"] = METRICS.index(metric)
    table["temperature"] = temperatures
    for row, position in zip(table, positions, strict=True):
        last = position == positions[-1]
        row["threshold"], row["repeat"], row["patience"] = _rule(policy, position, last)
    return table


def _rule(policy: Policy, position: int, last: bool) -> tuple[np.float32, int, int]:
    """(threshold, repeat, patience) of an exit; a subclass may decide otherwise, so it has none."""
    unused = np.float32(0)
    kind = type(policy)
    if kind not in (Never, Threshold, Patience, PatientAndConfident):
        raise ConfigError(
            f"the policy {kind.__name__} can't be decided on the device",
            remedy="The modes polling and sync decide on the host: mode='polling'",
        )
    if last or isinstance(policy, Never):
        return unused, 0, 1
    if isinstance(policy, Patience):
        return unused, 1, policy.patience
    assert isinstance(policy, Threshold | PatientAndConfident)
    threshold = policy.thresholds[position]
    # No signal reaches NaN: an exit without a threshold lets nobody leave.
    limit = np.float32(np.nan if threshold is None else threshold)
    return limit, 0, policy.patience if isinstance(policy, PatientAndConfident) else 1


class Verdict(NamedTuple):
    """What the device said of the samples at one exit: as arrays, or of one sample as scalars.

    Attributes:
        decision: As `confidence.decide` gives it.
        status: `GOES_ON` or why the sample leaves, shape (batch,) or an int.
        time_ns: Low 32 bits of the device's clock when it wrote, shape (batch,) or an int.
    """

    decision: Decision
    status: NDArray[np.uint32] | int
    time_ns: NDArray[np.uint32] | int


class Records:
    """Reads what the kernels write.

    Args:
        memory: exits * batch * `RECORD_BYTES` bytes, uint8, aligned to 8.
        exits: Number of evaluated exits.
        batch: Largest number of samples of a frame.
        answer: 8 bytes, uint8, aligned to 8: the word that says where the first sample left.
    """

    def __init__(
        self,
        memory: NDArray[np.uint8],
        exits: int,
        batch: int,
        answer: NDArray[np.uint8] | None = None,
    ) -> None:
        self._table = memory.view(np.uint64).reshape(exits, batch, RECORD_WORDS)
        # Reading these costs less than indexing an array.
        self._memory = memory.data
        self._exit_bytes = batch * RECORD_BYTES
        self._answer = None if answer is None else answer.data.cast("Q")

    def read(self, exit: int, samples: int, sequence: int) -> Verdict | None:
        """What an exit said of the first samples of a frame, None until all of it has arrived.

        Args:
            exit: Index among the evaluated exits.
            samples: How many samples the frame has; one gives scalars.
            sequence: The frame's number.
        """
        if samples != 1:
            return self._read_batch(exit, samples, sequence)
        words = _words_of(self._memory, exit * self._exit_bytes)
        label, signal, sure, status, time = words
        if not (
            label & _LOW == sequence
            and signal & _LOW == sequence
            and sure & _LOW == sequence
            and status & _LOW == sequence
            and time & _LOW == sequence
        ):
            return None
        return _verdict(words)

    def _read_batch(self, exit: int, samples: int, sequence: int) -> Verdict | None:
        # A copy first: the device may write while we look.
        words = self._table[exit, :samples, :_USED].T.copy()
        if (words & _LOW != sequence).any():
            return None
        label, signal, sure, status, time = (words >> 32).astype(np.uint32)
        decision = Decision(label.astype(np.int64), signal.view(np.float32), sure.view(np.float32))
        return Verdict(decision, status, time)

    def copy(self, exits: int, sequence: int) -> bytes | None:
        """What the first exits said of a frame of one image, None until all of it has arrived.

        The time this takes does not depend on how many exits there are, as reading each would;
        `verdict_of` reads one of them when somebody asks.

        Args:
            exits: How many have judged the frame.
            sequence: The frame's number.
        """
        raw = self._memory[: exits * RECORD_BYTES].tobytes()
        numbers = memoryview(raw).cast("I")[_LOWER::2].tobytes()
        return raw if numbers == sequence.to_bytes(4, sys.byteorder) * (len(raw) // 8) else None

    def answer(self, sequence: int) -> int | None:
        """The exit where the first sample of a frame left, None as long as it has not."""
        assert self._answer is not None
        word = self._answer[0]
        return word >> 32 if word & _LOW == sequence else None


def verdict_of(records: bytes, exit: int) -> Verdict:
    """What an exit said, of a copy that `Records.copy` made."""
    return _verdict(_words_of(records, exit * RECORD_BYTES))


def _verdict(words: tuple[int, ...]) -> Verdict:
    label, signal, sure, status, time = (word >> 32 for word in words)
    bits = _floats(_bits(signal, sure))
    decision = Decision(np.int64(label), np.float32(bits[0]), np.float32(bits[1]))
    return Verdict(decision, status, time)


def decide_twin(
    logits: NDArray[np.floating],
    rule: Any,
    control: Any,
    state: NDArray[Any],
    exit: int,
    first: bool,
    last: bool,
    records_out: NDArray[np.uint64],
    now_ns: int,
    answer: NDArray[np.uint64] | None = None,
) -> int:
    """Do on the host what the kernel does: the definition of it, for a fake device and for tests.

    Args:
        logits: Shape (batch, classes), float32 or float16.
        rule: One element of dtype `RULE`.
        control: One element of dtype `CONTROL`.
        state: Dtype `STATE`, shape (batch,); updated.
        exit: Index of the exit, as `control` and the answer count.
        first: Whether it is the first exit that is evaluated.
        last: Whether it always answers.
        records_out: Shape (batch, `RECORD_WORDS`); samples of the frame are written.
        now_ns: The device's clock.
        answer: Shape (1,); written where the first sample leaves.

    Returns:
        The status of the first sample; of a frame without samples `LAST`, since nothing goes on.
    """
    samples, sequence = int(control["samples"]), int(control["sequence"])
    statuses = []
    for sample in range(samples):
        decision, finite = _judge(logits[sample], rule)
        before = state[sample]
        repeats = not first and decision.labels == before["label"]
        fires = finite and (repeats if rule["repeat"] else decision.signal >= rule["threshold"])
        streak = (0 if first else int(before["streak"])) + 1 if fires else 0
        state[sample] = (decision.labels, streak)
        leaves = streak >= rule["patience"]
        status = _status(finite, last, bool(leaves), exit >= control["deepest"])
        _write(records_out[sample], decision, status, now_ns, sequence)
        statuses.append(status)
    if not statuses:
        return LAST
    if statuses[0] != GOES_ON and answer is not None:
        answer[0] = exit << 32 | sequence
    return statuses[0]


def _judge(logits: NDArray[np.floating], rule: Any) -> tuple[Decision, bool]:
    """The decision of one sample, and whether its logits are finite; if not, its signal is 0."""
    try:
        metric = METRICS[rule["metric"]]
        return confidence.decide(logits, metric, float(rule["temperature"])), True
    except BackendError:
        return Decision(logits.argmax(), np.float32(0), np.float32(0)), False


def _status(finite: bool, last: bool, leaves: bool, late: bool) -> int:
    if not finite:
        return NOT_FINITE
    if last:
        return LAST
    if leaves:
        return CONFIDENT
    return DEADLINE if late else GOES_ON


def _write(
    record: NDArray[np.uint64], decision: Decision, status: int, now_ns: int, sequence: int
) -> None:
    signal, sure = (int(np.float32(x).view(np.uint32)) for x in decision[1:])
    payloads = (int(decision.labels), signal, sure, status, now_ns & _LOW, 0, 0, 0)
    record[:] = [payload << 32 | sequence for payload in payloads]
