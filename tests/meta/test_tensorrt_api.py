"""Every name of TensorRT that our code uses is in every version that we support."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from edge_runtime.backends.tensorrt import api
from tests.meta.repository import ROOT, repository_files
from tests.meta.test_layers import LAYERS
from tests.tensorrt_api import listing
from tests.tensorrt_api.uses import find_missing, uses_tensorrt
from tests.tensorrt_without_gpu import SUPPORTED, make_module

LISTINGS = listing.read_listings()
BUILDER = "engines/tensorrt_build.py"


def has(version: str, capability: str) -> bool:
    return api.has(SimpleNamespace(__name__="tensorrt", __version__=version), capability)


def has_old_flags(version: str, capability: str) -> bool:
    return {"old flags": version.startswith("10.")}[capability]


def missing(source: str, file: str = "tensorrt.py") -> list[str]:
    """Return what is found in a source text."""
    return [finding.what for finding in find_missing(source, file, LISTINGS, has_old_flags)]


def test_our_code_uses_only_what_every_version_has():
    files = [name for name in repository_files(*LAYERS) if name.endswith(".py")]
    sources = {name: (ROOT / name).read_text(encoding="utf-8") for name in files}
    assert {BUILDER, "edge_runtime/backends/tensorrt/stages.py"} <= {
        n for n in files if uses_tensorrt(sources[n])
    }
    found = [
        str(finding)
        for name, source in sources.items()
        for finding in find_missing(source, name, LISTINGS, has)
    ]
    assert not found, "\n".join([*found, "tests/tensorrt_api/uses.py says how to mark exceptions"])


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("trt.BuilderFlag.FP16", "BuilderFlag.FP16 is not in TensorRT 11.4"),
        ("trt.EngineStat.TOTAL_WEIGHTS_SIZE", "EngineStat is not in TensorRT 10.3, 10.13"),
        ("self._trt.Bilder(log)", "Bilder is not in TensorRT 10.3, 10.13, 10.16, 11.4"),
        ("trt.Logger.Severity.ERORR", "ILogger.Severity.ERORR is not in TensorRT 10.3, 10.13, "),
        ("config.int8_calibrator = None", "IBuilderConfig.int8_calibrator is not in TensorRT 11.4"),
        ("self._engine.device_memory_size", "ICudaEngine.device_memory_size is not in TensorRT 11"),
        ("f(trt.float32)(context.enqueue())", "IExecutionContext.enqueue is not in TensorRT 10.3"),
        ("engine.num_layers = 1", "ICudaEngine.num_layers can't be assigned in TensorRT 10.3, 10"),
        ('getattr(trt.BuilderFlag, "FP16")', "BuilderFlag.FP16 is not in TensorRT 11.4"),
        ('getattr(trt.BuilderFlag, "FP15", 0)', "BuilderFlag.FP15: no TensorRT version has it"),
        ('hasattr(config, "fp16")', "IBuilderConfig.fp16: no TensorRT version has it"),
        (
            'if hasattr(config, "build_route"):\n    config.quantization_flags',
            "IBuilderConfig.quantization_flags is not in TensorRT 11.4",
        ),
        (
            'if not has(trt, "old flags"):\n    x = 1\nconfig.quantization_flags',
            "IBuilderConfig.quantization_flags is not in TensorRT 11.4",
        ),
        ('0 if has(trt, "old flags") else trt.BuilderFlag.FP16', "BuilderFlag.FP16 is not in Tens"),
        ('if has(trt, "odd flags"): pass', "there is no capability 'odd flags'"),
        ("import tensorrt", "import tensorrt as trt, or its names can't be checked"),
        ("from tensorrt import Builder", "import tensorrt as trt, or its names can't be checked"),
    ],
)
def test_a_name_that_a_version_lacks_is_found(source, found):
    (what,) = missing(source)
    assert what.startswith(found)


@pytest.mark.parametrize(
    "source",
    [
        "trt.ILogger.WARNING.name, trt.__name__, trt.BuilderFlag.__members__, trt.float32.itemsize",
        "def configure(parser: argparse.ArgumentParser): parser.add_argument('--device')",
        "class Build:\n    _timing_cache: Path\n    def f(self): self._timing_cache.read_bytes()",
        "from edge_runtime import config\nconfig.read()",
        'flag = getattr(trt.BuilderFlag, "FP16", None)',
        'if hasattr(config, "build_route"):\n    config.build_route = 1',
        'hasattr(config, "build_route") and config.build_route',
        'not hasattr(config, "build_route") or config.build_route',
        'if not hasattr(config, "build_route"):\n    raise E\nconfig.build_route = 1',
        'config.flags if not has(trt, "old flags") else trt.BuilderFlag.FP16',
        'if option and api.has(trt, "old flags"):\n    trt.BuilderFlag.FP16',
    ],
)
def test_what_every_version_has_or_a_guard_covers_is_accepted(source):
    assert missing(source) == []


def test_common_words_are_tensorrts_only_where_tensorrt_is():
    assert missing("config.read()", "edge_runtime/load.py") == []
    assert missing("def f(trt): config.read()", "edge_runtime/load.py") != []


@pytest.mark.parametrize(
    ("right", "wrong", "name"),
    [
        ("trt.OnnxParser(", "trt.CaffeParser(", "CaffeParser"),
        ("config.add_optimization_profile(", "config.add_profile(", "IBuilderConfig.add_profile"),
    ],
)
def test_a_wrong_name_in_our_code_is_found_with_its_line(right, wrong, name):
    before, _, after = (ROOT / BUILDER).read_text(encoding="utf-8").partition(right)
    assert after
    found = find_missing(before + wrong + after, BUILDER, LISTINGS, has)
    everywhere = ", ".join(LISTINGS)
    place = f"{BUILDER}:{before.count(chr(10)) + 1}"
    assert list(map(str, found)) == [f"{place}: {name} is not in TensorRT {everywhere}"]


def test_the_lists_begin_with_what_they_were_made_from():
    assert list(LISTINGS) == ["10.3", "10.13", "10.16", "11.4"]
    for version, found in LISTINGS.items():
        assert f"{found.version}.".startswith(f"{version}.")
        content = json.loads((listing.FOLDER / f"{version}.json").read_text(encoding="utf-8"))
        assert list(content) == ["wheel", "python", "names"]
        assert list(found.names) == sorted(found.names)


@pytest.mark.tensorrt
@pytest.mark.skipif(not SUPPORTED, reason="the bindings are there for Linux on x86-64 only")
def test_the_list_of_the_installed_bindings_is_what_they_have(tmp_path):
    committed = LISTINGS["11.4"]
    program = [sys.executable, listing.__file__, make_module(tmp_path), committed.wheel]
    made = subprocess.run(program, capture_output=True, text=True, check=True).stdout
    assert json.loads(made)["names"] == committed.names
