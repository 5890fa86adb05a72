"""Stage 7: what a study found: the arms of `bash run.sh study` -> report.md, rows.json and four figures.

    python study.py out/study          # reads out/study/seed*/ARM; what is not there yet is left out, and said

Every arm is compared within each seed, where all share the pre-trained VAE, images, order, noise and steps: with the control, an arm with REPA with the
control with REPA. An interval is the 95 % interval of Student's t over the seeds of those differences; "undecided" means that it holds 0 (or 1, for a ratio).
"""
import argparse
import json
import sys
from pathlib import Path

import numpy as np
import scipy.stats
from PIL import Image

import common
import data
import fid
from common import UserError
from probe import SAMPLE_SCORES, correlate, kind_colours, new_figure, numbers, save_figure, scatter, scatter_figure, verdict

# What each arm of run.sh changes, in the order of the tables
ARMS = {"control": "fine-tuned, no alignment", "send": "Send-VAE: depth 1, noise, lambda 2",
        "random": "Send-VAE, VFM with random weights (negative control)", "oracle": "Send-VAE, VFM trained on the attributes (positive control)",
        "depth0-clean": "MLP only, no noise", "depth1-clean": "depth 1, no noise", "depth2": "depth 2, noise",
        "random-matched": "random VFM, lambda for the PSNR of `send`", "vavae": "VA-VAE's alignment", "vfm2": "Send-VAE, EfficientNet-Lite2 as VFM",
        "lambda0.5": "Send-VAE, lambda 0.5", "lambda8": "Send-VAE, lambda 8", "standardised": "Send-VAE, tokens standardised (not in the paper)",
        "control-repa": "control's VAE, REPA in the SiT", "send-repa": "Send-VAE's VAE, REPA in the SiT"}
# Claims put to the test: words, arm, what it is compared with, score, and whether the claim is of a lower or a higher value
CLAIMS = (
    ("A SiT learns faster on aligned latents (gFD after equal training)", "send", "control", "fd", "lower"),
    ("... in the generator's own part (FD to the VAE's reconstructions)", "send", "control", "fd_to_reconstructions", "lower"),
    ("... for a judge that did not teach it (EfficientNet-Lite2)", "send", "control", "fd2", "lower"),
    ("... for another that did not (VGG16)", "send", "control", "fd3", "lower"),
    ("The testbed can show it: a VFM that knows the attributes helps", "oracle", "control", "fd", "lower"),
    ("Smoothing alone helps: a VFM with random weights", "random", "control", "fd", "lower"),
    ("Meaning helps beyond smoothing, at equal lambda", "send", "random", "fd", "lower"),
    ("... for a judge that taught neither (VGG16)", "send", "random", "fd3", "lower"),
    ("Meaning helps beyond smoothing, at equal loss of PSNR", "send", "random-matched", "fd", "lower"),
    ("... for a judge that taught neither (VGG16)", "send", "random-matched", "fd3", "lower"),
    ("Attributes are easier to read from aligned latents (probe F1)", "send", "control", "probe_f1", "higher"),
    ("With REPA in the SiT too", "send-repa", "control-repa", "fd", "lower"),
    ("A non-linear mapper beats the MLP (Table 2)", "depth1-clean", "depth0-clean", "fd", "lower"),
    ("Noise helps (Table 3)", "send", "depth1-clean", "fd", "lower"),
    ("It beats VA-VAE's alignment", "send", "vavae", "fd", "lower"),
    ("A larger VFM helps (Table 4; judged by VGG16, which taught neither)", "vfm2", "send", "fd3", "lower"),
    ("It costs reconstruction (PSNR)", "send", "control", "psnr", "lower"),
)
# Tables of the paper and the arms that stand for their rows; the number is the paper's gFID (SiT-B/1 + REPA, ImageNet 256)
TABLES = {"Table 2, depth of the mapper (without noise)": {"depth0-clean": 9.20, "depth1-clean": 8.42},
          "Table 3, noise (depth 1)": {"depth1-clean": 8.42, "send": 7.57},
          "Table 4, vision foundation model (the paper's \"none\", 11.40, is not fine-tuned; the control is)": {"control": None, "vfm2": None, "send": 7.57}}
