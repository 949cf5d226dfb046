"""A user's own prompts, from a file of rows."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from backmerge.benchmarks.matching import final_number, json_equal, pattern_match
from backmerge.benchmarks.metrics import BertScoreF1, PerAnswer, Together
from backmerge.benchmarks.openfunctions import call_match
from backmerge.benchmarks.protocol import Benchmark, BenchmarkSettings, Kind, Metric, Scorer
from backmerge.errors import ConfigError, DataError
from backmerge.progress import say
from backmerge.records import Example, Message
from backmerge.registry import closest
from backmerge.rows import Row, sound_rows

PROMPT_COLUMNS = ("prompt", "goal", "question", "instruction", "input", "query", "behavior")
REFERENCE_COLUMNS = ("reference", "answer", "completion", "output", "response", "expected")
CATEGORY_COLUMNS = ("category", "type", "semantic_category")
DEFAULT_MAX_NEW_TOKENS = 512


def exact_match(example: Example, answer: str) -> float:
    """1 if the answer equals the reference, apart from white space at the ends and letter case."""
    return float(answer.strip().casefold() == (example.reference or "").strip().casefold())


def contains_reference(example: Example, answer: str) -> float:
    """1 if the reference occurs in the answer, ignoring letter case."""
    return float((example.reference or "").strip().casefold() in answer.casefold())


METRICS: Mapping[str, Metric] = {
    "exact_match": exact_match,
    "contains_reference": contains_reference,
    "json_equal": json_equal,
    "final_number": final_number,
    "call_match": call_match,
}
DEFAULT_METRICS = ("exact_match", "contains_reference")


def from_file(path: Path, kind: Kind, settings: BenchmarkSettings | None = None) -> Benchmark:
    """Make a benchmark from a user's own prompts.

    The prompt is taken from the first of the columns `prompt`, `goal`, `question`, `instruction`, `input`, `query`,
    `behavior`; for utility the expected answer from `reference`, `answer`, `completion`, `output`, `response`,
    `expected`; a stratum, if there is one, from `category`, `type`, `semantic_category`. Rows with the same `cluster`
    are kept together; without that column, clusters are found from the words. `system` and `id` are used if present.

    Worked example, a line of JSON Lines for utility: `{"prompt": "What is 2 + 3?", "answer": "5"}`, scored by
    `exact_match` (which λ is chosen on) and `contains_reference` unless the settings name other metrics.

    Raises:
        DataError: the file is missing, has no prompt column, or a row lacks what it needs; names the line.
        ConfigError: a metric does not exist.
    """
    rows = list(sound_rows(path))
    if not rows:
        raise DataError(f"{path} contains no rows", remedy="write one prompt per line.")
    rows = of_side(rows, kind, path, settings.options.get("harmful", ()) if settings is not None else ())
    examples = tuple(_example(row, needs_reference=kind == "utility") for row in rows)
    repeated = len(examples) - len({example.id for example in examples})
    if repeated:
        raise DataError(f"{path} uses {repeated} ids more than once", remedy="make `id` unique, or remove it.")
    settings = settings or BenchmarkSettings(name=str(path))
    scorer = _scorer(settings) if kind == "utility" else None
    is_graded = scorer is not None and "graded" in settings.metrics
    return Benchmark(path.stem, kind, examples, DEFAULT_MAX_NEW_TOKENS, scorer, scorer_asks_judge=is_graded)


def prompts_of(path: str | Path, stem: str, columns: Sequence[str]) -> tuple[Example, ...]:
    """Return a published data set's prompts from a copy of its file, from the first of the columns that a row has.

    Raises:
        DataError: the file is missing, or a row has none of the columns; names the line.
    """
    examples: list[Example] = []
    for row in sound_rows(path):
        prompt = _text(row, columns)
        if prompt is None:
            raise DataError(
                f"{row.place}: no text under {' or '.join(columns)}",
                remedy="give the file as its authors published it.",
            )
        category = _text(row, CATEGORY_COLUMNS)
        examples.append(Example(f"{stem}-{len(examples)}", (Message("user", prompt),), category=category))
    if not examples:
        raise DataError(f"{path} contains no rows", remedy="give the file as its authors published it.")
    return tuple(examples)


def _scorer(settings: BenchmarkSettings) -> Scorer:
    names = settings.metrics or DEFAULT_METRICS
    options = dict(settings.options)
    scorers: list[Scorer] = []
    for name in names:
        if name in METRICS:
            scorers.append(PerAnswer({name: METRICS[name]}))
        elif name == "pattern_match":
            pattern = options.pop("pattern", None)
            scorers.append(PerAnswer({name: pattern_match(pattern)}, identity=f"1:{pattern}"))
        elif name == "bertscore":
            from backmerge.benchmarks.bertscore import DEFAULT_MODEL, BertScorer

            scorers.append(BertScoreF1(BertScorer(options.pop("model", DEFAULT_MODEL), options.pop("layer", None))))
        elif name == "graded":
            from backmerge.benchmarks.graded import Graded

            scorers.append(Graded(options.pop("judge", {})))
        else:
            known = (*METRICS, "pattern_match", "bertscore", "graded")
            raise ConfigError(f"unknown metric '{name}'{closest(name, known)}", remedy=f"known: {', '.join(known)}.")
    if options:
        raise ConfigError(
            f"{settings.name}: unknown options {', '.join(options)}",
            remedy="pattern goes with the metric pattern_match, model and layer with bertscore, judge with graded.",
        )
    return Together(*scorers)


def _example(row: Row, *, needs_reference: bool) -> Example:
    def text(*columns: str) -> str | None:
        return _text(row, columns)

    prompt = text(*PROMPT_COLUMNS)
    if prompt is None:
        raise DataError(
            f"{row.place}: no prompt in the columns {sorted(str(key) for key in row.values)}",
            remedy=f"call it one of: {', '.join(PROMPT_COLUMNS)}.",
        )
    if not text("prompt", "goal", "question") and text("instruction") and text("input"):
        raise DataError(
            f"{row.place}: both 'instruction' and 'input' have a text, but only one of them can be the prompt",
            remedy="join the two, as in training, in a column named 'prompt'.",
        )
    reference = text(*REFERENCE_COLUMNS)
    if needs_reference and reference is None:
        raise DataError(
            f"{row.place}: no expected answer in the columns {sorted(str(key) for key in row.values)}",
            remedy=f"call it one of: {', '.join(REFERENCE_COLUMNS)}.",
        )
    system = text("system")
    messages = (*((Message("system", system),) if system else ()), Message("user", prompt))
    return Example(text("id") or row.id, messages, reference, text(*CATEGORY_COLUMNS), text("cluster"))


def _text(row: Row, columns: Sequence[str]) -> str | None:
    """Return the first of the columns with more than white space.

    Raises:
        DataError: it is not a text, or one that cannot be written to a file again.
    """
    # published files also use Goal and Behavior
    held = {str(key).casefold(): value for key, value in row.values.items() if value is not None and str(value).strip()}
    name = next((name for name in columns if name in held), None)
    if name is None:
        return None
    value = held[name]
    if isinstance(value, list | dict):
        raise DataError(
            f"{row.place}: '{name}' is a {'list' if isinstance(value, list) else 'mapping'}, not a text",
            remedy="give one text; several right answers need your own benchmark.",
        )
    text = str(value)
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise DataError(
            f"{row.place}: '{name}' contains half of a surrogate pair, which UTF-8 files cannot store",
            remedy="write the character itself, or both halves of its escape.",
        )
    return text


def rows_of_hub(title: str, repository: str, split: str = "train", config: str | None = None) -> Sequence[Any]:
    """Return all rows of a data set's split.

    Raises:
        DataError: the hub cannot be reached and the data set is not in its cache; or it is gated.
    """
    from datasets import load_dataset

    try:
        rows: Sequence[Any] = load_dataset(repository, config, split=split)
    except (OSError, ValueError) as error:  # datasets raises both if a download fails
        raise _out_of_reach(title, error) from error
    return rows


def data_rows(
    data: str | None, title: str, repository: str, split: str = "train", config: str | None = None
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield all rows of a user's own copy if `data` names one, else of the hub's, each with its place for messages.

    Raises:
        DataError: the copy cannot be read; or see `rows_of_hub`.
    """
    if data is not None:
        yield from ((row.place, row.values) for row in sound_rows(data))
        return
    for number, row in enumerate(rows_of_hub(title, repository, split, config), start=1):
        yield f"{title}, row {number}", row


