"""Stage 5: scores. FID, sFID, IS, precision, recall of samples; rFID, PSNR, SSIM, LPIPS of reconstructions.

    NET="--net tf_efficientnet_lite0 --net-ckpt W.pth --net-size 96"
    python fid.py score ref/VIRTUAL_imagenet256_labeled.npz out/samples.npz   # as ADM's, without TensorFlow
    python fid.py score out/demo/avatars out/demo/send/samples.npz --split train $NET
    python fid.py score out/demo/avatars none --split train $NET --save-stats stats.npz   # for train_sit.py
    python fid.py recon --vae out/demo/send/vae.pt --data out/demo/avatars --split test --net none --lpips 0

A source is an image folder, an .npz with arr_0 (uint8 NHWC), an .npz of statistics (mu, sigma, mu_s, sigma_s:
ADM's reference files, or ours of --save-stats), or ADM's files that hold both. A Fréchet distance is printed
with its network's name, input size and number of images, as FD(name@size)-2k: two such numbers compare only
when all of these agree. It is called FID for the Inception network of 2015 alone.
"""
import hashlib
import json
import os
import struct
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
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from tqdm import tqdm

import common
import data
from common import UserError
from mapper import empty_model, pretrained
from vae import load_vae

RECONSTRUCTED = 2000  # images of the reference that `score --vae` reconstructs
INCEPTION_URL = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
                 "pt_inception-2015-12-05-6726825d.pth")


# -----------------------------------------------------------------------------------------------------------
# Networks: uint8 (B, 3, H, W) -> pooled features (B, D) float32


class FIDInception(nn.Module):
    """The network with which FID is defined, of 2015-12-05. uint8 (B, 3, H, W) -> pool_3 (B, 2048); frozen.

    torchvision's Inception v3 with what differs in FID's graph: average pools that leave the padding out, a
    max pool in the last block, 1008 classes; TensorFlow 1's bilinear resize to 299, (x - 128) / 128.
    ckpt: a local file instead of the download; weights=False: random ones, for a plan or to measure speed.
    Raises UserError when the weights cannot be had or do not fit.
    """

    POOLS = "Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e", "Mixed_7b"

    def __init__(self, ckpt=None, weights=True):
        super().__init__()
        self.label, self.dim, self.seen = "inception", 2048, {}
        with warnings.catch_warnings():  # torchvision announces a slower start for random weights
            warnings.simplefilter("ignore")
            self.net = net = torchvision.models.inception_v3(
                weights=None, num_classes=1008, aux_logits=False, init_weights=False)
        for name in self.POOLS:
            getattr(net, name).branch_pool.register_forward_pre_hook(self.exclude_padding)
        last = net.Mixed_7c
        last.register_forward_pre_hook(lambda _, x: self.seen.update(last=x[0]))
        last.branch_pool.register_forward_pre_hook(lambda *_: F.max_pool2d(self.seen.pop("last"), 3, 1, 1))
        # sFID looks at seven channels of mixed_6/conv:0
        net.Mixed_6d.branch1x1.register_forward_hook(lambda _, __, y: self.seen.update(spatial=y[:, :7]))
        net.avgpool.register_forward_hook(lambda _, __, y: self.seen.update(pool=y.flatten(1)))
        if weights:
            # not in every copy of the weights, and unused
            counters = {k: v for k, v in net.state_dict().items() if k.endswith("num_batches_tracked")}
            source = f"--net-ckpt {ckpt}" if ckpt else INCEPTION_URL
            try:
                with common.rank_zero_first():
                    state = tensors_of(ckpt) if ckpt else torch.hub.load_state_dict_from_url(
                        INCEPTION_URL, map_location="cpu", check_hash=True, weights_only=True)
            except (OSError, RuntimeError) as e:  # no network, or a file with another checksum
                raise UserError(f"--net inception: its weights cannot be fetched ({common.brief(e)}); "
                                f"give {INCEPTION_URL.rsplit('/')[-1]} with --net-ckpt, or another "
                                "--net") from None
            common.load_weights(net, {**state, **counters}, source)
        self.eval().requires_grad_(False)

    @staticmethod
    def exclude_padding(_, args):
        """torchvision divides by 9 everywhere: at the border multiply by 9 / (pixels inside)."""
        x, = args
        return x / F.avg_pool2d(torch.ones_like(x[:1, :1]), kernel_size=3, stride=1, padding=1)

    @torch.no_grad()
    def features(self, images):
        """-> pool (B, 2048); for sFID spatial (B, 17 * 17 * 7), rows first as in TensorFlow; for IS class
        probabilities (B, 1008), the softmax of the logits without bias."""
        x = (resize_tf1(images.float(), 299) - 128) / 128
        self.net(x.contiguous(memory_format=torch.channels_last))
        pool, spatial = self.seen.pop("pool").float(), self.seen.pop("spatial").float()
        with torch.autocast(x.device.type, enabled=False):
            probabilities = (pool @ self.net.fc.weight.T).softmax(1)
        return pool, spatial.permute(0, 2, 3, 1).flatten(1), probabilities  # (B, 7, 17, 17) -> (B, 2023)

    def forward(self, images):
        return self.features(images)[0]


