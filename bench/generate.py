"""The writer of data sets: what it costs beside the bare generator, and what it survives.

    python bench/generate.py [--generator fmae|vec2face|stylegan2|rendered] [--weights FOLDER] [--images 1024] [--rounds 3] [--threads N] [--out FILE.json]
    python bench/generate.py --kills 20 --count 100000 [--seed 0] [--processes 1] [--keep DIR]

Speed. Bare: the generator's forward pass alone, on vectors that lie in memory, at the batch it is best at. Ours:
`generate_dataset` from the plan to the finished folder of JPEG files with its tables. The two take turns, and each turn of
ours is compared with the bare ones before and after it. Ends with exit code 1 below 0.85.

Kills. A process that generates with a generator at 32 px is killed with SIGKILL at random moments (drawn over the work and over the
last step, when the set is put together) and started again. In the end every picture must be there once, whole, and equal to its
checksum; nothing else may be there. `--compare` also makes the set in peace and compares every byte. Exit code 1 if not.
"""
import argparse, json, os, random, shutil, subprocess, sys, tempfile, time
from pathlib import Path

import numpy as np
import torch

os.environ.setdefault("HYPERFACE_PROGRESS", "0")
from hyperface.core import provenance, set_threads, torch_rng, write_json
from hyperface.data.images import decode_image, read_file
from hyperface.data.records import Records
from hyperface.generate import check_dataset, expected_dim, generate_dataset, load_generator_by_name
from hyperface.identities import SamplingPlan, make_identities, plan_pictures
from hyperface.vec2face.networks import FeatureMAE, fmae_config


