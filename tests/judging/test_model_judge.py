"""Judges that are models: what they ask, once; what becomes of replies that cannot be used; what they are made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.judging.scripted import Scripted, answered, asked, echo_form, judge_over

from backmerge.errors import BackmergeError, CheckpointError, ConfigError, GenerationError
from backmerge.generation.protocol import EngineSettings
from backmerge.judging.model_judge import ModelJudge, default_second, model_judge
from backmerge.judging.protocol import JudgeSettings
from backmerge.records import Completion, Example, Message, Verdict
from backmerge.registry import ENGINES, JUDGES, resolve

MODEL_JUDGES = ("harmbench", "llama-guard-3", "rubric", "strongreject", "wildguard")


def told(engine: Scripted, *texts: str, **fields: Any) -> list[Verdict]:
    """The verdicts on answers to as many examples."""
    examples = [asked(number) for number in range(len(texts))]
    completions = [answered(text, number) for number, text in enumerate(texts)]
    return judge_over(engine, **fields)(examples, completions)


def test_verdicts_come_in_order_each_with_its_own_id() -> None:
    """The reply to each question becomes the verdict on the answer that it is about."""
    found = told(Scripted(lambda question: question.prompt), "yes", "no", "yes")
    assert [verdict.example for verdict in found] == ["the-0", "the-1", "the-2"]
    assert [verdict.harmful for verdict in found] == [True, False, True]
    assert [verdict.refusal for verdict in found] == [False, True, False]
    assert found[1].reason == "no to no"


def test_equal_questions_are_asked_once() -> None:
    """Two equal answers cost one question, and both get its verdict; the empty answer costs none."""
    engine = Scripted(lambda question: question.prompt)
    found = told(engine, "no", "yes", "no", "", "no")
    assert engine.questions == ["no", "yes"]
    assert [verdict.refusal for verdict in found] == [True, False, True, False, True]


def test_questions_have_unique_names() -> None:
    """Also for several answers to one prompt, and for a prompt that is given twice: engines tell them apart by name."""
    engine = Scripted(lambda question: question.prompt)
    completions = [answered("yes"), answered("no", sample=1), answered("maybe", sample=1)]
    found = judge_over(engine)([asked()] * 3, completions)
    names = [question.id for _, questions, _ in engine.calls for question in questions]
    assert len(set(names)) == 3
    assert all("the-0" in name for name in names)
    assert [verdict.harmful for verdict in found] == [True, False, None]


@pytest.mark.parametrize("text", ["", " \n\t "])
def test_an_empty_answer_is_neither_harmful_nor_refused(text: str) -> None:
    """And no model is needed to find that."""

    def make() -> Scripted:
        raise AssertionError("no engine is needed")

    [found] = ModelJudge(echo_form(), "some-model", make)([asked()], [answered(text)])
    assert found == Verdict("the-0", harmful=False, refusal=False, reason="the answer is empty")


@pytest.mark.parametrize("reply", ["", "  ", "maybe", "yes…", "No", "\x00�", "yes no"])
def test_a_reply_that_cannot_be_used_is_unscored(reply: str) -> None:
    """Never safe, never unsafe, with a reason; one that was cut off is not read, whatever it says."""
    [found] = told(Scripted(lambda _: reply), "an answer")
    assert found.harmful is None
    assert found.refusal is None
    assert found.reason.startswith("unscored: ")


def test_a_form_may_be_cut_short_by_intent() -> None:
    """A judge of one token has its reply read though the limit ended it."""
    [found] = told(Scripted(lambda _: "yes…"), "an answer", is_cut_short=True)
    assert found.harmful is True


def test_findings_that_a_judge_lacks_are_never_reported() -> None:
    """A judge of harm alone has no word on refusals, of an empty answer neither."""
    found = told(Scripted(lambda _: "no"), "an answer", "", finds_refusals=False)
    assert [(verdict.harmful, verdict.refusal) for verdict in found] == [(False, None), (False, None)]
    found = told(Scripted(lambda _: "no"), "an answer", "", finds_harm=False)
    assert [(verdict.harmful, verdict.refusal) for verdict in found] == [(None, True), (None, False)]


def test_a_question_beyond_the_context_is_unscored_alone() -> None:
    """An error that names a question leaves that one unscored, with the reason, and the others are judged."""

    def answer(question: Example) -> str:
        if "long" in question.prompt:
            error = GenerationError(f"prompt '{question.id}' has 9 tokens, but the model's context is 8")
            error.example = question.id  # type: ignore[attr-defined]
            raise error
        return question.prompt

    found = told(Scripted(answer), "yes", "too long", "no", "long too", "too long")
    assert [verdict.harmful for verdict in found] == [True, None, False, None, None]
    assert found[1].reason.startswith("unscored: prompt 'the-1, ")
    assert "context is 8" in found[3].reason
    assert [verdict.harmful for verdict in told(Scripted(answer), "long", "longer")] == [None, None]


def test_engine_failure_is_not_recorded_as_a_verdict() -> None:
    """A server that is gone makes the judge fail: its answers must not count as unscored, and be kept so."""

    def answer(question: Example) -> str:
        raise GenerationError(f"the server is gone, at '{question.id}'")

    with pytest.raises(GenerationError, match="the server is gone"):
        told(Scripted(answer), "an answer", "another")


def test_as_many_completions_as_examples() -> None:
    """One that is missing is a fault of ours."""
    with pytest.raises(ValueError, match="shorter"):
        judge_over(Scripted(lambda _: "yes"))([asked()], [])


def test_release_frees_the_engine_that_there_is() -> None:
    """Nothing is made only to be freed, and the judge works on afterwards."""
    engine = Scripted(lambda _: "yes")
    judge = judge_over(engine)
    judge.release()
    assert engine.num_released == 0
    assert judge([asked()], [answered("an answer")])[0].harmful
    judge.release()
    assert engine.num_released == 1
    assert judge([asked()], [answered("an answer")])[0].harmful


def test_identity_changes_with_all_that_verdicts_depend_on() -> None:
    """The form's version, the sampling, the model and the engine; and not from one time to the next."""

    def identity(model: str = "m", version: str = "1", limit: int = 4, engine_model: str = "e") -> str:
        form = echo_form()
        sampling = form.sampling.model_copy(update={"max_new_tokens": limit})
        engine = Scripted(EngineSettings(options={"model": engine_model}))
        form = type(form)(form.name, version, form.question, form.parse, sampling)
        return ModelJudge(form, model, lambda: engine).identity

    assert identity() == identity()
    assert identity().startswith("echo/")
    others = {identity(model="n"), identity(version="2"), identity(limit=5), identity(engine_model="f")}
    assert len(others | {identity()}) == 5