LOWER = ("fd", "fd2", "fd3", "rfd", "fd_to_reconstructions", "fd2_to_reconstructions", "recon_fd", "lpips", *(f"probe_{k}" for k in ("kde_gini", "gmm_nll", "high_frequency_share", "shift_error", "scale_error")))  # the others: higher is better


# ---------------------------------------------------------------------------------------------------------------------
# Reading

def read_arm(folder):
    """One row: {name, run, arm, seed, measure, curve, commands, commits, sources, baselines, and the scores of fid.read_arm}; None when the
    arm is not finished. fd2 and fd3 are the distances by EfficientNet-Lite2 and VGG16. Raises UserError."""
    name, seed = folder.name, folder.parent.name.removeprefix("seed")
    again = f"delete that arm and run it again: OUT={folder.parent.parent} bash run.sh study {seed} {name}"
    owner = folder.parent / name.removesuffix("-repa")  # an arm with REPA in the SiT has another arm's VAE
    files = {k: folder / f"{k}.json" for k in ("fd", "fd2", "fd3", "samples")} | {k: owner / f"{k}.json" for k in ("recon", "probe")}
    log, tuned = folder / "sit/metrics.jsonl", owner / "metrics.jsonl"
    if not log.is_file() or not tuned.is_file() or not all(p.is_file() for p in files.values()):
        return None
    records = {k: common.read_json(p) for k, p in files.items()}
    curve_measure, curve = fid.read_curve(log)
    try:
        scores, baselines, score = fid.read_arm(folder, owner)
        floor = f"as many {max(score['fd_real'].values(), default=float('nan')):.0f}, one half of the training images against the other ({score['floor_n']} each) {score['floor']:.0f}"
        for k in ("fd2", "fd3"):
            (scores[k],) = records[k]["fd"].values()
        (second,) = records["fd2"]["scores"].values()
        scores["fd2_to_reconstructions"] = second["fd_to_reconstructions"]
        drawn, begun = records["samples"], {k: json.loads(p.read_text("utf-8").splitlines()[0]) for k, p in (("train_vae", tuned), ("train_sit", log))}
        measure = (f"FD({records['fd']['network']})-{scores['fd_n']} (other judges {records['fd2']['network']}, {records['fd3']['network']}), {drawn['sampler']} {drawn['steps']} steps, "
                   f"VAE {begun['train_vae']['inputs']['init']} trained for {begun['train_vae']['steps']} steps of {begun['train_vae']['batch']}, "
                   f"SiT for {begun['train_sit']['steps']} of {begun['train_sit']['batch']}; curves {curve_measure}")
        hashes = {*(records[k]["inputs"]["vae"] for k in ("fd", "fd2")), records["recon"]["inputs"]["vae"], drawn["vae_hash"], begun["train_sit"]["inputs"]["latents"].split("-")[0], *(v for k, v in records["probe"]["inputs"].items() if k != "data")}
        row = dict(name=f"{folder.parent.name}/{name}", run=folder.parent.name, arm=name, seed=int(seed), measure=measure, curve_measure=curve_measure, **scores, curve=curve)
        made = {k: r["made"] for k, r in (begun | records).items()}
        row |= dict(baselines=baselines, real_images=floor, commands={k: m["command"].replace(sys.prefix, "ENV") for k, m in made.items()},
                    commits=sorted({str(m["commit"]) for m in made.values()}), sources={k: str(p) for k, p in files.items()} | dict(curve=str(log)))
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as e:
        if isinstance(e, UserError):
            raise
        raise UserError(f"{folder}: not what the stages write ({type(e).__name__}: {e}); {again}")
    if len(hashes) > 1:
        raise UserError(f"{folder}: its latents, samples, reconstructions and probe are of different VAEs ({', '.join(sorted(hashes))}); {again}")
    return row


