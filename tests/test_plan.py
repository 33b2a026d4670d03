"""What a run will need: counts restated, factors, what is never presented as measured."""
import json
import math
import re
from dataclasses import asdict, fields, replace

import pytest

from hyperface.config import PROFILES, Profile
from hyperface.core import ConfigError, DataError
from hyperface.pipeline import find_steps
from hyperface.report.plan import GPU_PROBES, WORK, Work, _pass, data_needs, gpu_rates, growth, last_times, measure, operations, plan, scaled_rate, space, training_bytes


@pytest.fixture(scope="module")
def steps():
    return find_steps()


def report(folder, seconds: dict, profile="quick", **changes):
    folder.mkdir(exist_ok=True)
    run = dict(sizes=asdict(PROFILES[profile]), provenance=dict(processors=2), steps={n: dict(status="done", seconds=s) for n, s in seconds.items()}) | changes
    (folder / "run.json").write_text(json.dumps(run))
    return folder


def test_every_count_is_of_a_page_that_exists_and_depends_only_on_sizes_it_reads(steps):
    "A page that stops reading a size, or a count that uses one its page does not read, shows here."
    assert set(WORK) <= set(steps)
    base = PROFILES["quick"]
    for name, count in WORK.items():
        reads = {size for page in (name, *steps[name].needs) for size in re.findall(r"sizes\.(\w+)", steps[page].code)} # a page takes sizes over from those it needs
        for f in fields(Profile):
            value = getattr(base, f.name)
            if f.name == "name" or isinstance(value, str):
                continue
            other = (not value) if isinstance(value, bool) else tuple(2*v for v in value) if isinstance(value, tuple) else 3*value
            if count(replace(base, **{f.name: other})) != count(base):
                assert f.name in reads or f.name == "train_identities" and "train_identities" in reads, (name, f.name)


def test_counts_of_the_heads_restated():
    p = PROFILES["study"]
    rendered, shown = WORK["e5_heads"](p)
    assert shown.amount == 4*3*6*240*16 and shown.size == 40                # heads, seeds, epochs, people, pictures
    assert rendered.amount == (240 + 24)*16 + 2*100*15


def test_counts_of_the_additions_restated():
    rendered, shown = WORK["e13_additions"](PROFILES["quick"])
    assert shown.amount == (9 + 2)*1*4*64*12 and shown.size == 40           # rows (one is twice as long), seeds, passes, people, pictures: 48 steps of 64 a row
    assert WORK["e13_additions"](PROFILES["study"])[1].amount == (9 + 2)*3*6*120*16
    assert rendered.amount == (160 + 16)*12 + 60*15


def test_counts_of_fairness_and_of_the_sweeps_restated():
    study = PROFILES["study"]
    [shown] = WORK["j1_fairness"](study)
    assert shown.amount == 10*3*12*144*6                                    # rows, seeds, passes, people, pictures
    [sweeps] = WORK["h2_ablation"](study)
    assert sweeps.amount == 8*3*12*80*8 and sweeps.unit == WORK["h1_benchmark"](study)[-1].unit


def test_operations_are_those_of_the_layers():
    import torch
    from torch import nn
    assert _pass(nn.Conv2d(3, 8, 3, padding=1), torch.zeros(1, 3, 10, 10)) == 2*3*8*9*100
    assert operations("recogniser", 112, "vec2face") == pytest.approx(3*2*6.3e9, rel=.05)   # insightface's R50: 6.3 G multiply-adds
    assert operations("embed", 112, "mobilefacenet")*3 < operations("recogniser", 112, "vec2face")
    assert operations("pack", 20, "") == 4*20*20*512 and math.isnan(operations("render", 112, ""))


def test_growth_is_the_range_of_the_kinds_factors():
    gan = lambda n: Work("gan", n, 16, "cpu16 16")
    assert growth([Work("render", 20, 40), gan(7)], [Work("render", 10, 40), gan(1)]) == (2., 7.)
    assert growth([gan(7)], [gan(7)]) == (1., 1.)
    assert all(map(math.isnan, growth([gan(7)], [Work("render", 1, 16)])))


def test_without_measurement_there_is_a_dash_not_a_number(steps, tmp_path):
    found = plan("full", steps)
    assert found.steps.cpu_low.isna().all() and set(found.steps.basis) == {"not measured"} and not found.rates
    text = found.text()
    assert "No rate is known" in text and "not on this machine" in text and "CPU –" in text


def test_an_earlier_run_gives_measured_seconds_times_growth(steps, tmp_path):
    last = report(tmp_path / "quick", {"e5_heads": 600., "e3_real_faces": 12.})
    found = plan("full", steps, last=last).steps.set_index("step")
    low, high = growth(WORK["e5_heads"](PROFILES["full"]), WORK["e5_heads"](PROFILES["quick"]))
    assert (found.cpu_low["e5_heads"], found.cpu_high["e5_heads"]) == (pytest.approx(600*low/3600), pytest.approx(600*high/3600))
    assert "600 s measured at quick" in found.basis["e5_heads"] and math.isnan(found.cpu_low["e3_real_faces"]) and "growth not counted" in found.basis["e3_real_faces"]
    same = plan("quick", steps, last=last).steps.set_index("step")
    assert same.cpu_low["e5_heads"] == same.cpu_high["e5_heads"] == pytest.approx(600/3600)


def test_gpu_hours_are_arithmetic_and_never_for_pages_that_ask_for_the_cpu(steps):
    slow, fast = (plan("full", steps, tflops=t, share=s).steps.set_index("step").gpu for t, s in ((100., .2), (400., .4)))
    assert (slow/fast).dropna().round(6).eq(8.).all() and slow["e5_heads"] > 0
    for name, step in steps.items():
        if 'device="cpu"' in step.code:
            assert math.isnan(slow[name])
    assert math.isnan(slow["e2_packing"])


