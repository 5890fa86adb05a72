"""What must hold on a GPU, checked in one run; each result is printed and written as it is made.

    python tests/gpu.py OUT                 # on a GPU: every check, the important ones first
    python tests/gpu.py OUT --device cpu    # the rehearsal: the same code where there is no GPU
    python tests/gpu.py OUT --only resume   # some of them

The CPU's numbers are made by the same commands with the GPU hidden. OUT/checks.jsonl gets a line a check; the
exit status is the number of failures. Needs torch, torchvision, timm, lpips, tqdm, scipy and Pillow; all
weights are random, all images made here.
"""
import argparse
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "extras")]
DEVICE = "cpu" if "cpu" in sys.argv else "cuda"
if DEVICE == "cpu":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import numpy as np  # noqa: E402
import timm  # noqa: E402
import torch  # noqa: E402
import torchvision  # noqa: E402
from PIL import Image  # noqa: E402

import common  # noqa: E402
import fid  # noqa: E402
import sit  # noqa: E402
import vae  # noqa: E402

STEPS = 50 if DEVICE == "cuda" else 6  # the rehearsal is short
NO_TF32 = {"NVIDIA_TF32_OVERRIDE": "0"}  # float32 means float32
FP32 = ("--precision", "fp32")
CPU = {"CUDA_VISIBLE_DEVICES": "", **NO_TF32}