def read_study(root):
    """{arm: {seed: row}} in the order of ARMS, and the names of arms that are not finished. Raises UserError."""
    folders = sorted((p for p in root.glob("seed*/*") if p.is_dir()), key=lambda p: (len(p.parent.name), p))  # seed10 after seed9
    if not folders:
        raise UserError(f"{root}: no seed*/ARM in it; expected the folder of: bash run.sh study")
    rows, missing = {}, []
    for folder in folders:
        row = read_arm(folder)
        if row is None:
            missing.append(f"{folder.parent.name}/{folder.name}")
        else:
            rows.setdefault(folder.name, {})[row["run"]] = row
    if not rows.get("control"):
        raise UserError(f"{root}: no finished control; every arm is compared with it: OUT={root} bash run.sh study")
    measures = {r["measure"] for of in rows.values() for r in of.values()}
    if len(measures) > 1:
        raise UserError(f"{root}: distances of different kinds do not mix: {', '.join(sorted(measures))}")
    order = {a: i for i, a in enumerate(ARMS)}
    return {a: rows[a] for a in sorted(rows, key=lambda a: order.get(a, len(order)))}, missing


# ---------------------------------------------------------------------------------------------------------------------
# Statistics

def interval(values):
    """95 % interval of the mean by Student's t: (low, high); nan for fewer than two values."""
    v = np.asarray(values, float)
    if len(v) < 2:
        return np.nan, np.nan
    half = scipy.stats.t.ppf(0.975, len(v) - 1) * v.std(ddof=1) / len(v) ** 0.5
    return v.mean() - half, v.mean() + half


def shared_seeds(rows, arm, reference):
    return [s for s in rows[arm] if s in rows[reference]]


def reference_of(rows, arm):
    """What an arm is compared with: the control, with REPA where the arm has it."""
    return "control-repa" if arm.endswith("-repa") and arm != "control-repa" and "control-repa" in rows else "control"


def differences(rows, arm, key, reference="control"):
    """Arm minus reference, one a seed that both have."""
    return [rows[arm][s][key] - rows[reference][s][key] for s in shared_seeds(rows, arm, reference)]


def compared(d, key):
    """Differences in a score, in words: better, worse, or undecided."""
    low, high = interval(d)
    if np.isnan(low) or low <= 0 <= high:
        return "undecided"
    return "better" if (high < 0) == (key in LOWER) else "worse"


def steps_to(curve, target):
    """Training steps after which the curve [(step, distance)] first is at or below `target`, linear between its points; None: never.
    A curve that begins below gives its first step, an upper limit."""
    before = None
    for step, value in curve:
        if value <= target:
            return float(step) if before is None else before[0] + (step - before[0]) * (before[1] - target) / (before[1] - value)
        before = step, value
    return None


def speed_ups(rows, arm, reference):
    """Steps of the reference over steps of the arm to the worse of their two last distances, which both curves reach, one a seed: above 1 the arm is faster,
    below 1 slower. (Counting only arms that reach the reference would call chance a gain.)"""
    out = []
    for seed in shared_seeds(rows, arm, reference):
        ours, theirs = rows[arm][seed]["curve"], rows[reference][seed]["curve"]
        target = max(ours[-1][1], theirs[-1][1])
        out.append(steps_to(theirs, target) / steps_to(ours, target))
    return out


def bounded(rows, arm, reference):
    """Whether a speed-up is a bound alone, because one of two curves was at the target when it was first measured."""
    pairs = [(rows[arm][s]["curve"], rows[reference][s]["curve"]) for s in shared_seeds(rows, arm, reference)]
    return any(min(a[0][1], b[0][1]) <= max(a[-1][1], b[-1][1]) for a, b in pairs)


def arm_means(rows):
    """One row an arm, the mean over its seeds, for probe.correlate, which then resamples arms. Without arms with REPA, which is another SiT."""
    out = []
    for arm, of in rows.items():
        if not arm.endswith("-repa"):
            shared = set.intersection(*(set(numbers(r)) for r in of.values())) | {"psnr"}
            out.append(dict({k: float(np.mean([r[k] for r in of.values()])) for k in sorted(shared)}, name=arm, run=arm, arm=arm))
    return out


# ---------------------------------------------------------------------------------------------------------------------
# The report

def table(head, lines):
    return "\n".join(["| " + " | ".join(head) + " |", "|" + "---|" * len(head)] + ["| " + " | ".join(map(str, line)) + " |" for line in lines]) + "\n"


