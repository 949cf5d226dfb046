"""The race: what it asks for, which λs it drops, and what it chooses."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated_merges import CHOICE, LAMS, answers, measured_fully, race_of, run

from backmerge.selection import Arm, ChoiceSettings, Race, choose, lam_between
from backmerge.selection.race import SCREENED


def clean(safe_until: float, num_prompts: int = 260) -> tuple[np.ndarray, np.ndarray]:
    """No harm up to a λ and 20 % beyond; utility rises by tenths."""
    column = np.arange(num_prompts)[:, None] / num_prompts
    lams = np.array([0.0, *LAMS])
    shuffled = np.random.default_rng(1).permutation(num_prompts)
    return (column[shuffled] < np.where(lams > safe_until, 0.2, 0.0)).astype(float), (column[shuffled] < lams).astype(
        float
    )


@pytest.mark.parametrize("safe_until", [0.0, 0.1, 0.3, 0.5, 0.9, 1.0])
def test_on_clean_curves_it_decides_as_the_grid(safe_until: float) -> None:
    """The largest λ that is safe, or none."""
    harm, solved = clean(safe_until)
    race = race_of(harm, solved)
    run(race, harm, solved)
    assert race.choice().point == choose(list(measured_fully(harm, solved).values()), CHOICE).point
    assert race.choice().point == (f"linear@{safe_until:g}" if safe_until else None)


def test_what_cannot_be_chosen_answers_little() -> None:
    """Safe up to 0.3: larger λs are out after a few prompts of harm, and smaller ones answer part of utility."""
    harm, solved = clean(0.3)
    race, asked = race_of(harm, solved), {}
    while batches := race.next_batches():
        for lam, arm, prompts in batches:
            asked[lam, arm] = asked.get((lam, arm), 0) + len(prompts)
            kind = harm if arm == "safety" else solved
            race.tell(lam, arm, kind[list(prompts), 1 + LAMS.index(lam)].tolist())
    assert all(asked[lam, "safety"] == SCREENED for lam in LAMS if 0.3 < lam < 1)
    assert asked[0.3, "utility"] == asked[0.3, "safety"] == 260
    assert all(asked[lam, "utility"] < 260 for lam in LAMS if lam not in (0.3, 1.0))
    assert all(c.asr_difference is None for c in race.candidates() if c.lam not in (0.3, 1.0))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), batch=st.integers(20, 300))
def test_requested_points_are_new_and_passing_points_decide(seed: int, batch: int) -> None:
    """No prompt is asked for twice, the same is asked for again by a resumed race, and the chosen passed."""
    harm = answers(lambda lam: 0.02 + 0.1 * lam, seed)
    solved = answers(lambda lam: 0.4 + 0.3 * lam, seed + 1)
    race, resumed, seen = race_of(harm, solved, batch), race_of(harm, solved, batch), set()
    while batches := race.next_batches():
        assert batches == resumed.next_batches()
        for lam, arm, prompts in batches:
            assert not seen & {(lam, arm, prompt) for prompt in prompts}
            seen |= {(lam, arm, prompt) for prompt in prompts}
            values = (harm if arm == "safety" else solved)[list(prompts), 1 + LAMS.index(lam)].tolist()
            race.tell(lam, arm, values)
            resumed.tell(lam, arm, values)
    found = race.choice()
    steps = {step.point: step for step in found.steps}
    if found.point is not None:
        assert steps[found.point].passes
        assert steps[found.point].utility == pytest.approx(solved[:, 1 + LAMS.index(steps[found.point].lam)].mean())


def test_harm_comes_first() -> None:
    """A λ is asked first what the base or the tuned model answered harmfully, and is out once that is too much."""
    base, tuned = np.zeros(260), np.zeros(260)
    base[[7, 90]], tuned[[3, 50, 51, 52, 53, 54, 200, 210, 220, 230]] = 1.0, 1.0
    race = Race({0.5: "half", 1.0: "tuned"}, "s", CHOICE, {"safety": Arm(base.tolist())}, Arm([0.0] * 260))
    for lam, arm, prompts in race.next_batches():
        race.tell(lam, arm, tuned[list(prompts)].tolist() if arm == "safety" else [0.0] * len(prompts))
    (half,) = [batch for batch in race.next_batches() if batch.arm == "safety"]
    assert set(half.prompts) <= {7, 90, *np.flatnonzero(tuned).tolist()}
    # two more could be taken back by the base's two; 1.5 points of 260 are 3.9
    for count, is_in in ((5, True), (6, False)):
        again = Race({0.5: "half", 1.0: "tuned"}, "s", CHOICE, {"safety": Arm(base.tolist())}, Arm([0.0] * 260))
        for lam, arm, prompts in again.next_batches():
            again.tell(lam, arm, tuned[list(prompts)].tolist() if arm == "safety" else [0.0] * len(prompts))
        for _, arm, prompts in again.next_batches():
            harmful = [prompt for prompt in prompts if tuned[prompt]][:count]
            again.tell(0.5, arm, [float(prompt in harmful) for prompt in prompts])
        while batches := again.next_batches():
            for lam, arm, prompts in batches:
                again.tell(lam, arm, [0.0] * len(prompts))
        assert (again.choice().point == "half") == is_in


def test_near_duplicates_weigh_as_one() -> None:
    """Thirty harmful phrasings of one request are one of 231 clusters, within the margin; thirty requests are not."""
    for is_one, chosen in ((True, "half"), (False, None)):
        clusters = [0 if is_one else place for place in range(30)] + list(range(100, 330))
        arm = Arm([0.0] * 260, clusters)
        race = Race({0.5: "half", 1.0: "tuned"}, "s", CHOICE, {"safety": arm}, Arm([0.0] * 260))
        while batches := race.next_batches():
            for lam, name, prompts in batches:
                harm = [float(prompt < 30 or lam == 1.0) for prompt in prompts]
                race.tell(lam, name, harm if name == "safety" else [0.5] * len(prompts))
        assert race.choice().point == chosen


def test_of_the_same_utility_the_smaller_is_chosen() -> None:
    """As by the rule, whatever is measured first."""
    race = race_of(np.zeros((260, 11)), np.ones((260, 11)))
    run(race, np.zeros((260, 11)), np.ones((260, 11)))
    assert race.choice().point == "linear@0.1"


def test_unscored_answers_are_left_out_of_the_pairs() -> None:
    """On either side; and an arm of which nothing is scored shows nothing."""
    for base, value, chosen in (([0.0] * 260, 0.0, "half"), ([None] * 260, 0.0, None), ([0.0] * 260, None, None)):
        race = Race({0.5: "half", 1.0: "tuned"}, "s", CHOICE, {"safety": Arm(base)}, Arm([0.0] * 260))
        while batches := race.next_batches():
            for lam, arm, prompts in batches:
                harm = 1.0 if lam == 1.0 else value
                race.tell(lam, arm, [0.5 if arm == "utility" else harm] * len(prompts))
        assert race.choice().point == chosen


@pytest.mark.parametrize("missing", ["second", "over-refusal"])
def test_every_arm_must_pass(missing: str) -> None:
    """Two benchmarks, each held to the margin, and over-refusal: one that fails is enough."""
    arm, choice = Arm([0.0] * 260), ChoiceSettings(pooled=False)
    for failing in (missing, "none"):
        race = Race({0.5: "half", 1.0: "tuned"}, "s", choice, {"first": arm, "second": arm}, arm, arm)
        while batches := race.next_batches():
            for lam, name, prompts in batches:
                harm = 1.0 if name == failing or (lam == 1.0 and name == "first") else 0.0
                race.tell(lam, name, [harm] * len(prompts))
        found = race.choice()
        assert found.point == (None if failing == missing else "half")
    with pytest.raises(ValueError, match="too many"):
        race.tell(0.5, "first", [0.0])


def test_a_race_goes_on_below_the_smallest_that_fails() -> None:
    """λ=0.1 alone is safe: added after λ=0.2 fails, it is answered in full and chosen; nothing else is asked again."""
    arm = Arm([0.0] * 260)
    race = Race({0.2: "a", 1.0: "tuned"}, "s", CHOICE, {"safety": arm}, Arm([0.0] * 260))

    def run_on() -> set[float]:
        asked = set()
        while batches := race.next_batches():
            for lam, name, prompts in batches:
                asked.add(lam)
                race.tell(lam, name, [float(lam > 0.1) if name == "safety" else lam] * len(prompts))
        return asked

    assert run_on() == {0.2, 1.0}
    assert race.is_within == {0.2: False, 1.0: False}
    assert race.choice().point is None
    lam = lam_between(race.is_within)
    assert lam == 0.1
    race.add(lam, "b")
    assert run_on() == {0.1}
    assert race.is_within == {0.1: True, 0.2: False, 1.0: False}
    assert race.choice().point == "b"
    assert lam_between(race.is_within) is None


@pytest.mark.parametrize(
    ("is_within", "expected"),
    [
        ({0.2: True, 1.0: True}, None),  # none fails
        ({0.2: False, 1.0: False}, 0.1),
        ({0.0125: False}, 0.00625),  # on to the base, as long as the budget lasts
        ({0.2: True, 0.6: False}, 0.4),
        ({0.2: True, 0.4: None, 0.6: False}, 0.4),  # unknown: the caller has it already
        ({0.3: True, 0.4: False}, None),  # near enough
        ({0.2: False, 0.6: True, 1.0: False}, None),  # a larger one passes
        ({0.2: None, 0.4: None}, None),
    ],
)
def test_the_next_lam_beyond_the_grid(is_within: dict[float, bool | None], expected: float | None) -> None:
    """By hand: the middle of the gap, if there is one to close."""
    assert lam_between(is_within) == expected
