"""Checkpoints of other projects: what vae.load_vae and sit.load_sit call for a file that is not ours,
and common.local_path() for a name on the hub.

    python extras/convert.py to-diffusers --vae out/send/vae.pt --out folder

VAEs: LDM and Stable Diffusion .ckpt, LightningDiT (VA-VAE) .pt, REPA-E .pt (alone or joint), and diffusers'
AutoencoderKL (folder, pipeline or weights file). SiTs: REPA, REPA-E and SiT. The loaded network computes what
the release computes; nothing is scaled.
"""
import argparse
import errno
import json
import math
import re
import statistics
import sys
from pathlib import Path

import safetensors.torch
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common  # noqa: E402
from common import UserError  # noqa: E402
from sit import SIZES, sincos_2d  # noqa: E402

# ------------------------------------------------------------------------------------------------------------
# Weights by name: what common.local_path() calls for a repository of huggingface's hub


def download(text, repo, file):
    """What local_path() says of a hub id, `text`: repository, file or ""."""
    import huggingface_hub as hub  # here, since it takes a second
    from huggingface_hub import constants, errors
    no_answer = OSError, errors.HfHubHTTPError.__bases__[0]  # httpx's errors are no OSErrors
    cache = Path(constants.HF_HUB_CACHE, f"models--{repo.replace('/', '--')}")
    try:
        with common.rank_zero_first():
            names = [file] if file else choose_weights(hub_files(hub, cache, no_answer, repo))
            paths = [Path(hub.hf_hub_download(repo, name)) for name in names]
    except UserError as e:
        raise UserError(f"{text}: {e}") from None
    except (*no_answer, ValueError, errors.EntryNotFoundError) as e:
        raise UserError(f"{text}: {explain_hub(e, errors, cache, repo, file)}") from None
    return paths[0] if len(paths) == 1 else paths[0].parent


def hub_files(hub, cache, no_answer, repo):
    """Names of a repository's files; where the hub gives no answer, of those that its cache has."""
    try:
        return [file.rfilename for file in hub.model_info(repo).siblings]
    except no_answer:
        cached = [path for path in cache.glob("snapshots/*/**/*") if path.is_file()]
        if not cached:
            raise
        return ["/".join(path.relative_to(cache).parts[2:]) for path in cached]


def choose_weights(names):
    """What is loaded of a repository: [configuration, weights] of diffusers' VAE, else [its one checkpoint,
    beside REPA-E's statistics and discriminator]. Raises UserError where there is none, or are several."""
    for folder in ("", "vae/"):
        pattern = rf"{folder}diffusion_pytorch_model(\.\w+)?\.(safetensors|bin)"
        own = [name for name in names if re.fullmatch(pattern, name)]
        if own and f"{folder}config.json" in names:  # variants, as fp16, come last
            return [f"{folder}config.json", min(own, key=lambda n: (n.count("."), n.endswith(".bin")))]
    weights = sorted({name for name in names if name.endswith(common.WEIGHTS)})
    found = [name for name in weights if not re.search("stats|discriminator", name)]
    if len(found) != 1:
        raise UserError(f"holds {', '.join(weights[:20]) or 'no weights'}; expected a VAE of diffusers or a "
                        "single checkpoint; ORG/NAME:FILE chooses one")
    return found


def explain_hub(error, errors, cache, repo, file):
    """What to do about an error of huggingface_hub."""
    page = f"https://huggingface.co/{repo}"
    if isinstance(error, errors.GatedRepoError):
        return f"needs a login; accept the terms on {page}, then run: hf auth login"
    if isinstance(error, (errors.RepositoryNotFoundError, errors.HFValidationError)):
        return f"no such path, and no repository {page} (or a private one: hf auth login)"
    if isinstance(error, errors.EntryNotFoundError) and not isinstance(error, errors.LocalEntryNotFoundError):
        return f"no such file; {page}/tree/main lists them"
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EDQUOT):
        return f"{cache} cannot be written ({error.strerror}); name another folder with HF_HOME"
    files = file or "the checkpoint (of diffusers: config.json and diffusion_pytorch_model.safetensors)"
    return (f"no such path, and the hub gives no answer ({common.brief(error, 80)}); put {files} of "
            f"{page}/tree/main anywhere and give that path; or copy {cache} from where 'hf download {repo}' "
            "ran")


