#!/bin/sh
# Environments of the programs that we are compared with, apart from everything else: build/peers/{trl,swift}, about 6 GB.
#   benchmarks/setup.sh [trl] [swift]      PYTHON=/opt/python3.11 benchmarks/setup.sh
set -e
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
into() {  # into NAME PACKAGE...: an environment with exactly these
    folder=build/peers/$1
    shift
    [ -e "$folder/.installed" ] && return
    "$python" -m venv "$folder"
    "$folder/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0
    "$folder/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 "$@"
    touch "$folder/.installed"
}
for name in ${@:-trl swift}; do
    case $name in
    trl) into trl trl==1.16.0 transformers==5.23.0 peft==0.21.2 accelerate==1.15.0 datasets==5.2.0 pillow ;;
    swift) into swift ms-swift==4.6.0 msgspec pillow ;;
    *) echo "no such environment: $name (trl, swift)" >&2; exit 2 ;;
    esac
done
