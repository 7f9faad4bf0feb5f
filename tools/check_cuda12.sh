#!/usr/bin/env bash
# Compiles every CUDA source to an object for sm_90 with an nvcc of CUDA 12. Usage: check_cuda12.sh DIRECTORY
# GAN_NVCC12 names the compiler. Without it one is put together in DIRECTORY, since no index has a whole one: pip's
# nvidia-cuda-nvcc-cu12 wheels have headers and ptxas, but no nvcc, so the programs come from Debian's package of CUDA 12.5
# (older than the 12.8 that we promise: what 12.5 compiles for sm_90, 12.8 does too).
set -euo pipefail
cd "$(dirname "$0")/.."
directory=$1

debian_package=nvidia-cuda-toolkit_12.5.40~12.5.0-2+b1_amd64.deb
debian_url=http://deb.debian.org/debian/pool/non-free/n/nvidia-cuda-toolkit/$debian_package
debian_sha256=88573e2a8626687cd201af953ed3086f2929c8c8914667d552f27b602f2cad68
wheels=(nvidia-cuda-runtime-cu12==12.5.82 nvidia-cuda-nvcc-cu12==12.5.82 nvidia-cuda-cccl-cu12==12.5.39.post1)

assemble_toolkit() {
  local downloads=$directory/downloads toolkit=$directory/toolkit.part
  echo "--- fetching a CUDA 12.5 compiler into $directory (130 MB)"
  mkdir -p "$downloads"
  rm -rf "$toolkit"
  mkdir -p "$toolkit"/{bin/crt,nvvm/bin,nvvm/libdevice,include}
  curl --fail --silent --show-error --continue-at - --output "$downloads/$debian_package" "$debian_url"
  echo "$debian_sha256  $downloads/$debian_package" | sha256sum --check --quiet
  "${PYTHON:-python3}" -m pip download --quiet --no-deps --only-binary=:all: --dest "$downloads" "${wheels[@]}"

  dpkg-deb --extract "$downloads/$debian_package" "$downloads/debian"
  local programs=$downloads/debian/usr/lib/nvidia-cuda-toolkit
  cp "$programs/bin/nvcc" "$downloads"/debian/usr/bin/{cudafe++,bin2c,fatbinary,ptxas,nvlink} "$toolkit/bin/"
  cp "$programs/bin/crt/"* "$toolkit/bin/crt/"
  cp "$programs/bin/cicc" "$toolkit/nvvm/bin/"
  cp "$programs/libdevice/"* "$toolkit/nvvm/libdevice/"
  local wheel
  for wheel in "$downloads"/*.whl; do
    "${PYTHON:-python3}" -m zipfile --extract "$wheel" "$downloads/wheels"
  done
  cp -r "$downloads"/wheels/nvidia/*/include/. "$toolkit/include/"
  cat > "$toolkit/bin/nvcc.profile" <<'PROFILE'
TOP = $(_HERE_)/..
CICC_PATH = $(TOP)/nvvm/bin
NVVMIR_LIBRARY_DIR = $(TOP)/nvvm/libdevice
PATH += $(TOP)/nvvm/bin:$(_HERE_):
INCLUDES += "-I$(TOP)/include" $(_SPACE_)
PROFILE
  mv "$toolkit" "$directory/toolkit"
}

nvcc=${GAN_NVCC12:-}
if [[ -z $nvcc ]]; then
  [[ -d $directory/toolkit ]] || assemble_toolkit
  nvcc=$directory/toolkit/bin/nvcc
fi
"$nvcc" --version | grep release
shopt -s nullglob
sources=(csrc/host/*.cu bench/*/*.cu)
if [[ ${#sources[@]} == 0 ]]; then
  echo "csrc/host/*.cu: CUDA sources are required; got none" >&2
  exit 1
fi
mkdir -p "$directory/objects"
for source in "${sources[@]}"; do
  echo "$source"
  "$nvcc" -std=c++17 -O3 -arch=sm_90 -Icsrc -DGAN_VERSION='"check"' -Xcompiler=-fPIC -c "$source" \
    -o "$directory/objects/$(basename "$source").o"
done
echo "all ${#sources[@]} compile with it"
