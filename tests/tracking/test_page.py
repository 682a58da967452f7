"""compare.html holds exactly the runs' figures, asks nothing of any server, and fits every screen."""

import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from plotly.offline import get_plotlyjs

from tests.tracking.browser import Tab, find, tab
from tests.tracking.runs import failed, measured, run, trace
from tracking.comparison import Comparison, compare_runs
from tracking.page import page, write_page
from tracking.pictures import write_pictures
from tracking.sources import Run

STRATEGIES = ("single", "ddp", "zero1", "zero2", "zero3", "zero3_offload", "fsdp", "hsdp", "tensor", "pipeline")
CHARTS = ("loss", "speed", "device", "efficiency", "mfu", "scaling", "memory", "traffic", "wait", "gantt", "pareto")


def many() -> list[Run]:
    """Fourteen runs: measured ones on two ranks, some of version 1, one repeated, one that failed."""
    new = [
        run(name, ranks=1 if name == "single" else 2, tokens_per_s=1000.0 + 50 * number, peak_gib=2 - number / 9)
        for number, name in enumerate(STRATEGIES)
    ]
    two: dict[str, Any] = {"ranks": 2, "found": measured(), "trace": trace()}
    repeated = [run("2d", seed=seed, tokens_per_s=1400.0 + 100 * seed, **two) for seed in (1, 2)]
    new[0] = run("single", val_losses=(4.1, 3.1, 2.1))
    return [*new, run("3d", losses=(4.0, 3.1, float("nan")), **two), *repeated, failed("model_parallel")]


def embedded(html: str) -> Any:
    found = re.search(r'<script type="application/json" id="comparison">(.*?)</script>', html, re.DOTALL)
    assert found is not None
    return json.loads(found.group(1))


class Reader(HTMLParser):
    """Tags that are open where they should not be, and what follows what."""

    def __init__(self) -> None:
        super().__init__()
        self.headings: list[int] = []
        self.ids: list[str] = []
        self.sources: list[str] = []
        self.unlabelled: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))
        self.ids += [given["id"] or ""] if "id" in given else []
        self.sources += [value for name, value in attrs if name in ("src", "href") and value]
        if (tag == "div" and given.get("role") in ("img", "region")) and not given.get("aria-label"):
            self.unlabelled.append(str(attrs))


def read(html: str) -> Reader:
    reader = Reader()
    reader.feed(html)
    return reader


def test_the_page_s_json_is_the_comparison() -> None:
    comparison = compare_runs(many())
    assert embedded(page(comparison)) == json.loads(comparison.model_dump_json())
    single = embedded(page(compare_runs([run("single", tokens_per_s=1234.5, peak_gib=0.75)])))["runs"][0]
    assert (single["tokens_per_s"], single["peak_gib"], single["curve"]["train_loss"]) == (
        1234.5,
        0.75,
        [4.0, 3.0, 2.0],
    )


def test_the_tables_have_the_figures_too() -> None:
    html = page(compare_runs([run("single"), run("ddp", tokens_per_s=1600, ranks=2, found=measured(), trace=trace())]))
    for text in ("1,600", "1.60", "80%", "6.0000", "all-reduce", "2.000", "20.0%", "10.00"):
        assert f">{text}<" in html or f"</span>{text}<" in html, text


def test_validation_losses_have_a_table() -> None:
    html = page(compare_runs([run("single", val_losses=(4.125,)), run("ddp")]))
    assert "Validation loss by optimizer step" in html and ">4.12500<" in html
    assert "Validation loss by optimizer step" not in page(compare_runs([run("single")]))


@pytest.mark.parametrize("ranks", [64, 512])
def test_a_run_of_many_ranks_makes_a_page_no_larger_than_one_of_few(ranks: int) -> None:
    def of(count: int) -> str:
        return page(compare_runs([run("zero3", ranks=count, found=measured(count), trace=trace(count))]))

    few, many = of(16), of(ranks)
    drawing = len(get_plotlyjs())
    assert len(many) - drawing < 1.05 * (len(few) - drawing)
    assert many.count(f"Shown are 16 of {ranks} ranks of zero3: the first and the last") == 3
    assert "Shown are" not in few


def test_names_are_text_and_no_markup() -> None:
    html = page(compare_runs([run("</script><b>single"), failed("x")]))
    assert "<b>single" not in html and "<b>no</b>" not in html
    assert embedded(html)["runs"][0]["label"] == "</script><b>single"


