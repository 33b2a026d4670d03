"The printed values are those of the texts, and the audit says what `PAPER_AUDIT` says."
import re

import numpy as np
import pytest

from hyperface.core import ConfigError, DataError, data_dir
from hyperface.report import audit as A, printed as P


def text_of(name):
    folder = data_dir() and data_dir().parent/"paper"
    if not folder or not (folder/name).exists(): pytest.skip("the papers' texts are not beside HYPERFACE_DATA")
    return (folder/name).read_text(encoding="utf-8").splitlines()


SOURCES = {"table": "mankame_embedding_extraction.txt", "vec2face": "vec2face_appendix.txt"}

@pytest.mark.parametrize("name", [f"table{i}" for i in range(1, 10)] + ["vec2face_table2"])
def test_cells_are_those_of_the_text(name):
    "Every row stands in the stated lines, cell by cell."
    raw = P._TABLES[name]
    first, last = map(int, raw[3].split("-"))
    lines = [line.split("\t") for line in text_of(SOURCES["vec2face" if name.startswith("v") else "table"])[first - 1:last]]
    rows = [line.split("\t") for line in raw[4].split("\n")[1:]]
    printed = [line for line in lines if len(line) == len(rows[0])]
    assert rows == printed[-len(rows):] and len(printed) - len(rows) in (0, 1)   # but for the header
    if name.startswith("table"): assert raw[2] in " ".join("\t".join(line) for line in lines)


def test_single_values_are_those_of_the_text():
    mankame, vec = "\n".join(text_of(SOURCES["table"])), "\n".join(text_of(SOURCES["vec2face"]))
    for t, stated in (("table5", "Accuracy: 97.4%, F1 Score: 0.973"), ("table6", "Accuracy: 98.2%, F1 Score: 0.981")):
        a = P.printed(t).attrs
        assert stated in mankame and f"Accuracy: {a['accuracy']}%, F1 Score: {a['f1']}" == stated
    row = next(line for line in vec.splitlines() if line.startswith("Accuracy\t")).split("\t")[1:]
    assert row == [str(v) for v in P.printed("vec2face_table1").accuracy]
    assert "less than 0.3" in vec and "higher than 0.7 similarity" in vec
    numbers = lambda s: [float(x) for x in s.split(",")]
    sets = [numbers(s) for s in re.findall(r"\{([-0-9., ]+)\\?\}", vec)]
    for k in (1, 2, 3): assert P.printed_values(f"Figure 8 row {k}") in sets
    for chunk in ("40:48", "56:64", "96:104"): assert chunk in vec and chunk in P.printed("vec2face_figures")["values"].iloc[-1]


def test_attrs_repeat_the_table():
    t = P.printed("table1"); a, v = t.attrs, [P.number(x) for x in t.value]
    assert v == [a["inter_class_cosine_distance"], a["intra_class_deg"], a["classes"], a["dim"], 1.0]
    t2 = P.printed("table2").set_index("feature").loc["Accuracy (LFW Benchmark)"]
    assert {k: P.number(x) for k, x in t2.items()} == P.printed("table2").attrs["lfw"]


def test_every_table_can_be_had_and_none_is_shared():
    for name in P.printed_tables().name:
        t = P.printed(name); assert len(t) and P.where(name)
        t.drop(t.index, inplace=True)
        assert len(P.printed(name))
    with pytest.raises(ConfigError, match="vec2face_table1"): P.printed("table0")
    with pytest.raises(ConfigError): P.printed_values("Figure 1")


# ---- the audit ----------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def audit(): return A.audit_tables()

