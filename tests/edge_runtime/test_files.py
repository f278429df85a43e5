"""Files that are whole or absent, whatever happens while they are written."""

import errno
import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime import files
from edge_runtime.errors import ConfigError, EdgeRuntimeError, ManifestError
from edge_runtime.files import (
    check_target,
    read_json,
    replacing_folder,
    sha256,
    write_bytes,
    write_json,
)
from tests.edge_runtime.bundles import refused

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def contents(folder: Path) -> dict[str, str]:
    """Relative path -> text of every file below a folder."""
    return {
        str(path.relative_to(folder)): path.read_text()
        for path in folder.rglob("*")
        if path.is_file()
    }


def interrupted_at(line: int, error: BaseException, work) -> bool:
    """Run `work`, raising `error` as the n-th line of files.py begins; whether it came so far."""
    lines = itertools.count()
    raised = []

    def trace(frame, event, arg):
        if frame.f_code.co_filename != files.__file__:
            return None
        if event == "line" and not raised and next(lines) == line:
            raised.append(True)
            raise error
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    except type(error):
        assert raised
    except EdgeRuntimeError as mapped:
        assert raised
        assert mapped.__cause__ is error
        assert str(mapped).isprintable()
    finally:
        sys.settrace(before)
    return bool(raised)


def test_sha256():
    assert sha256(b"") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


class TestReadJson:
    def test_reads(self, tmp_path):
        (tmp_path / "a.json").write_text('{"a": [1, 2.5, null, "é"]}', encoding="utf-8")
        assert read_json(tmp_path / "a.json", "manifest") == {"a": [1, 2.5, None, "é"]}

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            (b"", "is not whole"),
            (b'{"a": 1', "is not whole"),
            (b'{"a": 1}}', "is not whole"),
            (b'{"a": 1, "b": 2, "a": 3}', "the key 'a' appears twice"),
            (b'{"a": NaN}', "NaN is not JSON"),
            (b'{"a": -Infinity}', "-Infinity is not JSON"),
            (b'{"a": 1e999}', "the number 1e999 is too large"),
            (b'{"a": ' + b"9" * 5000 + b"}", "is not whole"),
            (b'"\xff"', "is not whole"),
            (b"[" * 65 + b"]" * 65, "nested deeper than 64 levels"),
            (b"[" * 100_000, "is not whole"),
            (b'{"a":' * 100_000, "is not whole"),
            ('{"a": 1}'.encode("utf-16"), "is not whole"),
        ],
    )
    def test_refuses_what_is_not_whole(self, tmp_path, text, message):
        (tmp_path / "a.json").write_bytes(text)
        with refused(ManifestError, f"manifest {tmp_path}/a.json", message):
            read_json(tmp_path / "a.json", "manifest")

    def test_refuses_what_is_no_file(self, tmp_path):
        with refused(ManifestError, "manifest", "does not exist"):
            read_json(tmp_path / "absent.json", "manifest")
        with refused(ManifestError, "is not a plain file"):
            read_json(tmp_path, "manifest")
        with pytest.raises(ManifestError, match=r"can't be read: .*embedded null"):
            read_json(Path("a\0b"), "manifest")

    def test_does_not_wait_for_a_pipe(self, tmp_path):
        os.mkfifo(tmp_path / "pipe.json")
        with refused(ManifestError, "is not a plain file"):
            read_json(tmp_path / "pipe.json", "manifest")

    def test_refuses_a_huge_file_without_reading_it(self, tmp_path):
        with (tmp_path / "a.json").open("wb") as file:
            file.truncate(files.MAX_JSON_BYTES + 1)
        with refused(ManifestError, "got a file over 64 MiB"):
            read_json(tmp_path / "a.json", "manifest")

    @settings(deadline=None)
    @given(data=st.binary(max_size=60) | st.text('[]{}":,0.e-1\\', max_size=30).map(str.encode))
    def test_any_bytes_are_read_or_refused(self, tmp_path_factory, data):
        path = tmp_path_factory.getbasetemp() / "any.json"
        path.write_bytes(data)
        try:
            found = read_json(path, "manifest")
        except EdgeRuntimeError as error:
            assert type(error) is ManifestError
            assert str(error).isprintable()
        else:
            assert json.loads(data) == found


