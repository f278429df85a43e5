"""The one import of the onnx package, with the error that says how to get it.

Modules here write ``from engines.onnx_package import onnx``; importing one of them without the
package raises `BackendUnavailable`, never a bare `ImportError`.
"""

import importlib

from edge_runtime.errors import missing_package

try:
    import onnx
    import onnx.checker
    import onnx.compose
    import onnx.inliner
    import onnx.utils
except ImportError as error:
    raise missing_package("onnx", "calib") from error

#: What parsing bytes that are no ONNX file raises.
DecodeError: type[Exception] = importlib.import_module("google.protobuf.message").DecodeError

__all__ = ["DecodeError", "onnx"]
