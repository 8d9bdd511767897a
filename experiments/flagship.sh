#!/usr/bin/env bash
# The recipe of experiments/flagship.md: EAGLE until it stops gaining, then from that head four heads on the same further
# rows in one pass: EAGLE, HAD, HCA and HASS. Every command resumes, so the script can be started again.
#
#   experiments/flagship.sh ANSWERS FURTHER_ANSWERS OUT [overrides of both trainings]
#
# ANSWERS, FURTHER_ANSWERS: conversations as JSON lines with a `split` (hass-prepare data=questions writes such files).
# OUT: receives a folder for each head. On a GPU add `target.device=cuda trainer=gpu`; for a short test `target=tiny
# model.draft.vocab_size=null trainer.max_epochs=-1 trainer.max_steps=4`.
set -euo pipefail
answers=$1 further=$2 out=$3
shift 3
common=(data=jsonl data.max_answer_tokens=null callbacks.decoding=null logger=csv "$@")
hass-train experiment=eagle data.source.path="$answers" trainer.max_epochs=4 name=flagship_eagle "${common[@]}"
first=$(ls -d runs/flagship_eagle-*)
heads='{eagle: {loss: eagle, alignment: {depth: 1}}, had: {alignment: {depth: 1}}, hca: {loss: eagle}, hass: {}}'
hass-train experiment=hass data.source.path="$further" trainer.max_epochs=1 model.optimizer.lr=5e-5 init_from="$first" \
    name=flagship_heads "+heads=$heads" "${common[@]}"
mkdir -p "$out"
cp -r "$first/draft" "$out/first_stage"
for head in eagle had hca hass; do
  cp -r runs/flagship_heads-*/"$head/draft" "$out/$head"
done