class TestWriteJson:
    def test_writes_what_is_read(self, tmp_path):
        data = {"a": [1, 2.5, None, "é\n"], "b": {}}
        write_json(tmp_path / "a.json", data)
        assert read_json(tmp_path / "a.json", "file") == data
        assert [path.name for path in tmp_path.iterdir()] == ["a.json"]

    def test_the_file_is_as_readable_as_any_other(self, tmp_path):
        (tmp_path / "other").write_text("")
        write_json(tmp_path / "a.json", 1)
        assert (tmp_path / "a.json").stat().st_mode == (tmp_path / "other").stat().st_mode

    @pytest.mark.parametrize("error", [FULL, KeyboardInterrupt()], ids=["full", "ctrl-c"])
    @pytest.mark.parametrize("exists", [True, False])
    def test_at_every_line_the_old_file_or_the_new_one(self, tmp_path, error, exists):
        for line in itertools.count():
            if exists:
                (tmp_path / "a.json").write_text('"old"')
            came = interrupted_at(line, error, lambda: write_json(tmp_path / "a.json", "new"))
            found = contents(tmp_path)
            assert found in ([{"a.json": '"old"'}] if exists else [{}]) + [{"a.json": '"new"\n'}]
            if not came:
                assert line > 10
                assert found == {"a.json": '"new"\n'}
                return
            (tmp_path / "a.json").unlink(missing_ok=True)

    def test_a_disk_that_is_really_full(self, tmp_path):
        """A file-size limit of the system, in a process of its own."""
        (tmp_path / "a.json").write_text('"old"')
        program = (
            "import resource, sys\n"
            "from pathlib import Path\n"
            "from edge_runtime import EdgeRuntimeError\n"
            "from edge_runtime.files import write_json\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
            "try:\n"
            "    write_json(Path(sys.argv[1]), 'x' * 100_000)\n"
            "except EdgeRuntimeError as error:\n"
            "    print(error)\n"
        )
        ran = subprocess.run(
            [sys.executable, "-c", program, str(tmp_path / "a.json")],
            capture_output=True,
            text=True,
            check=True,
            cwd=Path(files.__file__).parents[1],
        )
        assert ran.stdout == f"{tmp_path}/a.json can't be written: File too large\n"
        assert contents(tmp_path) == {"a.json": '"old"'}

    def test_where_it_can_not_be_written(self, tmp_path):
        with refused(EdgeRuntimeError, f"{tmp_path}/no/a.json can't be written: No such file"):
            write_json(tmp_path / "no" / "a.json", 1)
        (tmp_path / "folder").mkdir()
        with refused(EdgeRuntimeError, "can't be written: Is a directory"):
            write_json(tmp_path / "folder", 1)
        assert [path.name for path in tmp_path.iterdir()] == ["folder"]

    def test_a_link_stays_a_link(self, tmp_path):
        (tmp_path / "real.json").write_text("0")
        (tmp_path / "link.json").symlink_to("real.json")
        write_json(tmp_path / "link.json", 1)
        assert (tmp_path / "link.json").is_symlink()
        assert (tmp_path / "real.json").read_text() == "1\n"

    def test_a_pipe_is_written_to_and_stays(self, tmp_path):
        pipe = tmp_path / "pipe"
        os.mkfifo(pipe)
        got = []
        reader = threading.Thread(target=lambda: got.append(pipe.read_text()))
        reader.start()
        write_json(pipe, [1])
        reader.join()
        assert got == ["[\n  1\n]\n"]
        assert pipe.is_fifo()

    def test_numbers_that_are_not_json_write_nothing(self, tmp_path):
        with pytest.raises(ValueError, match="JSON compliant"):
            write_json(tmp_path / "a.json", float("nan"))
        assert contents(tmp_path) == {}


