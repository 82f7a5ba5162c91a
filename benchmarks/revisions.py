"""Times a case with this tree and with another git revision, each in its own process, in alternating turns.

`python benchmarks/revisions.py PACKAGE_ROOT` is a worker: it reads names of cases from stdin and writes seconds to
stdout.
"""

from __future__ import annotations

import importlib
import json
import os
import statistics
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.harness import Bench

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 1.10
TURNS = 9
TRIES = 3  # another process may disturb one


class Worker:
    """A process that runs this tree's benchmark cases with the package of another folder."""

    def __init__(self, package_root: Path) -> None:
        environment = os.environ | {"PYTHONPATH": str(package_root)}
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__)), str(package_root)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def seconds(self, module: str, size: str) -> float:
        """The median of three runs.

        Raises:
            RuntimeError: the worker exited; its error is on stderr.
        """
        self._process.stdin.write(json.dumps([module, size]) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the benchmark process exited with {self._process.wait()}; its error is above")
        return float(answer)

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


def built(revision: str) -> tuple[str, Path]:
    """The commit of a revision, and the folder of its built checkout in build/bench."""
    commit = _git("rev-parse", "--verify", f"{revision}^{{commit}}")
    folder = ROOT / "build" / "bench" / commit[:12]
    if not (folder / ".built").exists():
        if not folder.exists():
            _git("worktree", "add", "--detach", str(folder), commit)
        build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        environment = os.environ | {"SOFTMASK_FORCE_BUILD": "1"}
        subprocess.run(build, cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)
        for name in ("kernels", "train"):  # older revisions add these to the package only on installation
            link = folder / "softmask" / name
            if not link.exists():
                link.symlink_to(Path("..") / name)
        (folder / ".built").touch()
    return commit, folder


class Rival:
    """A built checkout of the revision to compare with."""

    def __init__(self, revision: str) -> None:
        self.commit, self.folder = built(revision)

    def __enter__(self) -> Rival:
        self._workers = Worker(ROOT), Worker(self.folder)
        return self

    def __exit__(self, *_error: object) -> None:
        for worker in self._workers:
            worker.close()

    def check(self, module: str, size: str) -> None:
        """Compares one case.

        Raises:
            AssertionError: this tree takes more than LIMIT times the revision's time in all TRIES.
        """
        ratios = []
        for _ in range(TRIES):
            turns = [[worker.seconds(module, size) for worker in self._workers] for _ in range(TURNS)]
            ratios.append(statistics.median(ours / theirs for ours, theirs in turns))
            if ratios[-1] <= LIMIT:
                return
        shown = ", ".join(f"{ratio:.2f}" for ratio in ratios)
        raise AssertionError(f"{module} {size}: {shown} times the time of {self.commit[:12]}, expected at most {LIMIT}")


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


@lru_cache(maxsize=1)
def _case(module: str, size: str) -> Bench:
    return importlib.import_module(module).CASES[size]()


def work(package_root: Path) -> None:
    """The loop of a worker process."""
    import softmask

    found = Path(softmask.__file__).resolve().parent.parent
    if found != package_root.resolve():
        sys.exit(f"softmask comes from {found}, expected {package_root}")
    sys.path.insert(0, str(ROOT))  # the cases are always this tree's
    from benchmarks import harness

    for line in sys.stdin:
        run = _case(*json.loads(line)).ours
        run()
        print(statistics.median(harness.seconds(run) for _ in range(3)), flush=True)


if __name__ == "__main__":
    work(Path(sys.argv[1]))
