"""The command line: pages anew from report.json, two runs compared, and exit codes that CI can rely on."""

import copy
import json
import os
import pty
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from lightning_quantdebug import cli
from lightning_quantdebug.cli import main
from lightning_quantdebug.report import Final, Report, Verdict
from lightning_quantdebug.report_markdown import to_markdown
from lightning_quantdebug.visuals import Visuals
from tests.report_examples import full_report, hostile_report
from tests.terminals import ESCAPE
from tests.test_report_diff import run
from tests.test_report_reading import places, written
from tests.visual_examples import image_report, sentence_report

ROOT = Path(__file__).parent.parent
REPORTS = [Report, full_report, hostile_report, image_report, sentence_report]


@pytest.fixture
def html(monkeypatch: pytest.MonkeyPatch) -> None:
    """A page that is quick to make, and pictures that are the bytes of their names."""
    for name, members in {
        "html_report": {"to_html": lambda report: f"<p>{report.final.files['report.html']}</p>"},
        "figures": {"overview": lambda report: {"chart": b"chart"}},
        "tensor_figures": {"of_tensor": lambda view: {"ranges": b"ranges"}},
        "figure_style": {"png": lambda figure: figure},
    }.items():
        made = ModuleType(f"lightning_quantdebug.{name}")
        vars(made).update(members)
        monkeypatch.setitem(sys.modules, made.__name__, made)


def kept(report: Report, directory: Path) -> Path:
    """The directory of a run."""
    report.to_json(directory / "report.json")
    return directory


def command(*arguments: object, **more: Any) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    words = [sys.executable, "-m", "lightning_quantdebug", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1"}
    return subprocess.run(words, env=environment, capture_output=True, encoding="utf-8", check=False, **more)


# report


@pytest.mark.usefixtures("html")
@pytest.mark.parametrize("make", REPORTS)
def test_the_pages_are_written_beside_the_report_which_stays(
    make: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = kept(make(), tmp_path) / "report.json"
    os.utime(path, ns=(1, 1))
    before = path.read_bytes()
    assert main(["report", str(tmp_path)]) == 0
    assert path.read_bytes() == before
    assert path.stat().st_mtime_ns == 1
    assert sorted(item.name for item in tmp_path.iterdir()) == ["report.html", "report.json", "report.md"]
    assert (tmp_path / "report.html").read_text() == f"<p>{tmp_path / 'report.html'}</p>"
    page = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert page.splitlines()[0] == to_markdown(Report.from_json(path)).splitlines()[0]
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("quantdebug: ")
    assert {tuple(line.split()) for line in lines} >= {
        (name, str(tmp_path / name)) for name in ("report.json", "report.md", "report.html")
    }


@pytest.mark.usefixtures("html")
def test_written_again_the_page_is_the_same(tmp_path: Path) -> None:
    files = {"report.json": str(tmp_path / "report.json"), "report.md": str(tmp_path / "report.md")}
    files["report.html"] = str(tmp_path / "report.html")
    report = replace(full_report(), final=replace(full_report().final, files=files))
    kept(report, tmp_path)
    assert main(["report", os.path.relpath(tmp_path)]) == 0
    assert (tmp_path / "report.md").read_text(encoding="utf-8") == to_markdown(Report.from_json(files["report.json"]))


@pytest.mark.usefixtures("html")
def test_a_file_is_as_good_as_its_directory_and_the_output_may_lie_elsewhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = full_report().to_json(tmp_path / "run" / "kept.json")
    out = tmp_path / "out" / "there"
    assert main(["report", str(path), "--output", str(out), "--pictures"]) == 0
    assert [item.name for item in path.parent.iterdir()] == ["kept.json"]
    assert sorted(item.name for item in out.iterdir()) == ["pictures", "report.html", "report.md"]
    assert [item.name for item in (out / "pictures").iterdir()] == ["overview-chart.png"]
    lines = capsys.readouterr().out.splitlines()
    assert f"report.json  {path}" in lines
    assert lines[-1] == f"pictures: 1 in {out / 'pictures'}"


@pytest.mark.usefixtures("html")
@pytest.mark.parametrize("name", ["report.md", "report.html"])
def test_the_report_is_never_written_over(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = full_report().to_json(tmp_path / name)
    before = path.read_bytes()
    (tmp_path / "link").symlink_to(tmp_path)
    for given in (path, tmp_path / "link" / name):
        assert main(["report", str(given)]) == 2
        assert "is the report itself: give another `--output`" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "link" / name), "--output", str(tmp_path)]) == 2
    assert path.read_bytes() == before


@pytest.mark.usefixtures("html")
def test_a_place_that_can_not_be_written_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main(["report", str(kept(full_report(), tmp_path)), "--output", str(tmp_path / "file")]) == 2
    assert capsys.readouterr().err.startswith("quantdebug: Can not write")


