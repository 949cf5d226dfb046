"""Build the documentation: `python docs/build.py`, which `make docs` calls.

Gathers the pages under build/docs, with the reference pages made from the program; has Zensical build them strictly;
then holds the built pages to what they must keep: no link leads nowhere, and nothing is asked of the network to show a
page.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

sys.path.insert(0, str(Path(__file__).parent))

import generate

ROOT = Path(__file__).resolve().parents[1]
DOCS, STAGED, SITE = ROOT / "docs", ROOT / "build" / "docs", ROOT / "site"
BORROWED = {  # pages that lie elsewhere in the repository, and their place on the site
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "benchmarks/README.md": "measured.md",
    "src/backmerge/demo/model/README.md": "demo-model.md",
}
SHIM = "https://unpkg.com/iframe-worker/shim"  # what Zensical's offline search would load from the network
_LINK = re.compile(r"(?P<start>\]\()(?P<target>[^)\s#:]+)(?P<anchor>#[^)\s]*)?(?P<end>\))")
_FENCE = re.compile(r"(^```.*?^```|`[^`\n]+`)", re.DOTALL | re.MULTILINE)
_HEADING = re.compile(r"^(?P<level>#{1,6}) (?P<title>.*\S) *$", re.MULTILINE)
_FRONT_MATTER = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)


def stage() -> None:
    """Put all pages in one folder, as the site has them."""
    shutil.rmtree(STAGED, ignore_errors=True)
    STAGED.mkdir(parents=True)
    pages = {path.relative_to(ROOT).as_posix(): path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    pages |= {source: place for source, place in BORROWED.items() if source != "README.md"}
    for source, place in pages.items():
        text = _FRONT_MATTER.sub("", (ROOT / source).read_text(encoding="utf-8"))
        target = STAGED / place
        target.parent.mkdir(parents=True, exist_ok=True)
        text = with_anchors(relinked(text, Path(source), Path(place), {**BORROWED, **pages}))
        target.write_text(text, encoding="utf-8")
    for path in DOCS.rglob("*"):
        if path.suffix in (".png", ".svg", ".css", ".js"):
            target = STAGED / path.relative_to(DOCS)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    generate.write(STAGED / "reference")


def relinked(text: str, source: Path, place: Path, pages: dict[str, str]) -> str:
    """A page's text with its links as they must be where it lies on the site.

    Args:
        text: Markdown.
        source: The page in the repository.
        place: The page on the site.
        pages: Where each page of the repository lies on the site. Other files that a page links to come along.
    """

    def moved(match: re.Match[str]) -> str:
        wanted = os.path.normpath(source.parent / match["target"])
        if wanted in pages:
            there = pages[wanted]
        elif (ROOT / wanted).is_file() and not wanted.startswith("docs/"):
            there = f"files/{wanted}"
            (STAGED / there).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / wanted, STAGED / there)
        elif wanted.startswith("docs/"):
            there = wanted.removeprefix("docs/")
        else:
            raise SystemExit(f"{source}: the link '{match['target']}' leads to no file of the repository")
        anchor = match["anchor"] or ""
        return match["start"] + os.path.relpath(there, place.parent) + anchor + match["end"]

    parts = _FENCE.split(text)
    return "".join(part if index % 2 else _LINK.sub(moved, part) for index, part in enumerate(parts))


def anchors_of(text: str) -> dict[str, str]:
    """Each heading's line and the anchor that GitHub gives it, which the site gives it, too."""
    anchors: dict[str, str] = {}
    used: list[str] = []
    outside = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    for heading in _HEADING.finditer(outside):
        title = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading["title"])
        base = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        anchors[heading[0]] = f"{base}-{used.count(base)}" if base in used else base
        used.append(base)
    return anchors


def with_anchors(text: str) -> str:
    """A page whose headings carry their anchors, so that Markdown's own are not taken, which leave out λ."""
    for heading, anchor in anchors_of(text).items():
        text = text.replace(f"{heading}\n", f"{heading} {{ #{anchor} }}\n", 1)
    return text


class Page(HTMLParser):
    """What a built page holds: the names that can be linked to, links, and what it loads."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note what a tag names, links to, or loads."""
        given = {name: value or "" for name, value in attrs}
        self.names |= {given[name] for name in ("id", "name") if given.get(name)}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        elif tag in ("script", "img", "iframe", "source") and given.get("src"):
            self.loaded.append(given["src"])
        elif tag == "link" and given.get("rel") not in ("canonical", "prev", "next", "edit"):
            self.loaded.append(given.get("href", ""))


def finish() -> list[str]:
    """Take the network out of the built pages, and say what is wrong with them."""
    for path in SITE.rglob("*.html"):
        up = os.path.relpath(SITE, path.parent)
        path.write_text(path.read_text(encoding="utf-8").replace(SHIM, f"{up}/assets/worker.js"), encoding="utf-8")
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in SITE.rglob("*.html")}
    return [
        f"{path.relative_to(SITE)}: {fault}" for path, page in pages.items() for fault in _faults(path, page, pages)
    ]


def _faults(path: Path, page: Page, pages: dict[Path, Page]) -> Iterator[str]:
    for address in [*page.loaded, *page.links]:
        parts = urlsplit(address)
        if parts.scheme or parts.netloc:
            if address in page.loaded and parts.scheme != "data":
                yield f"it loads {address}"
            continue
        if path.name == "404.html":  # whose links are from the root of wherever the site lies
            continue
        target = path if not parts.path else Path(os.path.normpath(path.parent / unquote(parts.path)))
        if target.is_dir():
            target /= "index.html"
        if not target.exists():
            yield f"the link '{address}' leads nowhere"
        elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].names:
            yield f"the link '{address}' leads to no place of that page"


def main() -> None:
    """Stage, build, check; says how large the site is."""
    stage()
    zensical = Path(sys.executable).with_name("zensical")
    if not zensical.exists():
        raise SystemExit("The docs need an extra: python -m pip install -e '.[docs]'")
    shutil.rmtree(SITE, ignore_errors=True)
    built = subprocess.run(
        [str(zensical), "build", "--strict", "--clean"],
        cwd=ROOT,
        check=False,
    )
    if built.returncode:
        raise SystemExit(built.returncode)
    faults = finish()
    if faults:
        raise SystemExit("The site is built, and wrong:\n" + "\n".join(faults))
    files = [path for path in SITE.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files) / 1e6
    num_pages = sum(path.suffix == ".html" for path in files)
    sys.stdout.write(f"{SITE / 'index.html'}: {num_pages} pages, {size:.1f} MB\n")


if __name__ == "__main__":
    main()
