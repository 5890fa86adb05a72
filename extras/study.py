"""Stage 7: tables and figures of what run.sh made: of the study, and of the demo.

    python extras/study.py out/study         # -> report.md, rows.json, correlations.json, figures
    python extras/study.py demo out/demo --study results/study_1000/rows.json  # -> report.json, report.png

The study compares every arm within each run (folder seedN, or seedN-fp32 of the same seed in another
precision), where all share the pre-trained VAE, images, order, noise and steps: with the control, an arm with
REPA with the control with REPA. What is not finished is left out, and said. An interval is the 95 % interval
of Student's t over the seeds of those differences; "undecided" means that it holds 0, or that there are fewer
than three seeds. Arms whose SiT is trained longer (-long) stand apart.
"""
import contextlib
import json
import sys
from pathlib import Path

import numpy as np
import scipy.interpolate
import scipy.optimize
import scipy.stats
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))
import common  # noqa: E402
from common import UserError  # noqa: E402
from correlate import correlate, kind_colours, new_figure, numbers, save_figure, verdict  # noqa: E402
from fid import count_name, warn_of_blur  # noqa: E402

# What each arm of run.sh is, in the order of the tables
ARMS = {
    "control": "no alignment",
    "send": "Send-VAE: VFM EfficientNet-Lite0, lambda 2",
    "random": "`send`, VFM resnet10t, random weights",
    "oracle": "`send`, VFM resnet10t, taught the attributes",
    "depth0-clean": "`send`, MLP alone as mapper, no noise",
    "depth1-clean": "`send`, no noise",
    "depth2": "`send`, mapper of depth 2",
    "random-matched": "`random`, lambda 8: at the PSNR of `send`",
    "vavae": "VA-VAE's alignment",
    "vfm2": "`send`, VFM EfficientNet-Lite2",
    "lambda0.5": "`send`, lambda 0.5",
    "lambda4": "`send`, lambda 4",
    "lambda8": "`send`, lambda 8",
    "standardised": "`send`, tokens standardised per channel (not in the paper)",
    "spatial": "`send`, tokens standardised per image (iREPA; not in the paper)",
    "gram": "`send` and a Gram loss (not in the paper)",
    "ve": "`send`, variance expansion for the KL (not in the paper)",
    "lambda0.1": "`send`, lambda 0.1",
    "ratio": "`send`, lambda by VA-VAE's ratio of gradients",
    "noise0.5": "`send`, a = 0.5 in eq. (1)",
    "lognormal": "`send`, a as the SiT's times",
    "depth0": "`send`, MLP alone as mapper",
    "depth2-clean": "`send`, no noise, mapper of depth 2",
    "vfm-fine": "`send`, VFM EfficientNet-Lite0's stride 8",
    "vfm-vit": "`send`, VFM a ViT-S of DINOv2's shape, block 8",
    "vfm-vgg16": "`send`, VFM VGG16",
    "oracle-half": "`send`, VFM resnet10t, taught the attributes of other styles",
    "control-repa": "`control`, REPA in the SiT",
    "send-repa": "`send`, REPA in the SiT",
    **{f"{arm}-{name}": f"`{arm}`, {change}" for name, change in {
        "quarter": "a quarter of the fine-tuning", "x4": "4 times the fine-tuning",
        "x16": "16 times the fine-tuning", "fsq": "finite scalar quantisation",
        "foreign": "aligned on other images", "modern": "SiT of RMSNorm, rotary positions and SwiGLU",
        "cosine": "SiT on the cosine path"}.items()
       for arm in ("control", "send")},
    "control-long": "`control`, SiT trained longer",
    "send-long": "`send`, SiT trained longer",
}
DISTANCES = ("curve_mean", "fd", "fd_to_reconstructions", "fd2", "fd3")  # better when lower, all else higher
# Claims put to the test: words, the arm that is to be better, than which, and by which scores
CLAIMS = (
    ("A SiT learns faster on aligned latents", "send", "control", DISTANCES),
    ("... beside REPA in the SiT", "send-repa", "control-repa", DISTANCES),
    ("REPA helps on aligned latents too", "send-repa", "send", DISTANCES),
    ("The positive control helps", "oracle", "control", DISTANCES),
    ("Smoothing alone helps: a random VFM", "random", "control", DISTANCES),
    ("... at the PSNR of `send`", "random-matched", "control", DISTANCES),
    ("Meaning helps beyond smoothing", "send", "random", DISTANCES),
    ("... at equal PSNR", "send", "random-matched", DISTANCES),
    ("... of one network, trained or random", "oracle", "random-matched", DISTANCES),
    ("`send` helps more than the positive control", "send", "oracle", DISTANCES),
    ("... than VA-VAE's alignment", "send", "vavae", DISTANCES),
    ("Another VFM helps more", "vfm2", "send", DISTANCES),
    ("... a ViT-S of DINOv2's shape", "vfm-vit", "send", DISTANCES),
    ("... VGG16", "vfm-vgg16", "send", DISTANCES),
    ("... twice as fine features (stride 8)", "vfm-fine", "send", DISTANCES),
    ("A larger weight helps more", "lambda8", "send", DISTANCES),
    ("A quarter of the weight helps too", "lambda0.5", "control", DISTANCES),
    ("The mapper's ViT block helps (Table 2)", "depth1-clean", "depth0-clean", DISTANCES),
    ("One block helps more than two (with noise)", "send", "depth2", DISTANCES),
    ("Noise helps (Table 3)", "send", "depth1-clean", DISTANCES),
    ("Standardised tokens help more", "standardised", "send", DISTANCES),
    ("Attributes are easier to read from aligned latents", "send", "control",
     ("probe_f1", "probe_top5_recall")),
    ("Alignment costs reconstruction", "control", "send", ("psnr",)),
)
# Columns of the main table: score, heading, digits, its (m)ean and its (d)ifference from the control's
COLUMNS = (
    ("psnr", "PSNR", 2, "m"), ("rfd", "rFD", 0, "m"), ("probe_f1", "probe F1", 3, "md"),
    ("probe_top5_recall", "top-5 recall", 3, "md"),
    ("fd", "gFD", 0, "md"), ("fd_to_reconstructions", "gFD to rec.", 0, "md"),
    ("curve_mean", "curve", 0, "md"),
    ("fd2", "by Lite2", 0, "md"), ("fd3", "by VGG16", 0, "md"),
    ("precision", "precision", 2, "m"), ("recall", "recall", 2, "m"),
    ("class_agreement", "class agreement", 3, "m"),
)
TITLES, DIGITS = {c[0]: c[1] for c in COLUMNS}, {c[0]: c[2] for c in COLUMNS}
COMPARED = tuple((key, title, digits) for key, title, digits, shown in COLUMNS if "d" in shown)
# Arms by their vision model, of which SHARED/knows-NAME.json says which attributes its tokens tell
LADDER = {"random": "random", "random-matched": "random", "vfm-vgg16": "vgg16", "vfm-vit": "vit",
          "vfm-fine": "fine", "send": "lite0", "vfm2": "lite2", "oracle": "oracle"}
