"""Contents and requirements of the package, and builds without C++ kernels."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from email import message_from_string
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import softmask

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ["setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md", "softmask", "kernels", "train", "csrc"]
NO_COMPILER = "/nonexistent/c++"

IMPORT_CORE = """
import sys
from importlib.machinery import PathFinder

ABSENT = {"triton", "deepspeed", "timm", "transformers", "tokenizers", "torchvision", "webdataset", "PIL"}

class WithoutExtras(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in ABSENT else super().find_spec(name, path, target)

sys.meta_path[:] = [WithoutExtras if finder is PathFinder else finder for finder in sys.meta_path]
import torch

def refuse():
    raise AssertionError("CUDA is initialized at import")

torch.cuda._lazy_init = refuse
import softmask, softmask.ops, softmask.reference
with softmask.backend("auto"):
    x = torch.nn.functional.normalize(torch.ones(2, 4), dim=1)
    print(float(softmask.ops.focal_contrastive_loss(x, x, 1.0)))
"""


def python(*arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run this interpreter with `environment` added to the session's, without the switches of setup.py."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("SOFTMASK_")}
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=inherited | environment, capture_output=True, text=True
    )


@dataclass(frozen=True)
class Wheel:
    names: list[str]
    requirements: list[Requirement]
    version: str


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the source tree without build products."""
    folder = tmp_path_factory.mktemp("tree")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        elif source.exists():
            shutil.copy(source, folder / name)
    return folder


@pytest.fixture(scope="module")
def wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Wheel:
    out = tmp_path_factory.mktemp("wheel")
    options = ["--no-build-isolation", "--no-deps", "--disable-pip-version-check", "--wheel-dir", str(out)]
    done = python("-m", "pip", "wheel", *options, ".", cwd=tree, SOFTMASK_SKIP_EXT="1")
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = out.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        (metadata_name,) = [name for name in names if name.endswith(".dist-info/METADATA")]
        metadata = message_from_string(archive.read(metadata_name).decode())
    requirements = [Requirement(line) for line in metadata.get_all("Requires-Dist")]
    return Wheel(names, requirements, metadata["Version"])


def needed_by(wheel: Wheel, extra: str) -> list[Requirement]:
    return [r for r in wheel.requirements if r.marker is None or r.marker.evaluate({"extra": extra})]


def pins() -> dict[str, Requirement]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(pin.name): pin for pin in found}


def test_version_is_the_same_everywhere(wheel: Wheel) -> None:
    assert softmask.__version__ == wheel.version


def test_wheel_holds_package_kernels_and_configurations_and_no_tests(wheel: Wheel) -> None:
    expected = [
        *(path.relative_to(ROOT) for path in (ROOT / "softmask").rglob("*.py")),
        *(Path("softmask", path.relative_to(ROOT)) for path in (ROOT / "kernels").rglob("*.py")),
        Path("softmask", "py.typed"),
        *(Path("softmask", "configs", path.name) for path in (ROOT / "train" / "configs").glob("*.yaml")),
    ]
    assert {"kernels", "configs"} <= {path.parts[1] for path in expected}
    assert sorted(path.as_posix() for path in expected) == sorted(
        name for name in wheel.names if ".dist-info/" not in name
    )
    assert any(name.endswith("LICENSE") for name in wheel.names)


def test_core_needs_torch_only(wheel: Wheel) -> None:
    assert [requirement.name for requirement in needed_by(wheel, "")] == ["torch"]


@pytest.mark.parametrize("extra", ["train", "demo", "bench", "test", "dev"])
def test_every_requirement_is_pinned_inside_its_range(wheel: Wheel, extra: str) -> None:
    pinned = pins()
    for requirement in needed_by(wheel, extra):
        assert canonicalize_name(requirement.name) in pinned, f"constraints.txt lacks {requirement.name}"
        (specifier,) = pinned[canonicalize_name(requirement.name)].specifier
        assert specifier.operator == "=="
        assert requirement.specifier.contains(specifier.version), f"{requirement} excludes {specifier.version}"