def resize_tf1(x, size):
    """Bilinear resize of TensorFlow 1, without half-pixel centres and antialiasing: output i reads position
    i * H / size, and beyond the last pixel that pixel. float (B, c, H, W) -> (B, c, size, size)."""
    def weights(n):  # (size, n), two numbers a row
        at = torch.arange(size, device=x.device) * (n / size)
        low = at.floor().long().clamp(max=n - 1)
        part = (at - low).clamp(0, 1)
        w = torch.zeros(size, n, device=x.device)
        w.scatter_add_(1, low[:, None], 1 - part[:, None])
        return w.scatter_add_(1, (low + 1).clamp(max=n - 1)[:, None], part[:, None])

    with torch.autocast(x.device.type, enabled=False):
        return weights(x.shape[-2]) @ x @ weights(x.shape[-1]).T


def tensors_of(ckpt, prefix=""):
    """The tensors in a checkpoint whose names begin with the prefix, without it."""
    state = common.load_checkpoint(ckpt)
    named = state.items() if isinstance(state, dict) else ()
    named = [(k, v) for k, v in named if isinstance(k, str) and isinstance(v, torch.Tensor)]
    return {k.removeprefix(prefix): v for k, v in named if k.startswith(prefix)}


class FeatureNet(nn.Module):
    """Pooled features of a timm model before its classifier. uint8 (B, 3, H, W) -> (B, D) float32; frozen.

    Images are resized (bicubic, antialiased when shrinking) to `size` (default: the model's own) and
    normalised with the model's mean and std. "vgg16" with a file: torchvision's convolutions, averaged over
    the image (what LPIPS's packaged weights hold, extras/packaged.py). weights=False: random, for a plan.
    """

    def __init__(self, name, ckpt=None, size=None, weights=True):
        super().__init__()
        if name == "vgg16" and ckpt:
            convolutions = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["D"])
            common.load_weights(convolutions, tensors_of(ckpt, "features."), f"--net-ckpt {ckpt}")
            self.net = nn.Sequential(convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten())
            name = "vgg16-conv"
            own_size, mean, std = 224, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
        else:
            spec, fixed = empty_model(name), {}  # refuses unknown names
            if size and hasattr(spec, "patch_embed"):  # a ViT is built for one input size
                fixed["img_size"], patch = size, spec.patch_embed.patch_size[0]
                if size % patch:
                    raise UserError(f"--net-size {size}: {name} needs a multiple of {patch}")
            self.net = pretrained(name, ckpt, "--net", weights, **fixed)
            config = self.net.pretrained_cfg
            own_size, mean, std = config["input_size"][-1], config["mean"], config["std"]
        self.size = size or own_size
        self.label = f"{name}@{self.size}"
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))
        self.eval().requires_grad_(False)
        # measured: a model's own number need not be the width after its head's hidden layer
        try:
            self.dim = self(torch.zeros(1, 3, self.size, self.size)).shape[1]
        except (AssertionError, RuntimeError) as e:
            raise UserError(f"--net {name}: takes no images of {self.size} x {self.size} pixels "
                            f"({common.brief(e, 100)}); choose another --net-size") from None

    @torch.no_grad()
    def forward(self, images):
        x = images.float() / 255
        shrinks = x.shape[-1] > self.size
        x = F.interpolate(x, (self.size, self.size), mode="bicubic", antialias=shrinks).clamp(0, 1)
        return self.net(((x - self.mean) / self.std).contiguous(memory_format=torch.channels_last)).float()


def load_net(name, ckpt=None, size=None, weights=True):
    """"inception", any timm model, or VGG16 from a file of its convolutions."""
    if name != "inception":
        return FeatureNet(name, ckpt, size, weights)
    if size:
        raise UserError(f"--net-size {size}: inception has one input size, 299")
    return FIDInception(ckpt, weights)


def build_lpips(ckpt, device, weights=True):
    """LPIPS with VGG16 (Zhang et al. 2018, the lpips package), frozen. weights=False: random, for a plan.
    Raises UserError when VGG16 cannot be had."""
    import lpips
    try:
        with common.rank_zero_first(), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # lpips asks torchvision in an old way
            net = lpips.LPIPS(net="vgg", pnet_rand=ckpt is not None or not weights, verbose=False)
    except OSError as e:
        raise UserError(f"LPIPS: torchvision's VGG16 weights cannot be fetched ({e}); give a local file with "
                        "--lpips-ckpt (vgg16-397923af.pth), or switch LPIPS off with --lpips 0") from None
    if ckpt is not None and weights:
        found = tensors_of(ckpt, "features.")
        places = [name.split(".", 1) for name in net.net.state_dict()]  # "slice2", "5.weight"
        common.load_weights(net.net, {f"{s}.{k}": found[k] for s, k in places if k in found}, ckpt)
    return net.to(device).eval().requires_grad_(False)


