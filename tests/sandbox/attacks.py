"""The table of attacks: programs that try to get out, to harm, or to pass without solving anything.

Each prints ESCAPED if it got what it wanted, and nothing like it otherwise; what it does to the world is looked at from
outside as well (`world.py`). Names between @ signs are put in from there. None harms a machine even where it works:
bombs count to a bound, and what would break things when run bare is run only in the sandbox.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ESCAPED = "ESCAPED"

# which of its promises the weaker level makes
ByProcess = Literal["stopped", "stopped as root", "not stopped"]

_LIBC = "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\n"


@dataclass(frozen=True)
class Attack:
    """One row.

    Attributes:
        program: What the sandbox is given.
        by_process: Whether the level `process` stops it; on macOS and unknown machines it promises less.
        works_bare: Whether the test also runs it outside, to see that it bites there.
        needs_filter: Whether the filter of system calls is the only wall against it.
        ends: How it must end, where that matters: `ok` where the attack is to live on after the last line, `not ok`
            where it is to pass without reaching it, `stopped` where it never ends by itself.
        is_root_only: Bare, it works for root only.
    """

    program: str
    by_process: ByProcess = "stopped"
    works_bare: bool = True
    needs_filter: bool = False
    ends: Literal["anyhow", "ok", "not ok", "stopped"] = "anyhow"
    is_root_only: bool = False


FILES = {
    "read a secret": Attack("print(open('@SECRET@').read())", "stopped as root"),
    "read the users' names": Attack("print('ESCAPED' if 'root:' in open('/etc/passwd').read() else '')", "not stopped"),
    "read the shadow file": Attack(
        "print('ESCAPED' if ':' in open('/etc/shadow').read() else '')", "stopped", is_root_only=True
    ),
    "list home": Attack("import os\nos.listdir('@HOME@')\nprint('ESCAPED')", "stopped as root"),
    "list the root": Attack(
        "import os\nprint('ESCAPED' if {'etc', 'home', 'root', 'var'} & set(os.listdir('/')) else '')", "not stopped"
    ),
    "write outside": Attack("open('@OUTSIDE@/new', 'w').write('x')\nprint('ESCAPED')", "stopped as root"),
    "overwrite a secret": Attack("open('@SECRET@', 'w').write('x')\nprint('ESCAPED')", "stopped as root"),
    "delete a secret": Attack("import os\nos.unlink('@SECRET@')\nprint('ESCAPED')", "stopped as root"),
    "rewrite the library": Attack(
        "import os, sys\n"
        "own = os.path.dirname(os.__file__), os.path.dirname(sys.executable)\n"
        "for folder in (*own, '/usr', '/usr/bin', '/', '/dev'):\n"
        "    try:\n"
        "        open(folder + '/backmerge-attack', 'w').close()\n"
        "        print('ESCAPED', folder)\n"
        "        os.unlink(folder + '/backmerge-attack')\n"
        "    except OSError as error: print(error)",
        "stopped as root",
        works_bare=False,
    ),
    "a symbolic link to a secret": Attack(
        "import os\nos.symlink('@SECRET@', 'link')\nprint(open('link').read())", "stopped as root"
    ),
    "a symbolic link out of the folder to write": Attack(
        "import os\nos.symlink('@OUTSIDE@', 'link')\nopen('link/new', 'w').write('x')\nprint('ESCAPED')",
        "stopped as root",
    ),
    "a hard link to a secret": Attack(
        "import os\nos.link('@SECRET@', 'hard')\nprint(open('hard').read())", "stopped as root"
    ),
    "the way up": Attack("print(open('../' * 40 + '@SECRET@'.lstrip('/')).read())", "stopped as root"),
    "the root of this process": Attack("print(open('/proc/self/root@SECRET@').read())", "stopped as root"),
    "the root of the first process": Attack(
        "print(open('/proc/1/root@SECRET@').read())", "stopped as root", works_bare=False
    ),
    "the root of another": Attack("print(open('/proc/@VICTIM@/root@SECRET@').read())", "stopped as root"),
    "the root of the parent": Attack(
        "import os\nprint(open(f'/proc/{os.getppid()}/root@SECRET@').read())", "stopped as root"
    ),
    "the working folder of another": Attack("print(open('/proc/@VICTIM@/cwd/secret').read())", "stopped as root"),
    "import from a path": Attack(
        "import importlib.util as u\nspec = u.spec_from_file_location('m', '@OUTSIDE@/module.py')\n"
        "module = u.module_from_spec(spec)\nspec.loader.exec_module(module)\nprint(module.secret)",
        "stopped as root",
    ),
    "posix_spawn": Attack(
        "import os\npid = os.posix_spawn('/usr/bin/cat', ['cat', '@SECRET@'], {})\nos.waitpid(pid, 0)",
        "stopped as root",
    ),
    "a shell": Attack("import os\nos.system('cat @SECRET@')", "stopped as root"),
    "the C library": Attack(
        _LIBC + "fd = libc.open(b'@SECRET@', 0)\nprint(os.read(fd, 99).decode())", "stopped as root"
    ),
    "a device": Attack(
        "import os, stat\nos.mknod('disk', stat.S_IFCHR | 0o600, os.makedev(1, 11))\nprint('ESCAPED')",
        "stopped",
        is_root_only=True,
    ),
    "shared memory files": Attack(
        "import os\nopen('/dev/shm/backmerge-@VICTIM@', 'w').write('x')\n"
        "os.unlink('/dev/shm/backmerge-@VICTIM@')\nprint('ESCAPED')",
        "not stopped",
    ),
    "an inherited file": Attack("import os\nprint(os.pread(@FD@, 99, 0).decode())"),
    "any inherited file": Attack(
        "import os\n"
        "for fd in range(3, 256):\n"
        "    try: print(os.pread(fd, 99, 0).decode())\n"
        "    except (OSError, ValueError): pass"
    ),
    "the environment": Attack("import os\nprint(os.environ['BACKMERGE_SECRET'])"),
    "the environment of another": Attack("print(open('/proc/@VICTIM@/environ').read())", "stopped as root"),
}

KERNEL = {
    "become root": Attack("import os\nos.setresuid(0, 0, 0)\nprint('ESCAPED')", is_root_only=True),
    "be root": Attack("import os\nprint('ESCAPED' if 0 in os.getresuid() + os.getresgid() else '')", is_root_only=True),
    "keep root's groups": Attack("import os\nprint('ESCAPED' if 0 in os.getgroups() else '')", works_bare=False),
    "keep a capability": Attack(
        _LIBC + "header, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()\n"
        "assert libc.capget(header, data) == 0\n"
        "print('ESCAPED' if any(data[i] for i in (0, 1, 3, 4)) else '')",  # effective and permitted
        is_root_only=True,
    ),
    "gain privileges by a program that has them": Attack(
        _LIBC + "print('' if libc.prctl(39, 0, 0, 0, 0) else 'ESCAPED')"  # PR_GET_NO_NEW_PRIVS
    ),
    "mount": Attack(
        _LIBC + "print('ESCAPED' if libc.mount(b'none', b'/tmp', b'tmpfs', 0, None) == 0 else '')", works_bare=False
    ),
    "make /usr writable": Attack(
        _LIBC + "print('ESCAPED' if libc.mount(None, b'/usr', None, 32 | 4096, None) == 0 else '')", works_bare=False
    ),
    "unmount": Attack(_LIBC + "print('ESCAPED' if libc.umount2(b'/tmp', 2) == 0 else '')", works_bare=False),
    "a user namespace of one's own": Attack(
        _LIBC + "print('ESCAPED' if libc.unshare(0x10000000) == 0 else '')", needs_filter=True
    ),
    "a user namespace by clone": Attack(
        _LIBC + "import platform\n"
        "number = {'x86_64': 56, 'aarch64': 220}[platform.machine()]\n"
        "pid = libc.syscall(ctypes.c_long(number), ctypes.c_long(0x10000000 | 17), *[ctypes.c_long(0)] * 4)\n"
        "if pid == 0: os._exit(0)\n"
        "print('ESCAPED' if pid > 0 else '')",
        needs_filter=True,
    ),
    "setns": Attack(
        _LIBC
        + "fd = os.open('/proc/@VICTIM@/ns/uts', os.O_RDONLY)\nprint('ESCAPED' if libc.setns(fd, 0) == 0 else '')",
        is_root_only=True,
    ),
    "chroot": Attack("import os\nos.chroot('/tmp')\nprint('ESCAPED')", is_root_only=True),
    "ptrace": Attack(
        _LIBC + "print('ESCAPED' if libc.ptrace(16, @VICTIM@, None, None) == 0 else '')", is_root_only=True
    ),
    "the memory of another": Attack(
        "open('/proc/@VICTIM@/mem', 'rb').close()\nprint('ESCAPED')", "stopped as root", is_root_only=True
    ),
    "trace its own child": Attack(
        _LIBC + "pid = os.fork()\n"
        "if pid == 0:\n    import time; time.sleep(5)\n"
        "print('ESCAPED' if libc.ptrace(16, pid, None, None) == 0 else '')\nos.kill(pid, 9)",
        needs_filter=True,
    ),
    "a keyring": Attack(
        _LIBC + "import platform\nnumber = {'x86_64': 250, 'aarch64': 219}[platform.machine()]\n"
        "print('ESCAPED' if libc.syscall(ctypes.c_long(number), 0, -5, 1) >= 0 else '')",  # the user session's
        needs_filter=True,
    ),
    "io_uring": Attack(
        _LIBC + "params = (ctypes.c_uint32 * 64)()\n"
        "print('ESCAPED' if libc.syscall(ctypes.c_long(425), 4, params) >= 0 else '')",
        works_bare=False,  # many machines have it off
        needs_filter=True,
    ),
    "raise a limit": Attack(
        "import resource as r\n"
        "for which in (r.RLIMIT_AS, r.RLIMIT_CPU, r.RLIMIT_FSIZE):\n"
        "    r.setrlimit(which, (r.RLIM_INFINITY, r.RLIM_INFINITY))\n"
        "print('ESCAPED')"
    ),
}

NETWORK = {
    "TCP": Attack("import socket\nsocket.create_connection(('127.0.0.1', @TCP@), 1).close()\nprint('ESCAPED')"),
    "UDP, as for names": Attack(
        "import socket\ns = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\ns.settimeout(0.3)\n"
        "s.sendto(b'x', ('127.0.0.1', @UDP@))\nif s.recv(1): print('ESCAPED')"
    ),
    "an abstract socket": Attack(
        "import socket\ns = socket.socket(socket.AF_UNIX)\ns.connect('\\0backmerge-@VICTIM@')\nprint('ESCAPED')"
    ),
    "a socket in a folder": Attack(
        "import os, socket\nos.chdir('@OUTSIDE@')\nsocket.socket(socket.AF_UNIX).connect('socket')\nprint('ESCAPED')"
    ),
    "raw packets": Attack(
        "import socket\nsocket.socket(socket.AF_PACKET, socket.SOCK_RAW).close()\nprint('ESCAPED')", is_root_only=True
    ),
    "the virtual machine's host": Attack(
        "import socket\ns = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)\nprint('ESCAPED')",
        works_bare=False,  # only some kernels have it
        needs_filter=True,
    ),
    "interfaces": Attack("import socket\nprint('ESCAPED' if len(socket.if_nameindex()) > 1 else '')", works_bare=False),
}

PROCESSES = {
    "kill another": Attack("import os\nos.kill(@VICTIM@, 9)\nprint('ESCAPED')"),
    "kill everything": Attack("import os\nos.kill(-1, 15)\nprint('sent')", works_bare=False),
    "kill the parent": Attack("import os\nos.kill(os.getppid(), 9)\nos.kill(@PARENT@, 9)", works_bare=False),
    "kill by the limits of another": Attack(
        "import resource\nresource.prlimit(@VICTIM@, resource.RLIMIT_CPU, (0, 0))\nprint('ESCAPED')"
    ),
    "a fork bomb that counts": Attack(
        "import os, time\nn = 0\n"
        "while n < 60:\n"
        "    if os.fork() == 0: time.sleep(30)\n"
        "    n += 1\n"
        "print('ESCAPED')\nos.killpg(0, 9)",
        works_bare=False,
    ),
    "a thread bomb that counts": Attack(
        "import threading, time\n"
        "for _ in range(60): threading.Thread(target=time.sleep, args=(30,), daemon=True).start()\n"
        "print('ESCAPED')"
    ),
    "a fork bomb": Attack(
        "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", works_bare=False, ends="stopped"
    ),
    "an endless loop": Attack("while True: pass", works_bare=False, ends="stopped"),
    "endless sleep": Attack("import time\nwhile True: time.sleep(1000)", works_bare=False, ends="stopped"),
    "a loop in C that no signal of Python ends": Attack(
        "x = 7 ** (10 ** 8)\nx = x * x", works_bare=False, ends="stopped"
    ),
    "all signals ignored": Attack(
        "import signal\n"
        "for s in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}: signal.signal(s, signal.SIG_IGN)\n"
        "while True: pass",
        works_bare=False,
        ends="stopped",
    ),
    "stop itself": Attack(
        "import os\nos.kill(os.getpid(), 19)\nos.close(1)\nwhile True: pass", works_bare=False, ends="stopped"
    ),
    "close everything and go on": Attack(
        "import os\nos.closerange(0, 256)\nwhile True: pass", works_bare=False, ends="stopped"
    ),
    "a daemon that outlives": Attack(
        "import os, time\n"
        "if os.fork() == 0:\n"
        "    try: os.setsid()\n"
        "    except OSError: pass\n"
        "    if os.fork() == 0:\n"
        "        os.closerange(0, 256)\n"
        "        while True: time.sleep(0.01)\n"
        "    os._exit(0)\n"
        "time.sleep(0.1)",
        works_bare=False,
        ends="ok",
    ),
    "a daemon that holds the output open": Attack(
        "import os, time\n"
        "if os.fork() == 0:\n"
        "    try: os.setsid()\n"
        "    except OSError: pass\n"
        "    while True: time.sleep(0.01)",
        works_bare=False,
        ends="ok",
    ),
    "a thread that never ends": Attack(
        "import threading\ndef spin():\n    while True: pass\nthreading.Thread(target=spin).start()",
        works_bare=False,
        ends="ok",
    ),
}

RESOURCES = {
    "a memory bomb": Attack(
        "kept = []\nwhile len(kept) < 40: kept.append(bytearray(b'x') * (1 << 24))\nprint('ESCAPED')", works_bare=False
    ),
    "memory that is mapped": Attack(
        "import mmap\nkept = [mmap.mmap(-1, 1 << 26) for _ in range(40)]\nprint('ESCAPED')"
    ),
    "memory in a file without a name": Attack(
        "import os\nos.write(os.memfd_create('x'), b'x')\nprint('ESCAPED')", needs_filter=True
    ),
    "memory that outlives": Attack(
        _LIBC + "number = libc.shmget(0, 4096, 0o1600)\nprint('ESCAPED' if number >= 0 else '')\n"
        "libc.shmctl(number, 0, None)",
        needs_filter=True,
    ),
    "one large file": Attack(
        "with open('large', 'wb') as f:\n"
        "    for _ in range(40):\n        f.write(bytes(1 << 20)); f.flush()\n"
        "print('ESCAPED')"
    ),
    "one large file with a hole": Attack("open('large', 'wb').truncate(1 << 30)\nprint('ESCAPED')"),
    "many files": Attack(
        "for i in range(40):\n    with open(f'{i}', 'wb') as f: f.write(bytes(1 << 20))\nprint('ESCAPED')",
        "not stopped",
    ),
    "many open files": Attack("kept = [open('/dev/null') for _ in range(200)]\nprint('ESCAPED')"),
    "a flood of output": Attack(
        "import os\nwhile True: os.write(1, b'flood' * 10000); os.write(2, b'flood' * 10000)",
        works_bare=False,
        ends="stopped",
    ),
    "a flood that ends": Attack("print('flood' * 2_000_000)", works_bare=False, ends="ok"),
    "endless recursion": Attack(
        "import sys\nsys.setrecursionlimit(10**9)\n"
        "class A:\n    def __getattr__(self, n): return getattr(self, n + 'x')\nA().a",
        works_bare=False,
        ends="not ok",
    ),
    "a crash in C": Attack("import ctypes\nctypes.string_at(0)", works_bare=False, ends="not ok"),
}

# the tests, which all of these are to evade, would be the assertion in their last line
_TESTS = "\nassert False\n"

FORGERIES = {
    name: Attack(program, works_bare=False, ends="not ok")
    for name, program in {
        "leave with 0": "import os\nos._exit(0)" + _TESTS,
        "sys.exit(0)": "import sys\nsys.exit(0)" + _TESTS,
        "raise SystemExit": "raise SystemExit" + _TESTS,
        "leave with 0 as the tests fail": "import atexit, os\natexit.register(os._exit, 0)" + _TESTS,
        "leave with 0 in a hook for exceptions": "import os, sys\nsys.excepthook = lambda *a: os._exit(0)\n"
        "sys.__excepthook__ = sys.excepthook" + _TESTS,
        "leave with 0 as the error is shown": "import os, sys\nclass S:\n    def write(self, t): os._exit(0)\n"
        "    def flush(self): os._exit(0)\nsys.stderr = sys.stdout = S()" + _TESTS,
        "leave with 0 from a thread": "import os, threading\nthreading.Thread(target=os._exit, args=(0,)).start()\n"
        "import time\ntime.sleep(5)",
        "become another program": "import os\nos.execv('/usr/bin/true', ['true'])",
        "become the test's own next step": "print('ok')\nprint('passed')\nimport os\nos._exit(0)",
        "write to everything": "import os\nfor fd in range(256):\n    for text in (b'+', b'+' + b'0' * 32, b'ok'):\n"
        "        try: os.write(fd, text)\n        except OSError: pass\nos._exit(0)",
        "write to everything and go on": "import os\nfor fd in range(3, 256):\n    try: os.write(fd, b'+')\n"
        "    except OSError: pass\n",
        "patch what the harness calls": "import builtins, os, sys\nos._exit = sys.exit = exit = lambda *a: None\n"
        "os.write = os.read = lambda *a: b''\nbuiltins.BaseException = builtins.Exception = int\n"
        "builtins.AssertionError = SystemExit\nbuiltins.type = builtins.getattr = None" + _TESTS,
        "patch assertions": "import builtins\nclass Calm(BaseException):\n    pass\nbuiltins.AssertionError = Calm\n"
        "builtins.__debug__ if False else None" + _TESTS,
        "read the harness's frames": "import gc, os, sys\n"
        "found, frame = set(), sys._getframe()\n"
        "while frame:\n    found |= {v for v in (*frame.f_locals.values(), *frame.f_globals.values()) "
        "if isinstance(v, (bytes, str)) and len(v) < 99}\n    frame = frame.f_back\n"
        "for thing in gc.get_objects():\n    if type(thing) is dict:\n"
        "        found |= {v for v in list(thing.values()) if type(v) in (bytes, str) and len(v) in range(16, 65)}\n"
        "for text in found:\n    for fd in range(3, 64):\n"
        "        try: os.write(fd, text if isinstance(text, bytes) else text.encode())\n"
        "        except OSError: pass\nos._exit(0)",
        "let the parent leave": "import os, time\nif os.fork(): os._exit(0)\ntime.sleep(0.3)\n",
        "kill itself": "import os\nos.abort()" + _TESTS,
        "no program": "this is no Python",
        "a null byte": "x = 1\0",
        "half a character": "x = '\ud800'",
        "code that only looks nested": "(" * 100_000,
    }.items()
}

ATTACKS = {**FILES, **KERNEL, **NETWORK, **PROCESSES, **RESOURCES, **FORGERIES}
