"""Slow tests: vae."""
import json
import subprocess
import sys

import pytest
import torch
from helpers import (
    HERE, assert_is_diffusers, ldm_state, peer_vae, tiny_vae)

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