# -----------------------------------------------------------------------------------------------------------
# Scores of features


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)) of two Gaussians (Heusel et al. 2017,
    eq. 6): mu (D,), sigma (D, D), float64 -> float.

    tr (sigma1 sigma2)^(1/2) is the sum of the square roots of the eigenvalues of A sigma2 A with
    A = sigma1^(1/2), which is symmetric and positive semi-definite: right for singular covariances, where a
    general matrix square root fails. Raises UserError for shapes that differ or values that are not finite.
    """
    mu1, sigma1, mu2, sigma2 = (np.asarray(a, np.float64) for a in (mu1, sigma1, mu2, sigma2))
    if mu1.shape != mu2.shape or sigma1.shape != sigma2.shape:
        raise UserError(f"statistics of {len(mu1)} and {len(mu2)} dimensions: made with different networks")
    if not all(np.isfinite(a).all() for a in (mu1, sigma1, mu2, sigma2)):
        raise UserError("Fréchet distance: the features are not finite")
    values, vectors = np.linalg.eigh(sigma1)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ sigma2 @ root).clip(0)).sum()
    found = float(np.square(mu1 - mu2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * cross)
    noise = 1e-4 * (np.trace(sigma1) + np.trace(sigma2))  # square roots of eigenvalues that are rounding
    return 0.0 if -noise <= found <= 0 else found


def statistics(features, block=4096):
    """(N, D) -> mean (D,) and unbiased covariance (D, D), float64, without a float64 copy of the features and
    about the first block's mean, so that no digits are lost to a large one."""
    features, shift, total, outer = torch.as_tensor(features), None, 0, 0
    for x in features.split(block):
        x = x.double()
        shift = x.mean(0) if shift is None else shift
        x = x - shift
        total = total + x.sum(0)
        outer = outer + x.T @ x
    n = len(features)
    mean = total / n
    return (shift + mean).numpy(), ((outer - n * torch.outer(mean, mean)) / (n - 1)).numpy()


def inception_score(probs, split=5000):
    """exp of the mean KL(p(y|x) || p(y)) (Salimans et al. 2016), averaged over consecutive splits of 5,000 as
    ADM does: probs (N, classes) -> float."""
    scores = []
    for part in torch.as_tensor(probs).double().split(split):
        marginal = part.mean(0)
        entropy = torch.special.xlogy(marginal, marginal).sum()
        scores.append((torch.special.xlogy(part, part).sum(1).mean() - entropy).exp())
    return float(torch.stack(scores).mean())


def distance_blocks(a, b, block=4096):
    """Squared distances of rows: yields (slice of a, slice of b, (A, B) float32)."""
    for i in range(0, len(a), block):
        for j in range(0, len(b), block):
            x, y = a[i:i + block], b[j:j + block]
            d = x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.T
            yield slice(i, i + block), slice(j, j + block), d.clamp_min_(0)


def kth_distances(x, k):
    """Squared distance of each row to its k-th nearest other row: (N, D) -> (N,)."""
    nearest = torch.full((len(x), k + 1), torch.inf, device=x.device)  # the row itself is one of k + 1
    for rows, _, d in distance_blocks(x, x):
        nearest[rows] = torch.cat([nearest[rows], d], 1).topk(k + 1, largest=False).values
    return nearest.amax(1)


def precision_recall(ref, sample, k=3):
    """Improved precision and recall (Kynkäänniemi et al. 2019, eqs. 2 and 3) of features (N, D), (M, D): the
    share of samples within the k-nearest-neighbour ball of some reference, and the share of references within
    that of some sample. In blocks: memory beyond the features is bounded. Raises UserError for k or fewer
    rows, and for features that are not finite."""
    ref, sample = (torch.as_tensor(f).float() for f in (ref, sample))
    if min(len(ref), len(sample)) <= k:
        raise UserError(f"precision and recall: {len(ref)} and {len(sample)} images; expected more than {k}")
    if not (ref.isfinite().all() and sample.isfinite().all()):
        raise UserError("precision and recall: the features are not finite")
    centre = ref.mean(0)  # distances stay, rounding shrinks
    ref, sample = ref - centre, sample - centre
    radius_ref, radius_sample = kth_distances(ref, k), kth_distances(sample, k)
    precise = torch.zeros(len(sample), dtype=torch.bool, device=sample.device)
    recalled = torch.zeros(len(ref), dtype=torch.bool, device=ref.device)
    for r, s, d in distance_blocks(ref, sample):
        precise[s] |= (d <= radius_ref[r, None]).any(0)
        recalled[r] |= (d <= radius_sample[s]).any(1)
    return precise.float().mean().item(), recalled.float().mean().item()


