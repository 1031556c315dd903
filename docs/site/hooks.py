"""What mkdocs does beyond the pages in docs/: pages made from the source, and links that lead out of docs/."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(ROOT)]

import choose  # noqa: E402
import errors  # noqa: E402
import notebook_pages  # noqa: E402
import reference  # noqa: E402

# Pages of the repository that the site has too, by where they lie in each.
ELSEWHERE = {
    "ARCHITECTURE.md": "architecture.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "benchmarks/RESULTS.md": "performance.md",
    "notebooks/README.md": "notebooks/index.md",
}
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are made."""
    made = {**errors.pages(), **reference.pages(), "choose.md": choose.page()}
    for place, target in ELSEWHERE.items():
        text = (ROOT / place).read_text(encoding="utf-8")
        made[target] = relinked(text, (ROOT / place).parent, target)
    made |= notebook_pages.pages()
    for path, text in made.items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Lead links out of docs/ to where the site has what they mean."""
    source = page.file.src_uri
    return relinked(markdown, (ROOT / "docs" / source).parent, source) if page.file.generated_by is None else markdown


def on_page_content(html: str, page: Any, **_: Any) -> str:
    """Put what notebooks show into their pages."""
    return notebook_pages.filled(html, page.file.src_uri)


def relinked(text: str, folder: Path, page: str) -> str:
    """The text with its links to files as the site needs them.

    Args:
        text: Markdown outside of the site, or of docs/.
        folder: that its links start from.
        page: its place in the site.
    """
    up = "../" * page.count("/")

    def new(match: re.Match[str]) -> str:
        picture, words, target, anchor = match[1], match[2], match[3], match[4] or ""
        if "://" in target:
            return match[0]
        place = (folder / target).resolve()
        if not place.is_relative_to(ROOT):
            return match[0]
        inside = place.relative_to(ROOT).as_posix()
        known = {**ELSEWHERE, **notebook_pages.PLACES}
        if inside in known:
            return f"{picture}[{words}]({up}{known[inside]}{anchor})"
        if inside.startswith("docs/"):
            return f"{picture}[{words}]({up}{inside.removeprefix('docs/')}{anchor})"
        return words if place.exists() else match[0]  # a file of the source: the site does not have it

    outside = re.split(r"(```.*?```)", text, flags=re.DOTALL)
    return "".join(part if part.startswith("```") else LINK.sub(new, part) for part in outside)
