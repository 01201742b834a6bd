import pytest

from amt_ray.core.schedule import Ramp, Schedule


@pytest.mark.parametrize(
    ("epochs", "warmup", "refresh", "refreshed"),
    [
        (400, 40, 40, list(range(40, 400, 40))),
        (10, 0, 4, [0, 4, 8]),
        (10, 3, 1, list(range(3, 10))),
        (10, 3, 100, [3]),
        (10, 10, 2, []),
        (1, 0, 40, [0]),
    ],
)
def test_schedule__scores_are_refreshed_at_the_switch_and_at_intervals_after_it(epochs, warmup, refresh, refreshed):
    schedule = Schedule(epochs, warmup, refresh)
    assert [e for e in range(epochs) if schedule.refresh_due(e)] == refreshed
    assert [e for e in range(epochs) if schedule.in_warmup(e)] == list(range(min(warmup, epochs)))
    assert not any(schedule.in_warmup(e) for e in refreshed)


@pytest.mark.parametrize(
    ("epochs", "every", "evaluated"), [(10, 0, [9]), (10, 3, [2, 5, 8, 9]), (10, 5, [4, 9]), (1, 1, [0]), (3, 9, [2])]
)
def test_schedule__the_end_is_always_evaluated_and_only_once(epochs, every, evaluated):
    schedule = Schedule(epochs, 0, 1, every)
    assert [e for e in range(epochs) if schedule.eval_due(e)] == evaluated
    assert [e for e in range(epochs) if schedule.is_last(e)] == [epochs - 1]


@pytest.mark.parametrize("wrong", [(0, 0, 1, 0), (1, -1, 1, 0), (1, 0, 0, 0), (1, 0, 1, -1)])
def test_schedule__refuses_numbers_out_of_range_and_shows_them(wrong):
    epochs, warmup, refresh, every = wrong
    with pytest.raises(ValueError, match=f"at least 1, .* got {epochs}, {refresh}, {warmup}, {every}"):
        Schedule(*wrong)


def test_ramp__starts_at_the_switch_and_ends_with_the_run():
    schedule = Schedule(epochs=11, warmup_epochs=2)
    progress = [schedule.progress(epoch) for epoch in (0, 2, 6, 10)]
    assert progress == [0.0, 0.0, 0.5, 1.0]
    assert [Ramp(0.2, 0.6).at(p) for p in (0.0, 0.25, 1.0)] == pytest.approx([0.2, 0.3, 0.6])
    assert [Ramp(0.2, 0.6, "cosine").at(p) for p in (0.0, 0.5, 1.0)] == pytest.approx([0.2, 0.4, 0.6])
    assert Ramp(0.2, 0.6, "cosine").at(0.1) < Ramp(0.2, 0.6).at(0.1)
    assert Schedule(epochs=3, warmup_epochs=2).progress(2) == 0.0
