"""`qlora elo` from files to tables, JSON and pictures."""

from __future__ import annotations

import json
import random
import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import typer

from qlora_cli.cli.elo import elo
from qlora_cli.errors import DataError, DiskError
from qlora_cli.workflows.elo import EloOptions, run_elo, run_percent
from qlora_cli.workflows.elo_text import elo_text, percent_text
from tests.conftest import write_jsonl

FEW = EloOptions(orders=50)


def games(questions: int = 30) -> list[dict[str, Any]]:
    """Three models, strong, even and weak, in both orders."""
    pick, rows = random.Random(1), []
    for question in range(questions):
        for one, other, chance in (("strong", "even", 0.7), ("even", "weak", 0.7), ("strong", "weak", 0.85)):
            winner = one if pick.random() < chance else other
            for first, second in ((one, other), (other, one)):
                said = "tie" if pick.random() < 0.1 else "a" if winner == first else "b"
                names = {"model_a": first, "model_b": second}
                rows.append({"question_id": question, **names, "winner": said, "judge": "j"})
    return rows


def scores(questions: int = 10) -> list[dict[str, Any]]:
    """One model that is a point better than the baseline, in both orders."""
    rows = []
    for question in range(questions):
        base, own = 5 + question % 3, 6 + question % 3
        both = {"question_id": question, "judge": "j"}
        rows.append({**both, "model_a": "base", "model_b": "m", "score_a": base, "score_b": own})
        rows.append({**both, "model_a": "m", "model_b": "base", "score_a": own, "score_b": base})
    return rows


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with games and scores in it."""
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "games.jsonl", games())
    write_jsonl(tmp_path / "scores.jsonl", scores())
    return tmp_path


def command(arguments: Sequence[str]) -> int:
    """Runs the command as `qlora elo` would; its errors pass through."""
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(elo)
    with pytest.raises(SystemExit) as end:
        app(args=list(arguments), prog_name="qlora elo")
    return int(end.value.code or 0)


def test_ratings_come_best_first_with_all_that_was_read(files: Path) -> None:
    result = run_elo(["games.jsonl"], FEW)
    assert [each.model for each in result.standings] == ["strong", "even", "weak"]
    assert (result.read.rows, result.read.questions, result.read.judges) == (180, 30, {"j": 180})
    assert sum(each.elo.mean for each in result.standings) == pytest.approx(3000)
    assert sum(each.strength for each in result.standings) == pytest.approx(3000)
    for i, each in enumerate(result.standings):
        assert each.interval is not None
        assert each.interval[0] < each.strength < each.interval[1]
        assert each.elo.mean == pytest.approx(each.strength, abs=60)
        assert (each.won, each.tied) == (sum(result.won[i]), sum(result.tied[i]))
        assert each.lost == sum(row[i] for row in result.won)
    assert result.position.pairs == 90


def test_games_split_over_files_rate_as_those_of_one(files: Path) -> None:
    rows = games()
    write_jsonl(files / "1.jsonl", rows[100:])
    write_jsonl(files / "2.jsonl", rows[:100])
    whole, split = run_elo(["games.jsonl"], FEW), run_elo(["1.jsonl", "2.jsonl"], FEW)
    assert [each.elo for each in split.standings] == [each.elo for each in whole.standings]
    assert [each.strength for each in split.standings] == pytest.approx([each.strength for each in whole.standings])


def test_k_start_and_seed_reach_the_ratings(files: Path) -> None:
    write_jsonl(files / "one.jsonl", games()[:1])
    first = run_elo(["one.jsonl"], EloOptions(orders=2, k=10, start=500))
    assert sorted(each.elo.mean for each in first.standings) == [495.0, 505.0]
    means = [run_elo(["games.jsonl"], EloOptions(orders=5, seed=seed)).standings[0].elo.mean for seed in (0, 0, 1)]
    assert means[0] == means[1] != means[2]


def test_json_is_json_and_says_what_the_result_holds(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["games.jsonl", "--orders", "50", "--json"]) == 0
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert found == json.loads(json.dumps(run_elo(["games.jsonl"], FEW).as_json()))
    assert (found["event"], found["orders"], found["k"], found["start"]) == ("result", 50, 32.0, 1000.0)
    assert [each["model"] for each in found["models"]] == ["strong", "even", "weak"]
    assert {(each["model"], each["opponent"]) for each in found["pairs"]} == {
        ("strong", "even"),
        ("strong", "weak"),
        ("even", "weak"),
    }
    assert all(each["won"] + each["lost"] + each["tied"] == 60 for each in found["pairs"])


def test_a_model_that_won_everything_is_said_to_be_above(files: Path) -> None:
    rows = [
        {**row, "winner": "a" if row["model_a"] == "strong" else "b"} for row in games() if "strong" in row.values()
    ]
    write_jsonl(files / "won.jsonl", rows + [row for row in games() if "strong" not in row.values()])
    result = run_elo(["won.jsonl"], FEW)
    top = result.standings[0]
    assert (top.model, top.bound, top.interval) == ("strong", "above", None)
    said = json.loads(json.dumps(result.as_json()), parse_constant=pytest.fail)
    assert said["models"][0]["bradley_terry"] == {"rating": None, "low": None, "high": None, "bound": "above"}
    assert "above: its wins lead to all others" in elo_text(result)


def test_one_game_has_ratings_and_says_what_is_not_known(files: Path) -> None:
    write_jsonl(files / "one.jsonl", games()[:1])
    result = run_elo(["one.jsonl"], EloOptions(orders=1))
    json.loads(json.dumps(result.as_json()), parse_constant=pytest.fail)
    text = elo_text(result)
    assert "nan" not in text
    assert "1 games" not in text
    assert "1 game on 1 question" in text
    assert "no question was judged in both orders" in text


def test_the_text_names_every_interval_and_shows_wins_and_position(files: Path) -> None:
    result = run_elo(["games.jsonl"], FEW)
    text = elo_text(result)
    assert text.startswith("180 games on 30 questions; judge: j (180)\n50 random orders (seed 0), K 32, from 1,000\n")
    assert f"{result.standings[0].elo.mean:.1f}" in text
    assert "95% of the mean: how well the mean over random orders is known" in text
    assert f"(1) strong  {'':>15}" in text
    assert f"{result.won[0][2]}+{result.tied[0][2]}" in text
    assert "judged in both orders: 90 pairs" in text


def test_bad_rows_are_named_and_end_the_command_or_are_left_out_and_counted(files: Path) -> None:
    rows = games()
    write_jsonl(files / "bad.jsonl", [*rows[:3], rows[3] | {"winner": "neither"}, *rows[4:]])
    with pytest.raises(DataError) as caught:
        run_elo(["bad.jsonl"], FEW)
    assert [each.where for each in caught.value.problems] == ["bad.jsonl:4"]
    result = run_elo(["bad.jsonl"], EloOptions(orders=50, skip_bad=True))
    assert (result.read.rows, len(result.read.bad)) == (179, 1)
    assert result.as_json()["bad"] == 1
    assert result.as_json()["bad_rows"][0]["where"] == "bad.jsonl:4"
    assert "left out, since they cannot be used: 1\n  bad.jsonl:4: winner must be a, b or tie" in elo_text(result)


def test_repeated_rows_are_counted_and_said(files: Path) -> None:
    write_jsonl(files / "again.jsonl", [*games(), *games(2)])
    result = run_elo(["again.jsonl"], FEW)
    assert (result.read.rows, result.read.repeated) == (192, 12)
    assert "12 of the games repeat an earlier row" in elo_text(result)


def test_percents_of_the_baseline_in_both_orders(files: Path) -> None:
    result = run_percent(["scores.jsonl"], "base")
    own, base = sum(6 + i % 3 for i in range(10)), sum(5 + i % 3 for i in range(10))
    only = result.models[0]
    assert (only.model, only.questions, result.read.rows) == ("m", 10, 20)
    assert (only.baseline_first, only.baseline_second, only.mean) == pytest.approx([100 * own / base] * 3)
    cells = percent_text(result).splitlines()[3].split()
    assert cells == ["m", *[f"{100 * own / base:.1f}%"] * 3, f"{only.low:.1f}", "to", f"{only.high:.1f}", "10"]
    assert json.loads(json.dumps(result.as_json()), parse_constant=pytest.fail)["models"][0]["model"] == "m"


def test_scores_that_do_not_pair_are_named_or_left_out_and_counted(files: Path) -> None:
    write_jsonl(files / "odd.jsonl", scores()[:-1])
    with pytest.raises(DataError, match="with the baseline first only") as caught:
        run_percent(["odd.jsonl"], "base")
    assert [each.where for each in caught.value.problems] == ["odd.jsonl:19"]
    result = run_percent(["odd.jsonl"], "base", EloOptions(skip_bad=True))
    assert (result.models[0].questions, result.read.rows, len(result.read.bad)) == (9, 18, 1)
    assert "odd.jsonl:19" in percent_text(result)
    write_jsonl(files / "none.jsonl", scores()[:1])
    with pytest.raises(DataError, match="with the baseline first only"):
        run_percent(["none.jsonl"], "base", EloOptions(skip_bad=True))


def test_a_baseline_that_is_in_no_row_is_an_error_that_names_the_models(files: Path) -> None:
    with pytest.raises(DataError, match=r"scores.jsonl:1: no row has the baseline bass[\s\S]*from base, m"):
        run_percent(["scores.jsonl"], "bass")


def test_pictures_are_drawn_even_of_names_that_look_like_formulas(files: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [{**row, "model_a": f"$_{row['model_a']}_$", "model_b": f"$_{row['model_b']}_$"} for row in games()]
    write_jsonl(files / "odd.jsonl", rows)
    assert command(["odd.jsonl", "--orders", "5", "--plot", "plots/g.png"]) == 0
    assert command(["scores.jsonl", "--baseline", "base", "--plot", "s.PNG"]) == 0
    for path in (files / "plots" / "g.png", files / "s.PNG"):
        head = path.read_bytes()[:24]
        assert head[:8] == b"\x89PNG\r\n\x1a\n"
        assert min(struct.unpack(">II", head[16:])) > 200


def test_a_plot_that_cannot_be_written_is_refused_before_anything_is_read(files: Path) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(DiskError, match=r"a plot is a \.png file"):
        run_elo(["none.jsonl"], EloOptions(plot=Path("plot.pdf")))


@pytest.mark.parametrize(
    "wrong", [["--k", "0"], ["--k", "nan"], ["--k", "2000"], ["--start", "inf"], ["--orders", "0"], ["--seed", "-1"]]
)
def test_values_that_make_no_rating_are_refused_as_usage(wrong: list[str], files: Path) -> None:
    assert command(["games.jsonl", *wrong]) == 2


def test_a_name_that_moves_the_cursor_is_shown_and_not_obeyed(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_jsonl(files / "odd.jsonl", [games()[0] | {"model_a": "x\x1b[2J", "judge": "\x07"}])
    assert command(["odd.jsonl", "--orders", "5"]) == 0
    said = capsys.readouterr().out
    assert "x␛[2J" in said
    assert "\x1b" not in said


def test_ratings_need_no_torch() -> None:
    code = "import sys, qlora_cli.workflows.elo, qlora_cli.workflows.elo_text; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
