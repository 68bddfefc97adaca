#!/usr/bin/env bash
# Everything that is to be measured on one GPU, in one go of about eight minutes, without a network.
#
#     benchmarks/gpu.sh FOLDER            leaves FOLDER/report.md, and FOLDER/raw.tgz with the logs and figures behind it
#     benchmarks/gpu.sh FOLDER --list     prints the commands and runs nothing
#
# A part that fails or takes too long is marked in the report, and the next one runs. PYTHON names the interpreter; it
# has to find torch, Triton, and the packages of pyproject.toml.
set -uo pipefail
[ $# -ge 1 ] || { sed -n '2,8s/^# \{0,1\}//p' "$0" >&2; exit 2; }
mkdir -p "$1"
out=$(cd "$1" && pwd)
list=${2:-}
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-python3}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export TRITON_PRINT_AUTOTUNING=1 # which blocks were chosen is in the logs
raw=$(mktemp -d)
trap 'rm -rf "$raw"' EXIT

# part NAME SECONDS COMMAND...
part() {
    local name=$1 limit=$2 rc=0 start=$SECONDS
    shift 2
    if [ "$list" = --list ]; then
        printf '%q ' "$@"
        echo
        return
    fi
    printf '\n== %s\n' "$name"
    timeout --kill-after=5 "$limit" "$@" >"$raw/$name.log" 2>&1 || rc=$?
    tail -n 40 "$raw/$name.log"
    printf '| %s | %s | %s |\n' "$name" "$rc" "$((SECONDS - start))" >>"$raw/parts.md"
}

shape=(--tokens 32768 --d_model 1024 --intermediate_size 512 --num_experts 64 --top_k 2 --dtype bf16)
rounds=(--rounds 30 --warmup 5)
bench() { # bench NAME SECONDS PEERS...: peers that may not fit are timed apart, each beside the floor
    local name=$1 limit=$2
    shift 2
    part "$name" "$limit" "$PYTHON" -m moe_scale.cli bench "${shape[@]}" "${rounds[@]}" --profile \
        --output_dir "$raw/$name" --peers "$@"
}

part machine 20 "$PYTHON" -c 'import torch, triton; print(torch.__version__, triton.__version__, torch.cuda.get_device_name())'
bench bench-kernels 140 dense custom triton hf-grouped
# Another version of torch prints other warnings; they are no reason to fail here.
part tests 150 "$PYTHON" -m pytest -m gpu tests/numerics -q -p no:cacheprovider -o filterwarnings=default
bench bench-deepspeed 50 dense deepspeed
bench bench-autoep 40 dense autoep
part compare 100 "$PYTHON" -m moe_scale.cli compare recipes/lm_16l.py --variants custom triton deepspeed dense \
    --output_dir "$raw/compare" --scale 1gpu --max_steps 20 --optim.warmup_steps 5 --model.num_layers 4 \
    --data.seq_len 1024 --eval.every 0 --eval.max_tokens 8192 --telemetry.every 1 \
    --deepspeed_override train_micro_batch_size_per_gpu=8 gradient_accumulation_steps=1

[ "$list" = --list ] && exit 0
{
    printf '# On one GPU\n\n%s\n\n| part | exit code | seconds |\n| --- | --- | --- |\n' "$(cat "$raw/machine.log")"
    cat "$raw/parts.md"
    for table in "$raw"/bench-*/bench.md "$raw"/compare/compare.md; do
        [ -f "$table" ] && printf '\n## %s\n\n' "$(basename "$(dirname "$table")")" && cat "$table"
    done
} >"$out/report.md"
tar -C "$raw" --exclude=checkpoints -czf "$out/raw.tgz" .
printf '\n'
cat "$out/report.md"
