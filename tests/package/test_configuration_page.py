"""docs/configuration.md has every key of both methods and of all tasks, with its default, and no other."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from softmask.data import DataConfig
from softmask.tasks.downstream import DownstreamTask
from softmask.tasks.registry import find_downstream, find_task, known
from softmask.training.config import Config, TrainConfig, flatten
from softmask.training.config_files import parse
from softmask.training.deepspeed_section import OWNED_DEEPSPEED_KEYS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "configuration.md"
METHODS = ("softmask_pp", "sycoca")
SHARED = "model: both methods"
HEAD = "head: "
ROW = re.compile(r"\| `([^`]+)` \| (.+) \| (?:`(.*)`|(\*required\*)) \| (.+) \|")


def sections() -> dict[str, str]:
    parts = re.split(r"^## (.+)$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def documented(section: str) -> dict[str, str | None]:
    """Key -> default as YAML, None where there is none."""
    lines = [line for line in sections()[section].splitlines() if line.startswith("| `")]
    rows = [ROW.fullmatch(line) for line in lines]
    assert section == "deepspeed" or all(rows), [line for line, row in zip(lines, rows, strict=True) if not row]
    found = [(row[1], row[3]) for row in rows if row]
    assert len(dict(found)) == len(found), f"{section}: a key is there twice"
    return dict(found)


def defaults(method: str) -> dict[str, Any]:
    """Key -> default of every leaf; a `Config` adapts some of its sections to its task."""
    config = Config(output="here", train=TrainConfig(steps=1), method=method)
    plain = {"method": Config.method, "train.steps": TrainConfig.steps, "data.eval_resize": DataConfig.eval_resize}
    return flatten(config) | plain


def sections_of(method: str) -> list[str]:
    other = {f"model: {name}" for name in METHODS if name != method}
    return [section for section in sections() if section not in other and not section.startswith(HEAD)]


@pytest.mark.parametrize("method", METHODS)
def test_every_key_is_on_the_page_and_no_other(method: str) -> None:
    keys = [key for section in sections_of(method) for key in documented(section)]
    assert sorted(keys) == sorted(defaults(method))


@pytest.mark.parametrize("method", METHODS)
def test_defaults_are_those_of_the_code(method: str) -> None:
    expected = defaults(method)
    for section in sections_of(method):
        for key, text in documented(section).items():
            default = expected[key]
            if text is None:
                assert key == "output"
            else:
                assert parse(text) == (list(default) if isinstance(default, tuple) else default), key


def test_every_task_has_a_section_with_its_options_and_their_defaults() -> None:
    found = {name: section for section in sections() if section.startswith(HEAD) for name in section[6:].split(", ")}
    assert found.keys() == known(DownstreamTask).keys()
    for name, section in found.items():
        expected = flatten(find_downstream(name).Head(), "head.")
        assert {key: parse(text or "") for key, text in documented(section).items()} == expected, name


def test_shared_section_holds_keys_of_both_methods() -> None:
    own = [set(flatten(find_task(method).Config(), "model.")) for method in METHODS]
    assert set(documented(SHARED)) == {key for key in own[0] & own[1] if key.startswith("model.vision.")}


def test_refused_keys_of_deepspeed_are_listed() -> None:
    rows = re.findall(r"^\| (`[^|]+) \| [^|]+ \|$", sections()["deepspeed"], flags=re.MULTILINE)
    assert sorted(key for row in rows for key in re.findall(r"`(\w+)`", row)) == sorted(OWNED_DEEPSPEED_KEYS)