WEIGHTS = ("control", "lambda0.1", "lambda0.5", "send", "lambda4", "lambda8")  # one recipe, lambda 0 to 8
OTHER_SIT = ("-repa", "-modern", "-cosine", "-long")  # of arms with another arm's VAE
LENGTHS = {"quarter": 0.25, "x4": 4, "x16": 16}  # fine-tuning, in that of the others
# The demo's table: names in report.json, and digits
PRINTED = dict(psnr=2, probe_f1=4, fd=1, rfd=1, fd_to_reconstructions=1, precision=3, recall=3,
               precision_to_reconstructions=3, recall_to_reconstructions=3, class_agreement=3)


# -----------------------------------------------------------------------------------------------------------
# Reading


@contextlib.contextmanager
def checked(path, again):
    """What content that no stage wrote raises in here becomes one line, which ends with what to do."""
    try:
        yield
    except UserError:
        raise
    except (OSError, *common.BROKEN) as e:
        raise UserError(f"{path}: not what the stages write ({type(e).__name__}: {e}); {again}") from None


def read_log(path):
    """The records of a metrics.jsonl; to be called within checked()."""
    return [dict(json.loads(line)) for line in path.read_text("utf-8").splitlines()]


def read_curve(path):
    """Name of the distance and [(step, distance)] of a metrics.jsonl of train_sit.py --eval-every."""
    with checked(path, "run that arm again"):
        scored = [(r["step"], k, r[k]) for r in read_log(path) for k in r if k.startswith(("FD(", "FID"))]
    return scored[0][1] if scored else None, [(step, v) for step, _, v in scored]


def last_seconds(path):
    """Training time in the last line with losses of a metrics.jsonl."""
    with checked(path, "run that arm again"):
        return float([r["seconds"] for r in read_log(path) if "seconds" in r][-1])


def read_scores(folder, owner):
    """The scores of one arm from what its stages wrote (fd.json, recon.json; probe.json where the images have
    attributes): fd, rfd, fd_to_reconstructions, precision, recall, class_agreement, psnr, ssim, recon_fd,
    probe_f1, ... owner: the folder of its VAE. -> (scores, probe F1 of the baselines, fd.json)."""
    score, quality, probe = common.read_json(folder / "fd.json"), common.read_json(owner / "recon.json"), {}
    if (owner / "probe.json").exists():
        probe = common.read_json(owner / "probe.json").get("results", {})
    with checked(folder, "delete its fd.json, recon.json and probe.json and run the same command again"):
        (found,), (n,) = score["scores"].values(), score["n"].values()
        if "rfd" not in found:
            raise UserError(f"{folder}/fd.json: no rFD in it; score again, with --vae {owner}/vae.pt")
        scores = dict(found, fd_n=n, psnr=quality["psnr"], ssim=quality["ssim"], recon_fd=quality.get("fd"))
        scores |= {"lpips": quality["lpips"]} if "lpips" in quality else {}
        scores |= numbers(next(iter(probe.values()), {}), "probe_")  # the VAE's come first
        simple = {k.split()[0]: r["f1"] for k, r in probe.items() if k.startswith(("majority", "pixels"))}
        return scores, simple, score


def other_sit(arm):
    """Whether an arm has another arm's VAE, and another SiT than the rest."""
    return arm.endswith(OTHER_SIT)


def has_own(arm, key):
    """Whether a score is not one of another arm's VAE."""
    return not other_sit(arm) or not key.startswith(("probe_", "psnr", "rfd"))


