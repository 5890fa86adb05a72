"""Stage 7: what a study found: the arms of `bash run.sh study` -> report.md, rows.json and four figures.

    python study.py out/study          # reads out/study/seed*/ARM; what is not there yet is left out, and said

Every arm is compared with the control of its own seed: the same pre-trained VAE, images, order, noise and steps. An interval is the 95 % interval of
Student's t over the seeds of those differences; "undecided" means that it holds 0. Intervals are not corrected for the number of comparisons.
"""
import argparse
import io
import json
from pathlib import Path

import numpy as np
import scipy.stats
from PIL import Image

import data
from data import UserError
from probe import correlate, numbers, verdict

# What each arm of run.sh changes, in the order of the tables
ARMS = {"base": "not fine-tuned", "control": "fine-tuned, no alignment", "send": "Send-VAE: depth 1, noise, lambda 1", "depth0-clean": "MLP only, no noise", "depth1-clean": "depth 1, no noise",
        "depth2": "depth 2, noise", "vavae": "VA-VAE's alignment", "vfm2": "Send-VAE, EfficientNet-Lite2 as VFM", "lambda0.25": "Send-VAE, lambda 0.25", "lambda4": "Send-VAE, lambda 4",
        "standardised": "Send-VAE, tokens standardised (not in the paper)", "lognormal": "Send-VAE, a as SiT's t (not in the paper)",
        "control-repa": "control's VAE, REPA in the SiT", "send-repa": "Send-VAE's VAE, REPA in the SiT"}
# Tables of the paper and the arms that stand for their rows; the number is the paper's gFID (SiT-B/1 + REPA, ImageNet 256)
TABLES = {"Table 2, depth of the mapper (without noise)": {"depth0-clean": 9.20, "depth1-clean": 8.42},
          "Table 3, noise (depth 1)": {"depth1-clean": 8.42, "send": 7.57},
          "Table 4, vision foundation model (the paper's \"none\" is not fine-tuned; the control is ours)": {"base": 11.40, "control": None, "vfm2": None, "send": 7.57}}
LOWER = ("fd", "recon_fd", "lpips", "kde_gini", "gmm_nll", "high_frequency_share", "shift_error", "scale_error")  # the others: higher is better


# ---------------------------------------------------------------------------------------------------------------------
# Reading

def read_curve(log):
    """[(step, distance)] of a metrics.jsonl of train_sit.py --eval-every. Raises UserError."""
    try:
        records = [json.loads(line) for line in log.read_text("utf-8").splitlines()]
        found = {r["step"]: v for r in records for k, v in r.items() if k.startswith(("FD(", "FID"))}  # a resumed run wrote some steps twice
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f"{log}: not a log of train_sit.py ({type(e).__name__}: {e}); run that arm again")
    if not found:
        raise UserError(f"{log}: no distances in it; expected a run with --eval-every")
    return sorted(found.items())


def read_arm(folder):
    """One row: {name, run, kind, measure, psnr, fd, scores..., curve, sources}; None when the arm is not finished. Raises UserError."""
    name, log = folder.name, folder / "sit/metrics.jsonl"
    owner = folder.parent / name.removesuffix("-repa")  # an arm with REPA in the SiT has another arm's VAE
    files = dict(fd=folder / "fd.json", recon=owner / "recon.json", probe=owner / "probe.json")
    if not log.is_file() or not all(p.is_file() for p in files.values()):
        return None
    score, recon, probe = (data.read_json(p) for p in files.values())
    try:
        (fd,), (n,) = score["fd"].values(), score["n"].values()
        row = dict(name=f"{folder.parent.name}/{name}", run=folder.parent.name, kind=name, measure=f"FD({score['network']})-{n}" + (", REPA" if owner != folder else ""), psnr=recon["psnr"], fd=fd)
        scores = dict(numbers(next(iter(probe["results"].values()))), recon_fd=recon["fd"], ssim=recon["ssim"], **{k: recon[k] for k in ("lpips",) if k in recon})
        commands = {k: r["made"]["command"] for k, r in (("fd", score), ("recon", recon), ("probe", probe))}
        sources = {k: f"{p}: {key}" for k, p, key in (("fd", files["fd"], "fd"), ("psnr, ssim, recon_fd, lpips", files["recon"], "same names"), ("others", files["probe"], "results, first entry"), ("curve", log, "its FD lines"))}
        baselines = {k: r["f1"] for k, r in probe["results"].items() if k == "majority" or k.startswith("pixels")}
        return dict(row, **scores, curve=read_curve(log), seconds=sit_seconds(log), baselines=baselines, commit=score["made"]["commit"], commands=commands, sources=sources)
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise UserError(f"{folder}: not what the stages write ({type(e).__name__}: {e}); delete that arm and run it again: bash run.sh study {folder.parent.name.removeprefix('seed')} {name}")


