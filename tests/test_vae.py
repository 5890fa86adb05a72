"""Slow tests: vae."""
import errno
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from helpers import (
    HERE, PLAIN, add_to_config, assert_is_diffusers, assert_refused, call, do, ldm_state, on_ranks,
    peer_vae, tiny_vae, write_images)
from huggingface_hub import errors
from huggingface_hub.hf_api import RepoSibling

import common
import vae
from common import UserError
from extras import convert


@pytest.mark.parametrize("name", ["f8d4", "f16d32"])
def test_presets_are_diffusers(name, tmp_path):
    """The layout of SD-VAE or VA-VAE computes something else than in diffusers, or changes in the export."""
    assert_is_diffusers(tmp_path, 64, **vae.VAE_CONFIGS[name])


def test_scripts_run_from_anywhere(tmp_path):
    """A script finds extras/convert.py from the repository's folder alone, or that is no script itself."""
    peer_vae().save_pretrained(tmp_path / "peer")
    def script(name, *args):
        command = [sys.executable, HERE / name, *args]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    done = script("extras/convert.py", "to-diffusers", "--vae", "peer", "--out", "ours")
    assert done.returncode == 0 and "from_pretrained('ours')" in done.stdout, done.stderr
    done = script("vae.py", "export", "--vae", "ours", "--out", "a.safetensors")
    assert done.returncode == 0 and "MiB" in done.stdout, done.stderr


def test_foreign_vae_that_does_not_fit(tmp_path):
    """A key that is missing, renamed or misshapen is passed over, or not named with its shapes; narrow or
    other models are built wrongly."""
    path, shapes = tmp_path / "w.pt", {k: tuple(v.shape) for k, v in ldm_state().items()}

    def refused(change, *words):
        state = ldm_state()
        change(state)
        torch.save({"state_dict": state}, path)
        with pytest.raises(UserError) as e:
            vae.load_vae(path)
        assert all(w in str(e.value) for w in (str(path), *words)), e.value

    for key in ("decoder.mid.attn_1.q.weight", "encoder.conv_in.weight", "encoder.down.1.block.0.conv1.bias"):
        refused(lambda s, key=key: s.pop(key), f"{key} is missing, expected {shapes[key]}")
    for key in ("quant_conv.weight", "encoder.down.1.block.0.conv2.weight"):
        refused(lambda s, key=key: s.update({key: torch.zeros(7, 5, 3, 3)}),
                f"{key} is (7, 5, 3, 3), expected {shapes[key]}")
    refused(lambda s: s.update({"encoder.conv_extra.bias": s.pop("encoder.conv_out.bias")}),
            "encoder.conv_out.bias is missing", "(6,)", "2 such")
    refused(lambda s: s.clear(), "not a VAE")
    refused(lambda s: s.update({k: v[:64] for k, v in s.items() if k.startswith("encoder.")}), "128 or more")
    torch.save(ldm_state(), path)
    convert.export_diffusers(vae.load_vae(path), tmp_path / "d")
    config = json.loads((tmp_path / "d/config.json").read_text())
    for key, value in (("act_fn", "gelu"), ("norm_num_groups", 16), ("_class_name", "VQModel")):
        (tmp_path / "d/config.json").write_text(json.dumps({**config, key: value}))
        with pytest.raises(UserError, match=f"{key} is {value}, expected"):
            vae.load_vae(tmp_path / "d")
    (tmp_path / "d/config.json").write_text("{")
    with pytest.raises(UserError, match="not a configuration of diffusers"):
        vae.load_vae(tmp_path / "d")
    (tmp_path / "d/config.json").unlink()
    with pytest.raises(UserError, match="holds no VAE"):
        vae.load_vae(tmp_path / "d")
    with pytest.raises(UserError, match="128 or more"):
        convert.export_diffusers(tiny_vae(), tmp_path / "x")


def test_weights_by_name(hub):
    """A name on the hub is another file than it says, an existing path is taken for a name, or the statistics
    of latents in a configuration are lost."""
    folder = hub("org/f2-hf")
    peer_vae().save_pretrained(folder)
    shutil.copytree(folder, hub("org/pipeline", "unet.bin") / "vae")
    add_to_config(folder, latents_mean=[1, 2, 3], latents_std=[4, 5, 6])
    one, two = vae.load_vae("org/f2-hf"), vae.load_vae("org/pipeline")
    assert all(map(torch.equal, one.state_dict().values(), two.state_dict().values()))
    assert [v.tolist() for v in one.latent_stats] == [[1, 2, 3], [4, 5, 6]] and two.latent_stats is None

    names = "a.pt", "a-discriminator-ckpt.pt", "a-latents-stats.pt"
    hub("org/sd3.5-vae", *names)
    for file, found in (("", names[0]), (f":{names[1]}", names[1])):
        assert common.local_path(f"org/sd3.5-vae{file}").name == found
    do("vae", "export", "--vae", "org/sd3.5-vae:a.pt", "--out", "a.safetensors")
    do("extras.convert", "to-diffusers", "--vae", "org/sd3.5-vae", "--out", "org/f2-hf")
    assert common.weights_hash(vae.load_vae("org/f2-hf").state_dict()) == common.weights_hash(ldm_state())
    assert "Converted from `org/sd3.5-vae`" in Path("org/f2-hf/README.md").read_text()


