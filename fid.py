"""Stage 5: scores. FID, sFID, IS, precision, recall of samples; rFID, PSNR, SSIM, LPIPS of reconstructions; the demo's report.

    python fid.py score ref/VIRTUAL_imagenet256_labeled.npz out/samples.npz                 # as ADM's evaluator, without TensorFlow
    python fid.py score out/demo/avatars out/demo/send/samples.npz --split train --net tf_efficientnet_lite0 --net-ckpt W.pth
    python fid.py recon --vae out/demo/send/vae.pt --data out/demo/avatars --split test --net none --lpips 0
    python fid.py report out/demo --arms control send
    python fid.py --bench 5                                                                 # speed, on random weights and images

A source is an image folder, an .npz with arr_0 (uint8 NHWC), an .npz of statistics (mu, sigma, mu_s, sigma_s: ADM's reference
files, or ours of --save-stats), or ADM's files that hold both. A Fréchet distance is printed with its network's name, input
size and number of images, as FD(name@size)-2k: two such numbers compare only when all of these agree. It is called FID for
the Inception network of 2015 alone.
"""
import argparse
import hashlib
import io
import json
import os
import struct
import sys
import tempfile
import time
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from PIL import Image
from tqdm import tqdm

import common
import data
from common import UserError, read_json
from mapper import empty_model, pretrained
from vae import load_vae

RECONSTRUCTED = 2000  # images of the reference that `score --vae` reconstructs
INCEPTION_URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"


# ---------------------------------------------------------------------------------------------------------------------
# Networks: uint8 (B, 3, H, W) -> pooled features (B, D) float32

class FIDInception(nn.Module):
    """The Inception network of 2015-12-05 with which FID is defined. uint8 (B, 3, H, W) -> pool_3 (B, 2048) float32; frozen.

    torchvision's Inception v3 with what differs in FID's graph: average pools that leave the padding out, a max pool in the
    last block, 1008 classes; TensorFlow 1's bilinear resize to 299 (no half-pixel centres, no antialiasing), (x - 128) / 128.
    half_pixel=True resizes and scales as pytorch-fid does. ckpt: local pt_inception-2015-12-05 weights instead of the
    download. Raises UserError when the weights cannot be had or do not fit. weights=False: random ones, for a plan or a bench.
    """

    def __init__(self, ckpt=None, half_pixel=False, weights=True):
        super().__init__()
        self.half_pixel, self.label, self.dim, self.seen = half_pixel, "inception", 2048, {}
        with warnings.catch_warnings():  # torchvision announces a slower start for random weights
            warnings.simplefilter("ignore")
            self.net = torchvision.models.inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False)
        for name, block in self.net.named_children():
            if name in ("Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e", "Mixed_7b"):
                block.branch_pool.register_forward_pre_hook(self.exclude_padding)
        self.net.Mixed_7c.register_forward_pre_hook(lambda _, x: self.seen.update(last=x[0]))
        self.net.Mixed_7c.branch_pool.register_forward_pre_hook(lambda *_: F.max_pool2d(self.seen.pop("last"), 3, 1, 1))
        self.net.Mixed_6d.branch1x1.register_forward_hook(lambda _, __, y: self.seen.update(spatial=y[:, :7]))  # mixed_6/conv:0
        self.net.avgpool.register_forward_hook(lambda _, __, y: self.seen.update(pool=y.flatten(1)))
        if weights:
            counters = {k: v for k, v in self.net.state_dict().items() if k.endswith("num_batches_tracked")}  # not in every copy, and unused
            common.load_weights(self.net, {**inception_weights(ckpt), **counters}, f"--net-ckpt {ckpt}" if ckpt else INCEPTION_URL)
        self.eval().requires_grad_(False)

    def train(self, mode=True):
        return super().train(False)

    @staticmethod
    def exclude_padding(_, args):
        """torchvision's pool divides by 9 everywhere: at the border multiply by 9 / (pixels of the window inside the image)."""
        x, = args
        return x / F.avg_pool2d(torch.ones_like(x[:1, :1]), kernel_size=3, stride=1, padding=1)

    @torch.no_grad()
    def features(self, images):
        """-> pool (B, 2048); spatial (B, 17 * 17 * 7), rows first as in TensorFlow, for sFID; class probabilities (B, 1008),
        the softmax of the logits without bias, for IS."""
        x = images.float()
        if self.half_pixel:
            x = F.interpolate(x, (299, 299), mode="bilinear", align_corners=False) / 127.5 - 1
        else:
            x = (resize_tf1(x, 299) - 128) / 128
        self.net(x.contiguous(memory_format=torch.channels_last))
        pool, spatial = self.seen.pop("pool").float(), self.seen.pop("spatial").float()
        with torch.autocast(x.device.type, enabled=False):
            probabilities = (pool @ self.net.fc.weight.T).softmax(1)
        return pool, spatial.permute(0, 2, 3, 1).flatten(1), probabilities

    def forward(self, images):
        return self.features(images)[0]


def resize_tf1(x, size):
    """Bilinear resize of TensorFlow 1: output i reads position i * H / size, the last pixel beyond it. float (B, c, H, W)."""
    def weights(n):  # (size, n), two numbers a row
        at = torch.arange(size, device=x.device) * (n / size)
        low = at.floor().long().clamp(max=n - 1)
        part = (at - low).clamp(0, 1)
        w = torch.zeros(size, n, device=x.device)
        w.scatter_add_(1, low[:, None], 1 - part[:, None])
        return w.scatter_add_(1, (low + 1).clamp(max=n - 1)[:, None], part[:, None])

    with torch.autocast(x.device.type, enabled=False):
        return weights(x.shape[-2]) @ x @ weights(x.shape[-1]).T


