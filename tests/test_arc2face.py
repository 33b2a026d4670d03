"""Arc2Face: the call sequence on a random pipeline of the published layout, against the same done by hand; loading that is strict and offline."""
import json
import shutil
import socket
import sys

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from hyperface import arc2face
from hyperface.core import ConfigError, DataError, MissingWeights, torch_rng

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
DIM, LENGTH, WIDTH = 16, 16, 32


@pytest.fixture(scope="module")
def pipeline():
    from diffusers import DPMSolverMultistepScheduler
    p = arc2face.tiny_pipeline(seed=3)
    p.scheduler = DPMSolverMultistepScheduler.from_config(p.scheduler.config)
    return p


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    "A folder of the published layout, from a pipeline with the base's own scheduler."
    return arc2face.save_arc2face(arc2face.tiny_pipeline(seed=3), tmp_path_factory.mktemp("arc2face")/"models")


@pytest.fixture
def folder(published, tmp_path):
    return shutil.copytree(published, tmp_path/"models")


def vectors(n, dim=DIM, seed=0):
    return F.normalize(torch.randn(n, dim, generator=torch_rng(seed, "vectors")), dim=1)


def tiny(pipeline, **options):
    return arc2face.Arc2FaceFaces(pipeline, **dict(dict(steps=3, dim=DIM), **options))


