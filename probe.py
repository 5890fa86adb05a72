"""Stage 6: how linearly readable are attributes in a VAE's latents? (arXiv 2601.05823, section 4 and Table 8.)

    python probe.py out/demo/control/vae.pt out/demo/send/vae.pt --data out/demo/avatars --json out/demo/probe.json
    python probe.py my/vae.pt --data celeba_folder --csv attributes_f1.csv     # any folder with an attributes.csv

One logistic regression an attribute on the flattened posterior mean, trained on the table's train split, its strength
chosen on val, scored on test. The majority guess and a probe on as many raw pixels as the latent has numbers stand
beside it, so that good can be told from bad.
"""
import argparse
import csv
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
from data import UserError
from vae import load_vae

STRENGTHS = (1e-1, 3e-2, 1e-2, 3e-3, 1e-3)  # L2 weights tried, strongest first (each starts from the one before)


@dataclass
class Probe:
    """logits = X @ weight + bias for raw features X (N, D); weight (D, A), bias (A,), strength (A,) the L2 chosen."""
    weight: torch.Tensor
    bias: torch.Tensor
    strength: torch.Tensor

    def __call__(self, X):
        return X @ self.weight + self.bias


def bce(logits, Y):
    """Mean binary cross-entropy of each attribute over its known labels: logits, Y (N, A), nan = unknown -> (A,)."""
    known = ~Y.isnan()
    loss = F.binary_cross_entropy_with_logits(logits, Y.nan_to_num(), reduction="none") * known
    return loss.sum(0) / known.sum(0).clamp_min(1)


def fit_probe(X, Y, X_val, Y_val, steps=100, progress=False):
    """Multi-label logistic regression: X (N, D) float32, Y (N, A) in {0, 1, nan} -> Probe.

    Minimises, for each attribute, mean cross-entropy + strength / 2 |w|^2 on features standardised with the training
    set's mean and std (full-batch L-BFGS, bias free of penalty), and keeps the strength with the least cross-entropy on
    the validation set. Raises UserError for an attribute without both values in the training set.
    """
    constant = [a for a in range(Y.shape[1]) if len(Y[:, a][~Y[:, a].isnan()].unique()) < 2]
    if constant:
        raise UserError(f"attribute {constant[0]} is constant in the training split; drop it before the fit")
    mean, std = X.mean(0), X.std(0).clamp_min(1e-6)
    Z, Z_val = (X - mean) / std, (X_val - mean) / std
    W = torch.zeros(X.shape[1], Y.shape[1], requires_grad=True)
    b = torch.zeros(Y.shape[1], requires_grad=True)
    best = torch.full((Y.shape[1],), np.inf)
    kept_W, kept_b, kept_s = W.detach().clone(), b.detach().clone(), torch.zeros(Y.shape[1])
    for strength in tqdm(STRENGTHS, "probe", disable=None if progress else True):
        solver = torch.optim.LBFGS([W, b], max_iter=steps, history_size=20, tolerance_grad=1e-5, tolerance_change=1e-7,
                                   line_search_fn="strong_wolfe")

        def objective():
            solver.zero_grad()
            loss = (bce(Z @ W + b, Y) + 0.5 * strength * W.square().sum(0)).sum()
            loss.backward()
            return loss

        solver.step(objective)
        with torch.no_grad():
            loss = bce(Z_val @ W + b, Y_val)
            better = loss < best
            best[better] = loss[better]
            kept_W[:, better], kept_b[better], kept_s[better] = W[:, better], b[better], strength
    weight = kept_W / std[:, None]
    return Probe(weight, kept_b - mean @ weight, kept_s)


def f1(Y, predicted):
    """F1 of each attribute over its known labels: Y (N, A) in {0, 1, nan}, predicted (N, A) bool -> (A,); 0 without hits."""
    hit = ((Y == 1) & predicted).sum(0)
    return 2 * hit / (hit + ((Y == 0) & predicted).sum(0) + (Y == 1).sum(0)).clamp_min(1)