def sit_seconds(log):
    return max(r.get("seconds", 0) for r in map(json.loads, log.read_text("utf-8").splitlines()))


def read_study(root):
    """{arm: {seed: row}} in the order of ARMS, and the names of arms that are not finished. Raises UserError."""
    folders = [p for p in sorted(root.glob("seed*/*")) if p.is_dir() and p.name != "pretrain"]
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
        raise UserError(f"{root}: no finished control; every arm is compared with it: bash run.sh study 0 control")
    measures = {r["measure"].removesuffix(", REPA") for of in rows.values() for r in of.values()}
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


def differences(rows, arm, key, reference="control"):
    """Arm minus reference, one a seed that both have."""
    return [rows[arm][s][key] - rows[reference][s][key] for s in sorted(rows[arm].keys() & rows[reference].keys())]


def compared(rows, arm, key, reference="control"):
    """In words: which is better, or undecided."""
    d = differences(rows, arm, key, reference)
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


def speed_up(rows, arm, reference="control"):
    """How many times fewer steps than the reference's whole training the arm needs to reach the reference's final distance, one a seed; None: not reached."""
    out = []
    for seed in sorted(rows[arm].keys() & rows[reference].keys()):
        end, target = rows[reference][seed]["curve"][-1]
        steps = steps_to(rows[arm][seed]["curve"], target)
        out.append(None if steps is None else end / steps)
    return out


def arm_means(rows):
    """One row an arm, the mean over its seeds, of the arms that share a SiT (without REPA): for probe.correlate, which then resamples arms."""
    out = []
    for arm, of in rows.items():
        if not arm.endswith("-repa"):
            shared = set.intersection(*(set(numbers(r)) for r in of.values())) | {"psnr"}
            out.append(dict({k: float(np.mean([r[k] for r in of.values()])) for k in sorted(shared)}, name=arm, run=arm, kind=arm))
    return out


# ---------------------------------------------------------------------------------------------------------------------
# The report

def table(head, lines):
    return "\n".join(["| " + " | ".join(head) + " |", "|" + "---|" * len(head)] + ["| " + " | ".join(map(str, line)) + " |" for line in lines]) + "\n"


def mean_sd(values, digits):
    v = np.asarray(values, float)
    return f"{v.mean():.{digits}f}" + (f" ± {v.std(ddof=1):.{digits}f}" if len(v) > 1 else "")


def change(rows, arm, key, digits, reference="control"):
    """Mean difference, its interval and what it says."""
    d = differences(rows, arm, key, reference)
    if arm == reference or not d:
        return "" if d else "no shared seed"
    low, high = interval(d)
    return f"{np.mean(d):+.{digits}f} " + (f"[{low:+.{digits}f}, {high:+.{digits}f}] {compared(rows, arm, key, reference)}" if len(d) > 1 else "(one seed)")


def speed_text(rows, arm):
    found = speed_up(rows, arm)
    reached = [s for s in found if s is not None]
    return "" if arm == "control" else f"{mean_sd(reached, 2)} times" + ("" if len(reached) == len(found) else f", reached in {len(reached)} of {len(found)} seeds") if reached else "not reached"


