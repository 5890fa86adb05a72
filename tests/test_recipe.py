"""Slow tests: recipe."""
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import skimage.data
import skimage.metrics
import timm
import torch
from helpers import (
    SMALL_VAE, LITE0, VFM, assert_refused, call, do, metrics, recipe, train_vae_args, write_images)
from PIL import Image

import common
import data
import vae
from extras import study as extras_study

# -----------------------------------------------------------------------------------------------------------
# run.sh at tiny scale: what it runs, runs


TINY = dict(VAE_FLAGS="--steps 2 --batch 4 --sample-every 0",
            SIT_FLAGS="--steps 2 --batch 4 --sample-every 0 --eval-every 1 --eval-images 8 --eval-steps 1",
            SAMPLE_FLAGS="--images 10 --steps 1")


# -----------------------------------------------------------------------------------------------------------
# The testbed: demo and study


def pretrain(images, out):
    """A VAE of two steps in the place of the shipped one."""
    do("train_vae", "--data", images, "--preset", "f4d16", "--batch", 4, "--steps", 2, "--lpips", 0,
       "--gan", 0, "--lambda-align", 0, "--precision", "fp32", "--out", out)


def test_demo_recipe(vgg, tmp_path):
    """`bash run.sh` does not run as such, with the study's judges, its arms begin apart or from another VAE,
    or the reports lack a score."""
    images, init, out = tmp_path / "avatars", tmp_path / "init.safetensors", tmp_path / "seed0"
    do("extras.avatars", images, "--n", 240, "--size", 32)
    pretrain(images, tmp_path / "vae")
    do("vae", "export", "--vae", tmp_path / "vae/vae.pt", "--out", init)
    (tmp_path / "shared").mkdir()
    shutil.copy(vgg[1], tmp_path / "shared/vgg16.pth")
    env = dict(OUT=out, SHARED=tmp_path / "shared", DATA=images, INIT=init, JUDGES=1, **TINY)
    for part in ("judge2", "judge3"):  # as in a study, before the arms run side by side
        recipe("study", "-", part, **env)
    printed, _ = recipe(**env)
    assert "control: " in printed and "send: " in printed

    report = json.loads((out / "report.json").read_text())
    names = {"fd", "rfd", "fd_to_reconstructions", "precision", "recall", "class_agreement", "psnr", "lpips",
             "probe_f1", "recon_fd"}
    assert list(report["arms"]) == ["control", "send"] and report["baselines"]["fd_floor"] > 0
    assert all(names | {"seconds"} <= scores.keys() for scores in report["arms"].values())
    first = {arm: metrics(out / arm)[1][0] for arm in ("control", "send")}
    assert "align" in first["send"] and "align" not in first["control"]
    begun = common.load_checkpoint(out / "send/vae.pt")
    assert begun["inputs"]["init"] == common.weights_hash(vae.load_vae(init).state_dict())

    do("extras.study", tmp_path)  # the demo's folder is that of one seed
    rows = {row["arm"]: row for row in json.loads((tmp_path / "rows.json").read_text())}
    judged = names | {"fd2", "fd2_to_reconstructions", "fd3", "probe_kde_gini"}
    assert list(rows) == ["control", "send"] and all(judged <= row.keys() for row in rows.values())
    assert [step for step, _ in rows["send"]["curve"]] == [1, 2]
    assert rows["send"]["fd"] == report["arms"]["send"]["fd"] and rows["send"]["seed"] == 0

    (out / "send/fd.json").write_text("{}")
    assert_refused(call("extras.study", "demo", out), "send", "fd.json")
    said, _ = recipe(status=2, **{**env, "OUT": tmp_path / "other", "INIT": tmp_path / "gone.safetensors"})
    assert "control: error: " in said and "gone.safetensors: no such checkpoint" in said


def test_parts_of_the_study(vgg, tmp_path):
    """What the study's arms share is not made: vision models with and without knowledge, judges, tokens."""
    images, init = tmp_path / "avatars", tmp_path / "vae/vae.pt"
    do("extras.avatars", images, "--n", 60, "--size", 32)
    pretrain(images, tmp_path / "vae")
    env = dict(OUT=tmp_path, DATA=images, INIT=init)
    (tmp_path / "shared").mkdir()
    shutil.copy(vgg[1], tmp_path / "shared/vgg16.pth")
    for part in ("random", "judge3", "tokens-random", "fork-fsq"):
        recipe("study", "-", part, **env)
    assert "--levels" in (tmp_path / "shared/fork-fsq/train_vae.py").read_text()
    command = [sys.executable, "-c", "import common; print(common.commit())"]
    told = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path / "shared/fork-fsq")
    assert told.stdout == "None\n" or told.stdout.endswith("+fsq\n")
    written = {path.name for path in (tmp_path / "shared").iterdir()}
    assert {"random.safetensors", "judge3.npz", "tokens-random"} <= written
    do("extras.oracle", images, tmp_path / "oracle.safetensors", "--steps", 2)
    with safetensors.safe_open(tmp_path / "oracle.safetensors", "pt") as f:
        assert f.metadata()["steps"] == "2" and 0 <= float(f.metadata()["test_f1"]) <= 1


