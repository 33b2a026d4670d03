"""Results as data, and two runs compared: names of rows, planted changes, how often chance is flagged."""
import io
import math

import numpy as np
import pandas as pd
import pytest

from hyperface.core import ConfigError, DataError, rng
from hyperface.report.compare import NAME, VERDICTS, compare, known_spread, margin_of_difference, read_results, training_spread
from hyperface.report.page import write_results
from hyperface.report.results import RESULT_COLUMNS, Run, Value, leading_keys, results_frame, to_csv

Z = 1.959963984540054


def report(folder, seed=0, shift=0., extra=None, data="rendered", status="computed"):
    "A report of two tables; `shift` is added to one accuracy."
    run = Run("t1_toy", profile="smoke", seed=seed, out=str(folder))
    rows = [{"method": m, "dataset": d, "accuracy, %": Value(*(v + i + (shift if i == 1 else 0) for v in (90., 89., 91.)), n=500), "pairs": 500, "paper": "97.5", "remark": "one of many"}
            for i, (m, d) in enumerate([("ArcFace", "A"), ("ArcFace", "B"), ("CosFace", "A")])]
    run.table("rates", pd.DataFrame(rows), "Table 1", data=data, status=status, why="" if status == "computed" else "because")
    run.table("plain", pd.DataFrame({"metric": ["angle", *(extra or [])], "value": [7.5]*(1 + len(extra or []))}), "Table 2", data=data)
    run.done()
    write_results(run.out)
    return run.out


def test_long_form_has_every_number_with_its_interval_and_a_name_of_its_own(tmp_path):
    frame = pd.read_parquet(report(tmp_path) / "results.parquet")
    assert tuple(frame.columns) == RESULT_COLUMNS and not frame.duplicated(NAME).any()
    assert len(frame) == 3*3 + 1                                             # accuracy, pairs and the paper's number; the remark is no number
    row = frame[(frame.row == "ArcFace · B") & (frame.column == "accuracy, %")].iloc[0]
    assert (row.value, row.low, row.high, row.n) == (91., 90., 92., 500.)
    assert (row.status, row.step, row.profile, row.seed, row.data) == ("computed", "t1_toy", "smoke", 0, "rendered") and row.commit
    assert frame[frame.column == "pairs"].low.isna().all()


def test_csv_and_long_form_agree_cell_by_cell(tmp_path):
    out = report(tmp_path)
    csv = pd.read_csv(out / "tables" / "rates.csv")
    assert {"accuracy, % low", "accuracy, % high", "accuracy, % n"} <= set(csv.columns)
    found = results_frame(out).set_index(NAME)
    for line in csv.to_dict("records"):
        assert found.loc[("rates", f"{line['method']} · {line['dataset']}", "accuracy, %"), "high"] == line["accuracy, % high"]
    plain = to_csv(pd.DataFrame({"a": ["x"], "b": [Value(1.)]}))
    assert plain == "a,b\nx,1.0\n"


def test_rows_are_named_by_leading_columns_never_by_measured_ones(tmp_path):
    frame = pd.DataFrame({"head": ["a", "a", "b"], "margin": [.3, .5, .3], "loss": [Value(1.), Value(2.), Value(3.)]})
    assert leading_keys(frame) == 2 and leading_keys(frame.iloc[1:]) == 1
    assert leading_keys(frame.drop(columns="margin")) == 1                    # names stay double rather than contain a measurement
    run = Run("t1_toy", profile="smoke", out=str(tmp_path))
    run.table("twice", frame.drop(columns="margin"), "T")
    run.table("given", frame, "T", keys=1)
    rows = results_frame(tmp_path)
    assert rows.row[rows.table == "twice"].tolist() == ["a", "a #2", "b"]
    assert rows.row[(rows.table == "given") & (rows.column == "margin")].tolist() == ["a", "a #2", "b"]
    for keys in (0, 3):
        with pytest.raises(ConfigError, match="must leave a column"):
            run.table("bad", frame, "T", keys=keys)


def test_a_column_that_is_called_low_is_a_value_unless_its_base_is_there(tmp_path):
    run = Run("t1_toy", profile="smoke", out=str(tmp_path))
    run.table("t", pd.DataFrame({"k": ["a"], "light low": [3.], "n": [4]}), "T")
    assert results_frame(tmp_path).column.tolist() == ["light low", "n"]


