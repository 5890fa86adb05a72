"""Slow tests: runs."""
import argparse
import hashlib
import json
import shutil
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
from helpers import (
    TRAIN, FP32, LITE0, NAME, SLOW, VFM, Evil, add_to_config, assert_refused, assert_same_bits, call, do,
    do_on_ranks, encode_command, ldm_state, metrics, sit_command, train_command, truncate, vae_command,
    write_images, write_table)
from PIL import Image

import common
import data
import fid
import sample
import sit
import train_sit
import vae
from common import UserError
from extras import convert  # noqa: E402

# ------------------------------------------------------------------------------------------------------------
# Encoding and sampling: what goes on, what is left out, whose models


def test_sampling_goes_on(small, tmp_path):
    """A killed sample.py loses or doubles an image when it is run again, on more processes too, or takes
    another run's left-overs."""
    command = ("sample", "--sit", small / "sit/sit.pt", "--images", 21, "--steps", 2, "--sampler", "sde",
               "--labels", "blocks", "--micro-batch", 2, *FP32)
    out = tmp_path / "parts.npz"
    do(*command, "--out", tmp_path / "whole.npz")
    whole = np.load(tmp_path / "whole.npz")
    assert whole["arr_1"].tolist() == [0] * 11 + [1] * 10
    settings = common.read_json(tmp_path / "whole.json")
    settings = {k: v for k, v in settings.items() if k not in ("seconds", "made", *sample.PATHS)}

    def leave(settings):  # what a kill leaves: nine images that no run would draw
        half = np.lib.format.open_memmap(f"{out}.part", "w+", np.uint8, whole["arr_0"].shape)
        done = np.lib.format.open_memmap(f"{out}.done", "w+", np.uint8, (21,))
        half[:9], done[:9] = 77, 1
        half.flush()
        done.flush()
        common.write_json(f"{out}.run", settings)

    leave({**settings, "seed": 8})
    do(*command, "--out", out)  # other settings: begins anew
    assert np.array_equal(np.load(out)["arr_0"], whole["arr_0"])
    out.unlink()
    leave(settings)
    assert "9 of 21 images are there" in do_on_ranks(*command, "--out", out, folder=tmp_path)
    images = np.load(out)["arr_0"]
    assert (images[:9] == 77).all() and np.abs(images[9:].astype(int) - whole["arr_0"][9:]).max() <= 1
    assert sorted(p.name for p in tmp_path.glob("parts*")) == ["parts.json", "parts.npz", "parts.png"]
    before = out.stat().st_mtime_ns
    out.with_suffix(".npz.part").touch()  # what a stop at the end may leave
    assert "already there" in do(*command, "--out", out) and out.stat().st_mtime_ns == before
    assert not out.with_suffix(".npz.part").exists()
    do(*command, "--seed", 9, "--out", out)
    assert not np.array_equal(np.load(out)["arr_0"][9:], whole["arr_0"][9:])


def test_an_image_that_cannot_be_read_leaves_no_hole(small, tmp_path):
    """Encoding with an unreadable image shifts the rows, leaves zeros in them, or counts them in the
    statistics."""
    images = write_images(tmp_path / "images", 120, size=8)
    truncate(images / "a/010.png")
    command = "vae", "--vae", small / "vae/vae.pt", "--data", images, "--resolution", 8
    for precision, micro in (("bf16", 1), ("fp32", 16)):
        flags = "--precision", precision, "--micro-batch", micro, "--out", tmp_path / precision
        status, _, err = call(*command, *flags)
        assert status == 0 and "a/010.png" in err
    (images / "a/010.png").unlink()
    do(*command, *FP32, "--out", tmp_path / "without")
    one, two = data.load_latents(tmp_path / "fp32"), data.load_latents(tmp_path / "without")
    assert one.files == two.files and len(one.files) == 119 and np.array_equal(one.labels, two.labels)
    moments = [latents.moments[:].astype(float) for latents in (one, two)]
    np.testing.assert_allclose(*moments, rtol=2e-3, atol=1e-3)
    torch.testing.assert_close(one.std, two.std, rtol=1e-3, atol=1e-4)


