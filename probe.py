"""Stage 6: which VAE will a diffusion model like? Linear probing of attributes (arXiv 2601.05823, section 4), and its rivals.

    python probe.py out/demo/control/vae.pt out/demo/send/vae.pt --data out/demo/avatars --json out/demo/probe.json
    python probe.py a/vae.pt b/vae.pt --data celeba --rivals --png directions.png     # CelebA as it is distributed
    python probe.py correlate out/demo out/demo_1 out/demo_2 --png scatter.png        # does it predict the Fréchet distance?
    python probe.py correlate --paper
    python probe.py --bench 3                                                         # speed, on random features

One logistic regression an attribute on the flattened posterior mean, trained on the table's train split, its strength
chosen on val, scored on test. The majority guess and a probe on as many raw pixels as the latent has numbers stand
beside it, so that good can be told from bad.
"""
import argparse
import csv
import io
import math
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.stats
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from tqdm import tqdm

import common
import data
from common import UserError, read_json
from fid import psnr
from mapper import VFM
from vae import load_vae

STRENGTHS = (1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4)  # L2 weights tried, strongest first (each starts from the one before)
IN_MEMORY = 2 ** 29  # features with more numbers than this lie in a file, in float16 (CelebA on f16d32: 1.7e9)
PIECE = 2 ** 24  # numbers of them that are computed with at a time
BLOCK = 2048  # columns whose covariance is diagonalised together
REACH = 4.0  # how far an attribute is moved, in standard deviations of its logit


# ---------------------------------------------------------------------------------------------------------------------
# The probe

@dataclass
class Probe:
    """logits = (X - mean) @ weight + bias for features X (N, D); weight (D, A), bias (A,), strength (A,) the L2 chosen, mean (D,)."""
    weight: torch.Tensor
    bias: torch.Tensor
    strength: torch.Tensor
    mean: torch.Tensor

    def __call__(self, X):
        return torch.cat([(x - self.mean) @ self.weight + self.bias for _, x in pieces(X)])


