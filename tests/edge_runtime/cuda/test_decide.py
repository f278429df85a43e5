"""The kernel's very source, run on the CPU, against `confidence.decide`, policies and its twin."""

import ctypes
import io
import time

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from edge_runtime import confidence
from edge_runtime.backends.cuda import decide as device
from edge_runtime.backends.cuda.decide import (
    CONFIDENT,
    CONTROL,
    DEADLINE,
    GOES_ON,
    LAST,
    NOT_FINITE,
    RECORD_BYTES,
    RECORD_WORDS,
    RULE,
    STATE,
    THREADS,
    Records,
    Verdict,
    decide_twin,
    kernel_name,
    rules,
)
from edge_runtime.confidence import METRICS
from edge_runtime.errors import BackendError, ConfigError
from edge_runtime.policy import Never, Patience, PatientAndConfident, Streak, Threshold
from tests.edge_runtime.bundles import refused
from tests.host_kernels import compile_host

DTYPES = ["float32", "float16"]
NAMES = [kernel_name(dtype, conditional) for dtype in DTYPES for conditional in (False, True)]

#: Gives each half as the kernels see it.
WIDEN = """
extern "C" __global__ void widen(const unsigned short* halves, float* floats) {
    const unsigned i = blockIdx.x * THREADS + threadIdx.x;
    floats[i] = to_float(halves[i]);
}
"""
HANDLER = ctypes.CFUNCTYPE(None, ctypes.c_uint64, ctypes.c_uint32)
SEQUENCE = 0xFFFFFFF7
ANYWHERE = 1000


@pytest.fixture(scope="module")
def host():
    return compile_host([device.SOURCE, WIDEN], [*NAMES, "widen"])


def launch(function, grid, *arguments):
    """Call a kernel as cuLaunchKernel is called; arrays are given by their address."""
    values = [ctypes.c_uint64(x.ctypes.data) if isinstance(x, np.ndarray) else x for x in arguments]
    pointers = (ctypes.c_void_p * len(values))(*[ctypes.addressof(x) for x in values])
    function(pointers, grid, THREADS)


class Device:
    """One frame on the kernel, or on its twin where there is no library."""

    def __init__(self, library, batch=1, *, samples=None, deepest=ANYWHERE, sequence=SEQUENCE):
        self.library = library
        self.batch = batch
        self.samples = batch if samples is None else samples
        self.sequence = sequence
        self.control = np.array([(sequence, deepest, self.samples, 0)], CONTROL)
        self.state = np.zeros(batch, STATE)
        self.record = np.zeros((1, batch, RECORD_WORDS), np.uint64)
        self.answer = np.zeros(1, np.uint64)
        self.records = Records(
            self.record.reshape(-1).view(np.uint8), 1, batch, self.answer.view(np.uint8)
        )

    def judge(self, logits, rule, *, exit=0, first=True, last=False, next=None):
        """Run one exit; returns the verdict."""
        where = (exit, first, last)
        if self.library is None:
            arguments = (rule[0], self.control[0], self.state, *where, self.record[0])
            decide_twin(logits, *arguments, time.time_ns(), self.answer)
        else:
            name = kernel_name(str(logits.dtype), next is not None)
            launch(
                getattr(self.library, f"host_{name}"),
                self.batch,
                *(logits, ctypes.c_int(logits.shape[1]), rule, self.control, self.state),
                *(self.record, self.answer, *map(ctypes.c_int, where)),
                *([] if next is None else [ctypes.c_uint64(next)]),
            )
        return self.records.read(0, self.samples, self.sequence)


def rule_of(metric="max_softmax", threshold=0.5, temperature=1.0, repeat=0, patience=1):
    fields = (threshold, temperature, METRICS.index(metric), repeat, patience, (0, 0, 0))
    return np.array([fields], RULE)


def judge(library, logits, rule, **options):
    """The verdict on logits of shape (batch, classes), as arrays."""
    verdict = Device(library, len(logits)).judge(logits, rule, **options)
    decision = confidence.Decision(*map(np.atleast_1d, verdict.decision))
    return Verdict(decision, np.atleast_1d(verdict.status), np.atleast_1d(verdict.time_ns))