def test_planted_changes_are_found_and_nothing_else(tmp_path):
    a, b = report(tmp_path / "a"), report(tmp_path / "b", seed=1, shift=5., extra=["distance"])
    found = compare(a, b)
    assert found.counts == {"beyond": 1, "changed, no interval": 0, "within": 0, "unchanged": 9, "new": 1, "missing": 0}
    line = found["beyond"].iloc[0]
    assert (line.table, line.row, line.column) == ("rates", "ArcFace · B", "accuracy, %") and line.difference == 5.
    back = compare(b, a)
    assert back.counts["missing"] == 1 and back["beyond"].difference.iloc[0] == -5. and found.status() == back.status() == 1
    small = compare(a, report(tmp_path / "c", seed=1, shift=.5))
    assert small.counts["within"] == 1 and small.status() == 0 and small.status(strict=True) == 1
    same = compare(a, a)
    assert same.counts["unchanged"] == 10 and same.status(strict=True) == 0 and "not independent" in " ".join(same.notes())


def test_shift_at_the_margin_is_within_and_just_above_is_beyond(tmp_path):
    write = lambda name, v: pd.DataFrame([dict(table="t", row="r", column="c", value=v, low=v - 3., high=v + 4.)]).to_parquet(tmp_path / name)
    write("a", 0.)
    for step, verdict in ((math.hypot(4, 3), "within"), (math.hypot(4, 3) + 1e-6, "beyond"), (-math.hypot(3, 4), "within"), (-math.hypot(3, 4) - 1e-6, "beyond"), (1e-13, "unchanged")):
        write("b", step)
        assert compare(tmp_path / "a", tmp_path / "b").counts[verdict] == 1, step


def test_values_without_interval_are_equal_or_changed_never_judged(tmp_path):
    base = dict(table="t", column="c")
    pd.DataFrame([dict(base, row="equal", value=1.), dict(base, row="changed", value=1.), dict(base, row="one side", value=1., low=.9, high=1.1), dict(base, row="half", value=1., low=.9)]).to_parquet(tmp_path / "a")
    pd.DataFrame([dict(base, row="equal", value=1.), dict(base, row="changed", value=100.), dict(base, row="one side", value=100.), dict(base, row="half", value=100., low=.9, high=101.)]).to_parquet(tmp_path / "b")
    found = compare(tmp_path / "a", tmp_path / "b")
    assert found.frame.set_index("row").verdict.to_dict() == {"equal": "unchanged", "changed": "changed, no interval", "one side": "changed, no interval", "half": "changed, no interval"}
    assert found.status() == 0 and found.with_interval == 0


@pytest.mark.parametrize("sizes", [(300, 300), (200, 1500)])
def test_two_samples_of_one_distribution_are_flagged_as_often_as_their_intervals_say(tmp_path, sizes):
    "4,000 means of normal draws with t intervals: 5 % beyond, give or take three standard errors; overlapping intervals would give 0.6 %."
    from scipy.stats import t
    for name, n in zip("ab", sizes):
        x = rng(0, name, n).normal(3., 2., size=(4000, n))
        mean, half = x.mean(1), t.ppf(.975, n - 1)*x.std(1, ddof=1)/np.sqrt(n)
        pd.DataFrame(dict(table="t", row=[str(i) for i in range(4000)], column="mean", value=mean, low=mean - half, high=mean + half)).to_parquet(tmp_path / name)
    found = compare(tmp_path / "a", tmp_path / "b")
    share = found.counts["beyond"]/4000
    assert abs(share - .05) < 3*math.sqrt(.05*.95/4000)
    f = found.frame
    overlap = (np.maximum(f.low_a, f.low_b) > np.minimum(f.high_a, f.high_b)).mean()
    assert overlap < .03 < share                                            # why the rule is not overlap


