"""Libraries that are kept: whole or not at all, found only as they were built, and no one else's."""

import contextlib
import errno
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tiny_library
import torch

from int8compile import native, native_build, native_cache, native_library, native_trust
from int8compile.errors import KernelBuildError

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
ANOTHER = 42345  # a user id that nobody has


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Iterator[Path]:
    """An empty cache folder, and a library named tiny."""
    monkeypatch.setenv("INT8COMPILE_CACHE_DIR", str(tmp_path / "cache"))
    with tiny_library.defined(tmp_path / "sources"):
        yield (tmp_path / "cache").resolve()


@pytest.fixture
def kept(cache, capfd) -> native_cache.Place:
    """Where the library is, which is there."""
    native.build("tiny")
    capfd.readouterr()
    return native.inspect("tiny")[0]


def copying(library: Path) -> Callable[[str, Path], Path]:
    """A compiler that is quick, and runs for every user, wherever Python's headers are."""
    data = library.read_bytes()

    def compile_library(name: str, folder: Path) -> Path:
        (folder / "built").write_bytes(data)
        return folder / "built"

    return compile_library


def warnings(caplog) -> list[str]:
    return [record.message for record in caplog.records if record.name == "int8compile.native"]


def fork(call: Callable[[], object], user: int | None = None) -> int:
    """Run in a process of its own, which has all that this one has imported, as another user if asked; its number."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            if user is not None:
                os.setgroups([])
                os.setgid(user)
                os.setuid(user)
            call()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return child


def in_child(call: Callable[[], object], user: int | None = None) -> int:
    """The exit code of such a process, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(fork(call, user), 0)[1])


def test_a_library_is_kept_with_its_checksum_and_found(kept, monkeypatch, caplog):
    digest = hashlib.sha256(kept.library.read_bytes()).hexdigest()
    assert kept.checksum.read_text() == f"{digest}  int8compile_tiny.so\n"  # as sha256sum -c has it
    monkeypatch.setattr(native_library, "compile_library", lambda *args: pytest.fail("was built again"))
    assert native.build("tiny") == kept.library == native.library_path("tiny")
    assert tiny_library.works(kept.library)
    assert not warnings(caplog)


@pytest.mark.parametrize(("given", "expected"), [(0o755, 0o755), (0o700, 0o700), (0o750, 0o750)])
def test_who_may_read_the_cache_folder_may_read_what_is_in_it_and_nobody_write(cache, given, expected):
    """Even with a umask that forbids nothing, or everything."""
    for umask in (0o000, 0o077):
        before = os.umask(umask)
        try:
            cache.mkdir()
            cache.chmod(given)
            library = native.build("tiny")
        finally:
            os.umask(before)
        modes = [path.stat().st_mode & 0o777 for path in (library.parent, library, Path(f"{library}.sha256"))]
        assert modes == [expected, expected, expected & 0o644]
        shutil.rmtree(cache)


def test_folders_on_the_way_are_made_for_this_user_alone(cache, monkeypatch):
    monkeypatch.setenv("INT8COMPILE_CACHE_DIR", str(cache / "a" / "b"))
    before = os.umask(0)
    try:
        native.build("tiny")
    finally:
        os.umask(before)
    assert [path.stat().st_mode & 0o777 for path in (cache, cache / "a", cache / "a" / "b")] == [0o700] * 3


def _a_link(path: Path, to: Path) -> None:
    """As a file that is whole, but somewhere else."""
    shutil.copy(path, to)
    path.unlink()
    path.symlink_to(to)