def test_gpu_hours_rest_on_shipped_rates_and_say_of_which_card(steps):
    known, full = gpu_rates(), PROFILES["full"]
    found = plan("full", steps); table = found.steps.set_index("step")
    assert known["gpu"] in found.text() and known["time"][:10] in found.text()
    works = [w for w in WORK["e13_additions"](full) if w.kind in GPU_PROBES]
    assert table.gpu["e13_additions"] == pytest.approx(sum(w.amount*known["rates"][w.unit] for w in works)/3600) and not table.gpu_scaled["e13_additions"]
    assert table.gpu["e2_packing"] > 0 and math.isnan(table.gpu["e1_rendered_faces"])        # rendering and ONNX models run on the processor
    for name, step in steps.items():
        if 'device="cpu"' in step.code:
            assert math.isnan(table.gpu[name])


def test_a_rate_of_another_size_is_scaled_upwards_only():
    rates = {("gan", 64, "cpu64 64"): 2., ("recogniser", 40, "cpu_quick"): 1.}
    assert scaled_rate(("gan", 64, "cpu64 64"), rates) == (2., True)
    assert scaled_rate(("gan", 16, "cpu16 16"), rates) == (2., False)                        # a smaller network keeps a GPU waiting as long
    more, own = scaled_rate(("recogniser", 112, "vec2face"), rates)
    assert not own and more == pytest.approx(operations("recogniser", 112, "vec2face")/operations("recogniser", 40, "cpu_quick"))
    assert math.isnan(scaled_rate(("pack", 100, ""), rates)[0])


def test_a_gpu_that_is_not_there_cannot_be_measured(monkeypatch):
    import torch
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="No CUDA device"):
        measure(("pack", 2000, ""), .1, "cuda")
    with pytest.raises(ConfigError, match="no probe for this work on cuda"):
        measure(("render", 40, ""), .1, "cuda")


def test_probes_measure_the_time_that_passes(steps):
    few = {n: steps[n] for n in ("e5a_stability",)}
    found = plan("smoke", few, probe=True, seconds=.2)
    (unit, seconds), = found.rates.items()
    assert unit == ("recogniser", 40, "cpu_smoke") and seconds > 0
    assert found.steps.cpu_low[0] == pytest.approx(18*32*PROFILES["smoke"].stability_steps*seconds/3600)
    assert "counted × rate measured now" in found.text() and "Rates measured now" in found.text()


def test_a_probe_that_tells_its_own_time_is_believed(monkeypatch):
    "Half a second told for 5 units, of which a run needs a quarter of the time each, because four processes share them."
    from hyperface.report import plan as module
    monkeypatch.setitem(module.PROBES, "render", lambda size, model: ((lambda: .5), 5, 1/4))
    assert measure(("render", 40, ""), 0.) == pytest.approx(.5/5/4)


def test_data_and_weights_are_looked_for_where_they_would_be_read(steps, tmp_path, monkeypatch):
    monkeypatch.delenv("HYPERFACE_MODELS", raising=False)
    (tmp_path / "lfw").mkdir()
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "w600k_mbf_dequant_fp32.onnx").write_bytes(b"x")
    monkeypatch.setenv("HYPERFACE_DATA", str(tmp_path))
    found = data_needs(steps).set_index("what")
    assert found.there[["lfw", "w600k_mbf_dequant_fp32.onnx"]].all() and not found.there[["utkface", "genderage_mx.onnx", "ckplus48"]].any()
    assert "ask: https://susanqq" in found.remedy["utkface"] and "HYPERFACE_MODELS" in found.remedy["genderage_mx.onnx"] and "e3_real_faces" in found["wanted by"]["lfw"]
    said = plan("smoke", steps).missing()
    assert any(s.startswith("utkface") for s in said) and not any(s.startswith("lfw") for s in said)
    monkeypatch.delenv("HYPERFACE_DATA")
    assert data_needs(steps).set_index("what").remedy["lfw"] == "hyperface fetch lfw"


def test_space_is_counted_and_compared_with_what_is_free(steps):
    p = PROFILES["full"]
    assert space(p, steps)["disk"] >= 3*112*112*(p.rendered_identities*p.rendered_per_identity + p.train_identities*p.train_per_identity)
    assert training_bytes("vec2face", 10_000) > 4*3*43e6                      # weights, gradients and momentum of a ResNet-50 alone
    found = plan("full", steps)
    found.machine["disk"] = 1e9
    assert any(re.match(r"disk: [\d.]+ GB counted, 1.0 GB free", s) for s in found.missing())


@pytest.mark.parametrize("arguments, says", [(dict(profile="ful"), "Did you mean full"), (dict(share=0.), "share must"), (dict(share=30.), "share must"), (dict(tflops=-1.), "tflops must"), (dict(share=math.nan), "share must")])
def test_nonsense_is_refused(steps, arguments, says):
    with pytest.raises(ConfigError, match=says):
        plan(**(dict(profile="full", steps=steps) | arguments))


def test_a_damaged_report_is_named_and_an_absent_one_is_none(steps, tmp_path):
    (tmp_path / "run.json").write_text('{"sizes": 3}')
    with pytest.raises(DataError, match="not what the runner writes"):
        plan("full", steps, last=tmp_path)
    (tmp_path / "run.json").write_text('{"sizes"')
    with pytest.raises(DataError, match="is not JSON"):
        last_times(tmp_path)
    assert plan("full", steps, last=tmp_path / "nothing").steps.cpu_low.isna().all()
    with pytest.raises(ConfigError, match="no probe"):
        measure(("dream", 1, ""))
