"""Checks that no other user can have written a file that is about to be run, or could while it is checked.

The check is by owner and mode, as ssh and sudo check their files. A folder is trusted if it and every folder above it
belong to root or to this user, and nobody else may write to them. The check goes from ``/`` downwards along a path
without symbolic links, so its result stays true: to replace a folder, one would have to write to the folder above it.
So the file that is checked, hashed and loaded by such a path is one and the same.

Three cases are common and harmless, so they are allowed:

- a folder *above* that everybody may write to but that is sticky, such as ``/tmp``: there, only owners rename;
- folders *above* that belong to the owner of ``/``: in a user namespace the system's files seem to belong to nobody;
- a group that may write but has this user as its only member (most distributions make such groups), or is root's.

Where there are no user ids (Windows), everything is trusted: a user's folders are private there by inheritance.
"""

from __future__ import annotations

import contextlib
import functools
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple


class Untrusted(OSError):  # noqa: N818 (it says what a path is, and becomes part of other errors)
    """A path that another user may have written to: which one, why, and the way out."""

    def __init__(self, problem: str, way_out: str) -> None:
        super().__init__(problem)
        self.way_out = way_out


_ELSEWHERE = "set INT8COMPILE_CACHE_DIR to a folder of your own"


class User(NamedTuple):
    """Who asks: whose files are trusted, and which groups have no other member."""

    uid: int
    private_groups: frozenset[int]
    #: who owns ``/``
    system: int


def current_user() -> User | None:
    """Who this process runs as; None where there are no user ids."""
    if not hasattr(os, "geteuid"):
        return None
    uid = os.geteuid()
    return User(uid, _private_groups(uid), os.stat("/").st_uid)


@functools.cache
def _private_groups(uid: int) -> frozenset[int]:
    """Root's own, and a group that has the user's name and nobody else in it."""
    import grp
    import pwd

    try:
        account = pwd.getpwuid(uid)
        group = grp.getgrgid(account.pw_gid)
    except KeyError:  # a container's user often has no name
        return frozenset({0})
    private = group.gr_name == account.pw_name and set(group.gr_mem) <= {account.pw_name}
    return frozenset({0, group.gr_gid}) if private else frozenset({0})


def check_folder(folder: Path) -> None:
    """Look at a folder, given by its real path, and at all those above it, as far as they are there.

    Raises:
        Untrusted: another user may have written to it, or could replace it.
        OSError: one of them cannot be looked at.
    """
    for path in (*reversed(folder.parents), folder):
        try:
            status = os.lstat(path)
        except FileNotFoundError:
            return
        _check(path, status, stat.S_ISDIR, "a folder", above=path != folder)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """A file, open for reading, in a folder that is trusted.

    Raises:
        Untrusted: another user may have written it, or it is no regular file.
        OSError: it is not there, a symbolic link, or cannot be read.
    """
    # Not to wait at a pipe, nor to follow a link to a file in another folder.
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, flags)
    try:
        _check(path, os.fstat(descriptor), stat.S_ISREG, "a regular file", above=False)
    except Untrusted:
        os.close(descriptor)
        raise
    with open(descriptor, "rb") as file:
        yield file


def check_own_folder(path: Path) -> None:
    """Look at one folder alone, which is in a folder that is trusted; raises as ``check_folder`` does."""
    _check(path, os.lstat(path), stat.S_ISDIR, "a folder", above=False)


def _check(path: Path, status: os.stat_result, is_kind: Callable[[int], bool], kind: str, *, above: bool) -> None:
    if not is_kind(status.st_mode):
        raise Untrusted(f"{path} is not {kind}", _ELSEWHERE)
    user = current_user()
    if user is None:
        return
    owner, mode = status.st_uid, stat.S_IMODE(status.st_mode)
    if owner not in (0, user.uid) and not (above and owner == user.system):
        raise Untrusted(f"{path} belongs to {_name(owner)}", _ELSEWHERE)
    if above and mode & stat.S_ISVTX:
        return
    ours = owner == user.uid and not mode & stat.S_ISVTX  # not /tmp, which is to stay as it is
    way_out = f"chmod go-w {path}" if ours else _ELSEWHERE
    if mode & stat.S_IWOTH:
        raise Untrusted(f"every user may write to {path} (mode {mode:04o})", way_out)
    if mode & stat.S_IWGRP and (status.st_gid not in user.private_groups or _has_acl(path)):
        raise Untrusted(f"other users may write to {path} (mode {mode:04o}, by its group)", way_out)


def _has_acl(path: Path) -> bool:
    """Whether the group's rights stand for those of other users and groups, too, which an access list then has."""
    try:
        return bool(os.getxattr(path, "system.posix_acl_access", follow_symlinks=False))
    except (AttributeError, OSError):  # not Linux; no list, or a file system that has none
        return False


def _name(uid: int) -> str:
    import pwd

    try:
        return f"user {pwd.getpwuid(uid).pw_name} ({uid})"
    except KeyError:
        return f"user {uid}"