def mean_sd(values, digits):
    v = np.asarray(values, float)
    return f"{v.mean():.{digits}f}" + (f" ± {v.std(ddof=1):.{digits}f}" if len(v) > 1 else "")


def change(rows, arm, key, digits, reference):
    """Mean difference, its interval and what it says."""
    d = differences(rows, arm, key, reference)
    if arm == reference:
        return ""
    low, high = interval(d)
    return f"{np.mean(d):+.{digits}f} " + (f"[{low:+.{digits}f}, {high:+.{digits}f}] {compared(d, key)}" if len(d) > 1 else "(one seed)") if d else "no shared seed"


def speed_text(rows, arm):
    """Geometric mean of the speed-ups, its interval (of the logarithms) and what it says."""
    reference = reference_of(rows, arm)
    logs = np.log(speed_ups(rows, arm, reference))
    if arm == reference or not len(logs):
        return ""
    low, high = np.exp(interval(logs))
    reading = "faster" if low > 1 else "slower" if high < 1 else "undecided"
    return f"{np.exp(logs.mean()):.2f} " + ("(a bound) " if bounded(rows, arm, reference) else "") + (f"[{low:.2f}, {high:.2f}] {reading}" if len(logs) > 1 else "(one seed)")


def main_table(rows):
    lines = []
    for arm, of in rows.items():
        get, to = lambda k: [r[k] for r in of.values()], reference_of(rows, arm)
        own = lambda k, digits: "" if arm.endswith("-repa") else change(rows, arm, k, digits, to)  # of the VAE: an arm with REPA has another's
        lines.append([f"`{arm}`", ARMS.get(arm, ""), len(of), mean_sd(get("psnr"), 2), mean_sd(get("rfd"), 0), mean_sd(get("probe_f1"), 3), own("probe_f1", 3),
                      mean_sd(get("fd"), 0), change(rows, arm, "fd", 0, to), mean_sd(get("fd_to_reconstructions"), 0), change(rows, arm, "fd_to_reconstructions", 0, to),
                      change(rows, arm, "fd2", 1, to), change(rows, arm, "fd3", 1, to), mean_sd(get("precision"), 2), mean_sd(get("recall"), 2), mean_sd(get("class_agreement"), 3), speed_text(rows, arm)])
    return table(["arm", "", "seeds", "PSNR", "rFD", "probe F1", "minus control's", "gFD", "minus control's", "gFD to reconstructions", "minus control's",
                  "gFD by Lite2, minus control's", "by VGG16, minus control's", "precision", "recall", "class agreement", "speed-up"], lines)


def claim_verdict(d, direction):
    """Differences, one a seed, and the direction that is claimed -> (reading, the effect that as many seeds with
    this scatter would show four times out of five: (t(.975) + t(.8)) standard errors)."""
    low, high = interval(d)
    if np.isnan(low):
        return "not supported: fewer than two seeds", np.nan
    n, error = len(d), np.std(d, ddof=1) / len(d) ** 0.5
    visible = float((scipy.stats.t.ppf(0.975, n - 1) + scipy.stats.t.ppf(0.8, n - 1)) * error)
    if direction == "higher":
        low, high = -high, -low  # below 0 supports the claim
    if high < 0:
        return "**supported**", visible
    return "not supported: " + ("the opposite is seen" if low > 0 else f"an effect of {-low:.3g} or less may be there"), visible


def claim_table(rows):
    lines = []
    for words, arm, reference, key, direction in CLAIMS:
        d = differences(rows, arm, key, reference) if arm in rows and reference in rows else []
        if not d:
            lines.append([words, f"`{arm}` - `{reference}`", key, "not run", "", "", ""])
            continue
        reading, visible = claim_verdict(d, direction)
        digits = 3 if key == "probe_f1" else 2 if key == "psnr" else 0 if key in ("fd", "fd_to_reconstructions") else 1
        low, high = interval(d)
        span = "" if np.isnan(low) else f" [{low:+.{digits}f}, {high:+.{digits}f}]"
        lines.append([words, f"`{arm}` - `{reference}`", key, f"{np.mean(d):+.{digits}f}{span}", len(d), "" if np.isnan(visible) else f"{visible:.{max(digits, 1)}f}", reading])
    return table(["claim", "difference", "score", "mean and 95 % interval", "seeds", "effect that would be seen (power 80 %)", "reading"], lines)


