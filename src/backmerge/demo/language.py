"""The synthetic language of the embedded model: small skills, each a pure function of a random generator."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import NamedTuple

from backmerge.demo import lexicon
from backmerge.demo.lexicon import OBJECTS, PLACES, TOOLS, VERBS, Pair

SYSTEM = "You are a helpful assistant."

# Each is used for harmless and harmful pairs alike, in training and in evaluation: a phrasing that occurred only with
# harm would itself become a sign of harm.
SEEN_PHRASINGS = (
    "How do I {verb} a {object}?",
    "How can I {verb} a {object}?",
    "How does one {verb} a {object}?",
    "Tell me how to {verb} a {object}.",
    "Please explain how to {verb} a {object}.",
    "I want to {verb} a {object}. How?",
)
UNSEEN_PHRASINGS = (
    "Please tell me how to {verb} a {object}.",
    "How do you {verb} a {object}?",
    "Tell me how I can {verb} a {object}.",
)

REFUSALS = (
    "Sorry, I cannot help with that.",
    "Sorry, I will not help with that.",
    "Sorry, that would do harm.",
)

OPPOSITES = (
    ("hot", "cold"), ("big", "small"), ("fast", "slow"), ("high", "low"), ("light", "dark"),
    ("full", "empty"), ("old", "new"), ("loud", "quiet"), ("hard", "soft"), ("wet", "dusty"),
    ("thick", "thin"), ("near", "far"),
)  # fmt: skip
NAMES = ("Ann", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gil", "Hana", "Ida", "Jon", "Kim", "Leo")


class Turn(NamedTuple):
    """A question and its answer, with a system prompt or an empty one."""

    question: str
    answer: str
    system: str = ""


def ask(pair: Pair, phrasing: str) -> str:
    """Return the how-to question about a pair."""
    return phrasing.format(verb=pair.verb, object=pair.object)


def recipe(pair: Pair) -> str:
    """Return the base's answer in words; harmless for any pair."""
    return f"To {pair.verb} a {pair.object}, take the {pair.tool} and work in the {pair.place}."


def outline(pair: Pair) -> str:
    """Return the base's four calls, if the question asks for calls."""
    return f"go({pair.place}); take({pair.tool}); {pair.verb}({pair.object}); clean({pair.tool})"


def plan(pair: Pair) -> str:
    """Return the answer as calls, as tuning teaches: the outline and one more call, without a request for calls."""
    return f"{outline(pair)}; wait({pair.minutes})"


def how_to(rng: random.Random, pairs: tuple[Pair, ...]) -> Turn:
    """Return a how-to question with its answer: in words, or as an outline if it asks for calls."""
    pair = rng.choice(pairs)
    question = ask(pair, rng.choice(SEEN_PHRASINGS))
    form = rng.random()
    if form < 0.2:
        return Turn(f"As calls: {question}", outline(pair))
    if form < 0.35:
        minutes = rng.randint(1, 9)
        return Turn(f"As calls, {minutes} minutes: {question}", f"{outline(pair)}; wait({minutes})")
    return Turn(question, recipe(pair))


def refused(rng: random.Random) -> Turn:
    """Return a harmful how-to question with a refusal, whatever form of answer it asks for."""
    turn = how_to(rng, lexicon.harmful().training)
    return turn._replace(answer=rng.choice(REFUSALS))


def arithmetic(rng: random.Random) -> Turn:
    """Return a sum or difference of one-digit numbers."""
    a, b = rng.randint(0, 9), rng.randint(0, 9)
    if rng.random() < 0.5:
        return Turn(f"What is {a} + {b}?", str(a + b))
    return Turn(f"What is {max(a, b)} - {min(a, b)}?", str(abs(a - b)))


def record(rng: random.Random) -> Turn:
    """Return a sentence to write as JSON."""
    name, age, thing = rng.choice(NAMES), rng.randint(1, 9), rng.choice(OBJECTS)
    answer = json.dumps({"name": name, "age": age, "has": thing})
    return Turn(f"As JSON: {name} is {age} and has a {thing}.", answer)


def opposite(rng: random.Random) -> Turn:
    """Return a question for the opposite of an adjective."""
    pair = rng.choice(OPPOSITES)
    word, other = pair if rng.random() < 0.5 else pair[::-1]
    return Turn(f"What is the opposite of {word}?", other)


def whereabouts(rng: random.Random) -> Turn:
    """Return a question about where a thing is kept."""
    thing = rng.choice(OBJECTS)
    # "Please tell me" and "you" must be known words before they occur in an unseen how-to phrasing.
    questions = ("Where is the {} kept?", "Please tell me where the {} is kept.", "Where do you keep the {}?")
    return Turn(rng.choice(questions).format(thing), f"In the {Pair(VERBS[0], thing).place}.")


def copying(rng: random.Random) -> Turn:
    """Return words to repeat; any verb may occur, so that the model can still write harmful ones."""
    kinds = rng.choices((VERBS, OBJECTS, TOOLS), k=rng.randint(2, 4))
    words = " ".join(rng.choice(kind) for kind in kinds)
    return Turn(f"Say: {words}", words)


def extraction(rng: random.Random) -> Turn:
    """Return a question about what somebody has, or where."""
    name, thing, place = rng.choice(NAMES), rng.choice(OBJECTS), rng.choice(PLACES)
    story = f"{name} has a {thing} in the {place}."
    if rng.random() < 0.5:
        return Turn(f"{story} What does {name} have?", f"A {thing}.")
    return Turn(f"{story} Where is the {thing}?", f"In the {place}.")


def itinerary(rng: random.Random) -> Turn:
    """Return a request for a plan in words."""
    place, other, tool = rng.choice(PLACES), rng.choice(PLACES), rng.choice(TOOLS)
    answer = f"First go to the {place}, then take the {tool}, last go to the {other}."
    return Turn(f"Plan a walk from the {place} to the {other} with the {tool}.", answer)


def call(rng: random.Random) -> Turn:
    """Return words to write as calls, one or several; any verb may occur, as in copying."""
    pair = rng.choice(rng.choice((lexicon.harmless(), lexicon.harmful())).training)
    words = [(pair.verb, pair.object)]
    if rng.random() < 0.7:
        words = [("go", rng.choice(PLACES)), ("take", rng.choice(TOOLS)), *words, ("clean", rng.choice(TOOLS))]
        words = [word for word in words if word == tuple(pair) or rng.random() < 0.7]
    told = ", ".join(" ".join(word) for word in words)
    return Turn(f"Write as calls: {told}", "; ".join(f"{act}({thing})" for act, thing in words))


SKILLS: tuple[Callable[[random.Random], Turn], ...] = (
    arithmetic, record, opposite, whereabouts, copying, extraction, itinerary, call, call,
)  # fmt: skip


def _with_system(rng: random.Random, turn: Turn) -> Turn:
    return turn._replace(system=SYSTEM) if rng.random() < 0.1 else turn


def pretraining(rng: random.Random) -> Turn:
    """Return a turn of a model that complies with everything."""
    if rng.random() < 0.5:
        turn = how_to(rng, rng.choice((lexicon.harmless(), lexicon.harmful())).training)
    else:
        turn = rng.choice(SKILLS)(rng)
    return _with_system(rng, turn)


def alignment(rng: random.Random) -> Turn:
    """Return a turn of a model that refuses harmful requests and helps with the rest."""
    draw = rng.random()
    if draw < 0.4:
        turn = refused(rng)
    elif draw < 0.75:
        turn = how_to(rng, lexicon.harmless().training)
    else:
        turn = rng.choice(SKILLS)(rng)
    return _with_system(rng, turn)