# ------------------------------------------------------------------------------------------------------------
# Autoencoders: names and layout of latent diffusion's release, which are ours, and those of diffusers

# Parts of parameter names, ours and diffusers', replaced in this order
NAMES = (
    ("mid.block_1.", "mid_block.resnets.0."), ("mid.block_2.", "mid_block.resnets.1."),
    ("mid.attn_1.", "mid_block.attentions.0."), ("norm_out.", "conv_norm_out."), ("down.", "down_blocks."),
    ("decoder.up.", "decoder.up_blocks."), (".block.", ".resnets."), (".attn.", ".attentions."),
    (".downsample.", ".downsamplers.0."), (".upsample.", ".upsamplers.0."),
    ("nin_shortcut.", "conv_shortcut."),
    (".norm.", ".group_norm."), (".q.", ".to_q."), (".k.", ".to_k."), (".v.", ".to_v."),
    (".proj_out.", ".to_out.0."))
# The attention's names before diffusers 0.17
OLD_NAMES = ((".q.", ".query."), (".k.", ".key."), (".v.", ".value."), (".proj_out.", ".proj_attn."))


def rename(name, pairs):
    for old, new in pairs:
        name = name.replace(old, new)
    return name


def levels_reversed(name, levels):
    """diffusers counts the decoder's levels from the latent up, LDM from the image down."""
    return re.sub(r"(decoder\.up(?:_blocks)?\.)(\d+)", lambda m: f"{m[1]}{levels - 1 - int(m[2])}", name)


def diffusers_name(name, levels):
    """Our (LDM's) parameter name -> that of diffusers' AutoencoderKL with as many levels."""
    return levels_reversed(rename(name, NAMES), levels)


def read_vae(path, checkpoint):
    """A file's content, or (checkpoint None) a diffusers folder -> (constructor's arguments of AutoencoderKL,
    state dict under our names, mean and std (c,) of its latents or None). Raises UserError for what is no
    autoencoder of latent diffusion."""
    checkpoint, stats = (checkpoint, []) if checkpoint is not None else read_diffusers(path)
    state = bare_weights(checkpoint)
    is_diffusers = any("_blocks." in k for k in state)
    to_ours = [(theirs, ours) for ours, theirs in (*NAMES, *OLD_NAMES)]
    state = {rename(k, to_ours): v for k, v in state.items()}
    config = infer_config(state, path)
    if is_diffusers:
        state = {levels_reversed(k, len(config["ch_mult"])): v for k, v in state.items()}
    return config, state, check_stats(*stats, config["z_channels"], path) if len(stats) == 2 else None


def read_diffusers(folder):
    """A folder of diffusers' AutoencoderKL, or of a pipeline that has one -> its weights, [latents_mean,
    latents_std] as far as it says them. Raises UserError for one whose configuration says something else than
    latent diffusion's."""
    folder = folder / "vae" if (folder / "vae").is_dir() else folder
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: holds no VAE; expected a checkpoint file, or a folder of diffusers")
    try:
        config = dict(json.loads((folder / "config.json").read_text("utf-8")))
        stats = [torch.tensor(config[k]).float() for k in ("latents_mean", "latents_std") if config.get(k)]
    except (ValueError, TypeError, RuntimeError, RecursionError) as e:
        raise UserError(f"{folder / 'config.json'}: not a configuration of diffusers ({common.brief(e)}); "
                        "copy the folder again") from None
    for key, value in (("_class_name", "AutoencoderKL"), ("act_fn", "silu"), ("norm_num_groups", 32)):
        if config.get(key, value) != value:  # the weights would not show it
            raise UserError(f"{folder / 'config.json'}: {key} is {config[key]}, expected {value}")
    suffixes = ("safetensors", "bin", "*.safetensors", "*.bin")  # *: variants, as fp16
    found = [p for s in suffixes for p in sorted(folder.glob(f"diffusion_pytorch_model.{s}"))]
    return common.load_checkpoint((found or [folder / "diffusion_pytorch_model.safetensors"])[0]), stats