def read_row(folder):
    """One arm of one run: {name, run, arm, seed, precisions, measure, curve, commands, commits, sources,
    baselines, and the scores of read_scores}; None when it is not finished. fd2 and fd3 are the distances by
    EfficientNet-Lite2 and VGG16; `measure` holds all that must agree between distances. Raises UserError."""
    arm, run = folder.name, folder.parent.name
    again = "delete that arm's folder and run the study's command again"
    owner = folder.parent / (arm.rpartition("-")[0] if other_sit(arm) else arm)
    logs = {"train_vae": owner / "metrics.jsonl", "train_sit": folder / "sit/metrics.jsonl"}
    files = {k: folder / f"{k}.json" for k in ("fd", "fd2", "fd3", "samples")}
    files |= {k: owner / f"{k}.json" for k in ("recon", "probe")}
    if not all(p.is_file() for p in (*logs.values(), *files.values())):
        return None
    scores, simple, fd = read_scores(folder, owner)
    curve_measure, curve = read_curve(logs["train_sit"])
    if not curve:
        raise UserError(f"{logs['train_sit']}: no distances; expected a run with --eval-every; {again}")
    scores["curve_mean"] = float(np.mean([distance for _, distance in curve]))
    with checked(folder, again):
        records = {k: common.read_json(p) for k, p in files.items()}
        records |= {k: read_log(p)[0] for k, p in logs.items()}
        fd2, fd3, drawn, tuned, trained = (records[k] for k in ("fd2", "fd3", "samples", *logs))
        (scores["fd2"],), (scores["fd3"],) = fd2["fd"].values(), fd3["fd"].values()
        scores["fd2_to_reconstructions"] = [*fd2["scores"].values()][0]["fd_to_reconstructions"]
        length = tuned["steps"] / LENGTHS.get(arm.rpartition("-")[2], 1)
        measure = (f"FD({fd['network']})-{scores['fd_n']} (other judges {fd2['network']}, {fd3['network']}), "
                   f"{drawn['sampler']} {drawn['steps']} steps, VAE {tuned['inputs']['init']} trained for "
                   f"{length:.0f} steps of {tuned['batch']}, SiT for {trained['steps']} of "
                   f"{trained['batch']}, images {fd['inputs'][fd['reference']]}; "
                   f"curves {curve_measure}")
        vaes = {records[k]["inputs"]["vae"] for k in ("fd", "fd2", "recon")} | {drawn["vae_hash"]}
        vaes |= {v for k, v in records["probe"]["inputs"].items() if k != "data"}
        vaes |= {trained["inputs"]["latents"].split("-")[0]}
        if len(vaes) > 1:
            raise UserError(f"{folder}: latents, samples, reconstructions and probe of different VAEs "
                            f"({', '.join(sorted(vaes))}); {again}")
        if len({r["inputs"][next(iter(r["scores"]))] for r in (fd, fd2, fd3)}) > 1:
            raise UserError(f"{folder}: fd.json, fd2.json and fd3.json are of different samples; {again}")
        real = max(fd["fd_real"].values(), default=np.nan)
        real = f"{real:.0f}, one half of the training images against the other {fd['floor']:.0f}"
        commands = {k: r["made"]["command"].replace(sys.prefix, "ENV") for k, r in records.items()}
        return dict(name=f"{run}/{arm}", run=run, arm=arm, seed=int(run[4:].partition("-")[0]),
                    precisions=" and ".join(sorted({tuned["precision"], trained["precision"]})),
                    measure=measure, curve_measure=curve_measure, curve=curve, **scores, baselines=simple,
                    real_images=real, commands=commands,
                    commits=sorted({str(r["made"]["commit"]) for r in records.values()}),
                    sources={k: str(p) for k, p in files.items()} | dict(curve=str(logs["train_sit"])))


def read_study(root):
    """{arm: {run: row}} in the order of ARMS, the same of the arms that are trained longer, and the names of
    what is not finished. Raises UserError."""
    order = {a: i for i, a in enumerate(ARMS)}
    folders = [p for p in root.glob("seed*/*") if p.is_dir()]
    folders.sort(key=lambda p: (order.get(p.name, len(order)), p.name, len(p.parent.name), p))  # seed10: last
    rows, long, missing = {}, {}, []
    for folder in folders:
        row, group = read_row(folder), long if folder.name.endswith("-long") else rows
        if row is None:
            missing.append(f"{folder.parent.name}/{folder.name}")
        else:
            group.setdefault(folder.name, {})[row["run"]] = row
    if "control" not in rows:
        raise UserError(f"{root}: no finished seed*/control, with which every arm is compared; run: bash "
                        "run.sh study, or the question whose folder this is (of a demo: study.py demo RUN)")
    for group in (rows, long):
        measures = {r["measure"] for of in group.values() for r in of.values()}
        if len(measures) > 1:
            raise UserError(f"{root}: distances of different kinds do not mix: {', '.join(sorted(measures))}")
    every = [r for of in (rows | long).values() for r in of.values()]
    for run in {r["run"] for r in every}:
        found = {r["precisions"] for r in every if r["run"] == run}
        if len(found) > 1 or run.partition("-")[2] not in ("", *found):
            raise UserError(f"{root}/{run}: arms in {', '.join(sorted(found))}; expected one precision a "
                            "folder; of another: bash run.sh study N-fp32 ARM, and its control")
    return rows, long, missing


def read_ladder(root, rows):
    """{arm: probe F1 of its vision model's tokens}, from low to high, of the arms that ran."""
    known = {}
    for arm, name in LADDER.items():
        file = root / f"shared/knows-{name}.json"
        if arm in rows and file.exists():
            with checked(file, "delete it and run the study's command again"):
                known[arm] = [*common.read_json(file)["results"].values()][1]["f1"]  # the VAE comes first
    return dict(sorted(known.items(), key=lambda item: item[1]))


