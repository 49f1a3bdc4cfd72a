import errno
import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import textwrap
import threading
from pathlib import Path

import pytest

import xmag
from xmag.errors import OutputError
from xmag.files import atomic_path, sha256_of, write_bytes, write_text

_REPOSITORY = Path(xmag.__file__).parents[1]
_posix = pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals and permissions")


def _child(code: str, *arguments: object) -> str:
    """What a fresh interpreter prints that runs `code` with these arguments."""
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        cwd=_REPOSITORY, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def mount(tmp_path):
    """A function that mounts a small tmpfs with the given options, where this may be done."""
    mounted = []

    def mount(options: str) -> Path:
        folder = tmp_path / f"mounted-{len(mounted)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("mounting a tmpfs is not allowed here")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("name", ["bag.h5", "Fall 1 – Präparat (é).h5", "ohne-endung"])
def test_what_was_written_is_there_and_nothing_else(tmp_path, name):
    write_bytes(tmp_path / name, b"old")
    write_bytes(str(tmp_path / name), b"new")

    assert (tmp_path / name).read_bytes() == b"new"
    assert _names(tmp_path) == [name]


def test_a_relative_path_is_one_from_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_bytes("a", b"x")
    assert Path("a").read_bytes() == b"x"


def test_text_is_utf8_with_its_line_ends_as_they_are(tmp_path):
    write_text(tmp_path / "a.csv", "µm\r\nx\ny")
    assert (tmp_path / "a.csv").read_bytes() == "µm\r\nx\ny".encode()


@pytest.mark.parametrize("failure", [RuntimeError("no"), KeyboardInterrupt(), OSError(5, "slide")])
def test_a_failure_while_writing_leaves_the_old_file_and_keeps_its_reason(tmp_path, failure):
    (tmp_path / "bag.h5").write_bytes(b"old")

    def write_half():
        with atomic_path(tmp_path / "bag.h5") as temp:
            temp.write_bytes(b"half")
            raise failure

    with pytest.raises(type(failure)) as caught:
        write_half()
    assert caught.value is failure
    assert (tmp_path / "bag.h5").read_bytes() == b"old"
    assert _names(tmp_path) == ["bag.h5"]


def test_a_failed_check_leaves_the_old_file(tmp_path):
    (tmp_path / "bag.h5").write_bytes(b"old")
    seen = []

    def check(temp):
        seen.append(temp.read_bytes())
        raise ValueError("damaged")

    with pytest.raises(ValueError, match="damaged"):
        write_bytes(tmp_path / "bag.h5", b"new", validate=check)
    assert seen == [b"new"]
    assert (tmp_path / "bag.h5").read_bytes() == b"old"
    assert _names(tmp_path) == ["bag.h5"]


def test_the_temporary_file_lies_beside_and_does_not_look_like_a_result(tmp_path):
    with atomic_path(tmp_path / "bag.h5") as temp:
        assert temp.parent == tmp_path
        assert temp.exists()
        assert list(tmp_path.glob("*.h5")) == []
        assert temp.name.startswith(".")
        assert temp.name.endswith(".xmag-tmp")


@_posix
def test_bytes_reach_the_disk_before_the_name_and_the_name_before_the_return(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, Path.replace

    def spy_fsync(descriptor):
        calls.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    def spy_replace(self, target):
        calls.append("replace")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(Path, "replace", spy_replace)
    write_bytes(tmp_path / "a", b"x", validate=lambda temp: calls.append("check"))

    assert calls == ["file", "check", "replace", "folder"]


@_posix
def test_a_folder_that_cannot_be_synced_does_not_matter(tmp_path, monkeypatch):
    fsync = os.fsync

    def refuse_folders(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "not on this file system")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse_folders)
    write_bytes(tmp_path / "a", b"x")
    assert (tmp_path / "a").read_bytes() == b"x"


@_posix
def test_permissions_are_those_of_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        write_bytes(tmp_path / "a", b"x")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


@_posix
def test_a_symbolic_link_is_written_through(tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "link.h5").symlink_to(tmp_path / "store" / "bag.h5")

    write_bytes(tmp_path / "link.h5", b"x")
    assert (tmp_path / "link.h5").is_symlink()
    assert (tmp_path / "store" / "bag.h5").read_bytes() == b"x"


def test_threads_that_write_the_same_path_leave_one_whole_file(tmp_path):
    contents = [bytes([i]) * 500_000 for i in range(8)]
    threads = [
        threading.Thread(target=write_bytes, args=(tmp_path / "a", content)) for content in contents
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert (tmp_path / "a").read_bytes() in contents
    assert _names(tmp_path) == ["a"]


@pytest.mark.parametrize(
    ("place", "remedy"),
    [
        ("missing/bag.h5", "create the folder"),
        ("file/bag.h5", "is a file, not a folder"),
        ("folder", "give the path of a file"),
        ("x" * 300, "a shorter name"),
    ],
)
def test_a_place_that_cannot_be_written_is_named_with_the_remedy(tmp_path, place, remedy):
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "folder").mkdir()

    with pytest.raises(OutputError) as caught:
        write_bytes(tmp_path / place, b"x")
    assert str(tmp_path / place) in str(caught.value)
    assert remedy in str(caught.value)
    assert _names(tmp_path) == ["file", "folder"]


