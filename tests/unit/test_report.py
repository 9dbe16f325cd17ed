"""What goes into a report, worked by hand."""

import json
import re

import pytest
from tokenizers import Tokenizer

from ratchet.report import facts, page
from ratchet.report.curve import sparkline
from ratchet.report.rollouts import Pieces, _spread
from ratchet.report.screen import figure, seconds, size
from ratchet.report.tail import Tail


def test_a_long_curve_is_thinned_to_means_and_keeps_its_last_step():
    points = [{"step": step, "loss": float(step % 2)} for step in range(1, 2401)]
    found = facts.series({"": points})["loss"]
    assert len(found["x"]) == facts.POINTS
    assert found["x"][-1] == 2400
    assert set(found["y"]) == {0.5}


def test_a_name_that_two_programs_use_is_told_apart():
    rows = [{"step": 1, "perf/tokens_per_s": 7.0, "time/at_s": 1.0}]
    found = facts.series({"": rows, "orchestrator/": rows})
    assert set(found) == {"perf/tokens_per_s", "orchestrator/perf/tokens_per_s"}


def test_pauses_between_attempts_are_cut_out_of_the_clock():
    stretches = facts.busy_stretches([(100.0, 110.0), (105.0, 120.0), (1000.0, 1010.0), (1020.0, 1030.0)])
    assert stretches == [(100.0, 120.0), (1000.0, 1030.0)]
    assert [facts.compressed(stretches, t) for t in (100.0, 115.0, 1000.0, 1005.0)] == [0.0, 15.0, 20.0, 25.0]


def test_samples_are_spread_over_the_whole_run():
    assert _spread(list(range(100)), 4) == [0, 33, 66, 99]
    assert _spread([1, 2], 4) == [1, 2]


def test_pieces_of_a_text_join_to_the_text():
    tokenizer = Tokenizer.from_file("examples/reverse_text/model/tokenizer.json")
    ids = tokenizer.encode("hello wide world").ids
    pieces = Pieces(tokenizer).of(ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=False)
    assert Pieces(None).of([5]) == ["[5]"]


def test_text_of_a_model_cannot_leave_its_place_in_the_page():
    html = page.render({"runs": [{"text": "</script><script>alert(1)</script>\u2028{{js}}"}]}).decode()
    data = re.search(r'<script id="data" type="application/json">(.*?)</script>', html, re.DOTALL)[1]
    assert json.loads(data)["runs"][0]["text"].startswith("</script><script>")
    assert "alert(1)</script>" not in html


def test_a_page_asks_the_network_for_nothing():
    html = page.render({"runs": []}).decode()
    assert set(re.findall(r"https?://[^\"' ]*", html)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"<(link|img|iframe)|@import|url\(http|\bfetch\(|XMLHttp", html)


def test_a_sparkline_spans_its_range_and_its_width():
    assert sparkline([0.0, 7.0], 10) == "▁█"
    assert len(sparkline(list(range(100)), 20)) == 20
    assert sparkline([1.0, float("nan"), 1.0], 10) == "▄▄"
    assert sparkline([], 10) == ""


def test_figures_as_people_read_them():
    assert [seconds(s) for s in (0.0123, 4.25, 59, 3600, 86400)] == [
        "12 ms",
        "4.2 s",
        "59 s",
        "60 min",
        "24.0 h",
    ]
    assert [figure(v) for v in (0.12345, 0.00001234, 0.0)] == ["0.1235", "1.23e-05", "0"]
    assert [size(n) for n in (2_800_000, 3_000_000_000)] == ["2.8 MB", "3.00 GB"]


@pytest.fixture
def rows_file(tmp_path):
    return tmp_path / "rows.jsonl"


def write(path, steps, mode="a"):
    with path.open(mode) as file:
        file.writelines(f'{{"step":{step}}}\n' for step in steps)


def test_a_tail_yields_each_row_once_also_when_the_file_is_put_in_place_of(rows_file, tmp_path):
    tail = Tail(rows_file)
    assert tail.look() == []
    write(rows_file, [1, 2, 3])
    assert [row["step"] for row in tail.look()] == [1, 2, 3]
    write(tmp_path / "shorter", [1, 2])
    (tmp_path / "shorter").rename(rows_file)
    write(rows_file, [9])
    assert [row["step"] for row in tail.look()] == [9]
    assert [row["step"] for row in tail.rows] == [1, 2, 9]
