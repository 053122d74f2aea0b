"""Which files and folders another user may have written to: by owner, mode and group, and on the way to them."""

import os
import stat
from collections import namedtuple
from pathlib import Path

import pytest

from int8compile.native import trust
from int8compile.native.trust import Untrusted, User, check_folder, opened

needs_root = pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root gives files away")

ME, MALLORY, NOBODY = 41000, 41001, 65534  # the first two have no names
MY_GROUP, STAFF = 1000, 50


def check(owner: int, mode: int, group: int = STAFF, *, above: bool = False) -> str:
    """What is wrong with a folder of such an owner and mode; empty if nothing is."""
    status = os.stat_result((stat.S_IFDIR | mode, 1, 1, 2, owner, group, 0, 0, 0, 0))
    try:
        trust._check(Path("/some/folder"), status, stat.S_ISDIR, "a folder", above=above)
    except Untrusted as error:
        return f"{error} ({error.way_out})"
    return ""


@pytest.fixture
def be(monkeypatch):
    """Run as some user."""
    return lambda *user: monkeypatch.setattr(trust, "current_user", lambda: (user and User(*user)) or None)


@pytest.fixture
def as_me(be):
    be(ME, frozenset({0, MY_GROUP}), 0)


@pytest.mark.parametrize(
    ("owner", "mode", "group"),
    [(ME, 0o700, STAFF), (ME, 0o755, STAFF), (0, 0o755, 0), (ME, 0o775, MY_GROUP), (0, 0o775, 0)],
)
def test_own_and_roots_are_trusted(as_me, owner, mode, group):
    assert check(owner, mode, group) == ""
    assert check(owner, mode, group, above=True) == ""


@pytest.mark.parametrize("above", [False, True])
def test_anybody_elses_are_not(as_me, above):
    assert "/some/folder belongs to user 41001" in check(MALLORY, 0o700, above=above)
    assert "set INT8COMPILE_CACHE_DIR to a folder of your own" in check(MALLORY, 0o700, above=above)
    assert "every user may write to /some/folder (mode 0777) (chmod go-w" in check(ME, 0o777, above=above)
    assert "every user may write to /some/folder (mode 0757)" in check(0, 0o757, above=above)
    assert "other users may write to /some/folder (mode 0775, by its group)" in check(ME, 0o775, STAFF, above=above)
    assert "by its group" in check(ME, 0o2770, STAFF, above=above)


def test_root_does_not_trust_a_users_files(be):
    be(0, frozenset({0}), 0)
    assert "belongs to user 41000" in check(ME, 0o755)
    assert "belongs to user 41000" in check(ME, 0o755, above=True)  # HOME is another user's
    assert check(0, 0o700) == ""


def test_a_sticky_folder_will_do_on_the_way_only(as_me):
    assert check(0, 0o1777, above=True) == ""
    assert check(0, 0o1777).endswith("(mode 1777) (set INT8COMPILE_CACHE_DIR to a folder of your own)")
    assert "belongs to" in check(MALLORY, 0o1777, above=True)  # its owner may rename what is in it


def test_the_systems_folders_are_on_the_way_in_a_user_namespace(be):
    be(ME, frozenset({0}), NOBODY)
    assert check(NOBODY, 0o755, above=True) == ""
    assert "belongs to" in check(NOBODY, 0o755)
    assert "belongs to" in check(MALLORY, 0o755, above=True)
    assert "every user" in check(NOBODY, 0o777, above=True)


def test_a_group_of_one_with_an_access_list_is_more_than_one(as_me, monkeypatch):
    monkeypatch.setattr(os, "getxattr", lambda *args, **options: b"\2\0\0\0", raising=False)
    assert "by its group" in check(ME, 0o775, MY_GROUP)
    assert check(ME, 0o755, MY_GROUP) == ""

    def none(*args: object, **options: object) -> None:
        raise OSError(61, "no data")

    monkeypatch.setattr(os, "getxattr", none)
    assert check(ME, 0o775, MY_GROUP) == ""