def inception_weights(ckpt):
    if ckpt is not None:
        state = common.load_checkpoint(ckpt)
        return {k: v for k, v in state.items() if isinstance(v, torch.Tensor)} if isinstance(state, dict) else {}
    try:
        with common.rank_zero_first():
            return torch.hub.load_state_dict_from_url(INCEPTION_URL, map_location="cpu", check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as e:  # no network, or a file with another checksum
        raise UserError(f"--net inception: its weights cannot be fetched ({type(e).__name__}: {' '.join(str(e).split())[:100]}); give "
                        f"{INCEPTION_URL.rsplit('/')[-1]} with --net-ckpt, or another network with --net")


class FeatureNet(nn.Module):
    """Pooled features of a timm model before its classifier. uint8 (B, 3, H, W) -> (B, D) float32; frozen.

    Images are resized (bicubic, antialiased when shrinking) to `size` (default: the model's own) and normalised with the
    model's mean and std. weights=False: random weights, for a plan.
    """

    def __init__(self, name, ckpt=None, size=None, weights=True):
        super().__init__()
        spec, fixed = empty_model(name), {}  # refuses unknown names
        if size and hasattr(spec, "patch_embed"):  # a ViT is built for one input size
            fixed = {"img_size": size}
            if size % spec.patch_embed.patch_size[0]:
                raise UserError(f"--net-size {size}: {name} needs a multiple of {spec.patch_embed.patch_size[0]}")
        self.net = pretrained(name, ckpt, "--net", weights, **fixed)
        config = self.net.pretrained_cfg
        self.size, self.dim = size or config["input_size"][-1], self.net.num_features
        self.label = f"{name}@{self.size}"
        self.register_buffer("mean", torch.tensor(config["mean"]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(config["std"]).view(1, 3, 1, 1))
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, images):
        x = images.float() / 255
        x = F.interpolate(x, (self.size, self.size), mode="bicubic", antialias=x.shape[-1] > self.size).clamp(0, 1)
        return self.net(((x - self.mean) / self.std).contiguous(memory_format=torch.channels_last)).float()


class VGGFeatures(FeatureNet):
    """The convolutions of torchvision's VGG16, averaged over the image: (B, 512). They are what the packaged weights of LPIPS hold
    (extras/vgg16.py); the classifier above them is not needed."""

    def __init__(self, ckpt, size=None):
        nn.Module.__init__(self)
        self.net = nn.Sequential(torchvision.models.vgg16(weights=None).features, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        state = common.load_checkpoint(ckpt)
        found = {k.replace("features", "0"): v for k, v in state.items() if k.startswith("features.")} if isinstance(state, dict) else {}
        common.load_weights(self.net, found, f"--net-ckpt {ckpt}")
        self.size, self.dim, self.label = size or 224, 512, f"vgg16-conv@{size or 224}"
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1))
        self.eval().requires_grad_(False)


def load_net(name, ckpt=None, size=None, weights=True):
    """"inception", any timm model, or VGG16 from a file of its convolutions."""
    if name == "vgg16" and ckpt:
        return VGGFeatures(ckpt, size)
    if name != "inception":
        return FeatureNet(name, ckpt, size, weights)
    if size:
        raise UserError(f"--net-size {size}: inception has one input size, 299")
    return FIDInception(ckpt, weights=weights)


def build_lpips(ckpt, device, weights=True):
    """LPIPS with VGG16 (Zhang et al. 2018, the lpips package), frozen. Raises UserError when VGG16 cannot be had.
    weights=False: random ones, for a plan."""
    import lpips
    try:
        with warnings.catch_warnings():  # lpips asks torchvision in an old way
            warnings.simplefilter("ignore", UserWarning)
            net = lpips.LPIPS(net="vgg", pnet_rand=ckpt is not None or not weights, verbose=False)
    except OSError as e:
        raise UserError(f"LPIPS needs torchvision's VGG16 weights, which cannot be fetched ({e}); give a local file with "
                        "--lpips-ckpt (vgg16-397923af.pth), or switch LPIPS off with --lpips 0")
    if ckpt is not None and weights:
        state = {k: v for k, v in common.load_checkpoint(ckpt).items() if k.startswith("features.")}
        slices = {f"slice{i}.{k}": v for i in range(1, 6) for k, v in
                  ((k, state.get(f"features.{k}")) for k in getattr(net.net, f"slice{i}").state_dict()) if v is not None}
        common.load_weights(net.net, slices, ckpt)
    return net.to(device).eval().requires_grad_(False)


# ---------------------------------------------------------------------------------------------------------------------
# Scores of features

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


class Moments:
    """Mean (D,) and unbiased covariance (D, D) of rows that come in pieces, float64. (Taken about the first piece's mean,
    so that no digits are lost to a large mean.)"""

    def __init__(self):
        self.n, self.shift, self.sum, self.outer = 0, None, 0, 0

    def add(self, features, counts=None):
        """features (B, D); counts (B,): how often each row is taken (default once)."""
        x = torch.as_tensor(features).double()
        self.shift = x.mean(0) if self.shift is None else self.shift
        x = x - self.shift
        w = torch.ones(len(x), dtype=torch.float64) if counts is None else torch.as_tensor(counts).double()
        self.n, self.sum, self.outer = self.n + int(w.sum()), self.sum + w @ x, self.outer + x.T @ (x * w[:, None])

    def result(self):
        mean = self.sum / self.n
        return (self.shift + mean).numpy(), ((self.outer - self.n * torch.outer(mean, mean)) / (self.n - 1)).numpy()


def statistics(features, counts=None):
    """(N, D) -> mean (D,) and unbiased covariance (D, D), float64, without a float64 copy of the features."""
    moments, features = Moments(), torch.as_tensor(features)
    for i in range(0, len(features), 4096):
        moments.add(features[i:i + 4096], None if counts is None else counts[i:i + 4096])
    return moments.result()


def inception_score(probs, split=5000):
    """exp of the mean KL(p(y|x) || p(y)) (Salimans et al. 2016), averaged over consecutive splits of 5,000 as ADM does:
    probs (N, classes) -> float."""
    scores = []
    for part in torch.as_tensor(probs).double().split(split):
        marginal = part.mean(0)
        scores.append((torch.special.xlogy(part, part).sum(1).mean() - torch.special.xlogy(marginal, marginal).sum()).exp())
    return float(torch.stack(scores).mean())


def distance_blocks(a, b, block=4096):
    """Squared distances of rows: yields (slice of a, slice of b, (A, B) float32)."""
    for i in range(0, len(a), block):
        for j in range(0, len(b), block):
            x, y = a[i:i + block], b[j:j + block]
            yield slice(i, i + block), slice(j, j + block), (x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.T).clamp_min_(0)


def kth_distances(x, k):
    """Squared distance of each row to its k-th nearest other row: (N, D) -> (N,)."""
    nearest = torch.full((len(x), k + 1), torch.inf, device=x.device)  # the row itself is one of k + 1
    for rows, _, d in distance_blocks(x, x):
        nearest[rows] = torch.cat([nearest[rows], d], 1).topk(k + 1, largest=False).values
    return nearest.amax(1)