# -----------------------------------------------------------------------------------------------------------
# Statistics


def interval(values):
    """95 % interval of the mean by Student's t: (low, high); nan for fewer than three values."""
    v = np.asarray(values, float)
    if len(v) < 3:
        return np.nan, np.nan
    half = scipy.stats.t.ppf(0.975, len(v) - 1) * v.std(ddof=1) / len(v) ** 0.5
    return v.mean() - half, v.mean() + half


def by_seed(found):
    """[(row, value)] -> one value a seed: a seed that ran in two precisions is not two."""
    of = {}
    for row, value in found:
        of.setdefault(row["seed"], []).append(value)
    return [np.mean(values, 0) for values in of.values()]


def values_of(of, key):
    """A score of an arm, one value a seed that has it."""
    return by_seed([(row, row[key]) for row in of.values() if key in row])


def pairs(rows, arm, reference):
    """The rows of an arm and of what it is compared with, of each run that both have."""
    theirs = rows.get(reference, {})
    return [(r, theirs[run]) for run, r in rows.get(arm, {}).items() if run in theirs]


def differences(rows, arm, key, reference="control"):
    """Arm minus reference, one a seed."""
    return by_seed([(a, a[key] - b[key]) for a, b in pairs(rows, arm, reference) if key in a and key in b])


def reference_of(rows, arm):
    """What an arm is compared with: the control, or the control with the same suffix where there is one."""
    same = f"control-{arm.partition('-')[2]}"
    return same if same in rows and same != arm else "control"


def compared(d, key):
    """Differences in a score, in words: better, worse, or undecided."""
    low, high = interval(d)
    if np.isnan(low) or low <= 0 <= high:
        return "undecided"
    return "better" if (high < 0) == (key in DISTANCES) else "worse"


def claim_verdict(d, key):
    """Differences in a score, one a seed, that are claimed to be for the better -> (reading, the effect that
    as many seeds with this scatter would show four times out of five, by the noncentral t; nan for fewer than
    three)."""
    (low, high), n = interval(d), len(d)
    if n < 3:
        return "undecided: fewer than three seeds", np.nan
    error, limit = np.std(d, ddof=1) / n ** 0.5, scipy.stats.t.ppf(0.975, n - 1)
    visible = error * scipy.optimize.brentq(lambda e: scipy.stats.nct.sf(limit, n - 1, e) - 0.8, 0, 20)
    if key not in DISTANCES:
        low, high = -high, -low  # below 0 supports the claim
    if high < 0:
        return "**supported**", visible
    seen = "the opposite is seen" if low > 0 else f"up to {-low:.3g} is not excluded"
    return f"not supported: {seen}", visible


def steps_to(curve, target):
    """Training steps after which the curve [(step, distance)] first is at or below `target`, linear between
    its points; None: never. A curve that begins below gives its first step, an upper limit."""
    before = None
    for step, value in curve:
        if value <= target:
            if before is None:
                return float(step)
            return before[0] + (step - before[0]) * (before[1] - target) / (before[1] - value)
        before = step, value
    return None


def speed_ups(rows, arm, reference):
    """Steps of the reference over steps of the arm to the worse of their two last distances, which both
    curves reach, one a seed: above 1 the arm is faster, below 1 slower. (Counting only arms that reach the
    reference would call chance a gain.) And whether one is a bound: a curve was there at its first point."""
    logs, bound = [], False
    for row, other in pairs(rows, arm, reference):
        ours, theirs = row["curve"], other["curve"]
        target = max(ours[-1][1], theirs[-1][1])
        logs.append((row, np.log(steps_to(theirs, target) / steps_to(ours, target))))
        bound |= min(ours[0][1], theirs[0][1]) <= target
    return list(np.exp(by_seed(logs))), bound


def at_equal_psnr(rows, arm, key):
    """Arm minus `send`'s recipe with the lambda that costs as much PSNR, one a seed: on a monotone cubic
    through the WEIGHTS of its run, as the gain of a dB shrinks. And through which. Left out: runs with fewer
    than three of them, and arms beyond their ends."""
    out, through = [], set()
    for run, row in rows[arm].items():
        weights = [a for a in WEIGHTS if run in rows.get(a, {})]
        line = sorted((rows[a][run]["psnr"], rows[a][run][key]) for a in weights)
        if len(line) > 2 and line[0][0] <= row["psnr"] <= line[-1][0]:
            curve = scipy.interpolate.PchipInterpolator(*zip(*line, strict=True))
            out.append((row, row[key] - curve(row["psnr"])))
            through.add(", ".join(f"`{a}`" for a in weights))
    return by_seed(out), "; ".join(sorted(through))


def arm_means(rows):
    """One row an arm, for correlate(), which then resamples arms: the control's mean over its seeds plus the
    arm's mean difference, as levels move with the precision. Without arms that have another SiT."""
    out, control = [], rows["control"]
    for arm in rows:
        both = pairs(rows, arm, "control")
        if both and not other_sit(arm):
            used = [*control.values(), *(row for row, _ in both)]
            keys = set.intersection(*(set(numbers(r)) for r in used)) | {"psnr"}
            means = {k: float(np.mean(values_of(control, k)) + np.mean(differences(rows, arm, k)))
                     for k in sorted(keys)}
            out.append(dict(means, name=arm, run=arm, arm=arm))
    return out


# -----------------------------------------------------------------------------------------------------------
# Tables, in Markdown