def class_agreement(ref, ref_labels, sample, sample_labels):
    """Do samples show their class? A linear classifier (least squares to one-hot labels, with a ridge) of
    reference features (N, D) is fitted on four fifths of them -> (share of samples that it puts in their
    class, the same share of the last fifth)."""
    x, s = torch.as_tensor(ref).double(), torch.as_tensor(sample).double()
    centre, scale = x.mean(0), x.std(0) + 1e-6
    x, s = (torch.cat([(v - centre) / scale, torch.ones(len(v), 1)], 1) for v in (x, s))
    y, n = torch.as_tensor(ref_labels).long(), len(x) * 4 // 5
    gram = x[:n].T @ x[:n] + 1e-2 * n * torch.eye(x.shape[1], dtype=torch.float64)
    weight = torch.linalg.solve(gram, x[:n].T @ F.one_hot(y[:n]).double())
    right = lambda v, label: ((v @ weight).argmax(1) == torch.as_tensor(label)).double().mean().item()
    return right(s, sample_labels), right(x[n:], y[n:])


# -----------------------------------------------------------------------------------------------------------
# Sources of images and statistics

# What a file of statistics may hold: ADM's four arrays, and what --save-stats adds of the network
STATISTICS = ("mu", "sigma", "mu_s", "sigma_s", "n", "network", "weights", "net", "net_ckpt", "net_size")


@dataclass
class Source:
    """n images, or 0: read(rows) -> (uint8 (B, 3, H, W), those of the rows that could be read); size: their
    short side in pixels; labels (n,) or None; hash: of the content. stats: arrays mu, sigma, ... or None.

    measure() adds rows (m,), the images that could be read, their features pool (m, D) float32 and with
    inception probabilities (m, 1008), or None without images; and stats where the file brought none."""
    name: str
    n: int = 0
    read: object = None
    size: int = None
    labels: np.ndarray = None
    hash: str = ""
    stats: dict = None
    rows: np.ndarray = None
    pool: torch.Tensor = None
    probabilities: torch.Tensor = None


def load_source(path, split=None, size=None):
    """An image folder, cropped to `size` pixels (default: the median short side of its images), or an .npz,
    whose images stay as they are. Raises UserError."""
    if Path(path).suffix == ".npz":
        return load_npz(path)
    images = settle_size(data.ImageFolder(path, size, split=split))

    def read(rows):
        pixels, _, kept, bad = data.read_rows(images, rows)
        images.note_bad(bad)
        return pixels, kept

    labels = np.asarray(images.labels) if len(images.classes) > 1 else None
    return Source(str(path), len(images), read, images.size, labels, images.hash)


def settle_size(images):
    """Give a folder without a size the median short side of about 256 of its images (a single file decides
    nothing), and say the size, and whether images are enlarged to it."""
    sides = data.short_sides(images)
    images.size = images.size or int(np.median(sides or [1]))
    print(f"{images.root}: {len(images)} images, cropped to {images.size} x {images.size}")
    small = sum(side < images.size for side in sides)
    if small:
        print(f"warning: {small} of {len(sides)} images looked at are smaller (median short side "
              f"{np.median(sides):.0f} pixels); they are enlarged, which changes every score")
    return images


def load_npz(path):
    try:
        common.check_zip(path)
        with np.load(path, allow_pickle=False) as z:
            stats = {k: z[k] for k in STATISTICS if k in z.files} if {"mu", "sigma"} <= set(z.files) else None
            array = map_array(path, "arr_0") if "arr_0" in z.files or stats is None else None
            labels = z["arr_1"] if "arr_1" in z.files else None
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; make it: python sample.py --sit SIT --out {path} (samples), "
                        f"python fid.py score REFERENCE none --save-stats {path} (statistics)") from None
    except common.DAMAGED as e:
        raise common.damage(e, f"{path}: expected an .npz with arr_0 (images), or mu and sigma (statistics) "
                               f"({type(e).__name__}: {e})") from None
    digest = hashlib.sha256(np.memmap(path, np.uint8, "r")).hexdigest()[:16]
    source = Source(str(path), hash=digest, stats=stats)
    if array is None:
        return source
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[-1] != 3:
        raise UserError(f"{path}: arr_0 is {array.dtype} {array.shape}; expected uint8 (N, H, W, 3), "
                        "values from 0 to 255, channels last")
    if labels is not None and labels.shape == array.shape[:1] and labels.dtype.kind in "iu":
        source.labels = labels

    def read(rows):
        return torch.from_numpy(np.array(array[rows])).permute(0, 3, 1, 2), rows  # NHWC -> NCHW

    source.n, source.size, source.read = len(array), min(array.shape[1:3]), read
    return source


def map_array(path, name):
    """An array of an .npz, memory-mapped when it is stored without compression (np.savez, sample.py): 50,000
    samples are 10 GB."""
    with zipfile.ZipFile(path) as z:
        info = z.getinfo(f"{name}.npy")
    with open(path, "rb") as f:
        f.seek(info.header_offset + 26)  # the local header's lengths of name and extra field
        f.seek(sum(struct.unpack("<HH", f.read(4))), os.SEEK_CUR)
        if info.compress_type == zipfile.ZIP_STORED and np.lib.format.read_magic(f) == (1, 0):
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(f)
            if not (fortran or dtype.hasobject or 0 in shape):
                return np.memmap(f, dtype, "r", f.tell(), shape)
    with np.load(path, allow_pickle=False) as z:
        return z[name]


