"""The files that set a machine up agree with one another and with what readers are reported."""

import os
import re
import shutil
import subprocess
import tomllib
from importlib.metadata import requires
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
CONSTRAINTS = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
# name -> version, of the lines that are an exact pin of a public version; the first test asks that all are
PIN = re.compile(r"([A-Za-z0-9._-]+)==([0-9][A-Za-z0-9.]*)")
PINS = {canonicalize_name(pin[1]): pin[2] for line in CONSTRAINTS if (pin := PIN.fullmatch(line))}
DIRECT = [
    Requirement(text)
    for text in [
        *PROJECT["build-system"]["requires"],
        *PROJECT["project"]["dependencies"],
        *PROJECT["project"]["optional-dependencies"]["dev"],
    ]
]

# Stands in for a Python: notes what it is asked, and makes a `.venv` whose python is itself.
STUB = """#!/bin/sh
echo "$@" >> {log}
case "$1 $2" in
  "-c "*) exit {version_code} ;;
  "-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  "-m pip") exit {pip_code} ;;
esac
"""


def test_constraints_are_exact_pins() -> None:
    """Each line of constraints.txt pins another package exactly, without a local version label."""
    assert [line for line in CONSTRAINTS if not PIN.fullmatch(line)] == []
    assert len(PINS) == len(CONSTRAINTS)


@pytest.mark.parametrize("requirement", DIRECT, ids=lambda requirement: requirement.name)
def test_a_dependency_is_pinned_within_its_range(requirement: Requirement) -> None:
    """Each package that pyproject.toml asks for (build, core, dev) is pinned to a version it allows."""
    pin = PINS.get(canonicalize_name(requirement.name))
    assert pin is not None, f"constraints.txt does not pin {requirement.name}"
    assert requirement.specifier.contains(pin), f"{requirement} refuses the pinned {pin}"


def test_what_dependencies_bring_in_is_pinned() -> None:
    """What the dependencies need in turn is pinned too, save what a build of torch brings for itself."""
    unpinned, seen, waiting = set(), set(), list(DIRECT)
    while waiting:
        requirement = waiting.pop()
        name, extras = canonicalize_name(requirement.name), sorted(requirement.extras) or [""]
        if (name, *extras) in seen or name == "torch":
            continue
        seen.add((name, *extras))
        unpinned |= {name} - PINS.keys()
        for text in requires(name) or []:
            needed = Requirement(text)
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in extras):
                waiting.append(needed)
    assert unpinned == set()


def test_torch_is_the_release_that_is_tested() -> None:
    """The pinned torch is 2.13.0, of which every build (CPU, CUDA) will do."""
    assert "torch==2.13.0" in CONSTRAINTS


def test_pre_commit_formats_as_make_does() -> None:
    """The hook's ruff is the pinned ruff, so that a commit never fails for the other's taste."""
    text = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    assert f"ruff-pre-commit\n    rev: v{PINS['ruff']} " in text


@pytest.mark.parametrize("command", ["make demo", "make test"])
def test_readme_names_the_command(command: str) -> None:
    """The README shows each command on a line of a fenced block; CI runs the second from there."""
    blocks = (ROOT / "README.md").read_text(encoding="utf-8").split("```")[1::2]
    assert re.search(rf"^{command}\b", "\n".join(blocks), re.MULTILINE)


def test_the_citation_is_of_this_version() -> None:
    """CITATION.cff names the version and the licence of pyproject.toml."""
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert (cited["version"], cited["license"]) == (PROJECT["project"]["version"], PROJECT["project"]["license"])


@pytest.mark.parametrize("name", ["bug", "idea"])
def test_issue_template_asks_for_the_doctors_output(name: str) -> None:
    """In a field that must be filled in; ids are unique, as GitHub asks."""
    text = (ROOT / ".github" / "ISSUE_TEMPLATE" / f"{name}.yml").read_text(encoding="utf-8")
    fields = {field["id"]: field for field in yaml.safe_load(text)["body"] if "id" in field}
    assert "backmerge doctor" in fields["doctor"]["attributes"]["label"]
    assert fields["doctor"]["validations"]["required"] is True