def test_headings_descend_and_everything_has_a_name() -> None:
    reader = read(page(compare_runs(many())))
    assert reader.headings[0] == 1 and reader.headings.count(1) == 1
    assert all(after - before <= 1 for before, after in zip(reader.headings, reader.headings[1:], strict=False))
    assert len(reader.ids) == len(set(reader.ids)) and not reader.unlabelled


def test_links_lead_to_the_page_itself() -> None:
    reader = read(page(compare_runs(many())))
    assert {source for source in reader.sources if not source.startswith("#")} == {"data:,"}
    assert {source[1:] for source in reader.sources if source.startswith("#")} <= set(reader.ids)


@pytest.mark.parametrize(
    "runs",
    [[run("single")], [failed("ddp")], [run("single", tokens_per_s=None, losses=(2.0,))], [run("single", history={})]],
    ids=["version 1", "failed", "too short", "no history"],
)
def test_a_run_that_lacks_something_is_shown_with_what_is_missing(runs: list[Run]) -> None:
    html = page(compare_runs(runs))
    assert "Not recorded by any of these runs: memory by category." in html
    assert "Not recorded by any of these runs: a trace of a step." in html


def test_a_page_is_replaced_as_a_whole(tmp_path: Path) -> None:
    write_page(compare_runs([run("single")]), tmp_path / "compare.html")
    assert [path.name for path in tmp_path.iterdir()] == ["compare.html"]


@pytest.mark.full
def test_pictures_are_drawn_of_what_there_is(tmp_path: Path) -> None:
    paths = write_pictures(compare_runs(many()), tmp_path / "whole")
    names = {path.stem.rpartition("-")[2] for path in paths}
    assert {"loss", "speed", "memory", "traffic", "pareto", "3d", "2d"} == names
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    assert {path.stem for path in write_pictures(compare_runs([run("single")]), tmp_path / "old")} == {
        "loss",
        "speed",
        "memory",
        "pareto",
    }
    assert write_pictures(compare_runs([failed("ddp")]), tmp_path / "none") == []


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    binary = find()
    if binary is None:
        pytest.skip("there is no Chromium; apt-get install chromium")
    with tab(binary, tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Comparison]:
    comparison = compare_runs(many())
    path = tmp_path_factory.mktemp("page") / "compare.html"
    write_page(comparison, path)
    return path, comparison


@pytest.mark.full
@pytest.mark.parametrize("width", [1400, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_the_screen_and_asks_for_nothing(
    browser: Tab, written: tuple[Path, Comparison], tmp_path: Path, width: int, scheme: Any
) -> None:
    path, _ = written
    browser.open(path, width=width, scheme=scheme)
    assert browser.complaints == []
    # The page itself; data: is what it carries within.
    assert {url for url in browser.requests if not url.startswith("data:")} == {path.as_uri()}
    browser.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true })")
    assert browser.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    for name in CHARTS:
        box = f"document.getElementById('{name}-chart').getBoundingClientRect()"
        assert browser.evaluate(f"{box}.left >= 0 && {box}.right <= {width} && {box}.height > 80"), name
        assert browser.evaluate(f"document.querySelectorAll('#{name}-chart svg .trace').length > 0"), name
    browser.picture(tmp_path / f"{width}-{scheme}.png")
    background = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") is (scheme == "light")


@pytest.mark.full
def test_the_charts_draw_the_figures(browser: Tab, written: tuple[Path, Comparison]) -> None:
    path, comparison = written
    browser.open(path, width=1400, scheme="light")
    drawn = browser.evaluate("document.getElementById('speed-chart').data[0].x")
    timed = [one.spreads["tokens_per_s"].mean for one in comparison.series if "tokens_per_s" in one.spreads]
    assert drawn == pytest.approx(timed[::-1])
    curves = browser.evaluate("document.getElementById('loss-chart').data.filter(t => !t.yaxis).map(t => [t.x, t.y])")
    with_losses = [one.curve for one in comparison.series if one.curve.steps]
    assert [x for x, _ in curves[::2]] == [curve.steps for curve in with_losses]
    assert [y[:2] for _, y in curves[::2]] == [curve.train_loss[:2] for curve in with_losses]
    assert curves[1] == [[10, 20, 30], [4.1, 3.1, 2.1]]  # single's validations
    parts = browser.evaluate("document.getElementById('memory-chart').data.map(t => [t.name, t.x[0]])")
    assert ["optimizer", 2.0] in parts and ["activations", 0.25] in parts