def main_table(rows):
    lpips = all("lpips" in r for of in rows.values() for r in of.values())
    lines = []
    for arm, of in rows.items():
        get = lambda k: [r[k] for r in of.values()]
        lines.append([f"`{arm}`", ARMS.get(arm, ""), mean_sd(get("psnr"), 2), *([mean_sd(get("lpips"), 3)] if lpips else []), mean_sd(get("recon_fd"), 0), mean_sd(get("f1"), 3), change(rows, arm, "f1", 3),
                      mean_sd(get("fd"), 0), change(rows, arm, "fd", 0), speed_text(rows, arm)])
    return table(["arm", "", "PSNR", *(["LPIPS"] if lpips else []), "FD of reconstructions", "probe F1", "F1 minus control's", "FD", "FD minus control's", "speed-up"], lines)


def paper_tables(rows):
    out = []
    for title, arms in TABLES.items():
        known = [a for a in arms if a in rows]
        lines = [[f"`{a}`", ARMS[a], "" if arms[a] is None else f"{arms[a]:.2f}", mean_sd([r["fd"] for r in rows[a].values()], 0), change(rows, a, "fd", 0, known[0]), mean_sd([r["f1"] for r in rows[a].values()], 3)] for a in known]
        out.append(f"### {title}\n\n" + table(["arm", "", "gFID, the paper's", "FD here", f"FD minus `{known[0]}`'s" if known else "", "probe F1 here"], lines))
    return "\n".join(out)


def score_table(rows):
    keys = [k for k in arm_means(rows)[0] if k not in ("name", "run", "kind", "fd", "psnr", "f1", "recon_fd", "lpips")]
    arms = [a for a in rows if not a.endswith("-repa")]
    return table(["score", *(f"`{a}`" for a in arms)], [[f"{k} ({'lower' if k in LOWER else 'higher'} is better)", *(mean_sd([r[k] for r in rows[a].values()], 3) for a in arms)] for k in keys])


def curve_table(rows):
    steps = sorted({s for of in rows.values() for r in of.values() for s, _ in r["curve"]})
    at = lambda of, step: [v for r in of.values() for s, v in r["curve"] if s == step]
    return table(["arm", *(f"step {s}" for s in steps)], [[f"`{a}`", *(mean_sd(at(of, s), 0) if at(of, s) else "" for s in steps)] for a, of in rows.items()])


def correlation_table(rows, result):
    """result: of probe.correlate on the arms' means. The last column: Pearson's r over the arms of one seed, lowest and highest."""
    seeds = sorted({s for of in rows.values() for s in of})
    span = lambda r, k: "" if k not in r else "undefined" if r[k] is None else f"{r[k]:+.2f}" + (f" [{r[k + '_interval'][0]:+.2f}, {r[k + '_interval'][1]:+.2f}]" if r[k + "_interval"] else "")
    lines = []
    for name, r in result.items():
        each = []
        for s in seeds:
            x, y = np.array([(of[s][name], of[s]["fd"]) for a, of in rows.items() if s in of and not a.endswith("-repa")]).T
            if len(x) > 2 and np.ptp(x) > 0 and np.ptp(y) > 0:
                each.append(np.corrcoef(x, y)[0, 1])
        lines.append([name, span(r, "pearson"), span(r, "spearman"), span(r, "partial"), r["n"], f"{min(each):+.2f} to {max(each):+.2f}" if each else "", verdict(r)])
    return table(["score", "Pearson", "Spearman", "partial, given PSNR", "n (arms)", "Pearson in each seed", "reading"], lines)


