"""The filter of system calls, read step by step as the kernel reads it."""

from __future__ import annotations

import errno
import platform
import struct
import sys

import pytest

from backmerge.sandbox.calls import NUMBERS, NUMBERS_OF_REACH, call_filter

MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
ALLOWED, KILLED, REFUSED, UNKNOWN = 0x7FFF0000, 0x80000000, 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS
# read, write, openat, mmap, execve, exit_group, futex
HARMLESS = {"x86_64": (0, 1, 257, 9, 59, 231, 202), "aarch64": (63, 64, 56, 222, 221, 94, 98)}
CLONE = {"x86_64": 56, "aarch64": 220}
PRLIMIT = {"x86_64": 302, "aarch64": 261}


def verdict(code: bytes, number: int, architecture: int, first_argument: int = 0) -> int:
    """Run the filter on one call."""
    data = struct.pack("<IIQQ", number, architecture, 0, first_argument)
    steps = list(struct.iter_unpack("<HBBI", code))
    place, held = 0, 0
    while True:
        operation, if_true, if_false, value = steps[place]
        place += 1
        if operation == 0x06:
            return value
        if operation == 0x20:
            (held,) = struct.unpack_from("<I", data, value)
            continue
        holds = {0x15: held == value, 0x35: held >= value, 0x45: bool(held & value)}[operation]
        place += if_true if holds else if_false


@pytest.fixture(params=MACHINES)
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each machine that the filter is known for."""
    monkeypatch.setattr(platform, "machine", lambda: request.param)
    monkeypatch.setattr(sys, "platform", "linux")
    return str(request.param)


@pytest.mark.parametrize("others_in_reach", [False, True])
def test_what_is_listed_is_refused(machine: str, others_in_reach: bool) -> None:
    """Every call of the tables fails, signals and sessions only where others are in reach; harmless ones pass."""
    code = call_filter(others_in_reach=others_in_reach)
    assert code is not None
    column, architecture = MACHINES[machine]
    for pair in NUMBERS.values():
        if (number := pair[column]) is not None:
            assert verdict(code, number, architecture) == REFUSED
    for pair in NUMBERS_OF_REACH.values():
        if (number := pair[column]) is not None:
            assert verdict(code, number, architecture) == (REFUSED if others_in_reach else ALLOWED)
    for number in HARMLESS[machine]:
        assert verdict(code, number, architecture) == ALLOWED


def test_calls_that_depend_on_their_arguments(machine: str) -> None:
    """`clone` passes for threads and forks, not for namespaces; limits can be asked of oneself only."""
    code = call_filter(others_in_reach=True)
    assert code is not None
    architecture = MACHINES[machine][1]
    for flags, expected in ((17, ALLOWED), (0x003D0F00, ALLOWED), (0x10000000 | 17, REFUSED), (0x20000000, REFUSED)):
        assert verdict(code, CLONE[machine], architecture, flags) == expected
    for process, expected in ((0, ALLOWED), (1, REFUSED), (4321, REFUSED)):
        assert verdict(code, PRLIMIT[machine], architecture, process) == expected
    assert verdict(code, 435, architecture) == UNKNOWN


def test_other_numberings_are_closed(machine: str) -> None:
    """A call in another machine's numbering ends the process; x86-64's second set of numbers is unknown."""
    code = call_filter(others_in_reach=False)
    assert code is not None
    assert verdict(code, 1, 0x40000003) == KILLED
    assert verdict(code, 0x40000000 + 41, MACHINES[machine][1]) == UNKNOWN


def test_elsewhere_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that the numbers are not known for gets no filter, rather than a wrong one."""
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    assert call_filter(others_in_reach=True) is None


@pytest.mark.parametrize("column", [0, 1])
def test_numbers_are_distinct(column: int) -> None:
    """No number stands for two calls, and none is one of those that programs need."""
    numbers = [pair[column] for pair in (NUMBERS | NUMBERS_OF_REACH).values() if pair[column] is not None]
    assert len(set(numbers)) == len(numbers)
    assert not set(numbers) & set(list(HARMLESS.values())[column])
