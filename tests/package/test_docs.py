"""Links of the pages work, their Python runs, and the environment page is complete."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from softmask.training.launchers import LAUNCHERS

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").glob("*/README.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_are_not_broken(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text)
    broken = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert broken == []


@pytest.mark.parametrize("page", ["README.md", "docs/ops.md", "docs/quickstart.md"])
def test_python_of_the_page_runs(page: str) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    assert blocks
    exec("\n".join(blocks), {})  # one page is one program


def test_readme_commands_exist() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    assert set(re.findall(r"(?:^|`)make ([a-z-]+)", text, flags=re.MULTILINE)) <= targets
    scripts = re.findall(r"(train/\w+\.py)", text)
    assert scripts and all((ROOT / script).is_file() for script in scripts)
    assert len(text.splitlines()) <= 130


def test_environment_page_names_every_variable() -> None:
    """Every variable that the code reads or sets, and every switch of setup.py."""
    sources = [path for folder in ("softmask", "kernels") for path in (ROOT / folder).rglob("*.py")]
    sources += [ROOT / "setup.py", *(ROOT / "csrc").rglob("*.h"), *(ROOT / "csrc").rglob("*.cpp")]
    call = r"(?:environ\.get|environ\.setdefault|environ\[|getenv|given\.get|given\[|switched_on)\(?\"([A-Z_]+)\""
    read = {name for path in sources for name in re.findall(call, path.read_text(encoding="utf-8"))}
    for one in LAUNCHERS:
        read |= {*one.rank, *one.world_size, *one.local_rank, *one.local_size}
    assert {"SOFTMASK_SKIP_EXT", "TRITON_INTERPRET", "ATEN_CPU_CAPABILITY", "XDG_CACHE_HOME", "SLURM_JOB_ID"} <= read
    page = (ROOT / "docs" / "environment.md").read_text(encoding="utf-8")
    named = {name.partition("=")[0] for name in re.findall(r"`([A-Z0-9_]+(?:=1)?)`", page)} | {"SOFTMASK_BACKEND"}
    prefixed = {name.replace("OMPI_", "MV2_") for name in named if name.startswith("OMPI_")}
    assert read - named - prefixed == set()
