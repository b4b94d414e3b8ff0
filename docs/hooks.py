"""Pages of the site that are files of the repository, links between both that work in either place, and all codes."""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from lightning_convnext_det.errors import CODES

ROOT = Path(__file__).parents[1]
RESULTS = sorted((ROOT / "benchmarks" / "results").rglob("*.md"))
# file of the repository -> page of the site
PAGES = {
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    **{path.relative_to(ROOT).as_posix(): f"results/{path.parent.name}/{path.name}" for path in RESULTS},
}
FILES = {page: file for file, page in PAGES.items()}
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)#:]+)(#[^)]*)?\)")  # of this repository: no address, no image


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files of the repository that are pages of the site."""
    for file, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / file).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links to files of the repository at their pages; the text alone stays where a file is not on the site."""
    uri = page.file.src_uri
    if uri == "error-codes.md":
        markdown += "\n| code | meaning |\n|---|---|\n"
        markdown += "".join(f"| `{code}` | {meaning} |\n" for code, meaning in CODES.items())
    folder = posixpath.dirname(FILES.get(uri, f"docs/{uri}"))

    def published(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, link[2]))
        target = PAGES.get(target, target.removeprefix("docs/") if target.startswith("docs/") else "")
        if not target:
            return link[1]
        return f"[{link[1]}]({posixpath.relpath(target, posixpath.dirname(uri) or '.')}{link[3] or ''})"

    return LINK.sub(published, markdown)
