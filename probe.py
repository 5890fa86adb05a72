"""Stage 6: which VAE will a diffusion model like? Probing of attributes (arXiv 2601.05823, section 4).

    python probe.py out/demo/control/vae.pt out/demo/send/vae.pt --data out/demo/avatars --json out/probe.json
    python probe.py a/vae.pt b/vae.pt --data out/celeba --rivals --png directions.png    # extras/datasets.py
    python extras/correlate.py out/demo out/demo_1 out/demo_2                     # do the scores predict?

One logistic regression an attribute on the flattened posterior mean, trained on the table's train split, its
strength chosen on val, scored on test. The majority guess and a probe on as many raw pixels as the latent has
numbers stand beside it, so that good can be told from bad.
"""
import importlib.util
import math
import tempfile
import time
import warnings
from dataclasses import dataclass
from functools import partial

import numpy as np
import scipy.fft
import scipy.stats
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from tqdm import tqdm

import common
import data
from common import UserError
from fid import psnr
from mapper import VFM
from vae import load_vae

STRENGTHS = (1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4)  # L2 weights tried, each from the last one's minimum
IN_MEMORY = 2 ** 29  # features with more numbers lie in a file, in float16 (CelebA on f16d32: 1.7e9)
PIECE = 2 ** 24  # numbers of them that are computed with at a time
BLOCK = 2048  # columns whose covariance is diagonalised together
REACH = 4.0  # how far an attribute is moved, in standard deviations of its logit


# ------------------------------------------------------------------------------------------------------------
# The probe