def release(folder):
    """Files as REPA-E publishes them: joint.pt (VAE and statistics inside), alone.pt without them, the VAE
    and the statistics apart."""
    torch.save(ldm_state(), folder / "vae.pt")
    model = sit.SIT_MODELS["SiT-demo/2"](input_size=16, in_channels=3, num_classes=2)
    torch.manual_seed(0)
    for p in model.parameters():
        nn.init.normal_(p, std=0.03)
    mean, var = torch.randn(3), torch.rand(3) + 0.5
    state = dict(model.state_dict(), pos_embed=sit.sincos_2d(128, 8)[None])
    torch.save({"ema": state, "steps": 5}, folder / "alone.pt")
    bn = {"bn.running_mean": mean, "bn.running_var": var, "bn.num_batches_tracked": torch.tensor(9)}
    joint = {"ema": {**state, **bn}, "vae": ldm_state(), "args": argparse.Namespace(lr=1), "steps": 5}
    torch.save(joint, folder / "joint.pt")
    stats = {"latents_scale": var.rsqrt().view(1, 3, 1, 1), "latents_bias": mean.view(1, 3, 1, 1)}
    torch.save(stats, folder / "vae-latents-stats.pt")
    np.savez(folder / "stats.npz", mean=mean.numpy(), std=var.sqrt().numpy())


def test_sampling_from_released_checkpoints(small, tmp_path):
    """REPA-E's files do not sample, their latents are not brought back to the VAE's scale, or statistics that
    are missing are made up."""
    release(tmp_path)
    flags = ("--images", 3, "--steps", 3, "--sampler", "euler", "--seed", 4, *FP32)
    alone = "sample", "--sit", tmp_path / "alone.pt", "--vae", tmp_path / "vae.pt", *flags

    def sampled(*command, name):
        do(*command, "--out", tmp_path / name)
        return np.load(tmp_path / name)["arr_0"].astype(int)
    shown = sampled("sample", "--sit", tmp_path / "joint.pt", *flags, name="joint.npz")
    assert shown.shape == (3, 32, 32, 3) and shown.std() > 1
    for stats in ("vae-latents-stats.pt", "stats.npz"):
        again = sampled(*alone, "--latent-stats", tmp_path / stats, name="alone.npz")
        assert np.abs(again - shown).max() <= 1
    convert.export_diffusers(vae.load_vae(tmp_path / "vae.pt"), tmp_path / "hf")
    with np.load(tmp_path / "stats.npz") as stats:
        add_to_config(tmp_path / "hf", **{f"latents_{k}": v.tolist() for k, v in stats.items()})
    assert np.abs(sampled(*alone, "--vae", tmp_path / "hf", name="hf.npz") - shown).max() <= 1
    halved = sampled(*alone, "--latent-stats", 0.5, name="factor.npz")
    model, _ = sit.load_sit(tmp_path / "alone.pt")
    noise = data.draw_noise(4, range(3), 0, (3, 16, 16))[1]
    labels = torch.from_numpy(np.load(tmp_path / "factor.npz")["arr_1"])
    z = sit.sample_ode(model, noise, labels, 3, method="euler")
    x = data.to_uint8(vae.load_vae(tmp_path / "vae.pt").decode(2 * z)).permute(0, 2, 3, 1)
    assert np.abs(halved - x.numpy()).max() <= 1
    np.savez(tmp_path / "bad.npz", mean=np.zeros(2), std=np.ones(2))
    bad = [(("--latent-stats", s), s) for s in (tmp_path / "bad.npz", tmp_path / "none.pt", 0, -1, "nan")]
    for more, word in [((), "--latent-stats"), (("--vae", small / "vae/vae.pt"), "4 latent channels"), *bad]:
        assert_refused(call(*alone, *more, "--out", tmp_path / "x.npz"), word)
    bare = call("sample", "--sit", tmp_path / "alone.pt", "--out", tmp_path / "x.npz")
    assert_refused(bare, "alone.pt", "--vae")
    ours = call("sample", "--sit", small / "sit/sit.pt", "--latent-stats", 1, "--out", tmp_path / "x.npz")
    assert_refused(ours, "leave the flag out")