def attention(layer, x, heads=4):
    "CLIP's causal attention from its four matrices."
    n, d = x.shape
    q, k, v = (getattr(layer, f"{c}_proj")(x).view(n, heads, d//heads).transpose(0, 1) for c in "qkv")
    score = q @ k.transpose(1, 2)/(d//heads)**.5
    score = score.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), float("-inf"))
    return layer.out_proj((score.softmax(-1) @ v).transpose(0, 1).reshape(n, d))


def prompt_by_hand(encoder, tokenizer, e):
    "One identity: embeddings with the vector at the place of `id`, then the transformer written out."
    parts = getattr(encoder, "text_model", encoder)
    ids = [tokenizer.bos_token_id, *(tokenizer.convert_tokens_to_ids(f"{w}</w>") for w in "photo of a id person".split())]
    ids += [tokenizer.eos_token_id]*(LENGTH - len(ids))
    rows = [torch.cat([e, torch.zeros(WIDTH - DIM)]) if i == 4 else parts.embeddings.token_embedding.weight[t] for i, t in enumerate(ids)]
    x = torch.stack(rows) + parts.embeddings.position_embedding.weight[:LENGTH]
    for layer in parts.encoder.layers:
        x = x + attention(layer.self_attn, layer.layer_norm1(x))
        h = layer.mlp.fc1(layer.layer_norm2(x))
        x = x + layer.mlp.fc2(h*torch.sigmoid(1.702*h))
    return parts.final_layer_norm(x)


# --- the prompt ------------------------------------------------------------------------------------------------------

def test_prompts_equal_the_transformer_written_out(pipeline):
    e = vectors(3)
    got = arc2face.encode_identities(pipeline.text_encoder, pipeline.tokenizer, e, DIM)
    for k in range(3):
        torch.testing.assert_close(got[k], prompt_by_hand(pipeline.text_encoder, pipeline.tokenizer, e[k]), atol=1e-5, rtol=1e-5)


def test_each_row_of_a_batch_is_its_own_identity(pipeline):
    e = vectors(5)
    together = arc2face.encode_identities(pipeline.text_encoder, pipeline.tokenizer, e, DIM)
    alone = torch.cat([arc2face.encode_identities(pipeline.text_encoder, pipeline.tokenizer, v[None], DIM) for v in e])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    assert (together[0, 4:] - together[1, 4:]).norm(dim=1).min() > 1e-3
    assert torch.equal(together[0, :4], together[1, :4])                              # words before the vector cannot see it


def test_the_encoder_is_left_as_it_was(pipeline):
    plain = pipeline.tokenizer(arc2face.PROMPT, padding="max_length", max_length=LENGTH, return_tensors="pt").input_ids
    before = pipeline.text_encoder(plain)[0]
    arc2face.encode_identities(pipeline.text_encoder, pipeline.tokenizer, vectors(2), DIM)
    with pytest.raises(DataError):
        arc2face.encode_identities(pipeline.text_encoder, pipeline.tokenizer, torch.zeros(2, DIM), DIM)
    assert torch.equal(pipeline.text_encoder(plain)[0], before) and not pipeline.text_encoder.get_input_embeddings()._forward_hooks


def test_the_hook_goes_when_the_encoder_fails(pipeline, monkeypatch):
    encoder = arc2face.tiny_pipeline().text_encoder
    monkeypatch.setattr(encoder, "forward", lambda *a, **k: 1/0)
    with pytest.raises(ZeroDivisionError):
        arc2face.encode_identities(encoder, pipeline.tokenizer, vectors(1), DIM)
    assert not encoder.get_input_embeddings()._forward_hooks


def test_a_tokenizer_that_splits_the_word_is_refused(pipeline):
    from transformers import CLIPTokenizer
    letters, merges = arc2face._word_pieces(["photo"])
    with pytest.raises(DataError, match="one token"):
        arc2face.prompt_tokens(CLIPTokenizer({**letters}, merges, model_max_length=LENGTH), LENGTH)


# --- pictures --------------------------------------------------------------------------------------------------------

def test_pictures_equal_the_denoising_loop_written_out(pipeline):
    "Guidance, scheduler and VAE by hand, from the same stream."
    e, faces = vectors(2), tiny(pipeline, guidance=2.5)
    got = faces.generate(e, n_per_identity=2, generator=torch_rng(5))
    seed = int(torch.randint(2**62, [], generator=torch_rng(5)))
    empty = pipeline.text_encoder(pipeline.tokenizer("", padding="max_length", max_length=LENGTH, return_tensors="pt").input_ids)[0]
    schedule = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
    with torch.no_grad():
        for k in range(4):
            c = prompt_by_hand(pipeline.text_encoder, pipeline.tokenizer, e[k//2])[None]
            schedule.set_timesteps(3)
            x = torch.randn(1, 4, 8, 8, generator=torch_rng(seed, "picture", k//2, k % 2))*schedule.init_noise_sigma
            for t in schedule.timesteps:
                without, with_ = (pipeline.unet(schedule.scale_model_input(x, t), t, encoder_hidden_states=p).sample for p in (empty, c))
                x = schedule.step(without + 2.5*(with_ - without), t, x).prev_sample
            expected = pipeline.vae.decode(x/pipeline.vae.config.scaling_factor).sample.clamp(-1, 1)[0]
            torch.testing.assert_close(got[k], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("batch", [1, 2, 4, 7])
def test_batches_decide_nothing(pipeline, batch):
    e = vectors(3)
    expected = tiny(pipeline, batch=6).generate(e, n_per_identity=2, generator=torch_rng(1))
    torch.testing.assert_close(tiny(pipeline, batch=batch).generate(e, n_per_identity=2, generator=torch_rng(1)), expected, atol=1e-4, rtol=1e-4)


def test_pictures_follow_the_seed_and_the_order_of_identities(pipeline):
    e, faces = vectors(3), tiny(pipeline)
    a = faces.generate(e, n_per_identity=2, generator=torch_rng(1))
    assert torch.equal(a, faces.generate(e, n_per_identity=2, generator=torch_rng(1)))
    assert not torch.allclose(a, faces.generate(e, n_per_identity=2, generator=torch_rng(2)), atol=1e-2)
    assert not torch.allclose(a[0], a[1], atol=1e-2)                                  # two pictures of one identity
    first = faces.generate(e[:1], n_per_identity=2, generator=torch_rng(1))
    torch.testing.assert_close(first, a[:2], atol=1e-4, rtol=1e-4)
    assert a.shape == (6, 3, 16, 16) and a.dtype == torch.float32 and a.device.type == "cpu" and -1 <= a.min() and a.max() <= 1 and faces.image_size == 16
    with_numpy = faces.generate(3*e.numpy().astype(np.float64), n_per_identity=2, generator=torch_rng(1))
    torch.testing.assert_close(with_numpy, a, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("embeddings, message", [
    (torch.zeros(2, DIM), "no direction"), (torch.full((2, DIM), float("nan")), "no direction"), (torch.ones(DIM), r"\(N, 16\)"), (torch.ones(2, DIM + 1), r"\(N, 16\)"), (np.array([["a"]*DIM]), "numbers"), (torch.full((1, DIM), float("inf")), "no direction")])
def test_vectors_that_are_none(pipeline, embeddings, message):
    with pytest.raises(DataError, match=message):
        tiny(pipeline).generate(embeddings)


@pytest.mark.parametrize("options, call, message", [
    (dict(steps=0), {}, "steps"), (dict(batch=0), {}, "batch"), (dict(guidance=.9), {}, "guidance"), (dict(guidance=float("nan")), {}, "guidance"),
    ({}, dict(n_per_identity=-1), "n_per_identity"), ({}, dict(n_per_identity=1.5), "n_per_identity"), ({}, dict(attributes=dict(age=[30, 30])), "attributes")])
def test_parameters_that_make_no_sense(pipeline, options, call, message):
    with pytest.raises(ConfigError, match=message):
        tiny(pipeline, **options).generate(vectors(2), **call)


def test_nothing_asked_nothing_drawn(pipeline):
    assert tiny(pipeline).generate(vectors(2), n_per_identity=0).shape == tiny(pipeline).generate(torch.zeros(0, DIM)).shape == (0, 3, 16, 16)


def test_pictures_that_are_not_finite_are_an_error():
    broken = arc2face.tiny_pipeline()
    broken.vae.decoder.conv_out.bias.fill_(float("nan"))
    with pytest.raises(DataError, match="not finite"):
        tiny(broken).generate(vectors(1))


# --- LCM-LoRA --------------------------------------------------------------------------------------------------------

def lora_of(unet, form, rank=2, seed=0):
    "A LoRA for a linear layer and two convolutions, in one of the two ways of naming."
    draw, state = torch_rng(seed, "lora"), {}
    for name in ("mid_block.attentions.0.transformer_blocks.0.attn1.to_q", "conv_in", "mid_block.attentions.0.proj_in", "down_blocks.0.downsamplers.0.conv"):
        w = unet.get_submodule(name).weight
        down = torch.randn(rank, *w.shape[1:], generator=draw)*.1
        up = torch.randn(len(w), rank, *([1, 1] if w.ndim == 4 else []), generator=draw)*.1
        key = {"kohya": f"lora_unet_{name.replace('.', '_')}", "peft": f"unet.{name}"}[form]
        a, b = {"kohya": ("lora_down", "lora_up"), "peft": ("lora_A", "lora_B")}[form]
        state |= {f"{key}.{a}.weight": down, f"{key}.{b}.weight": up} | ({f"{key}.alpha": torch.tensor(1.)} if form == "kohya" else {})
    return state


@pytest.mark.parametrize("form, factor", [("kohya", .5), ("peft", 1.)])                # alpha 1 of rank 2; no alpha means alpha = rank
def test_a_merged_lora_is_a_branch_beside_each_layer(form, factor):
    "W x + s B (A x), computed by two layers in a row beside the untouched one."
    unet, plain = arc2face.tiny_pipeline().unet, arc2face.tiny_pipeline().unet
    state = lora_of(unet, form)
    assert arc2face.merge_lora(unet, state) == 4
    a, b = [v for k, v in state.items() if "conv_in." in k and k.endswith("weight")]
    x = torch.randn(2, 4, 8, 8, generator=torch_rng(1))
    torch.testing.assert_close(unet.conv_in(x), plain.conv_in(x) + factor*F.conv2d(F.conv2d(x, a, padding=1), b), atol=1e-5, rtol=1e-5)
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    a, b = [v for k, v in state.items() if "attn1" in k and k.endswith("weight")]
    x = torch.randn(5, 32, generator=torch_rng(2))
    torch.testing.assert_close(unet.get_submodule(name)(x), plain.get_submodule(name)(x) + factor*F.linear(F.linear(x, a), b), atol=1e-5, rtol=1e-5)
    changed = [k for k, v in unet.state_dict().items() if not torch.equal(v, plain.state_dict()[k])]
    assert len(changed) == 4


@pytest.mark.parametrize("change, message", [
    (lambda s: s | {"lora_te_text_model.alpha": torch.tensor(1.)}, "no layer of a UNet"), (lambda s: s | {"lora_unet_nowhere.lora_up.weight": torch.ones(2, 2)}, "which this network has not"),
    (lambda s: {k: v for k, v in s.items() if "lora_up" not in k}, "incomplete"), (lambda s: {k: v[:, :1] if "lora_up" in k else v for k, v in s.items()}, "does not fit"),
    (lambda s: {k: v*float("nan") if "down_blocks" in k else v for k, v in s.items()}, "not finite")])
def test_a_lora_that_does_not_fit_changes_nothing(change, message):
    unet = arc2face.tiny_pipeline().unet
    before = {k: v.clone() for k, v in unet.state_dict().items()}
    with pytest.raises(DataError, match=message):
        arc2face.merge_lora(unet, change(lora_of(unet, "kohya")))
    assert all(torch.equal(v, before[k]) for k, v in unet.state_dict().items())


def test_lcm_takes_few_steps_without_guidance_and_the_pictures_own_noise(folder, tmp_path):
    from safetensors.torch import save_file
    save_file(lora_of(arc2face.tiny_pipeline().unet, "kohya"), tmp_path/"lcm.safetensors")
    faces = arc2face.load_arc2face(folder, lcm_lora=tmp_path/"lcm.safetensors", dim=DIM, device="cpu")
    assert type(faces.pipeline.scheduler).__name__ == "LCMScheduler" and (faces.steps, faces.guidance) == (4, 1.0)
    calls = []
    hook = faces.pipeline.unet.register_forward_pre_hook(lambda m, a: calls.append(len(a[0])))
    a = faces.generate(vectors(3), n_per_identity=2, generator=torch_rng(1))
    hook.remove()
    assert calls == [4]*4 + [2]*4                                                    # four steps, no second half for guidance
    faces.batch = 1
    torch.testing.assert_close(faces.generate(vectors(3), n_per_identity=2, generator=torch_rng(1)), a, atol=1e-4, rtol=1e-4)


# --- from a folder ---------------------------------------------------------------------------------------------------

def test_a_saved_pipeline_draws_the_same_and_nothing_goes_over_the_network(published, pipeline, monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", lambda *a: pytest.fail("it asked the network"))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: pytest.fail("it asked the network"))
    faces = arc2face.load_arc2face(published, dim=DIM, device="cpu", steps=3)
    assert faces.guidance == 3.0 and faces.notes["scheduler"] == "DPMSolverMultistepScheduler"
    torch.testing.assert_close(faces.generate(vectors(2), generator=torch_rng(1)), tiny(pipeline, guidance=3.0).generate(vectors(2), generator=torch_rng(1)), atol=1e-5, rtol=1e-5)


def test_defaults_are_the_published_ones(published):
    faces = arc2face.load_arc2face(published, dim=DIM, device="cpu")
    assert (faces.steps, faces.guidance, faces.batch) == (25, 3.0, 4) and arc2face.PROMPT == "photo of a id person"
    assert not any(p.requires_grad for part in (faces.pipeline.unet, faces.pipeline.vae, faces.pipeline.text_encoder) for p in part.parameters())
    assert faces.pipeline.scheduler.config.timestep_spacing == "linspace" and faces.pipeline.safety_checker is None
    with pytest.raises(DataError, match=r"\(N, 512\)"):
        arc2face.load_arc2face(published, device="cpu").generate(vectors(1))


def test_a_file_of_the_scheduler_as_stable_diffusion_publishes_it(folder):
    "Values of SD 1.5's scheduler_config.json; the pictures do not change."
    told = json.loads((folder/"stable-diffusion-v1-5/scheduler/scheduler_config.json").read_text())
    assert told == {"_class_name": "PNDMScheduler", "beta_start": .00085, "beta_end": .012, "beta_schedule": "scaled_linear", "skip_prk_steps": True, "set_alpha_to_one": False, "steps_offset": 1}
    expected = arc2face.load_arc2face(folder, dim=DIM, device="cpu").pipeline.scheduler.config
    (folder/"stable-diffusion-v1-5/scheduler/scheduler_config.json").write_text(json.dumps(told | {"_diffusers_version": "0.6.0", "num_train_timesteps": 1000, "trained_betas": None, "clip_sample": False}))
    got = arc2face.load_arc2face(folder, dim=DIM, device="cpu").pipeline.scheduler.config
    assert {k: v for k, v in got.items() if k[0] != "_" and k != "clip_sample"} == {k: v for k, v in expected.items() if k[0] != "_"}


@pytest.mark.parametrize("name", ["arc2face/config.json", "arc2face/diffusion_pytorch_model.safetensors", "encoder/config.json", "encoder/pytorch_model.bin", "stable-diffusion-v1-5/vae/config.json",
                                  "stable-diffusion-v1-5/vae/diffusion_pytorch_model.safetensors", "stable-diffusion-v1-5/tokenizer/vocab.json", "stable-diffusion-v1-5/scheduler/scheduler_config.json"])
def test_every_missing_file_is_named_with_its_origin_and_its_terms(folder, name):
    (folder/name).unlink()
    with pytest.raises(MissingWeights) as e:
        arc2face.load_arc2face(folder)
    assert name in str(e.value) and "FoivosPar/Arc2Face" in str(e.value) and "non-commercial" in str(e.value) and "OpenRAIL-M" in str(e.value).replace("Open RAIL", "OpenRAIL")
    assert len(arc2face.missing_files(folder)) == 1


def test_a_base_and_a_lora_elsewhere(folder, tmp_path):
    (folder/"stable-diffusion-v1-5").rename(tmp_path/"sd15")
    assert arc2face.load_arc2face(folder, tmp_path/"sd15", dim=DIM, device="cpu").image_size == 16
    with pytest.raises(MissingWeights, match="lcm-lora"):
        arc2face.load_arc2face(folder, tmp_path/"sd15", lcm_lora=tmp_path/"none.safetensors")


@pytest.mark.parametrize("name", ["arc2face/diffusion_pytorch_model.safetensors", "stable-diffusion-v1-5/vae/diffusion_pytorch_model.safetensors"])
@pytest.mark.parametrize("change", ["lacks", "has more", "other shape", "cut"])
def test_weights_are_loaded_strictly(folder, name, change):
    from safetensors.torch import load_file, save_file
    if change == "cut":
        (folder/name).write_bytes((folder/name).read_bytes()[:-100])
    else:
        state = load_file(folder/name)
        first = sorted(k for k in state if "conv_in.weight" in k)[0]
        if change == "lacks":
            del state[first]
        else:
            state |= {first + "x": torch.ones(2)} if change == "has more" else {first: torch.ones(3, 3, 3, 3)}
        save_file(state, folder/name, metadata=dict(format="pt"))
    with pytest.raises(DataError):
        arc2face.load_arc2face(folder, dim=DIM, device="cpu")


@pytest.mark.parametrize("change, message", [
    (lambda s: s.pop("text_model.final_layer_norm.bias"), "lacks"), (lambda s: s.update(more=torch.ones(2)), "unknown"), (lambda s: s.update({"text_model.final_layer_norm.bias": torch.ones(3)}), "shapes"),
    (lambda s: s["text_model.final_layer_norm.bias"].fill_(float("nan")), "not finite")])
def test_the_encoder_is_loaded_strictly(folder, change, message):
    file = folder/"encoder/pytorch_model.bin"
    state = torch.load(file, weights_only=True)
    change(state)
    torch.save(state, file)
    with pytest.raises(DataError, match=message) as e:
        arc2face.load_arc2face(folder, dim=DIM, device="cpu")
    assert "pytorch_model.bin" in str(e.value)


def test_an_encoder_with_old_and_new_names(folder, published):
    "The published file holds position numbers, as transformers 4.30 wrote them; newer ones are safetensors without the prefix."
    from safetensors.torch import save_file
    file = folder/"encoder/pytorch_model.bin"
    state = torch.load(file, weights_only=True)
    torch.save(state | {"text_model.embeddings.position_ids": torch.arange(LENGTH)[None]}, file)
    e = vectors(1)
    expected = arc2face.load_arc2face(published, dim=DIM, device="cpu", steps=1).generate(e, generator=torch_rng(1))
    assert torch.equal(arc2face.load_arc2face(folder, dim=DIM, device="cpu", steps=1).generate(e, generator=torch_rng(1)), expected)
    file.unlink()
    save_file({k.removeprefix("text_model."): v for k, v in state.items()}, folder/"encoder/model.safetensors")
    assert torch.equal(arc2face.load_arc2face(folder, dim=DIM, device="cpu", steps=1).generate(e, generator=torch_rng(1)), expected)


def test_a_pickle_that_runs_code_is_refused(folder, tmp_path):
    class Attack:
        def __reduce__(self):
            return open, (str(tmp_path/"touched"), "w")
    torch.save(dict(a=Attack()), folder/"encoder/pytorch_model.bin")
    with pytest.raises(DataError, match="refused"):
        arc2face.load_arc2face(folder, dim=DIM, device="cpu")
    assert not (tmp_path/"touched").exists()


@pytest.mark.parametrize("name, content", [("encoder/config.json", "{"), ("encoder/config.json", "[]"), ("encoder/config.json", '{"hidden_size": "x"}'), ("arc2face/config.json", "{"), ("arc2face/config.json", '{"down_block_types": ["Nothing"]}'),
                                           ("stable-diffusion-v1-5/vae/config.json", "[]"), ("stable-diffusion-v1-5/scheduler/scheduler_config.json", '{"beta_schedule": "odd"}'), ("stable-diffusion-v1-5/tokenizer/vocab.json", "{}")])
def test_damaged_descriptions(folder, name, content):
    (folder/name).write_text(content)
    with pytest.raises(DataError):
        arc2face.load_arc2face(folder, dim=DIM, device="cpu").generate(vectors(1))


def test_half_precision_is_asked_for(published):
    faces = arc2face.load_arc2face(published, dim=DIM, device="cpu", half=True)
    assert faces.pipeline.unet.dtype == faces.pipeline.text_encoder.dtype == torch.float16


def test_saving_does_not_replace_a_folder_unasked(published, pipeline):
    with pytest.raises(DataError, match="not empty"):
        arc2face.save_arc2face(pipeline, published)


def test_without_the_libraries_it_says_what_to_install(published, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ConfigError, match=r"pip install hyperface\[arc2face\]"):
        arc2face.load_arc2face(published)


def test_importing_the_module_imports_neither_library():
    import subprocess
    code = "import sys, hyperface.arc2face; assert not {'diffusers', 'transformers', 'webdataset', 'huggingface_hub'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