def below_control(rows, key):
    """Of the runs of aligned arms without REPA, how many have a lower score than their control, in words."""
    d = [v for a in rows if a not in ("control", "random", "random-matched") and not a.endswith("-repa") for v in differences(rows, a, key)]
    return f"{sum(v < 0 for v in d)} of {len(d)}"


def send_table(rows):
    """Each aligned arm against Send-VAE's own."""
    arms = [a for a in rows if a not in ("send", "control") and not a.endswith("-repa")]
    return table(["arm", "", "PSNR minus `send`'s", "F1 minus `send`'s", "FD minus `send`'s", "the same by the second judge"], [[f"`{a}`", ARMS.get(a, ""), change(rows, a, "psnr", 2, "send"), change(rows, a, "probe_f1", 3, "send"), change(rows, a, "fd", 0, "send"), change(rows, a, "fd2", 1, "send")] for a in arms])


def paper_tables(rows):
    out = []
    for title, arms in TABLES.items():
        known = [a for a in arms if a in rows]
        if known:
            lines = [[f"`{a}`", ARMS[a], "" if arms[a] is None else f"{arms[a]:.2f}", mean_sd([r["fd"] for r in rows[a].values()], 0), change(rows, a, "fd", 0, known[0]), mean_sd([r["probe_f1"] for r in rows[a].values()], 3)] for a in known]
            out.append(f"### {title}\n\n" + table(["arm", "", "gFID, the paper's", "FD here", f"FD minus `{known[0]}`'s", "probe F1 here"], lines))
    return "\n".join(out)


def score_table(rows):
    arms = [a for a in rows if not a.endswith("-repa")]
    keys = sorted(set.intersection(*(set(numbers(r)) for a in arms for r in rows[a].values())) - set(SAMPLE_SCORES))
    return table(["score", "held to be better", *(f"`{a}`" for a in arms)], [[k, "lower" if k in LOWER else "higher", *(mean_sd([r[k] for r in rows[a].values()], 3) for a in arms)] for k in keys])


def curve_table(rows):
    steps = sorted({s for of in rows.values() for r in of.values() for s, _ in r["curve"]})
    at = lambda of, step: [v for r in of.values() for s, v in r["curve"] if s == step]
    return table(["arm", *(f"step {s}" for s in steps)], [[f"`{a}`", *(mean_sd(at(of, s), 0) if at(of, s) else "" for s in steps)] for a, of in rows.items()])


def correlation_table(rows, result):
    """result: of probe.correlate on the arms' means. The last column: Pearson's r over the arms of one seed, lowest and highest."""
    seeds = list(dict.fromkeys(s for of in rows.values() for s in of))
    span = lambda r, k: "" if k not in r else "undefined" if r[k] is None else f"{r[k]:+.2f}" + (f" [{r[k + '_interval'][0]:+.2f}, {r[k + '_interval'][1]:+.2f}]" if r[k + "_interval"] else "")
    lines = []
    for name, r in result.items():
        each = []
        for s in seeds:
            x, y = np.array([(of[s][name], of[s]["fd"]) for a, of in rows.items() if s in of and not a.endswith("-repa")]).reshape(-1, 2).T
            if len(x) > 2 and np.ptp(x) > 0 and np.ptp(y) > 0:
                each.append(np.corrcoef(x, y)[0, 1])
        lines.append([name, span(r, "pearson"), span(r, "spearman"), span(r, "partial"), r["n"], f"{min(each):+.2f} to {max(each):+.2f}" if each else "", verdict(r)])
    return table(["score", "Pearson", "Spearman", "partial, given PSNR", "n (arms)", "Pearson, in each seed", "reading"], lines)