def test_sampling_with_a_guide(small, tmp_path):
    """--guide is ignored, guides outside its interval, or takes a model of other latents."""
    release(tmp_path)
    do(*sit_command(small, tmp_path / "guide", "--steps", 1, "--seed", 5, "--lr", 0.1))
    command = "sample", "--sit", small / "sit/sit.pt", "--images", 3, "--steps", 3, "--sampler", "heun", *FP32
    guide, images = ("--cfg", 3, "--guide", tmp_path / "guide/sit.pt"), {}
    kinds = dict(plain=(), cfg=("--cfg", 3), guide=guide, outside=(*guide, "--interval", 0.96, 0.97))
    for name, flags in kinds.items():
        out = do(*command, "--interval", 0, 1, *flags, "--out", tmp_path / f"{name}.npz")
        assert ("guide/sit.pt" in out) == ("--guide" in flags)
        images[name] = np.load(tmp_path / f"{name}.npz")["arr_0"].astype(int)
    assert np.array_equal(images["plain"], images["outside"])
    assert np.abs(images["guide"] - images["plain"]).max() > 3
    assert np.abs(images["guide"] - images["cfg"]).max() > 3
    do(*encode_command(small, small / "images", tmp_path / "latents", "--vae", small / "other/vae.pt"))
    do(*sit_command(tmp_path, tmp_path / "foreign", "--steps", 1))
    for file, words in (("alone.pt", ["in_channels 3", "4"]), ("foreign/sit.pt", ["latents of VAE"])):
        result = call(*command, "--cfg", 2, "--guide", tmp_path / file, "--out", tmp_path / "x.npz")
        assert_refused(result, file, *words)


def test_scores_during_training(small, net, tmp_path, monkeypatch):
    """--eval-every logs another distance than that of the averaged model's samples, changes the training,
    depends on the processes, or scores what is no longer finite."""
    reference = tmp_path / "ref.npz"
    do("fid", "score", small / "images", small / "images", *net, "--save-stats", reference)
    command = sit_command(small, tmp_path / "plain", *SLOW, "--steps", 4, "--ema", 0.5)
    eval_flags = ("--eval-every", 3, "--eval-stats", reference, "--eval-images", 9, "--eval-steps", 7)
    do(*command)
    do(*command, *eval_flags, "--out", tmp_path / "one")
    do_on_ranks(*command, *eval_flags, "--out", tmp_path / "two", folder=tmp_path)
    name = "FD(test_vit@32)-9"
    curves = [{r["step"]: r[name] for r in metrics(tmp_path / k)[1] if name in r}
              for k in ("plain", "one", "two")]
    assert curves[0] == {} and list(curves[1]) == [3, 4] and curves[1] == pytest.approx(curves[2], rel=2e-4)
    assert_same_bits(tmp_path / "plain/sit.pt", tmp_path / "one/sit.pt")
    model, checkpoint = sit.load_sit(tmp_path / "one/sit.pt")
    noise, y = data.draw_noise(2 ** 61, range(9), 0, (4, 8, 8))[1], torch.arange(9) % 2
    mean, std = (checkpoint[k].view(1, -1, 1, 1) for k in ("latent_mean", "latent_std"))
    z = sit.sample_ode(model, noise, y, 7) * std + mean
    images = data.to_uint8(vae.load_vae(small / "vae/vae.pt").decode(z))
    judge, stats = fid.load_stats(reference)
    expected = fid.frechet_distance(stats["mu"], stats["sigma"], *fid.statistics(judge(images)))
    assert curves[1][4] == pytest.approx(expected, rel=1e-5)
    np.savez(tmp_path / "bare.npz", mu=stats["mu"], sigma=stats["sigma"])
    bare = call(*command, *eval_flags, "--eval-stats", tmp_path / "bare.npz", "--out", tmp_path / "x")
    assert_refused(bare, "bare.npz", "--save-stats")
    assert_refused(call(*command, "--eval-every", 2, "--out", tmp_path / "x"), "--eval-stats")
    shutil.copytree(small / "latents", tmp_path / "latents")
    meta = tmp_path / "latents/meta.json"  # as if the VAE had moved since
    meta.write_text(meta.read_text().replace(f'"{small}/vae/vae.pt",', '"gone.pt",'))
    moved = (*command, *eval_flags, "--latents", tmp_path / "latents", "--out", tmp_path / "moved")
    assert_refused(call(*moved), "gone.pt", "new --vae: python vae.py --vae")
    assert "already encoded" in do(*encode_command(small, small / "images", tmp_path / "latents", "--flip"))
    do(*moved)
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(float("nan")))
    monkeypatch.setattr(train_sit.Evaluation, "__call__", lambda *_: pytest.fail("scored"))
    rare = ("--log-every", 100, "--save-every", 100, "--out", tmp_path / "nan")
    assert_refused(call(*command, *eval_flags, *rare), "step 1: grad_norm not finite")


