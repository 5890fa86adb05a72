"""Slow tests: fid."""
import contextlib
import io
import json
import os
import pickle
import shutil
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import safetensors.torch
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from helpers import (
    LITE0, Colours, assert_refused, call, do, read_scores, stats_of, tiny_vae, truncate, write_images,
    write_npz)
from PIL import Image

import common
import data
import fid
import mapper
import vae
from common import UserError
from extras import packaged


def test_oracle(tmp_path):
    """The oracle VFM does not learn its attributes, does not load as a VFM, or the random one is not the same
    network untrained."""
    root, lines = write_images(tmp_path / "images", 60, size=32), ["file,split,red,green"]
    for i, file in enumerate(data.find_images(root)):
        red, green = i % 2, i // 2 % 2
        Image.new("RGB", (32, 32), (255 * red, 255 * green, 4 * i)).save(root / file)
        lines.append(f"{file},{('train', 'train', 'test')[i % 3]},{red},{green}")
    (root / "attributes.csv").write_text("\n".join(lines) + "\n")
    do("extras.oracle", root, tmp_path / "random.safetensors", "--steps", 0)
    out = do("extras.oracle", root, tmp_path / "oracle.safetensors", "--steps", 12)
    losses = [float(line.split()[-1]) for line in out.splitlines() if line.startswith("step ")]
    assert losses[-1] < 0.9 * losses[0] and "macro F1 of 2 attributes on 20 test images" in out
    x, tokens = torch.rand(2, 3, 32, 32) * 2 - 1, []
    for name in ("random", "oracle"):
        tokens.append(mapper.VFM("resnet10t", 32, 8, str(tmp_path / f"{name}.safetensors"))(x))
    assert tokens[0].shape == tokens[1].shape == (2, 64, 256) and not torch.allclose(*tokens, atol=0.1)
    first = safetensors.torch.load_file(tmp_path / "random.safetensors")
    torch.manual_seed(0)
    assert torch.equal(first["conv1.0.weight"], timm.create_model("resnet10t").state_dict()["conv1.0.weight"])
    assert "already there" in do("extras.oracle", root, tmp_path / "oracle.safetensors")


def test_packaged_vgg16():
    """A convolution's axes are turned round on the way from the package, or its pickle may name more than
    arrays."""
    rng, arrays = np.random.default_rng(0), {}
    model = torchvision.models.vgg16(weights=None).features
    for k, m in enumerate(m for m in model if isinstance(m, nn.Conv2d)):
        kernel = rng.standard_normal((3, 3, m.in_channels, m.out_channels), np.float32)
        arrays[f"Conv_{k}"] = dict(kernel=kernel, bias=np.full(m.out_channels, k, np.float32))
    state = packaged.convert_vgg16(arrays, head=True)
    timm.create_model("vgg16").load_state_dict(state)
    state = {k: v for k, v in state.items() if k.startswith("features.")}
    model.load_state_dict({k.removeprefix("features."): v for k, v in state.items()})
    assert state["features.2.weight"][5, 7, 0, 2] == arrays["Conv_1"]["kernel"][0, 2, 7, 5]
    assert state["features.28.bias"][0] == 12
    read = lambda value: packaged.ArraysOnly(io.BytesIO(pickle.dumps(value, 3))).load()
    assert (read(arrays["Conv_0"])["kernel"] == arrays["Conv_0"]["kernel"]).all()
    with pytest.raises(UserError, match="posix.system|nt.system"):
        read(os.system)


