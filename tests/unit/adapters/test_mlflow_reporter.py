"""The journal of a training; MLflow itself is met in tests/integration/test_train.py."""

import pytest

from mm_model.adapters.mlflow_reporter import (
    JOURNAL,
    Journal,
    flush_backlog,
    read_journal,
    run_id_of,
    shipping,
)
from mm_model.errors import ServiceError


def steps_of(folder) -> list[int]:
    return [r["step"] for r in read_journal(folder)[0] if r["kind"] == "metrics"]


def test_repeated_steps_are_written_once(tmp_path):
    first = Journal(tmp_path)
    for step in (10, 20, 30):
        first.metrics(step, {"loss": float(step)})
    second = Journal(tmp_path)  # resumed from step 10
    for step in (20, 30, 40):
        second.metrics(step, {"loss": float(step)})
    assert steps_of(tmp_path) == [10, 20, 30, 40]


def test_a_picture_is_drawn_once_below_the_folder(tmp_path):
    drawn = []

    def save(path):
        drawn.append(path)
        path.write_bytes(b"png")

    Journal(tmp_path).picture(5, save)
    Journal(tmp_path).picture(5, save)
    (record,) = read_journal(tmp_path)[0]
    assert drawn == [tmp_path / record["file"]]


def test_a_line_that_a_crash_cut_off_is_dropped_and_written_again(tmp_path):
    journal = Journal(tmp_path)
    journal.metrics(10, {"loss": 1.0})
    journal.metrics(20, {"loss": 2.0})
    file = tmp_path / JOURNAL
    file.write_bytes(file.read_bytes()[:-5])
    assert steps_of(tmp_path) == [10]
    Journal(tmp_path).metrics(20, {"loss": 2.0})
    assert steps_of(tmp_path) == [10, 20]


def test_a_run_begins_once_and_is_then_resumed(tmp_path):
    for _ in range(2):
        Journal(tmp_path).begin("e", "n", params={"train": {"steps": 5}}, tags={"a": "b"})
    begin, resume = read_journal(tmp_path)[0]
    assert begin["kind"] == "begin"
    assert begin["params"] == {"train.steps": "5"}
    assert resume["kind"] == "resume"


def test_reading_goes_on_where_it_stopped(tmp_path):
    journal = Journal(tmp_path)
    journal.metrics(10, {})
    _, at = read_journal(tmp_path)
    assert read_journal(tmp_path, at) == ([], at)
    journal.metrics(20, {})
    assert [r["step"] for r in read_journal(tmp_path, at)[0]] == [20]


def test_without_mlflow_nothing_is_lost_or_waits(tmp_path, monkeypatch, free_tcp_port):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_tcp_port}")
    assert flush_backlog(tmp_path) is None  # no journal
    journal = Journal(tmp_path)
    journal.begin("e", "n", params={}, tags={})
    with shipping(tmp_path):
        journal.metrics(10, {"loss": 1.0})
    with pytest.raises(ServiceError, match="does not answer"):
        flush_backlog(tmp_path)
    assert run_id_of(tmp_path) is None
    assert steps_of(tmp_path) == [10]