@pytest.mark.parametrize("schedule,lr", [
    ((), [1e-3, 1e-3]), (("--lr-warmup", 10 ** 9), [1e-12, 2e-12]), (("--lr-decay", 1), [1e-3, 5e-4])])
def test_sit_schedule(schedule, lr, small, tmp_path):
    """train_sit.py logs a learning rate and steps with another one."""
    do(*sit_command(small, tmp_path, "--steps", 2, *schedule))
    assert [r["lr"] for r in metrics(tmp_path)[1]] == pytest.approx(lr)
    checkpoint = common.load_checkpoint(tmp_path / "sit.pt")
    assert checkpoint["optimizer"]["param_groups"][0]["lr"] == pytest.approx(lr[-1])
    moved = max((checkpoint["model"][k] - v).abs().max().item() for k, v in fresh_sit().items())
    # Adam's first steps: about lr each
    assert 0.5 * sum(lr) < moved < 2 * sum(lr) if lr[0] > 1e-9 else moved < 1e-7


def fresh_sit():
    torch.manual_seed(0)
    return sit.SIT_MODELS["SiT-demo/2"](input_size=8, in_channels=4, num_classes=2).state_dict()


@pytest.mark.parametrize("dropout,moved", [(0, [True, True, False]), (1, [False, False, True])])
def test_label_dropout(dropout, moved, small, tmp_path):
    """The row of "no class" is not trained, or labels are dropped where they should not be."""
    do(*sit_command(small, tmp_path, "--label-dropout", dropout, "--steps", 5))
    name = "y_embedder.embedding_table.weight"
    now = common.load_checkpoint(tmp_path / "sit.pt")["model"][name]
    assert (now != fresh_sit()[name]).any(1).tolist() == moved


def test_deterministic(small, tmp_path):
    """--deterministic fails, changes what a CPU computes, or is not passed on."""
    for script, name in NAME.items():
        for flags in ((), ("--deterministic",)):
            out = tmp_path / f"{script}{len(flags)}"
            do(script, *train_command(script, small, out), "--steps", 2, *flags)
            assert torch.are_deterministic_algorithms_enabled() == bool(flags)
        assert_same_bits(tmp_path / f"{script}0" / name, tmp_path / f"{script}1" / name)
    out = "--out", tmp_path / "a.npz"
    sampling = "sample", "--sit", small / "sit/sit.pt", "--images", 2, "--steps", 2, *out
    for command in (encode_command(small, small / "images", tmp_path / "latents"), sampling):
        common.setup()
        assert not torch.are_deterministic_algorithms_enabled()
        do(*command, "--deterministic")
        assert torch.are_deterministic_algorithms_enabled()
    common.setup()


def test_a_changed_data_set_is_seen(small, tmp_path):
    """Images that were replaced or added after encoding are paired with the old latents, or a run goes on
    with them."""
    images, latents, moved = tmp_path / "images", tmp_path / "latents", tmp_path / "moved"
    write_images(images, 40)
    do(*encode_command(small, images, latents))
    repa = (*sit_command(tmp_path, tmp_path / "sit"), "--data", images, "--repa", 0.5, *VFM)
    fine = vae_command(images, tmp_path / "vae")
    for command in (repa, fine):
        do(*command, "--steps", 1)
    images.rename(moved)  # the same files elsewhere
    for command in (repa, fine):
        do(*command, "--data", moved, "--steps", 2)
    moved.rename(images)
    Image.effect_noise((64, 64), 90).convert("RGB").save(images / "a/000.png")
    assert_refused(call(*repa, "--steps", 3), "--data")
    assert_refused(call(*fine, "--steps", 3), "other content of --data")
    assert_refused(call(*encode_command(small, images, latents)), "other images than --data")