def test_photographs(tmp_path):
    """`bash run.sh folder DIR` does not take photographs as they lie: JPEG of several sizes, in class folders
    or none, without attributes; with the shipped VAE, or one of another size."""
    photos = [skimage.data.astronaut(), skimage.data.chelsea(), skimage.data.coffee(), skimage.data.rocket()]
    for i in range(64):
        path = tmp_path / "my photos" / ("people", "cats", "food", "things")[i % 4] / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photos[i % 4][i:i + 200 + 2 * i, i:i + 180]).save(path)
    _, err = recipe("folder", tmp_path / "my photos/cats", status=2)
    assert_refused((2, "", err), "16 images", "64")

    for side in (32, 64):
        own = tmp_path / str(side)
        out, _ = recipe("folder", "my photos", folder=tmp_path, OUT=own, RES=side, **TINY)
        assert "no probe: no " in out and "people" in (own / "send/latents/meta.json").read_text()
        scores = json.loads((own / "report.json").read_text())["arms"]["send"]
        assert "psnr" in scores and scores["fd"] > 0 and "probe_f1" not in scores
        assert np.load(own / "send/samples.npz")["arr_0"].shape == (10, side, side, 3)
        assert not list(own.rglob("probe.json"))
        assert (own / "pretrain").exists() == (side == 64)


# -----------------------------------------------------------------------------------------------------------
# The paper's recipe


@pytest.fixture(scope="session")
def imagenet(small, tmp_path_factory):
    """A folder like ImageNet of 20 images, and a VAE under every name that run.sh starts from: (folder,
    environment of run.sh)."""
    out = tmp_path_factory.mktemp("imagenet")
    write_images(out / "data/train", 16)
    write_images(out / "data/val", 4)
    (out / "weights").mkdir()
    for name in ("vavae", "e2e-vavae", "sdvae", "f16d16", "f16d32", "f16d64"):
        shutil.copy(small / "vae/vae.pt", out / f"weights/{name}.pt")
    net = ("--resolution", 32, "--net", "tf_efficientnet_lite0", "--net-ckpt", LITE0, "--net-size", 32)
    do("fid", "score", out / "data/val", out / "data/val", *net, "--save-stats", out / "weights/adm-256.npz")
    shutil.copy(out / "weights/adm-256.npz", out / "weights/adm-512.npz")
    net, vfm = shlex.join(map(str, net)), shlex.join(map(str, VFM))
    small_batch = "--steps 2 --batch 4 --micro-batch 4 --sample-every 0"
    return out / "data", dict(
        INIT=out / "weights", OUT=out / "out", ENCODE_FLAGS="--resolution 32", SCORE_FLAGS=net,
        VAE_FLAGS=f"--resolution 32 {small_batch} --lpips 0 --mapper-width 16 --mapper-mlp 16 {vfm}",
        SIT_FLAGS=f"--model SiT-demo/2 {small_batch} {vfm}", RECON_FLAGS=f"{net} --lpips 0",
        SAMPLE_FLAGS="--images 5 --steps 2 --micro-batch 5")


def what_it_computes(line, arm):
    """A command without the names of its arm and its files. Of a flag given twice the second counts."""
    parts = [part.replace(f"/{arm}/", "/ARM/") for part in shlex.split(line) if not part.endswith(f"/{arm}")]
    parts = [re.sub(r"weights/(adm)?[\w.-]+", r"\1VAE", part) for part in parts]
    command, flags = [], {}
    values = command
    for part in parts:
        if part.startswith("--"):
            values = flags[part] = []
        else:
            values.append(part)
    return repr((command, sorted(flags.items())))


