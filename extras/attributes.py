"""What samples show: attributes read off them by a classifier, against those of the training images.

    python extras/attributes.py out/study/avatars out/study/shared/oracle.safetensors \\
        out/study/seed*/{control,send}/samples.npz --json out/study/attributes.json

The classifier is a logistic regression an attribute (probe.py) on the pooled features of the vision model
that extras/oracle.py trained. It reads the training images and the held-out ones too, so that its own errors
stand on both sides; the held-out images are the line "real". Of samples the class asked for is known, and
with it which attributes there can be: those that the table knows of an image of that class.

    frequencies   mean |share in the samples - share in the training images| over attributes
    pairs         the same over pairs of attributes
    rare          of the rarest 1 % of the pairs that the training images have, the share that is there (it
                  grows with the number of samples)
    impossible    share of images with an attribute that their class does not have
    drift         slope of (share in the samples - share) over share: above 0 the common becomes more common
    skin, glasses, headgear   frequencies, of these attributes alone

Of files seed*/ARM/samples.npz the arms' differences from the control follow, with their 95 % interval over
seeds, where there are three or more.
"""
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common  # noqa: E402
import data  # noqa: E402
import fid  # noqa: E402
from common import UserError  # noqa: E402
from mapper import pretrained  # noqa: E402
from oracle import NET, logits  # noqa: E402
from probe import f1, fit_probe, tune_thresholds  # noqa: E402
from study import interval  # noqa: E402

GROUPS = {"skin": ("skin_",), "glasses": ("glasses", "sunglasses"),
          "headgear": ("hat", "turban", "hijab", "tiara", "cat_ears", "flowers")}


def read_samples(path, size, classes):
    """An .npz of sample.py -> uint8 (N, 3, S, S), labels (N,). Raises UserError."""
    source = fid.load_npz(path)
    known = source.n > 1 and source.labels is not None and set(source.labels.tolist()) <= {*range(classes)}
    if source.size != size or not known:
        raise UserError(f"{path}: {source.n} images of {source.size} pixels; expected two or more of {size} "
                        f"(or another --size), each with its label 0 to {classes - 1}, as the data's")
    return source.read(range(source.n))[0], torch.from_numpy(source.labels.astype(np.int64))


def train_reader(table, keep, images, applies, features):
    """-> (function of uint8 images -> (N, A) bool, {split: (predictions, rows of the images)}, test F1). What
    a class cannot have counts as absent."""
    place = {file: i for i, file in enumerate(images.files)}
    parts, X, Y = {}, {}, {}
    for split in data.SPLITS:
        rows = [i for i, s in enumerate(table.splits) if s == split]
        parts[split] = [place[table.files[i]] for i in rows]
        X[split] = torch.cat([features(pixels) for pixels, _, _ in data.load_batches(
            images, common.chunks(parts[split], 64), replace=True)])
        Y[split] = torch.from_numpy(table.values[rows][:, keep])
        Y[split][~applies[torch.tensor(images.labels)[parts[split]]]] = 0
    reader = fit_probe(X["train"], Y["train"], X["val"], Y["val"], progress="reader")
    thresholds = tune_thresholds(Y["val"], reader(X["val"]))
    read = lambda x: reader(x) > thresholds
    seen = {split: (read(X[split]), parts[split]) for split in data.SPLITS}
    score = f1(Y["test"], seen["test"][0]).mean().item()
    return lambda pixels: read(torch.cat([features(x) for x in pixels.split(64)])), seen, score


def shares(predicted, labels, applies):
    """Predictions (N, A), labels (N,), applies (C, A): whether a class has an attribute -> shares of the
    attributes (A,) and of the pairs (A, A) among the images that can have them, nan where none can."""
    can = applies[labels].double()
    has = predicted.double() * can
    return (has.sum(0) / can.sum(0)).numpy(), (has.T @ has / (can.T @ can)).numpy()


def compare(predicted, labels, applies, names, expected, rare):
    """Scores of the docstring, and the change of each attribute's share. expected: shares() of the training
    images; rare: (P, 2) pairs of attributes."""
    each, pairs = shares(predicted, labels, applies)
    change, upper = each - expected[0], np.triu_indices(len(names), 1)
    has, known = (predicted & applies[labels]).numpy(), ~np.isnan(change)
    spread = expected[0][known] - expected[0][known].mean()
    result = dict(frequencies=np.nanmean(abs(change)),
                  pairs=np.nanmean(abs(pairs - expected[1])[upper]),
                  rare=np.mean([(has[:, a] & has[:, b]).any() for a, b in rare]),
                  impossible=(predicted & ~applies[labels]).any(1).double().mean().item(),
                  drift=(spread @ change[known]) / max(spread @ spread, 1e-12))
    for group, prefixes in GROUPS.items():
        of = [i for i, name in enumerate(names) if name.startswith(prefixes)]
        result |= {group: np.nanmean(abs(change[of]))} if known[of].any() else {}
    return ({k: float(v) for k, v in result.items()},
            {name: round(v, 4) for name, v in zip(names, change.tolist()) if not np.isnan(v)})