def precision_recall(ref, sample, k=3):
    """Improved precision and recall (Kynkäänniemi et al. 2019, eqs. 2 and 3) of features (N, D), (M, D): the share of samples
    within the k-nearest-neighbour ball of some reference, and the share of references within that of some sample. In blocks:
    memory beyond the features is bounded. Raises UserError for k or fewer rows, and for features that are not finite."""
    ref, sample = (torch.as_tensor(f).float() for f in (ref, sample))
    if min(len(ref), len(sample)) <= k:
        raise UserError(f"precision and recall: {len(ref)} and {len(sample)} images; expected more than {k} of each")
    if not (ref.isfinite().all() and sample.isfinite().all()):
        raise UserError("precision and recall: the features are not finite")
    centre = ref.mean(0)  # distances stay, rounding shrinks
    ref, sample = ref - centre, sample - centre
    radius_ref, radius_sample = kth_distances(ref, k), kth_distances(sample, k)
    precise, recalled = torch.zeros(len(sample), dtype=torch.bool, device=sample.device), torch.zeros(len(ref), dtype=torch.bool, device=ref.device)
    for r, s, d in distance_blocks(ref, sample):
        precise[s] |= (d <= radius_ref[r, None]).any(0)
        recalled[r] |= (d <= radius_sample[s]).any(1)
    return precise.float().mean().item(), recalled.float().mean().item()


def class_agreement(ref, ref_labels, sample, sample_labels, ridge=1e-2):
    """Do samples show their class? A linear classifier (least squares to one-hot labels, with a ridge) of reference features
    (N, D) is fitted on four fifths of them -> (share of samples that it puts in their class, the same share of the last fifth)."""
    x, s = torch.as_tensor(ref).double(), torch.as_tensor(sample).double()
    centre, scale = x.mean(0), x.std(0) + 1e-6
    x, s = ((torch.cat([(v - centre) / scale, torch.ones(len(v), 1)], 1)) for v in (x, s))
    y, n = torch.as_tensor(ref_labels).long(), len(x) * 4 // 5
    gram = x[:n].T @ x[:n] + ridge * n * torch.eye(x.shape[1], dtype=torch.float64)
    weight = torch.linalg.solve(gram, x[:n].T @ F.one_hot(y[:n]).double())
    right = lambda v, label: ((v @ weight).argmax(1) == torch.as_tensor(label)).double().mean().item()
    return right(s, sample_labels), right(x[n:], y[n:])


# ---------------------------------------------------------------------------------------------------------------------
# Sources of images and statistics

@dataclass
class Source:
    """images(rows) -> uint8 (B, 3, H, W), n of them (None, 0 without images); stats: arrays mu, sigma, ... or None; labels (n,) or None; hash of
    the images of a folder, of a split alone when one was asked for."""
    name: str
    images: object
    n: int
    stats: dict
    labels: object = None
    hash: str = ""


def map_array(path, name):
    """An array of an .npz, memory-mapped when it is stored without compression (np.savez, sample.py): 50,000 samples are 10 GB."""
    with zipfile.ZipFile(path) as z:
        info = z.getinfo(f"{name}.npy")
        with z.open(info) as f:
            version = np.lib.format.read_magic(f)
            shape, fortran, dtype = (np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0)(f)
            start = f.tell()
    if info.compress_type != zipfile.ZIP_STORED or fortran or dtype.hasobject or 0 in shape:
        with np.load(path, allow_pickle=False) as z:
            return z[name]
    with open(path, "rb") as f:
        f.seek(info.header_offset + 26)  # the local header's lengths of name and extra field
        start += info.header_offset + 30 + sum(struct.unpack("<HH", f.read(4)))
    return np.memmap(path, dtype, "r", start, shape)


# What a file of statistics may hold: ADM's four arrays, and what --save-stats adds of the network
STATISTICS = ("mu", "sigma", "mu_s", "sigma_s", "n", "network", "weights", "net", "net_ckpt", "net_size")


def load_source(path, split=None, size=None):
    """An image folder (cropped to `size`, default: the short side of its first image), or an .npz. Raises UserError."""
    name, path = str(path), Path(path)
    if path.suffix != ".npz":
        first = data.find_images(path)[0]
        with data.open_image(path / first) as image:
            size = size or min(image.size)
        images = data.ImageFolder(path, size, split=split)
        return Source(name, lambda rows: next(data.load_batches(images, [rows]))[0], len(images.files), None, np.asarray(images.labels) if len(images.classes) > 1 else None, images.hash)
    try:
        common.check_zip(path)
        with np.load(path, allow_pickle=False) as z:
            stats = {k: z[k] for k in STATISTICS if k in z.files} if {"mu", "sigma"} <= set(z.files) else None
            array = map_array(path, "arr_0") if "arr_0" in z.files or stats is None else None
            labels = z["arr_1"] if array is not None and "arr_1" in z.files else None
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; make it with: python sample.py --sit SIT --out {path}")
    except common.DAMAGED as e:
        raise common.damage(e, f"{path}: expected an .npz with arr_0 (images), or mu and sigma (statistics) ({type(e).__name__}: {e})")
    if stats is not None and (stats["mu"].ndim != 1 or stats["sigma"].shape != 2 * stats["mu"].shape):
        raise UserError(f"{path}: mu {stats['mu'].shape} and sigma {stats['sigma'].shape}; expected (D,) and (D, D)")
    if array is not None and (array.dtype != np.uint8 or array.ndim != 4 or array.shape[-1] != 3):
        layout = "; its channels stand first: transpose to NHWC" if array.ndim == 4 and array.shape[1] == 3 else ""
        scale = f"; its values lie in {float(array.min()):.3g} to {float(array.max()):.3g}: scale to 0 to 255 and round" if array.dtype.kind == "f" and array.size else ""
        raise UserError(f"{path}: arr_0 is {array.dtype} {array.shape}; expected uint8 (N, H, W, 3){layout}{scale}")
    if array is None:
        return Source(name, None, 0, stats)
    if labels is not None and (labels.shape != array.shape[:1] or labels.dtype.kind not in "iu"):
        labels = None  # no class numbers
    return Source(name, lambda rows: torch.from_numpy(np.array(array[rows])).permute(0, 3, 1, 2), len(array), stats, labels)


