#!/usr/bin/env bash
# gpu.py on a machine that has torch and a GPU, and no network.
#
#   benchmarks/gpu.sh wheels                  where there is a network: what that machine lacks, into .wheels/
#   benchmarks/gpu.sh run FOLDER [MINUTES]    there, in a copy of this checkout with .wheels/: install and measure
#
# The machine is taken to have Python 3.12 with torch, transformers, peft, accelerate, torchvision, timm, scipy,
# numpy, pillow, click and pluggy. Its own versions stay: nothing that is there is installed again.
set -euo pipefail
cd "$(dirname "$0")/.."
case "${1:-}" in
wheels)
    rm -rf .wheels
    platforms=(--platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 --platform manylinux_2_24_x86_64
        --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 --platform manylinux_2_34_x86_64)
    python3 -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
        "${platforms[@]}" -d .wheels diffusers==0.42.1 importlib-metadata==8.7.0 pydantic==2.14.4 \
        pydantic-core==2.50.5 annotated-types==0.7.0 typing-inspection==0.4.2 rich==15.0.0 tomli-w==1.2.0 \
        rapidfuzz==3.14.3 open_clip_torch==3.2.0 ftfy==6.3.1 wcwidth==0.2.14
    python3 -m pip wheel -q --no-deps -w .wheels .
    du -shc .wheels/*
    ;;
run)
    out=${2:?the folder of the results}
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    python3 -m pip install -q --no-index --no-deps --no-compile --target "$site" .wheels/*.whl
    export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
    python3 benchmarks/gpu.py --out "$out" --minutes "${3:-9}" "${@:4}"
    ;;
*)
    sed -n '2,8s/^# \{0,1\}//p' "$0"
    exit 2
    ;;
esac
