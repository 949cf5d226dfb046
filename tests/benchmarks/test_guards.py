"""Guard prompts: split off by whole clusters, never measured on, found again by their hash."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from backmerge.benchmarks.files import from_file
from backmerge.benchmarks.guards import Guard, GuardSettings, TaskSettings, digest_of_prompt, find_guards
from backmerge.benchmarks.protocol import Benchmark
from backmerge.benchmarks.split import Source, are_apart, calibration_of, clusters_of, split_benchmarks
from backmerge.errors import ConfigError, DataError
from backmerge.merging.inputs import GatheredLayer, LayerInputs, Provenance, write_statistics
from backmerge.records import Example, Message
from backmerge.registry import NOTHING_ALLOWED


def example(text: str, number: int, name: str = "s") -> Example:
    """A prompt."""
    return Example(f"{name}-{number}", (Message("user", text),))


def distinct(count: int, start: int = 0) -> list[str]:
    """Prompts of which no two are alike."""
    return [f"verb{n} noun{n} place{n}" for n in range(start, start + count)]


def measured(texts: Sequence[str], name: str = "safety") -> Source:
    """A benchmark of these prompts."""
    return Source(name, "safety", [example(text, n, name) for n, text in enumerate(texts)])


def test_prompts_that_nothing_measures_come_first() -> None:
    """A guard of other prompts costs the benchmarks nothing, near-duplicates of them are left alone."""
    benchmark = measured(distinct(20))
    guard = measured([*distinct(20), *distinct(6, 100), "verb3 noun3 place3 now"], "guard")
    found = calibration_of(guard, [benchmark], 6)
    assert {one.prompt for one in found.prompts} == set(distinct(6, 100))
    assert found.left == {"safety": benchmark.examples}


def test_of_a_measured_benchmark_at_most_a_quarter_of_the_clusters_is_taken_whole() -> None:
    """The prompts, and their near-duplicates, are measured no more; the rest are, and the two never meet."""
    texts = [text for base in distinct(20) for text in (base, f"{base} again")]
    source = measured(texts)
    found = calibration_of(source, [source], 64)
    left = found.left["safety"]
    assert (len(found.prompts), len(left)) == (10, 30)
    both = [*found.prompts, *left]
    clusters = clusters_of(both)
    assert set(clusters[: len(found.prompts)]).isdisjoint(clusters[len(found.prompts) :])
    assert calibration_of(source, [source], 64) == found
    # one of each cluster before a second one of any
    few = calibration_of(source, [source], 5).prompts
    assert len({one.prompt.removesuffix(" again") for one in few}) == 5


def test_other_kinds_drop_equal_prompts_but_keep_similar_ones() -> None:
    """As in the split into halves: within a kind words decide, between kinds the wording."""
    guard = measured(["forge a ticket at the hall"], "guard")
    harmless = Source("ordinary", "over_refusal", [example("mend a ticket at the hall", 0, "o")])
    same = Source("task", "utility", [example("Forge a ticket, at the hall!", 0, "t")])
    assert calibration_of(guard, [harmless, same], 1).left == {"ordinary": harmless.examples, "task": []}
    unknown = guard._replace(kind="")
    assert calibration_of(unknown, [harmless], 1).left == {"ordinary": []}


def test_the_law_of_the_split_covers_calibration() -> None:
    """Law 8's assertion fails where a prompt that a merge was made with is measured on."""
    halves = split_benchmarks([measured(distinct(8))])
    assert are_apart(halves, [example("something else", 0)])
    assert not are_apart(halves, [example("VERB3 noun3, place3", 0)])


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Benchmark]:
    """A file of 40 prompts, and the benchmark of it."""
    file = tmp_path / "mine.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": text}) for text in distinct(40)))
    return file, from_file(file, "safety")


def test_a_guard_from_the_measured_file_is_not_measured(files: tuple[Path, Benchmark]) -> None:
    """By name, file or statistics: what is left of the benchmark has none of the guard's prompts."""
    file, benchmark = files
    asked = GuardSettings(source=str(file), kind="harmful", num_prompts=4)
    guards, (left,) = find_guards([asked], [benchmark], NOTHING_ALLOWED)
    assert (guards[asked].kind, guards[asked].description) == ("harmful", "4 harmful prompts of mine")
    assert {one.prompt for one in guards[asked].prompts}.isdisjoint(one.prompt for one in left.examples)
    assert len(left.examples) == 36

    statistics = file.parent / "guard.safetensors"
    provenance = Provenance(
        model="m", kind="harmful", source="mine", num_prompts=4, num_tokens=9, max_new_tokens=0, dtype="float32",
        max_directions=8, prompts=tuple(digest_of_prompt(one) for one in guards[asked].prompts),
    )  # fmt: skip
    inputs = LayerInputs(np.eye(3, dtype=np.float32), np.ones(3, np.float32))
    write_statistics(statistics, provenance, {"l": GatheredLayer(("l",), inputs)})
    by_file = GuardSettings(source=str(statistics))
    again, (left_again,) = find_guards([by_file], [benchmark], NOTHING_ALLOWED)
    assert left_again.examples == left.examples
    assert again[by_file].description == "4 harmful prompts of mine"


def test_several_guards_are_all_left_out(files: tuple[Path, Benchmark]) -> None:
    """A guard's prompts are not measured on for any recipe, so that all are compared on the same ones."""
    file, benchmark = files
    asked = [GuardSettings(source=str(file), num_prompts=n) for n in (2, 5)]
    guards, (left,) = find_guards([*asked, GuardSettings(source="own")], [benchmark], NOTHING_ALLOWED)
    assert len(left.examples) == 35
    assert guards[GuardSettings(source="own")].prompts == ()
    assert guards[asked[0]].kind == "file"


def test_guard_name_shows_its_settings() -> None:
    """In the name of a series: the benchmark or the file's stem, and what is not the default."""
    assert GuardSettings(source="advbench=/data/advbench.csv").short == "advbench"
    assert GuardSettings(source="/data/mine.csv", num_prompts=8).short == "mine:num_prompts=8"
    assert Guard(GuardSettings(source="own", num_prompts=96), "own").description == "96 prompts that the base wrote"


def test_guards_that_cannot_be_are_refused(tmp_path: Path) -> None:
    """A benchmark's kind that is given again, and a guard that leaves nothing to measure."""
    with pytest.raises(ConfigError, match="has prompts of a known kind"):
        find_guards([GuardSettings(source="demo-harmful", kind="ordinary")], [], NOTHING_ALLOWED)
    file = tmp_path / "two.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": text}) for text in distinct(2)))
    with pytest.raises(DataError, match="take nearly all of the 2 prompts"):
        find_guards([GuardSettings(source=str(file))], [from_file(file, "safety")], NOTHING_ALLOWED)


def test_no_row_of_a_task_is_measured(files: tuple[Path, Benchmark]) -> None:
    """Those that the statistics leave out are not either: the tuned model may have learned them."""
    file, benchmark = files
    rows = file.parent / "rows.jsonl"
    taken = [example.prompt for example in benchmark.examples[:6]]
    rows.write_text("\n".join(json.dumps({"prompt": prompt, "answer": "x"}) for prompt in taken))
    asked = TaskSettings(source=str(rows), num_prompts=2)
    guards, (left,) = find_guards([asked], [benchmark], NOTHING_ALLOWED)
    assert len(guards[asked].prompts) == 2
    assert left.examples == benchmark.examples[6:]
