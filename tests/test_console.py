"""Progress and words of the commands."""

from __future__ import annotations

import io

import pytest

from rinr_loader import console
from rinr_loader.console import Meter, bytes_text, psnr_text, result_table, time_text


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (999, "999 B"), (14_600, "14.6 kB"), (3_200_000, "3.2 MB"), (5e12, "5.0 TB")])
def test_bytes(count: float, text: str) -> None:
    assert bytes_text(count) == text


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (59.6, "1 min 0 s"), (200, "3 min 20 s"), (18_720, "5 h 12 min")])
def test_durations(seconds: float, text: str) -> None:
    assert time_text(seconds) == text
    assert psnr_text(None) == "-"


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(console, "time", clock)
    return clock


def test_elsewhere_than_on_a_terminal_a_few_lines_are_printed(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Meter("converting") as meter:
        for k in range(1, 1001):
            clock.now = float(k)
            meter.update(100 + k, 1100, before=100, note="31.0 dB")
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == ""
    assert len(lines) == 10
    assert lines[0] == "converting: 210/1100 images, 1.00 images/s, 14 min 50 s left, 31.0 dB"
    assert lines[-1] == "converting: 1100/1100 images, 1.00 images/s, 31.0 dB"


def test_a_slow_job_is_heard_of_every_few_minutes(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Meter("converting") as meter:
        for k in range(1, 101):
            clock.now = k * 100.0
            meter.update(k, 100_000)
    assert len(capsys.readouterr().err.splitlines()) == 33


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def on_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return terminal


def test_on_a_terminal_there_is_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_terminal(monkeypatch)
    with Meter("converting") as meter:
        meter.update(3, 4, note="31.0 dB [b]")
    assert "3/4" in terminal.getvalue()
    assert "31.0 dB [b]" in terminal.getvalue()


def test_a_table_on_a_terminal_takes_brackets_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_terminal(monkeypatch)
    result_table(("key", "PSNR"), [("[red]a", "1.0 dB"), ("b", "31.0 dB")])
    assert "[red]a" in terminal.getvalue()


def test_a_plain_table_is_aligned_and_takes_brackets_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    result_table(("key", "PSNR"), [("[red]a", "1.0 dB"), ("b", "31.0 dB")])
    assert capsys.readouterr().out.splitlines() == ["key        PSNR", "[red]a   1.0 dB", "b       31.0 dB"]
