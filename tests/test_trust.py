"""The scripts of tests/trust, in short: what is promised of files, signals and strangers."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "trust"))

import bad_rows
import damage
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
