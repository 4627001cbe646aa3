"""The lines that long commands show."""

import io

from jaxvlm import progress
from jaxvlm.progress import Progress, duration


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_sees_rate_and_time_left(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    out = Terminal()
    with Progress("images", 1000, "decoded", out) as line:
        for _ in range(40):
            now[0] += 0.25
            line.add(10)
    shown = out.getvalue().split("\r")
    assert shown[4].strip() == "images 40/1,000 decoded  40/s  24 s left"
    assert shown[-1].strip() == "images 400 decoded: 10 s" and out.getvalue().endswith("\n")


def test_a_log_gets_a_line_every_ten_seconds(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    out = io.StringIO()
    with Progress("records", 3000, "read", out) as line:
        for _ in range(120):
            now[0] += 0.25
            line.add(25)
    assert [text.split("  ")[0] for text in out.getvalue().splitlines()] == [
        "records 1,000/3,000 read",
        "records 2,000/3,000 read",
        "records 3,000 read: 30 s",
    ]


def test_an_error_ends_the_line_and_says_no_more():
    out = Terminal()
    try:
        with Progress("records", 10, "read", out):
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert out.getvalue() == ""


def test_durations():
    assert [duration(s) for s in (0.4, 59.6, 185, 7800)] == ["0 s", "1 min 00 s", "3 min 05 s", "2 h 10 min"]
