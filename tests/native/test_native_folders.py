"""Cache folders that will not do, or can only be read: libraries are built in a temporary folder, or found."""

import contextlib
import errno
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tiny_library
import torch
from checkout import HELPERS
from tiny_library import ANOTHER, copying, in_child, needs_root, warnings

from int8compile.errors import KernelBuildError
from int8compile.native import builder, kernel_cache, libraries, loader, providers


class TestFoldersThatWillNotDo:
    """A temporary folder takes their place, with one warning."""

    @pytest.fixture
    def built_elsewhere(self, cache, caplog) -> Callable[[], str]:
        """Build, check that it was in a temporary folder that is this user's alone, and return the warning."""

        def build() -> str:
            library = loader.build("tiny")
            assert library.parent.parent == kernel_cache.temporary_in_use()
            assert library.parent.parent.name.startswith("int8compile-")
            assert library.parent.parent.stat().st_mode & 0o777 == 0o700
            assert tiny_library.works(library)
            assert loader.build("tiny") == library == loader.binary_path("tiny")
            loader.load("tiny")
            (message,) = warnings(caplog)
            assert message.endswith("; kernels are built in a temporary folder, for this process alone")
            with pytest.raises(KernelBuildError, match="the tiny kernels cannot be kept: "):
                loader.build("tiny", keep=True)  # for `int8compile build`
            return message

        return build

    def test_others_may_write(self, kept, built_elsewhere):
        kept.binary.write_bytes(b"planted")
        kept.folder.chmod(0o777)
        message = built_elsewhere()
        assert f"cache folder {kept.folder} is not used: every user may write to {kept.folder} (mode 0777)" in message
        assert f"chmod go-w {kept.folder}" in message
        assert kept.binary.read_bytes() == b"planted"

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
            loader.build("tiny", keep=True)

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

    def test_a_folder_that_another_process_makes_first(self, cache, built_elsewhere, monkeypatch):
        def make(folder: Path) -> None:
            folder.mkdir()
            folder.chmod(0o777)

        monkeypatch.setattr(kernel_cache, "_make", make)
        assert f"every user may write to {cache}" in built_elsewhere()

    def test_a_relative_cache_folder_is_none(self, cache, monkeypatch, tmp_path):
        """As the XDG specification has it; and one that begins with ~ is in the user's home, though no shell saw it."""
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setenv("XDG_CACHE_HOME", "relative")
        monkeypatch.setenv("INT8COMPILE_CACHE_DIR", "~/cache")
        assert loader.binary_path("tiny").is_relative_to(cache)
        monkeypatch.delenv("INT8COMPILE_CACHE_DIR")
        assert loader.binary_path("tiny").is_relative_to(tmp_path.resolve() / ".cache" / "int8compile")

    def test_a_home_that_is_not_there_is_made(self, cache, monkeypatch):
        for name in ("INT8COMPILE_CACHE_DIR", "XDG_CACHE_HOME"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("HOME", str(cache / "home"))
        assert loader.build("tiny").is_relative_to(cache / "home" / ".cache" / "int8compile")

    @pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
    def test_a_disk_that_is_full(self, cache, built_elsewhere, monkeypatch, code):
        """When the compiler writes, or when the library is to be kept."""
        compile_library, fsync = libraries.compile_library, os.fsync

        def compiler(name: str, folder: Path) -> Path:
            if folder.is_relative_to(cache):
                builder._raise_if_full(folder, RuntimeError(f"as: cannot write: {os.strerror(code)}"))
            return compile_library(name, folder)

        def failing(descriptor: int) -> None:
            if Path(os.readlink(f"/proc/self/fd/{descriptor}")).is_relative_to(cache):
                raise OSError(code, os.strerror(code))
            fsync(descriptor)

        monkeypatch.setattr(libraries, "compile_library", compiler)
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
        monkeypatch.setattr(loader, "load", lambda name: loader.build("tiny"))
        expected = r"cannot be built: the cache folder .* is not a folder .*; there is no temporary folder either: No "
        with pytest.raises(KernelBuildError, match=expected):
            providers.choose_provider("native", [torch.ones(1)])
        for _ in range(2):
            assert providers.choose_provider("auto", [torch.ones(1)]).name == "reference (cpu)"
        (message,) = warnings(caplog)
        assert message.endswith("; the slower reference operators are used instead")

    def test_a_temporary_folder_that_others_could_replace(self, cache, monkeypatch, tmp_path):
        """The next will do."""
        (tmp_path / "shared").mkdir()
        (tmp_path / "shared").chmod(0o777)
        cache.touch()
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "shared"))
        library = loader.build("tiny")
        assert not library.is_relative_to(tmp_path)
        assert not list((tmp_path / "shared").iterdir())

    @pytest.mark.parametrize("kernels", ["auto", "native"])
    def test_kernels_are_native_all_the_same(self, cache, kernels, monkeypatch):
        cache.touch()
        monkeypatch.setattr(loader, "load", lambda name: loader.build("tiny"))
        monkeypatch.setattr(providers, "_kernel_set", lambda device: "tiny")
        assert providers.choose_provider(kernels, [torch.ones(1)]).native