def test_the_container_installs_the_pinned_versions() -> None:
    """What the Dockerfile copies is here and is not hidden from it, and the constraints are used."""
    lines = (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines()
    copied = [name for line in lines if re.match(r"COPY (?!--from)", line) for name in line.split()[1:-1]]
    shown = {line[1:] for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines() if line[0] == "!"}
    assert set(copied) <= shown
    assert all((ROOT / name).exists() for name in copied)
    assert any("--constraint /tmp/constraints.txt" in line for line in lines)
    assert any("] @ file://" in line for line in lines), "a name alone may stand for another package on an index"


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
class TestSetUp:
    """The Makefile's `.venv`, with a Python that only notes what it is asked."""

    @pytest.fixture(autouse=True)
    def _project(self, tmp_path: Path) -> None:
        for name in ("Makefile", "constraints.txt", "pyproject.toml"):
            shutil.copy(ROOT / name, tmp_path)
        self.folder = tmp_path
        self.log = tmp_path / "asked"

    def make(self, *arguments: str, version_code: int = 0, pip_code: int = 0) -> subprocess.CompletedProcess[str]:
        """Run make with the stub for a Python, which exits as told; the log is begun again."""
        self.log.write_text("")
        stub = self.folder / "python-stub"
        stub.write_text(STUB.format(log=self.log, version_code=version_code, pip_code=pip_code))
        stub.chmod(0o755)
        return subprocess.run(
            ["make", f"PYTHON={stub}", *arguments],
            cwd=self.folder,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
            env={"PATH": os.environ["PATH"]},  # without the settings of a make around us
        )

    def test_a_second_make_installs_nothing(self) -> None:
        """`.venv` is set up once, and again only when the pins change."""
        assert self.make(".venv").returncode == 0
        assert "pip install" in self.log.read_text()
        assert self.make(".venv").returncode == 0
        assert self.log.read_text() == ""
        with (self.folder / "constraints.txt").open("a") as file:
            file.write("zzz==1.0\n")
        assert self.make(".venv").returncode == 0
        assert "pip install" in self.log.read_text()

    def test_failed_install_is_not_marked_as_done(self) -> None:
        """Where pip fails, make fails, and the next make installs again."""
        assert self.make(".venv", pip_code=1).returncode != 0
        assert not (self.folder / ".venv" / ".stamp").exists()
        assert self.make(".venv").returncode == 0
        assert "pip install" in self.log.read_text()

    def test_torch_can_be_overridden(self) -> None:
        """Another torch is asked for alone, no constraint contradicts it, and PIP_ARGS reach each install."""
        assert self.make(".venv", "TORCH=torch==2.14.1", "PIP_ARGS=--pre").returncode == 0
        installs = [line for line in self.log.read_text().splitlines() if "pip install" in line]
        assert len(installs) == 2
        assert all("--pre" in line for line in installs)
        assert "torch==2.14.1" in installs[0]
        kept = (self.folder / ".venv" / "constraints.txt").read_text().splitlines()
        assert kept == [line for line in CONSTRAINTS if not line.startswith("torch==")]

    def test_the_pinned_torch_is_asked_for_by_default(self) -> None:
        """Without an override, torch's version is that of constraints.txt."""
        self.make(".venv")
        assert f"torch=={PINS['torch']}" in self.log.read_text()

    def test_an_old_python_is_refused_in_one_line(self) -> None:
        """A Python below 3.11 (the stub says so by its exit code) gets one line, and no `.venv`."""
        done = self.make(".venv", version_code=1)
        assert done.returncode != 0
        (line,) = done.stdout.splitlines()
        assert "3.11 or newer" in line
        assert not (self.folder / ".venv").exists()
