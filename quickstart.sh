#!/usr/bin/env bash
# The Alpaca recipe end to end on a small real model: no GPU, no key, two CPU cores, 9 GB of memory.
#
#   make quickstart        installs what is missing and runs this file; everything lands in ./quickstart_run
#                          (QUICKSTART_RUN=DIR: in another folder)
#
# A run that was broken off goes on with the step it stopped at. After a complete run the next one starts clean: the
# finished folder is kept as quickstart_run_previous (one run back, older ones go).
set -euo pipefail
cd "$(dirname "$0")"

run=${QUICKSTART_RUN:-quickstart_run}
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1

if [ -e "$run/complete" ]; then
    rm -rf "${run}_previous"
    mv "$run" "${run}_previous"
fi
mkdir -p "$run/logs" "$run/done"

# step NAME SENTENCE COMMAND...: runs a command once, shows it, keeps its output in logs/NAME.txt, notes its seconds.
step() {
    local name=$1 sentence=$2 begin=$SECONDS
    shift 2
    if [ -e "$run/done/$name" ]; then
        printf '\n== %s: done in the run that was broken off (%s s)\n' "$name" "$(cat "$run/done/$name")"
        return
    fi
    printf '\n== %s: %s\n' "$name" "$sentence"
    printf '   $'; printf ' %q' "$@"; printf '\n\n'
    if ! "$@" 2>&1 | tee "$run/logs/$name.txt"; then
        printf '\nquickstart failed at step "%s". Its output is in %s; `make quickstart` goes on from there.\n' \
            "$name" "$run/logs/$name.txt" >&2
        exit 1
    fi
    echo $((SECONDS - begin)) > "$run/done/$name"
}

# The teacher: started before the one step that asks it, stopped after it and whenever this script ends.
start_teacher() {
    rm -f "$run/teacher.url"
    python local_llm.py serve --port 0 --ready_file "$run/teacher.url" > "$run/logs/teacher.txt" 2>&1 &
    teacher=$!
    trap stop_teacher EXIT
    trap 'exit 130' INT TERM
    for _ in $(seq 600); do
        [ -s "$run/teacher.url" ] && return
        kill -0 "$teacher" 2> /dev/null || break
        sleep 0.2
    done
    printf '\nquickstart failed at step "serve": the local model did not start.\n' >&2
    cat "$run/logs/teacher.txt" >&2
    exit 1
}
stop_teacher() {
    kill "$teacher" 2> /dev/null || true
    wait "$teacher" 2> /dev/null || true
}

if [ ! -e "$run/done/generate" ]; then
    printf '\n== serve: the embedded model SmolLM2-135M answers as an OpenAI-compatible server on this machine\n'
    printf '   $ python local_llm.py serve --port 0 --ready_file %s &\n' "$run/teacher.url"
    start_teacher
fi
step generate "it is asked for new tasks, which are parsed, filtered and deduplicated against the 175 seeds" \
    python generate_instruction.py --output_dir "$run/generated" --base_url "$(cat "$run/teacher.url")" \
    --num_instructions_to_generate 6 --num_tasks_per_request 6 --answer_separately True \
    --max_tokens 160 --temperature 0.7 --max_concurrency 8
if [ -n "${teacher:-}" ]; then stop_teacher; fi

step export "the same model becomes a Hugging Face checkpoint, the base of the fine-tuning" \
    python local_llm.py export_hf --output_dir "$run/base" --overwrite True

step train "fine-tuning on the first half of an epoch of alpaca_data.json, under torchrun" \
    torchrun --nproc_per_node=1 train.py configs/quickstart_cpu.yaml --model_name_or_path "$run/base" \
    --output_dir "$run/tuned" --overwrite True

step compare "loss, ROUGE-L of the answers and how many of them end, before and after, on tasks that were not trained on" \
    python evaluation.py loss --base "$run/base" --model_name_or_path "$run/tuned" \
    --data_path configs/eval_tasks.jsonl --output_dir "$run/compare" --rouge_tasks 24 --max_new_tokens 128 \
    --repetition_penalty 1.1 --overwrite True

# Whole folders that a run was broken off right behind, before it could note that the step was done.
for name in diff:make_diff recovered:recover; do
    if [ ! -e "$run/done/${name#*:}" ]; then rm -rf "$run/${name%:*}"; fi
done

step make_diff "the tuned weights as a difference from the base, so that they can be published apart" \
    python weight_diff.py make_diff --path_raw "$run/base" --path_tuned "$run/tuned" --path_diff "$run/diff"

step recover "and back: base plus difference" \
    python weight_diff.py recover --path_raw "$run/base" --path_diff "$run/diff" --path_tuned "$run/recovered"

step verify "the recovered tensors are the tuned ones, bit for bit" \
    python weight_diff.py verify --path_diff "$run/diff" --path_tuned "$run/recovered"

# A letter from notes, a list from nothing, advice.
step tasks "three of these tasks are shown in full" \
    bash -c "grep -E '\"eval_task_(8|45|50)\"' configs/eval_tasks.jsonl > $run/shown.jsonl && wc -l < $run/shown.jsonl"

# The likeliest token each time makes a model of this size go round in circles; 1.1 is what people set against it.
step answer "their answers by the base and by the tuned model, greedy with a repetition penalty of 1.1" \
    python inference.py --base "$run/base" --model_name_or_path "$run/tuned" --data_path "$run/shown.jsonl" \
    --max_new_tokens 128 --repetition_penalty 1.1

python - "$run" << 'PY' | tee "$run/summary.txt"
import json, pathlib, sys

run = pathlib.Path(sys.argv[1])
read = lambda name: json.loads((run / name).read_text())
said = lambda step: (run / "logs" / f"{step}.txt").read_text().strip().splitlines()[-1]
new, trained, compared = read("generated/alpaca_data.json"), read("tuned/train_report.json"), read("compare/loss.json")
before, after = compared["base"], compared["tuned"]
results = {
    "generate": f"{len(new)} tasks made up by the small model (not trained on), such as: {new[0]['instruction'][:50]}",
    "export": f"{(run / 'base/model.safetensors').stat().st_size / 1e6:.0f} MB",
    "train": f"{trained['steps']} steps of 8 rows, {trained['real_tokens_per_second']:.0f} tokens/s",
    "compare": f"loss {before['loss']:.3f} -> {after['loss']:.3f}, ROUGE-L {before['rouge_l']:.3f} -> "
    f"{after['rouge_l']:.3f}, answers that end {before['answers_ended']:.0%} -> {after['answers_ended']:.0%}",
    "make_diff": f"{sum(file.stat().st_size for file in (run / 'diff').glob('*.safetensors')) / 1e6:.0f} MB",
    "recover": said("recover").split(": ", 1)[-1],
    "verify": said("verify").split(": ", 1)[0] + ": the recovered model is the tuned one, bit for bit",
    "answer": f"{run}/logs/answer.txt, shown above",
}
print(f"\n{'step':<10}{'seconds':>8}   result")
for step, result in results.items():
    print(f"{step:<10}{(run / 'done' / step).read_text().strip():>8}   {result}")
total = sum(int((run / "done" / step).read_text()) for step in results)
print(f"{'all':<10}{total:>8}   the tuned model: {run}/tuned   the diff: {run}/diff   every output: {run}/logs")
if not after["loss"] < before["loss"]:
    sys.exit(f"the loss on the evaluation tasks did not fall: something is wrong with the training step, see "
             f"{run}/logs/train.txt. After a change, rm -r {run} and make quickstart start from the beginning.")
PY
touch "$run/complete"
