from helpers import *  # noqa: F403
from extras import convert

# ------------------------------------------------------------------------------------------------------------
# vae.py and extras/convert.py: autoencoders

PRESETS = {"f8d4": (4, 32), "f16d16": (16, 16), "f16d32": (32, 16), "f16d64": (64, 16), "f4d16": (16, 8),
           "f4d32": (32, 8), "demo": (4, 16)}
SMALL = dict(z_channels=3, ch=128, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(128,), resolution=256)


@pytest.mark.parametrize("name,channels,side", [(k, *v) for k, v in PRESETS.items()])
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
    for key, shape in {"encoder.conv_in.weight": (128, 3, 3, 3), "encoder.conv_out.weight": (8, 512, 3, 3),
                       "encoder.down.1.block.0.nin_shortcut.weight": (256, 128, 1, 1),
                       "encoder.down.2.downsample.conv.weight": (512, 512, 3, 3),
                       "decoder.up.0.block.0.nin_shortcut.weight": (128, 256, 1, 1),
                       "decoder.up.3.block.2.conv2.bias": (512,), "decoder.norm_out.weight": (128,),
                       "decoder.mid.attn_1.proj_out.weight": (512, 512, 1, 1),
                       "quant_conv.weight": (8, 8, 1, 1), "post_quant_conv.bias": (4,)}.items():
        assert shapes[key] == shape, key
    assert not any(".attn.0" in k or "down.3.downsample" in k for k in shapes)
    assert {"encoder.down.4.attn.1.q.weight", "decoder.up.4.attn.2.norm.bias"} <= set(f16.state_dict())


def test_vae_layers_are_ldms():
    """Public weights would load but compute something else: padding, attention or group count differ."""
    down = vae.Downsample(1)
    nn.init.ones_(down.conv.weight), nn.init.zeros_(down.conv.bias)
    assert down(torch.ones(1, 1, 4, 4)).flatten().tolist() == [9, 6, 6, 4]  # padded right and bottom only
    m, x = vae.AttnBlock(32).eval(), torch.randn(2, 32, 3, 5)
    h = F.group_norm(x, m.norm.num_groups, m.norm.weight, m.norm.bias, eps=1e-6)
    q, k, v = (f(h).flatten(2) for f in (m.q, m.k, m.v))
    w = torch.softmax(torch.einsum("bci,bcj->bij", q, k) / 32 ** 0.5, -1)
    expected = x + m.proj_out(torch.einsum("bcj,bij->bci", v, w).view_as(x))
    torch.testing.assert_close(m(x), expected)
    assert vae.GroupNorm(128).num_groups == vae.GroupNorm(512).num_groups == 32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_group_norm(dtype):
    """Group norm on the CPU or its backward is not PyTorch's: with a mean far from zero, in either layout."""
    torch.manual_seed(0)
    norm = vae.GroupNorm(64)
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    far, tolerance = (30, 2e-6) if dtype == torch.float32 else (1, 1e-2)
    x, g = torch.randn(3, 64, 8, 6) * (1 + torch.rand(1, 64, 1, 1)) + far, torch.randn(3, 64, 8, 6)
    exact = [v.detach().double().requires_grad_() for v in (x, norm.weight, norm.bias)]
    y = F.group_norm(exact[0], norm.num_groups, *exact[1:], norm.eps)
    expected = [y.detach(), *torch.autograd.grad(y, exact, g.double())]
    for layout in (torch.contiguous_format, torch.channels_last):
        leaf, dy = (v.to(dtype).contiguous(memory_format=layout) for v in (x, g))
        y = norm(leaf.requires_grad_())
        found = [y.detach(), *torch.autograd.grad(y, (leaf, norm.weight, norm.bias), dy)]
        for a, b in zip(found, expected, strict=True):
            assert (a.double() - b).norm() / b.norm() < tolerance
    with pytest.raises(RuntimeError, match="once_differentiable"):  # rather than a wrong second derivative
        leaf = x.clone().requires_grad_()
        torch.autograd.grad((norm(leaf) * leaf).square().sum(), leaf, create_graph=True)[0].sum().backward()