def agree(library, logits, rule, **options):
    """Compare kernel and twin; statuses may differ where a signal is next to its threshold."""
    kernel, twin = judge(library, logits, rule, **options), judge(None, logits, rule, **options)
    np.testing.assert_array_equal(kernel.decision.labels, twin.decision.labels)
    for ours, theirs in zip(kernel.decision[1:], twin.decision[1:], strict=True):
        assert ours.dtype == theirs.dtype == np.float32
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    clear = np.abs(twin.decision.signal - rule["threshold"]) > 1e-6
    np.testing.assert_array_equal(kernel.status[clear], twin.status[clear])
    return kernel


class TestSource:
    @pytest.mark.parametrize("conditionals", [False, True])
    @pytest.mark.parametrize("architecture", ["sm_87", "sm_90", "sm_110"])
    def test_the_compiler_of_the_device_takes_it(self, architecture, conditionals):
        core = pytest.importorskip("cuda.core", reason="cuda-core brings the compiler")
        options = core.ProgramOptions(
            arch=architecture,
            define_macro=["GRAPH_CONDITIONALS"] if conditionals else None,
            ptxas_options=["-v"],
        )
        log = io.StringIO()
        code = core.Program(device.source(), "c++", options).compile("cubin", logs=log).code
        found = [name for name in NAMES if f"\0.text.{name}\0".encode() in code]
        assert found == [name for name in NAMES if conditionals or not name.endswith("_next")]
        assert "warning" not in log.getvalue()
        memory = [line for line in log.getvalue().splitlines() if "stack frame" in line]
        assert len(memory) == len(found)
        for line in memory:
            assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in line

    def test_it_includes_nothing(self):
        assert "#include" not in device.source()

    def test_structs_have_their_sizes(self):
        assert (RULE.itemsize, CONTROL.itemsize, STATE.itemsize, RECORD_BYTES) == (32, 16, 8, 64)

    def test_without_conditionals_it_has_two_kernels(self):
        library = compile_host([device.SOURCE], NAMES[::2], conditionals=False)
        assert not hasattr(library, "host_decide_float32_next")
        logits = np.float32([[1, 3]])
        agree(library, logits, rule_of())

    def test_only_two_dtypes_have_kernels(self):
        with refused(BackendError, "dtype of the logits: got int8, expected float32 or float16"):
            kernel_name("int8", False)


