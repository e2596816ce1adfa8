#!/usr/bin/env bash
# gpu.py on a machine that has torch and a GPU, and no network.
#
#   benchmarks/gpu.sh wheels                  where there is a network: what that machine lacks, into .wheels/
#   benchmarks/gpu.sh run FOLDER [MINUTES]    there, in a copy of this checkout with .wheels/: install and measure
#
# The machine is taken to have Python 3.12 with torch, transformers, peft, accelerate, torchvision, timm, scipy,
# numpy, pillow, click and pluggy. Nothing of its own is changed: the wheels go into a folder that is found first.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
case "${1:-}" in
wheels)
    rm -rf .wheels
    platforms=(--platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 --platform manylinux_2_24_x86_64
        --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 --platform manylinux_2_34_x86_64)
    "$python" -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
        "${platforms[@]}" -d .wheels diffusers==0.42.1 importlib-metadata==8.7.0 pydantic==2.14.4 \
        pydantic-core==2.50.5 annotated-types==0.7.0 typing-inspection==0.4.5 rich==15.0.0 tomli-w==1.2.0 \
        rapidfuzz==3.14.3 open_clip_torch==3.2.0 ftfy==6.3.1 wcwidth==0.2.14 zipp==4.1.2 requests==2.34.2 \
        urllib3==2.8.0 charset-normalizer==3.5.3 idna==3.20 certifi==2026.10.19.post1 markdown-it-py==4.3.0 \
        mdurl==0.1.2 pygments==2.21.0 typing-extensions==4.16.0 safetensors==0.8.0 click==8.4.2
    "$python" -m pip wheel -q --no-deps -w .wheels ./nft_plugins .
    du -shc .wheels/*
    ;;
run)
    out=${2:?the folder of the results}
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    "$python" -m pip install -q --no-index --no-deps --no-compile --target "$site" .wheels/*.whl
    export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
    "$python" benchmarks/gpu.py --out "$out" --minutes "${3:-9}" "${@:4}"
    ;;
*)
    sed -n '2,8s/^# \{0,1\}//p' "$0"
    exit 2
    ;;
esac
