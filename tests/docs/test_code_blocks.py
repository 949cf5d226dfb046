"""Every code block of the documentation is checked, and run where it can be.

Shell: each command must exist and take these options, names and settings; on the pages of `docs/how-to` and
`docs/tutorial` the commands are carried out. Python is run everywhere. What is not run says so before the block, with
its reason.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
from tests.docs.blocks import Block, blocks_of
from tests.docs.pages import SHELL, as_installed, carry_out, faults_of_block, name_of, pages
from tests.docs.shell import commands_of, faults_of, ours

PAGES = pages()
TUTORIALS = [page for page in PAGES if page.parent.name == "tutorial"]
HOW_TOS = [page for page in PAGES if page.parent.name == "how-to"]
WIDTH = "100"


def _has_code(page: Path) -> bool:
    blocks = [block for block in blocks_of(page) if block.reason is None]
    return any(b.language == "python" or (b.language in SHELL and page in HOW_TOS) for b in blocks)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_block_is_sound(page: Path, tmp_path: Path) -> None:
    """Commands, options, names and settings are there; Python compiles; YAML and JSON say what ours know."""
    faults = [f"line {block.line}: {fault}" for block in blocks_of(page) for fault in faults_of_block(block, tmp_path)]
    assert not faults, f"{name_of(page)}:\n" + "\n".join(faults)


@pytest.mark.parametrize("page", [page for page in PAGES if page not in TUTORIALS and _has_code(page)], ids=name_of)
def test_pages_work_as_described(
    page: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    run_cli: Callable[..., tuple[int, str, str]],
) -> None:
    """Python blocks, and the commands of how-to guides, run in order and print what the page shows."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", WIDTH)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    carry_out(page, run=lambda arguments: run_cli(*arguments), runs_shell=page in HOW_TOS)


@pytest.mark.slow
@pytest.mark.parametrize("page", TUTORIALS, ids=name_of)
def test_tutorial_works_when_followed(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each command is a separate process, as for a reader, and prints what the page shows."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", WIDTH)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    carry_out(page, run=as_installed, runs_shell=True, is_exact=False)


BAD = {
    "no such command": ("sh", "backmerge restor BASE TUNED --out x"),
    "no such option": ("sh", "backmerge merge BASE TUNED --lamda 0.4 --out x"),
    "a required option left out": ("sh", "backmerge evaluate demo --safety demo-harmful"),
    "no such judge": ("sh", "backmerge evaluate M --safety advbench --judge wildgard --out x"),
    "no such benchmark": ("sh", "backmerge evaluate M \\\n  --safety advbnch --out x"),
    "no such setting": ("sh", "backmerge run x.yaml --set choice.margn=0.05"),
    "no such rule": ("sh", "backmerge restore B T --out x --rule safest"),
    "behind a variable and a pipe": ("sh", "HF_HUB_OFFLINE=1 backmerge doctr | head -3"),
    "behind accelerate": ("sh", "accelerate launch --num_processes 4 -m backmerge finetun BASE"),
    "behind srun": ("sh", "srun --gpus 8 backmerge run x.yaml --outt /shared/x"),
    "no such program": ("sh", "bakcmerge demo"),
    "no such target": ("sh", "make tests"),
    "no shell": ("sh", "for x in 1 2; echo $x"),
    "no such extra": ("sh", "pip install 'backmerge[vlm]'"),
    "no such module": ("sh", "python -m benchmarks.mergekit_conformances"),
    "unknown key of an experiment": ("yaml", "evaluate:\n  utlity: [a.jsonl]"),
    "unknown key of mergekit": ("yaml", "merge_method: linear\nmodles: []"),
    "not JSON": ("json", "{'a': 1}"),
    "not Python": ("python", "for x in"),
    "no such name of ours": ("python", "from backmerge.statistics import wilsons"),
    "no such language": ("pyhton", "x = 1"),
}


@pytest.mark.parametrize("case", BAD)
def test_faults_are_found(case: str, tmp_path: Path) -> None:
    """One fault of each sort is seen, also where the page says that the block isn't run."""
    language, text = BAD[case]
    assert faults_of_block(Block(1, language, text), tmp_path)
    if language != "pyhton":
        assert faults_of_block(Block(1, language, text, reason="needs a GPU"), tmp_path)


def test_an_opt_out_needs_a_reason_and_covers_one_block(tmp_path: Path) -> None:
    """The comment holds for the block right after it, and an empty one is a fault."""
    page = tmp_path / "page.md"
    fence = "```python\nx = 1\n```\n\n"
    page.write_text(
        f"<!-- not run: needs a GPU -->\n\n{fence}{fence}<!-- not run: -->\n\n{fence}    y = 2\n\n    pip list\n"
    )
    blocks = blocks_of(page)
    assert [block.reason for block in blocks] == ["needs a GPU", None, "", None]
    assert faults_of_block(blocks[2], tmp_path)
    assert [block.language for block in blocks] == ["python", "python", "python", "sh"]


def test_commands_are_found_in_scripts() -> None:
    """Comments, continued lines, wrappers, variables, redirections and operators are distinguished from the command."""
    text = (
        "# one\nA=1 srun --x backmerge a \\\n    b  # why\nbackmerge schema > s.json && echo 'x y' | head\n#SBATCH -n\n"
    )
    found = list(commands_of(text))
    assert [number for number, _ in found] == [1, 3, 3, 3]
    assert [ours(command) for _, command in found] == [("a", "b"), ("schema",), None, None]
    assert found[0][1].variables == {"A": "1"}
    assert found[1][1].output == "s.json"
    assert not faults_of(found[2][1])


def test_what_a_page_shows_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's output to the letter; a command's but for numbers; either fails where it differs."""
    monkeypatch.chdir(tmp_path)
    page = Path(__file__).parents[2] / "docs" / "page.md"
    for text, is_right in {
        "```python\nprint(0.5)\n```\n\n```text\n0.5\n```\n": True,
        "```python\nprint(0.5)\n```\n\n```text\n0.4\n```\n": False,
        "```sh\nbackmerge x\n```\n\n```text\n...\nkept 88.1 %\n```\n": True,
        "```sh\nbackmerge x\n```\n\n```text\nkept 88.1 %\n```\n": False,
        "```sh\nbackmerge x\n```\n\n```text\n...\nlost 88.1 %\n```\n": False,
    }.items():
        monkeypatch.setattr("tests.docs.pages.blocks_of", lambda _, text=text: _parsed(tmp_path, text))
        try:
            carry_out(page, run=lambda _: (0, "first\nkept 89.0 %\n", ""), runs_shell=True)
        except AssertionError:
            assert not is_right, text
        else:
            assert is_right, text


def _parsed(folder: Path, text: str) -> list[Block]:
    place = folder / "text.md"
    place.write_text(text, encoding="utf-8")
    return blocks_of(place)