def reconstructions(vae, path, source, rows, device, precision):
    """The source's images of these rows as the VAE gives them back: a sample of the posterior, decoded; its noise depends on the row alone."""
    @torch.no_grad()
    def decode(places):
        chosen = [int(rows[i]) for i in places]
        x = data.to_float(source.images(chosen).to(device)).contiguous(memory_format=torch.channels_last)
        if x.shape[-1] % vae.factor:
            raise UserError(f"--vae {path}: the reference's images have {x.shape[-1]} pixels a side; expected a multiple of {vae.factor}")
        with common.autocast(device, precision):
            posterior = vae.encode(x)
            eps = data.draw_noise(0, chosen, 0, posterior.mean.shape[1:])[1].to(device)
            return data.to_uint8(vae.decode(posterior.sample(eps)))
    return Source(f"reconstructions by {path}", decode, len(rows), None)


def source_hash(path):
    """16 hex digits: of a folder's files by name and size, of an .npz by content."""
    if path.is_dir():
        return data.ImageFolder(path, 1).hash
    h = hashlib.sha256()
    with open(path, "rb") as f:
        while piece := f.read(2 ** 24):
            h.update(piece)
    return h.hexdigest()[:16]


@dataclass
class Measured:
    """pool (N, D) float32 and probabilities (N, 1008) of the images, or None; stats: mu, sigma and (inception) mu_s, sigma_s."""
    pool: torch.Tensor
    probabilities: torch.Tensor
    stats: dict


def measure(net, weights, source, device, precision, batch=64):
    """Features of a source, and its statistics: those that its file brings, else those of the features. weights: the network's hash.
    Raises UserError for statistics of another network (a file that names none is ADM's, of inception)."""
    stats, pool, probabilities, spatial = dict(source.stats or {}), [], [], Moments()
    if stats and (stats["mu"].shape != (net.dim,) or str(stats.get("network", "inception")) != net.label):
        raise UserError(f"{source.name}: statistics of {stats.get('network', 'inception')} with {len(stats['mu'])} dimensions; --net {net.label} has {net.dim}")
    if str(stats.get("weights", weights)) != weights:
        raise UserError(f"{source.name}: statistics of weights {stats['weights']} of {net.label}; these are {weights}")
    for i in tqdm(range(0, source.n, batch), f"features {source.name}", disable=None):
        images = source.images(list(range(i, min(i + batch, source.n)))).to(device)
        with common.autocast(device, precision):
            if isinstance(net, FIDInception):
                features, at_17, p = net.features(images)
                probabilities.append(p.cpu())
                if source.stats is None:
                    spatial.add(at_17.cpu())
            else:
                features = net(images)
        pool.append(features.cpu())
        if not pool[-1].isfinite().all():
            raise UserError(f"{source.name}: features of images {i} to {i + len(pool[-1]) - 1} are not finite; use --precision fp32, or other weights")
    pool, probabilities = (torch.cat(v) if v else None for v in (pool, probabilities))
    if "mu" not in stats:
        stats.update(zip(("mu", "sigma"), statistics(pool)))
    if spatial.n:
        stats.update(zip(("mu_s", "sigma_s"), spatial.result()))
    return Measured(pool, probabilities, stats)


def measure_once(path, key, run):
    """run() -> Measured of images, kept in the .npz `path` (None: not kept) for the next time under the same key: source, network, precision."""
    if path and Path(path).exists():
        try:
            kept = common.read_npz(path, "key", "pool", "mu", "sigma")
        except common.DAMAGED as e:
            raise common.damage(e, f"--cache {path}: not readable ({type(e).__name__}: {e}); delete it, it is made again")
        if str(kept["key"]) == key:
            return Measured(torch.from_numpy(kept["pool"]), None, {k: kept[k] for k in ("mu", "sigma")})
        raise UserError(f"--cache {path}: holds features of {kept['key']}; this command needs those of {key}; give another file or delete it")
    found = run()
    if path:
        np.savez(f"{path}.part.npz", key=key, pool=found.pool.numpy(), **{k: found.stats[k] for k in ("mu", "sigma")})
        os.replace(f"{path}.part.npz", path)
    return found


def distance(a, b, keys=("mu", "sigma")):
    return frechet_distance(*(a[k] for k in keys), *(b[k] for k in keys))


def count_name(n):
    """2000 -> "2k", 1500 -> "1500"."""
    return f"{n // 1000}k" if n and n % 1000 == 0 else str(n)


def compare(reference, sample, order, device, bootstrap=0, labels=(None, None)):
    """All scores that the two have the features for, as a dictionary of floats. order: a fixed permutation of the reference's images;
    labels: class numbers of the two (a folder of samples has its own numbering, and none here)."""
    out = {"fd": distance(reference.stats, sample.stats)}
    if "mu_s" in reference.stats and "mu_s" in sample.stats:
        out["sfid"] = distance(reference.stats, sample.stats, ("mu_s", "sigma_s"))
    if sample.probabilities is not None:
        out["inception_score"] = inception_score(sample.probabilities)
    if sample.pool is not None and reference.pool is not None:
        chosen = reference.pool[np.sort(order[:10_000])]  # as many as ADM's references have
        if min(len(chosen), len(sample.pool)) > 3:
            out["precision"], out["recall"] = precision_recall(chosen.to(device), sample.pool.to(device))
        known = all(v is not None for v in labels) and len(reference.pool) == len(labels[0]) and len(sample.pool) == len(labels[1])
        if known and set(labels[1].tolist()) <= set(labels[0].tolist()):
            some = order[:50_000]  # of ImageNet: a classifier needs no more
            out["class_agreement"], out["class_agreement_real"] = class_agreement(reference.pool[some], labels[0][some], sample.pool, labels[1])
    if sample.pool is not None and bootstrap:
        generator, n = np.random.Generator(np.random.Philox(key=1)), len(sample.pool)
        drawn = [generator.multinomial(n, np.full(n, 1 / n)) for _ in range(bootstrap)]
        values = [distance(reference.stats, dict(zip(("mu", "sigma"), statistics(sample.pool, c)))) for c in tqdm(drawn, "bootstrap", disable=None)]
        out["interval"] = 1.96 * float(np.std(values, ddof=1))
    return out


def compare_reconstructions(reference, rows, copies, sample, device):
    """What is the VAE's part of the distance, and what the generator's. reference: features of the real images; rows: those of them
    that were reconstructed; copies: features of the reconstructions -> rFD of the copies to their originals, and of the samples
    their distance, precision and recall against the copies."""
    rfd = distance(dict(zip(("mu", "sigma"), statistics(reference.pool[rows]))), copies.stats)
    precision, recall = precision_recall(copies.pool.to(device), sample.pool.to(device))
    return dict(rfd=rfd, fd_to_reconstructions=distance(copies.stats, sample.stats), precision_to_reconstructions=precision, recall_to_reconstructions=recall)