def test_every_line_of_the_recipe_runs(imagenet):
    """A command of the recipe is mistyped, or what one writes the next cannot read. Of arms that differ in
    their names or VAE alone, once the tiny settings stand in for theirs, one is run to the end."""
    folder, env = imagenet
    out, arms = env["OUT"], {}
    lines = list(dict.fromkeys(recipe("imagenet", folder, "all", SHOW=1, **env)[0].splitlines()))
    for line in lines:
        arms.setdefault(re.search(f"{out}/([^/ ]+)", line)[1], []).append(line)
    assert len(lines) > 150 and len(arms) >= 25

    seen, whole = set(), ("control-vavae", "send-vavae-depth2-clean")
    for arm, its in arms.items():
        computed = [what_it_computes(line, arm) for line in its]
        new = [i for i, words in enumerate(computed) if words not in seen or arm in whole]
        seen.update(computed)
        for line in its[:max(new, default=-1) + 1]:  # all that the last new one reads
            _, script, *flags = shlex.split(line)
            do(script.removesuffix(".py"), *flags)
    trained, ended = (len(list(out.glob(f"*/{name}"))) for name in ("vae.pt", "recon.json"))
    assert trained >= 6 and ended >= 3 and all((out / arm / "recon.json").exists() for arm in whole)
    assert (out / "send-vavae/SiT-XL-1/samples-cfg.npz").exists()
    assert (out / "send-vavae/SiT-B-1/samples.npz").exists()
    assert metrics(out / "send-vavae-depth2-clean")[0]["mapper_depth"] == 2
    assert metrics(out / "control-vavae")[0]["align"] == "none"


def test_recipe_is_resumable(imagenet, hub, tmp_path):
    """`bash run.sh imagenet` does not run as such with a VAE of the hub, or does again what is done."""
    folder, env = imagenet
    name = "vavae-imagenet256-f16d32-dinov2"
    shutil.copy(env["INIT"] / "vavae.pt", hub(f"hustvl/{name}") / f"{name}.pt")
    (tmp_path / "weights").mkdir()
    shutil.copy(env["INIT"] / "adm-256.npz", tmp_path / "weights")
    attributes, out = write_images(tmp_path / "attributes", 12, size=40), tmp_path / "out"
    rows = zip(data.SPLITS * 4, sorted(data.find_images(attributes), key=lambda f: f[2:]), strict=True)
    (attributes / "attributes.csv").write_text(
        "file,split,a\n" + "".join(f"{f},{s},{int(f[0] == 'a')}\n" for s, f in rows))
    env = {**env, "OUT": out, "PROBE": attributes, "PROBE_FLAGS": "--resolution 32",
           "INIT": tmp_path / "weights", "HF_HUB_CACHE": tmp_path / "hub"}

    recipe("imagenet", folder, "rival", **env)
    arm = out / "vavae-vavae"
    assert json.loads((arm / "recon.json").read_text())["psnr"] > 0
    assert "scores" in json.loads((arm / "SiT-B-1/samples.npz.json").read_text())
    probed = json.loads((arm / "probe.json").read_text())["results"]
    assert {"f1", "kde_gini", "psnr"} <= probed[str(arm / "vae.pt")].keys()

    def times():
        return {path: path.stat().st_mtime_ns for path in out.rglob("*.*") if path.is_file()}

    before = times()
    assert len(before) > 12
    assert "already" in recipe("imagenet", folder, "rival", **env)[0]
    assert times() == before


@pytest.mark.parametrize("size", [256, 512])
def test_both_resolutions(size, tmp_path):
    """256 or 512 pixels do not go through all stages with a patch-14 VFM: token grids, input size, or the
    latent's size."""
    grid, name = size // 16, "vit_small_patch14_dinov2.lvd142m"
    images = write_images(tmp_path / "images", 4, size=size)
    torch.save(timm.create_model(name).state_dict(), tmp_path / "dino.pth")
    torch.manual_seed(0)
    narrow = vae.AutoencoderKL(**{**vae.VAE_CONFIGS["f16d32"], "ch": 8, "num_res_blocks": 1})
    torch.save({"config": narrow.config, "vae": {}, "ema": narrow.state_dict()}, tmp_path / "init.pt")
    dino = ("--vfm", name, "--vfm-ckpt", tmp_path / "dino.pth")

    vae_pt, latents, sit_pt = tmp_path / "vae/vae.pt", tmp_path / "latents", tmp_path / "sit/sit.pt"
    out = do("train_vae", "--data", images, "--init", tmp_path / "init.pt", "--resolution", size, *dino,
             "--batch", 1, "--steps", 1, "--lpips", 0, "--gan", 0, "--out", vae_pt.parent)
    assert f"at {14 * grid} x {14 * grid}, {grid} x {grid} tokens of 384" in out
    config = vae.load_vae(vae_pt).config
    assert (config["resolution"], tuple(config["attn_resolutions"])) == (size, (grid,))
    do("vae", "--vae", vae_pt, "--data", images, "--flip", "--out", latents)  # the crop is the checkpoint's
    assert data.load_latents(latents).moments.shape == (4, 2, 64, grid, grid)
    do("train_sit", "--latents", latents, "--data", images, "--model", "SiT-demo/1", *dino, "--batch", 1,
       "--steps", 1, "--sample-every", 0, "--out", sit_pt.parent)
    do("sample", "--sit", sit_pt, "--images", 1, "--steps", 2, "--out", tmp_path / "samples.npz")
    assert np.load(tmp_path / "samples.npz")["arr_0"].shape == (1, size, size, 3)


