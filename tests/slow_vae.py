from helpers import *  # noqa: F403


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