def pieces(X, device="cpu"):
    """(slice, float32 rows on the device) of X (N, D), which may lie in a file, a piece at a time."""
    size = max(1, PIECE // X.shape[1])
    for i in range(0, len(X), size):
        yield slice(i, i + size), X[i:i + size].to(device).float()


def principal_axes(X, device):
    """Columns of X (N, D) -> mean (D,), std (D,), inf for a column that is constant but for rounding, and of the standardised
    columns, in B blocks of at most BLOCK, the variance along each principal axis (D, 1) and the axes (B, D/B, D/B), one a column."""
    n, D = X.shape
    blocks = next(b for b in range(1, D + 1) if D % b == 0 and D // b <= BLOCK)
    mean = (sum(x.sum(0, dtype=torch.float64) for _, x in pieces(X, device)) / n).float()
    square = torch.zeros(blocks, D // blocks, D // blocks, device=device)
    for _, x in pieces(X, device):
        z = (x - mean).view(len(x), blocks, -1).transpose(0, 1)
        square += z.mT @ z
    std = (square.diagonal(dim1=1, dim2=2) / max(1, n - 1)).sqrt()  # (B, D/B)
    std = torch.where(std > 1e-6 * mean.view(std.shape).abs().clamp_min(1e-6), std, torch.inf)
    power, axes = torch.linalg.eigh(square / n / (std[:, :, None] * std[:, None]))
    return mean, std.flatten(), power.clamp_min(0).view(D, 1), axes


def bce(logits, Y):
    """Mean binary cross-entropy of each attribute over its known labels: logits, Y (N, A), nan = unknown -> (A,)."""
    known = ~Y.isnan()
    loss = F.binary_cross_entropy_with_logits(logits, Y.nan_to_num(), reduction="none") * known
    return loss.sum(0) / known.sum(0).clamp_min(1)


def fit_probe(X, Y, X_val, Y_val, steps=200, tolerance=1e-3, device="cpu", progress=None, clock=data.Clock(torch.device("cpu"))):
    """Multi-label logistic regression: X (N, D), Y (N, A) in {0, 1, nan} -> Probe (on the CPU).

    Minimises, for each attribute, mean cross-entropy + strength / 2 |w|^2 on features standardised with the training
    set's mean and std (bias free of penalty), and keeps the strength with the least cross-entropy on the validation set.
    Full-batch L-BFGS, until no gradient exceeds `tolerance` (or `steps`, and then it says so), in coordinates along the
    features' principal axes, scaled by the Hessian's diagonal there: in raw coordinates hundreds of steps do not get that
    far, here tens do. Features may lie in a file: they are read in pieces. progress: the label of a bar.
    Raises UserError for an attribute without both values in the training set.
    """
    low, high = Y.nan_to_num(1).amin(0), Y.nan_to_num(0).amax(0)
    if (low >= high).any():
        raise UserError(f"attribute {int((low >= high).nonzero()[0])} is constant in the training split; drop it before the fit")
    with clock("axes"):
        mean, std, power, axes = principal_axes(X, device)
    centred = lambda: ((rows, x - mean) for rows, x in pieces(X, device))
    kept = list(centred()) if X.shape[0] * X.shape[1] <= 8 * PIECE else None  # half a GiB spares the subtraction in each sweep
    share = (1 / (~Y.isnan()).sum(0)).to(device)  # of one known label in its attribute's mean

    def along(axes, W):
        return (axes @ W.view(len(axes), -1, W.shape[1])).view(W.shape)

    def sweep(W, b):
        """Cross-entropy, summed over attributes; its gradients (D, A) and (A,); each attribute's mean p (1 - p)."""
        loss, dW, db, curvature = 0, torch.zeros_like(W), torch.zeros_like(b), torch.zeros_like(b)
        weight = W / std[:, None]
        for rows, x in kept or centred():
            y, logits = Y[rows].to(device), x @ weight + b
            each, y, p = share * ~y.isnan(), y.nan_to_num(), torch.sigmoid(logits)
            loss += F.binary_cross_entropy_with_logits(logits, y, each, reduction="none").sum(dtype=torch.float64)
            g = (p - y) * each
            dW += x.T @ g
            db += g.sum(0)
            curvature += (p * (1 - p) * each).sum(0)
        return loss, dW / std[:, None], db, curvature.clamp_min(1e-6)

    W, b = torch.zeros(X.shape[1], Y.shape[1], device=device), torch.logit(Y.nanmean(0)).to(device)
    best, chosen = torch.full((Y.shape[1],), torch.inf), torch.zeros(Y.shape[1])
    kept_W, kept_b = torch.zeros(W.shape), torch.zeros(b.shape)
    for strength in tqdm(STRENGTHS, progress, disable=None if progress else True):
        curvature = sweep(W, b)[3]
        scale_W, scale_b = (curvature * power + strength).rsqrt(), curvature.rsqrt()
        U, u = along(axes.mT, W) / scale_W, b / scale_b
        solver = torch.optim.LBFGS([U, u], max_iter=steps, max_eval=2 * steps, history_size=10, tolerance_grad=tolerance, tolerance_change=0, line_search_fn="strong_wolfe")

        @torch.no_grad()
        def objective():
            W = along(axes, scale_W * U)
            loss, dW, db, _ = sweep(W, scale_b * u)
            U.grad, u.grad = scale_W * along(axes.mT, dW + strength * W), scale_b * db
            return loss + 0.5 * strength * W.square().sum()

        with clock("solver"):
            solver.step(objective)
        objective()  # a line search may leave the gradient of another point
        left = max(U.grad.abs().max().item(), u.grad.abs().max().item())
        if left > 3 * tolerance:
            print(f"{progress or 'probe'}: strength {strength:g} stopped at gradient {left:.1e}, expected {tolerance:.1e}: its weights are not the minimum's")
        W, b = along(axes, scale_W * U), scale_b * u
        now = Probe((W / std[:, None]).cpu(), b.cpu(), chosen, mean.cpu())
        loss = bce(now(X_val), Y_val)
        better = loss < best
        best[better], chosen[better] = loss[better], strength
        kept_W[:, better], kept_b[better] = now.weight[:, better], now.bias[better]
    return Probe(kept_W, kept_b, chosen, mean.cpu())


def f1(Y, predicted):
    """F1 of each attribute over its known labels: Y (N, A) in {0, 1, nan}, predicted (N, A) bool -> (A,); 0 without hits."""
    hit = ((Y == 1) & predicted).sum(0)
    return 2 * hit / (hit + ((Y == 0) & predicted).sum(0) + (Y == 1).sum(0)).clamp_min(1)


def ranked(Y, logits):
    """Of one attribute (N,), its known labels from the highest logit down -> logits (n,), hits so far (n,)."""
    known = ~Y.isnan()
    logit, by = logits[known].sort(descending=True)
    return logit, Y[known][by].cumsum(0)


def average_precision(Y, logits):
    """Area under precision over recall, a step at each distinct logit from the highest down: (N, A) -> (A,); 0 without known labels."""
    out = torch.zeros(Y.shape[1])
    for a in range(Y.shape[1]):
        logit, hits = ranked(Y[:, a], logits[:, a])
        if len(hits):
            last = torch.cat([logit[1:] != logit[:-1], torch.ones(1, dtype=torch.bool)])  # of equal logits
            hits, count = hits[last], torch.arange(1, len(logit) + 1)[last]
            out[a] = (hits / count * hits.diff(prepend=torch.zeros(1))).sum() / hits[-1].clamp_min(1)
    return out


def top_recall(Y, logits, k=5):
    """Top-k recall (DeepFashion, Liu et al. 2016): of all attributes that images have, the share among the k of their image
    with the highest probability, pooled over attributes -> float."""
    chosen = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, logits.topk(min(k, logits.shape[1]), 1).indices, True)
    return (((Y == 1) & chosen).sum() / (Y == 1).sum().clamp_min(1)).item()


def tune_thresholds(Y, logits):
    """The logit threshold of each attribute with the best F1 on its known labels in (Y, logits): half way between two logits -> (A,)."""
    out = torch.zeros(Y.shape[1])
    for a in range(Y.shape[1]):
        logit, hits = ranked(Y[:, a], logits[:, a])
        if len(hits):
            score = 2 * hits / (torch.arange(1, len(hits) + 1) + hits[-1])  # F1 when the highest 1, 2, ... are predicted
            score[:-1][logit[1:] == logit[:-1]] = -1  # equal logits are not parted
            best = score.argmax()
            out[a] = (logit[best] + logit[best + 1]) / 2 if best + 1 < len(logit) else logit[best] - 1
    return out


def scores(Y, logits, thresholds=None):
    """Y (N, A) in {0, 1, nan}, logits (N, A) -> dict: f1 (macro, at probability 0.5), f1_micro, average_precision (macro),
    balanced_accuracy (macro), top5_recall (for more than 5 attributes), f1_tuned when thresholds (A,) are given, and per_attribute (lists of A)."""
    predicted, positive, negative = logits > 0, Y == 1, Y == 0
    hit, false = (positive & predicted).sum(), (negative & predicted).sum()
    recall = (positive & predicted).sum(0) / positive.sum(0).clamp_min(1)
    specificity = (negative & ~predicted).sum(0) / negative.sum(0).clamp_min(1)
    each = {"f1": f1(Y, predicted), "average_precision": average_precision(Y, logits), "balanced_accuracy": (recall + specificity) / 2}
    if thresholds is not None:
        each["f1_tuned"] = f1(Y, logits > thresholds)
    return {**{k: v.mean().item() for k, v in each.items()}, "f1_micro": (2 * hit / (hit + false + positive.sum()).clamp_min(1)).item(),
            **({"top5_recall": top_recall(Y, logits)} if Y.shape[1] > 5 else {}), "per_attribute": {k: v.tolist() for k, v in each.items()}}


def bootstrap_f1(Y, predictions, draws=500):
    """Macro F1 on resampled test images, the same for every set of predictions: {name: (N, A) bool} -> {name: (draws,)}, shifted to the
    mean of the F1 itself: draws without a positive of a rare attribute lower it."""
    n = len(Y)
    weights = torch.from_numpy(np.random.Generator(np.random.Philox(key=0)).multinomial(n, np.full(n, 1 / n), draws)).float()  # (draws, N)
    positive, negative = (Y == 1).float(), (Y == 0).float()
    out = {}
    for name, predicted in predictions.items():
        p = predicted.float()
        hit, false = weights @ (positive * p), weights @ (negative * p)
        drawn = (2 * hit / (hit + false + weights @ positive).clamp_min(1)).mean(1)
        out[name] = drawn - drawn.mean() + f1(Y, predicted).mean()
    return out


def interval(values):
    """The middle 95 % -> (low, high)."""
    return tuple(np.quantile(np.asarray(values, np.float64), (0.025, 0.975)).tolist())


# ---------------------------------------------------------------------------------------------------------------------
# Features

def collect(images, order, compute, dimension, label):
    """compute(uint8 (B, 3, S, S)) -> (B, dimension), of the images order[i] -> (features (m, dimension), the m images that could
    be read). In memory as float32, beyond IN_MEMORY numbers as float16 in a temporary file. Raises UserError when its disk is
    too small, or for a feature that is not finite."""
    shape, cuda = (len(order), dimension), torch.cuda.is_available()
    if shape[0] * shape[1] <= IN_MEMORY:
        X = torch.empty(shape)
    else:
        folder, need = tempfile.gettempdir(), 2 * shape[0] * shape[1]
        free = shutil.disk_usage(folder).free
        if need > free:
            raise UserError(f"{folder}: the features of {label} need {need / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free; TMPDIR=DIR names a larger disk")
        X = torch.from_numpy(np.memmap(tempfile.TemporaryFile(), np.float16, "w+", shape=shape))
    rows, kept = common.chunks(order, max(1, 2 ** (22 if cuda else 18) // images.size ** 2)), []
    for pixels, _, read in tqdm(data.load_batches(images, rows, 4 * cuda), label, len(rows), disable=None):
        found = compute(pixels).cpu().to(X.dtype)
        if not found.isfinite().all():
            raise UserError(f"{label}: features of {images.files[read[0]]} and its batch are not finite (or exceed float16, in a file)")
        X[len(kept):len(kept) + len(read)] = found
        kept += read
    return X[:len(kept)], kept


def latent_shape(vae, size):
    """(c, h, w) of an image of size x size."""
    return vae.config["z_channels"], size // vae.factor, size // vae.factor


def latent_features(vae, images, order, precision, label):
    """Flattened posterior mean: collect()'s (features (m, c*h*w), rows)."""
    device = next(vae.parameters()).device

    @torch.no_grad()
    def encode(pixels):
        with common.autocast(device, precision):
            return vae.encode(data.to_float(pixels.to(device)).contiguous(memory_format=torch.channels_last)).mean.flatten(1).float()

    return collect(images, order, encode, math.prod(latent_shape(vae, images.size)), f"encode {label}")


def token_features(vfm, images, order, dimension, device):
    """A VFM's tokens, averaged over windows to about `dimension` numbers: a ceiling. -> collect()'s pair, and tokens a side."""
    side = min(vfm.grid, max(1, int((dimension / vfm.dim) ** 0.5)))

    def encode(pixels):
        tokens = vfm(data.to_float(pixels.to(device))).transpose(1, 2).unflatten(2, (vfm.grid, vfm.grid))  # (B, D, grid, grid)
        return F.adaptive_avg_pool2d(tokens, side).flatten(1)

    return *collect(images, order, encode, vfm.dim * side * side, f"encode {vfm.name}"), side


def pixel_features(images, order, dimension):
    """Images shrunk (box filter) to about `dimension` numbers in [-1, 1]: collect()'s pair, and pixels a side."""
    side = min(images.size, max(1, round((dimension / 3) ** 0.5)))
    return *collect(images, order, lambda pixels: F.interpolate(data.to_float(pixels), (side, side), mode="area").flatten(1), 3 * side * side, "pixels"), side


def evenly(part, count):
    """At most `count` rows spread over the slice `part`: tables are often sorted by class."""
    return torch.linspace(part.start, part.stop - 1, min(count, part.stop - part.start)).round().long()


def usable_attributes(table):
    """Indices of attributes with both values in every split, and the names of the others."""
    splits = np.asarray(table.splits)
    parts = [table.values[splits == s] for s in data.SPLITS]
    usable = np.all([(v == 0).any(0) & (v == 1).any(0) for v in parts], axis=0)
    return np.flatnonzero(usable).tolist(), [n for n, u in zip(table.names, usable) if not u]


# ---------------------------------------------------------------------------------------------------------------------
# The rivals of Figure 2, and two newer ones. All on the posterior mean.

def class_accuracy(X, labels, part, device):
    """Semantic gap: accuracy of a linear probe of the class (one against all, the same fit as the attributes'), on test.
    None where there is one class, or a class is missing in a split."""
    splits = [set(labels[part[s]].tolist()) for s in data.SPLITS]
    if len(splits[0]) < 2 or splits[1:] != splits[:1] * 2:
        return None
    Y = F.one_hot(labels).float()[:, sorted(splits[0])]
    fitted = fit_probe(X[part["train"]], Y[part["train"]], X[part["val"]], Y[part["val"]], device=device, progress="class probe")
    return (fitted(X[part["test"]]).argmax(1) == Y[part["test"]].argmax(1)).float().mean().item()


def gini(density):
    """Gini coefficient of positive numbers (N,): 0 when all are equal, near 1 when one has all."""
    density = np.sort(np.asarray(density, np.float64))
    n = len(density)
    return float(((2 * np.arange(1, n + 1) - n - 1) * density).sum() / (n * density.sum()))


def kde_gini(vectors):
    """Uniformity (VA-VAE, arXiv 2501.01423, and its tools/latent_vis.py): Gini coefficient of a Gaussian kernel density at the points
    themselves, in two dimensions. vectors (N, c): one random position an image (rivals() takes the mean of ten draws). VA-VAE
    reduces with t-SNE, here the first two principal components stand for it: deterministic, and needs no further library. Lower is
    more uniform; None where the points have no spread."""
    x = vectors.double() - vectors.double().mean(0)
    plane = (x @ torch.linalg.eigh(x.T @ x).eigenvectors[:, -2:]).numpy() if x.shape[1] > 2 else x.numpy()
    try:
        return gini(scipy.stats.gaussian_kde(plane.T)(plane.T))
    except (np.linalg.LinAlgError, ValueError):  # fewer points than dimensions, or points on a line
        return None


def gmm_nll(train, test, components=10, steps=50, starts=4):
    """Discrimination (MAETok, arXiv 2502.03444): negative log-likelihood of held-out vectors a dimension, in nats, under a mixture of
    Gaussians with full covariances, fitted by EM (the best of a few k-means++ starts): (N, c), (M, c) -> float; None for fewer
    than 4 c vectors, fewer components for fewer than 4 c or 20 vectors each. Of whitened vectors one Gaussian has
    1.42 (log(2 pi e) / 2); lower: the few modes say more."""
    x, generator = train.double(), np.random.Generator(np.random.Philox(key=2))
    if len(x) < 4 * x.shape[1]:
        return None
    components = max(1, min(components, len(x) // max(20, 4 * x.shape[1])))
    fits = [fit_mixture(x, components, steps, generator) for _ in range(starts)]
    best = max(fits, key=lambda mixture: log_densities(x, *mixture).logsumexp(1).mean())
    return -log_densities(test.double(), *best).logsumexp(1).mean().item() / x.shape[1]


def whiten(train, test):
    """Vectors (N, c), (M, c) -> uncorrelated, of unit variance in train; directions without variance are dropped."""
    mean = train.double().mean(0)
    power, axes = torch.linalg.eigh(torch.cov(train.double().T).view(train.shape[1], -1))
    live = power > 1e-6 * power[-1].clamp_min(1e-12)
    return tuple((v.double() - mean) @ axes[:, live] / power[live].sqrt() for v in (train, test))


def log_densities(x, weight, mean, roots):
    """(M, c) -> (M, K): log weight + log normal density; roots (K, c, c) of the covariances (Cholesky)."""
    solved = [torch.linalg.solve_triangular(root, (x - m).T, upper=False).square().sum(0) for m, root in zip(mean, roots)]
    volume = roots.diagonal(dim1=1, dim2=2).log().sum(1)
    return weight.log() - 0.5 * torch.stack(solved, 1) - volume - 0.5 * x.shape[1] * np.log(2 * np.pi)


def fit_mixture(x, components, steps, generator):
    """EM from one k-means++ start: x (N, c) float64 -> weight (K,), mean (K, c), roots (K, c, c)."""
    n, c = x.shape
    centres = x[generator.integers(n)][None]
    while len(centres) < components:
        d = torch.cdist(x, centres).amin(1).square().numpy()
        if d.sum() == 0:  # fewer distinct vectors than components
            break
        centres = torch.cat([centres, x[generator.choice(n, p=d / d.sum())][None]])
    share = F.one_hot(torch.cdist(x, centres).argmin(1), len(centres)).double()  # (N, K)
    for _ in range(steps):
        count = share.sum(0) + 1e-10
        weight, mean = count / n, (share.T @ x) / count[:, None]
        covariance = torch.stack([((x - m).T * share[:, k]) @ (x - m) / count[k] for k, m in enumerate(mean)])
        roots = torch.linalg.cholesky(covariance + 1e-6 * torch.eye(c, dtype=torch.float64))
        share = log_densities(x, weight, mean, roots).softmax(1)
    return weight, mean, roots


def high_frequency_share(z):
    """Spectral smoothness (Skorokhodov et al. 2025, arXiv 2502.14831): share of the latent's power, without its mean, above half the
    Nyquist frequency: z (B, c, h, w) -> float in [0, 1]. Lower is smoother; white noise has about 0.8."""
    power = torch.fft.fft2(z).abs().square().sum((0, 1))  # (h, w)
    fy, fx = (torch.fft.fftfreq(n, device=z.device) for n in z.shape[-2:])
    radius = (fy[:, None].square() + fx.square()).sqrt()
    power[0, 0] = 0
    return (power[radius > 0.25].sum() / power.sum()).item()


def equivariance(vae, x, z, std):
    """Equivariance errors (EQ-VAE, arXiv 2502.09509): mean squared difference, in units of the latent's variance, between encoding a
    transformed image and transforming the latent z of the image x. Shift by half a latent cell, without the border;
    scale to one half. Lower is more equivariant. -> (shift error, scale error)"""
    f, (h, w) = vae.factor, z.shape[-2:]
    shifted = vae.encode(torch.roll(x, f // 2, -1)).mean  # contents move right by half a cell
    expected = z.lerp(torch.roll(z, 1, -1), 0.5)  # linear interpolation
    edge = max(1, w // 4)
    shift = ((shifted - expected) / std).square()[:, :, edge:h - edge, edge:w - edge].mean()
    small = F.interpolate(x, scale_factor=0.5, mode="bilinear", antialias=True)
    scale = ((vae.encode(small).mean - F.interpolate(z, scale_factor=0.5, mode="bilinear", antialias=True)) / std).square().mean()
    return shift.item(), scale.item()


@torch.no_grad()
def rivals(vae, X, labels, part, pixels, solver):
    """All rivals of one VAE: X (m, D) its features; labels (m,); part {split: slice}; uint8 pixels of some
    test images, for the reconstruction (PSNR in dB) and the equivariance, both in float32; solver: fit_probe's device. -> {name: float}"""
    device, z_shape = next(vae.parameters()).device, latent_shape(vae, pixels.shape[-1])
    chosen = evenly(part["train"], 5000), evenly(part["test"], 5000)
    z = X[torch.cat(chosen)].float().view(-1, *z_shape)
    mean, std = z.mean((0, 2, 3), keepdim=True), z.std((0, 2, 3), keepdim=True).clamp_min(1e-6)
    z = (z - mean) / std
    u = data.draw_noise(0, range(len(z)), 20)[0].view(len(z), 10, 2)
    at = (u * torch.tensor(z_shape[1:])).long().minimum(torch.tensor(z_shape[1:]) - 1)  # ten random positions an image
    vectors = [z[torch.arange(len(z)), :, at[:, k, 0], at[:, k, 1]] for k in range(10)]
    some, cut = evenly(slice(0, len(z)), 3000), len(chosen[0])
    uniformity = [kde_gini(v[some]) for v in vectors]
    found = dict(class_accuracy=class_accuracy(X, labels, part, solver), kde_gini=None if None in uniformity else float(np.mean(uniformity)),
                 gmm_nll=gmm_nll(*whiten(vectors[0][:cut], vectors[0][cut:])), high_frequency_share=high_frequency_share(z))
    errors, quality = [], []
    for some in pixels.split(16):
        x = data.to_float(some.to(device)).contiguous(memory_format=torch.channels_last)
        z = vae.encode(x).mean
        quality.append(psnr(some, data.to_uint8(vae.decode(z)).cpu()))
        errors += [equivariance(vae, x, z, std.to(device))] * len(some)
    found.update(zip(("shift_error", "scale_error"), np.mean(errors, 0).tolist()), psnr=torch.cat(quality).mean().item())
    return {k: v for k, v in found.items() if v is not None and np.isfinite(v)}


# ---------------------------------------------------------------------------------------------------------------------
# What the probe saw

@torch.no_grad()
def move(vae, probe, z, a, reach):
    """Decode latents z (B, c, h, w) after the shortest step, the same for all, that changes attribute a's logit by `reach`: along its
    weight vector. -> uint8 (B, 3, S, S)"""
    w = probe.weight[:, a]
    return data.to_uint8(vae.decode(z + (reach / w.square().sum() * w).view(z.shape[1:]).to(z.device)))


@torch.no_grad()
def disentanglement(vae, probe, z, spread):
    """Move each attribute up and down by REACH standard deviations of its logit (spread (A,)), decode, encode again, probe again.
    -> reached (A,): the share of the asked-for change that the pictures show, 1 is all of it; leak (A,): how far the other
    attributes' logits went in mean, for one unit of the attribute's own (both in standard deviations), 0 is disentangled
    (an attribute with less than 1 % reached counts as 1 %).
    Attributes that exclude or entail each other leak rightly: compare VAEs, not numbers with 0."""
    reached, leak = torch.zeros(len(spread)), torch.zeros(len(spread))
    for a in tqdm(range(len(spread)), "directions", disable=None):
        up, down = (probe(vae.encode(data.to_float(move(vae, probe, z, a, sign * REACH * spread[a]))).mean.flatten(1).cpu()) for sign in (1, -1))
        change = (up - down) / (2 * REACH * spread)  # (B, A), 1: as asked for
        reached[a] = change[:, a].mean()
        others = change.abs().mean(0).sum() - change[:, a].abs().mean()
        leak[a] = others / max(1, len(spread) - 1) / reached[a].clamp_min(0.01)
    return reached, leak


@torch.no_grad()
def see(vae, probe, pixels, spread, shown):
    """What the probe of one VAE saw, on uint8 test images: (reached, leak) of each attribute, pictures of the attributes `shown`."""
    z = vae.encode(data.to_float(pixels.to(next(vae.parameters()).device))).mean
    pictures = [torch.stack([move(vae, probe, z[:4], a, sign * REACH * spread[a]).cpu() for sign in (-1, 0, 1)], 1) for a in shown]
    return *disentanglement(vae, probe, z, spread), torch.stack(pictures)


def draw_directions(path, blocks):
    """blocks {VAE: (title of each attribute, pictures (A, n, 3, 3, S, S))}: under the VAE's name a row an attribute, in it three
    pictures an image: attribute down, as it is, up."""
    A, n, _, _, s, _ = next(iter(blocks.values()))[1].shape
    gap, left, head = 6, 150, 18
    sheet = Image.new("RGB", (left + n * (3 * s + gap), len(blocks) * (head + A * (s + gap))), "white")
    draw, top = ImageDraw.Draw(sheet), 0
    for name, (titles, pictures) in blocks.items():
        draw.text((4, top + 3), f"{name}: down, as it is, up", fill="black")
        top += head
        for title, row in zip(titles, pictures):
            draw.text((4, top + s // 2 - 20), title, fill="black")
            for i, triple in enumerate(row):
                for j, picture in enumerate(triple):
                    sheet.paste(Image.fromarray(picture.permute(1, 2, 0).numpy()), (left + i * (3 * s + gap) + j * s, top))
            top += s + gap
    common.save_png(sheet, path)


# ---------------------------------------------------------------------------------------------------------------------
# Does it predict?

# Tables 7 and 8 of the paper; the distance is the gFID of SiT-B/1 + REPA
PAPER = [dict(name="IN-VAE", psnr=28.59, celeba_f1=.6222, deepfashion_f1=.0786, awa_f1=.5567, fd=17.43),
         dict(name="VA-VAE", psnr=27.96, celeba_f1=.6347, deepfashion_f1=.1094, awa_f1=.5948, fd=11.40),
         dict(name="E2E-VAE", psnr=27.63, celeba_f1=.6439, deepfashion_f1=.1177, awa_f1=.6441, fd=8.96),
         dict(name="Send-VAE", psnr=27.62, celeba_f1=.6647, deepfashion_f1=.1385, awa_f1=.6623, fd=7.57)]
NEEDED = 8  # runs, and kinds of VAE, below which nothing is said of a score


# Scores of samples, not of a VAE
SAMPLE_SCORES = ("fd", "fd2", "fd3", "fd_n", "fd_to_reconstructions", "fd2_to_reconstructions", "precision", "recall", "precision_to_reconstructions", "recall_to_reconstructions", "class_agreement", "class_agreement_real",
                 "sfid", "inception_score", "interval")


def numbers(record, prefix=""):
    return {prefix + k: v for k, v in record.items() if isinstance(v, float) and k not in ("psnr", "seconds")}


def read_run(path):
    """Rows {name, run, arm (the kind of VAE), measure (network, count and SiT of the distance), psnr, fd, scores...} of a run: each arm of RUN/report.json;
    one SiT, or all, of an arm of run.sh imagenet (ARM/SiT-*/samples.npz.json, ARM/recon.json, ARM/probe.json); or a .json
    list of such rows, in which run and measure may be missing. Raises UserError."""
    path = Path(path).parent if Path(path).name == "report.json" else Path(path)
    try:
        if not path.is_dir():
            return [dict({"run": f"{path}:{i}", "measure": ""}, **row) for i, row in enumerate(read_json(path, list))]
        if (path / "report.json").exists():
            report = read_json(path / "report.json")
            return [dict(numbers(arm), name=f"{path}/{name}", run=str(path), arm=name, measure=f"FD({report['network']})-{arm['fd_n']}", psnr=arm["psnr"]) for name, arm in report["arms"].items()]
        rows = []
        for file in sorted([*path.glob("samples.npz.json"), *path.glob("SiT-*/samples.npz.json")]):
            arm, score = file.parent.parent, read_json(file)
            (fd,), (n,) = score["fd"].values(), score["n"].values()
            rows.append(dict(numbers(next(iter(read_json(arm / "probe.json")["results"].values())), "probe_"), name=str(file.parent), run=str(arm),
                             measure=f"FD({score['network']})-{n} of {file.parent.name}", psnr=read_json(arm / "recon.json")["psnr"], fd=fd))
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise UserError(f"{path}: no runs in what is written there ({type(e).__name__}: {e}); expected report.json of fid.py, or rows with name, psnr, fd and scores")
    if not rows:
        raise UserError(f"{path}: neither report.json nor samples.npz.json nor SiT-*/samples.npz.json; expected a folder of run.sh")
    return rows


def check_rows(rows):
    """Raise UserError for rows that cannot be compared."""
    for r in rows:
        lacking = [k for k in ("psnr", "fd") if not isinstance(r.get(k), (int, float)) or not np.isfinite(r[k])]
        if lacking:
            raise UserError(f"correlate: {r.get('name', r)} has no {lacking[0]}; expected finite numbers for psnr and fd in every row")
    measures = {str(r["measure"]): r.get("name") for r in rows}
    if len(measures) > 1:
        raise UserError(f"correlate: distances of other networks, counts or SiTs do not mix; found {'; '.join(f'{m} in {n}' for m, n in measures.items())}")
    names = [r["name"] for r in rows if "name" in r]
    if len(set(names)) < len(names):
        raise UserError(f"correlate: {max(names, key=names.count)} is given twice; expected different runs")
    if len(rows) < 3:
        raise UserError(f"correlate: {len(rows)} rows (a run of the demo has two, its arms); a correlation needs three or more: name further runs")


def kind_of(row):
    """The kind of VAE: its arm, or where that is not said its name."""
    return str(row.get("arm", row.get("kind", row.get("name", ""))))


def shared_scores(rows):
    """Names of the scores of a VAE that every row has; those of samples are what is predicted."""
    return [k for k in rows[0] if k not in ("name", "run", "arm", "kind", "seed", "measure", "psnr", *SAMPLE_SCORES) and all(isinstance(r.get(k), (int, float)) and np.isfinite(r[k]) for r in rows)]


def correlation(x, y):
    return float(np.corrcoef(x, y)[0, 1]) if np.ptp(x) > 0 and np.ptp(y) > 0 else np.nan


def partial_correlation(x, y, given):
    """Pearson correlation of what is left of x and y after a linear fit on `given`: (n,) each -> float; nan without remainder."""
    design = np.stack([np.ones_like(given), given], 1)
    rest = [v - design @ np.linalg.lstsq(design, v, rcond=None)[0] for v in (x, y)]
    if any(np.abs(r).max() < 1e-9 * np.abs(v - v.mean()).max() or np.ptp(v) == 0 for r, v in zip(rest, (x, y))):
        return np.nan
    return correlation(*rest)


def correlate(rows, draws=2000):
    """For each score that all rows have: Pearson, Spearman and partial correlation (given PSNR) with the distance `fd`, each with
    the middle 95 % over resampled runs (arms of one run share seed and data: they are drawn together)
    -> {score: {n, runs, kinds, statistic: value, statistic_interval: (low, high)}}; None where it is not defined."""
    fd, quality = (np.array([r[k] for r in rows], np.float64) for k in ("fd", "psnr"))
    names = shared_scores(rows)
    runs = {}
    for i, r in enumerate(rows):
        runs.setdefault(str(r.get("run", i)), []).append(i)
    members, generator = list(runs.values()), np.random.Generator(np.random.Philox(key=3))
    picks = [sum((members[g] for g in generator.integers(len(members), size=len(members))), []) for _ in range(draws)]
    out = {}
    for name in ["psnr", *names]:
        x = np.array([r[name] for r in rows], np.float64)
        statistics = dict(pearson=lambda i: correlation(x[i], fd[i]), spearman=lambda i: correlation(scipy.stats.rankdata(x[i]), scipy.stats.rankdata(fd[i])))
        if name != "psnr":
            statistics["partial"] = lambda i: partial_correlation(x[i], fd[i], quality[i])
        out[name] = {"n": len(rows), "runs": len(members), "kinds": len(set(map(kind_of, rows)))}
        for k, statistic in statistics.items():
            values = np.array([statistic(i) for i in picks])
            defined = values[np.isfinite(values)]
            value = statistic(list(range(len(rows))))
            out[name][k], out[name][f"{k}_interval"] = value if np.isfinite(value) else None, interval(defined) if len(defined) > 0.9 * draws else None
    return out


def verdict(r):
    """What the rows say of a score, in words: r is its entry of correlate(). Seeds of the same two arms are no evidence that a score
    predicts: whatever one arm changes would follow the distance. So different kinds of VAE are counted, not rows."""
    if "partial" not in r:
        return "the yardstick"
    few = min(r["runs"], r["kinds"])
    if few < NEEDED:
        return f"undecided: {few} {'runs' if few == r['runs'] else 'kinds of VAE'}, {NEEDED} are needed"
    if r["partial"] is None or r["partial_interval"] is None or r["partial_interval"][0] <= 0 <= r["partial_interval"][1]:
        return "undecided: the partial interval holds 0"
    return f"follows the distance beyond PSNR ({'lower' if r['partial'] > 0 else 'higher'} is better)"


def new_figure(width, height):
    """A matplotlib figure, in inches. Raises UserError when the package is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError as e:
        raise UserError(f"cannot draw the figure ({e}): pip install -r requirements-dev.txt")
    return Figure((width, height), layout="constrained")


def save_figure(figure, path):
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=100, facecolor="white")
    common.save_png(Image.open(buffer).convert("RGB"), path)


def kind_colours(kinds):
    """Black for the control, red for Send-VAE, no other red: {kind: colour}, the same in every figure."""
    import matplotlib
    order = [0, 2, 4, 8, 10, 12, 14, 16, 18, 1, 3, 5, 9, 11]
    others = [k for k in dict.fromkeys(kinds) if k not in ("control", "send")]
    return {"control": "black", "send": "crimson", **{k: matplotlib.colormaps["tab20"](order[i % len(order)]) for i, k in enumerate(others)}}


def scatter(axis, rows, score, colours):
    """Score across, distance up: a dot a row, a disc for the mean of each kind of VAE."""
    for kind in dict.fromkeys(map(kind_of, rows)):
        x, y = np.array([(r[score], r["fd"]) for r in rows if kind_of(r) == kind], float).T
        axis.plot(x, y, ".", color=colours[kind], markersize=5, alpha=0.5)
        axis.plot(x.mean(), y.mean(), "o", color=colours[kind], markersize=8, label=kind)
    axis.set(xlabel=score, ylabel="Fréchet distance")


def scatter_figure(rows, result):
    """One panel a score, and one for the legend. result: of correlate()."""
    across, down = 4, len(result) // 4 + 1
    figure, colours = new_figure(4 * across, 3.4 * down), kind_colours(map(kind_of, rows))
    axes = list(figure.subplots(down, across, squeeze=False).flat)
    for axis, (name, r) in zip(axes, result.items()):
        scatter(axis, rows, name, colours)
        axis.set_title(f"r {'undefined' if r['pearson'] is None else format(r['pearson'], '+.2f')}" + (f", given PSNR {r['partial']:+.2f}" if r.get("partial") is not None else "") + f", n = {r['n']}", fontsize=10)
    for axis in axes[len(result):]:
        axis.axis("off")
    axes[len(result)].legend(*axes[0].get_legend_handles_labels(), fontsize=8, ncols=2, loc="center")
    return figure


def main_correlate(words):
    p = common.Parser(prog="probe.py correlate", description="Correlation of every score with the Fréchet distance, plain and given PSNR.")
    p.add_argument("runs", nargs="*", help="folders of run.sh (out/demo, out/imagenet/ARM/SiT-B-1), or .json lists of rows (name, psnr, fd, scores)")
    p.add_argument("--paper", action="store_true", help="the paper's own four rows (Tables 7 and 8)")
    p.add_argument("--png", help="draw the scatter here")
    p.add_argument("--json", help="write all numbers here")
    args = p.parse_args(words)
    if args.paper == bool(args.runs):
        raise UserError("correlate: expected the folders of runs, or --paper, and not both")
    rows = [dict(r, run=r["name"], measure="") for r in PAPER] if args.paper else [r for path in args.runs for r in read_run(path)]
    check_rows(rows)
    check_outputs(args.png, args.json)
    result = correlate(rows)
    lost = {k for r in rows for k in numbers(r)} - {"fd", *result}
    if lost:
        print(f"left out, not in every row: {', '.join(sorted(lost))}")
    print(f"{'with the distance (lower is better)':36} {'Pearson':>22} {'Spearman':>22} {'partial, given PSNR':>22}   n = {len(rows)}")
    for name, r in result.items():
        span = lambda pair: f"[{pair[0]:+.2f}, {pair[1]:+.2f}]" if pair else "[undefined]"
        cells = ["" if k not in r else "undefined" if r[k] is None else f"{r[k]:+.2f} {span(r[f'{k}_interval'])}" for k in ("pearson", "spearman", "partial")]
        print(f"{name:36} {cells[0]:>22} {cells[1]:>22} {cells[2]:>22}   {verdict(r)}")
    if len(result) > 5:
        print(f"{len(result)} scores were tried: of those without any relation about one in 20 leaves 0 outside its interval by chance.")
    if args.paper:
        print(f"Four VAEs: they show that probe scores rise as gFID falls. They cannot show why: PSNR follows gFID as closely ({result['psnr']['pearson']:+.2f}), and given PSNR one degree of freedom\n"
              "is left. Semantic disentanglement and mere loss of pixel detail are not told apart by these rows.")
    if args.png:
        save_figure(scatter_figure(rows, result), args.png)
    if args.json:
        common.write_json(args.json, dict(rows=rows, correlations=result))


# ---------------------------------------------------------------------------------------------------------------------

def parse_args():
    p = common.Parser(description=__doc__)
    p.add_argument("vae", nargs="*", help="checkpoints to compare, any format of vae.load_vae (or: correlate, see its --help)")
    p.add_argument("--data", help="folder with attributes.csv, CelebA, DeepFashion's Anno_coarse or Anno_fine, or AwA2, as distributed")
    p.add_argument("--resolution", type=common.positive, help="crop in pixels (default: the first VAE's)")
    p.add_argument("--rivals", action="store_true", help="class probe, KDE Gini, GMM, high frequencies, equivariance, PSNR too")
    p.add_argument("--vfm", help="a ceiling: tokens of this timm model, averaged to as many numbers")
    p.add_argument("--vfm-ckpt", help="its local weights")
    p.add_argument("--vfm-layer", type=int, help="block or stage")
    p.add_argument("--grid", type=common.positive, help="its tokens a side before averaging (default: resolution / 16, at least 8)")
    p.add_argument("--png", help="draw what the probe saw here: attributes down and up in decoded images")
    p.add_argument("--show", nargs="+", metavar="ATTRIBUTE", help="attributes of --png (default: the six that the first VAE's probe reads best)")
    p.add_argument("--bench", type=common.positive, metavar="STEPS", help="speed of STEPS fits on random features of f16d32 at 256, and end")
    p.add_argument("--json", help="write all scores (--bench: its numbers) here")
    p.add_argument("--csv", help="write the scores of every attribute here")
    p.add_argument("--precision", choices=("bf16", "fp32"), help="of the encoder (default: bf16 where it is fast)")
    p.add_argument("--dry-run", action="store_true", help="print the plan (images, attributes, memory), and end")
    args = p.parse_args()
    missing = [name for name, value in (("vae", args.vae), ("--data", args.data)) if not value]
    if missing and not args.bench:
        p.error(f"the following arguments are required: {', '.join(missing)}")
    return args


def bench(args, device, solver):
    """--bench: fits of 2,000 images with the 8,192 numbers of f16d32 at 256 and CelebA's 40 attributes, made up (encoding: vae.py --bench)."""
    n, D, A, generator, clock = 2000, 8192, 40, torch.Generator().manual_seed(0), data.Clock(solver)
    X, W = torch.randn(n, D, generator=generator), torch.randn(D, A, generator=generator)
    Y = (X @ W + D ** 0.5 * torch.randn(n, A, generator=generator) > 0).float()
    args.precision = "fp32"
    fit = lambda: fit_probe(X[:1600], Y[:1600], X[1600:], Y[1600:], device=solver, clock=clock)
    data.run_bench(args, f"probe.py fit of {n} images, {D} numbers, {A} attributes", device, fit, n, data.count_flops(fit) // n, clock, warmup=0)


def check_outputs(png, *others):
    """Raise UserError before the work for a path that cannot be written at its end."""
    for path in filter(None, (png, *others)):
        common.open_out(Path(path).parent)
        if Path(path).is_dir():
            raise UserError(f"{path}: is a folder; expected the name of a file")
    if png and Path(png).suffix.lower() != ".png":
        raise UserError(f"--png {png}: expected a name that ends in .png")


def print_table(results):
    """Scores down, feature sets across, as in the paper's Table 8."""
    columns = [n if len(n) < 28 else f"...{n[-25:]}" for n in results]
    width = max(12, *map(len, columns))
    keys = dict.fromkeys(k for r in results.values() for k, v in r.items() if isinstance(v, float) and k != "seconds")
    print(f"{'':22}" + "".join(f"{c:>{width + 2}}" for c in columns))
    for k in keys:
        print(f"{k:22}" + "".join(f"{r[k]:{width + 2}.4f}" if k in r else " " * (width + 2) for r in results.values()))


def print_differences(results, draws, vaes):
    """Which F1 of two VAEs differ by more than chance in the choice of test images."""
    for i, a in enumerate(vaes):
        low, high = results[a]["f1_interval"] = interval(draws[a])
        print(f"F1 of {a}: {results[a]['f1']:.4f} [{low:.4f}, {high:.4f}]")
        for b in vaes[:i]:
            low, high = interval(draws[a] - draws[b])
            print(f"F1 of {a} minus {b}: {results[a]['f1'] - results[b]['f1']:+.4f} [{low:+.4f}, {high:+.4f}], "
                  + ("within chance" if low <= 0 <= high else "beyond the 95 % interval of resampled test images"))


def write_csv(path, names, share, results):
    """One row an attribute: its share of positive test labels, then every score of every feature set."""
    columns = {f"{name} {k}": v for name, r in results.items() for k, v in r["per_attribute"].items()}
    with open(path, "w", newline="", encoding="utf-8") as f:
        writer = csv.writer(f)
        writer.writerow(["attribute", "share", *columns])
        writer.writerows([name, round(share[i].item(), 4), *(round(v[i], 4) for v in columns.values())] for i, name in enumerate(names))


def plan(images, order, A, sizes):
    """--dry-run: what would be done, and the largest main memory, counted."""
    counts = [len(order) * s for s in sizes]
    features, files = ([4 * n for n in counts if n <= IN_MEMORY], [2 * n for n in counts if n > IN_MEMORY])
    fit = max(4 * s * (3 * min(s, BLOCK) + 30 * A) for s in sizes) + 4 * A * 8 * len(order) + 44 * PIECE  # axes; L-BFGS; labels, logits and their terms
    print(f"{A} attributes, {len(order)} images of {images.size} x {images.size}; features {', '.join(map(str, sizes))}; about {(max(features, default=0) + fit) / 2**30:.2f} GiB of main memory "
          f"beside the encoder, {max(files, default=0) / 2**30:.2f} GiB in {tempfile.gettempdir()}")


def main():
    if sys.argv[1:2] == ["correlate"]:
        return main_correlate(sys.argv[2:])
    args = parse_args()
    device, _, _ = common.setup()
    args.precision = args.precision or common.fast_precision(device)
    solver = device if device.type == "cuda" else torch.device("cpu")  # MPS lacks float64 and eigh
    begin = time.time()
    if args.bench:
        return bench(args, device, solver)
    if not args.dry_run:
        check_outputs(args.png, args.json, args.csv)
    for flag, value, needed in (("--show", args.show, "png"), ("--vfm-ckpt", args.vfm_ckpt, "vfm"), ("--vfm-layer", args.vfm_layer, "vfm"), ("--grid", args.grid, "vfm")):
        if value is not None and getattr(args, needed) is None:
            raise UserError(f"{flag}: has no effect without --{needed}")
    if len(set(args.vae)) < len(args.vae):
        raise UserError(f"{max(args.vae, key=args.vae.count)} is given twice; expected different checkpoints")
    vaes = {path: load_vae(path) for path in args.vae}
    root, table = data.load_attributes(args.data)
    keep, dropped = usable_attributes(table)
    names = [table.names[a] for a in keep]
    if not keep:
        raise UserError(f"{args.data}: no attribute has both values in each of train, val and test")
    unknown = [s for s in args.show or () if s not in names]
    if unknown:
        raise UserError(f"--show {unknown[0]}: " + ("constant in a split, not probed" if unknown[0] in dropped else f"no attribute of that name; there are {', '.join(names)}"))
    shown = [names.index(s) for s in args.show or ()]
    if dropped:
        print(f"left out, constant in a split: {', '.join(dropped)}")
    images = data.ImageFolder(root, args.resolution or vaes[args.vae[0]].config["resolution"])
    for path, vae in vaes.items():
        step = vae.factor * (2 if args.rivals else 1)  # the rivals halve the image
        if images.size % step:
            raise UserError(f"--resolution {images.size}: expected a multiple of {step} for {path}{' with --rivals' if args.rivals else ''}")
    small = data.median_short_side(images)
    if small is not None and small < images.size:
        print(f"{root}: images are enlarged to {images.size} pixels, the median short side is {small}")
    at = {f: i for i, f in enumerate(images.files)}
    lines = sorted(range(len(table.files)), key=lambda i: data.SPLITS.index(table.splits[i]))  # train, val, test
    order, sizes = [at[table.files[i]] for i in lines], [math.prod(latent_shape(vae, images.size)) for vae in vaes.values()]
    if args.dry_run:
        return plan(images, order, len(keep), sizes)
    if args.vfm:
        vfm = VFM(args.vfm, images.size, args.grid or max(8, images.size // 16), args.vfm_ckpt, args.vfm_layer).to(device)
    labels, place = torch.from_numpy(table.values[lines][:, keep]), {row: k for k, row in enumerate(order)}
    ends = np.cumsum([table.splits.count(s) for s in data.SPLITS])

    def features():
        for path, vae in vaes.items():
            yield path, *latent_features(vae.to(device, memory_format=torch.channels_last), images, order, args.precision, path)
        if args.vfm:
            *found, side = token_features(vfm, images, order, sizes[0], device)
            yield f"{args.vfm} {side} x {side}", *found
        found = None  # one set at a time in memory
        *found, side = pixel_features(images, order, sizes[0])
        yield f"pixels {side} x {side}", *found

    results, predictions, blocks, start = {}, {}, {}, time.time()
    for name, X, rows in features():
        places = [place[row] for row in rows]  # without the unreadable images
        Y, stops = labels[places], np.searchsorted(places, ends).tolist()
        part = {s: slice(a, b) for s, a, b in zip(data.SPLITS, [0, *stops], stops)}
        train, val, test = part.values()
        if not results:
            print(f"{len(keep)} attributes; {', '.join(f'{p.stop - p.start} {s}' for s, p in part.items())} images")
        probe = fit_probe(X[train], Y[train], X[val], Y[val], device=solver, progress=f"probe {name}")
        logits = probe(X[test])
        found = results[name] = dict(scores(Y[test], logits, tune_thresholds(Y[val], probe(X[val]))), dimension=X.shape[1], strength=probe.strength.tolist())
        predictions[name] = logits > 0
        if name in vaes and (args.rivals or args.png):
            pixels = torch.stack([images[rows[i]][0] for i in evenly(test, 512)])
        if name in vaes and args.rivals:
            found.update(rivals(vaes[name], X, torch.tensor(images.labels)[rows], part, pixels, solver))
        if name in vaes and args.png:
            shown = shown or torch.tensor(found["per_attribute"]["f1"]).topk(min(6, len(names))).indices.tolist()
            reached, leak, pictures = see(vaes[name], probe, pixels[evenly(slice(0, len(pixels)), 16)], logits.std(0).clamp_min(1e-6), shown)
            found["per_attribute"].update(reached=reached.tolist(), leak=leak.tolist())
            found.update(reached=reached.mean().item(), leak=leak.mean().item())
            blocks[name] = [f"{names[a]}\nreached {reached[a]:.2f}\nleak {leak[a]:.3f}" for a in shown], pictures
        found["seconds"], start = round(time.time() - start, 1), time.time()
        del X  # before the next is made
    prior = Y[train].nanmean(0)
    results["majority"] = scores(Y[test], torch.logit(prior).expand(len(Y[test]), -1), torch.zeros(len(names)))
    print_table(results)
    print_differences(results, bootstrap_f1(Y[test], predictions), args.vae)
    if args.csv:
        write_csv(args.csv, names, Y[test].nanmean(0), results)
    if blocks:
        draw_directions(args.png, blocks)
    if args.json:  # last: it marks the stage as done
        common.write_json(args.json, dict(data=args.data, inputs=dict(data=images.hash, **{k: common.weights_hash(v.state_dict()) for k, v in vaes.items()}), attributes=names, left_out=dropped, n={s: p.stop - p.start for s, p in part.items()},
                                        precision=args.precision, results=results, seconds=round(time.time() - begin, 1)))


if __name__ == "__main__":
    common.run_script(main)
