"""NVlabs' pickles: what is in them comes out exactly, and nothing in them is ever run, whatever they hold."""
import gzip
import io
import math
import os
import pickle
import pickletools
import resource
import struct
import sys
import time
import types
import zipfile
from collections import OrderedDict
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from hyperface.core import ConfigError, DataError, MissingWeights
from hyperface.stylegan2 import convert as module
from hyperface.stylegan2.convert import convert, infer_arguments, load_nvlabs, open_pickle, read_nvlabs
from hyperface.stylegan2.networks import Discriminator, Generator

GIVEN = dict(z_dim=16, c_dim=3, w_dim=16, img_resolution=16, img_channels=3, mapping_kwargs=dict(num_layers=2), synthesis_kwargs=dict(channel_base=128, channel_max=16, num_fp16_res=2, conv_clamp=256))
CRITIC = dict(c_dim=3, img_resolution=16, img_channels=3, channel_base=128, channel_max=16, num_fp16_res=2, conv_clamp=256, block_kwargs={}, mapping_kwargs=dict(num_layers=2), epilogue_kwargs=dict(mbstd_group_size=4))


# --- writing such a file -----------------------------------------------------------------------------------------------

@contextmanager
def their_modules(**more):
    "Stand-ins for the modules that a pickle names, there only while it is written."
    def stand_in(module_name, name, kind=None):
        made = kind or (lambda *a: (_ for _ in ()).throw(AssertionError("somebody unpickled it")))
        made.__module__, made.__qualname__, made.__name__ = module_name, name, name
        return made
    made = {"torch_utils": {}, "torch_utils.persistence": dict(_reconstruct_persistent_obj=stand_in("torch_utils.persistence", "_reconstruct_persistent_obj")),
            "dnnlib": {}, "dnnlib.util": dict(EasyDict=stand_in("dnnlib.util", "EasyDict", type("EasyDict", (dict,), {})))}
    for name, content in made.items():
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(content)
    try:
        yield made["torch_utils.persistence"]["_reconstruct_persistent_obj"], made["dnnlib.util"]["EasyDict"]
    finally:
        for name in made:
            del sys.modules[name]


def official(top, protocol=4, marker="/nonexistent/marker", arguments=None, change=None, meta_kind="plain", kinds=None):
    "The bytes of modules as NVlabs' files hold them; the source text in them is a trap."
    source = f"open({str(marker)!r}, 'w').close()\nclass Generator: pass\n"
    buffer = io.BytesIO()
    with their_modules() as (rebuild, easy):
        class Writer(pickle.Pickler):
            def reducer_override(self, x):
                if not isinstance(x, torch.nn.Module):
                    return NotImplemented
                held = {k: v for k, v in vars(x).items() if k not in ("config", "notes")}
                held["act_gain"], held["weight_gain"] = np.sqrt(2), 1/np.sqrt(np.float32(7))           # the originals hold numpy numbers
                if hasattr(x, "config"):
                    given = x.config if arguments is None else arguments(x)
                    held.update(_init_args=(), _init_kwargs=easy({k: easy(v) if isinstance(v, dict) else v for k, v in given.items()}))
                if change is not None:
                    change(x, held)
                name = (kinds or {}).get(type(x).__name__, type(x).__name__)
                meta = dict(type="class", version=6, module_src=source, class_name=name, state=held)
                return rebuild, (easy(meta) if meta_kind == "easy" else meta,)
        Writer(buffer, protocol).dump({k: easy(v) if type(v) is dict else v for k, v in top.items()} if isinstance(top, dict) else top)
    return buffer.getvalue()


def networks(seed=0, **more):
    torch.manual_seed(seed)
    G, E, D = Generator(**{**GIVEN, **more}), Generator(**{**GIVEN, **more}), Discriminator(**CRITIC)
    with torch.no_grad():
        for net in (G, E, D):
            for k, v in [*net.named_parameters(), *net.named_buffers()]:
                if not k.endswith("resample_filter"):
                    v += .3*torch.randn_like(v)
    return dict(G=G.eval(), D=D.eval(), G_ema=E.eval())


NETS = networks()
with torch.device("meta"):
    networks()                                                                # torch imports parts of itself, and those theirs, when it is first asked for sizes alone
GOOD = official(dict(training_set_kwargs=dict(class_name="training.dataset.ImageFolderDataset", resolution=16, use_labels=True, max_size=None, xflip=False), **NETS, augment_pipe=None))


@pytest.fixture
def guarded(tmp_path):
    "Whatever the test reads: no file appears, no class or table changes, nothing is imported, it is quick and small."
    watched = [OrderedDict, torch.Tensor, torch.nn.Module, torch.nn.Parameter, Generator, Discriminator, module.Part, module.Name, module.Tensor, module.Storage, module.Array, module.NetworkWalk, pickle.Unpickler, np.ndarray]
    look = lambda: [dict(vars(c)) for c in watched] + [dict(module.CALLS), dict(module.ACTIONS), set(module.LABELS), set(vars(sys.modules["builtins"])), sorted(k for k in os.environ if not k.startswith("TORCHINDUCTOR"))] # torch sets that one when it first wants its compiler
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        before, loaded, start, memory = look(), set(sys.modules), time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        yield tmp_path
        seconds = time.process_time() - start                                                  # other work on the machine does not count
        assert look() == before
        assert not {m for m in set(sys.modules) - loaded if not m.startswith(("torch.", "encodings", "_pytest", "pytest", "json", "safetensors"))}
        assert not (tmp_path/"ran").exists()
        assert seconds < 2, f"{seconds:.1f} s"
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 150_000                    # kB


# --- good files ----------------------------------------------------------------------------------------------------------

def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize("meta_kind", ["plain", "easy"])
def test_networks_come_out_as_they_went_in(protocol, meta_kind, tmp_path):
    (tmp_path/"n.pkl").write_bytes(official({**NETS, "training_set_kwargs": {"resolution": 16}, "augment_pipe": None}, protocol, tmp_path/"ran", meta_kind=meta_kind))
    z, c = torch.randn(3, 16), torch.eye(3)
    for name in ("G", "G_ema"):
        net = load_nvlabs(tmp_path/"n.pkl", name)
        assert isinstance(net, Generator) and not net.training and same(net, NETS[name]) and net.config == NETS[name].config
        with torch.no_grad():
            assert torch.equal(net(z, c, truncation_psi=.5, noise_mode="const"), NETS[name](z, c, truncation_psi=.5, noise_mode="const"))
    D = load_nvlabs(str(tmp_path/"n.pkl"), "D")
    x = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        assert same(D, NETS["D"]) and torch.equal(D(x, torch.eye(3)[[0, 1, 2, 0]]), NETS["D"](x, torch.eye(3)[[0, 1, 2, 0]]))
    assert not (tmp_path/"ran").exists() and not {"torch_utils", "dnnlib"} & set(sys.modules)


