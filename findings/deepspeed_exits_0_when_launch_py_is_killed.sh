#!/usr/bin/env bash
# deepspeed 0.19.8, torch 2.13.0, Python 3.11: the `deepspeed` command starts deepspeed/launcher/launch.py, which starts
# the ranks. When launch.py dies of a signal (KILL by the kernel when memory is short, USR1, USR2, HUP), `deepspeed` ends
# with 0, as after success, and the ranks go on as orphans: the command passes on positive return codes only, and that of
# a child that died of a signal is negative. A script that reads only the exit code takes a killed training for a finished
# one. Output seen:
#     launch.py got KILL: deepspeed ended with 0, ranks running: 2
# Exit code of this script: 0 while that is so.
set -euo pipefail
# shellcheck source=findings/environment.sh
. "$(dirname "$0")/environment.sh"
ranks=()
trap 'kill "${ranks[@]}" 2>/dev/null || true; rm -rf "$folder"' EXIT
install torch==2.13.0 deepspeed==0.19.8
cat >"$folder/rank.py" <<'PY'
import os
import pathlib
import sys
import time

pathlib.Path(sys.argv[-1], os.environ["RANK"]).touch()
time.sleep(600)
PY
mkdir "$folder/up"

export DS_ACCELERATOR=cpu PATH="$folder/venv/bin:$PATH"
deepspeed --num_gpus 2 --master_port 29741 "$folder/rank.py" "$folder/up" >"$folder/log" 2>&1 &
command=$!
until [[ -e $folder/up/0 && -e $folder/up/1 ]]; do
    kill -0 "$command" || { cat "$folder/log" && exit 1; }
    sleep 1
done
launch=$(pgrep -P "$command" -f deepspeed.launcher.launch)
mapfile -t ranks < <(pgrep -P "$launch")
kill -KILL "$launch"
code=0
wait "$command" || code=$?
running=$(ps -o pid= "${ranks[@]}" | wc -l)
echo "launch.py got KILL: deepspeed ended with $code, ranks running: $running"
((code == 0 && running == 2))
