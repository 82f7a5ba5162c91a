"""Hooks of the documentation site: links that leave docs/ lead to a page of the site that shows the linked file, and
the reference of the ops lists what `softmask.ops` exports.

On GitHub the same links lead to the file itself. Links to folders and to files that are not text become plain text.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(?<!!)\[((?:[^\[\]]|\[[^\]]*\])+)\]\(((?:\.\./)+[^)#\s]+)(#[^)\s]*)?\)")
EVERY_OP = "<!-- every op of softmask.ops -->"
LANGUAGES = {".py": "python", ".yaml": "yaml", ".cpp": "cpp", ".h": "cpp", ".json": "json", ".csv": "text"}


def outside(page: Path, link: str, docs: Path) -> Path | None:
    """The target of a link, relative to the repository; None if it lies in docs/."""
    path = (page.parent / link).resolve()
    return None if path.is_relative_to(docs) else path.relative_to(ROOT)


def can_be_shown(path: Path) -> bool:
    return (ROOT / path).is_file() and path.suffix in (*LANGUAGES, ".md")


def shown_at(path: Path) -> PurePosixPath:
    """The page of the site that shows a file: benchmarks/ablation/README.md -> source/benchmarks/ablation/README.md."""
    name = PurePosixPath(path.as_posix())
    return "source" / (name if name.suffix == ".md" else name.with_name(f"{name.name}.md"))


def content(path: Path) -> str:
    """A Markdown page that shows a file. In Markdown files only links into docs/ are kept."""
    text = (ROOT / path).read_text(encoding="utf-8")
    if path.suffix == ".md":
        to_docs = re.compile(r"\]\((?:\.\./)+docs/")
        up = "../" * len(path.parts)
        return re.sub(r"\[([^\]]+)\]\((?!\.\./|https?:)[^)]*\)", r"\1", to_docs.sub(f"]({up}", text))
    return f"# {path.name}\n\n`{path.as_posix()}`\n\n````{LANGUAGES[path.suffix]}\n{text.rstrip()}\n````\n"


def every_op() -> str:
    """The entries of all functions and layers: each function, then the layer of its module."""
    source = (ROOT / "softmask" / "ops" / "__init__.py").read_text(encoding="utf-8")
    entries = []
    for node in ast.parse(source).body:
        if isinstance(node, ast.ImportFrom) and node.module != "__future__":
            layer, function = sorted(alias.name for alias in node.names)
            layer_below = f"::: {node.module}.{layer}\n    options: {{heading_level: 3}}"
            entries += [f"::: {node.module}.{function}", layer_below]
    return "\n\n".join(entries)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds a page for every file outside of docs/ that a page links to."""
    docs = Path(config.docs_dir)
    found = set()
    for file in files.documentation_pages():
        page = docs / file.src_uri
        for match in LINK.finditer(page.read_text(encoding="utf-8")):
            path = outside(page, match[2], docs)
            if path is not None and can_be_shown(path):
                found.add(path)
    for path in sorted(found):
        files.append(File.generated(config, shown_at(path).as_posix(), content=content(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fills in the ops, and turns the links of a page that leave docs/ into links to those pages."""
    if page.file.generated_by is not None:
        return markdown
    markdown = markdown.replace(EVERY_OP, every_op())
    docs = Path(config.docs_dir)
    up = "../" * (len(PurePosixPath(page.file.src_uri).parts) - 1)

    def replace(match: re.Match[str]) -> str:
        path = outside(docs / page.file.src_uri, match[2], docs)
        if path is None:
            return match[0]
        return f"[{match[1]}]({up}{shown_at(path)}{match[3] or ''})" if can_be_shown(path) else match[1]

    return LINK.sub(replace, markdown)
