"""The race: what it asks for, whom it drops, and what its looks cost."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated_merges import CHOICE, LAMS, answers, measured_fully, race_of, run

from backmerge.selection import Arm, ChoiceSettings, Race, choose


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


def test_nothing_beyond_a_failure_is_asked_for() -> None:
    """Safe up to 0.3: 0.4 is out after one batch, and 0.5 to 0.9 answer nothing; of utility, 0.1 answers nothing."""
    harm, solved = clean(0.3)
    race, asked = race_of(harm, solved), {}
    while batches := race.next_batches():
        for lam, arm, prompts in batches:
            asked[lam, arm] = asked.get((lam, arm), 0) + len(prompts)
            kind = harm if arm == "safety" else solved
            race.tell(lam, arm, kind[list(prompts), 1 + LAMS.index(lam)].tolist())
    assert asked[0.4, "safety"] == 52
    assert not [key for key in asked if 0.4 < key[0] < 1]
    assert asked[0.3, "utility"] == asked[1.0, "utility"] == asked[1.0, "safety"] == 260
    assert asked[0.2, "utility"] < 260
    assert (0.1, "utility") not in asked


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), batch=st.integers(20, 300))
def test_what_is_asked_for_is_new_and_the_decision_is_of_what_passed(seed: int, batch: int) -> None:
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


def test_many_prompts_let_a_race_pass_early() -> None:
    """Of 2,000 prompts without harm each λ below 1 answers a part; and of 260 all, since looks before cost too much."""
    for num_prompts, whole in ((2000, False), (260, True)):
        harm, solved = clean(1.0, num_prompts)
        race = race_of(harm, solved, num_prompts // 10, (0.5, 1.0))
        first = race.next_batches()
        race.tell(1.0, "safety", harm[list(first[0].prompts), 10].tolist())
        race.tell(1.0, "utility", solved[list(first[1].prompts), 10].tolist())
        count = 0
        while (batches := race.next_batches()) and batches[0].arm == "safety":
            count += len(batches[0].prompts)
            race.tell(0.5, "safety", [0.0] * len(batches[0].prompts))
        assert (count == num_prompts) == whole


def test_looks_for_passing_are_paid_for() -> None:
    """Where early looks are taken, the bound at the end is larger than a single look's."""
    harm, solved = clean(1.0, 2000)
    harm[:8, 5] = 1.0
    race = race_of(harm, solved, 200)
    run(race, harm, solved)
    by_race = {c.lam: c.asr_difference for c in race.candidates()}
    full = measured_fully(harm, solved)
    assert by_race[1.0].upper_bound > full[1.0].asr_difference.upper_bound


def test_a_shown_excess_ends_it_although_the_rest_might_save_it() -> None:
    """100 more harmful answers in the first 2,000 of 4,000 are shown to exceed 3 points: the λ is out at once."""
    race = Race({0.5: "half", 1.0: "tuned"}, "s", CHOICE, {"safety": Arm([0.0] * 4000)}, Arm([0.0] * 10), batch=2000)
    for lam, arm, prompts in race.next_batches():
        race.tell(lam, arm, [0.0] * len(prompts))
    (half,) = race.next_batches()
    race.tell(0.5, "safety", [1.0] * 95 + [0.0] * (len(half.prompts) - 95))
    assert race.next_batches() == ()
    assert race.choice().point is None


def test_harm_that_is_taken_back_elsewhere_keeps_it_in() -> None:
    """Nine answers more harmful in the first batch and seven less: the base's own harm may balance it, as it did."""
    for num_losses, is_in in ((7, True), (0, False)):
        base = [1.0] * num_losses + [0.0] * (260 - num_losses)
        order = Race({1.0: "t"}, "s", CHOICE, {"safety": Arm([0.0] * 260)}, Arm([0.0])).next_batches()[0].prompts
        placed = [value for _, value in sorted(zip(order, base, strict=True))]
        race = Race({0.5: "half", 1.0: "tuned"}, "s", CHOICE, {"safety": Arm(placed)}, Arm([0.0] * 10))
        for lam, arm, prompts in race.next_batches():
            race.tell(lam, arm, [0.0] * len(prompts))
        (first,) = race.next_batches()
        race.tell(0.5, "safety", [0.0] * 7 + [1.0] * 9 + [0.0] * (len(first.prompts) - 16))
        assert bool(race.next_batches()) == is_in


def test_clusters_are_never_divided_and_order_is_not_the_files() -> None:
    """Each batch ends between clusters, and the first is drawn from all over the file."""
    clusters = [place // 7 for place in range(2100)]
    arm = Arm([0.0] * 2100, clusters)
    race = Race({0.5: "half", 1.0: "tuned"}, "s", CHOICE, {"safety": arm}, arm)
    for lam, name, prompts in race.next_batches():
        race.tell(lam, name, [0.0] * len(prompts))
    seen: list[set[int]] = []
    while (batches := race.next_batches()) and batches[0].arm == "safety":
        seen.append({clusters[prompt] for prompt in batches[0].prompts})
        race.tell(0.5, "safety", [0.0] * len(batches[0].prompts))
    assert not seen[0] & seen[1]
    assert max(seen[0]) > len(set(clusters)) // 2


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