def load_sources(args):
    """[the reference, the sample sets]. Folders are cropped to --resolution, else to the side of the first
    sample set's images, else to the reference's own median."""
    size, samples = args.resolution, []
    for name in args.samples if args.samples != ["none"] else ():
        source = load_source(name, args.split if name == args.reference else None, size)
        if Path(name).is_dir():
            source.labels = None  # it has a numbering of its own
            suffixes = {Path(f).suffix.lower() for f in data.find_images(name)[:100]}
            if name != args.reference and suffixes & {".jpg", ".jpeg", ".jfif"}:
                print(f"warning: {name} holds JPEG files; their artefacts change every score; write PNG")
        size = size or source.size
        samples.append(source)
    reference = load_source(args.reference, args.split, size)
    sizes = sorted({s.size for s in (reference, *samples) if s.n})
    if len(sizes) > 1:
        print(f"warning: images of {' and '.join(map(str, sizes))} pixels a side: their distance is one of "
              "sharpness too; --resolution crops folders to one size")
    if args.vae and (len(samples) != 1 or not reference.n):
        raise UserError(f"--vae: {len(samples)} sets of samples, {reference.name} with {reference.n} images; "
                        "expected the one set that this VAE decoded, and a reference of images")
    return reference, *samples


def reconstructions(path, source, order, device, precision):
    """Of the source's images at the first places of `order`, what the VAE at `path` gives back: a sample of
    the posterior, decoded; its noise depends on the row alone."""
    vae = load_vae(path).to(device, memory_format=torch.channels_last)
    rows = source.rows[np.sort(order[:RECONSTRUCTED])]
    vae.latent_shape(source.size)  # raises where there is none

    @torch.no_grad()
    def read(places):
        pixels, kept = source.read([int(rows[i]) for i in places])
        x = data.to_float(pixels.to(device)).contiguous(memory_format=torch.channels_last)
        with common.autocast(device, precision):
            posterior = vae.encode(x)
            eps = data.draw_noise(0, kept, 0, posterior.mean.shape[1:])[1].to(device)
            return data.to_uint8(vae.decode(posterior.sample(eps))), places

    digest = common.weights_hash(vae.state_dict())
    return Source(f"reconstructions by {path}", len(rows), read, source.size, hash=digest)


# -----------------------------------------------------------------------------------------------------------
# Features of a source


