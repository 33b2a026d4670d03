"""Extraction against the bare network: how much of onnxruntime's batch rate survives decoding, checking and bookkeeping.

    python bench/extract.py [--model NAME.onnx] [--images 512] [--threads N] [--rounds 4] [--flip] [--out FILE.json]

Bare: onnxruntime alone on a batch that already lies in memory as float32, at the embedder's own batch size, and at the
fastest of several batch sizes. Extraction: `embed_records` from JPEG files on the disk to checked unit vectors, cache off.
The two take turns in one process, so that both see the same neighbours on the machine. Ends with exit code 1 below 0.9.
"""
import argparse, json, os, sys, tempfile, time
from pathlib import Path

import numpy as np

os.environ.setdefault("HYPERFACE_PROGRESS", "0")
from hyperface.core import cpu_count, data_dir, provenance, write_json
from hyperface.data.records import FileSource, Records, standard_table
from hyperface.extraction.embed import embed_records, load_embedder


def photographs(n:int, folder:Path) -> Records:
    "n aligned JPEG files: of LFW where it is there, rendered ones otherwise."
    root = data_dir("lfw")
    if root is not None: root = root / "lfw112"
    else:
        from hyperface.data.images import encode_image
        from hyperface.data.rendered import render_faces
        faces, root = render_faces(-(-n // 4), 4), folder
        for i in range(n): (folder / f"{i:05d}.jpg").write_bytes(encode_image(faces.pixels(i), "jpg"))
    names = sorted(p.relative_to(root).as_posix() for p in root.rglob("*.jpg"))[:n]
    table = standard_table(dict(image=names))
    return Records(table, FileSource(root, table["image"]), name="lfw" if data_dir("lfw") else "rendered")


def bare(embedder, batch:int, n:int) -> float:
    "Images per second of the session alone."
    x = np.random.default_rng(0).uniform(-1, 1, (batch, 3, embedder.size, embedder.size)).astype(np.float32)
    if embedder.raw: x = x * 127.5 + 127.5
    started = time.perf_counter()
    for _ in range(-(-n // batch)): embedder.session.run(None, {embedder.input: x})
    return -(-n // batch) * batch / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="w600k_mbf_dequant_fp32.onnx")
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--flip", action="store_true")
    parser.add_argument("--out", default=None)
    args = parser.parse_args()
    embedder = load_embedder(args.model, flip=args.flip, threads=args.threads)
    passes = 2 if args.flip else 1
    with tempfile.TemporaryDirectory() as folder:
        records = photographs(args.images, Path(folder))
        batches = sorted({8, 16, 32, 64, embedder.batch_size}) if not embedder.fixed else [embedder.fixed]
        best = max(batches, key=lambda b: bare(embedder, b, 2 * b))                       # also warms the session up
        embed_records(records.select(np.arange(min(64, len(records)))), embedder, cache=False)
        rates = {"bare": [], "bare_own_batch": [], "extraction": []}
        for _ in range(args.rounds):
            rates["bare"].append(bare(embedder, best, len(records)))
            started = time.perf_counter()
            embed_records(records, embedder, cache=False)
            rates["extraction"].append(passes * len(records) / (time.perf_counter() - started))
            rates["bare_own_batch"].append(bare(embedder, embedder.batch_size, len(records)))
    medians = {k: float(np.median(v)) for k, v in rates.items()}
    ratio = medians["extraction"] / max(medians["bare"], medians["bare_own_batch"])
    print(f"model {embedder.name}, {embedder.threads} thread(s) of {cpu_count()}, {len(records)} images of {records.name}, {args.rounds} rounds{', flip-summed (two passes count as two images)' if args.flip else ''}")
    print(f"bare onnxruntime   {medians['bare']:8.1f} images/s at batch {best}, {medians['bare_own_batch']:.1f} at batch {embedder.batch_size}")
    print(f"extraction         {medians['extraction']:8.1f} images/s, files to unit vectors")
    print(f"ratio              {ratio:8.3f} (wanted: at least 0.9)")
    result = dict(model=embedder.name, threads=embedder.threads, images=len(records), ratio=ratio, best_batch=best, rates=rates, provenance=provenance())
    if args.out: write_json(args.out, result)
    else: print(json.dumps({k: result[k] for k in ("model", "threads", "images", "ratio")}))
    sys.exit(ratio < .9)


if __name__ == "__main__":
    main()
