"""Filter system calls: a program for the kernel's classic BPF, written by hand so that no library is needed.

It lists what is refused instead of what is allowed: CPython with its standard library uses about 200 system calls,
which change with its version and libc's, while the refused ones are fixed, and no solution of a programming task needs
them.

Source: Linux, Documentation/userspace-api/seccomp_filter.rst; numbers from arch/x86/entry/syscalls/syscall_64.tbl and
include/uapi/asm-generic/unistd.h.
"""

from __future__ import annotations

import errno
import platform
import struct
import sys
from typing import NamedTuple

# x86-64, ARM64
NUMBERS: dict[str, tuple[int | None, int | None]] = {
    # other file systems, namespaces
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "unshare": (272, 97),
    "setns": (308, 268), "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430),
    "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433), "mount_setattr": (442, 442),
    "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265), "quotactl": (179, 60), "quotactl_fd": (443, 443),
    "fanotify_init": (300, 262), "lookup_dcookie": (212, 18),
    # other processes
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272),
    "pidfd_getfd": (438, 438), "process_madvise": (440, 440), "perf_event_open": (298, 241),
    # the kernel and the machine
    "bpf": (321, 280), "userfaultfd": (323, 282), "io_uring_setup": (425, 425), "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427), "init_module": (175, 105), "finit_module": (313, 273),
    "delete_module": (176, 106), "kexec_load": (246, 104), "kexec_file_load": (320, 294), "reboot": (169, 142),
    "swapon": (167, 224), "swapoff": (168, 225), "acct": (163, 89), "syslog": (103, 116), "iopl": (172, None),
    "ioperm": (173, None), "modify_ldt": (154, None), "settimeofday": (164, 170), "clock_settime": (227, 112),
    "adjtimex": (159, 171), "clock_adjtime": (305, 266), "personality": (135, 92), "add_key": (248, 217),
    "request_key": (249, 218), "keyctl": (250, 219),
    # memory that no limit counts
    "shmget": (29, 194), "semget": (64, 190), "msgget": (68, 186), "mq_open": (240, 180), "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    # the network, and other sockets: AF_UNIX and AF_VSOCK (a virtual machine's host) too
    "socket": (41, 198),
}  # fmt: skip

# refused as well if other processes are in reach: signals, and leaving the session that is killed as a whole
NUMBERS_OF_REACH: dict[str, tuple[int | None, int | None]] = {
    "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240), "pidfd_send_signal": (424, 424), "setsid": (112, 157), "setpgid": (109, 154),
    "setpriority": (141, 140), "sched_setaffinity": (203, 122), "sched_setscheduler": (144, 119),
}  # fmt: skip

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER_AT, _ARCHITECTURE_AT, _FIRST_ARGUMENT_AT = 0, 4, 16
_ALLOW, _KILL, _ERROR = 0x7FFF0000, 0x80000000, 0x00050000
_X32 = 0x40000000  # on x86-64, this bit selects a second table of calls
_NAMESPACE_FLAGS = 0x7E020000  # CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET


class _Machine(NamedTuple):
    """A machine's column in the tables."""

    column: int
    audit_name: int
    clone: int
    clone3: int
    prlimit: int


_MACHINES = {
    "x86_64": _Machine(0, 0xC000003E, clone=56, clone3=435, prlimit=302),
    "aarch64": _Machine(1, 0xC00000B7, clone=220, clone3=435, prlimit=261),
}


def _step(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("<HBBI", code, if_true, if_false, value)


def call_filter(*, others_in_reach: bool) -> bytes | None:
    """Return the filter for this machine, eight bytes per instruction; `None` for an unknown machine.

    A refused call fails with EPERM; `clone3`, whose flags a filter cannot see, fails with ENOSYS, so that the C library
    falls back to `clone`. A call in another machine's numbering kills the process.

    Args:
        others_in_reach: Whether the program shares its process namespace with others, so that signals, sessions and
            other processes' limits must be refused as well.
    """
    machine = _MACHINES.get(platform.machine())
    if machine is None or sys.platform != "linux":
        return None
    refuse, unknown = _step(_RETURN, _ERROR | errno.EPERM), _step(_RETURN, _ERROR | errno.ENOSYS)
    steps = [
        _step(_LOAD, _ARCHITECTURE_AT),
        _step(_EQUAL, machine.audit_name, if_true=1),
        _step(_RETURN, _KILL),
        _step(_LOAD, _NUMBER_AT),
        *(_step(_AT_LEAST, _X32, if_false=1), unknown),
        *(_step(_EQUAL, machine.clone3, if_false=1), unknown),
    ]
    for numbers in (NUMBERS, NUMBERS_OF_REACH) if others_in_reach else (NUMBERS,):
        for pair in numbers.values():
            number = pair[machine.column]
            if number is not None:
                steps += [_step(_EQUAL, number, if_false=1), refuse]
    # clone into new namespaces
    steps += [_step(_EQUAL, machine.clone, if_false=4), _step(_LOAD, _FIRST_ARGUMENT_AT)]
    steps += [_step(_ANY_BIT, _NAMESPACE_FLAGS, if_false=1), refuse, _step(_RETURN, _ALLOW)]
    if others_in_reach:  # the limits of another process: its first argument is not 0
        steps += [_step(_EQUAL, machine.prlimit, if_false=4), _step(_LOAD, _FIRST_ARGUMENT_AT)]
        steps += [_step(_EQUAL, 0, if_true=1), refuse, _step(_RETURN, _ALLOW)]
    return b"".join([*steps, _step(_RETURN, _ALLOW)])