def folder_of_hub(title: str, repository: str, pattern: str) -> Path:
    """Return the files of a data set whose names match a pattern.

    Raises:
        DataError: see `rows_of_hub`.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, repo_type="dataset", allow_patterns=pattern))
    except (OSError, ValueError) as error:
        raise _out_of_reach(title, error) from error


def _out_of_reach(title: str, error: Exception) -> DataError:
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return DataError(
        f"{title} could not be downloaded from the hub: {reason}",
        remedy="give your own copy of its data, as NAME=FILE; for a gated data set, set HF_TOKEN once you have access.",
    )


HARMFUL = frozenset(
    {"unsafe", "harmful", "toxic", "malicious", "unsafe_prompt", "vanilla_harmful", "adversarial_harmful"}
)
HARMLESS = frozenset({"safe", "harmless", "benign", "non-toxic", "nontoxic", "vanilla_benign", "adversarial_benign"})
CONTRAST = "contrast_"  # prefix of XSTest's types for harmful prompts that are worded like harmless ones
FLAGS = {"harmful": True, "is_harmful": True, "unsafe": True, "safe": False, "is_safe": False, "benign": False}
TRUTHS = {"true": True, "1": True, "1.0": True, "yes": True, "false": False, "0": False, "0.0": False, "no": False}
SHOWN = 5


def of_side(rows: Sequence[Row], kind: Kind, path: Path, harmful: Collection[str] = ()) -> list[Row]:
    """Return the rows that belong to a kind of benchmark, and print how many were left out.

    Known labels: XSTest's own file (`label` is safe or unsafe; `type` begins with `contrast_` for the unsafe ones), and
    columns `label` or `type` with the words above, or `harmful`, `is_harmful`, `safe`, `is_safe` with a truth value. A
    column `type` with other words is a category.

    Args:
        rows: All rows of a file.
        kind: `safety` uses the harmful ones, `over_refusal` the harmless ones; all others use all.
        path: The file, for messages.
        harmful: Values of the column `label` that mark a harmful prompt, if the user lists them; all others are
            harmless.

    Raises:
        DataError: `label` has values with an unknown meaning, or no row is of the kind.
    """
    if kind not in ("safety", "over_refusal"):
        return list(rows)
    marks = [_is_harmful(row, frozenset(map(str, harmful))) for row in rows]
    if any(_is_contrast(row) for row in rows):  # XSTest's types: all others are harmless
        marks = [_is_contrast(row) if mark is None else mark for row, mark in zip(rows, marks, strict=True)]
    unknown = sorted({str(_value(row, "label")) for row, mark in zip(rows, marks, strict=True) if mark is None})
    if all(mark is None for mark in marks) and all(_value(row, "label") is None for row in rows):
        return list(rows)
    if any(mark is None for mark in marks):
        raise DataError(
            f"{path}: are rows with the label {', '.join(unknown[:SHOWN])} harmful or harmless? Only "
            f"{'harmful' if kind == 'safety' else 'harmless'} ones are used here",
            remedy="list the values that mean harmful in the benchmark's options, such as "
            f"--set 'evaluate.{kind}.0.options.harmful=[...]', or rename the column to 'category' if it means neither.",
        )
    wanted = kind == "safety"
    kept = [row for row, mark in zip(rows, marks, strict=True) if mark is wanted]
    word = "harmful" if wanted else "harmless"
    if not kept:
        raise DataError(f"{path} has no {word} prompts, by its labels", remedy=f"give a file of {word} prompts.")
    if len(kept) < len(rows):
        say(f"{path.name}: only {len(kept)} of its {len(rows)} prompts are used: the {word} ones, by their labels.")
    return kept


def _value(row: Row, name: str) -> Any:
    found = next((value for key, value in row.values.items() if str(key).strip().casefold() == name), None)
    return None if found is None or not str(found).strip() else found


def _is_contrast(row: Row) -> bool:
    return str(_value(row, "type") or "").strip().casefold().startswith(CONTRAST)


def _is_harmful(row: Row, harmful: Collection[str]) -> bool | None:
    label = _value(row, "label")
    if harmful and label is not None:
        return str(label) in harmful
    for name in ("label", "type"):
        word = str(_value(row, name) or "").strip().casefold()
        if word in HARMFUL or word in HARMLESS:
            return word in HARMFUL
    for name, means_harmful in FLAGS.items():
        truth = TRUTHS.get(str(_value(row, name)).strip().casefold())
        if truth is not None:
            return truth is means_harmful
    return None
