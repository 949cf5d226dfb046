"""The documentation as a site: links, navigation, and a reference that leaves nothing out."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer
import yaml
from tests.docs.blocks import ROOT
from tests.docs.pages import name_of, pages

from backmerge import registry
from backmerge.cli import app
from backmerge.planning.settings import Experiment

MADE = ("reference/cli.md", "reference/experiment.md", "reference/methods.md", "reference/catalogue.md")
LINK = re.compile(r"\]\((?P<target>[^)\s#:]*)(?:#(?P<anchor>[^)\s]*))?\)")


@pytest.fixture(scope="module")
def build() -> Iterator[ModuleType]:
    """docs/build.py."""
    path = list(sys.path)
    spec = importlib.util.spec_from_file_location("build_docs", ROOT / "docs" / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = path


@pytest.fixture(scope="module")
def reference(build: ModuleType) -> dict[str, str]:
    """The pages that are read from the program, by their path."""
    return {f"reference/{path}": text for path, text in build.generate.pages().items()}


def _listed(nav: Any) -> Iterator[str]:
    for entry in nav:
        for inner in entry.values() if isinstance(entry, dict) else [entry]:
            yield from _listed(inner) if isinstance(inner, list) else [inner]


def test_every_page_has_its_place(build: ModuleType, reference: dict[str, str]) -> None:
    """What the navigation lists is there, and each page is listed once."""
    listed = list(_listed(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]))
    written = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert sorted(listed) == sorted({*written, *reference, *build.BORROWED.values()})


@pytest.mark.parametrize("page", pages(), ids=name_of)
def test_links_lead_somewhere(page: Path, build: ModuleType, reference: dict[str, str]) -> None:
    """Every relative link names a file, and its anchor a heading, as GitHub and the site have them."""
    text = re.sub(r"^```.*?^```|`[^`\n]+`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for link in LINK.finditer(text):
        target = Path(os.path.normpath(page.parent / link["target"])) if link["target"] else page
        made = target.relative_to(ROOT / "docs").as_posix() if target.is_relative_to(ROOT / "docs") else ""
        assert target.exists() or made in reference, f"{name_of(page)}: {link[0]}"
        if link["anchor"] and target.suffix == ".md":
            there = reference[made] if made in reference else target.read_text(encoding="utf-8")
            own = re.findall(r"\{ #(\S+) \}", there)
            assert link["anchor"] in {*build.anchors_of(there).values(), *own}, f"{name_of(page)}: {link[0]}"


def test_reference_is_complete(reference: dict[str, str]) -> None:
    """Each command with its options, each method, each name of a table, and each setting has its entry."""
    cli, experiment, methods, catalogue = (reference[path] for path in MADE)
    group: Any = typer.main.get_command(app)
    for name, command in group.commands.items():
        section = cli.partition(f"\n## {name}\n")[2].partition("\n## ")[0]
        for parameter in command.params:
            is_option = parameter.param_type_name == "option"
            for shown in parameter.opts if is_option else [parameter.name.upper()]:
                assert parameter.name == "help" or re.search(
                    rf"^\| `[^`]*{re.escape(shown)}\b", section, re.MULTILINE
                ), shown
    for name in registry.METHODS.entries:
        assert f"\n## `{name}` " in methods
    for table in (registry.BENCHMARKS, registry.JUDGES, registry.ENGINES, registry.DATASETS):
        assert not [name for name in table.entries if f"\n### `{name}` " not in catalogue]
    for definition in Experiment.model_json_schema()["$defs"].values():
        assert not [key for key in definition.get("properties", {}) if f"| `{key}` |" not in experiment]


def test_each_setting_is_explained(reference: dict[str, str]) -> None:
    """No row of the experiment file's tables has an empty last cell."""
    rows = [line for line in reference[MADE[1]].splitlines() if line.startswith("| `")]
    assert len(rows) > 80
    assert not [row for row in rows if row.endswith("|  |")]


def test_docstrings_become_markdown(build: ModuleType) -> None:
    """Sections, entries that go on, examples and signs that Markdown takes for its own."""
    text = """Sums a * b.

    >>> 1 + 1
    2

    Args:
        first, second: In [0, 1],
            or more.
        other: Any.

    Raises:
        ValueError: one is `a[0]`.
    Source: a paper,
    with two lines.
    """
    made = "\n".join(build.generate.described(text))
    assert "Sums a \\* b." in made
    assert "```python\n>>> 1 + 1\n2\n```" in made
    assert "- `first`: In \\[0, 1\\], or more.\n- `second`: In \\[0, 1\\], or more.\n- `other`: Any." in made
    assert "- `ValueError`: one is `a[0]`." in made
    assert "Source: a paper, with two lines." in made


def test_anchors_are_githubs(build: ModuleType) -> None:
    """Signs go, spaces become hyphens, letters of any alphabet stay, and the second of a kind has a number."""
    text = "# λ by module\n\n## Rules (`--rule`, `choice.rule`)\n\n```sh\n# none\n```\n\n## [Why](a.md)?\n\n## Why\n"
    assert list(build.anchors_of(text).values()) == ["λ-by-module", "rules---rule-choicerule", "why", "why-1"]


def test_a_broken_site_is_seen(build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A link to nowhere, an anchor that isn't there, and what is loaded from the network, but for the shim."""
    monkeypatch.setattr(build, "SITE", tmp_path)
    (tmp_path / "assets").mkdir()
    (tmp_path / "assets" / "worker.js").touch()
    page = tmp_path / "a" / "b.html"
    page.parent.mkdir()
    good = (
        f'<p id="there"><a href="#there">x</a><a href="https://example.org">y</a><script src="{build.SHIM}"></script>'
    )
    page.write_text(good)
    assert build.finish() == []
    assert '"../assets/worker.js"' in page.read_text()
    wrong = {
        '<a href="c.html">': "leads nowhere",
        '<a href="#gone">': "no place",
        '<img src="//example.org/x.png">': "it loads",
        '<script src="https://example.org/x.js"></script>': "it loads",
        '<link rel="stylesheet" href="https://example.org/x.css">': "it loads",
    }
    for bad, fault in wrong.items():
        page.write_text(good + bad)
        (found,) = build.finish()
        assert fault in found


@pytest.mark.slow
def test_the_site_builds(tmp_path: Path) -> None:
    """Zensical builds a copy strictly, and the built pages pass."""
    if not Path(sys.executable).with_name("zensical").exists():
        pytest.skip("the docs extra is not installed")
    for name in ("docs", "benchmarks", "experiments", "src"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "mkdocs.yml"):
        shutil.copyfile(ROOT / name, tmp_path / name)
    done = subprocess.run([sys.executable, "docs/build.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