class TestSignals:
    @pytest.mark.parametrize("metric", METRICS)
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("classes", [2, 3, 17, 255, 256, 257, 1000, 1003, 4099])
    def test_many_logits(self, host, metric, dtype, classes):
        random = np.random.default_rng([classes, METRICS.index(metric)])
        for scale, temperature in [(0.01, 1), (1, 1.7), (5, 1), (30, 0.25), (100, 20)]:
            logits = (random.standard_normal((3, classes)) * scale).astype(dtype)
            threshold = np.median(confidence.decide(logits, metric, temperature).signal)
            agree(host, logits, rule_of(metric, threshold, temperature))

    @pytest.mark.parametrize("metric", METRICS)
    def test_as_many_classes_as_imagenet_has_in_full(self, host, metric):
        logits = np.random.default_rng(1).standard_normal((1, 21_841)).astype(np.float32)
        agree(host, logits, rule_of(metric))

    @pytest.mark.parametrize("metric", METRICS)
    @settings(deadline=None, max_examples=50)
    @given(
        logits=st.integers(2, 6).flatmap(
            lambda classes: st.lists(
                st.lists(
                    st.floats(width=32) | st.sampled_from([0.0, -0.0, 1.0, 3e38, -3e38]),
                    min_size=classes,
                    max_size=classes,
                ),
                min_size=1,
                max_size=2,
            )
        ),
        temperature=st.floats(0.125, 20, width=32) | st.just(1.0),
    )
    def test_any_logits(self, host, metric, logits, temperature):
        logits = np.array(logits, np.float32)
        kernel = agree(host, logits, rule_of(metric, 0.7, temperature))
        lowest, highest = confidence.bounds(metric, logits.shape[1])
        finite = kernel.status != NOT_FINITE
        assert (kernel.decision.signal[finite] >= lowest).all()
        assert (kernel.decision.signal[finite] <= highest).all()
        assert (kernel.decision.signal[~finite] == 0).all()
        assert (kernel.decision.confidence[~finite] == 0).all()

    @pytest.mark.parametrize("metric", METRICS)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_the_lowest_label_wins_a_tie_wherever_it_stands(self, host, metric, dtype):
        random = np.random.default_rng(2)
        for classes in (2, 16, 300, 1000):
            logits = random.integers(0, 3, (4, classes)).astype(dtype)
            logits[0] = 1.5
            kernel = agree(host, logits, rule_of(metric, 10))
            np.testing.assert_array_equal(kernel.decision.labels, logits.argmax(axis=1))

    @pytest.mark.parametrize("metric", METRICS)
    @pytest.mark.parametrize("place", [0, 1, 255, 256, 511, 599])
    def test_the_two_largest_are_found_wherever_they_stand(self, host, metric, place):
        for other in (0, 1, 17, 256, 272, 598, 599):
            logits = np.zeros((1, 600), np.float32)
            logits[0, [place, other]] = 9, 7
            kernel = agree(host, logits, rule_of(metric))
            assert kernel.decision.labels == (place if other != place else logits.argmax())

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    @pytest.mark.parametrize("others", [0.0, np.nan, np.inf, -np.inf])
    @pytest.mark.parametrize("place", [0, 299])
    @pytest.mark.parametrize("temperature", [1.0, 2.0])
    def test_logits_that_are_not_finite(self, host, dtype, bad, others, place, temperature):
        logits = np.zeros((3, 300), dtype)
        logits[1, [place, 150]] = bad, others
        kernel = agree(host, logits, rule_of(threshold=0, temperature=temperature), last=True)
        assert kernel.status.tolist() == [LAST, NOT_FINITE, LAST]

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    def test_nothing_but_bad_logits(self, host, value):
        kernel = agree(host, np.full((1, 700), value, np.float32), rule_of())
        assert kernel.status == NOT_FINITE
        assert kernel.decision.labels == 0

    def test_logits_beyond_float32(self, host):
        logits = np.float32([[3e38, -3e38], [3e38, 0]])
        for temperature, status in [(1, [NOT_FINITE, CONFIDENT]), (0.1, [NOT_FINITE] * 2)]:
            kernel = agree(host, logits, rule_of(temperature=temperature))
            assert kernel.status.tolist() == status

    def test_every_half_is_read_rightly(self, host):
        halves = np.arange(2**16, dtype=np.uint16)
        floats = np.zeros(2**16, np.float32)
        launch(host.host_widen, 2**16 // THREADS, halves, floats)
        expected = halves.view(np.float16).astype(np.float32)
        np.testing.assert_array_equal(floats, expected)
        np.testing.assert_array_equal(np.signbit(floats), np.signbit(expected))

    @pytest.mark.parametrize("metric", METRICS)
    def test_a_sample_is_judged_bit_for_bit_the_same_alone_and_again(self, host, metric):
        logits = np.random.default_rng(3).standard_normal((4, 1000)).astype(np.float32)
        rule = rule_of(metric, 0.5, 1.5)
        together = judge(host, logits, rule).decision
        for row in range(4):
            alone = judge(host, logits[row : row + 1], rule).decision
            assert alone.labels == together.labels[row]
            assert alone.signal == together.signal[row]
            assert alone.confidence == together.confidence[row]


class TestStatus:
    @pytest.mark.parametrize("library", ["kernel", "twin"])
    @pytest.mark.parametrize("metric", METRICS)
    def test_a_signal_that_equals_the_threshold_leaves(self, host, library, metric):
        library = host if library == "kernel" else None
        random = np.random.default_rng(4)
        for _ in range(20):
            logits = random.standard_normal((1, 10)).astype(np.float32)
            signal = judge(library, logits, rule_of(metric)).decision.signal[0]
            assert judge(library, logits, rule_of(metric, signal)).status == CONFIDENT
            above = np.nextafter(signal, np.float32(np.inf))
            assert judge(library, logits, rule_of(metric, above)).status == GOES_ON

    @pytest.mark.parametrize("library", ["kernel", "twin"])
    def test_thresholds_at_the_ends_of_the_scale(self, host, library):
        library = host if library == "kernel" else None
        logits = np.float32([[0, 200], [0, 1], [0, 0]])
        assert (judge(library, logits, rule_of(threshold=0)).status == CONFIDENT).all()
        status = judge(library, logits, rule_of(threshold=1)).status
        assert status.tolist() == [CONFIDENT, GOES_ON, GOES_ON]
        assert (judge(library, logits, rule_of(threshold=np.nan)).status == GOES_ON).all()

    @pytest.mark.parametrize("library", ["kernel", "twin"])
    @pytest.mark.parametrize(
        ("exit", "deepest", "status"),
        [(0, 0, DEADLINE), (1, 0, DEADLINE), (1, 2, GOES_ON), (2, 2, DEADLINE), (0, 0, DEADLINE)],
    )
    def test_the_deadline_ends_at_the_deepest_exit(self, host, library, exit, deepest, status):
        frame = Device(host if library == "kernel" else None, deepest=deepest)
        unsure, sure = np.float32([[0, 0.1]]), np.float32([[0, 9]])
        assert frame.judge(unsure, rule_of(threshold=0.9), exit=exit).status == status
        assert frame.judge(sure, rule_of(threshold=0.9), exit=exit).status == CONFIDENT
        assert frame.judge(sure, rule_of(threshold=0.9), exit=exit, last=True).status == LAST
        bad = np.float32([[0, np.nan]])
        assert frame.judge(bad, rule_of(threshold=0.9), exit=exit, last=True).status == NOT_FINITE

    @pytest.mark.parametrize("library", ["kernel", "twin"])
    def test_slots_without_a_sample_are_left_alone(self, host, library):
        frame = Device(host if library == "kernel" else None, 4, samples=2)
        frame.record[:] = 77
        frame.state["streak"] = 5
        verdict = frame.judge(np.float32([[0, 9]] * 4), rule_of())
        assert verdict.status.tolist() == [CONFIDENT, CONFIDENT]
        assert (frame.record[0, 2:] == 77).all()
        assert (frame.record[0, :2, 5:] == frame.record[0, 0, 3] % 2**32).all()
        assert frame.state["streak"].tolist() == [1, 1, 5, 5]

    @pytest.mark.parametrize("library", ["kernel", "twin"])
    def test_a_frame_without_samples_does_nothing(self, host, library):
        frame = Device(host if library == "kernel" else None, samples=0)
        frame.judge(np.float32([[0, 9]]), rule_of())
        assert not frame.record.any()
        assert not frame.answer.any()

    @pytest.mark.parametrize("library", ["kernel", "twin"])
    @pytest.mark.parametrize(
        ("first_sample", "options", "status"),
        [
            ([0, 9], {}, CONFIDENT),
            ([0, 0], {}, GOES_ON),
            ([0, 0], {"last": True}, LAST),
            ([0, np.inf], {}, NOT_FINITE),
        ],
    )
    def test_the_answer_says_where_the_first_sample_left(
        self, host, library, first_sample, options, status
    ):
        frame = Device(host if library == "kernel" else None, 2)
        logits = np.float32([first_sample, [0, 9]])
        verdict = frame.judge(logits, rule_of(threshold=0.9), exit=3, **options)
        assert verdict.status[0] == status
        left = status != GOES_ON
        assert frame.records.answer(SEQUENCE) == (3 if left else None)
        assert frame.records.answer(SEQUENCE + 1) is None

    def test_without_an_answer_word_none_is_written(self, host):
        frame = Device(host)
        frame.answer = ctypes.c_uint64(0)
        assert frame.judge(np.float32([[0, 9]]), rule_of()).status == CONFIDENT

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_the_condition_is_set_where_the_sample_goes_on(self, host, dtype):
        told = []
        handler = HANDLER(lambda handle, value: told.append((handle, value)))
        host.host_on_conditional(handler)
        try:
            for sample in ([0, 9], [0, 0.5], [0, np.nan]):
                for last in (False, True):
                    for next_ in (None, 2**40 + 5):
                        logits = np.array([sample], dtype)
                        rule = rule_of(threshold=0.9)
                        status = Device(host).judge(logits, rule, last=last, next=next_).status
                        goes_on = status == GOES_ON
                        assert told == ([(2**40 + 5, 1)] if goes_on and next_ else [])
                        told.clear()
        finally:
            host.host_on_conditional(None)

    def test_the_time_is_that_of_the_clock(self, host):
        before = time.time_ns()
        verdict = Device(host).judge(np.float32([[0, 9]]), rule_of())
        after = time.time_ns()
        assert (verdict.time_ns - before) % 2**32 <= after - before


thresholds = st.lists(st.none() | st.floats(0.25, 1.125, width=32), min_size=4, max_size=4).map(
    tuple
)
policies = st.one_of(
    st.just(Never()),
    st.builds(Threshold, thresholds, st.just(0.25)),
    st.builds(Patience, st.integers(1, 5)),
    st.builds(PatientAndConfident, thresholds, st.integers(1, 3)),
)


def exit_on_device(library, policy, metric, temperatures, exits):
    """Where a sample leaves by the kernels, given its logits at each exit of the cascade."""
    positions = policy.evaluated(len(exits))
    table = rules(policy, metric, [temperatures[i] for i in positions], positions)
    frame = Device(library)
    for index, position in enumerate(positions):
        where = {"first": index == 0, "last": position == positions[-1]}
        rule = table[index : index + 1]
        verdict = frame.judge(exits[position][None], rule, exit=position, **where)
        assert verdict is not None
        if verdict.status != GOES_ON:
            assert verdict.status == (LAST if where["last"] else CONFIDENT)
            return frame.records.answer(SEQUENCE)
    raise AssertionError("no exit answered")


def exit_on_host(policy, metric, temperatures, exits):
    """Where it leaves by the policy, and how near its signals came to a threshold."""
    positions, streak, nearest = policy.evaluated(len(exits)), Streak(), np.inf
    limits = getattr(policy, "thresholds", ())
    for position in positions[:-1]:
        decision = confidence.decide(exits[position], metric, temperatures[position])
        if limits:
            nearest = min(nearest, abs(decision.signal - limits[position]))
        if policy.leaves(position, decision, streak):
            return position, nearest
    return positions[-1], nearest


class TestPolicies:
    @pytest.mark.parametrize("library", ["kernel", "twin"])
    @settings(deadline=None, max_examples=150)
    @given(
        policy=policies,
        metric=st.sampled_from(["max_softmax", "softmax_margin", "logits_margin"]),
        seed=st.integers(0, 2**32),
    )
    def test_a_sample_leaves_where_the_host_lets_it_leave(
        self, host, library, policy, metric, seed
    ):
        random = np.random.default_rng(seed)
        # Few classes, so that labels repeat.
        exits = (random.standard_normal((5, 3)) * random.uniform(0.5, 3)).astype(np.float32)
        temperatures = random.choice([1.0, 0.5, 1.75], 5).tolist()
        expected, nearest = exit_on_host(policy, metric, temperatures, exits)
        assume(nearest > 1e-5)
        library = host if library == "kernel" else None
        assert exit_on_device(library, policy, metric, temperatures, exits) == expected

    def test_the_table(self):
        table = rules(Threshold((0.5, None, 0.75), 0.0), "entropy", [1, 2, 3], [0, 2, 3])
        assert table["threshold"].tolist() == [0.5, 0.75, 0]
        assert table["temperature"].tolist() == [1, 2, 3]
        assert table["metric"].tolist() == [1, 1, 1]
        assert table["repeat"].tolist() == [0, 0, 0]
        assert table["patience"].tolist() == [1, 1, 1]

    def test_the_table_of_each_policy(self):
        def told(policy):
            table = rules(policy, "max_softmax", [1, 1, 1], [0, 1, 2])
            return table[["repeat", "patience"]].tolist()

        assert told(Patience(2)) == [(1, 2), (1, 2), (0, 1)]
        assert told(PatientAndConfident((0.5, 0.5), 2)) == [(0, 2), (0, 2), (0, 1)]
        assert rules(Never(), "max_softmax", [1.5], [4])["temperature"] == [1.5]

    def test_an_exit_that_is_certain_to_fire_is_the_last_one(self):
        policy = Threshold((0.5, 0.0, 0.5), 0.0)
        exits = np.float32([[0, 0, 0]] * 4)
        assert exit_on_device(None, policy, "softmax_margin", [1] * 4, exits) == 1

    def test_a_policy_of_ones_own_is_decided_on_the_host(self):
        class Reckless(Threshold):
            pass

        with refused(ConfigError, "the policy Reckless can't be decided on the device"):
            rules(Reckless((0.5,), 0.0), "max_softmax", [1, 1], [0, 1])

    @pytest.mark.parametrize("metric", METRICS)
    @settings(deadline=None, max_examples=50)
    @given(
        seed=st.integers(0, 2**32),
        limits=st.lists(st.floats(-2, 2, width=32), min_size=4, max_size=4),
        raised=st.lists(st.floats(0, 2, width=32), min_size=4, max_size=4),
    )
    def test_a_higher_threshold_never_exits_earlier(self, metric, seed, limits, raised):
        exits = np.random.default_rng(seed).standard_normal((5, 4)).astype(np.float32)
        lowest = confidence.bounds(metric, 4)[0]
        higher = tuple(limit + more for limit, more in zip(limits, raised, strict=True))
        before, after = (
            exit_on_device(None, Threshold(tuple(t), lowest), metric, [1.0] * 5, exits)
            for t in (limits, higher)
        )
        assert before <= after


def words(labels, sequence):
    """Records of confident samples, shape (batch, words)."""
    payloads = [[label, 0x3F400000, 0x3F000000, CONFIDENT, 99] for label in labels]
    made = np.full((len(labels), RECORD_WORDS), 123, np.uint64)
    made[:, :5] = np.array(payloads, np.uint64) << np.uint64(32) | np.uint64(sequence)
    return made


class TestRecords:
    @pytest.mark.parametrize("sequence", [1, 2**31, 2**32 - 1])
    def test_one_sample_is_read_as_scalars(self, sequence):
        memory = np.stack([words([0], 5), words([2**31 - 1], sequence)])
        verdict = Records(memory.reshape(-1).view(np.uint8), 2, 1).read(1, 1, sequence)
        labels, signal, sure = verdict.decision
        assert (type(labels), type(signal), type(sure)) == (np.int64, np.float32, np.float32)
        assert (labels, signal, sure) == (2**31 - 1, 0.75, 0.5)
        assert (verdict.status, verdict.time_ns) == (CONFIDENT, 99)

    def test_several_samples_are_read_as_arrays(self):
        memory = np.stack([words([0] * 3, 5), words([7, 8, 9], 6)])
        records = Records(memory.reshape(-1).view(np.uint8), 2, 3)
        verdict = records.read(1, 2, 6)
        assert verdict.decision.labels.tolist() == [7, 8]
        assert verdict.decision.signal.tolist() == [0.75, 0.75]
        assert verdict.decision.confidence.tolist() == [0.5, 0.5]
        assert verdict.status.tolist() == [CONFIDENT, CONFIDENT]
        assert verdict.time_ns.tolist() == [99, 99]
        assert verdict.decision.labels.dtype == np.int64
        assert records.read(0, 2, 6) is None

    @given(st.integers(1, 4), st.data())
    def test_a_record_of_which_a_word_is_old_is_not_taken(self, samples, data):
        memory, old = words(range(samples), 8), words(range(samples), 7)
        where = st.tuples(st.integers(0, samples - 1), st.integers(0, 4))
        for place in data.draw(st.sets(where, min_size=1)):
            memory[place] = old[place]
        records = Records(memory.reshape(-1).view(np.uint8), 1, samples)
        assert records.read(0, samples, 8) is None

    def test_old_words_after_the_samples_of_the_frame_do_not_matter(self):
        memory = np.concatenate([words([1, 2], 8), words([3], 7)])
        records = Records(memory.reshape(-1).view(np.uint8), 1, 3)
        assert records.read(0, 2, 8) is not None
        assert records.read(0, 3, 8) is None

    def test_a_verdict_stays_when_the_memory_changes(self):
        memory = words([1, 2], 8)
        verdict = Records(memory.reshape(-1).view(np.uint8), 1, 2).read(0, 2, 8)
        memory[:] = 0
        assert verdict.decision.labels.tolist() == [1, 2]
        assert verdict.decision.signal.tolist() == [0.75, 0.75]
