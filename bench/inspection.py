"""How many planted faults an inspection finds: rendered faces, and LFW where HYPERFACE_DATA has it.

    python bench/inspection.py [rendered] [lfw]      figures as on the page nbs/84a_inspection.ipynb

Faults are planted in pictures, not in vectors: labels are spoilt, copies are saved again, mirrored or moved by two pixels
and embedded, and the training set of the leak test holds *other* pictures of people of the set. LFW is used as it is, its own
label errors included; they count as false alarms here. Nothing of a data set is written.
"""
import sys

import numpy as np
import pandas as pd

from hyperface.core import data_dir, models_dir, rng
from hyperface.data.formats import read_dataset
from hyperface.data.images import decode_image, encode_image
from hyperface.data.records import Records
from hyperface.data.rendered import render_faces
from hyperface.extraction.embed import Embeddings, embed_records, load_embedder
from hyperface.metrics.quality import plant_faults, precision_recall_of
from hyperface.report.inspection import Rules, inspect_dataset


def copy_of(picture, k):
    return (decode_image(encode_image(picture, "jpg", 60)), np.ascontiguousarray(picture[:, ::-1]), np.roll(picture, 2, axis=1))[k % 3]


def plant(records, name, embedder, wrong, split, copies, seed):
    "Embeddings with spoilt labels, and what was planted."
    e = embed_records(records, embedder)
    who = np.array([str(v) for v in records.identities])
    _, labels, truth = plant_faults(e.vectors, who, wrong, split, copies, seed=seed)
    source = [a for a, _ in sorted(truth["copies"], key=lambda pair: pair[1])]
    again = embedder.embed(np.stack([copy_of(records.pixels(i), k) for k, i in enumerate(source)]).transpose(0, 3, 1, 2))
    vectors = np.concatenate([e.vectors, again])
    blank = Records.from_arrays(np.zeros((len(vectors), 8, 8, 3), np.uint8), name, identity=list(labels))          # the pictures are not looked at again
    return blank, Embeddings(vectors), truth, np.r_[who, who[source]]


def score(name, records, training, leaked, embedder, wrong, split, copies, seed=0):
    "One row per kind of finding: planted, found, precision, recall."
    blank, vectors, truth, who = plant(records, name, embedder, wrong, split, copies, seed)
    trained = embed_records(training, embedder)
    empty = Records.from_arrays(np.zeros((len(training), 8, 8, 3), np.uint8), "training", identity=[str(v) for v in training.identities])
    out = []
    for rules, how in ((Rules(centre=False), "as printed"), (Rules(), "default")):
        r = inspect_dataset(blank, embeddings=vectors, train=empty, train_embeddings=Embeddings(trained.vectors), rules=rules, estimate=False)
        f = {k: g for k, g in r.findings.groupby("kind")}
        rows = lambda kind: f[kind].row.tolist() if kind in f else []
        two = lambda kind, a, b: [tuple(sorted(p)) for p in zip(f[kind][a], f[kind][b])] if kind in f else []
        kinds = dict(wrong_folder=(rows("wrong_folder"), truth["wrong_folder"]), wrong_or_outlier=(rows("wrong_folder") + rows("outlier"), truth["wrong_folder"]),
                     split=(two("split", "identity", "other_identity"), truth["split"]), duplicate=(two("duplicate", "row", "other_row"), truth["copies"]), leak=(rows("leak"), np.flatnonzero(np.isin(who, leaked))))
        suggested = f["wrong_folder"] if "wrong_folder" in f else r.findings.iloc[:0]
        right = np.mean([who[i] == o for i, o in zip(suggested.row, suggested.other_identity) if i in set(truth["wrong_folder"])]) if len(suggested) else np.nan
        for kind, (found, planted) in kinds.items():
            p, q = precision_recall_of(found, planted)
            out.append((name, embedder.name, how + (", centred" if r.faults.mean is not None else ""), kind, len(planted), len(set(found)), p, q, right if kind == "wrong_folder" else np.nan, r.faults.noise["eer_rate"], r.faults.printed["impostor_mean"]))
    return pd.DataFrame(out, columns=["set", "embedder", "rules", "finding", "planted", "found", "precision", "recall", "suggestion right", "EER", "strangers"])


def rendered(embedder, seed=5):
    "60 people with 6 pictures; training: 100 strangers, and 3 other pictures of 12 of the 60."
    faces = render_faces(60, 9, seed=seed)
    at, who = np.arange(len(faces)) % 9, np.asarray(faces.identities)
    strangers, leaked = render_faces(100, 6, seed=77), faces.select((at >= 6) & (who < 12))
    training = Records.from_arrays(np.stack([r.pixels(i) for r in (strangers, leaked) for i in range(len(r))]), "training", identity=[str(1000 + i) for i in strangers.identities] + [str(i) for i in leaked.identities])
    return score("rendered 60 x 6", faces.select(at < 6), training, [str(i) for i in range(12)], embedder, 18, 5, 18, 3)


def lfw(embedder, least, seed=0):
    "People with at least `least` pictures; training: all pictures of a third of the people, and one picture of 100 of the others."
    records = read_dataset(data_dir("lfw"))
    who = np.array([str(v) for v in records.identities])
    names, counts = np.unique(who, return_counts=True)
    gen = rng(seed, "bench inspection")
    order = gen.permutation(names)
    trained, rest = order[:len(order)//3], order[len(order)//3:]
    many = rest[counts[np.searchsorted(names, rest)] >= max(least, 2)]
    leaked = many[:100]
    first = np.array([np.flatnonzero(who == n)[0] for n in leaked])
    kept = np.isin(who, rest[counts[np.searchsorted(names, rest)] >= least])
    kept[first] = False
    training = records.select(np.flatnonzero(np.isin(who, trained)).tolist() + first.tolist())
    return score(f"LFW, {least}+ pictures: {kept.sum():,}", records.select(kept), training, leaked, embedder, 100, 30, 60, seed)


if __name__ == "__main__":
    wanted = sys.argv[1:] or ["rendered", "lfw"]
    real = models_dir() is not None and (models_dir()/"w600k_mbf_dequant_fp32.onnx").exists()
    tables = []
    if "rendered" in wanted: tables += [rendered(load_embedder(m)) for m in (["w600k_mbf_dequant_fp32"] if real else []) + ["linear"]]
    if "lfw" in wanted and real and data_dir("lfw") is not None: tables += [lfw(load_embedder("w600k_mbf_dequant_fp32", flip="flip" in wanted), n) for n in (4, 1)]
    for table in tables: print(table.round(3).to_string(index=False), "\n")
