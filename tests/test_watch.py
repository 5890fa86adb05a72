"""Slow tests: training that can be watched."""
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import NAME, assert_refused, assert_same_bits, call, do, metrics, sit_command, vae_command
from PIL import Image

import common
import data
import sit
import train_sit
import vae


@pytest.mark.parametrize("script", NAME)
def test_pictures(script, small, tmp_path, monkeypatch):
    """Pictures move the training, are moved by a resume, or show another model, noise or images than they
    say; or the curves stay behind."""
    command = (vae_command(small / "images", tmp_path / "a") if script == "train_vae" else
               sit_command(small, tmp_path / "a", "--lr", 0.05))
    watched, labels, sample = (*command, "--sample-every", 1, "--out", tmp_path / "b"), [], sit.sample_ode
    monkeypatch.setattr(train_sit, "sample_ode", lambda *a, **b: labels.append(a[2]) or sample(*a, **b))
    do(*command, "--steps", 3)
    do(*watched, "--steps", 2)
    curves = (tmp_path / "b/curves.png").read_bytes()
    do(*watched, "--steps", 3)
    assert_same_bits(tmp_path / "a" / NAME[script], tmp_path / "b" / NAME[script])
    assert curves != (tmp_path / "b/curves.png").read_bytes() and not (tmp_path / "a/samples").exists()
    assert sorted(p.name for p in (tmp_path / "b/samples").iterdir()) == [f"00000{i}.png" for i in (1, 2, 3)]
    if script == "train_vae":
        folder, model = data.ImageFolder(small / "images", 32), vae.load_vae(tmp_path / "b/vae.pt")
        x = torch.stack([folder[i][0] for i in (0, 5, 11, 16, 22, 27, 33, 39)])
        images = torch.cat([x, data.to_uint8(model.decode(model.encode(data.to_float(x)).mean))])
    else:
        model, checkpoint = sit.load_sit(tmp_path / "b/sit.pt")
        noise, y = data.draw_noise(2 ** 61, range(16), 0, (4, 8, 8))[1], torch.arange(16) // 8
        mean, std = (checkpoint[k].view(1, -1, 1, 1) for k in ("latent_mean", "latent_std"))
        z = sample(model, noise, y, 10) * std + mean
        assert len(labels) == 3 and all(torch.equal(drawn, y) for drawn in labels)
        images = data.to_uint8(vae.load_vae(small / "vae/vae.pt").decode(z))
    sheet = images.view(2, 8, 3, 32, 32).permute(0, 3, 1, 4, 2).reshape(64, 256, 3).numpy()
    assert np.abs(sheet.astype(int) - np.array(Image.open(tmp_path / "b/samples/000003.png"))).max() <= 1


@pytest.mark.parametrize("name,module,flag", [("tensorboard", "torch.utils.tensorboard", "purge_step"),
                                              ("wandb", "wandb", "resume")])
def test_log_to(name, module, flag, small, tmp_path, monkeypatch):
    """TensorBoard or wandb is told other numbers or pictures than lie in --out, or its lack ends in a
    traceback."""
    opened, told, idle = [], {}, lambda *_, **__: None
    note = lambda k, v, step, **_: told.update({(k, step): v})
    log = lambda values: [note(k, v, values["step"]) for k, v in values.items() if k != "step"]
    board = SimpleNamespace(add_scalar=note, add_image=note, flush=idle, log=log, define_metric=idle)
    begin = lambda *_, **flags: opened.append(flags[flag]) or board
    fake = SimpleNamespace(**{"SummaryWriter" if name != module else "init": begin}, Image=np.asarray,
                           Error=ZeroDivisionError)
    command = sit_command(small, tmp_path, "--steps", 2, "--sample-every", 2, "--log-to", name)
    monkeypatch.setitem(sys.modules, module, None)
    assert_refused(call(*command), f"--log-to {name}", f"pip install {name}")
    monkeypatch.setitem(sys.modules, module, fake)
    do(*command)
    do(*command, "--steps", 3)
    do(*command[:-2], "--steps", 3, "--sample-every", 0)  # both flags are free to change
    assert opened == ([1, 3] if name == "tensorboard" else ["auto", "auto"])
    for i in (2, 3):
        assert np.array_equal(told.pop(("samples", i)), Image.open(tmp_path / f"samples/00000{i}.png"))
    written = {(f"{k}/{i}" if k == "velocity_t" else k, r["step"]): x for r in metrics(tmp_path)[1]
               for k, v in r.items() for i, x in enumerate(np.ravel(v)) if k != "step" and x is not None}
    assert told == written and len(told) > 20
    if name == "wandb":
        fake.init = lambda **_: 1 / 0  # as without an account
        assert_refused(call(*command, "--steps", 4), "--log-to wandb: division")


def test_what_cannot_be_watched(small, tmp_path, monkeypatch):
    """Without its VAE a run ends in a traceback, without matplotlib it says nothing; or without a terminal it
    says nothing for hours."""
    command, ticks = sit_command(small, tmp_path, "--steps", 6), iter(range(0, 10 ** 6, 20))
    with monkeypatch.context() as m:
        m.setattr(train_sit, "load_vae", lambda _: vae.load_vae("gone.pt"))
        assert_refused(call(*command, "--sample-every", 9), "gone.pt")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr(common, "time", SimpleNamespace(time=lambda: next(ticks), strftime=time.strftime))
    status, out, err = call(*command, "--sample-every", 9)
    assert status == 0 and "no curves.png is drawn" in out
    assert {p.name for p in tmp_path.iterdir()} == {"metrics.jsonl", "samples", "sit.pt"}
    told = [line.split(", ") for line in err.splitlines()]
    assert [line[0] for line in told] == ["step 2 of 6", "step 4 of 6", "step 6 of 6"]
    assert told[0][1].startswith("velocity ") and told[0][-2:] == ["0.1 images/s", "0:02:40 left"]