@pytest.fixture
def fake_python(tmp_path):
    """The environment of a run.sh in which python prints its command line, and writes it to the .npz or .json
    in OUT that stands last; it fails where that line holds $FAIL. With the signal STOP, a trainer of the
    control stops run.sh after 2 seconds, and each saves for one more. Asked for a package's weights (-c) it
    names the package."""
    fake = tmp_path / "bin/python"
    fake.parent.mkdir()
    fake.write_text("""#!/bin/sh
case "$1" in -) exit 0 ;; -c) echo "$2" | grep -o 'lite[02]' | head -n 1; exit 0 ;; esac
echo "COMMAND $@"
case "$*" in *${FAIL:-nothing at all}*) exit 3 ;; esac
case "$STOP $*" in
[A-Z]*train_vae.py*)
    trap 'sleep 1; echo saved; exit 143' TERM
    sleep 2
    case "$*" in *none*) kill -$STOP $(ps -o ppid= $PPID) ;; esac
    sleep 9 ;;
esac
for last; do :; done
case "$last" in "$OUT"/*.npz | "$OUT"/*.json) mkdir -p "${last%/*}"; echo "$@" > "$last" ;; esac
""")
    fake.chmod(0o755)
    return dict(PATH=f"{fake.parent}:{os.environ['PATH']}", OUT=tmp_path)


def test_demo_is_two_arms(fake_python, tmp_path):
    """The demo's arms differ in more than the alignment, or a command is missing."""
    lines = recipe(INIT="init.pt", **fake_python)[0].splitlines()
    own = {arm: [line.removeprefix(f"{arm}: COMMAND ") for line in lines if line.startswith(f"{arm}: ")]
           for arm in ("control", "send")}
    scripts = ["train_vae.py", "vae.py", "train_sit.py", "sample.py", "fid.py", "fid.py", "probe.py"]
    assert all([line.split()[0] for line in commands] == scripts for commands in own.values())
    control, send = (vars(train_vae_args(f"python {own[arm][0]}")) for arm in own)
    changed = {k for k in control if control[k] != send[k]}
    assert changed <= {"align", "lambda_align", "vfm", "vfm_ckpt", "cache_vfm", "grid", "mapper_mlp", "out"}
    assert (control["align"], send["align"], send["init"]) == ("none", "send", "init.pt")
    as_control = [line.replace(f"{tmp_path}/send", f"{tmp_path}/control") for line in own["send"]]
    assert own["control"][1:] == as_control[1:]
    assert f"COMMAND extras/study.py demo {tmp_path} --arms control send" in lines[-2]


@pytest.mark.parametrize("name", ["TERM", "HUP"])  # INT may be ignored where the tests run
def test_a_stopped_demo_waits_for_its_arms(name, fake_python):
    """run.sh ends before its trainers have saved, or goes on with the next stage."""
    lines = recipe(status=128 + signal.Signals[f"SIG{name}"], STOP=name, **fake_python)[0].splitlines()
    last = {line for line in lines if re.match("(control|send): (COMMAND (?!train_vae)|saved)", line)}
    assert last == {"control: saved", "send: saved"}


def test_done_is_known_by_its_content(fake_python, tmp_path):
    """A second run of run.sh folder with other flags reports the old samples, or scores what a copy brought;
    the crop does not reach a stage, or the images are checked when a VAE is trained."""
    images, out, moved = write_images(tmp_path / "images", 2), tmp_path / "out", tmp_path / "moved"
    (images / "attributes.csv").touch()

    def scored(out, **env):
        lines.append(recipe("folder", images, **fake_python | dict(OUT=out, RES=40, **env))[0])
        commands = re.findall(r"^\w+: COMMAND (sample|fid.py score|fid.py recon|probe)", lines[-1], re.M)
        return sorted(commands)

    lines, new = [], dict(SAMPLE_FLAGS="--steps 9")
    scored(out, SIT_FLAGS="--batch 9 --batch=8")
    assert lines[0].startswith(f"COMMAND data.py check {images} --size 40 --batch 32 8\nCOMMAND train_vae.py")
    for words in ("train_vae.*demo --resolution 40 ", "train_vae.*--grid 5 ", "fid.py score.* 40 --net "):
        assert re.search(f"COMMAND {words}", lines[0])
    judged = "--save-stats"
    assert judged in lines[0] and scored(out) == [] and judged not in lines[-1]
    write_images(images, 3)
    scored(out)
    assert judged in lines[-1]  # of other images the reference is another
    assert scored(out) == [] and scored(out, **new) == ["fid.py score"] * 2 + ["sample"] * 2
    shutil.copytree(out, moved)
    for i, path in enumerate(sorted(moved.rglob("*"))):
        os.utime(path, (i, i))  # fd.json is older than samples.npz
    assert scored(moved, **new) == []
    (moved / "send/vae.pt").write_text("another")
    assert scored(moved, **new) == ["fid.py recon", "fid.py score", "probe", "sample"]


