"""Files and folders that appear when they are whole."""

import os
import pathlib

import pytest

from keras_cc.whole_files import whole_file, whole_folder

pytestmark = pytest.mark.once


def names(folder):
    return sorted(path.name for path in folder.rglob("*"))


class TestFile:
    def test_appears_at_the_end(self, tmp_path):
        path = tmp_path / "cell.json"
        with whole_file(path) as unfinished:
            unfinished.write_text("new")
            assert unfinished.suffix == ".json"  # for writers that go by it
            assert not path.exists() and not list(tmp_path.glob("*.json"))
        assert path.read_text() == "new" and names(tmp_path) == ["cell.json"]

    def test_takes_the_place_of_one_that_is_there(self, tmp_path):
        path = tmp_path / "a"
        path.write_text("old")
        with whole_file(str(path)) as unfinished:
            unfinished.write_text("new")
            assert path.read_text() == "old"
        assert path.read_text() == "new" and names(tmp_path) == ["a"]

    @pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
    def test_an_exception_leaves_what_was_there(self, error, tmp_path):
        (tmp_path / "a").write_text("old")
        for path in (tmp_path / "a", tmp_path / "b"):
            with pytest.raises(error), whole_file(path) as unfinished:
                unfinished.write_text("half")
                raise error
        assert (tmp_path / "a").read_text() == "old" and names(tmp_path) == ["a"]

    def test_a_relative_path_is_of_where_it_began(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        with whole_file("a") as unfinished:
            unfinished.touch()
            (tmp_path / "sub").mkdir()
            os.chdir("sub")
        assert (tmp_path / "a").exists()

    def test_is_as_open_to_others_as_any_file(self, tmp_path):
        (tmp_path / "plain").touch()
        with whole_file(tmp_path / "a") as unfinished:
            unfinished.touch()
        assert (tmp_path / "a").stat().st_mode == (tmp_path / "plain").stat().st_mode


class TestFolder:
    def test_appears_at_the_end_in_folders_that_are_made(self, tmp_path):
        path = tmp_path / "m" / "1"
        with whole_folder(path) as unfinished:
            (unfinished / "b").touch()
            assert unfinished.name == "1" and not path.exists()
            assert all(name.startswith(".") for name in os.listdir(path.parent))
        (tmp_path / "plain").mkdir()
        assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode
        assert names(tmp_path / "m") == ["1", "b"]

    def test_takes_the_place_of_one_that_is_there(self, tmp_path):
        (tmp_path / "1").mkdir()
        (tmp_path / "1" / "old").touch()
        with whole_folder(tmp_path / "1") as unfinished:
            (unfinished / "new").touch()
            assert (tmp_path / "1" / "old").exists()
        assert names(tmp_path) == ["1", "new"]

    def test_an_exception_leaves_what_was_there(self, tmp_path):
        (tmp_path / "1").mkdir()
        (tmp_path / "1" / "old").touch()
        for name in ("1", "2"):
            with pytest.raises(KeyboardInterrupt), whole_folder(tmp_path / name) as unfinished:
                (unfinished / "half").touch()
                raise KeyboardInterrupt
        assert names(tmp_path) == ["1", "old"]

    def test_what_another_process_made_is_kept_if_it_is_as_good(self, tmp_path):
        def is_good():
            return (tmp_path / "1" / "theirs").exists()

        with whole_folder(tmp_path / "1", keeps=is_good) as unfinished:
            (unfinished / "ours").touch()
            (tmp_path / "1").mkdir()  # not yet as good
        assert names(tmp_path) == ["1", "ours"]
        with whole_folder(tmp_path / "1", keeps=is_good):
            (tmp_path / "1" / "theirs").touch()
        assert names(tmp_path) == ["1", "ours", "theirs"]

    @pytest.mark.parametrize("theirs", [False, True])
    def test_the_old_one_is_put_back_where_the_new_one_cannot_take_its_place(
        self, theirs, tmp_path, monkeypatch
    ):
        rename, path = pathlib.Path.rename, tmp_path / "1"

        def fail(self, target):
            if self.name == "1" and self.parent.name.startswith("."):
                if theirs:  # another process was quicker
                    path.mkdir()
                    (path / "theirs").touch()
                raise OSError("no")
            return rename(self, target)

        path.mkdir()
        (path / "old").touch()
        monkeypatch.setattr(pathlib.Path, "rename", fail)
        if theirs:
            with whole_folder(path, keeps=lambda: (path / "theirs").exists()):
                pass
        else:
            with pytest.raises(OSError, match="no"), whole_folder(path):
                pass
        assert names(tmp_path) == ["1", "theirs" if theirs else "old"]