def _a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _a_folder(path: Path) -> None:
    path.unlink()
    (path / "something").mkdir(parents=True)


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE: dict[str, tuple[Callable[[native_cache.Place], object], str]] = {
    "truncated": (lambda p: os.truncate(p.library, 4096), "does not match its checksum"),
    "empty": (lambda p: os.truncate(p.library, 0), "does not match its checksum"),
    "garbage": (lambda p: p.library.write_bytes(os.urandom(20000)), "does not match its checksum"),
    "one bit": (lambda p: _flip(p.library), "does not match its checksum"),
    "another library": (lambda p: shutil.copy(torch._C.__file__, p.library), "does not match its checksum"),
    "a link": (lambda p: _a_link(p.library, p.folder / "elsewhere"), "cannot be read"),
    "a pipe": (lambda p: _a_pipe(p.library), "is not a regular file"),
    "a folder": (lambda p: _a_folder(p.library), "is not a regular file"),
    "others may write": (lambda p: p.library.chmod(0o777), "every user may write to"),
    "no checksum": (lambda p: p.checksum.unlink(), "has no checksum"),
    "empty checksum": (lambda p: os.truncate(p.checksum, 0), "does not match its checksum"),
    "half a checksum": (lambda p: os.truncate(p.checksum, 32), "does not match its checksum"),
    "wrong checksum": (lambda p: p.checksum.write_text("0" * 64), "does not match its checksum"),
    "checksum is a pipe": (lambda p: _a_pipe(p.checksum), "is not a regular file"),
    "checksum is a folder": (lambda p: _a_folder(p.checksum), "is not a regular file"),
    "others may write the checksum": (lambda p: p.checksum.chmod(0o666), "every user may write to"),
    "others may write the folder": (lambda p: p.library.parent.chmod(0o777), "every user may write to"),
    "the folder is a file": (lambda p: (shutil.rmtree(p.library.parent), p.library.parent.touch()), "not a folder"),
    "the folder is a link": (
        lambda p: p.library.parent.symlink_to(p.library.parent.rename(p.folder / "elsewhere")),
        "is not a folder",
    ),
}
if os.geteuid() == 0:
    DAMAGE |= {
        "another's": (lambda p: os.chown(p.library, ANOTHER, -1), f"belongs to user {ANOTHER}"),
        "another's checksum": (lambda p: os.chown(p.checksum, ANOTHER, -1), f"belongs to user {ANOTHER}"),
        "another's folder": (lambda p: os.chown(p.library.parent, ANOTHER, -1), f"belongs to user {ANOTHER}"),
    }
else:
    DAMAGE["unreadable"] = (lambda p: p.library.chmod(0), "cannot be read (Permission denied)")


@pytest.mark.parametrize("kind", DAMAGE)
def test_what_is_not_as_it_was_built_is_built_anew_once(kept, kind, caplog, capfd, monkeypatch):
    """In its place, since the cache folder is this user's; with one warning, and not from whatever was planted."""
    damage, expected = DAMAGE[kind]
    damage(kept)
    native.load("tiny")
    (message,) = warnings(caplog)
    assert expected in message
    assert str(kept.library.parent) in message
    assert message.endswith("; it has been built anew")
    assert capfd.readouterr().err.count("compiling") == 1
    # All is well from then on.
    monkeypatch.setattr(native_library, "compile_library", lambda *args: pytest.fail("was built again"))
    assert native.build("tiny") == kept.library
    assert tiny_library.works(kept.library)
    assert warnings(caplog) == [message]
    assert not list(kept.folder.glob("building-*"))


def test_a_library_that_does_not_load_is_built_anew_once(kept, caplog, capfd):
    """Although its checksum is right, as on a system with other libraries."""
    kept.library.write_bytes(b"not a library")
    kept.checksum.write_text(hashlib.sha256(b"not a library").hexdigest())
    native.load("tiny")
    (message,) = warnings(caplog)
    assert f"{kept.library} does not load (" in message
    assert message.endswith("; it has been built anew")
    assert capfd.readouterr().err.count("compiling") == 1
    assert tiny_library.works(kept.library)


