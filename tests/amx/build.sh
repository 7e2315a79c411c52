#!/bin/sh
# Builds the program that tests the AMX kernels with the real instructions: static, so
# that it runs on a machine that has nothing but a kernel. Compiles in a few seconds.
#
#   tests/amx/build.sh PROGRAM
set -eu
[ $# -eq 1 ] || { sed -n '2,5s/^# \{0,1\}//p' "$0" >&2; exit 2; }
program=$(realpath -m "$1")
cd "$(dirname "$(realpath "$0")")/../.."

objects=$(mktemp -d)
trap 'rm -rf "$objects"' EXIT
compile() { # source, flags...
	source=$1
	shift
	"${CXX:-g++}" -std=c++20 -O2 -Wall -Wextra -ffp-contract=off -pthread -I ffi \
		-DKTJAX_COUNT_TILES -DKTJAX_NO_CVTNE2PS -Wno-maybe-uninitialized -Wno-uninitialized "$@" \
		-c "ffi/$source.cc" -o "$objects/$(basename "$source").o"
}
compile gemm/amx_bf16 -mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512dq -mavx512vl \
	-mavx512vnni -mavx512bf16 -mamx-tile -mamx-bf16
compile gemm/amx_emulated
compile base/cpu
compile format/format
compile format/pack_blocks
compile format/panel
compile testing/amx_program
mkdir -p "$(dirname "$program")"
"${CXX:-g++}" -static -pthread "$objects"/*.o -o "$program"