def test_packaged_vit():
    """A tensor of the ViT comes to another place, or turned round."""
    torch.manual_seed(0)
    expected = timm.create_model("vit_small_patch14_dinov2", num_classes=0).state_dict()
    expected = {k: torch.randn_like(v) for k, v in expected.items()}
    parts = {"attn.proj": "attention.output.dense", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
    positions = expected["pos_embed"]
    tensors = {"backbone.embeddings.cls_token": expected["cls_token"], "onnx::Concat_1": positions[:, :1],
               "onnx::Reshape_2": positions[:, 1:]}
    nodes = []

    def put(ours, theirs, linear=False):
        weight, tensors[f"{theirs}.bias"] = expected[f"{ours}.weight"], expected[f"{ours}.bias"]
        if not linear:
            tensors[f"{theirs}.weight"] = weight
            return
        tensors[f"onnx::MatMul_{len(nodes)}"] = weight.T
        nodes.append(onnx.helper.make_node("MatMul", ["x", f"onnx::MatMul_{len(nodes)}"], [f"made_{theirs}"]))
        nodes.append(onnx.helper.make_node("Add", [f"{theirs}.bias", f"made_{theirs}"], [f"y_{theirs}"]))

    put("patch_embed.proj", "backbone.embeddings.patch_embeddings.projection")
    put("norm", "backbone.layernorm")
    for i in range(12):
        theirs = f"backbone.encoder.layer.{i}"
        for kind in ("weight", "bias"):
            three = expected[f"blocks.{i}.attn.qkv.{kind}"].chunk(3)
            expected |= {f"{part}{i}.{kind}": v for part, v in zip(("query", "key", "value"), three)}
        for part in ("query", "key", "value"):
            put(f"{part}{i}", f"{theirs}.attention.attention.{part}", linear=True)
        for ours, name in parts.items():
            put(f"blocks.{i}.{ours}", f"{theirs}.{name}", linear=True)
        for k in (1, 2):
            put(f"blocks.{i}.norm{k}", f"{theirs}.norm{k}")
            tensors[f"{theirs}.layer_scale{k}.lambda1"] = expected[f"blocks.{i}.ls{k}.gamma"]
    stored = [onnx.numpy_helper.from_array(t.contiguous().numpy(), name) for name, t in tensors.items()]
    found = packaged.convert_vit(onnx.helper.make_graph(nodes, "vit", [], [], stored))
    assert len(found) == 174 and all(torch.equal(v, expected[k]) for k, v in found.items())


def test_exported_weights(tmp_path):
    """The small file that is passed on holds another VAE than the checkpoint's average, loses its shape, or a
    cut one passes."""
    small, tmp_vae, model = tmp_path / "a.safetensors", tmp_path / "vae.pt", tiny_vae(resolution=32)
    torch.save(dict(config=model.config, vae={}, ema=model.state_dict()), tmp_vae)
    do("vae", "export", "--vae", tmp_vae, "--out", small)
    ours, theirs = vae.load_vae(small), vae.load_vae(tmp_vae)
    assert ours.config == theirs.config
    for (k, a), b in zip(ours.state_dict().items(), theirs.state_dict().values()):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5, msg=k)
    (tmp_path / "cut.safetensors").write_bytes(small.read_bytes()[:-100])
    with pytest.raises(UserError, match="cut.safetensors.*not a readable checkpoint"):
        vae.load_vae(tmp_path / "cut.safetensors")
    assert_refused(call("vae", "export", "--vae", tmp_vae, "--out", tmp_path / "a.pt"), ".safetensors")


def test_inception_is_pytorch_fids(inception, monkeypatch):
    """But for the resize and the scale, the features differ from pytorch-fid's with the same weights."""
    import pytorch_fid.inception
    load = lambda *_, **__: torch.load(inception[1])
    monkeypatch.setattr(pytorch_fid.inception, "load_state_dict_from_url", load)
    monkeypatch.setattr(fid, "resize_tf1", lambda x, size: F.interpolate(x, (size, size), mode="bilinear"))
    x = torch.randint(0, 256, (1, 3, 100, 256), dtype=torch.uint8)
    with torch.no_grad():
        expected = pytorch_fid.inception.InceptionV3([3]).eval()(x / 255)[0].flatten(1)
    torch.testing.assert_close(inception[0](x * (128 / 127.5)), expected, rtol=0, atol=1e-4)


def test_inception_weights_that_cannot_be_had(inception, tmp_path, monkeypatch):
    """Weights that miss, do not fit or cannot be fetched end in a traceback or in random features."""
    def fail(*_, **__):
        raise RuntimeError('invalid hash value (expected "6726825d", got "0")')

    state = torch.load(inception[1])
    state.pop("Mixed_7c.branch_pool.conv.weight")
    torch.save(state, tmp_path / "part.pth")
    (tmp_path / "text.pth").write_text("no weights")
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fail)
    for ckpt, words in ((tmp_path / "part.pth", "Mixed_7c.branch_pool.conv.weight is missing"),
                        (tmp_path / "text.pth", "text.pth"), (tmp_path / "none.pth", "none.pth"),
                        (None, "6726825d.*--net-ckpt")):
        with pytest.raises(UserError, match=words):
            fid.FIDInception(ckpt)
    with pytest.raises(UserError, match="299"):
        fid.load_net("inception", inception[1], 96)


