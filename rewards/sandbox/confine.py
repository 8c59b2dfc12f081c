"""Taking rights away from the process that is about to run a program: capabilities, limits, Landlock, system calls.

Runs inside the sandbox, sent there as text together with `supervisor`; standard library only, Python 3.9 or newer.
Nothing here can be undone by the process that it was done to.
"""

from __future__ import annotations

import ctypes
import os
import resource
import struct

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # the same numbers on every architecture
_NOSUID_NODEV, _NOEXEC = 2 | 4, 8

# Landlock's rights of access to files; see linux/landlock.h.
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR, _TRUNCATE = 1, 2, 4, 8, 1 << 14
_IN_SCRATCH = sum(1 << bit for bit in (1, 2, 3, 4, 5, 7, 8, 12, 13, 14))  # read, write, remove, make, refer, truncate
_RIGHTS_SINCE = ((1, (1 << 13) - 1), (2, 1 << 13), (3, 1 << 14), (5, 1 << 15))  # (interface version, rights it added)

_libc = ctypes.CDLL(None, use_errno=True)


def _call(function: str, *arguments: object) -> int:
    result: int = getattr(_libc, function)(*arguments)
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{function}{arguments}: {os.strerror(error)}")
    return result


def _number(value: int) -> ctypes.c_ulong:
    return ctypes.c_ulong(value)


def landlock_version() -> int:
    """The kernel's Landlock interface: 1 and up, 0 without."""
    return max(0, _libc.syscall(_number(_CREATE_RULESET), None, _number(0), _number(1)))


def die_with_parent() -> None:
    """Have the kernel kill this process when the one that started it ends."""
    _call("prctl", _PR_SET_PDEATHSIG, _number(9), _number(0), _number(0), _number(0))


def hide() -> None:
    """Close this process's memory to others of its user."""
    _call("prctl", _PR_SET_DUMPABLE, _number(0), _number(0), _number(0), _number(0))


def mount_scratch(path: str, size: int, files: int, execute: bool) -> None:
    """An empty file system in memory: `size` bytes, `files` files and directories. Needs CAP_SYS_ADMIN."""
    options = f"size={size},nr_inodes={files + 1},mode=0700"  # the root directory counts as one
    flags = _NOSUID_NODEV if execute else _NOSUID_NODEV | _NOEXEC
    _call("mount", b"tmpfs", path.encode(), b"tmpfs", _number(flags), options.encode())


def unmount_scratch(path: str) -> None:
    """Drop what `mount_scratch` made, with everything in it."""
    _call("umount2", path.encode(), 2)  # MNT_DETACH


def limit(limits: dict[str, int], own_processes: bool) -> None:
    """Set the resource limits, for good. `own_processes`: the user's count of processes is this sandbox's alone."""
    bounds = {
        resource.RLIMIT_CPU: limits["cpu_seconds"],
        resource.RLIMIT_AS: limits["memory_bytes"],
        resource.RLIMIT_FSIZE: limits["disk_bytes"],
        resource.RLIMIT_NOFILE: limits["open_files"],
        resource.RLIMIT_STACK: min(64 * 2**20, limits["memory_bytes"] // 4),
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
        resource.RLIMIT_NICE: 0,
        resource.RLIMIT_RTPRIO: 0,
    }
    if own_processes:
        bounds[resource.RLIMIT_NPROC] = limits["tasks"] + 1  # the supervisor is of the same user
    for kind, bound in bounds.items():
        hard = resource.getrlimit(kind)[1]
        allowed = bound if hard == resource.RLIM_INFINITY else min(bound, hard)
        resource.setrlimit(kind, (allowed, allowed))


def drop_capabilities() -> None:
    """Give up every capability, permitted, effective and inheritable; ambient ones go with them."""
    header = struct.pack("=Ii", 0x20080522, 0)
    _call("capset", header, struct.pack("=6I", *[0] * 6))


def forbid_new_privileges() -> None:
    """Make setuid bits and file capabilities void; also what Landlock and seccomp ask for."""
    _call("prctl", _PR_SET_NO_NEW_PRIVS, _number(1), _number(0), _number(0), _number(0))


def restrict_files(readable: list[str], scratch: str, execute: bool, execute_scratch: bool) -> None:
    """Landlock: read below `readable`, everything ordinary below `scratch` ("" for none), nothing else anywhere.

    Also no TCP (version 4), no abstract sockets and no signals outside (version 6). Does nothing without Landlock.
    """
    version = landlock_version()
    if not version:
        return
    handled = sum(rights for since, rights in _RIGHTS_SINCE if version >= since)
    attributes = struct.pack("=3Q", handled, 3 if version >= 4 else 0, 3 if version >= 6 else 0)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    ruleset = _call("syscall", _number(_CREATE_RULESET), attributes[:size], _number(size), _number(0))
    read = _READ_FILE | _READ_DIR | (_EXECUTE if execute else 0)
    rules = [(path, read) for path in readable]
    rules += [("/dev/null", _READ_FILE | _WRITE_FILE), ("/dev/urandom", _READ_FILE)]
    if scratch:
        rules.append((scratch, _IN_SCRATCH | (_EXECUTE if execute_scratch else 0)))
    for path, rights in rules:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        if not os.path.isdir(path):
            rights &= _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE
        rule = struct.pack("=Qi", rights & handled, place)
        _call("syscall", _number(_ADD_RULE), _number(ruleset), _number(1), rule, _number(0))
        os.close(place)
    _call("syscall", _number(_RESTRICT_SELF), _number(ruleset), _number(0))
    os.close(ruleset)


def filter_system_calls(program: bytes) -> None:
    """Install a BPF program, see `rewards.sandbox.seccomp`."""
    code = ctypes.create_string_buffer(program, len(program))
    pointer = struct.pack("@HP", len(program) // 8, ctypes.addressof(code))
    _call("prctl", _PR_SET_SECCOMP, _number(2), pointer, _number(0), _number(0))