def table(head, lines):
    first, *others = ("| " + " | ".join(map(str, row)) + " |\n" for row in [head, *lines])
    return first + "|" + "---|" * len(head) + "\n" + "".join(others)


def mean_sd(values, digits, sign=""):
    v = np.asarray(values, float)
    return f"{v.mean():{sign}.{digits}f}" + (f" ± {v.std(ddof=1):.{digits}f}" if len(v) > 1 else "")


def mean_of(of, key, digits):
    values = values_of(of, key)
    return mean_sd(values, digits) if values else ""


def signed(value, digits):
    return f"{round(float(value), digits) + 0.0:+.{digits}f}"  # no "-0"


def span_text(d, digits, key=None):
    """Mean of differences and its interval; with the score's name what it says."""
    low, high = interval(d)
    if np.isnan(low):
        return f"{signed(np.mean(d), digits)} ({('one seed', 'two seeds')[len(d) - 1]})"
    reading = f" {compared(d, key)}" if key else ""
    return f"{signed(np.mean(d), digits)} [{signed(low, digits)}, {signed(high, digits)}]{reading}"


def short_span(d, key):
    """Mean of differences ± half of its interval, bold where that leaves out 0."""
    digits, (low, high) = DIGITS[key], interval(d)
    text = f"{signed(np.mean(d), digits)} ± {(high - low) / 2:.{digits}f}"
    return text if compared(d, key) == "undecided" else f"**{text}**"


def change(rows, arm, key, digits):
    """Difference from the control; nothing for the control itself."""
    reference = reference_of(rows, arm)
    d = differences(rows, arm, key, reference)
    if arm == reference or not d:
        return ""
    return span_text(d, digits, key)


def speed_text(rows, arm):
    """Geometric mean and range over seeds. No interval: a bound is no measurement."""
    reference = reference_of(rows, arm)
    ratios, bound = speed_ups(rows, arm, reference)
    if arm == reference or not ratios:
        return ""
    span = f" ({min(ratios):.2f} to {max(ratios):.2f})" if len(ratios) > 1 else " (one seed)"
    return f"{np.exp(np.log(ratios).mean()):.2f}{span}{', a bound' if bound else ''}"


def seeds_in(of):
    return ", ".join([str(len(values_of(of, "psnr"))), *sorted({r["precisions"] for r in of.values()})])


def main_table(rows):
    head, lines = ["arm", "", "seeds, in"], []
    for _, title, _, shown in COLUMNS:
        head += [title] * ("m" in shown) + [f"{title}, minus control's"] * ("d" in shown)
    for arm, of in rows.items():
        line = [f"`{arm}`", ARMS.get(arm, ""), seeds_in(of)]
        for key, _, digits, shown in COLUMNS:
            own = has_own(arm, key)
            line += [mean_of(of, key, digits) if own else ""] if "m" in shown else []
            line += [change(rows, arm, key, digits) if own else ""] if "d" in shown else []
        lines.append([*line, speed_text(rows, arm)])
    return table([*head, "speed-up"], lines)


def claim_table(rows):
    """A line a claim and score, with its verdict."""
    lines = []
    for words, arm, reference, scores in CLAIMS:
        for key in scores:
            d, line = differences(rows, arm, key, reference), [words, f"`{arm}` - `{reference}`", TITLES[key]]
            if not d:
                lines.append([*line, "", "", "", "not run"])
                continue
            reading, visible = claim_verdict(d, key)
            power = "" if np.isnan(visible) else f"{visible:.{max(DIGITS[key], 1)}f}"
            lines.append([*line, len(d), span_text(d, DIGITS[key]), power, reading])
    return table(["claim", "difference", "score", "seeds", "mean and 95 % interval",
                  "effect that would be seen (power 80 %)", "reading"], lines)


def short_table(rows):
    """The claims on distances that three seeds or more have decided, a line each, as README shows them."""
    keys = ("psnr", "probe_f1", *(k for k in DISTANCES if k != "fd2"))
    lines = []
    for words, arm, reference, scores in CLAIMS:
        d = {k: differences(rows, arm, k, reference) for k in keys if has_own(arm, k)}
        if scores == DISTANCES and len(d["fd"]) >= 3:
            spans = [short_span(d[k], k) if k in d else "" for k in keys]
            lines.append([words, f"`{arm}` - `{reference}`", len(d["fd"]), *spans])
    return table(["claim tested", "difference", "seeds", *(TITLES[k] for k in keys)], lines)


def long_part(long):
    """The arms whose SiT is trained longer, and when each first reaches the control's last distance."""
    lines, keys = [], {"fd": 0, "fd_to_reconstructions": 0, "precision": 3, "recall": 3, "class_agreement": 3}
    for arm, of in long.items():
        reached = [steps_to(a["curve"], b["curve"][-1][1]) for a, b in pairs(long, arm, "control-long")]
        lines.append([f"`{arm}`", len(values_of(of, "psnr")), max(r["curve"][-1][0] for r in of.values()),
                      *(mean_of(of, k, digits) for k, digits in keys.items()),
                      ", ".join("never" if v is None else f"{v:.0f}" for v in reached)])
    head = ["arm", "seeds", "steps of the SiT", "gFD", "gFD to rec.", "precision", "recall",
            "class agreement", "steps to the control's last distance (curve)"]
    return f"""On the VAEs of the arms above, with a decaying learning rate; not part of any table above.

{table(head, lines)}"""