def test_the_temporary_folder_goes_with_its_process(tmp_path):
    """Not with one that was forked from it."""
    code = (
        "import os, sys\n"
        "import tiny_library\n"
        f"tiny_library.define(tiny_library.Path({str(tmp_path)!r}))\n"
        "from int8compile.native import libraries, loader, providers; from int8compile.native import kernel_cache\n"
        "library = loader.build('tiny')\n"
        "if os.fork() == 0:\n"
        "    sys.exit(0)\n"
        "os.wait()\n"
        "assert library.exists()\n"
        "print(library)\n"
    )
    env = {**os.environ, "INT8COMPILE_CACHE_DIR": "/proc/x"}
    env["PYTHONPATH"] = os.pathsep.join([str(HELPERS), *sys.path])
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
    def prebuilt(self, monkeypatch) -> Iterator[kernel_cache.Place]:
        with open_to_all() as folder, tiny_library.defined(folder / "sources"):
            (folder / "cache").mkdir(mode=0o755)
            monkeypatch.setenv("INT8COMPILE_CACHE_DIR", str(folder / "cache"))
            loader.build("tiny")
            yield libraries.inspect("tiny")[0]

    def test_it_is_used_without_a_lock(self, prebuilt, monkeypatch, capfd):
        for path in prebuilt.folder.glob("*.lock"):
            path.unlink()

        def load() -> None:
            monkeypatch.setattr(libraries, "compile_library", lambda *args: pytest.fail("was built"))
            loader.load("tiny")
            assert loader.binary_path("tiny") == prebuilt.binary

        assert in_child(load, ANOTHER) == 0, capfd.readouterr().err
        assert not list(prebuilt.folder.glob("*.lock"))

    def test_what_it_lacks_or_hides_is_built_elsewhere(self, prebuilt, monkeypatch, capfd):
        monkeypatch.setattr(libraries, "compile_library", copying(prebuilt.binary))

        def load() -> None:
            monkeypatch.setattr(loader, "warn_once", lambda message: print(message, file=sys.stderr))
            loader.load("tiny")
            assert loader.binary_path("tiny").parent.parent == kernel_cache.temporary_in_use()
            kernel_cache._remove_temporary(os.getpid())

        for change, expected in [
            (
                lambda: prebuilt.binary.chmod(0o700),
                "tiny.so cannot be read (Permission denied); the folder",
            ),
            (lambda: (prebuilt.binary.chmod(0o755), os.truncate(prebuilt.binary, 10)), "is damaged"),
            (lambda: shutil.rmtree(prebuilt.binary.parent), "cannot be used: Permission denied"),
            (lambda: prebuilt.folder.chmod(0o700), "cannot be used: Permission denied"),
        ]:
            change()
            assert in_child(load, ANOTHER) == 0, capfd.readouterr().err
            assert expected in capfd.readouterr().err

    def test_what_a_user_has_filled_is_not_for_root(self, prebuilt):
        os.chown(prebuilt.folder, ANOTHER, -1)
        assert str(loader.build("tiny")).startswith(str(kernel_cache.temporary_in_use()))
