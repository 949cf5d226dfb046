"""Run Python that a model wrote, isolated from the rest of the machine.

There are two levels; `Sandbox.identity`, which is recorded with results, names the level that was used.

**bubblewrap**, used if a trial shows that it works. The program has its own file system, process, network, IPC and
host-name namespaces. They contain only /usr and the interpreter, read-only; a private /tmp of fixed size; no /proc,
/sys or /etc; and only null from /dev. The program is not root: if we are, it changes to a user id that nobody has,
since root's id could read root's files and is exempt from the limit on processes. A filter refuses system calls that no
solution needs (sockets, mounts, namespaces, tracing, keys, shared memory, ...). When the wall clock runs out, the whole
process namespace is killed.

**process**, only with the user's permission: a separate process with limits, an empty environment, a separate working
folder, no new privileges, and the same filter, which here also refuses signals to other processes and leaving the
session. If we are root, it also changes its user id and loses the network. It does *not* stop a program from

- reading any file that the user may read, including /proc of the user's other processes, with their environment;
- writing, deleting or filling the disk wherever the user may write (the size of each file is limited, their number is
  not);
- listing the machine's processes and users.

On a machine without a known filter (neither Linux on x86-64 nor on ARM64), it does not stop sockets, signals to the
user's other processes, or daemons that leave the session; macOS does not enforce the limit on memory.

Neither level stops

- faults of the kernel: the kernel is shared, since this is not a virtual machine;
- use of one core per process and of memory up to `num_processes` times `memory_bytes` until the time runs out, and
  about one kilobyte of kernel memory for each empty file in /tmp;
- anything that a program does to its own process, through frames, ctypes, `sys.modules`, stdout or exit codes. So a
  verdict on code that may be hostile comes only from `Sandbox.check`: the tests run in a separate process and sandbox,
  and call the function over a pipe. They get plain values, never the program's objects, and report their end by a token
  that no process of the program has. The price: a function that returns an iterator or an object of a class that it
  defines fails there, and the tests do not see changes that it makes to its arguments.
- a function that recognises its tests and returns memorised answers; no harness does.

A program that runs in `Sandbox.run` has a bare interpreter without any frame or module of ours. Leaving early,
printing, patching builtins or hooks does not count as reaching its end; but a program that reads the token from its
pipe and writes it to the verdict's pipe does. Assertions that it makes about itself prove nothing.
"""

from backmerge.sandbox.program import Level, Limits, Outcome, Sandbox, Status, available_level, make_sandbox

__all__ = ["Level", "Limits", "Outcome", "Sandbox", "Status", "available_level", "make_sandbox"]