def test_forced_build_without_compiler_fails_and_names_it(tree: Path) -> None:
    done = python("setup.py", "-q", "build_ext", cwd=tree, SOFTMASK_FORCE_BUILD="1", CXX=NO_COMPILER)
    assert done.returncode != 0
    assert f"SOFTMASK_FORCE_BUILD=1, but no C++ compiler: '{NO_COMPILER}'" in done.stderr


def test_build_without_compiler_skips_the_kernels_and_says_so(tree: Path) -> None:
    done = python("setup.py", "-q", "build_ext", cwd=tree, CXX=NO_COMPILER)
    assert done.returncode == 0, done.stderr
    (message,) = [line for line in done.stderr.splitlines() if line.startswith("softmask:")]
    assert message.startswith(f"softmask: installed without C++ kernels: no C++ compiler: '{NO_COMPILER}'")


def test_build_without_torch_names_the_remedy(tree: Path) -> None:
    without_torch = "import runpy, sys; sys.modules['torch'] = None; sys.argv = ['setup.py', '-q', 'build_ext']; "
    run_setup = without_torch + "runpy.run_path('setup.py')"
    forced = python("-c", run_setup, cwd=tree, SOFTMASK_FORCE_BUILD="1")
    assert forced.returncode != 0
    assert re.search("torch is not importable .* --no-build-isolation", forced.stderr)
    assert python("-c", run_setup, cwd=tree).returncode == 0


EXTENSIONS = """
import runpy, sys, setuptools
setuptools.setup = lambda **given: print({one.name: one.sources for one in given["ext_modules"]})
sys.argv = ["setup.py"]
runpy.run_path("setup.py")
"""


def test_cpp_extension_is_built_without_cuda_sources(tree: Path) -> None:
    done = python("-c", EXTENSIONS, cwd=tree, CUDA_HOME="/nonexistent")
    assert done.returncode == 0, done.stderr
    ((name, files),) = ast.literal_eval(done.stdout).items()
    assert name == "softmask._C" and {Path(file).parent.name for file in files} == {"csrc", "cpu"}


@pytest.mark.parametrize(
    ("release", "reason"),
    [
        (None, "there is no nvcc; install CUDA"),
        ("1.0", ".*/nvcc is of CUDA 1, expected CUDA .*, torch's; set CUDA_HOME"),
        ("", ".*/nvcc does not print its version, expected CUDA"),
    ],
)
def test_cuda_build_without_its_compiler_fails_and_names_it(
    release: str | None, reason: str, tree: Path, tmp_path: Path
) -> None:
    if torch.version.cuda is None:
        reason = "torch .* is built without CUDA"
    if release is not None:
        nvcc = tmp_path / "bin" / "nvcc"
        nvcc.parent.mkdir()
        nvcc.write_text(f"#!/bin/sh\necho release {release}\n")
        nvcc.chmod(0o755)
    done = python("setup.py", "-q", "build_ext", cwd=tree, SOFTMASK_CUDA="1", CUDA_HOME=str(tmp_path))
    assert done.returncode != 0
    assert re.search(f"^softmask: SOFTMASK_CUDA=1, but {reason}", done.stderr, re.MULTILINE), done.stderr


def test_cuda_build_that_builds_nothing_is_refused(tree: Path) -> None:
    done = python("setup.py", "-q", "build_ext", cwd=tree, SOFTMASK_CUDA="1", SOFTMASK_SKIP_EXT="1")
    assert done.returncode != 0
    assert "SOFTMASK_CUDA=1, but SOFTMASK_SKIP_EXT=1 builds no kernels; unset one of them" in done.stderr


def test_broken_source_fails_the_forced_build_only(tree: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(tree, tmp_path / "broken")
    shutil.rmtree(broken / "csrc")
    (broken / "csrc").mkdir()
    (broken / "csrc" / "ops.cpp").write_text("this is not C++\n")
    assert python("setup.py", "-q", "build_ext", cwd=broken).returncode == 0
    forced = python("setup.py", "-q", "build_ext", cwd=broken, SOFTMASK_FORCE_BUILD="1")
    assert forced.returncode != 0
    assert "SOFTMASK_FORCE_BUILD=1, but compiling csrc failed" in forced.stderr


def test_core_runs_with_torch_alone_and_does_not_initialize_cuda(tmp_path: Path) -> None:
    done = python("-c", IMPORT_CORE, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) >= 0
