from helpers import *  # noqa: F403


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
