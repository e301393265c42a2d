#!/usr/bin/env bash
# What there is to measure on one GPU, from random weights and glyphs, so without the Hub: both recipes from end to end,
# what pruning costs while training, and how fast merged networks are. About twenty minutes on an H100.
#
#   recipes/benchmarks/gpu/on_gpu.sh OUTPUT_FOLDER [STEP...]   # steps: see below; all of them by default, in this order
#   DRY=1 recipes/benchmarks/gpu/on_gpu.sh OUTPUT_FOLDER       # tiny networks on the processor: does the script itself work?
#
# OUTPUT_FOLDER gets a log of each step, and results/ with the reports, the tables and their JSON.
set -euo pipefail

STEPS=(checkpoints deit_small convnext_tiny training training_compiled latency)
if (($# == 0)); then
  echo "usage: $0 OUTPUT_FOLDER [${STEPS[*]}]" >&2
  exit 2
fi
mkdir -p "$1"
out=$(cd "$1" && pwd)
shift
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."
mkdir -p "$out/logs" "$out/results"
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

if [[ ${DRY:-} ]]; then
  machine=cpu
  checkpoints=(--image_size 32 --small true)
  recipe=(
    --glyph_resolution 32 --num_glyphs 400 --max_eval_samples 40 --calibration_size 32 --num_pruned_blocks 1
    --max_steps 12 --logging_steps 2 --global_batch_size 16 --per_device_train_batch_size 16
    --dataloader_num_workers 1
  )
  logging_steps=2
  training=(--device cpu --quick true --memory false --workers 1 --models deit_small)
  latency=(--device cpu --models mobilenetv2_100 --levels 2 4 --batch_sizes 1 --rounds 1)
else
  machine=one_gpu
  checkpoints=(--image_size 224)
  recipe=(
    --glyph_resolution 224 --num_glyphs 12000 --max_eval_samples 1000 --calibration_size 256 --num_pruned_blocks 6
    --max_steps 300 --logging_steps 10 --global_batch_size 128 --per_device_train_batch_size 128
    --dataloader_num_workers "$(nproc)" --bf16 true
  )
  logging_steps=10
  training=(--device cuda --bf16 true --batch_size 128 --rounds 10 --workers "$(nproc)")
  latency=(
    --device cuda --dtype bfloat16 --models deit_small_patch16_224 convnext_tiny --levels 6 12 18 --batch_sizes 1 128
    --rounds 30 --compile true --cuda_graphs true
  )
fi

# Options for a few hundred steps from random weights, where the recipes' are for many epochs from trained ones. The
# checkpoint has learnt nothing: pruning goes on from the supernet, and the teacher, which is there to be timed, counts
# for little.
recipe+=(
  --dataset glyphs --selector supernet --supernet_fraction 0.5 --start_from_supernet true
  --learning_rate 1e-3 --warmup_steps 0.1 --max_grad_norm 1.0 --ema_decay 0.98
  --ramp_end 0.4 --distillation soft --distillation_weight 0.1
  --horizontal_flip 0 --min_crop_scale 0.5 --mixup 0.2 --cutmix 0.2
  --eval_steps 0.25 --save_steps 0.5 --save_total_limit 1 --torch_compile true --disable_tqdm true --report_to none
)

# Runs a step, with each line of its log stamped with the seconds at which it came.
logged() {
  local name=$1
  shift
  echo "$(date +%T) $name"
  "$@" 2>&1 | while IFS= read -r line; do printf '%s %s\n' "$EPOCHREALTIME" "$line"; done >"$out/logs/$name.log" ||
    {
      tail -n 20 "$out/logs/$name.log" >&2
      echo "$name failed: see $out/logs/$name.log" >&2
      return 1
    }
}

make_checkpoints() {
  [[ -f $out/checkpoints/convnext_tiny/config.json ]] ||
    logged checkpoints python -m recipes.benchmarks.gpu.random_checkpoints --folder "$out/checkpoints" "${checkpoints[@]}"
}

run_recipe() {
  local name=$1 folder=$out/models/$1
  make_checkpoints
  rm -rf "$folder" # else the recipe would go on where it stopped, and there would be less to measure
  logged "$name" accelerate launch --config_file "recipes/accelerate/$machine.yaml" "recipes/$name.py" \
    --model_name_or_path "$out/checkpoints/$name" --output_dir "$folder" "${recipe[@]}"
  mkdir -p "$out/results/$name"
  cp "$folder/updp_report.json" "$folder/README.md" "$out/results/$name/"
  python -m recipes.benchmarks.gpu.step_rates "$out/logs/$name.log" "$logging_steps" | tee "$out/results/$name/steps.md"
}

run_benchmark() {
  local step=$1 name=$2
  shift 2
  logged "$step" python -m "recipes.benchmarks.$name" --output "$out/results/$step.json" "$@"
}

run_step() {
  case $1 in
    checkpoints) make_checkpoints ;;
    deit_small | convnext_tiny) run_recipe "$1" ;;
    training) run_benchmark benchmark_training_gpu training "${training[@]}" ;;
    training_compiled) # memory is that of the run above
      run_benchmark benchmark_training_gpu_compiled training "${training[@]}" --compile true \
        --memory false --loaded_images 0
      ;;
    latency) run_benchmark benchmark_latency_gpu latency "${latency[@]}" ;;
    *)
      echo "There is no step '$1', expected some of: ${STEPS[*]}." >&2
      return 2
      ;;
  esac
}

if (($# == 0)); then
  set -- "${STEPS[@]}"
fi
for step in "$@"; do
  run_step "$step"
done
echo "$(date +%T) done: $out/results"
