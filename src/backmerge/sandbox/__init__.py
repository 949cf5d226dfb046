"""Runs Python that a model wrote, kept away from everything else on the machine.

There are two levels, and `Sandbox.identity`, which is recorded with results, says which one it was.

**bubblewrap**, used wherever running it shows that it works. The program sees its own file system, process, network,
IPC and host-name namespaces. Only /usr and the interpreter are in it, read-only; /tmp is its own, of a fixed size;
there is no /proc, no /sys, no /etc, and of /dev only null. It is no root: as root the user id is dropped for one that
nobody has, since root's own id would read root's files and be exempt from the limit on processes. A filter refuses
system calls that no solution needs (sockets, mounts, namespaces, tracing, keys, shared memory, ...). When the wall
clock runs out the whole process namespace is killed.

**process**, only with the user's leave: a process of its own with limits, an empty environment, a working folder of
its own, no new privileges, and the same filter, which here also refuses signals to other processes and leaving the
session. Where we are root its user id is dropped as well, and its network is cut off. It does *not* stop a program
from

- reading any file that the user may read, /proc of the user's other processes, with their environment, among them;
- writing, deleting or filling the disk wherever the user may write (each file is limited, their number is not);
- seeing which processes and users there are.

Where the filter is not known for the machine (neither Linux on x86-64 nor on ARM64), it does not stop sockets,
signals to the user's other processes, nor daemons that leave the session; macOS does not hold the limit on memory.

Neither level stops

- faults of the kernel: the kernel is shared, so this is no virtual machine;
- use of one core per process and of memory up to `num_processes` times `memory_bytes` until the clock runs out, nor
  the about one kilobyte of kernel memory that each empty file in /tmp takes;
- whatever a program does to its own process, by frames, ctypes, `sys.modules`, stdout or exit codes. So a verdict on
  code that may be hostile comes from `Sandbox.check` alone: the tests run in a process and a sandbox apart, and call
  the function over a pipe. They get plain values, never the program's objects, and report their end by a token that
  no process of the program's has. The price: a function that returns an iterator or an object of its own
  class fails there, and what it changes in its arguments is not seen by the tests.
- a function that recognises its tests and answers by heart; no harness does.

A program that is given to `Sandbox.run` runs in a bare interpreter with no frame or module of ours. Leaving early,
printing, patching builtins or hooks does not count as reaching its end; but a program that fetches the token out of its
pipe and writes it to the verdict's does. What it asserts about itself is its own affair.
"""

from backmerge.sandbox.program import Level, Limits, Outcome, Sandbox, Status, available_level, make_sandbox

__all__ = ["Level", "Limits", "Outcome", "Sandbox", "Status", "available_level", "make_sandbox"]
