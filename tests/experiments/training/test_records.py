"""From metrics on the device to lines of the log."""

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.training.records import NonFiniteError, StepRecords, Stopwatch

NAMES = ("accuracy", "count", "loss")


def metrics(loss, *, count=2.0, accuracy=1.0, norm=0.5, rate=0.1, tokens=10):
    return jnp.array([accuracy, count, loss, norm, rate, tokens], jnp.float32)


def make(log_every=2, saved=None):
    lines = []
    stopwatch = Stopwatch()
    stopwatch.start()
    records = StepRecords(
        NAMES,
        log_every=log_every,
        stopwatch=stopwatch,
        emit=lambda step, values: lines.append((step, values)),
        saved=saved,
    )
    return records, lines


def test_a_line_holds_the_averages_over_its_steps():
    records, lines = make()
    records.add(1, metrics(4.0, norm=0.5, rate=0.1))
    records.add(2, metrics(2.0, count=6.0, norm=1.5, rate=0.2))
    records.add(3, metrics(1.0))
    assert lines == []
    records.collect(2)
    (step, values), *more = lines
    assert more == []
    assert step == 2
    assert values["loss"] == 6.0 / 8.0
    assert values["accuracy"] == 2.0 / 8.0
    assert values["gradient_norm"] == 1.0
    assert values["learning_rate"] == pytest.approx(0.2)
    assert values["tokens_per_second"] == pytest.approx(20 / values["seconds"], rel=1e-3)
    assert records.tokens == 20


def test_lines_do_not_depend_on_an_interruption():
    records, whole = make(log_every=3)
    for step in range(1, 7):
        records.add(step, metrics(step / 3))
    records.collect(6)
    first, lines = make(log_every=3)
    for step in range(1, 5):
        first.add(step, metrics(step / 3))
    first.collect(4)
    second, rest = make(log_every=3, saved=first.save())
    for step in range(5, 7):
        second.add(step, metrics(step / 3))
    second.collect(6)
    timed = {"tokens_per_second", "seconds"}
    assert [(s, {k: v for k, v in line.items() if k not in timed}) for s, line in lines + rest] == [
        (s, {k: v for k, v in line.items() if k not in timed}) for s, line in whole
    ]
    assert second.tokens == records.tokens


@pytest.mark.parametrize("bad", [dict(loss=float("nan")), dict(loss=1.0, norm=float("inf"))])
def test_the_first_step_that_is_not_finite_is_named(bad):
    records, lines = make(log_every=1)
    for step in range(1, 6):
        records.add(step, metrics(**bad) if step >= 3 else metrics(1.0))
    with pytest.raises(NonFiniteError, match=r"step 3: loss \S+, gradient_norm \S+") as caught:
        records.collect(5)
    assert caught.value.step == 3
    assert [step for step, _ in lines] == [1, 2]


def test_skipped_steps_are_counted_and_said(capsys):
    lines = []
    records = StepRecords(
        NAMES, log_every=2, stopwatch=Stopwatch(), emit=lambda _, values: lines.append(values), skip_norm=1.0
    )
    for step, norm in enumerate((0.5, 3.0, 1.0, 0.1), 1):
        records.add(step, metrics(1.0, norm=norm))
    records.collect(4)
    assert [line["skipped_steps"] for line in lines] == [1, 0]
    said = capsys.readouterr().err
    assert "step 2: the gradient norm 3 is above optimizer.skip_norm=1, and the step changes no" in said
    assert said.count("skip_norm") == 1


def test_lines_hold_utilization_and_memory_over_an_interruption():
    def lines(saved=None):
        clock, found = Clock(), []
        records = StepRecords(
            NAMES,
            log_every=1,
            stopwatch=clock,
            emit=lambda _, values: found.append(values),
            saved=saved,
            peak=100.0,
            memory=lambda: 7,
        )
        # From step 21 on a step takes half of the time.
        for step in range(1, 41):
            records.add(step, metrics(1.0), flops=40.0)
            clock.seconds += 1 if step <= 20 else 0.5
            records.collect(step)
        return found, records.save()

    found, saved = lines()
    assert [found[step - 1]["mfu"] for step in (1, 2, 20, 40)] == pytest.approx([0.4, 0.4, 0.4, 0.8])
    assert found[0]["peak_memory_bytes"] == 7
    assert saved["flops"] == 1600.0
    old = {name: value for name, value in saved.items() if name != "flops"}
    old["marks"] = [mark[:3] for mark in saved["marks"]]
    assert lines(old)[0][0]["mfu"] >= 0
    assert "mfu" not in timed([1], [1])[0]


def test_a_stopwatch_stands_still_while_paused(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("experiments.training.records.time.perf_counter", lambda: now[0])
    watch = Stopwatch(5.0)
    now[0] += 1
    assert watch.seconds == 5.0
    watch.start()
    now[0] += 2
    with watch.paused():
        now[0] += 4
        assert watch.seconds == 7.0
    now[0] += 8
    assert watch.seconds == 15.0
    watch.stop()
    now[0] += 16
    assert watch.seconds == 15.0


class Clock:
    """A stopwatch that a test sets."""

    seconds = 0.0


def timed(seconds_at, collects, *, saved=None):
    """The lines of steps that are collected in groups, each at its time."""
    clock, lines = Clock(), []
    records = StepRecords(
        NAMES, log_every=1, stopwatch=clock, emit=lambda step, values: lines.append(values), saved=saved
    )
    step = 0
    for seconds, count in zip(seconds_at, collects, strict=True):
        for _ in range(count):
            step += 1
            records.add(step, metrics(1.0))
        clock.seconds = seconds
        records.collect(step)
    return lines


def test_tokens_per_second_are_those_of_complete_steps():
    """Steps that are fetched together, before an evaluation, have the same time: a second per step all the same."""
    lines = timed([1.0, 2.0, 3.0, 6.0, 7.0, 8.0, 11.0, 14.0, 17.0], [1, 1, 1, 3, 1, 1, 3, 3, 3])
    rates = [line["tokens_per_second"] for line in lines]
    assert len(rates) == 17
    assert 5 < min(rates) <= max(rates) < 20
    assert rates[2] == pytest.approx(10)


def test_a_line_without_labels_has_no_averages_and_is_said_once(capsys):
    records, lines = make(log_every=1)
    for step in (1, 2):
        records.add(step, metrics(0.0, count=0.0, accuracy=0.0, norm=0.0))
    records.collect(2)
    assert np.isnan([values["loss"] for _, values in lines]).all()
    err = capsys.readouterr().err
    assert "step 1: the batch has no label" in err
    assert "step 2" not in err