def test_a_library_that_never_loads_is_an_error_and_built_once_a_process(tmp_path, monkeypatch, caplog, capfd):
    monkeypatch.setenv("INT8COMPILE_CACHE_DIR", str(tmp_path / "cache"))
    with tiny_library.defined(tmp_path, 'extern "C" int nowhere(); int call() { return nowhere(); }\n'):
        native.build("tiny")  # linked, as by another system, and now at hand
        capfd.readouterr()
        load = native.load
        monkeypatch.setattr(native, "load", lambda name: load("tiny"))
        for _ in range(2):
            with pytest.raises(KernelBuildError, match="tiny kernels do not load, although .*: .*nowhere"):
                native.choose_provider("native", [torch.ones(1)])
            assert not native.choose_provider("auto", [torch.ones(1)]).native
        (message,) = warnings(caplog)
        assert "the tiny kernels do not load" in message
        assert capfd.readouterr().err.count("compiling") == 1


def test_a_damaged_library_is_named_where_none_can_be_built(kept, monkeypatch):
    os.truncate(kept.library, 100)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(KernelBuildError, match=r"\(no-such-compiler\) was found \(.*tiny\.so is damaged"):
        native.load("tiny")


class TestFoldersThatWillNotDo:
    """A temporary folder takes their place, with one warning."""

    @pytest.fixture
    def built_elsewhere(self, cache, caplog) -> Callable[[], str]:
        """Build, check that it was in a temporary folder that is this user's alone, and return the warning."""

        def build() -> str:
            library = native.build("tiny")
            assert library.parent.parent == native_cache.temporary_in_use()
            assert library.parent.parent.name.startswith("int8compile-")
            assert library.parent.parent.stat().st_mode & 0o777 == 0o700
            assert tiny_library.works(library)
            assert native.build("tiny") == library == native.library_path("tiny")
            native.load("tiny")
            (message,) = warnings(caplog)
            assert message.endswith("; kernels are built in a temporary folder, for this process alone")
            with pytest.raises(KernelBuildError, match="the tiny kernels cannot be kept: "):
                native.build("tiny", keep=True)  # for `int8compile build`
            return message

        return build

    def test_others_may_write(self, kept, built_elsewhere):
        kept.library.write_bytes(b"planted")
        kept.folder.chmod(0o777)
        message = built_elsewhere()
        assert f"cache folder {kept.folder} is not used: every user may write to {kept.folder} (mode 0777)" in message
        assert f"chmod go-w {kept.folder}" in message
        assert kept.library.read_bytes() == b"planted"

    def test_others_may_write_above(self, kept, built_elsewhere):
        kept.folder.parent.chmod(0o777)
        assert f"every user may write to {kept.folder.parent} (mode 0777)" in built_elsewhere()

    @needs_root
    def test_anothers(self, kept, built_elsewhere):
        os.chown(kept.folder, ANOTHER, -1)
        assert f"{kept.folder} belongs to user {ANOTHER}" in built_elsewhere()

    @needs_root
    def test_anothers_by_a_link(self, kept, built_elsewhere, monkeypatch):
        os.chown(kept.folder, ANOTHER, -1)
        link = kept.folder.with_name("link")
        link.symlink_to(kept.folder)
        monkeypatch.setenv("INT8COMPILE_CACHE_DIR", str(link))
        assert f"cache folder {link} is not used: {kept.folder} belongs to user {ANOTHER}" in built_elsewhere()

    @needs_root
    def test_anothers_home(self, tmp_path, built_elsewhere, monkeypatch):
        """As sudo may leave it to root."""
        home = tmp_path / "home"
        home.mkdir()
        os.chown(home, ANOTHER, -1)
        monkeypatch.delenv("INT8COMPILE_CACHE_DIR")
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setenv("HOME", str(home))
        assert f"{home.resolve()} belongs to user {ANOTHER}" in built_elsewhere()
        assert not list(home.iterdir())

    def test_a_file_and_what_is_below_one(self, cache, built_elsewhere, monkeypatch):
        cache.touch()
        assert f"{cache} is not a folder" in built_elsewhere()
        monkeypatch.setenv("INT8COMPILE_CACHE_DIR", str(cache / "below"))
        with pytest.raises(KernelBuildError, match=f"{cache} is not a folder"):
            native.build("tiny", keep=True)

    def test_a_folder_that_cannot_be_made(self, built_elsewhere, monkeypatch):
        monkeypatch.setenv("INT8COMPILE_CACHE_DIR", "/proc/x")
        assert "the folder /proc/x cannot be used: No such file or directory (set INT8COMPILE" in built_elsewhere()

    def test_links_in_a_circle(self, cache, built_elsewhere):
        cache.symlink_to(cache)
        built_elsewhere()

    def test_programs_do_not_run_from_it(self, kept, built_elsewhere, monkeypatch):
        statvfs = os.statvfs

        class NoExec:
            f_flag = os.ST_NOEXEC

        monkeypatch.setattr(os, "statvfs", lambda path: NoExec if path == kept.folder else statvfs(path))
        assert f"the folder {kept.folder} cannot be used: it is mounted noexec" in built_elsewhere()

    @pytest.mark.parametrize("home", ["", "relative", None])
    def test_no_home(self, home, built_elsewhere, monkeypatch, tmp_path):
        for name in ("INT8COMPILE_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
            monkeypatch.delenv(name, raising=False)
        if home is None:  # nor an entry in the system's list of users, as in many containers

            def no_home(path: Path) -> Path:
                raise RuntimeError("Could not determine home directory.")

            monkeypatch.setattr(Path, "expanduser", no_home)
        else:
            monkeypatch.setenv("HOME", home)
        monkeypatch.chdir(tmp_path)
        assert "there is no home folder for a cache: HOME is " in built_elsewhere()

    def test_a_home_that_is_not_there_is_made(self, cache, monkeypatch):
        for name in ("INT8COMPILE_CACHE_DIR", "XDG_CACHE_HOME"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("HOME", str(cache / "home"))
        assert native.build("tiny").is_relative_to(cache / "home" / ".cache" / "int8compile")

    @pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
    def test_a_disk_that_is_full(self, cache, built_elsewhere, monkeypatch, code):
        """When the compiler writes, or when the library is to be kept."""
        compile_library, fsync = native_library.compile_library, os.fsync

        def compiler(name: str, folder: Path) -> Path:
            if folder.is_relative_to(cache):
                native_build._raise_if_full(folder, RuntimeError(f"as: cannot write: {os.strerror(code)}"))
            return compile_library(name, folder)

        def failing(descriptor: int) -> None:
            if Path(os.readlink(f"/proc/self/fd/{descriptor}")).is_relative_to(cache):
                raise OSError(code, os.strerror(code))
            fsync(descriptor)

        monkeypatch.setattr(native_library, "compile_library", compiler)
        if code != errno.ENOSPC:
            monkeypatch.setattr(os, "fsync", failing)
        assert f"the folder {cache} cannot be used: {os.strerror(code)}" in built_elsewhere()
        assert not list(cache.glob("building-*"))
        assert not list(cache.glob("tiny-*/*"))

    def test_no_temporary_folder_either(self, cache, monkeypatch, caplog):
        cache.touch()

        def none(*args: object, **options: object) -> None:
            raise FileNotFoundError("No usable temporary directory found")

        monkeypatch.setattr(tempfile, "mkdtemp", none)
        monkeypatch.setattr(native, "load", lambda name: native.build("tiny"))
        expected = r"cannot be built: the cache folder .* is not a folder .*; there is no temporary folder either: No usa"
        with pytest.raises(KernelBuildError, match=expected):
            native.choose_provider("native", [torch.ones(1)])
        for _ in range(2):
            assert native.choose_provider("auto", [torch.ones(1)]).name == "reference (cpu)"
        (message,) = warnings(caplog)
        assert message.endswith("; the slower reference operators are used instead")

    def test_a_temporary_folder_that_others_could_replace(self, cache, monkeypatch, tmp_path):
        """The next will do."""
        (tmp_path / "shared").mkdir()
        (tmp_path / "shared").chmod(0o777)
        cache.touch()
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "shared"))
        library = native.build("tiny")
        assert not library.is_relative_to(tmp_path)
        assert not list((tmp_path / "shared").iterdir())

    @pytest.mark.parametrize("kernels", ["auto", "native"])
    def test_kernels_are_native_all_the_same(self, cache, kernels, monkeypatch):
        cache.touch()
        monkeypatch.setattr(native, "load", lambda name: native.build("tiny"))
        monkeypatch.setattr(native, "_kernel_set", lambda device: "tiny")
        assert native.choose_provider(kernels, [torch.ones(1)]).native