def ladder_part(rows, known):
    """What each arm's vision model knows, and what the arm gains."""
    keys = ("probe_f1", "curve_mean", "fd3", "psnr")
    lines = [[f"`{arm}`", f"{f1:.3f}", *(change(rows, arm, k, DIGITS[k]) for k in keys)]
             for arm, f1 in known.items()]
    head = ["arm", "F1 of the vision model's tokens", *(f"{TITLES[k]}, minus control's" for k in keys)]
    return f"""## What the vision model knows

F1 of a probe on its tokens, averaged over positions to about as many numbers as the latent has.

{table(head, lines)}
![Gain against what the vision model knows](ladder.png)

"""


def equal_psnr_part(rows):
    """Each arm beside the recipe of `send` at the arm's own PSNR; not those with another SiT, length or
    latent, which have a control of their own."""
    lines = []
    for arm in (a for a in rows if a not in WEIGHTS and not a.startswith("control-")):
        if reference_of(rows, arm) != "control" or other_sit(arm):
            continue
        found = {key: at_equal_psnr(rows, arm, key) for key, *_ in COMPARED}
        d, through = found["fd"]
        if d:
            spans = [span_text(found[key][0], digits, key) for key, _, digits in COMPARED]
            lines.append([f"`{arm}`", through, len(d), *spans])
    return "" if not lines else f"""## At equal loss of PSNR

An arm minus the recipe of `send` at the arm's own PSNR: within each run, on a monotone cubic through the arms
that differ in lambda alone. Runs with fewer than three of those, and arms beyond their ends, are left out.
The intervals are those of the seeds; how the curve runs between so few points is a guess.

{table(["arm", "through", "seeds", *(title for _, title, _ in COMPARED)], lines)}
"""


def curve_table(rows):
    """Distances, and in brackets their differences from the control's."""
    lines, steps = [], sorted({s for of in rows.values() for r in of.values() for s, _ in r["curve"]})
    for arm, of in rows.items():
        line, curves = [f"`{arm}`"], [(r, dict(r["curve"])) for r in of.values()]
        both = [] if arm.startswith("control") else pairs(rows, arm, reference_of(rows, arm))
        both = [(a, dict(a["curve"]), dict(b["curve"])) for a, b in both]
        for s in steps:
            at = by_seed([(r, c[s]) for r, c in curves if s in c])
            lead = by_seed([(r, a[s] - b[s]) for r, a, b in both if s in a and s in b])
            line.append((mean_sd(at, 0) if at else "") + (f" ({mean_sd(lead, 0, '+')})" if lead else ""))
        lines.append(line)
    return table(["arm", *(f"step {s}" for s in steps)], lines)


def correlation_table(means, result):
    """Scores of the arms and what correlate() says of them."""
    lines = []
    for name, r in result.items():
        cells = []
        for k in ("pearson", "spearman", "partial"):
            span, value = r.get(f"{k}_interval"), r.get(k)
            cells.append(f"{value:+.2f}" if value is not None else "undefined" if k in r else "")
            cells[-1] += f" [{span[0]:+.2f}, {span[1]:+.2f}]" if span else ""
        lines.append([name, *(f"{m[name]:.3f}" for m in means), *cells, verdict(r)])
    return table(["score", *(f"`{m['arm']}`" for m in means), "Pearson", "Spearman", "partial, given PSNR",
                  "reading"], lines)


def write_report(root, rows, long, missing, means, correlations, known):
    control, made = next(iter(rows["control"].values())), common.made()
    runs = {r["run"]: r for of in rows.values() for r in of.values()}
    commits = sorted({c for of in (rows | long).values() for r in of.values() for c in r["commits"]})
    left_out = f" Not finished: {', '.join(missing)}." if missing else ""
    simple = ", ".join(f"{k} {v:.3f}" for k, v in control["baselines"].items())
    text = f"""# The study

{len(rows) + len(long)} arms, {len({r['seed'] for r in runs.values()})} seeds \
({', '.join(f"{run} in {r['precisions']}" for run, r in runs.items())}).{left_out}
The distance to the training images is {control['measure']} (lower is better).
As many real images score {control['real_images']}.
EfficientNet-Lite0, the first judge, taught the aligned arms but `random*`, `oracle`, `vfm2`, `vfm-vit` and
`vfm-vgg16`, and the SiT of `*-repa`. Values are mean ± standard deviation over seeds. A difference is taken
within a seed and a precision, and a seed that ran in two counts once; in brackets its 95 % interval by
Student's t ("undecided" where that holds 0; none of fewer than three seeds). All differences from a control
rest on the same few control runs: of those without any effect about one in 20 falls outside.

## In short

*Curve*: mean gFD while the SiT trains, of fewer samples. ±: half of the 95 % interval over seeds. A claim is
supported by a distance where its bold number is below 0, contradicted where one is above; the others are not
told apart by this many seeds. A claim of fewer than three seeds stands in the next table alone.

{short_table(rows)}
## Claims

"Supported": the 95 % interval of the differences lies on the claimed side of 0. Everything else is "not
supported", with the effect that the interval does not exclude; of fewer than three seeds "undecided". Beside
it: the effect that as many seeds with this scatter show four times out of five.

{claim_table(rows)}
## Arms against the control

{main_table(rows)}
Probe F1 of the baselines: {simple}. An arm `X-suffix` is compared with `control-suffix` where there is one,
which itself is compared with `control`. PSNR and probe F1 are of the test split. Speed-up: steps of the
control over steps of the arm to the worse of the last distances of their two curves, linear between the
points; above 1 the arm is faster; geometric mean and range over seeds; "a bound" where a curve was there at
its first point.

![Distance while the SiT trains, and the arms' final distance minus the control's](convergence.png)

{equal_psnr_part(rows)}{ladder_part(rows, known) if known else ''}## SiTs trained longer

{long_part(long) if long else 'Not run.'}

## Distance while the SiT trains

`{control['curve_measure']}`: of fewer samples and other noise than above, so its last value is another. In
brackets: minus the control's, within each seed, mean ± standard deviation.

{curve_table(rows | long)}
## Which score of a VAE follows the distance?

The arms with the same SiT, each as the control's mean plus the arm's mean difference, and correlations with
gFD over them; intervals are over resampled arms.
{len(correlations)} scores were tried: of those without any relation about one in 20 leaves 0 outside its
interval. The arms are variations of one recipe on the same pre-trained VAE, not a sample of all VAEs:
intervals are too narrow for that. `recon_fd`, `rfd`, `lpips` and `ssim` look at the same decoder as gFD.

{correlation_table(means, correlations) if correlations else 'Needs three such arms.'}
## Where the numbers come from

`rows.json` holds every number, its file and its commands. Commits of the arms: {', '.join(commits)}; torch
{made['versions']['torch']}. This report: `{made['command']}` at {made['commit']}, on {made['cpu']}.
An arm again: delete its folder, and those of its `-repa` and `-long`, and run the study's command again.
"""
    common.write_text(root / "report.md", text)


