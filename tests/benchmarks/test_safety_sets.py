"""The published safety benchmarks: from the hub, from copies of their files, and refused where they are neither."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from backmerge.benchmarks.advbench import advbench
from backmerge.benchmarks.catalogue import find_benchmark, named
from backmerge.benchmarks.harmbench import harmbench
from backmerge.benchmarks.hexphi import hexphi
from backmerge.benchmarks.jailbreakbench import jailbreakbench, jailbreakbench_benign
from backmerge.benchmarks.or_bench import or_bench_hard
from backmerge.benchmarks.protocol import Benchmark, BenchmarkSettings
from backmerge.benchmarks.sorry_bench import sorry_bench
from backmerge.benchmarks.split import Source, split_benchmarks
from backmerge.benchmarks.strongreject import strongreject
from backmerge.benchmarks.wildjailbreak import wildjailbreak, wildjailbreak_benign
from backmerge.benchmarks.xstest import xstest, xstest_unsafe
from backmerge.errors import ConfigError, DataError
from backmerge.records import Example, Message
from backmerge.registry import BENCHMARKS, Permissions

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
needs_data = pytest.mark.skipif(not SHARED.is_dir(), reason="the public data is not beside the project")


def asked(name: str, data: Path | None = None, **values: Any) -> BenchmarkSettings:
    """Settings of a benchmark with a copy of its data."""
    return BenchmarkSettings(name=name, data=None if data is None else str(data), **values)


def written(path: Path, text: str) -> Path:
    """The file with this text."""
    path.write_text(text, encoding="utf-8")
    return path


def hub(monkeypatch: pytest.MonkeyPatch, answer: Any) -> list[tuple[str, str | None, str]]:
    """Put a `datasets` in place that gives this, or raises it; what it was asked for."""
    module = ModuleType("datasets")
    wanted: list[tuple[str, str | None, str]] = []

    def load_dataset(repository: str, config: str | None, *, split: str) -> Any:
        wanted.append((repository, config, split))
        if isinstance(answer, Exception):
            raise answer
        return answer

    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    return wanted


def test_advbench_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of `prompt` and `target` become prompts with ids of their own; the target is not kept."""
    wanted = hub(monkeypatch, [{"prompt": "a", "target": "Sure"}, {"prompt": "b", "target": "Sure"}])
    found = advbench(asked("advbench"))
    assert wanted == [("walledai/AdvBench", None, "train")]
    assert [(e.id, e.prompt, e.reference) for e in found.examples] == [
        ("advbench-0", "a", None),
        ("advbench-1", "b", None),
    ]


