"""Conditions: what goes into the label vector comes out again, what is missing is zeros, and what makes no sense is refused by name."""
import json

import numpy as np
import pandas as pd
import pytest
import torch

from hyperface.core import ConfigError, DataError, torch_rng
from hyperface.data.records import Records
from hyperface.stylegan2.conditions import Categorical, ConditionSchema, Continuous, Identity, schema_from_records

GENDER, GROUP = Categorical("gender", ["female", "male"]), Categorical("ethnicity", ["asian", "black", "indian", "white"])
AGE, YAW, WHO = Continuous("age", 0, 100, knots=8), Continuous("yaw", -90, 90), Identity(dim=16)
SCHEMA = ConditionSchema([WHO, GENDER, GROUP, AGE, YAW])


def people(n=200, missing=.3, seed=0):
    draw = np.random.default_rng(seed)
    gap = lambda column: [None if draw.random() < missing else v for v in column]
    vectors = draw.standard_normal((n, 16))
    vectors = (vectors/np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    return dict(identity=gap(vectors), gender=gap(draw.choice(GENDER.values, n)), ethnicity=gap(draw.choice(GROUP.values, n)), age=gap(draw.uniform(0, 100, n)), yaw=gap(draw.uniform(-90, 90, n)))


def test_there_and_back():
    table = people()
    c = SCHEMA.encode(table)
    assert c.shape == (200, SCHEMA.c_dim) == (200, 16 + 2 + 4 + 8 + 2) and c.dtype == torch.float32
    back = SCHEMA.decode(c)
    for name in ("gender", "ethnicity"):
        assert back[name].astype(object).where(back[name].notna(), None).tolist() == table[name]
    for name in ("age", "yaw"):
        np.testing.assert_allclose(back[name], np.array(table[name], float), atol=2e-3)
    assert all((b is None or b is np.nan) == (a is None) and (a is None or np.array_equal(a, b)) for a, b in zip(table["identity"], back["identity"].where(back["identity"].notna(), None)))
    assert torch.allclose(SCHEMA.encode(back), c, atol=1e-5)


def test_blocks_are_what_the_definition_says():
    "Restated in plain numpy, one row at a time."
    table = people(40)
    c = SCHEMA.encode(table).numpy()
    for i in range(40):
        row = []
        row += [0.]*16 if table["identity"][i] is None else list(table["identity"][i])
        row += [float(v == table["gender"][i]) for v in GENDER.values] + [float(v == table["ethnicity"][i]) for v in GROUP.values]
        row += [0.]*8 if table["age"][i] is None else [max(0., 1 - abs(table["age"][i]/100*7 - k)) for k in range(8)]
        row += [0., 0.] if table["yaw"][i] is None else [1., table["yaw"][i]/90]
        np.testing.assert_allclose(c[i], row, atol=1e-6)
    known = np.array([a is not None for a in table["age"]])
    np.testing.assert_allclose(c[:, SCHEMA.blocks["age"]].sum(1), known, atol=1e-6)


def test_tables_of_every_kind_give_the_same():
    table = people(30)
    c = SCHEMA.encode(table)
    frame = pd.DataFrame({k: pd.Series(v, dtype=object) for k, v in table.items()})
    assert torch.equal(SCHEMA.encode(frame), c)
    assert torch.equal(SCHEMA.encode(frame.sample(frac=1, random_state=1).sort_index()), c)
    assert torch.equal(SCHEMA.encode(frame.set_index(np.arange(30)[::-1] + 7)), c)          # the index means nothing
    assert torch.equal(SCHEMA.encode(frame.assign(gender=frame.gender.astype("category"), ethnicity=frame.ethnicity.astype("string"))), c)
    assert torch.equal(SCHEMA.encode(frame.assign(age=frame.age.astype("Float64"))), c)
    records = Records.from_arrays(np.zeros((30, 8, 8, 3), np.uint8), gender=table["gender"], ethnicity=table["ethnicity"], age=table["age"], yaw=table["yaw"], identity=np.arange(30))
    assert torch.allclose(SCHEMA.encode(records, identity=table["identity"]), c, atol=1e-5)
    full = people(5, missing=0)
    stacked = np.stack(full["identity"])
    expected = SCHEMA.encode(full)
    for vectors in (stacked, torch.from_numpy(stacked), list(stacked), pd.Series(list(stacked)), stacked.astype(np.float64)):
        assert torch.equal(SCHEMA.encode({**full, "identity": vectors}), expected)
    assert torch.allclose(SCHEMA.encode({**full, "age": torch.tensor(full["age"])}), expected, atol=1e-6)


def test_single_values_and_lengths():
    one = np.eye(16, dtype=np.float32)[3]
    for identity in (one, one.tolist(), torch.from_numpy(one)):
        c = SCHEMA.encode(dict(identity=identity, gender="m", age=20, yaw=np.float32(3)), n=5)
        assert c.shape[0] == 5 and torch.equal(c[0], c[4]) and c[0, 3] == 1
    assert len(SCHEMA.encode(dict(age=20))) == 1 and len(SCHEMA.encode()) == 1 and len(SCHEMA.encode(n=0)) == 0
    assert len(SCHEMA.encode(dict(age=[]))) == 0 and len(SCHEMA.encode(pd.DataFrame(dict(age=[])))) == 0
    assert SCHEMA.encode(pd.DataFrame(index=range(3))).shape == (3, SCHEMA.c_dim)
    assert len(SCHEMA.encode(dict(age=[5]), n=1)) == 1
    assert torch.equal(SCHEMA.encode(dict(age=[30, 30])), SCHEMA.encode(age=30, n=2))
    assert torch.equal(SCHEMA.encode(dict(identity=[one, None]))[:, 3], torch.tensor([1., 0.]))


REFUSED = {
    "unknown attribute": (dict(height=3), "no attribute 'height'.*identity, gender"), "unknown value": (dict(gender="unknown"), "gender has no value 'unknown'.*female, male"), "a word for a number": (dict(age="old"), "age must be numbers"),
    "age negative": (dict(age=[3, -1]), r"age is out of range in row 1 \(got -1.0\).*0 to 100"), "age 101": (dict(age=101), "0 to 100"), "age infinite": (dict(age=np.inf), "out of range"), "lengths": (dict(age=[1, 2], gender=["f"]), "differ in length"),
    "identity NaN": (dict(identity=np.full((2, 16), np.nan, np.float32)), "identity is not finite in row 0"), "identity of another size": (dict(identity=np.eye(8, dtype=np.float32)), "16 numbers"), "identity not unit": (dict(identity=2*np.eye(16, dtype=np.float32)), "row 0 has another length"),
    "identity zero": (dict(identity=np.zeros((2, 16), np.float32)), "another length"), "identity labels": (dict(identity=["a", "b"]), "Pass the embeddings"), "identity numbers": (dict(identity=np.arange(3)), "Pass the embeddings|unit vectors"), "identity a word": (dict(identity="Abel"), "Pass the embeddings"),
    "identity ragged": (dict(identity=[np.eye(16, dtype=np.float32)[0], np.ones(3, np.float32)]), "another length"), "identity cube": (dict(identity=np.zeros((2, 2, 16))), "one value a row"), "age matrix": (dict(age=np.zeros((2, 2))), "one value a row"), "gender lists": (dict(gender=[["f"], ["m"]]), "one word a row"),
    "gender number": (dict(gender=1), "no value '1'"), "one NaN in a vector": (dict(identity=[np.r_[np.nan, np.eye(16)[1, 1:]]]), "not finite"), "age of lists": (dict(age=[[1], [2]]), "age must be numbers"), "table twice": (None, "one value a row"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused(kind):
    table, message = REFUSED[kind]
    table = pd.DataFrame([[1, 2]], columns=["age", "age"]) if table is None else table
    with pytest.raises(DataError, match=message):
        SCHEMA.encode(table)


@pytest.mark.parametrize("make, message", [
    (lambda: Categorical("gender", ["f", "f"]), "different"), (lambda: Categorical("gender", []), "different"), (lambda: Categorical("gender", "female"), "list"), (lambda: Categorical("gender", ["a", None]), "not empty"), (lambda: Categorical("gender", [["a"]]), "not empty|different"),
    (lambda: Categorical("", ["a"]), "name"), (lambda: Categorical(3, ["a"]), "name"), (lambda: Categorical("a b", ["a"]), "name"), (lambda: Continuous("age", 5, 5), "low below high"), (lambda: Continuous("age", 0, np.nan), "finite"), (lambda: Continuous("age", "x", 1), "numbers"),
    (lambda: Continuous("age", 0, 1, knots=1), "knots"), (lambda: Continuous("age", 0, 1, knots=-2), "knots"), (lambda: Continuous("age", 0, 1, knots=2.5), "knots"), (lambda: Continuous("age", 0, 1, knots=10**9), "knots"), (lambda: Identity(dim=0), "dim"), (lambda: Identity(dim=True), "dim"),
    (lambda: ConditionSchema([AGE, Categorical("age", ["a", "b"])]), "one name"), (lambda: ConditionSchema(["age"]), "attributes must be"), (lambda: SCHEMA.encode(n=-1), "n must be"), (lambda: SCHEMA.encode(n=2.5), "n must be"),
    (lambda: SCHEMA.drop(SCHEMA.encode(), 1.5), "share of hidden identity"), (lambda: SCHEMA.drop(SCHEMA.encode(), dict(age=-.1)), "share of hidden age")])
def test_schemas_that_make_no_sense(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_label_vectors_of_another_schema():
    for c in (torch.zeros(2, 5), torch.zeros(SCHEMA.c_dim), torch.zeros(2, SCHEMA.c_dim, dtype=torch.long)):
        with pytest.raises(DataError, match=rf"\(N, {SCHEMA.c_dim}\)"):
            SCHEMA.decode(c)
    with pytest.raises(DataError, match="not finite"):
        SCHEMA.decode(torch.full((1, SCHEMA.c_dim), torch.nan))


def test_saved_and_read():
    saved = json.loads(json.dumps(SCHEMA.to_dict(), allow_nan=False))
    again = ConditionSchema.from_dict(saved)
    assert again == SCHEMA and again.blocks == SCHEMA.blocks and repr(again) == repr(SCHEMA)
    table = people(20)
    assert torch.equal(again.encode(table), SCHEMA.encode(table))
    assert ConditionSchema.from_dict(dict(attributes=[])).c_dim == 0


@pytest.mark.parametrize("saved", [None, [], {}, dict(attributes=3), dict(attributes=["age"]), dict(attributes=[dict(name="age")]), dict(attributes=[dict(kind="eval", name="age")]), dict(attributes=[dict(kind="continuous", name="age")]),
                                   dict(attributes=[dict(kind="continuous", name="age", low=0, high=1, knots=0, code="x")]), dict(attributes=[dict(kind="continuous", name="age", low=float("nan"), high=1)]), dict(attributes=[dict(kind="identity", name="x", dim="512")]),
                                   dict(attributes=[dict(kind="identity", dim=4), dict(kind="identity", dim=4)]), dict(attributes=[dict(kind=[], name="age")]), dict(attributes=[dict(kind="categorical", name="g", values={"a": 1})])])
def test_saved_schemas_that_are_damaged(saved):
    with pytest.raises(DataError):
        ConditionSchema.from_dict(saved)


def test_drop_hides_whole_attributes_and_nothing_else():
    c = SCHEMA.encode(people(4000, missing=0))
    before = c.clone()
    out = SCHEMA.drop(c, dict(age=.5, gender=.2, identity=.1), torch_rng(0, "drop"))
    assert torch.equal(c, before)
    hidden = {}
    for name, block in SCHEMA.blocks.items():
        gone = (out[:, block] == 0).all(1)
        assert torch.equal(out[~gone, block], c[~gone, block])
        hidden[name] = gone.float()
    shares = torch.stack([hidden[n].mean() for n in ("identity", "gender", "ethnicity", "age", "yaw")])
    assert torch.allclose(shares, torch.tensor([.1, .2, 0, .5, 0]), atol=.03)
    assert abs(float((hidden["age"]*hidden["gender"]).mean()) - .1) < .02                     # independent
    assert torch.equal(SCHEMA.drop(c, .3, torch_rng(1)), SCHEMA.drop(c, .3, torch_rng(1)))
    with pytest.raises(DataError, match="no attribute 'height'"):
        SCHEMA.drop(c, dict(height=.1))


def test_schema_from_records():
    table = pd.DataFrame(dict(age=[3., 116.2, np.nan], gender=["f", None, "f"], ethnicity=["z", "b", None], skin_tone=[.1, .5, 1.05], yaw=[0., 5, -3], height=[1.5, 1.9, np.nan], label=[2, 0, 1], flag=[True, False, True]))
    s = schema_from_records(table, "age, gender,ethnicity,skin_tone,yaw,height,flag,identity", dim=8)
    assert s["age"] == Continuous("age", 0, 117, 8) and s["gender"].values == ("female", "male") and s["ethnicity"].values == ("b", "z")
    assert s["skin_tone"] == Continuous("skin_tone", 0, 1.1) and s["height"] == Continuous("height", 1.5, 1.9) and s["flag"].values == ("False", "True") and s["identity"].dim == 8
    c = s.encode(table, identity=None)
    assert np.allclose(s.decode(c).age, table.age, equal_nan=True, atol=1e-3) and s.decode(c).flag.tolist() == ["True", "False", "True"]
    big = pd.DataFrame(dict(name=[f"n{i}" for i in range(2000)], one=1., none=[None]*2000, words=["x"]*2000))
    for name, message in (("name", "too many"), ("one", "the same in all rows"), ("none", "missing"), ("height", "has no column height")):
        with pytest.raises(DataError, match=message):
            schema_from_records(big, [name])
    with pytest.raises(DataError, match="age must be numbers"):
        schema_from_records(big.rename(columns=dict(words="age")), ["age"])


def test_whole_numbers_are_words():
    a = Categorical("label", [3, 7, 10])
    assert a.values == ("3", "7", "10")
    np.testing.assert_array_equal(a.encode(np.array([7., np.nan, 10.])), [[0, 1, 0], [0, 0, 0], [0, 0, 1]])
    np.testing.assert_array_equal(a.encode(["3", 7]), a.encode(np.array([3, 7])))


def test_a_large_table_is_fast():
    import time
    draw = np.random.default_rng(0)
    table = pd.DataFrame(dict(gender=pd.Categorical(draw.choice(["female", "male"], 200_000)), ethnicity=draw.choice(GROUP.values, 200_000), age=draw.uniform(0, 100, 200_000).astype(np.float32), yaw=0.))
    start = time.monotonic()
    assert ConditionSchema([GENDER, GROUP, AGE, YAW]).encode(table).shape == (200_000, 16)
    assert time.monotonic() - start < 5