class Checks:
    """The inputs that all checks share, and the checks, in order of importance."""

    def __init__(self, out):
        self.out, self.images = out, out / "images"
        rng = np.random.default_rng(0)
        for i in range(64 if not self.images.exists() else 0):
            path = self.images / "ab"[i % 2] / f"{i:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            blob = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8))
            blob.resize((64, 64), Image.Resampling.BICUBIC).save(path)
        torch.manual_seed(0)
        self.vgg, self.vit = out / "vgg16.pth", out / "vit.pth"
        torch.save(torchvision.models.vgg16(weights=None).state_dict(), self.vgg)
        torch.save(timm.create_model("deit_tiny_patch16_224").state_dict(), self.vit)
        vfm = ("--vfm", "deit_tiny_patch16_224", "--vfm-ckpt", self.vit)
        common_flags = ("--steps", STEPS, "--batch", 16, "--log-every", 1, "--save-every", 1000)
        self.train_vae = ("train_vae", "--data", self.images, "--preset", "demo", *common_flags, "--lr",
                          1e-5, "--gan", 0.1,
                          "--lpips", 1, "--lpips-ckpt", self.vgg, "--grid", 4, "--mapper-mlp", 256, *vfm)
        self.train_sit = ("train_sit", "--latents", out / "latents", "--data", self.images, "--model",
                          "SiT-demo/2",
                          *common_flags, "--lr", 1e-4, "--repa", 0.5, *vfm)

    def run(self, script, *args, env=None, status=0):
        """A command line in a process of its own -> its output. The CPU is the reference where env says
        so."""
        words = [sys.executable, str(ROOT / f"{script}.py"), *map(str, args)]
        done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, **(env or {})},
                              timeout=500)
        text = (done.stdout + done.stderr)[-2000:]
        assert done.returncode == status, f"{script}: status {done.returncode}, {text}"
        return done.stdout + done.stderr

    def losses(self, name):
        """{loss: its value a step} of a run."""
        lines = [json.loads(line) for line in (self.out / name / "metrics.jsonl").read_text().splitlines()]
        steps = [r for r in lines if "grad_norm" in r]
        known = ("rec", "kl", "lpips", "gan", "align", "disc", "velocity", "repa")
        return {k: np.array([r[k] for r in steps]) for k in known if k in steps[0]}

    def furthest(self, a, b):
        """The largest relative difference of two runs' losses (of small ones: absolute, in units of 0.1; of
        the GAN's, a mean of logits about 0, in those of the hinge's margin, 1)."""
        a, b = self.losses(a), self.losses(b)
        scale = {k: np.maximum(np.abs(a[k]), 1 if k == "gan" else 0.1) for k in a}
        return max(float((np.abs(a[k] - b[k]) / scale[k]).max()) for k in a)

    def train(self, name, *flags, env=None):
        """Both trainers under a name; what is there is not done again."""
        for command in (self.train_vae, self.train_sit):
            self.run(*command, *flags, "--out", self.out / name / command[0], env=env)

    # -----------------------------------------------------------------------------------------------------

    def prepare(self):
        """A VAE of two steps, its latents with flips and a SiT on them, all made on the CPU."""
        self.run("train_vae", "--data", self.images, "--preset", "demo", "--steps", 2, "--batch", 8, "--lr",
                 1e-3,
                 "--lpips", 0, "--gan", 0, "--align", "none", *FP32, "--out", self.out / "vae", env=CPU)
        self.run("vae", "--vae", self.out / "vae/vae.pt", "--data", self.images, "--flip", *FP32,
                 "--out", self.out / "latents", env=CPU)
        self.run("train_sit", "--latents", self.out / "latents", "--model", "SiT-demo/2", "--steps", 5,
                 "--batch", 8,
                 "--lr", 1e-3, "--repa", 0, *FP32, "--out", self.out / "sit", env=CPU)

    def fp32(self):
        """50 steps of both trainers in float32 are the CPU's to 1e-4."""
        self.train("cpu", "--precision", "fp32", "--compile", 0, env=CPU)
        self.train("fp32", "--precision", "fp32", "--compile", 0, env=NO_TF32)
        found = {s: self.furthest(f"cpu/{s}", f"fp32/{s}") for s in ("train_vae", "train_sit")}
        assert max(found.values()) < 1e-4, found
        return found

    def compiled(self):
        """Compiled steps in bf16 are the eager ones within bf16's noise; no graph break, no recompilation."""
        self.train("eager", "--precision", "bf16", "--compile", 0)
        self.train("compiled", "--precision", "bf16", "--compile", 1)
        found = {s: (self.furthest(f"fp32/{s}", f"eager/{s}"), self.furthest(f"eager/{s}", f"compiled/{s}"))
                 for s in ("train_vae", "train_sit")}
        assert all(max(pair) < 0.05 for pair in found.values()), found
        return found

    def no_recompile(self):
        """50 compiled steps compile once."""
        for command in (self.train_vae, self.train_sit):
            out = self.out / "once" / command[0]
            text = self.run(*command, "--compile", 1, "--out", out, env={"TORCH_LOGS": "recompiles"})
            assert "Recompiling function" not in text, text[-1500:]

    def grad_checkpointing(self):
        """--grad-checkpointing changes no loss."""
        words = ("--precision", "fp32", "--compile", 0, "--grad-checkpointing", 1)
        self.run(*self.train_sit, *words, "--out", self.out / "checkpointing/train_sit", env=NO_TF32)
        found = self.furthest("fp32/train_sit", "checkpointing/train_sit")
        assert found < 1e-5, found
        return found

    def resume(self):
        """Under --deterministic 25 + 25 steps are the bits of 50."""
        for command, name in ((self.train_vae, "vae.pt"), (self.train_sit, "sit.pt")):
            whole, parts = self.out / "whole" / command[0], self.out / "parts" / command[0]
            self.run(*command, "--deterministic", "--out", whole)
            self.run(*command, "--deterministic", "--steps", STEPS // 2, "--out", parts)
            self.run(*command, "--deterministic", "--out", parts)
            part = name.removesuffix(".pt") if name == "vae.pt" else "model"
            a, b = (common.weights_hash(common.load_checkpoint(p / name)[part]) for p in (whole, parts))
            assert a == b, (command[0], a, b)

    def sigterm(self):
        """SIGTERM saves, and ends with 128 + 15."""
        words = [sys.executable, str(ROOT / "train_sit.py"), *map(str, self.train_sit[1:]), "--steps",
                 "1000000000",
                 "--out", str(self.out / "stopped")]
        process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        log, end = self.out / "stopped/metrics.jsonl", time.time() + 200
        while not (log.exists() and len(log.read_text().splitlines()) > 3):
            assert process.poll() is None and time.time() < end, process.communicate()
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 128 + signal.SIGTERM and "saved at step" in err, err[-500:]

    def out_of_memory(self):
        """Exhausted GPU memory is one line that names --micro-batch."""
        if DEVICE == "cpu":
            return "skipped: no GPU"
        rows = 64
        moments = np.lib.format.open_memmap(self.out / "large.npy", "w+", np.float16, (rows, 1, 64, 16, 16))
        moments[:, :, 32:] = 1
        latents = self.out / "large"
        latents.mkdir(exist_ok=True)
        os.replace(self.out / "large.npy", latents / "moments.npy")
        np.save(latents / "labels.npy", np.zeros(rows, np.int64))
        np.savez(latents / "stats.npz", mean=np.zeros(32), std=np.ones(32))
        (latents / "files.txt").write_text("".join(f"{i}\n" for i in range(rows)))
        meta = dict(n=rows, classes=["a"], resolution=256, split=None, vae="none", vae_hash="none")
        (latents / "meta.json").write_text(json.dumps(meta))
        words = ["train_sit.py", "--latents", str(latents), "--model", "SiT-XL/1", "--batch", "64", "--repa",
                 "0", "--compile", "0", "--sample-every", "0", "--out", str(self.out / "oom")]
        hold = f"""
import sys, torch
torch.cuda.set_per_process_memory_fraction(0.05)
sys.path.insert(0, {str(ROOT)!r})
sys.argv = {words!r}
import common, train_sit
common.run_script(train_sit.main)
"""
        done = subprocess.run([sys.executable, "-c", hold], capture_output=True, text=True)
        lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert done.returncode == 2 and len(lines) == 1 and "--micro-batch" in lines[0], done.stderr[-800:]
        return lines[0]

    def no_synchronisation(self):
        """Between two log lines nothing in the loop waits for the GPU."""
        if DEVICE == "cpu":
            return "skipped: no GPU"
        for script, *flags in (self.train_vae, self.train_sit):
            words = [f"{script}.py", *map(str, flags), "--steps", "30", "--log-every", "25", "--compile", "0",
                     "--out", str(self.out / "silent" / script)]
            code = f"""
import sys, torch
sys.path.insert(0, {str(ROOT)!r})
sys.argv = {words!r}
import common, {script}
after_step = common.Run.after_step
def noting(run, *args, **kwargs):
    if run.step in (5, 20):
        torch.cuda.set_sync_debug_mode("error" if run.step == 5 else "default")
    after_step(run, *args, **kwargs)
common.Run.after_step = noting
{script}.main()
"""
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr[-1500:]

    def encoding(self):
        """Moments are the CPU's to 1e-3 and do not depend on --micro-batch."""
        words = ("vae", "--vae", self.out / "vae/vae.pt", "--data", self.images, "--flip", *FP32)
        self.run(*words, "--out", self.out / "latents_gpu", env=NO_TF32)
        self.run(*words, "--micro-batch", 5, "--out", self.out / "latents_5", env=NO_TF32)
        names = ("latents", "latents_gpu", "latents_5")
        found = [np.load(self.out / f"{name}/moments.npy").astype(float) for name in names]
        return self.close(found[0], found[1], 1e-3), self.close(found[1], found[2], 1e-3)

    @staticmethod
    def close(a, b, tolerance):
        found = float(np.abs(a - b).max() / np.abs(a).max())
        assert found < tolerance, found
        return found

    def sampling(self):
        """8 images, ODE and SDE, are the CPU's to one level, and do not depend on --micro-batch."""
        worst = []
        for sampler in ("heun", "sde"):
            words = ("sample", "--sit", self.out / "sit/sit.pt", "--images", 8, "--sampler", sampler,
                     "--steps", 10,
                     "--cfg", 1.5, "--precision", "fp32")
            runs = dict(cpu=((), CPU), gpu=((), NO_TF32), three=(("--micro-batch", 3), NO_TF32))
            for name, (more, env) in runs.items():
                self.run(*words, *more, "--out", self.out / f"{sampler}_{name}.npz", env=env)
            files = [self.out / f"{sampler}_{name}.npz" for name in ("cpu", "gpu", "three")]
            images = [np.load(file)["arr_0"].astype(int) for file in files]
            worst += [int(np.abs(images[0] - images[k]).max()) for k in (1, 2)]
        assert max(worst) <= 1, worst
        return worst

    def inception(self):
        """Features of FID's Inception with random weights are the CPU's to 1e-3."""
        torch.manual_seed(0)
        torch.backends.cudnn.allow_tf32 = False
        net = fid.FIDInception(weights=False)
        images = torch.randint(0, 256, (8, 3, 64, 64), dtype=torch.uint8)
        here, there = net(images), net.to(DEVICE)(images.to(DEVICE)).cpu()
        return self.close(here.numpy(), there.numpy(), 1e-3)

    def networks(self):
        """The SiT and the VAE in float32 are the CPU's to 1e-4."""
        torch.backends.cudnn.allow_tf32 = False
        torch.manual_seed(0)
        model = sit.SIT_MODELS["SiT-B/1"](input_size=16, in_channels=32, num_classes=10).eval()
        for p in model.parameters():
            p.data += 0.02 * torch.randn_like(p)
        x, t, y = torch.randn(2, 32, 16, 16), torch.rand(2), torch.tensor([1, 10])
        auto = vae.AutoencoderKL(**vae.VAE_CONFIGS["f16d32"]).eval()
        with torch.no_grad():
            here = model(x, t, y), auto.decode(x)
            there = model.to(DEVICE)(x.to(DEVICE), t.to(DEVICE),
                                     y.to(DEVICE)), auto.to(DEVICE).decode(x.to(DEVICE))
        return [self.close(a.numpy(), b.cpu().numpy(), 1e-4) for a, b in zip(here, there)]


ORDER = ("prepare", "networks", "inception", "fp32", "compiled", "no_recompile", "resume",
         "no_synchronisation", "sigterm",
         "out_of_memory", "encoding", "sampling", "grad_checkpointing")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("out")
    p.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    p.add_argument("--only", nargs="+", choices=ORDER)
    args = p.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: no GPU (torch.cuda.is_available() is false); rehearse with --device cpu")
    out = Path(args.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    card = torch.cuda.get_device_name() if args.device == "cuda" else common.cpu_name()
    print(f"{card}, torch {torch.__version__}, {common.commit()}", flush=True)
    checks, failed = Checks(out), 0
    for name in ORDER:
        if args.only and name not in args.only:
            continue
        begin, record = time.time(), dict(check=name, card=card, says=getattr(checks, name).__doc__)
        try:
            record.update(result="passed", found=getattr(checks, name)())
        except Exception as e:  # whatever fails in one check, the minutes that are left go to the others
            failed += 1
            record.update(result="FAILED", found=f"{type(e).__name__}: {e}"[-1500:])
            traceback.print_exc()
        record["seconds"] = round(time.time() - begin, 1)
        with open(out / "checks.jsonl", "a") as f:
            f.write(json.dumps(record) + "\n")
        print(f"{name}: {record['result']} {str(record['found'])[:300]} ({record['seconds']} s)", flush=True)
    print(f"{failed} failed")
    sys.exit(failed)


if __name__ == "__main__":
    main()
