"""`compare` on results of eval, sim and spatial: the table, the files for a paper, and what is refused."""

import csv
import html
import json
import os
import re
import shutil
import subprocess
import zipfile
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest

from tests import recordings, serving
from vlm_local.cli import main

HARD_NAME = r"_$\frac$ π₀.₅ --marks |1<2|"  # to LaTeX, to matplotlib's formulas and to its legends
EVIDENCE = Path(__file__).parents[2] / "docs" / "evidence"


@pytest.fixture(scope="module")
def evaluations(tmp_path_factory):
    """Folder with the evaluations oracle-label, majority and random of three episodes."""
    folder = tmp_path_factory.mktemp("evaluations")
    recordings.write_walks(folder / "data", 3, num_steps=10)
    for name in ("oracle-label", "majority", "random"):
        command = ["eval", "--data", str(folder / "data"), "--policy", name, "--out", str(folder / name)]
        assert main(command) == 0
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folder with runs in the simulator: stop and oracle on the same seeds, other seeds, another level."""
    folder = tmp_path_factory.mktemp("runs")
    plans = {"stop": [], "oracle": [], "seeds": ["--seed", "50"], "easy": ["--level", "easy"]}
    for name, flags in plans.items():
        policy = "oracle" if name == "oracle" else "stop"
        plan = ["--task", "open_drawer,close_drawer", "--episodes", "1", "--max-steps", "40", "--films", "0"]
        assert main(["sim", "--policy", policy, "--out", str(folder / name), *plan, "--workers", "1", *flags]) == 0
    return folder


@pytest.fixture(scope="module")
def studies(tmp_path_factory):
    """Folder with spatial studies of 40 scenes, as they were published."""
    folder = tmp_path_factory.mktemp("studies")
    for name in ("random", "stop", "tiny"):
        zipfile.ZipFile(EVIDENCE / f"spatial-{name}.evidence.zip").extractall(folder / name)
    return folder


def _compare(capsys, folder, *names_and_flags) -> tuple[int, str, str]:
    """Names of results in the folder come before flags."""
    count = next((at for at, word in enumerate(names_and_flags) if word.startswith("--")), len(names_and_flags))
    results = [str(folder / name) for name in names_and_flags[:count]]
    capsys.readouterr()
    status = main(["compare", *results, *map(str, names_and_flags[count:])])
    return status, *capsys.readouterr()


def test_two_evaluations_stand_in_one_table(evaluations, capsys):
    status, out, _ = _compare(capsys, evaluations, "oracle-label", "majority")
    (line,) = (line for line in out.splitlines() if line.startswith("exact "))
    assert status == 0 and line.split()[:4] == ["exact", "30", "100.0", "%"]
    assert "30 shared steps in 3 episodes" in out and "Holm" not in out


def test_runs_are_paired_by_their_seeds(runs, capsys):
    status, out, _ = _compare(capsys, runs, "oracle", "stop", "--name", "B=Standing still")
    lines = {line.split("  ")[0]: line.split() for line in out.splitlines()}
    assert status == 0 and "B Standing still" in out
    assert lines["success"][1:6] == ["2", "100.0", "%", "0.0", "%"] and lines["success"][6] == "+100.0"
    assert lines["close_drawer"][1] == "1" and lines["progress"][1] == "2"


@pytest.mark.parametrize("names", [("oracle", "one"), ("one", "oracle")])
def test_a_run_of_fewer_tasks_is_compared_on_those_that_both_have(runs, tmp_path, capsys, names):
    plan = ["--task", "close_drawer", "--episodes", "1", "--max-steps", "40", "--films", "0", "--workers", "1"]
    assert main(["sim", "--policy", "stop", "--out", str(tmp_path / "one"), *plan]) == 0
    shutil.copytree(runs / "oracle", tmp_path / "oracle")
    status, out, _ = _compare(capsys, tmp_path, *names)
    told = json.loads(out.splitlines()[-1])
    assert (status, told["trials"]) == (0, 1)
    assert [measure["name"] for measure in told["measures"]] == ["success", "progress"]


def test_success_within_70_steps_is_told_only_where_so_many_were_played(runs, capsys):
    status, out, _ = _compare(capsys, runs, "oracle", "stop")
    assert status == 0 and "max steps 40" in out and "within 70" not in out
    assert "within 70" not in (runs / "stop" / "report.html").read_text()
    again = ["--task", "open_drawer,close_drawer", "--episodes", "1", "--max-steps", "40", "--films", "0"]
    assert main(["sim", "--policy", "stop", "--out", str(runs / "stop"), *again, "-q"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["success_rate"]["open_drawer"] == 0 and told["success_rate_70"]["open_drawer"] is None


def test_an_evaluation_that_was_stopped_is_refused(evaluations, tmp_path, capsys):
    """One of two episodes that was then asked about a third, and was stopped in it."""
    shutil.copytree(evaluations / "random", tmp_path / "stopped")
    rows = (tmp_path / "stopped" / "rows.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "stopped" / "rows.jsonl").write_text("".join(rows[:-4]))
    assert main(["compare", str(evaluations / "majority"), str(tmp_path / "stopped")]) == 2
    assert "has 26 rows and a report of 30" in capsys.readouterr().err


def test_data_and_camera_stand_beside_the_numbers(evaluations, capsys):
    _, out, _ = _compare(capsys, evaluations, "oracle-label", "majority")
    assert "data data, camera image_0" in out


def _write_paper(evaluations, folder) -> str:
    """Returns what it printed."""
    results = [str(evaluations / name) for name in ("oracle-label", "majority", "random")]
    names = ("--name", "A=Oracle_1 & co", "--name", f"B={HARD_NAME}")
    with redirect_stdout(StringIO()) as out:
        assert main(["compare", *results, *names, "--out", str(folder)]) == 0
    return out.getvalue()


@pytest.fixture(scope="module")
def paper(evaluations, tmp_path_factory):
    """(Folder of a comparison's files, what it printed)."""
    folder = tmp_path_factory.mktemp("paper")
    return folder, _write_paper(evaluations, folder)


@pytest.mark.slow
def test_files_for_a_paper(paper):
    folder, out = paper
    assert all(file.name in out for file in folder.iterdir())
    result = json.loads((folder / "comparison.json").read_text())
    assert result["results"][2]["made_with"]["policy"]["name"] == "random" and result["versions"]
    with (folder / "differences.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["measure"] == "exact"]
    assert [(row["first"], row["second"]) for row in rows] == [
        *[("Oracle_1 & co", HARD_NAME), ("Oracle_1 & co", "random"), (HARD_NAME, "random")]
    ]
    assert all(float(row["p_value"]) <= float(row["p_holm"]) for row in rows)
    tables = re.findall(
        r"\\begin\{tabular\}\{(\w+)\}\n(.*?)\\end\{tabular\}", (folder / "comparison.tex").read_text(), re.S
    )
    assert len(tables) == 2
    for columns, body in tables:
        lines = [line for line in body.splitlines() if line.endswith(r"\\")]
        assert {len(re.findall(r"(?<!\\)&", line)) + 1 for line in lines} == {len(columns)}
        assert r"Oracle\_1 \& co" in body and body.startswith("\\toprule\n") and body.endswith("\\bottomrule\n")
    assert "| exact | 30 | 100.0 %" in (folder / "comparison.md").read_text()
    for name in ("differences", "by_axis"):
        pdf = (folder / f"{name}.pdf").read_bytes()
        (width,) = re.findall(rb"/MediaBox \[ 0 0 ([0-9.]+) ", pdf)
        assert pdf.startswith(b"%PDF") and float(width) == 3.5 * 72 and b"/FontFile2" in pdf
        assert html.escape(HARD_NAME) in (folder / f"{name}.svg").read_text()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="apt install texlive-latex-recommended")
def test_tables_and_figures_go_through_pdflatex(paper, tmp_path):
    folder, _ = paper
    text = r"""\documentclass{article}\usepackage{booktabs,graphicx}\begin{document}
\input{comparison} \includegraphics{differences} \includegraphics{by_axis}
\end{document}"""
    (tmp_path / "paper.tex").write_text(text)
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "paper.tex"]
    environment = {**os.environ, "TEXINPUTS": f"{folder}:"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "Missing character" not in (tmp_path / "paper.log").read_text(errors="replace")


@pytest.mark.slow
def test_the_same_comparison_writes_the_same_bytes(paper, evaluations, tmp_path):
    _write_paper(evaluations, tmp_path)
    names = {file.name for file in tmp_path.iterdir()}
    assert {"comparison.json", "differences.pdf", "differences.svg"} < names
    for name in names:
        assert (tmp_path / name).read_bytes() == (paper[0] / name).read_bytes(), name


def test_three_studies_stand_in_one_table(studies, capsys):
    status, out, _ = _compare(capsys, studies, "tiny", "stop", "random")
    assert status == 0 and "40 shared scenes" in out and "Lower is better: moved, left" in out
    assert "n: axes, of each scene" in out and "Differs: version of vlm local: 0.2.0 in tiny; 0.1.0 in" in out
    (line,) = (line for line in out.splitlines() if line.startswith("moved") and "A - B" in line)
    assert line.split()[4] == "+0.005"  # p is below 0.001, so this must not read as 0.00


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (
            ("stop", "seeds"),
            "share no episode.*stop has open_drawer, seed 0 to close_drawer, seed 0; seeds has open_drawer, seed 50",
        ),
        (("stop", "oracle", "easy"), 'level is "normal" in stop and "easy" in easy'),
        (("stop",), "2 to 26 results, not 1"),
        (("stop", "nowhere"), "nowhere is no result folder"),
        (("stop", "stop"), "two results have the same name"),
        (("stop", "oracle", "--name", "C=x"), "with a letter from A to B"),
    ],
)
def test_what_cannot_be_compared_is_refused_with_the_reason(runs, capsys, names, says):
    status, _, told = _compare(capsys, runs, *names)
    assert status == 2 and re.search(says, told)