class TestWriteBytes:
    @pytest.mark.parametrize("error", [FULL, KeyboardInterrupt()], ids=["full", "ctrl-c"])
    def test_at_every_line_the_old_file_or_the_new_one(self, tmp_path, error):
        for line in itertools.count():
            (tmp_path / "a").write_bytes(b"old")
            came = interrupted_at(line, error, lambda: write_bytes(tmp_path / "a", b"\0new"))
            assert contents(tmp_path) in ({"a": "old"}, {"a": "\0new"})
            if not came:
                assert line > 10
                assert contents(tmp_path) == {"a": "\0new"}
                return

    def test_a_link_is_replaced_and_what_it_points_to_stays(self, tmp_path):
        (tmp_path / "precious").write_text("mine")
        (tmp_path / "link").symlink_to("precious")
        write_bytes(tmp_path / "link", b"new")
        assert contents(tmp_path) == {"precious": "mine", "link": "new"}

    def test_the_caller_says_how_to_mend_it(self, tmp_path):
        with refused(EdgeRuntimeError, f"{tmp_path}/no/a can't be written: No such", ". Mend it"):
            write_bytes(tmp_path / "no" / "a", b"", remedy="Mend it")

    def test_the_name_outlasts_a_power_cut(self, tmp_path, monkeypatch):
        events = []
        real_fsync, real_replace = os.fsync, Path.replace
        monkeypatch.setattr(
            os,
            "fsync",
            lambda fd: (events.append(os.readlink(f"/proc/self/fd/{fd}")), real_fsync(fd)),
        )
        monkeypatch.setattr(
            Path, "replace", lambda self, to: (events.append("rename"), real_replace(self, to))[1]
        )
        write_bytes(tmp_path / "a", b"new")
        data, rename, folder = events
        assert Path(data).name.startswith(".a.")
        assert (rename, folder) == ("rename", str(tmp_path))


