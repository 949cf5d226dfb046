"""Which units a command does of several that share a run directory, as the jobs of a Slurm array do."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from backmerge.errors import ConfigError


class Shard(NamedTuple):
    """One part of the units.

    Attributes:
        number: From 1 to `num_shards`.
        num_shards: How many parts there are.
    """

    number: int
    num_shards: int

    @classmethod
    def parsed(cls, text: str) -> Shard:
        """From `i/n`, i counted from 1.

        Raises:
            ConfigError: it is something else.
        """
        number, slash, num_shards = text.partition("/")
        if not (slash and number.isdecimal() and num_shards.isdecimal() and 1 <= int(number) <= int(num_shards)):
            raise ConfigError(
                f"--shard {text}: expected i/n, with i from 1 to n", remedy="for example --shard 1/8, to --shard 8/8."
            )
        return cls(int(number), int(num_shards))


def shard_of(keys: Iterable[str], shard: Shard) -> list[str]:
    """Every n-th of the sorted keys, from the i-th on: each key is in one shard, and sizes differ by one at most.

    All shards are given the keys of *all* units, those that are done too: what is left differs from moment to moment,
    and two shards would then cut differently.

    >>> shard_of(["d", "a", "c", "b"], Shard(1, 3))
    ['a', 'd']
    """
    return sorted(set(keys))[shard.number - 1 :: shard.num_shards]
