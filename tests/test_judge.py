"""The judge of generated faces: what it reads, that it is no generator's reader, and what it refuses."""
import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import binomtest

from hyperface.core import ConfigError, DataError
from hyperface.data.rendered import render_faces
from hyperface.recognition.judge import JUDGE_SEED, Judge, agreement, pixel_features, train_judge
from hyperface.recognition.multitask import CLASSES
from hyperface.recognition.train import RecognitionTrainer, recipe
from hyperface.stylegan2.conditions import schema_from_records
from hyperface.stylegan2.losses import ConditionReader


@pytest.fixture(scope="module")
def judge():
    return train_judge(24, 2, epochs=2)


@pytest.fixture(scope="module")
def faces():
    return render_faces(24, 1, size=64, nuisance=.1, seed=5, ages=(5, 90))


@pytest.mark.parametrize("hits", [0, 1, 37, 49, 50])
def test_intervals_are_wilsons(hits):
    asked = pd.DataFrame(dict(gender=["male"]*50))
    read = pd.DataFrame(dict(gender=["male"]*hits + ["female"]*(50 - hits)))
    row = agreement(asked, read).loc["gender"]
    expected = binomtest(hits, 50).proportion_ci(.95, "wilson")
    assert row["agreement"] == hits/50 and np.allclose([row["low"], row["high"]], [expected.low, expected.high], atol=1e-9)


def test_agreement_of_ages_is_inclusive_and_nothing_read_is_a_miss():
    asked, read = pd.DataFrame(dict(age=[20., 20, 20, np.nan])), pd.DataFrame(dict(age=[30., 30.01, np.nan, 5]))
    row = agreement(asked, read).loc["age"]
    assert row["n"] == 3 and row["agreement"] == 1/3 and abs(row["mae"] - 10.005) < 1e-9
    assert agreement(asked, read, years=11).loc["age", "agreement"] == 2/3


def test_agreement_goes_by_rows_not_by_index():
    asked = pd.DataFrame(dict(gender=["male", "female"]), index=[7, 3])
    assert agreement(asked, pd.DataFrame(dict(gender=["male", "female"]))).loc["gender", "agreement"] == 1


def test_agreement_refuses_by_name():
    table = pd.DataFrame(dict(gender=["male", None]))
    with pytest.raises(DataError, match="one row for each picture"): agreement(table, table[:1])
    with pytest.raises(DataError, match="no column in common"): agreement(table, table.rename(columns=dict(gender="sex")))
    with pytest.raises(DataError, match="gender was asked of no picture"): agreement(table.assign(gender=None), table)
    with pytest.raises(ConfigError, match="years"): agreement(table, table, years=-1)


def test_features_do_not_depend_on_the_batch_and_hardly_on_the_size(judge, faces):
    x = faces.images()
    whole = judge.features(x)
    assert whole.shape == (24, judge.dim) and whole.dtype == np.float32
    assert np.allclose(np.concatenate([judge.features(x[:5]), judge.features(x[5:])]), whole, atol=1e-4)
    half = torch.nn.functional.interpolate(torch.from_numpy(x), size=32, mode="area")    # what the network looks at
    assert np.allclose(judge.features(half), whole, atol=1e-3)
    assert judge.features(x[:0]).shape == (0, judge.dim) and judge.features(np.zeros((2, 3, 16, 16), np.float32)).shape == (2, judge.dim)


def test_reading_is_the_heads_likeliest_word(judge, faces):
    f = judge.features(faces.images())
    logits, read = judge.logits(f), judge.read_features(f)
    assert list(read) == ["age", "gender", "ethnicity"] and read["age"].between(0, 100).all()
    assert (read["ethnicity"] == [CLASSES["ethnicity"][i] for i in logits["ethnicity"].argmax(1)]).all()
    assert read.equals(judge.read(faces.images()))
    assert np.allclose(np.linalg.norm(judge.embed(faces.images()), axis=1), 1, atol=1e-5)


def test_the_judge_is_not_the_generators_reader(judge):
    kinds = {type(m).__name__ for m in judge.network.modules()}
    schema = schema_from_records(pd.DataFrame(dict(age=[5., 90], gender=["male", "female"], ethnicity=["white", "black"])))
    theirs = {type(m).__name__ for m in ConditionReader(schema).modules()} - {"Sequential", "Conv2d", "Linear"}
    assert not kinds & theirs and {"IBlock", "BatchNorm2d"} <= kinds
    assert JUDGE_SEED != 1 and not any(p.requires_grad for p in judge.network.parameters())


def test_a_judge_is_trained_once(judge):
    assert train_judge(24, 2, epochs=2).key == judge.key
    assert train_judge(24, 2, epochs=1).key != judge.key


def test_it_learns():
    made = train_judge(150, 2, epochs=8)
    held_out = render_faces(100, 1, size=64, nuisance=.1, seed=6, ages=(5, 90))
    found = agreement(held_out.table[["age", "gender", "ethnicity"]], made.read(held_out.images()))
    assert found.loc["gender", "agreement"] > .7 and found.loc["ethnicity", "low"] > .2 and found.loc["age", "mae"] < 21  # guessing: .5, .2, 21 years


def test_refusals(judge, faces):
    with pytest.raises(DataError, match=r"in \[-1, 1\]"): judge.features(faces.images()*100)
    with pytest.raises(DataError, match="finite"): judge.features(np.full((1, 3, 64, 64), np.nan, np.float32))
    with pytest.raises(DataError, match=r"\(N, 64\)"): judge.logits(np.zeros((2, 3), np.float32))
    with pytest.raises(ConfigError, match="identities"): train_judge(1)
    plain = RecognitionTrainer(recipe("cpu_smoke", image_size=32, epochs=1, tasks=("age",)), render_faces(4, 2, size=32, seed=8))
    plain.total = 1
    with pytest.raises(ConfigError, match="age, gender and ethnicity"): Judge(plain.fit())


def test_pixel_features_are_means():
    x = torch.rand(3, 3, 64, 64)*2 - 1
    assert np.allclose(pixel_features(x), torch.nn.functional.adaptive_avg_pool2d(x, 8).flatten(1), atol=1e-5)
    assert pixel_features((x*127.5 + 127.5).round().to(torch.uint8)).shape == (3, 192)
    with pytest.raises(DataError): pixel_features(x*3)