#  what the list of known faults says: start of `where`, text in `recomputed`, verdict
KNOWN = [("Eq. 3,", "10.5", "as meant"), ("Eq. 4 and 8", "1.3863", "agrees"), ("Eq. 4, generator", "0.9933", "as meant"), ("Eq. 5, sign", "accuracy on real 1.00", "as meant"), ("Eq. 9", "with the minus sign 0.0", "as meant"),
    ("Eq. 2", "88.64", "not given"), ("Eq. 10", "none", "not given"), ("T5 and T4, ArcFace / BUPT-CBFace, accuracy", "97.25", "differs"), ("T5 and T4, ArcFace / BUPT-CBFace, F1", ".9726", "agrees"),
    ("T5 and T4, ArcFace / BUPT-CBFace, specificity", ".9700", "differs"), ("T5 and T4, ArcFace / BUPT-CBFace, recall", ".9750", "differs"), ("T6 and T4, ArcFace / DigiFace, accuracy", "97.90", "differs"),
    ("T6 and T4, ArcFace / DigiFace, F1", ".9790", "differs"), ("T6 and T4, ArcFace / DigiFace, specificity", ".9780", "differs"), ("T7 and T4, CosFace / DigiFace, accuracy", "97.25", "differs"),
    ("T7 and T4, CosFace / DigiFace, specificity", ".9700", "differs"), ("T7 and T4, SphereFace / DigiFace, accuracy", "96.60", "differs"), ("T7 and T4, SphereFace / DigiFace, specificity", ".9650", "differs"),
    ("T5 and T7, counts", "equal", "impossible"), ("T4, columns recall", "equal", "misleading"), ("T4, ArcFace / DigiFace, accuracy", "98.85", "differs"), ("T4, ArcFace / LFW, F1", ".98", "impossible"),
    ("T1, mean inter-class", "1.000", "misleading"), ("T1, intra-class 7.5", ".1317", "agrees"), ("T1, intra-class 7.5", ".0058", "agrees"), ("T8 and T9", "+0.7", "differs"), ("T2 and T8, ArcFace", "204 errors", "differs"),
    ("T3, DigiFace", "720K", "differs"), ("T3, BUPT-CBFace", "28K", "differs"), ("T3, focus of CASIA", "Western", "differs"), ("T3, AgeDB", "568", "agrees"), ("T9, 'Demographic", "named once", "not given"),
    ("Section 3.1", "DeepFace", "differs"), ("Collected results, IDnet", "77.20", "differs"), ("Vec2Face T1", "93.51", "agrees")]

@pytest.mark.parametrize("where, value, verdict", KNOWN)
def test_known_faults_are_in_the_audit(audit, where, value, verdict):
    line = audit[audit["where"].str.startswith(where)]
    assert len(line) == 1, line
    assert value in line.recomputed.item() and line.verdict.item() == verdict


def test_audit_is_whole_and_shows_itself(audit):
    assert list(audit.columns) == A.COLUMNS and set(audit.verdict) <= set(A.VERDICTS) and not audit["where"].duplicated().any()
    page = A.Audit(audit)._repr_html_()
    assert page.count("<tr>") == len(audit) + audit.topic.nunique() + 1 and "&lt; 1" in page
    counts = A.verdict_counts(audit)
    assert counts.loc["all"].sum() == len(audit)


def test_another_seed_gives_the_same_verdicts(audit):
    assert A.audit_tables(7).verdict.tolist() == audit.verdict.tolist()


def test_counts_against_scikit_learn():
    from sklearn.metrics import accuracy_score, f1_score, recall_score
    for c in A.printed_counts().itertuples():
        y = np.repeat([1, 1, 0, 0], [c.tp, c.fn, c.fp, c.tn]); p = np.repeat([1, 0, 1, 0], [c.tp, c.fn, c.fp, c.tn])
        r = A.rates_from_counts(c.tp, c.fn, c.fp, c.tn)
        assert r["accuracy"]/100 == pytest.approx(accuracy_score(y, p)) and r["f1"] == pytest.approx(f1_score(y, p))
        assert r["recall"] == pytest.approx(recall_score(y, p)) and r["specificity"] == pytest.approx(recall_score(y, p, pos_label=0))


@pytest.mark.parametrize("seed", range(20))
def test_real_confusion_matrices_are_never_called_impossible(seed):
    gen = np.random.default_rng(seed)
    genuine, impostor = gen.integers(2000, 20000, 2); tp, tn = int(genuine*gen.uniform(.9, .99)), int(impostor*gen.uniform(.9, .999))
    r = A.rates_from_counts(tp, genuine - tp, impostor - tn, tn)
    low, high, f_low, f_high = A.feasible_f1(round(r["accuracy"], 1), round(r["recall"], 3), round(r["specificity"], 3))
    if abs(r["recall"] - r["specificity"]) < .003: return                     # then accuracy says nothing about the share
    assert low - .02 <= genuine/(genuine + impostor) <= high + .02 and f_low - 1e-3 <= r["f1"] <= f_high + 1e-3


@pytest.mark.parametrize("seed", range(3))
def test_ada_rules(seed):
    end = {rule: A.simulate_ada(rule, steps=3000, seed=seed).iloc[-60:][["p", "accuracy"]].mean() for rule in ("working", "mended", "printed")}
    assert abs(end["working"].accuracy - .8) < .03 and abs(end["mended"].accuracy - .8) < .03 and 0 < end["working"].p < 1
    assert end["printed"].p < -1 and end["printed"].accuracy > .95
    assert A.simulate_ada("printed", p0=.9, steps=500, seed=seed).p.iloc[-1] > 1


def test_bad_calls():
    for call in (lambda: A.simulate_ada("eq5"), lambda: A.mean_cosine_distance(np.ones((1, 3))), lambda: A.rates_from_counts(-1, 2, 3, 4), lambda: A.rates_from_counts(1, 1, 0, 0)):
        with pytest.raises(DataError): call()
    assert np.isnan(A.feasible_f1(99., .5, .6)).all()