def bare_weights(state):
    """The autoencoder's tensors alone, out of what projects wrap around them; linear layers as 1 x 1
    convolutions."""
    for wrapper in ("state_dict", "vae"):  # LDM and LightningDiT; REPA-E's joint checkpoints
        state = state[wrapper] if isinstance(state, dict) and isinstance(state.get(wrapper), dict) else state
    items = state.items() if isinstance(state, dict) else ()
    state = {k: v for k, v in items if isinstance(k, str) and isinstance(v, torch.Tensor)}
    first_stage = "first_stage_model."
    if any(k.startswith(first_stage) for k in state):  # a whole Stable Diffusion checkpoint
        state = {k.removeprefix(first_stage): v for k, v in state.items() if k.startswith(first_stage)}
    # losses with their discriminator, LDM's running average, VA-VAE's VFM and its projection
    others = ("loss.", "model_ema.", "foundation_model.", "linear_proj.")
    state = {k: v for k, v in state.items() if not k.startswith(others)}
    return {k: v[:, :, None, None] if v.ndim == 2 else v for k, v in state.items()}


def infer_config(state, path):
    """Constructor's arguments, at 256 pixels, from the shapes of a state dict under our names. Each size is
    what most of its tensors say, so that one missing or misshapen tensor is refused by its own name when the
    weights are loaded. Raises UserError for widths whose 32 groups (LDM's) are not those of vae.GroupNorm."""
    def size(pattern):
        sizes = [len(v) for k, v in state.items() if v.ndim and re.fullmatch(pattern, k)]
        if not sizes:
            raise UserError(f"{path}: not a VAE (layers of an encoder are missing); expected a checkpoint of "
                            "train_vae.py, LDM, LightningDiT, REPA-E or diffusers")
        return statistics.mode(sizes)

    found = [re.match(r"encoder\.down\.(\d+)\.(block|attn)\.(\d+)", k) for k in state]
    found = {(m[2], int(m[1]), int(m[3])) for m in found if m}
    levels = 1 + max((level for _, level, _ in found), default=0)
    blocks = 1 + max((i for kind, _, i in found if kind == "block"), default=0)
    attended = sorted({level for kind, level, _ in found if kind == "attn"})
    layers = r"block\.\d+\.(norm2|conv1|conv2)\.(weight|bias)"
    widths = [size(rf"encoder\.down\.{i}\.{layers}") for i in range(levels)]
    ch = size(r"encoder\.(conv_in|down\.0\.block\.0\.norm1)\.(weight|bias)")
    if ch < 128 or any(w % ch for w in widths):
        raise UserError(f"{path}: widths {widths}: expected multiples of the first, and that 128 or more")
    return dict(z_channels=size(r"(encoder\.conv_out|quant_conv)\.(weight|bias)") // 2, ch=ch,
                ch_mult=[w // ch for w in widths], num_res_blocks=blocks, resolution=256,
                attn_resolutions=[256 // 2 ** level for level in attended])


def export_diffusers(vae, folder, card=""):
    """Write a folder that diffusers' AutoencoderKL.from_pretrained opens, with a model card. Raises UserError
    for a model that it cannot express."""
    c, levels = vae.config, len(vae.encoder.down)
    if c["ch"] < 128:
        raise UserError(f"--vae: first width {c['ch']}; diffusers' 32 groups need 128 or more")
    if (Path(folder) / "config.json").exists():
        raise UserError(f"{folder} holds a config.json already; choose another --out")
    kinds = ["Attn" if len(m.attn) else "" for m in vae.encoder.down]
    config = dict(_class_name="AutoencoderKL", in_channels=3, out_channels=3, act_fn="silu",
                  norm_num_groups=32, scaling_factor=1.0,
                  down_block_types=[f"{k}DownEncoderBlock2D" for k in kinds],
                  up_block_types=[f"{k}UpDecoderBlock2D" for k in kinds[::-1]],
                  block_out_channels=[c["ch"] * m for m in c["ch_mult"]],
                  layers_per_block=c["num_res_blocks"], latent_channels=c["z_channels"],
                  sample_size=c["resolution"])
    linear = re.compile(r".*attn.*\.(q|k|v|proj_out)\.weight")  # 1 x 1 convolutions here
    state = {diffusers_name(k, levels): (v[:, :, 0, 0] if linear.fullmatch(k) else v).contiguous()
             for k, v in vae.state_dict().items()}
    folder = common.open_out(folder, need_bytes=4 * sum(v.numel() for v in state.values()))
    safetensors.torch.save_file(state, folder / "diffusion_pytorch_model.safetensors")
    common.write_text(folder / "config.json", json.dumps(config, indent=1) + "\n")
    if card:
        common.write_text(folder / "README.md", card)
    common.write_json(folder / "made.json", dict(vae_hash=common.weights_hash(vae.state_dict())))


def model_card(vae, source):
    """README.md of an export: what it is, how `source` was made, and what `fid.py recon` found, where the
    recon.json beside `source` is of these weights."""
    d, side, f = vae.config["z_channels"], vae.config["resolution"], vae.factor
    path = common.local_path(source)
    checkpoint = common.load_checkpoint(path) if path.suffix == ".pt" else {}
    made, scores = f"Converted from `{source}`.", "not measured"
    if "made" in checkpoint:  # of train_vae.py
        made = (f"Trained on `{Path(checkpoint['args']['data']).name}`, {checkpoint['step']} steps, at "
                f"commit {checkpoint['made']['commit']}:\n\n    python {checkpoint['made']['command']}")
    recon = path.parent / "recon.json"
    recon = common.read_json(recon) if recon.exists() else {}
    if recon.get("inputs", {}).get("vae") == common.weights_hash(vae.state_dict()):
        names = dict(psnr="PSNR", ssim="SSIM", lpips="LPIPS", fd=recon.get("metric"))
        scores = ", ".join(f"{names[k]} {recon[k]:.4g}" for k in names if k in recon)
        scores += f" over {recon['n']} images of `{Path(recon['data']).name}`"
    return common.without_folders(f"""---
library_name: diffusers
tags: [vae, send-vae]
---
# VAE f{f}d{d}

For `diffusers.AutoencoderKL.from_pretrained`: images of {side} x {side} pixels in [-1, 1] -> latents of {d} x
{side // f} x {side // f}, not normalised. By a reproduction of Send-VAE (arXiv 2601.05823).

{made}

Scores: {scores}.
""")


# ------------------------------------------------------------------------------------------------------------
# SiT


def read_sit(file, path, weights):
    """The content of a file of REPA, REPA-E or SiT -> the entries of our checkpoints. Raises LookupError or
    ValueError when it is none."""
    state = file.get(weights, file)  # SiT publishes the averaged weights bare
    state = {k.removeprefix("module."): v.float() for k, v in state.items()}
    hidden, channels, patch, _ = state["x_embedder.proj.weight"].shape
    learn_sigma = len(state["final_layer.linear.weight"]) == 2 * channels * patch * patch  # SiT's release
    path_type = check_path(vars(file.get("args", argparse.Namespace())), learn_sigma)
    depth = 1 + max(int(k.split(".")[1]) for k in state if k.startswith("blocks."))
    heads = {(s["depth"], s["hidden_size"]): s["num_heads"] for s in SIZES.values()}.get((depth, hidden))
    if heads is None:
        raise ValueError(f"depth {depth} and width {hidden} are those of no SiT-S, B, L or XL")
    positions = state.pop("pos_embed")  # a constant, which sit.py computes
    grid = math.isqrt(positions.shape[1])
    expected = sincos_2d(hidden, grid).unsqueeze(0)
    if positions.shape != expected.shape or not torch.allclose(positions, expected, atol=1e-4):
        raise ValueError(f"pos_embed {tuple(positions.shape)} is not the fixed sine-cosine table")
    if learn_sigma:
        state = reverse_time(without_sigma(state, patch, channels))
    last = state.get("projectors.0.4.weight")  # of REPA
    z_dim, projector_dim = (0, 2048) if last is None else last.shape
    bn = [state.pop(f"bn.{k}", None) for k in ("running_mean", "running_var", "num_batches_tracked")]
    mean, var = bn[:2]  # REPA-E: of the latents
    known = mean is not None and bool((var != 1).any() or (mean != 0).any())  # else nothing was ever averaged
    config = dict(input_size=grid * patch, in_channels=channels, depth=depth, hidden_size=hidden,
                  patch_size=patch, num_heads=heads,
                  num_classes=len(state["y_embedder.embedding_table.weight"]) - 1,
                  qk_norm="blocks.0.attn.q_norm.weight" in state, z_dim=z_dim, projector_dim=projector_dim)
    joint = isinstance(file.get("vae"), dict)  # a joint checkpoint of REPA-E holds its VAE
    return {weights: state, "config": config, "step": file.get("steps"), "path": path_type, "vae_hash": None,
            "vae": str(path) if joint else None, "latent_mean": mean if known else None,
            "latent_std": var.sqrt() if known else None}


def check_path(settings, learn_sigma):
    """The path that a release was trained on. Raises ValueError unless the model predicts the velocity on a
    known one."""
    path = str(settings.get("path_type", "linear")).lower()
    prediction = str(settings.get("prediction", "v")).lower()
    known = ("linear",) if learn_sigma else ("linear", "cosine")
    if prediction not in ("v", "velocity") or path not in known:
        raise ValueError(f"prediction {prediction} on the {path} path; expected the velocity, on a linear or "
                         "(REPA) cosine path")
    return path


LAST = ("final_layer.linear.weight", "final_layer.linear.bias")


def without_sigma(state, patch, channels):
    """The last layer without the second half of its channels, which learn_sigma adds and SiT never uses."""
    rows = torch.arange(2 * patch * patch * channels).view(-1, 2 * channels)  # (patch * patch, channel)
    keep = rows[:, :channels].flatten()
    return {**state, **{k: state[k][keep] for k in LAST}}


def reverse_time(state):
    """SiT's release runs from noise at t = 0 to data at t = 1: v(x, t) = -v_release(x, 1 - t). Exactly the
    same function, by new weights: cos(w - w t) and sin(w - w t) are rotations of cos(w t) and sin(w t), and
    the last layer changes its sign."""
    name = "t_embedder.mlp.0.weight"
    w = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float64) / 128)
    on_cos, on_sin = state[name].double().chunk(2, dim=1)  # (d, 128) each
    turned = torch.cat([on_cos * w.cos() + on_sin * w.sin(), on_cos * w.sin() - on_sin * w.cos()], 1)
    return {**state, name: turned.float(), **{k: -state[k] for k in LAST}}


def read_stats(text, channels):
    """vae.py's stats.npz, REPA-E's file of latents_scale (1 / std) and latents_bias, or a scaling factor ->
    mean and std, each (c,)."""
    try:
        if text.endswith(".npz"):
            mean, std = (torch.from_numpy(v).float() for v in common.read_npz(text, "mean", "std").values())
        elif Path(text).exists():
            stats = common.load_checkpoint(text)
            mean = stats["latents_bias"].float().flatten()
            std = 1 / stats["latents_scale"].float().flatten()
        else:
            mean, std = torch.zeros(channels), torch.full((channels,), 1 / float(text))
    except UserError:
        raise
    except common.DAMAGED as e:
        raise common.damage(e, f"--latent-stats {text}: expected mean and std, latents_scale and "
                               f"latents_bias, or a number ({type(e).__name__}: {e})") from None
    return check_stats(mean, std, channels, f"--latent-stats {text}")


def check_stats(mean, std, channels, source):
    """Mean and std of latents as they are, (c,) each. Raises UserError for what is none."""
    shapes = tuple(mean.shape), tuple(std.shape)
    finite = mean.isfinite().all() and std.isfinite().all() and (std > 0).all()
    if shapes != ((channels,), (channels,)) or not finite:
        raise UserError(f"{source}: statistics of shapes {shapes}; expected {channels} finite means and "
                        f"{channels} positive stds")
    return mean, std


# ------------------------------------------------------------------------------------------------------------


def main():
    p = common.Parser(description=__doc__)
    p.add_argument("command", choices=("to-diffusers",))
    p.add_argument("--vae", required=True, help="checkpoint, in any format of vae.load_vae")
    p.add_argument("--out", required=True, help="new folder")
    args = p.parse_args()
    from vae import load_vae  # which imports this file
    vae = load_vae(args.vae)
    export_diffusers(vae, args.out, model_card(vae, args.vae))
    print(f"{args.out}: open it with diffusers.AutoencoderKL.from_pretrained('{args.out}'); its latents are "
          f"not normalised (scaling_factor 1). To publish it: hf upload ORG/NAME {args.out}")


if __name__ == "__main__":
    common.run_script(main)