def test_weights_may_move_but_not_change(small, tmp_path):
    """A run does not go on when its weight files have moved, or goes on, or counts as done, when they have
    changed."""
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    shutil.copy(small / "vae/vae.pt", here / "init.pt")
    shutil.copy(LITE0, here / "vfm.pth")

    def tune(folder, steps):
        weights = "--init", folder / "init.pt", *VFM, "--vfm-ckpt", folder / "vfm.pth"
        flags = "--lpips", 0, "--gan", 0, *FP32, "--batch", 4, "--steps", steps, "--out", tmp_path / "out"
        return "train_vae", "--data", small / "images", *weights, *flags
    do(*tune(here, 1))
    here.rename(there)
    do(*tune(there, 2))
    state = common.load_checkpoint(LITE0)
    next(v for v in state.values() if v.ndim == 4).mul_(1.01)
    torch.save(state, there / "vfm.pth")
    assert_refused(call(*tune(there, 3)), "other content of --vfm")
    shutil.copy(LITE0, there / "vfm.pth")
    shutil.copy(small / "other/vae.pt", there / "init.pt")
    assert_refused(call(*tune(there, 2)), "other content of --init", "out/vae.pt")


def test_misfits(small, tmp_path):
    """A checkpoint of another size, or latents whose images are gone, are used, or end in a traceback."""
    checkpoint = common.load_checkpoint(small / "vae/vae.pt")
    checkpoint["config"]["ch"] = 32
    torch.save(checkpoint, tmp_path / "size.pt")
    words = "encoder.conv_in.weight", "(16, 3, 3, 3)", "(32, 3, 3, 3)"
    out = ("--data", small / "images", "--out", tmp_path / "out")
    assert_refused(call("vae", "--vae", tmp_path / "size.pt", *out), *words)
    assert_refused(call("train_vae", "--init", tmp_path / "size.pt", *out), *words)
    few = write_images(tmp_path / "images", 8)
    assert_refused(call(*sit_command(small, tmp_path / "sit", "--data", few, "--repa", 1, *VFM)), "a/008.png")
    (tmp_path / "taken/vae.pt").mkdir(parents=True)
    assert_refused(call(*vae_command(small / "images", tmp_path / "taken")), "vae.pt: a folder")


def test_output_that_cannot_be_written(small, net, tmp_path, monkeypatch):
    """A read-only or impossible output folder ends in a traceback. (It lies below a file: nobody can write
    there.) Or a run begins that the disk cannot hold."""
    write_table(small / "images")
    (tmp_path / "file").write_text("no folder")
    below, images, vae_pt = tmp_path / "file/out", small / "images", small / "vae/vae.pt"
    sampling = "sample", "--sit", small / "sit/sit.pt", "--images", 2, "--steps", 2
    recon = "fid", "recon", "--vae", vae_pt, "--data", images, "--net", "none", "--lpips", 0
    score, probing = ("fid", "score", images, images, *net), ("probe", vae_pt, "--data", images)
    for command in [
            ("avatars", below, "--n", 5), vae_command(images, below), encode_command(small, images, below),
            sit_command(small, below), (*sampling, "--out", below / "a.npz"),
            (*recon, "--json", below / "a.json"), (*recon, "--png", below / "a.png"),
            (*score, "--json", below / "a.json"), (*probing, "--json", below / "a.json")]:
        assert_refused(call(*command), tmp_path / "file")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
    for command in (vae_command(images, tmp_path), encode_command(small, images, tmp_path),
                    (*sampling, "--out", tmp_path / "a.npz")):
        assert_refused(call(*command), "GiB are free")
    assert not (tmp_path / "moments.npy").exists()


def test_a_latent_that_is_not_finite(small, tmp_path):
    """A damaged latent is trained on, or its image is not named."""
    shutil.copytree(small / "latents", tmp_path / "latents")
    command = sit_command(tmp_path, tmp_path / "sit", "--save-every", 1)
    do(*command, "--steps", 1)
    moments = np.load(tmp_path / "latents/moments.npy", mmap_mode="r+")
    moments[5, :, 1, 2, 3] = np.inf
    moments.flush()
    file = data.load_latents(small / "latents").files[5]
    result = call(*command, "--steps", 30)
    assert_refused(result, "step ", file, "not finite", "encode")
    np.savez(tmp_path / "latents/stats.npz", mean=np.full(4, np.nan), std=np.ones(4))
    assert_refused(call(*command, "--steps", 30), "damaged", "not finite")


