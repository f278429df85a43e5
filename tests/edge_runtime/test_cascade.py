"""The dataflow: what is refused, and that a plan runs what is needed, in order, and no more."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.cascade import Cascade, Exit, Plan, Stage
from edge_runtime.errors import ConfigError
from edge_runtime.tensors import TensorSpec
from tests.edge_runtime.bundles import refused

CLASSES = ("a", "b", "c")


def spec(name: str, width: int = 3, dtype: str = "float32") -> TensorSpec:
    return TensorSpec(name, ("batch", width), dtype)


def stage(name: str, inputs: str, outputs: str) -> Stage:
    """A stage by the names of its tensors, separated by spaces."""
    return Stage(
        name,
        "segment",
        tuple(spec(tensor) for tensor in inputs.split()),
        tuple(spec(tensor) for tensor in outputs.split()),
    )


def cascade(stages: list[Stage], *exits: str, classes=CLASSES) -> Cascade:
    return Cascade(
        classes, spec("image"), tuple(stages), tuple(Exit(f"exit-{name}", name) for name in exits)
    )


#: The trunk splits into two branches that meet again; four exits and a saver of its own.
DIAMOND = cascade(
    [
        stage("saver", "image", "s"),
        stage("trunk", "image", "t skip"),
        stage("left", "t", "l"),
        stage("left-head", "l", "left-logits"),
        stage("right", "t image", "r"),
        stage("right-head", "r", "right-logits"),
        stage("join", "l r skip", "j"),
        stage("last-head", "j s", "last-logits"),
        stage("unused", "j", "u"),
    ],
    "s",
    "left-logits",
    "right-logits",
    "last-logits",
)


class TestRefuses:
    @pytest.mark.parametrize(
        ("stages", "exits", "message"),
        [
            (["a: image -> y"], ["y", "y"], "the exit name 'exit-y' is used twice"),
            (["a: image -> x", "a: x -> y"], ["y"], "the stage name 'a' is used twice"),
            (["a: image -> x", ": x -> y"], ["y"], "the stage name '' is empty"),
            ([], ["y"], "a cascade needs at least one stage and one exit"),
            (["a: image -> y"], [], "a cascade needs at least one stage and one exit"),
            (["a:  -> y"], ["y"], "stage 'a' needs at least one input and one output"),
            (["a: image -> y", "b: y -> "], ["y"], "stage 'b' needs at least one input and"),
            (["a: image image -> y"], ["y"], "input of stage 'a': name 'image' is used twice"),
            (
                ["a: image -> x", "b: z -> y"],
                ["y"],
                "stage 'b': nobody produces its input 'z'. Tensors that exist: image, x, y",
            ),
            (["a: y -> y"], ["y"], "stage 'a' is part of a cycle: its input 'y' depends"),
            (["a: y -> x", "b: x -> y"], ["y"], "stage 'a' is part of a cycle"),
            (
                ["a: image z -> x", "b: x -> y", "c: y -> z"],
                ["y"],
                "stage 'a' is part of a cycle: its input 'z' depends on its own outputs",
            ),
            (
                ["b: x -> y", "a: image -> x"],
                ["y"],
                "stage 'b' is listed before 'a', which produces its input 'x'. List stages in",
            ),
            (["a: image -> y", "b: image -> y"], ["y"], "two producers: stage 'a' and stage 'b'"),
            (["a: image -> y y"], ["y"], "tensor 'y' has two producers: stage 'a' and stage 'a'"),
            (["a: image -> image y"], ["y"], "'image' has two producers: the image and stage 'a'"),
            (["a: image -> y"], ["z"], "exit 'exit-z': no stage produces its logits 'z'"),
            (["a: image -> y"], ["image"], "no stage produces its logits 'image'"),
        ],
    )
    def test_a_dataflow_that_can_not_run(self, stages, exits, message):
        made = []
        for text in stages:
            name, _, flow = text.partition(":")
            inputs, _, outputs = flow.partition("->")
            made.append(stage(name, inputs, outputs))
        with refused(ConfigError, message):
            cascade(made, *exits)

    @pytest.mark.parametrize(
        ("writes", "reads", "fits"),
        [
            (spec("x", 5), spec("x", 5), True),
            (spec("x", 5), spec("x", 6), False),
            (spec("x", 5), spec("x", 5, "float16"), False),
            (spec("x", 5, "int32"), spec("x", 5, "int64"), False),
            (spec("x", 5), TensorSpec("x", ("batch", 5, 1), "float32"), False),
            (spec("x", 5), TensorSpec("x", ("batch",), "float32"), False),
            (spec("x", 5), TensorSpec("x", ("batch", "width"), "float32"), True),
            (TensorSpec("x", ("batch", "width"), "float32"), spec("x", 5), True),
            (TensorSpec("x", (1, 5), "float32"), spec("x", 5), True),
            (spec("x", 5), TensorSpec("x", (1, 5), "float32"), True),
        ],
    )
    def test_shapes_and_dtypes_that_do_not_meet(self, writes, reads, fits):
        stages = (
            Stage("a", "segment", (spec("image"),), (writes,)),
            Stage("b", "head", (reads,), (spec("y"),)),
        )
        if fits:
            Cascade(CLASSES, spec("image"), stages, (Exit("e", "y"),))
            return
        message = "stage 'b': input 'x' does not fit what stage 'a' writes"
        with refused(ConfigError, message, f"got {writes}, expected {reads}"):
            Cascade(CLASSES, spec("image"), stages, (Exit("e", "y"),))

    def test_an_image_that_does_not_meet(self):
        image = TensorSpec("image", ("batch", "height", "width", 3), "uint8")
        with refused(ConfigError, "input 'image' does not fit what the image writes"):
            Cascade(CLASSES, image, (stage("a", "image", "y"),), (Exit("e", "y"),))

    @pytest.mark.parametrize(
        "logits",
        [
            spec("y", 4),
            spec("y", 2),
            spec("y", 3, "int32"),
            TensorSpec("y", ("batch", 3, 1), "float32"),
            TensorSpec("y", ("batch",), "float32"),
            TensorSpec("y", ("batch", "classes"), "float32"),
        ],
        ids=str,
    )
    def test_logits_that_are_not_one_number_per_class(self, logits):
        stages = (Stage("a", "head", (spec("image"),), (logits,)),)
        expected = f"exit 'e': logits 'y': got {logits}, expected (batch, 3) float32 or float16"
        with refused(ConfigError, expected):
            Cascade(CLASSES, spec("image"), stages, (Exit("e", "y"),))

    @pytest.mark.parametrize("dtype", ["float32", "float16"])
    def test_logits_of_either_float(self, dtype):
        stages = (Stage("a", "head", (spec("image"),), (spec("y", 3, dtype),)),)
        Cascade(CLASSES, spec("image"), stages, (Exit("e", "y"),))

    @pytest.mark.parametrize(
        ("classes", "message"),
        [
            ((), "a classifier needs classes: got 0, expected >= 2"),
            (("a",), "a classifier needs classes: got 1, expected >= 2"),
            (("a", "b", "a"), "the class name 'a' is used twice"),
            (("a", "b", ""), "the class name '' is empty"),
        ],
    )
    def test_classes(self, classes, message):
        with refused(ConfigError, message):
            cascade([stage("a", "image", "y")], "y", classes=classes)

    @pytest.mark.parametrize("positions", [[], [4], [-1], [0, 9]])
    def test_exits_that_do_not_exist(self, positions):
        with refused(ConfigError, "exits to evaluate: got", "expected some of 0..3"):
            DIAMOND.plan(positions)


def needed_by(whole: Cascade, tensors: set[str]) -> set[str]:
    """Names of the stages that tensors depend on, by repeating until nothing is added."""
    found: set[str] = set()
    while True:
        wanted = tensors | {i.name for s in whole.stages if s.name in found for i in s.inputs}
        more = {s.name for s in whole.stages if wanted & {o.name for o in s.outputs}}
        if more == found:
            return found
        found = more


def check_plan(whole: Cascade, positions: set[int], plan: Plan) -> None:
    """Every promise of `Cascade.plan`."""
    chosen = sorted(positions)
    assert [step.position for step in plan.steps] == chosen
    assert [step.exit for step in plan.steps] == [whole.exits[i] for i in chosen]
    assert plan.image == whole.image

    # Every needed stage once, none besides, in the cascade's order within a step.
    needed = needed_by(whole, {whole.exits[i].logits for i in chosen})
    names = [stage.name for stage in plan.stages]
    assert sorted(names) == sorted(needed)
    assert plan.pruned == tuple(s.name for s in whole.stages if s.name not in needed)
    order = [s.name for s in whole.stages]
    for number, step in enumerate(plan.steps):
        indices = [order.index(s.name) for s in step.stages]
        assert indices == sorted(indices)
        # As late as possible: nothing that only later exits need.
        so_far = {whole.exits[i].logits for i in chosen[: number + 1]}
        assert {s.name for s in step.stages} <= needed_by(whole, so_far)

    # Every input is there before it is read, the logits before they are judged.
    there = {whole.image.name}
    for number, step in enumerate(plan.steps):
        for one in step.stages:
            assert {i.name for i in one.inputs} <= there
            there |= {o.name for o in one.outputs}
        assert step.exit.logits in there
        # `live` is exactly what is there already and read later.
        later = plan.steps[number + 1 :]
        read = {i.name for s in later for one in s.stages for i in one.inputs}
        read |= {s.exit.logits for s in later}
        assert set(step.live) == there & read
        assert len(set(step.live)) == len(step.live)


SUBSETS = [set(subset) for size in range(1, 5) for subset in itertools.combinations(range(4), size)]


class TestPlan:
    @pytest.mark.parametrize("positions", SUBSETS, ids=str)
    def test_every_subset_of_the_exits_of_a_diamond(self, positions):
        check_plan(DIAMOND, positions, DIAMOND.plan(positions))

    def test_all_exits_of_the_diamond(self):
        plan = DIAMOND.plan(range(4))
        assert [[s.name for s in step.stages] for step in plan.steps] == [
            ["saver"],
            ["trunk", "left", "left-head"],
            ["right", "right-head"],
            ["join", "last-head"],
        ]
        assert [set(step.live) for step in plan.steps] == [
            {"image", "s"},
            {"image", "s", "t", "skip", "l"},
            {"s", "skip", "l", "r"},
            set(),
        ]
        assert plan.pruned == ("unused",)

    def test_an_exit_that_is_not_evaluated_takes_its_head_along(self):
        plan = DIAMOND.plan([3])
        assert plan.pruned == ("left-head", "right-head", "unused")
        assert [s.name for s in plan.stages] == [
            "saver",
            "trunk",
            "left",
            "right",
            "join",
            "last-head",
        ]

    def test_positions_in_any_order_and_twice(self):
        assert DIAMOND.plan([2, 0, 2]) == DIAMOND.plan([0, 2])

    def test_two_exits_on_one_tensor(self):
        whole = Cascade(
            CLASSES,
            spec("image"),
            (stage("a", "image", "y"),),
            (Exit("first", "y"), Exit("second", "y")),
        )
        plan = whole.plan([0, 1])
        assert [len(step.stages) for step in plan.steps] == [1, 0]
        assert plan.steps[0].live == ("y",)
        check_plan(whole, {0, 1}, plan)


@st.composite
def cascades(draw) -> Cascade:
    """Cascades of up to eight stages, each reading any earlier tensors."""
    tensors = ["image"]
    stages = []
    for number in range(draw(st.integers(1, 8))):
        inputs = draw(st.lists(st.sampled_from(tensors), min_size=1, max_size=3, unique=True))
        outputs = [f"t{number}.{i}" for i in range(draw(st.integers(1, 2)))]
        stages.append(stage(f"stage{number}", " ".join(inputs), " ".join(outputs)))
        tensors += outputs
    exits = draw(st.lists(st.sampled_from(tensors[1:]), min_size=1, max_size=4))
    return Cascade(
        CLASSES,
        spec("image"),
        tuple(stages),
        tuple(Exit(f"exit{i}", name) for i, name in enumerate(exits)),
    )


@settings(deadline=None, max_examples=200)
@given(cascades(), st.data())
def test_any_plan_of_any_cascade(whole, data):
    positions = data.draw(st.sets(st.integers(0, len(whole.exits) - 1), min_size=1))
    check_plan(whole, positions, whole.plan(positions))


@settings(deadline=None, max_examples=100)
@given(cascades(), st.randoms(use_true_random=False))
def test_any_other_order_of_the_stages_is_refused_unless_it_runs_too(whole, random):
    stages = list(whole.stages)
    random.shuffle(stages)
    there = {"image"}
    runs = True
    for one in stages:
        runs &= {i.name for i in one.inputs} <= there
        there |= {o.name for o in one.outputs}
    if runs:
        Cascade(whole.classes, whole.image, tuple(stages), whole.exits)
    else:
        with refused(ConfigError, "is listed before", "List stages in order of execution"):
            Cascade(whole.classes, whole.image, tuple(stages), whole.exits)