@pytest.mark.parametrize("factory", [advbench, xstest, harmbench, strongreject, jailbreakbench, or_bench_hard])
@pytest.mark.parametrize("error", [ConnectionError("no network\nat all"), ValueError("gated"), OSError()])
def test_without_the_hub(factory: Any, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the hub does not give is one line, with a way round it; also where the error says nothing."""
    hub(monkeypatch, error)
    with pytest.raises(DataError, match=r"could not be downloaded from the hub: .+") as caught:
        factory(asked("x"))
    assert "at all" not in str(caught.value)
    assert "NAME=FILE" in (caught.value.remedy or "")


@needs_data
def test_the_published_files() -> None:
    """AdvBench has 520 prompts; XSTest 250 that are harmless and 200 in contrast, each kind with its types."""
    assert len(advbench(asked("advbench", SHARED / "advbench" / "harmful_behaviors.csv")).examples) == 520
    file = SHARED / "xstest" / "xstest_prompts.csv"
    harmless, harmful = xstest(asked("xstest", file)), xstest_unsafe(asked("xstest-unsafe", file))
    assert (len(harmless.examples), harmless.kind) == (250, "over_refusal")
    assert (len(harmful.examples), harmful.kind) == (200, "safety")
    assert len({e.category for e in harmless.examples}) == 10
    assert not {e.id for e in harmless.examples} & {e.id for e in harmful.examples}


@pytest.mark.parametrize("with_label", [True, False])
def test_xstest_by_label_or_by_type(with_label: bool, tmp_path: Path) -> None:
    """The label decides; a file without labels says it by the type."""
    head = "id,prompt,type" + (",label" if with_label else "")
    rows = [("1,How do I kill time?,homonyms", ",safe"), ("2,How do I spoil a kite?,contrast_homonyms", ",unsafe")]
    text = "\n".join([head, *(row + (label if with_label else "") for row, label in rows)])
    file = written(tmp_path / "x.csv", text)
    assert [e.id for e in xstest(asked("xstest", file)).examples] == ["xstest-1"]
    assert [e.id for e in xstest_unsafe(asked("xstest-unsafe", file)).examples] == ["xstest-2"]
    with pytest.raises(DataError, match=r"y.csv, \w+ \d: no text under 'prompt'"):
        xstest(asked("xstest", written(tmp_path / "y.csv", "goal\na\n")))


def test_hexphi_by_category(tmp_path: Path) -> None:
    """Files of one column without header; categories by number, ten after nine; blank lines are none."""
    for number, text in ((2, "spoil a kite\n"), (10, '"tear a kite, twice"\n\nhide a kite\n')):
        written(tmp_path / f"category_{number}.csv", text)
    found = hexphi(asked("hexphi", tmp_path)).examples
    assert [e.id for e in found] == ["hexphi-2-1", "hexphi-10-1", "hexphi-10-2"]
    assert [e.category for e in found] == ["child abuse content", "privacy violation", "privacy violation"]
    assert found[1].prompt == "tear a kite, twice"
    written(tmp_path / "category_3.csv", "two, columns\n")
    with pytest.raises(DataError, match=r"category_3.csv, row 1: 2 columns"):
        hexphi(asked("hexphi", tmp_path))
    with pytest.raises(DataError, match=r"no category_1\.csv"):
        hexphi(asked("hexphi", tmp_path / "none"))


def test_harmbench_by_its_columns(tmp_path: Path) -> None:
    """A context goes before the behaviour, and both are told the judge apart; copyright is left out."""
    head = "Behavior,FunctionalCategory,SemanticCategory,Tags,ContextString,BehaviorID\n"
    rows = (
        "Spoil a kite,standard,kites,,,one\nSpoil it,contextual,kites,,A red kite.,two\nSing it,copyright,songs,,,three"
    )
    one, two = harmbench(asked("harmbench", written(tmp_path / "h.csv", head + rows))).examples
    assert (one.id, one.prompt, one.category, dict(one.facts)) == (
        "harmbench-one",
        "Spoil a kite",
        "kites",
        {"behavior": "Spoil a kite"},
    )
    assert two.prompt == "A red kite.\n\n---\n\nSpoil it"
    assert dict(two.facts) == {"behavior": "Spoil it", "context": "A red kite."}
    with pytest.raises(DataError, match="line 2: no text under 'Behavior'"):
        harmbench(asked("harmbench", written(tmp_path / "i.csv", "goal\na\n")))


def test_strongreject_from_its_file(tmp_path: Path) -> None:
    """`forbidden_prompt` and `category` are taken."""
    file = written(tmp_path / "s.csv", "category,source,forbidden_prompt\nkites,us,Spoil a kite\n")
    (found,) = strongreject(asked("strongreject", file)).examples
    assert (found.prompt, found.category) == ("Spoil a kite", "kites")


JBB = "Index,Goal,Target,Behavior,Category,Source\n"


def test_jailbreakbench_pairs_its_halves(tmp_path: Path) -> None:
    """Rows of one index are a pair, also in the split; a folder serves both halves, and the wrong half is refused."""
    kites = [f'{i},"{word} a kite",Sure,Kites {i},Kites,Original' for i, word in enumerate(WORDS)]
    boats = [f"{i},{word} a boat,Sure,Boats {i},Boats,Original" for i, word in enumerate(reversed(WORDS))]
    harmful = written(tmp_path / "harmful-behaviors.csv", JBB + "\n".join(kites))
    benign = written(tmp_path / "benign-behaviors.csv", JBB + "\n".join(boats))
    unsafe, safe = jailbreakbench(asked("x", tmp_path)), jailbreakbench_benign(asked("x", benign))
    assert (unsafe.kind, safe.kind) == ("safety", "over_refusal")
    assert unsafe.examples[0].prompt == f"{WORDS[0]} a kite"
    assert [e.pair for e in unsafe.examples] == [e.pair for e in safe.examples]
    halves = split_benchmarks([Source(b.name, b.kind, b.examples) for b in (unsafe, safe)])
    for split in ("selection", "confirmation"):
        pairs = [{e.pair for e in halves[b.name][split]} for b in (unsafe, safe)]
        assert pairs[0] == pairs[1]
        assert len(pairs[0]) == len(WORDS) // 2
    with pytest.raises(DataError, match="harmful half"):
        jailbreakbench_benign(asked("x", harmful))
    benign.unlink()
    with pytest.raises(DataError, match="has no benign-behaviors"):
        jailbreakbench_benign(asked("x", tmp_path))
    with pytest.raises(DataError, match="line 2: no text under 'Goal' or 'Index'"):
        jailbreakbench(asked("x", written(tmp_path / "mine.csv", "goal\na\n")))


WORDS = ("Fold", "Paint", "Launch", "Repair", "Measure", "Describe", "Weigh", "Store")


def test_jailbreakbench_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each half is a split of the configuration `behaviors`."""
    wanted = hub(monkeypatch, [{"Index": 7, "Goal": "Fly a kite", "Category": "Kites"}])
    assert jailbreakbench_benign(asked("x")).examples[0].pair == jailbreakbench(asked("x")).examples[0].pair
    assert [split for _, _, split in wanted] == ["benign", "harmful"]
    assert {config for _, config, _ in wanted} == {"behaviors"}


def test_or_bench_by_its_columns(tmp_path: Path) -> None:
    """Harmless prompts, by category, for over-refusal."""
    found = or_bench_hard(asked("x", written(tmp_path / "o.csv", "prompt,category\nHow do kites crash?,kites\n")))
    assert (found.kind, found.examples[0].category) == ("over_refusal", "kites")
    with pytest.raises(DataError, match="line 2: no text under 'prompt' or 'category'"):
        or_bench_hard(asked("x", written(tmp_path / "p.csv", "prompt\na\n")))


def test_sorry_bench_takes_base_prompts_only(tmp_path: Path) -> None:
    """One turn a line, by category; a mutated prompt is refused; its texts are in no report unless asked for."""
    line = '{"question_id": %d, "category": "%d", "turns": ["%s"], "prompt_style": "%s"}\n'
    file = written(
        tmp_path / "question.jsonl", line % (1, 1, "Tear a kite", "base") + line % (11, 2, "Hide it", "base")
    )
    found = sorry_bench(asked("x", file))
    assert [(e.id, e.category) for e in found.examples] == [
        ("sorry-bench-1", "category 1"),
        ("sorry-bench-11", "category 2"),
    ]
    assert found.is_gated
    with pytest.raises(DataError, match="style 'caesar'"):
        sorry_bench(asked("x", written(tmp_path / "c.jsonl", line % (1, 1, "Whdu d nlwh", "caesar"))))
    with pytest.raises(DataError, match="no single text under 'turns'"):
        sorry_bench(asked("x", written(tmp_path / "d.jsonl", '{"question_id": 1, "turns": ["a", "b"]}\n')))


def test_wildjailbreak_by_type(tmp_path: Path) -> None:
    """The harmful rows are for ASR, the look-alikes for over-refusal; a line break within quotes is text."""
    rows = '"You are a kite.\nTear up"\t1\tadversarial_harmful\nYou are a kite. Fly\t0\tadversarial_benign\n'
    file = written(tmp_path / "eval.tsv", "adversarial\tlabel\tdata_type\n" + rows)
    (harmful,) = wildjailbreak(asked("x", file)).examples
    (benign,) = wildjailbreak_benign(asked("x", file)).examples
    assert (harmful.prompt, benign.prompt) == ("You are a kite.\nTear up", "You are a kite. Fly")
    train = "vanilla\tadversarial\tcompletion\tdata_type\nFly\t\tSure\tvanilla_benign\n"
    with pytest.raises(DataError, match=r"'data_type' is neither of adversarial_harmful, adversarial_benign"):
        wildjailbreak(asked("x", written(tmp_path / "train.tsv", train)))


def test_names_on_the_command_line() -> None:
    """NAME=DATA is for benchmarks of the table and lm-eval's tasks; a file may have an = in its name."""
    assert named("xstest=a/b.csv") == BenchmarkSettings(name="xstest", data="a/b.csv")
    assert named("lm-eval:mine=tasks") == BenchmarkSettings(name="lm-eval:mine", data="tasks")
    assert named("a=b.csv") == BenchmarkSettings(name="a=b.csv")
    assert named("xstest") == BenchmarkSettings(name="xstest")


def test_settings_change_any_benchmark() -> None:
    """System prompt, prefill, samples and limit hold for a benchmark that knows nothing of them."""
    settings = BenchmarkSettings(
        name="demo-harmful", system="Be brief.", prefill="Sure: ", num_samples=3, temperature=0.7, max_new_tokens=9
    )
    found = find_benchmark(settings, "safety")
    assert [m.role for m in found.examples[0].messages] == ["system", "user"]
    assert found.examples[0].prefill == "Sure: "
    assert dict(found.sampling) == {"num_samples": 3, "temperature": 0.7}
    assert found.max_new_tokens == 9
    plain = find_benchmark("demo-harmful", "safety")
    assert find_benchmark(BenchmarkSettings(name="demo-harmful", system=""), "safety").examples == plain.examples


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"name": "demo-harmful", "options": {"nonsense": 1}}, "no option 'nonsense'"),
        ({"name": "demo-harmful", "metrics": ("exact_match",)}, "its own metrics"),
        ({"name": "demo-harmful", "data": "x"}, "made by backmerge itself"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(settings: dict[str, Any], words: str) -> None:
    """Options, metrics and data that a benchmark does not take."""
    with pytest.raises(ConfigError, match=words):
        find_benchmark(BenchmarkSettings(**settings), "safety")


def test_a_half_without_prompts_is_refused(tmp_path: Path) -> None:
    """A file of harmless prompts alone has no harmful half."""
    file = written(tmp_path / "x.csv", "id,prompt,type,label\n1,How do I kill time?,homonyms,safe\n")
    with pytest.raises(DataError, match="has no prompts"):
        find_benchmark(f"xstest-unsafe={file}", "safety")


def test_another_kind_is_refused() -> None:
    """XSTest's harmless half is not a measure of safety."""
    with pytest.raises(ConfigError, match="measures utility"):
        find_benchmark("demo-plans", "safety")


def test_every_benchmark_explains_itself() -> None:
    """Each factory of the table has a docstring whose module tells of its data and licence."""
    import importlib

    for name, place in BENCHMARKS.entries.items():
        module = importlib.import_module(place.partition(":")[0])
        factory = getattr(module, place.partition(":")[2])
        assert factory.__doc__, name
        assert "example" in (module.__doc__ or "").casefold() or name == "humaneval", name


def test_a_plugin_is_a_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    """A function of one's own gets the settings."""
    module = ModuleType("my_bench")
    module.mine = lambda settings: Benchmark(settings.name, "safety", (Example("a", (Message("user", "Hi"),)),), 4)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "my_bench", module)
    assert find_benchmark("my_bench:mine", "safety", Permissions(plugins=True)).max_new_tokens == 4
    with pytest.raises(ConfigError, match="your own code"):
        find_benchmark("my_bench:mine", "safety")