def average_precision(Y, logits):
    """Area under precision over recall, summed at each hit in falling order of the logit: (N, A) -> (A,)."""
    out = torch.zeros(Y.shape[1])
    for a in range(Y.shape[1]):
        known = ~Y[:, a].isnan()
        y = Y[known, a][logits[known, a].argsort(descending=True, stable=True)]
        precision = y.cumsum(0) / torch.arange(1, len(y) + 1)
        out[a] = (precision * y).sum() / y.sum().clamp_min(1)
    return out


def tune_thresholds(Y, logits):
    """The logit threshold of each attribute with the best F1 on (Y, logits), tried at 99 quantiles -> (A,)."""
    candidates = torch.quantile(logits, torch.linspace(0.01, 0.99, 99), dim=0)  # (99, A)
    return candidates[torch.stack([f1(Y, logits > c) for c in candidates]).argmax(0), torch.arange(Y.shape[1])]


def scores(Y, logits, thresholds=None):
    """Y (N, A) in {0, 1, nan}, logits (N, A) -> dict: f1 (macro, at probability 0.5), f1_micro, average_precision (macro),
    balanced_accuracy (macro), f1_tuned when thresholds (A,) are given, and per_attribute (lists of A)."""
    predicted, positive, negative = logits > 0, Y == 1, Y == 0
    hit, false = (positive & predicted).sum(), (negative & predicted).sum()
    recall = (positive & predicted).sum(0) / positive.sum(0).clamp_min(1)
    specificity = (negative & ~predicted).sum(0) / negative.sum(0).clamp_min(1)
    each = {"f1": f1(Y, predicted), "average_precision": average_precision(Y, logits), "balanced_accuracy": (recall + specificity) / 2}
    if thresholds is not None:
        each["f1_tuned"] = f1(Y, logits > thresholds)
    return {**{k: v.mean().item() for k, v in each.items()}, "f1_micro": (2 * hit / (hit + false + positive.sum()).clamp_min(1)).item(),
            "per_attribute": {k: v.tolist() for k, v in each.items()}}


@torch.no_grad()
def latent_features(path, images, device, precision):
    """Flattened posterior mean of every image: (N, c*h*w) float32 on the CPU."""
    vae = load_vae(path).to(device, memory_format=torch.channels_last)
    rows = data.chunks(range(len(images)), 64)
    out = []
    for pixels, _, kept in tqdm(data.load_batches(images, rows, replace=True), f"encode {path}", len(rows), disable=None):
        x = data.to_float(pixels.to(device)).contiguous(memory_format=torch.channels_last)
        with data.autocast(device, precision):
            out.append(vae.encode(x).mean.flatten(1).float().cpu())
    return torch.cat(out)


def pixel_features(images, dimension):
    """Images shrunk (box filter) to about `dimension` numbers: (N, 3*s*s) in [-1, 1]."""
    side = max(1, round((dimension / 3) ** 0.5))
    rows = data.chunks(range(len(images)), 256)
    return torch.cat([F.interpolate(data.to_float(pixels), (side, side), mode="area").flatten(1)
                      for pixels, _, _ in data.load_batches(images, rows, replace=True)]), side


def usable_attributes(table):
    """Indices of attributes with both values in every split, and the names of the others."""
    splits, keep = np.asarray(table.splits), []
    for a in range(len(table.names)):
        values = [table.values[splits == s, a] for s in data.SPLITS]
        keep += [a] if all((v == 0).any() and (v == 1).any() for v in values) else []
    return keep, [n for a, n in enumerate(table.names) if a not in keep]