@pytest.mark.slow
def test_jobs_of_a_station_are_paired_by_their_seeds(tmp_path, capsys):
    with serving.serve() as server:
        jobs = {"first": ("2", "3"), "second": ("2", "3"), "longer": ("1", "4"), "put": ("1", "3")}
        for name, (episodes, steps) in jobs.items():
            job = ["--task", "open_drawer", "--episodes", episodes, "--max-steps", steps, "--test-every", "0"]
            job += ["--reset-policy", "oracle"] * (name == "put")
            assert main(["station", server.url, *job, "--out", str(tmp_path / name)]) == 0
    status, out, _ = _compare(capsys, tmp_path, "first", "second")
    assert status == 0 and "2 shared episodes; task open_drawer, max steps 3, clock step" in out
    assert json.loads(out.splitlines()[-1])["measures"][1]["name"] == "reached"
    status, _, told = _compare(capsys, tmp_path, "first", "longer")
    assert status == 2 and "max_steps is 3 in first and 4 in longer" in told
    status, _, told = _compare(capsys, tmp_path, "first", "put")  # whose seeds are other scenes
    assert status == 2 and 'reset_policy is "scripted" in first and "oracle" in put' in told


def test_results_of_different_commands_are_refused(runs, studies, capsys):
    assert main(["compare", str(runs / "stop"), str(studies / "tiny")]) == 2
    assert "stop is a result of `sim` and tiny one of `spatial`" in capsys.readouterr().err


def test_scenes_that_were_changed_are_refused(studies, tmp_path, capsys):
    zipfile.ZipFile(EVIDENCE / "spatial-stop.evidence.zip").extractall(tmp_path / "changed")
    rows = tmp_path / "changed" / "rows.jsonl"
    rows.write_text(rows.read_text().replace("the red block", "the blue block", 1))
    assert main(["compare", str(studies / "stop"), str(tmp_path / "changed")]) == 2
    assert re.search(r"disagree on 1 of 40 scenes, first on scene \d+", capsys.readouterr().err)
