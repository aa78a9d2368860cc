"""Records of a run: written once, by the main process, and complete after a resume."""

import json

import pytest
from conftest import as_process
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from reclm.run.logger import Logger, plot_curves, say, write_json


def row(epoch, score=0.5):
    return {"epoch": epoch, "loss": 2.0 / (epoch + 1), "valid/NDCG@10": score}


def lines(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_a_line_per_epoch_as_it_ends(tmp_path, capsys):
    logger = Logger(tmp_path, [])
    for epoch in range(3):
        logger.start_epoch(epoch, 4, 0)
        logger.step(1.25, 1000.0)
        logger.end_epoch(row(epoch))
        assert lines(tmp_path) == [row(e) for e in range(epoch + 1)]  # on disk before the next epoch
    logger.close()
    assert logger.history == [row(0), row(1), row(2)]
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    for name in ("loss", "valid/NDCG@10"):
        found = [(event.step, event.value) for event in events.Scalars(name)]
        assert found == [(e, pytest.approx(row(e)[name])) for e in range(3)]


def test_resume_rewrites_the_history(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 0}\n{"epoch": 1}\n{"epoch": 2, "loss"')  # torn
    logger = Logger(tmp_path, [row(0), row(1)])
    assert lines(tmp_path) == [row(0), row(1)]
    logger.end_epoch(row(2))
    logger.close()
    assert lines(tmp_path) == [row(0), row(1), row(2)]


def test_other_processes_write_nothing(tmp_path, monkeypatch, capfd):
    as_process(monkeypatch, 1, 2)
    logger = Logger(tmp_path, [])
    logger.start_epoch(0, 4, 0)
    logger.step(1.0, 1.0)
    logger.end_epoch(row(0))
    logger.close()
    say("nobody hears this")
    write_json(tmp_path / "result.json", {})
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")
    assert logger.history == [row(0)]  # a checkpoint of any process would hold it


def test_say_and_write_json(tmp_path, capsys):
    say("one line")
    assert capsys.readouterr().out == "one line\n"
    write_json(tmp_path / "result.json", {"a": 1.5})
    assert json.loads((tmp_path / "result.json").read_text()) == {"a": 1.5}


def test_curves_of_one_epoch(tmp_path):
    plot_curves([row(0)], tmp_path / "one.png")
    assert (tmp_path / "one.png").stat().st_size > 1000


def test_step_works_before_start_and_after_end(tmp_path):
    logger = Logger(tmp_path, [])
    logger.step(1.0, 1.0)
    logger.start_epoch(0, 2, 1)
    assert logger.bar.n == 1  # a resumed epoch begins where it stood
    logger.step(1.0, 1.0)
    assert logger.bar.n == 2
    logger.end_epoch(row(0))
    logger.close()
    logger.close()