def rarest(table, keep, share=0.01):
    """The rarest pairs of attributes that training images have -> (P, 2)."""
    values = np.nan_to_num(table.values[np.array(table.splits) == "train"][:, keep])
    counts = np.triu(values.T @ values, 1)
    pairs = np.argwhere(counts > 0)
    order = np.argsort(counts[tuple(pairs.T)], kind="stable")
    return pairs[order[:max(1, round(share * len(pairs)))]]


def differences(results):
    """{arm: {score: (mean, low, high)}} minus the control's, over the seeds of files seed*/ARM/x.npz; of
    fewer than three seeds nothing."""
    runs = {}
    for name, scores in results.items():
        runs.setdefault(Path(name).parent.name, {})[Path(name).parent.parent.name] = scores
    control, out = runs.pop("control", {}), {}
    for arm, of in runs.items():
        seeds = [seed for seed in of if seed in control]
        keys = [k for k in next(iter(of.values())) if all(k in of[s] and k in control[s] for s in seeds)]
        out |= {arm: {k: (float(np.mean(d)), *interval(d)) for k in keys
                      for d in [[of[s][k] - control[s][k] for s in seeds]]}} if len(seeds) > 2 else {}
    return out


def main():
    p = common.Parser(description=__doc__)
    p.add_argument("data", help="image folder with attributes.csv, as the SiT's")
    p.add_argument("oracle", help="what extras/oracle.py trained on it")
    p.add_argument("samples", nargs="+", help=".npz of sample.py")
    p.add_argument("--size", type=common.side, default=32, help="of the samples, in pixels")
    p.add_argument("--json", help="write all scores here, and each attribute's change")
    args = p.parse_args()
    device, _, _ = common.setup()
    if args.json:
        common.open_file(args.json, "--json")
    table, images = data.read_attributes(args.data), data.ImageFolder(args.data, args.size)
    keep = data.usable_attributes(table)
    names, classes = [table.names[a] for a in keep], len(images.classes)
    samples = {path: read_samples(path, args.size, classes) for path in args.samples}
    if not Path(args.oracle).is_file():
        raise UserError(f"{args.oracle}: no such file; make it with: python extras/oracle.py {args.data} "
                        f"{args.oracle}")
    net = pretrained(NET, args.oracle, "oracle").to(device, memory_format=torch.channels_last).eval()
    features = torch.no_grad()(lambda pixels: logits(net, pixels, device).cpu())

    # What each class has, the reader, and what it reads off the images
    label_of = dict(zip(images.files, images.labels))
    applies = torch.zeros(classes, len(keep), dtype=torch.bool)
    for file, values in zip(table.files, table.values[:, keep]):
        applies[label_of[file]] |= torch.from_numpy(~np.isnan(values))
    read, seen, score = train_reader(table, keep, images, applies, features)
    print(f"the reader's macro F1 of {len(names)} attributes on the test images: {score:.4f}")
    labels = torch.tensor(images.labels)
    train, rows = seen["train"]
    expected, rare = shares(train, labels[rows], applies), rarest(table, keep)
    held_out = torch.cat([seen[s][0] for s in ("val", "test")])
    rows = seen["val"][1] + seen["test"][1]
    results, changes = {}, {}
    results["real"], changes["real"] = compare(held_out, labels[rows], applies, names, expected, rare)
    for path, (pixels, of) in samples.items():
        results[path], changes[path] = compare(read(pixels), of, applies, names, expected, rare)

    keys = list(results["real"])
    width = max(map(len, results))
    print(f"{'':{width}}" + "".join(f"{k:>13}" for k in keys))
    for name, scores in results.items():
        print(f"{name:{width}}" + "".join(f"{scores[k]:13.4f}" if k in scores else " " * 13 for k in keys))
    found = differences(results)
    for arm, scores in found.items():
        print(f"{arm} minus control: " + ", ".join(f"{k} {m:+.4f} [{low:+.4f}, {high:+.4f}]"
                                                   for k, (m, low, high) in scores.items()))
    if args.json:
        common.write_json(args.json, dict(reader_f1=score, scores=results, changes=changes,
                                          minus_control=found))


if __name__ == "__main__":
    common.run_script(main)