def test_a_report_that_can_not_be_drawn_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = ModuleType("lightning_quantdebug.html_report")
    made.to_html = lambda report: report.settings["missing"]  # type: ignore[attr-defined] # a stand-in
    monkeypatch.setitem(sys.modules, made.__name__, made)
    assert main(["report", str(kept(full_report(), tmp_path))]) == 2
    assert "does not hold what a report holds: KeyError: 'missing'" in capsys.readouterr().err


# diff


@pytest.mark.parametrize(
    ("loss", "more", "code"), [(0.02, [], 0), (0.05, [], 1), (0.03, ["--strict"], 1), (0.03, [], 0)]
)
def test_the_exit_code_says_whether_it_is_a_regression(loss: float, more: list[str], code: int, tmp_path: Path) -> None:
    a = kept(run(0.02), tmp_path / "a")
    b = kept(run(loss, verdict=Verdict.ACCEPTED if loss == 0.02 else Verdict.NOT_ACCEPTED), tmp_path / "b")
    assert main(["diff", str(a), str(b), *more]) == code


def test_json_is_all_that_is_printed_then(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = kept(run(0.02), tmp_path / "a"), kept(run(0.05), tmp_path / "b")
    assert main(["diff", str(a), str(b / "report.json"), "--json"]) == 1
    captured = capsys.readouterr()
    assert json.loads(captured.out)["regression"] is True
    assert captured.err == ""


def test_a_step_may_decide(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = kept(image_report(), tmp_path / "a")
    worse = image_report()
    (_, activations, *_) = worse.steps
    steps = tuple(replace(step, loss=0.5, interval=(0.4, 0.6)) if step is activations else step for step in worse.steps)
    b = kept(replace(worse, steps=steps), tmp_path / "b")
    assert main(["diff", str(a), str(b)]) == 0
    assert main(["diff", str(a), str(b), "--step", "activations"]) == 1
    assert main(["diff", str(a), str(b), "--step", "qat"]) == 2
    assert "measured no loss of `qat`" in capsys.readouterr().err


@pytest.mark.parametrize("as_json", [True, False])
def test_what_can_not_be_compared_is_told(as_json: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = kept(run(0.02), tmp_path / "a")
    other = replace(run(0.02), settings={"monitor": "\x1b[2J" + "val\n" * 500, "mode": "max"})
    b = kept(other, tmp_path / "b")
    assert main(["diff", str(a), str(b), *(["--json"] if as_json else [])]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("quantdebug: The runs can not be compared: `monitor` is 'val' in A and")
    assert len(captured.err) < 700
    assert "\x1b" not in captured.err
    if as_json:
        values = json.loads(captured.out)
        assert values["exit_code"] == 2
        assert values["error"] in captured.err
    else:
        assert captured.out == ""


@pytest.mark.parametrize(
    "arguments",
    [[], ["repair"], ["diff", "a"], ["diff", "a", "b", "--step", "none"], ["report"], ["report", "a", "--json"]],
)
def test_wrong_arguments_are_argparses_own_errors(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: python -m lightning_quantdebug" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["report", "diff"])
def test_help_tells_the_exit_codes(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([name, "--help"])
    assert caught.value.code == 0
    _, codes = capsys.readouterr().out.split("exit codes:")
    assert [line.split()[0] for line in codes.splitlines() if line[:3].strip()] == (
        ["0", "2"] if name == "report" else ["0", "1", "2"]
    )
    assert (cli.OK, cli.REGRESSION, cli.UNUSABLE) == (0, 1, 2)


@pytest.mark.usefixtures("html")
def test_whatever_stands_in_a_report_there_is_an_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = replace(full_report(), visuals=Visuals()).to_dict()
    good = kept(full_report(), tmp_path / "good")
    codes = {"report": set[int](), "diff": set[int]()}
    # What records leave open: readers must rely on nothing there.
    for place in [path for path in places(whole) if path[:1] == ("settings",) or "details" in path]:
        for value in (None, 5, "x", [], {}, [None], float("nan"), -1e308):
            values = copy.deepcopy(whole)
            owner: Any = values
            for key in place[:-1]:
                owner = owner[key]
            owner[place[-1]] = value
            (tmp_path / "bad").mkdir(exist_ok=True)
            bad = written(values, tmp_path / "bad")
            codes["report"].add(main(["report", str(bad)]))
            codes["diff"].add(main(["diff", str(good), str(bad)]))
            codes["diff"].add(main(["diff", str(bad), str(good), "--json"]))
            capsys.readouterr()
    assert codes == {"report": {0, 2}, "diff": {0, 2}}


def test_nesting_without_end_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = kept(full_report(), tmp_path / "good")
    for depth in (200, 3_000, 100_000):
        text = json.dumps({**full_report().to_dict(), "settings": {"x": "HERE"}})
        (tmp_path / str(depth)).mkdir()
        bad = written(text.replace('"HERE"', '{"y":' * depth + "1" + "}" * depth), tmp_path / str(depth))
        assert main(["diff", str(good), str(bad)]) == 2
        assert main(["diff", str(bad), str(bad), "--json"]) in (0, 2)
    capsys.readouterr()


# In a process of its own.


def test_a_regression_fails_a_job_and_nothing_else_is_written_to_a_pipe(tmp_path: Path) -> None:
    a, b = kept(run(0.02), tmp_path / "a"), kept(run(0.05), tmp_path / "b")
    worse = command("diff", a, b)
    assert worse.returncode == 1
    assert worse.stdout.startswith("REGRESSION: The loss of final rose by 0.03")
    assert "\x1b" not in worse.stdout
    assert worse.stderr == ""
    missing = command("diff", a, tmp_path / "missing")
    assert (missing.returncode, missing.stdout) == (2, "")
    assert missing.stderr.startswith("quantdebug: There is no report at")
    assert "Traceback" not in missing.stderr


def test_the_real_pages_are_written_by_the_command(tmp_path: Path) -> None:
    kept(sentence_report(), tmp_path)
    found = command("report", tmp_path)
    assert (found.returncode, found.stderr) == (0, "")
    assert "<html" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert str(tmp_path / "report.html") in found.stdout


def test_the_real_pictures_are_written_by_the_command(tmp_path: Path) -> None:
    kept(image_report(8), tmp_path)
    found = command("report", tmp_path, "--pictures")
    assert (found.returncode, found.stderr) == (0, "")
    pictures = list((tmp_path / "pictures").iterdir())
    assert f"pictures: {len(pictures)} in {tmp_path / 'pictures'}" in found.stdout
    assert len([path for path in pictures if path.name.startswith("tensor-01-")]) > 1
    assert {path.read_bytes()[:8] for path in pictures} == {b"\x89PNG\r\n\x1a\n"}


@pytest.mark.parametrize("no_color", [True, False])
def test_a_terminal_gets_colours(no_color: bool, tmp_path: Path) -> None:
    a, b = kept(run(0.02), tmp_path / "a"), kept(run(0.05), tmp_path / "b")
    leader, follower = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm-256color", "COLUMNS": "80"}
    environment = {**environment, "PYTHONIOENCODING": "utf-8", "NO_COLOR": "1" if no_color else ""}
    words = [sys.executable, "-m", "lightning_quantdebug", "diff", str(a), str(b)]
    with subprocess.Popen(words, env=environment, stdout=follower, stderr=follower) as process:
        os.close(follower)
        text = b""
        while True:
            try:
                found = os.read(leader, 65536)
            except OSError:
                break
            if not found:
                break
            text += found
    os.close(leader)
    assert process.returncode == 1
    shown = text.decode("utf-8")
    assert "╭" in shown
    assert "REGRESSION" in ESCAPE.sub("", shown)
    assert ("\x1b[1;31m" in shown) is not no_color


def test_a_reader_that_leaves_early_is_no_crash(tmp_path: Path) -> None:
    a = kept(image_report(), tmp_path / "a")
    words = [sys.executable, "-m", "lightning_quantdebug", "diff", str(a), str(a), "--json"]
    read, write = os.pipe()
    os.close(read)
    found = subprocess.run(
        words, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=write, stderr=subprocess.PIPE, check=False
    )
    os.close(write)
    assert found.stderr == b""
    assert found.returncode == 2


def test_a_comparison_needs_neither_torch_nor_lightning_nor_what_draws(tmp_path: Path) -> None:
    a = kept(Report(final=Final(loss=0.1)), tmp_path / "a")
    # A package without contents in the place of ours: what it imports itself is another matter.
    source = f"""
import sys, types
package = types.ModuleType("lightning_quantdebug")
package.__path__ = [{str(ROOT / "lightning_quantdebug")!r}]
sys.modules["lightning_quantdebug"] = package
from lightning_quantdebug.cli import main
assert main(["diff", {str(a)!r}, {str(a)!r}]) == 0
heavy = {{"torch", "numpy", "lightning", "pytorch_lightning", "torchmetrics", "matplotlib", "plotly", "jinja2"}}
print(sorted(heavy & set(sys.modules)))
"""
    found = subprocess.run([sys.executable, "-c", source], capture_output=True, encoding="utf-8", check=False)
    assert found.stderr == ""
    assert found.stdout.splitlines()[-1] == "[]"