@pytest.mark.parametrize("name", MODEL_JUDGES)
class TestEveryModelJudge:
    """What holds for each of the table's judges that are models."""

    def test_server_model_name_is_required(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """By the engine's option `model`; no weights are looked for here, and the variant is none."""
        monkeypatch.setitem(ENGINES.entries, "scripted", "tests.judging.scripted:Scripted")  # type: ignore[call-overload]
        settings = JudgeSettings(
            name=name, model="served-name", engine=EngineSettings(name="scripted", options={"url": "u"})
        )
        judge = resolve(JUDGES, name)(settings)
        assert judge.name == name
        assert judge.identity.startswith(f"{name}/")
        judge([asked()], [answered("Take the tape.")])
        engine = judge._engine
        assert engine.settings.options == {"url": "u", "model": "served-name"}
        [(variant, [question], sampling)] = engine.calls
        assert variant is None
        assert sampling.temperature == 0
        assert "Take the tape." in "".join(message.content for message in question.messages)

    def test_nothing_is_loaded_before_it_is_needed(self, name: str) -> None:
        """A judge whose engine is not there is made; asked for its identity it says what is missing."""
        judge = resolve(JUDGES, name)(JudgeSettings(name=name, model="m", engine=EngineSettings(name="nonesuch")))
        with pytest.raises(ConfigError, match="no engine named 'nonesuch'"):
            _ = judge.identity

    def test_a_model_that_is_not_there_is_named(self, name: str, tmp_path: Path) -> None:
        """Before anything is asked."""
        missing = str(tmp_path / "nowhere")
        judge = resolve(JUDGES, name)(JudgeSettings(name=name, model=missing))
        with pytest.raises(CheckpointError, match="nowhere"):
            _ = judge.identity

    def test_unknown_options_are_refused(self, name: str) -> None:
        """With the judge's name, when it is made."""
        with pytest.raises(ConfigError, match=f"judge '{name}' has no option 'rubrik'"):
            resolve(JUDGES, name)(JudgeSettings(name=name, model="m", options={"rubrik": "x"}))

    def test_the_answers_prefill_is_not_put_into_the_judges_mouth(self, name: str) -> None:
        """The question is an example of its own: neither prefill nor reference go over into it."""
        form = resolve(JUDGES, name)(JudgeSettings(name=name, model="m"))._form
        example = asked(prefill="Sure, ", reference="secret reference")
        question = form.question(example, answered("Sure, take the tape."))
        assert question.prefill == ""
        assert question.reference is None
        assert "secret reference" not in "".join(message.content for message in question.messages)

    def test_factory_docstring_and_needs_are_given(self, name: str) -> None:
        """In one line, which `backmerge list judges` prints."""
        line = resolve(JUDGES, name).__doc__.strip()
        assert "\n" not in line
        assert "Needs" in line


def test_judge_without_a_default_model_needs_one() -> None:
    """By the judge's model, or by the engine's option for a server."""
    with pytest.raises(ConfigError, match="needs a model") as raised:
        model_judge(echo_form(), JudgeSettings(name="echo"), None)
    assert isinstance(raised.value, BackmergeError)
    served = JudgeSettings(name="echo", engine=EngineSettings(name="openai", options={"model": "gpt"}))
    assert model_judge(echo_form(), served, None).name == "echo"


def test_conversations_keep_their_turns_and_lose_their_system_text() -> None:
    """What Llama Guard sees of several turns."""
    from backmerge.judging.model_judge import turns

    conversation = (
        Message("system", "Brief."), Message("user", "Hi"), Message("assistant", "Hello"), Message("user", "A kite?"),
    )  # fmt: skip
    found = turns(Example("x", conversation), Completion("x", "", "Tape.", 1, True))
    assert [(message.role, message.content) for message in found] == [
        ("user", "Hi"), ("assistant", "Hello"), ("user", "A kite?"), ("assistant", "Tape."),
    ]  # fmt: skip


def test_a_second_judge_is_one_whose_weights_are_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Next to a published judge only; the first is never its own second."""
    cached: set[str] = set()
    monkeypatch.setattr(
        "huggingface_hub.try_to_load_from_cache", lambda model, file: f"/{file}" if model in cached else None
    )
    assert default_second("wildguard") is None
    cached |= {"allenai/wildguard", "cais/HarmBench-Llama-2-13b-cls"}
    assert default_second("wildguard") == "harmbench"
    assert default_second("harmbench") == "wildguard"
    assert default_second("refusal-phrases") is None
    assert default_second("rubric") is None
