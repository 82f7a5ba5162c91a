"""The page of tables that `make gpu` makes from its files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from benchmarks.gpu.device import environment
from benchmarks.gpu.device.ops import FLOOR, OURS
from benchmarks.gpu.device.record import Row
from softmask.files import write_atomically
from softmask.training.checkpoint.state import read_json

PAGE = "page.md"


def read(folder: Path) -> dict[str, list[Row]]:
    """The rows of every file, by its name."""
    return {path.stem: read_json(path)["rows"] for path in sorted(folder.glob("*.json"))}


def failures(folder: Path) -> list[Row]:
    return [row for rows in read(folder).values() for row in rows if "error" in row]


def write_page(folder: Path) -> None:
    files = read(folder)
    run = read_json(folder / "run.json")
    parts = [
        f"# Measured on a device\n\n{run['processor']}, torch {run['torch']}, Triton {run['triton']}, by `make gpu`.",
        "\n".join(_rates(files.get("environment", []))),
        "\n".join(_tests(files.get("correct", []))),
        "\n".join(_kernels(files)),
        "\n".join(_ops([row for name, rows in files.items() if name.startswith("ops_") for row in rows])),
        "\n".join(_steps([row for name, rows in files.items() if name.startswith("step_") for row in rows])),
        "\n".join(_not_measured(files)),
    ]
    write_atomically(folder / PAGE, "\n\n".join(part for part in parts if part) + "\n")


def table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> Iterator[str]:
    columns = list(head)
    yield f"| {' | '.join(columns)} |"
    yield "|" + "---|" * len(columns)
    for row in rows:
        yield f"| {' | '.join(_text(value) for value in row)} |"


def _text(value: object) -> str:
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value).replace("|", "\\|")


def rates(rows: list[Row]) -> dict[str, float]:
    """The measured rates by name."""
    return {row["what"]: row["value"] for row in rows if isinstance(row.get("value"), float)}


def _rates(rows: list[Row]) -> Iterator[str]:
    if found := rates(rows):
        yield from table(("rate", "measured"), found.items())


def _tests(rows: list[Row]) -> Iterator[str]:
    if rows:
        failed = [row for row in rows if "error" in row]
        skipped = sum("skipped" in row for row in rows)
        yield "## Tests\n"
        yield f"{len(rows) - len(failed) - skipped} passed, {len(failed)} failed, {skipped} skipped."


def _kernels(files: dict[str, list[Row]]) -> Iterator[str]:
    """Measured beside predicted: the fewest bytes at the rate of a copy, or the products at that of a large one."""
    measured = rates(files.get("environment", []))
    shown = []
    for row in files.get("kernels", []):
        if "eager_us" in row:
            floor = predicted(row, measured)
            device = row.get("device_us")
            share = floor / device if device and floor else None
            shown.append((row["call"], row["size"], row["dtype"], device, floor, share, row.get("host_us")))
    if shown:
        yield "## Kernels\n"
        yield "Microseconds. Predicted: the fewest bytes and products of the definition at the rates above.\n"
        yield from table(("call", "size", "type", "device", "predicted", "share", "host"), shown)


def predicted(row: Row, measured: dict[str, float]) -> float | None:
    """Microseconds; None without the rates."""
    copy, products = measured.get(environment.COPY), measured.get(environment.product(row["dtype"]))
    if copy is None or products is None:
        return None
    return 1e6 * max(row["fewest_bytes"] / (copy * 1e9), row["fewest_flops"] / (products * 1e12))


def _ops(rows: list[Row]) -> Iterator[str]:
    """Every baseline's time over ours."""
    shown = []
    for ours in rows:
        if ours["run"] != OURS or "eager_us" not in ours:
            continue
        names = ("op", "size", "dtype")
        alike = [row for row in rows if [row[name] for name in names] == [ours[name] for name in names]]
        for row in alike:
            if row["run"] != OURS and "eager_us" in row:
                ratios = [
                    row.get("times", 1.0) * row[key] / ours[key] if key in row and key in ours else None
                    for key in ("device_us", "eager_us")
                ]
                name = f"{FLOOR}: {row['what']}" if row["run"] == FLOOR else row["run"]
                own = ours.get("device_us", ours["eager_us"])
                memory = None if row["run"] == FLOOR else row["peak_mib"]
                shown.append((*(ours[n] for n in names), own, name, *ratios, ours["peak_mib"], memory))
    if shown:
        yield "## Ops\n"
        yield "Forward and backward. A baseline's time over ours: below 1, the baseline is faster. Memory in MiB.\n"
        head = ("op", "size", "type", "ours, us", "beside", "device", "eager", "memory, ours", "its")
        yield from table(head, shown)


def _steps(rows: list[Row]) -> Iterator[str]:
    done = [row for row in rows if "step_ms" in row]
    if done:
        yield "## A training step\n"
        yield from table(
            ("method", "side", "batch", "ms", "MiB", "loss"),
            ((r["method"], r["side"], r["batch"], r["step_ms"], r["peak_mib"], r["losses"]["total"]) for r in done),
        )


def _not_measured(files: dict[str, list[Row]]) -> Iterator[str]:
    """Failed cases one by one, skipped ones by their reason."""
    failed, skipped = [], Counter[tuple[str, str]]()
    for name, rows in files.items():
        for row in rows:
            if "error" in row:
                case = ", ".join(str(value) for key, value in row.items() if key in KEYS)
                failed.append((name, case, row["error"]))
            elif "skipped" in row:
                skipped[name, row["skipped"]] += 1
    if failed:
        yield "## Failed\n"
        yield from table(("file", "case", "why"), failed)
    if skipped:
        yield "## Skipped\n" if not failed else "\n## Skipped\n"
        yield from table(("file", "why", "cases"), ((*which, count) for which, count in skipped.items()))


KEYS = ("test", "what", "call", "op", "size", "dtype", "run", "method", "side", "part")  # that name a case