def test_the_temporary_folder_goes_with_its_process(tmp_path):
    """Not with one that was forked from it."""
    code = (
        "import os, sys\n"
        "import tiny_library\n"
        f"tiny_library.define(tiny_library.Path({str(tmp_path)!r}))\n"
        "from int8compile import native, native_cache\n"
        "library = native.build('tiny')\n"
        "if os.fork() == 0:\n"
        "    sys.exit(0)\n"
        "os.wait()\n"
        "assert library.exists()\n"
        "print(library)\n"
    )
    env = {**os.environ, "INT8COMPILE_CACHE_DIR": "/proc/x"}
    env["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    library = Path(done.stdout.strip())
    assert library.name == "int8compile_tiny.so"
    assert not library.parent.parent.exists()


@contextlib.contextmanager
def open_to_all() -> Iterator[Path]:
    """A folder that every user can go into, which pytest's own is not."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name).resolve()


@needs_root
class TestOfAnotherUser:
    """A cache folder that root has filled, as in a container image, for a user who can only read it."""

    @pytest.fixture
    def prebuilt(self, monkeypatch) -> Iterator[native_cache.Place]:
        with open_to_all() as folder, tiny_library.defined(folder / "sources"):
            (folder / "cache").mkdir(mode=0o755)
            monkeypatch.setenv("INT8COMPILE_CACHE_DIR", str(folder / "cache"))
            native.build("tiny")
            yield native.inspect("tiny")[0]

    def test_it_is_used_without_a_lock(self, prebuilt, monkeypatch, capfd):
        for path in prebuilt.folder.glob("*.lock"):
            path.unlink()

        def load() -> None:
            monkeypatch.setattr(native_library, "compile_library", lambda *args: pytest.fail("was built"))
            native.load("tiny")
            assert native.library_path("tiny") == prebuilt.library

        assert in_child(load, ANOTHER) == 0, capfd.readouterr().err
        assert not list(prebuilt.folder.glob("*.lock"))

    def test_what_it_lacks_or_hides_is_built_elsewhere(self, prebuilt, monkeypatch, capfd):
        monkeypatch.setattr(native_library, "compile_library", copying(prebuilt.library))

        def load() -> None:
            monkeypatch.setattr(native, "_warn_once", lambda message: print(message, file=sys.stderr))
            native.load("tiny")
            assert native.library_path("tiny").parent.parent == native_cache.temporary_in_use()
            native_cache._remove_temporary(os.getpid())

        for change, expected in [
            (lambda: prebuilt.library.chmod(0o700), "int8compile_tiny.so cannot be read (Permission denied); the folder"),
            (lambda: os.truncate(prebuilt.library, 10), "is damaged"),
            (lambda: shutil.rmtree(prebuilt.library.parent), "cannot be used: Permission denied"),
            (lambda: prebuilt.folder.chmod(0o700), "cannot be used: Permission denied"),
        ]:
            change()
            assert in_child(load, ANOTHER) == 0, capfd.readouterr().err
            assert expected in capfd.readouterr().err

    def test_what_a_user_has_filled_is_not_for_root(self, prebuilt):
        os.chown(prebuilt.folder, ANOTHER, -1)
        assert str(native.build("tiny")).startswith(str(native_cache.temporary_in_use()))


def test_a_process_that_is_killed_leaves_nothing_or_all(kept, monkeypatch):
    """At every line that it runs, while it puts a library into the place of one that is damaged."""
    whole, half = kept.library.read_bytes(), kept.library.read_bytes()[:100]
    monkeypatch.setattr(native_library, "compile_library", copying(kept.library))
    traced = {function.__code__ for function in (native_cache.keep, native_cache._remove)}
    lines: list[tuple[str, int]] = []

    def build(at_line: Callable[[tuple[str, int]], object]) -> None:
        def trace(frame, event, argument):
            if event == "line" and frame.f_code in traced:
                at_line((frame.f_code.co_name, frame.f_lineno))
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            native.build("tiny")
        finally:
            sys.settrace(before)

    kept.library.write_bytes(half)
    build(lines.append)
    assert len(lines) > 15
    for line in lines:
        kept.library.write_bytes(half)
        killed = in_child(lambda here=line: build(lambda at: at == here and os.kill(os.getpid(), signal.SIGKILL)))
        assert killed == -signal.SIGKILL
        there = {path.name: path.read_bytes() for path in kept.folder.glob(f"{kept.key}/*")}
        if native_cache.state(kept).ready:
            assert there[kept.library.name] == whole, line
        else:
            assert there.get(kept.library.name, half) == half, line  # nothing new without its checksum
            assert list(kept.folder.glob("building-*"))
            native.build("tiny")
            assert native_cache.state(kept).ready
            assert not list(kept.folder.glob("building-*"))


def test_eight_processes_that_start_together_build_once(cache, capfd):
    reading, writing = os.pipe()

    def build() -> None:
        os.close(writing)
        os.read(reading, 1)  # until all are there
        native.build("tiny")
        assert tiny_library.works(native.library_path("tiny"))

    children = [fork(build) for _ in range(8)]
    os.close(reading)
    os.close(writing)
    codes = [os.waitpid(child, 0)[1] for child in children]
    messages = capfd.readouterr().err
    assert codes == [0] * 8, messages
    assert messages.count("compiling") == 1
    assert not list(cache.glob("building-*"))


def test_without_locks_processes_do_not_disturb_each_other(kept, monkeypatch):
    """As on a network file system that has none; what another one is building is left alone."""

    @contextlib.contextmanager
    def unlocked(path: Path) -> Iterator[bool]:
        yield False

    monkeypatch.setattr(native_cache, "locked", unlocked)
    theirs = kept.folder / f"building-{kept.key}-theirs"
    theirs.mkdir()
    os.truncate(kept.library, 100)
    native.build("tiny")
    assert theirs.exists()
    assert tiny_library.works(kept.library)
    # One that was faster: its library is as good.
    rename = Path.rename

    def late(path: Path, target: Path) -> Path:
        if target == kept.library.parent:
            shutil.copytree(path, target)
        return rename(path, target)

    os.truncate(kept.library, 100)
    monkeypatch.setattr(Path, "rename", late)
    assert native.build("tiny") == kept.library
    assert native_cache.state(kept).ready


@pytest.mark.parametrize("error", [OSError(errno.ENOLCK, "No locks available"), NotImplementedError("no flock")])
def test_where_there_are_no_locks_it_is_said(tmp_path, monkeypatch, error):
    with native_cache.locked(tmp_path / "lock") as held:
        assert held

    def fail(self: object) -> None:
        raise error

    monkeypatch.setattr(native_cache.filelock.FileLock, "_acquire", fail)
    with native_cache.locked(tmp_path / "lock") as held:
        assert not held


def test_nobody_else_can_hold_a_lock(kept):
    (lock,) = kept.folder.glob("*.lock")
    assert lock.stat().st_mode & 0o077 == 0
    assert native_trust.current_user() is None or lock.stat().st_uid == os.geteuid()
