"""Which execution modes work here, found out by running them on one tiny frame."""

from __future__ import annotations

import time
from contextlib import ExitStack

import numpy as np

from edge_runtime.backends.cuda import decide
from edge_runtime.backends.cuda.base import Body, Condition, Cuda
from edge_runtime.backends.cuda.graphs import FramePlan, frame_graph
from edge_runtime.backends.cuda.judge import Judge
from edge_runtime.backends.cuda.slots import NO_DEADLINE, Slot
from edge_runtime.errors import CudaError
from edge_runtime.tensors import TensorSpec

#: Modes from the best to the plainest, and what each does at an exit.
MODES = {
    "graph": "the device decides: one launch and one wait per frame",
    "polling": "the host decides, and sees each verdict the moment it is written",
    "sync": "the host decides, and waits for the stream at each exit",
    "run_all": "every stage runs; the host decides at the end",
}

_SPEC = TensorSpec("probe", ("batch", 1), "uint8")
_LOGITS = TensorSpec("logits", ("batch", 2), "float32")
_PATIENCE_S = 2.0


def why_not(cuda: Cuda, batch: int) -> dict[str, str]:
    """Why each mode is not available, empty where it is.

    Args:
        cuda: The device, open.
        batch: Samples of every run.
    """
    with ExitStack() as stack:
        bench = _Bench(cuda, not cuda.why_no_graphs(), stack)
        reasons = dict.fromkeys(MODES, "")
        reasons["polling"] = bench.why_no_polling()
        if batch != 1:
            reasons["graph"] = f"a graph takes one image per frame, the batch is {batch}"
        else:
            reasons["graph"] = cuda.why_no_graphs() or bench.why_no_branches()
    return reasons


class _Bench:
    """Two exits on two equal logits, whose largest softmax is 0.5."""

    def __init__(self, cuda: Cuda, graphs: bool, stack: ExitStack) -> None:
        keep = stack.enter_context
        self._cuda = cuda
        self._stream = keep(cuda.stream())
        self._logits = keep(cuda.memory(8)).address
        self._slot = Slot(0, cuda, _SPEC, 1, 2, keep)
        self._judge = Judge(cuda, [_LOGITS, _LOGITS], batch=1, conditionals=graphs, keep=keep)
        self._frames = 0

    def why_no_polling(self) -> str:
        """The host must see a verdict in mapped memory without waiting for the stream."""
        call = self._judge.call(0, self._slot, self._logits)
        self._begin(threshold=0.25)
        self._slot.bring(self._stream)
        self._stream.launch(*call)
        end, late = time.monotonic() + _PATIENCE_S, False
        while self._slot.records.read(0, 1, self._frames) is None:
            if late:
                return "the host does not see what the device writes to mapped memory"
            self._stream.is_done()  # raises what went wrong
            late = time.monotonic() > end  # One more look: this thread may have slept.
        return ""

    def why_no_branches(self) -> str:
        """A branch must run if, and only if, the exit before it goes on."""
        try:
            with frame_graph(self._cuda, FramePlan(self._slot.bring, [[], []], self._put)) as graph:
                for threshold, want in ((0.75, 1), (0.25, 0), (0.75, 1)):
                    self._begin(threshold)
                    graph.launch(self._stream)
                    self._stream.synchronize()
                    got = self._slot.records.answer(self._frames)
                    if got != want:
                        return f"a conditional graph ended at exit {got} instead of {want}"
        except CudaError as error:
            return f"a conditional graph failed: {error}"
        return ""

    def _begin(self, threshold: float) -> None:
        rules = np.zeros(2, decide.RULE)
        rules["threshold"], rules["temperature"], rules["patience"] = threshold, 1, 1
        self._judge.write(rules, self._stream)
        self._frames += 1
        self._slot.write(np.zeros((1, 1), np.uint8), self._frames)
        self._slot.limit(NO_DEADLINE)

    def _put(self, body: Body, k: int, condition: Condition | None) -> None:
        call = self._judge.call(k, self._slot, self._logits, on_device=True, condition=condition)
        body.launch(*call)
