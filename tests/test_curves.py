"""The picture of runs' curves: whose they are, what is drawn of them, and what is no run."""

import base64
import json
import re
from html.parser import HTMLParser

import pytest
from matplotlib.figure import Figure

import log


def run_at(directory, rows: list[dict]) -> str:
    directory.mkdir(parents=True)
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(directory)


TRAINED = [{"step": n, "loss": 3.0 / n, "learning_rate": 1e-3, "grad_norm": 1.0} for n in (1, 2, 3)]
EVALUATED = [{"step": n, "eval_loss": 4.0 - n, "eval_perplexity": 9.0} for n in (0, 1)]


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """The figure of the runs at some directories."""
    figures, save = [], Figure.savefig

    def keep(figure, *args, **options):
        figures.append(figure)
        save(figure, *args, **options)

    monkeypatch.setattr(Figure, "savefig", keep)

    def draw(*directories) -> Figure:
        log.curves(log.read_runs(directories), tmp_path / "curves.png")
        assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
        return figures[-1]

    return draw


def test_each_run_has_a_line_of_its_own_colour_and_points_in_every_panel_it_has_something_for(drawn, tmp_path):
    both = run_at(tmp_path / "both", [{"step": 0, "rows read": 5}, *EVALUATED, *TRAINED])
    trained = run_at(tmp_path / "trained", TRAINED[:2])
    evaluated = run_at(tmp_path / "evaluated", EVALUATED)
    panels = dict(zip(log.CURVES, drawn(trained, both, evaluated).axes))
    lines = {metric: {line.get_label(): line for line in panel.lines} for metric, panel in panels.items()}
    assert set(lines["loss"]) == set(lines["grad_norm"]) == {"both", "trained"}
    assert set(lines["eval_loss"]) == {"both", "evaluated"}
    assert lines["loss"]["both"].get_xydata().tolist() == [[1, 3.0], [2, 1.5], [3, 1.0]]
    assert lines["eval_loss"]["evaluated"].get_xydata().tolist() == [[0, 4.0], [1, 3.0]]
    colours = {name: {line[name].get_color() for line in lines.values() if name in line} for name in lines["loss"]}
    assert all(len(of_run) == 1 for of_run in colours.values()) and colours["both"] != colours["trained"]


def test_the_ar_sides_loss_is_dashed_beside_the_runs_own_and_axes_have_plain_numbers(drawn, tmp_path):
    rows = [{"step": n, "eval_loss": 6.0 - n, "eval_ar_loss": 0.9} for n in range(3)]
    figure = drawn(run_at(tmp_path / "run", rows))
    figure.canvas.draw()
    panels = dict(zip(log.CURVES, figure.axes))
    bound, as_ar = panels["eval_loss"].lines
    assert (bound.get_linestyle(), as_ar.get_linestyle()) == ("-", "--") and bound.get_color() == as_ar.get_color()
    assert as_ar.get_xydata().tolist() == [[0, 0.9], [1, 0.9], [2, 0.9]]
    assert panels["eval_loss"].get_title("left").endswith("dashed: as ar") and not panels["loss"].lines
    labels = {tick.get_text() for tick in panels["eval_loss"].get_yticklabels(which="both")}
    assert {"0.6", "2", "4"} <= labels and all(re.fullmatch(r"[\d.]*", label) for label in labels)


def test_a_legend_names_the_runs_where_there_are_several_even_those_without_a_loss(drawn, tmp_path):
    runs = [run_at(tmp_path / name / "run", rows) for name, rows in (("a", TRAINED), ("b", EVALUATED))]
    (legend,) = drawn(*runs).legends
    assert [text.get_text() for text in legend.get_texts()] == ["a/run", "b/run"]
    assert not drawn(runs[0]).legends


def test_a_name_is_as_much_of_the_path_as_tells_runs_apart(tmp_path, monkeypatch):
    names = ("x/one/run", "x/two/run", "x/three", "y/two/run")
    for name in names:
        run_at(tmp_path / name, TRAINED)
    assert list(log.read_runs([tmp_path / name for name in names])) == [
        "one/run",
        "x/two/run",
        "three",
        "y/two/run",
    ]
    monkeypatch.chdir(tmp_path / "x/three")
    assert list(log.read_runs(["."])) == ["three"]


def test_a_page_holds_the_picture_and_each_sample_as_text_below_its_prompt(tmp_path):
    found = [("", "")]

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attributes):
            found.append((tag, dict(attributes).get("src", "")))

        def handle_data(self, text):
            found[-1] = (found[-1][0], found[-1][1] + text)

    hostile = "</td><script>alert(1)</script>\n&amp; \x1b[2J"
    texts = [("a < b?", hostile), ("a < b?", "yes"), ("new", "")]
    rows = [{"step": n, "eval_loss": 3.0 - n, "sample_prompt": a, "sample": b} for n, (a, b) in enumerate(texts)]
    Reader().feed(log.page("<run>", [{"step": 0, "loss": 1.0}, *rows], b"a picture"))
    cells = [text.rstrip("\n") for tag, text in found if tag in ("th", "td")]
    assert cells[3:] == [
        *("a < b?", "0", "3.0000", hostile.replace("\x1b", "\ufffd"), "1", "2.0000", "yes", "new", "2", "1.0000", "")
    ]
    assert [text for tag, text in found if tag == "h1"] == ["<run>\n"] and "script" not in dict(found)
    (image,) = (text for tag, text in found if tag == "img")
    assert image.startswith("data:image/png;base64,") and base64.b64decode(image.split(",")[1]) == b"a picture"


def test_a_run_that_is_still_written_is_drawn_and_what_is_no_run_refused(drawn, tmp_path):
    run = run_at(tmp_path / "run", TRAINED)
    (tmp_path / "run/metrics.jsonl").open("a").write('{"step": 4, "lo')
    assert len(log.read_runs([run])["run"]) == 3
    assert drawn(run)
    with pytest.raises(FileNotFoundError, match=r"nowhere holds no metrics\.jsonl; expected the --output_dir of a run"):
        log.read_runs([run, tmp_path / "nowhere"])
    with pytest.raises(ValueError, match="run is named twice; name each run once"):
        log.read_runs([run, tmp_path / "run"])
    for text in ("{\n", "[1]\n", '{"loss": 1}\n'):
        bad = tmp_path / f"bad{len(text)}"
        run_at(bad, TRAINED)
        (bad / "metrics.jsonl").open("a").write(text)
        with pytest.raises(ValueError, match=r"metrics\.jsonl, line 4: .* is no row of a run's log; remove it"):
            log.read_runs([bad])
    assert drawn(run_at(tmp_path / "empty", []), run)  # a run that has logged nothing yet