def test_hostile_npz(small, net, tmp_path):
    """A zip bomb is unpacked, an array of objects unpickled."""
    bomb, objects, latents = tmp_path / "bomb.npz", tmp_path / "objects.npz", tmp_path / "latents"
    with zipfile.ZipFile(bomb, "w") as z:
        z.writestr("arr_0.npy", b"")
        z.filelist[0].file_size = 2 ** 31  # what it says that it unpacks to
    evil = np.array([Evil(tmp_path / "ran")] * 40, object)
    np.savez(objects, **dict.fromkeys(("mean", "std", "mu", "sigma", "arr_0"), evil))
    shutil.copytree(small / "latents", latents)
    command = sit_command(tmp_path, tmp_path / "out")
    for path, words in ((bomb, ["zip bomb"]), (objects, [])):
        assert_refused(call("fid", "score", small / "images", path, *net), path, *words)
        scoring = sit_command(small, tmp_path / "out", "--eval-every", 1, "--eval-stats", path)
        assert_refused(call(*scoring), path, *words)
        with pytest.raises(UserError, match="bomb" if words else "allow_pickle"):
            convert.read_stats(str(path), 4)
        shutil.copy(path, latents / "stats.npz")
        assert_refused(call(*command), latents, "damaged", *words)
    damaged = (small / "latents/labels.npy").read_bytes()
    shutil.copytree(small / "latents", latents, dirs_exist_ok=True)
    # the header is no Python any more
    (latents / "labels.npy").write_bytes(damaged[:45] + b"\0" + damaged[61:])
    assert_refused(call(*command), latents, "damaged")
    for name in ("labels", "moments"):
        shutil.copytree(small / "latents", latents, dirs_exist_ok=True)
        np.save(latents / f"{name}.npy", evil)
        assert_refused(call(*command), latents, "damaged")
    assert not (tmp_path / "ran").exists()


def test_finished_commands_do_nothing(demo, avatars):
    """Running run.sh twice trains or encodes again."""
    before = {p: p.stat().st_mtime_ns for p in demo.rglob("*") if p.is_file()}
    out = do("train_vae", "--data", avatars, *TRAIN, "--lpips", 0, "--gan", 0, "--preset", "demo",
             "--lambda-align", 0, "--out", demo / "pretrain")
    assert "already at step 3" in out
    do("vae", "--vae", demo / "send/vae.pt", "--data", avatars, "--split", "train", "--flip", *FP32,
       "--out", demo / "send/latents")
    do("train_sit", "--latents", demo / "send/latents", "--data", avatars, "--model", "SiT-demo/2",
       "--steps", 3,
       "--batch", 8, "--repa", 0.5, *VFM, *FP32, "--out", demo / "send/sit")
    do("avatars", avatars, "--n", 200)
    assert {p: p.stat().st_mtime_ns for p in demo.rglob("*") if p.is_file()} == before


def test_outputs_say_how_they_were_made(demo):
    """A file does not say by which command, commit, versions and inputs it was made."""
    def good(made, script):
        assert made["command"].startswith(f"{script}.py ") and made["commit"] == common.commit()
        assert set(made["versions"]) == {"python", "torch", "numpy", "pillow", "timm"}
        assert torch.__version__.startswith(made["versions"]["torch"])

    send = demo / "send"
    for name, script in {"latents/meta.json": "vae", "samples.json": "sample", "recon.json": "fid",
                         "fd.json": "fid", "probe.json": "probe"}.items():
        good(common.read_json(send / name)["made"], script)
    good(common.read_json(demo / "report.json")["made"], "study")
    for name, script in (("vae.pt", "train_vae"), ("sit/sit.pt", "train_sit")):
        checkpoint, (settings, _) = common.load_checkpoint(send / name), metrics((send / name).parent)
        good(checkpoint["made"], script)
        good(settings["made"], script)
        assert settings["inputs"] == checkpoint["inputs"]
    for name, script in (("samples.png", "sample"), ("recon.png", "fid")):
        good(json.loads(Image.open(send / name).text["made"]), script)
    vae_hash = common.weights_hash(vae.load_vae(send / "vae.pt").state_dict())
    meta = common.read_json(send / "latents/meta.json")
    assert meta["vae_hash"] == vae_hash == common.read_json(send / "recon.json")["inputs"]["vae"]
    assert metrics(send / "sit")[0]["inputs"]["latents"] == f"{vae_hash}-{meta['files_hash']}"
    init = common.weights_hash(vae.load_vae(demo / "pretrain/vae.pt").state_dict())
    assert metrics(send)[0]["inputs"]["init"] == init
    samples = hashlib.sha256((send / "samples.npz").read_bytes()).hexdigest()[:16]
    assert common.read_json(send / "fd.json")["inputs"][str(send / "samples.npz")] == samples
    assert len(common.read_json(send / "probe.json")["inputs"]) == 2
