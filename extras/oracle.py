"""The two ends of a study's scale: a vision model that knows exactly the attributes of a data set, and the
same network knowing nothing.

    python extras/oracle.py out/avatars out/oracle.safetensors            # resnet10t, trained on them
    python extras/oracle.py out/avatars out/random.safetensors --steps 0  # the same network, random weights
    python train_vae.py ... --vfm resnet10t --vfm-ckpt out/oracle.safetensors --grid 8

The first is the positive control: if alignment to it does not help a diffusion model, the testbed cannot show
that alignment helps. The second is the negative control: what alignment to random weights gains is not due to
meaning. Images are enlarged to 128 pixels, as VFM does with an 8 x 8 grid, so that stride 16 gives 8 x 8
tokens of 256 numbers. The loss is the cross-entropy of every known attribute; at the end the test split is
scored.
"""
import sys
from pathlib import Path

import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common  # noqa: E402
import data  # noqa: E402
from probe import f1  # noqa: E402

NET = "resnet10t"


def load_split(table, images, split):
    """Images (N, 3, S, S) uint8 and attributes (N, A) 0, 1 or nan of one split."""
    place = {file: i for i, file in enumerate(images.files)}
    rows = [i for i, s in enumerate(table.splits) if s == split]
    pixels = torch.stack([images[place[table.files[i]]][0] for i in tqdm(rows, split, disable=None)])
    return pixels, torch.tensor(table.values[rows])


def logits(net, pixels, device):
    """uint8 (B, 3, S, S) -> (B, classes), float32."""
    mean = torch.tensor(net.pretrained_cfg["mean"], device=device).view(1, 3, 1, 1)
    std = torch.tensor(net.pretrained_cfg["std"], device=device).view(1, 3, 1, 1)
    x = F.interpolate((pixels.to(device).float() / 255 - mean) / std, (128, 128), mode="bicubic")
    with common.autocast(device, common.fast_precision(device)):
        return net(x.contiguous(memory_format=torch.channels_last)).float()


def train(net, pixels, labels, steps, device):
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    for step in range(steps):
        rows = torch.randint(len(pixels), (64,))
        y = labels[rows].to(device)
        known = ~y.isnan()
        loss = F.binary_cross_entropy_with_logits(logits(net, pixels[rows], device)[known], y[known])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step} of {steps}, loss {loss.item():.4f}", flush=True)


def main():
    p = common.Parser(description=__doc__)
    p.add_argument("data", help="image folder with attributes.csv")
    p.add_argument("out", help="file to write (.safetensors)")
    p.add_argument("--steps", type=common.natural, default=1500, help="of 64 images; 0: random weights")
    p.add_argument("--size", type=common.side, default=32, help="crop in pixels")
    p.add_argument("--seed", type=common.seed, default=0)
    args = p.parse_args()
    out = Path(args.out)
    if out.exists():
        return print(f"{out}: already there")
    common.open_out(out.parent)
    device, _, _ = common.setup()
    torch.manual_seed(args.seed)
    net = timm.create_model(NET, num_classes=1000).to(device, memory_format=torch.channels_last)
    record = dict(kind="random weights", steps="0", seed=str(args.seed))
    if args.steps:
        table = data.read_attributes(args.data)
        images = data.ImageFolder(args.data, args.size)
        net.reset_classifier(len(table.names))
        net.to(device)
        train(net.train(), *load_split(table, images, "train"), args.steps, device)
        pixels, labels = load_split(table, images, "test")
        with torch.no_grad():
            found = torch.cat([logits(net.eval(), x, device) for x in pixels.split(64)]).cpu()
        score = f1(labels, found > 0).nanmean().item()
        record |= dict(kind=f"trained on {args.data}", steps=str(args.steps), test_f1=f"{score:.4f}",
                       data=images.hash)
        print(f"macro F1 of {len(table.names)} attributes on {len(pixels)} test images: {score:.4f}")
        net.reset_classifier(1000)  # VFM expects timm's own head; tokens do not pass it
    state = {k: v.cpu().contiguous() for k, v in net.state_dict().items()}
    with common.whole_file(out) as part:
        safetensors.torch.save_file(state, part, record)
    print(f"{out}: {NET}, {record['kind']}")


if __name__ == "__main__":
    common.run_script(main)