# What an arm of the study changes in the VAE's training, against send
CHANGES = {"control": dict(align="none", lambda_align=0.0),
           "send": {},
           "random": dict(vfm="resnet10t"),
           "oracle": dict(vfm="resnet10t"),
           "depth0-clean": dict(mapper_depth=0, noise=0),
           "depth1-clean": dict(noise=0),
           "random-matched": dict(vfm="resnet10t", lambda_align=8.0),
           "vavae": dict(align="vavae", lambda_align=0.1),
           "vfm2": dict(vfm="tf_efficientnet_lite2"),
           "depth2": dict(mapper_depth=2),
           "lambda0.5": dict(lambda_align=0.5),
           "lambda4": dict(lambda_align=4.0),
           "lambda8": dict(lambda_align=8.0),
           "standardised": dict(vfm_normalise="channel"),
           "spatial": dict(vfm_normalise="spatial"),
           "gram": {},
           "ve": dict(kl=0.0),
           "lambda0.1": dict(lambda_align=0.1),
           "ratio": dict(lambda_align=0.1, align_ratio=1),
           "noise0.5": dict(noise=0.5),
           "lognormal": dict(noise="lognormal"),
           "depth0": dict(mapper_depth=0),
           "depth2-clean": dict(mapper_depth=2, noise=0),
           "vfm-fine": dict(vfm_layer=2),
           "vfm-vit": dict(vfm="vit_small_patch14_dinov2.lvd142m", vfm_layer=8),
           "vfm-vgg16": dict(vfm="vgg16"),
           "oracle-half": dict(vfm="resnet10t"),
           **{f"{arm}-{name}": {**none, **steps} for name, steps in
              (("quarter", dict(steps=75)), ("x4", dict(steps=1200)), ("x16", dict(steps=4800)), ("fsq", {}))
              for arm, none in (("control", dict(align="none", lambda_align=0.0)), ("send", {}))}}


def test_a_run_of_another_precision(fake_python):
    """It goes into the seed's own folder, or its name is no seed."""
    out, _ = recipe("study", "1-fp32", "send", **fake_python)
    first = out.splitlines()[0]
    assert "/seed1-fp32/send" in first and "--seed 1 " in first
    recipe("study", "fp32-1", "send", status=2, **fake_python)


@pytest.fixture
def arms_commands(fake_python, tmp_path):
    """What run.sh runs for each arm of the study: {arm: {script and judge: its command}}, {arm: its fork}."""
    parsed, forks, foreign = {}, {}, tmp_path / "avatars/seed1"
    for arm in ("control", "send"):
        (foreign / arm).mkdir(parents=True)
        for file in ("vae.pt", "metrics.jsonl"):
            (foreign / arm / file).write_text(arm)
    _, err = recipe("study", 1, "gram", status=2, **fake_python)
    assert_refused((2, "", err), "fork-gram", "bash run.sh study - fork-gram")
    for name in ("gram", "ve", "fsq", "modern"):
        (tmp_path / f"shared/fork-{name}").mkdir()
    for arm in extras_study.ARMS:
        out, _ = recipe("study", 1, arm, **fake_python, FOREIGN=foreign.parent)
        commands = {}
        for line in out.splitlines():
            copy, line = re.fullmatch(r"COMMAND (\S*/shared/fork-\w+/)?(.*)", line).groups()
            if copy:
                forks[arm] = Path(copy).name.removeprefix("fork-")
            judged = next((f" {k}" for k in ("fd2", "fd3", "recon") if f"{k}.json" in line), "")
            commands[line.split()[0] + judged] = line
        scripts = ["train_sit.py", "sample.py", "fid.py", "fid.py fd2", "fid.py fd3"]
        if not extras_study.other_sit(arm):  # these take another arm's VAE
            scripts = ["vae.py", *scripts, "fid.py recon", "probe.py"]
            scripts = scripts if arm.endswith("-foreign") else ["train_vae.py", *scripts]
        assert list(commands) == scripts, arm
        for judged, net, cache in (("fid.py", "lite0", "judge"), ("fid.py fd2", "lite2", "judge2"),
                                   ("fid.py fd3", "vgg16", "judge3")):
            line = commands[judged]
            assert net in line and f"/{cache}.npz" in line and f"seed1/{arm}/samples.npz" in line
        parsed[arm] = commands
    return parsed, forks