def test_bootstrap_intervals_of_this_package_are_flagged_alike():
    "400 pairs of runs, each a mean error of 60 skewed draws with the bootstrap interval that the pages print."
    from hyperface.extraction.attributes import with_interval
    runs = np.array([with_interval(rng(0, "errors", i).exponential(5., 60), i) for i in range(800)])
    flagged = np.abs(runs[1::2, 0] - runs[::2, 0]) > margin_of_difference(*runs[::2].T, *runs[1::2].T)
    assert .02 < flagged.mean() < .05 + 3*math.sqrt(.05*.95/400)


def test_margin_is_newcombes_for_two_rates():
    "Newcombe (1998), method 10, its worked example: 56/70 and 48/80 differ by 0.2 with 95 % limits 0.0524 and 0.3339."
    wilson = lambda k, n: ((2*k + Z**2 - Z*math.sqrt(Z**2 + 4*k*(1 - k/n)))/(2*(n + Z**2)), (2*k + Z**2 + Z*math.sqrt(Z**2 + 4*k*(1 - k/n)))/(2*(n + Z**2)))
    (l1, h1), (l2, h2) = wilson(56, 70), wilson(48, 80)
    margin = float(margin_of_difference(.6, l2, h2, .8, l1, h1))
    assert .2 - margin == pytest.approx(.0524, abs=1e-4)
    assert margin == float(margin_of_difference(.8, l1, h1, .6, l2, h2))


def test_a_value_outside_its_own_interval_is_given_half_the_width():
    assert float(margin_of_difference(5., 1., 3., 9., 8., 10.)) == pytest.approx(math.hypot(1., 1.))
    assert np.isnan(margin_of_difference(1., np.nan, 2., 3., 2., 4.))


def test_changed_data_and_verdicts_are_told(tmp_path):
    found = compare(report(tmp_path / "a"), report(tmp_path / "b", seed=1, data="photographs", status="differs"))
    said = "\n".join(found.notes())
    assert "Computed on other data: plain, rates." in said and "The verdict on rates changed: computed → differs." in said and "not independent" not in said


def test_terminal_csv_and_page(tmp_path):
    found = compare(report(tmp_path / "a"), report(tmp_path / "<b>", seed=1, shift=5., extra=["distance <i>"]))
    text = found.text(width=120)
    assert "1 beyond the interval" in text and "ArcFace · B" in text and "new: plain (1)" in text and max(map(len, text.splitlines())) < 260
    assert "and 1 more" in found.text(most=0)
    csv = pd.read_csv(io.StringIO(found.save_csv(tmp_path / "c.csv").read_text()))
    assert len(csv) == len(found.frame) and set(csv.verdict) <= set(VERDICTS)
    page = found.save_html(tmp_path / "c.html").read_text()
    assert "&lt;b&gt;" in page and "distance <i>" not in page and "<script" not in page and "http:" not in page


def test_an_interrupted_run_is_read_from_its_records(tmp_path):
    out = report(tmp_path)
    whole = read_results(out)
    (out / "results.parquet").unlink()
    pd.testing.assert_frame_equal(read_results(out), whole)


@pytest.mark.parametrize("spoil, says", [
    (lambda f: f.assign(value="many"), "not numbers"), (lambda f: f.drop(columns="row"), "lacks row"), (lambda f: pd.concat([f, f]), "names a value twice"),
    (lambda f: f.assign(low=5., high=4.), "low end is above"), (lambda f: f.assign(value=np.nan), "not a number")])
def test_bad_files_are_refused_by_name(tmp_path, spoil, says):
    good = read_results(report(tmp_path / "a"))
    spoil(good).to_parquet(tmp_path / "bad.parquet")
    with pytest.raises(DataError, match=says):
        compare(tmp_path / "a", tmp_path / "bad.parquet")


