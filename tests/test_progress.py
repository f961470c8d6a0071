"""The progress bar: its rate and time left know nothing of what came before the first update."""

import io

import pytest

from sfd_jax.progress import ProgressBar


class Clock:
    """A clock that the test moves."""

    now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def bar_of(monkeypatch):
    clock = Clock()

    def make(**options):
        bar = ProgressBar(file=io.StringIO(), mininterval=0, **options)
        monkeypatch.setattr(bar, "_time", clock)
        bar.start_t = bar.last_print_t = clock.now
        return bar, clock

    return make


@pytest.mark.parametrize("initial", [0, 40])
def test_compilation_is_said_and_not_extrapolated(bar_of, initial):
    bar, clock = bar_of(total=initial + 101, initial=initial)
    assert "compiling" in str(bar)
    clock.now += 300
    bar.update()
    assert "compiling" not in str(bar) and bar.n == initial + 1
    for _ in range(10):
        clock.now += 2
        bar.update()
    shown = bar.format_dict
    assert shown["rate"] == pytest.approx(0.5)
    assert shown["elapsed"] == pytest.approx(20) and "03:00" in str(bar)  # the 90 that are left, two seconds each


def test_a_finished_job_does_not_say_that_it_compiles(bar_of):
    assert "compiling" not in str(bar_of(total=53, initial=53)[0])


def test_a_hidden_bar_counts_nothing(capsys):
    with ProgressBar(total=3, disable=True) as bar:
        bar.update()
    assert capsys.readouterr().err == ""