def warn_of_blur(scores, whose=""):
    if scores["rfd"] > scores["fd"] / 2:
        print(f"  warning: {whose}the VAE's blur rules this score: rFD is more than half of the distance; compare the distance to the reconstructions")


def check_sources(args, sources):
    for name, source in sources.items():
        if source.n < 4 and source.stats is None:
            raise UserError(f"{name}: {source.n} images; a covariance needs more")
        folder = Path(name)
        if name != args.reference and folder.is_dir() and any(f.lower().endswith((".jpg", ".jpeg")) for f in data.find_images(folder)[:100]):
            print(f"warning: {name} holds JPEG files; their artefacts change every score; write PNG or .npz")
    counts = {sources[name].n for name in args.samples if sources[name].n}
    if len(counts) > 1:
        print(f"warning: sample sets of {' and '.join(map(str, sorted(counts)))} images: the distance falls with the count, compare equal counts only")


def score(args):
    """Every sample set against the reference, and the floors: halves of the reference, and as many real images."""
    device, _, _ = common.setup()
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32
    begin = time.time()
    args.samples = [] if args.samples == ["none"] else args.samples
    net = load_net(args.net, args.net_ckpt, args.net_size, weights=not args.dry_run)
    sources = {name: load_source(name, args.split if name == args.reference else None, args.resolution) for name in [args.reference, *args.samples]}
    check_sources(args, sources)
    if args.dry_run:
        total = sum(s.n for s in sources.values())
        return print(f"{net.label} on {', '.join(f'{s.n} images of {name}' for name, s in sources.items())}; network "
                     f"{sum(p.numel() for p in net.parameters()) / 1e6:.1f} M, {net.dim} features, about {total * 4 * net.dim / 2**30:.2f} GiB of main memory for them")
    inputs = {name: source_hash(Path(name)) for name in sources}
    net = net.to(device, memory_format=torch.channels_last)
    metric = "FID" if args.net == "inception" else f"FD({net.label})"
    weights = common.weights_hash(net.state_dict())
    if args.cache and (args.net == "inception" or sources[args.reference].images is None or sources[args.reference].stats is not None):
        raise UserError("--cache: keeps features of images by a timm model; expected a reference of images, without statistics, and another --net than inception")
    key = f"images {sources[args.reference].hash or inputs[args.reference]}, crop {args.resolution}, {net.label} {weights} in {args.precision}"
    reference = measure_once(args.cache, key, lambda: measure(net, weights, sources[args.reference], device, args.precision))
    n_reference = sources[args.reference].n  # images at hand; a file's own statistics may be of more
    order = np.random.Generator(np.random.Philox(key=0)).permutation(n_reference)
    result = dict(metric=metric, network=net.label, weights=weights, reference=args.reference, split=args.split, n_reference=int(reference.stats.get("n", 0)) if sources[args.reference].stats else n_reference,
                  resize="TensorFlow 1 bilinear to 299" if args.net == "inception" else "bicubic, antialiased", dtype=args.precision, inputs=inputs, scores={}, fd={}, n={}, fd_real={})
    print(f"reference {args.reference}" + (f" ({args.split})" if args.split else "") + f": {result['n_reference'] or 'unknown number of'} images"
          + (", its own statistics" if sources[args.reference].stats else "") + f"; network {net.label}, weights {weights}, resize {result['resize']}")
    if args.save_stats:
        np.savez(f"{args.save_stats}.part.npz", **{k: v for k, v in reference.stats.items() if k in STATISTICS[:4]}, network=net.label, weights=weights,
                 n=result["n_reference"], net=args.net, net_ckpt=os.path.abspath(args.net_ckpt) if args.net_ckpt else "", net_size=args.net_size or 0,
                 made=json.dumps(common.made()), inputs=json.dumps(inputs))
        os.replace(f"{args.save_stats}.part.npz", args.save_stats)
    rows, copies = np.sort(order[:RECONSTRUCTED]), None
    if args.vae:
        if len(args.samples) != 1:
            raise UserError(f"--vae: {len(args.samples)} sets of samples; expected the one that this VAE decoded")
        if reference.pool is None:
            raise UserError(f"--vae: {args.reference} holds statistics; expected a reference with images, which it reconstructs")
        vae = load_vae(args.vae).to(device, memory_format=torch.channels_last)
        inputs["vae"] = common.weights_hash(vae.state_dict())
        copies = measure(net, weights, reconstructions(vae, args.vae, sources[args.reference], rows, device, args.precision), device, args.precision)
    for name in args.samples:
        sample, n = measure(net, weights, sources[name], device, args.precision), sources[name].n
        s = result["scores"][name] = compare(reference, sample, order, device, args.bootstrap, (sources[args.reference].labels, None if sources[name].hash else sources[name].labels))
        if copies is not None and sample.pool is not None:
            s.update(compare_reconstructions(reference, rows, copies, sample, device))
        result["fd"][name], result["n"][name] = s["fd"], n
        if reference.pool is not None and 4 <= n <= n_reference // 2:  # what as many real images would score
            result["fd_real"][name] = frechet_distance(*statistics(reference.pool[order[n:]]), *statistics(reference.pool[order[:n]]))
        parts = [f"{metric}-{count_name(n) if n else 'stats'} {s['fd']:.2f}" + (f" +- {s['interval']:.2f}" if "interval" in s else "")]
        parts += [f"{label} {s[k]:.{digits}f}" for k, label, digits in (("sfid", "sFID", 2), ("inception_score", "IS", 2), ("precision", "precision", 4), ("recall", "recall", 4)) if k in s]
        parts += [f"class agreement {s['class_agreement']:.4f} (real images {s['class_agreement_real']:.4f})"] if "class_agreement" in s else []
        print(f"{name}: {', '.join(parts)}" + (f"  (as many real images: {result['fd_real'][name]:.2f})" if name in result["fd_real"] else ""))
        if "rfd" in s:
            print(f"  {args.vae}: reconstructions of {len(rows)} reference images, rFD {s['rfd']:.2f}; samples against them: {metric} {s['fd_to_reconstructions']:.2f}, "
                  f"precision {s['precision_to_reconstructions']:.4f}, recall {s['recall_to_reconstructions']:.4f}")
            warn_of_blur(s)
        if 0 < n < 2048:
            print(f"  {n} images are few: the distance is biased upwards; compare only with equal counts")
    if reference.pool is not None and n_reference >= 8:
        halves = np.array_split(order, 2)
        result["floor"] = frechet_distance(*(a for h in halves for a in statistics(reference.pool[h])))
        result["floor_n"] = len(halves[1])
        print(f"{metric}-{count_name(len(halves[1]))} {result['floor']:.2f}  floor: one half of the reference's images against the other")
    result["seconds"] = round(time.time() - begin, 1)
    if args.json:
        common.write_json(args.json, result)


