"""HyperFace's benchmark: the usual verification sets have a column wherever a user has their `.bin`, and none where not."""
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from hyperface.core import read_json
from hyperface.data.containers import write_bin
from hyperface.data.pairs import USUAL
from hyperface.data.rendered import render_faces

pytestmark = pytest.mark.xdist_group("smoke")



def test_bin_files_become_columns_and_an_average(tmp_path):
    "All five sets, in the folder itself or in one below it, in a report of its own."
    data = tmp_path / "data"
    (data / "faces_emore").mkdir(parents=True)
    people = render_faces(20, 3, size=56, seed=7)
    at = lambda who, k: 3*who + k
    rows = np.array([[at(i, 0), at(i, 1), at(i, 2), at((i + 7) % 20, 0)] for i in range(20)]).ravel()   # genuine, impostor, genuine ...
    for k, file in enumerate(USUAL.values()):
        write_bin(people.select(rows), [True, False]*20, (data if k % 2 else data / "faces_emore") / file)
    done = subprocess.run([sys.executable, "-m", "hyperface.cli", "reproduce", "--profile", "smoke", "--only", "h1_benchmark", "--data", str(data), "--out", str(tmp_path / "report")],
                          capture_output=True, text=True, timeout=1200, env=os.environ | {"HYPERFACE_PUBLISH": ""})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    table = pd.read_csv(tmp_path / "report" / "tables" / "hyperface_benchmark.csv")
    mean, = [c for c in table if c.startswith("average of") and not c.endswith((" low", " high", " n"))]
    np.testing.assert_allclose(table[[f"{t}, %" for t in USUAL]].to_numpy(float).mean(1), table[mean].to_numpy(float), atol=1e-9)
    for t in USUAL:
        assert (table[f"{t}, % n"] == 40).all() and (table[f"{t}, % low"] < table[f"{t}, %"]).all()
    assert "Not there" not in read_json(tmp_path / "report" / "records" / "table-hyperface_benchmark.json")["why"]
    beside = pd.read_csv(tmp_path / "report" / "tables" / "hyperface_published.csv")
    ours = beside[beside["stands in"].str.startswith("this run")]
    np.testing.assert_allclose(ours["average of five, %"].to_numpy(float), table[mean].to_numpy(float), atol=1e-9)
    assert beside[~beside.index.isin(ours.index)]["stands in"].str.startswith("published: ").all()


def test_without_the_files_there_is_no_column_and_the_page_says_which_are_missing(smoke_report):
    record = read_json(smoke_report / "records" / "table-hyperface_benchmark.json")
    table = pd.read_csv(smoke_report / "tables" / "hyperface_benchmark.csv")
    for t, file in USUAL.items():
        assert (f"{t}, %" in table) != (f"{t} ({file})" in record["why"])
    assert "rendered, %" in table and table["steps"].nunique() == 1 and table["pictures"].nunique() == 1
    words = pd.read_csv(smoke_report / "tables" / "hyperface_differences.csv")
    for _, r in words.iterrows():
        low, high = r["rendered, points low"], r["rendered, points high"]
        assert r["on rendered"] == ("more" if low > 0 else "less" if high < 0 else "no difference seen")