def test_every_arm_of_the_study_is_a_command(arms_commands, tmp_path):
    """An arm of run.sh is mistyped, or changes something else than its name says."""
    parsed, forks = arms_commands
    of_forks = r" --(gram|ve|levels) \S+"
    tuned = {arm: vars(train_vae_args(f"python {re.sub(of_forks, '', commands['train_vae.py'])}"))
             for arm, commands in parsed.items() if "train_vae.py" in commands}
    flags = {arm: re.search(of_forks, c["train_vae.py"])[1] for arm, c in parsed.items()
             if re.search(of_forks, c.get("train_vae.py", ""))}
    assert flags == {"gram": "gram", "ve": "ve", "control-fsq": "levels", "send-fsq": "levels"}
    assert forks == {"gram": "gram", "ve": "ve", **{f"{arm}-{name}": name for arm in ("control", "send")
                                                    for name in ("fsq", "modern")}}
    assert all((tmp_path / f"seed1/{arm}-foreign/vae.pt").read_text() == arm for arm in ("control", "send"))
    without = {arm for arm in extras_study.ARMS if extras_study.other_sit(arm) or arm.endswith("-foreign")}
    assert set(extras_study.ARMS) - set(tuned) == without
    assert tuned.keys() == CHANGES.keys()
    send = tuned["send"]
    for arm, changes in CHANGES.items():
        ignored = {"out", "vfm_ckpt", "cache_vfm"}
        if arm.startswith(("control", "vavae")):
            ignored |= {"vfm", "grid", "mapper_mlp"}
        assert {k: v for k, v in tuned[arm].items() if v != send[k] and k not in ignored} == changes, arm
    assert (send["lambda_align"], send["mapper_depth"], send["noise"], send["seed"]) == (2.0, 1, 1, 1)
    weights = {arm: Path(args["vfm_ckpt"]).stem for arm, args in tuned.items() if args["vfm_ckpt"]}
    others = {"random": "random", "random-matched": "random", "oracle": "oracle", "vfm2": "lite2",
              "vfm-vit": "vit", "vfm-vgg16": "vgg16-timm", "oracle-half": "oracle-half"}
    assert weights == {arm: others.get(arm, "lite0") for arm in tuned if not arm.startswith("control")}
    caches = {arm: Path(tuned[arm]["cache_vfm"]).name.removeprefix("tokens-") for arm in weights}
    weights |= {"vfm-fine": "fine", "vfm-vgg16": "vgg16"}
    assert caches == weights  # or tokens of one model are read as another's

    sits = {arm: re.sub(r"--(out|latents) \S+", "", c["train_sit.py"]) for arm, c in parsed.items()}
    assert len({f for arm, f in sits.items() if not extras_study.other_sit(arm) or "-modern" in arm}) == 1
    for kind, flag in (("repa", "--repa 0.5"), ("long", "--steps 10000"), ("cosine", "--path cosine")):
        assert sits[f"control-{kind}"] == sits[f"send-{kind}"] and flag in sits[f"send-{kind}"]
    assert "seed1/send/latents" in parsed["send-repa"]["train_sit.py"]
    assert "seed1/send/vae.pt" in parsed["send-repa"]["sample.py"]


def test_one_arm_that_fails(fake_python, tmp_path):
    """A failing or mistyped arm of the study stops the others or passes for done, REPA comes before the VAE
    that it needs, or a seed is left out."""
    out, _ = recipe("study", status=1, **fake_python, STUDY_SEEDS=2, STUDY_ARMS="control sned",
                    STUDY_MORE="send-repa send", STUDY_LONG="", FAIL="seed1/control/latents", JOBS=1)
    assert f"COMMAND extras/study.py {tmp_path}" in out.splitlines()
    done = [line.split(":")[0] for line in out.splitlines() if ": done" in line]
    assert done[:7] == [f"- {part}" for part in ("avatars", "vgg16", "judge", "judge2", "judge3",
                                                 "tokens-lite0", "knows-lite0")]
    assert done[7:] == ["0 control", "0 send", "1 send", "0 send-repa", "1 send-repa"]
    failed = [line.split(":")[0] for line in out.splitlines() if "FAILED" in line]
    assert failed == ["1 control", "0 sned", "1 sned"] and "no such arm" in out


