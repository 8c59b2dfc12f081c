"""What `test_sandbox` throws at the sandbox: programs that must fail.

An attack raises when it is stopped and falls through when it succeeds. `{marker}` is a name to look for afterwards.
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass

LIBC = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
def call(name, *arguments):
    result = getattr(libc, name)(*arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), name)
    return result
"""


@dataclass(frozen=True)
class Attack:
    name: str
    body: str
    harmless: bool = False  # also run outside, to see that it would work there

    def program(self, **values: object) -> str:
        """Prints "stopped" and the exception's name, or "ESCAPED"."""
        body = self.body
        for key, value in values.items():
            body = body.replace("{" + key + "}", str(value))
        body = textwrap.indent(textwrap.dedent(body).strip(), "    ")
        return (
            f"try:\n{body}\nexcept Exception as error:\n    print('stopped', type(error).__name__, error)\n"
            "else:\n    print('ESCAPED')\n"
        )


ATTACKS = (
    Attack("read the shadow file", "open('/etc/shadow').read()"),
    Attack("read a host file", "open('/etc/passwd').read()", harmless=True),
    Attack("list the home directory", "import os; os.listdir('{home}')", harmless=True),
    Attack("read the repository", "open('{repository}/pyproject.toml').read()", harmless=True),
    Attack("read another file system", "import os; assert os.listdir('/sys') or os.listdir('/proc')", harmless=True),
    Attack(
        "find a secret of the environment",
        """
        import os
        seen = [str(dict(os.environ))]
        for pid in ("self", "1", str(os.getppid()), "thread-self"):
            try:
                seen.append(open(f"/proc/{pid}/environ").read())
            except OSError:
                pass
        if not any("{secret}" in text for text in seen):
            raise ValueError("not found")
        """,
        harmless=True,
    ),
    Attack(
        "write outside",
        """
        import os, sysconfig
        places = ["/", "/usr", "/etc", "/var/tmp", "/dev", "/dev/shm", "/tmp/..", "/tmp/../usr", "/run",
                  sysconfig.get_path("stdlib"), "{repository}"]
        for place in places:
            try:
                open(place + "/{marker}", "w").close()
                break
            except OSError:
                pass
        else:
            raise PermissionError("everywhere")
        """,
    ),
    Attack(
        "overwrite the interpreter's library",
        "import json; open(json.__file__, 'a').close(); __import__('os').truncate(json.__file__, 1 << 20)",
    ),
    Attack("connect to loopback", "import socket; socket.create_connection(('127.0.0.1', {port}), 2)", harmless=True),
    Attack(
        "connect to an abstract socket",
        "import socket; socket.socket(socket.AF_UNIX).connect('\\0{marker}')",
        harmless=True,
    ),
    Attack("open a UDP socket", "import socket; socket.socket(type=socket.SOCK_DGRAM)", harmless=True),
    Attack("open a netlink socket", "import socket; socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)", harmless=True),
    Attack("kill the parent", "import os; os.kill(os.getppid(), 9)"),
    Attack("kill process 1", "import os; os.kill(1, 9)"),
    Attack("kill everything", "import os; os.kill(-1, 9)"),
    Attack("kill the group", "import os; os.kill(0, 9)"),
    Attack("queue a signal to the parent", LIBC + "call('sigqueue', os.getppid(), 9, 0)"),
    Attack(
        "signal through a file",
        "import fcntl, os; r, w = os.pipe(); fcntl.fcntl(r, fcntl.F_SETOWN, os.getppid())",
        harmless=True,
    ),
    Attack("ptrace the parent", LIBC + "call('ptrace', 16, os.getppid(), 0, 0)"),
    Attack(
        "read the parent's memory",
        LIBC + "call('process_vm_readv', os.getppid(), ctypes.create_string_buffer(16), 1, bytes(16), 1, 0)",
    ),
    Attack("starve the parent", "import os, resource; resource.prlimit(os.getppid(), resource.RLIMIT_NOFILE, (0, 0))"),
    Attack(
        "raise a limit",
        "import resource as r; r.setrlimit(r.RLIMIT_AS, (r.RLIM_INFINITY, r.RLIM_INFINITY))",
    ),
    Attack("read through a symbolic link", "import os; os.symlink('/etc/passwd', '{marker}'); open('{marker}').read()"),
    Attack("link to the interpreter", "import os, sys; os.link(sys.executable, '/tmp/{marker}')"),
    Attack("mount", LIBC + "call('mount', b'tmpfs', b'/tmp', b'tmpfs', 0, None)"),
    Attack("bind-mount", LIBC + "call('mount', b'/', b'/tmp', None, 4096, None)"),
    Attack("unmount", LIBC + "call('umount2', b'/tmp', 2)"),
    Attack("a new user namespace", LIBC + "call('unshare', 0x10000000)"),
    Attack("a new network namespace", LIBC + "call('unshare', 0x40000000)"),
    Attack("clone into a user namespace", LIBC + "call('syscall', {clone}, 0x10000011, 0, 0, 0, 0) or os._exit(0)"),
    Attack("join a namespace", LIBC + "call('setns', 0, 0)"),
    Attack("change the root", "import os; os.chroot('/tmp')"),
    Attack("become root", "import os; os.setuid(0)"),
    Attack("become another group", "import os; os.setgroups([0])"),
    Attack("make a device", "import os, stat; os.mknod('{marker}', 0o600 | stat.S_IFBLK, os.makedev(254, 0))"),
    Attack("open the terminal", "open('/dev/tty', 'w').write('x')"),
    Attack("open the disk", "import os; os.open('/dev/vda', os.O_RDONLY)"),
    Attack("type into the terminal", "import fcntl; fcntl.ioctl(0, 0x5412, b'x')"),
    Attack("start a process", "import os; os.fork() or os._exit(0); os.wait()", harmless=True),
    Attack("start a shell", "import subprocess; subprocess.run(['/bin/sh', '-c', 'true'])", harmless=True),
    Attack(
        "replace itself", "import os, sys; os.execv(sys.executable, [sys.executable, '-c', 'print(\"ESCAPED\")'])", True
    ),
    Attack("10 GB of memory", "bytearray(10 << 30)"),
    Attack("10 GB of mapped memory", "import mmap; mmap.mmap(-1, 10 << 30)"),
    Attack("a file in memory", "import os; os.memfd_create('x')", harmless=True),
    Attack(
        "fill the disk",
        """
        for number in range(100):
            with open(f"/tmp/{marker}{number}", "wb") as file:
                file.write(bytes(1 << 20))
        """,
    ),
    Attack("a huge file", "open('/tmp/{marker}', 'wb').truncate(1 << 40)"),
    Attack("many files", "for number in range(100_000): open(f'/tmp/{marker}{number}', 'w').close()"),
    Attack("many directories", "import os\nfor number in range(100_000): os.mkdir(f'/tmp/{marker}{number}')"),
    Attack("many open files", "import os; kept = [os.pipe() for _ in range(5000)]"),
    Attack("more threads than bounded", "{threads}"),
    Attack(
        "write to inherited descriptors",
        """
        import os
        hit = 0
        for descriptor in range(4, 4096):
            try:
                os.write(descriptor, b"forged")
                hit += 1
            except OSError:
                pass
        if not hit:
            raise OSError("none is open")
        """,
    ),
)

THREADS = """
import threading
gate = threading.Event()
threading.stack_size(32768)
threads = [threading.Thread(target=gate.wait, daemon=True) for _ in range(500)]
try:
    for thread in threads:
        thread.start()
finally:
    gate.set()
"""

# Numbers are looked up in the project's own tables, whose correctness another test checks.
SYSTEM_CALLS = (
    "add_key", "bpf", "io_uring_setup", "keyctl", "memfd_secret", "mq_open", "msgget", "name_to_handle_at",
    "open_by_handle_at", "perf_event_open", "personality", "pidfd_open", "process_madvise", "reboot", "request_key",
    "semget", "setpriority", "shmget", "socket", "swapon", "sync", "syslog", "userfaultfd",
)  # fmt: skip
