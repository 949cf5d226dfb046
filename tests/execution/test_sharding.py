"""Which units each of several commands does."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backmerge.errors import ConfigError
from backmerge.execution import Shard, shard_of

KEYS = st.lists(st.text(max_size=4), unique=True, max_size=40)


@given(KEYS, st.integers(1, 12))
def test_every_unit_is_in_one_shard(keys: list[str], num_shards: int) -> None:
    """The shards are disjoint, cover all, and differ in size by one at most."""
    shards = [shard_of(keys, Shard(number, num_shards)) for number in range(1, num_shards + 1)]
    assert sorted(key for shard in shards for key in shard) == sorted(keys)
    sizes = [len(shard) for shard in shards]
    assert max(sizes) - min(sizes) <= 1


@given(KEYS.flatmap(lambda keys: st.tuples(st.just(keys), st.permutations(keys))))
def test_the_order_of_the_keys_does_not_matter(two: tuple[list[str], list[str]]) -> None:
    """Two commands that list the units differently cut them alike."""
    keys, shuffled = two
    assert shard_of(shuffled + keys, Shard(2, 3)) == shard_of(keys, Shard(2, 3))


@pytest.mark.parametrize(("text", "shard"), [("1/1", (1, 1)), ("3/8", (3, 8)), ("08/8", (8, 8))])
def test_a_shard_is_read(text: str, shard: tuple[int, int]) -> None:
    """As Slurm's own variables give it."""
    assert Shard.parsed(text) == shard


@pytest.mark.parametrize("text", ["0/4", "5/4", "4", "/4", "1/", "-1/4", "1/4/2", "a/b", "1 / 4", ""])
def test_what_is_no_shard_is_refused(text: str) -> None:
    """Counted from 1, to n."""
    with pytest.raises(ConfigError, match="expected i/n"):
        Shard.parsed(text)