def peer_vae(**config):
    """diffusers' AutoencoderKL with random weights, in the layout of a configuration of ours."""
    torch.manual_seed(0)
    c = SMALL | config
    sides = [c["resolution"] // 2 ** i for i in range(len(c["ch_mult"]))]
    kinds = ["Attn" if side in c["attn_resolutions"] else "" for side in sides]
    return diffusers.AutoencoderKL(
        latent_channels=c["z_channels"], block_out_channels=[c["ch"] * m for m in c["ch_mult"]],
        layers_per_block=c["num_res_blocks"], down_block_types=[f"{k}DownEncoderBlock2D" for k in kinds],
        up_block_types=[f"{k}UpDecoderBlock2D" for k in kinds[::-1]]).eval()


def assert_is_diffusers(folder, size, **config):
    """Weights of diffusers compute the same here, and are written back as they were."""
    peer = peer_vae(**config)
    peer.save_pretrained(folder / "peer")
    ours, x = vae.load_vae(folder / "peer"), torch.rand(2, 3, size, size) * 2 - 1
    assert ours.config == vae.AutoencoderKL(**config).config
    do("extras.convert", "to-diffusers", "--vae", folder / "peer", "--out", folder / "ours")
    back = diffusers.AutoencoderKL.from_pretrained(folder / "ours").eval()
    with torch.no_grad():
        q, p = ours.encode(x), peer.encode(x).latent_dist
        torch.testing.assert_close(q.mean, p.mean, rtol=0, atol=1e-4)
        torch.testing.assert_close(q.std, p.std, rtol=0, atol=1e-4)
        torch.testing.assert_close(ours.decode(p.mean), peer.decode(p.mean).sample, rtol=0, atol=1e-4)
        assert torch.equal(back.decode(p.mean).sample, peer.decode(p.mean).sample)


def test_vae_is_diffusers(tmp_path):
    """Public weights compute other moments or images than in diffusers, or the export is another model."""
    config = SMALL | dict(ch_mult=(1, 2, 2), num_res_blocks=2, attn_resolutions=(64,))
    assert_is_diffusers(tmp_path, 32, **config)
    again = call("extras.convert", "to-diffusers", "--vae", tmp_path / "peer", "--out", tmp_path / "ours")
    assert_refused(again, "holds a config.json already")
    moved = call("vae", "export-diffusers", "--vae", "a.pt", "--out", "b")
    assert_refused(moved, "python extras/convert.py to-diffusers --vae a.pt --out b")


LDM = {}


def ldm_state():
    """The small autoencoder's weights under LDM's names."""
    if not LDM:
        torch.manual_seed(0)
        model = vae.AutoencoderKL(**SMALL)
        LDM.update({k: torch.randn_like(v) * 0.05 for k, v in model.state_dict().items()})
    return dict(LDM)


def with_lightning(state, monkeypatch):
    """An LDM .ckpt: beside the weights, a class of a package that is not installed here."""
    package = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    package.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": package.__name__})
    settings = argparse.Namespace(out=Path("logs"), lr=np.float64(0.1))
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks", package.__name__):
        monkeypatch.setitem(sys.modules, name, package)
    one = package.ModelCheckpoint()
    one.best = 0.5
    return {"epoch": 3, "callbacks": {package.ModelCheckpoint: one, "by object": {one: 1}},
            "hyper_parameters": settings, "state_dict": state}


KINDS = "ldm", "sd", "vavae", "repae", "joint", "safetensors", "diffusers", "diffusers bin", "ours"


@pytest.mark.parametrize("kind", KINDS)
def test_vae_formats(kind, tmp_path, monkeypatch):
    """A published format does not load, or loads other weights."""
    state, path = ldm_state(), tmp_path / ("w.safetensors" if kind == "safetensors" else "w.pt")
    extra = {"loss.logvar": torch.zeros(()), "loss.discriminator.main.0.weight": torch.zeros(4, 3, 4, 4)}
    vfm = {"foundation_model.cls_token": torch.zeros(1, 1, 4), "linear_proj.weight": torch.zeros(4, 3, 1, 1)}
    if kind == "safetensors":
        safetensors.torch.save_file(state, path)
    elif kind.startswith("diffusers"):
        torch.save(state, path)
        path = tmp_path / "pipeline"
        convert.export_diffusers(vae.load_vae(tmp_path / "w.pt"), path / "vae")
        if kind == "diffusers bin":  # as they were saved before safetensors, with the attention's older names
            theirs = safetensors.torch.load_file(path / "vae/diffusion_pytorch_model.safetensors")
            older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
            for new, old in older.items():
                theirs = {k.replace(new, old): v for k, v in theirs.items()}
            torch.save(theirs, path / "vae/diffusion_pytorch_model.bin")
            os.remove(path / "vae/diffusion_pytorch_model.safetensors")
    else:
        inside = {f"first_stage_model.{k}": v for k, v in state.items()}
        files = {"ldm": with_lightning({**state, **extra}, monkeypatch), "repae": state,
                 "sd": {"state_dict": {**inside, "model.diffusion_model.a": torch.zeros(2)}},
                 "vavae": {"state_dict": {**state, **extra, **vfm}},
                 "ours": dict(config=SMALL, vae={}, ema=state),
                 "joint": dict(ema={"bn.mean": torch.zeros(3)}, vae=state, args=argparse.Namespace(lr=1))}
        torch.save(files[kind], path)
        monkeypatch.undo()
    loaded = vae.load_vae(path)
    assert common.weights_hash(loaded.state_dict()) == common.weights_hash(state) and loaded.config == SMALL
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())


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
    (tmp_path / "d/config.json").unlink()
    with pytest.raises(UserError, match="holds no VAE"):
        vae.load_vae(tmp_path / "d")
    with pytest.raises(UserError, match="128 or more"):
        convert.export_diffusers(tiny_vae(), tmp_path / "x")