def load_stats(path):
    """A file of --save-stats -> (its network with weights, its statistics): what train_sit.py --eval-stats scores with."""
    stats = load_source(path).stats
    if stats is None or not {"net", "net_ckpt", "net_size", "weights"} <= stats.keys():
        raise UserError(f"{path}: expected statistics written by fid.py score REFERENCE SAMPLES --save-stats {path}")
    net = load_net(*(stats[k].item() or None for k in ("net", "net_ckpt", "net_size")))
    found = common.weights_hash(net.state_dict())
    if found != str(stats["weights"]):
        raise UserError(f"{path}: made with weights {stats['weights']} of {net.label}, these are {found}; make it again")
    return net, stats


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
    """Decode the posterior mean of each image and compare: PSNR, SSIM and LPIPS as means over the images, the Fréchet distance of
    all reconstructions to all originals (rFID), and a picture."""
    device, _, _ = common.setup()
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32
    begin = time.time()
    vae = load_vae(args.vae).to(device, memory_format=torch.channels_last)
    images = data.ImageFolder(args.data, args.resolution or vae.config["resolution"], split=args.split)
    if images.size % vae.factor:
        raise UserError(f"--resolution {images.size}: expected a multiple of {vae.factor}, the VAE's downsampling factor")
    if args.dry_run:
        return print(f"{args.vae}: reconstruct {len(images)} images of {images.size} x {images.size}, latent {vae.config['z_channels']} x "
                     f"{images.size // vae.factor} x {images.size // vae.factor}, {sum(p.numel() for p in vae.parameters()) / 1e6:.1f} M")
    net = None if args.net == "none" else load_net(args.net, args.net_ckpt, args.net_size).to(device, memory_format=torch.channels_last)
    if net is not None and len(images) < 4:
        raise UserError(f"{args.data}: {len(images)} images; a covariance needs more (--net none: without the distance)")
    lpips = build_lpips(args.lpips_ckpt, device) if args.lpips else None
    rows = common.chunks(range(len(images)), 64)
    chosen = set(np.linspace(0, len(images) - 1, min(16, len(images) // 8 * 8 or len(images))).astype(int).tolist())  # all classes
    values, originals, copies, moments = [], [], [], (Moments(), Moments())
    for pixels, _, kept in tqdm(data.load_batches(images, rows), "reconstruct", len(rows), disable=None):
        x = data.to_float(pixels.to(device)).contiguous(memory_format=torch.channels_last)
        with common.autocast(device, args.precision):
            y = data.to_uint8(vae.decode(vae.encode(x).mean))
        each = [psnr(pixels, y.cpu()), ssim(pixels, y.cpu())]
        if lpips is not None:
            each.append(lpips(x, data.to_float(y)).flatten().double().cpu())
        values.append(torch.stack(each))
        if net is not None:
            moments[0].add(net(pixels.to(device)).cpu()), moments[1].add(net(y).cpu())
        at = [i for i, row in enumerate(kept) if row in chosen]
        originals.append(pixels[at]), copies.append(y.cpu()[at])
    values = torch.cat(values, 1)
    result = dict(vae=args.vae, inputs=dict(vae=common.weights_hash(vae.state_dict()), data=images.hash), data=args.data, split=args.split, n=values.shape[1], **dict(zip(("psnr", "ssim", "lpips"), values.mean(1).tolist())))
    shown = f"PSNR {result['psnr']:.2f} dB, SSIM {result['ssim']:.4f}" + (f", LPIPS {result['lpips']:.4f}" if lpips is not None else "")
    if net is not None:
        result.update(metric="rFID" if args.net == "inception" else f"FD({net.label})", fd=frechet_distance(*moments[0].result(), *moments[1].result()),
                      weights=common.weights_hash(net.state_dict()))
        shown += f", {result['metric']}-{count_name(result['n'])} {result['fd']:.2f}"
    result.update(dtype=args.precision, seconds=round(time.time() - begin, 1))
    print(f"{args.vae}: {shown} over {result['n']} images")
    if args.png:
        common.save_grid(torch.cat(originals + copies), args.png, columns=min(8, sum(map(len, originals))))
    if args.json:  # last: it marks the stage as done
        common.write_json(args.json, result)


# ---------------------------------------------------------------------------------------------------------------------
# The demo's report

def last_seconds(path):
    """Training time from the last line with losses of a metrics.jsonl."""
    try:
        return float([json.loads(line)["seconds"] for line in Path(path).read_text().splitlines() if '"seconds"' in line][-1])
    except common.DAMAGED:
        raise UserError(f"{path}: no training log with seconds; run the stage before")


def read_arm(folder, owner=None):
    """The scores of one arm from what its stages wrote (fd.json, recon.json; probe.json where the images have attributes), under the
    names that report.json and the study use: fd, rfd, fd_to_reconstructions, precision, recall, class_agreement, psnr, ssim,
    recon_fd, probe_f1, ... owner: the folder of its VAE, where that is another. -> (scores, probe F1 of baselines, fd.json).
    Raises UserError."""
    owner = owner or folder
    score, quality = read_json(folder / "fd.json"), read_json(owner / "recon.json")
    try:
        (found,), (n,) = score["scores"].values(), score["n"].values()
        if "rfd" not in found:
            raise UserError(f"{folder}/fd.json: no rFD in it; score again with: python fid.py score REFERENCE {folder}/samples.npz --vae {folder}/vae.pt --json {folder}/fd.json")
        probe = read_json(owner / "probe.json")["results"] if (owner / "probe.json").exists() else {}
        probed = next(iter(probe.values()), {})  # the VAE's comes first, then what it is compared with
        arm = dict(found, fd_n=n, psnr=quality["psnr"], ssim=quality["ssim"], recon_fd=quality.get("fd"), **({"lpips": quality["lpips"]} if "lpips" in quality else {}))
        arm |= {f"probe_{k}": v for k, v in probed.items() if isinstance(v, float) and k not in ("psnr", "seconds")}
        return arm, {k.split()[0]: r["f1"] for k, r in probe.items() if k == "majority" or k.startswith("pixels")}, score
    except (KeyError, TypeError, AttributeError, ValueError) as e:
        if isinstance(e, UserError):
            raise
        raise UserError(f"{folder}: not what the stages write ({type(e).__name__}: {e}); delete its fd.json, recon.json and probe.json and run the same command again")


# Columns of the demo's table: name in report.json, heading, digits
COLUMNS = (("psnr", "PSNR", 2), ("probe_f1", "probe F1", 4), ("fd", "gFD", 1), ("rfd", "rFD", 1), ("fd_to_reconstructions", "gFD to rec.", 1),
           ("precision", "precision", 3), ("recall", "recall", 3), ("precision_to_reconstructions", "P to rec.", 3), ("recall_to_reconstructions", "R to rec.", 3),
           ("class_agreement", "class", 3))


def report(args):
    """Collect what the stages wrote for each arm: RUN/report.json, RUN/report.png, and a table. Images without attributes have no probe.json."""
    run, arms = Path(args.run), {}
    for arm in args.arms:
        arms[arm], simple, score = read_arm(run / arm)
        arms[arm]["seconds"] = dict(train_vae=last_seconds(run / arm / "metrics.jsonl"), encode=read_json(run / arm / "latents/meta.json")["seconds"],
                                    train_sit=last_seconds(run / arm / "sit/metrics.jsonl"), sample=read_json(run / arm / "samples.json")["seconds"],
                                    fd=score["seconds"], recon=read_json(run / arm / "recon.json")["seconds"])
    baselines = dict(fd_floor=score["floor"], fd_floor_n=score["floor_n"], fd_real=max(score["fd_real"].values(), default=None), **{f"probe_f1_{n}": f1 for n, f1 in simple.items()})
    result = dict(arms=arms, baselines=baselines, network=score["network"], torch=torch.__version__, cpu=common.cpu_name(), threads=torch.get_num_threads())
    common.write_json(run / "report.json", result)
    draw_report(run, args.arms, read_json(args.study, list) if args.study and Path(args.study).exists() else [])
    columns = [c for c in COLUMNS if any(a.get(c[0]) is not None for a in arms.values())]
    print(f"{'':22}" + "".join(f"{title:>12}" for _, title, _ in columns) + f"   gFD = FD({score['network']})-{count_name(next(iter(arms.values()))['fd_n'])} to the training images, lower is better")
    for arm, a in arms.items():
        print(f"{arm:22}" + "".join(f"{a[k]:12.{digits}f}" if a.get(k) is not None else " " * 12 for k, _, digits in columns))
    for name, f1 in simple.items():
        print(f"probe F1 of {name}: {f1:.4f}")
    if baselines["fd_real"] is not None:
        print(f"gFD of as many real images: {baselines['fd_real']:.2f}")
    print(f"gFD of real images, half against half: {baselines['fd_floor']:.2f}")
    for arm, a in arms.items():
        warn_of_blur(a, f"{arm}: ")
    if not simple:
        print(f"no probe: no {run}/{args.arms[0]}/probe.json (images without attributes.csv have none)")
    print("seconds: " + ", ".join(f"{arm} {k} {v:.0f}" for arm, a in arms.items() for k, v in a["seconds"].items()) + f"\n{run}/report.json, {run}/report.png")


def read_curve(log):
    """Name of the distance and [(step, distance)] of a metrics.jsonl of train_sit.py --eval-every. Raises UserError."""
    try:
        records = [json.loads(line) for line in log.read_text("utf-8").splitlines()]
        found = [(k, r["step"], v) for r in records for k, v in r.items() if k.startswith(("FD(", "FID"))]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f"{log}: not a log of train_sit.py ({type(e).__name__}: {e}); run that arm again")
    if not found:
        raise UserError(f"{log}: no distances in it; expected a run with --eval-every")
    return found[0][0], [(step, v) for _, step, v in found]


def sheet_images(path, size, top=0.0, bottom=1.0):
    """The pictures (N, size, size, 3) in a share of the height of a grid that common.save_grid wrote."""
    with Image.open(path) as sheet:
        pixels = np.asarray(sheet.convert("RGB").crop((0, int(top * sheet.height), sheet.width, int(bottom * sheet.height))))
    rows, columns = pixels.shape[0] // size, pixels.shape[1] // size
    return pixels.reshape(rows, size, columns, size, 3).swapaxes(1, 2).reshape(-1, size, size, 3)


def tile(images, columns):
    """(N, S, S, 3) -> one picture, white where images lack."""
    rows, size = -(-len(images) // columns), images.shape[1]
    sheet = np.full((rows * columns, size, size, 3), 255, np.uint8)
    sheet[:len(images)] = images
    return sheet.reshape(rows, columns, size, size, 3).swapaxes(1, 2).reshape(rows * size, columns * size, 3)


def draw_curves(axis, run, arms, study):
    """gFD while the SiT trains: this run's, and behind it the study's long ones where there are any (mean over seeds)."""
    for i, arm in enumerate(arms):
        measure, curve = read_curve(run / arm / "sit/metrics.jsonl")
        colour = {"control": "black", "send": "crimson"}.get(arm, f"C{i}")
        axis.plot(*zip(*curve), "o-", color=colour, label=arm)
        long = [dict(map(tuple, r["curve"])) for r in study if r["arm"] == arm and r["curve_measure"] == measure]
        if long:
            steps = sorted(set.intersection(*map(set, long)))
            axis.plot(steps, [np.mean([c[s] for c in long]) for s in steps], color=colour, alpha=0.35, linewidth=3, label=f"{arm}, the study's mean of {len(long)}")
    axis.set(xlabel="steps of the SiT", ylabel="gFD (lower is better)", title="The same SiT on each arm's latents")
    axis.legend()


def draw_report(run, arms, study):
    """Each arm's samples from the same noise and labels, gFD while the SiT trained, originals and their reconstructions: RUN/report.png."""
    try:
        from matplotlib.figure import Figure
    except ImportError as e:
        raise UserError(f"cannot draw the report ({e}): pip install -r requirements-dev.txt")
    samples = {a: common.read_npz(run / a / "samples.npz", "arr_0")["arr_0"][:40] for a in arms}
    size = samples[arms[0]].shape[1]
    curves = '"eval_every": null' not in (run / arms[0] / "sit/metrics.jsonl").read_text("utf-8")
    figure = Figure((4.6 * (len(arms) + curves), 5.8), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(2.9, 1 + 0.1 * len(arms)))
    panels = above.subplots(1, len(arms) + curves, squeeze=False)[0]
    for axis, arm in zip(panels, arms):
        axis.imshow(tile(samples[arm], 8), interpolation="nearest")
        axis.set_title(f"{arm}: samples")
        axis.axis("off")
    if curves:
        draw_curves(panels[-1], run, arms, study)
    strips = [("originals", sheet_images(run / arms[0] / "recon.png", size, 0, 0.5))] + [(f"{a}: reconstructions", sheet_images(run / a / "recon.png", size, 0.5, 1)) for a in arms]
    for axis, (name, images) in zip(below.subplots(len(strips), 1), strips):
        axis.imshow(tile(images[:16], 16), interpolation="nearest")
        axis.set_ylabel(name, rotation=0, ha="right", va="center")
        axis.set(xticks=[], yticks=[])
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110, facecolor="white")
    common.save_png(Image.open(buffer).convert("RGB"), run / "report.png")


# ---------------------------------------------------------------------------------------------------------------------
# Speed

def timed(run, repeat=3):
    """Median seconds of run()."""
    seconds = []
    for _ in range(repeat):
        begin = time.time()
        run()
        seconds.append(time.time() - begin)
    return sorted(seconds)[len(seconds) // 2]


def bench(args):
    """Images/s of the Inception network in float32 beside torch-fidelity's (when installed), seconds of the Fréchet distance beside
    scipy's sqrtm, of precision and recall, on random images and features."""
    import scipy.linalg
    device, _, _ = common.setup()
    torch.backends.cudnn.allow_tf32, args.precision = False, "fp32"
    images = torch.randint(0, 256, (32, 3, 256, 256), dtype=torch.uint8, device=device)
    net, clock, moments = FIDInception(weights=False).to(device, memory_format=torch.channels_last), data.Clock(device), Moments()

    def step():
        with clock("network"):
            pool = net(images).cpu()
        with clock("statistics"):
            moments.add(pool)

    flops = data.count_flops(lambda: net(images[:1]))
    data.run_bench(args, "fid.py inception, 32 images of 256 x 256 at a time", device, step, len(images), flops, clock)
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        with tempfile.TemporaryDirectory() as folder:
            torch.save(net.net.state_dict(), f"{folder}/weights.pth")
            peer = FeatureExtractorInceptionV3("peer", ["2048", "logits_unbiased"], feature_extractor_weights_path=f"{folder}/weights.pth").to(device)
        with torch.no_grad():
            print(f"torch-fidelity: {len(images) / timed(lambda: peer(images)[0].cpu()):.1f} images/s")
    except ImportError:
        print("torch-fidelity: not installed")
    generator = np.random.default_rng(0)
    a, b = (statistics((generator.standard_normal((4096, 2048)) * (1 + np.arange(2048) / 500)).astype(np.float32)) for _ in range(2))
    ours, theirs = timed(lambda: frechet_distance(*a, *b)), timed(lambda: scipy.linalg.sqrtm(a[1] @ b[1]), 1)
    print(f"Fréchet distance, 2048-d: {ours:.1f} s; scipy.linalg.sqrtm of the product: {theirs:.1f} s ({theirs / ours:.1f} times)")
    features, begin = [torch.randn(args.images, 2048) for _ in range(2)], time.time()
    peak = data.peak_bytes(lambda: precision_recall(*features))
    print(f"precision and recall, {args.images} against {args.images}, 2048-d: {time.time() - begin:.1f} s, {peak / 2**30:.2f} GiB above the features")


def main():
    p = common.Parser(description=__doc__)
    commands = p.add_subparsers(dest="command", required=True)
    s = commands.add_parser("score", help="FID, sFID, IS, precision and recall of sample sets against a reference")
    s.add_argument("reference", help="image folder, .npz of images, or .npz of statistics")
    s.add_argument("samples", nargs="+", help="the same, or the word none: the reference's floors alone")
    s.add_argument("--split", choices=data.SPLITS, help="the reference's images that attributes.csv puts there")
    s.add_argument("--resolution", type=common.positive, help="crop of image folders in pixels (default: the short side of the first image)")
    s.add_argument("--vae", help=f"the samples' VAE: what it makes of {RECONSTRUCTED:,} reference images, and the samples against that")
    s.add_argument("--bootstrap", type=int, default=0, metavar="B", help="resample the samples B times: +- 1.96 standard deviations of the distance")
    s.add_argument("--cache", metavar="FILE", help="keep the features of the reference's images in this .npz for the next time")
    s.add_argument("--save-stats", help="write the reference's statistics to this .npz (ADM's keys), a reference for later runs")
    r = commands.add_parser("recon", help="rFID, PSNR, SSIM and LPIPS of a VAE")
    r.add_argument("--vae", required=True)
    r.add_argument("--data", required=True, help="image folder")
    r.add_argument("--split", choices=data.SPLITS)
    r.add_argument("--resolution", type=common.positive, help="crop in pixels (default: the VAE's)")
    r.add_argument("--lpips", type=int, default=1, choices=(0, 1))
    r.add_argument("--lpips-ckpt", help="local torchvision VGG16 weights instead of the download")
    r.add_argument("--png", help="write up to 16 originals and their reconstructions here")
    for c in (s, r):
        c.add_argument("--net", default="inception", help="inception (FID), or any timm model" + (", or none" if c is r else ""))
        c.add_argument("--net-ckpt", help="local weights of the network")
        c.add_argument("--net-size", type=int, help="input size of a timm model in pixels (default: its own)")
        c.add_argument("--dry-run", action="store_true", help="print the plan (images, network, memory), and end")
        c.add_argument("--json", help="write the scores here")
        c.add_argument("--precision", choices=("bf16", "fp32"), default="fp32", help="scores are float32 unless told otherwise")
    t = commands.add_parser("report", help="the demo's table and picture")
    t.add_argument("run", help="folder with a subfolder an arm")
    t.add_argument("--arms", nargs="+", default=["control", "send"])
    t.add_argument("--study", help="rows.json of study.py, whose curves are drawn behind this run's")
    if "--bench" in sys.argv[1:2]:  # no command
        b = common.Parser(prog="fid.py --bench", description="Speed of the network and the scores, beside peers.")
        data.bench_flags(b)
        b.add_argument("--images", type=common.positive, default=10_000, help="features of precision and recall (default 10,000)")
        args = b.parse_args()
        return bench(args)
    args = p.parse_args()
    for path in filter(None, (getattr(args, k, None) for k in ("json", "png", "save_stats", "cache") if not getattr(args, "dry_run", False))):
        common.open_out(Path(path).parent)
    {"score": score, "recon": recon, "report": report}[args.command](args)


if __name__ == "__main__":
    common.run_script(main)