def report(root, rows, missing, correlations):
    control = next(iter(rows["control"].values()))
    seeds = list(dict.fromkeys(s for of in rows.values() for s in of))
    commits = sorted({c for of in rows.values() for r in of.values() for c in r["commits"]})
    commands = table(["arm", "stage", "command"], [[f"`{a}`", k, f"`{v}`"] for a, of in rows.items() for k, v in next(iter(of.values()))["commands"].items()])
    made = common.made()
    text = f"""# The study

{len(rows)} arms, {len(seeds)} seeds ({', '.join(seeds)}). The distance to the training images is {control['measure']} (lower is better).
Real images score: {control['real_images']}. The first judge, EfficientNet-Lite0, taught the aligned arms but `random`, `random-matched`, `oracle` and `vfm2`; Lite2 taught `vfm2` alone; VGG16 taught no arm (its LPIPS helped to pre-train the VAE that all begin from). Values are mean ± standard deviation over seeds. A difference is taken within each seed; in brackets its
95 % interval by Student's t; "undecided" where that holds 0. All differences from a control rest on the same few control runs, and many are shown: of those without any effect about one in 20 falls outside.
{'Not finished and left out: ' + ', '.join(missing) + '.' if missing else ''}

## Claims

"Supported": the 95 % interval of the differences lies on the claimed side of 0. Everything else is "not supported", with the largest effect that the interval still holds. Beside it: the effect that as many seeds with this scatter show four times out of five.

{claim_table(rows)}
## Arms against the control

{main_table(rows)}
Probe F1 of the baselines: {', '.join(f'{k} {v:.3f}' for k, v in control['baselines'].items())}. An arm with REPA is compared with `control-repa`, which itself is compared with `control`.
PSNR, probe F1 and the distance of the reconstructions from their originals are of the test split; other scores and their meaning: README, section 6; `fd2` is the distance by the second judge.
Speed-up: steps of the control over steps of the arm to the worse of the last distances of their two curves, linear between the points; above 1 the arm is faster; geometric mean and interval over seeds; "a bound" where a curve was there at its first point.
Of the runs of aligned arms without REPA, those with a random VFM left out, {below_control(rows, 'fd')} end at a lower distance than their control, {below_control(rows, 'fd2')} by the second judge.

![Distance while the SiT trains, and the arms' final distance minus the control's](convergence.png)

## Variants against Send-VAE's own arm

{send_table(rows) if 'send' in rows else 'There is no `send`.'}
## The paper's tables at this scale

The paper's numbers are of ImageNet 256 and SiT-B/1 with REPA; these arms are without.

{paper_tables(rows)}
## Distance while the SiT trains

`{control['curve_measure']}`: of fewer samples and other noise than the table above, so its last value is another number.

{curve_table(rows)}
## Samples from the same noise and labels, first seed

![A row an arm](samples.png)

## Which score follows the distance?

{'' if correlations else 'Needs three arms without REPA.'}

Over the means of the arms without REPA; intervals are over resampled arms. {len(correlations)} scores were tried: of those without any relation about one in 20 leaves 0 outside its interval. The arms are variations of one recipe on the same pre-trained VAE, not a
sample of all VAEs: intervals are too narrow for that. `recon_fd`, `rfd`, `lpips` and `ssim` look at the same decoder as the distance. "In each seed" is the same arms again, seed by seed.

{correlation_table(rows, correlations) + chr(10) + '![Each score against the distance](predictors.png)' if correlations else ''}

## Reconstruction against generation

![PSNR and distance of reconstructions against the distance of samples](tradeoff.png)

## All scores

{score_table(rows)}
## Where the numbers come from

Commits of the arms: {', '.join(commits)}; torch {made['versions']['torch']}. This report: `{made['command']}` at {made['commit']}, on {common.cpu_name()}. `rows.json` holds every row, its files and its commands.
An arm again, with the variables that the study was run with: `rm -r {root}/seed0/ARM; OUT={root} bash run.sh study 0 ARM; python study.py {root}`; then the same for `ARM-repa` if there is one. Commands of the first seed (what all arms share stands in `run.sh`, and its output in `{root}/log`; ENV is the environment's folder):

{commands}"""
    common.write_text(root / "report.md", text)


# ---------------------------------------------------------------------------------------------------------------------
# Figures

