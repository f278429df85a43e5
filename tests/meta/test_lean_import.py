"""`import edge_runtime` costs numpy and the standard library."""

import json
import subprocess
import sys

from tests.meta.repository import ROOT

PROGRAM = """
import json, sys
import numpy, numpy.random
before = set(sys.modules)
import edge_runtime
print(json.dumps(sorted(set(sys.modules) - before)))
"""


def test_importing_edge_runtime_is_light():
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, check=True
    )
    modules = json.loads(result.stdout)
    assert "edge_runtime" in modules
    added = {module.partition(".")[0] for module in modules}
    assert added - sys.stdlib_module_names <= {"edge_runtime", "numpy"}