def report(root, rows, missing, correlations):
    control = next(iter(rows["control"].values()))
    seeds = sorted({s for of in rows.values() for s in of})
    baselines = ", ".join(f"{k} {v:.3f}" for k, v in control["baselines"].items())
    commits = sorted({r["commit"] for of in rows.values() for r in of.values()})
    sources = table(["arm", "number", "file: key"], [[f"`{r['name']}`", k, f"`{v}`"] for of in rows.values() for r in list(of.values())[:1] for k, v in r["sources"].items()])
    made = data.made()
    text = f"""# The study

{len(rows)} arms, {len(seeds)} seeds ({', '.join(seeds)}). The distance is {control['measure']} to the training images (lower is better); curves: `{read_measure(root, control)}`.
Values are mean ± standard deviation over seeds. A difference is taken within each seed; in brackets its 95 % interval by Student's t; "undecided" where that holds 0. {len(rows) - 1} arms are compared:
of arms that change nothing about one in 20 would fall outside by chance.
{'Not finished and left out: ' + ', '.join(missing) + '.' if missing else ''}

## Arms against the control

{main_table(rows)}
Probe F1 of the baselines: {baselines}. Speed-up: steps of the control over the steps until the arm's curve reaches the control's last distance, linear between the points of the curve.

![Distance while the SiT trains, and the arms' final distance minus the control's](convergence.png)

## The paper's tables at this scale

{paper_tables(rows)}
## Distance while the SiT trains

{curve_table(rows)}
![Samples from the same noise and labels](samples.png)

## Which score follows the distance?

Over the arms' means; intervals are over resampled arms. {len(correlations)} scores were tried.

{correlation_table(rows, correlations)}
![Each score against the distance](predictors.png)

## Reconstruction against generation

![PSNR and distance of reconstructions against the distance of samples](tradeoff.png)

## All scores

{score_table(rows)}
## Where the numbers come from

Machine: {data.cpu_name()}, one thread a command; torch {made['versions']['torch']}. Commits of the arms: {', '.join(commits)}; this report: `{made['command']}` at {made['commit']}.
`rows.json` holds every row with its files and commands. Of the other seeds: the same names. An arm again: `rm -r {root}/seed0/ARM; bash run.sh study 0 ARM`.

{sources}"""
    data.write_text(root / "report.md", text)


def read_measure(root, row):
    log = root / row["run"] / row["kind"] / "sit/metrics.jsonl"
    return next(k for line in log.read_text("utf-8").splitlines() for k in json.loads(line) if k.startswith(("FD(", "FID")))


# ---------------------------------------------------------------------------------------------------------------------
# Figures

def save(figure, path):
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=100, facecolor="white")
    data.save_png(Image.open(buffer).convert("RGB"), path)