def test_no_run_an_empty_folder_and_a_damaged_file(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.parquet").write_bytes(b"PAR1" + bytes(40))
    for path, says in ((tmp_path / "gone", "no such run"), (tmp_path / "empty", "holds no results"), (tmp_path / "x.parquet", "not a readable Parquet")):
        with pytest.raises(DataError, match=says):
            read_results(path)
    with pytest.raises(ConfigError, match="A verdict is one of"):
        compare(report(tmp_path / "a"), tmp_path / "a")["moved"]


def trained(folder, seed, training=2., rows=200, profile="toy"):
    "A run of networks trained once: the test people move a value by 1, the training by `training`; one column that no training moves; one without interval."
    r = rng(seed, "trained", training)
    value, still = 90 + r.normal(0, 1, rows) + r.normal(0, training, rows), 50 + r.normal(0, 1, rows)
    names = [str(i) for i in range(rows)]
    lines = [pd.DataFrame(dict(table="nets", row=names, column="accuracy", value=value, low=value - Z, high=value + Z)), pd.DataFrame(dict(table="nets", row=names, column="angle", value=still, low=still - Z, high=still + Z)),
             pd.DataFrame(dict(table="nets", row=names, column="loss", value=value))]
    path = folder / f"{profile}_{seed}_{training}.parquet"
    pd.concat(lines).assign(profile=profile, seed=seed, data="rendered", status="computed", commit="abc").to_parquet(path)
    return path


def test_training_spread_is_what_the_intervals_leave_out(tmp_path):
    spread = training_spread([trained(tmp_path, s) for s in range(4)]).set_index("column")
    assert list(spread.index) == ["accuracy", "angle"]                       # the loss has no interval, so nothing is known of it
    assert spread.spread["accuracy"] == pytest.approx(2., abs=.2) and spread.spread["angle"] < .35 and spread.rows["accuracy"] == 200 and spread.runs["accuracy"] == 4
    flagged = {}
    for known in (False, spread.reset_index()):
        found = [compare(trained(tmp_path, s), trained(tmp_path, s + 1), known) for s in range(10, 30, 2)]
        flagged[known is not False] = np.mean([(f.frame.verdict[f.frame.column == "accuracy"] == "beyond").mean() for f in found])
    assert flagged[False] > .3 and abs(flagged[True] - .05) < .02
    assert sum(f.on_intervals_alone for f in found) > sum(f.counts["beyond"] for f in found)
    assert any("another training moves them" in n for n in found[0].notes())
    moved = compare(trained(tmp_path, 40), trained(tmp_path, 41, training=2.), spread.reset_index())
    assert moved.frame.loc[moved.frame.column == "loss", "verdict"].eq("changed, no interval").all()


def test_a_spread_of_other_runs_is_refused(tmp_path):
    a, b, other = trained(tmp_path, 0), trained(tmp_path, 1), trained(tmp_path, 2, profile="else")
    for runs, says in (([a], "two runs or more"), ([a, other], "one profile"), ([a, a], "seed of its own")):
        with pytest.raises(ConfigError, match=says):
            training_spread(runs)
    with pytest.raises(ConfigError, match="was measured at toy, the runs are else"):
        compare(other, other, training_spread([a, b]))
    with pytest.raises(ConfigError, match="lacks spread"):
        compare(a, b, pd.DataFrame(dict(profile=["toy"], table=["nets"], column=["accuracy"])))
    assert known_spread("toy") is None and (compare(a, b).frame.spread == 0).all()


def test_the_shipped_spread_is_of_tables_that_exist_and_is_used(tmp_path):
    spread = known_spread("smoke")
    assert len(spread) and (spread.spread > 0).all() and (spread.runs >= 3).all() and spread.commit.str.len().min() >= 7
    line = spread.iloc[0]
    for seed, value in ((0, 10.), (1, 10. + 2*line.spread)):
        pd.DataFrame([dict(table=line.table, row="r", column=line.column, value=value, low=value - line.spread/100, high=value + line.spread/100, profile="smoke", seed=seed)]).to_parquet(tmp_path / str(seed))
    assert compare(tmp_path / "0", tmp_path / "1").counts["within"] == 1 and compare(tmp_path / "0", tmp_path / "1", False).counts["beyond"] == 1


def test_repeats_on_the_command_line(tmp_path):
    import subprocess
    import sys
    runs = [str(trained(tmp_path, s)) for s in range(5)]
    def command(*more):
        done = subprocess.run([sys.executable, "-m", "hyperface.cli", "compare", runs[3], runs[4], *more], capture_output=True, text=True, timeout=120)
        return done.returncode, done.stdout + done.stderr
    code, said = command("--repeats", *runs[:3])
    assert code == 1 and "as measured between runs of several seeds" in said
    assert "where networks are trained once" in command("--intervals")[1]
    assert command("--intervals", "--repeats", *runs[:3])[0] == 2
