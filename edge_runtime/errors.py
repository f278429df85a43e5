"""Every error that edge-runtime raises on purpose.

EdgeRuntimeError
├─ ConfigError (ValueError)          options, YAML or a data folder ask for something that can't be
├─ InputError (ValueError)           an image that doesn't fit the opened cascade
├─ ManifestError                     a bundle, an operating point or a result file is not whole
├─ BackendUnavailable (ImportError)  a package or a device is missing; names the extra to install
├─ BackendError                      a stage failed while it was opened or run; ``.stage`` names it
│  └─ CudaError                      the CUDA driver or runtime refused
├─ EngineBuildError                  a stage could not be exported, converted or built
├─ PowerError                        a sensor of power or energy is missing, refused or was lost
│  └─ BadReading                     one reading that can't be used; the next may be good
└─ CalibrationError                  data can't support the number that was asked of it

A message says what, got against expected, and how to mend it, on one line.
"""

from __future__ import annotations

from typing import ClassVar


class EdgeRuntimeError(Exception):
    """Base of all errors of this project.

    Args:
        what: The thing that is wrong, named (stage, tensor, file, option).
        got: What was found, where a comparison says more.
        expected: What should have been found.
        remedy: What the reader can do about it.
    """

    #: Exit code of the command line: 1 failed, 2 usage or config, 3 missing dependency or hardware.
    exit_code: ClassVar[int] = 1

    def __init__(
        self,
        what: str,
        *,
        got: object = None,
        expected: object = None,
        remedy: str | None = None,
    ) -> None:
        self.what = what
        self.got = got
        self.expected = expected
        self.remedy = remedy
        parts = []
        if got is not None:
            parts.append(f"got {got}")
        if expected is not None:
            parts.append(f"expected {expected}")
        message = f"{what}: {', '.join(parts)}" if parts else what
        if remedy is not None:
            message = f"{message.rstrip('.')}. {remedy}"
        # One line, whatever a file or folder is called.
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in message))


class ConfigError(EdgeRuntimeError, ValueError):
    """Options, YAML or a data folder ask for something that can't be."""

    exit_code = 2


class InputError(EdgeRuntimeError, ValueError):
    """An image that doesn't fit the opened cascade."""

    exit_code = 2


class ManifestError(EdgeRuntimeError):
    """A bundle, one of its files, an operating point or a result file is not whole."""


class BackendUnavailable(EdgeRuntimeError, ImportError):
    """A package or a device is missing; the message names the extra to install."""

    exit_code = 3


class BackendError(EdgeRuntimeError):
    """A stage failed while it was opened or run.

    Args:
        what: As in `EdgeRuntimeError`.
        stage: Name of the stage that failed, None where no stage is at fault.
        got: As in `EdgeRuntimeError`.
        expected: As in `EdgeRuntimeError`.
        remedy: As in `EdgeRuntimeError`.
    """

    def __init__(
        self,
        what: str,
        *,
        stage: str | None = None,
        got: object = None,
        expected: object = None,
        remedy: str | None = None,
    ) -> None:
        self.stage = stage
        super().__init__(what, got=got, expected=expected, remedy=remedy)


class CudaError(BackendError):
    """The CUDA driver or runtime refused a call."""


class EngineBuildError(EdgeRuntimeError):
    """A stage could not be exported, converted or built."""


class PowerError(EdgeRuntimeError):
    """A sensor of power or energy is missing, refused or was lost."""

    exit_code = 3


class BadReading(PowerError):
    """One reading that can't be used, such as a negative power; the next may be good."""


class CalibrationError(EdgeRuntimeError):
    """Data can't support the number that was asked of it."""


def missing_package(package: str, extra: str) -> BackendUnavailable:
    """The error for an import that failed, with the command that mends it."""
    return BackendUnavailable(
        f"the package {package} is not installed",
        remedy=f"Install it with: pip install 'edge-runtime[{extra}]'",
    )