def colours(rows):
    """Black for the control, red for Send-VAE, others apart; the same in every figure."""
    import matplotlib
    others = [a for a in rows if a not in ("control", "send")]
    return {"control": "black", "send": "crimson", **{a: matplotlib.colormaps["tab20"]((2 * i + i // 10) % 20) for i, a in enumerate(others)}}


def draw_convergence(rows, path, Figure):
    """Left: distance against steps, mean and band of one standard deviation over seeds. Right: final distance minus the control's, a dot a seed."""
    figure, colour = Figure((13, 5.2), layout="constrained"), colours(rows)
    left, right = figure.subplots(1, 2)
    for arm, of in rows.items():
        steps = [s for s, _ in next(iter(of.values()))["curve"]]
        values = np.array([[v for _, v in r["curve"]] for r in of.values() if len(r["curve"]) == len(steps)])
        main = arm in ("control", "send")
        left.plot(steps, values.mean(0), color=colour[arm], linewidth=3 if main else 1, linestyle="--" if arm.endswith("-repa") else "-", label=arm, zorder=3 if main else 2)
        if len(values) > 1:
            left.fill_between(steps, values.mean(0) - values.std(0, ddof=1), values.mean(0) + values.std(0, ddof=1), color=colour[arm], alpha=0.15 if main else 0.05, linewidth=0)
    left.set(xlabel="steps of the SiT", ylabel="Fréchet distance (lower is better)", title="The same SiT on each arm's latents")
    left.legend(fontsize=8)
    arms = [a for a in rows if a != "control"][::-1]
    for i, arm in enumerate(arms):
        d = differences(rows, arm, "fd")
        right.barh(i, np.mean(d), color=colour[arm], alpha=0.6)
        right.plot(d, [i] * len(d), "o", color="black", markersize=4)
    right.axvline(0, color="black", linewidth=1)
    right.set(yticks=range(len(arms)), yticklabels=arms, xlabel="final distance minus the control's (left: better than the control); a dot a seed", title="After equal training")
    save(figure, path)


def scatter(axis, rows, key, colour):
    for arm, of in rows.items():
        if not arm.endswith("-repa"):
            x, y = ([r[k] for r in of.values()] for k in (key, "fd"))
            axis.plot(x, y, ".", color=colour[arm], markersize=5, alpha=0.5)
            axis.plot(np.mean(x), np.mean(y), "o", color=colour[arm], markersize=8, label=arm)
    axis.set(xlabel=key, ylabel="Fréchet distance")


def draw_predictors(rows, correlations, path, Figure):
    """One panel a score: seeds as dots, arms' means as discs."""
    colour, across, down = colours(rows), 4, len(correlations) // 4 + 1  # one panel more, for the legend
    figure = Figure((4 * across, 3.4 * down), layout="constrained")
    axes = list(figure.subplots(down, across, squeeze=False).flat)
    for name, axis in zip(correlations, axes):
        scatter(axis, rows, name, colour)
        r = correlations[name]
        axis.set_title(f"r {'undefined' if r['pearson'] is None else format(r['pearson'], '+.2f')}" + (f", given PSNR {r['partial']:+.2f}" if r.get("partial") is not None else "") + f", n = {r['n']}", fontsize=10)
    for axis in axes[len(correlations):]:
        axis.axis("off")
    axes[len(correlations)].legend(*axes[0].get_legend_handles_labels(), fontsize=8, ncols=2, loc="center")
    save(figure, path)


def draw_tradeoff(rows, path, Figure):
    figure, colour = Figure((11, 4.6), layout="constrained"), colours(rows)
    for axis, key, text in zip(figure.subplots(1, 2), ("psnr", "recon_fd"), ("PSNR of reconstructions (dB, higher is better)", "Fréchet distance of reconstructions (lower is better)")):
        scatter(axis, rows, key, colour)
        axis.set(xlabel=text)
    axis.legend(fontsize=8)
    save(figure, path)


def draw_samples(root, rows, path, Figure, count=10):
    """A row an arm of the first seed: samples of the same noise and labels."""
    arms = {a: of[sorted(of)[0]] for a, of in rows.items() if (root / of[sorted(of)[0]]["name"] / "samples.npz").is_file()}
    figure = Figure((count * 0.75 + 1.6, len(arms) * 0.8), layout="constrained")
    for axis, (arm, row) in zip(np.ravel(figure.subplots(len(arms), 1)), arms.items()):
        images = data.read_npz(root / row["name"] / "samples.npz", "arr_0")["arr_0"]
        axis.imshow(np.concatenate(list(images[:count]), 1))
        axis.set_ylabel(arm, rotation=0, ha="right", va="center")
        axis.set(xticks=[], yticks=[])
    save(figure, path)


def main():
    p = data.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("study", help="folder of bash run.sh study")
    root = Path(p.parse_args().study)
    try:
        from matplotlib.figure import Figure
    except ImportError as e:
        raise UserError(f"cannot draw the figures ({e}): pip install -r requirements-dev.txt")
    rows, missing = read_study(root)
    if missing:
        print(f"not finished, left out: {', '.join(missing)}")
    means = arm_means(rows)
    correlations = correlate(means) if len(means) > 2 else {}
    data.write_json(root / "rows.json", dict(rows=[r for of in rows.values() for r in of.values()], correlations=correlations))
    draw_convergence(rows, root / "convergence.png", Figure)
    draw_predictors(rows, correlations, root / "predictors.png", Figure)
    draw_tradeoff(rows, root / "tradeoff.png", Figure)
    draw_samples(root, rows, root / "samples.png", Figure)
    report(root, rows, missing, correlations)
    print(main_table(rows) + f"{root}/report.md, {root}/rows.json")


if __name__ == "__main__":
    data.run_script(main)