class Cheap:
    "16 numbers as cells of a 32 px picture, and a grain: nearly all the time is spent on the writing."
    rowwise, image_size, dim = True, 32, 16
    def generate(self, embeddings, *, n_per_identity=1, attributes=None, generator=None):
        e = torch.as_tensor(np.asarray(embeddings)).reshape(-1, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
        return (e + .1*torch.stack([torch.randn(3, 32, 32, generator=g) for g in generator])).clamp(-1, 1)


def generator_of(args):
    "A generator and a function that runs nothing but its network: (vectors, batch) -> None."
    if args.generator == "fmae":
        from hyperface.vec2face.train import Vec2FaceFaces
        torch.manual_seed(0)
        faces = Vec2FaceFaces(FeatureMAE(fmae_config("tiny", grid=8)).eval().requires_grad_(False))
    else: faces = load_generator_by_name(args.generator, args.weights, **(dict(size=112) if args.generator == "rendered" else {}))

    @torch.no_grad()
    def bare(vectors, batch):
        for k in range(0, len(vectors), batch):
            x = torch.as_tensor(vectors[k:k + batch])
            if hasattr(faces, "model"): faces.model(x*faces.feature_norm, masking=faces.masking, generator=torch_rng(0, k))
            elif hasattr(faces, "G"): faces.G(torch.randn(len(x), faces.G.z_dim, generator=torch_rng(0, k)), faces.schema.encode(**{faces.identity.name: vectors[k:k + batch]}), noise_mode=faces.noise_mode)
            else: faces.generate(vectors[k:k + batch], generator=torch_rng(0, k))
    return faces, bare


def timed(f) -> tuple[float, float]:
    "Seconds by the clock and of the processors."
    wall, cpu = time.perf_counter(), time.process_time()
    f()
    return time.perf_counter() - wall, time.process_time() - cpu


def speed(args) -> dict:
    set_threads(args.threads)
    faces, bare = generator_of(args)
    plan = SamplingPlan(n=args.images//args.per_identity, dim=expected_dim(faces) or 512, per_identity=args.per_identity)
    n = plan.n*plan.per_identity
    vectors = plan_pictures(plan, make_identities(plan), np.repeat(np.arange(plan.n), plan.per_identity), np.tile(np.arange(plan.per_identity), plan.n)).vectors
    best = min((8, 16, 32, 64), key=lambda b: min(timed(lambda: bare(vectors[:128], b))[0] for _ in range(2)))
    rows = []
    for r in range(args.rounds):
        with tempfile.TemporaryDirectory(dir=args.dir) as folder:
            before = timed(lambda: bare(vectors, best))
            ours = timed(lambda: generate_dataset(faces, plan, Path(folder)/"set", batch=best, processes=args.processes))
            after = timed(lambda: bare(vectors, best))
            rows.append(dict(bare=(before[0] + after[0])/2, generate=ours[0], bare_cpu=(before[1] + after[1])/2, generate_cpu=ours[1]))
    total = {k: sum(r[k] for r in rows) for k in rows[0]}
    return dict(generator=args.generator, parameters=sum(p.numel() for p in getattr(faces, "model", getattr(faces, "G", torch.nn.Identity())).parameters()), pixels=faces.image_size, images=n, batch=best, threads=torch.get_num_threads(), rounds=args.rounds,
                bare_images_per_second=round(n*args.rounds/total["bare"], 1), images_per_second=round(n*args.rounds/total["generate"], 1), ratio=round(total["bare"]/total["generate"], 3), ratio_by_round=[round(r["bare"]/r["generate"], 3) for r in rows],
                ratio_of_processor_time=round(total["bare_cpu"]/total["generate_cpu"], 3))


def plan_of(count:int) -> SamplingPlan:
    return SamplingPlan(n=max(1, count//50), dim=16, max_cosine=1., per_identity=50)


def kills(args) -> dict:
    r, plan = random.Random(args.seed), plan_of(args.count)
    home = Path(args.keep or tempfile.mkdtemp(dir=args.dir)); out = home/"set"
    shards = -(-plan.n//max(1, 256//plan.per_identity))
    done = lambda: sum(1 for _ in os.scandir(out/".generate"/"done")) if (out/".generate"/"done").is_dir() else 0
    moments = sorted(r.uniform(0, 1.08) for _ in range(args.kills))            # beyond 1: while the set is put together
    log, start = [], time.monotonic()
    worker = lambda folder: subprocess.Popen([sys.executable, __file__, "--worker", str(folder), "--count", str(args.count), "--processes", str(args.processes)])
    for m in moments:
        process = worker(out)
        while process.poll() is None and done() < min(shards, m*shards): time.sleep(.002)
        time.sleep(r.uniform(0, .3) if m < 1 else r.uniform(0, 3))
        late = process.poll() is not None
        process.kill(); process.wait()
        log.append(dict(after=round(m, 3), shards=done(), uncommitted=len(list((out/".generate").glob("*.part"))), finished=late))
        print(json.dumps(log[-1]), file=sys.stderr, flush=True)
    if worker(out).wait(): raise SystemExit("the last run failed")
    records, wrong, whole = Records.load(out), check_dataset(out), 0
    for image in records.table["image"]: whole += decode_image(read_file(out/image)).shape == (32, 32, 3)
    places = set(zip(records.table["identity"].tolist(), records.table["draw"].tolist()))
    found = dict(asked=plan.n*plan.per_identity, pictures=len(records), different=len(places), whole=whole, damaged=len(wrong), kills=sum(not x["finished"] for x in log), after_the_end=sum(x["finished"] for x in log), shards=shards,
                 left_over=[p.name for p in out.iterdir() if p.name.startswith(".")], seconds=round(time.monotonic() - start, 1))
    if args.compare:
        if worker(home/"peace").wait(): raise SystemExit("the run in peace failed")
        names = [p.relative_to(out) for p in out.glob("*/*.jpg")]
        found["same_bytes"] = len(names) == sum(1 for _ in (home/"peace").glob("*/*.jpg")) and all((out/n).read_bytes() == (home/"peace"/n).read_bytes() for n in names)
    if not args.keep: shutil.rmtree(home)
    n = found["asked"]
    return found | dict(good=found["pictures"] == found["different"] == found["whole"] == n and not wrong and not found["left_over"] and found.get("same_bytes", True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generator", default="fmae", choices=["fmae", "vec2face", "stylegan2", "rendered"], help="fmae: the tiny network at 64 px with random weights")
    parser.add_argument("--weights", default=None)
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--per-identity", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("--compare", action="store_true", help="make the set in peace, too, and compare every byte")
    parser.add_argument("--dir", default=None, help="where the sets are made; default: the system's temporary folder")
    parser.add_argument("--keep", default=None, help="folder that keeps the killed set")
    parser.add_argument("--out", default=None, help="write the result as JSON")
    parser.add_argument("--worker", default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        set_threads(1)
        generate_dataset(Cheap(), plan_of(args.count), args.worker, processes=args.processes)
        return
    found = kills(args) if args.kills else speed(args)
    print(json.dumps(found, indent=1))
    if args.out: write_json(args.out, found | provenance())
    sys.exit(0 if (found["good"] if args.kills else found["ratio"] >= .85) else 1)


if __name__ == "__main__":
    main()