class TestReplacingFolder:
    OLD = {"manifest.json": "old", "stages/a.onnx": "old a", "stages/b.onnx": "old b"}  # noqa: RUF012
    NEW = {"manifest.json": "new", "stages/a.onnx": "new a"}  # noqa: RUF012

    @staticmethod
    def make(folder: Path, what: dict[str, str]) -> None:
        for name, text in what.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)

    def build(self, target: Path, overwrite: bool = True) -> None:
        with replacing_folder(target, overwrite=overwrite) as folder:
            self.make(folder, self.NEW)

    def test_makes_a_folder(self, tmp_path):
        self.build(tmp_path / "b", overwrite=False)
        assert contents(tmp_path / "b") == self.NEW
        assert [path.name for path in tmp_path.iterdir()] == ["b"]
        (tmp_path / "other").mkdir()
        assert (tmp_path / "b").stat().st_mode == (tmp_path / "other").stat().st_mode

    def test_replaces_the_whole_folder(self, tmp_path):
        self.make(tmp_path / "b", self.OLD)
        self.build(tmp_path / "b")
        assert contents(tmp_path / "b") == self.NEW
        assert [path.name for path in tmp_path.iterdir()] == ["b"]

    @pytest.mark.parametrize("error", [FULL, KeyboardInterrupt()], ids=["full", "ctrl-c"])
    @pytest.mark.parametrize("exists", [True, False])
    def test_at_every_line_the_old_folder_or_the_new_one(self, tmp_path, error, exists):
        for line in itertools.count():
            if exists:
                self.make(tmp_path / "b", self.OLD)
            came = interrupted_at(line, error, lambda: self.build(tmp_path / "b"))
            expected = [self.NEW, self.OLD if exists else None]
            left = [path.name for path in tmp_path.iterdir()]
            assert left == ["b"] or (left == [] and not exists), f"line {line}: {left}"
            assert (contents(tmp_path / "b") if left else None) in expected
            if not came:
                assert line > 20
                assert contents(tmp_path / "b") == self.NEW
                return
            shutil.rmtree(tmp_path / "b", ignore_errors=True)

    @pytest.mark.parametrize("error", [FULL, KeyboardInterrupt(), ValueError("a bug")])
    @pytest.mark.parametrize("exists", [True, False])
    def test_an_error_while_it_is_filled(self, tmp_path, error, exists):
        if exists:
            self.make(tmp_path / "b", self.OLD)
        with pytest.raises((EdgeRuntimeError, type(error))) as caught:  # noqa: SIM117
            with replacing_folder(tmp_path / "b", overwrite=True) as folder:
                self.make(folder, self.NEW)
                raise error
        if error is FULL:
            assert f"{tmp_path}/b was not written: " in str(caught.value)
            assert caught.value.__cause__ is error
        else:
            assert caught.value is error
        assert contents(tmp_path) == ({f"b/{k}": v for k, v in self.OLD.items()} if exists else {})
        assert len(list(tmp_path.iterdir())) == exists

    def test_refuses_to_replace_without_being_asked(self, tmp_path):
        self.make(tmp_path / "b", self.OLD)
        with refused(ConfigError, f"{tmp_path}/b exists. Choose another --out, or give --force"):
            self.build(tmp_path / "b", overwrite=False)
        assert contents(tmp_path / "b") == self.OLD

    @pytest.mark.parametrize("overwrite", [True, False])
    def test_a_folder_that_appears_meanwhile_is_not_replaced_without_being_asked(
        self, tmp_path, overwrite
    ):
        try:
            with replacing_folder(tmp_path / "b", overwrite=overwrite) as folder:
                self.make(folder, self.NEW)
                self.make(tmp_path / "b", self.OLD)
        except EdgeRuntimeError as error:
            assert not overwrite
            assert "was not written" in str(error)
        assert contents(tmp_path / "b") == (self.NEW if overwrite else self.OLD)
        assert [path.name for path in tmp_path.iterdir()] == ["b"]

    def test_never_deletes_what_is_not_ours(self, tmp_path):
        self.make(tmp_path / "home", {"photos/a.jpg": "precious"})
        with refused(ConfigError, f"{tmp_path}/home is not replaced", "manifest.json"):
            self.build(tmp_path / "home")
        (tmp_path / "file").write_text("precious")
        with refused(ConfigError, f"{tmp_path}/file is not replaced"):
            self.build(tmp_path / "file")
        assert contents(tmp_path) == {"home/photos/a.jpg": "precious", "file": "precious"}

    def test_the_caller_names_what_shows_that_it_is_ours(self, tmp_path):
        self.make(tmp_path / "study", {"study.json": "old"})
        with replacing_folder(tmp_path / "study", overwrite=True, marker="study.json") as folder:
            self.make(folder, {"study.json": "new"})
        assert contents(tmp_path / "study") == {"study.json": "new"}

    def test_an_empty_folder_may_be_replaced(self, tmp_path):
        (tmp_path / "b").mkdir()
        self.build(tmp_path / "b")
        assert contents(tmp_path / "b") == self.NEW

    def test_the_parent_must_exist(self, tmp_path):
        with refused(ConfigError, f"the folder {tmp_path}/no does not exist"):
            self.build(tmp_path / "no" / "b")

    def test_a_link_to_a_folder_stays_a_link(self, tmp_path):
        self.make(tmp_path / "disk" / "b", self.OLD)
        (tmp_path / "link").symlink_to("disk/b")
        self.build(tmp_path / "link")
        assert (tmp_path / "link").is_symlink()
        assert contents(tmp_path / "disk") == {f"b/{k}": v for k, v in self.NEW.items()}
        assert [path.name for path in (tmp_path / "disk").iterdir()] == ["b"]

    def test_everything_is_on_disk_before_the_name_is(self, tmp_path, monkeypatch):
        events = []
        real_fsync, real_rename = os.fsync, Path.rename
        monkeypatch.setattr(
            os,
            "fsync",
            lambda fd: (events.append(os.readlink(f"/proc/self/fd/{fd}")), real_fsync(fd)),
        )
        monkeypatch.setattr(
            Path, "rename", lambda self, to: (events.append("rename"), real_rename(self, to))[1]
        )
        self.build(tmp_path / "b")
        before = events[: events.index("rename")]
        names = {Path(path).name for path in before}
        assert {"manifest.json", "a.onnx", "stages"} <= names
        assert events[-1] == str(tmp_path)


def test_a_target_is_checked_before_any_work(tmp_path):
    check_target(tmp_path / "new", overwrite=False)
    (tmp_path / "old").mkdir()
    check_target(tmp_path / "old", overwrite=True)
    with refused(ConfigError, "old exists. Choose another --out, or give --force"):
        check_target(tmp_path / "old", overwrite=False)
    with refused(ConfigError, "does not exist. Create it first"):
        check_target(tmp_path / "no" / "new", overwrite=False)
    (tmp_path / "old" / "thesis.txt").write_text("mine")
    with refused(ConfigError, "it is no folder with a manifest.json"):
        check_target(tmp_path / "old", overwrite=True)