def test_a_pickle_never_runs(tmp_path):
    """Loading a checkpoint runs the code that it carries."""
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"state_dict": {}, "callbacks": Evil()}, tmp_path / "evil.ckpt")
    for load in (vae.load_vae, sit.load_sit):
        with pytest.raises(ValueError, match="evil.ckpt: not a readable checkpoint.*mkdir"):
            load(tmp_path / "evil.ckpt")
    assert not (tmp_path / "ran").exists()


def test_one_step_is_diffusers(tmp_path):
    """One optimiser step of train_vae.py moves the weights elsewhere than on diffusers' model."""
    peer, images = peer_vae(), data.ImageFolder(write_images(tmp_path / "images", 4, size=32), 32)
    peer.save_pretrained(tmp_path / "peer")
    do("train_vae", "--data", tmp_path / "images", "--init", tmp_path / "peer", "--resolution", 32,
       "--batch", 4, "--flip", 0, "--align", "none", "--lpips", 0, "--gan", 0, "--kl", 1e-3, "--lr", 1e-4,
       "--steps", 1, "--log-every", 1, "--precision", "fp32", "--out", tmp_path / "out")
    x = data.to_float(torch.stack([images[row][0] for row in data.sample_order(4, 0, range(4))]))
    eps = data.draw_noise(0, range(4), 1, (3, 16, 16))[1]
    optimizer = torch.optim.AdamW(peer.parameters(), 1e-4, weight_decay=0)
    posterior = peer.encode(x).latent_dist
    x_rec = peer.decode(posterior.mean + posterior.std * eps).sample
    loss = F.l1_loss(x_rec, x) + 1e-3 * posterior.kl().mean()
    loss.backward()
    nn.utils.clip_grad_norm_(peer.parameters(), 1.0)
    gradients = {k: p.grad.clone() for k, p in peer.named_parameters()}
    optimizer.step()
    (logged,) = metrics(tmp_path / "out")[1]
    assert logged["rec"] + 1e-3 * logged["kl"] == pytest.approx(loss.item(), rel=1e-5)
    moved = common.load_checkpoint(tmp_path / "out/vae.pt")["vae"]
    moved = {convert.diffusers_name(k, 2): v for k, v in moved.items()}
    for k, p in peer.named_parameters():
        sure = gradients[k].abs() > 1e-6  # Adam's first step is lr * sign(g): of rounding alone where g is 0
        torch.testing.assert_close(moved[k].view_as(p)[sure], p.detach()[sure], rtol=0, atol=1e-5)


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


def test_vae_sees_whole_images_one_by_one():
    """An image that the factor does not divide is cut silently, or a latent depends on its neighbours."""
    model, x = tiny_vae().eval(), torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model.encode(x).mean[2:3], model.encode(x[2:3]).mean, rtol=1e-5, atol=1e-6)
        with pytest.raises(ValueError, match="multiple of 4"):
            model.encode(torch.zeros(1, 3, 32, 34))