# -----------------------------------------------------------------------------------------------------------
# Figures


def sheet_images(path, size, top, bottom):
    """The pictures (N, size, size, 3) in a share of the height of a grid that common.save_grid wrote."""
    with Image.open(path) as sheet:
        box = 0, int(top * sheet.height), sheet.width, int(bottom * sheet.height)
        pixels = np.asarray(sheet.convert("RGB").crop(box))
    rows, columns = pixels.shape[0] // size, pixels.shape[1] // size
    return pixels.reshape(rows, size, columns, size, 3).swapaxes(1, 2).reshape(-1, size, size, 3)


def show(axis, images, columns, title=None, name=None):
    """Images (N, S, S, 3) in rows, white where they lack, with a title above or a name at the left."""
    rows, size = -(-len(images) // columns), images.shape[1]
    sheet = np.full((rows * columns, size, size, 3), 255, np.uint8)
    sheet[:len(images)] = images
    sheet = sheet.reshape(rows, columns, size, size, 3).swapaxes(1, 2)
    axis.imshow(sheet.reshape(rows * size, columns * size, 3), interpolation="nearest")
    axis.set(xticks=[], yticks=[], title=title)
    axis.set_ylabel(name, rotation=0, ha="right", va="center")


def draw_convergence(rows, long, path):
    """Left: distance against steps, mean and band of one standard deviation over seeds; dotted: trained
    longer. Right: final distance minus the control's, a dot a seed."""
    figure, colour = new_figure(13, 5.2), kind_colours(rows)
    left, right = figure.subplots(1, 2)
    for arm, of in (rows | long).items():
        steps = [s for s, _ in next(iter(of.values()))["curve"]]
        alike = [r for r in of.values() if [s for s, _ in r["curve"]] == steps]
        values = np.array(by_seed([(r, [v for _, v in r["curve"]]) for r in alike]))
        mean, main = values.mean(0), arm in ("control", "send")
        own = colour.get(arm.removesuffix("-long"), "grey")
        dash = ":" if arm in long else "--" if other_sit(arm) else "-"
        style = dict(linewidth=3 if main else 1, linestyle=dash, zorder=3 if main else 2)
        left.plot(steps, mean, color=own, **style)
        if len(values) > 1:
            sd = values.std(0, ddof=1)
            left.fill_between(steps, mean - sd, mean + sd, color=own, alpha=0.15 if main else 0.05, lw=0)
    left.set(xlabel="steps of the SiT", ylabel="Fréchet distance (lower is better)",
             title="The same SiT on each arm's latents (control black, dashed: with REPA)",
             xscale="log" if long else "linear")
    arms = [a for a in rows if a != "control"][::-1]
    for i, arm in enumerate(arms):
        d = differences(rows, arm, "fd", reference_of(rows, arm))
        right.barh(i, np.mean(d or [0]), color=colour[arm])
        right.plot(d, [i] * len(d), "o", color="black", markersize=4)
    right.axvline(0, color="black", linewidth=1)
    right.set(yticks=range(len(arms)), yticklabels=arms, title="After equal training",
              xlabel="final distance minus the control's (left is better); a dot a seed")
    save_figure(figure, path)


def draw_ladder(rows, known, path):
    """What an arm gains against what its vision model knows: a dot a seed, a larger one their mean."""
    figure, colour = new_figure(7, 4.5), kind_colours(rows)
    axis = figure.subplots()
    for arm, f1 in known.items():
        d = differences(rows, arm, "curve_mean") or [np.nan]
        axis.plot([f1] * len(d), d, ".", color=colour[arm], alpha=0.6)
        axis.plot([f1], [np.mean(d)], "o", color=colour[arm], markersize=9)
        axis.annotate(f" {arm}", (f1, np.mean(d)), fontsize=8)
    axis.axhline(0, color="black", linewidth=1)
    axis.margins(x=0.2)  # for the names
    axis.set(xlabel="F1 of the attributes in the vision model's tokens", title="Gain against knowledge",
             ylabel="gFD, mean of the curve, minus the control's")
    save_figure(figure, path)


def draw_demo(run, arms, study):
    """Each arm's samples from the same noise and labels, and gFD while the SiT trained; below them originals
    and their reconstructions: RUN/report.png. study: rows whose longer curves are drawn behind."""
    samples = {a: common.read_npz(run / a / "samples.npz", "arr_0")["arr_0"][:40] for a in arms}
    curves = {a: read_curve(run / a / "sit/metrics.jsonl") for a in arms}
    figure = new_figure(4.6 * (len(arms) + 1), 5.8)
    above, below = figure.subfigures(2, 1, height_ratios=(2.9, 1 + 0.1 * len(arms)))
    *panels, last = above.subplots(1, len(arms) + 1)
    for axis, arm in zip(panels, arms):
        show(axis, samples[arm], 8, title=f"{arm}: samples")
    colours = kind_colours(arms)
    for arm, (measure, curve) in curves.items():
        colour = colours[arm]
        last.plot(*zip(*curve), "o-", color=colour, label=arm)
        for r in study:
            if r["arm"] == f"{arm}-long" and r["curve_measure"] == measure:
                last.plot(*zip(*r["curve"]), color=colour, alpha=0.35, lw=3, label=f"{r['arm']} (study)")
                last.set(xscale="log")
    last.set(xlabel="steps of the SiT", ylabel="gFD (lower is better)",
             title="The same SiT on each arm's latents")
    last.legend()
    size = samples[arms[0]].shape[1]
    strips = {"originals": sheet_images(run / arms[0] / "recon.png", size, 0, 0.5)}
    strips |= {f"{a}: reconstructions": sheet_images(run / a / "recon.png", size, 0.5, 1) for a in arms}
    for axis, (name, images) in zip(below.subplots(len(strips), 1), strips.items()):
        show(axis, images[:16], 16, name=name)
    save_figure(figure, run / "report.png")


# -----------------------------------------------------------------------------------------------------------


def report_study(root):
    rows, long, missing = read_study(root)
    if missing:
        print(f"not finished, left out: {', '.join(missing)}")
    means, known = arm_means(rows), read_ladder(root, rows)
    correlations = correlate(means) if len(means) > 2 else {}
    every = [r for of in (rows | long).values() for r in of.values()]
    common.write_text(root / "rows.json", json.dumps(every, indent=1) + "\n")
    common.write_json(root / "correlations.json", correlations)
    write_report(root, rows, long, missing, means, correlations, known)
    print(claim_table(rows) + "\n" + main_table(rows) + f"{root}/report.md, {root}/rows.json")
    draw_convergence(rows, long, root / "convergence.png")  # last: all else is there without matplotlib
    if known:
        draw_ladder(rows, known, root / "ladder.png")


def report_demo(run, names, study):
    """What the stages wrote for each arm, in RUN/report.json and a table, and a picture."""
    arms = {}
    for name in names:
        folder = run / name
        arms[name], simple, fd = read_scores(folder, folder)
        files = dict(encode="latents/meta.json", sample="samples.json", fd="fd.json", recon="recon.json")
        seconds = {stage: common.read_json(folder / file)["seconds"] for stage, file in files.items()}
        seconds["train_vae"] = last_seconds(folder / "metrics.jsonl")
        seconds["train_sit"] = last_seconds(folder / "sit/metrics.jsonl")
        arms[name]["seconds"] = seconds
    real = max(fd["fd_real"].values(), default=None)
    baselines = dict(fd_floor=fd["floor"], fd_floor_n=fd["floor_n"], fd_real=real)
    baselines |= {f"probe_f1_{k}": f1 for k, f1 in simple.items()}
    record = dict(arms=arms, baselines=baselines, network=fd["network"], torch=torch.__version__,
                  cpu=common.cpu_name(), threads=torch.get_num_threads())
    common.write_json(run / "report.json", record)
    print(" " * 30 + "".join(f"{name:>12}" for name in arms))
    for key, digits in PRINTED.items():
        if all(a.get(key) is not None for a in arms.values()):
            print(f"{key:30}" + "".join(f"{a[key]:12.{digits}f}" for a in arms.values()))
    count = count_name(arms[names[0]]["fd_n"])
    print(f"fd is FD({fd['network']})-{count} to the training images, lower is better")
    for key, value in baselines.items():
        print(f"{key:30}" + ("" if value is None else f"{value:12.4g}"))
    if not simple:
        print(f"no probe: no {run}/{names[0]}/probe.json (images without attributes.csv have none, "
              "nor splits: reconstructions are then of the images trained on)")
    for name, a in arms.items():
        warn_of_blur(a, f"{name}: ")
        print(f"{name}, seconds: " + ", ".join(f"{k} {v:.0f}" for k, v in a["seconds"].items()))
    print(f"{run}/report.json, {run}/report.png")
    draw_demo(run, names, common.read_json(study, list) if study and Path(study).exists() else [])


def main():
    p = common.Parser(description=__doc__)
    if sys.argv[1:2] != ["demo"]:
        p.add_argument("study", type=Path, help="folder of bash run.sh study; or: demo RUN")
        return report_study(p.parse_args().study)
    p.add_argument("demo", help="the word demo")
    p.add_argument("run", type=Path, help="folder with a subfolder an arm")
    p.add_argument("--arms", nargs="+", default=["control", "send"])
    p.add_argument("--study", help="rows.json of a study, whose longer curves are drawn behind this run's")
    args = p.parse_args()
    report_demo(args.run, args.arms, args.study)


if __name__ == "__main__":
    common.run_script(main)