def parse_args():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("vae", nargs="+", help="checkpoints to compare")
    p.add_argument("--data", required=True, help="image folder with attributes.csv")
    p.add_argument("--resolution", type=int, help="crop in pixels (default: the first VAE's)")
    p.add_argument("--json", help="write all scores here")
    p.add_argument("--csv", help="write F1 of every attribute here")
    p.add_argument("--precision", choices=("bf16", "fp32"), help="default: bf16 where it is fast")
    p.add_argument("--dry-run", action="store_true", help="print the plan (images, attributes, memory), and end")
    return p.parse_args()


def main():
    args = parse_args()
    device, _, _ = data.setup()
    args.precision = args.precision or data.fast_precision(device)
    begin = time.time()
    for path in filter(None, (args.json, args.csv) if not args.dry_run else ()):
        data.open_out(Path(path).parent)
    configs = [load_vae(path).config for path in args.vae]
    table = data.read_attributes(args.data)
    keep, dropped = usable_attributes(table)
    if not keep:
        raise UserError(f"{args.data}/attributes.csv: no attribute has both values in each of train, val and test")
    if dropped:
        print(f"left out, constant in a split: {', '.join(dropped)}")
    images = data.ImageFolder(args.data, args.resolution or configs[0]["resolution"])
    if args.dry_run:
        sizes = [c["z_channels"] * (images.size // 2 ** (len(c["ch_mult"]) - 1)) ** 2 for c in configs]
        return print(f"{len(keep)} attributes, {len(table.files)} images of {images.size} x {images.size}; features "
                     f"{', '.join(map(str, sizes))}, about {len(images) * 4 * (sum(sizes) + 2 * max(sizes)) / 2**30:.2f} GiB of main memory")
    at = {f: i for i, f in enumerate(images.files)}
    Y = torch.full((len(images.files), len(keep)), np.nan)
    Y[[at[f] for f in table.files]] = torch.from_numpy(table.values[:, keep])
    features = [(path, latent_features(path, images, device, args.precision)) for path in args.vae]
    split = {s: [at[f] for f, t in zip(table.files, table.splits) if t == s and f not in images.bad] for s in data.SPLITS}
    print(f"{len(keep)} attributes; {', '.join(f'{len(v)} {k}' for k, v in split.items())} images")
    pixels, side = pixel_features(images, features[0][1].shape[1])
    results = {}
    for name, X in features + [(f"pixels {side} x {side}", pixels)]:
        start = time.time()
        probe = fit_probe(X[split["train"]], Y[split["train"]], X[split["val"]], Y[split["val"]], progress=True)
        thresholds = tune_thresholds(Y[split["val"]], probe(X[split["val"]]))
        results[name] = dict(scores(Y[split["test"]], probe(X[split["test"]]), thresholds), dimension=X.shape[1], strength=probe.strength.tolist(), seconds=round(time.time() - start, 1))
    often = Y[split["train"]].nanmean(0) > 0.5
    guess = torch.where(often, 1.0, -1.0).expand(len(split["test"]), -1)
    results["majority"] = scores(Y[split["test"]], guess, torch.where(often, 0.0, 2.0))
    columns = ("f1", "f1_tuned", "f1_micro", "average_precision", "balanced_accuracy")
    width = max(len(n) for n in results)
    print(f"{'':{width}}  " + "  ".join(f"{c:>17}" for c in columns))
    for name, r in results.items():
        print(f"{name:{width}}  " + "  ".join(f"{r[c]:17.4f}" for c in columns))
    if args.csv:
        with open(args.csv, "w", newline="") as f:
            writer = csv.writer(f)
            writer.writerow(["attribute", *results])
            writer.writerows([table.names[a], *(round(r["per_attribute"]["f1"][i], 4) for r in results.values())] for i, a in enumerate(keep))
    if args.json:  # last: it marks the stage as done
        data.write_json(args.json, dict(data=args.data, attributes=[table.names[a] for a in keep], left_out=dropped,
                                        n={k: len(v) for k, v in split.items()}, precision=args.precision, results=results, seconds=round(time.time() - begin, 1)))


if __name__ == "__main__":
    data.run_script(main)