def test_nothing_that_could_run_code_is_called(tmp_path, monkeypatch):
    "The reader works with `pickle`, `torch.load`, `exec` and `eval` out of order."
    import builtins
    (tmp_path/"n.pkl").write_bytes(GOOD)
    load_nvlabs(tmp_path/"n.pkl")                                                              # whatever torch imports on first use is there now

    def no(*args, **more):
        raise AssertionError("called")
    with monkeypatch.context() as patch:
        for where, names in ((pickle, "load loads Unpickler _Unpickler"), (torch, "load"), (torch.storage, "_load_from_bytes"), (torch._utils, "_rebuild_tensor_v2 _rebuild_parameter"), (builtins, "exec eval")):
            for name in names.split():
                patch.setattr(where, name, no)
        net = load_nvlabs(tmp_path/"n.pkl")
    assert same(net, NETS["G_ema"])


def test_everything_is_read_as_data(tmp_path):
    class Pipe(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.xflip, self.scale_std, self.imgfilter_bands = 1, .2, [1, 1, 1, 1]
            self.register_buffer("p", torch.tensor(.25)); self.register_buffer("Hz_geom", torch.randn(12))
            self.config = dict(xflip=1, rotate90=1)
    top = dict(**NETS, training_set_kwargs=dict(class_name="d", path="/data/x.zip", numbers=np.arange(3), scale=np.float64(1.5), shape=torch.Size([2, 3]), dtype=torch.float32, device=torch.device("cpu"), words={"a"}, none=None), augment_pipe=Pipe())
    (tmp_path/"n.pkl").write_bytes(official(top))
    read = read_nvlabs(tmp_path/"n.pkl")
    assert list(read) == ["G", "D", "G_ema", "training_set_kwargs", "augment_pipe"]
    assert read["training_set_kwargs"] == dict(class_name="d", path="/data/x.zip", numbers=[0, 1, 2], scale=1.5, shape=[2, 3], dtype="torch.float32", device="cpu", words=["a"], none=None)
    pipe = read["augment_pipe"]
    assert pipe["class_name"] == "Pipe" and pipe["arguments"] == dict(xflip=1, rotate90=1) and pipe["values"]["p"] == .25 and pipe["values"]["scale_std"] == .2
    assert read["D"]["class_name"] == "Discriminator" and read["D"]["arguments"]["epilogue_kwargs"] == dict(mbstd_group_size=4)
    assert set(read_nvlabs(tmp_path/"n.pkl", ["D"])) == {"D", "training_set_kwargs", "augment_pipe"}


def test_positional_and_loose_arguments(tmp_path):
    def positional(x, held):
        if isinstance(x, Generator):
            kw = held["_init_kwargs"]
            held["_init_args"] = (kw.pop("z_dim"), kw.pop("c_dim"))
    (tmp_path/"a.pkl").write_bytes(official(NETS, change=positional))
    assert same(load_nvlabs(tmp_path/"a.pkl"), NETS["G_ema"])
    loose = lambda x: {**{k: v for k, v in x.config.items() if k != "synthesis_kwargs"}, **x.config.get("synthesis_kwargs", {}), "fused_modconv_default": "inference_only"} if isinstance(x, Generator) else x.config
    (tmp_path/"b.pkl").write_bytes(official(NETS, arguments=loose))
    assert load_nvlabs(tmp_path/"b.pkl").config == NETS["G_ema"].config


@pytest.mark.parametrize("more", [dict(c_dim=0), dict(img_resolution=8), dict(img_channels=1), dict(mapping_kwargs=dict(num_layers=4, layer_features=24, embed_features=8, lr_multiplier=.1, activation="relu", w_avg_beta=.9)),
                                  *(dict(synthesis_kwargs=dict(channel_base=128, channel_max=16, architecture=a, resample_filter=f, use_noise=n)) for a, f, n in (("orig", [1, 2, 1], True), ("resnet", [1, 3, 3, 1], False), ("skip", [1, 4, 6, 4, 1], True)))])
def test_other_arguments(more, tmp_path):
    G = networks(1, **more)["G_ema"]
    (tmp_path/"n.pkl").write_bytes(official(dict(G_ema=G)))
    net = load_nvlabs(tmp_path/"n.pkl")
    assert same(net, G) and net.config == G.config
    torch.save(dict(G_ema=G.state_dict()), tmp_path/"s.pt")
    again = load_nvlabs(tmp_path/"s.pt")                                                       # arguments from shapes alone
    assert same(again, G)
    z, c = torch.randn(2, 16), torch.eye(3)[:2] if net.c_dim else None
    with torch.no_grad():
        if "activation" not in str(more):
            torch.testing.assert_close(again(z, c, noise_mode="const"), net(z, c, noise_mode="const"))


@pytest.mark.parametrize("more", [{}, dict(c_dim=0, mapping_kwargs={}), dict(architecture="orig"), dict(architecture="skip"), dict(cmap_dim=5), dict(epilogue_kwargs=dict(mbstd_num_channels=0)), dict(block_kwargs=dict(freeze_layers=3))])
def test_discriminators(more, tmp_path):
    D = Discriminator(**{**CRITIC, **more}).eval()
    (tmp_path/"n.pkl").write_bytes(official(dict(D=D)))
    assert same(load_nvlabs(tmp_path/"n.pkl", "D"), D)
    torch.save(dict(D=OrderedDict(D.state_dict())), tmp_path/"s.pt")
    again, x = load_nvlabs(tmp_path/"s.pt", "D"), torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(again(x, torch.eye(3)[[0, 1, 2, 2]]), D(x, torch.eye(3)[[0, 1, 2, 2]]))


def test_half_and_turned_tensors(tmp_path):
    G = networks(2)["G_ema"]
    G.half()
    G.synthesis.b8.conv1.weight.data = G.synthesis.b8.conv1.weight.data.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    G.mapping.fc1.weight.data = torch.randn(40, 40).half()[3:19, 5:21]                         # part of a larger storage
    (tmp_path/"n.pkl").write_bytes(official(dict(G_ema=G)))
    net = load_nvlabs(tmp_path/"n.pkl")
    assert same(net, G.float()) and next(net.parameters()).dtype == torch.float32


def test_the_published_names(tmp_path):
    "Keys and shapes of the contract, through a pickle; 64 pixels, ten labels."
    G = Generator(512, 10, 512, 64, 3, mapping_kwargs=dict(num_layers=2), synthesis_kwargs=dict(channel_base=16384, channel_max=512))
    (tmp_path/"n.pkl").write_bytes(official(dict(G_ema=G)))
    start = time.process_time()                                                            # other work on the machine does not count
    read = read_nvlabs(tmp_path/"n.pkl")["G_ema"]
    assert time.process_time() - start < 2
    assert len(read["state_dict"]) == 96 and sum(v.numel() for v in read["state_dict"].values()) == sum(v.numel() for v in G.state_dict().values())
    assert infer_arguments({k: tuple(v.shape) for k, v in read["state_dict"].items()}, "x")[1]["synthesis_kwargs"]["channel_base"] == 16384


def test_convert(tmp_path):
    (tmp_path/"n.pkl").write_bytes(GOOD)
    out = convert(tmp_path/"n.pkl", tmp_path/"out")
    for name, net in NETS.items():
        assert same(type(net).from_pretrained(out/name), net)
    import json
    told = json.loads((out/"source.json").read_text())
    assert told["networks"] == ["G", "D", "G_ema"] and told["training_set_kwargs"]["use_labels"] is True and len(told["sha256"]) == 64
    with pytest.raises(DataError, match="not empty"):
        convert(tmp_path/"n.pkl", tmp_path/"out")
    convert(tmp_path/"n.pkl", tmp_path/"out", overwrite=True)
    (tmp_path/"bad.pkl").write_bytes(GOOD[:-100])
    with pytest.raises(DataError, match=r"bad\.pkl"):
        convert(tmp_path/"bad.pkl", tmp_path/"out2")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.pkl", "n.pkl", "out"]            # nothing half-written stays


def test_names_that_are_wrong(tmp_path):
    (tmp_path/"n.pkl").write_bytes(official(dict(G_ema=NETS["G_ema"])))
    with pytest.raises(ConfigError, match="which must be"):
        load_nvlabs(tmp_path/"n.pkl", "Gs")
    with pytest.raises(DataError, match="no network 'D'. It has: G_ema"):
        load_nvlabs(tmp_path/"n.pkl", "D")
    with pytest.raises(MissingWeights, match="non-commercial"):
        load_nvlabs(tmp_path/"absent.pkl")


# --- hostile files -------------------------------------------------------------------------------------------------------

def S(text):
    b = text.encode()
    return b"\x8c" + bytes([len(b)]) + b if len(b) < 256 else b"X" + struct.pack("<I", len(b)) + b


def N(mod, name):
    return S(mod) + S(name) + b"\x93"


def P(*parts, protocol=4):
    return b"\x80" + bytes([protocol]) + b"".join(parts) + b"."


ODD, EASY, PART = N("collections", "OrderedDict"), N("dnnlib.util", "EasyDict"), N("torch_utils.persistence", "_reconstruct_persistent_obj")
MARK = b"("
RUN = S("open('ran', 'w')")


def D(**entries):
    return b"}(" + b"".join(S(k) + v for k, v in entries.items()) + b"u"


def part(kind="Generator", **held):
    return PART + D(type=S("class"), version=b"K\x06", module_src=RUN, class_name=S(kind), state=D(**{**dict(_parameters=b"}", _buffers=b"}", _modules=b"}"), **held})) + b"\x85R"


CALLED = [("os", "system"), ("posix", "system"), ("nt", "system"), ("subprocess", "Popen"), ("builtins", "eval"), ("builtins", "exec"), ("builtins", "getattr"), ("builtins", "setattr"), ("builtins", "__import__"), ("builtins", "open"), ("builtins", "type"), ("__builtin__", "eval"),
          ("builtins", "bytearray"), ("builtins", "print"), ("operator", "attrgetter"), ("functools", "partial"), ("importlib", "import_module"), ("types", "CodeType"), ("ctypes", "CDLL"), ("pickle", "loads"), ("_pickle", "loads"), ("torch", "load"), ("torch.hub", "load"), ("torch.jit", "load"),
          ("torch.serialization", "load"), ("torch", "Tensor"), ("torch.nn.modules.linear", "Linear"), ("torch._utils", "_rebuild_tensor_v3"), ("torch._utils", "_rebuild_wrapper_subclass"), ("torch._dynamo", "config"), ("numpy", "load"), ("numpy", "fromfile"), ("numpy.core._internal", "_ctypes"),
          ("runpy", "run_path"), ("shutil", "rmtree"), ("webbrowser", "open"), ("copyreg", "_reconstructor"), ("copyreg", "__newobj__"), ("_codecs", "encode"), ("collections", "OrderedDict.__init__.__globals__"), ("collections", "defaultdict"), ("dnnlib.util", "construct_class_by_name"), ("dnnlib.util", "call_func_by_name"),
          ("torch_utils.persistence", "_src_to_module"), ("torch_utils.persistence", "persistent_class"), ("hyperface.core", "write_text"), ("hyperface.stylegan2.convert", "convert"), ("safetensors.torch", "save_file"), ("os\n", "system"), ("\x1b[31mos", "system"), ("ｏｓ", "system"), ("", "eval"), ("builtins", "")]


@pytest.mark.parametrize("mod, name", CALLED, ids=lambda x: ascii(x)[1:-1])
def test_calls_are_refused_by_name(mod, name, guarded):
    "At the top, beside a network, and in a tensor."
    call = N(mod, name) + RUN + b"\x85R"
    for content in (P(call), P(D(training_set_kwargs=call, G_ema=part())), P(D(G_ema=part(_parameters=D(w=N("torch._utils", "_rebuild_parameter") + call + b"\x89}\x87R"))))):
        (guarded/"evil.pkl").write_bytes(content)
        with pytest.raises(DataError) as e:
            load_nvlabs(guarded/"evil.pkl")
        shown = f"{mod}.{name}" if f"{mod}.{name}".isascii() and f"{mod}.{name}".isprintable() else ascii(f"{mod}.{name}")
        assert "evil.pkl at byte" in str(e.value) and f"it asks for {shown}. Nothing in it was run" in str(e.value) and "\x1b" not in str(e.value)


def deep(n, start=b")", step=b"\x85"):
    return start + step*n


LAUGHS = b")" + b"".join(b"2\x86" for _ in range(60))                                           # (t, t), (t, t), ...: 2**60 leaves
INSTRUCTIONS = {
    "GLOBAL of protocol 0": (b"cos\nsystem\n(S'ls'\ntR.", r"os\.system"), "INST": (P(b"(" + RUN + b"ios\nsystem\n"), r"os\.system"), "INST of an allowed name": (P(b"(icollections\nOrderedDict\n"), r"collections\.OrderedDict"), "OBJ": (P(b"(" + ODD + b"o"), "OBJ"),
    "NEWOBJ of a layer": (P(PART + b")\x81"), "makes an object"), "NEWOBJ with arguments": (P(EASY + RUN + b"\x85\x81"), "makes an object"), "NEWOBJ_EX": (P(EASY + b")}\x92"), "NEWOBJ_EX"), "EXT1": (P(b"\x82\x01"), "EXT1"), "EXT2": (P(b"\x83\x01\x01"), "EXT2"), "EXT4": (P(b"\x84\x01\x01\x01\x01"), "EXT4"),
    "PERSID": (b"Pos.system\n.", "PERSID"), "BINPERSID": (P(RUN + b"Q"), "persistent"), "NEXT_BUFFER": (P(b"\x97", protocol=5), "NEXT_BUFFER"), "READONLY_BUFFER": (P(b"N\x98", protocol=5), "READONLY_BUFFER"), "STRING": (P(b"S'x'\n"), "STRING"),
    "BUILD on a name": (P(ODD + D(x=b"N") + b"b"), "state of a Name"), "BUILD on a name, __setstate__": (P(ODD + D(__setstate__=ODD) + b"b"), "state of a Name"), "BUILD on a dictionary": (P(ODD + b")R" + D(__class__=ODD, _metadata=b"}") + b"b"), "state of a dict"), "BUILD of slots": (P(b"}" + b"N" + D(__dict__=b"N") + b"\x86b"), "state of a dict"),
    "BUILD on a layer": (P(part() + D(kind=RUN) + b"b"), "state of a Part"), "BUILD on a list": (P(b"]" + b"}b"), "state of a list"), "BUILD on a number": (P(b"K\x01}b"), "state of a int"), "BUILD on a set": (P(b"\x8f}b"), "state of a set"), "BUILD on a type": (P(N("torch", "float32") + D(itemsize=b"K\x01") + b"b"), "state of a Name"),
    "REDUCE without a tuple": (P(ODD + b"]R"), "no name"), "REDUCE of a dictionary": (P(b"})R"), "no name"), "REDUCE of a result": (P(ODD + b")R)R"), "no name"), "REDUCE of a label": (P(N("torch", "FloatStorage") + b")R"), r"calls torch\.FloatStorage"), "REDUCE of an array type": (P(N("numpy", "ndarray") + b")R"), r"calls numpy\.ndarray"),
    "OrderedDict of text": (P(ODD + RUN + b"\x85R"), "odd arguments"), "OrderedDict of odd pairs": (P(ODD + b"](K\x01\x85K\x02\x85e\x85R"), "odd arguments"), "OrderedDict of two": (P(ODD + b"]]\x86R"), "odd arguments"), "set of a dictionary": (P(N("builtins", "set") + b"}\x85R"), "odd arguments"),
    "layer of nothing": (P(PART + b")R"), "described oddly"), "layer of two": (P(PART + b"}}\x86R"), "described oddly"), "layer of text": (P(PART + RUN + b"\x85R"), "described oddly"), "layer of another type": (P(PART + D(type=S("module"), version=b"K\x06", class_name=S("G"), state=b"}") + b"\x85R"), "described oddly"),
    "layer without state": (P(PART + D(type=S("class"), version=b"K\x06", class_name=S("G"), state=b"N") + b"\x85R"), "no attributes"), "layer with an odd class": (P(PART + D(type=S("class"), version=b"K\x06", class_name=S("os.system('ls')"), state=b"}") + b"\x85R"), "odd name"), "layer of a version in words": (P(PART + D(type=S("class"), version=S("6"), class_name=S("G"), state=b"}") + b"\x85R"), "described oddly"),
    "stack empty": (P(b"0"), "stack is empty"), "only STOP": (b".", "is not a pickle"), "no mark": (P(b"t"), "mark is missing"), "SETITEMS on a tuple": (P(b")(u"), "no dict"), "SETITEM on nothing": (P(b"K\x01K\x01s"), "no dict"), "ADDITEMS on a list": (P(b"](\x90"), "no set"), "APPEND to a dictionary": (P(b"}K\x01a"), "no list"),
    "key without a value": (P(b"}(K\x01u"), "no value"), "key twice": (P(b"}(K\x01K\x02K\x01K\x03u"), "set twice"), "key is a tuple": (P(b"}()K\x01u"), "key of a dictionary is a tuple"), "key is deep": (P(b"}" + deep(60_000) + b"K\x01s"), "key of a dictionary is a tuple"), "key is a layer": (P(b"}" + part() + b"K\x01s"), "is a Part"),
    "keys that collide": (P(b"}(" + b"".join(b"\x8a\x10" + int.to_bytes(k*(2**61 - 1), 16, "little") + b"N" for k in range(1, 50_000)) + b"u"), "key of a dictionary is a int"), "set of tuples": (P(b"\x8f(" + deep(60_000) + b"\x90"), "set holds a tuple"), "numbers in a set that collide": (P(b"\x8f(" + b"".join(b"\x8a\x10" + int.to_bytes(k*(2**61 - 1), 16, "little") for k in range(1, 50_000)) + b"\x90"), "set holds a int"),
    "memo empty": (P(b"h\x07"), "never filled"), "memo of nothing": (P(b"q\x07"), "nothing to remember"), "memo at 2^32": (P(b"]r\xff\xff\xff\xff0j\xff\xff\xff\xff"), "no networks"), "memo at 10^50": (P(b"]p" + b"9"*50 + b"\n"), "no networks|memo"), "memo at a power sign": (P("]p²\n".encode("latin-1")), "makes no sense"),
    "memo at -1": (P(b"]p-1\n"), "memo place"), "protocol 200": (b"\x80\xc8].", "protocol 200"), "unknown instruction": (P(b"\xff"), "not a pickle"), "number of 2 GB": (P(b"\x8b\xff\xff\xff\x7f"), "2,147,483,647 bytes"), "number of -5 bytes": (P(b"\x8b\xfb\xff\xff\xff"), "-5 bytes"), "number of 255 bytes": (P(b"\x8a\xff" + bytes(255)), "255 bytes"),
    "text of 4 GB": (P(b"X\xff\xff\xff\xff"), "declares 4,294,967,295"), "text of 2^63": (P(b"\x8d" + b"\xff"*7 + b"\x7f"), "declares"), "bytes of 2^64": (P(b"\x8e" + b"\xff"*8), "declares"), "bytes of -1": (P(b"T\xff\xff\xff\xff"), "declares -1"), "line without end": (P(b"c" + b"a"*100_000), "no end"), "number in words": (P(b"Ihello\n"), "not a number"),
    "integer of many digits": (P(b"L" + b"9"*4000 + b"L\n"), "no networks"), "a million steps": (P(b"N0"*200_000), "300,000 instructions"), "text over and over": (P(b"".join(b"X" + struct.pack("<I", 2**20) + bytes(2**20) + b"0" for _ in range(66))), "bytes of text"),
    "left over": (P(b"NN"), "left over"), "something follows": (P(b"]") + b"more", "4 bytes follow"), "no end": (b"\x80\x04}", "cut off"), "half a number": (b"\x80\x04J\x01", "cut off"), "frame": (b"\x80\x04\x95\xff\xff", "cut off"), "text is no text": (P(N("os", "system").replace(b"system", b"\xff\xfe\xfd\xfc\xfb\xfa")), "it asks for"),
    "TensorFlow": (b"\x80\x04" + N("dnnlib.tflib.network", "Network") + b".", "TensorFlow pickle.*legacy.py"), "TensorFlow, older": (b"\x80\x03cdnnlib.tflib.network\nNetwork\nq\x00.", "TensorFlow"),
    "a list": (P(b"]"), "holds no networks"), "a number": (P(b"K\x01"), "holds no networks"), "a tuple of three": (P(b"NNN\x87"), "holds no networks"), "a layer alone": (P(part()), "single Generator"), "an empty dictionary": (P(b"}"), "holds no networks"), "a dictionary of numbers": (P(b"}(K\x01K\x02u"), "holds no networks"),
    "network is None": (P(D(G_ema=b"N")), "NoneType, not a network"), "network is a list": (P(D(G_ema=b"]")), "list, not a network"), "network is empty": (P(D(G_ema=b"}")), "not a network"), "network is text": (P(D(G_ema=RUN)), "str, not a network"), "network of numbers": (P(D(G_ema=D(a=b"K\x01"))), "something else than tensors"),
    "another class": (P(D(G_ema=part("MappingNetwork"))), "is a MappingNetwork"), "no arguments": (P(D(G_ema=part())), "_init_kwargs is missing"), "arguments are a list": (P(D(G_ema=part(_init_kwargs=b"]"))), "_init_kwargs is missing"), "arguments are deep": (P(D(G_ema=part(_init_kwargs=D(z_dim=deep(60_000, b")"))))), "nested too deeply"),
    "arguments double 60 times": (P(D(G_ema=part(_init_kwargs=D(z_dim=LAUGHS)))), "nested too deeply"), "arguments hold themselves": (P(D(G_ema=part(_init_kwargs=b"}\x94" + S("z_dim") + b"h\x00s"))), "nested too deeply"), "arguments hold a class": (P(D(G_ema=part(_init_kwargs=D(z_dim=ODD)))), "no plain value"), "arguments hold a layer": (P(D(G_ema=part(_init_kwargs=D(z_dim=part())))), "no plain value"),
    "too many arguments": (P(D(G_ema=part(_init_kwargs=b"}", _init_args=b"(" + b"K\x04"*9 + b"t"))), "too many arguments"), "an argument twice": (P(D(G_ema=part(_init_kwargs=D(z_dim=b"K\x04"), _init_args=b"K\x04\x85"))), "one twice"), "data set holds a layer": (P(D(G_ema=b"N", training_set_kwargs=part())), "not a network"),
    "tuples in tuples": (P(b"N" + deep(60_000, b"", b"\x85")), "holds no networks"), "lists in lists": (P(b"]"*5 + b"a"*4), "holds no networks"), "dictionaries in dictionaries": (P(b"}" + b"".join(S("a") + b"}" for _ in range(20_000)) + b"s"*20_000), "holds no networks"),
}


def refused(path, content, message):
    "A file with this content is a DataError that names it and says why, shortly."
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as e:
        load_nvlabs(path)
    assert path.name in str(e.value) and len(str(e.value)) < 700


@pytest.mark.parametrize("kind", INSTRUCTIONS)
def test_hostile_instructions(kind, guarded):
    refused(guarded/"evil.pkl", *INSTRUCTIONS[kind])


# --- tensors ---------------------------------------------------------------------------------------------------------------

def payload(tensor):
    "The bytes of a tensor's storage in a pickle."
    return max((arg for _, arg, _ in pickletools.genops(pickle.dumps(tensor, 4)) if isinstance(arg, bytes)), key=len)


PAYLOAD = payload(torch.arange(1., 7))
START = len(PAYLOAD) - 24


def blob(payload=PAYLOAD):
    return N("torch.storage", "_load_from_bytes") + b"B" + struct.pack("<I", len(payload)) + payload + b"\x85R"


def whole(n):
    return b"\x8a\x10" + int.to_bytes(n, 16, "little", signed=True)


def tup(*items):
    return b"(" + b"".join(items) + b"t"


def tensor(storage=None, offset=0, size=(6,), stride=(1,), more=b"\x89}"):
    of = lambda x: x if isinstance(x, bytes) else tup(*(i if isinstance(i, bytes) else whole(i) for i in x)) if isinstance(x, tuple) else whole(x)
    return N("torch._utils", "_rebuild_tensor_v2") + MARK + (blob() if storage is None else storage) + of(offset) + of(size) + of(stride) + more + b"tR"


def patched(old, new):
    assert PAYLOAD.count(old) >= 1
    return PAYLOAD.replace(old, new, 1)


TENSORS = {
    "too many": (tensor(size=(7,)), "does not fit"), "offset": (tensor(offset=1), "does not fit"), "80 GB": (tensor(size=(10**5, 2*10**5), stride=(2*10**5, 1)), "does not fit"), "2^40 squared": (tensor(size=(2**39, 2**39), stride=(1, 1)), "does not fit"), "overflow of 64 bits": (tensor(size=(2**32, 2**32 + 1), stride=(0, 0)), "does not fit"),
    "2^63": (tensor(size=(2**63,)), "odd storage, shape"), "2^100": (tensor(size=(2**100,)), "odd storage, shape"), "stride 0": (tensor(size=(2**30,), stride=(0,)), "does not fit"), "stride of 2^38": (tensor(size=(2,), stride=(2**38,)), "does not fit"), "negative stride": (tensor(offset=5, stride=(-1,)), "odd storage"), "negative offset": (tensor(offset=-1), "odd storage"),
    "negative size": (tensor(size=(-6,)), "odd storage"), "two negative sizes": (tensor(size=(-2, -3), stride=(1, 1)), "odd storage"), "strides missing": (tensor(size=(2, 3), stride=(1,)), "odd storage"), "nine axes": (tensor(size=(1,)*9, stride=(1,)*9), "odd storage"), "100,000 axes": (tensor(size=(1,)*10_000, stride=(1,)*10_000), "odd storage"), "size is true": (tensor(size=(b"\x88",)), "odd storage"),
    "size is a float": (tensor(size=(b"G" + struct.pack(">d", 6.),)), "odd storage"), "size is text": (tensor(size=S("6")), "odd storage"), "size is a list": (tensor(size=b"]"), "odd storage"), "storage is text": (tensor(storage=S("x")), "odd storage"), "storage is None": (tensor(storage=b"N"), "odd storage"), "storage is a tensor": (tensor(storage=tensor()), "odd storage"),
    "no arguments": (N("torch._utils", "_rebuild_tensor_v2") + b")R", "odd arguments"), "parameter of text": (N("torch._utils", "_rebuild_parameter") + RUN + b"\x89}\x87R", "odd arguments"), "parameter of nothing": (N("torch._utils", "_rebuild_parameter") + b")R", "odd arguments"), "device of a number": (N("torch", "device") + b"K\x01\x85R", "odd arguments"),
    "payload empty": (tensor(blob(b"")), "cut off"), "payload cut in its head": (tensor(blob(PAYLOAD[:60])), "cut off|declares"), "payload cut in its numbers": (tensor(blob(PAYLOAD[:-4])), "has 20 bytes"), "payload with more": (tensor(blob(PAYLOAD + b"1234")), "has 28 bytes"), "payload of text": (N("torch.storage", "_load_from_bytes") + S("x") + b"\x85R", "no string of bytes"), "payload of nothing": (N("torch.storage", "_load_from_bytes") + b")R", "no string of bytes"),
    "payload that runs": (tensor(blob(P(N("os", "system") + RUN + b"\x85R"))), r"it asks for os\.system"), "payload of a layer": (tensor(blob(PAYLOAD.replace(b"ctorch\nFloatStorage\n", b"ctorch_utils.persistence\n_reconstruct_persistent_obj\n"))), "described oddly"), "payload asks in its third part": (tensor(blob(patched(b"ctorch\nFloatStorage\n", b"cposix\nsystem\n"))), r"posix\.system"),
    "payload is a zip": (tensor(blob(b"PK\3\4" + bytes(100))), "PERSID"), "payload is gzip": (tensor(blob(gzip.compress(PAYLOAD))), "not a pickle|cut off"), "another magic number": (tensor(blob(patched(b"\x8a\nl\xfc", b"\x8a\nl\xfd"))), "not in torch's format"), "another version": (tensor(blob(patched(b"M\xe9\x03.", b"M\xea\x03."))), "another version"), "big-endian": (tensor(blob(patched(b"q\x02\x88", b"q\x02\x89"))), "byte order"),
    "count of 2^39": (tensor(blob(patched(b"K\x06Nt", b"\x8a\x05\x00\x00\x00\x00\x7fNt"))), "numbers of 4 bytes has"), "count of -6": (tensor(blob(patched(b"K\x06Nt", b"J\xfa\xff\xff\xffNt"))), "odd length"), "two counts": (tensor(blob(PAYLOAD[:START - 8] + struct.pack("<q", 7) + PAYLOAD[START:])), "has 24 bytes"), "a view": (tensor(blob(patched(b"K\x06Nt", b"K\x06K\x01t"))), "is a view"),
    "quantised numbers": (tensor(blob(patched(b"FloatStorage", b"QInt8Storage"))), r"torch\.QInt8Storage"), "complex numbers": (tensor(blob(patched(b"FloatStorage", b"ComplexFloatStorage"))), "ComplexFloatStorage"), "untyped": (tensor(blob(patched(b"ctorch\nFloatStorage", b"ctorch.storage\nUntypedStorage"))), "UntypedStorage"), "doubles instead": (tensor(blob(patched(b"FloatStorage", b"DoubleStorage"))), "numbers of 8 bytes has 24"),
    "numpy type of objects": (N("numpy", "dtype") + S("O8") + b"\x89\x88\x87R", "type 'O8' is not plain"), "numpy type of records": (N("numpy", "dtype") + S("V16") + b"\x89\x88\x87R", "V16"), "numpy number too short": (N("numpy.core.multiarray", "scalar") + N("numpy", "dtype") + S("f8") + b"\x89\x88\x87RC\x04abcd\x86R", "has 4 bytes"), "numpy number of no type": (N("numpy._core.multiarray", "scalar") + b"NC\x04abcd\x86R", "odd type"),
    "numpy array of 2^40": (N("numpy.core.multiarray", "_reconstruct") + N("numpy", "ndarray") + b"K\x00\x85C\x01b\x87R" + tup(b"K\x01", tup(whole(2**19), whole(2**19)), N("numpy", "dtype") + S("f8") + b"\x89\x88\x87R", b"\x89", b"C\x00") + b"b", "has 0 bytes"), "numpy array of 2^70": (N("numpy.core.multiarray", "_reconstruct") + b")R" + tup(b"K\x01", tup(whole(2**70)), b"NNN") + b"b", "odd"),
    "numpy array of an odd state": (N("numpy.core.multiarray", "_reconstruct") + b")R}b", "odd state"), "big-endian numpy": (N("numpy", "dtype") + S("f8") + b"\x89\x88\x87R" + tup(b"K\x03", S(">"), b"NNN") + b"b", "little-endian"),
}


@pytest.mark.parametrize("kind", TENSORS)
def test_hostile_tensors(kind, guarded):
    content, message = TENSORS[kind]
    (guarded/"evil.pkl").write_bytes(P(D(G_ema=part(_parameters=D(w=content), _init_kwargs=b"}"))))
    with pytest.raises(DataError, match=message) as e:
        load_nvlabs(guarded/"evil.pkl")
    assert "evil.pkl" in str(e.value) and len(str(e.value)) < 700


def test_the_same_tensor_a_hundred_thousand_times(guarded):
    "Pointing at one storage over and over costs nothing and is refused."
    big = payload(torch.zeros(100_000))
    one = tensor(blob(big), size=(100_000,))
    many = b"}(" + S("w0") + one + b"\x94" + b"".join(S(f"w{k}") + b"h\x00" for k in range(1, 40_000)) + b"u"
    (guarded/"evil.pkl").write_bytes(P(D(G_ema=part(_parameters=many, _init_kwargs=D(z_dim=b"K\x08", c_dim=b"K\x00", w_dim=b"K\x08", img_resolution=b"K\x08", img_channels=b"K\x03")))))
    with pytest.raises(DataError, match="there more than once"):
        load_nvlabs(guarded/"evil.pkl")


def test_the_same_payload_over_and_over(guarded):
    again = b"\x94" + b"".join(b"0h\x01h\x02\x85R" for _ in range(70_000))
    (guarded/"evil.pkl").write_bytes(P(N("torch.storage", "_load_from_bytes") + b"\x94" + b"0" + S("x") + b"\x94" + b"0" + b"B" + struct.pack("<I", len(PAYLOAD)) + PAYLOAD + b"\x94" + b"h\x00h\x02\x85R" + again.replace(b"h\x01", b"h\x00")))
    with pytest.raises(DataError, match="instructions"):
        load_nvlabs(guarded/"evil.pkl")


# --- networks that are not what they say ---------------------------------------------------------------------------------------

def altered(**change):
    return lambda x: {**x.config, **change} if isinstance(x, Generator) else x.config


def damage(name, tensor=None, kind="_parameters"):
    "Replace or remove an entry of the layer `synthesis.b8.conv1`."
    def change(x, held):
        if type(x).__name__ == "SynthesisLayer" and x.resolution == 8 and x.up == 1:
            held[kind] = {k: v for k, v in held[kind].items() if k != name} | ({} if tensor is None else {name: tensor})
    return change


def nested(x, held):
    if isinstance(x, Generator):
        held["_modules"] = {"a": x}


SHAPE = NETS["G"].synthesis.b8.conv1.weight.shape
WRONG = {
    "unknown argument": (dict(arguments=altered(magnitude_ema_beta=.999)), "magnitude_ema_beta.*another network"), "unknown argument of the mapping": (dict(arguments=altered(mapping_kwargs=dict(num_layers=2, code="x"))), "'code'"), "unknown argument of the synthesis": (dict(arguments=altered(synthesis_kwargs=dict(kernel="x"))), "'kernel'"),
    "resolution 2^30": (dict(arguments=altered(img_resolution=2**30)), "4 to 4096"), "resolution 17": (dict(arguments=altered(img_resolution=17)), "power of two"), "resolution 32": (dict(arguments=altered(img_resolution=32)), "lacks"), "resolution -16": (dict(arguments=altered(img_resolution=-16)), "4 to 4096"), "resolution true": (dict(arguments=altered(img_resolution=True)), "4 to 4096"),
    "a billion layers": (dict(arguments=altered(mapping_kwargs=dict(num_layers=10**9))), "1 to 64"), "64 layers": (dict(arguments=altered(mapping_kwargs=dict(num_layers=64))), "lacks"), "one layer": (dict(arguments=altered(mapping_kwargs=dict(num_layers=1))), "has unknown"), "z of 60,000": (dict(arguments=altered(z_dim=60_000)), "describe a network|wrong shapes"), "w of 65,536": (dict(arguments=altered(w_dim=65_536)), "describe a network"),
    "z of 10^12": (dict(arguments=altered(z_dim=10**12)), "z_dim must be"), "z in words": (dict(arguments=altered(z_dim="512")), "z_dim must be"), "z NaN": (dict(arguments=altered(z_dim=math.nan)), "z_dim must be"), "channels of 2^20": (dict(arguments=altered(synthesis_kwargs=dict(channel_base=2**20, channel_max=16384))), "describe a network"), "channels of 0": (dict(arguments=altered(synthesis_kwargs=dict(channel_base=4))), "can be made|channel_base"),
    "clamp NaN": (dict(arguments=altered(synthesis_kwargs=dict(conv_clamp=math.nan))), "conv_clamp must be"), "clamp in words": (dict(arguments=altered(synthesis_kwargs=dict(conv_clamp="256"))), "conv_clamp must be"), "architecture evil": (dict(arguments=altered(synthesis_kwargs=dict(architecture="evil"))), "orig, skip, resnet"), "architecture a list": (dict(arguments=altered(synthesis_kwargs=dict(architecture=["skip"]))), "orig, skip, resnet"),
    "activation of code": (dict(arguments=altered(mapping_kwargs=dict(num_layers=2, activation="__import__('os')"))), "activation must be"), "filter of a million": (dict(arguments=altered(synthesis_kwargs=dict(resample_filter=[1]*15_000))), "1 to 16 numbers"), "filter of text": (dict(arguments=altered(synthesis_kwargs=dict(resample_filter=["a"]))), "1 to 16 numbers"), "filter of zeros": (dict(arguments=altered(synthesis_kwargs=dict(resample_filter=[]))), "1 to 16 numbers"),
    "mapping is a list": (dict(arguments=altered(mapping_kwargs=[1])), "must be a dictionary"), "arguments missing": (dict(arguments=lambda x: dict(z_dim=8)), "lack c_dim, w_dim"), "another class": (dict(kinds=dict(Generator="Network")), "is a Network"), "a discriminator in its place": (dict(kinds=dict(Generator="Discriminator")), "which it does not take"),
    "tensor missing": (dict(change=damage("bias")), r"lacks synthesis\.b8\.conv1\.bias"), "tensor too many": (dict(change=damage("extra", torch.zeros(1))), r"has unknown synthesis\.b8\.conv1\.extra"), "another shape": (dict(change=damage("weight", torch.zeros(1, 2, 3, 3))), r"wrong shapes: synthesis\.b8\.conv1\.weight"), "flattened": (dict(change=damage("weight", torch.zeros(SHAPE.numel()))), "wrong shapes"), "scalar": (dict(change=damage("weight", torch.tensor(1.))), "wrong shapes"),
    "NaN": (dict(change=damage("weight", torch.full(SHAPE, math.nan))), r"not finite in synthesis\.b8\.conv1\.weight"), "infinite": (dict(change=damage("bias", torch.full((SHAPE[0],), math.inf))), "not finite"), "1e300 as double": (dict(change=damage("bias", torch.full((SHAPE[0],), 1e300, dtype=torch.float64))), "not finite"), "complex": (dict(change=damage("bias", torch.zeros(SHAPE[0], dtype=torch.complex64))), "Complex"),
    "name with a dot": (dict(change=damage("conv.weight", torch.zeros(1))), "odd name"), "empty name": (dict(change=damage("", torch.zeros(1))), "odd name"), "name with a slash": (dict(change=damage("../x", torch.zeros(1))), "odd name"), "name twice": (dict(change=damage("weight", torch.zeros(SHAPE), "_buffers")), "one twice"), "name is a number": (dict(change=damage(3, torch.zeros(1))), "odd name"), "parameter is text": (dict(change=damage("weight", "x")), "is a str instead of a Tensor"),
    "layer is a tensor": (dict(change=damage("affine", torch.zeros(1), "_modules")), "Tensor instead of a Part"), "no parameters": (dict(change=lambda x, held: held.pop("_parameters") if type(x).__name__ == "ToRGBLayer" else None), "has no _parameters"), "buffers are a list": (dict(change=lambda x, held: held.update(_buffers=[]) if type(x).__name__ == "ToRGBLayer" else None), "has no _buffers"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_networks_that_are_not_what_they_say(kind, guarded):
    how, message = WRONG[kind]
    (guarded/"odd.pkl").write_bytes(official(dict(G_ema=NETS["G_ema"]), marker="ran", **how))
    with pytest.raises(DataError, match=message) as e:
        load_nvlabs(guarded/"odd.pkl")
    assert "odd.pkl" in str(e.value) and len(str(e.value)) < 700


def test_layers_that_hold_themselves_or_are_too_deep(guarded):
    me = part(_init_kwargs=D(z_dim=b"K\x08", c_dim=b"K\x00", w_dim=b"K\x08", img_resolution=b"K\x08", img_channels=b"K\x03"), _modules=b"}\x94")
    itself = P(D(G_ema=me + b"\x94" + b"0h\x00" + S("a") + b"h\x01s0h\x01"))
    held = dict(_init_kwargs=D(z_dim=b"K\x08", c_dim=b"K\x00", w_dim=b"K\x08", img_resolution=b"K\x08", img_channels=b"K\x03"))
    chain = part("Layer")
    for _ in range(40):
        chain = part("Layer", _modules=D(a=chain))
    wide = b"}(" + S("a0") + part("Layer") + b"\x94" + b"".join(S(f"a{k}") + b"h\x00" for k in range(1, 20_000)) + b"u"
    for content in (itself, P(D(G_ema=part(**held, _modules=D(a=chain)))), P(D(G_ema=part(**held, _modules=wide)))):
        (guarded/"evil.pkl").write_bytes(content)
        with pytest.raises(DataError, match="nested too deeply, or holds itself"):
            load_nvlabs(guarded/"evil.pkl")
    for _ in range(1000):
        chain = part("Layer", _modules=D(a=chain)) if len(chain) < 200_000 else chain
    (guarded/"evil.pkl").write_bytes(P(chain))
    with pytest.raises(DataError, match="single Layer"):
        load_nvlabs(guarded/"evil.pkl")


# --- files that are no such pickle ----------------------------------------------------------------------------------------------

def zip_of(entries, method=zipfile.ZIP_STORED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as z:
        for name, content in entries:
            z.writestr(name, content)
    return buffer.getvalue()


def saved(x, **options):
    buffer = io.BytesIO()
    torch.save(x, buffer, **options)
    return buffer.getvalue()


class Runs:
    def __reduce__(self):
        return eval, ("open('ran', 'w')",)


STATES = dict(G_ema=NETS["G_ema"].state_dict())
PKL = zipfile.ZipFile(io.BytesIO(saved(STATES))).read("archive/data.pkl")
FILES = {
    "empty": (b"", "is empty"), "gzip": (gzip.compress(GOOD), "gzip archive.*gunzip"), "bzip2": (b"BZh91AY" + bytes(20), "bzip2"), "xz": (b"\xfd7zXZ\0" + bytes(20), "xz archive"), "web page": (b"\n  <!DOCTYPE html><html>404</html>", "web page"), "web page in capitals": (b"\xef\xbb\xbf<HTML>", "web page"), "XML": (b"<?xml version='1.0'?><Error/>", "web page"),
    "git-lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git-lfs"), "numpy": (b"\x93NUMPY\1\0", "numpy array"), "HDF5": (b"\x89HDF\r\n", "HDF5"), "text": (b"this is no pickle", "is not a pickle: it begins with b'this"), "zeros": (bytes(1000), "not a pickle"), "JSON": (b'{"G_ema": 1}', "not a pickle"), "PNG": (b"\x89PNG\r\n\x1a\n" + bytes(50), "is not a pickle"),
    "torch's old format": (saved(STATES, _use_new_zipfile_serialization=False), "before 2020"), "zip of pictures": (zip_of([("a.png", b"x")]), "without one data.pkl"), "zip, empty": (zip_of([]), "without one data.pkl"), "zip, two pickles": (zip_of([("a/data.pkl", b"]."), ("b/data.pkl", b"].")]), "without one data.pkl"),
    "zip that runs": (saved(dict(G_ema=Runs())), r"it asks for __builtin__\.eval"), "zip that runs inside": (saved(dict(G_ema=dict(NETS["G_ema"].state_dict(), x=Runs()))), r"__builtin__\.eval"), "zip of modules": (saved(dict(G_ema=torch.nn.Linear(1, 1))), r"torch\.nn\.modules\.linear\.Linear"), "zip of compressed entries": (zip_of([("a/data.pkl", bytes(10**6))], zipfile.ZIP_DEFLATED), "is compressed"),
    "zip without its numbers": (zip_of([("archive/data.pkl", PKL)]), "no storage '0'"), "zip with short numbers": (zip_of([("archive/data.pkl", PKL), ("archive/data/0", b"abc")]), "should have"), "zip cut off": (saved(STATES)[:5000], "no list of contents|cut off"), "zip, big-endian": (zip_of([("archive/data.pkl", PKL), ("archive/byteorder", b"big")]), "little-endian"),
    "zip of something else": (saved([1, 2]), "holds no networks"), "zip of another network": (saved(dict(G_ema=dict(w=torch.zeros(3)))), "no state dict of StyleGAN2-ADA"), "zip of names": (saved(dict(G_ema={"synthesis.b4.conv1.weight": torch.zeros(3)})), "no state dict"), "zip of names, huge": (saved(dict(G_ema={f"synthesis.b{r}.conv1.weight": torch.zeros(1) for r in (4, 9999)})), "no state dict|must be"),
    "zip of half a network": (saved(dict(G_ema={k: v for k, v in STATES["G_ema"].items() if "noise_strength" not in k})), "lacks synthesis.*noise_strength"), "zip with NaN": (saved(dict(G_ema={k: v*math.nan for k, v in STATES["G_ema"].items()})), "not finite"), "zip of odd arguments": (saved(dict(G_ema=dict(class_name="Generator", arguments=dict(GIVEN, img_resolution=2**40), state_dict=STATES["G_ema"]))), "img_resolution must be"),
    "zip of an odd class": (saved(dict(G_ema=dict(class_name="os.system", arguments={}, state_dict=STATES["G_ema"]))), "does not say what it is"), "safetensors": (struct.pack("<Q", 10) + b'{"a":[0]}  ' + bytes(20), "safetensors"), "cut off": (GOOD[:len(GOOD)//2], "cut off|declares"), "cut at the end": (GOOD[:-1], "cut off"), "first byte missing": (GOOD[1:], "is not a pickle"), "twice": (GOOD*2, "bytes follow"),
    "an allowed pickle of lists": (pickle.dumps([[1, 2], {"a": 3}]), "holds no networks"), "a module": (pickle.dumps(torch.nn.Linear(2, 2)), r"torch\.nn\.modules\.linear\.Linear"), "a data frame": (pickle.dumps(__import__("pandas").DataFrame(dict(a=[1]))), "it asks for pandas"), "a function": (pickle.dumps(math.sqrt), r"math\.sqrt"), "an exception": (pickle.dumps(ValueError("x")), r"builtins\.ValueError"), "protocol 0": (pickle.dumps({"G": Runs()}, 0), r"UNICODE"),
    "protocol 1": (pickle.dumps({"G": Runs()}, 1), r"__builtin__\.eval"), "protocol 2": (pickle.dumps({"G": Runs()}, 2), r"__builtin__\.eval"), "protocol 5": (pickle.dumps({"G": Runs()}, 5), r"builtins\.eval"),
}


@pytest.mark.parametrize("kind", FILES)
def test_files_that_are_no_such_pickle(kind, guarded):
    refused(guarded/"file.pkl", *FILES[kind])


def test_things_that_are_no_files(guarded):
    os.mkfifo(guarded/"pipe")
    (guarded/"folder").mkdir()
    (guarded/"loop").symlink_to(guarded/"loop")
    (guarded/"sparse").touch()
    os.truncate(guarded/"sparse", 2**34)
    (guarded/"zeros").touch()
    os.truncate(guarded/"zeros", 2**32)
    for name in ("pipe", "folder", "sparse", "zeros", "/dev/zero", "/dev/null"):
        with pytest.raises(DataError, match=Path(name).name):
            load_nvlabs(guarded/name)
    for name in ("loop", "absent"):
        with pytest.raises(MissingWeights, match=name):
            load_nvlabs(guarded/name)


@pytest.mark.parametrize("seed", range(60))
def test_random_damage(seed, guarded):
    "Cut, flipped and overwritten anywhere: the networks or a DataError, nothing else, and quickly."
    draw = np.random.default_rng(seed)
    content = bytearray(GOOD if seed % 3 else saved(STATES))
    places = draw.integers(0, len(content), 1 + seed % 5) if seed % 2 else draw.integers(0, 3000, 1 + seed % 5)
    for at in places:
        content[at:at + 1 + seed % 4] = draw.bytes(1 + seed % 4)
    if seed % 7 == 0:
        content = content[:draw.integers(1, len(content))]
    (guarded/"x.pkl").write_bytes(content)
    try:
        net = load_nvlabs(guarded/"x.pkl")
        assert isinstance(net, Generator)
    except DataError as e:
        assert "x.pkl" in str(e)


@pytest.mark.parametrize("seed", range(20))
def test_random_instructions(seed, guarded):
    "Pieces of real and hostile pickles in random order."
    draw = np.random.default_rng(seed)
    pieces = [b"(", b"t", b"u", b"s", b"}", b"]", b")", b"R", b"b", b"\x81", b"o", b"\x94", b"h\x00", b"h\x01", b"0", b"2", b"N", b"K\x01", b"\x85", b"\x86", b"Q", b"\x93", b"a", b"e", b"d", b"l", b"\x8f", b"\x90", b"\x91", S("x"), S("state"), ODD, EASY, PART, part(), tensor(), blob(), N("torch", "float32"), N("torch", "Size"), N("numpy", "dtype"), b"\x8a\x02\x01\x01", b"p1\n", b"g1\n", b"I01\n"]
    for _ in range(100):
        (guarded/"x.pkl").write_bytes(P(*(pieces[k] for k in draw.integers(0, len(pieces), draw.integers(1, 40)))))
        with pytest.raises(DataError, match=r"x\.pkl"):
            load_nvlabs(guarded/"x.pkl")


def test_there_are_enough_hostile_files():
    assert len(CALLED) + len(INSTRUCTIONS) + len(TENSORS) + len(WRONG) + len(FILES) >= 250


def test_nothing_is_left_in_the_walk(tmp_path):
    "Two files one after the other do not see each other."
    (tmp_path/"a.pkl").write_bytes(GOOD)
    first = open_pickle(tmp_path/"a.pkl")[0]
    (tmp_path/"b.pkl").write_bytes(P(b"h\x00"))
    with pytest.raises(DataError, match="never filled"):
        open_pickle(tmp_path/"b.pkl")
    assert list(first) == ["training_set_kwargs", "G", "D", "G_ema", "augment_pipe"]
