"""The system-call filter of a judged program, assembled as classic BPF.

The filter refuses what `syscalls` lists, what Linux added since, and what belongs to another architecture. It is a layer
beside the namespaces and Landlock: it also closes what they leave open (io_uring, keyrings, writing to a terminal's
input, signals to other processes where there is no PID namespace).
"""

from __future__ import annotations

import errno
import platform
import struct

from rewards.sandbox.limits import Limits, Mode
from rewards.sandbox.syscalls import ALWAYS, CHECKED, METADATA, NEWEST, OTHER_PROCESSES, SUBPROCESSES

OWN_PID = 0x5AFE5AFE  # stands for the filtered process's id, which is put in when that is known
ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column in the tables, AUDIT_ARCH_*

_LOAD, _EQUAL, _GREATER, _ANY_BIT, _RETURN = 0x20, 0x15, 0x25, 0x45, 0x06  # BPF instruction codes
_ALLOW, _KILL = 0x7FFF0000, 0x80000000
_NUMBER, _ARCHITECTURE, _ARGUMENTS = (
    0,
    4,
    16,
)  # offsets in struct seccomp_data; an argument takes 8 bytes, low half first

_NEW_NAMESPACES = 0x7E020000  # CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET
_THREAD = 0x00010000  # CLONE_THREAD
_BAD_IOCTLS = (0x5412, 0x541C, 0x8901, 0x8902)  # TIOCSTI, TIOCLINUX, FIOSETOWN, SIOCSPGRP
_BAD_FCNTLS = (8, 10, 15, 1026)  # F_SETOWN, F_SETSIG, F_SETOWN_EX, F_NOTIFY: signals through files


def build_filter(mode: Mode, limits: Limits, machine: str = "") -> bytes:
    """The filter as an array of `struct sock_filter`, with `OWN_PID` still to be replaced.

    Args:
        mode: in "landlock" there is no file system and no PID namespace of its own, so more is refused: changing
            metadata of files (Landlock does not stop chmod), and any new thread (nothing else bounds their number).
        limits: `subprocesses` decides whether fork, execve and signals to other processes pass.
        machine: as `platform.machine()` says; that of this machine by default.

    Raises:
        ValueError: a machine for which there is no table.
    """
    machine = machine or platform.machine()
    if machine not in ARCHITECTURES:
        raise ValueError(f"the sandbox knows the system calls of {', '.join(ARCHITECTURES)}, not of {machine!r}")
    column, audit = ARCHITECTURES[machine]
    refused = ALWAYS | ({} if limits.subprocesses else SUBPROCESSES | OTHER_PROCESSES)
    if mode == "landlock":
        refused = refused | METADATA
    program = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_EQUAL, 1, 0, audit),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER),
        (_GREATER, 0, 1, NEWEST),  # also true of every call through the x32 interface
        _refuse(errno.ENOSYS),
    ]
    for numbers in refused.values():
        if (number := numbers[column]) is not None:
            program += [(_EQUAL, 0, 1, number), _refuse(errno.EPERM)]
    for name, body in _checks(mode, limits).items():
        number = CHECKED[name][column]
        assert number is not None  # the checked calls exist on every machine
        # The body decides alone: it loads an argument, so what follows could no longer see the number.
        program += [(_EQUAL, 0, len(body), number), *body]
    program.append((_RETURN, 0, 0, _ALLOW))
    return b"".join(struct.pack("=HBBI", *line) for line in program)


Line = tuple[int, int, int, int]


def _checks(mode: Mode, limits: Limits) -> dict[str, list[Line]]:
    """For each system call that is decided by an argument, lines that end in a verdict."""
    allow, deny = (_RETURN, 0, 0, _ALLOW), _refuse(errno.EPERM)
    clone: list[Line] = [deny]
    if mode == "bubblewrap":
        clone = [_load(0), (_ANY_BIT, 0, 1, _NEW_NAMESPACES), deny]
        clone += [allow] if limits.subprocesses else [(_ANY_BIT, 1, 0, _THREAD), deny, allow]
    own_only = [_load(0), (_EQUAL, 1, 0, OWN_PID), deny, allow]
    checks = {
        "clone": clone,
        "clone3": [_refuse(errno.ENOSYS)],  # its flags lie in memory, out of a filter's sight; libc then uses clone
        "ioctl": [_load(1), *(line for bad in _BAD_IOCTLS for line in ((_EQUAL, 0, 1, bad), deny)), allow],
        "fcntl": [_load(1), *(line for bad in _BAD_FCNTLS for line in ((_EQUAL, 0, 1, bad), deny)), allow],
        "prlimit64": [_load(0), (_EQUAL, 1, 0, 0), deny, allow],
    }
    return checks if limits.subprocesses else checks | {"kill": own_only, "tgkill": own_only}


def _load(argument: int) -> Line:
    return (_LOAD, 0, 0, _ARGUMENTS + 8 * argument)


def _refuse(error: int) -> Line:
    return (_RETURN, 0, 0, 0x00050000 | error)
