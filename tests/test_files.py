"""Files and directories that appear whole or not at all."""

import errno
import os
from pathlib import Path

import pytest

from cabochon.errors import MachineError, UserError
from cabochon.files import replaced_directory, write_whole


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_a_name_may_be_as_long_as_the_disk_takes(tmp_path):
    place = tmp_path / ("n" * 254)
    write_whole(place, "all of it")
    assert (place.read_text(), names(tmp_path)) == ("all of it", [place.name])


def test_it_appears_at_the_end_with_everything_in_it(tmp_path):
    place = tmp_path / "deep" / "er"
    with replaced_directory(place, overwrite=False) as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / "a").write_text("1")
        assert not place.exists()
        assert temporary.parent == place.parent  # the same disk, so that the rename is one step
    assert (place / "sub" / "a").read_text() == "1"
    assert names(place.parent) == ["er"]
    assert place.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("error", [KeyError("a bug"), UserError("a mistake"), KeyboardInterrupt()], ids=repr)
def test_an_error_inside_leaves_nothing_and_goes_on_up(tmp_path, error):
    def fail():
        with replaced_directory(tmp_path / "x", overwrite=False) as temporary:
            (temporary / "a").write_text("1")
            raise error

    with pytest.raises(type(error)):
        fail()
    assert names(tmp_path) == []


def test_a_failing_disk_is_one_line(tmp_path):
    with (
        pytest.raises(UserError, match=r"x: could not be written: No space left on device; nothing was left there$"),
        replaced_directory(tmp_path / "x", overwrite=False),
    ):
        raise OSError(28, "No space left on device")
    assert names(tmp_path) == []


def test_what_is_there_stays_unless_told(tmp_path):
    place = tmp_path / "x"
    place.mkdir()
    (place / "old").write_text("old")
    with pytest.raises(UserError, match="exists and is not empty"), replaced_directory(place, overwrite=False):
        pytest.fail("it must be refused before any work")
    with pytest.raises(KeyError), replaced_directory(place, overwrite=True):
        raise KeyError("half way")
    assert names(place) == ["old"]
    with replaced_directory(place, overwrite=True) as temporary:
        (temporary / "new").write_text("new")
    assert names(place) == ["new"]
    assert names(tmp_path) == ["x"]


def test_a_file_of_that_name_is_not_overwritten_either(tmp_path):
    (tmp_path / "x").write_text("mine")
    with pytest.raises(UserError, match="exists"), replaced_directory(tmp_path / "x", overwrite=False):
        pass
    assert (tmp_path / "x").read_text() == "mine"


def test_a_place_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with (
        pytest.raises(UserError, match=r"file/x: cannot be made there: (Not a directory|File exists)$"),
        replaced_directory(tmp_path / "file" / "x", overwrite=False),
    ):
        pass


def test_a_file_appears_whole_or_stays_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "a.json"
    write_whole(path, "first\n")
    assert path.read_text() == "first\n"

    def full(fd):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(MachineError, match=r"a\.json: cannot be written: No space left on device$"):
        write_whole(path, "second, longer\n")
    assert path.read_text() == "first\n"
    assert names(path.parent) == ["a.json"]
    with pytest.raises(MachineError, match=r"b\.json: cannot be written: (File exists|Not a directory)$"):
        write_whole(path / "b.json", "")


def test_a_file_behind_a_link_is_replaced_and_a_pipe_is_written_to(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere" / "file")
    write_whole(tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "elsewhere" / "file").read_text() == "text"
    os.mkfifo(tmp_path / "pipe")
    with os.fdopen(os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)) as reader:
        write_whole(tmp_path / "pipe", "text")
        assert reader.read() == "text"
    assert not (tmp_path / "pipe").is_file()
    with (tmp_path / "log").open("w+") as log:
        log.write("before\n")
        log.flush()
        write_whole(Path(f"/dev/fd/{log.fileno()}"), "text")
        assert (tmp_path / "log").read_text() == "before\ntext"


def test_what_a_link_points_to_is_replaced_and_the_link_stays(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "old").write_text("old")
    (tmp_path / "link").symlink_to("disk")
    with replaced_directory(tmp_path / "link", overwrite=True) as temporary:
        (temporary / "new").write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert names(tmp_path / "link") == ["new"]
    assert names(tmp_path) == ["disk", "link"]


@pytest.mark.parametrize("failing", ["rename", "sync"])
def test_a_failure_while_the_names_change_puts_the_old_one_back(tmp_path, monkeypatch, failing):
    place = tmp_path / "x"
    place.mkdir()
    (place / "old").write_text("old")
    rename = Path.rename

    def break_once(self, target):
        if self.suffix == ".partial" and failing == "rename":
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    def sync(path):
        if path == tmp_path and failing == "sync":
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Path, "rename", break_once)
    monkeypatch.setattr("cabochon.files.sync", sync)
    said = r"x: could not be written: Input/output error; what was there before is there still$"
    with pytest.raises(UserError, match=said), replaced_directory(place, overwrite=True) as temporary:
        (temporary / "new").write_text("new")
    assert names(place) == ["old"]
    assert names(tmp_path) == ["x"]


def test_an_old_one_that_will_not_go_is_named(tmp_path, monkeypatch):
    place = tmp_path / "x"
    place.mkdir()
    (place / "old").write_text("old")

    def rmtree(path, ignore_errors=False):
        if not ignore_errors:
            raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("shutil.rmtree", rmtree)
    said = r"x: is written, but what was there before could not be removed: .*/\.x\.\w+\.old: Permission denied$"
    with pytest.raises(UserError, match=said), replaced_directory(place, overwrite=True) as temporary:
        (temporary / "new").write_text("new")
    assert names(place) == ["new"]