@pytest.mark.parametrize("place", ["missing/bag.h5", "file/bag.h5", "folder"])
def test_a_bad_place_is_known_before_anything_is_computed(tmp_path, place):
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError), atomic_path(tmp_path / place):
        pytest.fail("the body ran")


@_posix
def test_a_folder_without_write_permission_is_an_output_error():
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    code = """
        import os, sys
        from xmag.errors import OutputError
        from xmag.files import write_bytes
        if os.geteuid() == 0:
            os.setuid(65534)  # permissions do not bind root
        try:
            write_bytes(sys.argv[1], b"x")
        except OutputError as error:
            print(error)
    """
    try:
        folder.chmod(0o555)
        message = _child(code, folder / "bag.h5")
        assert f"cannot write {folder / 'bag.h5'}: Permission denied; write to a folder" in message
        folder.chmod(0o000)
        assert "Permission denied" in _child(code, folder / "below" / "bag.h5")
    finally:
        folder.chmod(0o700)
        shutil.rmtree(folder)


def test_a_read_only_file_system_is_an_output_error(mount):
    folder = mount("ro,size=64k")
    with pytest.raises(OutputError, match="read-only"):
        write_bytes(folder / "bag.h5", b"x")


def test_a_full_disk_is_an_output_error_and_leaves_the_old_file(mount):
    folder = mount("size=256k")
    write_bytes(folder / "bag.h5", b"old")

    with pytest.raises(OutputError, match="No space left on device; free some space"):
        write_bytes(folder / "bag.h5", bytes(1_000_000))
    assert (folder / "bag.h5").read_bytes() == b"old"
    assert _names(folder) == ["bag.h5"]


@_posix
def test_a_limit_on_file_sizes_is_an_output_error_and_leaves_the_old_file(tmp_path):
    write_bytes(tmp_path / "bag.h5", b"old")
    message = _child(
        """
        import resource, sys
        from xmag.errors import OutputError
        from xmag.files import write_bytes
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        try:
            write_bytes(sys.argv[1], bytes(1_000_000))
        except OutputError as error:
            print(error)
        """,
        tmp_path / "bag.h5",
    )
    assert "File too large; raise the limit" in message
    assert (tmp_path / "bag.h5").read_bytes() == b"old"
    assert _names(tmp_path) == ["bag.h5"]


@_posix
@pytest.mark.parametrize("old", [b"old", None])
def test_a_run_killed_at_any_line_leaves_the_old_file_or_the_new_one(tmp_path, old):
    """Forks a writer for each line that it runs in xmag/files.py, and kills it there."""
    outcomes = json.loads(
        _child(
            """
            import json, os, signal, sys
            from pathlib import Path
            from xmag import files

            path, old = Path(sys.argv[1]), sys.argv[2]
            new = "new" * 100_000

            def write_and_die(lines):
                def trace(frame, event, argument):
                    nonlocal lines
                    if frame.f_code.co_filename != files.__file__:
                        return None
                    if event == "line":
                        lines -= 1
                        if lines == 0:
                            os.kill(os.getpid(), signal.SIGKILL)
                    return trace
                sys.settrace(trace)
                with files.atomic_path(path, validate=lambda temp: temp.read_text()) as temp:
                    with temp.open("w") as file:
                        file.write(new[:150_000])
                        file.flush()
                        file.write(new[150_000:])
                os._exit(0)

            outcomes, status, lines = [], 1, 0
            while status != 0:
                lines += 1
                path.unlink(missing_ok=True)
                if old:
                    path.write_text(old)
                child = os.fork()
                if child == 0:
                    write_and_die(lines)
                status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
                found = path.read_text() if path.exists() else ""
                outcomes.append([status, "new" if found == new else found])
            print(json.dumps(outcomes))
            """,
            tmp_path / "bag.h5",
            (old or b"").decode(),
        )
    )

    statuses = [status for status, _ in outcomes]
    assert statuses == [-9] * (len(outcomes) - 1) + [0]
    contents = [content for _, content in outcomes]
    switch = contents.index("new")
    assert switch > 10
    assert contents == [(old or b"").decode()] * switch + ["new"] * (len(contents) - switch)
    assert len(contents) - switch > 3
    leftovers = [name for name in _names(tmp_path) if name != "bag.h5"]
    assert all(name.endswith(".xmag-tmp") for name in leftovers)


def test_sha256_is_that_of_the_whole_file(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")  # FIPS 180-2, appendix B.1
    assert sha256_of(tmp_path / "a") == (
        "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    )
