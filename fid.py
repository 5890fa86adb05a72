"""Stage 5: scores. Fréchet distance between sets of images, reconstruction quality, and the demo's report.

    python fid.py score out/demo/avatars out/demo/send/samples.npz --split train --net tf_efficientnet_lite0 --net-ckpt W.pth
    python fid.py recon --vae out/demo/send/vae.pt --data out/demo/avatars --split test
    python fid.py report out/demo --arms control send

A Fréchet distance is printed with its network's name, input size and the number of images, as FD(name@size)-2k: two
such numbers compare only when all of these agree. It is called FID for the Inception network of 2015 alone.
"""
import argparse
import json
import platform
import time
import zipfile
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw
from tqdm import tqdm

import data
from data import UserError
from mapper import empty_model, pretrained
from vae import load_vae


# ---------------------------------------------------------------------------------------------------------------------
# Fréchet distance

def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)) of two Gaussians (Heusel et al. 2017, eq. 6):
    mu (D,), sigma (D, D), float64 -> float.

    tr (sigma1 sigma2)^(1/2) is the sum of the square roots of the eigenvalues of A sigma2 A with A = sigma1^(1/2), which
    is symmetric and positive semi-definite: right for singular covariances, where a general matrix square root fails.
    Raises UserError for shapes that differ or values that are not finite.
    """
    mu1, sigma1, mu2, sigma2 = (np.asarray(a, np.float64) for a in (mu1, sigma1, mu2, sigma2))
    if mu1.shape != mu2.shape or sigma1.shape != sigma2.shape:
        raise UserError(f"statistics of {mu1.shape[0]} and {mu2.shape[0]} dimensions: made with different networks")
    if not all(np.isfinite(a).all() for a in (mu1, sigma1, mu2, sigma2)):
        raise UserError("Fréchet distance: the features are not finite")
    values, vectors = np.linalg.eigh(sigma1)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ sigma2 @ root).clip(0)).sum()
    return float(np.square(mu1 - mu2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * cross)


def statistics(features):
    """(N, D) -> mean (D,) and unbiased covariance (D, D), float64."""
    features = np.asarray(features, np.float64)
    return features.mean(0), np.cov(features, rowvar=False)


class FeatureNet(nn.Module):
    """Pooled features of a timm model before its classifier. uint8 (B, 3, H, W) -> (B, D) float32; frozen.

    Images are resized (bicubic, antialiased when shrinking) to `size` (default: the model's own) and normalised with the
    model's mean and std. weights=False: random weights, for a plan.
    """

    def __init__(self, name, ckpt=None, size=None, weights=True):
        super().__init__()
        with torch.device("meta"):
            spec, fixed = empty_model(name), {}  # refuses unknown names
        if size and hasattr(spec, "patch_embed"):  # a ViT is built for one input size
            fixed = {"img_size": size}
            if size % spec.patch_embed.patch_size[0]:
                raise UserError(f"--net-size {size}: {name} needs a multiple of {spec.patch_embed.patch_size[0]}")
        self.net = pretrained(name, ckpt, "--net", **fixed) if weights else timm.create_model(name, num_classes=0, **fixed)
        config = self.net.pretrained_cfg
        self.size = size or config["input_size"][-1]
        self.label = f"{name}@{self.size}"
        self.register_buffer("mean", torch.tensor(config["mean"]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(config["std"]).view(1, 3, 1, 1))
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, images):
        x = images.float() / 255
        x = F.interpolate(x, (self.size, self.size), mode="bicubic", antialias=x.shape[-1] > self.size).clamp(0, 1)
        return self.net(((x - self.mean) / self.std).contiguous(memory_format=torch.channels_last)).float()


def load_images(source, split=None, size=None):
    """A folder, or an .npz with arr_0 uint8 (N, H, W, 3) -> function rows -> uint8 (B, 3, H, W), and N.
    Images of a folder are cropped to `size` (default: the short side of its first image)."""
    source = Path(source)
    if source.suffix != ".npz":
        first = data.find_images(source)[0]
        try:
            with Image.open(source / first) as image:
                size = size or min(image.size)
        except (OSError, ValueError) as e:
            raise UserError(f"{source / first}: cannot be read as an image ({e})")
        images = data.ImageFolder(source, size, split=split)
        return (lambda rows: next(data.load_batches(images, [rows]))[0]), len(images.files)
    try:
        with np.load(source, allow_pickle=False) as z:
            array = z["arr_0"]
    except FileNotFoundError:
        raise UserError(f"{source}: no such file; make it with: python sample.py --sit SIT --out {source}")
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as e:
        raise UserError(f"{source}: expected an .npz with arr_0 ({e})")
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[-1] != 3:
        raise UserError(f"{source}: arr_0 is {array.dtype} {array.shape}; expected uint8 (N, H, W, 3)")
    return (lambda rows: torch.from_numpy(array[rows]).permute(0, 3, 1, 2)), len(array)


def extract(net, source, n, device, precision, name, batch=64):
    """Features (N, D) of all images of load_images' source."""
    out = []
    for i in tqdm(range(0, n, batch), f"features {name}", disable=None):
        with data.autocast(device, precision):
            out.append(net(source(list(range(i, min(i + batch, n)))).to(device)).cpu().numpy())
    return np.concatenate(out)


def count_name(n):
    """2000 -> "2k", 1500 -> "1500"."""
    return f"{n // 1000}k" if n % 1000 == 0 else str(n)


def score(args):
    """Fréchet distance of each sample set to the reference, and the floor: two halves of the reference."""
    device, _, _ = data.setup()
    precision = args.precision
    begin = time.time()
    net = FeatureNet(args.net, args.net_ckpt, args.net_size, weights=not args.dry_run)
    sources = {name: load_images(name, args.split if name == args.reference else None, args.resolution) for name in [args.reference, *args.samples]}
    for name, (_, n) in sources.items():
        if n < 4:
            raise UserError(f"{name}: {n} images; a covariance needs more")
    if args.dry_run:
        total, dim = sum(n for _, n in sources.values()), net.net.num_features
        return print(f"FD({net.label}) on {', '.join(f'{n} images of {name}' for name, (_, n) in sources.items())}; network "
                     f"{sum(p.numel() for p in net.parameters()) / 1e6:.1f} M, {dim} features, about {(total * 4 + max(n for _, n in sources.values()) * 16) * dim / 2**30:.2f} GiB of main memory")
    net = net.to(device, memory_format=torch.channels_last)
    features = {name: extract(net, *source, device, precision, name) for name, source in sources.items()}
    reference = features[args.reference]
    order = np.random.Generator(np.random.Philox(key=0)).permutation(len(reference))
    halves = np.array_split(reference[order], 2)
    floor = frechet_distance(*statistics(halves[0]), *statistics(halves[1]))
    result = dict(network=net.label, reference=args.reference, split=args.split, n_reference=len(reference),
                  floor=floor, floor_n=len(halves[1]), precision=precision, weights=data.weights_hash(net.state_dict()), fd={}, n={}, fd_real={})
    mu, sigma = statistics(reference)
    print(f"reference {args.reference}" + (f" ({args.split})" if args.split else "") + f": {len(reference)} images; network {net.label}")
    for name in args.samples:
        result["n"][name] = len(features[name])
        n = result["n"][name]
        result["fd"][name] = frechet_distance(mu, sigma, *statistics(features[name]))
        if n <= len(reference) // 2:  # what as many real images would score
            result["fd_real"][name] = frechet_distance(*statistics(reference[order[n:]]), *statistics(reference[order[:n]]))
        print(f"FD({net.label})-{count_name(n)}  {result['fd'][name]:8.2f}  {name}"
              + (f"  (as many real images: {result['fd_real'][name]:.2f})" if name in result["fd_real"] else ""))
        if n < 2048:
            print(f"  {n} images are few: the distance is biased upwards; compare only with equal counts")
    print(f"FD({net.label})-{count_name(len(halves[1]))}  {floor:8.2f}  floor: one half of the reference against the other")
    result["seconds"] = round(time.time() - begin, 1)
    if args.json:
        data.write_json(args.json, result)


# ---------------------------------------------------------------------------------------------------------------------
# Reconstruction

def psnr(x, y):
    """uint8 (B, 3, H, W) twice -> peak signal-to-noise ratio of each image in dB (B,); inf for equal images."""
    mse = (x.double() - y.double()).square().mean((1, 2, 3))
    return 10 * torch.log10(255 ** 2 / mse)


def ssim(x, y):
    """uint8 (B, 3, H, W) twice -> structural similarity (B,) (Wang et al. 2004): 11 x 11 Gaussian window of sigma 1.5,
    data range 255, mean over channels and over the positions where the window fits."""
    x, y = x.double(), y.double()
    g = torch.exp(-torch.arange(-5, 6, dtype=torch.float64, device=x.device).square() / (2 * 1.5 ** 2))
    g = (g / g.sum()).expand(3, 1, 11)
    blur = lambda a: F.conv2d(F.conv2d(a, g[..., None], groups=3), g[..., None, :], groups=3)
    mx, my = blur(x), blur(y)
    vx, vy, vxy = blur(x * x) - mx ** 2, blur(y * y) - my ** 2, blur(x * y) - mx * my
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    return ((2 * mx * my + c1) * (2 * vxy + c2) / ((mx ** 2 + my ** 2 + c1) * (vx + vy + c2))).mean((1, 2, 3))


@torch.no_grad()
def recon(args):
    """Decode the posterior mean of each image and compare: mean PSNR and SSIM over the images, and a picture."""
    device, _, _ = data.setup()
    precision = args.precision
    begin = time.time()
    vae = load_vae(args.vae).to(device, memory_format=torch.channels_last)
    images = data.ImageFolder(args.data, args.resolution or vae.config["resolution"], split=args.split)
    if args.dry_run:
        return print(f"{args.vae}: reconstruct {len(images)} images of {images.size} x {images.size}, latent {vae.config['z_channels']} x "
                     f"{images.size // vae.factor} x {images.size // vae.factor}, {sum(p.numel() for p in vae.parameters()) / 1e6:.1f} M")
    rows = data.chunks(range(len(images)), 64)
    chosen = set(np.linspace(0, len(images) - 1, min(16, len(images) // 8 * 8 or len(images))).astype(int).tolist())  # all classes
    values, originals, copies = [], [], []
    for pixels, _, kept in tqdm(data.load_batches(images, rows), "reconstruct", len(rows), disable=None):
        x = data.to_float(pixels.to(device)).contiguous(memory_format=torch.channels_last)
        with data.autocast(device, precision):
            y = data.to_uint8(vae.decode(vae.encode(x).mean)).cpu()
        values.append(torch.stack([psnr(pixels, y), ssim(pixels, y)]))
        at = [i for i, row in enumerate(kept) if row in chosen]
        originals.append(pixels[at]), copies.append(y[at])
    values = torch.cat(values, 1)
    result = dict(vae=args.vae, data=args.data, split=args.split, n=values.shape[1], psnr=values[0].mean().item(), ssim=values[1].mean().item(),
                  precision=precision, seconds=round(time.time() - begin, 1))
    print(f"{args.vae}: PSNR {result['psnr']:.2f} dB, SSIM {result['ssim']:.4f} over {result['n']} images")
    if args.png:
        data.save_grid(torch.cat(originals + copies), args.png, columns=min(8, sum(map(len, originals))))
    if args.json:  # last: it marks the stage as done
        data.write_json(args.json, result)


# ---------------------------------------------------------------------------------------------------------------------
# The demo's report

def read_json(path):
    try:
        return json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; run the stage before (bash run.sh runs them all)")


def last_seconds(path):
    """Training time from the last line of a metrics.jsonl."""
    try:
        return json.loads(Path(path).read_text().splitlines()[-1])["seconds"]
    except (FileNotFoundError, IndexError, KeyError):
        raise UserError(f"{path}: no training log with seconds; run the stage before")


def cpu_name():
    """The processor's name where the system tells it."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def report(args):
    """Collect what the stages wrote for each arm: RUN/report.json, RUN/report.png, and a table."""
    run = Path(args.run)
    fd, probe = read_json(run / "fd.json"), read_json(run / "probe.json")
    by_path = lambda d: {Path(k): v for k, v in d.items()}  # out/x, ./out/x and out/x/ are one
    distance, count, probed = by_path(fd["fd"]), by_path(fd["n"]), by_path(probe["results"])
    pixels = next(n for n in probe["results"] if n.startswith("pixels"))  # "pixels 18 x 18"
    arms = {}
    for arm in args.arms:
        quality = read_json(run / arm / "recon.json")
        found = probed[run / arm / "vae.pt"]
        arms[arm] = dict(psnr=quality["psnr"], ssim=quality["ssim"], probe_f1=found["f1"], probe_f1_tuned=found["f1_tuned"],
                         probe_average_precision=found["average_precision"],
                         fd=distance[run / arm / "samples.npz"], fd_n=count[run / arm / "samples.npz"],
                         seconds=dict(train_vae=last_seconds(run / arm / "metrics.jsonl"), encode=read_json(run / arm / "latents/meta.json")["seconds"],
                                      train_sit=last_seconds(run / arm / "sit/metrics.jsonl"), sample=read_json(run / arm / "samples.json")["seconds"],
                                      recon=quality["seconds"]))
    baselines = dict(fd_floor=fd["floor"], fd_floor_n=fd["floor_n"], fd_real=max(fd["fd_real"].values(), default=None), probe_f1_pixels=probe["results"][pixels]["f1"],
                     probe_f1_majority=probe["results"]["majority"]["f1"])
    result = dict(arms=arms, baselines=baselines, network=fd["network"], probe_attributes=len(probe["attributes"]),
                  seconds=dict(pretrain=last_seconds(run / "pretrain/metrics.jsonl"), fd=fd["seconds"], probe=probe["seconds"]),
                  torch=torch.__version__, cpu=cpu_name(), threads=torch.get_num_threads())
    if (run / "avatars.time.json").exists():  # not when DATA= pointed elsewhere
        result["seconds"]["avatars"] = read_json(run / "avatars.time.json")["seconds"]
    data.write_json(run / "report.json", result)
    draw_report(run, args.arms)
    print(f"{'':22} {'PSNR':>8} {'probe F1':>9} {'FD':>9}   FD = FD({fd['network']})-{count_name(arms[args.arms[0]]['fd_n'])}, lower is better")
    for arm, a in arms.items():
        print(f"{arm:22} {a['psnr']:8.2f} {a['probe_f1']:9.4f} {a['fd']:9.2f}")
    print(f"{pixels:22} {'':8} {baselines['probe_f1_pixels']:9.4f}\n{'majority guess':22} {'':8} {baselines['probe_f1_majority']:9.4f}")
    if baselines["fd_real"] is not None:
        print(f"{'as many real images':22} {'':8} {'':9} {baselines['fd_real']:9.2f}")
    print(f"{'real, half vs half':22} {'':8} {'':9} {baselines['fd_floor']:9.2f}")
    spent = {f"{arm} {k}": v for arm, a in arms.items() for k, v in a["seconds"].items()} | result["seconds"]
    print("seconds: " + ", ".join(f"{k} {v:.0f}" for k, v in spent.items()) + f"\n{run}/report.json, {run}/report.png")


def draw_report(run, arms):
    """Originals, then each arm's reconstructions of them, then each arm's samples from the same noise and labels."""
    def part(path, top, bottom):  # a share of a picture's height
        with Image.open(path) as sheet:
            return sheet.convert("RGB").crop((0, int(top * sheet.height), sheet.width, int(bottom * sheet.height)))

    columns = [[("originals", part(run / arms[0] / "recon.png", 0, 0.5))] + [(f"{a}: reconstructions", part(run / a / "recon.png", 0.5, 1)) for a in arms]]
    columns.append([(f"{a}: samples", part(run / a / "samples.png", 0, 0.5)) for a in arms])
    gap, title = 12, 16
    width = sum(c[0][1].width + gap for c in columns) + gap
    height = max(sum(image.height + title + gap for _, image in c) for c in columns) + gap
    sheet = Image.new("RGB", (width, height), "white")
    draw, x = ImageDraw.Draw(sheet), gap
    for column in columns:
        y = gap
        for text, image in column:
            draw.text((x, y), text, fill="black")
            sheet.paste(image, (x, y + title))
            y += image.height + title + gap
        x += column[0][1].width + gap
    sheet.save(run / "report.png")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = p.add_subparsers(dest="command", required=True)
    s = commands.add_parser("score", help="Fréchet distance of sample sets to a reference")
    s.add_argument("reference", help="image folder or .npz")
    s.add_argument("samples", nargs="+", help=".npz or image folders")
    s.add_argument("--split", choices=data.SPLITS, help="the reference's images that attributes.csv puts there")
    s.add_argument("--resolution", type=data.positive, help="crop of image folders in pixels (default: the short side of the first image)")
    s.add_argument("--net", default="vit_base_patch14_dinov2.lvd142m", help="any timm model")
    s.add_argument("--net-ckpt", help="local weights of the network")
    s.add_argument("--net-size", type=int, help="input size in pixels (default: the model's own)")
    r = commands.add_parser("recon", help="PSNR and SSIM of a VAE")
    r.add_argument("--vae", required=True)
    r.add_argument("--data", required=True, help="image folder")
    r.add_argument("--split", choices=data.SPLITS)
    r.add_argument("--resolution", type=int, help="crop in pixels (default: the VAE's)")
    r.add_argument("--png", help="write up to 16 originals and their reconstructions here")
    for c in (s, r):
        c.add_argument("--dry-run", action="store_true", help="print the plan (images, network, memory), and end")
        c.add_argument("--json", help="write the scores here")
        c.add_argument("--precision", choices=("bf16", "fp32"), default="fp32", help="scores are float32 unless told otherwise")
    t = commands.add_parser("report", help="the demo's table and picture")
    t.add_argument("run", help="folder with a subfolder an arm")
    t.add_argument("--arms", nargs="+", default=["control", "send"])
    args = p.parse_args()
    for path in filter(None, (getattr(args, "json", None), getattr(args, "png", None))):
        data.open_out(Path(path).parent)
    {"score": score, "recon": recon, "report": report}[args.command](args)


if __name__ == "__main__":
    data.run_script(main)