def test_without_user_ids_everything_is_trusted(be, monkeypatch):
    be()
    assert check(MALLORY, 0o777) == ""
    monkeypatch.undo()
    monkeypatch.delattr(os, "geteuid")
    assert trust.current_user() is None


Account = namedtuple("Account", "pw_name pw_gid")
Group = namedtuple("Group", "gr_name gr_gid gr_mem")


@pytest.mark.parametrize(
    ("account", "group", "expected"),
    [
        (Account("ann", 1000), Group("ann", 1000, []), {0, 1000}),
        (Account("ann", 1000), Group("ann", 1000, ["ann"]), {0, 1000}),
        (Account("ann", 1000), Group("ann", 1000, ["ann", "mallory"]), {0}),
        (Account("ann", 100), Group("users", 100, []), {0}),  # of everybody, as their first group
        (None, None, {0}),
    ],
)
def test_private_groups(account, group, expected, monkeypatch):
    import grp
    import pwd

    def account_of(uid: int) -> Account:
        if account is None:
            raise KeyError(uid)
        return account

    monkeypatch.setattr(pwd, "getpwuid", account_of)
    monkeypatch.setattr(grp, "getgrgid", lambda gid: group)
    trust._private_groups.cache_clear()
    assert trust.current_user().private_groups == expected
    trust._private_groups.cache_clear()


def test_the_whole_way_to_a_folder_is_looked_at(tmp_path):
    folder = tmp_path.resolve() / "a" / "b"
    check_folder(folder)  # as far as it is there
    folder.mkdir(parents=True)
    check_folder(folder)
    (tmp_path / "a").chmod(0o777)
    with pytest.raises(Untrusted, match=r"every user may write to .*/a \(mode 0777\) *") as caught:
        check_folder(folder)
    assert caught.value.way_out == f"chmod go-w {tmp_path.resolve() / 'a'}"
    (tmp_path / "a").chmod(0o1777)
    check_folder(folder)
    (tmp_path / "link").symlink_to(folder.parent)
    with pytest.raises(Untrusted, match="link is not a folder"):
        check_folder(tmp_path.resolve() / "link" / "b")


@needs_root
def test_a_folder_of_another_users_on_the_way(tmp_path):
    folder = tmp_path.resolve() / "a" / "b"
    folder.mkdir(parents=True)
    os.chown(folder.parent, 42345, -1)
    with pytest.raises(Untrusted, match=r"/a belongs to user 42345$"):
        check_folder(folder)


class TestFiles:
    def test_a_file_is_read(self, tmp_path):
        (tmp_path / "file").write_bytes(b"bytes")
        os.link(tmp_path / "file", tmp_path / "again")  # of the same owner and mode, so no less trusted
        with opened(tmp_path / "again") as file:
            assert file.read() == b"bytes"

    def test_what_others_may_write_is_not(self, tmp_path):
        (tmp_path / "file").touch()
        (tmp_path / "file").chmod(0o666)
        with pytest.raises(Untrusted, match="every user may write to"), opened(tmp_path / "file"):
            pass

    @needs_root
    def test_nor_a_hard_link_to_another_users(self, tmp_path):
        (tmp_path / "file").touch()
        os.chown(tmp_path / "file", 42345, -1)
        os.link(tmp_path / "file", tmp_path / "link")
        with pytest.raises(Untrusted, match="link belongs to user 42345"), opened(tmp_path / "link"):
            pass

    def test_nor_what_is_no_file_and_none_is_waited_for(self, tmp_path):
        os.mkfifo(tmp_path / "pipe")
        (tmp_path / "folder").mkdir()
        for name in ("pipe", "folder"):
            with pytest.raises(Untrusted, match=f"{name} is not a regular file"), opened(tmp_path / name):
                pass
        (tmp_path / "file").touch()
        (tmp_path / "link").symlink_to("file")
        for name in ("link", "nothing"):
            with pytest.raises(OSError, match=name), opened(tmp_path / name):
                pass
        before = len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else 0
        for name in ("pipe", "folder", "link"):
            with pytest.raises(OSError), opened(tmp_path / name):  # noqa: PT011
                pass
        if before:
            assert len(os.listdir("/proc/self/fd")) == before