@pytest.mark.full
@pytest.mark.parametrize(
    ("chart", "figure"),
    [
        ("speed", "tokens_per_s"),
        ("device", "tokens_per_s_per_device"),
        ("efficiency", "efficiency"),
        ("mfu", "mfu"),
        ("scaling", "speed_up"),
        ("pareto", "seconds_to_target"),
    ],
)
def test_every_mean_is_drawn(browser: Tab, written: tuple[Path, Comparison], chart: str, figure: str) -> None:
    path, comparison = written
    browser.open(path, width=1400, scheme="light")
    data = f"document.getElementById('{chart}-chart').data"
    drawn = {
        "scaling": f"{data}.filter(t => t.mode === 'markers').map(t => t.y[0])",
        "pareto": f"{data}.filter(t => t.mode === 'markers+text').map(t => t.x[0])",
    }.get(chart, f"{data}[0].x.toReversed()")
    means = [one.spreads[figure].mean for one in comparison.series if figure in one.spreads]
    assert len(means) > 10
    assert browser.evaluate(drawn) == pytest.approx(means)


@pytest.mark.full
def test_traffic_waits_and_the_traced_step_are_drawn(browser: Tab, written: tuple[Path, Comparison]) -> None:
    path, comparison = written
    browser.open(path, width=1400, scheme="light")
    firsts = [comparison.runs[one.runs[0]] for one in comparison.series]
    parts = browser.evaluate("document.getElementById('traffic-chart').data.map(t => [t.name, t.x.toReversed()])")
    sent = [sum(megabytes) for megabytes in zip(*(of_runs for _, of_runs in parts), strict=True)]
    assert {name for name, _ in parts} == {"all-reduce · data", "all-gather · data"}
    assert sent == pytest.approx([run.sent_bytes / 1e6 for run in firsts if run.sent_bytes])
    waits = browser.evaluate("document.getElementById('wait-chart').data[0].x.toReversed()")
    assert waits == pytest.approx([run.wait_share for run in firsts if run.wait_share is not None])
    shown = next(run for run in comparison.runs if run.gantt)
    bars = browser.evaluate("document.getElementById('gantt-chart').data.map(t => [t.name, t.base, t.x])")
    assert {name: sorted(zip(starts, lengths, strict=True)) for name, starts, lengths in bars} == {
        category: sorted((bar.start_ms, bar.duration_ms) for bar in shown.gantt if bar.category == category)
        for category in {bar.category for bar in shown.gantt}
    }


@pytest.mark.full
def test_a_page_of_failed_runs_alone_has_nothing_to_complain_of(browser: Tab, tmp_path: Path) -> None:
    write_page(compare_runs([failed("ddp"), failed("zero1")]), tmp_path / "compare.html")
    browser.open(tmp_path / "compare.html", width=1400, scheme="light")
    assert browser.complaints == []
    assert browser.evaluate("document.querySelectorAll('#shown span svg').length") == 2


@pytest.mark.full
def test_the_keyboard_reaches_everything(browser: Tab, written: tuple[Path, Comparison]) -> None:
    path, comparison = written
    browser.open(path, width=1400, scheme="light")
    browser.press("Tab", 9)
    assert browser.evaluate("document.activeElement.className") == "skip"
    count = "document.getElementById('loss-chart').data.length"
    before = browser.evaluate(count)
    browser.evaluate("document.querySelector('#shown input').focus()")
    browser.press(" ", 32)
    assert browser.evaluate(count) == before - 3  # its loss, its difference and its validation loss
    browser.evaluate("document.querySelector('#across input:checked').focus()")
    browser.press("ArrowDown", 40)
    assert browser.evaluate("document.getElementById('loss-chart').layout.xaxis.title.text") == "tokens"
    browser.evaluate("document.getElementById('traced').focus()")
    browser.press("ArrowDown", 40)
    places = [str(place) for place, one in enumerate(comparison.runs) if one.gantt]
    assert browser.evaluate("document.getElementById('traced').value") == places[1]
    assert browser.complaints == []
