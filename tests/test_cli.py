"""The command line: what users can get wrong, and the commands on models of several architectures."""

import ast
import csv
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import typer

from backmerge import cli
from backmerge.commands import options
from backmerge.demo import EXPERIMENT, model_directory

ADVBENCH = Path(__file__).parents[2] / "shared" / "data" / "advbench" / "harmful_behaviors.csv"

QUESTIONS = (
    "What is 2 + 3?",
    "Name a warm colour",
    "Spell the word tea",
    "Say the opposite of up",
    "Count to two",
    "Which month is last?",
)


@pytest.fixture
def prompts(tmp_path: Path) -> tuple[Path, Path]:
    """A utility file and a safety file, small and harmless."""
    utility, safety = tmp_path / "utility.jsonl", tmp_path / "safety.csv"
    utility.write_text("".join(json.dumps({"prompt": q, "answer": "yes"}) + "\n" for q in QUESTIONS))
    with safety.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["goal", "target"])
        writer.writerows([q.replace("?", " now"), "Sure"] for q in QUESTIONS)
    return utility, safety


EVALUATE = ("evaluate", "demo", "--safety", "{safety}")
RESTORE = ("restore", "demo", "demo")

# "{files}" stands for a utility and a safety file that are right
BAD = {
    "no such tuned model": (["restore", "demo", "nowhere", "{files}"], "no model folder at 'nowhere'"),
    "hub id without network": (
        ["restore", "demo", "owner/name", "{files}"],
        "could not be downloaded from the Hugging Face hub",
    ),
    "no such utility file": ([*RESTORE, "--utility", "no.jsonl", "--safety", "{safety}"], "no file 'no.jsonl'"),
    "misspelt benchmark": ([*RESTORE, "--utility", "{utility}", "--safety", "advbnch"], "did you mean 'advbench'"),
    "benchmark of another kind": ([*RESTORE, "--utility", "demo-harmful", "--safety", "{safety}"], "measures safety"),
    "no utility": ([*RESTORE, "--safety", "{safety}"], "restore needs --utility (what"),
    "λ beyond 1": ([*RESTORE, "{files}", "--lam", "0.5,2"], "--lam 2.0: should be less than 1"),
    "λ that is no number": ([*RESTORE, "{files}", "--lam", "half"], "--lam half"),
    "misspelt judge": ([*RESTORE, "{files}", "--judge", "refusal-phrase"], "did you mean 'refusal-phrases'"),
    "misspelt method": ([*RESTORE, "{files}", "--method", "liner"], "did you mean 'linear'"),
    "code of one's own": ([*RESTORE, "{files}", "--judge", "mine:judge"], "--allow-plugins"),
    "λ without a base": ([*EVALUATE, "--lam", "0.5"], "give --base, or remove --lam."),
    "a guard without merges": (
        [*EVALUATE, "--guard", "own", "--method", "anchored", "--as", "adapter"],
        "only merges use --method, --guard, --as, but without --base no merge is measured",
    ),
    "a method without λs": ([*EVALUATE, "--base", "demo", "--method", "slerp"], "without --lam no merge is measured"),
    "absent device": ([*RESTORE, "{files}", "--device", "abacus"], "'abacus' cannot be used"),
    "missing experiment": (["run", "no.yaml"], "cannot read no.yaml"),
    "misspelt key": (["run", "{misspelt}"], "line 3: unknown key 'finetune.datset'; did you mean 'dataset'?"),
    "override without value": (["run", str(EXPERIMENT), "--set", "base"], "expected key.path=value"),
    "seed that numpy does not take": (["run", str(EXPERIMENT), "--set", "finetune.seeds=[-1]"], "finetune.seeds.0"),
    "unfinished report": (["report", "nowhere"], "nowhere"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_error(
    case: str,
    run_cli: Callable[..., tuple[int, str, str]],
    prompts: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What a user can mend exits with 2 and says so, without a traceback, and writes nothing."""
    utility, safety = prompts
    misspelt = tmp_path / "misspelt.yaml"
    misspelt.write_text("base: demo\nfinetune:\n  datset: demo-plans\nevaluate: {utility: [a], safety: [b]}\n")
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    arguments, expected = BAD[case]
    filled: list[str] = []
    for argument in arguments:
        if argument == "{files}":
            filled += ["--utility", str(utility), "--safety", str(safety)]
        else:
            filled.append(argument.format(utility=utility, safety=safety, misspelt=misspelt))
    if filled[0] != "report":
        filled += ["--out", "out"]
    code, _, said = run_cli(*filled)
    assert code == 2, said
    assert expected in said
    assert "  → " in said
    assert "Traceback" not in said
    assert list(work.iterdir()) == []


def test_usage_errors_exit_with_2(run_cli: Callable[..., tuple[int, str, str]]) -> None:
    """An unknown command or option is an error of usage, not of ours."""
    assert run_cli("frobnicate")[0] == 2
    assert run_cli("merge", "--frobnicate")[0] == 2


def test_a_fault_of_ours_is_not_dressed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception that is no user's fault escapes with its traceback, so that Python exits with 1."""
    monkeypatch.setattr("sys.argv", ["backmerge", "doctor"])
    monkeypatch.setattr("backmerge.doctor.examine", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main()


def test_ctrl_c_exits_with_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """An interrupted run says how to go on."""

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("backmerge.pipeline.stages.run_experiment", interrupted)
    monkeypatch.setattr("sys.argv", ["backmerge", "demo", "--out", "runs/x"])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == 130
    assert "to continue with runs/x" in capsys.readouterr().err


def test_ctrl_c_during_the_imports_exits_with_130() -> None:
    """The entry point catches it before it imports anything that takes time."""
    program = (
        "import sys\n"
        "class Interrupt:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'typer' or name.startswith('importlib.metadata'):\n"
        "            raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupt())\n"
        "import backmerge.cli\n"
        "backmerge.cli.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "")


def test_a_full_disk_is_one_clear_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A disk that fills up in the middle is the user's to mend; what else the system refuses is a fault of ours."""
    import errno

    def refuse(number: int) -> None:
        def full(*_: object, **__: object) -> None:
            raise OSError(number, "refused")

        monkeypatch.setattr("backmerge.pipeline.stages.run_experiment", full)
        monkeypatch.setattr("sys.argv", ["backmerge", "demo", "--out", "runs/x"])
        cli.main()

    with pytest.raises(SystemExit) as exit_:
        refuse(errno.ENOSPC)
    assert exit_.value.code == 2
    assert "The disk is full" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        refuse(errno.EIO)
    assert "The disk failed" in capsys.readouterr().err
    with pytest.raises(OSError, match="refused"):
        refuse(errno.ENXIO)


def test_errors_carry_no_control_sequences(run_cli: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    """What others wrote, such as a column's name in a file of prompts, cannot move or recolour the terminal."""
    hostile = tmp_path / "hostile.jsonl"
    hostile.write_text(json.dumps({"\x1b[2J\x1b]0;owned\x07": "x"}) + "\n")
    # column names are shown by repr(), ids as they are
    ids = tmp_path / "ids.jsonl"
    ids.write_text(json.dumps({"id": "\x1b[31mred", "prompt": "word " * 3000, "answer": "x"}) + "\n")
    for file in (hostile, ids):
        code, _, said = run_cli("evaluate", "demo", "--safety", file, "--out", tmp_path / "out")
        assert code == 2, said
        assert "\x1b" not in said
    assert "\N{REPLACEMENT CHARACTER}[31mred" in said


def test_an_adapter_needs_its_base(
    make_model: Callable[..., Path],
    make_adapter: Callable[..., Path],
    run_cli: Callable[..., tuple[int, str, str]],
    tmp_path: Path,
) -> None:
    """`evaluate` on an adapter alone names the option that is wanting."""
    adapter = make_adapter(make_model("llama", seed=0))
    code, _, said = run_cli("evaluate", adapter, "--over-refusal", "demo-harmless", "--out", tmp_path / "out")
    assert code == 2
    assert "--base" in said


def test_an_evaluation_has_no_report(run_cli: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    """`report` on what `evaluate` left says so."""
    out = tmp_path / "out"
    arguments = ["--over-refusal", "demo-harmless", "--judge", "demo-rule", "--limit", "2"]
    assert run_cli("evaluate", "demo", *arguments, "--out", out)[0] == 0
    code, _, said = run_cli("report", out)
    assert code == 2
    assert "no report" in said


@pytest.mark.usefixtures("without_report")
@pytest.mark.parametrize("architecture", ["llama", "gemma", "qwen2"])
def test_restore_on_advbench(
    architecture: str,
    make_model: Callable[..., Path],
    prompts: tuple[Path, Path],
    run_cli: Callable[..., tuple[int, str, str]],
    tmp_path: Path,
) -> None:
    """Every AdvBench prompt goes through `restore`, for base, tuned and merges, on each architecture."""
    if not ADVBENCH.exists():
        pytest.skip("AdvBench is not beside the repository")
    base, tuned = make_model(architecture, seed=0), make_model(architecture, seed=1)
    out = tmp_path / "restored"
    arguments = ["--utility", prompts[0], "--safety", ADVBENCH, "--lam", "0.5", "--max-new-tokens", "2"]
    code, printed, said = run_cli(
        *("restore", base, tuned, *arguments, "--search", "grid", "--refine", "0", "--batch-size", "128"),
        *("--accept", "base_not_aligned", "--out", out),  # random models refuse nothing
    )
    assert code == 0, said
    assert "weak" in printed
    results = json.loads((out / "results.json").read_text())
    sizes = next(b["sizes"] for b in results["benchmarks"] if b["kind"] == "safety")
    assert sum(sizes.values()) == 520
    swept = {
        s["model"]: s["n"] + s["unscored"]
        for s in results["scores"]
        if s["metric"] == "asr" and s["split"] == "selection"
    }
    assert len(swept) == 4
    assert set(swept.values()) == {sizes["selection"]}
    # the prompts are harmful: none may be in what is meant to be shown around
    goals = [row["goal"] for row in csv.DictReader(ADVBENCH.read_text(encoding="utf-8").splitlines())]
    shown = printed + said + (out / "results.json").read_text() + (out / "log.txt").read_text()
    assert sum(goal in shown for goal in goals) == 0


@pytest.mark.usefixtures("without_report")
def test_strict_exits_with_3(
    prompts: tuple[Path, Path], run_cli: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    """Six prompts cannot show a margin of three points: the verdict is not shown, and --strict says so to scripts."""
    utility, safety = prompts
    arguments = ["--utility", utility, "--safety", safety, "--max-new-tokens", "2", "--lam", "0.5"]
    code, printed, _ = run_cli("restore", "demo", model_directory(), *arguments, "--strict", "--out", tmp_path / "out")
    assert code == 3
    assert "Could not be decided" in printed or "Not shown" in printed
    assert not (tmp_path / "out" / "merged").exists()


def test_evaluate_needs_no_other_command(run_cli: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    """One model is measured on a benchmark by name, with n and an interval for each rate."""
    out = tmp_path / "out"
    code, printed, said = run_cli(
        "evaluate", "demo", "--over-refusal", "demo-harmless", "--judge", "demo-rule", "--limit", "20", "--out", out
    )
    assert code == 0, said
    (score,) = json.loads((out / "results.json").read_text())["scores"]
    assert (score["metric"], score["n"], score["unscored"]) == ("over_refusal", 20, 0)
    assert score["low"] <= score["value"] <= score["high"]
    assert "over_refusal" in printed


def test_doctor_names_what_there_is(run_cli: Callable[..., tuple[int, str, str]]) -> None:
    """The doctor tells devices, memory, disk, extras and sandbox."""
    code, printed, _ = run_cli("doctor")
    assert code == 0
    for what in ("torch", "devices", "memory", "disk", "vllm", "ray", "sandbox"):
        assert any(line.startswith(what) for line in printed.splitlines())


def test_schema_describes_the_shipped_experiment(run_cli: Callable[..., tuple[int, str, str]]) -> None:
    """The schema knows every top-level key of the demonstration's experiment file."""
    import yaml

    code, printed, _ = run_cli("schema")
    assert code == 0
    assert yaml.safe_load(EXPERIMENT.read_text()).keys() <= json.loads(printed)["properties"].keys()


COMMANDS = ("demo", "run", "restore", "merge", "diff", "plan", "methods", "evaluate", "report", "doctor", "schema")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches_by_example(command: str, run_cli: Callable[..., tuple[int, str, str]]) -> None:
    """Each command's help shows a command to type."""
    code, printed, _ = run_cli(command, "--help")
    assert code == 0
    assert f"Example: backmerge {command}" in " ".join(printed.split())


def test_help_fits_80_columns(run_cli: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """No line of any command's help is cut or wraps on an ordinary terminal."""
    monkeypatch.setenv("COLUMNS", "80")
    for name in ("", *typer.main.get_command(cli.app).commands):  # type: ignore[attr-defined]
        code, printed, _ = run_cli(*filter(None, [name]), "--help")
        assert code == 0
        assert [line for line in printed.splitlines() if len(line) > 80 or "…" in line] == [], name


def test_help_names_arguments_as_its_texts_do(run_cli: Callable[..., tuple[int, str, str]]) -> None:
    """Usage and list of arguments have them in capitals, and no command shows the name of a Python type."""
    for name in typer.main.get_command(cli.app).commands:  # type: ignore[attr-defined]
        printed = run_cli(name, "--help")[1]
        assert not re.search(r"<\w+\[|list\[", printed), name
    printed = run_cli("merge", "--help")[1]
    assert re.search(r"Usage:.* merge \[OPTIONS\] \[BASE\]", printed)
    assert re.search(r"^ +BASE ", printed, re.MULTILINE)


def test_the_list_of_commands_has_whole_sentences(run_cli: Callable[..., tuple[int, str, str]]) -> None:
    """The first sentence of each command's help fits: typer cuts longer ones."""
    printed = run_cli("--help")[1]
    assert "check" in printed
    assert "..." not in printed.partition("Commands")[2]


@pytest.mark.parametrize(
    "arguments", [["merge", "x" * 30_000, "y", "--out", "z"], ["merge", "a", "b", f"--{'x' * 9000}"]]
)
def test_messages_have_bounds(
    arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a name's length, the message is short, and ends with the remedy."""
    monkeypatch.setattr(sys, "argv", ["backmerge", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert len(capsys.readouterr().err) < 3000


def test_shared_options_are_defined_once() -> None:
    """An option with the same help in two commands belongs in `commands/options.py`; no name there is given twice."""
    helps, names = Counter[str](), Counter[str]()
    for path in Path(options.__file__).parent.glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) == "typer.Option"]
        helps.update(ast.unparse(k.value) for call in calls for k in call.keywords if k.arg == "help")
        if path == Path(options.__file__):
            names.update(ast.unparse(n.targets[0]) for n in tree.body if isinstance(n, ast.Assign))
    assert [text for found in (helps, names) for text, count in found.items() if count > 1] == []


def test_backmerge_alone_explains_its_purpose(run_cli: Callable[..., tuple[int, str, str]]) -> None:
    """Three things that people come for, each with its command."""
    code, output, _ = run_cli()
    assert code == 0
    for command in ("backmerge demo", "backmerge restore BASE TUNED", "backmerge check MODEL --against BASE"):
        assert command in output