@pytest.mark.parametrize("question,parts,arms,words", [
    ("backbone", "fork-modern vgg16 judge2", "send send-modern control-cosine", []),
    ("vfm", "vit vgg16-timm random oracle tokens-vit tokens-vgg16 tokens-lite2 tokens-fine", "vfm-vgg16",
     ["probe.py results/.* --vfm-layer 2 --json {}/shared/knows-fine.json$"]),
    ("beyond", "fork-gram fork-ve", "spatial ve", []), ("discrete", "fork-fsq", "control-fsq", []),
    ("length", "judge3", "send-x16 control-quarter", []), ("weight", "judge3", "lambda0.1 ratio", []),
    ("noise", "judge3", "depth2-clean lognormal", []),
    ("size", "avatars tokens-lite0", "control send",
     ["avatars.py {}/size64/avatars --n 12000 --size 64", "train_vae.py .*--resolution 64 .*--grid 8 ",
      "train_sit.py .*SiT-demo/2", "fid.py score .* --resolution 64 "]),
    ("transfer", "others oracle-half tokens-oracle-half", "oracle-half",
     ["avatars.py {}/transfer/avatars .*--styles micah big-smile pixel-art$",
      "oracle.py {}/transfer/shared/others"]),
    ("data", "fashion", "control-foreign",
     ["datasets.py fashion {}/fashion/images", "vae.py --vae {}/fashion/seed2/send-foreign/vae.pt"])])
def test_questions(question, parts, arms, words, fake_python, tmp_path):
    """A question of the study lacks a part, an arm or a seed, or is asked of the wrong images."""
    (tmp_path / "bin/python").write_text((tmp_path / "bin/python").read_text().replace(
        'echo "COMMAND $@"', f'echo "COMMAND $@" | tee -a {tmp_path}/commands'))
    for seed in range(3):
        for arm in ("control", "send"):
            (tmp_path / f"seed{seed}/{arm}").mkdir(parents=True)
            for file in ("vae.pt", "metrics.jsonl"):
                (tmp_path / f"seed{seed}/{arm}/{file}").touch()
    out, _ = recipe("study", question, **fake_python, JOBS=1)
    knows = "oracle" in parts.split() or question in ("data", "transfer")
    assert ("- oracle: done" in out) == knows
    done = {line.split(":")[0] for line in out.splitlines() if ": done" in line}
    assert {f"- {part}" for part in parts.split()} <= done and "FAILED" not in out
    assert {f"{seed} {arm}" for seed in range(3) for arm in f"control send {arms}".split()} <= done
    commands = (tmp_path / "commands").read_text()
    for word in words:
        assert re.search(f"^COMMAND (extras/)?{word.format(tmp_path)}", commands, re.M), word


def test_images_of_another_study(fake_python, tmp_path):
    """A VAE of another study that is not there is found out after hours, or a cut copy of it is kept."""
    _, err = recipe("study", "data", status=2, **fake_python)
    assert_refused((2, "", err), f"{tmp_path}/seed0/control/vae.pt", "run first: bash run.sh study")
    _, err = recipe("study", 0, "send-foreign", status=2, **fake_python, FOREIGN=tmp_path / "gone")
    assert_refused((2, "", err), "gone/seed0/send/vae.pt")
    there, copy = tmp_path / "avatars/seed0/send", tmp_path / "seed0/send-foreign"
    for folder in (there, copy):
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").touch()
        (folder / "vae.pt").write_text("whole" if folder == there else "who")
    recipe("study", 0, "send-foreign", **fake_python, FOREIGN=tmp_path / "avatars")
    assert (copy / "vae.pt").read_text() == "whole"


def test_jobs_are_cores(fake_python, tmp_path):
    """A study runs one job at a time: nproc answers 1 because each command has one thread."""
    nproc = tmp_path / "bin/nproc"
    nproc.write_text('#!/bin/sh\necho "${OMP_NUM_THREADS:-7}"\n')
    (tmp_path / "bin/xargs").write_text('#!/bin/sh\necho "XARGS $@"\nexit 1\n')
    for script in (nproc, tmp_path / "bin/xargs"):
        script.chmod(0o755)
    out, _ = recipe("study", status=1, **fake_python)
    assert out.split()[:4] == ["XARGS", "-r", "-P", "7"] or shutil.which("nvidia-smi")