def test_sample_files_are_mapped(tmp_path):
    """50,000 samples are read into memory, or a file is mapped at another place than its data."""
    x = np.random.default_rng(0).integers(0, 256, (9, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "plain.npz", arr_1=np.arange(9), arr_0=x)
    np.savez_compressed(tmp_path / "packed.npz", arr_0=x)
    np.savez(tmp_path / "fortran.npz", arr_0=np.asfortranarray(x))
    common.write_npz(tmp_path / "ours.npz", arr_0=x, arr_1=np.arange(9))
    for name in ("plain", "packed", "fortran", "ours"):
        array = fid.map_array(tmp_path / f"{name}.npz", "arr_0")
        assert isinstance(array, np.memmap) == (name in ("plain", "ours")) and np.array_equal(array, x)
        source = fid.load_source(tmp_path / f"{name}.npz")
        pixels, rows = source.read([0, 8])
        assert source.n == 9 and rows == [0, 8]
        assert np.array_equal(pixels.permute(0, 2, 3, 1).numpy(), x[[0, 8]])


def test_warnings_of_the_score(judge, tmp_path, monkeypatch):
    """JPEG samples, unequal counts and features that are not finite pass in silence."""
    ref, jpeg, png = (write_images(tmp_path / name, n, 32) for name, n in dict(ref=12, jpeg=8, png=6).items())
    for path in jpeg.rglob("*.png"):
        Image.open(path).save(path.with_suffix(".jpg"))
        path.unlink()
    out = do("fid", "score", ref, jpeg, png, *judge)
    assert "jpeg holds JPEG files" in out and "of 6 and 8 images" in out and "png holds" not in out
    assert "pixels a side" not in out and "enlarged" not in out
    monkeypatch.setattr(Colours, "forward", lambda _, x: torch.full((len(x), 48), torch.nan))
    assert_refused(call("fid", "score", ref, png, *judge), "ref", "not finite")


def test_no_single_file_decides_the_crop(judge, tmp_path):
    """A folder is cropped to its first image; sizes that differ, or images that are enlarged, pass in
    silence; large images are taken 64 at a time."""
    folder = write_images(tmp_path / "folder", 20)
    pixels = np.stack([np.asarray(Image.open(p)) for p in sorted(folder.rglob("*.png"))])
    Image.open(folder / "a/000.png").resize((8, 8)).save(folder / "a/000.png")
    large, small = (write_npz(tmp_path / f"{n}.npz", pixels[:, :n, :n]) for n in (64, 32))

    def sizes(reference, *samples, resolution=None):
        args = dict(reference=reference, samples=list(samples), split=None, resolution=resolution, vae=None)
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            sources = fid.load_sources(SimpleNamespace(**args))
        return [s.size for s in sources], out.getvalue()

    found, out = sizes(folder, "none")
    assert found == [64] and "20 images, cropped to 64 x 64" in out
    assert "1 of 20 images" in out and "enlarged" in out
    assert sizes(folder, large)[0] == [64, 64] and sizes(large, folder)[0] == [64, 64]
    assert sizes(folder, small)[0] == [32, 32]  # the samples' own side
    assert sizes(folder, small, resolution=48)[0] == [48, 32]
    assert sizes(folder, folder, resolution=16)[0] == [16, 16]
    assert "of 32 and 64 pixels a side" in sizes(small, folder)[1]
    out = do("fid", "score", folder, large, *judge, "--json", tmp_path / "a.json")
    assert read_scores(tmp_path / "a.json")["fd"] < 1 and "cropped to 64 x 64" in out  # all but one are equal
    taken = []

    def read(rows):
        taken.append(len(rows))
        return torch.zeros(len(rows), 3, 4, 4, dtype=torch.uint8), rows

    for size in (64, 512, 1024, 3000):
        fid.measure(fid.Source("x", 65, read, size), fid.load_net(), "", torch.device("cpu"), "fp32")
    assert taken == [64, 1, 64, 1, *[16] * 4, 1, *[1] * 65]


def test_unreadable_image_is_left_out(judge, tmp_vae, tmp_path):
    """One truncated image of a reference or sample set ends the command after all the work, or counts as
    read."""
    whole = write_images(tmp_path / "whole", 128, size=16, classes=("a", "b"))
    shutil.copytree(whole, tmp_path / "cut")
    truncate(tmp_path / "cut/a/050.png")
    truncate(tmp_path / "cut/b/127.png", share=0.1)  # more than 1 % are too many
    assert_refused(call("fid", "score", tmp_path / "cut", whole, *judge), "2 of 128 images are unreadable")
    shutil.copy(whole / "b/127.png", tmp_path / "cut/b/127.png")
    pixels, labels = zip(*(data.ImageFolder(whole, 16)[i] for i in range(20, 60)))
    pixels = torch.stack(pixels).permute(0, 2, 3, 1).numpy()
    samples, found = write_npz(tmp_path / "samples.npz", 255 - pixels // 2, arr_1=np.array(labels)), {}
    for name in ("cut", "less"):
        flags = ("--vae", tmp_vae, "--cache", tmp_path / f"{name}.npz", "--json", tmp_path / "a.json", *judge)
        for _ in range(2):  # the second time from the cache
            out = do("fid", "score", tmp_path / name, samples, *flags)
            found.setdefault(name, []).append(json.loads((tmp_path / "a.json").read_text()))
        assert ("127 images, 1 unreadable" in out) == (name == "cut")
        if name == "cut":
            shutil.copytree(tmp_path / "cut", tmp_path / "less")
            (tmp_path / "less/a/050.png").unlink()
    values = []
    for r in sum(found.values(), []):
        assert r["n_reference"] == 127 and r["floor_n"] == 63
        values.append([r["floor"], *r["fd_real"].values(), *r["scores"][str(samples)].values()])
    assert values[0] == values[1] and values[2] == values[3] and len(values[0]) == 11
    assert values[0][:-4] == pytest.approx(values[2][:-4], rel=1e-3, abs=1e-3)  # the VAE's noise is a row's
    do("fid", "score", whole, tmp_path / "cut", "--json", tmp_path / "a.json", *judge)
    assert json.loads((tmp_path / "a.json").read_text())["n"] == {str(tmp_path / "cut"): 127}
    do("fid", "recon", "--vae", tmp_vae, "--data", tmp_path / "cut", "--resolution", 16, "--lpips", 0, *judge,
       "--json", tmp_path / "a.json")
    assert json.loads((tmp_path / "a.json").read_text())["n"] == 127


def test_flags_of_the_score(tmp_vae, judge, tmp_path):
    """A VAE, a cache or a size that does not belong to the sources is used; what moved is not found."""
    root, x = write_images(tmp_path / "images", 8, size=32), np.zeros((8, 32, 32, 3), np.uint8)
    a, b = (write_npz(tmp_path / f"{n}.npz", x) for n in "ab")
    np.savez(tmp_path / "stats.npz", **stats_of(network="colours"))
    score = lambda *words: call("fid", "score", *words, *judge)
    assert_refused(score(root, a, "--resolution", 31, "--vae", tmp_vae), "31 pixels", "multiple of 4")
    assert_refused(score(tmp_path / "stats.npz", a, "--vae", tmp_vae), "--vae", "stats.npz", "images")
    assert_refused(score(root, a, b, "--vae", tmp_vae), "--vae", "2 sets")
    cache = tmp_path / "cache.npz"
    assert score(root, a, "--cache", cache)[0] == 0
    assert_refused(score(root, a, "--resolution", 16, "--cache", cache), "cache.npz", "crop 32", "crop 16")
    cache.write_bytes(cache.read_bytes()[:-40])
    assert_refused(score(root, a, "--cache", cache), "cache.npz", "delete it")
    assert "8 images" in score(root, a, "--dry-run", "--json", tmp_path / "dry.json")[1]
    assert not (tmp_path / "dry.json").exists()
    assert_refused(score(root, tmp_path / "gone.npz"), "gone.npz", "sample.py")


def test_feature_net():
    """Features for the distance are not the model's pooled features, or the input's scale is off."""
    net = fid.load_net("tf_efficientnet_lite0", LITE0, 32)
    peer = timm.create_model("tf_efficientnet_lite0", num_classes=0).eval()
    state = mapper.state_in_order(timm.create_model("tf_efficientnet_lite0"), LITE0)
    peer.load_state_dict({k: v for k, v in state.items() if "classifier" not in k})
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    mean, std = (torch.tensor(peer.pretrained_cfg[k]).view(1, 3, 1, 1) for k in ("mean", "std"))
    with torch.no_grad():
        torch.testing.assert_close(net(images), peer((images / 255 - mean) / std), rtol=1e-4, atol=1e-4)
    assert net.label == "tf_efficientnet_lite0@32"
    assert (fid.count_name(50000), fid.count_name(1500)) == ("50k", "1500")


def test_vgg_features(vgg, tmp_path):
    """The judge VGG16 is not the mean of its last convolutions, or takes a file without them."""
    layers, path = vgg
    net, images = fid.load_net("vgg16", path, 64), torch.randint(0, 256, (2, 3, 40, 40), dtype=torch.uint8)
    x = F.interpolate(images / 255, (64, 64), mode="bicubic").clamp(0, 1)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    with torch.no_grad():
        expected = layers.eval()((x - mean) / std).mean((2, 3))
    torch.testing.assert_close(net(images), expected, rtol=1e-4, atol=1e-4)
    assert (net.label, net.dim) == ("vgg16-conv@64", 512)
    with pytest.raises(UserError, match="0.weight is missing"):
        fid.load_net("vgg16", LITE0, 64)
    torch.save({0: torch.zeros(3)}, tmp_path / "numbered.pt")  # as Caffe's conversions
    with pytest.raises(UserError, match="0.weight is missing"):
        fid.load_net("vgg16", tmp_path / "numbered.pt", 64)
