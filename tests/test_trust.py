"""The scripts of tests/trust, in short: what is promised of files, signals and strangers."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent / "trust"))

import bad_rows
import damage
import full_disk
import kill
import soak
import threads


@pytest.mark.thorough()
@pytest.mark.parametrize("how", ["accumulation", "lora"])
def test_a_killed_training_goes_on(how):
    assert kill.compare(how, kills=1, seed=0, most=0.3) > 50


@pytest.mark.once
def test_bad_rows():
    happened = bad_rows.run(examples=300)
    assert happened["lines"] == happened["used"] + happened["quarantined"]
    assert min(happened[k] for k in ("used", "quarantined", "rows prepared", "refused by fit")) > 20


@pytest.mark.once
def test_damaged_files():
    found = damage.run(copies=9)
    assert len(found) == 7
    for name, happened in found.items():
        assert "LOADED AS SOMETHING ELSE" not in happened
        assert happened["refused"] >= (9 if name != "model.keras" else 3)


@pytest.mark.once
def test_a_file_of_an_enemy(tmp_path):
    """Right checksums over what is wrong: refused in words, or other weights of the same shapes."""
    kinds, whole = damage.enemy_files(tmp_path)
    random, happened = np.random.default_rng(0), set()
    for content in whole:
        assert damage.check_enemy(content, kinds) == "loaded"
        for number in range(25):
            wrong = content[:1] + damage.damaged(content[1:], number, random)
            happened.add(damage.check_enemy(wrong, kinds))
    assert happened == {"refused", "loaded"}


@pytest.mark.once
@pytest.mark.skipif(not full_disk.possible(), reason="no file system can be mounted here")
def test_a_full_disk():
    happened = full_disk.on_a_small_disk(times=2, seed=1)
    assert sum(happened.values()) == 8
    assert any("refused" in key for key in happened)


@pytest.mark.parametrize("connection", ["fused", "selected"])
def test_threads(connection):
    assert threads.run(threads=8, calls=2, connection=connection) == 14


@pytest.mark.once
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="there is no /proc")
def test_a_minute_of_everything():
    found = soak.run(minutes=0)
    assert found["rounds"] == 4
    for name in ("files", "threads", "arrays"):
        half, end = found[name]
        assert half == end