def measure(source, net, weights, device, precision):
    """Features of a source, and its statistics where its file brings none. weights: the network's hash.
    Images that cannot be read are left out. Raises UserError for statistics of another network, for fewer
    than four images, for features that are not finite."""
    check_statistics(source, net, weights)
    rows, pool, spatial, probabilities = [], [], [], []
    batch = max(1, min(64, 2 ** 24 // (source.size or 1) ** 2))  # fewer of large images, for memory's sake
    for wanted in tqdm(common.chunks(range(source.n), batch), f"features {source.name}", disable=None):
        images, kept = source.read(wanted)
        if not kept:
            continue
        with common.autocast(device, precision):
            if isinstance(net, FIDInception):
                features, at_17, p = net.features(images.to(device))
                spatial.append(at_17.cpu())
                probabilities.append(p.cpu())
            else:
                features = net(images.to(device))
        rows += kept
        pool.append(features.cpu())
        if not pool[-1].isfinite().all():
            raise UserError(f"{source.name}: features of images {kept[0]} to {kept[-1]} are not finite; use "
                            "--precision fp32, or other weights")
    if source.stats is None and len(rows) < 4:
        raise UserError(f"{source.name}: {len(rows)} images; a covariance needs more")
    source.rows = np.array(rows, int)
    source.pool, source.probabilities = (torch.cat(v) if v else None for v in (pool, probabilities))
    if source.stats is None:
        source.stats = dict(zip(("mu", "sigma"), statistics(source.pool)))
        if spatial:
            source.stats.update(zip(("mu_s", "sigma_s"), statistics(torch.cat(spatial), block=batch)))
    return source


def check_statistics(source, net, weights):
    """Raise UserError for statistics of another network; a file that names none is ADM's, of inception."""
    stats = source.stats
    if stats is None:
        return
    network, mu, sigma = str(stats.get("network", "inception")), stats["mu"], stats["sigma"]
    if network != net.label or mu.shape != (net.dim,) or sigma.shape != (net.dim, net.dim):
        raise UserError(f"{source.name}: statistics of {network} with mu {mu.shape} and sigma {sigma.shape}; "
                        f"--net {net.label} has {net.dim} dimensions")
    if str(stats.get("weights", weights)) != weights:
        raise UserError(f"{source.name}: made with weights {stats['weights']} of {network}, these are "
                        f"{weights}; make it again")


def measure_once(path, key, source, run):
    """run(source), which is measure(), unless the .npz `path` (None: none) keeps what it found under the same
    key: images, network, precision."""
    if not path or not Path(path).exists():
        run(source)
        if path and source.pool is not None:
            common.write_npz(path, key=key, pool=source.pool.numpy(), rows=source.rows, **source.stats)
        return
    try:
        kept = common.read_npz(path)
        found, pool, rows = str(kept.pop("key")), torch.from_numpy(kept.pop("pool")), kept.pop("rows")
    except common.DAMAGED as e:
        raise common.damage(e, f"--cache {path}: not readable ({type(e).__name__}: {e}); delete it") from None
    if found != key:
        raise UserError(f"--cache {path}: holds features of {found}; this command needs those of {key}; give "
                        "another file or delete it")
    source.rows, source.pool, source.stats = rows, pool, kept


# -----------------------------------------------------------------------------------------------------------
# Scores of samples


def distance(a, b, keys=("mu", "sigma")):
    return frechet_distance(*(a.stats[k] for k in keys), *(b.stats[k] for k in keys))


def count_name(n):
    """2000 -> "2k", 1500 -> "1500"."""
    return f"{n // 1000}k" if n and n % 1000 == 0 else str(n)


def compare(reference, sample, order, device, copies=None):
    """All scores that the two have the features for: {name: float}. order: a fixed permutation of the
    reference's images. copies: a VAE's reconstructions of them, which tell its part of the distance (rFD, to
    their originals) from the generator's (the samples against the reconstructions)."""
    out = {"fd": distance(reference, sample)}
    if "mu_s" in reference.stats and "mu_s" in sample.stats:
        out["sfid"] = distance(reference, sample, ("mu_s", "sigma_s"))
    if sample.probabilities is not None:
        out["inception_score"] = inception_score(sample.probabilities)
    if sample.pool is None or reference.pool is None:
        return out
    chosen = reference.pool[np.sort(order[:10_000])]  # as many as ADM's references have
    if min(len(chosen), len(sample.pool)) > 3:
        out["precision"], out["recall"] = precision_recall(chosen.to(device), sample.pool.to(device))
    if reference.labels is not None and sample.labels is not None:
        real, asked = reference.labels[reference.rows], sample.labels[sample.rows]
        if set(asked.tolist()) <= set(real.tolist()):
            some = order[:50_000]  # of ImageNet: a classifier needs no more
            out["class_agreement"], out["class_agreement_real"] = class_agreement(
                reference.pool[some], real[some], sample.pool, asked)
    if copies is not None:
        originals = statistics(reference.pool[np.sort(order[:RECONSTRUCTED])])
        out["rfd"] = frechet_distance(*originals, copies.stats["mu"], copies.stats["sigma"])
        out["fd_to_reconstructions"] = distance(copies, sample)
        out["precision_to_reconstructions"], out["recall_to_reconstructions"] = precision_recall(
            copies.pool.to(device), sample.pool.to(device))
    return out


def score(args):
    """Every sample set against the reference, and the floors: one half of the reference against the other,
    and as many real images as samples."""
    device, _, _ = common.setup()
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32
    begin = time.time()
    for path in {args.reference, *args.samples} - {"none"}:
        if not Path(path).exists():
            load_source(path)  # says so, before weights are fetched
    net = load_net(args.net, args.net_ckpt, args.net_size, weights=not args.dry_run)
    reference, *samples = load_sources(args)
    if args.dry_run:
        counts = " and ".join(f"{s.n} images of {s.name}" for s in (reference, *samples))
        return print(f"{net.label}, {sum(p.numel() for p in net.parameters()) / 1e6:.1f} M: {counts}")
    net, weights = net.to(device, memory_format=torch.channels_last), common.weights_hash(net.state_dict())
    result = describe(args, net, weights, reference, samples)

    features = lambda source: measure(source, net, weights, device, args.precision)
    key = f"images {reference.hash}, crop {reference.size}, {net.label} {weights} in {args.precision}"
    measure_once(args.cache, key, reference, features)
    order = np.random.Generator(np.random.Philox(key=0)).permutation(len(reference.rows))
    copies = None
    if args.vae:
        copies = features(reconstructions(args.vae, reference, order, device, args.precision))
        result["inputs"]["vae"] = copies.hash
    for source in samples:
        features(source)

    among_real = lambda a, b: frechet_distance(*statistics(reference.pool[a]), *statistics(reference.pool[b]))
    for sample in samples:
        scores, n = compare(reference, sample, order, device, copies), len(sample.rows)
        if 4 <= n <= len(order) // 2:  # what as many real images would score
            result["fd_real"][sample.name] = among_real(order[n:], order[:n])
        result["scores"][sample.name] = scores
        result["fd"][sample.name] = scores["fd"]
        result["n"][sample.name] = n
    if len(order) >= 8:
        half, other = np.array_split(order, 2)
        result["floor"], result["floor_n"] = among_real(half, other), len(other)

    if result["n_reference"] is None:
        result["n_reference"] = len(order)
    result["seconds"] = round(time.time() - begin, 1)
    print_scores(result, reference.n - len(order))
    if args.save_stats:
        save_stats(args, reference, result)
    if args.json:
        common.write_json(args.json, result)


def describe(args, net, weights, reference, samples):
    """Begin the record that --json keeps: what the scores are relative to."""
    inception = args.net == "inception"
    known = reference.stats and int(reference.stats.get("n", 0))  # may be of more images than are at hand
    return dict(metric="FID" if inception else f"FD({net.label})", network=net.label, weights=weights,
                reference=reference.name, split=args.split, n_reference=known, size=reference.size,
                resize="TensorFlow 1 bilinear to 299" if inception else "bicubic, antialiased",
                dtype=args.precision, inputs={s.name: s.hash for s in (reference, *samples)},
                scores={}, fd={}, n={}, fd_real={})


def print_scores(result, skipped):
    """Scores by their names in the record."""
    metric, counts = result["metric"], sorted(set(result["n"].values()) - {0})
    print(f"reference {result['reference']} ({result['split'] or 'all'}): "
          f"{result['n_reference'] or 'unknown number of'} images" + f", {skipped} unreadable" * bool(skipped)
          + f"; network {result['network']}, weights {result['weights']}, resize {result['resize']}")
    for name, scores in result["scores"].items():
        n = result["n"][name]
        text = f"{name}: {metric}-{count_name(n) if n else 'stats'} {scores['fd']:.2f}"
        text += f" (as many real images {result['fd_real'][name]:.2f})" if name in result["fd_real"] else ""
        print(text + "".join(f", {k} {v:.4f}" for k, v in scores.items() if k != "fd"))
        warn_of_blur(scores)
    if "floor" in result:
        print(f"{metric}-{count_name(result['floor_n'])} {result['floor']:.2f}  floor: one half of the "
              "reference's images against the other")
    few = []
    if counts and (len(counts) > 1 or counts[0] < 2048):
        few.append(f"samples of {' and '.join(map(str, counts))} images")
    if counts and (result["n_reference"] or 2048) < 2048:
        few.append(f"a reference of {result['n_reference']}")
    if few:
        print(f"warning: {', '.join(few)}: the fewer, the higher the distance; compare equal counts only")


def warn_of_blur(scores, whose=""):
    if scores.get("rfd", 0) > scores["fd"] / 2:
        print(f"  warning: {whose}the VAE's blur rules this score: rFD is more than half of the distance; "
              "compare the distance to the reconstructions")


def save_stats(args, reference, result):
    """ADM's arrays, and what load_stats needs to build the same network again."""
    common.write_npz(
        args.save_stats, **{k: v for k, v in reference.stats.items() if k in STATISTICS[:4]},
        network=result["network"], weights=result["weights"], n=result["n_reference"], net=args.net,
        net_ckpt=os.path.abspath(args.net_ckpt) if args.net_ckpt else "", net_size=args.net_size or 0,
        made=json.dumps(common.made()), inputs=json.dumps(result["inputs"]))


def load_stats(path):
    """A file of --save-stats -> (its network with weights, its statistics), for train_sit.py --eval-stats."""
    try:
        source = load_source(path)
        if source.stats is None or not {"net", "net_ckpt", "net_size", "weights"} <= source.stats.keys():
            raise UserError("expected a file of: python fid.py score REFERENCE none --save-stats FILE")
        net = load_net(*(source.stats[k].item() or None for k in ("net", "net_ckpt", "net_size")))
        check_statistics(source, net, common.weights_hash(net.state_dict()))
    except UserError as e:
        raise UserError(f"--eval-stats {path}: {str(e).removeprefix(f'{path}: ')}") from None
    return net, source.stats


# -----------------------------------------------------------------------------------------------------------
# Reconstruction


def psnr(x, y):
    """uint8 (B, 3, H, W) twice -> peak signal-to-noise ratio of each image in dB (B,); inf for equal ones."""
    mse = (x.double() - y.double()).square().mean((1, 2, 3))
    return 10 * torch.log10(255 ** 2 / mse)


def ssim(x, y):
    """uint8 (B, 3, H, W) twice -> structural similarity (B,) (Wang et al. 2004): 11 x 11 Gaussian window of
    sigma 1.5, data range 255, mean over channels and over the positions where the window fits."""
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
    """Decode the posterior mean of each image and compare: PSNR, SSIM and LPIPS as means over the images, the
    Fréchet distance of all reconstructions to all originals (rFID), and a picture."""
    device, _, _ = common.setup()
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32
    begin = time.time()
    vae = load_vae(args.vae).to(device, memory_format=torch.channels_last)
    size = args.resolution or vae.config["resolution"]
    vae.latent_shape(size)  # raises where there is none
    if size < 11:
        raise UserError(f"--resolution {size}: SSIM's window has 11 pixels a side; expected as many or more")
    images = settle_size(data.ImageFolder(args.data, size, split=args.split))
    if args.dry_run:
        return print(f"{args.vae}, {sum(p.numel() for p in vae.parameters()) / 1e6:.1f} M parameters")
    net = lpips = None
    if args.net != "none":
        net = load_net(args.net, args.net_ckpt, args.net_size).to(device, memory_format=torch.channels_last)
        if len(images) < 4:
            raise UserError(f"{args.data}: {len(images)} images; a covariance needs more (or --net none)")
    if args.lpips:
        lpips = build_lpips(args.lpips_ckpt, device)

    rows, most = common.chunks(range(len(images)), 64), min(16, len(images) // 8 * 8 or len(images))
    shown = set(np.linspace(0, len(images) - 1, most).astype(int).tolist())  # in the picture: of all classes
    values, originals, copies, features = [], [], [], ([], [])
    loaded = data.load_batches(images, rows, 4 * (device.type == "cuda"))
    for pixels, _, kept in tqdm(loaded, "reconstruct", len(rows), disable=None):
        if not kept:
            continue
        moved = pixels.to(device)
        x = data.to_float(moved).contiguous(memory_format=torch.channels_last)
        with common.autocast(device, args.precision):
            y = data.to_uint8(vae.decode(vae.encode(x).mean))
        copy = y.cpu()
        each = [psnr(pixels, copy), ssim(pixels, copy)]
        if lpips is not None:
            each.append(lpips(x, data.to_float(y)).flatten().double().cpu())
        values.append(torch.stack(each))
        if net is not None:
            features[0].append(net(moved).cpu())
            features[1].append(net(y).cpu())
        at = [i for i, row in enumerate(kept) if row in shown]
        originals.append(pixels[at])
        copies.append(copy[at])

    values = torch.cat(values, 1)  # (2 or 3 scores, N)
    scores = dict(zip(("psnr", "ssim", "lpips"), values.mean(1).tolist()))
    if net is not None:
        of_originals, of_copies = (statistics(torch.cat(f), block=64) for f in features)
        scores["fd"] = frechet_distance(*of_originals, *of_copies)
    result = dict(vae=args.vae, inputs=dict(vae=common.weights_hash(vae.state_dict()), data=images.hash),
                  data=args.data, split=args.split, n=values.shape[1], **scores)
    if net is not None:
        result["metric"] = "rFID" if args.net == "inception" else f"FD({net.label})"
        result["weights"] = common.weights_hash(net.state_dict())
    result.update(dtype=args.precision, seconds=round(time.time() - begin, 1))
    fd = f"{result.get('metric')}-{count_name(result['n'])}"
    text = ", ".join(f"{fd if k == 'fd' else k.upper()} {v:.4f}" for k, v in scores.items())
    print(f"{args.vae}: {text} over {result['n']} images")
    if args.png:
        common.save_grid(torch.cat(originals + copies), args.png, columns=min(8, sum(map(len, originals))))
    if args.json:  # last: it marks the stage as done
        common.write_json(args.json, result)


# -----------------------------------------------------------------------------------------------------------


def parse_args():
    p = common.Parser(description=__doc__)
    commands = p.add_subparsers(dest="command", required=True)
    s = commands.add_parser("score", help="FID, sFID, IS, precision and recall of sample sets")
    s.add_argument("reference", help="image folder, .npz of images, or .npz of statistics")
    s.add_argument("samples", nargs="+", help="the same, or the word none: the reference's floors alone")
    s.add_argument("--vae", help="the samples' VAE: rFD, and the samples against its reconstructions")
    s.add_argument("--cache", metavar="FILE", help="keep the features of the reference's images in this .npz")
    s.add_argument("--save-stats", type=common.npz_name, metavar="FILE",
                   help="write the reference's statistics to this .npz")
    r = commands.add_parser("recon", help="rFID, PSNR, SSIM and LPIPS of a VAE")
    r.add_argument("--vae", required=True, help="checkpoint, in any format of load_vae")
    r.add_argument("--data", required=True, help="image folder")
    r.add_argument("--lpips", type=int, default=1, choices=(0, 1), help="0: leave LPIPS out")
    r.add_argument("--lpips-ckpt", help="local torchvision VGG16 weights instead of the download")
    r.add_argument("--png", metavar="FILE", help="write up to 16 originals and their reconstructions here")
    for c in (s, r):
        c.add_argument("--split", choices=data.SPLITS, help="the images that attributes.csv puts there")
        c.add_argument("--resolution", type=common.side, help="crop of image folders in pixels (recon: "
                       "the VAE's; score: the samples' side, else the reference's median short side)")
        c.add_argument("--net", default="inception", help="inception (FID), any timm model; recon: or none")
        c.add_argument("--net-ckpt", help="local weights of the network")
        c.add_argument("--net-size", type=common.side, help="input size of a timm model in pixels "
                       "(default: its own)")
        c.add_argument("--precision", choices=("bf16", "fp32"), default="fp32", help="of the networks")
        c.add_argument("--json", metavar="FILE", help="write the scores here")
        c.add_argument("--dry-run", action="store_true", help="print what would be scored, and end")
    return p.parse_args()


def main():
    args = parse_args()
    for flag in () if args.dry_run else ("json", "png", "cache", "save_stats"):
        if getattr(args, flag, None):
            common.open_file(getattr(args, flag), f"--{flag.replace('_', '-')}")
    stats = getattr(args, "save_stats", None)
    if stats and zipfile.is_zipfile(stats) and "arr_0.npy" in zipfile.ZipFile(stats).namelist():
        raise UserError(f"--save-stats {stats}: holds images; choose another name")
    dict(score=score, recon=recon)[args.command](args)


if __name__ == "__main__":
    common.run_script(main)