def test_dry_run(small, tmp_path):
    """--dry-run writes, needs weights, or leaves out a part of the plan."""
    images, vae_pt, out = small / "images", small / "vae/vae.pt", tmp_path / "o"
    probed = tmp_path / "images"
    shutil.copytree(images, probed)
    rows = zip(data.SPLITS * 20, data.find_images(images), strict=False)
    table = "".join(f"{f},{s},{int(f[0] == 'a')}\n" for s, f in rows)
    (probed / "attributes.csv").write_text("file,split,a\n" + table)
    vit = "vit_small_patch14_dinov2.lvd142m"
    losses = ("--lpips", 1, "--gan", 0.1, "--vfm", vit)
    sit_flags = ("--latents", small / "latents", "--data", images, "--model", "SiT-demo/1", "--vfm", vit)
    plans = [(("train_vae", "--data", images, *SMALL_VAE, *losses, "--out", out),
              ["step 0 of", "VAE 0.61 M", vit, "discriminator 2.77 M", "disk"]),
             (("vae", "--vae", vae_pt, "--data", images, "--flip", "--out", out),
              ["40 images", "(40, 2, 8, 8, 8)", "disk"]),
             (("train_sit", *sit_flags, "--batch", 8, "--out", out),
              ["SiT-demo/1", "64 tokens", "REPA 0.5", vit, "disk"]),
             (("sample", "--sit", small / "sit/sit.pt", "--out", out / "a.npz"),
              ["50000 images of 32 x 32", "NFE 250", "disk"]),
             (("fid", "score", images, images, "--net", vit, "--json", out / "b.json"),
              [f"{vit}@518", "40 images"]),
             (("fid", "recon", "--vae", vae_pt, "--data", images),
              ["40 images", "32 x 32"]),
             (("probe", vae_pt, "--data", probed, "--json", out / "a.json"), ["1 attributes"])]
    for command, expected in plans:
        plan = do(*command, "--dry-run")
        assert all(word in plan for word in expected), (command, plan)
    assert not out.exists()


def test_recipe_is_the_papers(tmp_path):
    """A line of the recipe has other settings than the paper, or an experiment of its tables is missing."""
    (tmp_path / "train").mkdir()
    (tmp_path / "val").mkdir()

    def commands(table):
        return recipe("imagenet", tmp_path, table, SHOW=1)[0].splitlines()

    main = commands("main")
    fine_tuned = "--resolution 256 | --batch 1024 | --steps 100000 | --lr 3e-4"
    for expected in (f"train_vae.py | {fine_tuned} | --align send | --vfm vit_base_patch14_dinov2.lvd142m",
                     f"train_vae.py | {fine_tuned} | --align none",
                     "vae.py | --flip | --resolution 256",
                     "train_sit.py | --model SiT-XL/1 | --repa 0.5 | --batch 256 | --steps 400000",
                     "sample.py | --images 50000 | --sampler sde | --steps 250",
                     "sample.py | --images 50000 | --cfg 2.5 --interval 0 0.75",
                     "fid.py score weights/adm-256.npz",
                     "fid.py recon | --resolution 256"):
        parts = [f" {part} " for part in expected.split(" | ")]
        assert any(all(part in line for part in parts) for line in main), expected

    everything = commands("all")
    arms = {Path(line.split("--out ")[1].strip()).name: line for line in everything if "train_vae.py" in line}
    names = {f"{arm}-{init}" for arm in ("control", "send")
             for init in ("vavae", "sdvae", "sdvae-512", "f16d16", "f16d32", "f16d64")}
    assert names | {f"send-vavae-depth{d}-clean" for d in (0, 1, 2)} | {"vavae-vavae"} <= set(arms)
    vfms = {train_vae_args(line).vfm for line in arms.values() if "/send-" in line}
    assert vfms == {"vit_base_patch14_dinov2.lvd142m", "vit_large_patch16_224.mae",
                    "vit_large_patch14_clip_224.openai", "vit_huge_patch14_gap_224.in1k_ijepa",
                    "vit_base_patch16_siglip_256.webli", "vit_base_patch16_dinov3.lvd1689m"}
    depths = [train_vae_args(line) for line in commands("table2") if "--align send" in line]
    assert [(a.mapper_depth, a.noise) for a in depths] == [(0, 0), (1, 0), (2, 0)]
    assert train_vae_args(arms["send-sdvae-512"]).resolution == 512
    assert sum(" vae.py " in line and "/base-" in line for line in everything) >= 7  # VAEs as they are
    for line in arms.values():
        args = train_vae_args(line)
        losses = args.rec, args.lpips, args.gan, args.gan_start, args.kl, args.clip
        assert losses == ("l1", 1, 0.1, 0, 1e-6, 1)
        assert args.lambda_align == {"send": 1, "vavae": 0.1, "none": 0}[args.align]