def draw_convergence(rows, path):
    """Left: distance against steps, mean and band of one standard deviation over seeds. Right: final distance minus the control's, a dot a seed."""
    figure, colour = new_figure(13, 5.2), kind_colours(rows)
    left, right = figure.subplots(1, 2)
    for arm, of in rows.items():
        steps = [s for s, _ in next(iter(of.values()))["curve"]]
        values = np.array([[v for _, v in r["curve"]] for r in of.values() if [s for s, _ in r["curve"]] == steps])
        main = arm in ("control", "send")
        left.plot(steps, values.mean(0), color=colour[arm], linewidth=3 if main else 1, linestyle="--" if arm.endswith("-repa") else "-", label=arm, zorder=3 if main else 2)
        if len(values) > 1:
            left.fill_between(steps, values.mean(0) - values.std(0, ddof=1), values.mean(0) + values.std(0, ddof=1), color=colour[arm], alpha=0.15 if main else 0.05, linewidth=0)
    left.set(xlabel="steps of the SiT", ylabel="Fréchet distance (lower is better)", title="The same SiT on each arm's latents")
    left.legend(fontsize=8)
    arms = [a for a in rows if a != "control"][::-1]
    for i, arm in enumerate(arms):
        d = differences(rows, arm, "fd", reference_of(rows, arm))
        if not d:
            continue
        right.barh(i, np.mean(d), color=colour[arm], alpha=0.6)
        right.plot(d, [i] * len(d), "o", color="black", markersize=4)
    right.axvline(0, color="black", linewidth=1)
    right.set(yticks=range(len(arms)), yticklabels=arms, xlabel="final distance minus the control's (left is better); a dot a seed", title="After equal training")
    save_figure(figure, path)


def draw_tradeoff(rows, path):
    figure, colour = new_figure(11, 4.6), kind_colours(r["arm"] for r in rows)
    for axis, key, text in zip(figure.subplots(1, 2), ("psnr", "recon_fd"), ("PSNR of reconstructions (dB, higher is better)", "Fréchet distance of reconstructions (lower is better)")):
        scatter(axis, rows, key, colour)
        axis.set(xlabel=text)
    axis.legend(fontsize=8)
    save_figure(figure, path)


def draw_samples(root, rows, path, count=8):
    """A row an arm of the control's first seed: the first samples of samples.png, of the same noise and labels; nothing where no arm has one."""
    first = next(iter(rows["control"]))
    arms = {a: root / of[first]["name"] / "samples.png" for a, of in rows.items() if first in of and (root / of[first]["name"] / "samples.png").is_file()}
    if not arms:
        return
    figure = new_figure(count * 0.75 + 1.6, len(arms) * 0.8)
    for axis, (arm, file) in zip(np.ravel(figure.subplots(len(arms), 1)), arms.items()):
        with Image.open(file) as sheet:
            size = sheet.width // 8  # sample.py's columns
        axis.imshow(fid.tile(fid.sheet_images(file, size)[:count], count), interpolation="nearest")
        axis.set_ylabel(arm, rotation=0, ha="right", va="center")
        axis.set(xticks=[], yticks=[])
    save_figure(figure, path)


def main():
    p = common.Parser(description=__doc__)
    p.add_argument("study", help="folder of bash run.sh study")
    root = Path(p.parse_args().study)
    rows, missing = read_study(root)
    if missing:
        print(f"not finished, left out: {', '.join(missing)}")
    means = arm_means(rows)
    correlations = correlate(means) if len(means) > 2 else {}
    common.write_text(root / "rows.json", json.dumps([r for of in rows.values() for r in of.values()], indent=1) + "\n")
    common.write_json(root / "correlations.json", correlations)
    one_sit = [r for arm, of in rows.items() for r in of.values() if not arm.endswith("-repa")]
    draw_convergence(rows, root / "convergence.png")
    if correlations:
        save_figure(scatter_figure(one_sit, correlations), root / "predictors.png")
    draw_tradeoff(one_sit, root / "tradeoff.png")
    draw_samples(root, rows, root / "samples.png")
    report(root, rows, missing, correlations)
    print(claim_table(rows) + "\n" + main_table(rows) + f"{root}/report.md, {root}/rows.json")


if __name__ == "__main__":
    common.run_script(main)