@dataclass
class Probe:
    """logits (N, A) = (X - mean) @ weight + bias of features X (N, D); strength (A,): the L2 weights
    chosen."""
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
    """Columns of X (N, D) -> mean (D,), std (D,), inf for a column that is constant but for rounding, and of
    the standardised columns, in B blocks of at most BLOCK, the variance along each principal axis (D, 1) and
    the axes (B, D/B, D/B), one a column."""
    n, D = X.shape
    blocks = next(b for b in range(1, D + 1) if D % b == 0 and D // b <= BLOCK)
    mean = (sum(x.sum(0, dtype=torch.float64) for _, x in pieces(X, device)) / n).float()
    square = torch.zeros(blocks, D // blocks, D // blocks, device=device)
    for _, x in pieces(X, device):
        z = (x - mean).view(len(x), blocks, -1).transpose(0, 1)  # (B, n, D/B)
        square += z.mT @ z
    std = (square.diagonal(dim1=1, dim2=2) / max(1, n - 1)).sqrt()  # (B, D/B)
    std = torch.where(std > 1e-6 * mean.view(std.shape).abs().clamp_min(1e-6), std, torch.inf)
    covariance = square / n / (std[:, :, None] * std[:, None])
    # The rows of constant columns are zero, and LAPACK's float32 solver fails on hundreds of them
    covariance.diagonal(dim1=1, dim2=2)[std.isinf()] = 1
    power, axes = torch.linalg.eigh(covariance)
    return mean, std.flatten(), power.clamp_min(0).view(D, 1), axes


def bce(logits, Y):
    """Mean cross-entropy of each attribute over its known labels: logits, Y (N, A), nan = unknown -> (A,)."""
    known = ~Y.isnan()
    loss = F.binary_cross_entropy_with_logits(logits, Y.nan_to_num(), reduction="none") * known
    return loss.sum(0) / known.sum(0).clamp_min(1)


class Objective:
    """What fit_probe() minimises: X (N, D), Y (N, A) -> each attribute's mean cross-entropy over its known
    labels plus strength / 2 |w|^2, on features standardised with X's mean and std (bias free of penalty)."""

    def __init__(self, X, Y, device):
        self.X, self.Y, self.device = X, Y, device
        self.mean, self.std, self.power, self.axes = principal_axes(X, device)
        self.share = (1 / (~Y.isnan()).sum(0)).to(device)  # of one known label in its attribute's mean
        small = X.numel() <= 8 * PIECE  # half a GiB spares the subtraction
        self.kept = list(self.centred()) if small else None

    def centred(self):
        return ((rows, x - self.mean) for rows, x in pieces(self.X, self.device))

    def evaluate(self, W, b):
        """Summed cross-entropy; its gradients (D, A) and (A,); each attribute's mean p (1 - p)."""
        loss, dW, db, curvature = 0, torch.zeros_like(W), torch.zeros_like(b), torch.zeros_like(b)
        weight = W / self.std[:, None]
        for rows, x in self.kept or self.centred():
            y, logits = self.Y[rows].to(self.device), x @ weight + b
            each, y, p = self.share * ~y.isnan(), y.nan_to_num(), torch.sigmoid(logits)
            terms = F.binary_cross_entropy_with_logits(logits, y, each, reduction="none")
            loss += terms.sum(dtype=torch.float64)
            g = (p - y) * each
            dW += x.T @ g
            db += g.sum(0)
            curvature += (p * (1 - p) * each).sum(0)
        return loss, dW / self.std[:, None], db, curvature.clamp_min(1e-6)

    def minimise(self, strength, W, b, steps, tolerance):
        """Full-batch L-BFGS from W (D, A), b (A,) -> the minimum's, and the largest gradient that is left.

        In coordinates along the features' principal axes, scaled by the Hessian's diagonal there: in raw
        coordinates hundreds of steps do not get that far, here tens do."""
        curvature = self.evaluate(W, b)[3]
        scale_W, scale_b = (curvature * self.power + strength).rsqrt(), curvature.rsqrt()
        U, u = rotate(self.axes.mT, W) / scale_W, b / scale_b
        solver = torch.optim.LBFGS([U, u], max_iter=steps, max_eval=2 * steps, history_size=10,
                                   tolerance_change=0, tolerance_grad=tolerance,
                                   line_search_fn="strong_wolfe")

        @torch.no_grad()
        def objective():
            W = rotate(self.axes, scale_W * U)
            loss, dW, db, _ = self.evaluate(W, scale_b * u)
            U.grad, u.grad = scale_W * rotate(self.axes.mT, dW + strength * W), scale_b * db
            return loss + 0.5 * strength * W.square().sum()

        solver.step(objective)
        objective()  # a line search may leave the gradient of another point
        left = max(U.grad.abs().max().item(), u.grad.abs().max().item())
        return rotate(self.axes, scale_W * U), scale_b * u, left


def rotate(axes, W):
    """Blocks (B, D/B, D/B) of axes times W (D, A) -> (D, A)."""
    return (axes @ W.view(len(axes), -1, W.shape[1])).view(W.shape)


def fit_probe(X, Y, X_val, Y_val, steps=200, tolerance=1e-3, device="cpu", progress=None):
    """Multi-label logistic regression: X (N, D), Y (N, A) in {0, 1, nan} -> Probe (on the CPU).

    Minimises Objective for each of STRENGTHS, until no gradient exceeds `tolerance` (or for `steps`, and then
    it says so), and keeps for each attribute the strength with the least cross-entropy on the validation set.
    Features may lie in a file: they are read in pieces. progress: the label of a bar. Raises UserError for an
    attribute without both values in the training set.
    """
    constant = Y.nan_to_num(1).amin(0) >= Y.nan_to_num(0).amax(0)
    if constant.any():
        raise UserError(f"attribute {int(constant.nonzero()[0])} is constant in the training split; drop it")
    problem, (D, A) = Objective(X, Y, device), (X.shape[1], Y.shape[1])
    W, b = torch.zeros(D, A, device=device), torch.logit(Y.nanmean(0)).to(device)
    least = torch.full((A,), torch.inf)
    best = Probe(torch.zeros(D, A), torch.zeros(A), torch.zeros(A), problem.mean.cpu())
    for strength in tqdm(STRENGTHS, progress, disable=None if progress else True):
        W, b, left = problem.minimise(strength, W, b, steps, tolerance)
        if left > 3 * tolerance:
            print(f"{progress or 'probe'}: strength {strength:g} stopped at gradient {left:.1e}, expected "
                  f"{tolerance:.1e}: its weights are not the minimum's")
        found = Probe((W / problem.std[:, None]).cpu(), b.cpu(), best.strength, best.mean)
        loss = bce(found(X_val), Y_val)
        better = loss < least
        least[better], best.strength[better] = loss[better], strength
        best.weight[:, better], best.bias[better] = found.weight[:, better], found.bias[better]
    return best


# ------------------------------------------------------------------------------------------------------------
# Its scores


def f1(Y, predicted):
    """F1 of each attribute over its known labels: Y (N, A) in {0, 1, nan}, predicted (N, A) bool -> (A,)."""
    hit = ((Y == 1) & predicted).sum(0)
    return 2 * hit / (hit + ((Y == 0) & predicted).sum(0) + (Y == 1).sum(0)).clamp_min(1)


def ranked(Y, logits):
    """Of one attribute (N,), at each distinct logit of its known labels from the highest down -> the logit,
    how many are as high, and how many of those are hits: (n,) each."""
    known = ~Y.isnan()
    logit, by = logits[known].sort(descending=True)
    last = torch.cat([logit[1:] != logit[:-1], torch.ones(1, dtype=torch.bool)])[:len(logit)]  # of equals
    return logit[last], torch.arange(1, len(logit) + 1)[last], Y[known][by].cumsum(0)[last]


def average_precision(Y, logits):
    """Area under precision over recall, a step at each distinct logit: (N, A) -> (A,)."""
    out = torch.zeros(Y.shape[1])
    for a in range(Y.shape[1]):
        _, count, hits = ranked(Y[:, a], logits[:, a])
        if len(hits):
            out[a] = (hits / count * hits.diff(prepend=torch.zeros(1))).sum() / hits[-1].clamp_min(1)
    return out


def top_recall(Y, logits, k=5):
    """Top-k recall (DeepFashion, Liu et al. 2016): of all attributes that images have, the share among the k
    of their image with the highest probability, pooled over attributes -> float."""
    top = logits.topk(min(k, logits.shape[1]), 1).indices
    chosen = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, top, True)
    return (((Y == 1) & chosen).sum() / (Y == 1).sum().clamp_min(1)).item()


def tune_thresholds(Y, logits):
    """The logit threshold of each attribute with the best F1 on its known labels -> (A,)."""
    out = torch.zeros(Y.shape[1])
    for a in range(Y.shape[1]):
        logit, count, hits = ranked(Y[:, a], logits[:, a])
        if len(hits):
            best = (2 * hits / (count + hits[-1])).argmax()  # F1 when the first `count` are predicted
            out[a] = (logit[best] + logit[best + 1]) / 2 if best + 1 < len(logit) else logit[best] - 1
    return out


def scores(Y, logits, thresholds):
    """Y (N, A) in {0, 1, nan}, logits (N, A), thresholds (A,) of them -> dict: f1 (macro, at probability
    0.5), f1_tuned (at the thresholds), f1_micro, average_precision and balanced_accuracy (macro), top5_recall
    (for more than 5 attributes), and per_attribute (lists of A)."""
    predicted, positive, negative = logits > 0, Y == 1, Y == 0
    hit, false = (positive & predicted).sum(), (negative & predicted).sum()
    recall = (positive & predicted).sum(0) / positive.sum(0).clamp_min(1)
    specificity = (negative & ~predicted).sum(0) / negative.sum(0).clamp_min(1)
    each = dict(f1=f1(Y, predicted), average_precision=average_precision(Y, logits),
                balanced_accuracy=(recall + specificity) / 2, f1_tuned=f1(Y, logits > thresholds))
    found = {k: v.mean().item() for k, v in each.items()}
    found["f1_micro"] = (2 * hit / (hit + false + positive.sum()).clamp_min(1)).item()
    if Y.shape[1] > 5:
        found["top5_recall"] = top_recall(Y, logits)
    return dict(found, per_attribute={k: v.tolist() for k, v in each.items()})


def bootstrap_f1(Y, predictions, draws=500):
    """Macro F1 on resampled test images, the same for every set of predictions: {name: (N, A) bool} -> {name:
    (draws,)}, shifted to the mean of the F1 itself: draws without a positive of a rare attribute lower it."""
    n, generator = len(Y), np.random.Generator(np.random.Philox(key=0))
    weights = torch.from_numpy(generator.multinomial(n, np.full(n, 1 / n), draws)).float()  # (draws, N)
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


# ------------------------------------------------------------------------------------------------------------
# Features: functions of uint8 images (B, 3, S, S) -> (B, D)


@torch.no_grad()
def posterior_mean(vae, precision, pixels):
    device = next(vae.parameters()).device
    with common.autocast(device, precision):
        x = data.to_float(pixels.to(device)).contiguous(memory_format=torch.channels_last)
        return vae.encode(x).mean.flatten(1).float()


def averaged_tokens(vfm, side, device, pixels):
    """A ceiling: tokens of a VFM, averaged over windows to side x side."""
    tokens = vfm(data.to_float(pixels.to(device))).transpose(1, 2)  # (B, D, N)
    return F.adaptive_avg_pool2d(tokens.unflatten(2, (vfm.grid, vfm.grid)), side).flatten(1)


def thumbnails(side, pixels):
    return F.interpolate(data.to_float(pixels), (side, side), mode="area").flatten(1)


def collect(images, order, compute, label):
    """Features of the images order[i] -> ((m, D), the m rows of images that could be read). In memory as
    float32, beyond IN_MEMORY numbers as float16 in a temporary file. Raises UserError when its disk is too
    small, or for a feature that is not finite."""
    X, rows, cuda = None, [], torch.cuda.is_available()
    batches = common.chunks(order, max(1, 2 ** (22 if cuda else 18) // images.size ** 2))
    loaded = data.load_batches(images, batches, 4 * cuda)
    for pixels, _, read in tqdm(loaded, label, len(batches), disable=None):
        if not read:
            continue
        found = compute(pixels).cpu()
        if X is None:
            shape = len(order), found.shape[1]
            if math.prod(shape) <= IN_MEMORY:
                X = torch.empty(shape)
            else:
                common.open_out(tempfile.gettempdir(), 2 * math.prod(shape), "TMPDIR")
                X = torch.from_numpy(np.memmap(tempfile.TemporaryFile(), np.float16, "w+", shape=shape))
        X[len(rows):len(rows) + len(read)] = found
        if not X[len(rows):len(rows) + len(read)].isfinite().all():
            raise UserError(f"{label}: features of {images.files[read[0]]} and its batch are not finite (or "
                            "exceed float16, in a file)")
        rows += read
    return X[:len(rows)], rows


def evenly(part, count):
    """At most `count` rows spread over the slice `part`: tables are often sorted by class."""
    return torch.linspace(part.start, part.stop - 1, min(count, part.stop - part.start)).round().long()


# ------------------------------------------------------------------------------------------------------------
# The rivals of Figure 2, and newer ones. All on the posterior mean


def class_accuracy(X, labels, part, device):
    """Semantic gap: accuracy of a linear probe of the class (one against all, the same fit as the
    attributes'), on test. None where there is one class, or a class is missing in a split."""
    train, val, test = (part[s] for s in data.SPLITS)
    classes = set(labels[train].tolist())
    if len(classes) < 2 or any(set(labels[s].tolist()) != classes for s in (val, test)):
        return None
    Y = F.one_hot(labels).float()[:, sorted(classes)]
    fitted = fit_probe(X[train], Y[train], X[val], Y[val], device=device, progress="class probe")
    return (fitted(X[test]).argmax(1) == Y[test].argmax(1)).float().mean().item()


def gini(density):
    """Gini coefficient of positive numbers (N,): 0 when all are equal, near 1 when one has all."""
    density = np.sort(np.asarray(density, np.float64))
    n = len(density)
    return float(((2 * np.arange(1, n + 1) - n - 1) * density).sum() / (n * density.sum()))


def kde_gini(vectors):
    """Uniformity (VA-VAE, arXiv 2501.01423, tools/latent_vis.py): Gini coefficient of a Gaussian kernel
    density at the points themselves, in two dimensions. vectors (N, c): one random position an image. VA-VAE
    reduces with t-SNE, here the first two principal components stand for it: deterministic, and needs no
    further library. Lower is more uniform; None where the points have no spread."""
    x = vectors.double() - vectors.double().mean(0)
    plane = (x @ torch.linalg.eigh(x.T @ x).eigenvectors[:, -2:] if x.shape[1] > 2 else x).numpy()
    try:
        return gini(scipy.stats.gaussian_kde(plane.T)(plane.T))
    except (np.linalg.LinAlgError, ValueError):  # fewer points than dimensions, or points on a line
        return None


def whiten(train, test):
    """(N, c), (M, c) -> uncorrelated, of unit variance in train; directions without variance are dropped."""
    mean = train.double().mean(0)
    power, axes = torch.linalg.eigh(torch.cov(train.double().T).view(train.shape[1], -1))
    live = power > 1e-6 * power[-1].clamp_min(1e-12)
    return tuple((v.double() - mean) @ axes[:, live] / power[live].sqrt() for v in (train, test))


def gmm_nll(train, test, components=10):
    """Discrimination (MAETok, arXiv 2502.03444): negative log-likelihood of held-out vectors a dimension, in
    nats, under scikit-learn's mixture of Gaussians with full covariances: (N, c), (M, c) -> float; None for
    fewer than 4 c vectors, fewer components for fewer than 4 c or 20 vectors each. Of whitened vectors one
    Gaussian has 1.42 (log(2 pi e) / 2); lower: the few modes say more."""
    from sklearn.mixture import GaussianMixture
    n, c = train.shape
    if c == 0 or n < 4 * c:
        return None
    components = max(1, min(components, n // max(20, 4 * c)))
    mixture = GaussianMixture(components, n_init=4, reg_covar=1e-6, random_state=0, init_params="k-means++")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # not at the maximum yet; fewer distinct vectors than components
        return -mixture.fit(train.numpy()).score(test.numpy()) / c


def spectral_energy(z):
    """SEC (arXiv 2606.03578, eq. 9): share of the latent's DCT energy at frequencies u + v above half of the
    largest: z (B, c, h, w) -> [0, 1]. Lower is smoother; noise has about a half."""
    power = np.square(scipy.fft.dctn(z.numpy(), axes=(2, 3), norm="ortho")).sum((0, 1), dtype=np.float64)
    u, v = np.indices(power.shape)
    return float(power[u + v > (sum(power.shape) - 2) / 2].sum() / power.sum())


def velocity_variance(z, labels):
    """VIV, the velocity's irreducible variance (arXiv 2606.03578), were the latents of each class Gaussian:
    the mean over dimensions of the integral over t of lambda / ((1 - t)^2 + t^2 lambda), which is
    (pi / 2) sqrt(lambda), with lambda the eigenvalues of the class's covariance, taken as a Kronecker product
    of channels and positions. z (N, c, h, w) standardised, labels (N,) -> the mean over classes of enough
    images, 8 for each number that a factor of the product has, or more; None without one. Lower is easier to
    learn; white noise has pi / 2."""
    found, (c, h, w) = [], z.shape[1:]
    for label in labels.unique():
        x = z[labels == label].double().flatten(2)  # (n, c, h w)
        x = x - x.mean(0)
        if len(x) > 8 * max(c / (h * w), h * w / c) and x.square().sum() > 0:
            roots = [torch.linalg.eigvalsh(m).clamp_min(0).sqrt().mean() for m in kronecker_factors(x)]
            found.append((math.pi / 2 * roots[0] * roots[1]).item())
    return float(np.mean(found)) if found else None


def kronecker_factors(x, steps=5):
    """Covariance of x (n, c, p) without mean as a product of (c, c) and (p, p): the likeliest such, found in
    turn."""
    n, c, p = x.shape
    channels = torch.eye(c, dtype=x.dtype)
    for _ in range(steps):
        positions = torch.einsum("ncp,ncq->pq", x, inverse(channels) @ x) / (n - 1) / c
        channels = torch.einsum("ncp,ndp->cd", x, x @ inverse(positions)) / (n - 1) / p
    return channels, positions


def inverse(m):
    """Of a covariance, on the directions that have variance."""
    return torch.linalg.pinv(m, rtol=1e-9, hermitian=True)


def neighbour_consistency(z, labels, k=10):
    """LNC (arXiv 2606.03578, there of the foreground alone): of the k latents whose spatial mean is nearest,
    the share with the same label: z (N, c, h, w), labels (N,) -> [0, 1]. Higher: classes lie apart. None for
    one class, or k or fewer latents."""
    if len(z) <= k or len(labels.unique()) < 2:
        return None
    x = z.mean((2, 3))
    nearest = torch.cdist(x, x).fill_diagonal_(torch.inf).topk(k, largest=False).indices
    return (labels[nearest] == labels[:, None]).float().mean().item()


def local_similarity(z, far=6):
    """LDS (iREPA, arXiv 2512.10794): mean cosine of neighbouring positions minus that of positions `far` or
    more cells apart (or, of a smaller latent, as far as it goes), counted along rows and columns:
    z (B, c, h, w) -> float. Higher: more spatial structure. None for latents of fewer than 3 x 1 cells."""
    h, w = z.shape[-2:]
    if h + w < 4:
        return None
    at = torch.cartesian_prod(torch.arange(h), torch.arange(w)).float()
    apart = torch.cdist(at, at, p=1)
    unit = F.normalize(z.flatten(2), dim=1)
    similar = torch.einsum("bcp,bcq->pq", unit, unit) / len(unit)
    return (similar[apart == 1].mean() - similar[apart >= min(far, h + w - 2)].mean()).item()


def equivariance(vae, x, z, std):
    """Equivariance errors (EQ-VAE, arXiv 2502.09509): mean squared difference, in units of the latent's
    variance, between encoding a transformed image and transforming the latent z of the image x. -> (shift by
    half a latent cell, without the border; scale to one half). Lower is more equivariant."""
    halve = partial(F.interpolate, scale_factor=0.5, mode="bilinear", antialias=True)
    h, w = z.shape[-2:]
    shifted = vae.encode(torch.roll(x, vae.factor // 2, -1)).mean  # contents move right by half a cell
    expected = z.lerp(torch.roll(z, 1, -1), 0.5)  # linear interpolation
    edge = max(1, w // 4)
    shift = ((shifted - expected) / std).square()[:, :, edge:h - edge, edge:w - edge].mean()
    scale = ((vae.encode(halve(x)).mean - halve(z)) / std).square().mean()
    return shift.item(), scale.item()


@torch.no_grad()
def rivals(vae, X, labels, part, pixels, solver):
    """{name: float} of one VAE: X (m, D) its features; labels (m,); part {split: slice}; uint8 pixels of some
    test images, for PSNR (dB) and equivariance, both in float32; solver: fit_probe's device."""
    device, z_shape = next(vae.parameters()).device, vae.latent_shape(pixels.shape[-1])
    chosen = evenly(part["train"], 5000), evenly(part["test"], 5000)
    cut = len(chosen[0])
    z = X[torch.cat(chosen)].float().view(-1, *z_shape)  # (m, c, h, w)
    of = labels[torch.cat(chosen)]
    mean, std = z.mean((0, 2, 3), keepdim=True), z.std((0, 2, 3), keepdim=True).clamp_min(1e-6)
    z = (z - mean) / std
    u, side = data.draw_noise(0, range(len(z)), 20)[0].view(len(z), 10, 2), torch.tensor(z_shape[1:])
    at = (u * side).long().minimum(side - 1)  # ten random positions an image
    vectors = [z[torch.arange(len(z)), :, at[:, k, 0], at[:, k, 1]] for k in range(10)]  # (m, c) each
    some = evenly(slice(0, len(z)), 3000)
    uniformity = [kde_gini(v[some]) for v in vectors]
    found = dict(class_accuracy=class_accuracy(X, labels, part, solver),
                 kde_gini=None if None in uniformity else float(np.mean(uniformity)),
                 gmm_nll=gmm_nll(*whiten(vectors[0][:cut], vectors[0][cut:])),
                 viv=velocity_variance(z, of), lnc=neighbour_consistency(z[some], of[some]),
                 lds=local_similarity(z[some]), sec=spectral_energy(z))
    errors, quality = [], []
    for some in pixels.split(16):
        x = data.to_float(some.to(device)).contiguous(memory_format=torch.channels_last)
        z = vae.encode(x).mean
        quality.append(psnr(some, data.to_uint8(vae.decode(z)).cpu()))
        errors += [equivariance(vae, x, z, std.to(device))] * len(some)
    found["shift_error"], found["scale_error"] = np.mean(errors, 0).tolist()
    found["psnr"] = torch.cat(quality).mean().item()
    known = {k: v for k, v in found.items() if v is not None and np.isfinite(v)}
    if len(known) < len(found):
        print(f"not defined here: {', '.join(k for k in found if k not in known)} (one class, too few images "
              "of a class, latents without spread, or no difference)")
    return known


# ------------------------------------------------------------------------------------------------------------
# What the probe saw


@torch.no_grad()
def decode_moved(vae, probe, z, a, change):
    """Decode latents z (B, c, h, w) after the shortest step, the same for all, that changes attribute a's
    logit by `change`: along its weight vector. -> uint8 (B, 3, S, S)"""
    w = probe.weight[:, a]
    step = (change / w.square().sum().clamp_min(1e-30) * w).view(z.shape[1:])  # (D,) -> (c, h, w)
    return data.to_uint8(vae.decode(z + step.to(z.device)))


@torch.no_grad()
def directions(vae, probe, pixels, spread, shown=()):
    """In uint8 images (B, 3, S, S) move each attribute up and down by REACH standard deviations of its
    logit (spread (A,)), decode, encode again, probe again. -> reached (A,): the share of the asked-for change
    that the pictures show, 1 is all of it; leak (A,): how far the other attributes' logits went in mean, for
    one unit of the attribute's own (both in standard deviations), 0 is disentangled (an attribute with less
    than 1 % reached counts as 1 %); and for the attributes `shown` the first four images moved down, as they
    are, and up: [uint8 (4, 3, 3, S, S)]. Attributes that exclude or entail each other leak rightly: compare
    VAEs, not numbers with 0."""
    z, A, pictures = vae.encode(data.to_float(pixels)).mean, len(spread), {}
    plain = data.to_uint8(vae.decode(z[:4]))
    reached, leak = torch.zeros(A), torch.zeros(A)
    for a in tqdm(range(A), "directions", disable=None):
        down, up = (decode_moved(vae, probe, z, a, sign * REACH * spread[a]) for sign in (-1, 1))
        low, high = (probe(vae.encode(data.to_float(x)).mean.flatten(1).cpu()) for x in (down, up))
        change = (high - low) / (2 * REACH * spread)  # (B, A), 1: as asked for
        reached[a] = change[:, a].mean()
        others = change.abs().mean(0).sum() - change[:, a].abs().mean()
        leak[a] = others / max(1, A - 1) / reached[a].clamp_min(0.01)
        if a in shown:
            pictures[a] = torch.stack([down[:4], plain, up[:4]], 1).cpu()
    return reached, leak, [pictures[a] for a in shown]


def draw_directions(path, blocks):
    """blocks {VAE: (title of each attribute, pictures (n, 3, 3, S, S) of each)}: under the VAE's name a row
    an attribute, in it three pictures an image: attribute down, as it is, up. Small ones are enlarged."""
    titles, pictures = next(iter(blocks.values()))
    n, _, _, side, _ = pictures[0].shape
    zoom = max(1, 64 // side)  # three lines of text stand beside a picture
    s = zoom * side
    gap, left, head = 6, 150, 18
    size = left + n * (3 * s + gap), len(blocks) * (head + len(titles) * (s + gap))
    sheet = Image.new("RGB", size, "white")
    draw, top = ImageDraw.Draw(sheet), 0
    for name, (titles, pictures) in blocks.items():
        text = "down, as it is, up; reached: share of the change asked for; leak: change of the others"
        draw.text((4, top + 3), f"{name}: {text}", fill="black")
        top += head
        for title, row in zip(titles, pictures, strict=True):
            draw.text((4, top + s // 2 - 20), title, fill="black")
            for i, three in enumerate(row):
                strip = three.permute(2, 0, 3, 1).reshape(side, 3 * side, 3)  # (3, 3, S, S) -> side by side
                strip = strip.repeat_interleave(zoom, 0).repeat_interleave(zoom, 1)
                sheet.paste(Image.fromarray(strip.numpy()), (left + i * (3 * s + gap), top))
            top += s + gap
    common.save_png(sheet, path)


# ------------------------------------------------------------------------------------------------------------


def parse_args():
    p = common.Parser(description=__doc__)
    p.add_argument("vae", nargs="+", help="checkpoints to compare, any format of vae.load_vae")
    p.add_argument("--data", required=True, help="folder with attributes.csv (CelebA...: extras/datasets.py)")
    p.add_argument("--resolution", type=common.side, help="crop in pixels (default: the first VAE's)")
    p.add_argument("--rivals", action="store_true", help="the other scores of a latent space (scikit-learn)")
    p.add_argument("--vfm", help="a ceiling: tokens of this timm model, averaged to as many numbers")
    p.add_argument("--vfm-ckpt", help="its local weights")
    p.add_argument("--vfm-layer", type=common.layer, help="block or stage")
    p.add_argument("--grid", type=common.positive, help="tokens a side (default: resolution / 16, or 8)")
    p.add_argument("--png", help="draw what the probe saw here: attributes down and up in decoded images")
    p.add_argument("--show", nargs="+", metavar="ATTRIBUTE", help="attributes of --png (default: best six)")
    p.add_argument("--json", help="write all scores here")
    p.add_argument("--precision", choices=("bf16", "fp32"), help="of the encoder (default: bf16 where fast)")
    p.add_argument("--dry-run", action="store_true", help="print images, attributes and disk, and end")
    return p.parse_args()


def check_args(args):
    """Raise UserError, before the work, for flags that do not go together."""
    for flag, needed in (("show", "png"), ("vfm_ckpt", "vfm"), ("vfm_layer", "vfm"), ("grid", "vfm")):
        if getattr(args, flag) is not None and getattr(args, needed) is None:
            raise UserError(f"--{flag.replace('_', '-')}: has no effect without --{needed}")
    if len(set(args.vae)) < len(args.vae):
        raise UserError(f"{max(args.vae, key=args.vae.count)} is given twice; expected different checkpoints")
    if args.rivals and not importlib.util.find_spec("sklearn"):
        raise UserError("--rivals needs scikit-learn: pip install scikit-learn")
    for flag in () if args.dry_run else ("png", "json"):
        if getattr(args, flag):
            common.open_file(getattr(args, flag), f"--{flag}")


def by_image(table, keep, files):
    """Labels (N, A) and the number of the split (N,) of each of `files`, and the rows of those in the table:
    train, then val, then test."""
    place = {file: i for i, file in enumerate(files)}
    rows = [place[file] for file in table.files]
    labels, split = torch.full((len(files), len(keep)), torch.nan), np.zeros(len(files), int)
    labels[rows] = torch.from_numpy(table.values[:, keep])
    split[rows] = [data.SPLITS.index(s) for s in table.splits]
    return labels, split, sorted(rows, key=lambda row: split[row])


def open_images(args, vaes):
    """The ImageFolder, at a size that every VAE takes. Raises UserError."""
    size = args.resolution or vaes[args.vae[0]].config["resolution"]
    for path, vae in vaes.items():
        step = vae.factor * (2 if args.rivals else 1)  # the rivals halve the image
        if size % step:
            raise UserError(f"--resolution {size}: expected a multiple of {step} for {path}"
                            + (" with --rivals" if args.rivals else ""))
    images = data.ImageFolder(args.data, size)
    small = int(np.median(data.short_sides(images) or [size]))
    if small < size:
        print(f"{args.data}: images are enlarged to {size} pixels, the median short side is {small}")
    return images


def feature_sets(args, vaes, size, device):
    """{name: function of uint8 images}: each VAE's posterior mean, the VFM's tokens, pixels; the last two
    with as many numbers as the first VAE's latent, or about."""
    dimension = math.prod(vaes[args.vae[0]].latent_shape(size))
    sets = {path: partial(posterior_mean, vae.to(device, memory_format=torch.channels_last), args.precision)
            for path, vae in vaes.items()}
    if args.vfm:
        vfm = VFM(args.vfm, size, args.grid or max(8, size // 16), args.vfm_ckpt, args.vfm_layer).to(device)
        side = min(vfm.grid, max(1, int((dimension / vfm.dim) ** 0.5)))
        sets[f"{args.vfm} {side} x {side}"] = partial(averaged_tokens, vfm, side, device)
    side = min(size, max(1, round((dimension / 3) ** 0.5)))
    return {**sets, f"pixels {side} x {side}": partial(thumbnails, side)}


def print_table(results):
    """Scores down, feature sets across, as in the paper's Table 8."""
    columns = [n if len(n) < 28 else f"...{n[-25:]}" for n in results]
    width = max(12, *map(len, columns)) + 2
    keys = dict.fromkeys(k for r in results.values() for k, v in r.items() if isinstance(v, float))
    keys.pop("seconds")
    print(f"{'':22}" + "".join(f"{c:>{width}}" for c in columns))
    for k in keys:
        print(f"{k:22}" + "".join(f"{r[k]:{width}.4f}" if k in r else " " * width for r in results.values()))


def print_differences(results, draws, vaes):
    """Which F1 of two VAEs differ by more than chance in the choice of test images."""
    for i, a in enumerate(vaes):
        low, high = results[a]["f1_interval"] = interval(draws[a])
        print(f"F1 of {a}: {results[a]['f1']:.4f} [{low:.4f}, {high:.4f}]")
        for b in vaes[:i]:
            low, high = interval(draws[a] - draws[b])
            gain = results[a]["f1"] - results[b]["f1"]
            chance = low <= 0 <= high
            print(f"F1 of {a} minus {b}: {gain:+.4f} [{low:+.4f}, {high:+.4f}], "
                  + ("within chance" if chance else "beyond the 95 % interval of resampled test images"))


def print_plan(images, attributes, order, vaes):
    """--dry-run: what would be done, and the disk it needs."""
    sizes = [math.prod(vae.latent_shape(images.size)) for vae in vaes.values()]
    disk = max(2 * len(order) * s if len(order) * s > IN_MEMORY else 0 for s in sizes)
    print(f"{attributes} attributes, {len(order)} images of {images.size} x {images.size}; features "
          f"{', '.join(map(str, sizes))}; {disk / 2**30:.2f} GiB in {tempfile.gettempdir()}")


def main():
    args = parse_args()
    device, _, _ = common.setup()
    args.precision = args.precision or common.fast_precision(device)
    solver = device if device.type == "cuda" else torch.device("cpu")  # MPS lacks float64 and eigh
    begin = time.time()
    check_args(args)
    vaes = {path: load_vae(path) for path in args.vae}

    # Attributes and images
    table = data.read_attributes(args.data)
    keep = data.usable_attributes(table)
    names = [table.names[a] for a in keep]
    dropped = [name for name in table.names if name not in names]
    if dropped:
        print(f"left out, constant in a split: {', '.join(dropped)}")
    for s in args.show or ():
        if s not in names:
            raise UserError(f"--show {s}: not an attribute that is probed; there are {', '.join(names)}")
    shown = [names.index(s) for s in args.show or ()]
    images = open_images(args, vaes)
    labels, split, order = by_image(table, keep, images.files)
    if args.dry_run:
        return print_plan(images, len(names), order, vaes)

    # A probe of each set of features; of a VAE also the rivals and the directions
    results, predictions, blocks, start = {}, {}, {}, time.time()
    for name, compute in feature_sets(args, vaes, images.size, device).items():
        X, rows = collect(images, order, compute, name)  # without the unreadable images
        Y, ends = labels[rows], np.bincount(split[rows], minlength=3).cumsum().tolist()
        train, val, test = slice(0, ends[0]), slice(ends[0], ends[1]), slice(ends[1], ends[2])
        part = dict(train=train, val=val, test=test)
        counts = {s: p.stop - p.start for s, p in part.items()}
        if not results:
            print(f"{len(names)} attributes; {', '.join(f'{n} {s}' for s, n in counts.items())} images")
        probe = fit_probe(X[train], Y[train], X[val], Y[val], device=solver, progress=f"probe {name}")
        logits = probe(X[test])
        found = scores(Y[test], logits, tune_thresholds(Y[val], probe(X[val])))
        found.update(dimension=X.shape[1], strength=probe.strength.tolist())
        results[name], predictions[name] = found, logits > 0
        if name in vaes and (args.rivals or args.png):
            pixels = torch.stack([images[rows[i]][0] for i in evenly(test, 512)])
        if name in vaes and args.rivals:
            found.update(rivals(vaes[name], X, torch.tensor(images.labels)[rows], part, pixels, solver))
        if name in vaes and args.png:
            best = torch.tensor(found["per_attribute"]["f1"]).topk(min(6, len(names))).indices.tolist()
            shown, some = shown or best, pixels[evenly(slice(0, len(pixels)), 16)].to(device)
            spread = logits.std(0).clamp_min(1e-6)
            reached, leak, pictures = directions(vaes[name], probe, some, spread, shown)
            found["per_attribute"].update(reached=reached.tolist(), leak=leak.tolist())
            found.update(reached=reached.mean().item(), leak=leak.mean().item())
            titles = [f"{names[a]}\nreached {reached[a]:.2f}\nleak {leak[a]:.3f}" for a in shown]
            blocks[name] = titles, pictures
        found["seconds"], start = round(time.time() - start, 1), time.time()
        del X  # before the next is made
    prior = torch.logit(Y[train].nanmean(0)).expand(len(Y[test]), -1)
    results["majority"] = scores(Y[test], prior, torch.zeros(len(names)))

    # What is printed and written
    print_table(results)
    print_differences(results, bootstrap_f1(Y[test], predictions), args.vae)
    if blocks:
        draw_directions(args.png, blocks)
    if args.json:  # last: it marks the stage as done
        inputs = {path: common.weights_hash(vae.state_dict()) for path, vae in vaes.items()}
        common.write_json(args.json, dict(
            data=args.data, inputs=dict(data=images.hash, **inputs), attributes=names, left_out=dropped,
            share=Y[test].nanmean(0).tolist(), n=counts, precision=args.precision, results=results,
            seconds=round(time.time() - begin, 1)))


if __name__ == "__main__":
    common.run_script(main)