def test_one_process_downloads(hub, tmp_path, monkeypatch):
    """Each process downloads a VAE of the hub for itself, or a repository's files are not asked for."""
    def files(_):
        return SimpleNamespace(siblings=[RepoSibling(rfilename=name) for name in ("README.md", "a.pt")])

    def download(_, name):
        found = tmp_path / name
        if not found.exists():
            time.sleep(1)
            torch.save(ldm_state(), found)
            (tmp_path / f"downloaded by {common.dist.get_rank()}").touch()
        return str(found)

    monkeypatch.setattr(huggingface_hub, "model_info", files)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    images = write_images(tmp_path / "images", 4)
    flags = "--vae", "org/f2", "--data", images, "--resolution", 16, "--out", tmp_path / "latents"
    ranks = on_ranks("vae", *flags, folder=tmp_path)
    assert [status for status, *_ in ranks] == [0, 0], ranks
    assert [path.name for path in tmp_path.glob("downloaded*")] == ["downloaded by 0"]


def test_model_card(tmp_path):
    """The card of a published VAE lacks its data, command or scores, shows those of other weights, or this
    machine's folders."""
    images, out = write_images(tmp_path / "images", 4), tmp_path / "out"
    peer_vae().save_pretrained(tmp_path / "peer")
    do("train_vae", "--data", images, "--init", tmp_path / "peer", "--resolution", 32, "--batch", 2,
       "--steps", 1, "--align", "none", "--lpips", 0, "--gan", 0, "--out", out)
    do("fid", "recon", "--vae", out / "vae.pt", "--data", images, "--net", "none", "--lpips", 0,
       "--json", out / "recon.json")

    def card(name):
        do("extras.convert", "to-diffusers", "--vae", out / "vae.pt", "--out", tmp_path / name)
        return (tmp_path / name / "README.md").read_text()

    scores, found = json.loads((out / "recon.json").read_text()), card("one")
    for words in ("32 x 32 pixels", "latents of 3 x\n16 x 16,", "on `images`, 1 steps", " --data images ",
                  f"Scores: PSNR {scores['psnr']:.4g}, SSIM {scores['ssim']:.4g} over 4 images of `images`."):
        assert words in found, found
    assert str(tmp_path) not in found
    (out / "recon.json").write_text(json.dumps(scores | dict(inputs=dict(vae="of others"))))
    assert "Scores: not measured." in card("two")


NO_NETWORK = "put a.pt of https://huggingface.co/org/f2/tree/main anywhere and give that path; or copy "
ANSWER = dict(response=SimpleNamespace(headers={}, request=None))


@pytest.mark.parametrize("error,words", [
    (errors.RepositoryNotFoundError("?", **ANSWER), "no repository https://huggingface.co/org/f2 "),
    (errors.GatedRepoError("?", **ANSWER), "accept the terms on https://huggingface.co/org/f2, then"),
    (errors.EntryNotFoundError("?"), "no such file; https://huggingface.co/org/f2/tree/main"),
    (errors.LocalEntryNotFoundError("?"), NO_NETWORK), (None, NO_NETWORK),
    (errors.HfHubHTTPError.__bases__[0]("?"), NO_NETWORK),  # what its client raises
    (PermissionError(errno.EACCES, "Permission denied"), "(Permission denied); name another folder")])
def test_what_the_hub_refuses(error, words, hub, monkeypatch):
    """A name that the hub does not know or give, no network, or a cache that cannot be written, ends in a
    traceback or a page of huggingface's."""
    def refuse(*_):
        raise error

    if error:
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    write_images(Path("images"), 4)
    flags = "--data", "images", "--out", "o"
    train = "train_vae", *flags, *PLAIN, "--lpips", 0
    for command in ((*train, "--init"), (*train, "--preset", "demo", "--gan", 1, "--disc-ckpt"),
                    ("vae", *flags, "--vae"), ("sample", "--out", "a.npz", "--sit")):
        assert_refused(call(*command, "org/f2:a.pt"), "org/f2:a.pt: ", words)


def test_repositories_without_a_vae(hub):
    """A repository without weights, with several, of another network, or with statistics of other latents is
    loaded, or does not say what it holds."""
    hub("org/text", "README.md")
    hub("org/many", "a.pt", "b.ckpt")
    for name, config in (("wan", dict(_class_name="AutoencoderKLWan")), ("stats", dict(latents_mean=[1, 2])),
                         ("torn", dict(latents_mean={"a": 1}))):
        folder = hub(f"org/{name}", "diffusion_pytorch_model.bin")
        (folder / "config.json").write_text(json.dumps(dict(latents_std=[1, 2]) | config))
    for name, words in dict(
            text="org/text: holds no weights", many="org/many: holds a.pt, b.ckpt; expected a VAE",
            none="of diffusers: config.json and diffusion_pytorch_model.safetensors", wan="KLWan, expected",
            stats="shapes ((2,), (2,)); expected 3", torn="not a configuration of diffusers").items():
        assert_refused(call("vae", "--vae", f"org/{name}", "--data", "x", "--out", "y"), words)
