"""Extraction against the bare network: how much of onnxruntime's batch rate survives decoding, checking and bookkeeping.

    python bench/extract.py [--model NAME.onnx] [--images 1024] [--threads N] [--flip] [--out FILE.json]

Bare: onnxruntime alone, default options, on a batch that already lies in memory as float32, at its fastest batch size.
Extraction: `embed_records` from JPEG files on the disk to checked unit vectors, cache off. The two take turns every 128
images, so that both see the same neighbours on the machine; each turn of ours is compared with the bare ones before and
after it. Ends with exit code 1 below 0.9.
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


def bare_session(embedder, threads:int):
    "onnxruntime with nothing but the number of threads set: the thing to be compared with."
    import onnxruntime as ort
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    return ort.InferenceSession(str(embedder.path), options, providers=["CPUExecutionProvider"])


def timed(f) -> tuple[float, float]:
    "Seconds by the clock and of the processors."
    wall, cpu = time.perf_counter(), time.process_time()
    f()
    return time.perf_counter() - wall, time.process_time() - cpu


def bare(session, embedder, batch:int, n:int) -> None:
    "n images through the session alone, from memory."
    x = np.random.default_rng(0).uniform(-1, 1, (batch, 3, embedder.size, embedder.size)).astype(np.float32)
    if embedder.raw: x = x * 127.5 + 127.5
    for start in range(0, n, batch): session.run(None, {embedder.input: x[:min(batch, n - start)]})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="w600k_mbf_dequant_fp32.onnx", help="a file with a free batch dimension")
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--slice", type=int, default=128, help="images between two turns")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--flip", action="store_true")
    parser.add_argument("--out", default=None)
    args = parser.parse_args()
    embedder = load_embedder(args.model, flip=args.flip, threads=args.threads)
    session, passes = bare_session(embedder, embedder.threads), 2 if args.flip else 1
    with tempfile.TemporaryDirectory() as folder:
        records = photographs(args.images, Path(folder))
        speeds = {b: min(timed(lambda: bare(session, embedder, b, 64))[0] for _ in range(2)) for b in (1, 8, 16, 32, 64)}
        best = min(speeds, key=speeds.get)
        embed_records(records.select(np.arange(min(64, len(records)))), embedder, cache=False)      # warm
        rows = []
        for start in range(0, len(records), args.slice):
            part = records.select(np.arange(start, min(start + args.slice, len(records))))
            n = passes * len(part)
            before = timed(lambda: bare(session, embedder, best, n))
            ours = timed(lambda: embed_records(part, embedder, cache=False))
            after = timed(lambda: bare(session, embedder, best, n))
            rows.append(dict(images=n, bare=(before[0] + after[0]) / 2, extraction=ours[0], bare_cpu=(before[1] + after[1]) / 2, extraction_cpu=ours[1]))
    rate = lambda k: sum(r["images"] for r in rows) / sum(r[k] for r in rows)
    ratio = float(np.median([r["bare"] / r["extraction"] for r in rows]))
    print(f"model {embedder.name}, {embedder.threads} thread(s) of {cpu_count()}, {len(records)} images of {records.name} in {len(rows)} turns{', flip-summed: two passes an image' if args.flip else ''}")
    print(f"bare onnxruntime {rate('bare'):8.1f} images/s at batch {best}, its fastest of {', '.join(map(str, speeds))}")
    print(f"extraction       {rate('extraction'):8.1f} images/s, from files to unit vectors")
    print(f"ratio            {ratio:8.3f}, median over the turns (wanted: at least 0.9); by processor time {rate('extraction_cpu') / rate('bare_cpu'):.3f}")
    result = dict(model=embedder.name, threads=embedder.threads, images=len(records), flip=args.flip, best_batch=best, ratio=ratio, bare_per_s=rate("bare"), extraction_per_s=rate("extraction"), turns=rows, provenance=provenance())
    if args.out: write_json(args.out, result)
    print(json.dumps({k: result[k] for k in ("model", "threads", "images", "bare_per_s", "extraction_per_s", "ratio")}))
    sys.exit(ratio < .9)


if __name__ == "__main__":
    main()
